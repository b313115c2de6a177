//! Consume, transform, produce: what follows from each record of some topics stands on others, once.
//!
//! ```text
//! topics ──▶ transform(&Record) ──▶ records ──┐
//!   ▲                                         ├──▶ one transaction
//!   └──────────────── offsets ────────────────┘
//! ```
//! A [`Processor`] is a consumer in exactly-once mode whose handler is a plain function: it has no context, waits for nothing, and is tested
//! by calling it. With a handler that waits, or that routes events by type, use [`ConsumerBuilder`] with
//! [`DeliveryGuarantee::ExactlyOnce`] instead.
//!
//! Invariant: all that a record leads to is what the function returns for it, so that calling it again does no harm.

use super::Error;
use super::consumer::{ConsumerBuilder, ConsumerHandle, Context, DeliveryGuarantee, Handler, HandlerError};
use crate::log::{Log, ProducerRecord, Record};

/// Turns records into others, exactly once.
///
/// ```no_run
/// use barnabas::log::{Log, ProducerRecord, Record};
/// use barnabas::patterns::consumer::{ConsumerBuilder, HandlerError};
/// use barnabas::patterns::processor::Processor;
///
/// fn checkout(payment: &Record) -> Result<Vec<ProducerRecord>, HandlerError> {
///     let Some(id) = &payment.key else {
///         return Err(HandlerError::non_retriable("a payment without an id"));
///     };
///     Ok(vec![ProducerRecord::to("checkouts").key(id.clone())])
/// }
///
/// # async fn start(log: &Log) -> Result<(), barnabas::patterns::Error> {
/// let consumer = ConsumerBuilder::new("checkout", ["payments"]);
/// let running = Processor::new(consumer, checkout).start(log).await?;
/// running.shutdown().await
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Processor<F> {
    consumer: ConsumerBuilder,
    transform: F,
}

impl<F> Processor<F>
where
    F: Fn(&Record) -> Result<Vec<ProducerRecord>, HandlerError> + Send + Sync + 'static,
{
    /// `consumer` says the group, the topics, and everything else but the guarantee, which is [`DeliveryGuarantee::ExactlyOnce`]. The function
    /// may be called again for a record, and says by its error what then becomes of it, as a [`Handler`] does.
    pub fn new(consumer: ConsumerBuilder, transform: F) -> Self {
        Self {
            consumer: consumer.guarantee(DeliveryGuarantee::ExactlyOnce),
            transform,
        }
    }

    /// Joins the group and begins to call the function, in tasks of the current tokio runtime.
    ///
    /// # Errors
    /// Those of [`ConsumerBuilder::start`].
    pub async fn start(self, log: &Log) -> Result<ConsumerHandle, Error> {
        self.consumer.start(log, Transform(self.transform)).await
    }
}

struct Transform<F>(F);

impl<F> Handler for Transform<F>
where
    F: Fn(&Record) -> Result<Vec<ProducerRecord>, HandlerError> + Send + Sync + 'static,
{
    async fn handle(&self, context: &mut Context, record: &Record) -> Result<(), HandlerError> {
        for record in (self.0)(record)? {
            context.send(record);
        }
        Ok(())
    }
}
