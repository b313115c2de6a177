//! Works on consumers, and on state on the log, for as long as it is told, with kills, pauses, brokers cut off, members that come and
//! go, and operators who act on what stands still, and checks at the end that nothing was lost, doubled, or out of order, that no offset
//! ran ahead, that a group which stood still all the time held no other up, and that stores, windows, views, tables and posted events say what
//! the log says.
//!
//! ```text
//! tests/soak --minutes 10 --seed 7
//! ```
//! It prints its seed and a verdict. Exit status 0: all is well; 64: not understood; anything else: it is not.

mod operator;
mod state;
mod telemetry;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use barnabas_tests::consumer::{At, Crew, Fault, FaultKind, Guarantee, Membership, Order, Retry, SOON, assert_once};
use barnabas_tests::kafka::KafkaNode;
use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use self::operator::Operator;
use self::state::State;

const SLOTS: [&str; 2] = ["a", "b"];
const PARTITIONS: i32 = 6;
const KEYS: u64 = 200;
/// Records for each crew in one step.
const STEP_RECORDS: u64 = 60;
/// One of so many records fails a few times.
const FAILS: u64 = 23;
/// One of so many records fails until an operator has looked at it.
const STANDS_STILL: u64 = 97;
/// One of so many records becomes a dead letter at once.
const HOPELESS: u64 = 115;

/// What is done to a crew in one step.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// SIGKILL with handlers at work, and a new process in the same slot.
    Kill,
    /// SIGSTOP for longer than the session.
    PauseLong,
    /// SIGSTOP for less than the session.
    PauseShort,
    /// SIGTERM, and a new process in the same slot.
    Restart,
}

impl Trouble {
    fn any(random: &mut StdRng) -> Self {
        match random.random_range(0..18) {
            0..8 => Self::Kill,
            8..12 => Self::PauseShort,
            12..15 => Self::PauseLong,
            _ => Self::Restart,
        }
    }
}

/// What is done to the broker in one step, for all crews.
#[derive(Clone, Copy, Debug)]
enum Outage {
    /// SIGSTOP.
    Pause,
    /// SIGKILL, and it is started again.
    Kill,
}

impl Outage {
    /// In most steps there is none.
    fn any(random: &mut StdRng) -> Option<Self> {
        match random.random_range(0..16) {
            0 => Some(Self::Pause),
            1 => Some(Self::Kill),
            _ => None,
        }
    }
}

/// What a crew is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Handlers succeed.
    Plain,
    /// Some fail a few times, and are tried again in their places.
    Blocking,
    /// Some fail a few times, and are tried again by way of retry topics; some become dead letters.
    NonBlocking,
    /// Some fail until an operator has looked.
    Operated,
    /// All fail until the end.
    StandingStill,
}

struct Member {
    role: Role,
    crew: Crew,
    kills: usize,
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
        eprintln!("usage: tests/soak [--minutes N] [--seed S]");
        return ExitCode::from(64);
    };
    println!("soak: {minutes} minutes, seed {seed}");
    // Checks are assertions: one that fails says what is wrong and ends the process with status 101.
    soak(Duration::from_secs(60 * minutes), seed).await;
    println!("soak: all is well, seed {seed}");
    ExitCode::SUCCESS
}

async fn members(brokers: &str) -> Vec<Member> {
    let fault = |at, attempts, kind| Fault {
        at,
        attempts,
        until: None,
        kind,
    };
    let mut members: Vec<Member> = Vec::new();
    use {Guarantee::*, Membership::*, Order::*};
    for (role, guarantee, order, membership) in [
        (Role::Plain, ExactlyOnce, Partition, Dynamic),
        (Role::Plain, AtMostOnce, Partition, Dynamic),
        (Role::Blocking, ExactlyOnce, Key, Static),
        (Role::Blocking, AtLeastOnce, Key, Broker),
        (Role::NonBlocking, ExactlyOnce, Key, Dynamic),
        (Role::Operated, ExactlyOnce, Key, Dynamic),
        (Role::StandingStill, AtLeastOnce, Partition, Dynamic),
    ] {
        // Who stands still does so beside the first.
        let beside = members.first().map(|member| member.crew.input().to_owned());
        let crew = Crew::new(brokers, PARTITIONS, |settings| {
            settings.guarantee = guarantee;
            settings.order = order;
            settings.membership = membership;
            if role == Role::Operated {
                // Keys that wait long are let go and read again.
                settings.buffer_bytes = Some(20_000);
            }
            settings.work_max_us = 15_000;
            if guarantee != Guarantee::ExactlyOnce {
                settings.output = None;
            }
            (settings.retry, settings.faults) = match role {
                Role::Plain => (Retry::None, Vec::new()),
                Role::Blocking => (Retry::Blocking(50), vec![fault(At::Every(FAILS), 2, FaultKind::Fail)]),
                Role::NonBlocking => (
                    Retry::NonBlocking(vec![200, 500]),
                    vec![
                        fault(At::Every(HOPELESS), u32::MAX, FaultKind::Hopeless),
                        fault(At::Every(FAILS), 2, FaultKind::Fail),
                    ],
                ),
                Role::Operated => (
                    Retry::Blocking(500),
                    vec![fault(At::Every(STANDS_STILL), u32::MAX, FaultKind::Fail)],
                ),
                Role::StandingStill => {
                    settings.topics = beside.into_iter().collect();
                    (Retry::Blocking(500), vec![fault(At::All, u32::MAX, FaultKind::Fail)])
                }
            };
        });
        let mut crew = crew.await;
        if role == Role::StandingStill {
            crew.settings.faults[0].until = Some(crew.folder().join("well"));
        }
        for slot in SLOTS {
            crew.start(slot);
        }
        members.push(Member { role, crew, kills: 0 });
    }
    members
}

async fn soak(time: Duration, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let node = KafkaNode::start();
    let mut members = members(node.brokers()).await;
    let operated = members.iter().find(|member| member.role == Role::Operated);
    let mut operator = Operator::new(&operated.expect("one is operated").crew, random.random());
    let mut state = State::start(node.brokers(), random.random()).await;
    let until = Instant::now() + time;
    let mut steps = 0;
    while Instant::now() < until {
        steps += 1;
        for member in &mut members {
            if member.role != Role::StandingStill {
                member.crew.append(STEP_RECORDS, KEYS).await;
            }
        }
        state.submit().await;
        tokio::time::sleep(Duration::from_millis(random.random_range(100..1000))).await;
        // What the operator does meets what happens to the crews, and both meet what happens to the broker.
        let mut troubles = Vec::new();
        for (at, member) in members.iter_mut().enumerate() {
            let (trouble, slot) = (Trouble::any(&mut random), SLOTS[random.random_range(0..SLOTS.len())]);
            let seed = random.random();
            if random.random_range(0..3) == 0 {
                println!("step {steps}: {trouble:?} {at} {slot}");
                troubles.push(make_trouble(trouble, member, slot, StdRng::seed_from_u64(seed)));
            }
        }
        let outage = Outage::any(&mut random);
        let seed = random.random();
        let (_, (), (), (asked, answers)) = tokio::join!(
            join_all(troubles),
            state.make_trouble(steps),
            make_outage(outage, &node, StdRng::seed_from_u64(seed)),
            operator.act()
        );
        println!("step {steps}: outage {outage:?}, {answers} of {asked} operator's commands were answered");
        for (at, member) in members.iter_mut().enumerate() {
            let crashed = member.crew.restart_crashed();
            if crashed > 0 {
                println!("step {steps}: {crashed} of {at} ended by themselves");
            }
        }
        state.restart_ended(steps);
    }
    finish(members, operator).await;
    state.finish().await;
}

async fn make_trouble(trouble: Trouble, member: &mut Member, slot: &str, mut random: StdRng) {
    let crew = &mut member.crew;
    match trouble {
        Trouble::Kill => {
            if member.role == Role::StandingStill {
                crew.kill(slot);
            } else {
                crew.kill_at_work(slot, KEYS).await;
                member.kills += 1;
            }
            crew.start(slot);
        }
        Trouble::PauseLong => {
            crew.worker(slot).pause();
            wait(&mut random, 3000..5000).await;
            crew.worker(slot).resume();
        }
        Trouble::PauseShort => {
            crew.worker(slot).pause();
            wait(&mut random, 50..1000).await;
            crew.worker(slot).resume();
        }
        Trouble::Restart => {
            crew.stop_meanwhile(slot).await;
            crew.start(slot);
        }
    }
}

async fn make_outage(outage: Option<Outage>, node: &KafkaNode, mut random: StdRng) {
    match outage {
        None => {}
        Some(Outage::Pause) => {
            node.pause();
            wait(&mut random, 500..6000).await;
            node.resume();
        }
        Some(Outage::Kill) => {
            node.kill();
            wait(&mut random, 0..3000).await;
            tokio::task::block_in_place(|| {
                node.restart();
                node.wait_in_sync();
            });
        }
    }
}

async fn wait(random: &mut StdRng, ms: std::ops::Range<u64>) {
    tokio::time::sleep(Duration::from_millis(random.random_range(ms))).await;
}

/// Lets all get to their ends, and judges.
async fn finish(mut members: Vec<Member>, mut operator: Operator) {
    // A: who stands still is the last.
    for member in &mut members {
        let Member { role, crew, kills } = member;
        println!(
            "{role:?} {:?} {:?}: {} records, {} lines",
            crew.settings.guarantee,
            crew.settings.order,
            crew.appended(),
            crew.ledger().len()
        );
        if *role == Role::Operated {
            operator.end(crew).await;
        }
        if *role == Role::StandingStill {
            break;
        }
        crew.caught_up().await;
        crew.assert_kills_told(*kills);
        let letters = format!("{}.{}.dlt", crew.input(), crew.settings.group);
        match (*role, crew.settings.guarantee) {
            (Role::Operated, _) => operator.judge(crew, STANDS_STILL),
            (Role::NonBlocking, _) => {
                let records = crew.appended();
                crew.until("each has an end", SOON, |crew| {
                    let ends = crew.read(crew.output()).len() + crew.read(&letters).len();
                    ends as u64 >= records
                })
                .await;
                crew.stop_all();
                let (letters, output) = (crew.read(&letters), crew.read(crew.output()));
                let (hopeless, others) = (0..records).partition::<Vec<_>, _>(|number| number.is_multiple_of(HOPELESS));
                assert_once(hopeless, &letters);
                assert_once(others, &output);
            }
            (_, Guarantee::ExactlyOnce) => {
                crew.assert_offsets(&[]);
                crew.stop_all();
                crew.assert_exactly_once();
            }
            (_, Guarantee::AtLeastOnce) => {
                crew.assert_offsets(&[]);
                crew.stop_all();
                crew.assert_at_least_once();
            }
            (_, Guarantee::AtMostOnce) => {
                crew.stop_all();
                crew.assert_at_most_once();
            }
        }
    }
    let beside = members[0].crew.appended();
    let standing = members.last_mut().expect("there are members");
    let crew = &mut standing.crew;
    assert_eq!(crew.count("done"), 0, "it stood still");
    crew.note_appended(beside);
    std::fs::write(crew.folder().join("well"), "").expect("written");
    crew.caught_up().await;
    crew.assert_offsets(&[]);
    crew.stop_all();
    crew.assert_at_least_once();
}
