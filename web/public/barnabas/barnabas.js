// The Barnabas client: follow channels of a gateway, submit jobs. No dependencies, no build step.
//
//   const barnabas = connect({ url: location.origin });
//   const subscription = barnabas.subscribe("my-channel", {}, (event) => console.log(event.type, event.data));
//
// Types stand in barnabas.d.ts.

export { Connection } from "./connection.js";
export { Problem, jobState, submitJob } from "./jobs.js";

import { Connection } from "./connection.js";

/**
 * Connects to a gateway and stays connected: with WebSocket, else SSE, else long-poll, whichever gets through.
 * @param {import("./barnabas.d.ts").ConnectOptions} [options]
 * @returns {Connection}
 */
export function connect(options = {}) {
  return new Connection(options);
}
