/**
 * Runs a bundle's conformance vectors in Node: `node check.mjs [BUNDLE]`.
 *
 * onnxruntime-web is taken from where it is installed, or from the directory in POCKETVLM_NODE_MODULES.
 * Exit status 0: this reader conforms; 1: it does not; 2: the bundle cannot be read.
 */
import path from 'node:path';
import { fileURLToPath } from 'node:url';

import { DiskSource } from './node_source.js';
import { loadOrt } from './node_ort.js';
import { BundleFiles, check, PocketError, Session } from './reader/index.js';

const own = path.dirname(fileURLToPath(import.meta.url));
const directory = process.argv[2] ?? path.dirname(own);

try {
  const files = await BundleFiles.open(new DiskSource(directory));
  const session = await Session.open(files, await loadOrt(), { providers: ['wasm'] });
  const { cases, lines } = await check(session);
  for (const line of lines) console.error(line);
  console.log(`${files.manifest.name}: ${lines.length ? 'does not conform' : 'conforms'}, ${cases} cases`);
  process.exitCode = lines.length ? 1 : 0;
} catch (error) {
  if (!(error instanceof PocketError)) throw error;
  console.error(error.message);
  process.exitCode = 2;
}
