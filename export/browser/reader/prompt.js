/**
 * The manifest's prompt section: a conversation in token ids, proved equal to the chat template by the exporter.
 *
 * In: JSON; then a question and prepared pictures. Out: ids. Not here: text to ids (`tokenizer.js`).
 */
import { PocketError } from './errors.js';
import { Fields } from './fields.js';

const SEGMENTS = {
  ids: (fields) => ({ ids: fields.ints('ids') }),
  image: (fields) => ({ between: fields.ints('between') }),
  question: (fields) => ({
    before: fields.string('before'),
    after: fields.string('after'),
    trim: fields.bool('trim', false),
  }),
};

// what Python's str.strip takes off; String.prototype.trim takes another set
const BLANK = '[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]';
const ENDS = new RegExp(`^${BLANK}+|${BLANK}+$`, 'g');

function segments(list) {
  return list.map((fields) => {
    const kind = fields.string('kind');
    if (!Object.hasOwn(SEGMENTS, kind)) throw fields.wrong('kind', `ids, image or question, not ${kind}`);
    return fields.finish({ kind, ...SEGMENTS[kind](fields) });
  });
}

function optionalSegments(fields, key) {
  const found = fields.find(key);
  if (found === undefined) return null;
  if (!Array.isArray(found)) throw fields.wrong(key, 'a list');
  return segments(found.map((value, index) => new Fields(value, `${fields.place}.${key}[${index}]`)));
}

function tiled(fields) {
  const isIds = (ids) => Array.isArray(ids) && ids.every(Number.isSafeInteger);
  const cells = fields.array('cells');
  if (!cells.every((row) => Array.isArray(row) && row.every(isIds))) throw fields.wrong('cells', 'rows of lists');
  return fields.finish({
    cells,
    before: fields.ints('before'),
    rowEnd: fields.ints('row_end'),
    whole: fields.ints('whole'),
    after: fields.ints('after'),
  });
}

function later(fields) {
  fields.skip('answer_before');
  return fields.finish({
    turnEnd: fields.ints('turn_end'),
    user: optionalSegments(fields, 'user'),
    userWithoutImage: segments(fields.list('user_without_image')),
  });
}

/** Ids of a conversation's turns. */
export class Prompt {
  constructor(fields) {
    const image = fields.fields('image');
    this.image = image.finish({
      before: image.ints('before'),
      token: image.int('token'),
      after: image.ints('after'),
      tiled: image.optional('tiled', tiled),
    });
    this.system = fields.ints('system');
    this.user = segments(fields.list('user'));
    this.userWithoutImage = optionalSegments(fields, 'user_without_image');
    this.assistant = fields.ints('assistant');
    this.later = fields.optional('later', later);
    this.refused = fields.strings('refused_text');
    fields.finish();
  }

  /** Ids of the first turn. */
  first(question, images, tokenizer) {
    const user = images.length ? this.user : this.userWithoutImage;
    if (!user) throw new PocketError('question: needs a picture in this bundle; add one');
    return [...this.system, ...this.#turn(user, question, images, tokenizer), ...this.assistant];
  }

  /** Ids of a further turn, which follow an answer; `ended` is its last id if that ended it, else null. */
  further(question, images, tokenizer, ended) {
    if (!this.later) {
      throw new PocketError('question: this bundle answers one question at a time; start a new conversation');
    }
    const user = images.length ? this.later.user : this.later.userWithoutImage;
    if (!user) {
      throw new PocketError('question: has a picture, but later questions of this bundle take none; start anew');
    }
    const end = this.later.turnEnd;
    const closed = end.length && end[0] === ended ? end.slice(1) : end;
    return [...closed, ...this.#turn(user, question, images, tokenizer), ...this.assistant];
  }

  #turn(user, question, images, tokenizer) {
    for (const text of this.refused) {
      if (question.includes(text)) {
        throw new PocketError(`question: contains ${text}, which stands for a picture; leave it out`);
      }
    }
    return user.flatMap((segment) => {
      if (segment.kind === 'ids') return segment.ids;
      if (segment.kind === 'question') {
        const asked = segment.trim ? question.replace(ENDS, '') : question;
        return tokenizer.encode(segment.before + asked + segment.after);
      }
      return images.flatMap((image, nth) => [...(nth ? segment.between : []), ...this.#picture(image)]);
    });
  }

  #picture(image) {
    const { before, after, token, tiled: spec } = this.image;
    const tokens = (count) => new Array(count).fill(token);
    const [rows, columns] = image.tiles;
    if (!spec || rows * columns === 0) return [...before, ...tokens(image.tokens), ...after];
    if (rows > spec.cells.length || columns > Math.min(...spec.cells.map((row) => row.length))) {
      throw new PocketError(`prompt.image.tiled: has no ids for ${rows} x ${columns} tiles; re-export`);
    }
    const ids = [...spec.before];
    for (let row = 0; row < rows; row++) {
      if (row) ids.push(...spec.rowEnd);
      for (let column = 0; column < columns; column++) {
        ids.push(...spec.cells[row][column], ...tokens(image.views[row * columns + column].tokens));
      }
    }
    if (image.views.length > rows * columns) ids.push(...spec.whole, ...tokens(image.views.at(-1).tokens));
    return [...ids, ...spec.after];
  }
}
