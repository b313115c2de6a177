// Making elements and keeping lists of them. What comes from outside is only ever put in as text.

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string>} [attributes]
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/**
 * What a selector finds under an element; an HTMLElement unless its class is named.
 * @template {HTMLElement} [Found=HTMLElement]
 * @param {ParentNode} root
 * @param {string} selector
 * @returns {Found}
 */
export function find(root, selector) {
  const found = root.querySelector(selector);
  if (!found) throw new Error(`the page has no ${selector}`);
  return /** @type {Found} */ (found);
}

/**
 * Sets text only when it differs, so that nothing is announced or laid out anew without need.
 * @param {HTMLElement} element
 * @param {string} text
 */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Shows text, or hides the element when there is none.
 * @param {HTMLElement} element
 * @param {string} text
 */
export function say(element, text) {
  setText(element, text);
  element.hidden = text === "";
}

/**
 * The rows of a list. A row stays the same element as long as its item is there, so it keeps focus and what it says.
 * @template Item
 */
export class Rows {
  #container;
  #idOf;
  #make;
  /** @type {Map<string, import("./types.d.ts").Row<Item>>} */ #rows = new Map();

  /**
   * @param {HTMLElement} container
   * @param {(item: Item) => string} idOf
   * @param {(item: Item) => import("./types.d.ts").Row<Item>} make
   */
  constructor(container, idOf, make) {
    this.#container = container;
    this.#idOf = idOf;
    this.#make = make;
  }

  /** The row of an item, if it is shown. @param {Item} item */
  of(item) {
    return this.#rows.get(this.#idOf(item));
  }

  /** @returns {IterableIterator<import("./types.d.ts").Row<Item>>} */
  [Symbol.iterator]() {
    return this.#rows.values();
  }

  /**
   * Shows these items, in this order.
   * @param {Item[]} items
   * @param {HTMLElement} [refuge] takes the focus of a row that goes
   */
  show(items, refuge) {
    const wanted = new Set(items.map(this.#idOf));
    for (const [id, { root }] of this.#rows) {
      if (wanted.has(id)) continue;
      if (root.contains(document.activeElement)) refuge?.focus({ preventScroll: true });
      root.remove();
      this.#rows.delete(id);
    }
    let place = this.#container.querySelector(":scope > :not(thead)");
    for (const item of items) {
      const id = this.#idOf(item);
      const row = this.#rows.get(id) ?? this.#make(item);
      this.#rows.set(id, row);
      row.show(item);
      // What stands right is not moved: moving takes the focus away.
      if (row.root === place) place = place.nextElementSibling;
      else this.#container.insertBefore(row.root, place);
    }
  }
}
