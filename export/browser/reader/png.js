/**
 * PNG files to samples, exactly as stored: a canvas multiplies alpha in and applies colour profiles.
 *
 * In: a file's bytes. Out: `{width, height, channels, samples}`, 8 bit, 3 channels or 4 with alpha. Of an animated
 * one the first frame. Not here: EXIF (`orientation.js`), other formats (`picture_file.js`).
 */
import { PocketError } from './errors.js';

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const [GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA] = [0, 2, 3, 4, 6];
const CHANNELS = { [GRAY]: 1, [RGB]: 3, [PALETTE]: 1, [GRAY_ALPHA]: 2, [RGBA]: 4 };
const DEEP = [8, 16];
const DEPTHS = { [GRAY]: [1, 2, 4, ...DEEP], [RGB]: DEEP, [PALETTE]: [1, 2, 4, 8], [GRAY_ALPHA]: DEEP, [RGBA]: DEEP };
/** Adam7: first column, first row, step of columns, step of rows. */
const PASSES = [[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2]];

export const isPng = (bytes) => SIGNATURE.every((byte, place) => bytes[place] === byte);

const damaged = (what) => new PocketError(`image: the PNG is damaged (${what}); save it again`);

const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

function crc(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = CRC[(value ^ byte) & 255] ^ (value >>> 8);
  return ~value >>> 0;
}

/** Chunks up to IEND as {name, data}; those that decoding needs are checked. */
export function* chunks(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let place = 8; place + 12 <= bytes.length; ) {
    const length = view.getUint32(place);
    const name = String.fromCharCode(...bytes.subarray(place + 4, place + 8));
    const end = place + 8 + length;
    if (end + 4 > bytes.length) throw damaged('cut off');
    if (name < 'a' && crc(bytes.subarray(place + 4, end)) !== view.getUint32(end)) throw damaged(`checksum of ${name}`);
    yield { name, data: bytes.subarray(place + 8, end) };
    if (name === 'IEND') return;
    place = end + 4;
  }
  throw damaged('cut off');
}

/** Width and height, before anything is decoded. */
export function pngSize(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 33) throw damaged('cut off');
  return { width: view.getUint32(16), height: view.getUint32(20) };
}

async function inflate(pieces, size) {
  const stream = new Blob(pieces).stream().pipeThrough(new DecompressionStream('deflate'));
  const out = new Uint8Array(size);
  let place = 0;
  const reader = stream.getReader();
  try {
    while (place < size) {
      const { done, value } = await reader.read();
      if (done) break;
      const part = value.subarray(0, size - place);
      out.set(part, place);
      place += part.length;
    }
  } catch {
    throw damaged('its data do not inflate');
  } finally {
    reader.cancel().catch(() => {}); // what follows the picture is nobody's
  }
  if (place < size) throw damaged('too few pixels');
  return out;
}

function headOf(data) {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const [depth, kind, , , interlaced] = data.subarray(8, 13);
  if (data.length !== 13 || !DEPTHS[kind]?.includes(depth) || interlaced > 1) throw damaged('its header');
  return { width: view.getUint32(0), height: view.getUint32(4), depth, kind, interlaced: interlaced === 1 };
}

/** What is coded apart: the whole picture, or the passes that have pixels. */
function passesOf({ width, height, interlaced }) {
  return (interlaced ? PASSES : [[0, 0, 1, 1]])
    .map(([left, top, right, down]) => ({
      left, top, right, down, columns: Math.ceil((width - left) / right), rows: Math.ceil((height - top) / down),
    }))
    .filter((pass) => pass.columns > 0 && pass.rows > 0);
}

function paeth(a, b, c) {
  const [pa, pb, pc] = [Math.abs(b - c), Math.abs(a - c), Math.abs(a + b - 2 * c)];
  if (pa <= pb && pa <= pc) return a;
  return pb <= pc ? b : c;
}

/** Undo a row's filter in place; `above`: the row before it. */
function unfilter(filter, row, above, step) {
  if (filter > 4) throw damaged(`filter ${filter}`);
  for (let i = 0; i < row.length && filter; i++) {
    const left = i < step ? 0 : row[i - step];
    const corner = i < step ? 0 : above[i - step];
    if (filter === 1) row[i] += left;
    else if (filter === 2) row[i] += above[i];
    else if (filter === 3) row[i] += (left + above[i]) >> 1;
    else row[i] += paeth(left, above[i], corner);
  }
}

/** Sample n of a row, in its own depth. */
function sampleAt(row, n, depth) {
  if (depth === 8) return row[n];
  if (depth === 16) return (row[2 * n] << 8) | row[2 * n + 1];
  const bit = n * depth;
  return (row[bit >> 3] >> (8 - depth - (bit & 7))) & ((1 << depth) - 1);
}

/** What writes a pixel's bytes: by the kind of picture, its palette and its transparent colour. */
function painter({ kind, depth }, palette, transparency) {
  const toByte = (value) => (depth === 16 ? value >> 8 : depth === 8 ? value : (value * 255) / ((1 << depth) - 1));
  const clear = transparency && kind !== PALETTE ? Array.from({ length: CHANNELS[kind] }, (_, n) =>
    (transparency[2 * n] << 8) | transparency[2 * n + 1]) : null;
  if (kind === PALETTE && !palette) throw damaged('no palette');
  const hasAlpha = kind === GRAY_ALPHA || kind === RGBA || Boolean(transparency);
  const paint = (values, out, place) => {
    if (kind === PALETTE) {
      const index = values[0];
      if (3 * index + 3 > palette.length) throw damaged('a colour that the palette lacks');
      out.set(palette.subarray(3 * index, 3 * index + 3), place);
      if (hasAlpha) out[place + 3] = transparency[index] ?? 255;
      return;
    }
    const isGray = kind === GRAY || kind === GRAY_ALPHA;
    for (let n = 0; n < 3; n++) out[place + n] = toByte(values[isGray ? 0 : n]);
    if (clear) out[place + 3] = clear.every((value, n) => value === values[n]) ? 0 : 255;
    else if (hasAlpha) out[place + 3] = toByte(values[isGray ? 1 : 3]);
  };
  return { paint, channels: hasAlpha ? 4 : 3 };
}

function read(bytes) {
  const found = { pieces: [], head: null, palette: null, transparency: null };
  for (const { name, data } of chunks(bytes)) {
    if (name === 'IHDR') found.head = headOf(data);
    else if (name === 'PLTE') found.palette = data;
    else if (name === 'tRNS') found.transparency = data;
    else if (name === 'IDAT') found.pieces.push(data);
  }
  if (!found.head) throw damaged('no header');
  return found;
}

export async function decodePng(bytes) {
  const { head, pieces, palette, transparency } = read(bytes);
  const { width, height, depth, kind } = head;
  const passes = passesOf(head);
  const bits = depth * CHANNELS[kind];
  const lengthOf = (pass) => Math.ceil((pass.columns * bits) / 8);
  const raw = await inflate(pieces, passes.reduce((sum, pass) => sum + pass.rows * (1 + lengthOf(pass)), 0));
  const { paint, channels } = painter(head, palette, kind === GRAY_ALPHA || kind === RGBA ? null : transparency);
  const samples = new Uint8Array(width * height * channels);
  const values = new Array(CHANNELS[kind]);
  let place = 0;
  for (const pass of passes) {
    const length = lengthOf(pass);
    let above = new Uint8Array(length);
    for (let y = 0; y < pass.rows; y++) {
      const row = raw.subarray(place + 1, place + 1 + length);
      unfilter(raw[place], row, above, Math.max(bits >> 3, 1));
      for (let x = 0; x < pass.columns; x++) {
        for (let n = 0; n < values.length; n++) values[n] = sampleAt(row, x * values.length + n, depth);
        const at = (pass.top + y * pass.down) * width + pass.left + x * pass.right;
        paint(values, samples, at * channels);
      }
      above = row;
      place += 1 + length;
    }
  }
  return { width, height, channels, samples };
}
