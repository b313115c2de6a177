//! What operators see of a consumer, and what they have it do: the consumer's side of [`crate::patterns::control`].
//!
//! What stands still is written to the group's blocked topic soon after, the latest state of each place; what changes faster is
//! never written. Every consumer of the group reads it too: whoever gets a partition goes on with the attempts and the waiting of
//! the owner before.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::log_clock::{LogClock, due_ms};
use super::partition::{LaneId, Partition};
use super::runner::Operation;
use crate::log::{self, Log, Producer, ProducerRecord, Reader, Record, StartAt, TopicPartition};
use crate::patterns::control::{
    Blocked, BlockedState, Command, ControlRecord, Key, Outcome, Place, blocked_topic, control_topic,
};
use crate::patterns::hop::cut;
use crate::patterns::{Error, millis, now_ms};

/// The least time between two writes of what stands still.
const PUBLISH_EVERY: Duration = Duration::from_millis(50);

/// First and longest wait before what was not written is written again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// The key of a record on the blocked topic that is there for its timestamp alone. No place has such a key.
const CLOCK_KEY: &str = "clock";

/// Places written at a time at most.
const PUBLISH_PLACES: usize = 500;

pub(super) struct Operators {
    group: String,
    /// Which of the group's consumers this is.
    owner: String,
    producer: Producer,
    blocked: Reader,
    /// It has to be read from its start again.
    blocked_is_overtaken: bool,
    control: Reader,
    /// As of the blocked topic.
    control_is_overtaken: bool,
    /// What the blocked topic says of each place, and when that was written by the log's clock; `None`: it is on its way there.
    table: HashMap<String, (Blocked, Option<i64>)>,
    /// That of the blocked topic.
    clock: LogClock,
    /// How far it has been read.
    position: i64,
    /// Places whose state may be another than the topic says.
    changed: BTreeSet<(TopicPartition, LaneId)>,
    publishing: bool,
    publish_at: Instant,
    /// Commands that have come and were not looked at.
    commands: VecDeque<(Uuid, Command)>,
}

/// What an operator, or another consumer of the group, has made known.
pub(super) enum Told {
    /// A command for the owner of its partition.
    Command(Uuid, Command),
    /// The blocked topic has been read further.
    Table,
}

impl Operators {
    pub(super) async fn new(log: &Log, group: &str, producer: Producer) -> Result<Self, Error> {
        let mut blocked = log.reader(&blocked_topic(group)).await?;
        let position = blocked.assign(0, StartAt::Start).await?;
        let mut control = log.reader(&control_topic(group)).await?;
        control.assign(0, StartAt::End).await?;
        // What stood still before this consumer came must neither be early nor wait anew.
        let record = ProducerRecord::to(blocked_topic(group)).partition(0).key(CLOCK_KEY);
        let mut clock = LogClock::default();
        clock.see(producer.append(record).await?.timestamp_ms, Instant::now());
        Ok(Self {
            group: group.to_owned(),
            owner: Uuid::now_v7().to_string(),
            producer,
            blocked,
            blocked_is_overtaken: false,
            control,
            control_is_overtaken: false,
            table: HashMap::new(),
            clock,
            position,
            changed: BTreeSet::new(),
            publishing: false,
            publish_at: Instant::now(),
            commands: VecDeque::new(),
        })
    }

    /// What comes next. Cancel safe.
    pub(super) async fn next(&mut self) -> log::Result<Told> {
        loop {
            if let Some((id, command)) = self.commands.pop_front() {
                return Ok(Told::Command(id, command));
            }
            // Until it has succeeded: nothing comes from a reader that is put nowhere.
            for (reader, is_overtaken) in [
                (&mut self.blocked, &mut self.blocked_is_overtaken),
                (&mut self.control, &mut self.control_is_overtaken),
            ] {
                if *is_overtaken {
                    reader.assign(0, StartAt::Start).await?;
                    *is_overtaken = false;
                }
            }
            tokio::select! {
                batch = self.blocked.next() => match batch {
                    Ok(batch) => {
                        for record in &batch.records {
                            self.note(record);
                        }
                        self.position = batch.next_offset.0;
                        return Ok(Told::Table);
                    }
                    // Compaction has taken what stood there: what is kept is read anew.
                    Err(log::Error::OffsetOutOfRange { .. }) => self.blocked_is_overtaken = true,
                    Err(error) => return Err(error),
                },
                batch = self.control.next() => match batch {
                    Ok(batch) => {
                        let commands = batch.records.iter().filter_map(|record| match ControlRecord::read(record)? {
                            (id, ControlRecord::Command(command)) => Some((id, command)),
                            (_, ControlRecord::Outcome(_) | ControlRecord::Letters { .. }) => None,
                        });
                        self.commands.extend(commands);
                    }
                    Err(log::Error::OffsetOutOfRange { .. }) => self.control_is_overtaken = true,
                    Err(error) => return Err(error),
                },
            }
        }
    }

    fn note(&mut self, record: &Record) {
        self.clock.see(record.timestamp_ms, Instant::now());
        let Some(key) = record.key.as_ref().and_then(|key| std::str::from_utf8(key).ok()) else {
            return;
        };
        let blocked = record
            .value
            .as_ref()
            .and_then(|value| serde_json::from_slice::<Blocked>(value).ok());
        match blocked {
            Some(blocked) => {
                let known = (blocked, Some(record.timestamp_ms));
                self.table.insert(key.to_owned(), known);
            }
            None => drop(self.table.remove(key)),
        }
    }

    /// How far the blocked topic has been read.
    pub(super) fn position(&self) -> i64 {
        self.position
    }

    /// The partition of the blocked topic.
    pub(super) fn blocked_partition(&self) -> TopicPartition {
        self.blocked.topic_partition(0)
    }

    /// What stands on the topic for a partition, and when what waits there is due. What waited for an operator is due at once: its
    /// consumer had made too many dead letters, and this one has made none.
    pub(super) fn of(&self, partition: &TopicPartition) -> Vec<(Blocked, Instant)> {
        let now = Instant::now();
        let of = |(blocked, _): &&(Blocked, Option<i64>)| {
            *blocked.place.topic == *partition.topic && blocked.place.partition == partition.partition
        };
        let due = |(blocked, written_ms): &(Blocked, Option<i64>)| {
            let wait = Duration::from_millis(blocked.wait_ms.try_into().unwrap_or(0));
            let by_log = written_ms.and_then(|written_ms| self.clock.when(due_ms(written_ms, blocked.wait_ms)));
            let due = match blocked.due_ms {
                0 => now,
                _ => by_log.unwrap_or(now + wait),
            };
            (blocked.clone(), due)
        };
        self.table.values().filter(of).map(due).collect()
    }

    /// Takes note that the state of a place has changed.
    pub(super) fn changed(&mut self, partition: &TopicPartition, lanes: impl IntoIterator<Item = LaneId>) {
        self.changed
            .extend(lanes.into_iter().map(|lane| (partition.clone(), lane)));
    }

    /// Takes note of places of a partition of this consumer's about which another one has written since.
    pub(super) fn changed_by_others(&mut self, partition: &Partition) {
        for (blocked, _) in self.of(&partition.name) {
            if blocked.owner != self.owner && !partition.expects(blocked.offset) {
                let lane = partition.lane_of(&blocked.place, blocked.offset);
                self.changed.insert((partition.name.clone(), lane));
            }
        }
    }

    /// Whether everything about the partition has been written.
    pub(super) fn is_settled(&self, partition: &TopicPartition) -> bool {
        !self.publishing && !self.changed.iter().any(|(of, _)| of == partition)
    }

    /// Forgets what was to be written about a partition that is another's now.
    pub(super) fn forget(&mut self, partition: &TopicPartition) {
        self.changed.retain(|(of, _)| of != partition);
    }

    pub(super) fn wake_at(&self) -> Option<Instant> {
        (!self.publishing && !self.changed.is_empty()).then_some(self.publish_at)
    }

    /// Begins to write what has changed, when it is time.
    pub(super) fn publish<'a>(
        &mut self,
        find: impl Fn(&TopicPartition) -> Option<&'a Partition>,
    ) -> Option<BoxFuture<'static, Operation>> {
        let now = Instant::now();
        if self.publishing || self.changed.is_empty() || now < self.publish_at {
            return None;
        }
        let mut records = Vec::new();
        while records.len() < PUBLISH_PLACES
            && let Some((name, lane)) = self.changed.pop_first()
        {
            if let Some(partition) = find(&name) {
                records.extend(self.record(partition, &lane));
            }
        }
        if records.is_empty() {
            return None;
        }
        self.publishing = true;
        let written = write(self.producer.clone(), records);
        Some(written.map(|()| Operation::Published).boxed())
    }

    /// Takes note that a write has ended.
    pub(super) fn published(&mut self) {
        self.publishing = false;
        self.publish_at = Instant::now() + PUBLISH_EVERY;
    }

    /// What is to be written about a place; `None`: what stands there is right.
    fn record(&mut self, partition: &Partition, lane: &LaneId) -> Option<ProducerRecord> {
        let (place, by_itself) = place(&partition.name, lane);
        let key = place.record_key(by_itself);
        // What is left of the wait is rounded up, and less when it is written: the next owner must not be early.
        let blocked = partition.blocked(lane);
        let now_ms = now_ms();
        let state = match blocked {
            Some(blocked) => Some(Blocked {
                place,
                state: BlockedState::Blocked,
                offset: blocked.offset,
                attempts: blocked.attempts,
                kind: blocked.kind.as_str().to_owned(),
                message: cut(&blocked.message).to_owned(),
                since_ms: now_ms - millis(blocked.since),
                due_ms: blocked.due_in.map_or(0, |due_in| now_ms + millis(due_in) + 1),
                wait_ms: blocked.due_in.map_or(0, |due_in| millis(due_in) + 1),
                waiting: blocked.waiting,
                owner: self.owner.clone(),
            }),
            None => partition.ignored_since(lane).map(|offset| Blocked {
                place,
                state: BlockedState::Ignoring,
                offset,
                attempts: 0,
                kind: String::new(),
                message: String::new(),
                since_ms: now_ms,
                due_ms: 0,
                wait_ms: 0,
                waiting: 0,
                owner: self.owner.clone(),
            }),
        };
        let record = ProducerRecord::to(blocked_topic(&self.group))
            .partition(0)
            .key(key.clone());
        match state {
            Some(state) => {
                let value = serde_json::to_vec(&state).ok()?;
                // It is on its way: what is written next is written over it.
                self.table.insert(key, (state, None));
                Some(record.value(value))
            }
            None => self.table.remove(&key).map(|_| record),
        }
    }

    /// Answers a command.
    pub(super) fn answer(&self, id: Uuid, refused: Option<&str>) -> Option<BoxFuture<'static, Operation>> {
        let outcome = Outcome {
            done: refused.is_none(),
            reason: refused.unwrap_or_default().to_owned(),
            owner: self.owner.clone(),
        };
        let record = ControlRecord::Outcome(outcome).into_record(&self.group, id).ok()?;
        let written = write(self.producer.clone(), vec![record]);
        Some(written.map(|()| Operation::Abandoned).boxed())
    }
}

/// Writes records, and tries again until all are written: the order in which states of a place are written is that of their changes.
/// One that is refused for good is given up, so that it does not hold up the others.
async fn write(producer: Producer, mut records: Vec<ProducerRecord>) {
    let mut wait = BACK_OFF.0;
    loop {
        let mut deliveries = Vec::with_capacity(records.len());
        for record in records {
            let delivery = producer.send(record.clone()).await;
            deliveries.push((record, delivery));
        }
        records = Vec::new();
        for (record, delivery) in deliveries {
            let written = match delivery {
                Ok(delivery) => delivery.await.map(drop),
                Err(error) => Err(error),
            };
            match written {
                Ok(()) => {}
                Err(error) if error.is_retriable() => {
                    tracing::warn!(topic = %record.topic, %error, "operators are not told yet; trying on: {error}");
                    records.push(record);
                }
                Err(error) => tracing::error!(topic = %record.topic, %error, "operators are not told: {error}"),
            }
        }
        if records.is_empty() {
            return;
        }
        sleep(wait).await;
        wait = (wait * 2).min(BACK_OFF.1);
    }
}

/// A lane as operators name it, with the offset of a record that has no order.
fn place(partition: &TopicPartition, lane: &LaneId) -> (Place, Option<i64>) {
    let (key, by_itself) = match lane {
        LaneId::Key(key) => (Some(Key::new(key)), None),
        LaneId::Record(offset) => (None, Some(*offset)),
        LaneId::Partition | LaneId::Loose => (None, None),
    };
    let place = Place {
        topic: partition.topic.to_string(),
        partition: partition.partition,
        key,
    };
    (place, by_itself)
}
