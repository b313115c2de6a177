//! When and how a consumer commits: offsets every now and then, or transactions one after the other.
//!
//! One commit is under way at a time, beside the runner. What handlers send in exactly once mode waits here for the transaction
//! that holds its offset too; a transaction that fails leaves nothing visible, and what it held goes into the next, with the
//! offsets as they are then. So handlers are not called again for it.
//!
//! Invariant: a transaction has the offsets of every partition from which it has records, and a partition's offset stands for
//! exactly the records whose output was committed with it or before.

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::members::Members;
use super::partition::Run;
use super::{ConsumerBuilder, DeliveryGuarantee};
use crate::log::{self, Batch, CommittedOffset, Log, ProducerRecord, Record, TopicPartition, TransactionalProducer};

/// First and longest wait before a commit that failed is tried again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// The least wait before a producer that was fenced takes its id back: if another instance has the same slot, both go on slowly
/// and loudly.
const AFTER_FENCED: Duration = Duration::from_secs(1);

/// The longest pause between two transactions, which else is as long as the first of them took.
const PAUSE: Duration = Duration::from_millis(20);

/// Batches that wait for their offsets to be committed at most, in at most once mode. Behind it nothing is taken from the member.
const WAITING_BATCHES: usize = 64;

/// Bytes that wait for a transaction at most. Behind it no handler is called.
const WINDOW_BYTES: usize = 16 * 1024 * 1024;

/// Records that wait for a transaction at most. Behind it no handler is called.
const WINDOW_RECORDS: usize = 20_000;

pub(super) struct Committer {
    interval: Duration,
    /// In exactly once mode.
    transactions: Option<Transactions>,
    /// At most once: what is handled when its offsets are committed.
    unfed: Vec<(u64, Batch)>,
    /// So many more batches are in the commit that is under way.
    unfed_committing: usize,
    committing: bool,
    /// Something was done since the last commit began.
    touched: bool,
    due: Instant,
    back_off: Duration,
    not_before: Instant,
    begun: Instant,
    commits: u64,
}

struct Transactions {
    log: Log,
    transactional_id: String,
    /// `None` while it is at work, and after it was fenced.
    producer: Option<TransactionalProducer>,
    /// What handlers have sent and no transaction has committed.
    window: Vec<Sent>,
    window_bytes: usize,
    /// It is not known whether this one was committed.
    undecided: Option<(Vec<Mark>, Vec<Sent>)>,
}

/// How far a partition is done.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    pub(super) partition: TopicPartition,
    pub(super) epoch: u64,
    pub(super) offset: CommittedOffset,
}

/// A record that waits for its transaction.
struct Sent {
    partition: TopicPartition,
    epoch: u64,
    /// What it follows from; `None`: it leaves for another topic itself.
    origin: Option<Origin>,
    record: ProducerRecord,
}

/// The record whose handler sent another.
pub(super) struct Origin {
    pub(super) record: Record,
    pub(super) attempts: u32,
}

impl Sent {
    /// With what it follows from, which it keeps in memory too.
    fn size_bytes(&self) -> usize {
        let origin = self.origin.as_ref().map_or(0, |origin| origin.record.size_bytes());
        origin + self.record.size_bytes()
    }
}

/// What became of a commit.
pub(super) struct Outcome {
    marks: Vec<Mark>,
    sent: Vec<Sent>,
    unfed: Vec<(u64, Batch)>,
    producer: Option<TransactionalProducer>,
    /// What is committed by now, when it was not known what became of the commit.
    committed: Option<Vec<(TopicPartition, Option<CommittedOffset>)>>,
    result: log::Result<()>,
}

impl Committer {
    pub(super) async fn new(log: &Log, settings: &ConsumerBuilder) -> log::Result<Self> {
        let transactions = match settings.guarantee {
            DeliveryGuarantee::AtMostOnce | DeliveryGuarantee::AtLeastOnce => None,
            DeliveryGuarantee::ExactlyOnce => {
                let transactional_id = format!("{}-{}", settings.group, settings.slot);
                Some(Transactions {
                    producer: Some(log.transactional_producer(&transactional_id).await?),
                    log: log.clone(),
                    transactional_id,
                    window: Vec::new(),
                    window_bytes: 0,
                    undecided: None,
                })
            }
        };
        let now = Instant::now();
        Ok(Self {
            interval: settings.commit_interval,
            transactions,
            unfed: Vec::new(),
            unfed_committing: 0,
            committing: false,
            touched: false,
            due: now,
            back_off: BACK_OFF.0,
            not_before: now,
            begun: now,
            commits: 0,
        })
    }

    pub(super) fn is_transactional(&self) -> bool {
        self.transactions.is_some()
    }

    /// Whether more records may be taken from the member.
    pub(super) fn may_take(&self) -> bool {
        self.unfed.len() + self.unfed_committing < WAITING_BATCHES
    }

    /// Whether handlers may be called.
    pub(super) fn has_room(&self) -> bool {
        let full = |transactions: &Transactions| {
            transactions.window_bytes >= WINDOW_BYTES || transactions.window.len() >= WINDOW_RECORDS
        };
        !self.transactions.as_ref().is_some_and(full)
    }

    pub(super) fn is_committing(&self) -> bool {
        self.committing
    }

    /// Commits that succeeded.
    pub(super) fn commits(&self) -> u64 {
        self.commits
    }

    /// Takes note that there may be something to commit.
    pub(super) fn touch(&mut self) {
        self.touched = true;
    }

    /// Adds a batch that is to be handled when its offset is committed.
    pub(super) fn commit_first(&mut self, epoch: u64, batch: Batch) {
        self.unfed.push((epoch, batch));
    }

    /// Adds what a handler has sent for records that are done.
    pub(super) fn send(&mut self, run: &Run, sent: Vec<(usize, ProducerRecord)>) {
        for (index, record) in sent {
            let origin = run.records.get(index).map(|record| Origin {
                record: record.clone(),
                attempts: if index == 0 {
                    run.attempts.first
                } else {
                    run.attempts.others
                },
            });
            self.add(&run.partition, run.epoch, origin, record);
        }
    }

    /// Adds a record that leaves its topic.
    pub(super) fn hop(&mut self, partition: &TopicPartition, epoch: u64, record: ProducerRecord) {
        self.add(partition, epoch, None, record);
    }

    fn add(&mut self, partition: &TopicPartition, epoch: u64, origin: Option<Origin>, record: ProducerRecord) {
        self.touched = true;
        if let Some(transactions) = &mut self.transactions {
            let sent = Sent {
                partition: partition.clone(),
                epoch,
                origin,
                record,
            };
            transactions.window_bytes += sent.size_bytes();
            transactions.window.push(sent);
        }
    }

    /// Forgets what is not handled yet of a partition that leaves.
    pub(super) fn hand_back(&mut self, partition: &TopicPartition) {
        self.unfed.retain(|(_, batch)| batch.partition != *partition);
    }

    /// Forgets everything of a partition that has gone: its next owner does it again.
    pub(super) fn forget(&mut self, partition: &TopicPartition) {
        self.hand_back(partition);
        if let Some(transactions) = &mut self.transactions {
            transactions.window.retain(|sent| sent.partition != *partition);
            transactions.count();
        }
    }

    /// When a commit may be due for which nothing else wakes the runner.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let wanted = self.touched || !self.unfed.is_empty();
        (wanted && !self.committing).then(|| match self.unfed.is_empty() {
            true => self.due.max(self.not_before),
            false => self.not_before,
        })
    }

    pub(super) fn is_due(&self, urgent: bool) -> bool {
        let now = Instant::now();
        let wanted = urgent || !self.unfed.is_empty() || self.touched && now >= self.due;
        wanted && !self.committing && now >= self.not_before
    }

    /// Begins a commit; `None`: there is nothing to commit.
    pub(super) fn begin(&mut self, members: &Members, mut marks: Vec<Mark>) -> Option<BoxFuture<'static, Outcome>> {
        let now = Instant::now();
        self.begun = now;
        let unfed = std::mem::take(&mut self.unfed);
        self.unfed_committing = unfed.len();
        for (epoch, batch) in &unfed {
            marks.retain(|mark| mark.partition != batch.partition);
            marks.push(Mark {
                partition: batch.partition.clone(),
                epoch: *epoch,
                offset: CommittedOffset {
                    next_offset: batch.next_offset,
                    metadata: String::new(),
                },
            });
        }
        let Some(transactions) = &mut self.transactions else {
            self.touched = false;
            if marks.is_empty() {
                return None;
            }
            self.committing = true;
            let commit = members.commit(&marks);
            let outcome = async move {
                Outcome {
                    result: commit.await,
                    marks,
                    sent: Vec::new(),
                    unfed,
                    producer: None,
                    committed: None,
                }
            };
            return Some(outcome.boxed());
        };
        // What was done since is not in it, and is due after it.
        if let Some((marks, sent)) = transactions.undecided.take() {
            self.committing = true;
            let committed = members.committed(&marks);
            let producer = transactions.producer.take();
            return Some(decide(committed, marks, sent, producer).boxed());
        }
        self.touched = false;
        if marks.is_empty() {
            return None;
        }
        self.committing = true;
        let (sent, rest) = std::mem::take(&mut transactions.window)
            .into_iter()
            .partition(|sent| marks.iter().any(|mark| mark.partition == sent.partition));
        transactions.window = rest;
        transactions.count();
        let offsets = members.owned_offsets(&marks);
        let producer = transactions.producer.take();
        let (log, transactional_id) = (transactions.log.clone(), transactions.transactional_id.clone());
        let outcome = async move {
            let (producer, result) = transact(&log, &transactional_id, producer, offsets, &sent).await;
            Outcome {
                marks,
                sent,
                unfed: Vec::new(),
                producer,
                committed: None,
                result,
            }
        };
        Some(outcome.boxed())
    }

    /// Takes note of what became of a commit, and returns its marks, and the batches that may now be handled. `is_current` says
    /// whether a partition is still the member's in this epoch.
    pub(super) fn end(
        &mut self,
        outcome: Outcome,
        is_current: impl Fn(&TopicPartition, u64) -> bool,
    ) -> (Vec<Mark>, log::Result<Vec<(u64, Batch)>>) {
        let Outcome {
            marks,
            sent,
            mut unfed,
            producer,
            committed,
            result,
        } = outcome;
        // Only what is still the member's tells: of what has gone, others may have committed the same, or more. And all of that: of
        // a partition of which nothing was done, the transaction says what was committed before.
        let was_committed = |committed: Vec<_>| {
            let mut current = marks.iter().filter(|mark| is_current(&mark.partition, mark.epoch));
            current.all(|mark| committed.contains(&(mark.partition.clone(), Some(mark.offset.clone()))))
        };
        let result = match committed.is_none_or(was_committed) {
            true => result,
            false => Err(log::Error::Aborted("its offsets were not committed".to_owned())),
        };
        self.committing = false;
        self.unfed_committing = 0;
        let now = Instant::now();
        if let Some(transactions) = &mut self.transactions {
            transactions.producer = producer;
        }
        let Err(error) = result else {
            self.commits += 1;
            self.back_off = BACK_OFF.0;
            self.not_before = now;
            self.due = match self.transactions {
                Some(_) => now + (now - self.begun).min(PAUSE),
                None => now + self.interval,
            };
            return (marks, Ok(unfed));
        };
        self.touched = true;
        let least = match error {
            log::Error::Fenced(_) => AFTER_FENCED,
            _ => Duration::ZERO,
        };
        self.not_before = now + self.back_off.max(least);
        self.back_off = (self.back_off * 2).min(BACK_OFF.1);
        unfed.retain(|(epoch, batch)| is_current(&batch.partition, *epoch));
        self.unfed.splice(0..0, unfed);
        if let Some(transactions) = &mut self.transactions {
            match error {
                // Who is fenced may have committed before, and not heard of it.
                log::Error::Indefinite(_) | log::Error::Fenced(_) => {
                    transactions.undecided = Some((marks.clone(), sent));
                }
                _ => transactions.put_back(sent, is_current),
            }
        }
        (marks, Err(error))
    }

    /// Takes from the window what follows from a record because of which a transaction was refused, and returns that record with
    /// its partition; `None`: no record of the window is the reason.
    pub(super) fn take_refused(&mut self, error: &log::Error) -> Option<(TopicPartition, u64, Origin)> {
        let topic = refused_topic(error)?;
        let may_be = |record: &ProducerRecord| match error {
            log::Error::RecordTooLarge { size_bytes, .. } => record.size_bytes() >= *size_bytes,
            log::Error::UnknownPartition(unknown) => record.partition == Some(unknown.partition),
            _ => true,
        };
        // Most often a topic refuses what has no key, because it is compacted.
        let suspicion = |record: &ProducerRecord| {
            let keyless = matches!(error, log::Error::InvalidTopic { .. }) && record.key.is_none();
            (keyless, record.size_bytes())
        };
        let transactions = self.transactions.as_mut()?;
        let refused = transactions
            .window
            .iter()
            .filter(|sent| *sent.record.topic == *topic && sent.origin.is_some() && may_be(&sent.record));
        let refused = refused.max_by_key(|sent| suspicion(&sent.record))?;
        let (partition, epoch) = (refused.partition.clone(), refused.epoch);
        let offset = refused.origin.as_ref().map(|origin| origin.record.offset);
        let all = transactions.window.extract_if(.., |sent| {
            sent.partition == partition && sent.origin.as_ref().map(|origin| origin.record.offset) == offset
        });
        let origin = all.filter_map(|sent| sent.origin).last();
        transactions.count();
        // Without it the next transaction may be taken at once.
        self.back_off = BACK_OFF.0;
        self.not_before = Instant::now();
        Some((partition, epoch, origin?))
    }
}

/// The topic that does not take a record.
pub(super) fn refused_topic(error: &log::Error) -> Option<&str> {
    match error {
        log::Error::RecordTooLarge { topic, .. }
        | log::Error::InvalidTopic { topic, .. }
        | log::Error::UnknownTopic(topic) => Some(topic),
        log::Error::UnknownPartition(partition) => Some(&partition.topic),
        _ => None,
    }
}

impl Transactions {
    /// Puts what a transaction did not commit before what came later.
    fn put_back(&mut self, mut sent: Vec<Sent>, is_current: impl Fn(&TopicPartition, u64) -> bool) {
        sent.retain(|sent| is_current(&sent.partition, sent.epoch));
        sent.append(&mut self.window);
        self.window = sent;
        self.count();
    }

    fn count(&mut self) {
        self.window_bytes = self.window.iter().map(Sent::size_bytes).sum();
    }
}

/// Whether a commit may succeed when it is tried again with what is the member's then.
pub(super) fn may_pass(error: &log::Error) -> bool {
    use log::Error;
    error.is_retriable()
        || matches!(
            error,
            Error::UnknownMember { .. } | Error::Fenced(_) | Error::Indefinite(_)
        )
}

/// Commits everything in one transaction, with a new producer if there is none. The producer is gone when it was fenced.
async fn transact(
    log: &Log,
    transactional_id: &str,
    producer: Option<TransactionalProducer>,
    offsets: impl Future<Output = log::Result<Vec<(log::GroupMetadata, Vec<(TopicPartition, CommittedOffset)>)>>>,
    sent: &[Sent],
) -> (Option<TransactionalProducer>, log::Result<()>) {
    let mut producer = match producer {
        Some(producer) => producer,
        None => match log.transactional_producer(transactional_id).await {
            Ok(producer) => producer,
            Err(error) => return (None, Err(error)),
        },
    };
    let mut transaction = producer.begin();
    let result = async {
        let offsets = offsets.await?;
        for sent in sent {
            transaction.send(sent.record.clone()).await?;
        }
        for (member, offsets) in offsets {
            transaction.send_offsets(member, offsets);
        }
        transaction.commit().await
    };
    match result.await {
        Err(error @ log::Error::Fenced(_)) => (None, Err(error)),
        result => (Some(producer), result),
    }
}

/// Asks what is committed for the partitions of a transaction of which it is not known whether it was.
async fn decide(
    committed: impl Future<Output = log::Result<Vec<(TopicPartition, Option<CommittedOffset>)>>>,
    marks: Vec<Mark>,
    sent: Vec<Sent>,
    producer: Option<TransactionalProducer>,
) -> Outcome {
    let (committed, result) = match committed.await {
        Ok(committed) => (Some(committed), Ok(())),
        // Still not known: it is asked again.
        Err(error) => (None, Err(log::Error::Indefinite(error.to_string()))),
    };
    Outcome {
        marks,
        sent,
        unfed: Vec::new(),
        producer,
        committed,
        result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::embedded::EmbeddedSettings;
    use crate::log::{NextOffset, TopicSpec};
    use crate::patterns::consumer::routes::Routes;
    use crate::patterns::retry::RetryPolicy;

    fn partition(partition: i32) -> TopicPartition {
        TopicPartition::new("orders", partition)
    }

    fn offset(next_offset: i64) -> CommittedOffset {
        CommittedOffset {
            next_offset: NextOffset(next_offset),
            metadata: String::new(),
        }
    }

    /// A transaction with offset 10 of partitions 0 and 1, and what is committed for them by now.
    fn asked(committed: [i64; 2]) -> Outcome {
        let mark = |number| Mark {
            partition: partition(number),
            epoch: 1,
            offset: offset(10),
        };
        let sent = |number| Sent {
            partition: partition(number),
            epoch: 1,
            origin: None,
            record: ProducerRecord::to("checkouts").key(number.to_string()),
        };
        Outcome {
            marks: vec![mark(0), mark(1)],
            sent: vec![sent(0), sent(1)],
            unfed: Vec::new(),
            producer: None,
            committed: Some(
                (0..)
                    .zip(committed)
                    .map(|(of, at)| (partition(of), Some(offset(at))))
                    .collect(),
            ),
            result: Ok(()),
        }
    }

    async fn open_log() -> (tempfile::TempDir, Log) {
        let folder = tempfile::tempdir().expect("a folder");
        let log = Log::open_embedded(EmbeddedSettings::new(folder.path())).await;
        (folder, log.expect("a log"))
    }

    #[tokio::test]
    async fn an_unknown_end_is_judged_by_a_partition_that_is_still_the_members() {
        let (_folder, log) = open_log().await;
        let settings = ConsumerBuilder::new("group", ["orders"]).guarantee(DeliveryGuarantee::ExactlyOnce);
        let mut committer = Committer::new(&log, &settings).await.expect("a committer");
        let waiting = |committer: &Committer| committer.transactions.as_ref().map_or(0, |own| own.window.len());
        // Partition 0 has moved to a member that went further.
        let is_current = |of: &TopicPartition, _| of.partition == 1;
        let (_, result) = committer.end(asked([20, 10]), is_current);
        result.expect("it was committed");
        assert_eq!(waiting(&committer), 0, "nothing is sent a second time");
        let (_, result) = committer.end(asked([10, 5]), is_current);
        assert!(matches!(result, Err(log::Error::Aborted(_))), "it was not committed");
        assert_eq!(waiting(&committer), 1, "only what is the member's is sent again");
        // Nothing was done of partition 0: it stands where it stood, whether or not this was committed.
        let (_, result) = committer.end(asked([10, 5]), |_, _| true);
        assert!(matches!(result, Err(log::Error::Aborted(_))), "it was not committed");
        // With nothing left that is the member's there is nothing to send either.
        committer.forget(&partition(0));
        committer.forget(&partition(1));
        let (_, result) = committer.end(asked([0, 0]), |_, _| false);
        result.expect("nobody minds");
        assert_eq!(waiting(&committer), 0);
    }

    #[tokio::test]
    async fn whether_it_had_committed_before_it_was_fenced_is_looked_up() {
        let (_folder, log) = open_log().await;
        let settings = ConsumerBuilder::new("group", ["orders"]).guarantee(DeliveryGuarantee::ExactlyOnce);
        let mut committer = Committer::new(&log, &settings).await.expect("a committer");
        let waiting = |committer: &Committer| committer.transactions.as_ref().map_or(0, |own| own.window.len());
        for (committed, again) in [([10, 10], 0), ([5, 5], 2)] {
            let fenced = Outcome {
                result: Err(log::Error::Fenced("group-0".to_owned())),
                committed: None,
                ..asked([0, 0])
            };
            committer.end(fenced, |_, _| true).1.expect_err("it is fenced");
            assert_eq!(waiting(&committer), 0, "nothing is sent before that is known");
            let own = committer.transactions.as_mut().expect("it has transactions");
            own.undecided.take().expect("it is looked up");
            let (_, result) = committer.end(asked(committed), |_, _| true);
            assert_eq!((result.is_err(), waiting(&committer)), (again > 0, again));
        }
    }

    #[tokio::test]
    async fn what_waits_for_its_offsets_is_bounded_while_they_cannot_be_committed() {
        let (_folder, log) = open_log().await;
        let settings = ConsumerBuilder::new("group", ["orders"]).guarantee(DeliveryGuarantee::AtMostOnce);
        let mut committer = Committer::new(&log, &settings).await.expect("a committer");
        let members = join(&log, &settings).await;
        let batch = || Batch {
            partition: partition(0),
            records: Vec::new(),
            next_offset: NextOffset(10),
            caught_up: false,
        };
        for _ in 0..3 {
            while committer.may_take() {
                committer.commit_first(1, batch());
            }
            drop(committer.begin(&members, Vec::new()).expect("a commit"));
            assert!(!committer.may_take(), "what is being committed counts");
            let failed = Outcome {
                marks: Vec::new(),
                sent: Vec::new(),
                unfed: (0..WAITING_BATCHES).map(|_| (1, batch())).collect(),
                producer: None,
                committed: None,
                result: Err(log::Error::Unavailable("no coordinator".to_owned())),
            };
            committer.end(failed, |_, _| true).1.expect_err("it failed");
            assert_eq!(committer.unfed.len(), WAITING_BATCHES);
        }
    }

    #[tokio::test]
    async fn of_what_a_topic_refuses_that_is_blamed_which_can_be_the_reason() {
        let (_folder, log) = open_log().await;
        let settings = ConsumerBuilder::new("group", ["orders"]).guarantee(DeliveryGuarantee::ExactlyOnce);
        let mut committer = Committer::new(&log, &settings).await.expect("a committer");
        let mut offset = 0;
        let mut send = |committer: &mut Committer, record: ProducerRecord| {
            let origin = Record {
                offset,
                timestamp_ms: 0,
                key: None,
                value: Some(vec![b'x'; 1000].into()),
                headers: log::Headers::new(),
            };
            offset += 1;
            committer.add(
                &partition(0),
                1,
                Some(Origin {
                    record: origin,
                    attempts: 1,
                }),
                record,
            );
        };
        let to = || ProducerRecord::to("totals").value("a long value");
        send(&mut committer, to().key("a"));
        send(&mut committer, ProducerRecord::to("totals").value("1"));
        send(&mut committer, to().key("b").partition(7));
        send(&mut committer, to().key("c"));
        let own = committer.transactions.as_ref().expect("it has transactions");
        assert!(own.window_bytes > 4000, "what they follow from is kept in memory too");
        let keyless = log::Error::keyless("totals");
        let blamed = committer
            .take_refused(&keyless)
            .map(|(_, _, origin)| origin.record.offset);
        assert_eq!(blamed, Some(1));
        let unknown = log::Error::UnknownPartition(TopicPartition::new("totals", 7));
        let blamed = committer
            .take_refused(&unknown)
            .map(|(_, _, origin)| origin.record.offset);
        assert_eq!(blamed, Some(2));
    }

    async fn join(log: &Log, settings: &ConsumerBuilder) -> Members {
        let apply = async |topics: &[TopicSpec]| {
            let plan = log.plan_topics(topics).await.expect("a plan");
            log.apply_topics(&plan).await.expect("topics");
        };
        apply(&[TopicSpec::new("orders", 2)]).await;
        apply(&settings.topics(log).await.expect("topics")).await;
        let topics = ["orders".to_owned()];
        let routes = Routes::new(log, "group", &topics, &RetryPolicy::None).await;
        let members = Members::join(log, settings, &routes.expect("routes"), Duration::from_secs(1)).await;
        members.expect("members")
    }

    #[tokio::test]
    async fn what_is_done_while_an_unknown_end_is_looked_up_is_due_after_it() {
        let (_folder, log) = open_log().await;
        let settings = ConsumerBuilder::new("group", ["orders"]).guarantee(DeliveryGuarantee::ExactlyOnce);
        let members = join(&log, &settings).await;
        let mut committer = Committer::new(&log, &settings).await.expect("a committer");
        let unknown = Outcome {
            result: Err(log::Error::Indefinite("cut off".to_owned())),
            committed: None,
            ..asked([0, 0])
        };
        committer.end(unknown, |_, _| true).1.expect_err("nobody knows");
        committer.touch();
        let looked_up = committer.begin(&members, Vec::new()).expect("it is looked up");
        drop(looked_up);
        committer.end(asked([10, 10]), |_, _| true).1.expect("it was committed");
        assert!(committer.wake_at().is_some());
    }
}
