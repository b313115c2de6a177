// Asks before something is done that cannot be undone.

import { find } from "./dom.js";

/**
 * @param {{ title: string, text: string, yes: string, no?: string }} question `no`: what the button says that does nothing
 * @returns {Promise<boolean>}
 */
export function confirm({ title, text, yes, no = "Cancel" }) {
  const dialog = /** @type {HTMLDialogElement} */ (find(document, "#confirm-dialog"));
  find(dialog, "h2").textContent = title;
  find(dialog, "#confirm-dialog-text").textContent = text;
  find(dialog, ".yes").textContent = yes;
  find(dialog, ".no").textContent = no;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
