/**
 * Typed arrays by the manifest's names of types, and conversions between them.
 *
 * A half is kept as its 16 bits, which every version of onnxruntime takes.
 */
import { PocketError } from './errors.js';

const ARRAYS = {
  float32: Float32Array, float16: Uint16Array, int64: BigInt64Array, int32: Int32Array, int8: Int8Array,
  uint8: Uint8Array, bool: Uint8Array,
};

const word = new Uint32Array(1);
const float = new Float32Array(word.buffer);

/** The bits of the nearest half; a tie goes to the even one. */
export function toHalf(value) {
  float[0] = value;
  const sign = (word[0] >>> 16) & 0x8000;
  const bits = word[0] & 0x7fffffff;
  if (bits >= 0x7f800000) return sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (bits >= 0x477ff000) return sign | 0x7c00;
  const isSmall = bits < 0x38800000; // below the least normal half
  const shift = isSmall ? 126 - (bits >>> 23) : 13;
  if (shift > 24) return sign;
  const mantissa = isSmall ? (bits & 0x7fffff) | 0x800000 : bits - 0x38000000;
  const half = 2 ** (shift - 1);
  const rest = mantissa % (2 * half);
  const cut = Math.floor(mantissa / (2 * half));
  return sign | (cut + (rest > half || (rest === half && cut % 2 === 1) ? 1 : 0));
}

export function fromHalf(bits) {
  const [exponent, mantissa] = [(bits >> 10) & 31, bits & 0x3ff];
  const sign = bits & 0x8000 ? -1 : 1;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + mantissa / 1024) * 2 ** (exponent - 15) : mantissa * 2 ** -24);
}

export function zeros(dtype, count) {
  return new ARRAYS[dtype](count);
}

/** Numbers (a typed array or a list) as this type. */
export function arrayOf(dtype, values) {
  if (values instanceof ARRAYS[dtype] && dtype !== 'float16') return values;
  if (dtype === 'int64') return BigInt64Array.from(values, BigInt);
  const numbers = values instanceof BigInt64Array ? Array.from(values, Number) : values;
  return dtype === 'float16' ? Uint16Array.from(numbers, toHalf) : ARRAYS[dtype].from(numbers);
}

/** A copy of what a part gave, in float32. */
export function floatsOf({ type, data }) {
  if (type === 'float32') return Float32Array.from(data);
  if (type !== 'float16') throw new PocketError(`parts: give ${type}, wanted float32 or float16; re-export`);
  return data instanceof Uint16Array ? Float32Array.from(data, fromHalf) : Float32Array.from(data);
}
