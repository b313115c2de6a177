// Dead letters: the topics on which some stand, a way to look through them, and what is done with them.

import { inWords } from "./api.js";
import { confirm } from "./confirm.js";
import { el, find, Rows, say, setText } from "./dom.js";
import { counted, keyText, number, time } from "./format.js";
import { Pages } from "./pages.js";
import { headerOf, stateText } from "./record.js";

/** Dead letters of a page. */
const PAGE = 50;
/** How long after a change a page is read anew; many changes come together. */
const RELOAD_MS = 300;

/** @typedef {import("./types.d.ts").Letter} Letter */
/** @typedef {import("./types.d.ts").LetterTopic} LetterTopic */
/** @typedef {import("./types.d.ts").Selection} Selection */
/** @typedef {"redrive" | "discard"} Settling */

/** @type {Record<Settling, { yes: string, done: string }>} */
const WORDS = { redrive: { yes: "Redrive", done: "redriven" }, discard: { yes: "Discard", done: "discarded" } };

/** @param {{ partition: number, offset: number }} letter */
function idOf({ partition, offset }) {
  return `${partition}-${offset}`;
}

export class DeadLettersSection {
  #section;
  #api;
  #rows;
  #letters;

  /**
   * @param {HTMLElement} section
   * @param {import("./api.js").Api} api
   * @param {import("./blocked.js").Context} context
   * @param {() => void} changed some were redriven or discarded
   */
  constructor(section, api, context, changed) {
    this.#section = section;
    this.#api = api;
    this.#letters = new Letters(find(section, "#letters"), api, context, changed);
    const open = (/** @type {LetterTopic} */ topic) => this.#letters.open(topic);
    this.#rows = new Rows(find(section, ".list"), (/** @type {LetterTopic} */ { topic }) => topic, () => new TopicRow(open));
  }

  async refresh() {
    const topics = (await this.#api.letterTopics()).filter(({ records }) => records > 0);
    this.#rows.show(topics);
    find(this.#section, ".empty").hidden = topics.length > 0;
    find(this.#section, ".scroll").hidden = topics.length === 0;
    const waiting = topics.reduce((sum, topic) => sum + topic.waiting, 0);
    const count = find(document, "#dead-letters-count");
    setText(count, number(waiting));
    count.classList.toggle("bad", waiting > 0);
  }

  /** Something has happened to the dead letters of a topic. @param {string} topic */
  hear(topic) {
    this.#letters.hear(topic);
  }
}

class TopicRow {
  #open = el("button", { type: "button", class: "link" });
  #waiting = el("td", { class: "number waiting" });
  #records = el("td", { class: "number" });
  root = el("tr", {}, el("th", { scope: "row" }, this.#open), this.#waiting, this.#records);
  /** @type {LetterTopic | undefined} */ #topic;

  /** @param {(topic: LetterTopic) => void} open */
  constructor(open) {
    this.#open.addEventListener("click", () => this.#topic && open(this.#topic));
  }

  /** @param {LetterTopic} topic */
  show(topic) {
    const about = topic.estimated ? "at most " : "";
    this.#topic = topic;
    setText(this.#open, topic.topic);
    setText(this.#waiting, about + number(topic.waiting));
    setText(this.#records, about + number(topic.records));
  }
}

/** The dead letters of one topic. */
class Letters {
  #root;
  #api;
  #context;
  #changed;
  #rows;
  #form;
  /** @type {LetterTopic | undefined} */ #topic;
  #pages = new Pages();
  #wanted = { filter: "", state: "waiting" };
  /** @type {import("./types.d.ts").LetterPage} */ #page = { records: [], matching: 0, next: null };
  /** @type {Set<string>} */ #selected = new Set();
  /** The last that was asked for; an answer to an earlier question is thrown away. */ #asked = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #reload;
  #isBusy = false;

  /**
   * @param {HTMLElement} root
   * @param {import("./api.js").Api} api
   * @param {import("./blocked.js").Context} context
   * @param {() => void} changed
   */
  constructor(root, api, context, changed) {
    this.#root = root;
    this.#api = api;
    this.#context = context;
    this.#changed = changed;
    this.#form = /** @type {HTMLFormElement} */ (find(root, "form"));
    const settle = (/** @type {Settling} */ action, /** @type {Letter} */ letter) => this.#settle(action, [letter]);
    const view = (/** @type {Letter} */ letter) => this.#topic && context.records.openLetter(this.#topic, letter, settle);
    const select = (/** @type {Letter} */ letter, /** @type {boolean} */ isSelected) => this.#select([letter], isSelected);
    this.#rows = new Rows(find(root, ".records"), idOf, () => new LetterRow(this.#selected, view, select));
    this.#listen();
  }

  #listen() {
    const on = (/** @type {string} */ selector, /** @type {() => unknown} */ pressed) => find(this.#root, selector).addEventListener("click", pressed);
    on(".close", () => this.#close());
    on(".newer", () => this.#turn(() => this.#pages.back()));
    on(".older", () => this.#turn(() => this.#page.next !== null && this.#pages.forward(this.#page.next, this.#page.records.length)));
    const all = /** @type {HTMLInputElement} */ (find(this.#root, ".all"));
    all.addEventListener("change", () => this.#select(this.#waiting, all.checked));
    for (const action of /** @type {Settling[]} */ (["redrive", "discard"])) {
      on(`.${action}-selected`, () => this.#press(() => this.#settle(action, this.#waiting.filter((letter) => this.#selected.has(idOf(letter))))));
      on(`.${action}-all`, () => this.#press(() => this.#settleFound(action)));
    }
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      const fields = new FormData(this.#form);
      this.#wanted = { filter: String(fields.get("filter") ?? ""), state: String(fields.get("state") ?? "waiting") };
      this.#turn(() => (this.#pages = new Pages()));
    });
  }

  /** @param {LetterTopic} topic */
  open(topic) {
    this.#topic = topic;
    this.#form.reset();
    this.#wanted = { filter: "", state: "waiting" };
    this.#page = { records: [], matching: 0, next: null };
    setText(find(this.#root, "h3"), topic.topic);
    for (const button of [".redrive-selected", ".redrive-all"]) find(this.#root, button).hidden = !topic.redrives;
    find(this.#root, ".final").hidden = topic.redrives;
    this.#root.hidden = false;
    find(this.#root, "h3").focus();
    this.#turn(() => (this.#pages = new Pages()));
  }

  #close() {
    this.#topic = undefined;
    this.#root.hidden = true;
    find(document, "#dead-letters-title").focus();
  }

  /** @param {string} topic */
  hear(topic) {
    if (this.#topic?.topic !== topic) return;
    this.#reload ??= setTimeout(() => {
      this.#reload = undefined;
      this.#load();
    }, RELOAD_MS);
  }

  /** Those of this page with which something can be done. */
  get #waiting() {
    return this.#page.records.filter(({ state }) => state === "waiting");
  }

  /** Goes to another page. @param {() => unknown} go */
  #turn(go) {
    go();
    this.#selected.clear();
    say(find(this.#root, ".error"), "");
    setText(find(this.#root, ".result"), "");
    return this.#load();
  }

  async #load() {
    if (!this.#topic) return;
    const asked = ++this.#asked;
    try {
      const page = await this.#api.letters(this.#topic.topic, { limit: PAGE, before: this.#pages.cursor, ...this.#wanted });
      if (asked !== this.#asked) return;
      this.#page = page;
      this.#show();
    } catch (error) {
      if (asked === this.#asked) say(find(this.#root, ".error"), inWords(error));
    }
  }

  #show() {
    const { records, matching, next } = this.#page;
    const waiting = new Set(this.#waiting.map(idOf));
    for (const id of this.#selected) if (!waiting.has(id)) this.#selected.delete(id);
    this.#rows.show(records, find(this.#root, "h3"));
    const isAny = this.#wanted.filter !== "" || this.#wanted.state === "waiting";
    const none = isAny ? "None is found." : "There are none.";
    setText(find(this.#root, ".page"), records.length > 0 ? this.#pages.words(records.length, matching) : none);
    this.#enable(".newer", !this.#pages.isFirst);
    this.#enable(".older", next !== null);
    this.#showSelection();
  }

  #showSelection() {
    const selected = this.#selected.size;
    const some = selected > 0 ? `${number(selected)} selected` : "selected";
    for (const action of /** @type {Settling[]} */ (["redrive", "discard"])) {
      setText(find(this.#root, `.${action}-selected`), `${WORDS[action].yes} ${some}`);
      this.#enable(`.${action}-selected`, selected > 0);
    }
    const all = /** @type {HTMLInputElement} */ (find(this.#root, ".all"));
    const waiting = this.#waiting.length;
    all.disabled = waiting === 0;
    all.checked = waiting > 0 && selected === waiting;
    all.indeterminate = selected > 0 && selected < waiting;
  }

  /**
   * @param {string} selector
   * @param {boolean} isEnabled
   */
  #enable(selector, isEnabled) {
    const button = /** @type {HTMLButtonElement} */ (find(this.#root, selector));
    // A button that cannot be pressed cannot be focused either.
    if (!isEnabled && button === document.activeElement) find(this.#root, "h3").focus();
    button.disabled = !isEnabled;
  }

  /**
   * @param {Letter[]} letters
   * @param {boolean} isSelected
   */
  #select(letters, isSelected) {
    for (const letter of letters) {
      if (isSelected) this.#selected.add(idOf(letter));
      else this.#selected.delete(idOf(letter));
    }
    this.#rows.show(this.#page.records);
    this.#showSelection();
  }

  /** @param {() => Promise<unknown>} work */
  async #press(work) {
    if (this.#isBusy) return;
    this.#isBusy = true;
    this.#root.setAttribute("aria-busy", "true");
    say(find(this.#root, ".error"), "");
    setText(find(this.#root, ".result"), "");
    try {
      await work();
    } catch (error) {
      say(find(this.#root, ".error"), inWords(error));
    } finally {
      this.#isBusy = false;
      this.#root.setAttribute("aria-busy", "false");
    }
  }

  /**
   * Does it with these, and returns whether it was done.
   * @param {Settling} action
   * @param {Letter[]} letters
   */
  async #settle(action, letters) {
    const records = letters.map(({ partition, offset }) => ({ partition, offset }));
    if (action === "discard" && !(await this.#confirm(action, records.length))) return false;
    return this.#carryOut(action, { records });
  }

  /**
   * Does it with all that wait and were searched for, on this page or not.
   * @param {Settling} action
   */
  async #settleFound(action) {
    if (!this.#topic) return;
    const { filter } = this.#wanted;
    const { matching } = await this.#api.letters(this.#topic.topic, { limit: 1, before: null, filter, state: "waiting" });
    if (matching === 0) setText(find(this.#root, ".result"), "None of them waits.");
    else if (await this.#confirm(action, matching)) await this.#carryOut(action, { filter });
  }

  /**
   * @param {Settling} action
   * @param {number} count
   */
  #confirm(action, count) {
    const { yes } = WORDS[action];
    const what = counted(count, "dead letter");
    const group = this.#topic?.group;
    const text = action === "discard" ? `${group} will never handle ${count === 1 ? "it" : "them"}.` : `${group} will handle ${count === 1 ? "it" : "them"} again.`;
    return confirm({ title: `${yes} ${what}?`, text, yes: `${yes} ${number(count)}` });
  }

  /**
   * @param {Settling} action
   * @param {Selection} selection
   */
  async #carryOut(action, selection) {
    if (!this.#topic || !(await this.#context.operator.isKnown())) return false;
    const count = await this.#api.settle(action, this.#topic.topic, selection);
    const done = `${counted(count, "dead letter")} ${WORDS[action].done}.`;
    setText(find(this.#root, ".result"), done);
    this.#changed();
    await this.#load();
    return true;
  }
}

class LetterRow {
  #selected;
  /** @type {Letter | undefined} */ #letter;
  #check = el("input", { type: "checkbox" });
  #view = el("button", { type: "button", class: "link" });
  #when = el("time", { class: "hint" });
  #key = el("td", { class: "key" });
  #error = el("td", { class: "message" });
  #state = el("td", { class: "letter-state" });
  root = el("tr", {}, el("td", { class: "check" }, this.#check), el("td", { class: "place" }, this.#view, el("br"), this.#when), this.#key, this.#error, this.#state);

  /**
   * @param {Set<string>} selected
   * @param {(letter: Letter) => void} view
   * @param {(letter: Letter, isSelected: boolean) => void} select
   */
  constructor(selected, view, select) {
    this.#selected = selected;
    this.#view.addEventListener("click", () => this.#letter && view(this.#letter));
    this.#check.addEventListener("change", () => this.#letter && select(this.#letter, this.#check.checked));
  }

  /** @param {Letter} letter */
  show(letter) {
    this.#letter = letter;
    const { partition, offset, timestamp_ms, state } = letter;
    const place = `partition ${partition}, offset ${offset}`;
    const kind = headerOf(letter, "bn-error-kind") ?? "";
    const message = headerOf(letter, "bn-error-message") ?? "";
    setText(this.#view, place);
    this.#check.setAttribute("aria-label", `Select ${place}`);
    this.#check.disabled = state !== "waiting";
    this.#check.checked = this.#selected.has(idOf(letter));
    this.#when.dateTime = new Date(timestamp_ms).toISOString();
    setText(this.#when, time(timestamp_ms));
    setText(this.#key, keyText(letter) ?? "–");
    setText(this.#error, [kind, message].filter((part) => part !== "").join(": "));
    setText(this.#state, stateText(letter));
    this.root.dataset.state = state;
  }
}
