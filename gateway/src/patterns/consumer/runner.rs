//! The task behind a consumer: the only one that knows the partitions.
//!
//! It takes what the group member brings, hands runs to the pool, notes what became of them, and commits. Nothing here waits for a
//! handler, a delivery or a commit: they are [`Operation`]s beside the loop, so that no rebalance, command or other partition
//! waits for them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::commit::{self, Committer, Mark, Origin, Outcome};
use super::handle::{ConsumerHandle, ConsumerState, Request, WAITING_REQUESTS};
use super::handler::{AnyHandler, Failure, FailureKind};
use super::limit::DeadLetterCount;
use super::members::Members;
use super::operators::{Operators, Told};
use super::partition::{Ended, Failed, LaneId, Partition, PauseReason, Restored};
use super::pool::Pool;
use super::reread::{Reread, Rereader};
use super::routes::{Route, Routes};
use super::{ConsumerBuilder, DeliveryGuarantee};
use crate::log::{
    self, Appended, Batch, CommittedOffset, GroupEvent, Log, Producer, ProducerRecord, ProducerSettings, Record,
    StartAt, TopicPartition,
};
use crate::patterns::control::{Action, BlockedState, Command};
use crate::patterns::hop::Why;
use crate::patterns::retry::clock_record;
use crate::patterns::{Error, LOOK_EVERY, MISSED_LOOKS, now_ms};

/// Runs that wait for a worker at most; the others wait in their partitions.
const WAITING_RUNS: usize = 1000;

/// Records of one partition that are not done at most. Behind it the partition is paused: one that stays blocked lets others go
/// by so far only.
const OPEN_RECORDS: usize = 100_000;

/// First and longest wait before a record that was not written is written again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// How long beyond its handlers a partition that leaves waits for the commit of what they have done.
const COMMIT_PATIENCE: Duration = Duration::from_secs(5);

pub(super) async fn start(
    log: Log,
    settings: Arc<ConsumerBuilder>,
    handler: Box<dyn AnyHandler>,
) -> Result<ConsumerHandle, Error> {
    let mut looks = 0;
    let Joined {
        routes,
        producer,
        operators,
        committer,
        members,
    } = loop {
        match join(&log, &settings).await {
            Err(Error::MissingTopics(_) | Error::Log(log::Error::UnknownTopic(_))) if looks < MISSED_LOOKS => {
                looks += 1
            }
            joined => break joined?,
        }
        sleep(LOOK_EVERY).await;
    };
    let (requests, asked) = mpsc::channel(WAITING_REQUESTS);
    let stopping = CancellationToken::new();
    let for_handlers = (!committer.is_transactional()).then(|| producer.clone());
    let mut runner = Runner {
        pool: Pool::new(settings.pool, handler, for_handlers),
        dead_letters: DeadLetterCount::new(settings.dead_letter_limit),
        operators,
        rereader: Rereader::new(&log),
        log: log.clone(),
        settings,
        routes: Arc::new(routes),
        producer,
        committer,
        members,
        partitions: HashMap::new(),
        last_epoch: 0,
        paused: Paused::default(),
        operations: FuturesUnordered::new(),
        drains: Vec::new(),
        stopping: stopping.clone(),
    };
    runner.look_for_topics();
    let runner = tokio::spawn(runner.run(asked));
    Ok(ConsumerHandle::new(log, requests, stopping, runner))
}

/// What a consumer needs of the log.
struct Joined {
    routes: Routes,
    producer: Producer,
    operators: Operators,
    committer: Committer,
    members: Members,
}

async fn join(log: &Log, settings: &ConsumerBuilder) -> Result<Joined, Error> {
    let topics = settings.subscription.names(log).await?;
    let routes = Routes::new(log, &settings.group, &topics, &settings.retry).await?;
    let producer = log.producer(ProducerSettings::default()).await?;
    let operators = Operators::new(log, &settings.group, producer.clone()).await?;
    let committer = Committer::new(log, settings).await?;
    // The runner lets go by itself; this is for one that hangs.
    let release_timeout = settings.drain_timeout + 2 * COMMIT_PATIENCE;
    let members = Members::join(log, settings, &routes, release_timeout).await?;
    Ok(Joined {
        routes,
        producer,
        operators,
        committer,
        members,
    })
}

struct Runner {
    log: Log,
    settings: Arc<ConsumerBuilder>,
    routes: Arc<Routes>,
    pool: Pool,
    /// For records that go to another topic outside a transaction.
    producer: Producer,
    committer: Committer,
    operators: Operators,
    dead_letters: DeadLetterCount,
    members: Members,
    rereader: Rereader,
    partitions: HashMap<TopicPartition, Assigned>,
    last_epoch: u64,
    paused: Paused,
    operations: FuturesUnordered<BoxFuture<'static, Operation>>,
    /// Who waits until nothing is in hand.
    drains: Vec<oneshot::Sender<()>>,
    stopping: CancellationToken,
}

/// A partition with what the runner adds to it.
struct Assigned {
    state: Partition,
    route: Arc<Route>,
    leaving: Option<Leaving>,
    /// How far the blocked topic has to be read before what stood still here is known; `None`: that is not known yet.
    restored_at: Option<i64>,
    /// Ends what goes on for the partition beside the runner.
    gone: CancellationToken,
}

/// How a partition leaves.
struct Leaving {
    /// Until when its handlers may go on.
    by: Instant,
    /// Whether the group waits for it.
    release: bool,
    /// When its handlers had finished, or their time was over.
    idle_at: Option<Instant>,
}

/// What the application has paused, whoever owns it now.
#[derive(Default)]
struct Paused {
    all: bool,
    /// Those with which it is the other way round.
    except: HashSet<TopicPartition>,
}

/// Something that went on beside the loop and has ended.
pub(super) enum Operation {
    Committed(Outcome),
    /// The first record of a lane is on another topic.
    Hopped(TopicPartition, u64, LaneId),
    /// What time it was in a partition of a retry topic.
    Time(TopicPartition, u64, i64),
    /// Where the blocked topic ended when the partition was assigned.
    BlockedEnd(TopicPartition, u64, i64),
    /// Records that a partition had let go are here again.
    Reread(Reread),
    /// What has changed about blocked places is written.
    Published,
    /// It was looked for topics that match: the routes with them, if there are new ones.
    Looked(Option<Routes>),
    /// Nothing follows from it.
    Abandoned,
}

impl Runner {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>) -> Result<(), Error> {
        let stopping = self.stopping.clone();
        let mut stopped = false;
        loop {
            self.dispatch();
            self.flow().await?;
            self.reread();
            self.commit();
            self.publish();
            self.let_go().await?;
            self.answer_drains();
            if stopped && self.partitions.is_empty() {
                return Ok(());
            }
            let may_take = self.committer.may_take();
            let wake_at = self.wake_at();
            tokio::select! {
                () = stopping.cancelled(), if !stopped => {
                    stopped = true;
                    self.leave_all();
                }
                event = self.members.next(), if may_take => {
                    self.event(event).await?;
                    if stopped {
                        self.leave_all();
                    }
                }
                ended = self.pool.ended() => for ended in ended {
                    self.ended(ended);
                },
                told = self.operators.next() => self.told(told)?,
                Some(operation) = self.operations.next() => self.operation(operation).await?,
                Some(request) = requests.recv() => self.obey(request),
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => self.wake(),
            }
        }
    }

    async fn event(&mut self, event: log::Result<GroupEvent>) -> Result<(), Error> {
        match event {
            Ok(GroupEvent::Assigned(partitions)) => {
                // A pause that was asked for in an assignment before this one may have come after it.
                let names = partitions.iter().map(|(partition, _)| partition.clone());
                self.members.resume(names.collect()).await?;
                for (partition, start) in partitions {
                    self.assign(partition, start);
                }
            }
            Ok(GroupEvent::Records(batch)) => {
                // Of a partition that leaves nothing more is begun.
                let assigned = self.partitions.get(&batch.partition);
                if let Some(assigned) = assigned.filter(|assigned| assigned.leaving.is_none()) {
                    match self.settings.guarantee {
                        DeliveryGuarantee::AtMostOnce => self.committer.commit_first(assigned.state.epoch, batch),
                        DeliveryGuarantee::AtLeastOnce | DeliveryGuarantee::ExactlyOnce => self.feed(batch),
                    }
                }
            }
            Ok(GroupEvent::Revoked(partitions)) => {
                tracing::debug!(group = self.settings.group, ?partitions, "partitions revoked");
                let (known, unknown): (Vec<_>, Vec<_>) = partitions
                    .into_iter()
                    .partition(|partition| self.partitions.contains_key(partition));
                for partition in known {
                    self.leave(&partition, true);
                }
                self.members.release(unknown).await?;
            }
            Ok(GroupEvent::Lost(partitions)) => {
                tracing::warn!(group = self.settings.group, ?partitions, "partitions lost");
                for partition in partitions {
                    self.forget(&partition);
                }
            }
            Err(error) if error.is_retriable() => {
                tracing::warn!(group = self.settings.group, %error, "the group cannot be reached; trying on");
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn assign(&mut self, partition: TopicPartition, start: CommittedOffset) {
        tracing::debug!(group = self.settings.group, %partition, offset = start.next_offset.0, "partition assigned");
        self.forget(&partition);
        let Some(route) = self.routes.of(&partition.topic) else {
            tracing::error!(group = self.settings.group, %partition, "a partition of a topic that was not asked for");
            return;
        };
        self.last_epoch += 1;
        let mut state = Partition::new(
            partition.clone(),
            self.last_epoch,
            self.settings.order,
            self.settings.run_records,
            route.attempts_before,
            self.settings.guarantee != DeliveryGuarantee::AtLeastOnce,
            start,
        );
        state.set_paused(PauseReason::User, self.paused.contains(&partition));
        state.set_paused(PauseReason::DeadLetters, self.dead_letters.is_reached());
        state.set_paused(PauseReason::Restoring, true);
        let gone = CancellationToken::new();
        let (log, blocked) = (self.log.clone(), self.operators.blocked_partition());
        let end = move || {
            let (log, blocked) = (log.clone(), blocked.clone());
            async move { log.offset(&blocked, StartAt::End).await }.boxed()
        };
        let end = blocked_end(end, partition.clone(), self.last_epoch, gone.clone());
        self.operations.push(end.boxed());
        let assigned = Assigned {
            state,
            route,
            leaving: None,
            restored_at: None,
            gone,
        };
        self.partitions.insert(partition, assigned);
        self.committer.touch();
    }

    /// Looks for further topics that match, after a while.
    fn look_for_topics(&mut self) {
        if self.settings.subscription.pattern.is_none() {
            return;
        }
        let (log, settings, routes) = (self.log.clone(), self.settings.clone(), self.routes.clone());
        let looking = async move {
            sleep(settings.subscription.interval).await;
            let found = async {
                let topics = settings.subscription.names(&log).await?;
                routes.with(&log, &settings.group, &topics, &settings.retry).await
            };
            Operation::Looked(found.await.unwrap_or_else(|error| {
                tracing::warn!(group = settings.group, %error, "it is not known whether further topics match; trying on");
                None
            }))
        };
        self.operations.push(looking.boxed());
    }

    fn feed(&mut self, batch: Batch) {
        if let Some(assigned) = self.partitions.get_mut(&batch.partition) {
            let held_for = assigned.route.held_for;
            let now = Instant::now();
            let partition = batch.partition.clone();
            assigned.state.take_in(batch, held_for, now);
            assigned.state.wake(now);
            self.committer.touch();
            if assigned.state.asks_for_time() {
                let (epoch, gone) = (assigned.state.epoch, assigned.gone.clone());
                let record = clock_record(&partition);
                let told = move |appended: Appended| Operation::Time(partition, epoch, appended.timestamp_ms);
                self.operations
                    .push(write(self.producer.clone(), record, gone, told).boxed());
            }
        }
    }

    /// Hands runs to the pool, one of each partition in turn.
    fn dispatch(&mut self) {
        let has_room = self.committer.has_room();
        let mut room = WAITING_RUNS.saturating_sub(self.pool.waiting());
        let mut runs = Vec::new();
        loop {
            let before = runs.len();
            for assigned in self.partitions.values_mut() {
                if room == 0 {
                    break;
                }
                // What a crowded one still gives makes room.
                if !has_room && !assigned.state.is_crowded() {
                    continue;
                }
                if let Some(run) = assigned.state.next_run(self.settings.pool) {
                    runs.push(run);
                    room -= 1;
                }
            }
            if runs.len() == before {
                break;
            }
        }
        if !runs.is_empty() {
            self.pool.start(runs);
        }
    }

    /// Pauses partitions of which enough waits, and resumes those of which half of it is done.
    async fn flow(&mut self) -> Result<(), Error> {
        let most = self.settings.buffer_bytes;
        let (mut pause, mut resume) = (Vec::new(), Vec::new());
        for (partition, assigned) in &mut self.partitions {
            let state = &mut assigned.state;
            if state.bytes() >= most && !state.is_full() {
                state.let_go();
            }
            let full = state.bytes() >= most || state.open() >= OPEN_RECORDS;
            let roomy = state.bytes() <= most / 2 && state.open() <= OPEN_RECORDS / 2;
            if full && state.set_paused(PauseReason::Full, true) {
                pause.push(partition.clone());
            } else if roomy && state.set_paused(PauseReason::Full, false) {
                resume.push(partition.clone());
            }
        }
        if !pause.is_empty() {
            self.members.pause(pause).await?;
        }
        if !resume.is_empty() {
            self.members.resume(resume).await?;
        }
        Ok(())
    }

    /// Has read again what partitions have let go and want back.
    fn reread(&mut self) {
        let partitions = self.partitions.values().map(|assigned| &assigned.state);
        self.operations.extend(self.rereader.begin(partitions));
    }

    fn wake_at(&self) -> Option<Instant> {
        let partitions = self.partitions.values();
        let due = partitions.clone().filter_map(|assigned| assigned.state.wake_at());
        let leave = partitions.filter_map(|assigned| Some(assigned.leaving.as_ref()?.wake_at()));
        let own = self.committer.wake_at().into_iter().chain(self.operators.wake_at());
        due.chain(leave).chain(own).min()
    }

    fn wake(&mut self) {
        let now = Instant::now();
        for assigned in self.partitions.values_mut() {
            assigned.state.wake(now);
        }
    }

    fn ended(&mut self, mut ended: Ended) {
        let partition = ended.run.partition.clone();
        // Of an earlier assignment: whoever owns the partition now does it again.
        let assigned = self.partitions.get_mut(&partition);
        let Some(assigned) = assigned.filter(|assigned| assigned.state.epoch == ended.run.epoch) else {
            return;
        };
        let sent = std::mem::take(&mut ended.handled.sent);
        self.committer.send(&ended.run, sent);
        self.committer.touch();
        self.dead_letters.done(ended.handled.done);
        let failed = assigned.state.ended(ended);
        self.operators.changed(&partition, assigned.state.take_changed());
        if let Some(failed) = failed {
            self.failed(&partition, failed);
        }
    }

    /// Decides what becomes of a failed record.
    fn failed(&mut self, partition: &TopicPartition, failed: Failed) {
        let Some(assigned) = self.partitions.get_mut(partition) else {
            return;
        };
        let group = &self.settings.group;
        let attempts = assigned.route.attempts_before + failed.failed;
        let (offset, reason) = (failed.record.offset, &failed.failure.message);
        let retriable = failed.failure.kind.is_retriable();
        if assigned.state.is_ignored(&failed.lane) {
            tracing::warn!(group, %partition, offset, attempts, "a record failed and is passed over, as told: {reason}");
            self.pass(partition, failed.lane);
            return;
        }
        if retriable && let Some(delay) = assigned.route.delay(failed.failed) {
            tracing::warn!(
                group, %partition, offset, attempts, delay_ms = delay.as_millis() as u64,
                "a record failed and is tried again: {reason}"
            );
            self.block(partition, failed.lane, Some(Instant::now() + delay), failed.failure);
            return;
        }
        if !assigned.route.is_dead_letter(retriable) || self.dead_letters.add() {
            self.leave_topic(partition, &failed, retriable);
            return;
        }
        self.stop_at_limit();
        let message = format!("no further dead letters without an operator: {reason}");
        let failure = Failure {
            message,
            ..failed.failure
        };
        self.block(partition, failed.lane, None, failure);
    }

    /// Lets a record that has failed go to its next retry topic, or to the dead letters.
    fn leave_topic(&mut self, partition: &TopicPartition, failed: &Failed, retriable: bool) {
        let Some(assigned) = self.partitions.get(partition) else {
            return;
        };
        let attempts = assigned.route.attempts_before + failed.failed;
        let (route, epoch, gone) = (assigned.route.clone(), assigned.state.epoch, assigned.gone.clone());
        let record = self.hop_record(&route, partition, &failed.record, attempts, &failed.failure, retriable);
        if self.committer.is_transactional() {
            self.committer.hop(partition, epoch, record);
            self.pass(partition, failed.lane.clone());
            return;
        }
        let hopped = Operation::Hopped(partition.clone(), epoch, failed.lane.clone());
        let done = |_| hopped;
        let hopping = write(self.producer.clone(), record, gone, done);
        self.operations.push(hopping.boxed());
    }

    /// The record as it leaves for the topic that its failure leads to.
    fn hop_record(
        &self,
        route: &Route,
        partition: &TopicPartition,
        record: &Record,
        attempts: u32,
        failure: &Failure,
        retriable: bool,
    ) -> ProducerRecord {
        let group = &self.settings.group;
        let hop = route.hop(retriable);
        let reason = &failure.message;
        tracing::warn!(
            group, %partition, offset = record.offset, attempts, to = hop.topic(),
            "a record failed and leaves: {reason}"
        );
        let why = Why {
            group,
            attempts,
            kind: failure.kind.as_str(),
            message: reason,
        };
        hop.record(partition, record, route.is_source, &why)
    }

    async fn operation(&mut self, operation: Operation) -> Result<(), Error> {
        match operation {
            Operation::Hopped(partition, epoch, lane) => {
                if self.of_epoch(&partition, epoch).is_some() {
                    self.pass(&partition, lane);
                }
            }
            Operation::Time(partition, epoch, stamp_ms) => {
                if let Some(assigned) = self.of_epoch(&partition, epoch) {
                    assigned.state.hear_time(stamp_ms, Instant::now());
                }
            }
            Operation::BlockedEnd(partition, epoch, end) => {
                if let Some(assigned) = self.of_epoch(&partition, epoch) {
                    assigned.restored_at = Some(end);
                    self.restore(&partition);
                }
            }
            Operation::Reread(mut reread) => {
                self.rereader.end(&mut reread);
                let assigned = self.of_epoch(&reread.partition, reread.epoch);
                if let Some(assigned) = assigned
                    && let Some((from, batch)) = reread.read
                {
                    let gone = assigned.state.take_back(from, batch);
                    self.committer.touch();
                    if gone > 0 {
                        let (group, partition) = (&self.settings.group, &reread.partition);
                        tracing::error!(
                            group, %partition, records = gone,
                            "records whose keys stood still are gone: compaction or retention has taken them"
                        );
                    }
                }
            }
            Operation::Looked(found) => {
                if let Some(routes) = found
                    && !self.stopping.is_cancelled()
                {
                    self.members.subscribe(&routes).await?;
                    self.routes = Arc::new(routes);
                }
                self.look_for_topics();
            }
            Operation::Published => self.operators.published(),
            Operation::Abandoned => {}
            Operation::Committed(outcome) => return self.committed(outcome),
        }
        Ok(())
    }

    /// The first record of a lane is done, or stands elsewhere.
    fn pass(&mut self, partition: &TopicPartition, lane: LaneId) {
        if let Some(assigned) = self.partitions.get_mut(partition) {
            assigned.state.pass(lane);
            self.operators.changed(partition, assigned.state.take_changed());
            self.committer.touch();
        }
    }

    fn block(&mut self, partition: &TopicPartition, lane: LaneId, due: Option<Instant>, failure: Failure) {
        if let Some(assigned) = self.partitions.get_mut(partition) {
            assigned.state.block(lane, due, failure);
            self.operators.changed(partition, assigned.state.take_changed());
        }
    }

    /// Too many have become dead letters: nothing is handled until an operator has looked.
    fn stop_at_limit(&mut self) {
        tracing::error!(
            group = self.settings.group,
            "the limit of dead letters is reached; nothing is handled until an operator has a record tried again"
        );
        for assigned in self.partitions.values_mut() {
            assigned.state.set_paused(PauseReason::DeadLetters, true);
        }
    }

    fn told(&mut self, told: log::Result<Told>) -> Result<(), Error> {
        match told {
            Ok(Told::Command(id, command)) => {
                let partition = TopicPartition::new(command.place.topic.as_str(), command.place.partition);
                if self.partitions.contains_key(&partition) {
                    let refused = self.carry_out(&partition, &command).err();
                    let Command { action, offset, by, .. } = &command;
                    tracing::info!(
                        group = self.settings.group, %partition, offset, ?action, by, ?refused, "an operator's command"
                    );
                    self.operations.extend(self.operators.answer(id, refused));
                }
            }
            Ok(Told::Table) => {
                let all: Vec<_> = self.partitions.keys().cloned().collect();
                for partition in all {
                    self.restore(&partition);
                }
            }
            Err(error) if error.is_retriable() => {
                tracing::warn!(group = self.settings.group, %error, "operators cannot be heard; trying on");
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Does what an operator asks for, or says why not.
    fn carry_out(&mut self, partition: &TopicPartition, command: &Command) -> Result<(), &'static str> {
        let Some(assigned) = self.partitions.get_mut(partition) else {
            return Err("the partition is no longer here");
        };
        let state = &mut assigned.state;
        if assigned.leaving.is_some() || state.is_restoring() {
            return Err("the partition is moving to another member");
        }
        let lane = state.lane_of(&command.place, command.offset);
        let scope = match &lane {
            // What has no order has no later either: the whole partition is meant.
            LaneId::Record(_) => LaneId::Partition,
            lane => lane.clone(),
        };
        if command.action == Action::Block {
            let was = state.set_ignored(scope, None);
            self.operators.changed(partition, state.take_changed());
            return was.then_some(()).ok_or("failures there are not passed over");
        }
        let Some(failed) = state.unblock(&lane, command.offset) else {
            return Err("the record at this offset is not blocked there");
        };
        match command.action {
            Action::Retry => {
                state.retry(lane);
                self.dead_letters.reset();
                for assigned in self.partitions.values_mut() {
                    assigned.state.set_paused(PauseReason::DeadLetters, false);
                }
            }
            Action::Ignore => {
                state.set_ignored(scope, Some(command.offset));
                self.pass(partition, lane);
            }
            Action::Skip => self.pass(partition, lane),
            Action::DeadLetter => self.leave_topic(partition, &failed, false),
            Action::Block => {}
        }
        Ok(())
    }

    /// Takes over what the owner before knew, when all of it has been read.
    fn restore(&mut self, partition: &TopicPartition) {
        let Some(assigned) = self.partitions.get_mut(partition) else {
            return;
        };
        if assigned.restored_at.is_none_or(|end| self.operators.position() < end) {
            return;
        }
        let state = &mut assigned.state;
        if state.is_restoring() {
            let (now_ms, now) = (now_ms(), Instant::now());
            let before = assigned.route.attempts_before;
            for (blocked, due) in self.operators.of(partition) {
                if blocked.state == BlockedState::Ignoring {
                    let lane = match state.lane_of(&blocked.place, blocked.offset) {
                        LaneId::Record(_) => LaneId::Partition,
                        lane => lane,
                    };
                    state.set_ignored(lane, Some(blocked.offset));
                    continue;
                }
                let wait = |ms: i64| Duration::from_millis(ms.try_into().unwrap_or(0));
                let restored = Restored {
                    failed: blocked.attempts.saturating_sub(before).max(1),
                    since: now.checked_sub(wait(now_ms.saturating_sub(blocked.since_ms))),
                    due,
                    failure: Failure {
                        kind: FailureKind::parse(&blocked.kind),
                        message: blocked.message,
                    },
                };
                state.restore(blocked.offset, restored);
            }
            state.set_paused(PauseReason::Restoring, false);
            state.take_changed();
        }
        self.operators.changed_by_others(state);
    }

    /// Writes what has changed about blocked places.
    fn publish(&mut self) {
        let partitions = &self.partitions;
        let publishing = self.operators.publish(|partition| {
            let assigned = partitions.get(partition)?;
            Some(&assigned.state)
        });
        self.operations.extend(publishing);
    }

    fn of_epoch(&mut self, partition: &TopicPartition, epoch: u64) -> Option<&mut Assigned> {
        let assigned = self.partitions.get_mut(partition)?;
        (assigned.state.epoch == epoch).then_some(assigned)
    }

    /// Begins a commit when it is time and there is something to commit.
    fn commit(&mut self) {
        let urgent = !self.drains.is_empty() || self.partitions.values().any(Assigned::waits_for_commit);
        if !self.committer.is_due(urgent) {
            return;
        }
        let partitions = self.partitions.values();
        let marks: Vec<Mark> = partitions
            .filter_map(|assigned| assigned.committable(self.settings.guarantee))
            .collect();
        if let Some(commit) = self.committer.begin(&self.members, marks) {
            self.operations.push(commit.map(Operation::Committed).boxed());
        }
    }

    fn committed(&mut self, outcome: Outcome) -> Result<(), Error> {
        let is_current = |partition: &TopicPartition, epoch| {
            let assigned = self.partitions.get(partition);
            assigned.is_some_and(|assigned| assigned.state.epoch == epoch)
        };
        let (marks, result) = self.committer.end(outcome, is_current);
        match result {
            Ok(batches) => {
                for mark in marks {
                    if let Some(assigned) = self.of_epoch(&mark.partition, mark.epoch) {
                        assigned.state.committed(mark.offset);
                    }
                }
                for (epoch, batch) in batches {
                    let assigned = self.of_epoch(&batch.partition, epoch);
                    // What leaves is handed back, not begun.
                    if assigned.is_some_and(|assigned| assigned.leaving.is_none()) {
                        self.feed(batch);
                    }
                }
            }
            Err(error) if commit::may_pass(&error) => {
                tracing::warn!(group = self.settings.group, %error, "a commit failed and is tried again");
            }
            Err(error) if let Some((partition, epoch, origin)) = self.committer.take_refused(&error) => {
                if !self.dead_letters.add() {
                    tracing::error!(
                        group = self.settings.group,
                        "the limit of dead letters is reached; the consumer ends"
                    );
                    return Err(error.into());
                }
                self.refused(&partition, epoch, &origin, &error);
            }
            // A topic of retries or dead letters, or that of a record which has gone with its partition.
            Err(error) if commit::refused_topic(&error).is_some() => {
                tracing::error!(group = self.settings.group, %error, "a record cannot be written and is tried again: {error}");
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// A record whose handler sent what the log does not take becomes a dead letter, in place of what was sent.
    fn refused(&mut self, partition: &TopicPartition, epoch: u64, origin: &Origin, error: &log::Error) {
        let Some(assigned) = self.of_epoch(partition, epoch) else {
            return;
        };
        let route = assigned.route.clone();
        let failed = Failure {
            kind: FailureKind::NonRetriable,
            message: format!("what the handler sent is refused: {error}"),
        };
        let record = self.hop_record(&route, partition, &origin.record, origin.attempts, &failed, false);
        self.committer.hop(partition, epoch, record);
    }

    fn leave_all(&mut self) {
        let all: Vec<_> = self.partitions.keys().cloned().collect();
        for partition in all {
            self.leave(&partition, false);
        }
    }

    /// Begins to let a partition go: handlers finish what they have in hand.
    fn leave(&mut self, partition: &TopicPartition, release: bool) {
        let Some(assigned) = self.partitions.get_mut(partition) else {
            return;
        };
        match &mut assigned.leaving {
            Some(leaving) => leaving.release |= release,
            None => {
                assigned.state.set_paused(PauseReason::Leaving, true);
                assigned.leaving = Some(Leaving {
                    by: Instant::now() + self.settings.drain_timeout,
                    release,
                    idle_at: None,
                });
                self.pool.take_back(partition);
                self.committer.hand_back(partition);
            }
        }
    }

    /// Lets partitions go of which nothing is in hand and everything done is committed, or whose time is over.
    async fn let_go(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        let (guarantee, is_committing) = (self.settings.guarantee, self.committer.is_committing());
        let (mut gone, mut released) = (Vec::new(), Vec::new());
        for (partition, assigned) in &mut self.partitions {
            let Some(leaving) = &mut assigned.leaving else { continue };
            if !assigned.state.is_idle() && now < leaving.by {
                continue;
            }
            let idle_at = *leaving.idle_at.get_or_insert(now);
            let release = leaving.release;
            let is_settled = self.operators.is_settled(partition);
            let is_committed = !is_committing && assigned.committable(guarantee).is_none();
            if is_committed && is_settled || now >= idle_at + COMMIT_PATIENCE {
                gone.push(partition.clone());
                if release {
                    released.push(partition.clone());
                }
            }
        }
        for partition in gone {
            self.forget(&partition);
        }
        if !released.is_empty() {
            self.members.release(released).await?;
        }
        Ok(())
    }

    fn forget(&mut self, partition: &TopicPartition) {
        if let Some(assigned) = self.partitions.remove(partition) {
            assigned.gone.cancel();
            assigned.state.stop();
            self.pool.take_back(partition);
            self.committer.forget(partition);
            self.operators.forget(partition);
        }
    }

    fn answer_drains(&mut self) {
        if self.drains.is_empty() || self.committer.is_committing() {
            return;
        }
        let guarantee = self.settings.guarantee;
        let done = |assigned: &Assigned| assigned.state.is_idle() && assigned.committable(guarantee).is_none();
        if self.partitions.values().all(done) {
            for drain in self.drains.drain(..) {
                // Who no longer waits need not know.
                let _ = drain.send(());
            }
        }
    }

    fn obey(&mut self, request: Request) {
        match request {
            Request::Pause(partitions, paused) => {
                self.paused.set(partitions, paused);
                for (partition, assigned) in &mut self.partitions {
                    let paused = self.paused.contains(partition);
                    assigned.state.set_paused(PauseReason::User, paused);
                }
            }
            Request::State(reply) => {
                let mut partitions: Vec<_> = self
                    .partitions
                    .values()
                    .map(|assigned| assigned.state.describe())
                    .collect();
                partitions.sort_by(|a, b| a.partition.cmp(&b.partition));
                // Who no longer waits need not know.
                let _ = reply.send(ConsumerState {
                    partitions,
                    commits: self.committer.commits(),
                });
            }
            Request::Drain(reply) => self.drains.push(reply),
        }
    }
}

impl Assigned {
    /// What is to be committed. At most once all is committed before it is handled, and what leaves unhandled is taken back; but not
    /// while a handler is at work, which may be done with its record.
    fn committable(&self, guarantee: DeliveryGuarantee) -> Option<Mark> {
        match guarantee {
            DeliveryGuarantee::AtMostOnce if self.leaving.is_none() || !self.state.is_idle() => None,
            _ => self.state.committable(),
        }
    }

    /// Whether it goes as soon as what is done is committed.
    fn waits_for_commit(&self) -> bool {
        let by = self.leaving.as_ref().map(|leaving| leaving.by);
        by.is_some_and(|by| self.state.is_idle() || Instant::now() >= by)
    }
}

impl Leaving {
    /// When it is over, whatever happens.
    fn wake_at(&self) -> Instant {
        self.idle_at.map_or(self.by, |idle_at| idle_at + COMMIT_PATIENCE)
    }
}

impl Paused {
    fn set(&mut self, partitions: Option<Vec<TopicPartition>>, paused: bool) {
        match partitions {
            None => {
                self.all = paused;
                self.except.clear();
            }
            Some(partitions) if paused != self.all => self.except.extend(partitions),
            Some(partitions) => self.except.retain(|partition| !partitions.contains(partition)),
        }
    }

    fn contains(&self, partition: &TopicPartition) -> bool {
        self.all != self.except.contains(partition)
    }
}

/// Asks where the blocked topic ends until that is known.
async fn blocked_end(
    operators_end: impl Fn() -> BoxFuture<'static, log::Result<i64>>,
    partition: TopicPartition,
    epoch: u64,
    gone: CancellationToken,
) -> Operation {
    let mut wait = BACK_OFF.0;
    loop {
        match operators_end().await {
            Ok(end) => return Operation::BlockedEnd(partition, epoch, end),
            Err(error) => tracing::warn!(%partition, %error, "what stood still there is not known yet; trying on"),
        }
        tokio::select! {
            () = gone.cancelled() => return Operation::Abandoned,
            () = sleep(wait) => {}
        }
        wait = (wait * 2).min(BACK_OFF.1);
    }
}

/// Writes a record until it is written or the partition has gone: it is not done before.
async fn write(
    producer: Producer,
    record: ProducerRecord,
    gone: CancellationToken,
    done: impl FnOnce(Appended) -> Operation,
) -> Operation {
    let mut wait = BACK_OFF.0;
    loop {
        let error = tokio::select! {
            () = gone.cancelled() => return Operation::Abandoned,
            written = producer.append(record.clone()) => match written {
                Ok(appended) => return done(appended),
                Err(error) => error,
            }
        };
        tracing::error!(topic = %record.topic, %error, "a record cannot be written to a retry or dead-letter topic; trying on: {error}");
        tokio::select! {
            () = gone.cancelled() => return Operation::Abandoned,
            () = sleep(wait) => {}
        }
        wait = (wait * 2).min(BACK_OFF.1);
    }
}
