// What SSE and long-poll have in common: commands are answered here, and the gateway is asked over plain requests for all channels
// at once. Subclasses say how events come.

/** @typedef {{ token: string | undefined, since?: string, last?: number }} Place */

export class HttpTransport {
  /** @type {(() => void) | null} */ onopen = null;
  /** @type {((text: string) => void) | null} */ onmessage = null;
  /** @type {((closed: import("./transports.js").Closed) => void) | null} */ onclose = null;
  /** @type {Map<string, Place>} */ channels = new Map();
  #url;
  #ended = false;
  /** @type {AbortController | null} ends the request that brings events */ #running = null;
  /** What is said when the next request gets through: until then a subscription has proven nothing. @type {object[]} */ #pending = [];
  /** Commands are carried out one after the other. */ #work = Promise.resolve();

  /** @param {string} url the gateway's origin */
  constructor(url) {
    this.#url = url;
    queueMicrotask(() => this.onopen?.());
  }

  /** @param {string} text */
  send(text) {
    for (const line of text.split("\n")) {
      const frame = JSON.parse(line);
      this.#work = this.#work.then(() => this.#obey(frame)).catch((error) => this.fail(error));
    }
    this.#work = this.#work.then(() => this.#run());
  }

  close() {
    this.end({ code: 1000, reason: "" });
  }

  /** @param {import("./transports.js").Closed} closed */
  end(closed) {
    if (this.#ended) return;
    this.#ended = true;
    this.#running?.abort();
    this.onclose?.(closed);
  }

  /** @param {unknown} error a request that could not be made, was refused, or broke off */
  fail(error) {
    const refusal = error instanceof Refused ? error : null;
    const forever = refusal !== null && refusal.status >= 400 && refusal.status < 500 && refusal.status !== 429;
    this.end({ code: forever ? 4500 : 1006, reason: JSON.stringify({ code: refusal?.code ?? "unreachable", retry_ms: refusal?.retryMs }) });
  }

  /** @param {object} frame */
  say(frame) {
    if (!this.#ended) this.onmessage?.(JSON.stringify(frame));
  }

  /** The request that brings events has got through. */
  through() {
    const pending = this.#pending;
    this.#pending = [];
    for (const frame of pending) this.say(frame);
  }

  /**
   * Brings events of all channels until it is aborted or the gateway ends it. Says when it is through.
   * @param {AbortSignal} _signal
   * @returns {Promise<void>}
   */
  async receive(_signal) {
    throw new Error("a transport says how events come");
  }

  /**
   * @param {string} path
   * @param {string} accept
   * @param {AbortSignal} [signal]
   * @returns {Promise<Response>}
   */
  async request(path, accept, signal) {
    const answer = await fetch(new URL(path, this.#url), { headers: { accept }, cache: "no-store", signal });
    if (!answer.ok) throw await Refused.of(answer);
    return answer;
  }

  /** The query for all channels, each after its own token. */
  query() {
    const query = new URLSearchParams();
    for (const [channel, place] of this.channels) {
      query.append("channel", channel);
      query.append("after", place.token ?? "");
    }
    return query;
  }

  /** @param {any} frame */
  async #obey({ id, connect, subscribe, unsubscribe, publish }) {
    if (this.#ended) return;
    if (connect) {
      this.say({ id, connected: { session: "", ping_s: this.pingS() } });
    } else if (subscribe) {
      await this.#subscribe(id, subscribe);
    } else if (unsubscribe) {
      this.channels.delete(unsubscribe.channel);
      this.#stop();
      this.say({ id, unsubscribed: { channel: unsubscribe.channel } });
    } else if (publish) {
      const { channel, ...event } = publish;
      const answer = await fetch(new URL(`/v1/channels/${channel}/events`, this.#url), {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify(event),
      });
      if (answer.ok) {
        this.say({ id, published: { token: answer.headers.get("barnabas-token") } });
      } else {
        const { code, message, status } = await Refused.of(answer);
        this.say({ id, error: { code, message, retry: status >= 500 } });
      }
    }
  }

  /** Seconds after which the gateway has given a sign of life. */
  pingS() {
    return 25;
  }

  /**
   * @param {number} id
   * @param {{ channel: string, after?: string, since?: string, last?: number }} wanted
   */
  async #subscribe(id, { channel, after, since, last }) {
    let token = after;
    /** @type {object[]} */ let events = [];
    if (!token) {
      // A first poll that does not wait finds out where the channel is now, and brings what was asked for of the past.
      const query = new URLSearchParams({ wait: "0" });
      if (since) query.set("since", since);
      if (last) query.set("last", String(last));
      const answer = await this.request(`/v1/channels/${channel}/events?${query}`, "application/json");
      ({ token, events } = await answer.json());
    }
    this.channels.set(channel, { token });
    this.#stop();
    this.#pending.push({ id, subscribed: { channel, token: after ?? token, resumed: after !== undefined } });
    for (const event of events) this.#pending.push("gap" in event ? event : { event });
  }

  #stop() {
    this.#running?.abort();
    this.#running = null;
  }

  /** Starts the request that brings events, unless it runs. */
  #run() {
    if (this.#ended || this.#running || this.channels.size === 0) return;
    const running = new AbortController();
    this.#running = running;
    this.receive(running.signal).then(
      () => running.signal.aborted || this.end({ code: 1006, reason: "" }),
      (error) => running.signal.aborted || this.fail(error),
    );
  }

  /**
   * An event has come: the next request goes on behind it.
   * @param {{ channel: string, token: string }} event
   */
  saw(event) {
    const place = this.channels.get(event.channel);
    if (place) place.token = event.token;
  }
}

/** A request that the gateway refused. */
export class Refused extends Error {
  /**
   * @param {number} status
   * @param {string} code
   * @param {string} message
   * @param {number} [retryMs]
   */
  constructor(status, code, message, retryMs) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryMs = retryMs;
  }

  /** @param {Response} answer */
  static async of(answer) {
    const problem = await answer.json().catch(() => ({}));
    const seconds = Number(answer.headers.get("retry-after"));
    const retryMs = seconds > 0 ? seconds * 1000 : undefined;
    return new Refused(answer.status, problem.code ?? `http-${answer.status}`, problem.detail ?? answer.statusText, retryMs);
  }
}
