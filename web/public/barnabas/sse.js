// Server-Sent Events over fetch rather than EventSource: a refusal can be read, headers can be sent, and coming back is left to one
// place, the connection.

import { HttpTransport } from "./http-transport.js";

export class SseTransport extends HttpTransport {
  static label = "sse";

  pingS() {
    return 15;
  }

  /** @param {AbortSignal} signal */
  async receive(signal) {
    const answer = await this.request(`/v1/events?${this.query()}`, "text/event-stream", signal);
    if (signal.aborted) return;
    this.through();
    const reader = /** @type {ReadableStream<Uint8Array>} */ (answer.body).getReader();
    const decoder = new TextDecoder();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += decoder.decode(value, { stream: true });
      const messages = text.split("\n\n");
      text = messages.pop() ?? "";
      for (const message of messages) {
        if (signal.aborted) return;
        this.#hear(message);
      }
    }
  }

  /** @param {string} message */
  #hear(message) {
    let name = "";
    let data = "";
    for (const line of message.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7);
      else if (line.startsWith("data: ")) data += line.slice(6);
    }
    if (name === "event") {
      const event = JSON.parse(data);
      this.saw(event);
      this.say({ event });
    } else if (name === "gap") {
      const gap = JSON.parse(data);
      this.saw({ channel: gap.channel, token: gap.to });
      this.say({ gap });
    } else if (name === "bye") {
      const bye = JSON.parse(data);
      this.end({ code: 1012, reason: JSON.stringify(bye) });
    } else {
      // The greeting, or a heartbeat: a sign of life.
      this.say({});
    }
  }
}
