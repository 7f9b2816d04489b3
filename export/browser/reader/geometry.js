/**
 * Sizes that the operations make of a picture's size, as [height, width].
 *
 * Every fraction is a double, in the order written: docs/bundle.md. Not here: pixels.
 */
import { PocketError } from './errors.js';

/** The nearest integer; a half goes to the even one. */
function nearest(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest !== 0.5) return rest < 0.5 ? floor : floor + 1;
  return floor % 2 === 0 ? floor : floor + 1;
}

const up = (length, side) => Math.ceil(length / side) * side;

export function longestEdge([height, width], { longestEdge: edge, cap }) {
  let aspect = width / height;
  if (width >= height) {
    [width, height] = [edge, Math.trunc(edge / aspect)];
    height += height % 2;
  } else {
    [width, height] = [Math.trunc(edge * aspect), edge];
    width += width % 2;
  }
  [height, width] = [Math.max(height, 1), Math.max(width, 1)];
  aspect = width / height;
  if (width >= height && width > cap) [width, height] = [cap, Math.trunc(cap / aspect)];
  else if (height > width && height > cap) [width, height] = [Math.trunc(cap * aspect), cap];
  return [Math.max(height, 1), Math.max(width, 1)];
}

export function smart([height, width], resize) {
  const [longer, shorter] = [Math.max(height, width), Math.min(height, width)];
  if (resize.aspectLimit !== null && longer > resize.aspectLimit * shorter) {
    throw new PocketError(
      `image: ${width} x ${height}: one side is more than ${resize.aspectLimit} times the other; crop it`,
    );
  }
  const { factor, minPixels, maxPixels } = resize;
  const sides = [height, width];
  const least = resize.atLeastFactor ? factor : 0;
  const rounded = sides.map((side) => Math.max(least, nearest(side / factor) * factor));
  const area = rounded[0] * rounded[1];
  if (area > maxPixels) {
    const shrink = Math.sqrt((height * width) / maxPixels);
    return sides.map((side) => Math.max(factor, Math.floor(side / shrink / factor) * factor));
  }
  if (area < minPixels) {
    const grow = Math.sqrt(minPixels / (height * width));
    return sides.map((side) => Math.ceil((side * grow) / factor) * factor);
  }
  return rounded;
}

/** After `resize_exact@1` or `smart_resize@1`. */
export function resized(size, resize) {
  return resize.op === 'resize_exact@1' ? [resize.height, resize.width] : smart(size, resize);
}

/** `tiles.split@1`: the longer edge up to a multiple of `side`, the other after the aspect, then up. */
export function split([height, width], side) {
  const aspect = width / height;
  if (width >= height) {
    const wide = up(width, side);
    return [up(Math.trunc(wide / aspect), side), wide];
  }
  const high = up(height, side);
  return [high, up(Math.trunc(high * aspect), side)];
}

function isLarge(size, test) {
  const [height, width] = size.map((side) => Math.max(test.least, nearest(side / test.factor) * test.factor));
  return height * width > test.pixels;
}

function nearestGrid([height, width], tiles) {
  const aspect = width / height;
  let [best, distance] = [[1, 1], Infinity];
  for (const [rows, columns] of tiles.grids) {
    const found = Math.abs(aspect - columns / rows);
    const area = tiles.height * tiles.width * rows * columns;
    if (found < distance || (found === distance && 2 * height * width > area)) {
      [best, distance] = [[rows, columns], found];
    }
  }
  return best;
}

/** `tiles.grid@1`: [rows, columns] of tiles, [0, 0] for none; the whole view's size, null without one. */
export function gridPlan(size, tiles) {
  const [rows, columns] = tiles.only === null || isLarge(size, tiles.only) ? nearestGrid(size, tiles) : [1, 1];
  const whole = resized(size, tiles.whole);
  if (rows === 1 && columns === 1) return { grid: [0, 0], whole };
  return { grid: [rows, columns], whole: tiles.wholeAfterTiles ? whole : null };
}
