//! What users write: a [`Handler`] of records, or a [`BatchHandler`] of several at once.
//!
//! A handler runs guarded: an error, a panic and a timeout are all a failure of its record, and nothing else's.

use std::any::Any;
use std::error::Error as _;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use crate::log::{ProducerRecord, Record, TopicPartition};

/// The cause of a [`HandlerError`].
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Handles records one by one.
pub trait Handler: Send + Sync + 'static {
    /// Does what the record asks for. When it returns `Ok`, the record is done.
    fn handle(&self, context: &mut Context, record: &Record) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

/// Handles several records of one partition at once: those that stand one behind the other, or in key order those of one key.
pub trait BatchHandler: Send + Sync + 'static {
    /// Does what the records ask for. When it returns `Ok`, all of them are done. After a panic or a timeout it is called again with the
    /// first half of them, until it shows of which record that is the failure.
    fn handle(&self, context: &mut Context, records: &[Record]) -> impl Future<Output = Result<(), BatchError>> + Send;
}

/// Why a record could not be handled.
#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    /// It may work later: the retry policy decides when.
    #[error("{0}")]
    Retriable(#[source] Cause),
    /// It never will: the record becomes a dead letter.
    #[error("{0}")]
    NonRetriable(#[source] Cause),
    /// It need not be handled: the record is done.
    #[error("skipped")]
    Skip,
}

impl HandlerError {
    /// An error that may pass.
    pub fn retriable(cause: impl Into<Cause>) -> Self {
        Self::Retriable(cause.into())
    }

    /// An error that will not pass.
    pub fn non_retriable(cause: impl Into<Cause>) -> Self {
        Self::NonRetriable(cause.into())
    }
}

/// Why not all records of a batch could be handled.
#[derive(Debug, thiserror::Error)]
#[error("record {index} of the batch: {error}")]
pub struct BatchError {
    /// The first record that was not handled, from 0. Those before it are done, or, if the batch has sent records, are handled
    /// once more without it. Behind it another batch begins.
    pub index: usize,
    /// What is wrong with it.
    #[source]
    pub error: HandlerError,
}

/// What a handler knows of the record beside its content, and where it puts what follows from it.
#[derive(Debug)]
pub struct Context {
    partition: TopicPartition,
    attempt: u32,
    sent: Vec<ProducerRecord>,
}

impl Context {
    pub(super) fn new(partition: TopicPartition) -> Self {
        Self {
            partition,
            attempt: 1,
            sent: Vec::new(),
        }
    }

    /// The partition from which the record was read. That of a retry topic when it comes from there.
    pub fn partition(&self) -> &TopicPartition {
        &self.partition
    }

    /// Which attempt at the record this is, from 1, those before it waited on retry topics counted. Of a batch: at its first.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Produces a record when the one in hand is done: in exactly-once mode in one transaction with its offset, else before its
    /// offset is committed. What a failed attempt has sent is dropped.
    pub fn send(&mut self, record: ProducerRecord) {
        self.sent.push(record);
    }
}

/// One failed attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) kind: FailureKind,
    pub(super) message: String,
}

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// [`HandlerError::Retriable`].
    Retriable,
    /// [`HandlerError::NonRetriable`].
    NonRetriable,
    /// The handler panicked.
    Panic,
    /// The handler took longer than it may. It may be quicker later.
    Timeout,
}

impl FailureKind {
    /// As headers and operators say it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retriable => "retriable",
            Self::NonRetriable => "non-retriable",
            Self::Panic => "panic",
            Self::Timeout => "timeout",
        }
    }

    /// What [`FailureKind::as_str`] has said; anything else is [`FailureKind::Retriable`].
    pub(super) fn parse(text: &str) -> Self {
        let kinds = [Self::NonRetriable, Self::Panic, Self::Timeout];
        kinds
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .unwrap_or(Self::Retriable)
    }

    /// Whether another attempt may help.
    pub fn is_retriable(self) -> bool {
        matches!(self, Self::Retriable | Self::Timeout)
    }
}

/// What became of the records that a handler was given.
#[derive(Debug, Default)]
pub(super) struct Handled {
    /// So many of them, from the first, are done.
    pub(super) done: usize,
    /// Why the one behind them is not.
    pub(super) failure: Option<Failure>,
    /// What the done ones have sent, each with the index of the record that it follows from. Of a batch: of its first.
    pub(super) sent: Vec<(usize, ProducerRecord)>,
}

/// The handler of a consumer, whichever kind it is.
pub(super) trait AnyHandler: Send + Sync + 'static {
    /// Handles records from the first on, until one fails, or the run is stopped or its turn over.
    fn handle<'a>(
        &'a self,
        partition: TopicPartition,
        records: &'a [Record],
        attempts: Attempts,
        turn: Turn<'a>,
    ) -> BoxFuture<'a, Handled>;
}

/// How long a handler goes on with a run.
#[derive(Clone, Copy)]
pub(super) struct Turn<'a> {
    /// Whether the run is wanted; false: its partition leaves.
    pub(super) is_wanted: &'a (dyn Fn() -> bool + Send + Sync),
    /// Behind it nothing further is begun.
    pub(super) until: Instant,
}

/// Which attempts at its records a handler is given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempts {
    /// At the first record.
    pub(super) first: u32,
    /// At the others.
    pub(super) others: u32,
}

/// Calls a [`Handler`] for one record after the other.
pub(super) struct Each<H> {
    pub(super) handler: H,
    pub(super) timeout: Option<Duration>,
}

impl<H: Handler> AnyHandler for Each<H> {
    fn handle<'a>(
        &'a self,
        partition: TopicPartition,
        records: &'a [Record],
        attempts: Attempts,
        turn: Turn<'a>,
    ) -> BoxFuture<'a, Handled> {
        let handle = async move {
            let mut context = Context::new(partition);
            let mut handled = Handled::default();
            for (index, record) in records.iter().enumerate() {
                if !(turn.is_wanted)() || Instant::now() >= turn.until {
                    break;
                }
                context.attempt = if index == 0 { attempts.first } else { attempts.others };
                let ended = guarded(self.timeout, async { self.handler.handle(&mut context, record).await });
                match ended.await {
                    Ok(Ok(())) => handled
                        .sent
                        .extend(context.sent.drain(..).map(|record| (index, record))),
                    Ok(Err(error)) => handled.failure = Failure::of(error),
                    Err(failure) => handled.failure = Some(failure),
                }
                if handled.failure.is_some() {
                    break;
                }
                context.sent.clear();
                handled.done += 1;
            }
            handled
        };
        handle.boxed()
    }
}

/// Calls a [`BatchHandler`] for all records at once.
pub(super) struct Batches<H> {
    pub(super) handler: H,
    pub(super) timeout: Option<Duration>,
}

impl<H: BatchHandler> AnyHandler for Batches<H> {
    fn handle<'a>(
        &'a self,
        partition: TopicPartition,
        records: &'a [Record],
        attempts: Attempts,
        turn: Turn<'a>,
    ) -> BoxFuture<'a, Handled> {
        let handle = async move {
            let mut handled = Handled::default();
            let mut records = records;
            // Each further call is for the first ones of the same batch, however long it takes.
            while !records.is_empty() {
                if !(turn.is_wanted)() {
                    return Handled::default();
                }
                let mut context = Context::new(partition.clone());
                context.attempt = attempts.first;
                let ended = guarded(self.timeout, async { self.handler.handle(&mut context, records).await });
                let (failed, failure) = match ended.await {
                    Ok(Ok(())) => {
                        handled.done = records.len();
                        handled.sent = context.sent.into_iter().map(|record| (0, record)).collect();
                        break;
                    }
                    Ok(Err(BatchError { index, error })) => (index.min(records.len() - 1), Failure::of(error)),
                    // Whose fault it is the handler did not say: it shows among fewer.
                    Err(_) if records.len() > 1 => {
                        handled.failure = None;
                        records = &records[..records.len() / 2];
                        continue;
                    }
                    Err(failure) => (0, Some(failure)),
                };
                if context.sent.is_empty() || failed == 0 {
                    // Without a failure the record is to be skipped.
                    handled.done = failed + usize::from(failure.is_none());
                    handled.failure = failure;
                    break;
                }
                handled.failure = failure;
                // Whose the sent records are only the handler knows: those before the failed one are handled by themselves.
                records = &records[..failed];
            }
            handled
        };
        handle.boxed()
    }
}

/// Runs a handler's future so that a panic or a timeout is its failure.
async fn guarded<T>(timeout: Option<Duration>, future: impl Future<Output = T>) -> Result<T, Failure> {
    let caught = AssertUnwindSafe(future).catch_unwind();
    let ended = match timeout {
        None => caught.await,
        Some(timeout) => match tokio::time::timeout(timeout, caught).await {
            Ok(ended) => ended,
            Err(_) => {
                return Err(Failure {
                    kind: FailureKind::Timeout,
                    message: format!("the handler took longer than {} ms", timeout.as_millis()),
                });
            }
        },
    };
    ended.map_err(|panic| Failure {
        kind: FailureKind::Panic,
        message: format!("the handler panicked: {}", said(&*panic)),
    })
}

/// What a panic said.
pub(in crate::patterns) fn said(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "no text",
    }
}

impl Failure {
    /// `None`: the record is to be skipped.
    fn of(error: HandlerError) -> Option<Self> {
        let kind = match error {
            HandlerError::Retriable(_) => FailureKind::Retriable,
            HandlerError::NonRetriable(_) => FailureKind::NonRetriable,
            HandlerError::Skip => return None,
        };
        Some(Self {
            kind,
            message: with_causes(&error),
        })
    }
}

/// An error with what caused it.
fn with_causes(error: &HandlerError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source().and_then(|cause| cause.source());
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::log::Headers;

    struct Panics(AtomicUsize);

    impl BatchHandler for Panics {
        async fn handle(&self, _: &mut Context, _: &[Record]) -> Result<(), BatchError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            panic!("whose fault it is is not said");
        }
    }

    /// So many calls for a batch of eight whose partition leaves after so many, and whether a record is blamed.
    async fn calls(wanted: usize) -> (usize, bool) {
        let batches = Batches {
            handler: Panics(AtomicUsize::new(0)),
            timeout: None,
        };
        let record = |offset| Record {
            offset,
            timestamp_ms: 0,
            key: None,
            value: None,
            headers: Headers::new(),
        };
        let records: Vec<_> = (0..8).map(record).collect();
        let calls = || batches.handler.0.load(Ordering::Relaxed);
        let turn = Turn {
            is_wanted: &|| calls() < wanted,
            until: Instant::now(),
        };
        let attempts = Attempts { first: 1, others: 1 };
        let handled = batches
            .handle(TopicPartition::new("t", 0), &records, attempts, turn)
            .await;
        assert_eq!(handled.done, 0);
        (calls(), handled.failure.is_some())
    }

    #[tokio::test]
    async fn a_batch_is_halved_to_find_its_record_and_left_when_its_partition_leaves() {
        assert_eq!(calls(usize::MAX).await, (4, true));
        assert_eq!(calls(2).await, (2, false));
        assert_eq!(calls(0).await, (0, false));
    }
}
