// The real program with a data folder of its own, and a proxy in front of it that can block transports and cut connections.
import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { createServer, connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

export class Gateway {
  #program;
  #folder;
  /** @type {Record<string, string>} variables beside its own */ #settings;
  /** @type {import("node:child_process").ChildProcess | null} */ #process = null;
  #port = 0;

  static async start(settings = {}) {
    const program = process.env.CONTACTS_IMPORT;
    if (!program) throw new Error("CONTACTS_IMPORT must name the program contacts-import");
    const gateway = new Gateway(program, await mkdtemp(join(tmpdir(), "barnabas-page-")), settings);
    await gateway.run();
    return gateway;
  }

  /** Several on the Kafka of KAFKA_BROKERS, with topics of their own and one database. */
  static async startOnKafka(count) {
    const brokers = process.env.KAFKA_BROKERS;
    if (!brokers) throw new Error("KAFKA_BROKERS must name a Kafka");
    const gateways = [];
    const first = await mkdtemp(join(tmpdir(), "barnabas-page-"));
    const prefix = `page${randomBytes(6).toString("hex")}`;
    const config = join(first, "barnabas.toml");
    await writeFile(config, `[topics]\nprefix = "${prefix}"\n\n[job_types.import-contacts]\nformat = "csv"\ntopic = "${prefix}.import-contacts"\n`);
    const settings = { KAFKA_BROKERS: brokers, BARNABAS_CONFIG: config, DATABASE_URL: `sqlite:${join(first, "contacts.sqlite")}` };
    for (let i = 0; i < count; i++) gateways.push(await Gateway.start(settings));
    return { gateways, stop: async () => {
      await Promise.all(gateways.map((gateway) => gateway.stop()));
      await rm(first, { recursive: true });
    } };
  }

  constructor(program, folder, settings) {
    this.#program = program;
    this.#folder = folder;
    this.#settings = settings;
  }

  get port() {
    return this.#port;
  }

  /** Starts it, or starts it again at its port and on its data. */
  async run() {
    const environment = { ...process.env, BARNABAS_LISTEN: `127.0.0.1:${this.#port}`, BARNABAS_DATA_DIR: this.#folder };
    delete environment.KAFKA_BROKERS;
    Object.assign(environment, this.#settings);
    const started = spawn(this.#program, { env: environment, stdio: ["ignore", "pipe", "inherit"] });
    this.#process = started;
    const lines = createInterface({ input: started.stdout });
    const line = await Promise.race([once(lines, "line"), once(started, "exit").then(([code]) => { throw new Error(`it exited with ${code}`); })]);
    this.#port = Number(new URL(line[0]).port);
  }

  /** kill -9. */
  async kill() {
    if (!this.#process) return;
    const ended = once(this.#process, "exit");
    this.#process.kill("SIGKILL");
    await ended;
    this.#process = null;
  }

  async stop() {
    await this.kill();
    await rm(this.#folder, { recursive: true });
  }
}

/** Passes bytes on, to several gateways in turn; a request whose head holds one of `blocked` is never answered. */
export class Proxy {
  #server;
  #sockets = new Set();
  /** @type {string[]} */ blocked = [];

  static async start(...ports) {
    const proxy = new Proxy(ports);
    proxy.#server.listen(0, "127.0.0.1");
    await once(proxy.#server, "listening");
    return proxy;
  }

  constructor(ports) {
    let turn = 0;
    this.#server = createServer((from) => {
      const to = connect(ports[turn++ % ports.length], "127.0.0.1");
      for (const [one, other] of [[from, to], [to, from]]) {
        this.#sockets.add(one);
        one.on("close", () => {
          this.#sockets.delete(one);
          other.destroy();
        });
        one.on("error", () => other.destroy());
      }
      to.on("data", (bytes) => from.write(bytes));
      from.on("data", (bytes) => {
        const head = bytes.toString("latin1").toLowerCase();
        if (!this.blocked.some((words) => head.includes(words))) to.write(bytes);
      });
    });
  }

  get url() {
    return `http://127.0.0.1:${this.#server.address().port}`;
  }

  cutAll() {
    for (const socket of this.#sockets) socket.destroy();
  }

  async stop() {
    this.cutAll();
    this.#server.close();
    await once(this.#server, "close");
  }
}
