//! The handle that submits, cancels and looks up schedules, from any process.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::Mutex;

use super::nearest::{Bounds, Key, Nearest};
use super::pending::{Pending, over};
use super::{Error, MAX_ID_BYTES, Schedule, When, commands_topic};
use crate::log::{self, Log, Producer, partition_for_key};
use crate::patterns::scan::Scan;
use crate::patterns::{now_ms, owner};

/// What a schedule's record has beside its event's at most, with its id: what an event must leave of a topic's largest record.
const ENVELOPE_BYTES: usize = 1024;

/// Bytes of schedules that a page holds at most.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// Submits, cancels and looks up schedules, from any process. Clones share the producer.
#[derive(Clone, Debug)]
pub struct Scheduler {
    log: Log,
    name: Arc<str>,
    producer: Producer,
    /// What each topic takes that was asked for: those of events, which exist and are few. A topic that goes or takes less later is
    /// noticed when its event is due.
    topics: Arc<Mutex<HashMap<Arc<str>, Takes>>>,
}

/// What a topic takes.
#[derive(Clone, Copy, Debug)]
struct Takes {
    /// The largest record.
    max_bytes: usize,
    /// Only records with a key.
    only_keyed: bool,
}

/// Some of the schedules, in the order in which they are due.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The schedules.
    pub schedules: Vec<Pending>,
    /// Where the next page begins: due time and id of its first schedule. `None`: there is none.
    pub next: Option<(i64, Arc<str>)>,
}

impl Scheduler {
    /// A handle to the schedules `name`. Use a producer with all acks: a lost command is a schedule that never fires.
    pub fn new(log: Log, name: &str, producer: Producer) -> Self {
        Self {
            log,
            name: name.into(),
            producer,
            topics: Arc::default(),
        }
    }

    /// Submits a schedule, in the place of one with the same id, and waits until the log has it. Returns what was submitted, with
    /// its first due time. Commands for one id that are submitted one after the other are applied in that order.
    ///
    /// # Errors
    /// [`Error::Setting`] for an id that is empty or too long; [`Error::Cron`], [`Error::TimeZone`];
    /// [`log::Error::UnknownTopic`] when the topic of the event does not exist, [`log::Error::RecordTooLarge`] and
    /// [`log::Error::InvalidTopic`] when it would not take the event: it is too large, or has no key and the topic is compacted. As [`Producer::append`]: after a timeout it may still have been written, and it is harmless to submit it again.
    pub async fn submit(&self, schedule: Schedule) -> Result<Pending, Error> {
        check_id(&schedule.id)?;
        let Takes { max_bytes, only_keyed } = self.takes(&schedule.event.topic).await?;
        if only_keyed && schedule.event.key.is_none() {
            return Err(Error::Log(log::Error::keyless(&schedule.event.topic)));
        }
        let size_bytes = schedule.event.size_bytes() + ENVELOPE_BYTES;
        if size_bytes > max_bytes {
            return Err(Error::Log(log::Error::RecordTooLarge {
                topic: schedule.event.topic.to_string(),
                size_bytes,
                max_bytes,
            }));
        }
        let mut event = schedule.event;
        event.timestamp_ms = None;
        let pending = Pending {
            id: schedule.id.into(),
            due_ms: schedule.when.due_ms(now_ms())?,
            cron: match schedule.when {
                When::Cron(cron) => Some(cron),
                When::At(_) | When::After(_) => None,
            },
            event,
            refused: None,
        };
        self.producer
            .append(pending.to_record(&commands_topic(&self.name))?)
            .await?;
        Ok(pending)
    }

    async fn takes(&self, topic: &Arc<str>) -> Result<Takes, Error> {
        // Held while one asks, so that many who come at once ask once.
        let mut topics = self.topics.lock().await;
        if let Some(takes) = topics.get(topic) {
            return Ok(*takes);
        }
        let found = self.log.describe_topic(topic).await?;
        let takes = Takes {
            max_bytes: found.max_message_bytes,
            only_keyed: found.cleanup.compacts(),
        };
        topics.insert(topic.clone(), takes);
        Ok(takes)
    }

    /// Cancels a schedule, and waits until the log has the command. Until its partition's owner has applied it, the schedule may still
    /// fire. One that does not exist is no error.
    ///
    /// # Errors
    /// As [`Scheduler::submit`].
    pub async fn cancel(&self, id: &str) -> Result<(), Error> {
        check_id(id)?;
        self.producer.append(over(&commands_topic(&self.name), id)).await?;
        Ok(())
    }

    /// A schedule, as its owner has last written it: one that was just submitted may not be there yet. Reads the whole partition.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub async fn get(&self, id: &str) -> Result<Option<Pending>, Error> {
        let partitions = self.log.describe_topic(&self.name).await?.partitions;
        let partition = partition_for_key(id.as_bytes(), partitions);
        let mut found = None;
        let take = |record: &log::Record| {
            if let Ok((of, pending)) = Pending::from_record(record)
                && of == id
            {
                found = pending;
            }
        };
        owner::read_partition(&self.log, &self.name, partition, take).await?;
        Ok(found)
    }

    /// The schedules that are due next, as many as `limit`, from a page's [`Page::next`] on. Those that were refused come last. Reads
    /// the whole topic, and holds no more than a page in memory.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub async fn list(&self, from: Option<Key>, limit: usize) -> Result<Page, Error> {
        let mut page = Page {
            schedules: Vec::new(),
            next: from,
        };
        let mut bytes = 0;
        // What is over by now can have taken the room of what is not.
        while page.schedules.len() < limit && bytes < PAGE_BYTES {
            let bounds = Bounds {
                schedules: limit - page.schedules.len(),
                bytes: PAGE_BYTES - bytes,
            };
            let mut nearest = Nearest::new(bounds, page.next);
            let mut scan = Scan::new(&self.log, &self.name).await?;
            while let Some(batch) = scan.next().await? {
                for record in &batch.records {
                    match Pending::from_record(record) {
                        Ok((_, Some(pending))) => nearest.put(pending),
                        Ok((id, None)) => nearest.remove(id),
                        // Its owner says so.
                        Err(_) => {}
                    }
                }
            }
            page.next = nearest.horizon().cloned();
            for pending in nearest.into_pending() {
                bytes += pending.size_bytes();
                // One is found however large it is, and may be too much for a page that has others.
                if bytes > PAGE_BYTES && !page.schedules.is_empty() {
                    page.next = Some((pending.due_ms, pending.id));
                    return Ok(page);
                }
                page.schedules.push(pending);
            }
            if page.next.is_none() {
                break;
            }
        }
        Ok(page)
    }
}

fn check_id(id: &str) -> Result<(), Error> {
    if id.is_empty() || id.len() > MAX_ID_BYTES || id.contains(char::is_control) {
        return Err(Error::Setting {
            setting: "id",
            reason: format!("a schedule's id has 1 to {MAX_ID_BYTES} bytes and no control characters"),
        });
    }
    Ok(())
}
