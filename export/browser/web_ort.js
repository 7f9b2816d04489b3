/**
 * onnxruntime-web from the directory `ort/` beside this page.
 *
 * In: 'webgpu', 'wasm' or 'auto'. Out: `{ort, provider}`. The page asks no other server for anything.
 */
import { PocketError } from './reader/errors.js';

const HERE = new URL('ort/', import.meta.url);
const MODULES = { webgpu: 'ort.webgpu.min.mjs', wasm: 'ort.wasm.min.mjs' };

async function hasGpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

/** `threads`: of WebAssembly; more than one needs a page that is cross-origin isolated. */
export async function loadOrt(wanted, threads) {
  const provider = wanted === 'auto' ? ((await hasGpu()) ? 'webgpu' : 'wasm') : wanted;
  if (!Object.hasOwn(MODULES, provider)) throw new PocketError(`provider: got ${provider}; choose auto, webgpu or wasm`);
  let ort;
  try {
    ort = await import(new URL(MODULES[provider], HERE));
  } catch {
    throw new PocketError(
      `browser/ort/${MODULES[provider]}: is not there; copy the files of onnxruntime-web's dist folder into browser/ort`,
    );
  }
  ort.env.wasm.wasmPaths = HERE.href;
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? threads : 1;
  return { ort, provider };
}
