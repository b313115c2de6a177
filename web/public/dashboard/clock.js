// The gateway's time: a browser whose clock is wrong counts down right all the same.

/** Answers say their time in whole seconds and are under way for a while; less than this is no difference. */
const TRUSTED_MS = 2000;

export class Clock {
  #offMs = 0;
  #now;

  /** @param {() => number} now the browser's own time */
  constructor(now = Date.now) {
    this.#now = now;
  }

  /** @param {number} serverMs what an answer says that has just come */
  hear(serverMs) {
    const off = serverMs - this.#now();
    this.#offMs = Math.abs(off) > TRUSTED_MS ? off : 0;
  }

  now() {
    return this.#now() + this.#offMs;
  }
}
