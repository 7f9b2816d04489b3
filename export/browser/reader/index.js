/** The reader: everything a page or a program needs. docs/browser.md shows how. */
export { check, readCases } from './conformance.js';
export { PocketError } from './errors.js';
export { BundleFiles, FolderSource, HttpSource } from './files.js';
export { KNOWN } from './manifest.js';
export { Picture } from './picture.js';
export { readPicture } from './picture_file.js';
export { Session } from './session.js';
export { Detokenizer, Tokenizer } from './tokenizer.js';
