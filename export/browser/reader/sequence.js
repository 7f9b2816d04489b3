/**
 * The sequence that the decoder's state holds: a prompt at once (or chunk by chunk), then token by token.
 *
 * In: ids and features of pictures. Out: logits. Not here: the parts (`engine.js`), answers (`session.js`).
 */
import { PocketError } from './errors.js';
import { positionsOf } from './positions.js';
import { floatsOf } from './tensors.js';

const int64 = (values, shape) => ({ dtype: 'int64', shape, data: values });

export class RunningSequence {
  #manifest;
  #engine;
  #position = 0;

  constructor(manifest, engine) {
    this.#manifest = manifest;
    this.#engine = engine;
  }

  get length() {
    return this.#engine.length;
  }

  /** A new sequence. */
  begin() {
    this.#engine.reset();
    this.#engine.length = 0;
    this.#position = 0;
  }

  /** Append ids with the features of the pictures among them; logits (vocabulary) of the last one. */
  async extend(ids, images) {
    const { context, positions, fixed, prompt } = this.#manifest;
    if (!ids.length) throw new PocketError('prompt: has no tokens; give one or more');
    if (this.length + ids.length > context) {
      throw new PocketError(`prompt: ${this.length + ids.length} tokens, the context holds ${context}; ask for less`);
    }
    const slots = ids.flatMap((id, place) => (id === prompt.image.token ? [place] : []));
    const given = images.reduce((sum, image) => sum + image.tokens, 0);
    if (slots.length !== given) throw new PocketError(`prompt: ${slots.length} image tokens, ${given} features`);
    const grids = images.flatMap((image) => image.grids);
    const { rows, next } = positionsOf(positions, ids, prompt.image.token, grids, this.#position);
    const views = images.flatMap((image) => image.views);
    const size = fixed?.chunk ?? ids.length;
    let [logits, taken] = [null, 0];
    for (let first = 0; first < ids.length; first += size) {
      const last = Math.min(first + size, ids.length);
      const places = slots.filter((slot) => slot >= first && slot < last).map((slot) => slot - first);
      const step = { ids: ids.slice(first, last), rows: rows.map((row) => row.slice(first, last)), places, taken };
      logits = await this.#step(step, views);
      taken += places.length;
    }
    this.#position = next;
    return logits;
  }

  /** One run. `places`: where image features go, beginning with number `taken` of all that the views have. */
  async #step({ ids, rows, places, taken }, views) {
    const { fixed, deepstack, types } = this.#manifest;
    const role = ids.length > 1 && this.#engine.has('decoder_prefill') ? 'decoder_prefill' : 'decoder';
    const size = fixed && ids.length > 1 ? fixed.chunk : ids.length;
    const padded = (values) => [...values, ...new Array(size - values.length).fill(0)];
    const { embeds, hidden } = await this.#embed(ids, size);
    const stack = deepstack ? new Float32Array(deepstack.layers * size * hidden) : null;
    put(views, places, taken, hidden, embeds, stack, size);
    const values = {
      inputs_embeds: { dtype: 'float32', shape: [1, size, hidden], data: embeds },
      position_ids: int64(rows.flatMap(padded), rows.length === 1 ? [1, size] : [rows.length, 1, size]),
      num_logits_to_keep: int64([1], []),
    };
    if (fixed) Object.assign(values, this.#masks(ids.length));
    else values.attention_mask = int64(new Array(this.length + size).fill(1), [1, this.length + size]);
    if (types) values[types] = int64(typesOf(places, size), [1, size]);
    if (deepstack) {
      values[deepstack.input] = { dtype: 'float32', shape: [deepstack.layers, 1, size, hidden], data: stack };
    }
    const { logits } = await this.#engine.run(role, values, ids.length);
    this.#engine.length += ids.length;
    const found = floatsOf(logits);
    return found.subarray(found.length - logits.dims.at(-1));
  }

  /** Embeddings of ids; in graphs of fixed shapes of a whole chunk, of which the first `size` are given. */
  async #embed(ids, size) {
    const [spec] = this.#manifest.part('embed_tokens').inputs;
    const most = this.#manifest.fixed?.chunk ?? size;
    const fed = [...ids, ...new Array(most - ids.length).fill(0)];
    const found = await this.#engine.run('embed_tokens', { [spec.name]: int64(fed, [1, most]) });
    const [tensor] = Object.values(found);
    const hidden = tensor.dims.at(-1);
    return { embeds: floatsOf(tensor).subarray(0, size * hidden), hidden };
  }

  #masks(count) {
    const { context, fixed } = this.#manifest;
    const data = new Float32Array(context).fill(fixed.masked);
    data.fill(0, 0, this.length);
    return {
      past_mask: { dtype: 'float32', shape: [1, 1, 1, context], data },
      logits_index: int64([count - 1], [1]),
    };
  }
}

function typesOf(places, size) {
  const found = new Array(size).fill(0);
  for (const place of places) found[place] = 1;
  return found;
}

/** Image features over embeddings, and deepstack's to its places. */
function put(views, places, taken, hidden, embeds, stack, size) {
  let [first, n] = [0, 0];
  for (const view of views) {
    for (; n < places.length && taken + n < first + view.tokens; n++) {
      const from = taken + n - first;
      embeds.set(view.features.subarray(from * hidden, (from + 1) * hidden), places[n] * hidden);
      const layers = stack ? stack.length / (size * hidden) : 0;
      for (let layer = 0; layer < layers; layer++) {
        const start = (layer * view.tokens + from) * hidden;
        stack.set(view.deepstack.subarray(start, start + hidden), (layer * size + places[n]) * hidden);
      }
    }
    first += view.tokens;
  }
}
