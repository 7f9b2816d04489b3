/**
 * `manifest.json`: what this reader needs of it. docs/bundle.md is the contract.
 *
 * In: bytes. Out: a checked `Manifest`. Not here: files (`files.js`), running anything.
 */
import { PocketError } from './errors.js';
import { Fields, parse } from './fields.js';
import { IMAGE_OPERATIONS, readImage } from './image_spec.js';
import { Prompt } from './prompt.js';

const POSITIONS = ['positions.1d@1', 'positions.mrope@1'];
const ATTENTION = ['attention.causal@1', 'attention.image_bidirectional@1'];

/** Every operation that this reader carries out. */
export const KNOWN = new Set([
  ...IMAGE_OPERATIONS, ...POSITIONS, ...ATTENTION, 'replace_tokens@1', 'deepstack.add@1', 'cache.static@1',
]);

const ITEM_BYTES = { float32: 4, float16: 2, int64: 8, int32: 4, int8: 1, uint8: 1, bool: 1 };

/** A path that stays inside of the bundle, as it is written. */
function confined(path, place) {
  const parts = path.split('/');
  if (/[\\:]/.test(path) || parts.some((part) => ['', '.', '..'].includes(part))) {
    throw new PocketError(`${place}: path ${path} must be relative and stay inside the bundle`);
  }
  return path;
}

/** A file of the bundle with its hash. */
export function readFile(fields) {
  const path = confined(fields.string('path'), fields.place);
  return fields.finish({ path, sha256: fields.string('sha256'), bytes: fields.int('bytes') });
}

function tensor(fields) {
  const dtype = fields.string('dtype');
  if (!Object.hasOwn(ITEM_BYTES, dtype)) throw fields.wrong('dtype', Object.keys(ITEM_BYTES).join(', '));
  return fields.finish({ name: fields.string('name'), dtype, shape: fields.array('shape') });
}

function part(fields) {
  let [bits, parameters] = [0, 0];
  for (const row of fields.list('bits')) {
    const count = row.int('parameters');
    bits += row.int('bits') * count;
    parameters += count;
  }
  const data = fields.find('data') ?? [];
  if (!Array.isArray(data)) throw fields.wrong('data', 'a list');
  fields.skip('fallbacks', 'onnx');
  return fields.finish({
    role: fields.string('role'),
    path: confined(fields.string('path'), fields.place),
    sha256: fields.string('sha256'),
    bytes: fields.int('bytes'),
    inputs: fields.list('inputs').map(tensor),
    outputs: fields.list('outputs').map(tensor),
    data: data.map((each, index) => readFile(new Fields(each, `${fields.place}.data[${index}]`))),
    bits: parameters ? bits / parameters : null,
  });
}

function state(fields) {
  fields.skip('in_place', 'padding_side', 'rewindable');
  const dtype = fields.string('dtype');
  if (!Object.hasOwn(ITEM_BYTES, dtype)) throw fields.wrong('dtype', Object.keys(ITEM_BYTES).join(', '));
  const found = fields.finish({
    input: fields.string('input'),
    output: fields.string('output'),
    kind: fields.string('kind'),
    dtype,
    shape: fields.array('shape'),
    axis: fields.find('sequence_axis') ?? null,
  });
  if (!['kv', 'conv'].includes(found.kind)) throw fields.wrong('kind', `kv or conv, not ${found.kind}`);
  return found;
}

/** A state's shape with so many tokens in it; what else is named is one sequence. */
export function stateShape(spec, length) {
  return spec.shape.map((size, axis) => (axis === spec.axis ? length : typeof size === 'number' ? size : 1));
}

function deepstack(fields) {
  fields.expect('deepstack.add@1');
  const layers = fields.int('layers');
  return fields.finish({ layers, output: fields.string('output'), input: fields.string('input') });
}

function fixed(fields) {
  fields.expect('cache.static@1');
  return fields.finish({ chunk: fields.int('chunk'), masked: fields.number('masked') });
}

function refuseUnknown(requires) {
  const unknown = requires.filter((name) => !KNOWN.has(name));
  if (unknown.length) {
    throw new PocketError(
      `manifest.json: needs ${unknown.join(', ')}, unknown to this reader; take a newer page or another target`,
    );
  }
}

export class Manifest {
  constructor(bytes) {
    const fields = new Fields(parse(bytes, 'manifest.json'), 'manifest.json');
    if (fields.int('manifest_version') !== 1) throw fields.wrong('manifest_version', '1');
    refuseUnknown(fields.strings('requires'));
    this.name = fields.string('name');
    this.format = fields.string('format');
    if (this.format !== 'onnx') {
      throw new PocketError(`manifest.json: format ${this.format}, this reader runs onnx; export for the browser`);
    }
    this.precision = fields.string('precision');
    this.target = fields.find('target') ?? null;
    this.providers = fields.strings('providers');
    this.image = readImage(fields.fields('image'));
    this.prompt = new Prompt(fields.fields('prompt'));
    this.#decoder(fields);
    this.#limits(fields.fields('limits'));
    this.#tokenizer(fields.fields('tokenizer'));
    this.parts = fields.list('parts').map(part);
    for (const role of ['vision_encoder', 'embed_tokens', 'decoder']) this.part(role);
    this.conformance = readFile(fields.fields('conformance'));
    this.sourceSha256 = fields.fields('source').string('sha256');
    fields.skip('flavour', 'coreml', 'tool_versions', 'parity', 'notes');
    fields.finish();
  }

  #decoder(fields) {
    const merge = fields.fields('merge');
    merge.expect('replace_tokens@1');
    if (merge.int('token') !== this.prompt.image.token) throw merge.wrong('token', `${this.prompt.image.token}`);
    merge.finish();
    this.deepstack = fields.optional('deepstack', deepstack);
    const positions = fields.fields('positions');
    this.positions = positions.expect(...POSITIONS);
    positions.skip('sections', 'interleaved');
    positions.finish();
    const attention = fields.fields('attention');
    const isCausal = attention.expect(...ATTENTION) === ATTENTION[0];
    /** The decoder's input that tells image tokens from others, if it wants one. */
    this.types = isCausal ? null : attention.string('input');
    attention.skip('windows');
    attention.finish();
    this.fixed = fields.optional('static', fixed);
    this.states = fields.list('state').map(state);
  }

  #limits(limits) {
    this.context = limits.int('context');
    this.images = limits.int('images');
    this.sourcePixels = limits.int('source_pixels');
    limits.skip('image_tokens');
    limits.finish();
  }

  #tokenizer(text) {
    if (text.string('type') !== 'tokenizers-json') throw text.wrong('type', 'tokenizers-json');
    this.tokenizer = readFile(text.fields('file'));
    this.stopIds = new Set(text.ints('stop_ids'));
    text.finish();
  }

  /** A part by its role; null when it need not be there and is not. */
  find(role) {
    return this.parts.find((each) => each.role === role) ?? null;
  }

  part(role) {
    const found = this.find(role);
    if (!found) throw new PocketError(`manifest.json: has no part ${role}; re-export`);
    return found;
  }

  /** Bytes of the state with so many tokens in it. */
  stateBytes(tokens) {
    const size = (spec) => stateShape(spec, tokens).reduce((product, each) => product * each, ITEM_BYTES[spec.dtype]);
    return this.states.reduce((sum, spec) => sum + size(spec), 0);
  }
}
