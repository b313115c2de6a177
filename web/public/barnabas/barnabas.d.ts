/** How events come. */
export type TransportName = "websocket" | "sse" | "long-poll";

export interface ConnectOptions {
  /** The gateway's origin. Default: the page's own. */
  url?: string;
  /** A JWT, where the gateway wants one. */
  token?: string;
  /** The transports that may be used, best first whatever the order here. Default: all. */
  transports?: TransportName[];
}

/** Where a connection is. */
export type State =
  | { name: "connecting"; transport?: TransportName | string }
  | { name: "open"; transport: TransportName | string }
  /** It tries again after `retryMs`. */
  | { name: "waiting"; retryMs: number }
  /** It does not try again. */
  | { name: "closed"; reason: string };

export interface SubscribeOptions {
  /** Go on behind this token. */
  after?: string;
  /** Start in the past: a time, a time ago such as "-15m", or "earliest". */
  since?: string | Date;
  /** Start with the latest event. */
  last?: 1;
}

/** An event, with CloudEvents' names. */
export interface BarnabasEvent<Data = any> {
  channel: string;
  /** Where to go on after it. */
  token: string;
  id: string;
  type: string;
  /** RFC 3339. */
  time: string;
  /** The job's id, for job events. */
  subject?: string;
  data?: Data;
}

/** Events between two tokens were missed, or may have been. */
export interface Gap {
  channel: string;
  from: string;
  to: string;
  reason: "retention" | "topic-recreated" | "foreign-token" | "ahead-of-log" | "bad-token" | string;
}

export interface Subscription {
  readonly channel: string;
  /** Where to go on; undefined until the gateway has said it. */
  readonly token: string | undefined;
  unsubscribe(): void;
}

/** Dispatches `state` (detail: State) and `error` (detail: `{channel, code, message}`, a subscription that was refused). */
export declare class Connection extends EventTarget {
  constructor(options?: ConnectOptions);
  readonly state: State;
  subscribe(
    channel: string,
    options: SubscribeOptions,
    onEvent: (event: BarnabasEvent) => void,
    onGap?: (gap: Gap) => void,
  ): Subscription;
  /** Uses these transports only, from now on; without: all. Nothing is lost or repeated by the change. */
  use(names?: TransportName[]): void;
  close(): void;
}

export declare function connect(options?: ConnectOptions): Connection;

export interface SubmitOptions {
  /** The channel that is told how the job goes. Subscribe it first, or after the answer's token. */
  channel: string;
  url?: string;
  /** Default "text/csv". */
  contentType?: string;
  onProgress?: (sentBytes: number, totalBytes: number) => void;
  signal?: AbortSignal;
}

export interface SubmittedJob {
  id: string;
  channel: string;
  /** A place before the job's first event. */
  token: string;
}

export interface JobProgress {
  chunks: { done: number; total: number };
  rows: { ok: number; rejected: number; total: number };
  /** The first 100. */
  rejects: { line: number; reason: string }[];
  error?: { code: string; message: string };
}

export interface JobState extends JobProgress {
  id: string;
  type: string;
  channel: string;
  state: "accepted" | "running" | "completed" | "failed";
}

export declare function submitJob(jobType: string, body: Blob | string, options: SubmitOptions): Promise<SubmittedJob>;
export declare function jobState(
  id: string,
  options?: { url?: string; waitS?: number; signal?: AbortSignal },
): Promise<JobState>;

/** What the gateway says is wrong with a request (RFC 9457). */
export declare class Problem extends Error {
  constructor(status: number, problem: { code?: string; detail?: string; title?: string; line?: number });
  /** HTTP's; 0 when there was no answer. */
  readonly status: number;
  readonly code: string;
  /** The line of the uploaded file. */
  readonly line: number | undefined;
}
