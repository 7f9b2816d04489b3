/**
 * A bundle's files: over http or from a folder that somebody chose; each is what the manifest says.
 *
 * In: where the bundle lies. Out: bytes whose hash is right. Not here: what is in them.
 */
import { sha256 } from './digest.js';
import { PocketError } from './errors.js';
import { Manifest } from './manifest.js';

/** Over http(s). `onBytes(path, got)` is called as they come; `got` is the number of new bytes. */
export class HttpSource {
  #base;
  #onBytes;

  constructor(base, onBytes = () => {}) {
    this.#base = new URL(base, globalThis.location?.href);
    this.#onBytes = onBytes;
  }

  async read(path) {
    const url = new URL(path.split('/').map(encodeURIComponent).join('/'), this.#base);
    let response;
    try {
      response = await fetch(url);
    } catch {
      throw new PocketError(`${path}: cannot be fetched; is the server there?`);
    }
    if (!response.ok) throw new PocketError(`${path}: the server says ${response.status}; copy the bundle again`);
    const pieces = [];
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      pieces.push(value);
      this.#onBytes(path, value.length);
    }
    return new Uint8Array(await new Blob(pieces).arrayBuffer());
  }
}

/** Files of `<input type="file" webkitdirectory>`. */
export class FolderSource {
  #files;

  constructor(files) {
    // the first name is that of the folder that was chosen
    this.#files = new Map(Array.from(files, (file) => [file.webkitRelativePath.split('/').slice(1).join('/'), file]));
  }

  async read(path) {
    const file = this.#files.get(path);
    if (!file) throw new PocketError(`${path}: is not in that folder; choose a bundle's folder`);
    return new Uint8Array(await file.arrayBuffer());
  }
}

export class BundleFiles {
  #source;

  constructor(source, manifest, hash) {
    this.#source = source;
    this.manifest = manifest;
    /** SHA-256 of manifest.json. */
    this.sha256 = hash;
  }

  static async open(source) {
    const bytes = await source.read('manifest.json');
    return new BundleFiles(source, new Manifest(bytes), await sha256(bytes));
  }

  /** The bytes of `{path, sha256}`. */
  async data({ path, sha256: wanted }) {
    const bytes = await this.#source.read(path);
    const found = await sha256(bytes);
    if (found !== wanted) {
      throw new PocketError(
        `${path}: sha256 ${found.slice(0, 8)}.., manifest says ${wanted.slice(0, 8)}..; copy the bundle again`,
      );
    }
    return bytes;
  }
}
