// What survives a reload of this tab: its channel, how far it has read, and its imports.

const KEY = "barnabas.imports";
/** Imports that are remembered; older ones are dropped. */
const MOST_JOBS = 50;

export class Store {
  /** @type {{ channel: string, token?: string, transport: string, jobs: { id: string, name: string }[] }} */ #kept;

  constructor() {
    this.#kept = { channel: `imports-${randomName()}`, transport: "", jobs: [], ...load() };
    this.#save();
  }

  get channel() {
    return this.#kept.channel;
  }

  get jobs() {
    return this.#kept.jobs;
  }

  get token() {
    return this.#kept.token;
  }

  set token(token) {
    this.#kept.token = token;
    this.#save();
  }

  get transport() {
    return this.#kept.transport;
  }

  set transport(transport) {
    this.#kept.transport = transport;
    this.#save();
  }

  /**
   * @param {string} id
   * @param {string} name
   */
  remember(id, name) {
    this.#kept.jobs = [...this.#kept.jobs, { id, name }].slice(-MOST_JOBS);
    this.#save();
  }

  /** @param {string} id */
  forget(id) {
    this.#kept.jobs = this.#kept.jobs.filter((job) => job.id !== id);
    this.#save();
  }

  #save() {
    try {
      sessionStorage.setItem(KEY, JSON.stringify(this.#kept));
    } catch {
      // Storage is forbidden: a reload begins anew.
    }
  }
}

function load() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY) ?? "{}");
  } catch {
    return {};
  }
}

/** Enough that nobody guesses another's channel. */
function randomName() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
