// Who did what and when, in all groups.

import { el, find, Rows, setText } from "./dom.js";
import { counted, keyText, time } from "./format.js";

/** Actions that are shown. */
const SHOWN = 100;
/** Actions that are remembered; an answer can be heard before what it answers. */
const REMEMBERED = 500;

/** @typedef {import("./types.d.ts").Action} Action */

/** What was done, from the gateway's lists and the events since, in whatever order they come. */
export class Actions {
  /** @type {Map<string, Partial<Action> & { id: string }>} */ #byId = new Map();

  /** Newest first. @returns {Action[]} */
  get all() {
    const told = /** @type {Action[]} */ ([...this.#byId.values()].filter(({ action }) => action !== undefined));
    return told.sort((a, b) => b.at_ms - a.at_ms || (a.id < b.id ? 1 : -1));
  }

  /** @param {Partial<Action> & { id: string }} told an action, or only what became of it */
  hear(told) {
    const known = this.#byId.get(told.id);
    const merged = { ...known, ...told };
    if (known && isAnswered(known) && !isAnswered(told)) Object.assign(merged, { done: known.done, reason: known.reason });
    this.#byId.set(told.id, merged);
    if (this.#byId.size > 2 * REMEMBERED) {
      const newest = this.all.slice(0, REMEMBERED);
      this.#byId = new Map(newest.map((action) => [action.id, action]));
    }
  }
}

/** @param {Partial<Action>} action */
function isAnswered({ done }) {
  return done === true || done === false;
}

export class ActionsSection {
  #section;
  #api;
  #actions = new Actions();
  #rows;

  /**
   * @param {HTMLElement} section
   * @param {import("./api.js").Api} api
   */
  constructor(section, api) {
    this.#section = section;
    this.#api = api;
    this.#rows = new Rows(find(section, ".list"), (/** @type {Action} */ { id }) => id, () => new ActionRow());
  }

  async refresh() {
    const actions = await this.#api.actions(SHOWN);
    for (const action of actions.reverse()) this.#actions.hear(action);
    this.#show();
  }

  /** @param {Action} action */
  hear(action) {
    this.#actions.hear(action);
    this.#show();
  }

  #show() {
    const shown = this.#actions.all.slice(0, SHOWN);
    this.#rows.show(shown);
    find(this.#section, ".empty").hidden = shown.length > 0;
    find(this.#section, ".scroll").hidden = shown.length === 0;
  }
}

/** What was done to what. @param {Action} action */
export function whatOf(action) {
  const { action: what, group, topic, partition, offset, records } = action;
  if (records !== undefined) return `${what} ${counted(records, "dead letter")} of ${topic}`;
  const key = keyText(action);
  return `${what} ${key === undefined ? "" : `${key} · `}${group} · ${topic}, partition ${partition}, offset ${offset}`;
}

class ActionRow {
  #when = el("time");
  #who = el("td", { class: "who" });
  #what = el("td", { class: "what" });
  #outcome = el("td", { class: "outcome" });
  root = el("tr", {}, el("td", {}, this.#when), this.#who, this.#what, this.#outcome);

  /** @param {Action} action */
  show(action) {
    const { at_ms, by, done, reason } = action;
    this.#when.dateTime = new Date(at_ms).toISOString();
    setText(this.#when, time(at_ms));
    setText(this.#who, by);
    setText(this.#what, whatOf(action));
    setText(this.#outcome, done === null ? "no answer yet" : done ? "done" : `refused: ${reason}`);
    this.root.dataset.outcome = done === null ? "open" : done ? "done" : "refused";
  }
}
