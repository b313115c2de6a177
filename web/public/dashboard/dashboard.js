// The page of operators: what consumer groups do, what stands still in them, and what is done about it; what tables, stores and
// schedules hold.
//
// Each section shows one noun. Lists are asked for when the page opens and now and then; between, the channel of operators says
// what has changed. Lag is asked for every two seconds while somebody looks.

import { connect } from "../barnabas/barnabas.js";
import { ActionsSection } from "./actions.js";
import { Api, inWords } from "./api.js";
import { BlockedSection } from "./blocked.js";
import { Clock } from "./clock.js";
import { DeadLettersSection } from "./dead-letters.js";
import { find, say, setText } from "./dom.js";
import { GroupsSection } from "./groups.js";
import { lagging, LaggingSection, lateText } from "./lagging.js";
import { Operator } from "./operator.js";
import { Poll } from "./poll.js";
import { RecordDialog } from "./record.js";
import { RetryTopicsSection } from "./retry-topics.js";
import { SchedulesSection } from "./schedules.js";
import { TablesSection } from "./tables.js";

const CHANNEL = "barnabas.admin";

const GROUPS_MS = 2000;
const RETRIES_MS = 4000;
/** What the channel tells is asked for as well: it is silent on what happened while no gateway ran, or before a group was found. */
const LISTS_MS = 10_000;
/** How long to gather changes before a list is asked for because of them. */
const SOON_MS = 300;

const element = (/** @type {string} */ id) => find(document, `#${id}`);
const announcer = element("announcer");
const announce = (/** @type {string} */ text) => (announcer.textContent = text);

const clock = new Clock();
const operator = new Operator(element("operator"), /** @type {HTMLDialogElement} */ (element("operator-dialog")));
const api = new Api(() => operator.name, (serverMs) => clock.hear(serverMs));
const records = new RecordDialog(/** @type {HTMLDialogElement} */ (element("record-dialog")));
const context = { operator, clock, announce, records };

const groups = new GroupsSection(element("groups"), api);
const behind = new LaggingSection(element("lagging"));
const blocked = new BlockedSection(element("blocked"), api, context);
const retryTopics = new RetryTopicsSection(element("retry-topics"), api, clock);
const deadLetters = new DeadLettersSection(element("dead-letters"), api, context, () => lists.deadLetters.soon(0));
const tables = new TablesSection(element("tables"), api, (topic, record) => records.open(topic, record));
const schedules = new SchedulesSection(element("schedules"), api, context, () => lists.schedules.soon(SOON_MS));
const actions = new ActionsSection(element("actions"), api);

/** Groups of which the rest is known. */
let known = "";

const groupsPoll = poll("groups", GROUPS_MS, async () => {
  await groups.refresh();
  behind.show(lagging(groups.all, tables.all), lateText(schedules.firstDueMs, clock.now()));
  const names = groups.all.map(({ group }) => group).join("\n");
  if (names === known) return;
  known = names;
  for (const list of Object.values(lists)) list.soon(0);
});

const lists = {
  blocked: poll("blocked", LISTS_MS, () => blocked.refresh()),
  retryTopics: poll("retry-topics", RETRIES_MS, () => retryTopics.refresh()),
  deadLetters: poll("dead-letters", LISTS_MS, () => deadLetters.refresh()),
  tables: poll("tables", LISTS_MS, () => tables.refresh()),
  schedules: poll("schedules", LISTS_MS, () => schedules.refresh()),
  actions: poll("actions", LISTS_MS, () => actions.refresh()),
};

/**
 * Asks again and again, and says in the section when there is no answer.
 * @param {string} section
 * @param {number} everyMs
 * @param {() => Promise<void>} refresh
 */
function poll(section, everyMs, refresh) {
  const notice = find(element(section), ".notice");
  return new Poll(everyMs, async () => {
    try {
      await refresh();
      say(notice, "");
    } catch (error) {
      say(notice, `${inWords(error)} What is shown may be old.`);
    }
  });
}

// --- the channel ------------------------------------------------------------------------------------------------------

const barnabas = connect();
barnabas.addEventListener("state", (event) => showConnection(/** @type {CustomEvent} */ (event).detail));
barnabas.subscribe(CHANNEL, {}, heard, askAgain);

/** @param {import("../barnabas/barnabas.d.ts").BarnabasEvent} event */
function heard(event) {
  switch (event.type) {
    case "group.blocked":
    case "group.unblocked":
      blocked.hear(event);
      groupsPoll.soon(SOON_MS);
      lists.retryTopics.soon(SOON_MS);
      break;
    case "group.action":
      actions.hear(event.data);
      if (event.data.records !== undefined) lettersChanged(event.data.topic);
      break;
    case "group.dead-letter":
      lettersChanged(event.data.topic);
      break;
  }
}

/** @param {string} topic */
function lettersChanged(topic) {
  deadLetters.hear(topic);
  lists.deadLetters.soon(SOON_MS);
}

/** Events are gone, or were not listened for, so what they would have told is asked for. */
function askAgain() {
  for (const list of Object.values(lists)) list.soon(SOON_MS);
}

/** @param {import("../barnabas/barnabas.d.ts").State} state */
function showConnection(state) {
  const shown = element("connection");
  shown.dataset.state = state.name;
  if (state.name === "open") askAgain();
  if (state.name === "open") setText(shown, "live");
  else if (state.name === "waiting") setText(shown, `reconnecting in ${Math.max(1, Math.round(state.retryMs / 1000))} s`);
  else if (state.name === "closed") setText(shown, `disconnected: ${state.reason}`);
  else setText(shown, "connecting");
}
