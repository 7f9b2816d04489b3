/**
 * The EXIF orientation of a JPEG, PNG or WebP file, and where it is written.
 *
 * In: a file's bytes. Out: `{value, at}`, `at` being the place of the value; null without one. An unreadable EXIF
 * block says nothing about the pixels.
 */
import { chunks, isPng } from './png.js';

const TAG = 0x0112;
const SHORT = 3;
const ascii = (bytes, place, length) => String.fromCharCode(...bytes.subarray(place, place + length));

export const isJpeg = (bytes) => bytes[0] === 0xff && bytes[1] === 0xd8;
export const isWebp = (bytes) => ascii(bytes, 0, 4) === 'RIFF' && ascii(bytes, 8, 4) === 'WEBP';

/** A TIFF block at `start`: its first directory's orientation. */
function inTiff(bytes, start, end) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const order = ascii(bytes, start, 2);
  if (order !== 'II' && order !== 'MM') return null;
  const little = order === 'II';
  const directory = start + view.getUint32(start + 4, little);
  const count = view.getUint16(directory, little);
  for (let n = 0; n < count; n++) {
    const entry = directory + 2 + 12 * n;
    if (entry + 12 > end) return null;
    if (view.getUint16(entry, little) !== TAG || view.getUint16(entry + 2, little) !== SHORT) continue;
    const value = view.getUint16(entry + 8, little);
    return value >= 1 && value <= 8 ? { value, at: entry + 8 + (little ? 0 : 1) } : null;
  }
  return null;
}

/** Start and end of the TIFF block of each EXIF section. */
function* blocks(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const behindName = (place) => (ascii(bytes, place, 6) === 'Exif\0\0' ? place + 6 : place);
  if (isPng(bytes)) {
    for (const { name, data } of chunks(bytes)) {
      const start = data.byteOffset - bytes.byteOffset;
      if (name === 'eXIf') yield [behindName(start), start + data.length];
    }
  } else if (isWebp(bytes)) {
    for (let place = 12; place + 8 <= bytes.length; ) {
      const length = view.getUint32(place + 4, true);
      if (ascii(bytes, place, 4) === 'EXIF') yield [behindName(place + 8), place + 8 + length];
      place += 8 + length + (length % 2);
    }
  } else if (isJpeg(bytes)) {
    for (let place = 2; place + 4 <= bytes.length && bytes[place] === 0xff && bytes[place + 1] !== 0xda; ) {
      const length = view.getUint16(place + 2);
      const isExif = bytes[place + 1] === 0xe1 && ascii(bytes, place + 4, 6) === 'Exif\0\0';
      if (isExif) yield [place + 10, place + 2 + length];
      place += 2 + length;
    }
  }
}

export function orientation(bytes) {
  try {
    for (const [start, end] of blocks(bytes)) {
      const found = inTiff(bytes, start, end);
      if (found) return found;
    }
  } catch {
    return null;
  }
  return null;
}
