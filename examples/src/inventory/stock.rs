//! Commands, the events that follow from them, and what is folded from events: [`Stock`], [`Shipped`], [`Outcomes`].
//!
//! Invariant: what a [`Stock`] decides never makes it negative; a command that would becomes a rejected event.

use std::collections::BTreeMap;
use std::fmt;

use barnabas::log::Record;
use serde::{Deserialize, Serialize};

/// What somebody wants done with copies of a title.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Command {
    /// Which one.
    pub id: String,
    /// Of which book.
    pub title: String,
    /// What.
    pub action: Action,
    /// How many copies; for [`Action::Adjust`] negative ones too.
    pub copies: i64,
}

/// What can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Copies came in.
    Receive,
    /// Copies are kept back for an order.
    Reserve,
    /// Copies that were kept back go out.
    Ship,
    /// Somebody has counted.
    Adjust,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StockEvent {
    /// The command that it follows from.
    pub command: String,
    /// Of which book.
    pub title: String,
    /// What was asked for.
    pub action: Action,
    /// How many copies.
    pub copies: i64,
    /// Whether it was refused, and nothing has changed.
    pub rejected: bool,
}

impl StockEvent {
    /// Its CloudEvents type.
    pub fn event_type(&self) -> &'static str {
        match (self.rejected, self.action) {
            (true, _) => "stock.rejected",
            (_, Action::Receive) => "stock.received",
            (_, Action::Reserve) => "stock.reserved",
            (_, Action::Ship) => "stock.shipped",
            (_, Action::Adjust) => "stock.adjusted",
        }
    }
}

/// What is folded from events: the same whether they are new or replayed.
pub trait ReadModel: Default + Send + Serialize + 'static {
    /// Takes in what has happened.
    fn apply(&mut self, event: &StockEvent);

    /// As [`ReadModel::apply`], from a record.
    ///
    /// # Errors
    /// It holds no such event.
    fn apply_record(&mut self, record: &Record) -> serde_json::Result<()> {
        self.apply(&serde_json::from_slice(record.value.as_deref().unwrap_or_default())?);
        Ok(())
    }
}

/// Copies in the warehouse.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stock(pub BTreeMap<String, Copies>);

/// Copies of one title.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Copies {
    /// On the shelf.
    pub on_hand: i64,
    /// Of those, kept back for orders.
    pub reserved: i64,
}

impl Copies {
    fn after(self, action: Action, copies: i64) -> Self {
        let Self { on_hand, reserved } = self;
        match action {
            Action::Receive | Action::Adjust => Self {
                on_hand: on_hand + copies,
                reserved,
            },
            Action::Reserve => Self {
                on_hand,
                reserved: reserved + copies,
            },
            Action::Ship => Self {
                on_hand: on_hand - copies,
                reserved: reserved - copies,
            },
        }
    }

    /// Whether there can be so many.
    pub fn is_possible(self) -> bool {
        self.reserved >= 0 && self.on_hand >= self.reserved
    }
}

impl Stock {
    /// What follows from a command.
    pub fn decide(&self, command: Command) -> StockEvent {
        let Command {
            id,
            title,
            action,
            copies,
        } = command;
        let now = self.0.get(&title).copied().unwrap_or_default();
        let is_sensible = copies > 0 || action == Action::Adjust;
        StockEvent {
            command: id,
            title,
            action,
            copies,
            rejected: !is_sensible || !now.after(action, copies).is_possible(),
        }
    }
}

impl ReadModel for Stock {
    fn apply(&mut self, event: &StockEvent) {
        if !event.rejected {
            let copies = self.0.entry(event.title.clone()).or_default();
            *copies = copies.after(event.action, event.copies);
        }
    }
}

impl fmt::Display for Stock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>8} {:>8}  title", "on hand", "reserved")?;
        for (title, Copies { on_hand, reserved }) in &self.0 {
            write!(f, "\n{on_hand:>8} {reserved:>8}  {title}")?;
        }
        Ok(())
    }
}

/// Copies that have gone out, by title: a read model that nobody had thought of in the beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Shipped(pub BTreeMap<String, i64>);

impl ReadModel for Shipped {
    fn apply(&mut self, event: &StockEvent) {
        if !event.rejected && event.action == Action::Ship {
            *self.0.entry(event.title.clone()).or_default() += event.copies;
        }
    }
}

/// How many events each command has, and how many were rejected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outcomes {
    /// By the command's id.
    pub events: BTreeMap<String, usize>,
    /// Of those.
    pub rejected: usize,
}

impl ReadModel for Outcomes {
    fn apply(&mut self, event: &StockEvent) {
        *self.events.entry(event.command.clone()).or_default() += 1;
        self.rejected += usize::from(event.rejected);
    }
}
