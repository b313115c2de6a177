// Long-poll: a request at a time, answered when there is something. It gets through everything that lets plain requests through.

import { HttpTransport } from "./http-transport.js";

export class LongPollTransport extends HttpTransport {
  static label = "long-poll";

  /** @param {AbortSignal} signal */
  async receive(signal) {
    // The first does not wait: it is to show that requests get through.
    let wait = "&wait=0";
    while (!signal.aborted) {
      const answer = await this.request(`/v1/events?${this.query()}${wait}`, "application/json", signal);
      const { events, token } = await answer.json();
      if (signal.aborted) return;
      wait = "";
      this.through();
      for (const event of events) this.say("gap" in event ? event : { event });
      // The answer's token covers all channels.
      for (const place of this.channels.values()) place.token = token;
      this.say({});
    }
  }
}
