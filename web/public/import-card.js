// One import as the page shows it. What comes from outside is put in as text.

const STAGES = ["upload", "accepted", "consumed", "progress", "end"];
const WORDS = /** @type {Record<string, string>} */ ({
  upload: "Uploading",
  accepted: "Accepted",
  consumed: "Picked up",
  progress: "Importing",
  completed: "Completed",
  failed: "Failed",
});
const number = new Intl.NumberFormat("en");

export class ImportCard {
  root;
  hasEnded = false;
  #name;
  #stage = 0;
  /** Rows that were done when, for the speed. @type {{ at: number, rows: number }[]} */ #samples = [];
  #counts = { ok: 0, rejected: 0, total: 0 };

  /** @param {string} name */
  constructor(name) {
    const template = /** @type {HTMLTemplateElement} */ (document.getElementById("import-template"));
    this.root = /** @type {HTMLElement} */ (/** @type {DocumentFragment} */ (template.content.cloneNode(true)).firstElementChild);
    this.#name = name;
    this.#find(".name").textContent = name;
    this.#find(".bar").setAttribute("aria-label", `Progress of ${name}`);
    this.#reach("upload", "upload");
  }

  /**
   * @param {number} sent bytes
   * @param {number} total bytes
   */
  upload(sent, total) {
    if (this.#stage === 0) this.#fill(total > 0 ? sent / total : 1, `uploading, ${Math.round((100 * sent) / (total || 1))} %`);
  }

  /** The gateway has the file. */
  submitted() {
    this.#reach("accepted", "accepted");
    this.#fill(0, "waiting");
  }

  /** @param {{ type: string, time: string, data?: any }} event */
  hear({ type, time, data }) {
    if (this.hasEnded) return;
    if (type === "job.consumed") this.#reach("consumed", "consumed");
    if (type === "job.progress") this.#reach("progress", "progress");
    if (data?.rows) this.#showProgress(data, Date.parse(time));
    if (type === "job.completed") this.#end("completed");
    if (type === "job.failed") this.fail(data?.error?.message ?? "The import failed.");
  }

  /** @param {import("./barnabas/barnabas.d.ts").JobState} state */
  showState(state) {
    if (this.hasEnded) return;
    if (state.state === "running") this.#reach("progress", "progress");
    this.#showProgress(state, Date.now());
    if (state.state === "completed") this.#end("completed");
    if (state.state === "failed") this.fail(state.error?.message ?? "The import failed.");
  }

  /** @param {string} why */
  fail(why) {
    const error = this.#find(".error");
    error.textContent = why;
    error.hidden = false;
    this.#end("failed");
  }

  /** The result in one sentence. */
  summary() {
    const { ok, rejected } = this.#counts;
    return `${this.#name}: ${this.root.dataset.state}, ${number.format(ok)} imported, ${number.format(rejected)} rejected`;
  }

  /**
   * @param {import("./barnabas/barnabas.d.ts").JobProgress} progress
   * @param {number} at
   */
  #showProgress({ rows, rejects }, at) {
    this.#counts = rows;
    const done = rows.ok + rows.rejected;
    this.#find(".ok").textContent = number.format(rows.ok);
    this.#find(".rejected").textContent = number.format(rows.rejected);
    this.#find(".total").textContent = number.format(rows.total);
    this.#fill(rows.total > 0 ? done / rows.total : 0, `${number.format(done)} of ${number.format(rows.total)} rows`);
    this.#showRate(done, at);
    this.#showRejects(rejects, rows.rejected);
  }

  /**
   * @param {number} done
   * @param {number} at
   */
  #showRate(done, at) {
    this.#samples = [...this.#samples, { at, rows: done }].slice(-400);
    const first = this.#samples[0];
    const seconds = (at - first.at) / 1000;
    if (seconds > 0 && done > first.rows) {
      this.#find(".rate").textContent = number.format(Math.round((done - first.rows) / seconds));
    }
  }

  /**
   * @param {{ line: number, reason: string }[]} rejects
   * @param {number} count
   */
  #showRejects(rejects, count) {
    if (!rejects?.length) return;
    const details = this.#find(".rejects");
    details.hidden = false;
    const more = count > rejects.length ? `, the first ${number.format(rejects.length)} of them here` : "";
    this.#find(".rejects summary").textContent = `${number.format(count)} rejected ${count === 1 ? "row" : "rows"}${more}`;
    const rows = rejects.map(({ line, reason }) => {
      const row = document.createElement("tr");
      row.insertCell().textContent = number.format(line);
      row.insertCell().textContent = reason;
      return row;
    });
    this.#find("tbody").replaceChildren(...rows);
  }

  /** @param {"completed" | "failed"} how */
  #end(how) {
    this.hasEnded = true;
    if (how === "completed") this.#fill(1, "completed");
    this.#reach("end", how);
    if (how === "failed") this.#find('[data-stage="end"]').textContent = "Failed";
  }

  /**
   * @param {string} stage
   * @param {string} state
   */
  #reach(stage, state) {
    this.#stage = Math.max(this.#stage, STAGES.indexOf(stage));
    this.root.dataset.state = state;
    this.#find(".state").textContent = WORDS[state];
    for (const [i, name] of STAGES.entries()) {
      const shown = this.#find(`[data-stage="${name}"]`);
      const isDone = i < this.#stage || state === "completed";
      shown.classList.toggle("done", isDone && state !== "failed");
      shown.classList.toggle("now", i === this.#stage && !isDone && state !== "failed");
      shown.classList.toggle("failed", name === "end" && state === "failed");
      if (i === this.#stage) shown.setAttribute("aria-current", "step");
      else shown.removeAttribute("aria-current");
    }
  }

  /**
   * @param {number} share from 0 to 1
   * @param {string} words
   */
  #fill(share, words) {
    const percent = Math.max(0, Math.min(100, share * 100));
    this.#find(".fill").style.width = `${percent}%`;
    const bar = this.#find(".bar");
    bar.setAttribute("aria-valuenow", String(Math.floor(percent)));
    bar.setAttribute("aria-valuetext", words);
  }

  /** @param {string} selector */
  #find(selector) {
    const found = this.root.querySelector(selector);
    if (!(found instanceof HTMLElement)) throw new Error(`a card has no ${selector}`);
    return found;
  }
}
