//! Transactions: a thread that owns librdkafka's transactional producer and serves one transaction after the other.
//!
//! What goes wrong ends in one of three ways. The transaction is aborted and the producer goes on; the producer is fenced and
//! does nothing more; or the producer is no longer to be trusted and is made anew under its id, which ends whatever the old one
//! left open.
//!
//! Invariant: before a commit, and before offsets are sent, all records are acknowledged ([`TransactionThread::drain`]):
//! librdkafka's own flush waits in steps of 100 ms.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::ConsumerGroupMetadata;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext};
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::error::Resource;
use super::event::{IDLE_TICK, LogContext, ProducerQueue};
use super::producer::delivery_error;
use super::{KafkaLog, Started, lock, native_headers};
use crate::log::group::GroupMetadataEngine;
use crate::log::transaction::{GroupOffsets, TransactionCommand};
use crate::log::{CommittedOffset, Error, GroupMetadata, ProducerRecord, Result, TopicPartition};

/// One wait for acknowledgements.
const POLL_STEP: Duration = Duration::from_millis(1);
/// How long the first call of an abort may take. All of it passes when records are on their way.
const ABORT_BEGINS: Duration = Duration::from_millis(5);
/// How much longer than its time a call may take to say that it is over.
const ANSWER_STEP: Duration = Duration::from_millis(100);
/// Before an operation that failed in passing is tried again.
const RETRY_STEP: Duration = Duration::from_millis(20);

/// Serves transactions until the handle is dropped or the log is closed.
pub(super) async fn run(
    log: KafkaLog,
    transactional_id: String,
    transaction_timeout: Duration,
    mut commands: mpsc::Receiver<TransactionCommand>,
    started: Started,
) {
    let closing = log.0.closing.clone();
    let mut thread = TransactionThread {
        log,
        transactional_id,
        transaction_timeout,
        producer: None,
        transaction: State::None,
        left: Left::Nothing,
    };
    let made = thread.make_producer();
    let failed = made.is_err();
    // A caller who no longer waits has dropped the handle too: the loop then ends at once.
    let _ = started.send(made);
    if failed {
        return;
    }
    loop {
        let command = tokio::select! {
            biased;
            () = closing.cancelled() => break,
            command = timeout(IDLE_TICK, commands.recv()) => command,
        };
        match command {
            Ok(Some(TransactionCommand::Records(records))) => thread.add(records).await,
            Ok(Some(TransactionCommand::Commit {
                records,
                offsets,
                reply,
            })) => {
                let answer = thread.commit(records, &offsets).await;
                if matches!(answer, Err(Error::Indefinite(_))) {
                    // What became of it is settled when the next producer has taken over.
                    thread.clean_up();
                }
                // Who has dropped the answer does not want to know.
                let _ = reply.send(answer);
            }
            Ok(Some(TransactionCommand::Abort { reply })) => {
                let answer = thread.abort();
                // As above.
                let _ = reply.send(answer);
            }
            Ok(None) => break,
            Err(_) => thread.idle(),
        }
        // After the answer: a transaction that no commit was sent for is as good as aborted, however long the brokers take.
        thread.clean_up();
    }
    // Whoever is next under its id aborts what this cannot.
    let _ = thread.abort();
}

struct TransactionThread {
    log: KafkaLog,
    transactional_id: String,
    /// A transaction that is open for longer is aborted.
    transaction_timeout: Duration,
    /// `None` while it could not be made anew.
    producer: Option<Client>,
    transaction: State,
    left: Left,
}

/// librdkafka's producer and its queue, which is dropped first.
struct Client {
    queue: ProducerQueue,
    /// Shared with a call that may not return, see [`TransactionThread::try_send_offsets`].
    producer: Arc<BaseProducer<RecordContext>>,
}

impl Client {
    /// Serves one event, waiting for it up to `wait`.
    fn serve(&self, wait: Duration) {
        let context = self.producer.context();
        self.queue
            .serve(wait, |code, topic, size_bytes| context.fail(code, topic, size_bytes));
    }
}

impl std::ops::Deref for Client {
    type Target = BaseProducer<RecordContext>;

    fn deref(&self) -> &Self::Target {
        &self.producer
    }
}

/// What a failed transaction has left to do before the next one.
enum Left {
    Nothing,
    /// The producer has it open still.
    Abort,
    /// The producer cannot go on.
    Remake,
}

enum State {
    /// Nothing is open.
    None,
    /// Open since then.
    Open(Instant),
    /// It has failed and is aborted; the commit is answered with the error.
    Failed(Error),
    /// Another producer has taken over, for good.
    Fenced,
}

/// How an operation on the producer failed.
enum Failure {
    /// The transaction must be aborted; the producer goes on.
    Abort(Error),
    Fenced,
    /// The producer cannot go on. The transaction is not committed unless the error says otherwise.
    Broken(Error),
}

impl TransactionThread {
    /// Adds records; an error is kept for the commit.
    async fn add(&mut self, records: Vec<ProducerRecord>) {
        if matches!(self.transaction, State::Failed(_) | State::Fenced) {
            return;
        }
        if let Err(failure) = self.write(records).await {
            let error = self.end_after(failure);
            if !matches!(self.transaction, State::Fenced) {
                self.transaction = State::Failed(error);
            }
        }
    }

    async fn commit(&mut self, records: Vec<ProducerRecord>, offsets: &[GroupOffsets]) -> Result<()> {
        match std::mem::replace(&mut self.transaction, State::None) {
            State::Failed(error) => return Err(error),
            State::Fenced => {
                self.transaction = State::Fenced;
                return Err(self.fenced());
            }
            state => self.transaction = state,
        }
        match self.try_commit(records, offsets).await {
            Ok(()) => {
                self.transaction = State::None;
                Ok(())
            }
            Err(failure) => Err(self.end_after(failure)),
        }
    }

    async fn try_commit(
        &mut self,
        records: Vec<ProducerRecord>,
        offsets: &[GroupOffsets],
    ) -> std::result::Result<(), Failure> {
        self.write(records).await?;
        self.drain()?;
        for GroupOffsets { group, offsets } in offsets {
            self.send_offsets(offsets, group)?;
        }
        let within = self.log.0.settings.request_timeout;
        let deadline = Instant::now() + within;
        loop {
            let error = match self.client()?.commit_transaction(within) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if retriable(&error) && Instant::now() < deadline {
                std::thread::sleep(RETRY_STEP);
                continue;
            }
            return Err(match self.failure(&error, "commit") {
                Failure::Broken(error) => Failure::Broken(Error::Indefinite(error.to_string())),
                failure => failure,
            });
        }
    }

    fn abort(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.transaction, State::None) {
            State::None | State::Failed(_) => Ok(()),
            State::Fenced => {
                self.transaction = State::Fenced;
                Err(self.fenced())
            }
            State::Open(_) => {
                self.abort_open();
                match self.transaction {
                    State::Fenced => Err(self.fenced()),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Serves what librdkafka has to say, and aborts a transaction that is open for too long before the broker does: the
    /// broker's abort could not be told from being fenced.
    fn idle(&mut self) {
        if let Some(producer) = &self.producer {
            // The count has the events in it that wait to be served.
            for _ in 0..producer.in_flight_count() {
                producer.serve(Duration::ZERO);
            }
        }
        if let Err(failure) = self.check_age() {
            let error = self.end_after(failure);
            if !matches!(self.transaction, State::Fenced) {
                self.transaction = State::Failed(error);
            }
        }
    }

    fn check_age(&self) -> std::result::Result<(), Failure> {
        let allowed = self.transaction_timeout * 9 / 10;
        match self.transaction {
            // Either the brokers do not answer, or they answer a new producer at once.
            State::Open(since) if since.elapsed() > allowed => Err(Failure::Broken(Error::Aborted(format!(
                "it was open for more than {} ms",
                allowed.as_millis()
            )))),
            _ => Ok(()),
        }
    }

    async fn write(&mut self, records: Vec<ProducerRecord>) -> std::result::Result<(), Failure> {
        self.open()?;
        for record in records {
            self.log.check_record(&record).await.map_err(Failure::Abort)?;
            self.write_record(&record)?;
        }
        self.client()?.serve(Duration::ZERO);
        self.check_age()?;
        self.check_deliveries()
    }

    fn write_record(&self, record: &ProducerRecord) -> std::result::Result<(), Failure> {
        let producer = self.client()?;
        let mut native: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(&record.topic);
        native.partition = record.partition;
        native.key = record.key.as_deref();
        native.payload = record.value.as_deref();
        native.timestamp = record.timestamp_ms;
        native.headers = native_headers(&record.headers);
        loop {
            let (error, refused) = match producer.send(native) {
                Ok(()) => return Ok(()),
                Err(refused) => refused,
            };
            if error != KafkaError::MessageProduction(Code::QueueFull) {
                return Err(self.failure(&error, "append to"));
            }
            native = refused;
            producer.serve(POLL_STEP);
            self.check_age()?;
        }
    }

    /// Begins the transaction at the broker, if it is not begun.
    fn open(&mut self) -> std::result::Result<(), Failure> {
        if matches!(self.transaction, State::Open(_)) {
            return Ok(());
        }
        if self.producer.is_none() {
            self.make_producer().map_err(Failure::Broken)?;
        }
        let producer = self.client()?;
        lock(&producer.context().failed).take();
        producer
            .begin_transaction()
            .map_err(|error| self.failure(&error, "begin"))?;
        self.transaction = State::Open(Instant::now());
        Ok(())
    }

    /// Waits until all records are acknowledged.
    fn drain(&self) -> std::result::Result<(), Failure> {
        let producer = self.client()?;
        while producer.in_flight_count() > 0 {
            producer.serve(POLL_STEP);
            self.check_age()?;
        }
        self.check_deliveries()
    }

    fn check_deliveries(&self) -> std::result::Result<(), Failure> {
        let producer = self.client()?;
        let failed = lock(&producer.context().failed).take();
        let Some(failed) = failed else {
            return Ok(());
        };
        if let Some((code, _)) = producer.client().fatal_error() {
            return Err(self.fatal(code));
        }
        let code = match failed.code {
            // The transaction has failed, and all its records with it. Committing it says why, and does nothing more.
            Code::PurgeQueue => match producer.commit_transaction(ANSWER_STEP) {
                Err(error) if !retriable(&error) => return Err(self.failure(&error, "append to a topic of")),
                _ => Code::PurgeQueue,
            },
            // It stood in one batch with the record that is refused.
            Code::InvalidDifferentRecord => Code::InvalidRecord,
            code => code,
        };
        Err(Failure::Abort(
            match delivery_error(
                code,
                &failed.topic,
                failed.size_bytes,
                failed.size_bytes,
                self.transaction_timeout,
            ) {
                error @ (Error::UnknownTopic(_)
                | Error::InvalidTopic { .. }
                | Error::RecordTooLarge { .. }
                | Error::Unauthorized(_)) => error,
                error => Error::Aborted(error.to_string()),
            },
        ))
    }

    fn send_offsets(
        &self,
        offsets: &[(TopicPartition, CommittedOffset)],
        group: &GroupMetadata,
    ) -> std::result::Result<(), Failure> {
        let GroupMetadataEngine::Kafka(group) = &group.engine else {
            return Err(Failure::Abort(Error::Aborted(
                "the offsets are of a member of another log".to_owned(),
            )));
        };
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (partition, committed) in offsets {
            let mut element = list.add_partition(&partition.topic, partition.partition);
            element
                .set_offset(Offset::Offset(committed.next_offset.0))
                .map_err(|error| Failure::Abort(Error::Aborted(error.to_string())))?;
            if !committed.metadata.is_empty() {
                element.set_metadata(&committed.metadata);
            }
        }
        let deadline = Instant::now() + self.log.0.settings.request_timeout;
        loop {
            let error = match self.try_send_offsets(&list, &group.metadata)? {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if retriable(&error) && Instant::now() < deadline {
                std::thread::sleep(RETRY_STEP);
                continue;
            }
            let failure = self.failure(&error, "commit offsets in");
            let code = error.rdkafka_error_code().unwrap_or(Code::Fail);
            let of_group = self.log.attempt("commit offsets of", Resource::Group(&group.group));
            return Err(match (failure, of_group.code(code)) {
                (Failure::Abort(_), error @ (Error::UnknownMember { .. } | Error::Unauthorized(_))) => {
                    Failure::Abort(error)
                }
                (failure, _) => failure,
            });
        }
    }

    /// One call, which a thread of its own waits for: it can wait for ever when the group's coordinator has left the cluster
    /// (librdkafka's issues 5456 and 5511). The producer is then left to it, and the next one under its id fences it. The call ends
    /// when one of that producer's connections does, which are closed when they are idle for a minute.
    fn try_send_offsets(
        &self,
        offsets: &TopicPartitionList,
        metadata: &Arc<ConsumerGroupMetadata>,
    ) -> std::result::Result<std::result::Result<(), KafkaError>, Failure> {
        let within = self.transaction_timeout / 2;
        let (answer, answered) = sync_channel(1);
        let (producer, offsets, metadata) = (self.client()?.producer.clone(), offsets.clone(), metadata.clone());
        thread::Builder::new()
            .name("kafka-offsets".to_owned())
            .spawn(move || {
                // Nobody waits for an answer that comes too late.
                let _ = answer.send(producer.send_offsets_to_transaction(&offsets, &metadata, within));
            })
            .map_err(|error| Failure::Abort(Error::Aborted(format!("thread kafka-offsets: {error}"))))?;
        answered.recv_timeout(within + ANSWER_STEP).map_err(|_| {
            let within_ms = within.as_millis();
            Failure::Broken(Error::Aborted(format!(
                "offsets were not added to it within {within_ms} ms"
            )))
        })
    }

    /// The error to answer with. What is left to do is done by [`Self::clean_up`].
    fn end_after(&mut self, failure: Failure) -> Error {
        let open = matches!(self.transaction, State::Open(_));
        self.transaction = State::None;
        match failure {
            Failure::Abort(error) => {
                if open {
                    self.left = Left::Abort;
                }
                error
            }
            Failure::Fenced => {
                self.become_fenced();
                self.fenced()
            }
            Failure::Broken(error) => {
                tracing::warn!(transactional_id = %self.transactional_id, "the producer is made anew: {error}");
                // One that could not be made is tried again by the next transaction.
                if self.producer.is_some() {
                    self.left = Left::Remake;
                }
                error
            }
        }
    }

    /// Leaves the producer ready for the next transaction.
    fn clean_up(&mut self) {
        match std::mem::replace(&mut self.left, Left::Nothing) {
            Left::Nothing => {}
            Left::Abort => self.abort_open(),
            Left::Remake => self.remake_producer(),
        }
    }

    /// Aborts what the producer has open.
    fn abort_open(&mut self) {
        let within = self.log.0.settings.request_timeout;
        let deadline = Instant::now() + within;
        let Some(producer) = &self.producer else {
            return;
        };
        // librdkafka's abort drops what it has not sent, and then skips those sequence numbers: the broker refuses the next
        // transaction. So all is sent first, unless something has failed already and no more is sent.
        while producer.in_flight_count() > 0 && lock(&producer.context().failed).is_none() && Instant::now() < deadline
        {
            producer.serve(POLL_STEP);
        }
        // Its abort waits for acknowledgements without serving them: with some outstanding it is called once to begin, and
        // again when they are served.
        let mut allowed = if producer.in_flight_count() > 0 {
            ABORT_BEGINS
        } else {
            within
        };
        let failure = loop {
            let aborted = producer.abort_transaction(allowed);
            while producer.in_flight_count() > 0 && Instant::now() < deadline {
                producer.serve(POLL_STEP);
            }
            match aborted {
                Ok(()) if !producer.context().purged.load(Ordering::Relaxed) => return,
                Ok(()) => break Failure::Broken(Error::Aborted("records were dropped unsent".to_owned())),
                Err(error) if retriable(&error) && Instant::now() < deadline => allowed = within,
                Err(error) => break self.failure(&error, "abort"),
            }
        };
        match failure {
            Failure::Fenced => self.become_fenced(),
            Failure::Abort(_) | Failure::Broken(_) => self.remake_producer(),
        }
    }

    fn become_fenced(&mut self) {
        self.transaction = State::Fenced;
        self.producer = None;
    }

    fn remake_producer(&mut self) {
        self.producer = None;
        if let Err(error) = self.make_producer() {
            // The next transaction tries again, and is answered with the error if that fails.
            tracing::warn!(transactional_id = %self.transactional_id, "the producer cannot be made anew: {error}");
        }
    }

    /// Makes the producer and takes over its transactional id: what was open under it is aborted, who had it is fenced.
    fn make_producer(&mut self) -> Result<()> {
        let attempt = self
            .log
            .attempt("initialise", Resource::TransactionalId(&self.transactional_id));
        let context = RecordContext {
            failed: Mutex::default(),
            purged: AtomicBool::new(false),
        };
        let config = self
            .log
            .0
            .settings
            .transactional_producer(&self.transactional_id, self.transaction_timeout);
        let client = BaseProducer::from_config_and_context(&config, context)
            .and_then(|producer| {
                let queue = ProducerQueue::new(&producer)?;
                let producer = Arc::new(producer);
                self.log.0.bootstrap.keep(&producer);
                Ok(Client { queue, producer })
            })
            .map_err(|error| attempt.error(&error))?;
        let deadline = Instant::now() + attempt.within;
        loop {
            let error = match client.init_transactions(attempt.within) {
                Ok(()) => break,
                Err(error) => error,
            };
            client.serve(Duration::ZERO);
            if !retriable(&error) || Instant::now() >= deadline {
                return Err(attempt.error(&error));
            }
            std::thread::sleep(RETRY_STEP);
        }
        self.producer = Some(client);
        Ok(())
    }

    fn client(&self) -> std::result::Result<&Client, Failure> {
        self.producer
            .as_ref()
            .ok_or_else(|| Failure::Broken(Error::Unavailable("the producer is being made anew".to_owned())))
    }

    /// What an error of librdkafka's means for the transaction and the producer.
    fn failure(&self, error: &KafkaError, operation: &'static str) -> Failure {
        let code = error.rdkafka_error_code().unwrap_or(Code::Fail);
        let fatal = self
            .producer
            .as_ref()
            .and_then(|producer| producer.client().fatal_error());
        if let Some((code, _)) = fatal {
            return self.fatal(code);
        }
        if let KafkaError::Transaction(error) = error {
            if error.is_fatal() {
                return self.fatal(code);
            }
            if error.txn_requires_abort() && code == Code::TopicAuthorizationFailed {
                return Failure::Abort(Error::Unauthorized(format!("{operation}: {}", error.string())));
            }
            if error.txn_requires_abort() {
                return Failure::Abort(Error::Aborted(format!("{operation}: {}", error.string())));
            }
        }
        let attempt = self
            .log
            .attempt(operation, Resource::TransactionalId(&self.transactional_id));
        Failure::Broken(attempt.error(error))
    }

    fn fatal(&self, code: Code) -> Failure {
        match code {
            Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch => Failure::Fenced,
            code => Failure::Broken(
                match self
                    .log
                    .attempt("write", Resource::TransactionalId(&self.transactional_id))
                    .code(code)
                {
                    error @ Error::Unauthorized(_) => error,
                    error => Error::Aborted(error.to_string()),
                },
            ),
        }
    }

    fn fenced(&self) -> Error {
        Error::Fenced(self.transactional_id.clone())
    }
}

fn retriable(error: &KafkaError) -> bool {
    match error {
        KafkaError::Transaction(error) => error.is_retriable() && !error.is_fatal() && !error.txn_requires_abort(),
        KafkaError::Flush(_) => true,
        _ => false,
    }
}

/// The first record that was not written.
#[derive(Debug)]
struct FailedRecord {
    code: Code,
    topic: String,
    size_bytes: usize,
}

struct RecordContext {
    failed: Mutex<Option<FailedRecord>>,
    /// Whether a record was dropped unsent.
    purged: AtomicBool,
}

impl ClientContext for RecordContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        LogContext.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        LogContext.error(error, reason);
    }

    fn stats_raw(&self, _: &[u8]) {}
}

impl ProducerContext for RecordContext {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, message)) = result {
            let code = error.rdkafka_error_code().unwrap_or(Code::Fail);
            self.fail(code, message.topic(), message.key_len() + message.payload_len());
        }
    }
}

impl RecordContext {
    fn fail(&self, code: Code, topic: &str, size_bytes: usize) {
        if code == Code::PurgeQueue {
            self.purged.store(true, Ordering::Relaxed);
        }
        lock(&self.failed).get_or_insert_with(|| FailedRecord {
            code,
            topic: topic.to_owned(),
            size_bytes,
        });
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

    use super::*;
    use crate::log::kafka::tests::on_mock_broker;

    /// librdkafka's mock broker is enough here: nothing of it is proved but what its refusals are told as.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_topic_that_may_not_be_written_is_told_from_a_passing_trouble() {
        for refused in [RDKafkaApiKey::AddPartitionsToTxn, RDKafkaApiKey::Produce] {
            let (cluster, log) = on_mock_broker().await;
            let mut producer = log.transactional_producer("id", None).await.expect("a producer");
            let error = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
            cluster.request_errors(refused, &[error; 20]);
            let mut transaction = producer.begin();
            let record = ProducerRecord::to("t").value("v");
            transaction.send(record).await.expect("sent");
            let committed = transaction.commit().await;
            assert!(matches!(committed, Err(Error::Unauthorized(_))), "{committed:?}");
        }
    }
}
