/**
 * The parts of a bundle in onnxruntime-web (or onnxruntime-node, whose interface is the same), and the state.
 *
 * In: files and tensors `{dtype, shape, data}`. Out: tensors of onnxruntime. Not here: tokens (`sequence.js`).
 *
 * A state is handed from step to step; on a GPU it stays there. In graphs of fixed shapes it is a buffer of ours.
 */
import { PocketError } from './errors.js';
import { stateShape } from './manifest.js';
import { arrayOf, zeros } from './tensors.js';

const product = (shape) => shape.reduce((all, size) => all * size, 1);

export class Engine {
  #ort;
  #runs = new Map();
  #state = new Map();

  constructor(ort, manifest) {
    this.#ort = ort;
    this.manifest = manifest;
    this.reset();
  }

  /**
   * `ort`: the module of onnxruntime. `providers`: its names, such as ['webgpu', 'wasm']. `leave`: roles that are
   * not opened. A part's bytes are hashed and given to onnxruntime, then forgotten.
   */
  static async open(ort, files, { providers, leave = [], onPart = () => {} }) {
    const { manifest } = files;
    const engine = new Engine(ort, manifest);
    for (const part of manifest.parts) {
      if (leave.includes(part.role)) continue;
      const [bytes, ...data] = await Promise.all([part, ...part.data].map((file) => files.data(file)));
      onPart(part.role);
      const options = { executionProviders: providers, logSeverityLevel: 3 };
      if (data.length) {
        options.externalData = part.data.map(({ path }, n) => ({ path: path.split('/').at(-1), data: data[n] }));
      }
      const isDecoder = part.role.startsWith('decoder');
      if (isDecoder && providers[0] === 'webgpu' && !manifest.fixed) {
        const outputs = manifest.states.map((each) => [each.output, 'gpu-buffer']);
        options.preferredOutputLocation = Object.fromEntries(outputs);
      }
      engine.#runs.set(part.role, { part, session: await engine.#create(part, bytes, options) });
    }
    return engine;
  }

  async #create(part, bytes, options) {
    let session;
    try {
      session = await this.#ort.InferenceSession.create(bytes, options);
    } catch (error) {
      const [reason] = String(error.message ?? error).split('\n');
      throw new PocketError(`${part.path}: onnxruntime cannot open it (${reason})`);
    }
    const differing = [
      ...part.inputs.filter(({ name }) => !session.inputNames.includes(name)),
      ...part.outputs.filter(({ name }) => !session.outputNames.includes(name)),
    ];
    if (differing.length) {
      throw new PocketError(`${part.path}: has no ${differing[0].name}, which the manifest lists; re-export`);
    }
    return session;
  }

  has(role) {
    return this.#runs.has(role);
  }

  /** An empty state. */
  reset() {
    for (const tensor of this.#state.values()) tensor.dispose?.();
    this.#state.clear();
    for (const spec of this.manifest.states) {
      const shape = stateShape(spec, 0).map((size, axis) => (this.manifest.fixed ? spec.shape[axis] : size));
      this.#state.set(spec.input, this.#tensor(spec.dtype, zeros(spec.dtype, product(shape)), shape));
    }
  }

  #tensor(dtype, data, shape) {
    return new this.#ort.Tensor(dtype, data, shape);
  }

  /**
   * Outputs by name of a part on those of the values `{dtype, shape, data}` that it lists as inputs. A decoder's
   * state joins them; `count`: how many new tokens it takes.
   */
  async run(role, values, count = 0) {
    const { part, session } = this.#runs.get(role);
    const isDecoder = role.startsWith('decoder');
    const feeds = {};
    for (const spec of part.inputs) {
      if (isDecoder && this.#state.has(spec.name)) {
        feeds[spec.name] = this.#state.get(spec.name);
        continue;
      }
      const value = values[spec.name];
      if (!value) throw new PocketError(`${part.path}: wants ${spec.name}, which this reader does not fill; re-export`);
      const isFixed = spec.shape.every((size) => typeof size === 'number');
      if (isFixed && spec.shape.join() !== value.shape.join()) {
        throw new PocketError(
          `${part.path}: takes ${spec.name} [${spec.shape}] only, got [${value.shape}]; re-export or ask otherwise`,
        );
      }
      feeds[spec.name] = this.#tensor(spec.dtype, arrayOf(spec.dtype, value.data), value.shape);
    }
    const found = await session.run(feeds);
    if (isDecoder) this.#keep(found, count);
    return found;
  }

  #keep(found, count) {
    for (const spec of this.manifest.states) {
      const old = this.#state.get(spec.input);
      if (this.manifest.fixed) {
        appendRows(old, found[spec.output], spec.axis, this.length, count);
      } else {
        old.dispose?.();
        this.#state.set(spec.input, found[spec.output]);
      }
    }
  }

  /** Tokens that the state holds before a step; whoever runs the decoder sets it. */
  length = 0;

  async close() {
    for (const { session } of this.#runs.values()) await session.release?.();
    this.#runs.clear();
  }
}

/** Copy the first `count` entries of `from` along an axis to `place` of the buffer `to`. */
function appendRows(to, from, axis, place, count) {
  const inner = product(to.dims.slice(axis + 1));
  const outer = product(to.dims.slice(0, axis));
  const [wide, narrow] = [to.dims[axis] * inner, from.dims[axis] * inner];
  for (let row = 0; row < outer; row++) {
    to.data.set(from.data.subarray(row * narrow, row * narrow + count * inner), row * wide + place * inner);
  }
}
