//! Owners of partitions: each partition of a topic of commands has one owner among all processes, which alone writes what
//! follows from them, in transactions with the consumed offset. What it keeps and writes is its [`Store`]'s.
//!
//! Here is the member of the owners' group: it hands the records of each partition to the task that owns it, and does for the
//! tasks what only the member can do. Each partition has a task and an [`Inbox`], so that a slow transaction holds up its own
//! partition only. A revoked partition is released when its task has finished its window.

mod partition;

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use self::partition::Link;
use super::{Error, LOOK_EVERY, MISSED_LOOKS};
use crate::log::{
    self, Batch, CommittedOffset, GroupEvent, GroupMember, GroupMetadata, GroupSettings, Log, NextOffset,
    ProducerRecord, Record, StartAt, TopicDescription, TopicPartition,
};

/// A partition for which so much waits is paused; what the engine had read ahead by then still comes in. Batches are not counted:
/// small ones come quickly, and on Kafka a pause costs more than they hold.
const INBOX_BYTES: usize = 4 * 1024 * 1024;

/// What a record or batch is taken to hold beside its key and value.
const OVERHEAD_BYTES: usize = 128;

/// Requests of the partitions' tasks that may wait. Each task has one at a time; a full queue makes the next wait.
const REQUESTS: usize = 64;

/// How long a partition rests whose task panicked.
const AFTER_PANIC: Duration = Duration::from_secs(1);

/// What owners keep of partitions.
pub(crate) trait Store: Send + Sync + 'static {
    /// What is kept of one partition.
    type State: State;

    /// Reads what is kept of a partition from the log. Nobody else writes it meanwhile, and it is as it was when the offset was
    /// committed that has `noted` beside it.
    fn restore(&self, partition: i32, noted: &str) -> impl Future<Output = Result<Self::State, Error>> + Send;
}

/// What an owner keeps of a partition. It changes only by windows whose transaction is committed: undoing one is dropping it.
pub(crate) trait State: Send {
    /// Commands that are about to change it.
    type Window: Default + Send;

    /// Applies a command in the window.
    fn apply(&self, window: &mut Self::Window, command: &Record);

    /// Adds what had become due by a time.
    fn add_due(&self, window: &mut Self::Window, by_ms: i64);

    /// Returns the records of the window's transaction.
    fn derive(&self, window: &mut Self::Window, now_ms: i64) -> Result<Vec<ProducerRecord>, Error>;

    /// What is noted beside the offset that the window commits.
    fn note(&self, _window: &Self::Window) -> String {
        String::new()
    }

    /// Takes over a window whose transaction is committed.
    fn keep(&mut self, window: Self::Window, now_ms: i64);

    /// A window whose transaction was aborted for this.
    fn refused(&mut self, _window: &Self::Window, _error: &log::Error) {}

    /// When something becomes due, in milliseconds since the Unix epoch.
    fn due_ms(&self) -> Option<i64>;

    /// Drops what memory need not hold any more. Called now and then.
    fn forget(&mut self, _now_ms: i64) {}

    /// Whether there is more on the log than here, and it is needed now: the partition is then restored anew.
    fn is_dry(&self) -> bool {
        false
    }

    /// Keys in memory.
    fn len(&self) -> usize;
}

/// How partitions are owned.
#[derive(Clone, Debug)]
pub(crate) struct OwnerSettings {
    /// The consumer group of the owners, and the stem of their transactional ids.
    pub(crate) name: String,
    /// The topic of commands.
    pub(crate) commands: String,
    /// Most commands of one transaction.
    pub(crate) window_commands: usize,
    /// After it the partitions of an owner that cannot be heard go to another.
    pub(crate) session_timeout: Duration,
}

/// What the tasks share.
struct Shared<S> {
    log: Log,
    settings: OwnerSettings,
    store: S,
}

/// A topic beside that of commands, which must have as many partitions.
///
/// # Errors
/// [`Error::PartitionCounts`]; [`Error::Log`] when one of them does not exist.
pub(crate) async fn topic_beside(log: &Log, commands: &str, other: &str) -> Result<TopicDescription, Error> {
    let commands = log.describe_topic(commands).await?;
    let other = log.describe_topic(other).await?;
    match commands.partitions == other.partitions {
        true => Ok(other),
        false => Err(Error::PartitionCounts {
            left: commands.name,
            left_partitions: commands.partitions,
            right: other.name,
            right_partitions: other.partitions,
        }),
    }
}

/// Reads a partition from its start to its end.
pub(crate) async fn read_partition(
    log: &Log,
    topic: &str,
    partition: i32,
    mut each: impl FnMut(&Record),
) -> Result<(), Error> {
    let mut reader = log.reader(topic).await?;
    reader.assign(partition, StartAt::Start).await?;
    loop {
        match reader.next().await {
            Ok(batch) => {
                batch.records.iter().for_each(&mut each);
                if batch.caught_up {
                    return Ok(());
                }
            }
            // Retention or compaction took the start away meanwhile. What was read before is overwritten by what is kept.
            Err(log::Error::OffsetOutOfRange { .. }) => {
                reader.assign(partition, StartAt::Start).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether a topic that was missed is gone.
async fn is_gone(log: &Log, topic: &str) -> bool {
    for _ in 0..MISSED_LOOKS {
        if !matches!(log.describe_topic(topic).await, Err(log::Error::UnknownTopic(_))) {
            return false;
        }
        sleep(LOOK_EVERY).await;
    }
    true
}

/// Takes part in the group until `stopping`, or until the log ends.
///
/// Tasks live in a `JoinSet` so that dropping this future stops them, as killing the process would.
pub(crate) async fn run<S: Store>(
    log: Log,
    settings: OwnerSettings,
    store: S,
    stopping: CancellationToken,
) -> Result<(), Error> {
    let group = GroupSettings {
        session_timeout: settings.session_timeout,
        ..GroupSettings::new(&settings.name, [&settings.commands])
    };
    let member = log.join_group(group).await?;
    let store = Arc::new(Shared { log, settings, store });
    let (requests_tx, mut requests) = mpsc::channel(REQUESTS);
    let mut owner = Owner {
        store,
        member,
        requests: requests_tx,
        owned: HashMap::new(),
        running: HashMap::new(),
        tasks: JoinSet::new(),
        stopping: stopping.clone(),
    };
    loop {
        tokio::select! {
            () = stopping.cancelled(), if !owner.tasks.is_empty() && owner.is_serving() => owner.stop(),
            () = stopping.cancelled(), if owner.tasks.is_empty() => return Ok(()),
            event = owner.member.next() => match event {
                Err(log::Error::Closed) if stopping.is_cancelled() => return Ok(()),
                event => owner.event(event).await?,
            },
            Some(request) = requests.recv() => owner.answer(request).await,
            Some(ended) = owner.tasks.join_next_with_id() => owner.ended(ended).await,
        }
    }
}

struct Owner<S> {
    store: Arc<Shared<S>>,
    member: GroupMember,
    requests: mpsc::Sender<Request>,
    /// The partitions that are the member's.
    owned: HashMap<TopicPartition, Owned>,
    /// Every task that has not ended, that of a partition no longer owned among them.
    running: HashMap<task::Id, Running>,
    tasks: JoinSet<()>,
    stopping: CancellationToken,
}

struct Owned {
    task: task::Id,
    assigned: NextOffset,
    inbox: Arc<Inbox>,
    leaving: CancellationToken,
}

struct Running {
    partition: TopicPartition,
    /// Whether the group waits for the partition.
    release: bool,
}

impl<S: Store> Owner<S> {
    fn is_serving(&self) -> bool {
        self.owned.values().any(|owned| !owned.leaving.is_cancelled())
    }

    fn stop(&self) {
        for owned in self.owned.values() {
            owned.leaving.cancel();
        }
    }

    async fn event(&mut self, event: log::Result<GroupEvent>) -> Result<(), Error> {
        match event {
            Ok(GroupEvent::Assigned(partitions)) => {
                for (partition, assigned) in partitions {
                    tracing::debug!(topic = %partition.topic, partition = partition.partition, "partition assigned");
                    self.start(partition, assigned.next_offset, Duration::ZERO);
                }
            }
            Ok(GroupEvent::Records(batch)) => self.records(batch).await,
            Ok(GroupEvent::Revoked(partitions)) => {
                let mut idle = Vec::new();
                for partition in partitions {
                    tracing::debug!(topic = %partition.topic, partition = partition.partition, "partition revoked");
                    match self.leave(&partition) {
                        Some(running) => running.release = true,
                        None => idle.push(partition),
                    }
                }
                self.release(idle).await;
            }
            Ok(GroupEvent::Lost(partitions)) => {
                for partition in partitions {
                    tracing::warn!(topic = %partition.topic, partition = partition.partition, "partition lost");
                    self.leave(&partition);
                }
            }
            Err(error) if error.is_retriable() => {
                tracing::warn!(group = self.member.group(), %error, "the group cannot be reached; trying on");
            }
            Err(error @ (log::Error::UnknownTopic(_) | log::Error::UnknownPartition(_))) => {
                if is_gone(&self.store.log, &self.store.settings.commands).await {
                    return Err(error.into());
                }
                tracing::warn!(group = self.member.group(), %error, "the topic is there all the same; going on");
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn start(&mut self, partition: TopicPartition, assigned: NextOffset, after: Duration) {
        if self.stopping.is_cancelled() {
            return;
        }
        // An earlier task of the partition may still be at its last commit: the new one's producer fences it.
        self.leave(&partition);
        let (inbox, leaving) = (Arc::new(Inbox::default()), CancellationToken::new());
        let link = Link {
            partition: partition.clone(),
            assigned,
            inbox: inbox.clone(),
            leaving: leaving.clone(),
            requests: self.requests.clone(),
        };
        let task = self.tasks.spawn(partition::run(self.store.clone(), link, after)).id();
        self.running.insert(
            task,
            Running {
                partition: partition.clone(),
                release: false,
            },
        );
        let owned = Owned {
            task,
            assigned,
            inbox,
            leaving,
        };
        self.owned.insert(partition, owned);
    }

    /// Tells the partition's task to finish, and returns what is known of it while it has not.
    fn leave(&mut self, partition: &TopicPartition) -> Option<&mut Running> {
        let owned = self.owned.remove(partition)?;
        owned.leaving.cancel();
        self.running.get_mut(&owned.task)
    }

    async fn records(&mut self, batch: Batch) {
        let Some(owned) = self.owned.get(&batch.partition) else {
            return;
        };
        let partition = batch.partition.clone();
        if owned.inbox.push(batch) {
            // It fails only when the partition is about to be taken away, which is said by an event.
            let _ = self.member.pause(vec![partition]).await;
        }
    }

    /// A request of a task whose partition is no longer the member's is dropped, which tells the task as much.
    async fn answer(&mut self, request: Request) {
        match request {
            Request::Metadata { link, reply } => {
                // A partition that was lost has another owner, although this member may be in the group again.
                if self.is_current(&link) || self.is_releasing(&link.partition) {
                    // A task that has ended meanwhile needs no answer; so for all replies.
                    let _ = reply.send(self.member.metadata().await);
                }
            }
            Request::Committed { link, reply } => {
                if self.is_current(&link) {
                    let _ = reply.send(self.committed(link.partition).await);
                }
            }
            Request::Rewind { link, to, reply } => {
                if self.is_current(&link) {
                    let _ = reply.send(self.rewind(&link, to).await);
                }
            }
            Request::Resume { link } => {
                if self.is_current(&link) && !link.inbox.is_paused() {
                    // As with the pause.
                    let _ = self.member.resume(vec![link.partition]).await;
                }
            }
        }
    }

    fn is_current(&self, link: &LinkId) -> bool {
        self.owned
            .get(&link.partition)
            .is_some_and(|owned| Arc::ptr_eq(&owned.inbox, &link.inbox))
    }

    /// Whether a task finishes what it began before the partition goes to another member.
    fn is_releasing(&self, partition: &TopicPartition) -> bool {
        let mut running = self.running.values();
        running.any(|running| running.release && running.partition == *partition)
    }

    async fn committed(&self, partition: TopicPartition) -> log::Result<Option<CommittedOffset>> {
        Ok(self.member.committed(vec![partition]).await?.pop().flatten())
    }

    async fn rewind(&mut self, link: &LinkId, to: NextOffset) -> log::Result<()> {
        self.member.seek(link.partition.clone(), to).await?;
        // Nothing read before the seek comes after it, so an empty inbox now holds nothing stale later.
        link.inbox.clear();
        // Also a pause of an earlier task of the partition, which may have panicked.
        self.member.resume(vec![link.partition.clone()]).await
    }

    async fn ended(&mut self, ended: Result<(task::Id, ()), JoinError>) {
        let (task, panicked) = match &ended {
            Ok((task, ())) => (*task, false),
            Err(error) => (error.id(), true),
        };
        let Some(running) = self.running.remove(&task) else {
            return;
        };
        if running.release {
            self.release(vec![running.partition]).await;
            return;
        }
        let Some(owned) = self.owned.get(&running.partition).filter(|owned| owned.task == task) else {
            return;
        };
        let assigned = owned.assigned;
        self.owned.remove(&running.partition);
        if panicked {
            tracing::error!(
                topic = %running.partition.topic, partition = running.partition.partition,
                "an owner's task panicked; the partition starts again from the log"
            );
            self.start(running.partition, assigned, AFTER_PANIC);
        }
    }

    async fn release(&self, partitions: Vec<TopicPartition>) {
        if !partitions.is_empty() {
            // It fails only when the log has ended, which the next event says.
            let _ = self.member.release(partitions).await;
        }
    }
}

/// Batches of a partition on their way from the member to the partition's task. Bounded by pausing the partition.
#[derive(Debug, Default)]
struct Inbox {
    waiting: Mutex<Waiting>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    batches: VecDeque<Batch>,
    bytes: usize,
    paused: bool,
}

impl Inbox {
    /// The next batch, if one waits, and whether the partition must be resumed.
    fn pop(&self) -> Option<(Batch, bool)> {
        let mut waiting = self.waiting();
        let batch = waiting.batches.pop_front()?;
        waiting.bytes -= size_bytes(&batch);
        let resume = waiting.paused && waiting.bytes <= INBOX_BYTES / 4;
        if resume {
            waiting.paused = false;
        }
        Some((batch, resume))
    }

    /// Waits until a batch waits. Only the partition's task may call it.
    async fn ready(&self) {
        while self.is_empty() {
            self.filled.notified().await;
        }
    }

    /// Adds a batch and says whether the partition must be paused.
    fn push(&self, batch: Batch) -> bool {
        let mut waiting = self.waiting();
        waiting.bytes += size_bytes(&batch);
        waiting.batches.push_back(batch);
        let pause = !waiting.paused && waiting.bytes >= INBOX_BYTES;
        waiting.paused |= pause;
        drop(waiting);
        self.filled.notify_one();
        pause
    }

    /// Drops what waits. The partition is not paused from now on.
    fn clear(&self) {
        *self.waiting() = Waiting::default();
    }

    fn is_empty(&self) -> bool {
        self.waiting().batches.is_empty()
    }

    fn is_paused(&self) -> bool {
        self.waiting().paused
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing panics while it is held; a poisoned lock still guards a whole queue.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn size_bytes(batch: &Batch) -> usize {
    let sizes = batch.records.iter().map(|record| OVERHEAD_BYTES + record.size_bytes());
    OVERHEAD_BYTES + sizes.sum::<usize>()
}

/// Which task asks: that of this partition in the assignment that has this inbox.
#[derive(Clone, Debug)]
struct LinkId {
    partition: TopicPartition,
    inbox: Arc<Inbox>,
}

/// What a partition's task asks of the member.
#[derive(Debug)]
enum Request {
    Metadata {
        link: LinkId,
        reply: oneshot::Sender<log::Result<GroupMetadata>>,
    },
    Committed {
        link: LinkId,
        reply: oneshot::Sender<log::Result<Option<CommittedOffset>>>,
    },
    Rewind {
        link: LinkId,
        to: NextOffset,
        reply: oneshot::Sender<log::Result<()>>,
    },
    Resume {
        link: LinkId,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{Headers, Record};

    fn batch(value_bytes: usize) -> Batch {
        let record = Record {
            offset: 0,
            timestamp_ms: 0,
            key: None,
            value: Some(vec![b'x'; value_bytes].into()),
            headers: Headers::default(),
        };
        Batch {
            partition: TopicPartition::new("commands", 0),
            records: vec![record],
            next_offset: NextOffset(1),
            caught_up: false,
        }
    }

    #[tokio::test]
    async fn a_full_inbox_pauses_its_partition_once_and_resumes_it_when_nearly_empty() {
        let inbox = Inbox::default();
        let pauses: Vec<bool> = (0..6).map(|_| inbox.push(batch(INBOX_BYTES / 4))).collect();
        assert_eq!(pauses, [false, false, false, true, false, false]);
        inbox.ready().await;
        let resumes: Vec<bool> = (0..6).map(|_| inbox.pop().expect("a batch").1).collect();
        assert_eq!(resumes, [false, false, false, false, false, true]);
        assert!(inbox.pop().is_none() && !inbox.is_paused());
    }

    #[test]
    fn many_small_batches_do_not_pause_a_partition() {
        let inbox = Inbox::default();
        assert!((0..1000).all(|_| !inbox.push(batch(100))));
    }

    #[test]
    fn a_cleared_inbox_is_as_a_new_one() {
        let inbox = Inbox::default();
        assert!(inbox.push(batch(INBOX_BYTES)));
        inbox.clear();
        assert!(!inbox.is_paused() && inbox.pop().is_none());
        assert!(!inbox.push(batch(1)), "nothing is left of what was cleared");
    }
}
