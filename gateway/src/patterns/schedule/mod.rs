//! Schedules: an event is produced at a time, after a delay, or again and again as a cron expression says.
//!
//! ```text
//! submit, cancel ══ {name}.commands ══▶ the partition's owner: keeps the nearest in memory, waits
//!                                          │ one transaction: events + next times (or tombstones) + consumed offset
//!                                          ├══ {name} (compacted; the same partition) ══▶ the next owner, lists
//!                                          └══ the topics of the events
//! ```
//!
//! Invariant: only the owner of a partition writes schedules, and what it writes stands in one transaction with the event, so each due
//! time is one event on the committed log, whoever dies. A command is applied before whatever is due when it comes; a cancelled
//! schedule fires no more once its cancelling is applied.
//!
//! Nothing fires early by the clock of the machine that owns it. What is late fires as soon as there is an owner, in the order of due
//! times in each partition; of a cron schedule's missed times the last, once. Every event says when it was due ([`DUE_MS`]).
//!
//! Memory of an owner is bounded: the nearest schedules of each partition are in memory, up to
//! [`SchedulerSettings::max_pending`] and [`SchedulerSettings::max_pending_bytes`], and when they have fired the next are read from the
//! log in one pass over the partition.

mod cron;
mod firing;
mod nearest;
mod pending;
mod scheduler;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_util::sync::CancellationToken;

pub use self::cron::Cron;
use self::firing::{Firing, floor};
use self::nearest::{Bounds, Nearest};
pub use self::pending::{NEVER_MS, Pending};
pub use self::scheduler::{Page, Scheduler};
use super::owner::{self, OwnerSettings};
use super::{Error, millis};
use crate::log::{CleanupPolicy, Log, ProducerRecord, TopicSpec};

/// The header of a fired event with the time at which it was due, in milliseconds since the Unix epoch.
pub const DUE_MS: &str = "bn-due-ms";

/// The header of a fired event with the id of its schedule.
pub const SCHEDULE_ID: &str = "bn-schedule-id";

/// Bytes of a schedule's id at most.
pub const MAX_ID_BYTES: usize = 255;

/// An event that is to be produced, and when.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Names it: submitting another with the same id replaces it. 1 to [`MAX_ID_BYTES`] bytes.
    pub id: String,
    /// When it fires.
    pub when: When,
    /// The event. Its timestamp is not kept: it is that of its append.
    pub event: ProducerRecord,
}

/// When a schedule fires.
#[derive(Clone, Debug)]
pub enum When {
    /// At a time; at once if it has passed.
    At(SystemTime),
    /// So long after it was submitted, by the clock of the submitter.
    After(Duration),
    /// At each time of a cron expression from now on.
    Cron(Cron),
}

impl When {
    /// The first due time, in milliseconds since the Unix epoch.
    fn due_ms(&self, now_ms: i64) -> Result<i64, Error> {
        Ok(match self {
            Self::At(time) => time.duration_since(UNIX_EPOCH).map_or(0, millis).min(NEVER_MS - 1),
            Self::After(delay) => now_ms.saturating_add(millis(*delay)).min(NEVER_MS - 1),
            Self::Cron(cron) => cron.next_ms(now_ms)?,
        })
    }
}

/// How schedules are owned.
#[derive(Clone, Debug)]
pub struct SchedulerSettings {
    /// Their name: their topic, the consumer group of their owners, and the stem of their transactional ids.
    pub name: String,
    /// Most commands, and most events, of one transaction. Default 500.
    pub window: usize,
    /// Schedules in memory at most, for each partition that is owned. Default 20 000.
    pub max_pending: usize,
    /// Bytes of schedules in memory at most, for each partition that is owned. Default 16 MiB.
    pub max_pending_bytes: usize,
    /// After it the partitions of an owner that cannot be heard go to another. Default 10 s.
    pub session_timeout: Duration,
}

impl SchedulerSettings {
    /// The schedules `name`, everything else at its default.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            window: 500,
            max_pending: 20_000,
            max_pending_bytes: 16 * 1024 * 1024,
            session_timeout: Duration::from_secs(10),
        }
    }
}

/// The topics of schedules: commands, kept for `retention`, and schedules, the last state of each kept for ever. The partition count is
/// fixed: another one would part commands from schedules.
pub fn topics(name: &str, partitions: i32, retention: Duration) -> [TopicSpec; 2] {
    let topic = |name, cleanup, retention| TopicSpec {
        fixed_partitions: true,
        cleanup,
        retention,
        ..TopicSpec::new(name, partitions)
    };
    [
        topic(commands_topic(name), CleanupPolicy::Delete, Some(retention)),
        topic(name.to_owned(), CleanupPolicy::Compact, None),
    ]
}

/// The topic on which schedules are submitted and cancelled.
pub fn commands_topic(name: &str) -> String {
    format!("{name}.commands")
}

/// Owns partitions of the schedules until `stopping`, and fires what is due in them. Dropped before that, it stops as a killed
/// process does: what is open is undone by the next owner.
///
/// # Errors
/// [`Error::PartitionCounts`] when the two topics differ; [`Error::Log`] when they do not exist, when the group cannot be joined, or
/// when the log has ended. Troubles of a transaction are not errors: they are undone and tried again.
pub async fn run(log: Log, settings: SchedulerSettings, stopping: CancellationToken) -> Result<(), Error> {
    let commands = commands_topic(&settings.name);
    owner::topic_beside(&log, &commands, &settings.name).await?;
    let owners = OwnerSettings {
        name: settings.name.clone(),
        commands,
        window_commands: settings.window.max(1),
        session_timeout: settings.session_timeout,
    };
    let schedules = Schedules {
        log: log.clone(),
        topic: settings.name.into(),
        window: settings.window.max(1),
        bounds: Bounds {
            schedules: settings.max_pending,
            bytes: settings.max_pending_bytes,
        },
    };
    owner::run(log, owners, schedules, stopping).await
}

/// What owners keep.
struct Schedules {
    log: Log,
    topic: Arc<str>,
    window: usize,
    bounds: Bounds,
}

impl owner::Store for Schedules {
    type State = Firing;

    async fn restore(&self, partition: i32, noted: &str) -> Result<Firing, Error> {
        let mut from = floor(noted);
        loop {
            let mut nearest = Nearest::new(self.bounds, from);
            let take = |record: &_| match Pending::from_record(record) {
                Ok((_, Some(pending))) => nearest.put(pending),
                Ok((id, None)) => nearest.remove(id),
                Err(reason) => tracing::error!(
                    topic = %self.topic, partition, offset = record.offset, reason, "passing over a schedule that cannot be read"
                ),
            };
            owner::read_partition(&self.log, &self.topic, partition, take).await?;
            // The nearest that stood there first may all be over, and the next behind what memory took.
            if nearest.len() == 0 && nearest.horizon().is_some() {
                from = nearest.horizon().cloned();
                continue;
            }
            nearest.lift_floor();
            return Ok(Firing::new(self.topic.clone(), partition, self.window, nearest));
        }
    }
}
