/**
 * The page: loads the bundle that it lies in, asks about a picture, checks and measures itself.
 *
 * WebGPU is used where there is one and the bundle's conformance vectors come out right on it, else WebAssembly.
 *
 * In the address: `?provider=auto|webgpu|wasm`, `?threads=4`, `?bundle=../` (where the manifest is), `?run=check` and
 * `?run=bench&post=/results` to do that by itself and send what came of it to the server that gave the page.
 */
import { benchmark, TimedSource } from './reader/bench.js';
import {
  BundleFiles, check, FolderSource, HttpSource, PocketError, readCases, readPicture, Session,
} from './reader/index.js';
import { loadOrt } from './web_ort.js';

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const threads = Number(query.get('threads')) || Math.min(navigator.hardwareConcurrency || 1, 4);
const page = { runtime: null, source: null, session: null, stop: null };

const say = (text) => void ($('state').textContent = text);
const number = (id) => Number($(id).value);

function fail(error) {
  const text = error instanceof PocketError ? error.message : `unexpected: ${error.stack ?? error}`;
  $('error').textContent = text;
  $('error').hidden = false;
  say('Stopped.');
}

/** Everything that can be pressed waits while `work` runs; the buttons are as they should be afterwards. */
async function busy(work) {
  $('error').hidden = true;
  for (const id of ['send', 'further', 'check', 'measure']) $(id).disabled = true;
  try {
    return await work();
  } catch (error) {
    fail(error);
    throw error;
  } finally {
    const isReady = page.session !== null;
    for (const id of ['send', 'check', 'measure']) $(id).disabled = !isReady;
    $('further').disabled = !isReady || !page.asked;
    $('stop').disabled = true;
  }
}

/** A source over http that moves the bar. */
function httpSource(total) {
  let got = 0;
  return new HttpSource(new URL(query.get('bundle') ?? '../', location.href), (_, bytes) => {
    got += bytes;
    $('progress').value = Math.min(got / total(), 1);
  });
}

async function open(source, onPart = () => {}) {
  const timed = new TimedSource(source);
  const files = await BundleFiles.open(timed);
  const { ort, provider } = page.runtime;
  const providers = provider === 'webgpu' ? ['webgpu', 'wasm'] : ['wasm'];
  const session = await Session.open(files, ort, { providers, onPart });
  return { session, downloadMs: timed.waitedMs };
}

/** A session on this provider, opened for the first time in this page; `page.opening` keeps what that took. */
async function first(source, provider) {
  const begun = performance.now();
  page.runtime = await loadOrt(provider, threads);
  const { session, downloadMs } = await open(source, (role) => say(`Opening ${role}…`));
  page.opening = { coldMs: performance.now() - begun, downloadMs };
  return session;
}

async function start(source) {
  await page.session?.close();
  Object.assign(page, { session: null, asked: false, source });
  const wanted = query.get('provider') ?? 'auto';
  let session = await first(source, wanted);
  let reason = '';
  if (wanted === 'auto' && page.runtime.provider === 'webgpu') {
    say('Checking what WebGPU computes…');
    const wrong = await faults(session);
    if (wrong) {
      reason = ` WebGPU is not used: ${wrong}.`;
      await session.close();
      session = await first(source, 'wasm');
    }
  }
  page.session = session;
  page.notes = reason ? [reason.trim()] : [];
  $('name').textContent = session.manifest.name;
  document.title = session.manifest.name;
  $('progress').hidden = true;
  say(`Ready: ${session.manifest.precision}, ${page.runtime.provider}.${reason}`);
}

/** Why a session does not conform; empty when it does. */
async function faults(session) {
  try {
    const { lines } = await check(session);
    return lines.length ? `${lines.length} differences, such as ${lines[0]}` : '';
  } catch (error) {
    return String(error.message ?? error).split('\n')[0];
  }
}

async function ask(isFurther) {
  const [file] = $('picture').files;
  const isNew = !isFurther || file !== page.picture;
  const bytes = file && isNew ? new Uint8Array(await file.arrayBuffer()) : null;
  const controller = new AbortController();
  page.stop = () => controller.abort();
  $('stop').disabled = false;
  $('answer').textContent = '';
  say('Answering…');
  const onText = async (piece) => {
    $('answer').textContent += piece;
    await new Promise((resolve) => setTimeout(resolve)); // so that it is seen
  };
  const options = { onText, signal: controller.signal };
  page.asked = false;
  const question = $('question').value;
  const { session } = page;
  const found = await (isFurther ? session.askFurther(question, bytes, options) : session.ask(question, bytes, options));
  Object.assign(page, { asked: true, picture: file });
  const { ttftMs, decodeMs, promptTokens } = found.times;
  const spent = decodeMs.reduce((sum, each) => sum + each, 0);
  const parts = [`${promptTokens} tokens in`, `${found.ids.length} out`, `first text after ${ttftMs.toFixed(0)} ms`];
  if (spent) parts.push(`${((1000 * decodeMs.length) / spent).toFixed(1)} tokens/s`);
  $('cost').textContent = `${parts.join(', ')} (${found.finish})`;
  say('Ready.');
  return found;
}

async function conform() {
  say('Checking…');
  page.asked = false;
  const { cases, lines } = await check(page.session);
  $('answer').textContent = lines.join('\n');
  say(lines.length ? 'This reader does not conform here.' : `This reader conforms: ${cases} cases.`);
  return { cases, lines };
}

/** The chosen picture and question; without, those of the bundle's first conformance case. */
async function subject() {
  const { files } = page.session;
  const [file] = $('picture').files;
  const [first] = await readCases(files);
  const bytes = file ? new Uint8Array(await file.arrayBuffer()) : await files.data(first.image);
  const { width, height } = await readPicture(bytes, page.session.manifest.sourcePixels);
  return {
    id: file ? 'own' : 'conformance',
    image: file ? file.name : first.image.path.split('/').at(-1),
    width,
    height,
    question: (file && $('question').value) || first.question,
    bytes,
  };
}

async function measure() {
  const what = await subject();
  await page.session.close();
  page.session = null;
  const { ort, provider } = page.runtime;
  const settings = {
    warmup: Number(query.get('warmup') ?? 2),
    repeats: Number(query.get('repeats')) || number('repeats'),
    tokens: Number(query.get('tokens')) || number('tokens'),
    seconds: Number(query.get('seconds')) || number('seconds'),
  };
  const subjects = { opening: page.opening, open: () => open(page.source), ort, provider };
  const found = await benchmark(subjects, what, settings, (text) => say(`Measuring: ${text}…`));
  found.notes.push(...page.notes);
  const blob = new Blob([JSON.stringify(found, null, 1)], { type: 'application/json' });
  URL.revokeObjectURL($('download').href);
  $('download').href = URL.createObjectURL(blob);
  $('download').hidden = false;
  page.session = (await open(page.source)).session;
  say('Measured: bench.json is below.');
  return found;
}

/** What the address asks for; what comes of it goes to the page's own server. */
async function byItself() {
  const work = { check: conform, bench: measure }[query.get('run')];
  if (!work) throw new PocketError(`run: got ${query.get('run')}; choose check or bench`);
  const found = await busy(work);
  const to = query.get('post');
  if (!to) return;
  const answer = await fetch(new URL(to, location.origin), { method: 'POST', body: JSON.stringify(found) });
  if (answer.status === 205) {
    // Reset content: another round, from loading on. The long run was in the first.
    query.set('seconds', 0);
    location.replace(`?${query}`);
  }
}

$('ask').addEventListener('submit', (event) => {
  event.preventDefault();
  busy(() => ask(false)).catch(() => {});
});
$('further').addEventListener('click', () => busy(() => ask(true)).catch(() => {}));
$('stop').addEventListener('click', () => page.stop?.());
$('check').addEventListener('click', () => busy(conform).catch(() => {}));
$('measure').addEventListener('click', () => busy(measure).catch(() => {}));
$('folder').addEventListener('change', ({ target }) => busy(() => start(new FolderSource(target.files))).catch(() => {}));
$('picture').addEventListener('change', ({ target }) => {
  const [file] = target.files;
  URL.revokeObjectURL($('shown').src);
  $('shown').hidden = !file;
  if (file) $('shown').src = URL.createObjectURL(file);
});

const total = () => page.bytes ?? Infinity;
try {
  await busy(async () => {
    const source = httpSource(total);
    const { manifest } = await BundleFiles.open(source);
    page.bytes = manifest.parts.flatMap((part) => [part, ...part.data]).reduce((sum, file) => sum + file.bytes, 0);
    await start(source);
  });
  if (query.has('run')) await byItself();
} catch (error) {
  const to = query.get('post');
  if (to) await fetch(new URL(to, location.origin), { method: 'POST', body: JSON.stringify({ error: error.message }) });
}
