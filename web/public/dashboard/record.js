// One record: its headers, and its value as JSON, text or bytes.

import { inWords } from "./api.js";
import { el, find, say, setText } from "./dom.js";
import { counted, keyText, time } from "./format.js";

/** Bytes of a value that are shown as a hex dump; more would hold up the browser. */
const DUMPED_BYTES = 64 * 1024;
/** Characters of a value that are shown as text. */
const SHOWN_CHARACTERS = 512 * 1024;

/** @typedef {import("./types.d.ts").Letter} Letter */
/** @typedef {import("./types.d.ts").StoredRecord} StoredRecord */
/** @typedef {(action: "redrive" | "discard", letter: Letter) => Promise<boolean>} Settle whether it was done */

/**
 * The bytes behind text or base64.
 * @param {string | undefined} text
 * @param {string | undefined} base64
 * @returns {Uint8Array}
 */
export function bytesOf(text, base64) {
  if (base64 === undefined) return new TextEncoder().encode(text ?? "");
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/**
 * Sixteen bytes a line: where they stand, in hex, and as ASCII.
 * @param {Uint8Array} bytes
 */
export function hexDump(bytes) {
  const lines = [];
  for (let at = 0; at < bytes.length; at += 16) {
    const some = [...bytes.subarray(at, at + 16)];
    const hex = some.map((byte, i) => `${i === 8 ? " " : ""}${byte.toString(16).padStart(2, "0")}`).join(" ");
    const ascii = some.map((byte) => (byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : ".")).join("");
    lines.push(`${at.toString(16).padStart(8, "0")}  ${hex.padEnd(48)}  |${ascii}|`);
  }
  return lines.join("\n");
}

/**
 * JSON with line breaks and indentation, else as it was written: parsing and writing it anew would change long numbers and lose
 * what is doubled.
 * @param {string} text
 * @returns {string | null} null: it is no JSON
 */
export function prettyJson(text) {
  try {
    JSON.parse(text);
  } catch {
    return null;
  }
  let pretty = "";
  let depth = 0;
  const line = () => `\n${"  ".repeat(depth)}`;
  // Strings, brackets and separators, and what stands between them.
  const tokens = text.match(/"[^"\\]*(?:\\.[^"\\]*)*"|[[\]{},:]|[^\s"[\]{},:]+/g) ?? [];
  for (const [i, token] of tokens.entries()) {
    const isClosing = token === "}" || token === "]";
    const isEmpty = isClosing && (tokens[i - 1] === "{" || tokens[i - 1] === "[");
    if (isClosing) depth -= 1;
    if (isClosing && !isEmpty) pretty += line();
    pretty += token;
    if (token === ":") pretty += " ";
    if (token === ",") pretty += line();
    if (token === "{" || token === "[") {
      depth += 1;
      const next = tokens[i + 1];
      if (next !== "}" && next !== "]") pretty += line();
    }
  }
  return pretty;
}

/**
 * The ways in which a value can be looked at, best first.
 * @param {{ value?: string, value_base64?: string }} record
 * @returns {{ name: string, render: () => string }[]}
 */
export function viewsOf({ value, value_base64 }) {
  if (value === undefined && value_base64 === undefined) return [];
  const views = [];
  if (value !== undefined) {
    const json = value.length <= SHOWN_CHARACTERS ? prettyJson(value) : null;
    if (json !== null) views.push({ name: "JSON", render: () => json });
    views.push({ name: "Text", render: () => cut(value) });
  }
  views.push({
    name: "Hex",
    render: () => {
      const bytes = bytesOf(value, value_base64);
      const rest = bytes.length - DUMPED_BYTES;
      return hexDump(bytes.subarray(0, DUMPED_BYTES)) + (rest > 0 ? `\n… ${counted(rest, "more byte")}` : "");
    },
  });
  return views;
}

/** @param {string} text */
function cut(text) {
  const rest = text.length - SHOWN_CHARACTERS;
  return rest > 0 ? `${text.slice(0, SHOWN_CHARACTERS)}\n… ${counted(rest, "more character")}` : text;
}

/**
 * The text of a header, if there is one of this name.
 * @param {Letter} letter
 * @param {string} name
 */
export function headerOf({ headers }, name) {
  return headers.find((header) => header.name === name)?.value;
}

/** @param {Letter} letter */
export function stateText({ state, by, at_ms }) {
  if (state === "waiting") return "waiting";
  return `${state} by ${by ?? "somebody"}${at_ms === undefined ? "" : `, ${time(at_ms)}`}`;
}

/** Shows a record, and has it redriven or discarded if it is a dead letter. */
export class RecordDialog {
  #dialog;
  #view;
  /** @type {ReturnType<typeof viewsOf>} */ #views = [];
  /** @type {((action: "redrive" | "discard") => Promise<boolean>) | undefined} */ #settle;

  /** @param {HTMLDialogElement} dialog */
  constructor(dialog) {
    this.#dialog = dialog;
    this.#view = /** @type {HTMLSelectElement} */ (find(dialog, ".view"));
    this.#view.addEventListener("change", () => this.#showValue());
    find(dialog, ".close").addEventListener("click", () => dialog.close());
    find(dialog, ".redrive").addEventListener("click", () => this.#press("redrive"));
    find(dialog, ".discard").addEventListener("click", () => this.#press("discard"));
  }

  /**
   * @param {import("./types.d.ts").LetterTopic} on
   * @param {Letter} letter
   * @param {Settle} settle
   */
  openLetter({ topic, redrives }, letter, settle) {
    const isWaiting = letter.state === "waiting";
    find(this.#dialog, ".redrive").hidden = !redrives;
    this.#open(topic, letter, stateText(letter), isWaiting ? (action) => settle(action, letter) : undefined);
  }

  /**
   * @param {string} topic
   * @param {StoredRecord} record
   */
  open(topic, record) {
    this.#open(topic, record, "", undefined);
  }

  /**
   * @param {string} topic
   * @param {StoredRecord} record
   * @param {string} state
   * @param {((action: "redrive" | "discard") => Promise<boolean>) | undefined} settle undefined: nothing can be done with it
   */
  #open(topic, record, state, settle) {
    this.#settle = settle;
    const { partition, offset, timestamp_ms, headers } = record;
    const dialog = this.#dialog;
    find(dialog, "h2").textContent = keyText(record) ?? "No key";
    find(dialog, ".where").textContent = `${topic}, partition ${partition}, offset ${offset}, ${time(timestamp_ms)}`;
    say(find(dialog, ".state"), state);
    find(dialog, ".buttons").hidden = settle === undefined;
    say(find(dialog, ".error"), "");
    this.#views = viewsOf(record);
    this.#view.replaceChildren(...this.#views.map(({ name }) => el("option", {}, name)));
    const label = /** @type {HTMLElement} */ (this.#view.parentElement);
    label.hidden = this.#views.length < 2;
    const size = bytesOf(record.value, record.value_base64).length;
    setText(find(dialog, ".size"), this.#views.length === 0 ? "There is none." : counted(size, "byte"));
    this.#showValue();
    const rows = headers.map(({ name, value, value_base64 }) => {
      const shown = value ?? hexDump(bytesOf(undefined, value_base64));
      return el("tr", {}, el("th", { scope: "row" }, name), el("td", value === undefined ? { class: "bytes" } : {}, shown));
    });
    find(dialog, ".headers").replaceChildren(...rows);
    find(dialog, ".has-headers").hidden = rows.length === 0;
    dialog.showModal();
  }

  #showValue() {
    const view = this.#views[this.#view.selectedIndex];
    const shown = find(this.#dialog, ".value");
    shown.hidden = view === undefined;
    shown.textContent = view?.render() ?? "";
    shown.dataset.view = view?.name ?? "";
  }

  /** @param {"redrive" | "discard"} action */
  async #press(action) {
    if (!this.#settle) return;
    const error = find(this.#dialog, ".error");
    say(error, "");
    try {
      if (await this.#settle(action)) this.#dialog.close();
    } catch (problem) {
      say(error, inWords(problem));
    }
  }
}

