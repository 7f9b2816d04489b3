/**
 * The bundle's conformance vectors: what every reader must reproduce before it is trusted.
 *
 * In: a session. Out: one line for every difference; none when this reader conforms.
 */
import { PocketError } from './errors.js';
import { Fields, parse } from './fields.js';
import { readFile } from './manifest.js';

function readCase(fields) {
  const top = fields.list('top').map((row) => row.finish({ id: row.int('id'), logit: row.number('logit') }));
  return fields.finish({
    top,
    name: fields.string('name'),
    image: readFile(fields.fields('image')),
    question: fields.string('question'),
    pixels: readFile(fields.fields('pixels')),
    shapes: fields.rows('pixels_shapes'),
    step: fields.int('pixels_step'),
    pixelsTolerance: fields.number('pixels_tolerance'),
    ids: fields.ints('ids'),
    positions: fields.rows('positions'),
    logitTolerance: fields.number('logit_tolerance'),
  });
}

export async function readCases(files) {
  const { path } = files.manifest.conformance;
  const fields = new Fields(parse(await files.data(files.manifest.conformance), path), path);
  if (fields.int('cases_version') !== 1) throw fields.wrong('cases_version', '1');
  return fields.finish(fields.list('cases').map(readCase));
}

/** Every step-th value of all views joined. */
function kept(views, step) {
  const found = [];
  let next = 0;
  for (const { inputs } of views) {
    const { data } = inputs.pixel_values;
    for (; next < data.length; next += step) found.push(data[next]);
    next -= data.length;
  }
  return found;
}

async function pixelDifference(files, one, image) {
  const raw = await files.data(one.pixels);
  const expected = new DataView(raw.buffer, raw.byteOffset, raw.byteLength);
  const found = kept(image.views, one.step);
  if (found.length * 4 !== raw.length) {
    throw new PocketError(`${one.pixels.path}: holds ${raw.length / 4} values, wanted ${found.length}; re-export`);
  }
  return found.reduce((most, value, n) => Math.max(most, Math.abs(value - expected.getFloat32(4 * n, true))), 0);
}

async function differences(session, one, withLogits) {
  const image = await session.prepare(await session.files.data(one.image));
  const shapes = JSON.stringify(image.views.map((view) => view.inputs.pixel_values.shape));
  if (shapes !== JSON.stringify(one.shapes)) {
    return [`${one.name}: pixels have shapes ${shapes}, expected ${JSON.stringify(one.shapes)}`];
  }
  const found = [];
  const off = await pixelDifference(session.files, one, image);
  if (!(off <= one.pixelsTolerance)) {
    found.push(`${one.name}: pixels differ by ${off}, allowed ${one.pixelsTolerance}`);
  }
  const ids = session.promptIds(one.question, [image]);
  if (ids.join() !== one.ids.join()) {
    return [...found, `${one.name}: prompt ids differ (${ids.length} ids, expected ${one.ids.length})`];
  }
  if (JSON.stringify(session.positions(ids, [image])) !== JSON.stringify(one.positions)) {
    found.push(`${one.name}: positions differ`);
  }
  if (!withLogits) return found;
  const logits = await session.prefill(ids, [await session.encode(image)]);
  for (const top of one.top) {
    const gap = Math.abs(logits[top.id] - top.logit);
    if (!(gap <= one.logitTolerance)) {
      found.push(`${one.name}: logit of id ${top.id} differs by ${gap}, allowed ${one.logitTolerance}`);
    }
  }
  return found;
}

/** `withLogits`: also run the model. */
export async function check(session, withLogits = true) {
  const cases = await readCases(session.files);
  const lines = [];
  for (const one of cases) lines.push(...(await differences(session, one, withLogits)));
  return { cases: cases.length, lines };
}
