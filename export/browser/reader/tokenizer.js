/**
 * Text to ids and back, by a byte-level BPE in the file format of the tokenizers library.
 *
 * In: `tokenizer.json`. Out: ids equal to that library's. What this reader would not do as it does is refused.
 * Not here: cutting text into words (`pretokenizer.js`).
 */
import { PocketError } from './errors.js';
import { parse } from './fields.js';
import { PreTokenizer } from './pretokenizer.js';

/** The character that stands for each byte in a byte-level vocabulary (GPT-2's table). */
const CHARACTERS = (() => {
  const isPlain = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(isPlain(byte) ? byte : next++));
})();
const BYTES = new Map(CHARACTERS.map((character, byte) => [character, byte]));
const encoder = new TextEncoder();

/** The bytes that a token's text stands for; a text with another character is taken as it is. */
function bytesOf(token) {
  const found = Array.from(token, (character) => BYTES.get(character));
  return found.includes(undefined) ? encoder.encode(token) : Uint8Array.from(found);
}

const refuse = (what) => new PocketError(`tokenizer.json: ${what}`);

function check({ model, decoder, added_tokens: added }) {
  const affixes = [model?.continuing_subword_prefix, model?.end_of_word_suffix];
  const isPlain = model?.type === 'BPE' && affixes.every((affix) => !affix) && !model.dropout && !model.byte_fallback;
  if (!isPlain) throw refuse(`model ${model?.type} with its settings is no plain byte-level BPE`);
  if (decoder?.type !== 'ByteLevel') throw refuse(`decoder ${decoder?.type ?? 'none'} is unknown to this reader`);
  for (const token of added ?? []) {
    if (token.lstrip || token.rstrip || token.single_word) {
      throw refuse(`${token.content} takes spaces or words around it, which this reader cannot do`);
    }
  }
}

/** Whether texts are composed (NFC) first. */
function composes(step) {
  if (!step) return false;
  if (step.type === 'NFC') return true;
  if (step.type === 'Sequence') return step.normalizers.map(composes).includes(true);
  throw refuse(`normalizer ${step.type} is unknown to this reader`);
}

function mergesOf(model, vocabulary, size) {
  const merges = new Map();
  model.merges.forEach((merge, rank) => {
    const pair = typeof merge === 'string' ? merge.split(' ') : merge;
    const [first, second, id] = [pair[0], pair[1], pair.join('')].map((text) => vocabulary.get(text));
    if (pair.length !== 2 || [first, second, id].includes(undefined)) {
      throw refuse(`merge ${rank} is of tokens that the vocabulary lacks`);
    }
    merges.set(first * size + second, { rank, id });
  });
  return merges;
}

export class Tokenizer {
  #added;
  #special;
  #vocabulary;
  #texts = new Map();
  #byteIds;
  #merges;
  #size;
  #ignoresMerges;
  #composes;
  #preTokenizer;

  constructor(bytes) {
    const file = parse(bytes, 'tokenizer.json');
    check(file);
    this.#preTokenizer = new PreTokenizer(file.pre_tokenizer);
    this.#composes = composes(file.normalizer);
    this.#ignoresMerges = file.model.ignore_merges === true;
    this.#vocabulary = new Map(Object.entries(file.model.vocab));
    this.#byteIds = CHARACTERS.map((character) => {
      const id = this.#vocabulary.get(character);
      if (id === undefined) throw refuse(`the vocabulary lacks the byte ${character}`);
      return id;
    });
    for (const [text, id] of this.#vocabulary) this.#texts.set(id, bytesOf(text));
    this.#size = Math.max(...this.#texts.keys()) + 1;
    this.#merges = mergesOf(file.model, this.#vocabulary, this.#size);
    const added = file.added_tokens ?? [];
    for (const token of added) this.#texts.set(token.id, bytesOf(token.content));
    this.#special = new Set(added.filter((token) => token.special).map((token) => token.id));
    // the longest first, so that it wins where two begin alike
    this.#added = added.filter((token) => token.content).sort((a, b) => b.content.length - a.content.length);
  }

  /** Ids of a text: special tokens in it become themselves, none is added. */
  encode(text) {
    if (/\p{Surrogate}/u.test(text)) throw new PocketError('question: is no valid Unicode text; type it anew');
    return this.#split(text, false).flatMap((piece) => {
      if (typeof piece === 'number') return piece;
      const composed = this.#composes ? piece.normalize('NFC') : piece;
      return this.#split(composed, true).flatMap((inner) => {
        if (typeof inner === 'number') return inner;
        return this.#preTokenizer.pieces(inner).flatMap((word) => this.#word(word));
      });
    });
  }

  /** The text of ids, special tokens left out. */
  decode(ids) {
    const stream = new Detokenizer(this);
    return ids.map((id) => stream.push(id)).join('') + stream.flush();
  }

  /** What an id stands for; nothing for a special token. */
  bytes(id) {
    return this.#special.has(id) ? new Uint8Array(0) : (this.#texts.get(id) ?? new Uint8Array(0));
  }

  /** Ids of added tokens and the text between them; `normalized`: which of them are looked for. */
  #split(text, normalized) {
    const wanted = this.#added.filter((token) => token.normalized === normalized);
    const out = [];
    let [held, place] = [0, 0];
    while (place < text.length) {
      const found = wanted.find((token) => text.startsWith(token.content, place));
      if (!found) {
        place += 1;
        continue;
      }
      if (place > held) out.push(text.slice(held, place));
      out.push(found.id);
      place += found.content.length;
      held = place;
    }
    if (held < text.length) out.push(text.slice(held));
    return out;
  }

  /** Byte pairs, the one of lowest rank first, the leftmost of equal ones. */
  #word(word) {
    const bytes = encoder.encode(word);
    if (this.#ignoresMerges) {
      const id = this.#vocabulary.get(Array.from(bytes, (byte) => CHARACTERS[byte]).join(''));
      if (id !== undefined) return [id];
    }
    const ids = Array.from(bytes, (byte) => this.#byteIds[byte]);
    for (;;) {
      let [best, at] = [null, 0];
      for (let place = 0; place + 1 < ids.length; place++) {
        const merge = this.#merges.get(ids[place] * this.#size + ids[place + 1]);
        if (merge && merge.rank < (best?.rank ?? Infinity)) [best, at] = [merge, place];
      }
      if (!best) return ids;
      ids.splice(at, 2, best.id);
    }
  }
}

/** Text of ids as they come, never half a character; all pieces joined are `decode` of all ids. */
export class Detokenizer {
  #decoder = new TextDecoder('utf-8', { ignoreBOM: true });

  constructor(tokenizer) {
    this.tokenizer = tokenizer;
  }

  push(id) {
    return this.#decoder.decode(this.tokenizer.bytes(id), { stream: true });
  }

  /** What is left at the end; an unfinished character is U+FFFD. */
  flush() {
    return this.#decoder.decode();
  }
}
