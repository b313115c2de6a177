//! A service: what it does with each type of event.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use barnabas::patterns::consumer::{Context, EventHandler, HandlerError};
use serde::{Deserialize, Serialize};

use super::Outcome;
use crate::scene::event;

pub(super) const PLACED: &str = "order.placed";
pub(super) const CANCELLED: &str = "order.cancelled";

/// An order was placed.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Placed {
    pub(super) order: String,
    pub(super) item: String,
    /// In cents.
    pub(super) amount: u64,
}

/// An order was cancelled.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Cancelled {
    pub(super) order: String,
    pub(super) reason: String,
}

pub(super) struct Service {
    name: String,
    outcomes: String,
    /// Whether the bank is there, for a service that needs it.
    bank: Option<Arc<AtomicBool>>,
}

impl Service {
    pub(super) fn new(name: &str, outcomes: &str, bank: Option<Arc<AtomicBool>>) -> Self {
        Self {
            name: name.to_owned(),
            outcomes: outcomes.to_owned(),
            bank,
        }
    }

    fn ask_the_bank(&self) -> Result<(), HandlerError> {
        let is_away = self.bank.as_ref().is_some_and(|bank| !bank.load(Ordering::Relaxed));
        match is_away {
            true => Err(HandlerError::retriable("the bank is away")),
            false => Ok(()),
        }
    }

    /// Says what was done, in the order of the order's events.
    fn say(&self, context: &mut Context, order: &str, event_type: &str) -> Result<(), HandlerError> {
        let outcome = Outcome {
            service: self.name.clone(),
            event: event_type.to_owned(),
        };
        let record = event(&self.outcomes, order, "order.handled", &outcome);
        context.send(record.map_err(HandlerError::non_retriable)?);
        Ok(())
    }
}

impl EventHandler<Placed> for Service {
    async fn handle(&self, context: &mut Context, placed: Placed) -> Result<(), HandlerError> {
        self.ask_the_bank()?;
        tracing::debug!(
            service = self.name,
            item = placed.item,
            amount = placed.amount,
            "placed"
        );
        self.say(context, &placed.order, PLACED)
    }
}

impl EventHandler<Cancelled> for Service {
    async fn handle(&self, context: &mut Context, cancelled: Cancelled) -> Result<(), HandlerError> {
        self.ask_the_bank()?;
        tracing::debug!(service = self.name, reason = cancelled.reason, "cancelled");
        self.say(context, &cancelled.order, CANCELLED)
    }
}
