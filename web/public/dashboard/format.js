// Numbers, times and keys as people read them.

const whole = new Intl.NumberFormat("en");
const tenths = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

const SECOND = 1000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;

/** @param {number} value */
export function number(value) {
  return whole.format(value);
}

/**
 * @param {number} value
 * @param {string} one the word for one; many have an s more
 */
export function counted(value, one) {
  return `${whole.format(value)} ${one}${value === 1 ? "" : "s"}`;
}

/**
 * Per second; undefined: not known yet.
 * @param {number | undefined} value
 */
export function rate(value) {
  if (value === undefined) return "–";
  return value < 10 ? tenths.format(value) : whole.format(Math.round(value));
}

/** @param {number} ms */
export function duration(ms) {
  if (ms < SECOND) return `${Math.max(0, Math.round(ms))} ms`;
  if (ms < MINUTE) return `${tenths.format(Math.floor(ms / 100) / 10)} s`;
  const [large, small, names] = ms < HOUR ? [MINUTE, SECOND, ["min", "s"]] : ms < DAY ? [HOUR, MINUTE, ["h", "min"]] : [DAY, HOUR, ["d", "h"]];
  const rest = Math.floor((ms % large) / small);
  return `${Math.floor(ms / large)} ${names[0]}${rest > 0 ? ` ${rest} ${names[1]}` : ""}`;
}

/**
 * How long until a time, in tenths of seconds when it is near.
 * @param {number} dueMs
 * @param {number} nowMs
 */
export function countdown(dueMs, nowMs) {
  const left = dueMs - nowMs;
  if (left <= 0) return "now";
  if (left < 10 * SECOND) return `in ${(left / SECOND).toFixed(1)} s`;
  return `in ${duration(Math.ceil(left / SECOND) * SECOND)}`;
}

/** @param {number} ms */
export function time(ms) {
  const at = new Date(ms);
  const isToday = at.toDateString() === new Date().toDateString();
  return isToday ? at.toLocaleTimeString("en-GB") : at.toLocaleString("en-GB");
}

/**
 * @param {import("./types.d.ts").Keyed} keyed
 * @returns {string | undefined} undefined: there is no key
 */
export function keyText({ key, key_base64 }) {
  if (key_base64 !== undefined) return `base64:${key_base64}`;
  return key === "" ? "(empty key)" : key;
}
