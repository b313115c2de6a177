//! Moves chunks from the job type's topic into the database and says so: at least once, and a repetition changes nothing.
//!
//! Each worker is a member of the group. It takes some chunks at a time: says that their jobs have begun, reads the rows on a
//! blocking thread, upserts them in one transaction, produces `done` for each chunk, and only then commits the offsets. While
//! that goes on it hears of partitions that move to others; those it finishes or gives up, and releases.
//!
//! Invariant: an offset is committed only when the contacts before it are in the database and their answers in the log.

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use barnabas::log::{
    self, Batch, CommittedOffset, GroupEvent, GroupMember, GroupSettings, Log, Producer, ProducerRecord,
    ProducerSettings, TopicPartition,
};
use barnabas::patterns;
use barnabas::server::job_store::{JobCommand, command_record};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::chunk::{self, Chunk};
use super::database::Database;
use super::settings::ImporterSettings;

/// Chunks that share a database transaction at most. More would make progress come in leaps.
const CHUNKS_PER_TRANSACTION: usize = 8;

/// With so many chunks waiting, a worker pauses its partitions; what the log has read ahead still comes.
const WAITING_CHUNKS: usize = 8 * CHUNKS_PER_TRANSACTION;

/// Jobs that are remembered as begun. A forgotten one is said to have begun again, which does no harm.
const REMEMBERED_JOBS: usize = 1024;

/// First and longest wait before something is tried again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// The importer cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log refuses in a way that trying again does not help.
    #[error(transparent)]
    Log(#[from] log::Error),
}

/// Imports contacts until `stopping`; what has been begun is finished first, unless the database is away.
///
/// # Errors
/// The log was closed, or does not allow it. Everything else is tried again.
pub async fn run(
    log: Log,
    database: Database,
    settings: ImporterSettings,
    stopping: CancellationToken,
) -> Result<(), Error> {
    let prepared = retry("the table of contacts", &stopping, || database.prepare(), |_| true).await;
    if prepared.is_none() {
        return Ok(());
    }
    let make = || log.producer(ProducerSettings::default());
    let Some(producer) = retry("the producer of answers", &stopping, make, log::Error::is_retriable).await else {
        return Ok(());
    };
    let shared = Arc::new(Shared {
        producer: producer?,
        database,
        begun: Mutex::default(),
        settings,
    });
    // One that cannot go on takes the others along: the process is started again, or says why it cannot.
    let ending = stopping.child_token();
    let failure = Arc::new(Mutex::new(None));
    let workers = TaskTracker::new();
    for _ in 0..shared.settings.workers {
        let (log, shared, ending, failure) = (log.clone(), Arc::clone(&shared), ending.clone(), Arc::clone(&failure));
        workers.spawn(async move {
            if let Err(error) = work(log, shared, &ending).await {
                failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
            }
            // Also at the end of an abort or panic nothing is waited for in vain.
            ending.cancel();
        });
    }
    let _abort = ending.clone().drop_guard();
    workers.close();
    workers.wait().await;
    shared.database.close().await;
    let failure = failure.lock().unwrap_or_else(|e| e.into_inner()).take();
    failure.map_or(Ok(()), Err)
}

/// What the workers of a process share.
#[derive(Debug)]
struct Shared {
    producer: Producer,
    database: Database,
    begun: Mutex<BegunJobs>,
    settings: ImporterSettings,
}

#[derive(Debug, Default)]
struct BegunJobs {
    known: HashSet<String>,
    oldest_first: VecDeque<String>,
}

impl BegunJobs {
    /// Whether the job is a new one.
    fn insert(&mut self, job: &str) -> bool {
        if self.known.contains(job) {
            return false;
        }
        if self.oldest_first.len() == REMEMBERED_JOBS
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.known.insert(job.to_owned());
        self.oldest_first.push_back(job.to_owned());
        true
    }
}

/// One worker: joins, and joins again when the log was away.
async fn work(log: Log, shared: Arc<Shared>, stopping: &CancellationToken) -> Result<(), Error> {
    let settings = GroupSettings::new(&shared.settings.group, [&shared.settings.topic]);
    // The gateway makes the topic, perhaps later.
    let join = || log.join_group(settings.clone());
    let may_come = |error: &log::Error| error.is_retriable() || matches!(error, log::Error::UnknownTopic(_));
    match retry("joining the group", stopping, join, may_come).await {
        Some(member) => Worker::new(member?, shared).run(stopping).await,
        None => Ok(()),
    }
}

/// A member of the group with what waits for it.
struct Worker {
    member: GroupMember,
    shared: Arc<Shared>,
    assigned: HashSet<TopicPartition>,
    waiting: VecDeque<Batch>,
    paused: bool,
}

/// What became of the chunks in hand.
enum Outcome {
    Done,
    /// Told to give up while the database or the log was away.
    GivenUp,
    Failed(Error),
}

impl Worker {
    fn new(member: GroupMember, shared: Arc<Shared>) -> Self {
        Self {
            member,
            shared,
            assigned: HashSet::new(),
            waiting: VecDeque::new(),
            paused: false,
        }
    }

    async fn run(mut self, stopping: &CancellationToken) -> Result<(), Error> {
        while !stopping.is_cancelled() {
            let in_hand = self.take();
            if !in_hand.is_empty() {
                self.process(in_hand, stopping).await?;
                continue;
            }
            self.flow().await;
            tokio::select! {
                () = stopping.cancelled() => {}
                event = self.member.next() => {
                    let revoked = self.hear(event, &mut Vec::new()).await?;
                    self.release(revoked).await;
                }
            }
        }
        Ok(())
    }

    /// Does the chunks in hand while it hears of what happens to the group.
    async fn process(&mut self, mut in_hand: Vec<Batch>, stopping: &CancellationToken) -> Result<(), Error> {
        let giving_up = stopping.child_token();
        let work = import(Arc::clone(&self.shared), in_hand.clone(), giving_up.clone());
        tokio::pin!(work);
        let mut revoked = Vec::new();
        let outcome = loop {
            self.flow().await;
            tokio::select! {
                outcome = &mut work => break outcome,
                event = self.member.next() => {
                    let now_revoked = self.hear(event, &mut in_hand).await?;
                    let (held, free): (Vec<_>, Vec<_>) = now_revoked
                        .into_iter()
                        .partition(|partition| in_hand.iter().any(|batch| batch.partition == *partition));
                    self.release(free).await;
                    if !held.is_empty() {
                        revoked.extend(held);
                        giving_up.cancel();
                    }
                }
            }
        };
        match outcome {
            Outcome::Done => self.commit(&in_hand).await?,
            Outcome::GivenUp => {
                in_hand.retain(|batch| !revoked.contains(&batch.partition));
                for batch in in_hand.into_iter().rev() {
                    self.waiting.push_front(batch);
                }
            }
            Outcome::Failed(error) => return Err(error),
        }
        self.release(revoked).await;
        Ok(())
    }

    /// Chunks for one transaction, in the order in which they came.
    fn take(&mut self) -> Vec<Batch> {
        let mut taken = Vec::new();
        let mut room = CHUNKS_PER_TRANSACTION;
        while room > 0
            && let Some(mut batch) = self.waiting.pop_front()
        {
            if batch.records.len() > room {
                let rest = batch.records.split_off(room);
                let end = std::mem::replace(&mut batch.next_offset, log::NextOffset(rest[0].offset));
                self.waiting.push_front(Batch {
                    partition: batch.partition.clone(),
                    records: rest,
                    next_offset: end,
                    caught_up: batch.caught_up,
                });
            }
            room -= batch.records.len();
            taken.push(batch);
        }
        taken
    }

    /// Takes an event in and returns the partitions that are to be released; what waits of them is forgotten.
    async fn hear(
        &mut self,
        event: log::Result<GroupEvent>,
        in_hand: &mut Vec<Batch>,
    ) -> Result<Vec<TopicPartition>, Error> {
        match event {
            Ok(GroupEvent::Assigned(partitions)) => {
                let new: Vec<_> = partitions.into_iter().map(|(partition, _)| partition).collect();
                self.assigned.extend(new.iter().cloned());
                // The others are paused still, and resumed with these.
                if self.paused
                    && let Err(error) = self.member.pause(new).await
                {
                    tracing::debug!(%error, "a rebalance comes between: {error}");
                }
            }
            Ok(GroupEvent::Records(batch)) => {
                // An empty batch says only how far the reader came; there is nothing to do for it.
                if !batch.records.is_empty() {
                    self.waiting.push_back(batch);
                }
            }
            Ok(GroupEvent::Revoked(partitions)) => {
                self.forget(&partitions);
                return Ok(partitions);
            }
            Ok(GroupEvent::Lost(partitions)) => {
                self.forget(&partitions);
                in_hand.retain(|batch| !partitions.contains(&batch.partition));
            }
            Err(error) if error.is_retriable() => {
                tracing::warn!(%error, "the log is away: {error}");
                tokio::time::sleep(BACKOFF.0).await;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(Vec::new())
    }

    fn forget(&mut self, partitions: &[TopicPartition]) {
        self.assigned.retain(|partition| !partitions.contains(partition));
        self.waiting.retain(|batch| !partitions.contains(&batch.partition));
    }

    /// Pauses when much waits, and resumes when little does.
    async fn flow(&mut self) {
        let chunks: usize = self.waiting.iter().map(|batch| batch.records.len()).sum();
        let pause = match self.paused {
            false => chunks >= WAITING_CHUNKS,
            true => chunks >= CHUNKS_PER_TRANSACTION,
        };
        if pause == self.paused {
            return;
        }
        let partitions = self.assigned.iter().cloned().collect();
        let asked = match pause {
            true => self.member.pause(partitions).await,
            false => self.member.resume(partitions).await,
        };
        match asked {
            Ok(()) => self.paused = pause,
            Err(error) => tracing::debug!(%error, "a rebalance comes between: {error}"),
        }
    }

    /// Commits what is done. When that fails the chunks come again, to this worker or another, and change nothing.
    async fn commit(&self, done: &[Batch]) -> Result<(), Error> {
        let mut offsets: Vec<(TopicPartition, CommittedOffset)> = Vec::new();
        for batch in done {
            let offset = CommittedOffset {
                next_offset: batch.next_offset,
                metadata: String::new(),
            };
            match offsets.iter_mut().find(|(partition, _)| *partition == batch.partition) {
                Some((_, last)) => *last = offset,
                None => offsets.push((batch.partition.clone(), offset)),
            }
        }
        if offsets.is_empty() {
            return Ok(());
        }
        match self.member.commit(offsets).await {
            Ok(()) => Ok(()),
            Err(log::Error::Closed) => Err(log::Error::Closed.into()),
            Err(error) => {
                tracing::warn!(%error, "chunks that are done will come again, their offsets were not committed: {error}");
                Ok(())
            }
        }
    }

    async fn release(&self, partitions: Vec<TopicPartition>) {
        if !partitions.is_empty()
            && let Err(error) = self.member.release(partitions).await
        {
            // Only a log that was closed refuses, and that ends the worker at the next event.
            tracing::debug!(%error, "not released: {error}");
        }
    }
}

/// Chunks into the database, answers into the log.
async fn import(shared: Arc<Shared>, batches: Vec<Batch>, giving_up: CancellationToken) -> Outcome {
    match try_import(&shared, batches, &giving_up).await {
        Ok(Some(())) => Outcome::Done,
        Ok(None) => Outcome::GivenUp,
        Err(error) => Outcome::Failed(error),
    }
}

/// `None` when it was told to give up.
async fn try_import(
    shared: &Arc<Shared>,
    batches: Vec<Batch>,
    giving_up: &CancellationToken,
) -> Result<Option<()>, Error> {
    let begun = begun(shared, &batches);
    if say(shared, begun, giving_up).await?.is_none() {
        return Ok(None);
    }
    let region = shared.settings.region;
    let chunks = match tokio::task::spawn_blocking(move || parse(&batches, region)).await {
        Ok(chunks) => chunks,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    };
    let (contacts, answers) = chunks;
    let upsert = || shared.database.upsert(&contacts);
    // The rule retries every error, so it ends well or not at all.
    if retry("the database", giving_up, upsert, |_| true).await.is_none() {
        return Ok(None);
    }
    say(shared, answers, giving_up).await
}

/// An answer to a job's store.
type Answer = (String, JobCommand);

fn begun(shared: &Shared, batches: &[Batch]) -> Vec<Answer> {
    let mut begun = shared.begun.lock().unwrap_or_else(|e| e.into_inner());
    let records = batches.iter().flat_map(|batch| &batch.records);
    records
        .filter_map(|record| chunk::identity(record).ok())
        .filter(|(job, _)| begun.insert(job))
        .map(|(job, chunk)| (job.to_owned(), JobCommand::Started { chunk }))
        .collect()
}

fn parse(batches: &[Batch], region: phonenumber::country::Id) -> (Vec<chunk::SourcedContact>, Vec<Answer>) {
    let mut contacts = Vec::new();
    let mut answers = Vec::new();
    for batch in batches {
        for record in &batch.records {
            match Chunk::parse(record, region) {
                Ok(chunk) => {
                    contacts.extend(chunk.contacts);
                    answers.push((chunk.job, chunk.answer));
                }
                Err(stray) => tracing::error!(
                    topic = %batch.partition.topic, partition = batch.partition.partition, offset = record.offset,
                    "a record is passed over: {stray}"
                ),
            }
        }
    }
    (contacts, answers)
}

/// Produces answers and waits until all are acknowledged; says all of them again when one is not. `None` when told to give up.
async fn say(shared: &Shared, answers: Vec<Answer>, giving_up: &CancellationToken) -> Result<Option<()>, Error> {
    let encode = |(job, command): &Answer| command_record(&shared.settings.topics, job, command);
    let records: Vec<ProducerRecord> = match answers.iter().map(encode).collect() {
        Ok(records) => records,
        Err(patterns::Error::Log(error)) => return Err(error.into()),
        Err(error) => {
            // No command of ours is too much for JSON.
            tracing::error!(%error, "an answer cannot be encoded: {error}");
            return Ok(Some(()));
        }
    };
    let produce = || async {
        let mut deliveries = Vec::with_capacity(records.len());
        for record in &records {
            deliveries.push(shared.producer.send(record.clone()).await?);
        }
        for delivery in deliveries {
            delivery.await?;
        }
        Ok(())
    };
    let produced = retry("the job store's topic", giving_up, produce, log::Error::is_retriable).await;
    Ok(produced.transpose()?)
}

/// Tries until it succeeds or fails for good, with growing pauses; `None` when told to give up meanwhile.
async fn retry<T, E, F>(
    what: &str,
    giving_up: &CancellationToken,
    mut attempt: impl FnMut() -> F,
    is_retriable: impl Fn(&E) -> bool,
) -> Option<Result<T, E>>
where
    E: std::fmt::Display,
    F: Future<Output = Result<T, E>>,
{
    let mut wait = BACKOFF.0;
    loop {
        match attempt().await {
            Err(error) if is_retriable(&error) => {
                tracing::warn!(%error, "{what}: {error}; trying again in {} ms", wait.as_millis());
            }
            ended => return Some(ended),
        }
        tokio::select! {
            () = giving_up.cancelled() => return None,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(BACKOFF.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_begins_once_while_it_is_remembered() {
        let mut begun = BegunJobs::default();
        assert!(begun.insert("first"));
        assert!(!begun.insert("first"));
        for job in 0..REMEMBERED_JOBS {
            assert!(begun.insert(&job.to_string()));
        }
        assert_eq!(begun.known.len(), REMEMBERED_JOBS);
        assert!(begun.insert("first"), "the oldest is forgotten");
    }
}
