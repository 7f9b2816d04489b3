/**
 * A decoded picture: 8-bit samples as they are stored, alpha not multiplied in, no colour profile applied.
 *
 * In: samples. Out: upright RGB. Not here: decoding files (`picture_file.js`).
 */
import { PocketError } from './errors.js';

/** Which stored [row, column] comes to column x of row y, by EXIF orientation. */
const SOURCE = {
  2: (x, y, right) => [y, right - x],
  3: (x, y, right, bottom) => [bottom - y, right - x],
  4: (x, y, right, bottom) => [bottom - y, x],
  5: (x, y) => [x, y],
  6: (x, y, right, bottom) => [bottom - x, y],
  7: (x, y, right, bottom) => [bottom - x, right - y],
  8: (x, y, right) => [x, right - y],
};

export class Picture {
  /**
   * `channels`: 3 or 4 (with alpha); `orientation`: EXIF, 1 to 8; `isFile`: a file's bytes, not a camera frame or
   * a canvas: rotation and transparency differ.
   */
  constructor({ width, height, channels, samples, orientation = 1, isFile }) {
    const isRight = width > 0 && height > 0 && (channels === 3 || channels === 4);
    if (!isRight || samples.length !== width * height * channels) {
      throw new PocketError(`image: ${samples.length} samples do not make ${width} x ${height} x ${channels}`);
    }
    Object.assign(this, { width, height, channels, samples, orientation, isFile });
  }

  /** `exif_rotate@1`: upright by the orientation, for a file. */
  upright() {
    const source = SOURCE[this.orientation];
    if (!this.isFile || !source) return this;
    const { width, height, channels, samples } = this;
    const [rows, columns] = this.orientation >= 5 ? [width, height] : [height, width];
    const out = new Uint8Array(samples.length);
    let place = 0;
    for (let y = 0; y < rows; y++) {
      for (let x = 0; x < columns; x++) {
        const [row, column] = source(x, y, width - 1, height - 1);
        const from = (row * width + column) * channels;
        for (let channel = 0; channel < channels; channel++) out[place++] = samples[from + channel];
      }
    }
    return new Picture({ width: columns, height: rows, channels, samples: out, isFile: true });
  }

  /** `to_rgb@1` as `{height, width, bytes}`. */
  rgb({ file, pixels }) {
    const { width, height, channels, samples } = this;
    if (channels === 3) return { width, height, bytes: samples };
    const isWhite = (this.isFile ? file : pixels) === 'white';
    const out = new Uint8Array(width * height * 3);
    let place = 0;
    for (let from = 0; from < samples.length; from += 4) {
      const alpha = samples[from + 3];
      for (let channel = 0; channel < 3; channel++) {
        const colour = samples[from + channel];
        const t = (colour * alpha + 255 * (255 - alpha)) * 128 + 16384;
        out[place++] = isWhite ? (((t >> 8) + t) >> 8) >> 7 : colour;
      }
    }
    return { width, height, bytes: out };
  }
}
