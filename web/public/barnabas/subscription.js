// One followed channel: where it is, and to whom its events go.

/** Tokens that are remembered so that an event that comes again is known. */
const REMEMBERED_TOKENS = 1024;

export class Subscription {
  channel;
  /** @type {string | undefined} where to go on; undefined until the gateway has said it */ token;
  #since;
  #last;
  #onEvent;
  #onGap;
  #unsubscribe;
  /** @type {Set<string>} */ #seen = new Set();

  /**
   * @param {string} channel
   * @param {import("./barnabas.d.ts").SubscribeOptions} options
   * @param {(event: import("./barnabas.d.ts").BarnabasEvent) => void} onEvent
   * @param {((gap: import("./barnabas.d.ts").Gap) => void) | undefined} onGap
   * @param {() => void} unsubscribe
   */
  constructor(channel, { after, since, last } = {}, onEvent, onGap, unsubscribe) {
    this.channel = channel;
    this.token = after;
    this.#since = since instanceof Date ? since.toISOString() : since;
    this.#last = last;
    this.#onEvent = onEvent;
    this.#onGap = onGap;
    this.#unsubscribe = unsubscribe;
  }

  unsubscribe() {
    this.#unsubscribe();
  }

  /** What the gateway is asked for. */
  wanted() {
    if (this.token !== undefined) return { channel: this.channel, after: this.token };
    return { channel: this.channel, since: this.#since, last: this.#last };
  }

  /** @param {{ token: string }} subscribed */
  begin({ token }) {
    this.token ??= token;
  }

  /** @param {import("./barnabas.d.ts").BarnabasEvent} event */
  deliver(event) {
    if (this.#seen.has(event.token)) return;
    this.#seen.add(event.token);
    if (this.#seen.size > REMEMBERED_TOKENS) {
      const [oldest] = this.#seen;
      this.#seen.delete(oldest);
    }
    this.token = event.token;
    this.#onEvent(event);
  }

  /** @param {import("./barnabas.d.ts").Gap} gap */
  miss(gap) {
    if (gap.to) this.token = gap.to;
    // A log that has lost its end writes other events to the same places.
    this.#seen.clear();
    this.#onGap?.(gap);
  }

  /** The token is of no use: begin anew. */
  forget() {
    this.token = undefined;
    this.#since = this.#last = undefined;
  }
}
