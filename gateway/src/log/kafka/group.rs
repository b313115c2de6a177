//! Membership of a group: a thread that owns a consumer, polls it whatever the application does, and moves partitions when the
//! application has let go of them.
//!
//! librdkafka announces a rebalance and waits for `incremental_assign` or `incremental_unassign`, which may come later: so
//! nothing here blocks in a callback. Assigned: committed offsets are looked up, then the application is told, then records
//! flow. Revoked: records stop, the application is told, and the partitions move at its release or after the release timeout.
//!
//! Invariant: while events wait for the application no records are taken from librdkafka, so they are bounded by one round; if
//! that lasts, all partitions are paused and polling goes on for the sake of the group.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::consumer::{CommitMode, Consumer as _, ConsumerGroupMetadata};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::admin_request::read_committed;
use super::batch::PartitionBuffer;
use super::error::Resource;
use super::event::{Consumer, ConsumerError, Event, HeaderNames, IDLE_TICK};
use super::{KafkaLog, Started};
use crate::log::group::{GroupCommand, GroupMetadataEngine, MemberEvent};
use crate::log::{CommittedOffset, Error, GroupMetadata, GroupSettings, NextOffset, Result, StartAt, TopicPartition};

/// Messages taken from librdkafka before events are handed over and commands are looked at.
const ROUND_MESSAGES: usize = 4000;
/// How long events may wait for the application before its partitions are paused.
const PAUSE_AFTER: Duration = Duration::from_millis(500);
/// Before something that failed in passing is tried again.
const RETRY_STEP: Duration = Duration::from_millis(20);
/// How long a commit is tried again while the group is between two generations.
const REBALANCE_PATIENCE: Duration = Duration::from_secs(3);

/// A member in a generation of its group.
#[derive(Clone)]
pub(in crate::log) struct KafkaGroupMetadata {
    pub(super) group: String,
    pub(super) metadata: Arc<ConsumerGroupMetadata>,
}

impl std::fmt::Debug for KafkaGroupMetadata {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KafkaGroupMetadata").field(&self.group).finish()
    }
}

/// Serves a member until its handle is dropped or the log is closed, and then leaves the group.
pub(super) async fn run(
    log: KafkaLog,
    settings: GroupSettings,
    mut commands: mpsc::Receiver<GroupCommand>,
    events: mpsc::Sender<Result<MemberEvent>>,
    started: Started,
) {
    let attempt = log.attempt("join", Resource::Group(&settings.group));
    let topics: Vec<&str> = settings.topics.iter().map(String::as_str).collect();
    let made = Consumer::new(&log.0.settings.group_member(&settings)).and_then(|consumer| match topics.is_empty() {
        true => Ok(consumer),
        false => consumer.client().subscribe(&topics).map(|()| consumer),
    });
    let consumer = match made {
        Ok(consumer) => consumer,
        Err(error) => {
            // A caller who no longer waits needs no answer.
            let _ = started.send(Err(attempt.error(&error)));
            return;
        }
    };
    // As above: the loop then ends at once, its commands being closed.
    let _ = started.send(Ok(()));
    let closing = log.0.closing.clone();
    let mut thread = MemberThread {
        log: log.clone(),
        settings: settings.clone(),
        consumer,
        owned: Vec::new(),
        rebalance: Rebalance::None,
        departures: 0,
        waiting: VecDeque::new(),
        blocked_since: None,
        held: false,
        names: HeaderNames::default(),
    };
    loop {
        thread.rebalance();
        let may_take = thread.waiting.is_empty() || thread.held;
        let idle = !may_take || thread.collect();
        thread.hold_or_let_go();
        let wake_at = thread.wake_at();
        let ready = thread.consumer.ready.clone();
        tokio::select! {
            biased;
            () = closing.cancelled() => break,
            room = events.reserve(), if !thread.waiting.is_empty() => match room {
                Ok(room) => if let Some(event) = thread.waiting.pop_front() {
                    thread.blocked_since = None;
                    room.send(event);
                },
                Err(_) => break,
            },
            command = commands.recv() => match command {
                Some(command) => thread.serve(command),
                None => break,
            },
            () = std::future::ready(()), if !idle => {}
            () = ready.notified(), if may_take => {}
            () = sleep_until(wake_at) => {}
        }
    }
    thread.leave();
}

struct MemberThread {
    log: KafkaLog,
    settings: GroupSettings,
    consumer: Consumer,
    owned: Vec<Owned>,
    rebalance: Rebalance,
    /// How often partitions have gone: released, or lost.
    departures: u64,
    /// Events that wait for room in the handle's queue.
    waiting: VecDeque<Result<MemberEvent>>,
    /// Since when the first of them waits.
    blocked_since: Option<Instant>,
    /// Whether all partitions are paused because the application does not take what waits.
    held: bool,
    names: HeaderNames,
}

/// A partition of this member's.
struct Owned {
    buffer: PartitionBuffer,
    /// The number of its last seek.
    seek: u64,
    /// Paused by the application.
    paused: bool,
    /// Waits for its release: its records are no longer wanted.
    revoked: bool,
}

/// What librdkafka waits for.
enum Rebalance {
    None,
    /// The committed offsets of new partitions are not known yet.
    Assigning {
        partitions: Vec<TopicPartition>,
        told: bool,
        again_at: Instant,
    },
    /// The application has not let go of all of `partitions`; it holds `unreleased` still.
    Releasing {
        partitions: Vec<TopicPartition>,
        unreleased: Vec<TopicPartition>,
        deadline: Instant,
    },
}

impl MemberThread {
    /// Moves what librdkafka has read to `waiting`. Whether nothing is left there.
    fn collect(&mut self) -> bool {
        let mut idle = false;
        // Messages come in runs of one partition.
        let mut hint = 0;
        for _ in 0..ROUND_MESSAGES {
            let Some(event) = self.consumer.poll() else {
                idle = true;
                break;
            };
            match event {
                Event::Message(message) => {
                    let found = self.find(hint, message.topic(), message.partition());
                    let Some(at) = found else {
                        continue;
                    };
                    hint = at;
                    let owned = &mut self.owned[at];
                    if owned.revoked {
                        continue;
                    }
                    if let Some(batch) = owned.buffer.push(&message, &mut self.names) {
                        self.waiting.push_back(Ok(MemberEvent::Records {
                            seek: owned.seek,
                            batch,
                        }));
                    }
                }
                Event::EndOfPartition { partition, offset } => {
                    if let Some(at) = self.find(hint, &partition.topic, partition.partition)
                        && !self.owned[at].revoked
                        && let Some(batch) = self.owned[at].buffer.reach_end(offset)
                    {
                        let seek = self.owned[at].seek;
                        self.waiting.push_back(Ok(MemberEvent::Records { seek, batch }));
                    }
                }
                Event::Assign(partitions) => self.begin_assign(partitions),
                Event::Revoke(partitions) => self.begin_revoke(partitions),
                Event::Error(error) => self.fail(&error),
                Event::Other => {}
            }
        }
        for owned in &mut self.owned {
            if let Some(batch) = owned.buffer.flush()
                && !owned.revoked
            {
                self.waiting.push_back(Ok(MemberEvent::Records {
                    seek: owned.seek,
                    batch,
                }));
            }
        }
        idle
    }

    fn find(&self, hint: usize, topic: &str, partition: i32) -> Option<usize> {
        let is =
            |owned: &Owned| owned.buffer.partition.partition == partition && &*owned.buffer.partition.topic == topic;
        match self.owned.get(hint) {
            Some(owned) if is(owned) => Some(hint),
            _ => self.owned.iter().position(is),
        }
    }

    fn begin_assign(&mut self, partitions: Vec<TopicPartition>) {
        self.rebalance = Rebalance::Assigning {
            partitions,
            told: false,
            again_at: Instant::now(),
        };
        self.rebalance();
    }

    fn begin_revoke(&mut self, partitions: Vec<TopicPartition>) {
        if self.consumer.client().assignment_lost() {
            self.finish_revoke(&partitions, &partitions);
            return;
        }
        for owned in &mut self.owned {
            owned.revoked |= partitions.contains(&owned.buffer.partition);
        }
        self.set_fetching(&partitions, false);
        if !partitions.is_empty() {
            self.waiting.push_back(Ok(MemberEvent::Revoked(partitions.clone())));
        }
        self.rebalance = Rebalance::Releasing {
            unreleased: partitions.clone(),
            partitions,
            deadline: Instant::now() + self.settings.release_timeout,
        };
        self.rebalance();
    }

    /// Takes a running rebalance as far as it goes now.
    fn rebalance(&mut self) {
        match std::mem::replace(&mut self.rebalance, Rebalance::None) {
            Rebalance::None => {}
            Rebalance::Assigning {
                partitions,
                told,
                again_at,
            } => {
                if Instant::now() < again_at {
                    self.rebalance = Rebalance::Assigning {
                        partitions,
                        told,
                        again_at,
                    };
                    return;
                }
                match self.starts(&partitions) {
                    Ok(starts) => self.finish_assign(&partitions, starts),
                    Err(error) => {
                        tracing::warn!(group = %self.settings.group, "committed offsets cannot be read yet: {error}");
                        if !told {
                            self.waiting.push_back(Err(error));
                        }
                        self.rebalance = Rebalance::Assigning {
                            partitions,
                            told: true,
                            again_at: Instant::now() + IDLE_TICK,
                        };
                    }
                }
            }
            Rebalance::Releasing {
                partitions,
                unreleased,
                deadline,
            } => {
                let lost = self.consumer.client().assignment_lost();
                if unreleased.is_empty() || lost || Instant::now() >= deadline {
                    self.finish_revoke(&partitions, &unreleased);
                } else {
                    self.rebalance = Rebalance::Releasing {
                        partitions,
                        unreleased,
                        deadline,
                    };
                }
            }
        }
    }

    /// Where each of these partitions goes on: at what is committed, if that is kept.
    fn starts(&self, partitions: &[TopicPartition]) -> Result<Vec<CommittedOffset>> {
        if partitions.is_empty() {
            return Ok(Vec::new());
        }
        let committed = self.read_committed(partitions)?;
        let first = self.log.read_offsets(partitions, Offset::Beginning)?;
        let end = self.log.read_offsets(partitions, Offset::End)?;
        let starts = committed.into_iter().zip(first.iter().zip(&end)).zip(partitions);
        Ok(starts
            .map(|((committed, (first, end)), partition)| {
                let fresh = match self.settings.start_at {
                    StartAt::End => *end,
                    _ => *first,
                };
                match committed {
                    None => NextOffset(fresh).into(),
                    Some(committed) if (*first..=*end).contains(&committed.next_offset.0) => committed,
                    Some(committed) => {
                        tracing::warn!(
                            group = %self.settings.group, partition = %partition,
                            "the committed offset {} is not kept ({first} to {end} are): going on at {fresh}",
                            committed.next_offset.0
                        );
                        NextOffset(fresh).into()
                    }
                }
            })
            .collect())
    }

    fn finish_assign(&mut self, partitions: &[TopicPartition], starts: Vec<CommittedOffset>) {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for (partition, start) in partitions.iter().zip(&starts) {
            list.add_partition(&partition.topic, partition.partition)
                .set_offset(Offset::Offset(start.next_offset.0))
                // Offsets of a broker are not negative; one that is would be an error of the assignment below.
                .unwrap_or_default();
        }
        // A pause survives unassign and assign in librdkafka: this assignment starts without those of earlier ones.
        self.set_fetching(partitions, !self.held);
        if let Err(error) = self.consumer.client().incremental_assign(&list) {
            tracing::error!(group = %self.settings.group, "partitions cannot be assigned: {error}");
            return;
        }
        for (partition, start) in partitions.iter().zip(&starts) {
            self.owned.push(Owned {
                buffer: PartitionBuffer::new(partition.clone(), start.next_offset.0),
                seek: 0,
                paused: false,
                revoked: false,
            });
        }
        if !partitions.is_empty() {
            let assigned = partitions.iter().cloned().zip(starts).collect();
            self.waiting.push_back(Ok(MemberEvent::Assigned(assigned)));
        }
    }

    /// Gives partitions up; `lost` are those that the application has not released.
    fn finish_revoke(&mut self, partitions: &[TopicPartition], lost: &[TopicPartition]) {
        self.rebalance = Rebalance::None;
        // The application knows nothing of partitions whose assignment was not finished.
        let lost: Vec<_> = self
            .owned
            .iter()
            .map(|owned| owned.buffer.partition.clone())
            .filter(|partition| lost.contains(partition))
            .collect();
        self.owned.retain(|owned| !partitions.contains(&owned.buffer.partition));
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(&partition.topic, partition.partition);
        }
        if let Err(error) = self.consumer.client().incremental_unassign(&list) {
            tracing::error!(group = %self.settings.group, "partitions cannot be given up: {error}");
        }
        if !lost.is_empty() {
            self.departures += 1;
            self.waiting.push_back(Ok(MemberEvent::Lost(lost)));
        }
    }

    /// Pauses all partitions when the application has not taken an event for a while, and resumes them when it has taken all.
    fn hold_or_let_go(&mut self) {
        if self.waiting.is_empty() {
            self.blocked_since = None;
            if self.held {
                self.held = false;
                self.set_fetching(&self.wanted(), true);
            }
            return;
        }
        let since = *self.blocked_since.get_or_insert_with(Instant::now);
        if !self.held && since.elapsed() >= PAUSE_AFTER {
            self.held = true;
            self.set_fetching(&self.wanted(), false);
        }
    }

    /// The partitions whose records the application wants.
    fn wanted(&self) -> Vec<TopicPartition> {
        self.owned
            .iter()
            .filter(|owned| !owned.paused && !owned.revoked)
            .map(|owned| owned.buffer.partition.clone())
            .collect()
    }

    fn set_fetching(&self, partitions: &[TopicPartition], fetching: bool) {
        if partitions.is_empty() {
            return;
        }
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(&partition.topic, partition.partition);
        }
        let client = self.consumer.client();
        let done = if fetching {
            client.resume(&list)
        } else {
            client.pause(&list)
        };
        if let Err(error) = done {
            tracing::debug!(group = %self.settings.group, "pause or resume: {error}");
        }
        if fetching {
            self.fetch_now(partitions);
        }
    }

    /// Lets librdkafka fetch resumed partitions at once. A resume alone does not wake its thread, which may sleep for another
    /// second; a seek does, and to where reading stands it changes nothing. It is not waited for: without it only time is lost.
    fn fetch_now(&self, partitions: &[TopicPartition]) {
        let mut list = TopicPartitionList::new();
        for owned in self
            .owned
            .iter()
            .filter(|owned| partitions.contains(&owned.buffer.partition))
        {
            let TopicPartition { topic, partition } = &owned.buffer.partition;
            let next = Offset::Offset(owned.buffer.next_offset);
            if let Err(error) = list.add_partition_offset(topic, *partition, next) {
                tracing::debug!(group = %self.settings.group, "resume at {next:?}: {error}");
            }
        }
        if list.count() > 0
            && let Err(error) = self.consumer.client().seek_partitions(list, Duration::ZERO)
        {
            tracing::debug!(group = %self.settings.group, "resume: {error}");
        }
    }

    fn wake_at(&self) -> Instant {
        let mut at = Instant::now() + IDLE_TICK;
        match &self.rebalance {
            Rebalance::Assigning { again_at, .. } => at = at.min(*again_at),
            Rebalance::Releasing { deadline, .. } => at = at.min(*deadline),
            Rebalance::None => {}
        }
        if let (Some(since), false) = (self.blocked_since, self.held) {
            at = at.min(since + PAUSE_AFTER);
        }
        at
    }

    fn serve(&mut self, command: GroupCommand) {
        // Who has dropped the answer to a command does not want to know.
        match command {
            GroupCommand::Subscribe { topics, reply } => {
                let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
                let client = self.consumer.client();
                if topics.is_empty() {
                    client.unsubscribe();
                    let _ = reply.send(Ok(()));
                    return;
                }
                let attempt = self.log.attempt("subscribe for", Resource::Group(&self.settings.group));
                let _ = reply.send(client.subscribe(&topics).map_err(|error| attempt.error(&error)));
            }
            GroupCommand::Release { partitions } => {
                self.departures += 1;
                if let Rebalance::Releasing { unreleased, .. } = &mut self.rebalance {
                    unreleased.retain(|partition| !partitions.contains(partition));
                }
            }
            GroupCommand::Commit { offsets, reply } => {
                let _ = reply.send(self.commit(&offsets));
            }
            GroupCommand::Committed { partitions, reply } => {
                let _ = reply.send(self.read_committed(&partitions));
            }
            GroupCommand::Seek {
                partition,
                to,
                seek,
                reply,
            } => {
                let _ = reply.send(self.seek(&partition, to, seek));
            }
            GroupCommand::Pause { partitions, reply } => {
                self.pause(&partitions, true);
                let _ = reply.send(Ok(()));
            }
            GroupCommand::Resume { partitions, reply } => {
                self.pause(&partitions, false);
                let _ = reply.send(Ok(()));
            }
            GroupCommand::Metadata { departures, reply } => {
                if departures != self.departures || self.consumer.client().assignment_lost() {
                    let _ = reply.send(Err(self.unknown_member()));
                    return;
                }
                let metadata = self.consumer.client().group_metadata();
                let _ = reply.send(metadata.map_or_else(
                    || Err(self.unknown_member()),
                    |metadata| {
                        Ok(GroupMetadata {
                            engine: GroupMetadataEngine::Kafka(KafkaGroupMetadata {
                                group: self.settings.group.clone(),
                                metadata: Arc::new(metadata),
                            }),
                        })
                    },
                ));
            }
        }
    }

    fn commit(&self, offsets: &[(TopicPartition, CommittedOffset)]) -> Result<()> {
        if offsets.is_empty() {
            return Ok(());
        }
        let attempt = self.log.attempt("commit for", Resource::Group(&self.settings.group));
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (partition, committed) in offsets {
            if !self.owned.iter().any(|owned| owned.buffer.partition == *partition) {
                return Err(self.unknown_member());
            }
            let mut element = list.add_partition(&partition.topic, partition.partition);
            element
                .set_offset(Offset::Offset(committed.next_offset.0))
                .map_err(|error| attempt.error(&error))?;
            if !committed.metadata.is_empty() {
                element.set_metadata(&committed.metadata);
            }
        }
        let deadline = Instant::now() + REBALANCE_PATIENCE;
        loop {
            if self.consumer.client().assignment_lost() {
                return Err(self.unknown_member());
            }
            let error = match self.consumer.client().commit(&list, CommitMode::Sync) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            // The partitions are this member's; only the group's generation is changing.
            let passing = matches!(
                error.rdkafka_error_code(),
                Some(Code::RebalanceInProgress | Code::IllegalGeneration)
            );
            if !passing || Instant::now() >= deadline {
                return Err(attempt.error(&error));
            }
            std::thread::sleep(RETRY_STEP);
        }
    }

    fn read_committed(&self, partitions: &[TopicPartition]) -> Result<Vec<Option<CommittedOffset>>> {
        let attempt = self
            .log
            .attempt("read committed offsets of", Resource::Group(&self.settings.group));
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(&partition.topic, partition.partition);
        }
        let list = self
            .consumer
            .client()
            .committed_offsets(list, attempt.within)
            .map_err(|error| attempt.error(&error))?;
        for element in list.elements() {
            element.error().map_err(|error| attempt.error(&error))?;
        }
        let found = read_committed(&list);
        Ok(partitions
            .iter()
            .map(|partition| {
                found
                    .iter()
                    .find(|(of, offset, _)| of == partition && *offset >= 0)
                    .map(|(_, offset, metadata)| CommittedOffset {
                        next_offset: NextOffset(*offset),
                        metadata: metadata.clone(),
                    })
            })
            .collect())
    }

    fn seek(&mut self, partition: &TopicPartition, to: NextOffset, seek: u64) -> Result<()> {
        let unknown = self.unknown_member();
        let owned = self
            .owned
            .iter_mut()
            .find(|owned| owned.buffer.partition == *partition && !owned.revoked)
            .ok_or(unknown)?;
        owned.seek = seek;
        owned.buffer.restart(to.0);
        self.seek_consumer(partition, to.0)
    }

    fn seek_consumer(&self, partition: &TopicPartition, to: i64) -> Result<()> {
        let attempt = self.log.attempt("seek in", Resource::Partition(partition));
        let deadline = Instant::now() + attempt.within;
        loop {
            let mut list = TopicPartitionList::with_capacity(1);
            let sought = list
                .add_partition_offset(&partition.topic, partition.partition, Offset::Offset(to))
                .and_then(|()| self.consumer.client().seek_partitions(list, attempt.within))
                .and_then(|list| list.elements().iter().try_for_each(|element| element.error()));
            let error = match sought {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            // Just assigned: librdkafka has not started to fetch it.
            let passing = matches!(error.rdkafka_error_code(), Some(Code::State | Code::PreviousInProgress));
            if !passing || Instant::now() >= deadline {
                return Err(attempt.error(&error));
            }
            std::thread::sleep(RETRY_STEP / 4);
        }
    }

    fn pause(&mut self, partitions: &[TopicPartition], paused: bool) {
        let mut changed = Vec::new();
        for owned in &mut self.owned {
            if !owned.revoked && owned.paused != paused && partitions.contains(&owned.buffer.partition) {
                owned.paused = paused;
                changed.push(owned.buffer.partition.clone());
            }
        }
        if !self.held {
            self.set_fetching(&changed, !paused);
        }
    }

    fn fail(&mut self, error: &ConsumerError) {
        let attempt = self.log.attempt("consume for", Resource::Group(&self.settings.group));
        match (error.code, &error.partition) {
            (Code::UnknownTopic | Code::UnknownTopicOrPartition, Some(partition)) => {
                let topic = partition.topic.to_string();
                self.waiting.push_back(Err(Error::UnknownTopic(topic)));
            }
            // The member can do nothing more: another one has its instance id, or the broker does not know its protocol.
            _ if let Some((code, reason)) = self.consumer.client().client().fatal_error() => {
                tracing::error!(group = %self.settings.group, "{code}: {reason}");
                let mapped = match attempt.code(code) {
                    mapped if mapped.is_retriable() => Error::InvalidSetting {
                        name: "group.protocol".to_owned(),
                        reason,
                    },
                    mapped => mapped,
                };
                self.waiting.push_back(Err(mapped));
            }
            (code, partition) => {
                let resource = partition.as_ref().map_or(attempt.resource, Resource::Partition);
                let mapped = self
                    .log
                    .attempt("consume for", resource)
                    .error(&KafkaError::MessageConsumption(code));
                match mapped {
                    Error::Unauthorized(_) => self.waiting.push_back(Err(mapped)),
                    _ if code == Code::AllBrokersDown && self.waiting.is_empty() => {
                        self.waiting
                            .push_back(Err(Error::Unavailable("no broker can be reached".to_owned())));
                    }
                    _ => tracing::debug!(group = %self.settings.group, "{code}: {}", error.reason),
                }
            }
        }
    }

    /// Answers what librdkafka still waits for: its close would wait for it too.
    fn leave(&mut self) {
        match std::mem::replace(&mut self.rebalance, Rebalance::None) {
            Rebalance::None => {}
            Rebalance::Assigning { .. } => {
                if let Err(error) = self.consumer.client().incremental_assign(&TopicPartitionList::new()) {
                    tracing::debug!(group = %self.settings.group, "leaving in mid-assignment: {error}");
                }
            }
            Rebalance::Releasing { partitions, .. } => self.finish_revoke(&partitions, &[]),
        }
    }

    fn unknown_member(&self) -> Error {
        Error::UnknownMember {
            group: self.settings.group.clone(),
        }
    }
}
