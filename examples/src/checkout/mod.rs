//! Exactly once from log to log: each payment becomes one checkout, and each checkout one delivery, one booking in the inventory
//! and one invoice, although the checkout stage is killed again and again.
//!
//! ```text
//! payments ══▶ checkout stage ══▶ checkouts ══┬▶ delivery  ══▶ deliveries
//!                    ║                        ├▶ inventory ══▶ bookings
//!                    ╚═▶ dead letters         └▶ invoicing ══▶ invoices
//! ```
//! Each arrow is a consumer with [`DeliveryGuarantee::ExactlyOnce`]: what it sends, what it gives up, and the offset of what it has
//! read are one transaction. A stage that is killed in the middle of one leaves nothing visible; its successor takes its slot, ends
//! what was open, and does those payments again. So handlers are called more often than there are payments, and nobody sees it.

mod stage;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use barnabas::log::{ProducerSettings, TopicSpec};
use barnabas::patterns::consumer::{
    ConsumerBuilder, ConsumerHandle, Context, DeliveryGuarantee, EventHandler, HandlerError, Registry,
};
use barnabas::patterns::dead_letter::dead_letter_topic;
use barnabas::server::program::Failure;
use serde::{Deserialize, Serialize};

use self::stage::{Stage, Till};
use crate::scene::{Scene, event, key};

const PAYMENTS: usize = 600;

/// Every so many payments one is hopeless.
const HOPELESS: usize = 50;

/// After so many payments the first, second, … checkout stage is killed.
const KILLED_AFTER: [usize; 4] = [40, 80, 120, 160];

/// The services behind the checkout, and what each makes of it.
const DOWNSTREAM: [(&str, &str); 3] = [
    ("delivery", "deliveries"),
    ("inventory", "bookings"),
    ("invoicing", "invoices"),
];

const PAID: &str = "payment.received";
const CHECKED_OUT: &str = "checkout.done";

/// Money that came in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Payment {
    /// Which one, and the key of all that follows from it.
    pub id: String,
    /// In cents. Without any it is hopeless.
    pub amount: u64,
}

/// A payment that was checked out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Checkout {
    /// The payment's.
    pub id: String,
}

/// Sends payments through all stages, kills the checkout stage on the way, and proves from the log what has come of it.
///
/// # Errors
/// The log refuses.
pub async fn run(scene: &Scene) -> Result<Report, Failure> {
    let names = Names::new(scene);
    scene.make(&names.topics()).await?;
    pay(scene, &names.payments).await?;
    println!("{PAYMENTS} payments came in");
    let mut services = Vec::new();
    for (service, output) in DOWNSTREAM {
        services.push(start_downstream(scene, &names, service, output).await?);
    }

    let till = Arc::new(Till::new(&names.checkouts));
    for payments in KILLED_AFTER {
        let stage = Stage::start(scene, &names.payments, &names.checkout, &till).await?;
        till.wait_for(payments).await;
        stage.kill();
        println!("the checkout stage was killed at its payment {payments}, and another takes over");
    }
    let stage = Stage::start(scene, &names.payments, &names.checkout, &till).await?;
    scene
        .until(async || Ok(Report::read(scene, &names, &till).await?.is_settled()))
        .await?;
    stage.stop().await?;
    for service in services {
        service.shutdown().await?;
    }
    // What would come a second time has come by now.
    Report::read(scene, &names, &till).await
}

/// The names of this run.
struct Names {
    payments: String,
    checkouts: String,
    /// The group of the checkout stage.
    checkout: String,
    outputs: Vec<String>,
}

impl Names {
    fn new(scene: &Scene) -> Self {
        Self {
            payments: scene.name("payments"),
            checkouts: scene.name("checkouts"),
            checkout: scene.name("checkout"),
            outputs: DOWNSTREAM.map(|(_, output)| scene.name(output)).to_vec(),
        }
    }

    fn topics(&self) -> Vec<TopicSpec> {
        let names = [&self.payments, &self.checkouts].into_iter().chain(&self.outputs);
        names.map(|name| TopicSpec::new(name, 4)).collect()
    }
}

async fn pay(scene: &Scene, payments: &str) -> Result<(), Failure> {
    let producer = scene.log.producer(ProducerSettings::default()).await?;
    let mut deliveries = Vec::new();
    for number in 1..=PAYMENTS {
        let payment = Payment {
            id: format!("payment-{number}"),
            amount: if number.is_multiple_of(HOPELESS) { 0 } else { 4200 },
        };
        let record = event(payments, &payment.id, PAID, &payment)?;
        deliveries.push(producer.send(record).await?);
    }
    for delivery in deliveries {
        delivery.await?;
    }
    Ok(())
}

async fn start_downstream(
    scene: &Scene,
    names: &Names,
    service: &str,
    output: &str,
) -> Result<ConsumerHandle, Failure> {
    let consumer =
        ConsumerBuilder::new(scene.name(service), [&names.checkouts]).guarantee(DeliveryGuarantee::ExactlyOnce);
    let handler = Downstream {
        output: scene.name(output),
    };
    scene
        .start(consumer, Registry::new().on::<Checkout>(CHECKED_OUT, handler))
        .await
}

/// A service that does its part of each checkout, and says so on a topic of its own.
struct Downstream {
    output: String,
}

impl EventHandler<Checkout> for Downstream {
    async fn handle(&self, context: &mut Context, checkout: Checkout) -> Result<(), HandlerError> {
        let record = event(&self.output, &checkout.id, "checkout.handled", &checkout);
        context.send(record.map_err(HandlerError::non_retriable)?);
        Ok(())
    }
}

/// What has become of the payments, from the log: how often each stands on each topic, in committed transactions.
#[derive(Clone, Debug)]
pub struct Report {
    payments: BTreeMap<String, usize>,
    checkouts: BTreeMap<String, usize>,
    dead_letters: BTreeMap<String, usize>,
    downstream: BTreeMap<String, BTreeMap<String, usize>>,
    /// How often the checkout stage's handler was called.
    pub calls: usize,
}

impl Report {
    async fn read(scene: &Scene, names: &Names, till: &Till) -> Result<Self, Failure> {
        let mut downstream = BTreeMap::new();
        for output in &names.outputs {
            downstream.insert(output.clone(), count(scene, output).await?);
        }
        Ok(Self {
            payments: count(scene, &names.payments).await?,
            checkouts: count(scene, &names.checkouts).await?,
            dead_letters: count(scene, &dead_letter_topic(&names.payments, &names.checkout)).await?,
            downstream,
            calls: till.calls(),
        })
    }

    /// Whether everything has come out at the end, once or more.
    fn is_settled(&self) -> bool {
        let has_ended = |id| self.checkouts.contains_key(id) || self.dead_letters.contains_key(id);
        self.payments.keys().all(has_ended)
            && self
                .downstream
                .values()
                .all(|seen| seen.keys().eq(self.checkouts.keys()))
    }

    /// What contradicts exactly once: each payment is one checkout or one dead letter, and each service has each checkout once.
    pub fn contradictions(&self) -> Vec<String> {
        let mut found = Vec::new();
        let times = |counts: &BTreeMap<String, usize>, id| counts.get(id).copied().unwrap_or(0);
        for id in self.payments.keys() {
            let (checkouts, dead_letters) = (times(&self.checkouts, id), times(&self.dead_letters, id));
            if checkouts + dead_letters != 1 {
                found.push(format!(
                    "{id} has {checkouts} checkouts and {dead_letters} dead letters"
                ));
            }
            for (topic, seen) in &self.downstream {
                if times(seen, id) != checkouts {
                    found.push(format!("{id} stands {} times on {topic}", times(seen, id)));
                }
            }
        }
        found
    }

    /// Payments that came in, were checked out, and became dead letters.
    pub fn totals(&self) -> (usize, usize, usize) {
        (self.payments.len(), self.checkouts.len(), self.dead_letters.len())
    }
}

/// How often each key stands on a topic.
async fn count(scene: &Scene, topic: &str) -> Result<BTreeMap<String, usize>, Failure> {
    let mut counts = BTreeMap::new();
    for record in scene.read(topic).await? {
        *counts.entry(key(&record)).or_default() += 1;
    }
    Ok(counts)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (payments, checkouts, dead_letters) = self.totals();
        writeln!(f, "\n{payments:>6} payments")?;
        writeln!(f, "{checkouts:>6} checkouts")?;
        writeln!(f, "{dead_letters:>6} dead letters, of payments that were hopeless")?;
        for (topic, seen) in &self.downstream {
            writeln!(f, "{:>6} {topic}", seen.values().sum::<usize>())?;
        }
        writeln!(
            f,
            "\nThe checkout stage's handler was called {} times: {} payments were done again after a kill.",
            self.calls,
            self.calls.saturating_sub(payments)
        )?;
        match self.contradictions().as_slice() {
            [] => write!(
                f,
                "Each payment is exactly one checkout or one dead letter, and each service has each checkout exactly once."
            ),
            found => write!(f, "That is not exactly once:\n  {}", found.join("\n  ")),
        }
    }
}
