// Tables, atomic stores and whatever else is compacted: which there are, and a way to look through one.

import { inWords } from "./api.js";
import { el, find, Rows, say, setText } from "./dom.js";
import { keyText, number, time } from "./format.js";
import { Pages } from "./pages.js";

/** Entries of a page. */
const PAGE = 50;
/** Characters of a value that its row shows. */
const PREVIEW = 160;

/** @typedef {import("./types.d.ts").Table} Table */
/** @typedef {import("./types.d.ts").StoredRecord} StoredRecord */
/** @typedef {(topic: string, record: StoredRecord) => void} View */

/** @type {Record<Table["kind"], string>} */
const KINDS = {
  table: "table",
  store: "atomic store",
  schedules: "schedules",
  blocked: "what is blocked in a group",
  "dead-letter-marks": "what became of dead letters",
};

/** The beginning of a value on one line. @param {{ value?: string, value_base64?: string }} record */
export function previewOf({ value, value_base64 }) {
  if (value === undefined) return `base64:${cut(value_base64 ?? "")}`;
  return value === "" ? "(empty)" : cut(value.replace(/\s+/g, " "));
}

/** @param {string} text */
function cut(text) {
  return text.length > PREVIEW ? `${text.slice(0, PREVIEW)}…` : text;
}

export class TablesSection {
  #section;
  #api;
  #rows;
  #internal;
  /** @type {Table[]} */ #tables = [];

  /**
   * @param {HTMLElement} section
   * @param {import("./api.js").Api} api
   * @param {View} view shows a record
   */
  constructor(section, api, view) {
    this.#section = section;
    this.#api = api;
    const entries = new Entries(find(section, "#entries"), api, view);
    this.#rows = new Rows(find(section, ".list"), (/** @type {Table} */ { topic }) => topic, () => new TableRow((topic) => entries.open(topic)));
    this.#internal = /** @type {HTMLInputElement} */ (find(section, ".others input"));
    this.#internal.addEventListener("change", () => this.#show());
  }

  get all() {
    return this.#tables;
  }

  async refresh() {
    this.#tables = await this.#api.tables();
    this.#show();
  }

  #show() {
    const internal = this.#tables.filter((table) => table.internal).length;
    find(this.#section, ".others").hidden = internal === 0;
    setText(find(this.#section, ".others span"), `${number(internal)} of Barnabas' own too`);
    const shown = this.#tables.filter((table) => !table.internal || this.#internal.checked);
    this.#rows.show(shown, find(this.#section, "h2"));
    find(this.#section, ".empty").hidden = shown.length > 0;
    find(this.#section, ".scroll").hidden = shown.length === 0;
    setText(find(document, "#tables-count"), number(shown.length));
  }
}

class TableRow {
  #open = el("button", { type: "button", class: "link" });
  #kind = el("td");
  #partitions = el("td", { class: "number" });
  #records = el("td", { class: "number records" });
  root = el("tr", {}, el("th", { scope: "row" }, this.#open), this.#kind, this.#partitions, this.#records);

  /** @param {(topic: string) => void} open */
  constructor(open) {
    this.#open.addEventListener("click", () => open(this.#open.textContent ?? ""));
  }

  /** @param {Table} table */
  show({ topic, kind, partitions, records }) {
    setText(this.#open, topic);
    setText(this.#kind, KINDS[kind]);
    setText(this.#partitions, number(partitions));
    setText(this.#records, number(records));
    this.root.dataset.topic = topic;
  }
}

/** What stands on one of them, as it was when it was read. */
class Entries {
  #root;
  #api;
  #rows;
  #form;
  #topic = "";
  #prefix = "";
  #pages = new Pages();
  /** @type {import("./types.d.ts").EntryPage} */ #page = { records: [], next: null, cut: false };
  /** The last that was asked for; an answer to an earlier question is thrown away. */ #asked = 0;

  /**
   * @param {HTMLElement} root
   * @param {import("./api.js").Api} api
   * @param {View} view
   */
  constructor(root, api, view) {
    this.#root = root;
    this.#api = api;
    this.#form = /** @type {HTMLFormElement} */ (find(root, "form"));
    const open = (/** @type {StoredRecord} */ record) => view(this.#topic, record);
    this.#rows = new Rows(find(root, ".records"), (/** @type {StoredRecord} */ record) => `${record.partition}/${keyText(record)}`, () => new EntryRow(open));
    const on = (/** @type {string} */ selector, /** @type {() => unknown} */ pressed) => find(root, selector).addEventListener("click", pressed);
    on(".close", () => this.#close());
    on(".back", () => this.#turn(() => this.#pages.back()));
    on(".forward", () => this.#turn(() => this.#page.next !== null && this.#pages.forward(this.#page.next, this.#page.records.length)));
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#prefix = String(new FormData(this.#form).get("prefix") ?? "");
      this.#turn(() => (this.#pages = new Pages()));
    });
  }

  /** @param {string} topic */
  open(topic) {
    this.#topic = topic;
    this.#form.reset();
    this.#prefix = "";
    this.#page = { records: [], next: null, cut: false };
    this.#rows.show([]);
    setText(find(this.#root, "h3"), topic);
    this.#root.hidden = false;
    find(this.#root, "h3").focus();
    this.#turn(() => (this.#pages = new Pages()));
  }

  #close() {
    this.#asked++;
    this.#root.hidden = true;
    find(document, "#tables-title").focus();
  }

  /** Goes to a page, or reads this one anew. @param {() => unknown} go */
  async #turn(go) {
    go();
    const error = find(this.#root, ".error");
    say(error, "");
    const asked = ++this.#asked;
    this.#root.setAttribute("aria-busy", "true");
    setText(find(this.#root, ".page"), "reading");
    try {
      const page = await this.#api.entries(this.#topic, { limit: PAGE, after: this.#pages.cursor, prefix: this.#prefix });
      if (asked !== this.#asked) return;
      this.#page = page;
      this.#show();
    } catch (problem) {
      if (asked !== this.#asked) return;
      setText(find(this.#root, ".page"), "");
      say(error, inWords(problem));
    }
    this.#root.setAttribute("aria-busy", "false");
  }

  #show() {
    const { records, next, cut } = this.#page;
    this.#rows.show(records, find(this.#root, "h3"));
    const none = next !== null ? "All of this page is gone by now; there is more." : this.#prefix === "" ? "There are none." : "None is found.";
    setText(find(this.#root, ".page"), records.length > 0 ? this.#pages.words(records.length) : none);
    say(find(this.#root, ".cut"), cut ? "The topic is too large to be read to its end for a page: there may be more keys, and newer values." : "");
    this.#enable(".back", !this.#pages.isFirst);
    this.#enable(".forward", next !== null);
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
}

class EntryRow {
  /** @type {StoredRecord | undefined} */ #record;
  #view = el("button", { type: "button", class: "link" });
  #value = el("td", { class: "message" });
  #when = el("time");
  #place = el("span");
  root = el("tr", {}, el("td", { class: "key" }, this.#view), this.#value, el("td", { class: "hint" }, this.#when, el("br"), this.#place));

  /** @param {(record: StoredRecord) => void} view */
  constructor(view) {
    this.#view.addEventListener("click", () => this.#record && view(this.#record));
  }

  /** @param {StoredRecord} record */
  show(record) {
    this.#record = record;
    setText(this.#view, keyText(record) ?? "");
    setText(this.#value, previewOf(record));
    this.#when.dateTime = new Date(record.timestamp_ms).toISOString();
    setText(this.#when, time(record.timestamp_ms));
    setText(this.#place, `partition ${record.partition}, offset ${record.offset}`);
  }
}
