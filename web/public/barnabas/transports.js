// The three ways to a gateway. Each has WebSocket's five members (send, close, onopen, onmessage, onclose) and speaks the frames of
// `barnabas.v1.json`, so that the connection above has no branches: SSE and long-poll answer its commands themselves.

export { WebSocketTransport } from "./websocket.js";
export { SseTransport } from "./sse.js";
export { LongPollTransport } from "./long-poll.js";

/**
 * @typedef {object} Closed
 * @property {number} code a WebSocket close code
 * @property {string} reason JSON as the gateway gives it, or words
 */

/**
 * @typedef {object} Transport
 * @property {(text: string) => void} send one or more frames, one a line
 * @property {() => void} close
 * @property {(() => void) | null} onopen
 * @property {((text: string) => void) | null} onmessage one or more frames, one a line
 * @property {((closed: Closed) => void) | null} onclose once, whatever the reason
 */
