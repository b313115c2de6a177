// WebSocket: the transport of choice.

export class WebSocketTransport {
  static label = "websocket";
  /** @type {(() => void) | null} */ onopen = null;
  /** @type {((text: string) => void) | null} */ onmessage = null;
  /** @type {((closed: import("./transports.js").Closed) => void) | null} */ onclose = null;
  #socket;

  /** @param {string} url the gateway's origin */
  constructor(url) {
    const at = new URL("/v1/ws", url);
    at.protocol = at.protocol === "https:" ? "wss:" : "ws:";
    this.#socket = new WebSocket(at, "barnabas.v1.json");
    this.#socket.onopen = () => this.onopen?.();
    this.#socket.onmessage = (message) => this.onmessage?.(message.data);
    // It says nothing of why; the close event that follows is what counts.
    this.#socket.onerror = () => {};
    this.#socket.onclose = ({ code, reason }) => this.onclose?.({ code, reason });
  }

  /** @param {string} text */
  send(text) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(text);
  }

  close() {
    this.#socket.close(1000);
  }
}
