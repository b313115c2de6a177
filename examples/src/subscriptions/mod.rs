//! Schedule and forget: a renewal must be paid in the end, though the payment provider is away for a while.
//!
//! ```text
//! schedules ══ renewals, key = user ══▶ biller ── HTTP ──▶ payment provider
//!                      ▲                   │ paid
//!                      └─ tried again ─────┴══▶ receipts, key = user
//! ```
//! A user's plan is a cron expression: the first of each month, or of each January. The calendar says when a renewal is due, and
//! [`Pace`] how fast the calendar goes by; the schedule of a user is the next renewal, on the log.
//!
//! The biller consumes in the order of each user. While the provider is away, each user's first unpaid renewal is tried again with
//! growing pauses, and the later ones of the same user wait behind it. So all are paid in the end, each user's in order. With
//! [`non_blocking`] they wait on retry topics instead: all are paid, and the order is given up.

mod biller;
mod provider;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use barnabas::log::{ProducerSettings, TopicSpec};
use barnabas::patterns::consumer::{ConsumerBuilder, ConsumerHandle, ProcessingOrder, Registry};
use barnabas::patterns::retry::{BackOff, RetryPolicy, RetryTopics};
use barnabas::patterns::schedule::{self, Cron, Schedule, Scheduler, SchedulerSettings, When};
use barnabas::server::event::rfc3339;
use barnabas::server::program::Failure;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::biller::Biller;
use self::provider::Provider;
use crate::scene::{Scene, event};

/// Who pays for each month.
const MONTHLY: [&str; 6] = ["ada", "barbara", "edsger", "grace", "katherine", "tony"];

/// Who pays for a year at once.
const YEARLY: [&str; 1] = ["margaret"];

/// 15 December 2026, on which the calendar of the example begins, in milliseconds since the Unix epoch.
const CALENDAR_FROM_MS: i64 = 1_797_292_800_000;

/// Months that are scheduled.
const MONTHS: u32 = 4;

/// Payments that are taken before the provider goes away.
const BEFORE_OUTAGE: usize = 5;

/// A subscription that is to be paid for another month.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Renewal {
    /// Who pays.
    pub user: String,
    /// For which month, from 1; for a year from that month on, if the plan is yearly.
    pub month: u32,
    /// In cents.
    pub amount: u64,
}

/// How time goes by.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// From one month's renewals to the next. Default 1.2 s.
    pub month: Duration,
    /// How long the provider is away, from its sixth payment on. Default 3 s.
    pub outage: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            month: Duration::from_millis(1200),
            outage: Duration::from_secs(3),
        }
    }
}

/// Waits in place: 200 ms, then twice as long each time up to 2 s, until it is paid. Order is kept.
pub fn blocking() -> RetryPolicy {
    let back_off = BackOff::exponential(Duration::from_millis(200), 2.0, Duration::from_secs(2));
    RetryPolicy::Blocking(back_off.infinite())
}

/// Waits on retry topics: 0.5 s, 1 s, 2 s, 4 s. What is not paid then becomes a dead letter. Order is given up.
pub fn non_blocking() -> RetryPolicy {
    RetryPolicy::NonBlocking(RetryTopics::new([500, 1000, 2000, 4000].map(Duration::from_millis)))
}

/// Schedules the renewals of four months for seven users, waits until all are paid, and says what the log says of it.
///
/// # Errors
/// The log refuses.
pub async fn run(scene: &Scene, retry: RetryPolicy, pace: Pace) -> Result<Report, Failure> {
    let subscriptions = Subscriptions::start(scene, retry, pace).await?;
    let report = subscriptions.live_through(1..=MONTHS).await?;
    subscriptions.stop().await?;
    Ok(report)
}

/// Like [`run`], and then month after month without end, with a card of grace's that is declined: her renewals stand still until an
/// operator skips the first of them or has it kept as a dead letter.
///
/// # Errors
/// The log refuses.
pub async fn run_on(scene: &Scene, retry: RetryPolicy, pace: Pace) -> Result<(), Failure> {
    let subscriptions = Subscriptions::start(scene, retry, pace).await?;
    println!("{}", subscriptions.live_through(1..=MONTHS).await?);
    println!("From now on grace's card is declined. Ctrl-C ends this.");
    subscriptions.provider.decline("grace");
    for month in MONTHS + 1.. {
        subscriptions.schedule(month).await?;
        tokio::time::sleep(pace.month * 3).await;
    }
    subscriptions.stop().await
}

/// The running example.
struct Subscriptions<'a> {
    scene: &'a Scene,
    renewals: String,
    receipts: String,
    plans: Vec<Plan>,
    scheduler: Scheduler,
    /// Fires the schedules.
    firing: JoinHandle<Result<(), barnabas::patterns::Error>>,
    stop_firing: DropGuard,
    provider: Provider,
    biller: ConsumerHandle,
    pace: Pace,
}

/// When a user pays, and how much.
struct Plan {
    user: &'static str,
    dates: Cron,
    amount: u64,
}

impl Plan {
    fn all() -> Result<Vec<Self>, Failure> {
        let monthly = Cron::new("0 9 1 * *", "Europe/Berlin")?;
        let yearly = Cron::new("0 9 1 JAN *", "Europe/Berlin")?;
        let plan = |user, dates: &Cron, amount| Self {
            user,
            dates: dates.clone(),
            amount,
        };
        let mut plans = Vec::from(MONTHLY.map(|user| plan(user, &monthly, 990)));
        plans.extend(YEARLY.map(|user| plan(user, &yearly, 9900)));
        Ok(plans)
    }

    /// Whether a renewal is due on a day of the calendar.
    fn is_due(&self, date_ms: i64) -> Result<bool, Failure> {
        Ok(self.dates.next_ms(date_ms - 1)? == date_ms)
    }
}

/// When a month's renewals are due, by the calendar.
fn date_ms(month: u32) -> Result<i64, Failure> {
    let first_of_month = Cron::new("0 9 1 * *", "Europe/Berlin")?;
    let mut date_ms = CALENDAR_FROM_MS;
    for _ in 0..month {
        date_ms = first_of_month.next_ms(date_ms)?;
    }
    Ok(date_ms)
}

impl<'a> Subscriptions<'a> {
    /// Makes the topics, and starts provider and biller.
    async fn start(scene: &'a Scene, retry: RetryPolicy, pace: Pace) -> Result<Self, Failure> {
        let (renewals, receipts) = (scene.name("renewals"), scene.name("receipts"));
        let schedules = scene.name("renewal-schedules");
        scene
            .make(&[TopicSpec::new(&renewals, 4), TopicSpec::new(&receipts, 4)])
            .await?;
        scene
            .make(&schedule::topics(&schedules, 2, Duration::from_secs(3600)))
            .await?;
        let provider = Provider::start(BEFORE_OUTAGE, pace.outage).await?;
        let biller = Biller::new(provider.address(), &receipts);
        let consumer = ConsumerBuilder::new(scene.name("biller"), [&renewals])
            .order(ProcessingOrder::Key)
            .retry(retry)
            .handler_timeout(Duration::from_secs(5));
        let registry = Registry::new().on::<Renewal>("renewal.due", biller);
        let producer = scene.log.producer(ProducerSettings::default()).await?;
        let stop_firing = CancellationToken::new();
        let settings = SchedulerSettings::new(&schedules);
        let firing = schedule::run(scene.log.clone(), settings, stop_firing.clone());
        Ok(Self {
            scene,
            renewals,
            receipts,
            plans: Plan::all()?,
            scheduler: Scheduler::new(scene.log.clone(), &schedules, producer),
            firing: tokio::spawn(firing),
            stop_firing: stop_firing.drop_guard(),
            provider,
            biller: scene.start(consumer, registry).await?,
            pace,
        })
    }

    /// Lives through one month after the other, and waits until all is paid.
    async fn live_through(&self, months: RangeInclusive<u32>) -> Result<Report, Failure> {
        for month in months {
            self.schedule(month).await?;
        }
        self.scene
            .until(async || Ok(self.report().await?.is_all_paid()))
            .await?;
        self.report().await
    }

    /// Schedules what is to be paid for a month, and waits until it is due: a user's next renewal is scheduled when the one before has
    /// become due, so the renewals of a user keep their order.
    async fn schedule(&self, month: u32) -> Result<(), Failure> {
        let before = self.scene.read(&self.renewals).await?.len();
        let date_ms = date_ms(month)?;
        let mut scheduled = 0;
        for plan in &self.plans {
            if !plan.is_due(date_ms)? {
                continue;
            }
            let renewal = Renewal {
                user: plan.user.to_owned(),
                month,
                amount: plan.amount,
            };
            let schedule = Schedule {
                id: plan.user.to_owned(),
                when: When::After(self.pace.month),
                event: event(&self.renewals, plan.user, "renewal.due", &renewal)?,
            };
            self.scheduler.submit(schedule).await?;
            scheduled += 1;
        }
        println!(
            "            --- month {month} is scheduled for {} ---",
            rfc3339(date_ms)
        );
        self.scene
            .until(async || Ok(self.scene.read(&self.renewals).await?.len() >= before + scheduled))
            .await?;
        Ok(())
    }

    /// What the log says by now.
    async fn report(&self) -> Result<Report, Failure> {
        let mut report = Report {
            scheduled: self.scene.read(&self.renewals).await?.len(),
            failed: self.provider.refused(),
            paid: BTreeMap::new(),
        };
        for receipt in self.scene.read(&self.receipts).await? {
            let receipt: Renewal = serde_json::from_slice(receipt.value.as_deref().unwrap_or_default())?;
            let months = report.paid.entry(receipt.user).or_default();
            // At least once: the same receipt may come again.
            if !months.contains(&receipt.month) {
                months.push(receipt.month);
            }
        }
        Ok(report)
    }

    async fn stop(self) -> Result<(), Failure> {
        drop(self.stop_firing);
        self.firing.await??;
        Ok(self.biller.shutdown().await?)
    }
}

/// What has become of the renewals, from the log.
#[derive(Clone, Debug)]
pub struct Report {
    /// Renewals that were scheduled.
    pub scheduled: usize,
    /// Payments that the provider did not take.
    pub failed: usize,
    /// The months that each user has paid, in the order in which it happened.
    pub paid: BTreeMap<String, Vec<u32>>,
}

impl Report {
    /// Whether every renewal is paid.
    pub fn is_all_paid(&self) -> bool {
        self.paid.values().map(Vec::len).sum::<usize>() == self.scheduled
    }

    /// The users whose months were paid in another order than they were scheduled.
    pub fn out_of_order(&self) -> Vec<&str> {
        let unsorted = self.paid.iter().filter(|(_, months)| !months.is_sorted());
        unsorted.map(|(user, _)| user.as_str()).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        for (user, months) in &self.paid {
            writeln!(f, "{user:>10}  has paid for months {months:?}, in this order")?;
        }
        let paid: usize = self.paid.values().map(Vec::len).sum();
        writeln!(
            f,
            "\n{paid} of {} renewals are paid, though {} payments had failed.",
            self.scheduled, self.failed
        )?;
        match self.out_of_order().as_slice() {
            [] => write!(f, "Every user's months were paid in order."),
            users => write!(f, "Not in order: the months of {}.", users.join(", ")),
        }
    }
}
