/**
 * A view's pixels in the layout that the vision part wants.
 *
 * In: `{height, width, bytes}` and the last two operations. Out: tensors `{dtype, shape, data}` by name.
 * Not here: resizing to such sizes.
 */
import { PocketError } from './errors.js';

const CHANNELS = [0, 1, 2];

/** By channel, what each byte becomes in float32; both steps are rounded. */
function tables({ subtract, divide }) {
  return CHANNELS.map((channel) =>
    Float32Array.from({ length: 256 }, (_, byte) => Math.fround(byte - subtract[channel]) / divide[channel]),
  );
}

/** [rows, columns] of squares of `step` pixels. */
function gridOf({ height, width }, step) {
  if (height % step || width % step) {
    throw new PocketError(
      `image.operations: give ${width} x ${height} pixels, which no patches of ${step} fill; re-export`,
    );
  }
  return [height / step, width / step];
}

const float32 = (data, shape) => ({ dtype: 'float32', shape, data });
const int64 = (values, shape) => ({ dtype: 'int64', shape, data: BigInt64Array.from(values, BigInt) });

function nchw(view, normalise) {
  const plane = view.height * view.width;
  const values = new Float32Array(3 * plane);
  tables(normalise).forEach((table, channel) => {
    for (let i = 0; i < plane; i++) values[channel * plane + i] = table[view.bytes[i * 3 + channel]];
  });
  return { pixel_values: float32(values, [1, 3, view.height, view.width]) };
}

/** Blocks in reading order, a block's patches in reading order; each channel, frame, row. */
function blocks(view, normalise, { patch, merge, frames }) {
  const [rows, columns] = gridOf(view, patch * merge);
  const table = tables(normalise);
  const length = 3 * frames * patch * patch;
  const count = rows * columns * merge * merge;
  const values = new Float32Array(count * length);
  let place = 0;
  for (let n = 0; n < count; n++) {
    const [block, inner] = [Math.floor(n / (merge * merge)), n % (merge * merge)];
    const top = (Math.floor(block / columns) * merge + Math.floor(inner / merge)) * patch;
    const left = ((block % columns) * merge + (inner % merge)) * patch;
    for (const channel of CHANNELS) {
      for (let frame = 0; frame < frames; frame++) {
        for (let y = top; y < top + patch; y++) {
          for (let x = left; x < left + patch; x++) {
            values[place++] = table[channel][view.bytes[(y * view.width + x) * 3 + channel]];
          }
        }
      }
    }
  }
  return {
    pixel_values: float32(values, [count, length]),
    image_grid_thw: int64([1, rows * merge, columns * merge], [1, 3]),
  };
}

/** Throws for a view of more than `length` patches; to be asked before its pixels are made. */
export function refuseNeedle([height, width], { patch, length }) {
  const [rows, columns] = [Math.floor(height / patch), Math.floor(width / patch)];
  if (rows * columns > length) {
    throw new PocketError(
      `image: is too long and thin: ${columns} x ${rows} patches, the most is ${length}; crop it`,
    );
  }
}

/** Patches in reading order, each row, column, channel; zeros up to `length`. */
function padded(view, normalise, layout) {
  const { patch, length } = layout;
  const [rows, columns] = gridOf(view, patch);
  refuseNeedle([view.height, view.width], layout);
  const table = tables(normalise);
  const size = patch * patch * 3;
  const values = new Float32Array(length * size);
  let place = 0;
  for (let n = 0; n < rows * columns; n++) {
    const [top, left] = [Math.floor(n / columns) * patch, (n % columns) * patch];
    for (let y = top; y < top + patch; y++) {
      for (let x = left; x < left + patch; x++) {
        for (const channel of CHANNELS) {
          values[place++] = table[channel][view.bytes[(y * view.width + x) * 3 + channel]];
        }
      }
    }
  }
  const mask = Int32Array.from({ length }, (_, n) => (n < rows * columns ? 1 : 0));
  return {
    pixel_values: float32(values, [1, length, size]),
    pixel_attention_mask: { dtype: 'int32', shape: [1, length], data: mask },
    spatial_shapes: int64([rows, columns], [1, 2]),
  };
}

/** By the name of the layout. */
export const LAYOUTS = { 'to_nchw@1': nchw, 'patchify.blocks@1': blocks, 'patchify.padded@1': padded };
