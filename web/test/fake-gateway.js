// A gateway in a hundred lines that keeps events in memory and misbehaves on demand.
import { createServer } from "node:http";
import { WebSocketServer } from "ws";

export class FakeGateway {
  /** @type {Map<string, { from: number, events: { offset: number, data: unknown }[] }>} */ #channels = new Map();
  #listeners = new Set();
  #sockets = new Set();
  #server;
  #webSockets = new WebSocketServer({ noServer: true, handleProtocols: () => "barnabas.v1.json" });
  url = "";

  static async start() {
    const gateway = new FakeGateway();
    await new Promise((resolve) => gateway.#server.listen(0, "127.0.0.1", resolve));
    gateway.url = `http://127.0.0.1:${gateway.#server.address().port}`;
    return gateway;
  }

  constructor() {
    this.#server = createServer((request, response) => this.#answer(request, response));
    this.#server.on("connection", (socket) => {
      this.#sockets.add(socket);
      socket.on("close", () => this.#sockets.delete(socket));
    });
    this.#server.on("upgrade", (request, socket, head) => {
      if (this.webSocket === "hang") return;
      if (this.webSocket === "refuse") return socket.destroy();
      this.#webSockets.handleUpgrade(request, socket, head, (webSocket) => this.#talk(webSocket));
    });
    this.reset();
  }

  reset() {
    this.cutAll();
    this.#channels.clear();
    this.webSocket = "serve";
    this.sse = "serve";
    this.refusal = null;
    /** Answers to `connect` that are held back, when there is a list for them. */
    this.held = null;
    this.pongs = 0;
  }

  async stop() {
    this.cutAll();
    await new Promise((resolve) => this.#server.close(resolve));
  }

  publish(channel, data) {
    const { events, from } = this.#channel(channel);
    const offset = events.length ? events[events.length - 1].offset + 1 : from;
    events.push({ offset, data });
    for (const listener of [...this.#listeners]) listener();
  }

  /** Retention takes everything before an offset. */
  forget(name, before) {
    const channel = this.#channel(name);
    channel.events = channel.events.filter(({ offset }) => offset >= before);
    channel.from = before;
  }

  /** The log loses its end: everything from an offset on. */
  lose(name, from) {
    const channel = this.#channel(name);
    channel.events = channel.events.filter(({ offset }) => offset < from);
  }

  cutAll() {
    for (const socket of this.#sockets) socket.destroy();
  }

  closeAll(code, reason) {
    for (const client of this.#webSockets.clients) client.close(code, reason);
  }

  bye(retryMs) {
    for (const client of this.#webSockets.clients) client.send(JSON.stringify({ bye: { code: "shutdown", retry_ms: retryMs } }));
  }

  ping() {
    for (const client of this.#webSockets.clients) client.send("{}");
  }

  #channel(name) {
    if (!this.#channels.has(name)) this.#channels.set(name, { from: 0, events: [] });
    return this.#channels.get(name);
  }

  #end(name) {
    const { events, from } = this.#channel(name);
    return events.length ? events[events.length - 1].offset + 1 : from;
  }

  /** What a cursor has not seen, as frames; moves it. */
  #take(cursor) {
    const { events, from } = this.#channel(cursor.channel);
    const frames = [];
    if (cursor.next < from) {
      const { channel } = cursor;
      frames.push({ gap: { channel, from: `${channel}-${cursor.next}`, to: `${channel}-${from}`, reason: "retention" } });
      cursor.next = from;
    }
    const end = this.#end(cursor.channel);
    if (cursor.next > end) {
      const { channel } = cursor;
      frames.push({ gap: { channel, from: `${channel}-${cursor.next}`, to: `${channel}-${end}`, reason: "ahead-of-log" } });
      cursor.next = end;
    }
    for (const { offset, data } of events) {
      if (offset < cursor.next) continue;
      cursor.next = offset + 1;
      frames.push({ event: { channel: cursor.channel, token: `${cursor.channel}-${offset + 1}`, type: "n", data } });
    }
    return frames;
  }

  #cursor(channel, { after, since }) {
    const next = after ? Number(after.split("~").find((token) => token.startsWith(`${channel}-`)).slice(channel.length + 1)) : undefined;
    return { channel, next: next ?? (since === "earliest" ? 0 : this.#end(channel)) };
  }

  #talk(socket) {
    const cursors = new Map();
    const push = () => {
      const frames = [...cursors.values()].flatMap((cursor) => this.#take(cursor));
      if (frames.length) socket.send(frames.map((frame) => JSON.stringify(frame)).join("\n"));
    };
    this.#listeners.add(push);
    socket.on("close", () => this.#listeners.delete(push));
    socket.on("message", (message) => {
      for (const line of String(message).split("\n")) {
        const { id, connect, subscribe, unsubscribe } = JSON.parse(line);
        if (connect) {
          const answer = () => socket.send(JSON.stringify({ id, connected: { session: "s", ping_s: 25 } }));
          if (this.held) this.held.push(answer);
          else answer();
        } else if (subscribe?.channel === "forbidden") {
          socket.send(JSON.stringify({ id, error: { code: "forbidden", message: "no", retry: false } }));
        } else if (subscribe) {
          const cursor = this.#cursor(subscribe.channel, subscribe);
          cursors.set(subscribe.channel, cursor);
          socket.send(JSON.stringify({ id, subscribed: { channel: subscribe.channel, token: `${subscribe.channel}-${cursor.next}` } }));
          push();
        } else if (unsubscribe) {
          cursors.delete(unsubscribe.channel);
        } else {
          this.pongs += 1;
        }
      }
    });
  }

  #answer(request, response) {
    const url = new URL(request.url, this.url);
    // A kept connection could be cut between two tests, under the second one's first request.
    response.setHeader("connection", "close");
    if (url.pathname.startsWith("/v1/jobs/")) return this.#job(request, response, url);
    const one = url.pathname.match(/^\/v1\/channels\/(.+)\/events$/)?.[1];
    const channels = one ? [one] : url.searchParams.getAll("channel");
    const tokens = url.searchParams.getAll("after");
    const cursors = channels.map((channel, i) =>
      this.#cursor(channel, { after: tokens[tokens.length > 1 ? i : 0], since: url.searchParams.get("since") }));
    if (request.headers.accept === "text/event-stream") return this.#stream(request, response, cursors);
    const send = () => {
      const frames = cursors.flatMap((cursor) => this.#take(cursor));
      if (!frames.length && url.searchParams.get("wait") !== "0") return false;
      const events = frames.map((frame) => frame.event ?? frame);
      const token = cursors.map(({ channel, next }) => `${channel}-${next}`).join("~");
      response.setHeader("content-type", "application/json").end(JSON.stringify({ events, token }));
      return true;
    };
    if (send()) return;
    const listener = () => send() && this.#listeners.delete(listener);
    this.#listeners.add(listener);
    request.on("close", () => this.#listeners.delete(listener));
  }

  #stream(request, response, cursors) {
    if (this.sse === "refuse") return response.destroy();
    response.setHeader("content-type", "text/event-stream");
    const write = (name, data) => response.write(`event: ${name}\ndata: ${JSON.stringify(data)}\n\n`);
    for (const { channel, next } of cursors) write("hello", { channel, token: `${channel}-${next}` });
    const push = () => {
      for (const { event, gap } of cursors.flatMap((cursor) => this.#take(cursor))) write(event ? "event" : "gap", event ?? gap);
    };
    this.#listeners.add(push);
    request.on("close", () => this.#listeners.delete(push));
    push();
  }

  #job(request, response, url) {
    request.resume();
    response.setHeader("content-type", "application/json");
    if (this.refusal) {
      response.writeHead(this.refusal.status).end(JSON.stringify(this.refusal.problem));
    } else if (request.method === "POST") {
      response.writeHead(202).end(JSON.stringify({ id: "job-1", channel: url.searchParams.get("channel"), token: "c-0" }));
    } else {
      response.end(JSON.stringify({ id: "job-1", state: "accepted" }));
    }
  }
}
