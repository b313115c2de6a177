// The page of operators in Chromium, with running consumer groups, on both logs.
import assert from "node:assert/strict";
import { mkdir } from "node:fs/promises";
import { after, afterEach, before, beforeEach, describe, test } from "node:test";
import { chromium } from "playwright-core";

import { OperatedGroups } from "./operated-groups.js";

const DEADLINE_MS = 60_000;
/** A key that must be shown as it is. */
const TRICKY = '<img src="x" onerror="document.body.remove()">';
const QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

let browser;

before(async () => {
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: QUIET });
});
after(() => browser?.close());

/** Waits for a fact. */
async function until(what, fact) {
  const deadline = Date.now() + DEADLINE_MS;
  while (!(await fact())) {
    if (Date.now() > deadline) assert.fail(`not within ${DEADLINE_MS} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

for (const [log, brokers] of [["the embedded log", () => undefined], ["Kafka", kafkaBrokers]]) {
  describe(`on ${log}`, () => operate(brokers));
}

function kafkaBrokers() {
  if (!process.env.KAFKA_BROKERS) throw new Error("KAFKA_BROKERS must name a Kafka");
  return process.env.KAFKA_BROKERS;
}

function operate(brokers) {
  let groups, context, page;
  /** The requests of pages that are under way. */
  const asked = new Set();

  beforeEach(async () => {
    asked.clear();
    groups = await OperatedGroups.start(brokers());
    context = await browser.newContext({ viewport: { width: 1200, height: 900 } });
    context.setDefaultTimeout(DEADLINE_MS);
    page = await open();
  });
  afterEach(async (test) => {
    if (!test.passed && page) {
      await mkdir("test/browser/failures", { recursive: true });
      await page.screenshot({ path: `test/browser/failures/${test.fullName.replace(/\W+/g, "-")}.png`, fullPage: true });
    }
    await context?.close();
    await groups?.stop();
  });

  async function open() {
    const opened = await context.newPage();
    opened.on("pageerror", (error) => console.error("page error:", error));
    opened.on("request", (request) => asked.add(request));
    for (const end of ["requestfinished", "requestfailed"]) opened.on(end, (request) => asked.delete(request));
    // A reload would forget it.
    await opened.goto(`${groups.url}/dashboard`);
    await opened.evaluate(() => (window.isOfOneLoad = true));
    return opened;
  }

  // Others may be on the same Kafka.
  const own = (on, list) => on.locator(list, { hasText: groups.prefix });
  const cards = (on) => own(on, "#blocked .card");
  const card = (on, key) => cards(on).filter({ has: on.getByRole("heading", { name: key, exact: true }) });
  const actions = (on) => own(on, "#actions tbody tr");
  const wasHandled = (key, value) => () => groups.handled.some((line) => line.handled === key && line.value === value);
  const group = (name) => page.locator(`#groups tbody[data-group="${groups.prefix}.${name}"]`);

  async function introduce(name, on = page) {
    const dialog = on.getByRole("dialog", { name: "Who are you?" });
    await dialog.getByLabel("Name").fill(name);
    await dialog.getByLabel("Name").press("Enter");
  }

  async function confirm(words) {
    await page.getByRole("dialog").getByRole("button", { name: words }).click();
  }

  /** From now on the page hears of what is blocked and done, and cannot ask. */
  async function hearOnly() {
    await page.locator('#connection[data-state="open"]').waitFor();
    await group("billing").waitFor();
    for (const list of ["blocked", "actions?*"]) await page.route(`**/v1/admin/${list}`, (route) => route.abort());
    const isList = (request) => /\/v1\/admin\/(blocked|actions)/.test(request.url());
    await until("what was asked before is answered", () => ![...asked].some(isList));
    // The gateway tells what happens from when it has found the groups.
    let probe = 0;
    let probeAt = 0;
    await until("something is heard", async () => {
      if (Date.now() >= probeAt) {
        groups.append("renewals", `probe-${++probe}`, "poison");
        probeAt = Date.now() + 200;
      }
      return (await cards(page).count()) > 0;
    });
  }

  test("a key that is blocked is skipped by an operator, and goes on", async () => {
    await hearOnly();
    groups.append("renewals", "user-7", "poison 1");
    const blocked = card(page, "user-7");
    await blocked.waitFor();
    assert.match(await blocked.locator(".message").textContent(), /the card is declined/);
    assert.equal(await blocked.locator(".attempts").textContent(), "1");
    assert.match(await blocked.locator(".due").textContent(), /^in (1 h|59 min)/);
    groups.append("renewals", "user-7", "renewal 2");
    groups.append("renewals", "user-8", "renewal 1");
    await until("others go on", wasHandled("user-8", "renewal 1"));
    assert.ok(!wasHandled("user-7", "renewal 2")());

    await blocked.getByRole("button", { name: "Skip" }).press("Enter");
    await page.getByRole("dialog", { name: "Skip: user-7?" }).waitFor();
    await page.keyboard.press("Enter");
    await introduce("Zoë");
    await until("the next renewal goes through", wasHandled("user-7", "renewal 2"));
    await blocked.waitFor({ state: "detached" });
    const action = actions(page).filter({ hasText: "skip user-7" });
    await action.locator("td", { hasText: /^done$/ }).waitFor();
    assert.equal(await action.locator(".who").textContent(), "Zoë");
    assert.ok(!wasHandled("user-7", "poison 1")());
    assert.equal(await page.evaluate(() => window.isOfOneLoad), true, "the page was loaded once");
  });

  test("what another operator was faster with is refused, and said at the button", async () => {
    groups.append("renewals", "user-7", "poison 1");
    groups.append("renewals", "user-7", "poison 2");
    const [mine, other] = [page, await open()];
    await card(mine, "user-7").getByRole("button", { name: "Skip" }).click();
    await card(other, "user-7").getByRole("button", { name: "To dead letters" }).click();
    await introduce("eve", other);
    const offset = async () => (await card(mine, "user-7").locator(".where").textContent())?.split("offset ")[1];
    const first = await offset();
    await until("the next record is blocked", async () => (await offset()) !== first);
    await confirm("Skip");
    await introduce("bob");
    await card(mine, "user-7").getByText("Refused: the record at this offset is not blocked there.").waitFor();
    await actions(mine).filter({ hasText: "bob" }).getByText("refused").waitFor();
    await card(mine, "user-7").getByRole("button", { name: "Ignore" }).click();
    await confirm("Ignore");
    const ignored = card(mine, "user-7").and(mine.locator('[data-state="ignoring"]'));
    await ignored.getByRole("button", { name: "Block again" }).click();
    await ignored.waitFor({ state: "detached" });
    await until("nothing is left behind", async () => (await group("billing").locator(".lag").textContent()) === "0");
  });

  test("more dead letters than a page has are turned through, and acted on together", async () => {
    for (let i = 1; i <= 120; i++) groups.append("renewals", `user-${i}`, `hopeless ${i}`);
    const topic = own(page, "#dead-letters .list tr").filter({ hasText: "renewals" });
    await topic.locator(".waiting", { hasText: /^120$/ }).waitFor();
    await topic.getByRole("button").click();
    const letters = page.getByRole("region", { name: ".dlt" });
    const keys = () => letters.locator("tbody .key").allTextContents();
    const seen = [];
    for (const range of ["1–50 of 120", "51–100 of 120", "101–120 of 120"]) {
      await letters.getByText(range, { exact: true }).waitFor();
      seen.push(...(await keys()));
      if (seen.length < 120) await letters.getByRole("button", { name: "Older" }).click();
    }
    assert.equal(new Set(seen).size, 120);
    assert.ok(await letters.getByRole("button", { name: "Older" }).isDisabled());
    await letters.getByRole("button", { name: "Newer" }).click();
    await letters.getByText("51–100 of 120", { exact: true }).waitFor();
    assert.deepEqual(await keys(), seen.slice(50, 100));

    await letters.getByLabel("Select all of this page").check();
    await letters.getByRole("button", { name: "Discard 50 selected" }).click();
    await confirm("Cancel");
    await letters.getByLabel("Select partition").first().uncheck();
    await letters.getByRole("button", { name: "Discard 49 selected" }).click();
    await confirm("Discard 49");
    await introduce("eve");
    await letters.getByText("49 dead letters discarded.").waitFor();
    await letters.getByLabel("Filter").fill("hopeless 1");
    await letters.getByRole("button", { name: "Find" }).click();
    const discarded = new Set(seen.slice(51, 100));
    const left = seen.filter((key) => key.startsWith("user-1") && !discarded.has(key)).length;
    await letters.getByText(`of ${left}`).waitFor();
    groups.heal();
    await letters.getByRole("button", { name: "Redrive all found" }).click();
    await confirm(`Redrive ${left}`);
    await letters.getByText(`${left} dead letters redriven.`).waitFor();
    await until("they are handled", () => groups.handled.length === left);
    await topic.locator(".waiting", { hasText: new RegExp(`^${71 - left}$`) }).waitFor();
  });

  test("what waits on a retry topic is told until when, on a narrow screen in the dark", async () => {
    await page.setViewportSize({ width: 360, height: 740 });
    await page.emulateMedia({ colorScheme: "dark" });
    groups.append("reminders", "user-1", "poison");
    groups.append("renewals", `user-${"x".repeat(100)}`, `poison, {"${"y".repeat(300)}":1}`);
    groups.append("renewals", "user-2", `{"hopeless":"${"z".repeat(300)}"}`);
    const retries = own(page, "#retry-topics tbody tr");
    await retries.locator(".waiting", { hasText: /^1$/ }).waitFor();
    assert.match(await retries.locator(".due").textContent(), /^in (10|9) min/);
    await cards(page).waitFor();
    await own(page, "#dead-letters .list button").filter({ hasText: "renewals" }).click();
    await page.locator("#letters tbody tr").waitFor();
    await fits();
    await page.locator("#letters tbody .link").click();
    await page.getByRole("dialog").locator(".headers tr").first().waitFor();
    await fits();
    await page.getByRole("dialog").getByRole("button", { name: "Close" }).click();
    groups.append("plans", `plan-${"x".repeat(100)}`, `{"${"y".repeat(300)}":1}`);
    await page.locator(`#tables tr[data-topic="${groups.prefix}.plans"]`).getByRole("button").click();
    await page.getByRole("region", { name: ".plans" }).locator("tbody tr").waitFor();
    await fits();
  });

  test("a table is looked through by key, page by page, and a record of it is shown", async () => {
    for (let i = 1; i <= 60; i++) groups.append("plans", `plan-${String(i).padStart(2, "0")}`, `{"cents":${i}}`);
    groups.append("plans", "plan-07", '{"cents":9007199254740993}');
    groups.append("plans", TRICKY, new Uint8Array([0xff, 0x00]));
    const topic = `${groups.prefix}.plans`;
    const table = page.locator(`#tables tr[data-topic="${topic}"]`);
    await table.locator(".records", { hasText: /^62$/ }).waitFor();
    assert.equal(await page.locator(`#tables tr[data-topic="${groups.prefix}.jobs"]`).count(), 0, "Barnabas' own are not shown at first");
    await page.getByLabel("of Barnabas' own too").check();
    await page.locator(`#tables tr[data-topic="${groups.prefix}.jobs"]`).getByText("atomic store").waitFor();
    await table.getByRole("button", { name: topic }).click();
    const entries = page.getByRole("region", { name: topic });
    const keys = () => entries.locator("tbody .key").allTextContents();
    await entries.getByText("1–50", { exact: true }).waitFor();
    assert.equal((await keys())[0], TRICKY);
    assert.equal(await page.locator("main img").count(), 0);
    await entries.getByRole("button", { name: "Next" }).click();
    await entries.getByText("51–61", { exact: true }).waitFor();
    assert.equal((await keys()).at(-1), "plan-60");
    assert.ok(await entries.getByRole("button", { name: "Next" }).isDisabled());
    await entries.getByRole("button", { name: "Back" }).click();
    await entries.getByText("1–50", { exact: true }).waitFor();

    await entries.getByLabel("Keys that begin with").fill("plan-0");
    await entries.getByRole("button", { name: "Find" }).click();
    await entries.getByText("1–9", { exact: true }).waitFor();
    assert.deepEqual(await keys(), Array.from({ length: 9 }, (_, i) => `plan-0${i + 1}`));
    await entries.getByRole("button", { name: "plan-07" }).press("Enter");
    const record = page.getByRole("dialog", { name: "plan-07" });
    assert.equal(await record.locator(".value").textContent(), '{\n  "cents": 9007199254740993\n}');
    assert.ok(await record.getByRole("button", { name: "Redrive" }).isHidden());
    await record.getByRole("button", { name: "Close" }).click();
    await entries.getByLabel("Keys that begin with").fill("nobody");
    await entries.getByLabel("Keys that begin with").press("Enter");
    await entries.getByText("None is found.").waitFor();
  });

  test("a schedule is cancelled by its button, and does not come back", async () => {
    const schedule = async (id, when) => {
      const event = { topic: `${groups.prefix}.offers`, type: "offer.due", partitionkey: "ada", data: {} };
      const body = JSON.stringify({ id, ...when, event });
      const answer = await fetch(`${groups.url}/v1/schedules`, { method: "POST", headers: { "content-type": "application/json" }, body });
      assert.equal(answer.status, 202);
    };
    await schedule("once", { after_s: 7200 });
    await schedule("again", { cron: "0 9 1 * *", time_zone: "Europe/Berlin" });
    const row = (id) => page.locator(`#schedules tr[data-schedule="${id}"]`);
    await row("again").getByText("0 9 1 * * · Europe/Berlin").waitFor();
    assert.match(await row("once").locator(".left").textContent(), /^in (2 h|1 h 59 min)/);
    await row("once").getByText(`${groups.prefix}.offers · offer.due · ada`).waitFor();
    await row("once").getByRole("button", { name: "Cancel: once" }).press("Enter");
    await confirm("Keep it");
    await row("once").getByRole("button", { name: "Cancel: once" }).click();
    await page.getByRole("dialog", { name: "Cancel once?" }).waitFor();
    await confirm("Cancel the schedule");
    await row("once").waitFor({ state: "detached" });
    const listed = await (await fetch(`${groups.url}/v1/schedules`)).json();
    assert.deepEqual(listed.schedules.map(({ id }) => id), ["again"]);
    await page.locator("#schedules-count", { hasText: /^1$/ }).waitFor();
    await page.locator("#schedules").getByLabel("Show").selectOption("refused");
    await row("again").waitFor({ state: "detached" });
    await page.locator("#schedules .empty", { hasText: "There are none." }).waitFor();
  });

  test("what lags is told with where it is furthest behind", async () => {
    groups.append("renewals", "user-7", "poison 1");
    for (let i = 2; i <= 5; i++) groups.append("renewals", "user-7", `renewal ${i}`);
    const row = page.locator(`#lagging tr[data-group="${groups.prefix}.billing"]`);
    await row.locator(".lag", { hasText: /^5$/ }).waitFor();
    assert.match(await row.locator(".where").textContent(), new RegExp(`^${groups.prefix}\\.renewals, partition [01]: 5$`));
    await row.getByText("consumers").waitFor();
    await card(page, "user-7").getByRole("button", { name: "To dead letters" }).click();
    await introduce("eve");
    await row.waitFor({ state: "detached" });
  });

  async function fits() {
    const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    assert.ok(overflow <= 0, `${overflow} px too wide`);
  }

  test("dead letters are looked at, discarded, redriven and handled again", async () => {
    groups.append("renewals", "user-1", '{"hopeless":1,"amount":9007199254740993}');
    groups.append("renewals", "user-2", "hopeless 2");
    groups.append("renewals", TRICKY, new Uint8Array([0xff, 0x00, ...Buffer.from("hopeless")]));
    await page.getByRole("button", { name: `${groups.prefix}.renewals.${groups.prefix}.billing.dlt` }).click();
    const letters = page.getByRole("region", { name: ".dlt" });
    const row = (key) => letters.locator("tbody tr", { hasText: key });
    await row(TRICKY).waitFor();
    assert.equal(await page.locator("main img").count(), 0);
    await row("user-1").getByText("there is no such card").waitFor();

    const record = page.getByRole("dialog");
    await row("user-1").getByRole("button").click();
    assert.equal(await record.locator(".value").textContent(), '{\n  "hopeless": 1,\n  "amount": 9007199254740993\n}');
    assert.match(await record.locator(".headers").textContent(), /bn-origin-offset/);
    await record.getByRole("button", { name: "Close" }).click();
    await row(TRICKY).getByRole("button").click();
    assert.match(await record.locator(".value").textContent(), /^00000000 {2}ff 00 68 6f/);
    await record.getByRole("button", { name: "Close" }).click();

    await letters.getByLabel("Filter").fill("less 2");
    await letters.getByRole("button", { name: "Find" }).click();
    await row("user-1").waitFor({ state: "detached" });
    await row("user-2").getByRole("checkbox").check();
    await letters.getByRole("button", { name: "Discard 1 selected" }).click();
    await page.getByRole("dialog", { name: "Discard 1 dead letter?" }).waitFor();
    await confirm("Discard 1");
    await introduce("eve");
    await letters.getByText("1 dead letter discarded.").waitFor();

    groups.heal();
    await letters.getByLabel("Filter").fill("");
    await letters.getByLabel("Filter").press("Enter");
    await row("user-1").getByRole("button").click();
    await record.getByRole("button", { name: "Redrive" }).click();
    await until("it is handled again", wasHandled("user-1", '{"hopeless":1,"amount":9007199254740993}'));
    await row("user-1").waitFor({ state: "detached" });
    await letters.getByRole("button", { name: "Redrive all found" }).click();
    await page.getByRole("dialog", { name: "Redrive 1 dead letter?" }).waitFor();
    await confirm("Redrive 1");
    await until("the last is handled", () => groups.handled.some(({ handled }) => handled === TRICKY));
    await letters.getByText("None is found.").waitFor();
    await letters.getByLabel("Show").selectOption("all");
    await letters.getByRole("button", { name: "Find" }).click();
    await row("user-2").getByText("discarded by eve").waitFor();
    await row("user-1").getByText("redriven by eve").waitFor();
    await actions(page).filter({ hasText: "discard 1 dead letter" }).waitFor();
    assert.ok(!wasHandled("user-2", "hopeless 2")());
  });

  test("dead letters of a projection are discarded, and there is no button to redrive them", async () => {
    const topic = `entries.${groups.prefix}.view.dlt`;
    groups.append(topic, "user-1", "nonsense");
    await page.getByRole("button", { name: `${groups.prefix}.${topic}` }).click();
    const letters = page.getByRole("region", { name: ".dlt" });
    const row = letters.locator("tbody tr", { hasText: "user-1" });
    await row.getByRole("button").click();
    const record = page.getByRole("dialog");
    await record.getByRole("button", { name: "Discard" }).waitFor();
    assert.equal(await page.getByRole("button", { name: "Redrive" }).count(), 0);
    await record.getByRole("button", { name: "Close" }).click();
    await letters.getByText("They do not come back one by one").waitFor();

    await letters.getByRole("button", { name: "Discard all found" }).click();
    await confirm("Discard 1");
    await introduce("eve");
    await row.waitFor({ state: "detached" });
    await actions(page).filter({ hasText: `discard 1 dead letter of ${groups.prefix}.${topic}` }).waitFor();
  });
}
