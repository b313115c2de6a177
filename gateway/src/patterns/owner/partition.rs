//! The task that owns one partition: restore, then window after window.
//!
//! What becomes due comes after the commands that stood on the log by then, however many they are: one of them may have called it
//! off. It does not wait for those that came later, or it might wait for ever.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::{Error, Inbox, LinkId, Request, Shared, State, Store};
use crate::log::{
    self, CommittedOffset, GroupMetadata, NextOffset, Record, StartAt, TopicPartition, TransactionalProducer,
};
use crate::patterns::now_ms;

/// The shortest and the longest rest after a failure; it doubles from one to the other.
const REST: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(5));

/// The shortest rest after another owner has fenced this one.
const AFTER_FENCED: Duration = Duration::from_secs(1);

/// The longest pause between two windows, which else is as long as the first of them took.
const PAUSE: Duration = Duration::from_millis(20);

/// How often memory is searched for keys that it need not hold.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// What ties the task to the group's member.
pub(super) struct Link {
    /// The partition of the commands topic.
    pub(super) partition: TopicPartition,
    /// Where the group's records start if it has committed nothing.
    pub(super) assigned: NextOffset,
    pub(super) inbox: Arc<Inbox>,
    /// Finish the window, commit, and end.
    pub(super) leaving: CancellationToken,
    pub(super) requests: mpsc::Sender<Request>,
}

/// How a partition that was served well has ended.
enum Ended {
    /// It goes to another owner, or nowhere.
    Left,
    /// It has more on the log.
    Dry,
}

/// Owns the partition until it leaves, beginning after a rest. A failure drops what is in memory; the log brings it back.
pub(super) async fn run<S: Store>(store: Arc<Shared<S>>, link: Link, mut rest: Duration) {
    loop {
        tokio::select! {
            () = link.leaving.cancelled() => return,
            () = sleep(rest) => {}
        }
        let opened = tokio::select! {
            () = link.leaving.cancelled() => return,
            opened = Partition::open(&store, &link) => opened,
        };
        let ended = match opened {
            Ok(mut partition) => {
                let ended = partition.serve().await;
                if partition.has_committed {
                    rest = REST.0;
                }
                ended
            }
            Err(error) => Err(error),
        };
        let error = match ended {
            Ok(Ended::Left) => return,
            Ok(Ended::Dry) => {
                rest = Duration::ZERO;
                continue;
            }
            Err(error) => error,
        };
        rest = longer(rest);
        if let Error::Log(log::Error::Fenced(_)) = error {
            // Another owner: fencing it in turn at once would help nobody. The group says soon whose the partition is.
            rest = rest.max(AFTER_FENCED);
        }
        tracing::warn!(
            topic = %link.partition.topic, partition = link.partition.partition, %error, rest_ms = rest.as_millis() as u64,
            "the partition is restored from the log"
        );
    }
}

/// An owned and restored partition.
struct Partition<'a, S: Store> {
    store: &'a Shared<S>,
    link: &'a Link,
    producer: TransactionalProducer,
    state: S::State,
    /// What the group has committed: where `state` stands.
    committed: NextOffset,
    /// What a commit would say now.
    consumed: NextOffset,
    /// The rest of the batch at hand, and where reading goes on behind it.
    records: std::vec::IntoIter<Record>,
    batch_end: NextOffset,
    /// Whether nothing stood behind that batch when it was read.
    is_last: bool,
    /// What has become due behind commands that are not applied yet.
    behind: Option<Behind>,
    has_committed: bool,
}

/// What is due waits for commands.
struct Behind {
    /// What had become due by then.
    by_ms: i64,
    /// Where the commands ended then.
    end: NextOffset,
}

impl<'a, S: Store> Partition<'a, S> {
    /// Takes the partition over. The order is the point: the producer fences the earlier owner and waits until its open
    /// transaction is decided, so that nothing can be committed between the offset that is read next and the states.
    async fn open(store: &'a Shared<S>, link: &'a Link) -> Result<Self, Error> {
        let number = link.partition.partition;
        let transactional_id = format!("{}-{number}", store.settings.name);
        let producer = store.log.transactional_producer(&transactional_id).await?;
        let (committed, noted) = match link.committed().await? {
            Some(committed) => (Some(committed.next_offset), committed.metadata),
            None => (None, String::new()),
        };
        let start = NextOffset(store.log.offset(&link.partition, StartAt::Start).await?);
        if let Some(committed) = committed.filter(|committed| *committed < start) {
            tracing::error!(
                topic = %link.partition.topic, partition = number, offset = committed.0, start = start.0,
                "retention has deleted commands before they were applied"
            );
        }
        let has_no_offset = committed.is_none();
        let committed = committed.unwrap_or(link.assigned).max(start);
        let state = store.store.restore(number, &noted).await?;
        if has_no_offset && state.len() > 0 {
            tracing::error!(
                topic = %link.partition.topic, partition = number, offset = committed.0, keys = state.len(),
                "the group has lost its offset: commands from there on may have been applied before"
            );
        }
        link.rewind(committed).await?;
        tracing::info!(
            store = store.settings.name,
            partition = number,
            offset = committed.0,
            keys = state.len(),
            "partition restored"
        );
        Ok(Self {
            store,
            link,
            producer,
            state,
            committed,
            consumed: committed,
            records: Vec::new().into_iter(),
            batch_end: committed,
            is_last: false,
            behind: None,
            has_committed: false,
        })
    }

    /// Applies what comes and derives what is due until the partition leaves.
    ///
    /// A window that was not full is followed by a pause as long as it took: under load the store then takes half of the log's
    /// time at most, and fewer and fuller windows do the same work. The first command after a quiet time never waits.
    async fn serve(&mut self) -> Result<Ended, Error> {
        let mut forget_at = Instant::now() + FORGET_EVERY;
        let mut rest = Duration::ZERO;
        loop {
            if self.state.is_dry() {
                return Ok(Ended::Dry);
            }
            if Instant::now() >= forget_at {
                self.state.forget(now_ms());
                forget_at = Instant::now() + FORGET_EVERY;
            }
            let due = self.state.due_ms().filter(|_| !self.is_behind()).map(until);
            tokio::select! {
                biased;
                () = self.link.leaving.cancelled() => return Ok(Ended::Left),
                () = std::future::ready(()), if self.records.len() > 0 => {}
                () = self.link.inbox.ready() => {}
                () = sleep(due.unwrap_or_default()), if due.is_some() => {}
                () = sleep_until(forget_at) => continue,
            }
            let begin = Instant::now();
            let error = match self.window().await {
                Ok(fill) => {
                    rest = Duration::ZERO;
                    if fill < self.store.settings.window_commands {
                        tokio::select! {
                            () = self.link.leaving.cancelled() => return Ok(Ended::Left),
                            () = sleep(begin.elapsed().min(PAUSE)) => {}
                        }
                    }
                    continue;
                }
                Err(error) => error,
            };
            if !is_undone(&error) {
                return Err(error);
            }
            tracing::warn!(
                topic = %self.link.partition.topic, partition = self.link.partition.partition, offset = self.committed.0,
                %error, "a transaction was aborted; its commands are applied again"
            );
            self.rewind().await?;
            rest = longer(rest);
            tokio::select! {
                () = self.link.leaving.cancelled() => return Ok(Ended::Left),
                () = sleep(rest) => {}
            }
        }
    }

    /// Applies the commands that have come, derives, and commits it all in one transaction. Says how full it was: its commands or
    /// its records, whichever are more.
    async fn window(&mut self) -> Result<usize, Error> {
        let mut window = <S::State as State>::Window::default();
        // Asked first: what is due is looked for in what is kept, and that has not seen the commands of this window.
        let due_by = self.due_by(now_ms()).await?;
        let commands = self.fill(&mut window).await;
        let now_ms = now_ms();
        if let Some(by_ms) = due_by {
            self.state.add_due(&mut window, by_ms);
        }
        let records = self.state.derive(&mut window, now_ms)?;
        let fill = commands.max(records.len());
        // With offsets, also those of before, the log refuses an owner that the group has replaced: one that was cut off may have
        // taken its transactional id back from its successor.
        let has_offsets = fill > 0;
        let mut transaction = self.producer.begin();
        for record in records {
            transaction.send(record).await?;
        }
        if has_offsets {
            let group = self.link.metadata().await?;
            let consumed = CommittedOffset {
                next_offset: self.consumed,
                metadata: self.state.note(&window),
            };
            transaction.send_offsets(group, [(self.link.partition.clone(), consumed)]);
        }
        if let Err(error) = transaction.commit().await {
            self.state.refused(&window, &error);
            return Err(error.into());
        }
        self.has_committed |= has_offsets;
        self.state.keep(window, now_ms);
        self.committed = self.consumed;
        Ok(fill)
    }

    /// What has become due until when may come now. `None`: nothing has, or commands come first.
    async fn due_by(&mut self, now_ms: i64) -> Result<Option<i64>, Error> {
        let Some(due_ms) = self.state.due_ms().filter(|due_ms| *due_ms <= now_ms) else {
            return Ok(None);
        };
        // All that waited has come, or was called off.
        self.behind.take_if(|behind| behind.by_ms < due_ms);
        if self.behind.is_none() {
            if self.is_at_end() {
                return Ok(Some(now_ms));
            }
            let end = NextOffset(self.store.log.offset(&self.link.partition, StartAt::End).await?);
            self.behind = Some(Behind { by_ms: now_ms, end });
        }
        let by_ms = self.behind.as_ref().map(|behind| behind.by_ms);
        Ok(by_ms.filter(|_| !self.is_behind()))
    }

    /// Whether commands come before what is due.
    fn is_behind(&self) -> bool {
        // At the end also if it lies before that which was told: the log may have lost some.
        let behind = self.behind.as_ref();
        behind.is_some_and(|behind| self.consumed < behind.end && !self.is_at_end())
    }

    /// Whether all commands are applied that the log is known to have.
    fn is_at_end(&self) -> bool {
        self.is_last && self.records.len() == 0 && self.link.inbox.is_empty()
    }

    /// Applies what waits, as far as one window takes it, and says how many commands that were.
    async fn fill(&mut self, window: &mut <S::State as State>::Window) -> usize {
        let most = self.store.settings.window_commands;
        let mut commands = 0;
        while commands < most {
            if let Some(record) = self.records.next() {
                self.consumed = NextOffset::after(record.offset);
                self.state.apply(window, &record);
                commands += 1;
                continue;
            }
            let Some((batch, resume)) = self.link.inbox.pop() else {
                break;
            };
            if resume {
                self.link.resume().await;
            }
            self.batch_end = batch.next_offset;
            self.is_last = batch.caught_up;
            self.records = batch.records.into_iter();
        }
        if self.records.len() == 0 {
            self.consumed = self.consumed.max(self.batch_end);
        }
        commands
    }

    async fn rewind(&mut self) -> Result<(), Error> {
        self.records = Vec::new().into_iter();
        self.consumed = self.committed;
        self.batch_end = self.committed;
        self.is_last = false;
        Ok(self.link.rewind(self.committed).await?)
    }
}

/// Whether nothing of the transaction is visible, and the producer may go on.
///
/// `UnknownMember` is among them: as long as no other owner has fenced the producer, nobody else has written the states. If
/// the partition is no longer the member's, the rewind that follows fails.
fn is_undone(error: &Error) -> bool {
    match error {
        Error::Log(error) => matches!(
            error,
            log::Error::Aborted(_)
                | log::Error::UnknownMember { .. }
                | log::Error::UnknownTopic(_)
                | log::Error::UnknownPartition(_)
                | log::Error::InvalidTopic { .. }
                | log::Error::RecordTooLarge { .. }
                | log::Error::Unauthorized(_)
        ),
        Error::Encode(_) => true,
        // The others are not of a transaction.
        _ => false,
    }
}

fn longer(rest: Duration) -> Duration {
    (rest * 2).clamp(REST.0, REST.1)
}

fn until(time_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(time_ms.saturating_sub(now_ms())).unwrap_or(0))
}

impl Link {
    async fn committed(&self) -> log::Result<Option<CommittedOffset>> {
        self.ask(|reply| Request::Committed { link: self.id(), reply }).await
    }

    async fn metadata(&self) -> log::Result<GroupMetadata> {
        self.ask(|reply| Request::Metadata { link: self.id(), reply }).await
    }

    /// Goes on from `to`; the inbox holds nothing from before.
    async fn rewind(&self, to: NextOffset) -> log::Result<()> {
        self.ask(|reply| Request::Rewind {
            link: self.id(),
            to,
            reply,
        })
        .await
    }

    async fn resume(&self) {
        // It fails only when the owner has ended, and this task with it.
        let _ = self.requests.send(Request::Resume { link: self.id() }).await;
    }

    fn id(&self) -> LinkId {
        LinkId {
            partition: self.partition.clone(),
            inbox: self.inbox.clone(),
        }
    }

    /// `Closed` also when the partition is no longer the member's: then `leaving` is about to be, or is, cancelled.
    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<log::Result<T>>) -> Request) -> log::Result<T> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(request(reply))
            .await
            .map_err(|_| log::Error::Closed)?;
        answer.await.map_err(|_| log::Error::Closed)?
    }
}
