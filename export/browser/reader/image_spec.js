/**
 * The manifest's image section: the operations in their order. docs/bundle.md gives each to the rounding rule.
 *
 * In: JSON. Out: plain objects with `op`. Not here: carrying them out (`prepare.js`).
 */
import { PocketError } from './errors.js';

const FILTERS = ['bilinear', 'bicubic', 'lanczos'];
const CUTS = ['tiles.split@1', 'tiles.grid@1'];
const LAYOUTS = ['to_nchw@1', 'patchify.blocks@1', 'patchify.padded@1'];

function choice(fields, key, known) {
  const name = fields.string(key);
  if (!known.includes(name)) throw fields.wrong(key, `${known.join(' or ')}, not ${name}`);
  return name;
}

const filter = (fields) => choice(fields, 'filter', FILTERS);
const alpha = (fields, key) => choice(fields, key, ['drop', 'white']);

function triple(fields, key) {
  const found = fields.numbers(key);
  if (found.length !== 3) throw fields.wrong(key, 'three numbers');
  return found.map(Math.fround);
}

function exact(fields) {
  return { height: fields.int('height'), width: fields.int('width'), filter: filter(fields) };
}

function smart(fields) {
  const limit = fields.find('aspect_limit');
  if (limit !== undefined && !Number.isSafeInteger(limit)) throw fields.wrong('aspect_limit', 'an integer');
  return {
    factor: fields.int('factor'),
    minPixels: fields.int('min_pixels'),
    maxPixels: fields.int('max_pixels'),
    aspectLimit: limit ?? null,
    atLeastFactor: fields.bool('at_least_factor', false),
    filter: filter(fields),
  };
}

function whole(fields) {
  const op = fields.expect('resize_exact@1', 'smart_resize@1');
  return fields.finish({ op, ...(op === 'resize_exact@1' ? exact(fields) : smart(fields)) });
}

function large(fields) {
  const [factor, least] = [fields.int('factor'), fields.int('least')];
  return fields.finish({ factor, least, pixels: fields.number('pixels') });
}

function grid(fields) {
  const grids = fields.rows('grids');
  if (grids.some((pair) => pair.length !== 2)) throw fields.wrong('grids', 'pairs');
  return {
    height: fields.int('height'),
    width: fields.int('width'),
    grids,
    only: fields.optional('only', large),
    whole: whole(fields.fields('whole')),
    wholeAfterTiles: fields.bool('whole_after_tiles', true),
    filter: filter(fields),
  };
}

/** How each operation's fields are read; this reader carries out these and no others. */
const READ = {
  'exif_rotate@1': () => ({}),
  'to_rgb@1': (fields) => ({ file: alpha(fields, 'file_alpha'), pixels: alpha(fields, 'pixels_alpha') }),
  'resize_longest_edge@1': (fields) => ({
    longestEdge: fields.int('longest_edge'), cap: fields.int('cap'), filter: filter(fields),
  }),
  'resize_exact@1': exact,
  'smart_resize@1': smart,
  'tiles.split@1': (fields) => ({ side: fields.int('side'), filter: filter(fields) }),
  'tiles.grid@1': grid,
  'normalise@1': (fields) => ({ subtract: triple(fields, 'subtract'), divide: triple(fields, 'divide') }),
  'to_nchw@1': () => ({}),
  'patchify.blocks@1': (fields) => ({
    patch: fields.int('patch'), merge: fields.int('merge'), frames: fields.int('frames'),
  }),
  'patchify.padded@1': (fields) => ({ patch: fields.int('patch'), length: fields.int('length') }),
};

export const IMAGE_OPERATIONS = [...Object.keys(READ), 'tokens.grid@1'];

export function readImage(fields) {
  const operations = fields.list('operations').map((each) => {
    const op = each.expect(...Object.keys(READ));
    return each.finish({ op, ...READ[op](each) });
  });
  const names = operations.map((operation) => operation.op);
  const cuts = names.filter((name) => CUTS.includes(name)).length;
  if (cuts > 1 || !LAYOUTS.includes(names.at(-1)) || names.at(-2) !== 'normalise@1') {
    throw new PocketError(`${fields.place}.operations: ${names.join(', ')} are in no order that can be run; re-export`);
  }
  const tokens = fields.fields('tokens');
  tokens.expect('tokens.grid@1');
  const found = { operations, patch: tokens.int('patch'), merge: tokens.int('merge') };
  tokens.finish();
  fields.skip('max_views', 'max_tokens');
  return fields.finish(found);
}
