// The way through pages of which each only knows the next.

import { number } from "./format.js";

/** Where this page begins, and each of those before it. */
export class Pages {
  /** @type {{ cursor: string | null, start: number }[]} */ #way = [{ cursor: null, start: 0 }];

  get #here() {
    return this.#way[this.#way.length - 1];
  }

  /** The cursor of this page; null: the first. */
  get cursor() {
    return this.#here.cursor;
  }

  get isFirst() {
    return this.#way.length === 1;
  }

  /**
   * @param {string} next where the page after this one begins
   * @param {number} length of this page
   */
  forward(next, length) {
    this.#way.push({ cursor: next, start: this.#here.start + length });
  }

  back() {
    if (!this.isFirst) this.#way.pop();
  }

  /**
   * Which of them this page shows.
   * @param {number} length of this page
   * @param {number} [matching] from this page on; without: it is not known
   */
  words(length, matching) {
    const { start } = this.#here;
    if (length === 0) return "";
    return `${number(start + 1)}–${number(start + length)}${matching === undefined ? "" : ` of ${number(start + matching)}`}`;
  }
}
