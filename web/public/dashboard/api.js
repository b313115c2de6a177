// What the page asks of the gateway, and has it do: `/v1/admin`, and `/v1/schedules`.

import { Problem } from "../barnabas/barnabas.js";

/** Questions that are not answered by then are given up. */
const QUESTION_MS = 10_000;
/** A page of a table, or of schedules, is found by reading a whole topic. */
const PAGE_MS = 35_000;
/** The owner of a partition has five seconds to answer; the rest is the way. */
const COMMAND_MS = 15_000;

/** @typedef {import("./types.d.ts").Selection} Selection */

export class Api {
  #operator;
  #heard;

  /**
   * @param {() => string} operator who acts
   * @param {(serverMs: number) => void} heard told the gateway's time with each answer
   */
  constructor(operator, heard = () => {}) {
    this.#operator = operator;
    this.#heard = heard;
  }

  /** @returns {Promise<import("./types.d.ts").Group[]>} */
  async groups() {
    return (await this.#ask("groups")).groups;
  }

  /** @returns {Promise<import("./types.d.ts").Blocked[]>} */
  async blocked() {
    return (await this.#ask("blocked")).blocked;
  }

  /** @returns {Promise<import("./types.d.ts").RetryTopic[]>} */
  async retryTopics() {
    return (await this.#ask("retry-topics")).topics;
  }

  /**
   * Of all groups, newest first.
   * @param {number} limit
   * @returns {Promise<import("./types.d.ts").Action[]>}
   */
  async actions(limit) {
    return (await this.#ask(`actions?limit=${limit}`)).actions;
  }

  /** @returns {Promise<import("./types.d.ts").LetterTopic[]>} */
  async letterTopics() {
    return (await this.#ask("dead-letters")).topics;
  }

  /**
   * Newest first.
   * @param {string} topic
   * @param {{ limit: number, before: string | null, filter: string, state: string }} wanted
   * @returns {Promise<import("./types.d.ts").LetterPage>}
   */
  letters(topic, { limit, before, filter, state }) {
    const query = new URLSearchParams({ limit: String(limit), filter, state });
    if (before !== null) query.set("before", before);
    return this.#ask(`dead-letters/${encodeURIComponent(topic)}?${query}`);
  }

  /** @returns {Promise<import("./types.d.ts").Table[]>} */
  async tables() {
    return (await this.#ask("tables")).tables;
  }

  /**
   * In the order of keys.
   * @param {string} topic
   * @param {{ limit: number, after: string | null, prefix: string }} wanted
   * @returns {Promise<import("./types.d.ts").EntryPage>}
   */
  entries(topic, { limit, after, prefix }) {
    const query = new URLSearchParams({ limit: String(limit), prefix });
    if (after !== null) query.set("after", after);
    return this.#ask(`tables/${encodeURIComponent(topic)}?${query}`, PAGE_MS);
  }

  /**
   * In the order in which they are due; those that were refused, and come last, by themselves if wanted.
   * @param {{ limit: number, after: string | null, refused: boolean }} wanted
   * @returns {Promise<import("./types.d.ts").SchedulePage>}
   */
  schedules({ limit, after, refused }) {
    const query = new URLSearchParams({ limit: String(limit), refused: String(refused) });
    if (after !== null) query.set("after", after);
    return this.#fetch(`schedules?${query}`, { cache: "no-store", signal: AbortSignal.timeout(PAGE_MS) });
  }

  /** Resolves when the log has the command. @param {string} id */
  async cancelSchedule(id) {
    await this.#fetch(`schedules/${encodeURIComponent(id)}`, { method: "DELETE", signal: AbortSignal.timeout(COMMAND_MS) });
  }

  /**
   * Resolves when the owner of the partition has done it.
   * @param {import("./types.d.ts").Command} action
   * @param {import("./types.d.ts").Blocked} blocked
   */
  async command(action, { group, topic, partition, key, key_base64, offset }) {
    const body = { action, topic, partition, key, key_base64, offset };
    await this.#do(`groups/${encodeURIComponent(group)}/commands`, body, AbortSignal.timeout(COMMAND_MS));
  }

  /**
   * Resolves with the number of those that were waiting.
   * @param {"redrive" | "discard"} action
   * @param {string} topic
   * @param {Selection} selection
   * @returns {Promise<number>}
   */
  async settle(action, topic, selection) {
    return (await this.#do(`dead-letters/${encodeURIComponent(topic)}/${action}`, selection)).records;
  }

  /**
   * @param {string} path
   * @param {number} [withinMs]
   */
  #ask(path, withinMs = QUESTION_MS) {
    return this.#fetch(`admin/${path}`, { cache: "no-store", signal: AbortSignal.timeout(withinMs) });
  }

  /**
   * @param {string} path
   * @param {object} body
   * @param {AbortSignal} [signal] without: however long it takes
   */
  #do(path, body, signal) {
    const headers = { "content-type": "application/json", "barnabas-operator": headerText(this.#operator()) };
    return this.#fetch(`admin/${path}`, { method: "POST", headers, body: JSON.stringify(body), signal });
  }

  /**
   * @param {string} path
   * @param {RequestInit} request
   * @returns {Promise<any>}
   */
  async #fetch(path, request) {
    /** @type {Response} */ let answer;
    try {
      answer = await fetch(`/v1/${path}`, request);
    } catch (error) {
      const isLate = error instanceof DOMException && error.name === "TimeoutError";
      throw new Problem(0, isLate ? { code: "late", detail: "the gateway did not answer in time" } : {});
    }
    const date = Date.parse(answer.headers.get("date") ?? "");
    if (!Number.isNaN(date)) this.#heard(date);
    const body = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Problem(answer.status, { detail: `the gateway answers ${answer.status}`, ...body });
    return body;
  }
}

/**
 * A header carries bytes, which browsers want as characters up to 255: this is UTF-8.
 * @param {string} text
 */
export function headerText(text) {
  const bytes = new TextEncoder().encode(text.replace(/\p{Cc}/gu, " "));
  return String.fromCharCode(...bytes);
}

/**
 * What went wrong, for the one who pressed the button.
 * @param {unknown} error
 */
export function inWords(error) {
  if (!(error instanceof Problem)) {
    console.error(error);
    return "Something went wrong in this page.";
  }
  switch (error.status) {
    case 409:
      return `Refused: ${error.message}.`;
    case 504:
      return `No answer: ${error.message}.`;
    default:
      return `${error.message.charAt(0).toUpperCase()}${error.message.slice(1)}.`;
  }
}
