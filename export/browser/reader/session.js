/**
 * A bundle ready to answer: one sequence at a time.
 *
 * In: pictures and questions. Out: pieces of text and an answer with its times. Greedy: the largest logit, the lowest
 * id of equal ones. Not here: how parts run (`engine.js`).
 */
import { Engine } from './engine.js';
import { PocketError } from './errors.js';
import { readPicture } from './picture_file.js';
import { prepare } from './prepare.js';
import { positionsOf } from './positions.js';
import { RunningSequence } from './sequence.js';
import { floatsOf } from './tensors.js';
import { Detokenizer, Tokenizer } from './tokenizer.js';

export class Session {
  #engine;
  #sequence;
  #last = [];
  #pictures = 0;
  #isBusy = false;

  /** `engine` null: pictures and prompts only. */
  constructor(files, tokenizer, engine) {
    this.files = files;
    this.manifest = files.manifest;
    this.tokenizer = tokenizer;
    this.#engine = engine;
    this.#sequence = engine && new RunningSequence(this.manifest, engine);
  }

  /** `options` as those of `Engine.open`; without `ort` no part is opened. */
  static async open(files, ort, options) {
    const tokenizer = new Tokenizer(await files.data(files.manifest.tokenizer));
    return new Session(files, tokenizer, ort ? await Engine.open(ort, files, options) : null);
  }

  /** A picture file's bytes, or a `Picture`, as the vision part wants it. */
  async prepare(source) {
    const { sourcePixels, image } = this.manifest;
    const picture = source instanceof Uint8Array ? await readPicture(source, sourcePixels) : source;
    if (picture.width * picture.height > sourcePixels) {
      throw new PocketError(
        `image: ${picture.width} x ${picture.height} pixels, the limit is ${sourcePixels}; make it smaller`,
      );
    }
    return prepare(picture, image);
  }

  /** Ids of a conversation's first question. */
  promptIds(question, images) {
    return this.manifest.prompt.first(question, images, this.tokenizer);
  }

  /** Rows of position ids of a whole sequence. */
  positions(ids, images) {
    const { positions, prompt } = this.manifest;
    return positionsOf(positions, ids, prompt.image.token, images.flatMap((image) => image.grids), 0).rows;
  }

  /** Features of a picture, view after view. */
  async encode(image) {
    const { deepstack } = this.manifest;
    const views = [];
    for (const view of image.views) {
      const found = await this.#open().run('vision_encoder', view.inputs);
      const features = floatsOf(found.image_features);
      const tokens = features.length / found.image_features.dims.at(-1);
      if (tokens !== view.tokens) {
        throw new PocketError(`image: gave ${tokens} features, the manifest says ${view.tokens}; re-export`);
      }
      views.push({ tokens, features, deepstack: deepstack && floatsOf(found[deepstack.output]) });
    }
    return { views, grids: image.grids, tokens: image.tokens };
  }

  /** Logits (vocabulary) after a prompt, in a new sequence. */
  async prefill(ids, images) {
    this.#open();
    this.#sequence.begin();
    return this.#sequence.extend(ids, images);
  }

  /**
   * The answer to a first question; `source` null: without a picture. `tokens`: the most of them; `ignoreStop`: as
   * many in any case. `onText` gets pieces as they come; `signal`: an AbortSignal that ends the answer.
   */
  ask(question, source, options) {
    return this.#alone(() => this.#answer(question, source, options, null));
  }

  /** The answer to a further question, after `ask`; it goes on from the state. */
  askFurther(question, source, options) {
    return this.#alone(() => {
      if (!this.#last.length) throw new PocketError('question: nothing was asked before; start anew');
      return this.#answer(question, source, options, this.#last.at(-1));
    });
  }

  async close() {
    await this.#engine?.close();
    this.#engine = null;
  }

  #open() {
    if (!this.#engine) throw new PocketError('session: has no parts open; open the bundle again');
    return this.#engine;
  }

  async #alone(work) {
    this.#open();
    if (this.#isBusy) throw new PocketError('session: is answering; wait for the end or stop it');
    this.#isBusy = true;
    try {
      return await work();
    } finally {
      this.#isBusy = false;
    }
  }

  /** `after`: the id that the last answer ended with, which has not been run yet; null for a first question. */
  async #answer(question, source, options, after) {
    const times = { decodeMs: [] };
    const start = performance.now();
    const since = (mark) => performance.now() - mark;
    const images = source ? [await this.prepare(source)] : [];
    this.#count(images, after);
    times.preprocessMs = since(start);
    const ids = this.#ids(question, images, after);
    [times.promptTokens, times.imageTokens] = [ids.length, images.reduce((sum, image) => sum + image.tokens, 0)];
    let mark = performance.now();
    const features = [];
    for (const image of images) features.push(await this.encode(image));
    times.encodeMs = images.length ? since(mark) : 0;
    mark = performance.now();
    this.#last = []; // a step that fails leaves a sequence that nothing can go on from
    if (after === null) this.#sequence.begin();
    const logits = await this.#sequence.extend(ids, features);
    times.prefillMs = since(mark);
    return this.#generate(logits, options ?? {}, times, start);
  }

  #count(images, after) {
    const pictures = (after === null ? 0 : this.#pictures) + images.length;
    if (pictures > this.manifest.images) {
      throw new PocketError(`question: has ${pictures} pictures, this bundle takes ${this.manifest.images} at most`);
    }
    this.#pictures = pictures;
  }

  #ids(question, images, after) {
    if (after === null) return this.promptIds(question, images);
    const ended = this.manifest.stopIds.has(after) ? after : null;
    return [after, ...this.manifest.prompt.further(question, images, this.tokenizer, ended)];
  }

  async #generate(first, { tokens: most = 256, ignoreStop = false, onText = () => {}, signal }, times, start) {
    const detokenizer = new Detokenizer(this.tokenizer);
    const ids = [];
    let [logits, text, finish] = [first, '', null];
    while (!finish) {
      const id = largest(logits);
      ids.push(id);
      if (!ignoreStop && this.manifest.stopIds.has(id)) finish = 'stop';
      else if (ids.length >= most) finish = 'length';
      else if (this.#sequence.length >= this.manifest.context) finish = 'context';
      let piece = finish === 'stop' ? '' : detokenizer.push(id);
      if (!finish && signal?.aborted) finish = 'cancelled';
      if (finish) piece += detokenizer.flush();
      if (piece || finish) times.ttftMs ??= performance.now() - start;
      text += piece;
      if (piece) await onText(piece);
      if (finish) break;
      const mark = performance.now();
      logits = await this.#sequence.extend([id], []);
      times.decodeMs.push(performance.now() - mark);
    }
    times.endToEndMs = performance.now() - start;
    this.#last = ids;
    return { text, ids, finish, times };
  }
}

/** The index of the largest logit, the first of equal ones. */
export function largest(logits) {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  return best;
}
