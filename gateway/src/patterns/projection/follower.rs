//! Follows the topics into one generation of a view: builds it, has readers switched to it, and keeps it up to date until another takes
//! its place.
//!
//! One task does one thing after the other: while the database is away, it waits, the log's client has read ahead as far as its queue lets
//! it, and the group keeps the member. A partition that is to be released meanwhile is taken from it; its next owner goes on from what the
//! database says, and what this one still tries is refused there.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::database::DatabaseError;
use super::generations::{Generation, Move, Positions, State};
use super::view::RowChange;
use super::{Projector, Shared, generation_group, insist};
use crate::log::{
    self, Batch, CleanupPolicy, CommittedOffset, GroupEvent, GroupMember, GroupSettings, NextOffset, ProducerRecord,
    Record, StartAt, TopicDescription, TopicPartition,
};
use crate::patterns::Error;
use crate::patterns::consumer::{FailureKind, said};
use crate::patterns::hop::{Hop, Why};

/// Records of one transaction, and bytes of them, behind which no further batch of the log is added to it.
const TRANSACTION_RECORDS: usize = 2000;
const TRANSACTION_BYTES: usize = 4 * 1024 * 1024;

/// How often it is looked what has become of the generation, and how often the group is told how far it is.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long the group is waited for when it is told. It is for the eye only.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(5);

/// How following a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The projection stops.
    Stopped,
    /// Another generation has taken its place.
    Superseded,
}

pub(super) struct Follower<P> {
    shared: Arc<Shared<P>>,
    generation: Generation,
    /// Where the partitions of the member's are read on, as the database had it last.
    positions: Positions,
    /// Where the partitions ended at first: so far a generation must have read before anybody reads it.
    ends: Positions,
}

/// A record and what follows from it.
struct Item {
    partition: TopicPartition,
    record: Record,
    changes: Vec<RowChange>,
}

/// What became of a transaction.
enum Committed {
    Done,
    /// A position is not where it was believed to be.
    Elsewhere,
    /// The database does not take a value.
    Refused(DatabaseError),
}

/// What became of work.
enum Written {
    Done,
    /// Nothing of it was written, as the database refuses a value of one of these.
    Refused(Vec<Item>),
    /// The partitions are read again from where the database is.
    Rewound,
}

/// What the work of a follower comes to: on with it, or not.
type Flow = Result<ControlFlow<Ended>, Error>;

impl<P: Projector> Follower<P> {
    pub(super) fn new(shared: Arc<Shared<P>>, generation: Generation) -> Self {
        Self {
            shared,
            generation,
            positions: Positions::new(),
            ends: Positions::new(),
        }
    }

    pub(super) async fn run(mut self) -> Result<Ended, Error> {
        let shared = self.shared.clone();
        let (group, number) = (&shared.settings.group, self.generation.number);
        let view = shared.settings.view.name();
        tracing::info!(view, number, state = ?self.generation.state, "projecting into generation {number} of {view}");
        let partitions = all_partitions(&shared.topics);
        let Some(ends) = insist!(shared, shared.log.offsets(&partitions, StartAt::End)) else {
            return Ok(Ended::Stopped);
        };
        self.ends = partitions.into_iter().zip(ends).collect();
        let settings = GroupSettings {
            session_timeout: shared.settings.session_timeout,
            ..GroupSettings::new(generation_group(group, number), &shared.settings.topics)
        };
        let Some(mut member) = insist!(shared, shared.log.join_group(settings.clone())) else {
            return Ok(Ended::Stopped);
        };
        if self.generation.state == State::Live {
            self.tell_live();
        }
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut waiting = None;
        loop {
            let event = match waiting.take() {
                Some(event) => event,
                None => tokio::select! {
                    () = shared.stopping.cancelled() => {
                        self.tell_group(&member).await;
                        return Ok(Ended::Stopped);
                    }
                    _ = look.tick() => {
                        self.tell_group(&member).await;
                        if let ControlFlow::Break(ended) = self.look().await? {
                            return Ok(ended);
                        }
                        continue;
                    }
                    event = member.next() => event,
                },
            };
            let flow = match event {
                Ok(GroupEvent::Records(batch)) => {
                    let batches = gather(&mut member, batch, &mut waiting);
                    self.project(&mut member, batches).await?
                }
                Ok(GroupEvent::Assigned(partitions)) => self.assigned(&mut member, partitions).await?,
                Ok(GroupEvent::Revoked(partitions)) => {
                    self.tell_group(&member).await;
                    self.positions.retain(|partition, _| !partitions.contains(partition));
                    // It fails only when the log has ended, which the next event says.
                    let _ = member.release(partitions).await;
                    ControlFlow::Continue(())
                }
                Ok(GroupEvent::Lost(partitions)) => {
                    self.positions.retain(|partition, _| !partitions.contains(partition));
                    ControlFlow::Continue(())
                }
                Err(error) if error.is_retriable() => {
                    tracing::warn!(group, %error, "the group cannot be reached; trying on");
                    ControlFlow::Continue(())
                }
                Err(log::Error::Closed) if shared.stopping.is_cancelled() => ControlFlow::Break(Ended::Stopped),
                Err(error) => return Err(error.into()),
            };
            if let ControlFlow::Break(ended) = flow {
                return Ok(ended);
            }
            // Readers are not kept waiting for the next look.
            if self.generation.state == State::Building
                && self.is_read_up(&self.positions)
                && let ControlFlow::Break(ended) = self.look().await?
            {
                return Ok(ended);
            }
        }
    }

    /// Reads on where the database says.
    async fn assigned(&mut self, member: &mut GroupMember, assigned: Vec<(TopicPartition, CommittedOffset)>) -> Flow {
        let shared = self.shared.clone();
        let number = self.generation.number;
        let partitions: Vec<_> = assigned.iter().map(|(partition, _)| partition.clone()).collect();
        let Some(starts) = insist!(shared, shared.log.offsets(&partitions, StartAt::Start)) else {
            return Ok(ControlFlow::Break(Ended::Stopped));
        };
        let starts: Positions = partitions.iter().cloned().zip(starts).collect();
        let known = insist!(shared, async {
            shared.generations.begin(number, &starts).await?;
            shared.generations.positions(number).await
        });
        let Some(known) = known else {
            return Ok(ControlFlow::Break(Ended::Stopped));
        };
        for (partition, assigned) in assigned {
            let Some(position) = known.get(&partition).copied() else {
                // It was dropped, which the next look finds.
                continue;
            };
            let start = starts.get(&partition).copied().unwrap_or(0);
            self.check_kept(&partition, position, start).await?;
            let at = position.max(start);
            self.positions.insert(partition.clone(), position);
            if at == assigned.next_offset.0 {
                continue;
            }
            if !self.seek(member, &partition, at).await? {
                return Ok(ControlFlow::Break(Ended::Stopped));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Has a partition read from an offset. One that has gone meanwhile is forgotten. False: the projection stops.
    async fn seek(&mut self, member: &mut GroupMember, partition: &TopicPartition, to: i64) -> Result<bool, Error> {
        let shared = self.shared.clone();
        let sought = insist!(shared, async {
            match member.seek(partition.clone(), NextOffset(to)).await {
                Err(log::Error::UnknownMember { .. }) => Ok(false),
                sought => sought.map(|()| true),
            }
        });
        match sought {
            Some(true) => {}
            Some(false) => drop(self.positions.remove(partition)),
            None => return Ok(false),
        }
        Ok(true)
    }

    /// # Errors
    /// [`log::Error::OffsetOutOfRange`]: retention has taken events that were not projected. A compacted topic has the last of each key all
    /// the same.
    async fn check_kept(&self, partition: &TopicPartition, position: i64, start: i64) -> Result<(), Error> {
        let topic = self.shared.topics.get(&*partition.topic);
        if position >= start || topic.is_none_or(|topic| topic.cleanup == CleanupPolicy::Compact) {
            return Ok(());
        }
        Err(Error::Log(log::Error::OffsetOutOfRange {
            partition: partition.clone(),
            offset: position,
            start,
            end: self.shared.log.offset(partition, StartAt::End).await?,
        }))
    }

    /// Projects the records of batches, in one transaction.
    async fn project(&mut self, member: &mut GroupMember, batches: Vec<Batch>) -> Flow {
        let shared = self.shared.clone();
        let (mut items, mut letters, mut ends) = (Vec::new(), Vec::new(), Positions::new());
        for batch in batches {
            let Some(position) = self.positions.get(&batch.partition).copied() else {
                continue;
            };
            let read = ends.get(&batch.partition).copied().unwrap_or(position);
            let first = batch
                .records
                .first()
                .map_or(batch.next_offset.0, |record| record.offset);
            if first > read {
                // Markers of transactions leave gaps too, and so does compaction.
                match insist!(shared, shared.log.offset(&batch.partition, StartAt::Start)) {
                    Some(start) => self.check_kept(&batch.partition, read, start).await?,
                    None => return Ok(ControlFlow::Break(Ended::Stopped)),
                }
            }
            ends.insert(batch.partition.clone(), batch.next_offset.0.max(read));
            for record in batch.records {
                if record.offset < position {
                    continue;
                }
                let changes = self.changes(&record).unwrap_or_else(|(kind, message)| {
                    letters.push(self.letter(&batch.partition, &record, kind, &message));
                    Vec::new()
                });
                items.push(Item {
                    partition: batch.partition.clone(),
                    record,
                    changes,
                });
            }
        }
        // Before the offset is stored: a letter may come twice, and is never lost.
        if !self.send(letters).await? {
            return Ok(ControlFlow::Break(Ended::Stopped));
        }
        self.write(member, items, ends).await
    }

    /// What a record does to the view, or why it does nothing.
    fn changes(&self, record: &Record) -> Result<Vec<RowChange>, (FailureKind, String)> {
        let Shared {
            projector, settings, ..
        } = &*self.shared;
        let project = || {
            let changes = projector.project(projector.decode(record)?)?;
            changes.into_iter().map(|change| settings.view.encode(change)).collect()
        };
        match catch_unwind(AssertUnwindSafe(project)) {
            Ok(Ok(changes)) => Ok(changes),
            Ok(Err(error)) => Err((FailureKind::NonRetriable, error.to_string())),
            Err(panic) => Err((FailureKind::Panic, format!("the projector panicked: {}", said(&*panic)))),
        }
    }

    fn letter(&self, partition: &TopicPartition, record: &Record, kind: FailureKind, message: &str) -> ProducerRecord {
        let group = &self.shared.settings.group;
        tracing::warn!(
            topic = %partition.topic, partition = partition.partition, offset = record.offset,
            "an event cannot be projected and becomes a dead letter: {message}"
        );
        let why = Why {
            group,
            attempts: 1,
            kind: kind.as_str(),
            message,
        };
        Hop::to_dead_letters(&partition.topic, group).record(partition, record, true, &why)
    }

    /// Appends dead letters, for as long as it takes. False: the projection stops before that.
    async fn send(&self, letters: Vec<ProducerRecord>) -> Result<bool, Error> {
        let mut deliveries = Vec::with_capacity(letters.len());
        for letter in &letters {
            deliveries.push(self.shared.producer.send(letter.clone()).await);
        }
        for (letter, delivery) in letters.into_iter().zip(deliveries) {
            let appended = match delivery {
                Ok(delivery) => delivery.await,
                Err(error) => Err(error),
            };
            if appended.is_err() && !self.send_one(letter).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn send_one(&self, letter: ProducerRecord) -> Result<bool, Error> {
        let sent = insist!(self.shared, async {
            let appended = self.shared.producer.append(letter.clone()).await;
            appended.map_err(|error| match error {
                log::Error::Closed => error,
                // Whatever the log has against it: it is not passed over.
                _ => log::Error::Unavailable(error.to_string()),
            })
        });
        Ok(sent.is_some())
    }

    /// Writes what follows from records, and how far they go, for as long as it takes: in one transaction, or, when the database refuses a
    /// value, each record in its own.
    async fn write(&mut self, member: &mut GroupMember, items: Vec<Item>, ends: Positions) -> Flow {
        let refused = match self.commit(member, items, ends.clone()).await? {
            ControlFlow::Continue(Written::Refused(items)) => items,
            ControlFlow::Continue(Written::Done | Written::Rewound) => return Ok(ControlFlow::Continue(())),
            ControlFlow::Break(ended) => return Ok(ControlFlow::Break(ended)),
        };
        let each = refused.into_iter().map(|item| {
            let end = Positions::from([(item.partition.clone(), item.record.offset + 1)]);
            (vec![item], end)
        });
        for (items, ends) in each.chain([(Vec::new(), ends)]) {
            match self.commit(member, items, ends).await? {
                ControlFlow::Continue(Written::Done | Written::Refused(_)) => {}
                ControlFlow::Continue(Written::Rewound) => break,
                ControlFlow::Break(ended) => return Ok(ControlFlow::Break(ended)),
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Writes in one transaction, and gives back what was to be written if it is of several records and the database refuses a value. A
    /// single record that is refused becomes a dead letter.
    async fn commit(
        &mut self,
        member: &mut GroupMember,
        mut items: Vec<Item>,
        ends: Positions,
    ) -> Result<ControlFlow<Ended, Written>, Error> {
        let shared = self.shared.clone();
        let number = self.generation.number;
        loop {
            let moves: Vec<Move> = ends
                .iter()
                .filter_map(|(partition, to)| {
                    let from = self.positions.get(partition).copied()?;
                    let partition = partition.clone();
                    (from < *to).then_some(Move {
                        partition,
                        from,
                        to: *to,
                    })
                })
                .collect();
            if moves.is_empty() {
                return Ok(ControlFlow::Continue(Written::Done));
            }
            let committed = insist!(shared, async {
                let changes = items.iter().flat_map(|item| {
                    let placed = move |change| (&item.partition, item.record.offset, change);
                    item.changes.iter().map(placed)
                });
                let statements = shared.generations.statements(number, &moves, changes);
                match shared.generations.database.transact(statements).await {
                    Ok(true) => Ok(Committed::Done),
                    Ok(false) => Ok(Committed::Elsewhere),
                    Err(error) if error.is_about_a_value() && !items.is_empty() => Ok(Committed::Refused(error)),
                    Err(error) => Err(error),
                }
            });
            match committed {
                None => return Ok(ControlFlow::Break(Ended::Stopped)),
                Some(Committed::Done) => {
                    let moved = moves.into_iter().map(|Move { partition, to, .. }| (partition, to));
                    self.positions.extend(moved);
                    return Ok(ControlFlow::Continue(Written::Done));
                }
                Some(Committed::Elsewhere) => match self.find_positions(member).await? {
                    ControlFlow::Continue(true) => {
                        let positions = &self.positions;
                        let is_new = |item: &Item| {
                            positions
                                .get(&item.partition)
                                .is_some_and(|at| item.record.offset >= *at)
                        };
                        items.retain(is_new);
                    }
                    ControlFlow::Continue(false) => return Ok(ControlFlow::Continue(Written::Rewound)),
                    ControlFlow::Break(ended) => return Ok(ControlFlow::Break(ended)),
                },
                Some(Committed::Refused(_)) if items.len() > 1 => {
                    return Ok(ControlFlow::Continue(Written::Refused(items)));
                }
                Some(Committed::Refused(error)) => {
                    let message = error.to_string();
                    let letter =
                        |item: &Item| self.letter(&item.partition, &item.record, FailureKind::NonRetriable, &message);
                    let letters = items.iter().map(letter).collect();
                    if !self.send(letters).await? {
                        return Ok(ControlFlow::Break(Ended::Stopped));
                    }
                    items.clear();
                }
            }
        }
    }

    /// Takes over the positions of the database: another instance has gone ahead, or a commit whose answer was lost was done after all. False:
    /// somebody has put back an older state of the database, and the partitions are read again from there.
    async fn find_positions(&mut self, member: &mut GroupMember) -> Result<ControlFlow<Ended, bool>, Error> {
        let shared = self.shared.clone();
        let number = self.generation.number;
        let found = insist!(shared, async {
            let state = shared.generations.state(number).await?;
            Ok::<_, DatabaseError>((state, shared.generations.positions(number).await?))
        });
        let mut known = match found {
            None => return Ok(ControlFlow::Break(Ended::Stopped)),
            Some((State::Old, _)) => return Ok(ControlFlow::Break(Ended::Superseded)),
            Some((State::Building | State::Live, known)) => known,
        };
        known.retain(|partition, _| self.positions.contains_key(partition));
        if known.len() < self.positions.len() {
            return Ok(ControlFlow::Break(Ended::Superseded));
        }
        let before = std::mem::replace(&mut self.positions, known.clone());
        let is_ahead = known
            .iter()
            .all(|(partition, at)| before.get(partition).is_none_or(|before| at >= before));
        let view = shared.settings.view.name();
        tracing::warn!(
            view,
            ?before,
            ?known,
            "the database is not where this instance has left it; going on from there"
        );
        if !is_ahead {
            for (partition, at) in known {
                if !self.seek(member, &partition, at).await? {
                    return Ok(ControlFlow::Break(Ended::Stopped));
                }
            }
        }
        Ok(ControlFlow::Continue(is_ahead))
    }

    /// What has become of the generation; one that has read enough becomes the live one.
    async fn look(&mut self) -> Flow {
        match insist!(self.shared, self.look_once()) {
            None => Ok(ControlFlow::Break(Ended::Stopped)),
            Some(State::Old) => Ok(ControlFlow::Break(Ended::Superseded)),
            Some(state) => {
                if state == State::Live && self.generation.state == State::Building {
                    self.generation.state = State::Live;
                    self.tell_live();
                }
                Ok(ControlFlow::Continue(()))
            }
        }
    }

    async fn look_once(&self) -> Result<State, DatabaseError> {
        let (generations, number) = (&self.shared.generations, self.generation.number);
        let state = generations.state(number).await?;
        if state != State::Building || !self.is_read_up(&self.positions) {
            return Ok(state);
        }
        // Other instances may have some of the partitions.
        let positions = generations.positions(number).await?;
        let knows_all = self.ends.keys().all(|partition| positions.contains_key(partition));
        let is_live = knows_all && self.is_read_up(&positions) && generations.switch(number).await?;
        Ok(if is_live { State::Live } else { State::Building })
    }

    /// Whether positions are nowhere before where the partitions ended at first. Partitions that are not among them do not count here.
    fn is_read_up(&self, positions: &Positions) -> bool {
        self.ends
            .iter()
            .all(|(partition, end)| positions.get(partition).is_none_or(|at| at >= end))
    }

    fn tell_live(&self) {
        let (view, number) = (self.shared.settings.view.name(), self.generation.number);
        tracing::info!(view, number, "generation {number} of {view} is the live one");
        self.shared.live.send_modify(|live| *live = (*live).max(Some(number)));
    }

    /// Commits how far the partitions are projected, so that the group's lag can be seen.
    async fn tell_group(&self, member: &GroupMember) {
        if self.positions.is_empty() {
            return;
        }
        let offset = |(partition, at): (&TopicPartition, &i64)| (partition.clone(), NextOffset(*at).into());
        let commit = member.commit(self.positions.iter().map(offset).collect());
        if let Ok(Err(error)) = timeout(COMMIT_TIMEOUT, commit).await {
            tracing::debug!(group = member.group(), %error, "the group was not told how far it is");
        }
    }
}

/// The batch and what else waits, up to what one transaction may have. An event of another kind is left for later.
fn gather(member: &mut GroupMember, batch: Batch, waiting: &mut Option<log::Result<GroupEvent>>) -> Vec<Batch> {
    let (mut records, mut bytes) = (batch.records.len(), size_bytes(&batch));
    let mut batches = vec![batch];
    while records < TRANSACTION_RECORDS && bytes < TRANSACTION_BYTES {
        match member.next().now_or_never() {
            Some(Ok(GroupEvent::Records(batch))) => {
                records += batch.records.len();
                bytes += size_bytes(&batch);
                batches.push(batch);
            }
            other => {
                *waiting = other;
                break;
            }
        }
    }
    batches
}

fn size_bytes(batch: &Batch) -> usize {
    batch.records.iter().map(Record::size_bytes).sum()
}

fn all_partitions(topics: &BTreeMap<String, TopicDescription>) -> Vec<TopicPartition> {
    let of = |topic: &TopicDescription| {
        let name: Arc<str> = topic.name.as_str().into();
        (0..topic.partitions).map(move |number| TopicPartition::new(name.clone(), number))
    };
    topics.values().flat_map(of).collect()
}
