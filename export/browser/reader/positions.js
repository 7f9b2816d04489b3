/**
 * Position ids by the scheme that a manifest names.
 *
 * In: ids and the grids of the views behind their image tokens. Out: rows of position ids.
 */
import { PocketError } from './errors.js';

/** Rows (1 or 3) of position ids from `first` on, and the position after them. */
export function positionsOf(scheme, ids, imageToken, grids, first) {
  if (scheme === 'positions.1d@1') return { rows: [ids.map((_, place) => first + place)], next: first + ids.length };
  const slots = ids.filter((id) => id === imageToken).length;
  const cells = grids.reduce((sum, [rows, columns]) => sum + rows * columns, 0);
  if (slots !== cells) throw new PocketError(`prompt: ${slots} image tokens do not fill views of ${cells} tokens`);
  const rows = [[], [], []];
  let [next, view] = [first, 0];
  for (let place = 0; place < ids.length; ) {
    if (ids[place] !== imageToken) {
      for (const row of rows) row.push(next);
      next += 1;
      place += 1;
      continue;
    }
    const [height, width] = grids[view++];
    for (let cell = 0; cell < height * width; cell++) {
      rows[0].push(next);
      rows[1].push(next + Math.floor(cell / width));
      rows[2].push(next + (cell % width));
    }
    next += Math.max(height, width);
    place += height * width;
  }
  return { rows, next };
}
