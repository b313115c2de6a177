// What is behind: the groups with records that wait for them, the furthest behind first.

import { el, find, Rows, say, setText } from "./dom.js";
import { counted, duration, number } from "./format.js";

/** A schedule that is later than that is said to be late; owners commit several times a second. */
const LATE_MS = 5000;

/** @typedef {import("./types.d.ts").Group} Group */
/** @typedef {import("./types.d.ts").Table} Table */
/** @typedef {{ group: string, is: string, lag: number, unknown: number, worst: Group["partitions"][0] | undefined, nobody: number }} Lagging */

/**
 * The groups that are behind, or of which it is not known.
 * @param {Group[]} groups
 * @param {Table[]} tables which tell owners of stores and schedules from other groups
 * @returns {Lagging[]}
 */
export function lagging(groups, tables) {
  const kinds = new Map(tables.map(({ topic, kind }) => [topic, kind]));
  const behind = groups.filter(({ lag, lag_unknown }) => lag > 0 || lag_unknown > 0);
  const told = behind.map(({ group, projection, operated, lag, lag_unknown, partitions }) => {
    const late = partitions.filter((partition) => partition.lag === null || partition.lag > 0);
    const [worst] = [...late].sort((a, b) => (b.lag ?? -1) - (a.lag ?? -1));
    const kind = kinds.get(group);
    const other = projection === undefined ? "other program" : "projection";
    const is = kind === "store" ? "atomic store" : kind === "schedules" ? "schedules" : operated ? "consumers" : other;
    return { group, is, lag, unknown: lag_unknown, worst, nobody: late.filter(({ member }) => member === null).length };
  });
  return told.sort((a, b) => b.lag - a.lag || b.unknown - a.unknown || (a.group < b.group ? -1 : 1));
}

/** How far behind a group is, as far as that is known. @param {{ lag: number, unknown: number }} lagging */
export function lagText({ lag, unknown }) {
  if (unknown === 0) return number(lag);
  return lag === 0 ? "not known" : `at least ${number(lag)}`;
}

/**
 * What to say of the schedule that is due first, if it is late.
 * @param {number | null} dueMs
 * @param {number} nowMs
 */
export function lateText(dueMs, nowMs) {
  if (dueMs === null || nowMs - dueMs < LATE_MS) return "";
  return `Schedules are late: the first of them was due ${duration(nowMs - dueMs)} ago.`;
}

export class LaggingSection {
  #section;
  #rows;

  /** @param {HTMLElement} section */
  constructor(section) {
    this.#section = section;
    this.#rows = new Rows(find(section, ".list"), (/** @type {Lagging} */ { group }) => group, () => new LaggingRow());
  }

  /**
   * @param {Lagging[]} all
   * @param {string} late what is said of schedules
   */
  show(all, late) {
    this.#rows.show(all, find(this.#section, "h2"));
    find(this.#section, ".empty").hidden = all.length > 0 || late !== "";
    find(this.#section, ".scroll").hidden = all.length === 0;
    say(find(this.#section, ".late"), late);
    setText(find(document, "#lagging-count"), number(all.length));
  }
}

class LaggingRow {
  #group = el("th", { scope: "row" });
  #is = el("td");
  #lag = el("td", { class: "number lag" });
  #worst = el("td", { class: "where" });
  root = el("tr", {}, this.#group, this.#is, this.#lag, this.#worst);

  /** @param {Lagging} lagging */
  show(lagging) {
    const { group, is, worst, nobody } = lagging;
    setText(this.#group, group);
    setText(this.#is, is);
    setText(this.#lag, lagText(lagging));
    const where = worst ? `${worst.topic}, partition ${worst.partition}: ${worst.lag === null ? "not known" : number(worst.lag)}` : "–";
    setText(this.#worst, nobody > 0 ? `${where}; ${counted(nobody, "partition")} of nobody` : where);
    this.root.dataset.group = group;
  }
}
