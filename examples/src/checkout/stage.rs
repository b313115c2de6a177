//! The checkout stage, and how it is killed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use barnabas::patterns::consumer::{
    ConsumerBuilder, ConsumerHandle, Context, DeliveryGuarantee, EventHandler, HandlerError, Registry,
};
use barnabas::server::program::Failure;
use tokio::sync::Notify;

use super::{CHECKED_OUT, Checkout, PAID, Payment};
use crate::scene::{Process, Scene, event};

/// How long the work on a payment takes.
const WORK: Duration = Duration::from_millis(1);

/// A running stage, in a process of its own so to speak. Dropped, it is killed.
pub(super) struct Stage {
    // Dropped before the consumer, whose own end would be a graceful one.
    _process: Process,
    consumer: ConsumerHandle,
}

impl Stage {
    pub(super) async fn start(scene: &Scene, payments: &str, group: &str, till: &Arc<Till>) -> Result<Self, Failure> {
        // It keeps its slot, the default one: a successor ends what its predecessor has left open.
        let builder = ConsumerBuilder::new(group, [payments]).guarantee(DeliveryGuarantee::ExactlyOnce);
        scene.make(&builder.topics(&scene.log).await?).await?;
        let registry = Registry::new().on::<Payment>(PAID, till.clone());
        let process = Process::start()?;
        till.open();
        let log = scene.log.clone();
        let started = process.spawn(async move { builder.start(&log, registry).await });
        Ok(Self {
            _process: process,
            consumer: started.await??,
        })
    }

    /// Ends it where it stands: nothing is finished, nothing is committed, nobody is told.
    pub(super) fn kill(self) {
        drop(self);
    }

    /// Lets it finish what is in hand.
    pub(super) async fn stop(self) -> Result<(), Failure> {
        Ok(self.consumer.shutdown().await?)
    }
}

/// What the stage does with payments.
pub(super) struct Till {
    checkouts: String,
    calls: AtomicUsize,
    called: Notify,
    /// Calls when the running stage was started.
    opened_at: AtomicUsize,
}

impl Till {
    pub(super) fn new(checkouts: &str) -> Self {
        Self {
            checkouts: checkouts.to_owned(),
            calls: AtomicUsize::new(0),
            called: Notify::new(),
            opened_at: AtomicUsize::new(0),
        }
    }

    fn open(&self) {
        self.opened_at.store(self.calls(), Ordering::Relaxed);
    }

    /// Calls of the handler by all stages.
    pub(super) fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    /// Waits until the running stage has begun so many payments.
    pub(super) async fn wait_for(&self, payments: usize) {
        while self.calls() < self.opened_at.load(Ordering::Relaxed) + payments {
            self.called.notified().await;
        }
    }
}

impl EventHandler<Payment> for Till {
    async fn handle(&self, context: &mut Context, payment: Payment) -> Result<(), HandlerError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.called.notify_one();
        tokio::time::sleep(WORK).await;
        if payment.amount == 0 {
            return Err(HandlerError::non_retriable("there is no money in this payment"));
        }
        let checkout = Checkout { id: payment.id };
        let record = event(&self.checkouts, &checkout.id, CHECKED_OUT, &checkout);
        context.send(record.map_err(HandlerError::non_retriable)?);
        Ok(())
    }
}
