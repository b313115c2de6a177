//! Works on consumers for as long as it is told, with kills, pauses, brokers cut off, and members that come and go, and checks at the
//! end that nothing was lost, doubled, or out of order, and that no offset ran ahead.
//!
//! ```text
//! cargo run -p barnabas-tests --bin soak -- --minutes 10 --seed 7
//! ```
//! It prints its seed and a verdict. Exit status 0: all is well; 64: not understood; anything else: it is not.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use barnabas_tests::consumer::{At, Crew, Fault, FaultKind, Guarantee, Order, Retry};
use barnabas_tests::kafka::KafkaNode;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

const SLOTS: [&str; 3] = ["a", "b", "c"];
const PARTITIONS: i32 = 6;
const KEYS: u64 = 200;
/// Records for each crew in one step.
const STEP_RECORDS: u64 = 100;

/// What is done to a crew in one step. What operators do has its place here too.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// SIGKILL, and a new process in the same slot.
    Kill,
    /// SIGSTOP for longer than the session.
    PauseLong,
    /// SIGSTOP for less than the session.
    PauseShort,
    /// SIGTERM, and a new process in the same slot.
    Restart,
    /// The broker stands still for all crews.
    BrokerPause,
    /// The broker is killed and started again, for all crews.
    BrokerKill,
}

fn trouble(random: &mut StdRng) -> Trouble {
    match random.random_range(0..20) {
        0..8 => Trouble::Kill,
        8..12 => Trouble::PauseShort,
        12..15 => Trouble::PauseLong,
        15..18 => Trouble::Restart,
        18 => Trouble::BrokerPause,
        _ => Trouble::BrokerKill,
    }
}

fn arguments() -> Option<(u64, u64)> {
    let (mut minutes, mut seed) = (3, rand::rng().random());
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next()?.parse().ok()?;
        match name.as_str() {
            "--minutes" => minutes = value,
            "--seed" => seed = value,
            _ => return None,
        }
    }
    Some((minutes, seed))
}

#[tokio::main]
async fn main() -> ExitCode {
    let Some((minutes, seed)) = arguments() else {
        eprintln!("usage: soak [--minutes N] [--seed S]");
        return ExitCode::from(64);
    };
    println!("soak: {minutes} minutes, seed {seed}");
    // Checks are assertions: one that fails says what is wrong and ends the process with status 101.
    soak(Duration::from_secs(60 * minutes), seed).await;
    println!("soak: all is well, seed {seed}");
    ExitCode::SUCCESS
}

async fn crews(brokers: &str) -> Vec<Crew> {
    let mut crews = Vec::new();
    let retried = Fault {
        at: At::Every(23),
        attempts: 2,
        until: None,
        kind: FaultKind::Fail,
    };
    for (guarantee, order, retry) in [
        (Guarantee::ExactlyOnce, Order::Partition, Retry::None),
        (Guarantee::ExactlyOnce, Order::Key, Retry::Blocking(50)),
        (Guarantee::AtLeastOnce, Order::Key, Retry::Blocking(50)),
        (Guarantee::AtMostOnce, Order::Partition, Retry::None),
    ] {
        let crew = Crew::new(brokers, PARTITIONS, |settings| {
            if let Retry::Blocking(_) = retry {
                settings.faults = vec![retried.clone()];
            }
            settings.guarantee = guarantee;
            settings.order = order;
            settings.retry = retry;
            settings.work_max_us = 3000;
            if guarantee != Guarantee::ExactlyOnce {
                settings.output = None;
            }
        });
        crews.push(crew.await);
    }
    crews
}

async fn soak(time: Duration, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let node = KafkaNode::start();
    let mut crews = crews(node.brokers()).await;
    for crew in &mut crews {
        for slot in SLOTS {
            crew.start(slot);
        }
    }
    let until = Instant::now() + time;
    let mut steps = 0;
    while Instant::now() < until {
        steps += 1;
        for crew in &mut crews {
            crew.append(STEP_RECORDS, KEYS).await;
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(100..1500))).await;
        let at = random.random_range(0..crews.len());
        let slot = SLOTS[random.random_range(0..SLOTS.len())];
        let trouble = trouble(&mut random);
        println!("step {steps}: {trouble:?} {at} {slot}");
        let crew = &mut crews[at];
        match trouble {
            Trouble::Kill => {
                crew.kill(slot);
                crew.start(slot);
            }
            Trouble::PauseLong | Trouble::PauseShort => {
                crew.worker(slot).pause();
                let ms = if let Trouble::PauseLong = trouble {
                    3000..5000
                } else {
                    50..1000
                };
                tokio::time::sleep(Duration::from_millis(random.random_range(ms))).await;
                crew.worker(slot).resume();
            }
            Trouble::Restart => {
                crew.stop(slot);
                crew.start(slot);
            }
            Trouble::BrokerPause => {
                node.pause();
                tokio::time::sleep(Duration::from_millis(random.random_range(500..6000))).await;
                node.resume();
            }
            Trouble::BrokerKill => {
                node.kill();
                tokio::time::sleep(Duration::from_millis(random.random_range(0..3000))).await;
                node.restart();
            }
        }
        for (at, crew) in crews.iter_mut().enumerate() {
            let crashed = crew.restart_crashed();
            if crashed > 0 {
                println!("step {steps}: {crashed} of {at} ended by themselves");
            }
        }
    }
    for crew in &mut crews {
        crew.caught_up().await;
        crew.assert_offsets(&[]);
        crew.stop_all();
        match crew.settings.guarantee {
            Guarantee::ExactlyOnce => crew.assert_exactly_once(),
            Guarantee::AtLeastOnce => crew.assert_at_least_once(),
            Guarantee::AtMostOnce => crew.assert_at_most_once(),
        }
        let (records, calls) = (crew.appended(), crew.ledger().len());
        println!(
            "{:?} {:?}: {records} records, {calls} lines",
            crew.settings.guarantee, crew.settings.order
        );
    }
}
