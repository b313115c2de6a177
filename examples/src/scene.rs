//! What the examples share: a log to run on, topics and groups that are this run's alone, and reading a topic back, which is how
//! each example proves what it promises.

use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use barnabas::log::{Log, ProducerRecord, Record, StartAt, TopicSpec};
use barnabas::patterns::consumer::{ConsumerBuilder, ConsumerHandle, Handler};
use barnabas::server::Config;
use barnabas::server::config::DataConfig;
use barnabas::server::event::Event;
use barnabas::server::program::Failure;
use serde::Serialize;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

/// How long to wait before the log is read again for something that has not happened yet.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The log of a run, and what the run has made on it.
#[derive(Debug)]
pub struct Scene {
    /// The log.
    pub log: Log,
    /// Behind every name on a log that others use too; empty on one that is this run's alone.
    suffix: String,
    /// Whether what the run makes stays, for the next one.
    is_kept: bool,
    topics: Mutex<Vec<String>>,
    /// Deleted when the run is over.
    _folder: Option<TempDir>,
}

impl Scene {
    /// Opens the log that the settings name: Kafka, or the embedded log in a temporary folder, or in the data folder if one is
    /// named. The settings then name that folder.
    ///
    /// # Errors
    /// The log or a temporary folder cannot be opened.
    pub async fn open(config: &mut Config) -> Result<Self, Failure> {
        let folder = match config.data.dir == DataConfig::default().dir {
            true => Some(tempfile::Builder::new().prefix("barnabas-").tempdir()?),
            false => None,
        };
        if let Some(folder) = &folder {
            config.data.dir = folder.path().to_owned();
        }
        let is_new = folder.is_some() && config.kafka.brokers.is_none();
        Ok(Self {
            log: config.open_log().await?,
            suffix: match is_new {
                true => String::new(),
                false => format!("-{:08x}", rand::random::<u32>()),
            },
            is_kept: false,
            topics: Mutex::default(),
            _folder: folder,
        })
    }

    /// Like [`Scene::open`], but what is made on a log that outlives the run is kept, under names that the next run has too.
    ///
    /// # Errors
    /// Those of [`Scene::open`].
    pub async fn open_kept(config: &mut Config) -> Result<Self, Failure> {
        let mut scene = Self::open(config).await?;
        scene.is_kept = !std::mem::take(&mut scene.suffix).is_empty();
        Ok(scene)
    }

    /// Whether what the run makes stays.
    pub fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// The name of a topic or group of this run.
    pub fn name(&self, name: &str) -> String {
        format!("{name}{}", self.suffix)
    }

    /// Makes topics. None is ever made in silence: what is missing is planned, and the plan carried out.
    ///
    /// # Errors
    /// The log refuses.
    pub async fn make(&self, topics: &[TopicSpec]) -> Result<(), Failure> {
        let plan = self.log.plan_topics(topics).await?;
        self.log.apply_topics(&plan).await?;
        if self.is_kept {
            return Ok(());
        }
        let names = topics.iter().map(|topic| topic.name.clone());
        self.topics.lock().unwrap_or_else(PoisonError::into_inner).extend(names);
        Ok(())
    }

    /// Makes the retry and dead-letter topics of a consumer, and starts it.
    ///
    /// # Errors
    /// The log refuses, or the consumer's settings do not go together.
    pub async fn start(&self, consumer: ConsumerBuilder, handler: impl Handler) -> Result<ConsumerHandle, Failure> {
        self.make(&consumer.topics(&self.log).await?).await?;
        Ok(consumer.start(&self.log, handler).await?)
    }

    /// All that stands on a topic now, in the order of each partition.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn read(&self, topic: &str) -> Result<Vec<Record>, Failure> {
        let mut reader = self.log.reader(topic).await?;
        let mut open = HashSet::new();
        for partition in 0..self.log.describe_topic(topic).await?.partitions {
            reader.assign(partition, StartAt::Start).await?;
            open.insert(partition);
        }
        let mut records = Vec::new();
        while !open.is_empty() {
            let batch = reader.next().await?;
            // What comes behind the end of a partition is not waited for.
            if open.contains(&batch.partition.partition) {
                records.extend(batch.records);
            }
            if batch.caught_up {
                open.remove(&batch.partition.partition);
            }
        }
        Ok(records)
    }

    /// Asks again and again until the answer is yes.
    ///
    /// # Errors
    /// Those of `is_so`.
    pub async fn until(&self, mut is_so: impl AsyncFnMut() -> Result<bool, Failure>) -> Result<(), Failure> {
        while !is_so().await? {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    /// Deletes the topics of this run, unless they are kept, and closes the log.
    pub async fn close(self) {
        let topics = self.topics.into_inner().unwrap_or_else(PoisonError::into_inner);
        for topic in topics.iter().collect::<HashSet<_>>() {
            if let Err(error) = self.log.delete_topic(topic).await {
                tracing::warn!(topic, %error, "topic {topic} could not be deleted");
            }
        }
        self.log.close().await;
    }
}

/// A process of its own, so to speak: a runtime whose tasks all end where they stand when it is dropped. Nothing is finished then,
/// nothing is committed, nobody is told.
#[derive(Debug)]
pub struct Process(Option<Runtime>);

impl Process {
    /// Starts one.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self(Some(runtime)))
    }

    /// Runs a task in it.
    pub fn spawn<F: Future<Output: Send> + Send + 'static>(&self, task: F) -> JoinHandle<F::Output> {
        let runtime = self.0.as_ref().expect("it is taken when it is dropped");
        runtime.spawn(task)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// An event as a record: CloudEvents, with `key` as the record's key and `data` as its value in JSON.
///
/// # Errors
/// The data cannot be written as JSON.
pub fn event(topic: &str, key: &str, event_type: &str, data: &impl Serialize) -> serde_json::Result<ProducerRecord> {
    let mut event = Event::new(key, event_type);
    event.data = Some(serde_json::value::to_raw_value(data)?);
    Ok(event.into_record(topic))
}

/// A record's key as text.
pub fn key(record: &Record) -> String {
    let key = record.key.as_deref().unwrap_or_default();
    String::from_utf8_lossy(key).into_owned()
}
