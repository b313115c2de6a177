// Schedules: what is due when, what was set aside, and the button that cancels one.

import { inWords } from "./api.js";
import { confirm } from "./confirm.js";
import { el, find, Rows, say, setText } from "./dom.js";
import { countdown, number, time } from "./format.js";
import { Pages } from "./pages.js";
import { Problem } from "../barnabas/barnabas.js";

/** Schedules of a page. */
const PAGE = 50;
const TICK_MS = 200;
/** Its owner applies a command in milliseconds, as a rule: so often it is asked whether one that was cancelled is gone, before the next poll. */
const LOOKS = 5;
const LOOK_MS = 500;

/** @typedef {import("./types.d.ts").Schedule} Schedule */

/** When a schedule comes: the cron expression, or once. @param {Schedule} schedule */
export function whenOf({ cron, time_zone }) {
  return cron === undefined ? "once" : `${cron} · ${time_zone}`;
}

/** What becomes of it. @param {Schedule} schedule */
export function targetOf({ event }) {
  const about = [event.type, event.subject ?? event.partitionkey].filter((part) => part !== undefined);
  return about.length > 0 ? `${event.topic} · ${about.join(" · ")}` : event.topic;
}

export class SchedulesSection {
  #section;
  #api;
  #context;
  #changed;
  #rows;
  #show;
  #pages = new Pages();
  /** @type {import("./types.d.ts").SchedulePage} */ #page = { schedules: [], next: null };
  /** Cancelled from here, and still listed: the log has the command, its owner has not applied it yet. @type {Set<string>} */ #cancelled = new Set();
  #looks = 0;
  #asked = 0;
  /** When the schedule is due that is due first; null: there is none, or it is not known. @type {number | null} */ firstDueMs = null;

  /**
   * @param {HTMLElement} section
   * @param {import("./api.js").Api} api
   * @param {import("./blocked.js").Context} context
   * @param {() => void} changed one was cancelled, or other ones are wanted
   */
  constructor(section, api, context, changed) {
    this.#section = section;
    this.#api = api;
    this.#context = context;
    this.#changed = changed;
    const cancel = (/** @type {Schedule} */ schedule) => this.#cancel(schedule);
    this.#rows = new Rows(find(section, ".list"), (/** @type {Schedule} */ { id }) => id, () => new ScheduleRow(context, this.#cancelled, cancel));
    this.#show = /** @type {HTMLSelectElement} */ (find(section, "select"));
    this.#show.addEventListener("change", () => this.#turn(() => (this.#pages = new Pages())));
    find(section, ".back").addEventListener("click", () => this.#turn(() => this.#pages.back()));
    find(section, ".forward").addEventListener("click", () => this.#turn(() => this.#page.next !== null && this.#pages.forward(this.#page.next, this.#page.schedules.length)));
    setInterval(() => {
      for (const row of this.#rows) /** @type {ScheduleRow} */ (row).tick();
    }, TICK_MS);
  }

  /** @param {() => unknown} go */
  #turn(go) {
    go();
    // What is asked for by now is another page.
    this.#asked++;
    this.#changed();
  }

  async refresh() {
    const asked = ++this.#asked;
    const after = this.#pages.cursor;
    const isRefused = this.#show.value === "refused";
    const page = await this.#ask({ limit: PAGE, after, refused: isRefused });
    if (asked !== this.#asked) return;
    if (page && after === null && !isRefused) this.firstDueMs = dueMs(page.schedules[0]);
    this.#page = page ?? { schedules: [], next: null };
    this.#draw(page === null);
    if (this.#cancelled.size === 0 || this.#looks === 0) return;
    this.#looks--;
    setTimeout(this.#changed, LOOK_MS);
  }

  /**
   * @param {{ limit: number, after: string | null, refused: boolean }} wanted
   * @returns {Promise<import("./types.d.ts").SchedulePage | null>} null: there can be no schedules
   */
  async #ask(wanted) {
    try {
      return await this.#api.schedules(wanted);
    } catch (error) {
      if (error instanceof Problem && error.code === "no-schedules") return null;
      throw error;
    }
  }

  /** @param {boolean} isClosed whether there can be none */
  #draw(isClosed) {
    const { schedules, next } = this.#page;
    const listed = new Set(schedules.map(({ id }) => id));
    for (const id of this.#cancelled) if (!listed.has(id)) this.#cancelled.delete(id);
    this.#rows.show(schedules, find(this.#section, "h2"));
    const none = isClosed ? "No topic is open for posting, so there is nothing to schedule." : "There are none.";
    say(find(this.#section, ".empty"), schedules.length > 0 ? "" : none);
    find(this.#section, ".scroll").hidden = schedules.length === 0;
    setText(find(this.#section, ".page"), this.#pages.words(schedules.length));
    find(this.#section, ".pager").hidden = this.#pages.isFirst && next === null;
    /** @type {HTMLButtonElement} */ (find(this.#section, ".back")).disabled = this.#pages.isFirst;
    /** @type {HTMLButtonElement} */ (find(this.#section, ".forward")).disabled = next === null;
    if (!this.#pages.isFirst || this.#show.value === "refused") return;
    setText(find(document, "#schedules-count"), `${number(schedules.length)}${next === null ? "" : "+"}`);
  }

  /** @param {Schedule} schedule */
  async #cancel(schedule) {
    const error = find(this.#section, ".gone");
    say(error, "");
    const { id } = schedule;
    const text = `Its event will not be produced: ${targetOf(schedule)}. Nothing brings the schedule back but submitting it again.`;
    try {
      if (!(await confirm({ title: `Cancel ${id}?`, text, yes: "Cancel the schedule", no: "Keep it" }))) return;
      await this.#api.cancelSchedule(id);
      this.#cancelled.add(id);
      this.#looks = LOOKS;
      this.#rows.of(schedule)?.show(schedule);
      this.#context.announce(`Cancelled: ${id}`);
      this.#changed();
    } catch (problem) {
      say(error, `${id}: ${inWords(problem)}`);
    }
  }
}

/** @param {Schedule | undefined} schedule */
function dueMs(schedule) {
  const due = schedule?.due;
  return due ? Date.parse(due) : null;
}

class ScheduleRow {
  #context;
  #cancelled;
  /** @type {Schedule | undefined} */ #schedule;
  #id = el("th", { scope: "row" });
  #left = el("span", { class: "left" });
  #due = el("time", { class: "hint" });
  #when = el("td");
  #target = el("td", { class: "what" });
  #refused = el("p", { class: "message" });
  #button = el("button", { type: "button", class: "cancel button small danger" });
  root = el("tr", {}, this.#id, el("td", {}, this.#left, el("br"), this.#due), this.#when, this.#target, el("td", {}, this.#button));

  /**
   * @param {import("./blocked.js").Context} context
   * @param {Set<string>} cancelled
   * @param {(schedule: Schedule) => void} cancel
   */
  constructor(context, cancelled, cancel) {
    this.#context = context;
    this.#cancelled = cancelled;
    this.#button.addEventListener("click", () => this.#schedule && cancel(this.#schedule));
  }

  /** @param {Schedule} schedule */
  show(schedule) {
    this.#schedule = schedule;
    setText(this.#id, schedule.id);
    setText(this.#when, whenOf(schedule));
    if (!this.#refused.parentElement) this.#target.append(el("span"), this.#refused);
    setText(find(this.#target, "span"), targetOf(schedule));
    say(this.#refused, schedule.refused ?? "");
    const due = dueMs(schedule);
    this.#due.hidden = due === null;
    if (due !== null) this.#due.dateTime = new Date(due).toISOString();
    setText(this.#due, due === null ? "" : time(due));
    const isCancelled = this.#cancelled.has(schedule.id);
    setText(this.#button, isCancelled ? "Cancelled" : "Cancel");
    this.#button.setAttribute("aria-label", `${isCancelled ? "Cancelled" : "Cancel"}: ${schedule.id}`);
    this.#button.disabled = isCancelled;
    this.root.dataset.schedule = schedule.id;
    this.tick();
  }

  tick() {
    const due = dueMs(this.#schedule);
    setText(this.#left, due === null ? "set aside" : countdown(due, this.#context.clock.now()));
  }
}
