// A gateway with consumer groups beside it that get into trouble when told to.
import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

export class OperatedGroups {
  #folder;
  #process;
  /** Lines of what was handled. @type {{ handled: string, value: string }[]} */ handled = [];
  /** Its topics and groups begin with it. */ prefix;
  url = "";

  /** On the Kafka at these brokers, or on an embedded log. */
  static async start(brokers) {
    const program = process.env.OPERATED_GROUPS;
    if (!program) throw new Error("OPERATED_GROUPS must name the program operated-groups");
    const folder = await mkdtemp(join(tmpdir(), "barnabas-dashboard-"));
    const groups = new OperatedGroups(folder);
    await groups.#run(program, brokers);
    return groups;
  }

  constructor(folder) {
    this.#folder = folder;
    this.prefix = `ops${randomBytes(6).toString("hex")}`;
  }

  async #run(program, brokers) {
    const settings = { BARNABAS_TOPICS_PREFIX: this.prefix, BARNABAS_LISTEN: "127.0.0.1:0", BARNABAS_DATA_DIR: this.#folder };
    const environment = { ...process.env, ...settings };
    delete environment.KAFKA_BROKERS;
    if (brokers) environment.KAFKA_BROKERS = brokers;
    this.#process = spawn(program, { env: environment, stdio: ["pipe", "pipe", "inherit"] });
    const lines = createInterface({ input: this.#process.stdout });
    const ended = once(this.#process, "exit").then(([code]) => { throw new Error(`it exited with ${code}`); });
    const [url] = await Promise.race([once(lines, "line"), ended]);
    ended.catch(() => {});
    this.url = url;
    lines.on("line", (line) => this.handled.push(JSON.parse(line)));
  }

  append(topic, key, value) {
    const content = typeof value === "string" ? { value } : { bytes: [...value] };
    this.#tell({ topic, key, ...content });
  }

  /** From now on nothing fails. */
  heal() {
    this.#tell({ heal: true });
  }

  #tell(what) {
    this.#process.stdin.write(`${JSON.stringify(what)}\n`);
  }

  async stop() {
    const ended = once(this.#process, "exit");
    this.#process.kill("SIGKILL");
    await ended;
    await rm(this.#folder, { recursive: true });
  }
}
