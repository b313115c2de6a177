//! librdkafka's events of one client, taken from its queue without the copies, the lost offsets and the ambiguous `None` of
//! `BaseConsumer::poll`: that says of an end of partition neither the topic nor the offset, and cannot tell an empty queue from
//! one whose first event it has served itself.
//!
//! Everything unsafe about events and messages is here. [`Consumer::poll`] returns an [`Event`]; [`Consumer::take`] returns messages, each of
//! which owns its native one.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rdkafka::bindings as sys;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, Producer as _, ProducerContext};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientConfig, ClientContext};
use tokio::sync::Notify;

use super::KafkaLog;
use crate::log::{Headers, Record, TopicPartition};

/// Sends what librdkafka logs to `tracing`.
#[derive(Debug)]
pub(super) struct LogContext;

impl ClientContext for LogContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level as i32, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // Transport errors are retried by librdkafka; what fails for good is answered by the operation.
        tracing::debug!("librdkafka: {error}: {reason}");
    }

    fn stats_raw(&self, _: &[u8]) {}
}

impl ConsumerContext for LogContext {}

/// Writes one line of librdkafka's log. Levels are syslog's.
fn log_line(level: i32, facility: &str, message: &str) {
    match level {
        // A lost connection is logged as an error each time it is tried again: the operations that fail say so themselves.
        _ if facility == "FAIL" || facility == "ERROR" => tracing::debug!("librdkafka: {facility}: {message}"),
        0..=3 => tracing::error!("librdkafka: {facility}: {message}"),
        4 => tracing::warn!("librdkafka: {facility}: {message}"),
        5 | 6 => tracing::info!("librdkafka: {facility}: {message}"),
        _ => tracing::debug!("librdkafka: {facility}: {message}"),
    }
}

/// A consumer and its event queue. One thread owns it.
pub(super) struct Consumer {
    /// Fields are dropped in this order: the queue before the client that it belongs to.
    queue: Queue,
    client: Arc<BaseConsumer<LogContext>>,
    /// Notified when the queue is no longer empty.
    pub(super) ready: Arc<Notify>,
}

/// Something that happened to a member of a group.
pub(super) enum Event {
    Error(ConsumerError),
    /// Partitions come to this member, by `incremental_assign`.
    Assign(Vec<TopicPartition>),
    /// Partitions leave this member, by `incremental_unassign`.
    Revoke(Vec<TopicPartition>),
    /// Served, or of no interest to a member that reads nothing.
    Other,
}

/// What a message says.
pub(super) enum Read {
    Record(Message),
    /// The end of a partition was reached at `offset`: nothing committed stands there or behind it.
    EndOfPartition {
        partition: TopicPartition,
        offset: i64,
    },
    Error(ConsumerError),
}

/// An error that librdkafka reports to the consumer.
#[derive(Debug)]
pub(super) struct ConsumerError {
    pub(super) code: RDKafkaErrorCode,
    pub(super) reason: String,
    pub(super) partition: Option<TopicPartition>,
}

impl Consumer {
    pub(super) fn new(config: &ClientConfig, log: &KafkaLog) -> Result<Self, KafkaError> {
        let mut client = BaseConsumer::from_config_and_context(config, LogContext)?;
        let ready = Arc::new(Notify::new());
        client.set_nonempty_callback({
            let ready = ready.clone();
            move || ready.notify_one()
        });
        // SAFETY: the client is alive; a consumer that has a group id has a consumer queue, and a null is checked below.
        let queue = unsafe { sys::rd_kafka_queue_get_consumer(client.client().native_ptr()) };
        let queue = NonNull::new(queue)
            .ok_or_else(|| KafkaError::ClientCreation("the consumer has no queue: no group.id".to_owned()))?;
        let client = Arc::new(client);
        log.0.bootstrap.keep(&client);
        Ok(Self {
            queue: Queue(queue),
            client,
            ready,
        })
    }

    /// The client, which closes when its last reference goes.
    pub(super) fn client(&self) -> &Arc<BaseConsumer<LogContext>> {
        &self.client
    }

    /// The next event that is there; never waits. `None`: the queue is empty, and [`Consumer::ready`] is notified when it no
    /// longer is.
    pub(super) fn poll(&self) -> Option<Event> {
        // SAFETY: the queue is alive as long as `self`.
        let event = unsafe { sys::rd_kafka_queue_poll(self.queue.0.as_ptr(), 0) };
        NonNull::new(event).map(|event| NativeEvent(event).read())
    }

    /// Up to `most` messages that were read, of a client that is in no group; never waits. Fewer than `most`: nothing is left, and
    /// [`Consumer::ready`] is notified when something is there. One call takes many, for a call for each costs as much as the rest of it.
    ///
    /// Behind the end of a partition librdkafka believes that the application stands one further than it does: who resumes a
    /// partition must seek.
    pub(super) fn take(&self, most: usize) -> Vec<Message> {
        let mut messages: Vec<*mut sys::rd_kafka_message_t> = vec![ptr::null_mut(); most];
        // SAFETY: the queue is alive as long as `self`, and there is room for `most` pointers.
        let taken = unsafe { sys::rd_kafka_consume_batch_queue(self.queue.0.as_ptr(), 0, messages.as_mut_ptr(), most) };
        messages.truncate(usize::try_from(taken).unwrap_or(0));
        messages.into_iter().filter_map(NonNull::new).map(Message).collect()
    }
}

/// The event queue of a producer. Serving it returns with the first event, where `BaseProducer::poll` waits out its time: a
/// transaction that waits for its last acknowledgement would lose half a millisecond each time.
pub(super) struct ProducerQueue(Queue);

impl ProducerQueue {
    /// The queue of a producer that outlives it and has no delivery opaques.
    pub(super) fn new<C: ProducerContext<DeliveryOpaque = ()>>(producer: &BaseProducer<C>) -> Result<Self, KafkaError> {
        // SAFETY: the client is alive; a null is checked below.
        let queue = unsafe { sys::rd_kafka_queue_get_main(producer.client().native_ptr()) };
        let queue =
            NonNull::new(queue).ok_or_else(|| KafkaError::ClientCreation("the producer has no queue".to_owned()))?;
        Ok(Self(Queue(queue)))
    }

    /// Serves one event, waiting for it up to `wait`; `failed` is told of each record that was not written: why, its topic, the
    /// bytes of its key and value.
    pub(super) fn serve(&self, wait: Duration, mut failed: impl FnMut(RDKafkaErrorCode, &str, usize)) {
        let wait_ms = wait.as_millis().try_into().unwrap_or(c_int::MAX);
        // SAFETY: the queue is alive as long as `self`.
        let event = unsafe { sys::rd_kafka_queue_poll(self.0.0.as_ptr(), wait_ms) };
        let Some(event) = NonNull::new(event).map(NativeEvent) else {
            return;
        };
        // SAFETY: the event is alive.
        if unsafe { sys::rd_kafka_event_type(event.0.as_ptr()) } != sys::RD_KAFKA_EVENT_DR {
            if let Event::Error(error) = event.read() {
                tracing::debug!("librdkafka: {}: {}", error.code, error.reason);
            }
            return;
        }
        // SAFETY: the event is alive and of type DR. It returns each of its messages once and then null; they live as long as
        // the event, their topic's name is a C string, and they have no opaque to be freed.
        unsafe {
            while let Some(message) = sys::rd_kafka_event_message_next(event.0.as_ptr()).as_ref() {
                if message.err != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
                    let topic = CStr::from_ptr(sys::rd_kafka_topic_name(message.rkt)).to_string_lossy();
                    failed(message.err.into(), &topic, message.key_len + message.len);
                }
            }
        }
    }
}

/// A reference to a queue of librdkafka's.
struct Queue(NonNull<sys::rd_kafka_queue_t>);

// SAFETY: librdkafka's queues may be used from any thread (rdkafka.h, "thread-safe").
unsafe impl Send for Queue {}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: the reference was taken by rd_kafka_queue_get_consumer or _main and is given back once. The client still
        // lives: it is dropped after its queue.
        unsafe { sys::rd_kafka_queue_destroy(self.0.as_ptr()) }
    }
}

struct NativeEvent(NonNull<sys::rd_kafka_event_t>);

impl Drop for NativeEvent {
    fn drop(&mut self) {
        // SAFETY: the event came from rd_kafka_queue_poll, which passes its ownership, and is destroyed once.
        unsafe { sys::rd_kafka_event_destroy(self.0.as_ptr()) }
    }
}

impl NativeEvent {
    fn read(self) -> Event {
        let event = self.0.as_ptr();
        // SAFETY: the event is alive.
        match unsafe { sys::rd_kafka_event_type(event) } {
            sys::RD_KAFKA_EVENT_ERROR => self.read_error(),
            sys::RD_KAFKA_EVENT_REBALANCE => self.read_rebalance(),
            sys::RD_KAFKA_EVENT_LOG => {
                let (mut facility, mut message, mut level) = (ptr::null::<c_char>(), ptr::null::<c_char>(), 0 as c_int);
                // SAFETY: the event is alive and of type LOG; on success (0) both strings are set and live as long as it.
                unsafe {
                    if sys::rd_kafka_event_log(event, &raw mut facility, &raw mut message, &raw mut level) == 0 {
                        log_line(
                            level,
                            &CStr::from_ptr(facility).to_string_lossy(),
                            CStr::from_ptr(message).to_string_lossy().trim_end(),
                        );
                    }
                }
                Event::Other
            }
            _ => Event::Other,
        }
    }

    fn read_error(self) -> Event {
        let event = self.0.as_ptr();
        // SAFETY: the event is alive; its error string lives as long as it. The partition is a copy, null if the error is not
        // about one; it is destroyed once, after the last use of its topic.
        unsafe {
            let code: RDKafkaErrorCode = sys::rd_kafka_event_error(event).into();
            let partition = NonNull::new(sys::rd_kafka_event_topic_partition(event)).map(|native| {
                let fields = native.as_ref();
                let partition = TopicPartition::new(&*CStr::from_ptr(fields.topic).to_string_lossy(), fields.partition);
                sys::rd_kafka_topic_partition_destroy(native.as_ptr());
                partition
            });
            let reason = sys::rd_kafka_event_error_string(event);
            Event::Error(ConsumerError {
                code,
                reason: if reason.is_null() {
                    String::new()
                } else {
                    CStr::from_ptr(reason).to_string_lossy().into_owned()
                },
                partition,
            })
        }
    }

    fn read_rebalance(self) -> Event {
        let event = self.0.as_ptr();
        // SAFETY: the event is alive and of type REBALANCE; its list lives as long as the event and is only read. `elems` has
        // `cnt` elements, each with a topic that is a C string.
        let (code, partitions) = unsafe {
            let list = sys::rd_kafka_event_topic_partition_list(event);
            let partitions = if list.is_null() || (*list).cnt <= 0 {
                Vec::new()
            } else {
                slice::from_raw_parts((*list).elems, (*list).cnt as usize)
                    .iter()
                    .map(|element| {
                        TopicPartition::new(&*CStr::from_ptr(element.topic).to_string_lossy(), element.partition)
                    })
                    .collect()
            };
            (sys::rd_kafka_event_error(event), partitions)
        };
        match code {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => Event::Assign(partitions),
            _ => Event::Revoke(partitions),
        }
    }
}

/// A message in librdkafka's memory. Gives it back when dropped.
pub(super) struct Message(NonNull<sys::rd_kafka_message_t>);

impl Drop for Message {
    fn drop(&mut self) {
        // SAFETY: the message came from rd_kafka_consume_batch_queue, which passes its ownership, and is destroyed once.
        unsafe { sys::rd_kafka_message_destroy(self.0.as_ptr()) }
    }
}

impl Message {
    pub(super) fn read(self) -> Read {
        let error = self.fields().err;
        if error == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Read::Record(self);
        }
        let is_placed = !self.fields().rkt.is_null();
        let partition = is_placed.then(|| TopicPartition::new(self.topic(), self.partition()));
        match (error.into(), partition) {
            (RDKafkaErrorCode::PartitionEOF, Some(partition)) => Read::EndOfPartition {
                partition,
                offset: self.offset(),
            },
            (code, partition) => Read::Error(ConsumerError {
                code,
                reason: "fetch".to_owned(),
                partition,
            }),
        }
    }

    fn fields(&self) -> &sys::rd_kafka_message_t {
        // SAFETY: the message lives as long as `self`, and nothing changes it.
        unsafe { self.0.as_ref() }
    }

    pub(super) fn topic(&self) -> &str {
        // SAFETY: the message holds a reference to its topic, whose name is a C string that never changes. Kafka allows ASCII
        // only in it.
        let name = unsafe { CStr::from_ptr(sys::rd_kafka_topic_name(self.fields().rkt)) };
        name.to_str().unwrap_or_default()
    }

    pub(super) fn partition(&self) -> i32 {
        self.fields().partition
    }

    pub(super) fn offset(&self) -> i64 {
        self.fields().offset
    }

    /// Bytes of key and value.
    pub(super) fn size_bytes(&self) -> usize {
        self.fields().len + self.fields().key_len
    }

    /// Copies the message out of librdkafka's memory.
    pub(super) fn to_record(&self, memory: &mut RecordMemory) -> Record {
        let fields = self.fields();
        // SAFETY: key and value are null or point to as many bytes as their lengths say, which live as long as `self`.
        let (key, value) = unsafe {
            (
                bytes_at(fields.key, fields.key_len),
                bytes_at(fields.payload, fields.len),
            )
        };
        let headers = self.header_slices();
        let total = key.map_or(0, <[u8]>::len)
            + value.map_or(0, <[u8]>::len)
            + headers.iter().map(|(_, value)| value.len()).sum::<usize>();
        memory.reserve(total);
        let (key, value) = (key.map(|key| memory.copy(key)), value.map(|value| memory.copy(value)));
        let mut record_headers = Headers::new();
        for (name, value) in headers {
            record_headers.push(memory.name(name), memory.copy(value));
        }
        // SAFETY: the message is alive; the type of the timestamp is not asked for.
        let timestamp_ms = unsafe { sys::rd_kafka_message_timestamp(self.0.as_ptr(), ptr::null_mut()) };
        Record {
            offset: fields.offset,
            timestamp_ms,
            key,
            value,
            headers: record_headers,
        }
    }

    fn header_slices(&self) -> Vec<(&CStr, &[u8])> {
        let mut slices = Vec::new();
        let mut headers = ptr::null_mut();
        // SAFETY: the message is alive. On success `headers` belongs to it and lives as long; each call with a smaller index
        // than there are headers sets name (a C string) and value (null or `size` bytes) in the memory of `headers`.
        unsafe {
            let found = sys::rd_kafka_message_headers(self.0.as_ptr(), &raw mut headers);
            if found != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
                return slices;
            }
            let (mut name, mut value, mut size) = (ptr::null::<c_char>(), ptr::null::<c_void>(), 0);
            while sys::rd_kafka_header_get_all(headers, slices.len(), &raw mut name, &raw mut value, &raw mut size)
                == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR
            {
                slices.push((
                    CStr::from_ptr(name),
                    bytes_at(value.cast_mut(), size).unwrap_or_default(),
                ));
            }
        }
        slices
    }
}

/// # Safety
/// `start` is null or points to `len` bytes that live for `'a` and do not change.
unsafe fn bytes_at<'a>(start: *mut c_void, len: usize) -> Option<&'a [u8]> {
    // SAFETY: as the caller promises.
    NonNull::new(start).map(|start| unsafe { slice::from_raw_parts(start.cast::<u8>().as_ptr(), len) })
}

/// Where records are copied to. Small ones share a piece of memory, for an allocation per record costs more than the copy; each name
/// of a header is there once.
#[derive(Debug, Default)]
pub(super) struct RecordMemory {
    piece: BytesMut,
    names: Vec<Arc<str>>,
}

impl RecordMemory {
    /// Of one piece. A record that is kept keeps its whole piece, so a piece is small.
    const PIECE_BYTES: usize = 4096;
    /// Names remembered. A producer that makes up names gets each allocated anew beyond that.
    const REMEMBERED_NAMES: usize = 32;

    /// Makes room for the parts of one record.
    fn reserve(&mut self, bytes: usize) {
        if self.piece.capacity() < bytes {
            self.piece = BytesMut::with_capacity(bytes.max(Self::PIECE_BYTES));
        }
    }

    fn copy(&mut self, part: &[u8]) -> Bytes {
        self.piece.extend_from_slice(part);
        self.piece.split().freeze()
    }

    fn name(&mut self, name: &CStr) -> Arc<str> {
        if let Some(known) = self.names.iter().find(|known| known.as_bytes() == name.to_bytes()) {
            return known.clone();
        }
        let name: Arc<str> = name.to_string_lossy().into();
        if self.names.len() < Self::REMEMBERED_NAMES {
            self.names.push(name.clone());
        }
        name
    }
}

/// How long a thread with nothing to do sleeps before it looks again, should librdkafka not have said that it has something.
pub(super) const IDLE_TICK: Duration = Duration::from_millis(500);
