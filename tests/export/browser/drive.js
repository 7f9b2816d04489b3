// In a browser, beside the page: asks as a person does, and says what becomes of picture files.
import { readPicture } from './reader/index.js';
import { plainSha256, sha256 } from './reader/digest.js';

const asked = await (await fetch('asked.json')).json();
const bytesOf = async (name) => new Uint8Array(await (await fetch(name)).arrayBuffer());
const found = { pictures: {} };

async function until(what, isTrue) {
  for (let n = 0; n < 1200; n++) {
    if (isTrue()) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`waited in vain: ${what}`);
}

async function askAsPerson({ picture, question, further }) {
  const frame = document.createElement('iframe');
  frame.src = 'index.html?provider=wasm';
  document.body.append(frame);
  await new Promise((resolve) => frame.addEventListener('load', resolve));
  const $ = (id) => frame.contentDocument.getElementById(id);
  await until('ready', () => !$('send').disabled);
  const files = new DataTransfer();
  files.items.add(new File([await bytesOf(picture)], picture));
  $('picture').files = files.files;
  $('picture').dispatchEvent(new Event('change'));
  const answers = [];
  for (const [button, text] of [['send', question], ['further', further]]) {
    $('question').value = text;
    $(button).click();
    await until('busy', () => $('send').disabled || !$('error').hidden);
    await until('answered', () => !$('send').disabled);
    answers.push($('answer').textContent, $('error').textContent);
  }
  const shown = $('shown');
  await until('shown', () => shown.complete && shown.naturalWidth > 0);
  return { answers, cost: $('cost').textContent, name: $('name').textContent };
}

try {
  for (const name of asked.pictures) {
    try {
      const picture = await readPicture(await bytesOf(name), 1e6);
      const { width, height, channels, orientation, samples } = picture;
      found.pictures[name] = { width, height, channels, orientation, samples: Array.from(samples) };
    } catch (error) {
      found.pictures[name] = { error: error.message };
    }
  }
  const bytes = new TextEncoder().encode('pocketvlm');
  found.hashes = [plainSha256(bytes), await sha256(bytes)];
  found.asked = await askAsPerson(asked);
} catch (error) {
  found.error = String(error.stack ?? error);
}
await fetch('/results', { method: 'POST', body: JSON.stringify(found) });
