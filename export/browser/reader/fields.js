/**
 * The members of a JSON object, each taken once; `finish` refuses what is left, by name.
 *
 * In: parsed JSON. Out: checked values. Not here: what the keys mean.
 */
import { PocketError } from './errors.js';

/** JSON of a file's bytes. */
export function parse(bytes, name) {
  try {
    return JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
  } catch {
    throw new PocketError(`${name}: is no JSON; copy the bundle again`);
  }
}

export class Fields {
  #left;

  constructor(value, place) {
    if (value === null || typeof value !== 'object' || Array.isArray(value)) {
      throw new PocketError(`${place}: is no object; re-export`);
    }
    this.place = place;
    this.#left = new Map(Object.entries(value));
  }

  /** The value of a key; absent and null are the same. */
  find(key) {
    const found = this.#left.get(key);
    this.#left.delete(key);
    return found === null ? undefined : found;
  }

  #of(key, isRight, wanted) {
    const found = this.find(key);
    if (!isRight(found)) throw this.wrong(key, wanted);
    return found;
  }

  string(key) {
    return this.#of(key, (value) => typeof value === 'string', 'a text');
  }

  int(key) {
    return this.#of(key, Number.isSafeInteger, 'an integer');
  }

  number(key) {
    return this.#of(key, Number.isFinite, 'a number');
  }

  bool(key, fallback) {
    const found = this.find(key) ?? fallback;
    if (typeof found !== 'boolean') throw this.wrong(key, 'true or false');
    return found;
  }

  array(key) {
    return this.#of(key, Array.isArray, 'a list');
  }

  #all(key, isRight, wanted) {
    const found = this.array(key);
    if (!found.every(isRight)) throw this.wrong(key, wanted);
    return found;
  }

  ints(key) {
    return this.#all(key, Number.isSafeInteger, 'integers');
  }

  numbers(key) {
    return this.#all(key, Number.isFinite, 'numbers');
  }

  strings(key) {
    return this.#all(key, (value) => typeof value === 'string', 'texts');
  }

  /** A list of lists of integers. */
  rows(key) {
    const isRow = (row) => Array.isArray(row) && row.every(Number.isSafeInteger);
    return this.#all(key, isRow, 'rows of integers');
  }

  fields(key) {
    return new Fields(this.find(key), `${this.place}.${key}`);
  }

  /** What `read` makes of an object that may be absent. */
  optional(key, read) {
    const found = this.find(key);
    return found === undefined ? null : read(new Fields(found, `${this.place}.${key}`));
  }

  /** The objects of a list. */
  list(key) {
    return this.array(key).map((value, index) => new Fields(value, `${this.place}.${key}[${index}]`));
  }

  /** Keys whose value this reader has no use for. */
  skip(...keys) {
    for (const key of keys) this.#left.delete(key);
  }

  /** `found`, when every key was read. */
  finish(found) {
    const [key] = [...this.#left.keys()].sort();
    if (key !== undefined) {
      throw new PocketError(`${this.place}: has the unknown key ${key}; this reader is older than the bundle`);
    }
    return found;
  }

  /** The operation must be this one. */
  expect(...known) {
    const name = this.string('op');
    if (!known.includes(name)) {
      throw new PocketError(`${this.place}: operation ${name} is unknown to this reader; take a newer page`);
    }
    return name;
  }

  wrong(key, wanted) {
    return new PocketError(`${this.place}.${key}: wanted ${wanted}; re-export`);
  }
}
