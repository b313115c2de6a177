// The client against a small gateway that misbehaves on demand.
import assert from "node:assert/strict";
import { after, before, beforeEach, test } from "node:test";
import { WebSocket } from "ws";

import { Backoff } from "../public/barnabas/backoff.js";
import { connect, jobState, Problem, submitJob } from "../public/barnabas/barnabas.js";
import { FakeGateway } from "./fake-gateway.js";

globalThis.WebSocket ??= /** @type {any} */ (WebSocket);

/** @type {FakeGateway} */ let gateway;
/** @type {import("../public/barnabas/connection.js").Connection[]} */ let connections = [];

before(async () => {
  gateway = await FakeGateway.start();
});
beforeEach(() => {
  connections.forEach((connection) => connection.close());
  connections = [];
  gateway.reset();
});
after(async () => {
  connections.forEach((connection) => connection.close());
  await gateway.stop();
});

function open(options = {}) {
  const connection = connect({ url: gateway.url, ...options });
  connections.push(connection);
  return connection;
}

/** Waits for a fact; the test runner's own deadline is the last resort. */
async function until(what, fact, deadlineMs = 15_000) {
  const deadline = Date.now() + deadlineMs;
  while (!fact()) {
    if (Date.now() > deadline) assert.fail(`not within ${deadlineMs} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

const isOpen = (connection, transport) => () =>
  connection.state.name === "open" && (!transport || connection.state.transport === transport);

function follow(connection, channel = "c", options = {}) {
  const seen = { numbers: [], gaps: [], subscription: null };
  seen.subscription = connection.subscribe(channel, options, (event) => seen.numbers.push(event.data), (gap) => seen.gaps.push(gap));
  return seen;
}

const upTo = (count) => Array.from({ length: count }, (_, i) => i);

for (const transport of ["websocket", "sse", "long-poll"]) {
  test(`${transport} carries every event once and in order`, async () => {
    const connection = open({ transports: [transport] });
    const seen = follow(connection);
    await until("open", isOpen(connection, transport));
    for (let i = 0; i < 50; i++) gateway.publish("c", i);
    gateway.publish("other", 99);
    await until("events", () => seen.numbers.length >= 50);
    assert.deepEqual(seen.numbers, upTo(50));
    assert.equal(seen.subscription.token, "c-50");
  });

  test(`${transport} goes on behind the last event after every cut`, async () => {
    const connection = open({ transports: [transport] });
    const seen = follow(connection);
    await until("open", isOpen(connection, transport));
    for (let round = 0; round < 3; round++) {
      for (let i = 0; i < 5; i++) gateway.publish("c", round * 10 + i);
      await until("the round", () => seen.numbers.length >= round * 10 + 5);
      gateway.cutAll();
      for (let i = 5; i < 10; i++) gateway.publish("c", round * 10 + i);
      await until("what was missed", () => seen.numbers.length >= round * 10 + 10);
    }
    assert.deepEqual(seen.numbers, upTo(30));
    assert.deepEqual(seen.gaps, []);
  });

  test(`${transport} tells of a gap and goes on behind it`, async () => {
    gateway.publish("c", 0);
    gateway.publish("c", 1);
    gateway.publish("c", 2);
    gateway.forget("c", 2);
    const connection = open({ transports: [transport] });
    const seen = follow(connection, "c", { after: "c-0" });
    await until("the gap and what is left", () => seen.numbers.length >= 1);
    assert.deepEqual(seen.numbers, [2]);
    assert.equal(seen.gaps.length, 1);
    assert.equal(seen.gaps[0].reason, "retention");
  });

  test(`${transport} follows several channels, and can start in the past`, async () => {
    gateway.publish("a", 1);
    const connection = open({ transports: [transport] });
    const [a, b] = [follow(connection, "a", { since: "earliest" }), follow(connection, "b")];
    await until("the past", () => a.numbers.length === 1);
    await until("open", isOpen(connection, transport));
    const late = follow(connection, "late");
    await until("subscribed", () => late.subscription.token !== undefined && b.subscription.token !== undefined);
    gateway.publish("b", 2);
    gateway.publish("late", 3);
    await until("all channels", () => b.numbers.length === 1 && late.numbers.length === 1);
    b.subscription.unsubscribe();
    gateway.publish("b", 4);
    gateway.publish("a", 5);
    await until("the others", () => a.numbers.length === 2);
    assert.deepEqual([a.numbers, b.numbers, late.numbers], [[1, 5], [2], [3]]);
  });
}

test("a black-holed upgrade is given up after five seconds and SSE is used", async () => {
  gateway.webSocket = "hang";
  const connection = open();
  const seen = follow(connection);
  await until("SSE", isOpen(connection, "sse"));
  gateway.publish("c", 1);
  await until("the event", () => seen.numbers.length === 1);
});

test("when SSE is refused too, long-poll gets through", async () => {
  gateway.webSocket = "refuse";
  gateway.sse = "refuse";
  const connection = open();
  const seen = follow(connection);
  await until("long-poll", isOpen(connection, "long-poll"));
  gateway.publish("c", 1);
  await until("the event", () => seen.numbers.length === 1);
});

test("a change of transport in mid-stream loses and repeats nothing", async () => {
  const connection = open();
  const seen = follow(connection);
  await until("open", isOpen(connection));
  let sent = 0;
  const publishing = setInterval(() => gateway.publish("c", sent++), 2);
  for (const transport of ["sse", "long-poll", "websocket", "long-poll", "sse", "websocket"]) {
    connection.use([transport]);
    await until(transport, isOpen(connection, transport));
  }
  clearInterval(publishing);
  await until("all", () => seen.numbers.length >= sent);
  assert.deepEqual(seen.numbers, upTo(sent));
});

test("a channel is followed also when it is asked for before the gateway has answered", async () => {
  gateway.held = [];
  const connection = open({ transports: ["websocket"] });
  await until("it is told who connects", () => gateway.held.length === 1);
  const seen = follow(connection);
  gateway.held.forEach((answer) => answer());
  await until("open", isOpen(connection));
  gateway.publish("c", 0);
  await until("the event", () => seen.numbers.length === 1);
});

test("what was on its way to a subscription that was ended is not told to the next one of the channel", async () => {
  const connection = open({ transports: ["websocket"] });
  const first = follow(connection);
  await until("open", isOpen(connection));
  for (const n of upTo(5)) gateway.publish("c", n);
  await until("the first five", () => first.numbers.length === 5);
  gateway.publish("c", 5);
  first.subscription.unsubscribe();
  const second = follow(connection, "c", { since: "earliest" });
  await until("all six", () => second.numbers.length >= 6);
  assert.deepEqual(second.numbers, upTo(6));
});

test("events at places that a log has lost and filled again are told", async () => {
  const connection = open({ transports: ["websocket"] });
  const seen = follow(connection);
  await until("open", isOpen(connection));
  for (const n of upTo(3)) gateway.publish("c", n);
  await until("the first three", () => seen.numbers.length === 3);
  gateway.lose("c", 1);
  gateway.cutAll();
  await until("the gap", () => seen.gaps.length === 1);
  assert.equal(seen.gaps[0].reason, "ahead-of-log");
  gateway.publish("c", 10);
  gateway.publish("c", 11);
  await until("the events after it", () => seen.numbers.length === 5);
  assert.deepEqual(seen.numbers, [0, 1, 2, 10, 11]);
});

test("the gateway says when to come back, and is obeyed", async () => {
  const connection = open({ transports: ["websocket"] });
  follow(connection);
  await until("open", isOpen(connection));
  const states = [];
  connection.addEventListener("state", (event) => states.push(event.detail));
  gateway.bye(321);
  await until("waiting", () => states.some(({ name }) => name === "waiting"));
  await until("open again", isOpen(connection));
  assert.deepEqual(states.find(({ name }) => name === "waiting"), { name: "waiting", retryMs: 321 });
});

test("a close code of 4500 or more ends it for good", async () => {
  const connection = open({ transports: ["websocket"] });
  await until("open", isOpen(connection));
  gateway.closeAll(4501, JSON.stringify({ code: "bad-message" }));
  await until("closed", () => connection.state.name === "closed");
  assert.deepEqual(connection.state, { name: "closed", reason: "bad-message" });
});

test("pings are answered", async () => {
  const connection = open({ transports: ["websocket"] });
  await until("open", isOpen(connection));
  gateway.ping();
  await until("a pong", () => gateway.pongs === 1);
});

test("a subscription that is refused is told and the others go on", async () => {
  const connection = open({ transports: ["websocket"] });
  const errors = [];
  connection.addEventListener("error", (event) => errors.push(event.detail.code));
  follow(connection, "forbidden");
  const seen = follow(connection, "c");
  await until("the refusal", () => errors.length === 1);
  gateway.publish("c", 1);
  await until("the event", () => seen.numbers.length === 1);
  assert.deepEqual(errors, ["forbidden"]);
});

test("waits grow, are spread, and never pass the bound", () => {
  const backoff = new Backoff();
  const longest = Array.from({ length: 12 }, () => backoff.next(undefined, () => 1));
  assert.deepEqual(longest.slice(0, 4), [500, 1000, 2000, 4000]);
  assert.equal(Math.max(...longest), 30_000);
  assert.ok(backoff.next(undefined, () => 0) < 30_000);
  assert.equal(backoff.next(77), 77);
  backoff.reset();
  assert.equal(backoff.next(undefined, () => 1), 500);
});

test("a job is submitted, and its state asked for", async () => {
  const job = await submitJob("import-contacts", "name\nx\n", { channel: "c", url: gateway.url });
  assert.deepEqual(job, { id: "job-1", channel: "c", token: "c-0" });
  assert.equal((await jobState("job-1", { url: gateway.url })).state, "accepted");
});

test("a refused job says why and where", async () => {
  gateway.refusal = { status: 422, problem: { code: "unbalanced-quote", detail: "a quote is never closed", line: 7 } };
  await assert.rejects(submitJob("import-contacts", '"', { channel: "c", url: gateway.url }), (error) => {
    assert.ok(error instanceof Problem);
    assert.deepEqual([error.status, error.code, error.line, error.message], [422, "unbalanced-quote", 7, "a quote is never closed"]);
    return true;
  });
});
