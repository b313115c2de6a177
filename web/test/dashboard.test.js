// The parts of the page of operators that need no browser.
import assert from "node:assert/strict";
import { test } from "node:test";

import { Actions, whatOf } from "../public/dashboard/actions.js";
import { Api, headerText, inWords } from "../public/dashboard/api.js";
import { BlockedPlaces, nameOf } from "../public/dashboard/blocked.js";
import { Problem } from "../public/barnabas/barnabas.js";
import { Clock } from "../public/dashboard/clock.js";
import { countdown, duration, keyText } from "../public/dashboard/format.js";
import { Rates } from "../public/dashboard/groups.js";
import { lagging, lagText, lateText } from "../public/dashboard/lagging.js";
import { Pages } from "../public/dashboard/pages.js";
import { bytesOf, hexDump, prettyJson, viewsOf } from "../public/dashboard/record.js";
import { targetOf, whenOf } from "../public/dashboard/schedules.js";
import { previewOf } from "../public/dashboard/tables.js";

const polled = (...partitions) => [{
  group: "billing", members: [], operated: true, lag: 0, lag_unknown: 0,
  partitions: partitions.map(([partition, committed, end]) => ({ topic: "renewals", partition, committed, end, lag: end - committed, member: null })),
}];

test("a rate is what moved between polls, by the time between them", () => {
  const rates = new Rates();
  rates.hear(polled([0, 10, 20], [1, 0, 0]), 1000);
  assert.deepEqual(rates.of("billing"), { done: undefined, come: undefined });
  rates.hear(polled([0, 14, 20], [1, 2, 8]), 3000);
  assert.deepEqual(rates.of("billing"), { done: 3, come: 4 });
  rates.hear(polled([0, 14, 20], [1, 2, 8]), 4000);
  assert.deepEqual(rates.of("billing"), { done: 2, come: 8 / 3 });
  assert.deepEqual(rates.of("nobody"), { done: undefined, come: undefined });
});

test("a partition that is new, or was set back, has not moved", () => {
  const rates = new Rates();
  rates.hear(polled([0, 100, 100]), 0);
  rates.hear(polled([0, 5, 100], [1, 5000, 5000]), 1000);
  assert.deepEqual(rates.of("billing"), { done: 0, come: 0 });
  rates.hear(polled([0, 8, 100], [1, 5001, 5002]), 2000);
  assert.deepEqual(rates.of("billing"), { done: 2, come: 1 });
});

test("the first commit of a partition is no jump from nothing", () => {
  const rates = new Rates();
  rates.hear(polled([0, null, 100]), 0);
  rates.hear(polled([0, 90, 104]), 1000);
  assert.deepEqual(rates.of("billing"), { done: 0, come: 4 });
  rates.hear(polled([0, 94, 104]), 2000);
  assert.deepEqual(rates.of("billing"), { done: 2, come: 2 });
});

test("a rate forgets what was long ago, and two polls however far apart give one", () => {
  const rates = new Rates();
  rates.hear(polled([0, 0, 0]), 0);
  rates.hear(polled([0, 1000, 1000]), 1000);
  for (let second = 2; second <= 12; second++) rates.hear(polled([0, 1000, 1000]), second * 1000);
  assert.deepEqual(rates.of("billing"), { done: 0, come: 0 });
  rates.hear(polled([0, 2200, 2200]), 612_000);
  assert.deepEqual(rates.of("billing"), { done: 2, come: 2 });
});

const blocked = (place, more = {}) => ({ group: "billing", place, topic: "renewals", partition: 0, state: "blocked", offset: 1, since_ms: 1, ...more });
const places = (blockedPlaces) => blockedPlaces.all.map(({ place }) => place);

test("what is blocked follows the events, the longest blocked first", () => {
  const all = new BlockedPlaces();
  all.answer([blocked("renewals/0/key/b", { since_ms: 5 }), blocked("renewals/0/key/a", { since_ms: 5 })]);
  all.hear({ type: "group.blocked", data: blocked("renewals/0/key/c", { since_ms: 2 }) });
  assert.deepEqual(places(all), ["renewals/0/key/c", "renewals/0/key/a", "renewals/0/key/b"]);
  all.hear({ type: "group.blocked", data: blocked("renewals/0/key/c", { since_ms: 9, offset: 3 }) });
  assert.deepEqual(places(all), ["renewals/0/key/a", "renewals/0/key/b", "renewals/0/key/c"]);
  all.hear({ type: "group.unblocked", data: { group: "mail", place: "renewals/0/key/a" } });
  all.hear({ type: "group.unblocked", data: { group: "billing", place: "renewals/0/key/b" } });
  assert.deepEqual(places(all), ["renewals/0/key/a", "renewals/0/key/c"]);
});

test("a list that is older than the events after its question does not undo them", () => {
  const all = new BlockedPlaces();
  all.answer([blocked("renewals/0/key/a")]);
  all.ask();
  all.hear({ type: "group.unblocked", data: { group: "billing", place: "renewals/0/key/a" } });
  all.hear({ type: "group.blocked", data: blocked("renewals/0/key/b") });
  all.answer([blocked("renewals/0/key/a")]);
  assert.deepEqual(places(all), ["renewals/0/key/b"]);
  all.ask();
  all.answer([]);
  assert.deepEqual(places(all), []);
});

test("a place is named by its key, as a partition, or as a record by itself", () => {
  assert.equal(nameOf(blocked("renewals/0/key/a", { key: "a" })), "a");
  assert.equal(nameOf(blocked("renewals/0/base64//w==", { key_base64: "/w==" })), "base64:/w==");
  assert.equal(nameOf(blocked("renewals/0")), "Partition 0");
  assert.equal(nameOf(blocked("renewals/0/offset/1700", { offset: 1700 })), "Record 1,700");
});

const action = (id, at_ms, more = {}) => ({ id, group: "billing", at_ms, by: "eve", action: "skip", topic: "renewals", partition: 0, offset: 1, done: null, reason: "", ...more });

test("an action and its outcome are one, in whatever order they come", () => {
  const told = [action("1", 10), { id: "1", group: "billing", done: false, reason: "gone" }];
  for (const order of [told, [...told].reverse(), [...told, told[0]]]) {
    const actions = new Actions();
    for (const one of order) actions.hear(one);
    assert.equal(actions.all.length, 1);
    assert.deepEqual(actions.all[0], action("1", 10, { done: false, reason: "gone" }));
  }
  const early = new Actions();
  early.hear(told[1]);
  assert.deepEqual(early.all, [], "an outcome alone says nothing");
});

test("actions are the newest first, and not without end", () => {
  const actions = new Actions();
  for (let i = 0; i < 2500; i++) actions.hear(action(String(i), i));
  assert.equal(actions.all[0].id, "2499");
  assert.ok(actions.all.length <= 1000);
});

test("an action is told with what it was done to", () => {
  assert.equal(whatOf(action("1", 1, { key: "user-7", offset: 17 })), "skip user-7 · billing · renewals, partition 0, offset 17");
  assert.equal(whatOf({ ...action("1", 1), action: "redrive", records: 1, topic: "r.b.dlt" }), "redrive 1 dead letter of r.b.dlt");
});

test("pages are turned back the way they came", () => {
  const pages = new Pages();
  assert.deepEqual([pages.cursor, pages.isFirst, pages.words(50, 120)], [null, true, "1–50 of 120"]);
  pages.forward("0-70", 50);
  pages.forward("0-20", 50);
  assert.deepEqual([pages.cursor, pages.isFirst, pages.words(20, 20)], ["0-20", false, "101–120 of 120"]);
  assert.equal(pages.words(20), "101–120", "how many there are is not always known");
  pages.back();
  assert.equal(pages.cursor, "0-70");
  pages.back();
  pages.back();
  assert.deepEqual([pages.cursor, pages.isFirst], [null, true]);
});

test("JSON is laid out and otherwise left as it is", () => {
  const text = '{"n":9007199254740993,"d":1.10,"a":[],"o":{ },"l":[1,"a\\"{,"],"n":null}';
  const laid = '{\n  "n": 9007199254740993,\n  "d": 1.10,\n  "a": [],\n  "o": {},\n  "l": [\n    1,\n    "a\\"{,"\n  ],\n  "n": null\n}';
  assert.equal(prettyJson(text), laid);
  assert.equal(prettyJson(laid), laid);
  assert.equal(prettyJson(' "x" '), '"x"');
  for (const none of ["", "renewal 2", '{"a":}', "[1,]"]) assert.equal(prettyJson(none), null, none);
  const long = JSON.stringify({ text: "x\\".repeat(200_000) });
  assert.deepEqual(JSON.parse(prettyJson(long)), JSON.parse(long));
});

test("bytes are dumped sixteen a line", () => {
  const bytes = Uint8Array.from({ length: 18 }, (_, i) => 0x5f + i);
  assert.equal(
    hexDump(bytes),
    "00000000  5f 60 61 62 63 64 65 66  67 68 69 6a 6b 6c 6d 6e  |_`abcdefghijklmn|\n" +
      "00000010  6f 70                                             |op|",
  );
  assert.equal(hexDump(new Uint8Array([0, 0x7f, 0xff])).slice(-5), "|...|");
  assert.equal(hexDump(new Uint8Array()), "");
});

test("a value is shown as JSON, text and bytes, as far as it is that", () => {
  const names = (record) => viewsOf(record).map(({ name }) => name);
  assert.deepEqual(names({ value: "[1]" }), ["JSON", "Text", "Hex"]);
  assert.deepEqual(names({ value: "renewal" }), ["Text", "Hex"]);
  assert.deepEqual(names({ value: "" }), ["Text", "Hex"]);
  assert.deepEqual(names({ value_base64: "/wA=" }), ["Hex"]);
  assert.deepEqual(names({}), [], "a tombstone has none");
  assert.deepEqual([...bytesOf(undefined, "/wA=")], [255, 0]);
  assert.deepEqual([...bytesOf("ä", undefined)], [195, 164]);
  const dump = viewsOf({ value: "x".repeat(70_000) }).at(-1)?.render() ?? "";
  assert.deepEqual([dump.split("\n").length, dump.slice(-18)], [4097, "… 4,464 more bytes"]);
});

test("times are told as long as they are", () => {
  const told = [0, 999, 1000, 59_940, 61_000, 120_000, 3_600_000, 5_400_000, 90_000_000].map(duration);
  assert.deepEqual(told, ["0 ms", "999 ms", "1 s", "59.9 s", "1 min 1 s", "2 min", "1 h", "1 h 30 min", "1 d 1 h"]);
  assert.deepEqual([1000, 2500, 13_200, 0, -5].map((left) => countdown(left, 0)), ["in 1.0 s", "in 2.5 s", "in 14 s", "now", "now"]);
  assert.deepEqual([{}, { key: "" }, { key: "a" }, { key_base64: "/w==" }].map(keyText), [undefined, "(empty key)", "a", "base64:/w=="]);
});

test("a browser's clock that is wrong is set right by what answers say, and one that is right is left alone", () => {
  const clock = new Clock(() => 1_000_000);
  clock.hear(999_100);
  assert.equal(clock.now(), 1_000_000);
  clock.hear(400_000);
  assert.equal(clock.now(), 400_000);
});

test("an operator's name goes through a header as UTF-8", () => {
  assert.equal(headerText("eve"), "eve");
  const sent = headerText("Zoë Ščerba\n");
  assert.equal(new TextDecoder().decode(Uint8Array.from(sent, (character) => character.charCodeAt(0))), "Zoë Ščerba ");
  new Headers({ "barnabas-operator": sent });
});

test("a command says who acts and where, and a refusal is told in the gateway's words", async (t) => {
  /** @type {any[]} */ const asked = [];
  t.mock.method(globalThis, "fetch", async (/** @type {string} */ url, /** @type {any} */ request) => {
    asked.push({ url, ...request });
    const headers = { "content-type": "application/problem+json", date: "Tue, 24 Nov 2026 03:00:00 GMT" };
    return new Response(JSON.stringify({ code: "refused", detail: "another record stands there" }), { status: 409, headers });
  });
  let heardMs = 0;
  const api = new Api(() => "eve", (ms) => (heardMs = ms));
  const refused = await api.command("skip", /** @type {any} */ ({ ...blocked("r/0/key/a/b", { key: "a/b" }), group: "bil/ling" })).catch((error) => error);
  assert.ok(refused instanceof Problem);
  assert.equal(inWords(refused), "Refused: another record stands there.");
  assert.equal(heardMs, Date.UTC(2026, 10, 24, 3));
  assert.equal(asked[0].url, "/v1/admin/groups/bil%2Fling/commands");
  assert.equal(asked[0].headers["barnabas-operator"], "eve");
  assert.deepEqual(JSON.parse(asked[0].body), { action: "skip", topic: "renewals", partition: 0, key: "a/b", offset: 1 });
});

test("a gateway that is away, or does not answer, is told from one that refuses", async (t) => {
  const fails = t.mock.method(globalThis, "fetch", async () => { throw new TypeError("fetch failed"); });
  const api = new Api(() => "eve");
  const away = await api.groups().catch((error) => error);
  assert.equal(inWords(away), "The gateway cannot be reached.");
  fails.mock.mockImplementation(async () => new Response("<html>", { status: 502 }));
  assert.equal(inWords(await api.groups().catch((error) => error)), "The gateway answers 502.");
  assert.equal(inWords(new Problem(504, { detail: "nobody of billing answers" })), "No answer: nobody of billing answers.");
});

const lag = (partition, behind, member = "a") => ({ topic: "renewals", partition, committed: behind === null ? null : 1, end: 9, lag: behind, member });
const group = (name, operated, partitions) => ({
  group: name, members: [], operated, partitions,
  lag: partitions.reduce((sum, one) => sum + (one.lag ?? 0), 0), lag_unknown: partitions.filter((one) => one.lag === null).length,
});

test("what lags is the furthest behind first, and what is not known is not nothing", () => {
  const groups = [
    group("done", true, [lag(0, 0)]),
    group("billing", true, [lag(0, 2), lag(1, 5, null)]),
    group("new", false, [lag(0, null)]),
    group("orders", false, [lag(0, 90), lag(1, null)]),
    group("due", false, [lag(0, 1)]),
    { ...group("apps.g2", false, [lag(0, 4)]), projection: "apps" },
    group("other.g2", false, [lag(0, 3)]),
  ];
  const told = lagging(groups, [{ topic: "orders", kind: "store" }, { topic: "due", kind: "schedules" }]);
  assert.deepEqual(told.map(({ group }) => group), ["orders", "billing", "apps.g2", "other.g2", "due", "new"]);
  assert.deepEqual(told.map(({ is }) => is), ["atomic store", "consumers", "projection", "other program", "schedules", "other program"]);
  assert.deepEqual(told.map(lagText), ["at least 90", "7", "4", "3", "1", "not known"]);
  assert.deepEqual(told.map(({ worst, nobody }) => [worst?.partition, nobody]), [[0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [0, 0]]);
});

test("a schedule that is late is told, and one that is just due is not", () => {
  assert.equal(lateText(null, 100_000), "");
  assert.equal(lateText(99_000, 100_000), "");
  assert.equal(lateText(200_000, 100_000), "");
  assert.equal(lateText(40_000, 100_000), "Schedules are late: the first of them was due 1 min ago.");
});

test("a value is told on a line, and a schedule by when it comes and what it makes", () => {
  assert.equal(previewOf({ value: '{\n  "a": 1\n}' }), '{ "a": 1 }');
  assert.equal(previewOf({ value: "" }), "(empty)");
  assert.equal(previewOf({ value_base64: "/wA=" }), "base64:/wA=");
  assert.equal(previewOf({ value: "x".repeat(500) }), `${"x".repeat(160)}…`);
  const event = { topic: "renewals", type: "renewal.due", partitionkey: "ada" };
  assert.equal(targetOf({ id: "a", due: null, event }), "renewals · renewal.due · ada");
  assert.equal(targetOf({ id: "a", due: null, event: { topic: "renewals" } }), "renewals");
  assert.equal(whenOf({ id: "a", due: null, event }), "once");
  assert.equal(whenOf({ id: "a", due: null, event, cron: "0 9 * * *", time_zone: "Europe/Berlin" }), "0 9 * * * · Europe/Berlin");
});

test("tables and schedules are asked for page by page, and a schedule is cancelled by its id", async (t) => {
  /** @type {string[]} */ const asked = [];
  t.mock.method(globalThis, "fetch", async (/** @type {string} */ url, /** @type {any} */ request) => {
    asked.push(`${request.method ?? "GET"} ${url}`);
    return request.method === "DELETE" ? new Response(null, { status: 202 }) : new Response("{}");
  });
  const api = new Api(() => "eve");
  await api.entries("a b", { limit: 50, after: "0.YQ", prefix: "user/" });
  await api.schedules({ limit: 50, after: null, refused: true });
  await api.cancelSchedule("renewal/7");
  assert.deepEqual(asked, [
    "GET /v1/admin/tables/a%20b?limit=50&prefix=user%2F&after=0.YQ",
    "GET /v1/schedules?limit=50&refused=true",
    "DELETE /v1/schedules/renewal%2F7",
  ]);
});
