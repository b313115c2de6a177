// A question that is asked again and again while somebody looks.

export class Poll {
  #everyMs;
  #ask;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #timer;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #soon;
  #isAsking = false;
  #isWantedAgain = false;

  /**
   * @param {number} everyMs from an answer to the next question
   * @param {() => Promise<void>} ask handles its own errors
   */
  constructor(everyMs, ask) {
    this.#everyMs = everyMs;
    this.#ask = ask;
    document.addEventListener("visibilitychange", () => {
      if (isVisible()) this.now();
      else clearTimeout(this.#timer);
    });
    this.now();
  }

  /** Asks now; while a question is out, once more after its answer, which may have been on its way already. */
  async now() {
    clearTimeout(this.#timer);
    if (this.#isAsking) {
      this.#isWantedAgain = true;
      return;
    }
    this.#isAsking = true;
    do {
      this.#isWantedAgain = false;
      await this.#ask();
    } while (this.#isWantedAgain);
    this.#isAsking = false;
    if (isVisible()) this.#timer = setTimeout(() => this.now(), this.#everyMs);
  }

  /**
   * Asks soon, once for all who want it until then.
   * @param {number} withinMs
   */
  soon(withinMs) {
    this.#soon ??= setTimeout(() => {
      this.#soon = undefined;
      this.now();
    }, withinMs);
  }
}

function isVisible() {
  return document.visibilityState === "visible";
}
