// How long to wait before the next attempt: exponential with full jitter, so that thousands of clients that lost the same
// gateway do not come back in the same moment. What the gateway asks for goes first.

const FIRST_MS = 500;
const MOST_MS = 30_000;

export class Backoff {
  #failures = 0;

  /** After something went well. */
  reset() {
    this.#failures = 0;
  }

  /**
   * @param {number} [askedMs] what the gateway asked for
   * @param {() => number} [random] from 0 to 1
   * @returns {number} milliseconds
   */
  next(askedMs, random = Math.random) {
    if (askedMs !== undefined) return askedMs;
    const ceiling = Math.min(MOST_MS, FIRST_MS * 2 ** this.#failures);
    this.#failures += 1;
    return Math.round(ceiling / 10 + random() * ceiling * 0.9);
  }
}
