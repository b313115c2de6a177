// Sends what happens on this page, and draws what was counted of it on all pages. It asks nothing again and again: the counts are pushed.

import { connect } from "../barnabas/barnabas.js";

const MINUTE_MS = 60_000;
const MINUTES = 15;
const TYPES = ["click", "move", "key"];

/** How often what has happened is sent. */
const SEND_EVERY_MS = 500;
/** More is sent at once. A browser takes 64 KiB of beacons at a time. */
const SEND_EVENTS = 200;
/** More does not wait: what comes then is left out, and said. */
const WAITING_EVENTS = 2000;
/** Moves come faster than anybody wants to count them. */
const MOVE_EVERY_MS = 50;

const topic = new URLSearchParams(location.search).get("topic") ?? "clicks";
const visitor = crypto.randomUUID();

// --- events out ---------------------------------------------------------------------------------------------------------

/** @type {{ type: string, partitionkey: string, data: { at_ms: number } }[]} */
let waiting = [];
let sent = 0;
let movedAt = 0;

/** @param {string} type */
function happened(type) {
  if (waiting.length >= WAITING_EVENTS) return warn("The browser takes no more events at the moment; some are left out.");
  waiting.push({ type, partitionkey: visitor, data: { at_ms: Date.now() } });
  if (waiting.length >= SEND_EVENTS) send();
}

/** A beacon goes out also while the page goes away. What the gateway answers to it is never heard. */
function send() {
  while (waiting.length > 0) {
    const some = waiting.slice(0, SEND_EVENTS);
    const lines = some.map((event) => JSON.stringify(event)).join("\n");
    // The browser says no when too much is on its way: then it goes the next time.
    if (!navigator.sendBeacon(`/v1/topics/${encodeURIComponent(topic)}/events`, lines)) return;
    waiting = waiting.slice(some.length);
    sent += some.length;
  }
  element("sent").textContent = String(sent);
}

document.addEventListener("click", () => happened("click"));
document.addEventListener("keydown", () => happened("key"));
document.addEventListener("pointermove", () => {
  if (Date.now() - movedAt < MOVE_EVERY_MS) return;
  movedAt = Date.now();
  happened("move");
});
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "hidden") send();
});
addEventListener("pagehide", send);
setInterval(send, SEND_EVERY_MS);

// --- counts in ----------------------------------------------------------------------------------------------------------

/** Counts by the beginnings of minutes, then by type. @type {Map<number, Record<string, number>>} */
const counts = new Map();

const barnabas = connect();
barnabas.addEventListener("state", (event) => showConnection(/** @type {CustomEvent} */ (event).detail));
barnabas.addEventListener("error", (event) => warn(/** @type {CustomEvent} */ (event).detail.message));
barnabas.subscribe(
  topic,
  { since: `-${MINUTES + 1}m` },
  ({ data }) => {
    const minute = counts.get(data.start_ms) ?? {};
    counts.set(data.start_ms, { ...minute, [data.key]: data.value });
    draw();
  },
  () => warn("Some counts were missed; the next ones are whole."),
);
setInterval(draw, 1000);

function draw() {
  const now = Math.floor(Date.now() / MINUTE_MS) * MINUTE_MS;
  for (const start of counts.keys()) if (start <= now - MINUTES * MINUTE_MS) counts.delete(start);
  const most = Math.max(1, ...[...counts.values()].flatMap((minute) => Object.values(minute)));
  const columns = [];
  for (let start = now - (MINUTES - 1) * MINUTE_MS; start <= now; start += MINUTE_MS) columns.push(column(start, most));
  element("minutes").replaceChildren(...columns);
  for (const type of TYPES) {
    const all = [...counts.values()].reduce((sum, minute) => sum + (minute[type] ?? 0), 0);
    element(type).textContent = String(all);
  }
}

/**
 * @param {number} start
 * @param {number} most the highest bar
 */
function column(start, most) {
  const minute = counts.get(start) ?? {};
  const item = document.createElement("li");
  const bars = document.createElement("div");
  bars.className = "bars";
  for (const type of TYPES) {
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.dataset.type = type;
    bar.style.height = `${(100 * (minute[type] ?? 0)) / most}%`;
    bars.append(bar);
  }
  const time = document.createElement("time");
  time.dateTime = new Date(start).toISOString();
  time.textContent = new Date(start).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const words = TYPES.map((type) => `${minute[type] ?? 0} ${type}s`).join(", ");
  item.setAttribute("aria-label", `${time.textContent}: ${words}`);
  item.append(bars, time);
  return item;
}

// --- words --------------------------------------------------------------------------------------------------------------

/** @param {{ name: string, transport?: string }} state */
function showConnection(state) {
  const shown = element("connection");
  shown.dataset.state = state.name;
  shown.textContent = state.name === "open" ? `live, ${state.transport}` : state.name;
}

/** @param {string} text */
function warn(text) {
  element("notice").textContent = text;
  element("notice").hidden = false;
}

/** @param {string} id */
function element(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}
