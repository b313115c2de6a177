// Consumer groups: who is in them, how far behind they are, and how fast they go.

import { el, find, Rows, say, setText } from "./dom.js";
import { counted, number, rate } from "./format.js";

/** Rates are means over so much time; a shorter one jumps with each batch. */
const WINDOW_MS = 10_000;

/** @typedef {import("./types.d.ts").Group} Group */

/** How fast groups move, from what successive polls say. */
export class Rates {
  /** @type {Map<string, { samples: { atMs: number, done: number, come: number }[], partitions: Group["partitions"] }>} */ #groups = new Map();

  /**
   * @param {Group[]} groups
   * @param {number} atMs when they were asked for, by a clock that only goes forward
   */
  hear(groups, atMs) {
    const before = this.#groups;
    this.#groups = new Map();
    for (const { group, partitions } of groups) {
      const last = before.get(group);
      const moved = last ? movedSince(last.partitions, partitions) : { done: 0, come: 0 };
      const sums = last?.samples.at(-1) ?? { done: 0, come: 0 };
      const sample = { atMs, done: sums.done + moved.done, come: sums.come + moved.come };
      const samples = [...(last?.samples ?? []), sample];
      // The one before the window's begin is kept, so that there are always two.
      while (samples.length > 2 && samples[1].atMs <= atMs - WINDOW_MS) samples.shift();
      this.#groups.set(group, { samples, partitions });
    }
  }

  /**
   * Records per second that a group has committed, and that have come for it; undefined until there were two polls.
   * @param {string} group
   * @returns {{ done: number | undefined, come: number | undefined }}
   */
  of(group) {
    const samples = this.#groups.get(group)?.samples ?? [];
    const [first, last] = [samples[0], samples.at(-1)];
    if (!first || !last || last.atMs <= first.atMs) return { done: undefined, come: undefined };
    const seconds = (last.atMs - first.atMs) / 1000;
    return { done: (last.done - first.done) / seconds, come: (last.come - first.come) / seconds };
  }
}

/**
 * What moved between two polls. A partition that is new has not moved, and one that was set back or had nothing committed has not either.
 * @param {Group["partitions"]} before
 * @param {Group["partitions"]} after
 */
function movedSince(before, after) {
  const known = new Map(before.map((partition) => [placeOf(partition), partition]));
  let [done, come] = [0, 0];
  for (const partition of after) {
    const last = known.get(placeOf(partition));
    if (!last) continue;
    if (partition.committed !== null && last.committed !== null) done += Math.max(0, partition.committed - last.committed);
    come += Math.max(0, partition.end - last.end);
  }
  return { done, come };
}

/** @param {{ topic: string, partition: number }} place */
function placeOf({ topic, partition }) {
  return `${topic}/${partition}`;
}

/** A member with where it is, if that is known. @param {Group} group @param {string | null} id */
function owner({ members }, id) {
  if (id === null) return "nobody";
  const member = members.find(({ member }) => member === id);
  return member ? `${id} at ${member.host}` : id;
}

export class GroupsSection {
  #section;
  #api;
  #rates = new Rates();
  #rows;
  #others;
  /** @type {Group[]} */ #groups = [];

  /**
   * @param {HTMLElement} section
   * @param {import("./api.js").Api} api
   */
  constructor(section, api) {
    this.#section = section;
    this.#api = api;
    const table = find(section, ".list");
    this.#rows = new Rows(table, (/** @type {Group} */ { group }) => group, () => new GroupRow(this.#rates));
    this.#others = /** @type {HTMLInputElement} */ (find(section, ".others input"));
    this.#others.addEventListener("change", () => this.#show());
  }

  get all() {
    return this.#groups;
  }

  async refresh() {
    const groups = await this.#api.groups();
    this.#rates.hear(groups, performance.now());
    this.#groups = groups;
    this.#show();
  }

  #show() {
    const others = this.#groups.filter(({ operated }) => !operated).length;
    const isOperated = others < this.#groups.length;
    find(this.#section, ".others").hidden = others === 0 || !isOperated;
    setText(find(this.#section, ".others span"), `${counted(others, "other group")} too`);
    const areOthersShown = this.#others.checked || !isOperated;
    const shown = this.#groups.filter(({ operated }) => operated || areOthersShown);
    this.#rows.show(shown, find(this.#section, "h2"));
    find(this.#section, ".empty").hidden = shown.length > 0;
    find(this.#section, ".scroll").hidden = shown.length === 0;
    setText(find(document, "#groups-count"), number(shown.length));
  }
}

class GroupRow {
  root = el("tbody");
  #rates;
  #toggle = el("button", { type: "button", class: "toggle", "aria-expanded": "false" });
  #cells = { members: el("td", { class: "number members" }), lag: el("td", { class: "number lag" }), come: el("td", { class: "number come" }), done: el("td", { class: "number done" }) };
  #details = el("tr", { class: "details" });
  #note = el("p", { class: "hint" });
  #partitions = el("tbody");

  /** @param {Rates} rates */
  constructor(rates) {
    this.#rates = rates;
    const names = ["Topic", "Partition", "Committed", "End", "Lag"];
    const heads = names.map((name, i) => el("th", { scope: "col", class: i > 0 ? "number" : "" }, name));
    const head = el("tr", {}, ...heads, el("th", { scope: "col" }, "Member"));
    const table = el("table", {}, el("thead", {}, head), this.#partitions);
    this.#details.append(el("td", { colspan: "5" }, this.#note, el("div", { class: "scroll" }, table)));
    this.#details.hidden = true;
    this.#toggle.addEventListener("click", () => {
      this.#details.hidden = !this.#details.hidden;
      this.#toggle.setAttribute("aria-expanded", String(!this.#details.hidden));
    });
    const { members, lag, come, done } = this.#cells;
    this.root.append(el("tr", {}, el("th", { scope: "row" }, this.#toggle), members, lag, come, done), this.#details);
  }

  /** @param {Group} group */
  show(group) {
    const { done, come } = this.#rates.of(group.group);
    setText(this.#toggle, group.group);
    this.root.dataset.group = group.group;
    setText(this.#cells.members, number(group.members.length));
    setText(this.#cells.lag, group.lag_unknown > 0 ? `at least ${number(group.lag)}` : number(group.lag));
    setText(this.#cells.come, rate(come));
    setText(this.#cells.done, rate(done));
    say(this.#note, group.operated ? "" : "Its consumers take no commands from here.");
    const rows = group.partitions.map(({ topic, partition, committed, end, lag, member }) => {
      const texts = [number(partition), committed === null ? "nothing yet" : number(committed), number(end), lag === null ? "not known" : number(lag)];
      const numbers = texts.map((text) => el("td", { class: "number" }, text));
      return el("tr", {}, el("td", {}, topic), ...numbers, el("td", {}, owner(group, member)));
    });
    this.#partitions.replaceChildren(...rows);
  }
}
