// Answers lines of JSON on standard input with lines of JSON: what the JavaScript reader makes of bundles.
// First argument: the directory of the reader's package. Environment: POCKETVLM_NODE_MODULES.
import { readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import readline from 'node:readline';
import { pathToFileURL } from 'node:url';

const from = (name) => import(pathToFileURL(path.join(process.argv[2], name)));
const reader = await from('reader/index.js');
const { plainSha256, sha256 } = await from('reader/digest.js');
const { fromHalf, toHalf } = await from('reader/tensors.js');
const { DiskSource } = await from('node_source.js');
const { BundleFiles, check, Detokenizer, Picture, PocketError, readPicture, Session, Tokenizer } = reader;

const bytesOf = async (file) => new Uint8Array(await readFile(file));
const open = (bundle) => BundleFiles.open(new DiskSource(bundle));
const runtime = async () => (await from('node_ort.js')).loadOrt();

async function session(bundle, leave) {
  return Session.open(await open(bundle), await runtime(), { providers: ['wasm'], leave });
}

async function rawPicture({ width, height, channels, samples, orientation, file }) {
  return new Picture({ width, height, channels, samples: await bytesOf(samples), orientation, isFile: file });
}

const WORK = {
  async encode({ tokenizer: file, texts }) {
    const tokenizer = new Tokenizer(await bytesOf(file));
    const ids = texts.map((text) => tokenizer.encode(text));
    const streamed = ids.map((row) => {
      const detokenizer = new Detokenizer(tokenizer);
      return row.map((id) => detokenizer.push(id)).join('') + detokenizer.flush();
    });
    return { ids, streamed, texts: ids.map((row) => tokenizer.decode(row)) };
  },
  async prepare(request) {
    const found = await Session.open(await open(request.bundle), null);
    const prepared = await found.prepare(await rawPicture(request));
    const ids = found.promptIds(request.question, [prepared]);
    const values = prepared.views.map((view) => view.inputs.pixel_values);
    await writeFile(request.out, Buffer.concat(values.map(({ data }) => Buffer.from(data.buffer))));
    return { ids, shapes: values.map(({ shape }) => shape), positions: found.positions(ids, [prepared]) };
  },
  async decode({ file, most, out }) {
    const { width, height, channels, orientation, samples } = await readPicture(await bytesOf(file), most);
    await writeFile(out, samples);
    return { width, height, channels, orientation };
  },
  async open({ bundle }) {
    return { name: (await open(bundle)).manifest.name };
  },
  async known() {
    return { known: [...reader.KNOWN].sort() };
  },
  async check({ bundle, leave }) {
    return check(await session(bundle, leave));
  },
  async ask({ bundle, picture, asked, leave }) {
    const found = await session(bundle, leave);
    const answers = [];
    for (const { question, withPicture, tokens, ignoreStop, further } of asked) {
      const pieces = [];
      const options = { tokens, ignoreStop, onText: (piece) => void pieces.push(piece) };
      const source = withPicture ? await bytesOf(picture) : null;
      const { ids, text, finish } = await (further
        ? found.askFurther(question, source, options)
        : found.ask(question, source, options));
      answers.push({ ids, text, finish, pieces });
    }
    await found.close();
    return { answers };
  },
  async digest({ file }) {
    const bytes = await bytesOf(file);
    return { plain: plainSha256(bytes), platform: await sha256(bytes) };
  },
  async half({ file, out }) {
    const found = await bytesOf(file);
    const bits = Uint16Array.from(new Float32Array(found.buffer, found.byteOffset, found.length / 4), toHalf);
    await writeFile(out, Buffer.from(bits.buffer));
    return { back: Array.from(bits, fromHalf).map(String) };
  },
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  let answer;
  try {
    answer = await WORK[request.what](request);
  } catch (error) {
    answer = { error: error.message, isOurs: error instanceof PocketError };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
