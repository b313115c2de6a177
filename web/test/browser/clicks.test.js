// The page of the clicks example in Chromium: what it sends is counted, and it shows the counts that come back.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { after, afterEach, before, beforeEach, describe, test } from "node:test";
import { chromium } from "playwright-core";

const DEADLINE_MS = 60_000;
const QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

let browser;

before(async () => {
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: QUIET });
});
after(() => browser?.close());

/** The example with its page, on the Kafka at these brokers or on an embedded log. */
class Clicks {
  #process;

  static async start(brokers) {
    const program = process.env.CLICKS;
    if (!program) throw new Error("CLICKS must name the program clicks");
    const clicks = new Clicks();
    const environment = { ...process.env, BARNABAS_LISTEN: "127.0.0.1:0" };
    delete environment.KAFKA_BROKERS;
    if (brokers) environment.KAFKA_BROKERS = brokers;
    clicks.folder = await mkdtemp(join(tmpdir(), "barnabas-clicks-"));
    clicks.#process = spawn(program, ["--serve"], { env: environment, cwd: clicks.folder, stdio: ["ignore", "pipe", "inherit"] });
    const lines = createInterface({ input: clicks.#process.stdout });
    const ended = once(clicks.#process, "exit").then(([code]) => { throw new Error(`it exited with ${code}`); });
    [clicks.url] = await Promise.race([once(lines, "line"), ended]);
    ended.catch(() => {});
    return clicks;
  }

  async stop() {
    const ended = once(this.#process, "exit");
    this.#process.kill("SIGTERM");
    const [code] = await ended;
    await rm(this.folder, { recursive: true });
    assert.equal(code, 0);
  }
}

function kafkaBrokers() {
  if (!process.env.KAFKA_BROKERS) throw new Error("KAFKA_BROKERS must name a Kafka");
  return process.env.KAFKA_BROKERS;
}

for (const [log, brokers] of [["the embedded log", () => undefined], ["Kafka", kafkaBrokers]]) {
  describe(`on ${log}`, () => count(brokers));
}

function count(brokers) {
  let clicks, context;
  /** What pages have complained of. */
  const complaints = [];

  beforeEach(async () => {
    complaints.length = 0;
    clicks = await Clicks.start(brokers());
    context = await browser.newContext({ viewport: { width: 1100, height: 800 } });
    context.setDefaultTimeout(DEADLINE_MS);
  });
  afterEach(async (test) => {
    for (const page of test.passed ? [] : (context?.pages() ?? [])) {
      await mkdir("test/browser/failures", { recursive: true });
      await page.screenshot({ path: `test/browser/failures/${test.fullName.replace(/\W+/g, "-")}.png`, fullPage: true });
    }
    await context?.close();
    await clicks?.stop();
  });

  async function open() {
    const page = await context.newPage();
    page.on("pageerror", (error) => complaints.push(String(error)));
    page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
    await page.goto(clicks.url);
    await page.locator("#connection[data-state=open]").waitFor();
    return page;
  }

  /** Waits until a page shows so many of a type, and no more. */
  async function shows(page, type, number) {
    await page.waitForFunction(([id, text]) => document.getElementById(id)?.textContent === text, [type, String(number)]);
  }

  test("what is done on a page is counted and drawn on every page", async () => {
    const [page, other] = [await open(), await open()];
    await page.bringToFront();
    for (let i = 0; i < 7; i++) await page.locator("h1").click();
    for (let i = 0; i < 4; i++) await page.keyboard.press("k");
    for (const shown of [page, other]) {
      await shows(shown, "click", 7);
      await shows(shown, "key", 4);
    }
    const minutes = page.locator("#minutes li");
    assert.equal(await minutes.count(), 15);
    const heights = await page.locator('#minutes .bar[data-type="click"]').evaluateAll((bars) => bars.map((bar) => bar.offsetHeight));
    assert.ok(heights.some((height) => height > 0), `a bar is drawn: ${heights}`);
    const labels = await minutes.evaluateAll((all) => all.map((item) => item.getAttribute("aria-label")));
    const clicked = labels.map((label) => Number(/(\d+) clicks/.exec(label)[1]));
    assert.equal(clicked.reduce((a, b) => a + b), 7);
    assert.deepEqual(complaints, []);
  });

  test("a page that comes later shows the minutes before it, and one that goes away sends what it has", async () => {
    const page = await open();
    for (let i = 0; i < 3; i++) await page.locator("h1").click();
    // Without waiting for the next time that it would send.
    await page.close({ runBeforeUnload: true });
    const later = await open();
    await shows(later, "click", 3);
    await later.reload();
    await shows(later, "click", 3);
    assert.deepEqual(complaints, []);
  });
}
