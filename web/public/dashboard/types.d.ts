// What `/v1/admin` answers, and `/v1/schedules`.

export interface PartitionLag {
  topic: string;
  partition: number;
  /** The next offset that the group will handle; null: it has committed nothing yet, so its lag is not known. */
  committed: number | null;
  end: number;
  lag: number | null;
  /** Which member has it; null: none is seen to. */
  member: string | null;
}

export interface Group {
  group: string;
  /** The projection of which it is a generation. */
  projection?: string;
  members: { member: string; client: string; host: string }[];
  /** Whether commands can be given to it. */
  operated: boolean;
  /** Of the partitions of which it is known. */
  lag: number;
  /** Of how many partitions it is not known. */
  lag_unknown: number;
  partitions: PartitionLag[];
}

/** A key as JSON has it: text, or base64 of what is none. */
export interface Keyed {
  key?: string;
  key_base64?: string;
}

/** What stands still, or is told not to. */
export interface Blocked extends Keyed {
  group: string;
  /** What tells places of a group apart. */
  place: string;
  topic: string;
  partition: number;
  state: "blocked" | "ignoring";
  offset: number;
  attempts: number;
  kind: string;
  message: string;
  since_ms: number;
  /** 0: only an operator helps. */
  due_ms: number;
  /** Records that wait behind it. */
  waiting: number;
  owner: string;
}

export type Command = "retry" | "skip" | "dead-letter" | "ignore" | "block";

export interface Action extends Keyed {
  id: string;
  group: string;
  at_ms: number;
  by: string;
  action: Command | "redrive" | "discard";
  topic: string;
  partition?: number;
  offset?: number;
  /** Of a redrive or discard: how many. */
  records?: number;
  /** null: there is no answer yet. */
  done: boolean | null;
  reason: string;
}

export interface RetryTopic {
  topic: string;
  group: string;
  source: string;
  delay_ms: number;
  waiting: number;
  next_due_ms: number | null;
}

export interface LetterTopic {
  topic: string;
  group: string;
  source: string;
  records: number;
  waiting: number;
  /** Whether the group takes them back. */
  redrives: boolean;
  /** The numbers are upper bounds. */
  estimated?: boolean;
}

export interface Header {
  name: string;
  value?: string;
  value_base64?: string;
}

/** A record with where it stands. */
export interface StoredRecord extends Keyed {
  partition: number;
  offset: number;
  timestamp_ms: number;
  value?: string;
  value_base64?: string;
  headers: Header[];
}

export interface Letter extends StoredRecord {
  state: "waiting" | "redriven" | "discarded";
  by?: string;
  at_ms?: number;
}

export interface LetterPage {
  records: Letter[];
  /** How many there are from this page on. */
  matching: number;
  /** Where the next page begins; null: this is the last. */
  next: string | null;
}

/** A compacted topic. */
export interface Table {
  topic: string;
  kind: "table" | "store" | "schedules" | "blocked" | "dead-letter-marks";
  /** Whether it is Barnabas' own. */
  internal: boolean;
  partitions: number;
  /** At most: those that are replaced and not cleaned away yet count too. */
  records: number;
}

export interface EntryPage {
  records: StoredRecord[];
  /** Where the next page begins; null: this is the last. */
  next: string | null;
  /** The topic was too large to be read to its end. */
  cut: boolean;
}

export interface Schedule {
  id: string;
  /** RFC 3339; null: it was set aside. */
  due: string | null;
  cron?: string;
  time_zone?: string;
  /** Why its event could not be produced. */
  refused?: string;
  event: { topic: string; type?: string; subject?: string; partitionkey?: string; data?: unknown };
}

export interface SchedulePage {
  schedules: Schedule[];
  next: string | null;
}

export type Selection = { records: { partition: number; offset: number }[] } | { filter: string };

/** A row of a list: made once for each item, shown again when the item has changed. */
export interface Row<Item> {
  root: HTMLElement;
  show(item: Item): void;
}
