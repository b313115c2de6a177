//! What visitors do, minute by minute: counts per minute and type of event, exact although events come out of order and the counter is
//! killed again and again.
//!
//! ```text
//! page ── sendBeacon ──▶ gateway ══▶ clicks ══▶ consumer ══ commands, key = type ══▶ window store ══▶ minutes: each once
//!   ▲                                                                                     ║
//!   └── WebSocket, SSE, long-poll ◀── gateway ◀══ notifications: minutes as they grow ◀═══╝
//! ```
//! [`run`] sends the events itself and proves the minutes against a count of its own; [`serve`] has the page beside it send them.
//! The consumer works exactly once, the store counts each command once, and a minute's result is in the transaction that closes it.

mod counter;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use barnabas::log::{ProducerRecord, ProducerSettings, TopicSpec};
use barnabas::patterns::atomic_store;
use barnabas::patterns::window::OpenWindows;
use barnabas::server::program::Failure;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use self::counter::Counter;
use crate::scene::{Scene, event};

/// Types of events that are counted. A visitor cannot add to them.
pub const TYPES: [&str; 3] = ["click", "move", "key"];

const MINUTE_MS: i64 = 60_000;

/// How much later than others an event of the same type may come.
const GRACE: Duration = Duration::from_secs(10);

/// When nothing comes for so long, minutes that are over are closed. A counter that is killed has its successor well before that.
const IDLE: Duration = Duration::from_secs(60);

const MINUTES: i64 = 15;
const EVENTS_A_MINUTE: usize = 200;

/// At the end of these minutes the counter is killed.
const KILLED_AFTER: [i64; 2] = [5, 10];

/// At the end of these minutes events of long ago come in.
const LATE_AFTER: [i64; 2] = [7, 12];
const LATE_EVENTS: usize = 7;

/// What a page says of something that has happened on it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Happened {
    /// When, by the page's clock, in milliseconds since the Unix epoch.
    pub at_ms: i64,
}

/// The count of a minute and type that is closed, as it stands on the topic of minutes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Minute {
    /// The type of events.
    pub key: String,
    /// Its first millisecond.
    pub start_ms: i64,
    /// The first millisecond behind it.
    pub end_ms: i64,
    /// How many there were.
    pub value: u64,
}

/// The names of a run.
#[derive(Debug)]
struct Names {
    /// The topic of events, and the channel on which a page hears of the minutes.
    events: String,
    /// The group of the consumer.
    group: String,
    store: String,
    minutes: String,
    /// Where browsers hear of what is counted.
    notifications: String,
}

impl Names {
    fn new(scene: &Scene, notifications: String) -> Self {
        Self {
            events: scene.name("clicks"),
            group: scene.name("click-commands"),
            store: scene.name("click-minutes"),
            minutes: scene.name("minutes"),
            notifications,
        }
    }

    async fn make(&self, scene: &Scene) -> Result<(), Failure> {
        scene
            .make(&[TopicSpec::new(&self.events, 4), TopicSpec::new(&self.minutes, 1)])
            .await?;
        scene
            .make(&atomic_store::topics(&self.store, 4, Duration::from_secs(24 * 60 * 60)))
            .await
    }
}

/// Makes the topics, and names that of events, so that a gateway can open it. It is also the channel of the minutes.
///
/// # Errors
/// The log refuses.
pub async fn events_topic(scene: &Scene) -> Result<String, Failure> {
    let names = Names::new(scene, String::new());
    names.make(scene).await?;
    Ok(names.events)
}

/// Counts what comes on the topic of events, and tells the page by way of `notifications`, until it is dropped.
///
/// # Errors
/// The log refuses.
pub async fn serve(scene: &Scene, notifications: String) -> Result<(), Failure> {
    let names = Names::new(scene, notifications);
    let counter = Counter::start(scene, &names, IDLE).await?;
    counter.ended().await
}

/// Sends a quarter of an hour of events in some seconds, kills the counter on the way, and proves what was counted.
///
/// # Errors
/// The log refuses.
pub async fn run(scene: &Scene) -> Result<Report, Failure> {
    let names = Names::new(scene, scene.name("notifications"));
    names.make(scene).await?;
    scene.make(&[TopicSpec::new(&names.notifications, 1)]).await?;
    let mut sent = Sent::default();
    let mut counter = Counter::start(scene, &names, IDLE).await?;
    for minute in 1..=MINUTES {
        sent.minute(scene, &names, minute).await?;
        if LATE_AFTER.contains(&minute) {
            sent.wait(scene, &names).await?;
            sent.late(scene, &names).await?;
            println!("minute {minute:>2}: {LATE_EVENTS} events of minute 1 come now");
        }
        if KILLED_AFTER.contains(&minute) {
            counter.kill();
            println!("minute {minute:>2}: the counter was killed, and another takes over");
            counter = Counter::start(scene, &names, IDLE).await?;
        }
        // The next minute must not overtake this one on another partition.
        sent.wait(scene, &names).await?;
    }
    counter.stop().await?;
    // Nothing more is on its way: the last minute need not be waited for.
    let counter = Counter::start(scene, &names, Duration::from_secs(1)).await?;
    scene
        .until(async || Ok(sent.report(scene, &names).await?.is_settled()))
        .await?;
    counter.stop().await?;
    sent.report(scene, &names).await
}

/// What was sent, counted by the one who has sent it.
#[derive(Debug)]
struct Sent {
    begin_ms: i64,
    counts: BTreeMap<(String, i64), u64>,
    late: u64,
    sent: u64,
}

impl Default for Sent {
    fn default() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        Self {
            // All minutes are over by now.
            begin_ms: (now_ms / MINUTE_MS - MINUTES - 2) * MINUTE_MS,
            counts: BTreeMap::new(),
            late: 0,
            sent: 0,
        }
    }
}

impl Sent {
    /// The events of a minute, jumbled as far as the grace lets them be.
    async fn minute(&mut self, scene: &Scene, names: &Names, minute: i64) -> Result<(), Failure> {
        let start_ms = self.begin_ms + (minute - 1) * MINUTE_MS;
        let mut events = Vec::new();
        for number in 0..EVENTS_A_MINUTE {
            let at_ms = start_ms + number as i64 * MINUTE_MS / EVENTS_A_MINUTE as i64;
            let event_type = TYPES[number % TYPES.len()];
            *self.counts.entry((event_type.to_owned(), start_ms)).or_default() += 1;
            events.push((event_type, at_ms));
        }
        let grace_events = GRACE.as_millis() as usize * EVENTS_A_MINUTE / MINUTE_MS as usize;
        for near in events.chunks_mut(grace_events) {
            near.shuffle(&mut rand::rng());
        }
        self.send(scene, names, &events).await
    }

    /// Events of the first minute.
    async fn late(&mut self, scene: &Scene, names: &Names) -> Result<(), Failure> {
        self.late += LATE_EVENTS as u64;
        self.send(scene, names, &[(TYPES[0], self.begin_ms); LATE_EVENTS]).await
    }

    async fn send(&mut self, scene: &Scene, names: &Names, events: &[(&str, i64)]) -> Result<(), Failure> {
        let producer = scene.log.producer(ProducerSettings::telemetry()).await?;
        let mut deliveries = Vec::new();
        for (event_type, at_ms) in events {
            // Some visitors, whose events stay in their order.
            let visitor = format!("visitor-{}", self.sent % 5);
            let record: ProducerRecord = event(&names.events, &visitor, event_type, &Happened { at_ms: *at_ms })?;
            deliveries.push(producer.send(record).await?);
            self.sent += 1;
        }
        for delivery in deliveries {
            delivery.await?;
        }
        Ok(())
    }

    /// Waits until all that was sent is in a minute, or is counted as late.
    async fn wait(&self, scene: &Scene, names: &Names) -> Result<(), Failure> {
        scene
            .until(async || {
                let report = self.report(scene, names).await?;
                Ok(report.counted() >= self.sent)
            })
            .await
    }

    async fn report(&self, scene: &Scene, names: &Names) -> Result<Report, Failure> {
        let mut report = Report {
            sent: self.sent,
            expected: self.counts.clone(),
            expected_late: self.late,
            closed: Vec::new(),
            open: 0,
            late: 0,
        };
        for record in scene.read(&names.minutes).await? {
            report
                .closed
                .push(serde_json::from_slice(record.value.as_deref().unwrap_or_default())?);
        }
        for state in atomic_store::states::<OpenWindows<u64>>(&scene.log, &names.store)
            .await?
            .values()
        {
            report.open += state.open.values().sum::<u64>();
            report.late += state.late;
        }
        Ok(report)
    }
}

/// The minutes as they stand on the log, beside what was sent.
#[derive(Clone, Debug)]
pub struct Report {
    /// Events that were sent.
    pub sent: u64,
    /// How many of each type and minute were in time, by the sender's count.
    pub expected: BTreeMap<(String, i64), u64>,
    /// How many were not.
    pub expected_late: u64,
    /// The results of the minutes that are closed, in the order of the log.
    pub closed: Vec<Minute>,
    /// Events in minutes that are open.
    pub open: u64,
    /// Events that the store has counted as late.
    pub late: u64,
}

impl Report {
    fn counted(&self) -> u64 {
        self.closed.iter().map(|minute| minute.value).sum::<u64>() + self.open + self.late
    }

    fn is_settled(&self) -> bool {
        self.open == 0 && self.counted() >= self.sent
    }

    /// What contradicts the sender's count.
    pub fn contradictions(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut minutes: BTreeMap<(String, i64), Vec<u64>> = BTreeMap::new();
        for minute in &self.closed {
            minutes
                .entry((minute.key.clone(), minute.start_ms))
                .or_default()
                .push(minute.value);
        }
        for (of, count) in &self.expected {
            let told = minutes.remove(of).unwrap_or_default();
            if told != [*count] {
                found.push(format!("{of:?} has {count} events, and {told:?} was told"));
            }
        }
        found.extend(minutes.into_keys().map(|of| format!("{of:?} is no minute of these")));
        if self.late != self.expected_late {
            found.push(format!(
                "{} were late, and {} counted so",
                self.expected_late, self.late
            ));
        }
        found
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first_ms = self
            .expected
            .keys()
            .map(|(_, start_ms)| *start_ms)
            .min()
            .unwrap_or_default();
        writeln!(
            f,
            "\n  minute  {}",
            TYPES.map(|event_type| format!("{event_type:>6}")).concat()
        )?;
        for minute in 0..MINUTES {
            let start_ms = first_ms + minute * MINUTE_MS;
            let count = |event_type: &str| {
                let of = self
                    .closed
                    .iter()
                    .filter(|of| of.key == event_type && of.start_ms == start_ms);
                of.map(|of| of.value).sum::<u64>()
            };
            writeln!(
                f,
                "  {:>6}  {}",
                minute + 1,
                TYPES.map(|event_type| format!("{:>6}", count(event_type))).concat()
            )?;
        }
        writeln!(
            f,
            "\n{} events were sent, {} of them when their minute was closed; {} minutes were told.",
            self.sent,
            self.expected_late,
            self.closed.len()
        )?;
        match self.contradictions().as_slice() {
            [] => write!(
                f,
                "Each minute was told once, with the sender's own count, and what was late was counted as late."
            ),
            found => write!(f, "This contradicts the sender's count:\n{}", found.join("\n")),
        }
    }
}
