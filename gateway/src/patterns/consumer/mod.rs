//! Consuming as a service does: in order, with a bounded pool, committing what is done and nothing else.
//!
//! ```text
//! group member ──▶ partitions: lanes in order ──▶ pool of workers ──▶ handler
//!      ▲                 │        ▲                                     │ done, or failed
//!      └── offsets ◀── runner ────┴─────────────────────────────────────┘
//! ```
//! [`ConsumerBuilder::start`] joins the group and returns a [`ConsumerHandle`]. What a failure leads to is said by a
//! [`RetryPolicy`]; whatever it cannot help becomes a dead letter.
//!
//! Invariant: a committed offset has only finished records before it, and those that its metadata does not name as finished come
//! again. Only the task of the runner changes what is known of a partition.

mod commit;
mod handle;
mod handler;
mod limit;
mod log_clock;
mod members;
mod offsets;
mod operators;
mod partition;
mod pool;
mod registry;
mod reread;
mod routes;
mod runner;
mod subscription;

use std::sync::Arc;
use std::time::Duration;

pub use handle::{BlockedLane, ConsumerHandle, ConsumerState, PartitionState};
pub use handler::{BatchError, BatchHandler, Cause, Context, FailureKind, Handler, HandlerError};
pub use limit::DlqLimit;
#[cfg(feature = "server")]
pub(crate) use members::retry_group;
pub use partition::PauseReason;
pub use registry::{EventHandler, Registry};

pub(in crate::patterns) use self::handler::said;

use self::handler::{AnyHandler, Batches, Each};
use self::subscription::Subscription;
use super::dead_letter::KEEP_DEAD_LETTERS;
use super::retry::RetryPolicy;
use super::{Error, control, dead_letter};
use crate::log::{GroupProtocol, Log, StartAt, TopicSpec};

/// Records that go to a worker in one piece at most: it ends earlier when they take long.
const RUN_RECORDS: usize = 4000;

/// What is kept in order. Within it one record is handled after the other; across it up to the size of the pool at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProcessingOrder {
    /// The records of a partition.
    #[default]
    Partition,
    /// The records of a key. Those without a key have no order.
    Key,
    /// Nothing.
    Unordered,
}

/// How often a record is handled when processes die.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeliveryGuarantee {
    /// Once or not at all: its offset is committed before the handler is called. There is no retry.
    AtMostOnce,
    /// Once or more: its offset is committed when it is done.
    #[default]
    AtLeastOnce,
    /// What handlers send, what is retried or given up, and the offset are one transaction: readers of committed records see each
    /// once, however often the handler was called. It holds from log to log; an effect elsewhere needs a key that makes it
    /// idempotent. A plain function from a record to others is a [`super::processor::Processor`].
    ExactlyOnce,
}

/// What a consumer is made from. Every setting but group and topics has a default.
#[derive(Clone, Debug)]
pub struct ConsumerBuilder {
    group: String,
    subscription: Subscription,
    order: ProcessingOrder,
    guarantee: DeliveryGuarantee,
    pool: usize,
    retry: RetryPolicy,
    handler_timeout: Option<Duration>,
    commit_interval: Duration,
    drain_timeout: Duration,
    session_timeout: Duration,
    start_at: StartAt,
    buffer_bytes: usize,
    run_records: usize,
    dead_letter_limit: Option<DlqLimit>,
    slot: String,
    instance_id: Option<String>,
    protocol: GroupProtocol,
}

impl ConsumerBuilder {
    /// A member of `group` that consumes `topics`.
    pub fn new(group: impl Into<String>, topics: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            group: group.into(),
            subscription: Subscription {
                topics: topics.into_iter().map(Into::into).collect(),
                pattern: None,
                interval: Duration::from_secs(30),
            },
            order: ProcessingOrder::default(),
            guarantee: DeliveryGuarantee::default(),
            pool: 16,
            retry: RetryPolicy::default(),
            handler_timeout: None,
            commit_interval: Duration::from_millis(500),
            drain_timeout: Duration::from_secs(20),
            session_timeout: Duration::from_secs(10),
            start_at: StartAt::Start,
            buffer_bytes: 4 * 1024 * 1024,
            run_records: RUN_RECORDS,
            dead_letter_limit: None,
            slot: "0".to_owned(),
            instance_id: None,
            protocol: GroupProtocol::default(),
        }
    }

    /// Consumes all topics too whose whole names match a regular expression, and looks for new ones every `interval`; Kafka's own and those
    /// that consumers keep beside theirs are never meant. A topic that turns up without the retry and dead-letter topics that it
    /// needs is told as an error each time, and consumed when it has them. Default: none.
    #[must_use]
    pub fn pattern(mut self, pattern: impl Into<String>, interval: Duration) -> Self {
        self.subscription.pattern = Some(pattern.into());
        self.subscription.interval = interval;
        self
    }

    /// What is kept in order. Default [`ProcessingOrder::Partition`].
    #[must_use]
    pub fn order(mut self, order: ProcessingOrder) -> Self {
        self.order = order;
        self
    }

    /// Default [`DeliveryGuarantee::AtLeastOnce`].
    #[must_use]
    pub fn guarantee(mut self, guarantee: DeliveryGuarantee) -> Self {
        self.guarantee = guarantee;
        self
    }

    /// Handlers at work at the same time, 1 at least. Default 16.
    #[must_use]
    pub fn pool(mut self, handlers: usize) -> Self {
        self.pool = handlers.max(1);
        self
    }

    /// What becomes of a record whose handler fails. Default [`RetryPolicy::None`]: it is a dead letter at once.
    #[must_use]
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// A handler that takes longer has failed. Default: it may take as long as it likes, for the group is kept meanwhile.
    #[must_use]
    pub fn handler_timeout(mut self, timeout: Duration) -> Self {
        self.handler_timeout = Some(timeout);
        self
    }

    /// How often offsets are committed; a process that is killed does again what it has done since. Default 500 ms. In exactly
    /// once mode a transaction is committed as soon as there is something to commit and the one before has ended.
    #[must_use]
    pub fn commit_interval(mut self, interval: Duration) -> Self {
        self.commit_interval = interval;
        self
    }

    /// How long a partition that goes to another member, and a shutdown, wait for handlers at work. Default 20 s.
    #[must_use]
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.drain_timeout = timeout;
        self
    }

    /// Static membership: an instance that is restarted under its id within the session timeout has its partitions again without a
    /// rebalance, see [`crate::log::GroupSettings::instance_id`]. Instances of a group need an id each. Default: none.
    #[must_use]
    pub fn instance_id(mut self, instance_id: impl Into<String>) -> Self {
        self.instance_id = Some(instance_id.into());
        self
    }

    /// Kafka's protocol for groups, the same for all instances. Default [`GroupProtocol::Classic`].
    #[must_use]
    pub fn protocol(mut self, protocol: GroupProtocol) -> Self {
        self.protocol = protocol;
        self
    }

    /// After it a member that cannot be heard loses its partitions. Default 10 s.
    #[must_use]
    pub fn session_timeout(mut self, timeout: Duration) -> Self {
        self.session_timeout = timeout;
        self
    }

    /// Where a partition starts for which the group has committed nothing: [`StartAt::Start`] (default) or [`StartAt::End`].
    #[must_use]
    pub fn start_at(mut self, start_at: StartAt) -> Self {
        self.start_at = start_at;
        self
    }

    /// Bytes of records of one partition that may wait in memory before it is paused. What the log's client has read ahead by then
    /// still comes in. Default 4 MiB.
    #[must_use]
    pub fn buffer_bytes(mut self, bytes: usize) -> Self {
        self.buffer_bytes = bytes.max(1);
        self
    }

    /// When so many records have become dead letters that the consumer stops. Default: never.
    #[must_use]
    pub fn dead_letter_limit(mut self, limit: DlqLimit) -> Self {
        self.dead_letter_limit = Some(limit);
        self
    }

    /// Which of the group's instances this is, for exactly once: the transactional id is `{group}-{slot}`. Two that run at the same
    /// time need two slots; one that is started again takes its slot again, and with it ends what it left open. Default `0`.
    #[must_use]
    pub fn slot(mut self, slot: impl Into<String>) -> Self {
        self.slot = slot.into();
        self
    }

    /// The topics that the consumer needs beside those it consumes: retry topics as its policy says, dead letters, which are kept
    /// for four weeks, and the two of [`control`]. They have to exist when it starts; [`Log::plan_topics`] and [`Log::apply_topics`] make them.
    ///
    /// # Errors
    /// [`Error::Log`] for a consumed topic that does not exist; [`Error::Setting`] for a pattern that is none.
    pub async fn topics(&self, log: &Log) -> Result<Vec<TopicSpec>, Error> {
        let mut specs = vec![control::blocked_spec(&self.group)];
        specs.extend(dead_letter::settling(&self.group, KEEP_DEAD_LETTERS));
        for topic in self.subscription.names(log).await? {
            let topic = log.describe_topic(&topic).await?;
            specs.extend(dead_letter::topics(&topic, &self.group, &self.retry, KEEP_DEAD_LETTERS));
        }
        Ok(specs)
    }

    /// Joins the group and begins to call the handler, in tasks of the current tokio runtime.
    ///
    /// # Errors
    /// [`Error::Setting`] for settings that do not go together; [`Error::MissingTopics`] for topics that do not exist;
    /// [`Error::PartitionCounts`], [`Error::RetentionTooShort`] and [`Error::WritersTimes`] for topics that would lose what is retried
    /// or have it early; [`Error::Log`] when
    /// the group cannot be joined.
    pub async fn start<H: Handler>(self, log: &Log, handler: H) -> Result<ConsumerHandle, Error> {
        let timeout = self.handler_timeout;
        self.start_any(log, Box::new(Each { handler, timeout })).await
    }

    /// Like [`ConsumerBuilder::start`], for a handler of up to `records` records at once.
    ///
    /// # Errors
    /// Those of [`ConsumerBuilder::start`].
    pub async fn start_batches<H: BatchHandler>(
        mut self,
        log: &Log,
        records: usize,
        handler: H,
    ) -> Result<ConsumerHandle, Error> {
        self.run_records = records.max(1);
        let timeout = self.handler_timeout;
        self.start_any(log, Box::new(Batches { handler, timeout })).await
    }

    async fn start_any(self, log: &Log, handler: Box<dyn AnyHandler>) -> Result<ConsumerHandle, Error> {
        if self.guarantee == DeliveryGuarantee::AtMostOnce && self.retry != RetryPolicy::None {
            return Err(Error::Setting {
                setting: "retry",
                reason: "what is handled at most once is not tried again".to_owned(),
            });
        }
        runner::start(log.clone(), Arc::new(self), handler).await
    }
}
