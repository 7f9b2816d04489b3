/**
 * Cuts a text into the pieces that merges stay within: the `pre_tokenizer` section of `tokenizer.json`.
 *
 * In: that section, then texts. Out: pieces, which together are the text. Unknown steps are refused by name.
 */
import { PocketError } from './errors.js';

/** GPT-2's pattern, which `ByteLevel` uses unless told otherwise. */
const BYTE_LEVEL = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`;

/** Letters beside upper and lower case that are equal when case is ignored. */
const ALSO = { s: '\u017f', k: '\u212a' };

/** `(?i:...)` written out, which older browsers lack; of what such a group holds, letters alone have a case. */
function withoutCaseGroups(pattern) {
  const either = (letter) => {
    const low = letter.toLowerCase();
    return `[${low}${low.toUpperCase()}${ALSO[low] ?? ''}]`;
  };
  return pattern.replace(/\(\?i:([^()[\]\\]*)\)/g, (_, inner) => `(?:${inner.replace(/[a-z]/gi, either)})`);
}

/** The tokenizers library means all white space of Unicode by \s; JavaScript has U+FEFF for U+0085. */
function expression(pattern) {
  const same = withoutCaseGroups(pattern)
    .replaceAll(String.raw`\s`, String.raw`\p{White_Space}`)
    .replaceAll(String.raw`\S`, String.raw`\P{White_Space}`);
  try {
    return new RegExp(same, 'gu');
  } catch {
    throw new PocketError(`tokenizer.json: pattern ${pattern} is none that this reader knows`);
  }
}

/** Matches and what is between them. */
function isolate(text, pattern) {
  const out = [];
  let place = 0;
  for (const match of text.matchAll(pattern)) {
    if (!match[0]) continue;
    if (match.index > place) out.push(text.slice(place, match.index));
    out.push(match[0]);
    place = match.index + match[0].length;
  }
  if (place < text.length) out.push(text.slice(place));
  return out;
}

function cutsOf(step) {
  switch (step?.type) {
    case 'Sequence':
      return step.pretokenizers.flatMap(cutsOf);
    case 'Digits':
      return [step.individual_digits ? /\p{N}/gu : /\p{N}+/gu];
    case 'Split':
      if (step.behavior !== 'Isolated' || step.invert || typeof step.pattern?.Regex !== 'string') {
        throw new PocketError(`tokenizer.json: Split ${step.behavior ?? ''} is unknown to this reader`);
      }
      return [expression(step.pattern.Regex)];
    case 'ByteLevel':
      if (step.add_prefix_space) {
        throw new PocketError('tokenizer.json: ByteLevel with add_prefix_space is unknown to this reader');
      }
      return step.use_regex === false ? [] : [expression(BYTE_LEVEL)];
    default:
      throw new PocketError(`tokenizer.json: pre_tokenizer ${step?.type ?? 'none'} is unknown to this reader`);
  }
}

const endsInBytes = (step) =>
  step?.type === 'ByteLevel' || (step?.type === 'Sequence' && endsInBytes(step.pretokenizers.at(-1)));

export class PreTokenizer {
  #cuts;

  constructor(step) {
    this.#cuts = cutsOf(step);
    if (!endsInBytes(step)) {
      throw new PocketError('tokenizer.json: pre_tokenizer does not end in ByteLevel; unknown to this reader');
    }
  }

  pieces(text) {
    return this.#cuts.reduce((pieces, cut) => pieces.flatMap((piece) => isolate(piece, cut)), text ? [text] : []);
  }
}
