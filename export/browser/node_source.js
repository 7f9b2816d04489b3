/**
 * A bundle's files on disk, for Node. A browser does not load this.
 *
 * In: a directory. Out: bytes. A symbolic link that leads out of the directory is refused.
 */
import { readFile, realpath } from 'node:fs/promises';
import path from 'node:path';

import { PocketError } from './reader/errors.js';

export class DiskSource {
  #directory;

  constructor(directory) {
    this.#directory = directory;
  }

  async read(name) {
    let [found, inside] = [null, null];
    try {
      inside = await realpath(this.#directory);
      found = await realpath(path.join(inside, name));
    } catch {
      throw new PocketError(`${name}: is not there; copy the bundle again`);
    }
    if (!found.startsWith(inside + path.sep)) throw new PocketError(`${name}: leads out of the bundle; copy the file in`);
    return new Uint8Array(await readFile(found));
  }
}
