/**
 * onnxruntime-web in Node, on WebAssembly.
 *
 * In: POCKETVLM_NODE_MODULES, a node_modules directory; without it the module is looked for as any other.
 */
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

import { PocketError } from './reader/errors.js';

export async function loadOrt(threads = 1) {
  const modules = process.env.POCKETVLM_NODE_MODULES;
  let found;
  try {
    const from = modules ? path.join(path.resolve(modules), 'x.js') : import.meta.url;
    found = createRequire(from).resolve('onnxruntime-web');
  } catch {
    throw new PocketError('onnxruntime-web: is not installed; run npm install onnxruntime-web beside this file');
  }
  const module = await import(pathToFileURL(found));
  const ort = module.InferenceSession ? module : module.default;
  ort.env.wasm.numThreads = threads;
  return ort;
}
