/**
 * Resizing in the fixed-point arithmetic of docs/bundle.md: first the width, rounded to bytes, then the height.
 *
 * In and out: `{height, width, bytes}`, 8-bit RGB, row after row. Not here: which size (`geometry.js`).
 */
const A = -0.5;
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

const FILTERS = {
  bilinear: { radius: 1, at: (x) => Math.max(1 - x, 0) },
  bicubic: {
    radius: 2,
    at: (x) => {
      if (x < 1) return ((A + 2) * x - (A + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * A : 0;
    },
  },
  lanczos: { radius: 3, at: (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

const MOST_PRECISION = 22;
const WEIGHT_LIMIT = 1 << 15;

/** Integer weights of one axis: output i takes `weights[i]` of the inputs from `first[i]` on. */
function tapsOf(sizeIn, sizeOut, filter) {
  const { radius, at } = FILTERS[filter];
  const scale = sizeIn / sizeOut;
  const support = radius * Math.max(scale, 1);
  const shrink = scale >= 1 ? 1 / scale : 1;
  const first = new Int32Array(sizeOut);
  const rows = [];
  let largest = 0;
  for (let i = 0; i < sizeOut; i++) {
    const centre = scale * (i + 0.5);
    const low = Math.max(Math.trunc(centre - support + 0.5), 0);
    const high = Math.min(Math.trunc(centre + support + 0.5), sizeIn);
    const row = [];
    let sum = 0;
    for (let j = low; j < high; j++) {
      const weight = at(Math.abs((j - centre + 0.5) * shrink));
      row.push(weight);
      sum += weight;
    }
    for (let j = 0; j < row.length; j++) {
      row[j] /= sum;
      largest = Math.max(largest, row[j]);
    }
    first[i] = low;
    rows.push(row);
  }
  let precision = 0;
  while (precision < MOST_PRECISION && Math.trunc(0.5 + largest * (2 << precision)) < WEIGHT_LIMIT) precision += 1;
  const unit = 1 << precision;
  const toInteger = (weight) => Math.trunc(weight * unit + (weight < 0 ? -0.5 : 0.5));
  return { first, precision, weights: rows.map((row) => Int32Array.from(row, toInteger)) };
}

// sums stay below 2^31: the weights of an output add up to 2^22 at most, bytes to 255
const toByte = (sum, precision) => Math.min(Math.max(sum >> precision, 0), 255);

function alongWidth({ height, width, bytes }, size, filter) {
  const { first, weights, precision } = tapsOf(width, size, filter);
  const out = new Uint8Array(height * size * 3);
  const half = 1 << (precision - 1);
  let place = 0;
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < size; column++) {
      const taps = weights[column];
      let from = (row * width + first[column]) * 3;
      let [red, green, blue] = [half, half, half];
      for (let j = 0; j < taps.length; j++, from += 3) {
        red += taps[j] * bytes[from];
        green += taps[j] * bytes[from + 1];
        blue += taps[j] * bytes[from + 2];
      }
      out[place++] = toByte(red, precision);
      out[place++] = toByte(green, precision);
      out[place++] = toByte(blue, precision);
    }
  }
  return { height, width: size, bytes: out };
}

function alongHeight({ height, width, bytes }, size, filter) {
  const { first, weights, precision } = tapsOf(height, size, filter);
  const stride = width * 3;
  const out = new Uint8Array(size * stride);
  const sums = new Int32Array(stride);
  for (let row = 0; row < size; row++) {
    sums.fill(1 << (precision - 1));
    weights[row].forEach((weight, j) => {
      const from = (first[row] + j) * stride;
      for (let i = 0; i < stride; i++) sums[i] += weight * bytes[from + i];
    });
    for (let i = 0; i < stride; i++) out[row * stride + i] = toByte(sums[i], precision);
  }
  return { height: size, width, bytes: out };
}

export function resize(picture, [height, width], filter) {
  let found = picture;
  if (found.width !== width) found = alongWidth(found, width, filter);
  if (found.height !== height) found = alongHeight(found, height, filter);
  return found;
}

/** Equal pieces, row by row. */
export function cut({ height, width, bytes }, [rows, columns]) {
  const [high, wide] = [height / rows, width / columns];
  const views = [];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const out = new Uint8Array(high * wide * 3);
      for (let y = 0; y < high; y++) {
        const from = ((row * high + y) * width + column * wide) * 3;
        out.set(bytes.subarray(from, from + wide * 3), y * wide * 3);
      }
      views.push({ height: high, width: wide, bytes: out });
    }
  }
  return views;
}
