// The contacts import page: files in, live progress out. It knows jobs and channels, not how they travel.

import { Problem, connect, jobState, submitJob } from "./barnabas/barnabas.js";
import { ImportCard } from "./import-card.js";
import { Store } from "./store.js";

const JOB_TYPE = "import-contacts";

const store = new Store();
/** @type {Map<string, ImportCard>} by job id */
const cards = new Map();
/** Events of jobs whose submission has not been answered yet. @type {Map<string, object[]>} */
const early = new Map();

const notice = element("notice");
const list = element("imports");
const announcer = element("announcer");
const transport = /** @type {HTMLSelectElement} */ (element("transport"));

// --- the channel ------------------------------------------------------------------------------------------------------

transport.value = store.transport;
const barnabas = connect({ transports: transport.value ? [/** @type {any} */ (transport.value)] : undefined });
barnabas.addEventListener("state", (event) => showConnection(/** @type {CustomEvent} */ (event).detail));
barnabas.addEventListener("error", (event) => warn(/** @type {CustomEvent} */ (event).detail.message));
transport.addEventListener("change", () => {
  store.transport = transport.value;
  barnabas.use(transport.value ? [/** @type {any} */ (transport.value)] : undefined);
});

// One channel for all imports of this tab: one connection carries any number of them.
const subscription = barnabas.subscribe(store.channel, { after: store.token }, heard, missed);

/** @param {import("./barnabas/barnabas.d.ts").BarnabasEvent} event */
function heard(event) {
  store.token = event.token;
  const card = cards.get(event.subject ?? "");
  if (card) {
    show(card, event);
  } else if (event.subject) {
    const waiting = early.get(event.subject) ?? [];
    early.set(event.subject, [...waiting, event]);
  }
}

/** Events are gone, so the states are asked for instead. */
function missed() {
  for (const [id, card] of cards) if (!card.hasEnded) refresh(id, card);
}

/**
 * @param {ImportCard} card
 * @param {any} event
 */
function show(card, event) {
  card.hear(event);
  if (event.type === "job.completed" || event.type === "job.failed") announcer.textContent = card.summary();
}

/**
 * @param {string} id
 * @param {ImportCard} card
 */
async function refresh(id, card) {
  try {
    card.showState(await jobState(id));
  } catch (error) {
    if (error instanceof Problem && [404, 410].includes(error.status)) {
      card.fail("The gateway knows nothing of this import any more.");
      store.forget(id);
    }
  }
}

// --- files in -----------------------------------------------------------------------------------------------------------

const file = /** @type {HTMLInputElement} */ (element("file"));
file.addEventListener("change", () => {
  for (const chosen of file.files ?? []) submit(chosen.name, chosen);
  file.value = "";
});

element("sample").addEventListener("click", async () => {
  const answer = await fetch("/sample.csv");
  if (answer.ok) submit("sample.csv", await answer.blob());
  else warn("The sample could not be loaded.");
});

const drop = element("drop");
for (const type of ["dragenter", "dragover"]) {
  drop.addEventListener(type, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const type of ["dragleave", "drop"]) drop.addEventListener(type, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  for (const dropped of event.dataTransfer?.files ?? []) submit(dropped.name, dropped);
});

/**
 * @param {string} name
 * @param {Blob} body
 */
async function submit(name, body) {
  notice.hidden = true;
  const card = addCard(name);
  try {
    const onProgress = (/** @type {number} */ sent, /** @type {number} */ total) => card.upload(sent, total);
    const job = await submitJob(JOB_TYPE, body, { channel: store.channel, onProgress });
    card.submitted();
    cards.set(job.id, card);
    store.remember(job.id, name);
    for (const event of early.get(job.id) ?? []) show(card, event);
    early.delete(job.id);
  } catch (error) {
    card.fail(inWords(error));
  }
}

/** @param {unknown} error */
function inWords(error) {
  if (!(error instanceof Problem)) return "Something went wrong in this page.";
  const line = error.line ? ` (line ${error.line})` : "";
  switch (error.status) {
    case 0:
      return "The gateway cannot be reached. The file was not imported; try again.";
    case 413:
      return `The file is too large: ${error.message}`;
    case 503:
      return "The gateway cannot take the file now. Nothing was imported; try again in a moment.";
    default:
      return `${error.message}${line}`;
  }
}

// --- what is shown ------------------------------------------------------------------------------------------------------

/** @param {string} name */
function addCard(name) {
  const card = new ImportCard(name);
  list.prepend(card.root);
  element("empty").hidden = true;
  return card;
}

/** @param {any} state */
function showConnection({ name, transport: label, retryMs, reason }) {
  const shown = element("connection");
  const labels = /** @type {Record<string, string>} */ ({ websocket: "WebSocket", sse: "SSE", "long-poll": "Long-poll" });
  shown.dataset.state = name;
  shown.dataset.transport = name === "open" ? label : "";
  if (name === "open") shown.textContent = `live · ${labels[label]}`;
  else if (name === "waiting") shown.textContent = `reconnecting in ${Math.max(1, Math.round(retryMs / 1000))} s`;
  else if (name === "closed") shown.textContent = `disconnected: ${reason}`;
  else shown.textContent = "connecting";
}

/** @param {string} text */
function warn(text) {
  notice.textContent = text;
  notice.hidden = false;
}

/** @param {string} id */
function element(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

// --- after a reload -----------------------------------------------------------------------------------------------------

for (const { id, name } of store.jobs) {
  const card = addCard(name);
  card.submitted();
  cards.set(id, card);
  refresh(id, card);
}
export { subscription };
