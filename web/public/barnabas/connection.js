// A connection that outlives its transports: it tries them in turn, remembers the one that got through, comes back after every
// end, and goes on behind the last event that each subscription has seen. So nothing is lost and nothing comes twice, whatever
// happens underneath.

import { Backoff } from "./backoff.js";
import { Subscription } from "./subscription.js";
import { LongPollTransport, SseTransport, WebSocketTransport } from "./transports.js";

/** A transport that has not answered by then is given up: a black-holed upgrade gives no event at all. */
const CONNECT_MS = 5000;
/** What is added to the gateway's own interval before silence counts as a cut. */
const SILENCE_MS = 10_000;
/** How often the clock is looked at, and a jump that means that the machine has slept. */
const TICK_MS = 2000;
const SLEPT_MS = 15_000;
/** How long a lesser transport is kept before the better ones are tried again. */
const BETTER_MS = 5 * 60_000;
const REMEMBERED = "barnabas.transport";

const TRANSPORTS = [WebSocketTransport, SseTransport, LongPollTransport];

/** @typedef {import("./transports.js").Transport} Transport */
/** @typedef {import("./barnabas.d.ts").State} State */

export class Connection extends EventTarget {
  #url;
  #jwt;
  #backoff = new Backoff();
  /** @type {Map<string, Subscription>} */ #subscriptions = new Map();
  /** @type {Map<number, string>} channels of subscribe commands that are not answered yet */ #asked = new Map();
  #nextId = 1;
  /** @type {(typeof TRANSPORTS)[number][]} */ #transports;
  #index = 0;
  #triedInARow = 0;
  /** @type {Transport | null} */ #transport = null;
  /** Whether the transport has got through. */ #proven = false;
  #silentAfterMs = 25_000 + SILENCE_MS;
  #heardAt = 0;
  #openedAt = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #timer;
  #ticker;
  #tickedAt = Date.now();
  /** @type {State} */ #state = { name: "connecting" };
  #online = () => this.#retryNow();
  #shown = () => {
    if (globalThis.document?.visibilityState === "visible") this.#lookAtClock();
  };

  /** @param {import("./barnabas.d.ts").ConnectOptions} options */
  constructor({ url, token, transports } = {}) {
    super();
    this.#url = url ?? globalThis.location?.origin;
    if (!this.#url) throw new TypeError("connect: url is missing");
    this.#jwt = token;
    this.#transports = choose(transports);
    this.#index = Math.max(0, this.#transports.findIndex(({ label }) => label === remembered()));
    globalThis.addEventListener?.("online", this.#online);
    globalThis.document?.addEventListener("visibilitychange", this.#shown);
    this.#ticker = setInterval(() => this.#lookAtClock(), TICK_MS);
    // After the caller has had the chance to listen.
    this.#timer = setTimeout(() => this.#open(), 0);
  }

  /** @returns {State} */
  get state() {
    return this.#state;
  }

  /**
   * Follows a channel until it is unsubscribed. A channel can be followed once on a connection.
   * @param {string} channel
   * @param {import("./barnabas.d.ts").SubscribeOptions} options
   * @param {(event: import("./barnabas.d.ts").BarnabasEvent) => void} onEvent
   * @param {(gap: import("./barnabas.d.ts").Gap) => void} [onGap] events were missed, and why
   */
  subscribe(channel, options, onEvent, onGap) {
    if (this.#state.name === "closed") throw new Error("the connection is closed");
    if (this.#subscriptions.has(channel)) throw new Error(`channel ${channel} is subscribed already`);
    const subscription = new Subscription(channel, options, onEvent, onGap, () => this.#unsubscribe(subscription));
    this.#subscriptions.set(channel, subscription);
    if (this.#isConnected) this.#send([this.#ask(subscription)]);
    return subscription;
  }

  /**
   * Uses these transports only, from now on.
   * @param {import("./barnabas.d.ts").TransportName[]} [names] without: all of them
   */
  use(names) {
    this.#transports = choose(names);
    this.#index = 0;
    this.#triedInARow = 0;
    remember(undefined);
    this.#backoff.reset();
    this.#retryNow(true);
  }

  /** Ends it for good. */
  close() {
    this.#stop({ name: "closed", reason: "by the page" });
  }

  get #isConnected() {
    return this.#transport !== null && this.#connected;
  }

  /** Whether the gateway was told who connects. */ #connected = false;

  #open() {
    clearTimeout(this.#timer);
    const Chosen = this.#transports[this.#index];
    this.#setState({ name: "connecting", transport: Chosen.label });
    this.#proven = false;
    this.#connected = false;
    /** @type {Transport} */ let transport;
    try {
      transport = new Chosen(this.#url);
    } catch {
      // A page's policy can forbid one.
      this.#ended({ code: 1006, reason: "" });
      return;
    }
    this.#transport = transport;
    this.#timer = setTimeout(() => {
      this.#drop();
      this.#ended({ code: 1006, reason: "" });
    }, CONNECT_MS);
    transport.onopen = () => {
      const connect = { id: this.#nextId++, connect: this.#jwt ? { jwt: this.#jwt } : {} };
      this.#send([connect, ...[...this.#subscriptions.values()].map((subscription) => this.#ask(subscription))]);
      // Commands are obeyed in order: what the page asks for from here on need not wait for the answer.
      this.#connected = true;
    };
    transport.onmessage = (text) => {
      this.#heardAt = Date.now();
      for (const line of text.split("\n")) {
        if (transport !== this.#transport) return;
        this.#hear(JSON.parse(line));
      }
    };
    transport.onclose = (closed) => {
      if (transport !== this.#transport) return;
      this.#transport = null;
      this.#ended(closed);
    };
  }

  /** @param {any} frame */
  #hear({ id, connected, subscribed, event, gap, bye, error, ...rest }) {
    if (connected) {
      this.#silentAfterMs = connected.ping_s * 1000 + SILENCE_MS;
      if (this.#asked.size === 0) this.#prove();
    } else if (subscribed) {
      this.#asked.delete(id);
      this.#subscriptions.get(subscribed.channel)?.begin(subscribed);
      this.#prove();
    } else if (event) {
      this.#begun(event.channel)?.deliver(event);
    } else if (gap) {
      this.#begun(gap.channel)?.miss(gap);
    } else if (error) {
      this.#refused(id, error);
    } else if (bye) {
      this.#drop();
      this.#ended({ code: 1012, reason: JSON.stringify(bye) });
    } else if (id === undefined && Object.keys(rest).length === 0) {
      this.#transport?.send("{}");
    }
  }

  /**
   * The channel's subscription, unless its answer has not come: what comes before that is of one that was ended.
   * @param {string} channel
   */
  #begun(channel) {
    for (const asked of this.#asked.values()) if (asked === channel) return undefined;
    return this.#subscriptions.get(channel);
  }

  /**
   * @param {number} id
   * @param {{ code: string, message: string, retry: boolean }} error
   */
  #refused(id, error) {
    const channel = this.#asked.get(id);
    this.#asked.delete(id);
    const subscription = channel === undefined ? undefined : this.#subscriptions.get(channel);
    if (!subscription) return;
    if (error.retry) {
      this.#drop();
      this.#ended({ code: 1013, reason: JSON.stringify(error) });
      return;
    }
    this.#prove();
    if (error.code === "bad-token" && subscription.token !== undefined) {
      const gap = { channel: subscription.channel, from: subscription.token, to: "", reason: "bad-token" };
      subscription.forget();
      subscription.miss(gap);
      this.#send([this.#ask(subscription)]);
      return;
    }
    this.#subscriptions.delete(subscription.channel);
    this.dispatchEvent(new CustomEvent("error", { detail: { channel: subscription.channel, ...error } }));
  }

  /** The transport carries events: it is the one to remember. */
  #prove() {
    if (this.#proven) return;
    this.#proven = true;
    this.#triedInARow = 0;
    this.#openedAt = Date.now();
    this.#backoff.reset();
    clearTimeout(this.#timer);
    const { label } = this.#transports[this.#index];
    remember(label);
    this.#setState({ name: "open", transport: label });
  }

  /**
   * The transport has ended, or never began.
   * @param {import("./transports.js").Closed} closed
   */
  #ended({ code, reason }) {
    clearTimeout(this.#timer);
    if (this.#state.name === "closed") return;
    this.#asked.clear();
    const why = parse(reason);
    if (code >= 4500) {
      this.#stop({ name: "closed", reason: why.code ?? String(code) });
      return;
    }
    if (!this.#proven) {
      this.#index = (this.#index + 1) % this.#transports.length;
      this.#triedInARow += 1;
      // The next way at once; only when all have failed it is worth waiting.
      if (this.#triedInARow < this.#transports.length) {
        this.#open();
        return;
      }
      this.#triedInARow = 0;
    }
    const retryMs = this.#backoff.next(why.retry_ms);
    this.#setState({ name: "waiting", retryMs });
    this.#timer = setTimeout(() => this.#open(), retryMs);
  }

  /** @param {boolean} [anyway] also when a transport runs */
  #retryNow(anyway = false) {
    if (this.#state.name === "closed" || (this.#proven && this.#transport && !anyway)) return;
    this.#drop();
    this.#open();
  }

  /** Lets go of the transport without hearing of its end. */
  #drop() {
    const transport = this.#transport;
    this.#transport = null;
    this.#asked.clear();
    if (!transport) return;
    transport.onclose = transport.onmessage = transport.onopen = null;
    transport.close();
  }

  #lookAtClock() {
    const now = Date.now();
    const slept = now - this.#tickedAt > SLEPT_MS;
    this.#tickedAt = now;
    if (this.#state.name === "waiting" && slept) {
      this.#retryNow();
    } else if (this.#proven && this.#transport) {
      const cut = now - this.#heardAt > this.#silentAfterMs;
      const better = this.#index > 0 && now - this.#openedAt > BETTER_MS;
      if (better) this.#index = 0;
      if (slept || cut || better) this.#retryNow(true);
    }
  }

  /** @param {State} last */
  #stop(last) {
    this.#setState(last);
    this.#drop();
    clearTimeout(this.#timer);
    clearInterval(this.#ticker);
    globalThis.removeEventListener?.("online", this.#online);
    globalThis.document?.removeEventListener("visibilitychange", this.#shown);
  }

  /** @param {Subscription} subscription */
  #ask(subscription) {
    const id = this.#nextId++;
    this.#asked.set(id, subscription.channel);
    return { id, subscribe: subscription.wanted() };
  }

  /** @param {Subscription} subscription */
  #unsubscribe({ channel }) {
    this.#subscriptions.delete(channel);
    if (this.#isConnected) this.#send([{ id: this.#nextId++, unsubscribe: { channel } }]);
  }

  /** @param {object[]} frames */
  #send(frames) {
    this.#transport?.send(frames.map((frame) => JSON.stringify(frame)).join("\n"));
  }

  /** @param {State} state */
  #setState(state) {
    this.#state = state;
    this.dispatchEvent(new CustomEvent("state", { detail: state }));
  }
}

/** @param {import("./barnabas.d.ts").TransportName[]} [names] */
function choose(names) {
  const chosen = names ? TRANSPORTS.filter(({ label }) => names.some((name) => name === label)) : TRANSPORTS;
  if (chosen.length === 0) throw new TypeError(`none of these transports is known: ${names}`);
  return chosen;
}

/** @param {string} reason */
function parse(reason) {
  try {
    return JSON.parse(reason) ?? {};
  } catch {
    return {};
  }
}

// Storage can be forbidden: then nothing is remembered.
function remembered() {
  try {
    return globalThis.sessionStorage?.getItem(REMEMBERED);
  } catch {
    return null;
  }
}

/** @param {string | undefined} label */
function remember(label) {
  try {
    if (label) globalThis.sessionStorage?.setItem(REMEMBERED, label);
    else globalThis.sessionStorage?.removeItem(REMEMBERED);
  } catch {
    return;
  }
}
