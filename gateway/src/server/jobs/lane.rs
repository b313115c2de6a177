//! The producing of jobs: what waits shares a transaction.
//!
//! ```text
//! handlers ── small ──▶ queue ──▶ lanes: each takes all that waits into one transaction of its own producer
//!          └─ large ──▶ queue ──▶ large lanes: one job, one transaction
//! ```
//! A transaction holds back the readers of every partition that it has written to, so a large job has one to itself, and no small
//! job waits behind it. Its chunks come first and the registration last: who sees the registration can see all chunks.
//!
//! Invariant: a job is answered once; one that nobody waits for any more is not begun, and one that fails leaves nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::chunk::Plan;
use super::spool::Spooled;
use crate::log::{
    self, Log, NextOffset, ProducerRecord, StartAt, TopicDescription, TopicPartition, Transaction,
    TransactionalProducer, partition_for_key,
};
use crate::server::config::{BodyFormat, TopicsConfig};
use crate::server::job_store::{JobCommand, command_record};
use crate::server::token::Token;

/// Small jobs of one transaction at most.
pub(crate) const TRANSACTION_JOBS: usize = 256;
/// A transaction takes no further job when it has this many bytes.
pub(crate) const TRANSACTION_BYTES: u64 = 4 * 1024 * 1024;
/// A lane waits for more jobs for an eighth of what its last transaction took, 5 ms at most: clients that were answered together
/// come again together, and a transaction of one job costs as much as one of many.
const GATHERING: (u32, Duration) = (8, Duration::from_millis(5));
/// How long the transaction of a large job may be open on Kafka. It is given up after nine tenths and answered 503: 1 GiB takes a
/// broker beside this process 5 s, and one that is far away may take it at 19 MiB/s. If this process dies within it and does not
/// come back, readers of the job's topic are held back as long.
pub(crate) const LARGE_TRANSACTION_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a lane waits before it tries again to make its producer.
pub(crate) const PRODUCER_PAUSE: Duration = Duration::from_secs(1);

/// A job type as it is on the log.
#[derive(Debug)]
pub(crate) struct JobTopic {
    pub(super) job_type: String,
    pub(super) topic: Arc<str>,
    pub(super) partitions: i32,
    pub(super) format: BodyFormat,
}

/// A job that is received, checked and cut.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: String,
    pub(super) to: Arc<JobTopic>,
    pub(super) channel: String,
    pub(super) traceparent: String,
    pub(super) submitted_ms: i64,
    pub(super) plan: Plan,
    pub(crate) body: Spooled,
}

/// Why a job was not produced.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum ProduceError {
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error("the spool cannot be read: {0}")]
    Spool(Arc<std::io::Error>),
    #[error("the registration cannot be written: {0}")]
    Registration(String),
    /// The client went away in the middle.
    #[error("nobody waits for the job any more")]
    Abandoned,
}

/// A job in a queue.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) job: Job,
    /// Answered with where the job's channel was when nothing of the job was written.
    pub(super) reply: oneshot::Sender<Result<Token, ProduceError>>,
}

/// Jobs that wait for the next lane that is free.
pub(super) type Queue = Arc<Mutex<mpsc::Receiver<Waiting>>>;

/// What the lanes have in common.
#[derive(Clone, Debug)]
pub(crate) struct LaneContext {
    pub(crate) log: Log,
    pub(crate) topics: TopicsConfig,
    pub(crate) notifications: TopicDescription,
    /// Cancelled when no more jobs come.
    pub(crate) drained: CancellationToken,
}

/// A transactional producer and the task's work around it.
pub(super) struct Lane {
    context: LaneContext,
    queue: Queue,
    transactional_id: String,
    producer: TransactionalProducer,
    kind: Kind,
    /// What the last transaction took.
    last_took: Duration,
}

/// Which jobs a lane takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Small ones, as many as wait.
    Shared,
    /// One large job at a time.
    Single,
}

impl Lane {
    /// A lane for small jobs, with its producer ready.
    pub(super) async fn shared(context: LaneContext, queue: Queue, transactional_id: String) -> log::Result<Self> {
        Self::new(context, queue, transactional_id, Kind::Shared).await
    }

    /// A lane for one large job at a time, with its producer ready.
    pub(super) async fn single(context: LaneContext, queue: Queue, transactional_id: String) -> log::Result<Self> {
        Self::new(context, queue, transactional_id, Kind::Single).await
    }

    async fn new(context: LaneContext, queue: Queue, transactional_id: String, kind: Kind) -> log::Result<Self> {
        let producer = kind.producer(&context.log, &transactional_id).await?;
        Ok(Self {
            context,
            queue,
            transactional_id,
            producer,
            kind,
            last_took: Duration::ZERO,
        })
    }

    /// Produces what comes, until no more does.
    pub(super) async fn run(mut self) {
        while let Some(batch) = self.next_batch().await {
            let usable = self.produce_and_answer(batch).await;
            if !usable && !self.replace_producer().await {
                return;
            }
        }
    }

    /// Everything that waits, as far as it fits into a transaction; `None` when no more comes.
    async fn next_batch(&self) -> Option<Vec<Waiting>> {
        let mut queue = self.queue.lock().await;
        let first = tokio::select! {
            biased;
            first = queue.recv() => first?,
            () = self.context.drained.cancelled() => return None,
        };
        let mut size_bytes = first.job.body.size_bytes;
        let mut batch = vec![first];
        if self.kind == Kind::Shared {
            tokio::time::sleep((self.last_took / GATHERING.0).min(GATHERING.1)).await;
        }
        while batch.len() < self.kind.jobs()
            && size_bytes < TRANSACTION_BYTES
            && let Ok(next) = queue.try_recv()
        {
            size_bytes += next.job.body.size_bytes;
            batch.push(next);
        }
        Some(batch)
    }

    /// Returns whether the producer can be used again.
    async fn produce_and_answer(&mut self, mut batch: Vec<Waiting>) -> bool {
        batch.retain(|waiting| !waiting.reply.is_closed());
        let produced = self.produce(&batch).await;
        match &produced {
            Err(error) if batch.len() > 1 && error.may_be_of_one_job() => {
                tracing::debug!(%error, "a shared transaction failed, each job is tried alone: {error}");
            }
            _ => return answer(batch, produced),
        }
        let mut usable = true;
        for waiting in batch {
            let alone = vec![waiting];
            let produced = self.produce(&alone).await;
            usable &= answer(alone, produced);
        }
        usable
    }

    /// Writes the jobs in one transaction.
    async fn produce(&mut self, batch: &[Waiting]) -> Result<Vec<Token>, ProduceError> {
        let began = Instant::now();
        let jobs: Vec<&Job> = batch.iter().map(|waiting| &waiting.job).collect();
        let tokens = self.context.tokens(&jobs).await?;
        let asked = began.elapsed();
        let mut transaction = self.producer.begin();
        let is_abandoned = || batch.len() == 1 && batch[0].reply.is_closed();
        self.context.write(&mut transaction, &jobs, is_abandoned).await?;
        let written = began.elapsed();
        transaction.commit().await?;
        self.last_took = began.elapsed();
        tracing::debug!(
            jobs = batch.len(),
            "a transaction with {} jobs: places {asked:?}, records {:?}, commit {:?}",
            batch.len(),
            written - asked,
            began.elapsed() - written,
        );
        Ok(tokens)
    }

    /// Makes the producer anew; false when no more jobs come.
    async fn replace_producer(&mut self) -> bool {
        loop {
            match self.kind.producer(&self.context.log, &self.transactional_id).await {
                Ok(producer) => {
                    self.producer = producer;
                    return true;
                }
                Err(error) => tracing::error!(%error, "jobs cannot be produced: {error}"),
            }
            tokio::select! {
                () = self.context.drained.cancelled() => return false,
                () = tokio::time::sleep(PRODUCER_PAUSE) => {}
            }
        }
    }
}

impl Kind {
    /// Jobs of one transaction at most.
    fn jobs(self) -> usize {
        match self {
            Self::Shared => TRANSACTION_JOBS,
            Self::Single => 1,
        }
    }

    async fn producer(self, log: &Log, transactional_id: &str) -> log::Result<TransactionalProducer> {
        match self {
            Self::Shared => log.transactional_producer(transactional_id).await,
            Self::Single => {
                let timeout = LARGE_TRANSACTION_TIMEOUT;
                log.transactional_producer_within(transactional_id, timeout).await
            }
        }
    }
}

/// Answers each job, and returns whether the producer can be used again.
fn answer(batch: Vec<Waiting>, produced: Result<Vec<Token>, ProduceError>) -> bool {
    match produced {
        Ok(tokens) => {
            for (waiting, token) in batch.into_iter().zip(tokens) {
                // Who has gone meanwhile needs no answer.
                let _ = waiting.reply.send(Ok(token));
            }
            true
        }
        Err(error) => {
            for waiting in batch {
                // As above.
                let _ = waiting.reply.send(Err(error.clone()));
            }
            !matches!(error, ProduceError::Log(log::Error::Fenced(_) | log::Error::Closed))
        }
    }
}

impl ProduceError {
    /// Whether nothing of the transaction is visible and one of its jobs may be the cause.
    pub(crate) fn may_be_of_one_job(&self) -> bool {
        match self {
            Self::Spool(_) | Self::Registration(_) => true,
            Self::Log(error) => matches!(
                error,
                log::Error::Aborted(_)
                    | log::Error::InvalidTopic { .. }
                    | log::Error::RecordTooLarge { .. }
                    | log::Error::Unauthorized(_)
                    | log::Error::UnknownPartition(_)
                    | log::Error::UnknownTopic(_)
            ),
            Self::Abandoned => false,
        }
    }
}

impl LaneContext {
    /// Adds jobs to a transaction: the chunks of all, then the registrations.
    pub(crate) async fn write(
        &self,
        transaction: &mut Transaction<'_>,
        jobs: &[&Job],
        is_abandoned: impl Fn() -> bool,
    ) -> Result<(), ProduceError> {
        // One start for all: the fewer partitions a transaction touches, the less it costs a broker.
        let first_partition = rand::random_range(0..i32::MAX);
        for job in jobs {
            let mut sent = 0;
            while sent < job.plan.chunks.len() {
                if is_abandoned() {
                    return Err(ProduceError::Abandoned);
                }
                let values = job.body.read_chunks(&job.plan, sent).await;
                for value in values.map_err(|error| ProduceError::Spool(Arc::new(error)))? {
                    transaction.send(job.chunk_record(sent, value, first_partition)).await?;
                    sent += 1;
                }
            }
        }
        for job in jobs {
            transaction.send(job.registration(&self.topics)?).await?;
        }
        Ok(())
    }

    /// Where the channels of the jobs are now. Each partition is asked for once.
    pub(crate) async fn tokens(&self, jobs: &[&Job]) -> log::Result<Vec<Token>> {
        let TopicDescription {
            name, id, partitions, ..
        } = &self.notifications;
        let place = |job: &&Job| {
            let partition = partition_for_key(job.channel.as_bytes(), *partitions);
            TopicPartition::new(name.as_str(), partition)
        };
        let places: Vec<_> = jobs.iter().map(place).collect();
        let ends = self.log.offsets(&places, StartAt::End).await?;
        let token = |(place, end): (&TopicPartition, i64)| Token::at(*id, place.partition, NextOffset(end));
        Ok(places.iter().zip(ends).map(token).collect())
    }
}

impl Job {
    /// The record of a chunk, on a partition of its own in turn from `first_partition` on.
    fn chunk_record(&self, index: usize, value: Bytes, first_partition: i32) -> ProducerRecord {
        let chunk = &self.plan.chunks[index];
        let partition = (first_partition as usize + index) % self.to.partitions as usize;
        let content_type = match self.to.format {
            BodyFormat::Csv => "text/csv; charset=utf-8",
            BodyFormat::Ndjson => "application/x-ndjson",
        };
        ProducerRecord::to(Arc::clone(&self.to.topic))
            .partition(partition as i32)
            .header("bn-job", self.id.clone())
            .header("bn-job-type", self.to.job_type.clone())
            .header("bn-chunk", index.to_string())
            .header("bn-chunks", self.plan.chunks.len().to_string())
            .header("bn-first-line", chunk.first_line.to_string())
            .header("bn-rows", chunk.rows.to_string())
            .header("bn-channel", self.channel.clone())
            .header("traceparent", self.traceparent.clone())
            .header("content-type", content_type)
            .value(value)
    }

    fn registration(&self, topics: &TopicsConfig) -> Result<ProducerRecord, ProduceError> {
        let register = JobCommand::Register {
            job_type: self.to.job_type.clone(),
            channel: self.channel.clone(),
            chunks: self.plan.chunks.len() as u32,
            rows: self.plan.rows,
            submitted_ms: self.submitted_ms,
            traceparent: Some(self.traceparent.clone()),
        };
        command_record(topics, &self.id, &register).map_err(|error| ProduceError::Registration(error.to_string()))
    }
}
