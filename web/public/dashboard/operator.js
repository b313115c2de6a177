// Who sits here. Asked once, before the first thing that is done, and kept by this browser.

import { find } from "./dom.js";

const KEY = "barnabas.operator";

export class Operator {
  #name = kept();
  #button;
  #dialog;
  #input;
  /** @type {((isKnown: boolean) => void) | undefined} */ #answered;

  /**
   * @param {HTMLElement} button says the name, and changes it
   * @param {HTMLDialogElement} dialog
   */
  constructor(button, dialog) {
    this.#button = button;
    this.#dialog = dialog;
    this.#input = /** @type {HTMLInputElement} */ (find(dialog, "input"));
    button.addEventListener("click", () => this.#ask());
    find(dialog, ".cancel").addEventListener("click", () => dialog.close(""));
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "ok") this.#keep(this.#input.value.trim());
      this.#answered?.(this.#name !== "");
      this.#answered = undefined;
    });
    this.#show();
  }

  get name() {
    return this.#name;
  }

  /** Whether it is known who acts; asks if it is not. */
  async isKnown() {
    return this.#name !== "" || this.#ask();
  }

  /** @returns {Promise<boolean>} */
  #ask() {
    this.#input.value = this.#name;
    this.#dialog.returnValue = "";
    this.#dialog.showModal();
    this.#input.select();
    return new Promise((resolve) => (this.#answered = resolve));
  }

  /** @param {string} name */
  #keep(name) {
    if (name === "") return;
    this.#name = name;
    this.#show();
    try {
      localStorage.setItem(KEY, name);
    } catch {
      // Storage is forbidden: it is asked again after a reload.
    }
  }

  #show() {
    this.#button.textContent = this.#name === "" ? "Who are you?" : `Operator: ${this.#name}`;
  }
}

function kept() {
  try {
    return localStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}
