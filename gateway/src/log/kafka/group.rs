//! Membership of a group: a thread that owns two clients and moves partitions when the application has let go of them.
//!
//! One client is the member: it joins, hears of rebalances, commits, and reads nothing. The other reads the member's partitions and is
//! in no group. librdkafka stops reading all partitions of a member from the announcement of a rebalance to its answer, which comes
//! only when the application has finished what it has in hand: so those that stay would stand still for as long as the slowest
//! handler of those that go.
//!
//! A rebalance is answered with `incremental_assign` or `incremental_unassign`, later: nothing here blocks in a callback. Assigned:
//! committed offsets are looked up, then the application is told, then records flow. Revoked: records stop, the application is told,
//! and the partitions move at its release or after the release timeout.
//!
//! Invariant: while events wait for the application no records are taken from librdkafka, so they are bounded by one round. The group
//! is attended to whatever the application does.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerGroupMetadata};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::admin_request::read_committed;
use super::batch::PartitionBuffer;
use super::error::Resource;
use super::event::{Consumer, ConsumerError, Event, IDLE_TICK, LogContext, Read, RecordMemory};
use super::{KafkaLog, Started};
use crate::log::group::{GroupCommand, GroupMetadataEngine, MemberEvent};
use crate::log::{CommittedOffset, Error, GroupMetadata, GroupSettings, NextOffset, Result, StartAt, TopicPartition};

/// Messages taken from librdkafka before events are handed over and commands are looked at.
const ROUND_MESSAGES: usize = 4000;
/// Commits that wait for their turn. With more no commands are taken.
const MAX_COMMITS: usize = 64;
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
    let (membership, fetching) = match start(&log, &settings) {
        Ok(clients) => clients,
        Err(error) => {
            // A caller who no longer waits needs no answer.
            let _ = started.send(Err(attempt.error(&error)));
            return;
        }
    };
    // As above: the loop then ends at once, its commands being closed.
    let _ = started.send(Ok(()));
    let closing = log.0.closing.clone();
    let (attended, readable) = (membership.ready.clone(), fetching.ready.clone());
    let mut thread = MemberThread {
        log: log.clone(),
        settings: settings.clone(),
        membership,
        fetching,
        owned: Vec::new(),
        rebalance: Rebalance::None,
        departures: 0,
        commits: VecDeque::new(),
        committing: None,
        waiting: VecDeque::new(),
        memory: RecordMemory::default(),
    };
    loop {
        thread.commit_next();
        thread.rebalance();
        thread.attend();
        let may_take = thread.waiting.is_empty();
        let idle = !may_take || thread.collect();
        let wake_at = thread.wake_at();
        tokio::select! {
            biased;
            () = closing.cancelled() => break,
            room = events.reserve(), if !thread.waiting.is_empty() => match room {
                Ok(room) => if let Some(event) = thread.waiting.pop_front() {
                    room.send(event);
                },
                Err(_) => break,
            },
            command = commands.recv(), if thread.commits.len() < MAX_COMMITS => match command {
                Some(command) => thread.serve(command),
                None => break,
            },
            () = std::future::ready(()), if !idle => {}
            () = attended.notified() => {}
            () = readable.notified(), if may_take => {}
            () = sleep_until(wake_at) => {}
        }
    }
    thread.leave();
}

/// The client that is the member, and the one that reads.
fn start(log: &KafkaLog, settings: &GroupSettings) -> std::result::Result<(Consumer, Consumer), KafkaError> {
    let topics: Vec<&str> = settings.topics.iter().map(String::as_str).collect();
    let fetching = Consumer::new(&log.0.settings.group_fetcher(settings), log)?;
    let membership = Consumer::new(&log.0.settings.group_member(settings), log)?;
    if !topics.is_empty() {
        membership.client().subscribe(&topics)?;
    }
    Ok((membership, fetching))
}

struct MemberThread {
    log: KafkaLog,
    settings: GroupSettings,
    /// The member. Its partitions are those of `fetching`, and are all paused.
    membership: Consumer,
    /// Reads the member's partitions.
    fetching: Consumer,
    owned: Vec<Owned>,
    rebalance: Rebalance,
    /// How often partitions have gone: released, or lost.
    departures: u64,
    /// Commits that wait for the one under way: side by side an earlier one could come last.
    commits: VecDeque<Commit>,
    /// Ends with the commit that is under way.
    committing: Option<oneshot::Receiver<()>>,
    /// Events that wait for room in the handle's queue.
    waiting: VecDeque<Result<MemberEvent>>,
    memory: RecordMemory,
}

struct Commit {
    offsets: Vec<(TopicPartition, CommittedOffset)>,
    reply: oneshot::Sender<Result<()>>,
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
        /// Where they start, once that has been looked up.
        starts: oneshot::Receiver<Result<Vec<CommittedOffset>>>,
        /// Whether the application knows that this takes long.
        told: bool,
    },
    /// The application has not let go of all of `partitions`; it holds `unreleased` still.
    Releasing {
        partitions: Vec<TopicPartition>,
        unreleased: Vec<TopicPartition>,
        deadline: Instant,
    },
}

impl MemberThread {
    /// Hears what librdkafka says about the group.
    fn attend(&mut self) {
        while let Some(event) = self.membership.poll() {
            match event {
                Event::Assign(partitions) => {
                    let starts = self.look_up_starts(&partitions, Duration::ZERO);
                    self.rebalance = Rebalance::Assigning {
                        partitions,
                        starts,
                        told: false,
                    };
                }
                Event::Revoke(partitions) => self.begin_revoke(partitions),
                Event::Error(error) => self.fail(&error),
                Event::Other => {}
            }
        }
    }

    /// Moves what librdkafka has read to `waiting`. Whether nothing is left there.
    fn collect(&mut self) -> bool {
        let messages = self.fetching.take(ROUND_MESSAGES);
        let idle = messages.len() < ROUND_MESSAGES;
        // Messages come in runs of one partition.
        let mut hint = 0;
        for message in messages {
            match message.read() {
                Read::Record(message) => {
                    let found = self.find(hint, message.topic(), message.partition());
                    let Some(at) = found else {
                        continue;
                    };
                    hint = at;
                    let owned = &mut self.owned[at];
                    if owned.revoked {
                        continue;
                    }
                    if let Some(batch) = owned.buffer.push(&message, &mut self.memory) {
                        self.waiting.push_back(Ok(MemberEvent::Records {
                            seek: owned.seek,
                            batch,
                        }));
                    }
                }
                Read::EndOfPartition { partition, offset } => {
                    if let Some(at) = self.find(hint, &partition.topic, partition.partition)
                        && !self.owned[at].revoked
                        && let Some(batch) = self.owned[at].buffer.reach_end(offset)
                    {
                        let seek = self.owned[at].seek;
                        self.waiting.push_back(Ok(MemberEvent::Records { seek, batch }));
                    }
                }
                // That no broker can be reached the member says too.
                Read::Error(error) if error.partition.is_some() => self.fail(&error),
                Read::Error(error) => {
                    tracing::debug!(group = %self.settings.group, "{}: {}", error.code, error.reason)
                }
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

    fn begin_revoke(&mut self, partitions: Vec<TopicPartition>) {
        for owned in &mut self.owned {
            owned.revoked |= partitions.contains(&owned.buffer.partition);
        }
        self.set_fetching(&partitions, false);
        if !partitions.is_empty() && !self.membership.client().assignment_lost() {
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
                mut starts,
                told,
            } => {
                let (starts, told) = match starts.try_recv() {
                    Err(oneshot::error::TryRecvError::Empty) => (starts, told),
                    Ok(Ok(starts)) => return self.finish_assign(&partitions, starts),
                    Ok(Err(error)) => {
                        tracing::warn!(group = %self.settings.group, "committed offsets cannot be read yet: {error}");
                        if !told {
                            self.waiting.push_back(Err(error));
                        }
                        (self.look_up_starts(&partitions, IDLE_TICK), true)
                    }
                    // The runtime is shutting down.
                    Err(oneshot::error::TryRecvError::Closed) => return,
                };
                self.rebalance = Rebalance::Assigning {
                    partitions,
                    starts,
                    told,
                };
            }
            Rebalance::Releasing {
                partitions,
                unreleased,
                deadline,
            } => {
                let lost = self.membership.client().assignment_lost();
                let is_over = unreleased.is_empty() || lost || Instant::now() >= deadline;
                // A commit that is on its way must not come in behind one of the partitions' next owner.
                if is_over && !self.is_committing() {
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

    /// Has it looked up, after a while, where each of the partitions goes on, and wakes the thread then. It can take as long as a
    /// transaction that another member has left open.
    fn look_up_starts(
        &self,
        partitions: &[TopicPartition],
        after: Duration,
    ) -> oneshot::Receiver<Result<Vec<CommittedOffset>>> {
        let (sender, starts) = oneshot::channel();
        let (coordinator, ready, partitions) = (self.coordinator(), self.membership.ready.clone(), partitions.to_vec());
        tokio::task::spawn_blocking(move || {
            std::thread::sleep(after);
            // Partitions that have gone meanwhile need no start.
            let _ = sender.send(coordinator.starts(&partitions));
            ready.notify_one();
        });
        starts
    }

    fn coordinator(&self) -> Coordinator {
        Coordinator {
            log: self.log.clone(),
            settings: self.settings.clone(),
            member: self.membership.client().clone(),
            fetcher: self.fetching.client().clone(),
        }
    }

    fn finish_assign(&mut self, partitions: &[TopicPartition], starts: Vec<CommittedOffset>) {
        // One for each client: librdkafka puts its own references into a list.
        let list = || {
            let mut list = TopicPartitionList::with_capacity(partitions.len());
            for (partition, start) in partitions.iter().zip(&starts) {
                list.add_partition(&partition.topic, partition.partition)
                    .set_offset(Offset::Offset(start.next_offset.0))
                    // Offsets of a broker are not negative; one that is would be an error of the assignment below.
                    .unwrap_or_default();
            }
            list
        };
        let member = self.membership.client();
        if let Err(error) = member.incremental_assign(&list()) {
            tracing::error!(group = %self.settings.group, "partitions cannot be assigned: {error}");
            return;
        }
        if let Err(error) = member.pause(&list()) {
            // They would be read twice, here for nothing.
            tracing::warn!(group = %self.settings.group, "partitions are not paused: {error}");
        }
        // A pause survives unassign and assign in librdkafka: this assignment starts without those of earlier ones.
        self.set_fetching(partitions, true);
        if let Err(error) = self.fetching.client().incremental_assign(&list()) {
            let attempt = self.log.attempt("consume for", Resource::Group(&self.settings.group));
            self.waiting.push_back(Err(attempt.error(&error)));
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
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(&partition.topic, partition.partition);
        }
        // Not all of them, when their assignment was not finished.
        let mut fetched = TopicPartitionList::new();
        for owned in self
            .owned
            .iter()
            .filter(|owned| partitions.contains(&owned.buffer.partition))
        {
            let TopicPartition { topic, partition } = &owned.buffer.partition;
            fetched.add_partition(topic, *partition);
        }
        if let Err(error) = self.fetching.client().incremental_unassign(&fetched) {
            tracing::error!(group = %self.settings.group, "partitions are still read: {error}");
        }
        if let Err(error) = self.membership.client().incremental_unassign(&list) {
            tracing::error!(group = %self.settings.group, "partitions cannot be given up: {error}");
        }
        self.owned.retain(|owned| !partitions.contains(&owned.buffer.partition));
        if !lost.is_empty() {
            self.departures += 1;
            for Commit { reply, .. } in std::mem::take(&mut self.commits) {
                // Who has dropped the answer does not want to know.
                let _ = reply.send(Err(self.unknown_member()));
            }
            self.waiting.push_back(Ok(MemberEvent::Lost(lost)));
        }
    }

    fn set_fetching(&self, partitions: &[TopicPartition], fetching: bool) {
        if partitions.is_empty() {
            return;
        }
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(&partition.topic, partition.partition);
        }
        let client = self.fetching.client();
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
            && let Err(error) = self.fetching.client().seek_partitions(list, Duration::ZERO)
        {
            tracing::debug!(group = %self.settings.group, "resume: {error}");
        }
    }

    fn wake_at(&self) -> Instant {
        let at = Instant::now() + IDLE_TICK;
        match &self.rebalance {
            Rebalance::Releasing { deadline, .. } => at.min(*deadline),
            Rebalance::None | Rebalance::Assigning { .. } => at,
        }
    }

    fn serve(&mut self, command: GroupCommand) {
        // Who has dropped the answer to a command does not want to know.
        match command {
            GroupCommand::Subscribe { topics, reply } => {
                let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
                let client = self.membership.client();
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
            GroupCommand::Commit {
                offsets,
                departures,
                reply,
            } => {
                // What has gone may have come again: the offset is then of another assignment.
                if departures != self.departures {
                    let _ = reply.send(Err(self.unknown_member()));
                    return;
                }
                self.commits.push_back(Commit { offsets, reply });
                self.commit_next();
            }
            GroupCommand::Committed { partitions, reply } => {
                let coordinator = self.coordinator();
                tokio::task::spawn_blocking(move || {
                    let _ = reply.send(coordinator.committed(&partitions));
                });
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
                if departures != self.departures || self.membership.client().assignment_lost() {
                    let _ = reply.send(Err(self.unknown_member()));
                    return;
                }
                let metadata = self.membership.client().group_metadata();
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

    /// Begins the next commit if none is under way. In a rebalance one can take a second, in which records flow on.
    fn commit_next(&mut self) {
        while !self.is_committing()
            && let Some(Commit { offsets, reply }) = self.commits.pop_front()
        {
            let is_owned = |of: &TopicPartition| self.owned.iter().any(|owned| owned.buffer.partition == *of);
            if !offsets.iter().all(|(partition, _)| is_owned(partition)) {
                let _ = reply.send(Err(self.unknown_member()));
                continue;
            }
            let (done, committing) = oneshot::channel();
            let (coordinator, ready) = (self.coordinator(), self.membership.ready.clone());
            self.committing = Some(committing);
            tokio::task::spawn_blocking(move || {
                let _ = reply.send(coordinator.commit(&offsets));
                drop(done);
                ready.notify_one();
            });
        }
    }

    fn is_committing(&mut self) -> bool {
        let ended = |done: &mut oneshot::Receiver<()>| done.try_recv() != Err(oneshot::error::TryRecvError::Empty);
        self.committing.as_mut().is_some_and(|committing| !ended(committing))
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
                .and_then(|()| self.fetching.client().seek_partitions(list, attempt.within))
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
        self.set_fetching(&changed, !paused);
    }

    fn fail(&mut self, error: &ConsumerError) {
        let attempt = self.log.attempt("consume for", Resource::Group(&self.settings.group));
        match (error.code, &error.partition) {
            (Code::UnknownTopic | Code::UnknownTopicOrPartition, Some(partition)) => {
                let topic = partition.topic.to_string();
                self.waiting.push_back(Err(Error::UnknownTopic(topic)));
            }
            // The member can do nothing more: another one has its instance id, or the broker does not know its protocol.
            _ if let Some((code, reason)) = self.membership.client().client().fatal_error() => {
                tracing::error!(group = %self.settings.group, "{code}: {reason}");
                let mapped = match (attempt.code(code), &self.settings.instance_id) {
                    (Error::UnknownMember { group }, Some(instance_id)) => Error::FencedMember {
                        group,
                        instance_id: instance_id.clone(),
                    },
                    (mapped, _) if mapped.is_retriable() => Error::InvalidSetting {
                        name: "group.protocol".to_owned(),
                        reason,
                    },
                    (mapped, _) => mapped,
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
                if let Err(error) = self.membership.client().incremental_assign(&TopicPartitionList::new()) {
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

/// What is asked of the group's coordinator by the member's client, on threads that may wait for it.
struct Coordinator {
    log: KafkaLog,
    settings: GroupSettings,
    member: Arc<BaseConsumer<LogContext>>,
    fetcher: Arc<BaseConsumer<LogContext>>,
}

impl Coordinator {
    /// Where each of these partitions goes on: at what is committed, if that is kept.
    fn starts(&self, partitions: &[TopicPartition]) -> Result<Vec<CommittedOffset>> {
        if partitions.is_empty() {
            return Ok(Vec::new());
        }
        self.find_leaders(partitions)?;
        let committed = self.committed(partitions)?;
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

    /// Has the reading client know the topics. Of itself it would look for those that it does not know once a second.
    fn find_leaders(&self, partitions: &[TopicPartition]) -> Result<()> {
        let topics: BTreeSet<_> = partitions.iter().map(|partition| &*partition.topic).collect();
        for topic in topics {
            let attempt = self.log.attempt("find the leaders of", Resource::Topic(topic));
            let found = self.fetcher.fetch_metadata(Some(topic), attempt.within);
            found.map_err(|error| attempt.error(&error))?;
        }
        Ok(())
    }

    fn commit(&self, offsets: &[(TopicPartition, CommittedOffset)]) -> Result<()> {
        if offsets.is_empty() {
            return Ok(());
        }
        let attempt = self.log.attempt("commit for", Resource::Group(&self.settings.group));
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (partition, committed) in offsets {
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
            if self.member.assignment_lost() {
                return Err(Error::UnknownMember {
                    group: self.settings.group.clone(),
                });
            }
            let error = match self.member.commit(&list, CommitMode::Sync) {
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

    /// What the group has committed for each of the partitions.
    fn committed(&self, partitions: &[TopicPartition]) -> Result<Vec<Option<CommittedOffset>>> {
        let attempt = self
            .log
            .attempt("read committed offsets of", Resource::Group(&self.settings.group));
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(&partition.topic, partition.partition);
        }
        let list = self
            .member
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
}
