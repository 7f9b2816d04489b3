/** What is wrong, in one line: where, got, wanted, next. */
export class PocketError extends Error {
  constructor(message) {
    super(message);
    this.name = 'PocketError';
  }
}
