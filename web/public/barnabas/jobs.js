// Submitting jobs and asking for their state.

/** What the gateway says is wrong with a request (RFC 9457). */
export class Problem extends Error {
  /**
   * @param {number} status HTTP's, 0 when there was no answer
   * @param {{ code?: string, detail?: string, title?: string, line?: number }} problem
   */
  constructor(status, { code, detail, title, line }) {
    super(detail ?? title ?? "the gateway cannot be reached");
    this.name = "Problem";
    this.status = status;
    this.code = code ?? "unreachable";
    this.line = line;
  }
}

/**
 * Submits a job. Resolves when it is on the log.
 * @param {string} jobType
 * @param {Blob | string} body
 * @param {import("./barnabas.d.ts").SubmitOptions} options
 * @returns {Promise<import("./barnabas.d.ts").SubmittedJob>}
 */
export async function submitJob(jobType, body, { channel, url, contentType = "text/csv", onProgress, signal }) {
  const at = new URL(`/v1/jobs/${encodeURIComponent(jobType)}`, url ?? globalThis.location?.origin);
  at.searchParams.set("channel", channel);
  const headers = { "content-type": contentType, prefer: "return=representation" };
  const post = globalThis.XMLHttpRequest && onProgress ? postWithProgress : postWithFetch;
  const { status, text } = await post(at, body, headers, onProgress, signal);
  /** @type {any} */ let answer = {};
  try {
    answer = JSON.parse(text);
  } catch {
    // Something between here and the gateway has answered.
  }
  if (status !== 202) throw new Problem(status, answer);
  return answer;
}

/**
 * Where a job stands.
 * @param {string} id
 * @param {{ url?: string, waitS?: number, signal?: AbortSignal }} [options] `waitS`: wait so long for its end
 * @returns {Promise<import("./barnabas.d.ts").JobState>}
 */
export async function jobState(id, { url, waitS, signal } = {}) {
  const at = new URL(`/v1/jobs/${encodeURIComponent(id)}`, url ?? globalThis.location?.origin);
  const headers = waitS ? { prefer: `wait=${waitS}` } : undefined;
  const answer = await fetch(at, { headers, signal, cache: "no-store" });
  if (!answer.ok) throw new Problem(answer.status, await answer.json().catch(() => ({})));
  return answer.json();
}

/**
 * fetch cannot say how much of a body was sent.
 * @param {URL} at
 * @param {Blob | string} body
 * @param {Record<string, string>} headers
 * @param {((sent: number, total: number) => void) | undefined} onProgress
 * @param {AbortSignal | undefined} signal
 * @returns {Promise<{ status: number, text: string }>}
 */
function postWithProgress(at, body, headers, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", at);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = ({ loaded, total }) => onProgress?.(loaded, total);
    request.onload = () => resolve({ status: request.status, text: request.responseText });
    request.onerror = () => reject(new Problem(0, {}));
    request.onabort = () => reject(new DOMException("aborted", "AbortError"));
    signal?.addEventListener("abort", () => request.abort());
    request.send(body);
  });
}

/**
 * @param {URL} at
 * @param {Blob | string} body
 * @param {Record<string, string>} headers
 * @param {unknown} _onProgress
 * @param {AbortSignal | undefined} signal
 */
async function postWithFetch(at, body, headers, _onProgress, signal) {
  try {
    const answer = await fetch(at, { method: "POST", headers, body, signal });
    return { status: answer.status, text: await answer.text() };
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem(0, {});
  }
}
