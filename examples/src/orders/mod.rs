//! Queue and publish-subscribe: every service gets every order, and no service's trouble is another's.
//!
//! ```text
//!            ┌─▶ wallet      (a group of its own, blocked while the bank is away)
//! orders ════┼─▶ warehouse   (a group of its own)
//!            ├─▶ logistics   (a group of its own)
//!            └─▶ loyalty     (joins late, and starts at the first order)
//! ```
//! Each service is a consumer group, in which its instances would share the partitions. What it does with an event is said by the
//! event's type, in a [`Registry`] that every instance has in full. What each has done it says on a topic of outcomes, from which
//! the summary is made.

mod service;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barnabas::log::{ProducerSettings, StartAt, TopicSpec};
use barnabas::patterns::consumer::{ConsumerBuilder, ConsumerHandle, Registry};
use barnabas::patterns::dead_letter::dead_letter_topic;
use barnabas::patterns::retry::{BackOff, RetryPolicy};
use barnabas::server::program::Failure;
use serde::{Deserialize, Serialize};

use self::service::{CANCELLED, Cancelled, PLACED, Placed, Service};
use crate::scene::{Scene, event, key};

/// The services that are there from the beginning, and the one that comes late.
const SERVICES: [&str; 3] = ["wallet", "warehouse", "logistics"];
const LATE: &str = "loyalty";

/// Orders that are placed. Every tenth is cancelled, and one event is of a type that no service knows.
const ORDERS: u32 = 50;

/// What a service has done with an event.
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    service: String,
    /// The type of the event.
    event: String,
}

/// Places orders and waits until all services, the late one too, have done all of them.
///
/// # Errors
/// The log refuses.
pub async fn run(scene: &Scene) -> Result<Summary, Failure> {
    let (orders, outcomes) = (scene.name("orders"), scene.name("outcomes"));
    scene
        .make(&[TopicSpec::new(&orders, 4), TopicSpec::new(&outcomes, 4)])
        .await?;
    let bank = Arc::new(AtomicBool::new(false));
    let mut services = Vec::new();
    for name in SERVICES {
        // Only the wallet needs the bank.
        let bank = (name == "wallet").then(|| bank.clone());
        services.push(start(scene, name, &orders, &outcomes, bank).await?);
    }
    println!(
        "{} started; the bank is away, so the wallet is blocked",
        SERVICES.join(", ")
    );
    let events = place(scene, &orders).await?;
    println!("{ORDERS} orders placed, {events} events in all");

    let others = &SERVICES[1..];
    until_done(scene, &orders, &outcomes, others).await?;
    let summary = Summary::read(scene, &orders, &outcomes, &SERVICES).await?;
    println!(
        "warehouse and logistics are done with all of them, the wallet with {}",
        summary.services["wallet"].done
    );
    let while_blocked = summary.services["wallet"].done;

    bank.store(true, Ordering::Relaxed);
    println!("the bank is back");
    until_done(scene, &orders, &outcomes, &SERVICES).await?;
    println!("the wallet is done too; {LATE} joins, and starts at the first order");

    services.push(start(scene, LATE, &orders, &outcomes, None).await?);
    let all = [&SERVICES[..], &[LATE]].concat();
    until_done(scene, &orders, &outcomes, &all).await?;
    for service in services {
        service.shutdown().await?;
    }
    let mut summary = Summary::read(scene, &orders, &outcomes, &all).await?;
    summary.wallet_while_blocked = while_blocked;
    Ok(summary)
}

/// Starts an instance of a service: a member of the group of its name.
async fn start(
    scene: &Scene,
    name: &str,
    orders: &str,
    outcomes: &str,
    bank: Option<Arc<AtomicBool>>,
) -> Result<ConsumerHandle, Failure> {
    let service = Arc::new(Service::new(name, outcomes, bank));
    let registry = Registry::new()
        .on::<Placed>(PLACED, service.clone())
        .on::<Cancelled>(CANCELLED, service);
    let consumer = ConsumerBuilder::new(scene.name(name), [orders])
        // Also a group that joins late wants the orders from before.
        .start_at(StartAt::Start)
        .retry(RetryPolicy::Blocking(
            BackOff::fixed(Duration::from_millis(100)).infinite(),
        ));
    scene.start(consumer, registry).await
}

/// Appends the events of all orders, and returns how many there are.
async fn place(scene: &Scene, orders: &str) -> Result<usize, Failure> {
    let producer = scene.log.producer(ProducerSettings::default()).await?;
    let mut events = Vec::new();
    for number in 1..=ORDERS {
        let order = format!("order-{number}");
        let placed = Placed {
            order: order.clone(),
            item: "a book".to_owned(),
            amount: 1200,
        };
        events.push(event(orders, &order, PLACED, &placed)?);
        if number.is_multiple_of(10) {
            let cancelled = Cancelled {
                order: order.clone(),
                reason: "bought twice".to_owned(),
            };
            events.push(event(orders, &order, CANCELLED, &cancelled)?);
        }
    }
    events.push(event(orders, "order-1", "order.gift-wrapped", &"in red")?);
    let count = events.len();
    for record in events {
        producer.append(record).await?;
    }
    Ok(count)
}

async fn until_done(scene: &Scene, orders: &str, outcomes: &str, services: &[&str]) -> Result<(), Failure> {
    let is_done = async || {
        let summary = Summary::read(scene, orders, outcomes, services).await?;
        Ok(summary.services.values().all(|part| part.missing == 0))
    };
    scene.until(is_done).await
}

/// What each service has done, from the log.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Events of orders.
    pub events: usize,
    /// The services by name.
    pub services: BTreeMap<String, Part>,
    /// Events that the wallet had done while the bank was away and the others finished.
    pub wallet_while_blocked: usize,
}

/// What one service has done.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Events that it has done.
    pub done: usize,
    /// Events that it has kept as dead letters.
    pub dead_letters: usize,
    /// Events of which neither is so.
    pub missing: usize,
    /// Orders that it has cancelled before it had seen them placed.
    pub out_of_order: usize,
}

impl Summary {
    async fn read(scene: &Scene, orders: &str, outcomes: &str, services: &[&str]) -> Result<Self, Failure> {
        let events = scene.read(orders).await?.len();
        let done = scene.read(outcomes).await?;
        let mut summary = Self {
            events,
            services: BTreeMap::new(),
            wallet_while_blocked: 0,
        };
        for service in services {
            let mut part = Part::default();
            let mut seen = BTreeSet::new();
            for record in &done {
                let outcome: Outcome = serde_json::from_slice(record.value.as_deref().unwrap_or_default())?;
                if outcome.service == *service {
                    let order = key(record);
                    let is_early = outcome.event == CANCELLED && !seen.contains(&(order.clone(), PLACED.to_owned()));
                    part.out_of_order += usize::from(is_early);
                    // At least once: the same outcome may come again.
                    seen.insert((order, outcome.event));
                }
            }
            part.done = seen.len();
            let dead_letters = dead_letter_topic(orders, &scene.name(service));
            part.dead_letters = scene.read(&dead_letters).await?.len();
            part.missing = events.saturating_sub(part.done + part.dead_letters);
            summary.services.insert((*service).to_owned(), part);
        }
        Ok(summary)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:<10} {:>6} {:>13} {:>8}",
            "service", "done", "dead letters", "missing"
        )?;
        for (name, part) in &self.services {
            let Part {
                done,
                dead_letters,
                missing,
                ..
            } = part;
            writeln!(f, "{name:<10} {done:>6} {dead_letters:>13} {missing:>8}")?;
        }
        let out_of_order: usize = self.services.values().map(|part| part.out_of_order).sum();
        writeln!(
            f,
            "\nEach service has every one of the {} events, done or, being of a type that it does not know, as a dead letter.",
            self.events
        )?;
        write!(
            f,
            "{out_of_order} orders were cancelled before they were placed. While the wallet was blocked the others went on."
        )
    }
}
