//! Appending without transactions: librdkafka's producer with a thread that answers each delivery.
//!
//! A fatal error ends the client inside, not the [`KafkaProducer`]: what was in flight is answered with an error and the next
//! record makes a new client.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext, ThreadedProducer};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, timeout};

use super::error::{Attempt, Resource};
use super::event::LogContext;
use super::{KafkaLog, blocking, lock, native_headers};
use crate::log::producer::ProducerEngine;
use crate::log::{Acks, Appended, Delivery, Error, Producer, ProducerRecord, ProducerSettings, Result, TopicPartition};

/// How librdkafka's statistics say that an idempotent producer has its id.
const HAS_PRODUCER_ID: &[u8] = br#""idemp_state": "Assigned""#;

/// How long a full queue is waited for before it is tried again, should no record be seen to leave it.
const QUEUE_TICK: Duration = Duration::from_millis(10);

type Client = ThreadedProducer<DeliveryContext>;

/// A producer's handle. Clones share its queue.
#[derive(Clone)]
pub(in crate::log) struct KafkaProducer(Arc<Shared>);

pub(super) struct Shared {
    log: KafkaLog,
    settings: ProducerSettings,
    client: RwLock<Arc<Client>>,
    closed: AtomicBool,
}

impl std::fmt::Debug for KafkaProducer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KafkaProducer").field(&self.0.settings).finish()
    }
}

/// Makes a producer and waits until it can append without delay: an idempotent one first asks for its producer id, which takes
/// half a second.
pub(super) async fn start(log: &KafkaLog, settings: ProducerSettings) -> Result<Producer> {
    let client = blocking({
        let (log, settings) = (log.clone(), settings.clone());
        move || make_client(&log, &settings)
    })
    .await??;
    if settings.acks == Acks::All {
        let mut ready = client.context().ready.subscribe();
        let within = log.0.settings.request_timeout;
        timeout(within, ready.wait_for(|ready| *ready))
            .await
            .map_err(|_| Error::Unavailable(format!("no producer id within {} ms", within.as_millis())))?
            .map_err(|_| Error::Closed)?;
    }
    let shared = Arc::new(Shared {
        log: log.clone(),
        settings,
        client: RwLock::new(client),
        closed: AtomicBool::new(false),
    });
    let mut producers = lock(&log.0.producers);
    producers.retain(|producer| producer.strong_count() > 0);
    producers.push(Arc::downgrade(&shared));
    drop(producers);
    Ok(Producer {
        engine: ProducerEngine::Kafka(KafkaProducer(shared)),
    })
}

fn make_client(log: &KafkaLog, settings: &ProducerSettings) -> Result<Arc<Client>> {
    let context = DeliveryContext {
        ready: watch::Sender::new(false),
        room: Notify::new(),
        failed: AtomicBool::new(false),
        delivery_timeout: settings.delivery_timeout,
    };
    let client = ThreadedProducer::from_config_and_context(&log.0.settings.producer(settings), context)
        .map_err(|error| log.attempt("make a producer for", Resource::Cluster).error(&error))?;
    let client = Arc::new(client);
    log.0.bootstrap.keep(&client);
    Ok(client)
}

impl KafkaProducer {
    pub(in crate::log) async fn check(&self, record: &ProducerRecord) -> Result<()> {
        self.0.log.check_record(record).await.map(drop)
    }

    pub(in crate::log) async fn send(&self, record: ProducerRecord) -> Result<Delivery> {
        let shared = &self.0;
        if shared.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        let known = shared.log.check_record(&record).await?;
        let (reply, answer) = oneshot::channel();
        let mut native = BaseRecord::with_opaque_to(
            &record.topic,
            Box::new(Waiting {
                topic: record.topic.clone(),
                size_bytes: record.size_bytes(),
                max_bytes: known.max_message_bytes,
                reply,
            }),
        );
        native.partition = record.partition;
        native.key = record.key.as_deref();
        native.payload = record.value.as_deref();
        native.timestamp = record.timestamp_ms;
        native.headers = native_headers(&record.headers);

        let deadline = Instant::now() + shared.settings.delivery_timeout;
        loop {
            let client = shared.client();
            let error = match client.send(native) {
                Ok(()) => return Ok(Delivery(answer)),
                Err((error, refused)) => {
                    native = refused;
                    error
                }
            };
            match error {
                KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull) => {
                    // A record leaves the queue each moment: one that did so between the refusal and here is soon followed
                    // by another, and the tick is for the last of them.
                    let room = client.context().room.notified();
                    if timeout(QUEUE_TICK, room).await.is_err() && Instant::now() >= deadline {
                        return Err(shared.attempt(&record.topic).code(RDKafkaErrorCode::MessageTimedOut));
                    }
                }
                KafkaError::MessageProduction(RDKafkaErrorCode::Fatal) => shared.replace_client(&client)?,
                error => return Err(shared.attempt(&record.topic).error(&error)),
            }
            if Instant::now() >= deadline {
                return Err(shared.attempt(&record.topic).code(RDKafkaErrorCode::MessageTimedOut));
            }
        }
    }
}

impl Shared {
    /// The client that serves now; a new one if the last has failed.
    fn client(&self) -> Arc<Client> {
        let client = self.client.read().unwrap_or_else(PoisonError::into_inner).clone();
        if client.context().failed.load(Ordering::Acquire) {
            // The failed client refuses the record, and the caller tries again: nothing is lost by going on with it.
            if let Err(error) = self.replace_client(&client) {
                tracing::error!("the producer cannot be made anew: {error}");
            }
            return self.client.read().unwrap_or_else(PoisonError::into_inner).clone();
        }
        client
    }

    /// Makes a new client in place of one that has failed, unless another caller has done so.
    fn replace_client(&self, failed: &Arc<Client>) -> Result<()> {
        let mut current = self.client.write().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&current, failed) {
            tracing::warn!("the producer failed for good and is made anew");
            let old = std::mem::replace(&mut *current, make_client(&self.log, &self.settings)?);
            drop(current);
            end_client(&self.log, old, Duration::ZERO);
        }
        Ok(())
    }

    fn attempt<'a>(&self, topic: &'a str) -> Attempt<'a> {
        Attempt {
            operation: "append to",
            resource: Resource::Topic(topic),
            within: self.settings.delivery_timeout,
        }
    }

    /// Refuses new records and returns when all that were taken are answered.
    pub(super) async fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let client = self.client();
        let within = self.settings.delivery_timeout;
        // Each record that could not be written is answered with its own error.
        let _ = blocking(move || client.flush(within)).await;
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let client = self.client.read().unwrap_or_else(PoisonError::into_inner).clone();
        end_client(&self.log, client, self.settings.delivery_timeout);
    }
}

/// Ends a client on a thread of its own, since that blocks; what waits in it is written first, for as long as `flush` allows.
fn end_client(log: &KafkaLog, client: Arc<Client>, flush: Duration) {
    let counted = log.0.threads.token();
    let spawned = thread::Builder::new().name("kafka-flush".to_owned()).spawn(move || {
        // Each record that could not be written is answered with its own error.
        let _ = client.flush(flush);
        drop(client);
        drop(counted);
    });
    if let Err(error) = spawned {
        tracing::error!("no thread to flush a producer: {error}");
    }
}

/// A record that waits for its acknowledgement.
struct Waiting {
    topic: Arc<str>,
    size_bytes: usize,
    max_bytes: usize,
    reply: oneshot::Sender<Result<Appended>>,
}

struct DeliveryContext {
    /// Whether the producer has its id.
    ready: watch::Sender<bool>,
    /// Notified when a record leaves the queue.
    room: Notify,
    /// Set by a fatal error: this client appends nothing more.
    failed: AtomicBool,
    delivery_timeout: Duration,
}

impl ClientContext for DeliveryContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        LogContext.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if error == KafkaError::Global(RDKafkaErrorCode::Fatal) {
            self.failed.store(true, Ordering::Release);
        }
        LogContext.error(error, reason);
    }

    fn stats_raw(&self, statistics: &[u8]) {
        if !*self.ready.borrow()
            && statistics
                .windows(HAS_PRODUCER_ID.len())
                .any(|window| window == HAS_PRODUCER_ID)
        {
            self.ready.send_replace(true);
        }
    }
}

impl ProducerContext for DeliveryContext {
    type DeliveryOpaque = Box<Waiting>;

    fn delivery(&self, result: &DeliveryResult<'_>, waiting: Self::DeliveryOpaque) {
        self.room.notify_waiters();
        let Waiting {
            topic,
            size_bytes,
            max_bytes,
            reply,
        } = *waiting;
        let answer = match result {
            Ok(message) => Ok(Appended {
                partition: TopicPartition::new(topic, message.partition()),
                // Without an acknowledgement librdkafka has a mark of its own here.
                offset: message.offset().max(-1),
                timestamp_ms: message.timestamp().to_millis().unwrap_or(-1),
            }),
            Err((error, _)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail);
                if code == RDKafkaErrorCode::Fatal {
                    self.failed.store(true, Ordering::Release);
                }
                Err(delivery_error(
                    code,
                    &topic,
                    size_bytes,
                    max_bytes,
                    self.delivery_timeout,
                ))
            }
        };
        // A caller who has dropped the delivery does not want to know.
        let _ = reply.send(answer);
    }
}

/// The log's error for a record that was not written.
pub(super) fn delivery_error(
    code: RDKafkaErrorCode,
    topic: &str,
    size_bytes: usize,
    max_bytes: usize,
    within: Duration,
) -> Error {
    match code {
        RDKafkaErrorCode::MessageSizeTooLarge
        | RDKafkaErrorCode::InvalidMessageSize
        | RDKafkaErrorCode::MessageBatchTooLarge => Error::RecordTooLarge {
            topic: topic.to_owned(),
            size_bytes,
            max_bytes,
        },
        RDKafkaErrorCode::InvalidRecord => Error::InvalidTopic {
            topic: topic.to_owned(),
            reason: "it does not take this record".to_owned(),
        },
        code => Attempt {
            operation: "append to",
            resource: Resource::Topic(topic),
            within,
        }
        .code(code),
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::bindings as sys;
    use rdkafka::types::RDKafkaRespErr;

    use super::*;
    use crate::log::kafka::tests::on_mock_broker;

    /// librdkafka's mock broker is enough here: nothing of it is proved but that the producer goes on.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_fatal_error_ends_the_client_and_not_the_producer() {
        let (_cluster, log) = on_mock_broker().await;
        let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
        let record = || ProducerRecord::to("t").value("v");
        producer.append(record()).await.expect("appended");

        let ProducerEngine::Kafka(KafkaProducer(shared)) = &producer.engine else {
            unreachable!("it is made by this engine");
        };
        let failed = shared.client();
        // SAFETY: the client is alive, and the reason is a C string that is copied.
        unsafe {
            sys::rd_kafka_test_fatal_error(
                failed.client().native_ptr(),
                RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER,
                c"a test".as_ptr(),
            );
        }
        producer.append(record()).await.expect("appended by a new client");
        assert!(!Arc::ptr_eq(&failed, &shared.client()));
    }
}
