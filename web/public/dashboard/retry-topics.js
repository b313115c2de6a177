// Retry topics: what waits there, and until when.

import { el, find, Rows, setText } from "./dom.js";
import { countdown, duration, number } from "./format.js";

const TICK_MS = 200;

/** @typedef {import("./types.d.ts").RetryTopic} RetryTopic */

export class RetryTopicsSection {
  #section;
  #api;
  #rows;

  /**
   * @param {HTMLElement} section
   * @param {import("./api.js").Api} api
   * @param {import("./clock.js").Clock} clock
   */
  constructor(section, api, clock) {
    this.#section = section;
    this.#api = api;
    this.#rows = new Rows(find(section, ".list"), (/** @type {RetryTopic} */ { topic }) => topic, () => new RetryTopicRow(clock));
    setInterval(() => {
      for (const row of this.#rows) /** @type {RetryTopicRow} */ (row).tick();
    }, TICK_MS);
  }

  async refresh() {
    const topics = await this.#api.retryTopics();
    this.#rows.show(topics);
    find(this.#section, ".empty").hidden = topics.length > 0;
    find(this.#section, ".scroll").hidden = topics.length === 0;
    const waiting = topics.reduce((sum, topic) => sum + topic.waiting, 0);
    setText(find(document, "#retry-topics-count"), number(waiting));
  }
}

class RetryTopicRow {
  #clock;
  #topic = el("th", { scope: "row" });
  #delay = el("td", { class: "number" });
  #waiting = el("td", { class: "number waiting" });
  #due = el("td", { class: "number due" });
  root = el("tr", {}, this.#topic, this.#delay, this.#waiting, this.#due);
  /** @type {number | null} */ #dueMs = null;

  /** @param {import("./clock.js").Clock} clock */
  constructor(clock) {
    this.#clock = clock;
  }

  /** @param {RetryTopic} topic */
  show({ topic, delay_ms, waiting, next_due_ms }) {
    setText(this.#topic, topic);
    setText(this.#delay, duration(delay_ms));
    setText(this.#waiting, number(waiting));
    this.#dueMs = next_due_ms;
    this.tick();
  }

  tick() {
    setText(this.#due, this.#dueMs === null ? "–" : countdown(this.#dueMs, this.#clock.now()));
  }
}
