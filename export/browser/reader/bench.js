/**
 * Measures a bundle with one picture and question, as `pocketvlm.bench@1`: what `pocketvlm bench --import` reads.
 *
 * In: a way to open a session, a picture file's bytes. Out: an object to be written as JSON. docs/bench.md is the
 * contract. Not here: what the browser says of the device (`device.js`).
 */
import { deviceFacts, memoryMib } from './device.js';

const now = () => new Date().toISOString();

/** A source that keeps how long somebody waited for it, in milliseconds. */
export class TimedSource {
  waitedMs = 0;
  #source;

  constructor(source) {
    this.#source = source;
  }

  async read(path) {
    const start = performance.now();
    try {
      return await this.#source.read(path);
    } finally {
      this.waitedMs += performance.now() - start;
    }
  }
}

/** Open again, with whatever the browser kept of the first time. */
async function reopen(open, opening) {
  const start = performance.now();
  const { session } = await open();
  const warm = [performance.now() - start];
  const load = { cold_ms: opening.coldMs, warm_ms: warm, download_ms: opening.downloadMs, page_cache: 'unknown' };
  return { session, load, loaded: await memoryMib() };
}

const EMPTY = { preprocess_ms: [], encode_ms: [], prefill_ms: [], ttft_ms: [], decode_ms: [], end_to_end_ms: [] };

function add(times, found) {
  times.preprocess_ms.push(found.preprocessMs);
  times.encode_ms.push(found.encodeMs);
  times.prefill_ms.push(found.prefillMs);
  times.ttft_ms.push(found.ttftMs);
  times.decode_ms.push(found.decodeMs);
  times.end_to_end_ms.push(found.endToEndMs);
}

async function repeated(session, subject, policy, onProgress) {
  const times = structuredClone(EMPTY);
  const options = { tokens: policy.decode_tokens + 1, ignoreStop: true };
  let last;
  for (let n = -policy.warmup; n < policy.repeats; n++) {
    onProgress(n < 0 ? 'warming up' : `answer ${n + 1} of ${policy.repeats}`);
    last = await session.ask(subject.question, subject.bytes, options);
    if (n >= 0) add(times, last.times);
  }
  return { times, last };
}

async function sustained(session, subject, policy, seconds) {
  if (!(seconds > 0)) return null;
  const options = { tokens: policy.decode_tokens + 1, ignoreStop: true };
  const start = performance.now();
  const found = { asked_s: seconds, tokens_per_answer: options.tokens, answer_at_s: [], answer_ms: [] };
  while (performance.now() - start < seconds * 1000) {
    const { times } = await session.ask(subject.question, subject.bytes, options);
    found.answer_at_s.push((performance.now() - start) / 1000);
    found.answer_ms.push(times.endToEndMs);
  }
  return { ...found, measured_s: (performance.now() - start) / 1000 };
}

function bundleResult(files, provider, point) {
  const { manifest } = files;
  const parts = manifest.parts.map(({ role, bytes, bits }) => ({ role, bytes, bits, unit: provider, unit_note: null }));
  return {
    name: manifest.name,
    sha256: files.sha256,
    source_sha256: manifest.sourceSha256,
    format: manifest.format,
    precision: manifest.precision,
    target: manifest.target,
    parts,
    state_bytes: manifest.stateBytes(manifest.context),
    max_context: manifest.context,
    points: [point],
  };
}

function reasons(memory) {
  const found = [{ what: 'energy', why: 'a browser gives a page no energy meter' }];
  const why = 'a browser tells a page no peak of its memory';
  found.push({ what: 'peak_rss_mib', why: memory ? why : `${why}, and this one no memory at all` });
  return found;
}

/**
 * `opening`: `{coldMs, downloadMs}` of the first time in this page; `open()` opens another session. `subject`: `{id,
 * image, width, height, question, bytes}`; `settings`: `{warmup, repeats, tokens, seconds}`, the last to ask again and
 * again for so long.
 */
export async function benchmark({ opening, open, ort, provider }, subject, settings, onProgress = () => {}) {
  const started = now();
  const policy = {
    rounds: 1, warmup: settings.warmup, repeats: settings.repeats, decode_tokens: settings.tokens,
    threads: provider === 'wasm' ? ort.env.wasm.numThreads || 1 : null, providers: [provider], interleaved: false,
  };
  onProgress('loading');
  const { session, load, loaded } = await reopen(open, opening);
  const { times, last } = await repeated(session, subject, policy, onProgress);
  const memory = loaded === null ? null : { meter: 'measureUserAgentSpecificMemory', loaded_rss_mib: loaded };
  const point = {
    point: subject.id,
    prompt_tokens: last.times.promptTokens,
    image_tokens: last.times.imageTokens,
    decode_tokens: last.ids.length - 1,
    runs: [{ round: 0, order: 0, started, fresh_process: true, load, times, memory }],
    sustained: await sustained(session, subject, policy, settings.seconds),
  };
  const { bytes: _, ...gridPoint } = subject;
  await session.close();
  return {
    schema: 'pocketvlm.bench@1',
    created: now(),
    tool: { name: 'pocketvlm browser reader', version: '1' },
    source: 'browser',
    device: await deviceFacts(ort),
    policy,
    grid: [gridPoint],
    bundles: [bundleResult(session.files, provider, point)],
    missing: reasons(memory),
    notes: globalThis.crossOriginIsolated ? [] : ['the page is not cross-origin isolated: one thread, a coarse clock'],
  };
}
