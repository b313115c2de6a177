//! The patterns that make event-driven services right, on either engine of [`crate::log`].
//!
//! | pattern | promise | order | cost |
//! | --- | --- | --- | --- |
//! | [`atomic_store`] | each command counts once; state, derived events and consumed offsets are one transaction | per key, that of the commands | the open keys in memory, one transaction per window |
//! | [`consumer`] | each record is handled at most once, at least once, or exactly once from log to log; failures are tried again as a policy says and then kept as dead letters | per partition, per key, or none | records in hand in memory, one commit per interval |
//! | [`processor`] | what a function makes of each record stands on other topics once, with the offset in one transaction | as of its consumer | those of a consumer, one transaction per window |
//! | [`projection`] | rows in a database of the service's own are the fold of the events, whatever is killed; a new version is built beside the live view | per partition | one database transaction per batch; a rebuild reads everything |
//! | [`replay`] | a range of a topic again, all of it or an error; nobody's offsets move | per partition; partitions one after the other or merged by time | reading from the beginning of the range to the end of the topic; up to 5 MiB a partition in memory |
//! | [`schedule`] | each due time is one event on the committed log, never early; late ones fire at once | of due times, per partition of schedules | the nearest schedules in memory, a pass over the partition for the next; one transaction per window |
//! | [`table`] | every instance has all of a compacted topic in memory; reads never wait; a checked write is made only if what it expects still holds | per key, that of the topic | all keys and values in memory, the topic read at each start |
//! | [`window`] | on an atomic store: each command counts once in every window of its time, or is counted as late; a window's result is told once | none needed inside a window | that of the store, with the open windows of each key as its state |

pub mod atomic_store;
pub mod consumer;
pub mod control;
pub mod dead_letter;
mod error;
mod hop;
mod owner;
pub mod processor;
pub mod projection;
pub mod replay;
pub mod retry;
pub(crate) mod scan;
pub mod schedule;
pub mod table;
pub mod window;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use error::Error;

/// After so many looks in a row that did not find a topic there is none: a broker that starts does not know it yet, nor one that was not
/// told yet of what was just created.
const MISSED_LOOKS: u32 = 3;

/// How long after one another these are.
const LOOK_EVERY: Duration = Duration::from_secs(1);

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
}
