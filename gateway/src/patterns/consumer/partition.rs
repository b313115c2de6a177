//! One partition of a consumer's: which of its records wait, are being handled, are blocked, or are done.
//!
//! ```text
//! log ──▶ held (retry topics: until due) ──▶ lanes ──▶ runs ──▶ handler
//!                                              ▲  done: the offsets take note
//!                                              └─ failed: blocked until due, or hopping to another topic
//! ```
//! A [`Lane`] holds what must stay in order: the whole partition, or one key. One run of a lane is under way at a time. Records
//! without order are loose; one that fails has a lane to itself. Nothing here waits or speaks to the log; the runner does.
//!
//! Invariant: every record that was taken in and is not done stands in exactly one place: held, loose, a lane, or a run.

use std::collections::hash_map::{Entry, OccupiedEntry};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use foldhash::fast::RandomState;
use tokio::time::Instant;

use super::ProcessingOrder;
use super::commit::Mark;
use super::handle::{BlockedLane, PartitionState};
use super::handler::{Attempts, Failure, Handled};
use super::log_clock::{LogClock, due_ms};
use super::offsets::Offsets;
use crate::log::{Batch, CommittedOffset, Record, TopicPartition};
use crate::patterns::control::{Key, Place};
use crate::patterns::millis;
use crate::patterns::retry::is_clock_record;

/// What a record is taken to hold beside its key, value and headers.
const RECORD_OVERHEAD_BYTES: usize = 160;

/// Loose records that are handled in one run at most.
const LOOSE_RUN_RECORDS: usize = 32;

/// Records that a lane takes back at once of those that it has let go.
const TAKEN_BACK_RECORDS: usize = 64;

/// Runs of done records above the committed offset behind which no further one is begun. The metadata of a commit has room for twice as
/// many short ones, which what is at work by then may leave.
const MOST_RUNS: usize = 450;

/// A partition in one of its assignments.
pub(super) struct Partition {
    pub(super) name: TopicPartition,
    /// The number of the assignment. What comes from an earlier one is ignored.
    pub(super) epoch: u64,
    order: ProcessingOrder,
    /// Records of one run at most.
    run_records: usize,
    /// Attempts that records of this partition have behind them: on a retry topic those before it.
    attempts_before: u32,
    /// Whether the metadata of a commit must tell all that is done above the offset.
    exact: bool,
    offsets: Offsets,
    lanes: HashMap<LaneId, Lane, RandomState>,
    /// Lanes whose next run may begin.
    ready: VecDeque<LaneId>,
    /// Records without order, by offset: when there are many gaps the first of them tells whether it fills one.
    loose: VecDeque<Record>,
    /// Lanes that wait, those with an end by it.
    blocked: BTreeSet<(Instant, LaneId)>,
    /// Records that lanes have let go.
    away: usize,
    /// Lanes that have nothing but what they have let go, by its first offset.
    missing: BTreeMap<i64, LaneId>,
    /// Records that the owner before had blocked and that were not handled here yet, by their offsets.
    restored: HashMap<i64, Restored>,
    /// The places where failures are passed over, with the first offset for which that holds.
    ignored: HashMap<LaneId, i64>,
    /// Lanes that were blocked, or no longer are, since somebody looked.
    changed: Vec<LaneId>,
    /// Not to be handled before their time by the log's clock, in milliseconds since the Unix epoch, and not before those ahead of them.
    held: VecDeque<(i64, Record)>,
    clock: LogClock,
    /// Whether `clock` need not be set by a record of its own: what stood here first has been read, or that was asked for.
    has_time: bool,
    /// Bytes of all records that are not done.
    bytes: usize,
    /// Runs under way.
    running: usize,
    /// Records on their way to another topic.
    hopping: usize,
    /// Tells runs to end after the record in hand.
    stop: Arc<AtomicBool>,
    pauses: BTreeSet<PauseReason>,
    /// What was committed in this assignment. It begins with where the partition starts: a group that has committed nothing would
    /// start elsewhere the next time, and nobody would see it.
    committed: Option<CommittedOffset>,
}

/// Why a partition does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PauseReason {
    /// The application has paused it: nothing more is handled. What is read waits.
    User,
    /// Enough of its records wait: nothing more is read.
    Full,
    /// It is on its way to another member: nothing more is handled.
    Leaving,
    /// What stood still at its owner before is not known yet: nothing is handled.
    Restoring,
    /// More became dead letters than [`super::DlqLimit`] allows: nothing more is handled until an operator retries one.
    DeadLetters,
}

/// What must stay in order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum LaneId {
    /// All records of the partition.
    Partition,
    /// Those of one key.
    Key(Bytes),
    /// The one at this offset, which has failed.
    Record(i64),
    /// Records without order, of which none has failed.
    Loose,
}

struct Lane {
    records: VecDeque<Record>,
    /// The offsets of those behind, which have to be read again.
    let_go: VecDeque<i64>,
    state: LaneState,
    /// How often the first of them has failed here, and since when.
    failed: u32,
    failed_since: Option<Instant>,
}

enum LaneState {
    Ready,
    Running,
    Blocked {
        /// `None`: until an operator says so.
        due: Option<Instant>,
        failure: Failure,
    },
    /// The first record has failed and is on its way to another topic.
    Hopping,
    /// Its next record has to be read again first.
    Missing,
}

/// What the owner before knew of a blocked record.
#[derive(Clone, Debug)]
pub(super) struct Restored {
    /// How often it had failed here.
    pub(super) failed: u32,
    pub(super) since: Option<Instant>,
    pub(super) due: Instant,
    pub(super) failure: Failure,
}

/// Records of one lane on their way to the handler.
pub(super) struct Run {
    pub(super) partition: TopicPartition,
    pub(super) epoch: u64,
    pub(super) lane: LaneId,
    pub(super) records: Vec<Record>,
    pub(super) attempts: Attempts,
    pub(super) stop: Arc<AtomicBool>,
}

/// A run that has ended.
pub(super) struct Ended {
    pub(super) run: Run,
    pub(super) handled: Handled,
}

/// A lane whose first record has failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) lane: LaneId,
    /// The failed record.
    pub(super) record: Record,
    /// How often it has failed here.
    pub(super) failed: u32,
    pub(super) failure: Failure,
}

impl Partition {
    pub(super) fn new(
        name: TopicPartition,
        epoch: u64,
        order: ProcessingOrder,
        run_records: usize,
        attempts_before: u32,
        exact: bool,
        start: CommittedOffset,
    ) -> Self {
        Self {
            name,
            epoch,
            order,
            run_records,
            attempts_before,
            exact,
            offsets: Offsets::new(start.next_offset, &start.metadata),
            lanes: HashMap::default(),
            ready: VecDeque::new(),
            loose: VecDeque::new(),
            blocked: BTreeSet::new(),
            away: 0,
            missing: BTreeMap::new(),
            restored: HashMap::new(),
            ignored: HashMap::new(),
            changed: Vec::new(),
            held: VecDeque::new(),
            clock: LogClock::default(),
            has_time: false,
            bytes: 0,
            running: 0,
            hopping: 0,
            stop: Arc::default(),
            pauses: BTreeSet::new(),
            committed: None,
        }
    }

    /// Takes in what was read. Of a retry topic a record is not handled before it has stood there for `held_for`.
    pub(super) fn take_in(&mut self, batch: Batch, held_for: Option<Duration>, now: Instant) {
        for record in batch.records {
            if held_for.is_some() {
                self.clock.see(record.timestamp_ms, now);
                if is_clock_record(&record) {
                    continue;
                }
            }
            if !self.offsets.read(record.offset) {
                continue;
            }
            self.bytes += size_bytes(&record);
            match held_for {
                None => self.queue(record),
                Some(delay) => self
                    .held
                    .push_back((due_ms(record.timestamp_ms, millis(delay)), record)),
            }
        }
        // With nothing held when the end is reached, the first that comes later is fresh.
        self.has_time |= batch.caught_up && self.held.is_empty();
        self.offsets.reach(batch.next_offset);
    }

    /// Puts a record behind the others of its lane.
    fn queue(&mut self, record: Record) {
        let id = match (self.order, &record.key) {
            (ProcessingOrder::Partition, _) => LaneId::Partition,
            (ProcessingOrder::Key, Some(key)) => LaneId::Key(key.clone()),
            (ProcessingOrder::Key, None) | (ProcessingOrder::Unordered, _) if self.expects(record.offset) => {
                LaneId::Record(record.offset)
            }
            (ProcessingOrder::Key, None) | (ProcessingOrder::Unordered, _) => {
                self.loose.push_back(record);
                return;
            }
        };
        match self.lanes.entry(id) {
            Entry::Occupied(lane) if lane.get().let_go.is_empty() => lane.into_mut().records.push_back(record),
            Entry::Occupied(lane) => {
                self.bytes -= size_bytes(&record);
                self.away += 1;
                lane.into_mut().let_go.push_back(record.offset);
            }
            Entry::Vacant(vacant) => {
                self.ready.push_back(vacant.key().clone());
                vacant.insert(Lane::new(record));
            }
        }
    }

    /// Whether the log should be asked what time it is, which is said once: what was held when the partition came here may have been
    /// for long, and its stamps do not say for how long.
    pub(super) fn asks_for_time(&mut self) -> bool {
        !self.held.is_empty() && !std::mem::replace(&mut self.has_time, true)
    }

    /// Takes note of the stamp of a record that was just appended here.
    pub(super) fn hear_time(&mut self, stamp_ms: i64, now: Instant) {
        self.clock.see(stamp_ms, now);
    }

    /// Lets go on what has become due.
    pub(super) fn wake(&mut self, now: Instant) {
        let log_ms = self.clock.at_least(now);
        while self.held.front().is_some_and(|(due_ms, _)| Some(*due_ms) <= log_ms)
            && let Some((_, record)) = self.held.pop_front()
        {
            self.queue(record);
        }
        while self.blocked.first().is_some_and(|(due, _)| *due <= now)
            && let Some((_, id)) = self.blocked.pop_first()
        {
            self.go_on(id);
        }
    }

    /// When [`Partition::wake`] has something to do.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let held = self.held.front().and_then(|(due_ms, _)| self.clock.when(*due_ms));
        let blocked = self.blocked.first().map(|(due, _)| *due);
        held.into_iter().chain(blocked).min()
    }

    /// The next run, if there is one and nothing speaks against it. `workers` share the loose records.
    pub(super) fn next_run(&mut self, workers: usize) -> Option<Run> {
        if self.is_stopped() {
            return None;
        }
        let only_before = self.is_crowded().then(|| self.offsets.done_to());
        let may_begin = |record: &Record| only_before.is_none_or(|end| record.offset < end);
        let (lane, records, failed) = match self.next_ready(only_before) {
            Some(id) => {
                let lane = self.lanes.get_mut(&id)?;
                lane.state = LaneState::Running;
                let waits = |record: &Record| !may_begin(record) || self.restored.contains_key(&record.offset);
                let most = self.run_records.min(lane.records.len());
                let count = lane.records.iter().take(most).position(waits).unwrap_or(most);
                let records = match count == lane.records.len() {
                    true => std::mem::take(&mut lane.records).into(),
                    false => lane.records.drain(..count).collect(),
                };
                (id, records, lane.failed)
            }
            None if !self.loose.front().is_some_and(may_begin) => return None,
            None => {
                // What one worker is slow with another cannot do: half of its share is left for later.
                let share = self.loose.partition_point(may_begin) / (2 * workers);
                let count = share.clamp(1, LOOSE_RUN_RECORDS.min(self.run_records));
                (LaneId::Loose, self.loose.drain(..count).collect(), 0)
            }
        };
        self.running += 1;
        Some(Run {
            partition: self.name.clone(),
            epoch: self.epoch,
            lane,
            records,
            attempts: Attempts {
                first: self.attempts_before + failed + 1,
                others: self.attempts_before + 1,
            },
            stop: self.stop.clone(),
        })
    }

    /// Whether so many runs of done records lie between those that are not that a commit could not tell of more: then only what fills
    /// the gaps between them is handled.
    pub(super) fn is_crowded(&self) -> bool {
        self.exact && self.order != ProcessingOrder::Partition && self.offsets.runs() > MOST_RUNS
    }

    /// The next lane that may run, if told so one whose first record stands before an offset. One whose first record the owner before had
    /// blocked goes on waiting instead.
    fn next_ready(&mut self, only_before: Option<i64>) -> Option<LaneId> {
        loop {
            let at = match only_before {
                None => 0,
                Some(end) => self.ready.iter().position(|id| {
                    let first = self.lanes.get(id).and_then(|lane| lane.records.front());
                    first.is_some_and(|record| record.offset < end)
                })?,
            };
            let id = self.ready.remove(at)?;
            if self.restored.is_empty() {
                return Some(id);
            }
            let Some(lane) = self.lanes.get_mut(&id) else { continue };
            let restored = lane
                .records
                .front()
                .and_then(|record| self.restored.remove(&record.offset));
            let Some(restored) = restored else {
                return Some(id);
            };
            lane.failed = restored.failed;
            lane.failed_since = restored.since;
            lane.state = LaneState::Hopping;
            self.hopping += 1;
            self.block(id, Some(restored.due), restored.failure);
        }
    }

    /// Takes note of what became of a run. If its first record that is not done has failed, the lane stands still until one of
    /// [`Partition::block`] and [`Partition::pass`].
    pub(super) fn ended(&mut self, ended: Ended) -> Option<Failed> {
        let Ended { run, handled } = ended;
        self.running -= 1;
        let mut records = run.records;
        let mut rest = records.split_off(handled.done.min(records.len()));
        for record in &records {
            self.bytes -= size_bytes(record);
            self.offsets.complete(record.offset);
        }
        let id = match (run.lane, &handled.failure) {
            (LaneId::Loose, failure) => {
                let failed = failure.is_some() && !rest.is_empty();
                let failed = failed.then(|| rest.remove(0));
                for record in rest.drain(..).rev() {
                    let at = self.loose.partition_point(|other| other.offset < record.offset);
                    self.loose.insert(at, record);
                }
                let failed = failed?;
                let id = LaneId::Record(failed.offset);
                self.lanes.insert(id.clone(), Lane::new(failed));
                id
            }
            (id, _) => id,
        };
        let Entry::Occupied(mut entry) = self.lanes.entry(id) else {
            return None;
        };
        let lane = entry.get_mut();
        if !records.is_empty() && lane.failed > 0 {
            lane.failed = 0;
            self.changed.push(entry.key().clone());
        }
        let lane = entry.get_mut();
        for record in rest.into_iter().rev() {
            lane.records.push_front(record);
        }
        match (handled.failure, lane.records.front()) {
            (_, None) | (None, Some(_)) => {
                lane_goes_on(entry, &mut self.ready, &mut self.missing);
                None
            }
            (Some(failure), Some(record)) => {
                if lane.failed == 0 {
                    lane.failed_since = Some(Instant::now());
                }
                lane.failed += 1;
                lane.state = LaneState::Hopping;
                self.hopping += 1;
                Some(Failed {
                    record: record.clone(),
                    failed: lane.failed,
                    lane: entry.key().clone(),
                    failure,
                })
            }
        }
    }

    /// Lets a lane whose first record has failed wait until `due`; `None`: until an operator says so.
    pub(super) fn block(&mut self, id: LaneId, due: Option<Instant>, failure: Failure) {
        let is_full = self.is_full();
        if let Some(lane) = self.lanes.get_mut(&id)
            && let LaneState::Hopping = lane.state
        {
            self.hopping -= 1;
            lane.state = LaneState::Blocked { due, failure };
            self.changed.push(id.clone());
            if is_full {
                let (records, bytes) = lane.let_go(&id);
                self.away += records;
                self.bytes -= bytes;
            }
            self.blocked.extend(due.map(|due| (due, id)));
        }
    }

    /// Lets a blocked lane stand as one whose first record has just failed, if that is the record at `offset`.
    pub(super) fn unblock(&mut self, id: &LaneId, offset: i64) -> Option<Failed> {
        let lane = self.lanes.get_mut(id)?;
        let record = lane.records.front().filter(|record| record.offset == offset)?.clone();
        let LaneState::Blocked { due, failure } = &lane.state else {
            return None;
        };
        if let Some(due) = due {
            self.blocked.remove(&(*due, id.clone()));
        }
        let failed = Failed {
            lane: id.clone(),
            record,
            failed: lane.failed,
            failure: failure.clone(),
        };
        lane.state = LaneState::Hopping;
        self.hopping += 1;
        Some(failed)
    }

    /// Lets a lane whose first record has failed try it again at once.
    pub(super) fn retry(&mut self, id: LaneId) {
        if let Some(lane) = self.lanes.get_mut(&id)
            && let LaneState::Hopping = lane.state
        {
            self.hopping -= 1;
            self.go_on(id);
        }
    }

    /// The first record of a lane has failed and stands elsewhere now, or is passed over: the lane goes on behind it.
    pub(super) fn pass(&mut self, id: LaneId) {
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        let LaneState::Hopping = lane.state else { return };
        self.hopping -= 1;
        let Some(record) = lane.records.pop_front() else { return };
        lane.failed = 0;
        self.changed.push(id.clone());
        self.bytes -= size_bytes(&record);
        self.offsets.complete(record.offset);
        self.go_on(id);
    }

    /// Lets go, of the keys that stand still, all but the first record.
    pub(super) fn let_go(&mut self) {
        for (id, lane) in &mut self.lanes {
            let (records, bytes) = lane.let_go(id);
            self.away += records;
            self.bytes -= bytes;
        }
    }

    /// The offset from which to read again what was let go and is wanted now: at `position` or behind it, else the first.
    pub(super) fn missing_from(&self, position: i64) -> Option<i64> {
        let behind = self.missing.range(position..).next();
        behind.or(self.missing.first_key_value()).map(|(offset, _)| *offset)
    }

    /// Whether anything was let go and is not back.
    pub(super) fn has_let_go(&self) -> bool {
        self.away > 0
    }

    /// Takes back what was let go. `from`: what the log still has from there up to the end of the batch is in the batch.
    /// Returns how many records the log no longer has.
    pub(super) fn take_back(&mut self, from: i64, batch: Batch) -> usize {
        let end = batch.next_offset.0;
        let mut gone = Vec::new();
        for record in batch.records {
            let Some(key) = &record.key else { continue };
            let id = LaneId::Key(key.clone());
            let Some(lane) = self.lanes.get_mut(&id) else { continue };
            if lane.let_go.is_empty()
                || lane.records.len() >= TAKEN_BACK_RECORDS
                || matches!(lane.state, LaneState::Blocked { .. } | LaneState::Hopping)
            {
                continue;
            }
            if let LaneState::Missing = lane.state
                && let Some(first) = lane.let_go.front()
            {
                self.missing.remove(first);
            }
            while let Some(offset) = lane.let_go.front().copied()
                && (from..record.offset).contains(&offset)
            {
                lane.let_go.pop_front();
                gone.push(offset);
            }
            if lane.let_go.front() == Some(&record.offset) {
                lane.let_go.pop_front();
                self.away -= 1;
                self.bytes += size_bytes(&record);
                lane.records.push_back(record);
            }
            if let LaneState::Missing = lane.state {
                self.go_on(id);
            }
        }
        while let Some((&first, _)) = self.missing.range(from..end).next()
            && let Some(id) = self.missing.remove(&first)
        {
            if let Some(lane) = self.lanes.get_mut(&id) {
                while let Some(offset) = lane.let_go.pop_front_if(|offset| (from..end).contains(offset)) {
                    gone.push(offset);
                }
            }
            self.go_on(id);
        }
        self.away -= gone.len();
        for offset in &gone {
            self.offsets.complete(*offset);
        }
        gone.len()
    }

    /// A lane of which nothing is in hand goes on with its next record, if it has one.
    fn go_on(&mut self, id: LaneId) {
        if let Entry::Occupied(entry) = self.lanes.entry(id) {
            lane_goes_on(entry, &mut self.ready, &mut self.missing);
        }
    }

    /// Whether failures of a lane are passed over.
    pub(super) fn is_ignored(&self, id: &LaneId) -> bool {
        !self.ignored.is_empty() && (self.ignored.contains_key(id) || self.ignored.contains_key(&LaneId::Partition))
    }

    /// From which offset on failures of exactly this lane are passed over.
    pub(super) fn ignored_since(&self, id: &LaneId) -> Option<i64> {
        self.ignored.get(id).copied()
    }

    /// Passes failures of a lane over, or no longer. Says whether it was so before.
    pub(super) fn set_ignored(&mut self, id: LaneId, since: Option<i64>) -> bool {
        self.changed.push(id.clone());
        let before = match since {
            Some(since) => self.ignored.insert(id, since),
            None => self.ignored.remove(&id),
        };
        before.is_some()
    }

    /// Takes over what the owner before knew of a record. It waits on, unless it is done already.
    pub(super) fn restore(&mut self, offset: i64, restored: Restored) {
        if !self.offsets.is_done(offset) {
            self.restored.insert(offset, restored);
            // It may have come in among those without order.
            if let Some(index) = self.loose.iter().position(|record| record.offset == offset)
                && let Some(record) = self.loose.remove(index)
            {
                self.lanes.insert(LaneId::Record(offset), Lane::new(record));
                self.ready.push_back(LaneId::Record(offset));
            }
        }
    }

    /// Whether a record that the owner before had blocked has not come to its turn here.
    pub(super) fn expects(&self, offset: i64) -> bool {
        self.restored.contains_key(&offset)
    }

    /// The lanes that were blocked, or no longer are, since this was called last.
    pub(super) fn take_changed(&mut self) -> Vec<LaneId> {
        std::mem::take(&mut self.changed)
    }

    /// The lane that operators mean by a place, in which they have seen the record at `offset`.
    pub(super) fn lane_of(&self, place: &Place, offset: i64) -> LaneId {
        match (self.order, place.key.as_ref().and_then(Key::bytes)) {
            (ProcessingOrder::Partition, _) => LaneId::Partition,
            (ProcessingOrder::Key, Some(key)) => LaneId::Key(key.into()),
            (ProcessingOrder::Key, None) | (ProcessingOrder::Unordered, _) => LaneId::Record(offset),
        }
    }

    /// What to commit, if that is not what was committed last and all that is done can be told.
    pub(super) fn committable(&self) -> Option<Mark> {
        let (metadata, is_all) = self.offsets.metadata();
        let offset = CommittedOffset {
            next_offset: self.offsets.committable(),
            metadata,
        };
        (Some(&offset) != self.committed.as_ref() && (is_all || !self.exact)).then(|| Mark {
            partition: self.name.clone(),
            epoch: self.epoch,
            offset,
        })
    }

    /// Takes note of what was committed.
    pub(super) fn committed(&mut self, offset: CommittedOffset) {
        self.committed = Some(offset);
    }

    /// Adds or takes away a reason for pausing. Says whether that changed something.
    pub(super) fn set_paused(&mut self, reason: PauseReason, paused: bool) -> bool {
        let changed = match paused {
            true => self.pauses.insert(reason),
            false => self.pauses.remove(&reason),
        };
        self.stop.store(self.is_stopped(), Ordering::Relaxed);
        changed
    }

    /// Whether nothing may be handed to the handler.
    fn is_stopped(&self) -> bool {
        self.pauses.iter().any(|reason| *reason != PauseReason::Full)
    }

    /// Whether it reads nothing more for now.
    pub(super) fn is_full(&self) -> bool {
        self.pauses.contains(&PauseReason::Full)
    }

    pub(super) fn is_restoring(&self) -> bool {
        self.pauses.contains(&PauseReason::Restoring)
    }

    /// Ends what is under way after the record in hand.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(super) fn describe(&self) -> PartitionState {
        let mut blocked: Vec<_> = self.lanes.keys().filter_map(|id| self.blocked(id)).collect();
        blocked.sort_by_key(|blocked| blocked.offset);
        PartitionState {
            partition: self.name.clone(),
            committed: self.committed.as_ref().map(|committed| committed.next_offset),
            done: self.offsets.committable(),
            read: self.offsets.position(),
            open: self.offsets.open(),
            open_bytes: self.bytes,
            pauses: self.pauses.iter().copied().collect(),
            blocked,
        }
    }

    /// How a lane is blocked, if it is.
    pub(super) fn blocked(&self, id: &LaneId) -> Option<BlockedLane> {
        let lane = self.lanes.get(id)?;
        let LaneState::Blocked { due, failure } = &lane.state else {
            return None;
        };
        let now = Instant::now();
        Some(BlockedLane {
            key: match id {
                LaneId::Key(key) => Some(key.clone()),
                LaneId::Partition | LaneId::Record(_) | LaneId::Loose => None,
            },
            offset: lane.records.front()?.offset,
            attempts: self.attempts_before + lane.failed,
            kind: failure.kind,
            message: failure.message.clone(),
            since: lane.failed_since.map_or(Duration::ZERO, |since| now - since),
            due_in: due.map(|due| due - now),
            waiting: lane.records.len() - 1 + lane.let_go.len(),
        })
    }

    /// Bytes of the records that are not done.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Records that are not done.
    pub(super) fn open(&self) -> usize {
        self.offsets.open()
    }

    /// Whether none of its records is being handled or on its way to another topic.
    pub(super) fn is_idle(&self) -> bool {
        self.running == 0 && self.hopping == 0
    }
}

impl Lane {
    fn new(record: Record) -> Self {
        Self {
            records: VecDeque::from([record]),
            let_go: VecDeque::new(),
            state: LaneState::Ready,
            failed: 0,
            failed_since: None,
        }
    }

    /// Lets go all but the first record if this is a key that stands still. Returns how many records and bytes that were.
    fn let_go(&mut self, id: &LaneId) -> (usize, usize) {
        let (LaneId::Key(_), LaneState::Blocked { .. }) = (id, &self.state) else {
            return (0, 0);
        };
        let (mut records, mut bytes) = (0, 0);
        for record in self.records.drain(1..).rev() {
            records += 1;
            bytes += size_bytes(&record);
            self.let_go.push_front(record.offset);
        }
        (records, bytes)
    }
}

impl Run {
    /// Whether the next record may be handled.
    pub(super) fn may_go_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

/// Puts a lane of which nothing is in hand where it belongs; one that has nothing left goes.
fn lane_goes_on(
    mut entry: OccupiedEntry<'_, LaneId, Lane>,
    ready: &mut VecDeque<LaneId>,
    missing: &mut BTreeMap<i64, LaneId>,
) {
    let lane = entry.get_mut();
    if !lane.records.is_empty() {
        lane.state = LaneState::Ready;
        ready.push_back(entry.key().clone());
    } else if let Some(first) = lane.let_go.front().copied() {
        lane.state = LaneState::Missing;
        missing.insert(first, entry.key().clone());
    } else {
        entry.remove();
    }
}

fn size_bytes(record: &Record) -> usize {
    record.size_bytes() + RECORD_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;
    use crate::log::{Headers, NextOffset};
    use crate::patterns::consumer::handler::FailureKind;
    use crate::patterns::dead_letter::header;

    /// What the log said the time was when the first record came.
    const LONG_AGO_MS: i64 = 1_700_000_000_000;
    const DELAY: Duration = Duration::from_secs(3600);

    /// What happens to a run: so many of its records are done, and then one fails for now, or none does.
    fn end(partition: &mut Partition, run: Run, done: usize) {
        let failure = (done < run.records.len()).then(|| Failure {
            kind: FailureKind::Retriable,
            message: String::new(),
        });
        let handled = Handled {
            done,
            failure: failure.clone(),
            sent: Vec::new(),
        };
        let failed = partition.ended(Ended { run, handled });
        if let Some((failed, failure)) = failed.zip(failure) {
            partition.block(failed.lane, Some(Instant::now() + DELAY), failure);
        }
    }

    fn keyed(offset: i64) -> Record {
        Record {
            key: Some(offset.to_string().into()),
            ..record(offset, LONG_AGO_MS)
        }
    }

    fn source_partition(order: ProcessingOrder) -> Partition {
        source_partition_from(order, CommittedOffset::from(NextOffset(0)))
    }

    fn source_partition_from(order: ProcessingOrder, start: CommittedOffset) -> Partition {
        Partition::new(TopicPartition::new("orders", 0), 1, order, 100, 0, true, start)
    }

    fn feed(partition: &mut Partition, records: Vec<Record>) {
        let next_offset = NextOffset(records.last().map_or(0, |record| record.offset + 1));
        let batch = Batch {
            partition: partition.name.clone(),
            records,
            next_offset,
            caught_up: true,
        };
        partition.take_in(batch, None, Instant::now());
    }

    fn retry_partition() -> Partition {
        let start = CommittedOffset::from(NextOffset(0));
        let name = TopicPartition::new("orders.billing.retry.1h", 0);
        Partition::new(name, 1, ProcessingOrder::Unordered, 100, 1, false, start)
    }

    fn record(offset: i64, timestamp_ms: i64) -> Record {
        Record {
            offset,
            timestamp_ms,
            key: None,
            value: None,
            headers: Headers::new(),
        }
    }

    fn take_in(partition: &mut Partition, records: Vec<Record>, caught_up: bool, now: Instant) {
        let next_offset = NextOffset(records.last().map_or(0, |record| record.offset + 1));
        let batch = Batch {
            partition: partition.name.clone(),
            records,
            next_offset,
            caught_up,
        };
        partition.take_in(batch, Some(DELAY), now);
        partition.wake(now);
    }

    fn next(partition: &mut Partition) -> Vec<i64> {
        let run = partition.next_run(1);
        run.map_or_else(Vec::new, |run| run.records.iter().map(|record| record.offset).collect())
    }

    #[test]
    fn more_gaps_than_a_commit_can_tell_are_filled_before_anything_is_begun() {
        const RECORDS: i64 = 5000;
        let mut partition = source_partition(ProcessingOrder::Key);
        feed(&mut partition, (0..RECORDS).map(keyed).collect());
        let is_poisoned = |run: &Run| run.records[0].offset % 2 == 1;
        while let Some(run) = partition.next_run(1) {
            let done = usize::from(!is_poisoned(&run));
            end(&mut partition, run, done);
        }
        let mark = partition.committable().expect("all that is done can be told");
        assert_eq!(mark.offset.next_offset, NextOffset(1));
        let waiting = partition.describe().blocked.len();
        assert!((MOST_RUNS / 2..2 * MOST_RUNS).contains(&waiting), "{waiting}");

        // The next owner fills them too.
        let mut next = source_partition_from(ProcessingOrder::Key, mark.offset);
        feed(&mut next, (1..RECORDS).map(keyed).collect());
        assert!(next.is_crowded());
        while let Some(run) = next.next_run(1) {
            end(&mut next, run, 1);
        }
        assert_eq!(next.open(), 0);

        partition.wake(Instant::now() + DELAY);
        // One by one, the last first.
        let mut runs: Vec<Run> = std::iter::from_fn(|| partition.next_run(1)).collect();
        assert!(runs.len() >= waiting, "all of them may try again");
        while let Some(run) = runs.pop().or_else(|| partition.next_run(1)) {
            end(&mut partition, run, 1);
        }
        let mark = partition.committable().expect("all is done");
        assert_eq!((mark.offset.next_offset.0, partition.open()), (RECORDS, 0));
    }

    #[test]
    fn without_order_gaps_are_filled_though_every_record_fails_and_handlers_end_in_any_order() {
        const RECORDS: i64 = 5000;
        const WORKERS: usize = 32;
        const WAITING: usize = 250;
        let mut random = StdRng::seed_from_u64(5);
        let mut partition = source_partition(ProcessingOrder::Unordered);
        feed(&mut partition, (0..RECORDS).map(keyed).collect());
        let mut runs = VecDeque::new();
        let mut was_crowded = false;
        while partition.open() > 0 {
            let room = WAITING.saturating_sub(runs.len());
            runs.extend(std::iter::from_fn(|| partition.next_run(WORKERS)).take(room));
            let at_work = WORKERS.min(runs.len());
            assert!(at_work > 0, "{} records wait for nothing", partition.open());
            let run: Run = runs.remove(random.random_range(0..at_work)).expect("one of them");
            // It leaves for another topic.
            let failure = Failure {
                kind: FailureKind::Retriable,
                message: String::new(),
            };
            let handled = Handled {
                failure: Some(failure),
                ..Handled::default()
            };
            let failed = partition.ended(Ended { run, handled }).expect("it has failed");
            partition.pass(failed.lane);
            was_crowded |= partition.is_crowded();
        }
        assert!(was_crowded, "this makes many gaps");
        let mark = partition.committable().expect("all is done");
        assert_eq!(mark.offset.next_offset, NextOffset(RECORDS));
    }

    #[test]
    fn what_the_owner_before_had_blocked_waits_though_it_comes_with_others() {
        let mut partition = source_partition(ProcessingOrder::Partition);
        let now = Instant::now();
        let restored = Restored {
            failed: 2,
            since: Some(now),
            due: now + DELAY,
            failure: Failure {
                kind: FailureKind::Retriable,
                message: String::new(),
            },
        };
        partition.restore(3, restored);
        feed(&mut partition, (0..6).map(keyed).collect());
        let run = partition.next_run(1).expect("what stands before it");
        assert_eq!(run.records.len(), 3);
        end(&mut partition, run, 3);
        assert!(partition.next_run(1).is_none());
        partition.wake(now + DELAY);
        let run = partition.next_run(1).expect("it is due");
        assert_eq!((run.records[0].offset, run.attempts.first), (3, 3));
    }

    #[test]
    fn what_has_waited_before_it_came_here_goes_as_soon_as_the_log_says_so() {
        let mut partition = retry_partition();
        let now = Instant::now();
        take_in(&mut partition, vec![record(0, LONG_AGO_MS)], false, now);
        assert!(partition.asks_for_time());
        assert!(!partition.asks_for_time(), "once");
        let wait = partition.wake_at().expect("it waits") - now;
        assert_eq!(wait, DELAY + Duration::from_millis(1), "it may just have been written");
        partition.hear_time(LONG_AGO_MS + millis(DELAY), now);
        partition.wake(now);
        assert_eq!(next(&mut partition), [0i64; 0], "stamps are cut to milliseconds");
        let at = partition.wake_at().expect("it waits");
        assert_eq!(at - now, Duration::from_millis(1));
        partition.wake(at);
        assert_eq!(next(&mut partition), [0]);
    }

    #[test]
    fn a_later_record_tells_the_time_of_an_earlier_one_and_one_for_that_alone_is_passed_over() {
        let mut partition = retry_partition();
        let now = Instant::now();
        let mut clock = record(2, LONG_AGO_MS + 2 * millis(DELAY));
        clock.headers.push(header::CLOCK, "");
        let later = record(1, LONG_AGO_MS + millis(DELAY));
        take_in(&mut partition, vec![record(0, LONG_AGO_MS), later, clock], false, now);
        assert_eq!(next(&mut partition), [0]);
        partition.wake(now + Duration::from_millis(1));
        assert_eq!(next(&mut partition), [1]);
        assert_eq!((partition.open(), partition.wake_at()), (2, None), "nothing is held");
    }

    #[test]
    fn what_comes_after_the_end_was_reached_is_fresh() {
        let mut partition = retry_partition();
        let now = Instant::now();
        take_in(&mut partition, Vec::new(), true, now);
        take_in(&mut partition, vec![record(0, LONG_AGO_MS)], true, now);
        assert!(!partition.asks_for_time());
        assert_eq!(partition.wake_at(), Some(now + DELAY + Duration::from_millis(1)));
    }
}
