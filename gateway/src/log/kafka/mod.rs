//! Engine 2: Apache Kafka, or any broker of its protocol, through librdkafka.
//!
//! librdkafka's calls block and its consumers belong to one thread, so each [`Reader`], [`GroupMember`] and
//! [`TransactionalProducer`] has an OS thread of its own; handles speak to it through bounded channels. Requests about topics
//! and offsets run on tokio's blocking threads. Nothing here blocks a tokio worker.
//!
//! What librdkafka's settings are called is known to `settings` alone, what its errors mean to `error`, and its memory is
//! touched in `event`, `admin_request` and `bootstrap` only.

mod admin;
mod admin_request;
mod assignment;
mod batch;
mod bootstrap;
mod error;
mod event;
mod group;
mod producer;
mod reader;
mod settings;
mod transaction;

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use rdkafka::admin::AdminClient;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::BaseConsumer;
use rdkafka::message::{Header, OwnedHeaders};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::reader::READ_AHEAD_BATCHES;
use super::transaction::WAITING_SLICES;
use super::{
    Error, GroupMember, GroupSettings, Headers, Producer, ProducerRecord, ProducerSettings, Reader, Result, StartAt,
    TopicPartition, TransactionalProducer,
};
use bootstrap::Bootstrap;
use error::{Attempt, Resource};
use event::LogContext;
pub(super) use group::KafkaGroupMetadata;
pub(super) use producer::KafkaProducer;
pub use settings::KafkaSettings;

/// Commands on their way to a reader's or member's thread. When the queue is full the caller waits.
const WAITING_COMMANDS: usize = 64;

/// A connection to Kafka. Clones share it.
#[derive(Clone)]
pub(super) struct KafkaLog(Arc<Shared>);

struct Shared {
    settings: KafkaSettings,
    /// Cares for all clients.
    bootstrap: Arc<Bootstrap>,
    admin: Arc<AdminClient<LogContext>>,
    /// Asked for the end behind open transactions and the offsets of groups; made when first needed.
    consumer: OnceLock<Arc<BaseConsumer<LogContext>>>,
    /// What producers need to know of topics. As many as this process writes to.
    topics: Mutex<HashMap<Arc<str>, KnownTopic>>,
    producers: Mutex<Vec<Weak<producer::Shared>>>,
    /// Ends the threads.
    closing: CancellationToken,
    /// Counts the threads.
    threads: TaskTracker,
}

impl std::fmt::Debug for KafkaLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KafkaLog").field(&self.0.settings).finish()
    }
}

impl KafkaLog {
    pub(super) async fn connect(settings: KafkaSettings) -> Result<Self> {
        settings.check()?;
        let attempt = Attempt {
            operation: "connect to",
            resource: Resource::Cluster,
            within: settings.request_timeout,
        };
        let bootstrap = Arc::new(Bootstrap::new(&settings.brokers)?);
        let admin = AdminClient::from_config_and_context(&settings.admin(), LogContext)
            .map_err(|error| attempt.error(&error))?;
        let admin = Arc::new(admin);
        bootstrap.keep(&admin);
        let log = Self(Arc::new(Shared {
            bootstrap,
            admin,
            consumer: OnceLock::new(),
            topics: Mutex::default(),
            producers: Mutex::default(),
            closing: CancellationToken::new(),
            threads: TaskTracker::new(),
            settings,
        }));
        let probe = log.clone();
        blocking(move || {
            probe
                .0
                .admin
                .inner()
                .fetch_metadata(None, probe.0.settings.request_timeout)
        })
        .await?
        .map_err(
            |error| match log.attempt("connect to", Resource::Cluster).error(&error) {
                error @ (Error::Unauthorized(_) | Error::InvalidSetting { .. }) => error,
                error => Error::Unavailable(format!("no broker of {} answers: {error}", log.0.settings.brokers)),
            },
        )?;
        let (bootstrap, shared) = (log.0.bootstrap.clone(), Arc::downgrade(&log.0));
        let closing = log.0.closing.clone();
        log.start_thread("kafka-bootstrap", move |started| {
            bootstrap.run(shared, closing, started)
        })
        .await?;
        Ok(log)
    }

    pub(super) async fn producer(&self, settings: ProducerSettings) -> Result<Producer> {
        producer::start(self, settings).await
    }

    /// Transactions may be open for the settings' time if it is not said for how long.
    pub(super) async fn transactional_producer(
        &self,
        transactional_id: &str,
        timeout: Option<Duration>,
    ) -> Result<TransactionalProducer> {
        let timeout = timeout.unwrap_or(self.0.settings.transaction_timeout);
        let (commands, receiver) = mpsc::channel(WAITING_SLICES);
        let (log, id) = (self.clone(), transactional_id.to_owned());
        self.start_thread("kafka-transact", move |started| {
            transaction::run(log, id, timeout, receiver, started)
        })
        .await?;
        Ok(TransactionalProducer::new(transactional_id, commands))
    }

    pub(super) async fn reader(&self, topic: &str) -> Result<Reader> {
        let topic: Arc<str> = topic.into();
        self.describe_topic(&topic).await?;
        let (commands, receiver) = mpsc::channel(WAITING_COMMANDS);
        let (batches, batch_receiver) = mpsc::channel(READ_AHEAD_BATCHES);
        let (log, read) = (self.clone(), topic.clone());
        self.start_thread("kafka-reader", move |started| {
            reader::run(log, read, receiver, batches, started)
        })
        .await?;
        Ok(Reader::new(topic, commands, batch_receiver))
    }

    pub(super) async fn join_group(&self, settings: GroupSettings) -> Result<GroupMember> {
        if !matches!(settings.start_at, StartAt::Start | StartAt::End) {
            return Err(Error::InvalidSetting {
                name: "start_at".to_owned(),
                reason: "a group starts at the start or the end".to_owned(),
            });
        }
        for topic in &settings.topics {
            self.describe_topic(topic).await?;
        }
        let group = settings.group.clone();
        let (commands, receiver) = mpsc::channel(WAITING_COMMANDS);
        let (events, event_receiver) = mpsc::channel(READ_AHEAD_BATCHES);
        let log = self.clone();
        self.start_thread("kafka-member", move |started| {
            group::run(log, settings, receiver, events, started)
        })
        .await?;
        Ok(GroupMember::new(group, commands, event_receiver))
    }

    pub(super) async fn close(&self) {
        let producers: Vec<_> = lock(&self.0.producers).drain(..).collect();
        for producer in producers.iter().filter_map(Weak::upgrade) {
            producer.close().await;
        }
        self.0.closing.cancel();
        self.0.threads.close();
        self.0.threads.wait().await;
    }

    /// What producers need to know of a topic: whether it exists, its partitions, its largest record. Asked once per topic.
    async fn known_topic(&self, topic: &Arc<str>) -> Result<KnownTopic> {
        let known = lock(&self.0.topics).get(topic).copied();
        match known {
            Some(known) => Ok(known),
            None => {
                let found = self.describe_topic(topic).await?;
                let known = KnownTopic {
                    partitions: found.partitions,
                    max_message_bytes: found.max_message_bytes,
                    only_keyed: found.cleanup.compacts(),
                };
                lock(&self.0.topics).insert(topic.clone(), known);
                Ok(known)
            }
        }
    }

    /// Whether a record can be written, as far as that is known before it is tried.
    ///
    /// # Errors
    /// [`Error::UnknownTopic`], [`Error::UnknownPartition`], [`Error::RecordTooLarge`], [`Error::InvalidTopic`].
    async fn check_record(&self, record: &ProducerRecord) -> Result<KnownTopic> {
        let known = self.known_topic(&record.topic).await?;
        match refusal(record, known) {
            None => Ok(known),
            // The topic may have changed since it was asked for.
            Some(_) => {
                self.forget_topic(&record.topic);
                let known = self.known_topic(&record.topic).await?;
                refusal(record, known).map_or(Ok(known), Err)
            }
        }
    }

    /// Has a topic asked for anew when it is next needed.
    fn forget_topic(&self, topic: &str) {
        lock(&self.0.topics).remove(topic);
    }

    fn attempt<'a>(&self, operation: &'static str, resource: Resource<'a>) -> Attempt<'a> {
        Attempt {
            operation,
            resource,
            within: self.0.settings.request_timeout,
        }
    }

    /// Runs a future on an OS thread of its own, where it may block, and returns when it says that it has started.
    async fn start_thread<R, F>(&self, name: &str, run: R) -> Result<()>
    where
        R: FnOnce(Started) -> F + Send + 'static,
        F: Future<Output = ()>,
    {
        if self.0.closing.is_cancelled() {
            return Err(Error::Closed);
        }
        let counted = self.0.threads.token();
        let (started, answer) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(|error| Error::Unavailable(format!("thread {name}: {error}")))?;
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                runtime.block_on(run(started));
                drop(counted);
            })
            .map_err(|error| Error::Unavailable(format!("thread {name}: {error}")))?;
        answer.await.map_err(|_| Error::Closed)?
    }
}

/// What producers need to know of a topic.
#[derive(Clone, Copy, Debug)]
struct KnownTopic {
    partitions: i32,
    max_message_bytes: usize,
    only_keyed: bool,
}

fn refusal(record: &ProducerRecord, known: KnownTopic) -> Option<Error> {
    if let Some(partition) = record.partition
        && !(0..known.partitions).contains(&partition)
    {
        return Some(Error::UnknownPartition(TopicPartition::new(
            record.topic.clone(),
            partition,
        )));
    }
    // A broker refuses it, and with it all that stands in the same batch.
    if record.key.is_none() && known.only_keyed {
        return Some(Error::keyless(&record.topic));
    }
    let size_bytes = record.size_bytes();
    (size_bytes > known.max_message_bytes).then(|| Error::RecordTooLarge {
        topic: record.topic.to_string(),
        size_bytes,
        max_bytes: known.max_message_bytes,
    })
}

/// The headers of a record as librdkafka takes them.
fn native_headers(headers: &Headers) -> Option<OwnedHeaders> {
    (!headers.is_empty()).then(|| {
        headers.iter().fold(
            OwnedHeaders::new_with_capacity(headers.iter().len()),
            |native, (key, value)| {
                native.insert(Header {
                    key,
                    value: Some(&value[..]),
                })
            },
        )
    })
}

/// Told by a thread when it is ready, or why it cannot be.
type Started = oneshot::Sender<Result<()>>;

/// Runs one of librdkafka's blocking calls on a thread that may block.
async fn blocking<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    // It fails only when the runtime is shutting down.
    tokio::task::spawn_blocking(call).await.map_err(|_| Error::Closed)
}

/// What the mutexes here guard is whole after each statement, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests {
    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::DefaultProducerContext;

    use super::*;

    /// A log on a mock broker of librdkafka's, with the topic `t`.
    pub(super) async fn on_mock_broker() -> (MockCluster<'static, DefaultProducerContext>, KafkaLog) {
        let cluster = MockCluster::new(1).expect("a mock broker");
        cluster.create_topic("t", 1, 1).expect("a topic");
        let settings = KafkaSettings {
            // It leaves unanswered what it does not know.
            request_timeout: Duration::from_secs(2),
            ..KafkaSettings::new(cluster.bootstrap_servers())
        };
        let log = KafkaLog::connect(settings).await;
        let log = log.expect("a connection");
        // It does not describe topics.
        let known = KnownTopic {
            partitions: 1,
            max_message_bytes: 1_000_000,
            only_keyed: false,
        };
        lock(&log.0.topics).insert("t".into(), known);
        (cluster, log)
    }

    pub(crate) async fn producer_on_mock_broker() -> (MockCluster<'static, DefaultProducerContext>, Producer) {
        let (cluster, log) = on_mock_broker().await;
        let producer = log.producer(ProducerSettings::default()).await;
        (cluster, producer.expect("a producer"))
    }
}
