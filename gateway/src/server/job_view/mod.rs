//! The job view: where each job stands, for `GET /v1/jobs/{id}`, in a SQLite file of this node.
//!
//! ```text
//! job store ══ {prefix}.jobs ══▶ JobView::run ─▶ jobs.sqlite: states + positions, one transaction ─▶ JobView::find
//! ```
//!
//! Invariant: the file is what the topic says up to the positions that stand in it. It is a cache of the log: bounded by the
//! topic's retention, built anew when the topic is another one or the file cannot be read, and never the only place of
//! anything.

mod file;
mod registration;
mod routes;

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::file::{Change, JobFile};
use super::config::TopicsConfig;
use super::event::now_ms;
use super::job_state::JobState;
use crate::log::{self, Batch, Log, Reader, StartAt, TopicDescription};

pub(crate) use routes::routes;

/// The file's name in the data folder.
const FILE: &str = "jobs.sqlite";

/// Jobs that are searched for on the log at a time; more wait for their turn.
const MAX_SEARCHES: usize = 2;

/// How often jobs past retention are removed.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// How long the projection rests after a failure.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The states of jobs as this node knows them. Clones share the file.
#[derive(Clone, Debug)]
pub struct JobView(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// For the projection alone.
    writing: Mutex<JobFile>,
    /// For everybody else. SQLite's write-ahead log lets it read while the other writes.
    reading: Mutex<JobFile>,
    waiting: Mutex<HashMap<Uuid, Arc<Notify>>>,
    /// Searches of the log that may run now.
    searches: Semaphore,
    is_caught_up: AtomicBool,
    /// Retention of the topic in milliseconds; `i64::MAX`: for ever.
    retention_ms: AtomicI64,
}

/// A job as the view knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its state.
    pub state: JobState,
    /// When that was written, in milliseconds since the Unix epoch.
    pub updated_ms: i64,
}

/// The view cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JobViewError {
    /// The folder cannot be made.
    #[error("the data folder: {0}")]
    Folder(#[from] io::Error),
    /// The SQLite file failed.
    #[error("the job view's file: {0}")]
    File(#[from] rusqlite::Error),
    /// The topic cannot be read.
    #[error(transparent)]
    Log(#[from] log::Error),
    /// A state in the file cannot be read, or the thread that was to do it ended.
    #[error("the job view: {0}")]
    Broken(String),
}

impl JobView {
    /// Opens the view of a topic in a folder, making both if they do not exist. What stands in the file from another topic, or
    /// from one of that name that was deleted, is dropped before anybody can see it.
    ///
    /// # Errors
    /// The folder or the file cannot be used.
    pub fn open(folder: &Path, topic: &TopicDescription) -> Result<Self, JobViewError> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(FILE);
        let mut writing = JobFile::open(&path)?;
        writing.positions(topic.id)?;
        let reading = JobFile::open(&path)?;
        Ok(Self(Arc::new(Inner {
            writing: Mutex::new(writing),
            reading: Mutex::new(reading),
            waiting: Mutex::default(),
            searches: Semaphore::new(MAX_SEARCHES),
            is_caught_up: AtomicBool::new(false),
            retention_ms: AtomicI64::new(retention_ms(topic)),
        })))
    }

    /// Follows the topic of job states until `stopping`. Failures are logged and tried again.
    pub async fn run(self, log: Log, topic: String, stopping: CancellationToken) {
        loop {
            let error = tokio::select! {
                () = stopping.cancelled() => return,
                ended = self.follow(&log, &topic) => match ended {
                    Err(JobViewError::Log(log::Error::Closed)) if stopping.is_cancelled() => return,
                    Err(error) => error,
                },
            };
            tracing::warn!(topic, %error, "the job view stopped and starts again: {error}");
            tokio::select! {
                () = stopping.cancelled() => return,
                () = tokio::time::sleep(RETRY_AFTER) => {}
            }
        }
    }

    /// The job, if the view has it.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn find(&self, id: Uuid) -> Result<Option<Job>, JobViewError> {
        self.blocking(move |inner| lock(&inner.reading).find(id)).await
    }

    /// The job as it is when `patience`, asked after each change how long to wait since the call, is at its end.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn find_patiently(
        &self,
        id: Uuid,
        patience: impl Fn(Option<&Job>) -> Duration,
    ) -> Result<Option<Job>, JobViewError> {
        let start = Instant::now();
        let interest = Interest::new(&self.0, id);
        loop {
            // Registered before looking, so that a change in between is not missed.
            let mut changed = std::pin::pin!(interest.changed.notified());
            changed.as_mut().enable();
            let job = self.find(id).await?;
            let deadline = start + patience(job.as_ref());
            if Instant::now() >= deadline {
                return Ok(job);
            }
            tokio::select! {
                () = changed => {}
                () = sleep_until(deadline) => return Ok(job),
            }
        }
    }

    /// The job as it was registered, from the log: for one that the view does not have, because its store has not come to it.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn find_registration(
        &self,
        log: &Log,
        topics: &TopicsConfig,
        id: Uuid,
        submitted_ms: i64,
    ) -> log::Result<Option<Job>> {
        let _turn = self.0.searches.acquire().await.map_err(|_| log::Error::Closed)?;
        registration::find(log, topics, id, submitted_ms).await
    }

    /// Whether the view has once reached the end of the topic. Before that a job that it does not have may exist.
    pub fn is_caught_up(&self) -> bool {
        self.0.is_caught_up.load(Ordering::Acquire)
    }

    /// Whether a job submitted then may have been removed by retention.
    pub fn is_past_retention(&self, submitted_ms: i64) -> bool {
        now_ms().saturating_sub(submitted_ms) > self.0.retention_ms.load(Ordering::Acquire)
    }

    async fn follow(&self, log: &Log, topic: &str) -> Result<Infallible, JobViewError> {
        let description = log.describe_topic(topic).await?;
        let retention_ms = retention_ms(&description);
        self.0.retention_ms.store(retention_ms, Ordering::Release);
        let id = description.id;
        let positions = self.blocking(move |inner| lock(&inner.writing).positions(id)).await?;
        let mut reader = log.reader(topic).await?;
        for partition in 0..description.partitions {
            assign(&mut reader, partition, positions.get(&partition).copied()).await?;
        }
        let mut behind: HashSet<i32> = (0..description.partitions).collect();
        let mut forget_at = Instant::now();
        loop {
            tokio::select! {
                batch = reader.next() => match batch {
                    Ok(batch) => {
                        if batch.caught_up && behind.remove(&batch.partition.partition) && behind.is_empty() {
                            self.apply(batch).await?;
                            self.0.is_caught_up.store(true, Ordering::Release);
                            tracing::debug!(topic, "the job view has caught up");
                        } else {
                            self.apply(batch).await?;
                        }
                    }
                    // What is missing now is past retention here too, so what is kept completes the view again.
                    Err(log::Error::OffsetOutOfRange { partition, .. }) => {
                        assign(&mut reader, partition.partition, None).await?;
                    }
                    Err(error) => return Err(error.into()),
                },
                () = sleep_until(forget_at) => {
                    let before_ms = now_ms().saturating_sub(retention_ms);
                    let removed = self.blocking(move |inner| lock(&inner.writing).forget(before_ms)).await?;
                    tracing::debug!(removed, "jobs past retention removed from the view");
                    forget_at = Instant::now() + FORGET_EVERY;
                }
            }
        }
    }

    /// Writes a batch and its end in one transaction, then wakes those who wait for its jobs.
    async fn apply(&self, batch: Batch) -> Result<(), JobViewError> {
        let (partition, next_offset) = (batch.partition.clone(), batch.next_offset);
        // The last of each job is all that counts.
        let mut changes: HashMap<Uuid, Change> = HashMap::new();
        for record in batch.records {
            let id = record.key.as_ref().and_then(|key| std::str::from_utf8(key).ok());
            let Some(id) = id.and_then(|id| Uuid::try_parse(id).ok()) else {
                tracing::warn!(
                    topic = %partition.topic, partition = partition.partition, offset = record.offset,
                    "passing over a state whose key is no job id"
                );
                continue;
            };
            let change = Change {
                state: record.value,
                updated_ms: record.timestamp_ms,
            };
            changes.insert(id, change);
        }
        let changed: Vec<Uuid> = changes.keys().copied().collect();
        self.blocking(move |inner| lock(&inner.writing).apply(partition.partition, next_offset, changes))
            .await?;
        let waiting = lock(&self.0.waiting);
        for id in changed {
            if let Some(changed) = waiting.get(&id) {
                changed.notify_waiters();
            }
        }
        Ok(())
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, JobViewError> + Send + 'static,
    ) -> Result<T, JobViewError> {
        let inner = self.0.clone();
        tokio::task::spawn_blocking(move || work(&inner))
            .await
            .map_err(|error| JobViewError::Broken(error.to_string()))?
    }
}

fn retention_ms(topic: &TopicDescription) -> i64 {
    topic.retention.map_or(i64::MAX, |retention| {
        i64::try_from(retention.as_millis()).unwrap_or(i64::MAX)
    })
}

/// Reads on from a position, or from the start where there is none or it is not kept.
async fn assign(reader: &mut Reader, partition: i32, position: Option<i64>) -> log::Result<()> {
    if let Some(position) = position {
        match reader.assign(partition, StartAt::Offset(position)).await {
            Err(log::Error::OffsetOutOfRange { .. }) => {}
            assigned => return assigned.map(|_| ()),
        }
    }
    reader.assign(partition, StartAt::Start).await.map(|_| ())
}

/// Somebody waits for changes of a job. The entry goes with the last of them.
struct Interest<'a> {
    inner: &'a Inner,
    id: Uuid,
    changed: Arc<Notify>,
}

impl<'a> Interest<'a> {
    fn new(inner: &'a Inner, id: Uuid) -> Self {
        let changed = lock(&inner.waiting).entry(id).or_default().clone();
        Self { inner, id, changed }
    }
}

impl Drop for Interest<'_> {
    fn drop(&mut self) {
        let mut waiting = lock(&self.inner.waiting);
        // The map's and this one.
        if Arc::strong_count(&self.changed) <= 2 {
            waiting.remove(&self.id);
        }
    }
}

/// A panic while a file was held has rolled its transaction back, and the map of those who wait is whole between any two
/// steps: what a poisoned lock guards can be used.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
