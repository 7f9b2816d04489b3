/**
 * From a picture to the vision part's input, by the operations that a manifest names.
 *
 * In: a `Picture` and the image section. Out: `{views, tiles, tokens, grids}`; a view is one run of the vision part,
 * `{inputs, grid, tokens}`. Not here: sizes (`geometry.js`), the vision part.
 */
import * as geometry from './geometry.js';
import { LAYOUTS, refuseNeedle } from './layouts.js';
import { cut, resize } from './resample.js';

const sizeOf = ({ height, width }) => [height, width];

const RESIZES = {
  'resize_longest_edge@1': geometry.longestEdge,
  'resize_exact@1': geometry.resized,
  'smart_resize@1': geometry.resized,
};

function split(pixels, { side, filter }) {
  const [height, width] = geometry.split(sizeOf(pixels), side);
  const stretched = resize(pixels, [height, width], filter);
  if (height === side && width === side) return { views: [stretched], tiles: [0, 0] };
  const tiles = [height / side, width / side];
  return { views: [...cut(stretched, tiles), resize(stretched, [side, side], filter)], tiles };
}

function grid(pixels, operation) {
  const { grid: tiles, whole } = geometry.gridPlan(sizeOf(pixels), operation);
  const [rows, columns] = tiles;
  const stretched = [operation.height * rows, operation.width * columns];
  const views = rows * columns ? cut(resize(pixels, stretched, operation.filter), tiles) : [];
  if (whole) views.push(resize(pixels, whole, operation.whole.filter));
  return { views, tiles };
}

const CUTS = { 'tiles.split@1': split, 'tiles.grid@1': grid };

/** A view with too many patches could also be too large for the memory: refused before it is made. */
function refuseBefore(pixels, operation, layout) {
  if (layout.op !== 'patchify.padded@1') return;
  if (operation.op === 'smart_resize@1') refuseNeedle(geometry.smart(sizeOf(pixels), operation), layout);
  if (operation.op !== 'tiles.grid@1') return;
  const { whole } = geometry.gridPlan(sizeOf(pixels), operation);
  if (whole) refuseNeedle(whole, layout);
}

export function prepare(picture, spec) {
  const layout = spec.operations.at(-1);
  const normalise = spec.operations.at(-2);
  let [upright, pixels, made] = [picture, null, null];
  for (const operation of spec.operations.slice(0, -2)) {
    if (operation.op === 'exif_rotate@1') upright = picture.upright();
    else if (operation.op === 'to_rgb@1') pixels = upright.rgb(operation);
    else {
      refuseBefore(pixels, operation, layout);
      if (CUTS[operation.op]) made = CUTS[operation.op](pixels, operation);
      else pixels = resize(pixels, RESIZES[operation.op](sizeOf(pixels), operation), operation.filter);
    }
  }
  const { views, tiles } = made ?? { views: [pixels], tiles: [0, 0] };
  const side = (length) => Math.ceil(Math.floor(length / spec.patch) / spec.merge);
  const found = views.map((view) => {
    const cells = sizeOf(view).map(side);
    return { inputs: LAYOUTS[layout.op](view, normalise, layout), grid: cells, tokens: cells[0] * cells[1] };
  });
  return {
    views: found,
    tiles,
    grids: found.map((view) => view.grid),
    tokens: found.reduce((sum, view) => sum + view.tokens, 0),
  };
}
