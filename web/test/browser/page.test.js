// The page in Chromium, against the real program, with real clicks.
import assert from "node:assert/strict";
import { mkdir } from "node:fs/promises";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { chromium } from "playwright-core";

import { Gateway, Proxy } from "./gateway.js";

const DEADLINE_MS = 60_000;
const QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

let gateway, browser, proxy, context, page;

before(async () => {
  gateway = await Gateway.start();
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: QUIET });
});
after(async () => {
  await browser?.close();
  await gateway?.stop();
});
beforeEach(async () => {
  proxy = await Proxy.start(gateway.port);
  context = await browser.newContext({ viewport: { width: 1100, height: 900 } });
  context.setDefaultTimeout(DEADLINE_MS);
  page = await open();
});
afterEach(async (test) => {
  if (!test.passed && page) {
    await mkdir("test/browser/failures", { recursive: true });
    await page.screenshot({ path: `test/browser/failures/${test.name.replace(/\W+/g, "-")}.png`, fullPage: true });
  }
  await context.close();
  await proxy.stop();
});

async function open() {
  const opened = await context.newPage();
  opened.on("pageerror", (error) => console.error("page error:", error));
  await opened.goto(proxy.url);
  return opened;
}

const card = (on, name) => on.locator(".import", { has: on.getByRole("heading", { name }) });
const count = async (shown, name) => Number((await shown.locator(`.${name}`).first().textContent()).replace(/\D/g, ""));

/** Rows of which every hundredth has no e-mail worth the name. */
function contacts(rows) {
  const lines = Array.from({ length: rows }, (_, i) => `Person ${i},${i % 100 === 99 ? "nobody" : `p${i}@example.com`},`);
  return { name: `people-${rows}.csv`, mimeType: "text/csv", buffer: Buffer.from(`name,email,phone\n${lines.join("\n")}\n`) };
}

async function openOver(on, transport) {
  await on.locator(`#connection[data-state="open"][data-transport="${transport}"]`).waitFor();
}

async function completed(on, name) {
  await card(on, name).and(on.locator('[data-state="completed"]')).waitFor();
}

test("the sample is imported with a click, stage by stage", async () => {
  await openOver(page, "websocket");
  await page.getByRole("button", { name: "Import the sample" }).click();
  await completed(page, "sample.csv");
  const shown = card(page, "sample.csv");
  assert.equal(await shown.locator(".stages .done").count(), 5);
  const [ok, rejected, total] = [await count(shown, "ok"), await count(shown, "rejected"), await count(shown, "total")];
  assert.equal(total, 600);
  assert.equal(ok + rejected, total);
  assert.ok(rejected > 5, `${rejected} rejected`);
  await shown.getByText("rejected rows").click();
  assert.equal(await shown.locator("tbody tr").count(), rejected);
  assert.match(await shown.locator("tbody tr").first().textContent(), /^\d+\S/);
  assert.equal(await shown.getByRole("progressbar").getAttribute("aria-valuenow"), "100");
});

test("a chosen file and a dropped one are imported side by side", async () => {
  await page.getByLabel("Choose a file").setInputFiles(contacts(1000));
  const dropped = await page.evaluateHandle(() => {
    const transfer = new DataTransfer();
    transfer.items.add(new File(["name,email,phone\nAda,ada@example.com,\n"], "dropped.csv", { type: "text/csv" }));
    return transfer;
  });
  await page.dispatchEvent("#drop", "drop", { dataTransfer: dropped });
  await completed(page, "people-1000.csv");
  await completed(page, "dropped.csv");
  assert.equal(await count(card(page, "people-1000.csv"), "ok"), 990);
  assert.equal(await count(card(page, "dropped.csv"), "ok"), 1);
});

test("with WebSocket blocked SSE is used, with SSE blocked too long-poll", async () => {
  proxy.blocked = ["upgrade: websocket"];
  await page.evaluate(() => sessionStorage.clear());
  await page.reload();
  await openOver(page, "sse");
  await page.getByRole("button", { name: "Import the sample" }).click();
  await completed(page, "sample.csv");
  proxy.blocked.push("text/event-stream");
  await page.evaluate(() => sessionStorage.clear());
  await page.reload();
  await openOver(page, "long-poll");
  await page.getByLabel("Choose a file").setInputFiles(contacts(2000));
  await completed(page, "people-2000.csv");
  assert.equal(await count(card(page, "people-2000.csv"), "ok"), 1980);
});

test("each transport can be forced, in mid-import too", async () => {
  await page.getByLabel("Choose a file").setInputFiles(contacts(100_000));
  for (const transport of ["sse", "long-poll", "websocket"]) {
    await page.getByLabel("Transport").selectOption(transport);
    await openOver(page, transport);
  }
  await completed(page, "people-100000.csv");
  assert.equal(await count(card(page, "people-100000.csv"), "ok"), 99_000);
});

test("a reload in mid-import shows the import go on", async () => {
  await page.getByLabel("Choose a file").setInputFiles(contacts(100_001));
  await card(page, "people-100001.csv").locator('.stages [data-stage="accepted"].now, .stages [data-stage="accepted"].done').waitFor();
  await page.reload();
  await completed(page, "people-100001.csv");
  assert.equal(await count(card(page, "people-100001.csv"), "rejected"), 1000);
});

test("two tabs show their own imports only", async () => {
  const other = await open();
  await page.getByLabel("Choose a file").setInputFiles(contacts(500));
  await other.getByLabel("Choose a file").setInputFiles(contacts(700));
  await completed(page, "people-500.csv");
  await completed(other, "people-700.csv");
  assert.equal(await page.locator(".import").count(), 1);
  assert.equal(await other.locator(".import").count(), 1);
});

test("a gateway killed and started again in mid-import loses and repeats nothing", async () => {
  await openOver(page, "websocket");
  await page.getByLabel("Choose a file").setInputFiles(contacts(200_000));
  await card(page, "people-200000.csv").locator('.stages [data-stage="progress"].now').waitFor();
  await gateway.kill();
  proxy.cutAll();
  await page.locator('#connection:not([data-state="open"])').waitFor();
  await gateway.run();
  await completed(page, "people-200000.csv");
  const shown = card(page, "people-200000.csv");
  assert.deepEqual([await count(shown, "ok"), await count(shown, "rejected")], [198_000, 2000]);
});

test("three gateways behind one address show an import whichever of them answers", async () => {
  const { gateways, stop } = await Gateway.startOnKafka(3);
  const balancer = await Proxy.start(...gateways.map(({ port }) => port));
  try {
    await page.goto(balancer.url);
    await page.getByLabel("Choose a file").setInputFiles(contacts(50_000));
    for (const transport of ["sse", "long-poll", "websocket"]) {
      await page.getByLabel("Transport").selectOption(transport);
      await openOver(page, transport);
    }
    // Cut off, it goes on with the next.
    balancer.cutAll();
    await completed(page, "people-50000.csv");
    const shown = card(page, "people-50000.csv");
    assert.deepEqual([await count(shown, "ok"), await count(shown, "rejected")], [49_500, 500]);
  } finally {
    await balancer.stop();
    await stop();
  }
});

test("a file that cannot be read says why and where", async () => {
  const broken = { name: "broken.csv", mimeType: "text/csv", buffer: Buffer.from('name,email,phone\nA,a@example.com,\n"B,b@example.com,\n') };
  await page.getByLabel("Choose a file").setInputFiles(broken);
  const error = card(page, "broken.csv").locator(".error");
  await error.waitFor();
  assert.match(await error.textContent(), /line 3/);
});

test("the page fits a narrow screen and works in the dark", async () => {
  await page.setViewportSize({ width: 360, height: 740 });
  await page.emulateMedia({ colorScheme: "dark" });
  await page.getByRole("button", { name: "Import the sample" }).click();
  await completed(page, "sample.csv");
  const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  assert.ok(overflow <= 0, `${overflow} px too wide`);
});
