// What stands still: its error, when it is tried again, and the buttons. It changes live.

import { inWords } from "./api.js";
import { confirm } from "./confirm.js";
import { el, find, Rows, say, setText } from "./dom.js";
import { countdown, counted, duration, keyText, number, time } from "./format.js";

/** Cards that are shown at first, and so many more with each press. */
const SHOWN_AT_ONCE = 50;
/** How often the countdowns are moved. */
const TICK_MS = 200;

/** @typedef {import("./types.d.ts").Blocked} Blocked */
/** @typedef {import("./types.d.ts").Command} Command */
/** @typedef {{ type: string, data?: any }} Event */

/** What stands still in all groups, from the gateway's list and the events since. */
export class BlockedPlaces {
  /** @type {Map<string, Blocked>} */ #places = new Map();
  /** Events since a list was asked for: the list may be older than they are. @type {Event[] | null} */ #since = null;

  /** The longest blocked first. */
  get all() {
    return [...this.#places.values()].sort((a, b) => a.since_ms - b.since_ms || (idOf(a) < idOf(b) ? -1 : 1));
  }

  /** A list is asked for. */
  ask() {
    this.#since = [];
  }

  /** @param {Blocked[]} list what is answered */
  answer(list) {
    this.#places = new Map(list.map((blocked) => [idOf(blocked), blocked]));
    const since = this.#since ?? [];
    this.#since = null;
    for (const event of since) this.hear(event);
  }

  /** @param {Event} event */
  hear(event) {
    this.#since?.push(event);
    if (event.type === "group.blocked") this.#places.set(idOf(event.data), event.data);
    if (event.type === "group.unblocked") this.#places.delete(idOf(event.data));
  }
}

/** @param {{ group: string, place: string }} place */
function idOf({ group, place }) {
  return `${group}/${place}`;
}

/** What is blocked, in a word or two. @param {Blocked} blocked */
export function nameOf(blocked) {
  const key = keyText(blocked);
  if (key !== undefined) return key;
  const isWhole = blocked.place === `${blocked.topic}/${blocked.partition}`;
  return isWhole ? `Partition ${blocked.partition}` : `Record ${number(blocked.offset)}`;
}

export class BlockedSection {
  #section;
  #api;
  #context;
  #places = new BlockedPlaces();
  #rows;
  #shown = SHOWN_AT_ONCE;
  #isDrawing = false;

  /**
   * @param {HTMLElement} section
   * @param {import("./api.js").Api} api
   * @param {Context} context
   *
   * @typedef {object} Context what the sections share
   * @property {import("./operator.js").Operator} operator
   * @property {import("./clock.js").Clock} clock
   * @property {import("./record.js").RecordDialog} records
   * @property {(text: string) => void} announce to those who do not see it
   */
  constructor(section, api, context) {
    this.#section = section;
    this.#api = api;
    this.#context = context;
    this.#rows = new Rows(find(section, ".list"), idOf, () => new BlockedRow(context, (action, blocked) => this.#command(action, blocked)));
    find(section, ".more").addEventListener("click", () => {
      this.#shown += SHOWN_AT_ONCE;
      this.#show();
    });
    setInterval(() => {
      for (const row of this.#rows) /** @type {BlockedRow} */ (row).tick();
    }, TICK_MS);
  }

  async refresh() {
    this.#places.ask();
    this.#places.answer(await this.#api.blocked());
    this.#show();
  }

  /** @param {Event} event */
  hear(event) {
    this.#places.hear(event);
    // Thousands may come at once; they are drawn together.
    if (this.#isDrawing) return;
    this.#isDrawing = true;
    setTimeout(() => {
      this.#isDrawing = false;
      this.#show();
    }, 50);
  }

  #show() {
    const all = this.#places.all;
    this.#rows.show(all.slice(0, this.#shown), find(this.#section, "h2"));
    find(this.#section, ".empty").hidden = all.length > 0;
    const more = find(this.#section, ".more");
    say(more, all.length > this.#shown ? `Show more of ${number(all.length)}` : "");
    const count = find(document, "#blocked-count");
    if (count.textContent !== "" && count.textContent !== number(all.length)) this.#context.announce(`${number(all.length)} blocked`);
    setText(count, number(all.length));
    count.classList.toggle("bad", all.length > 0);
  }

  /**
   * @param {Command} action
   * @param {Blocked} blocked
   */
  async #command(action, blocked) {
    const { label, question, done } = COMMANDS[action];
    const name = nameOf(blocked);
    const gone = find(this.#section, ".gone");
    say(gone, "");
    try {
      if (question && !(await confirm({ title: `${label}: ${name}?`, text: question(blocked), yes: label }))) return;
      if (!(await this.#context.operator.isKnown())) return;
      await this.#api.command(action, blocked);
      this.#context.announce(`${done}: ${name}`);
    } catch (error) {
      // The row where the button was may have gone meanwhile, and another may have come for the same place.
      const row = /** @type {BlockedRow | undefined} */ (this.#rows.of(blocked));
      if (row) row.fail(inWords(error));
      else say(gone, `${name}: ${inWords(error)}`);
    }
  }
}

/** @type {Record<Command, { label: string, title: string, done: string, question?: (blocked: Blocked) => string }>} */
const COMMANDS = {
  retry: { label: "Retry now", title: "Tries the record again now.", done: "Tried again" },
  skip: {
    label: "Skip",
    title: "Passes over the record, this once.",
    done: "Skipped",
    question: ({ group, offset }) => `${group} will never handle the record at offset ${offset}. It is not kept as a dead letter.`,
  },
  "dead-letter": { label: "To dead letters", title: "Moves the record to the dead letters, from where it can be redriven.", done: "Moved to the dead letters" },
  ignore: {
    label: "Ignore",
    title: "Passes over the record, and over whatever fails here later.",
    done: "Ignored from now on",
    question: ({ group }) => `${group} will pass over this record and over everything that fails here later, until it is told to block again.`,
  },
  block: { label: "Block again", title: "What fails here is waited for again.", done: "Blocks again" },
};

/** @type {Record<Blocked["state"], Command[]>} */
const COMMANDS_OF = { blocked: ["retry", "skip", "dead-letter", "ignore"], ignoring: ["block"] };

class BlockedRow {
  root = el("li", { class: "card" });
  #context;
  #command;
  /** @type {Blocked | undefined} */ #blocked;
  #name = el("h3");
  #state = el("span", { class: "badge" });
  #where = el("p", { class: "where hint" });
  #message = el("p", { class: "message" });
  #numbers = { attempts: el("dd", { class: "attempts" }), since: el("dd"), due: el("dd", { class: "due" }), waiting: el("dd", { class: "waiting" }) };
  #buttons = el("div", { class: "buttons", role: "group" });
  #error = el("p", { class: "error", role: "alert" });
  #isBusy = false;

  /**
   * @param {Context} context
   * @param {(action: Command, blocked: Blocked) => Promise<void>} command handles its errors
   */
  constructor(context, command) {
    this.#context = context;
    this.#command = command;
    const { attempts, since, due, waiting } = this.#numbers;
    const pairs = /** @type {[string, HTMLElement][]} */ ([["Attempts", attempts], ["Since", since], ["Next attempt", due], ["Wait behind it", waiting]]);
    const numbers = el("dl", { class: "numbers" }, ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), value)));
    this.#error.hidden = true;
    const head = el("header", {}, this.#name, this.#state);
    this.root.append(el("article", {}, head, this.#where, this.#message, numbers, this.#buttons, this.#error));
  }

  /** @param {Blocked} blocked */
  show(blocked) {
    // What went wrong with another record is of no interest any more.
    if (this.#blocked?.offset !== blocked.offset) say(this.#error, "");
    const was = this.#blocked?.state;
    this.#blocked = blocked;
    const { group, topic, partition, offset, state, kind, message, attempts, waiting } = blocked;
    this.root.dataset.state = state;
    setText(this.#name, nameOf(blocked));
    setText(this.#state, state === "blocked" ? "blocked" : "failures ignored");
    setText(this.#where, `${group} · ${topic}, partition ${partition}, offset ${offset}`);
    const known = kind === "" || message.startsWith(kind) ? message : `${kind}: ${message}`;
    say(this.#message, known);
    setText(this.#numbers.attempts, number(attempts));
    setText(this.#numbers.waiting, counted(waiting, "record"));
    this.#buttons.setAttribute("aria-label", `What to do about ${nameOf(blocked)}`);
    if (was !== state) this.#makeButtons(COMMANDS_OF[state]);
    this.tick();
  }

  /** Time goes by. */
  tick() {
    if (!this.#blocked) return;
    const { since_ms, due_ms, state } = this.#blocked;
    const now = this.#context.clock.now();
    const { since, due } = this.#numbers;
    setText(since, since_ms > 0 ? duration(Math.max(0, Math.floor((now - since_ms) / 1000) * 1000)) : "–");
    since.title = since_ms > 0 ? time(since_ms) : "";
    if (state === "ignoring") setText(due, "–");
    else setText(due, due_ms > 0 ? countdown(due_ms, now) : "when told to");
  }

  /** @param {Command[]} commands */
  #makeButtons(commands) {
    const hadFocus = this.#buttons.contains(document.activeElement);
    const buttons = commands.map((action) => {
      const { label, title, question } = COMMANDS[action];
      const button = el("button", { type: "button", class: question ? "button danger" : "button", title }, label);
      button.addEventListener("click", () => this.#press(action));
      return button;
    });
    this.#buttons.replaceChildren(...buttons);
    if (hadFocus) buttons[0].focus();
  }

  /** @param {Command} action */
  async #press(action) {
    // It is about what was seen when the button was pressed, whatever comes meanwhile.
    const blocked = this.#blocked;
    if (this.#isBusy || !blocked) return;
    this.#setBusy(true);
    say(this.#error, "");
    await this.#command(action, blocked);
    this.#setBusy(false);
  }

  /** What was wanted here was not done. @param {string} why */
  fail(why) {
    say(this.#error, why);
  }

  /** @param {boolean} isBusy */
  #setBusy(isBusy) {
    this.#isBusy = isBusy;
    this.root.setAttribute("aria-busy", String(isBusy));
  }
}
