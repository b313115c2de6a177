//! Subscribers that live at random: each seed is a small world of gateways that come and go, clients that change transport and
//! gateway whenever they like, bursts of events, and retention that takes some of them. Whatever happens, a client is told each
//! event once and in order, or is told of the gap.
//!
//! `BARNABAS_SEEDS=1000` runs as many; `BARNABAS_SEED=7` runs that one alone.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use barnabas::log::partition_for_key;
use barnabas_tests::conformance::within;
use barnabas_tests::subscriber::{Push, Subscriber, TRANSPORTS, Transport};
use barnabas_tests::world::World;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const SEEDS: u64 = 60;
/// Worlds that live at the same time.
const AT_ONCE: usize = 4;
const EVENTS: u32 = 150;
const CLIENTS: usize = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_each_event_is_told_once_and_in_order_or_a_gap_is_said() {
    let number = |name| std::env::var(name).ok().map(|value| value.parse().expect("a number"));
    let seeds = match number("BARNABAS_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("BARNABAS_SEEDS").unwrap_or(SEEDS),
    };
    let (mut gaps, mut running) = (0, tokio::task::JoinSet::new());
    for seed in seeds {
        if running.len() == AT_ONCE {
            gaps += running.join_next().await.expect("a world").expect("no panic");
        }
        running.spawn(live(seed));
    }
    while let Some(ended) = running.join_next().await {
        gaps += ended.expect("no panic");
    }
    println!("{gaps} gaps were said");
}

/// What all that live in a world know.
struct Common {
    seed: u64,
    /// Gateways that are up.
    gateways: Mutex<Vec<SocketAddr>>,
    /// Below it retention has taken the events of each channel.
    kept_from: [AtomicI64; 2],
}

/// One world to its end; returns how many gaps its clients were told of.
async fn live(seed: u64) -> usize {
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let has_retention = random.random_bool(0.5);
    let mut world = World::with(|config| {
        config.push.backlog_bytes = random.random_range(1..64 * 1024);
        config.push.history_bytes = random.random_range(1..256 * 1024);
        config.push.poll_wait = Duration::from_secs(1);
        config.http.shutdown_grace = Duration::from_millis(100);
    })
    .await;
    let channels = channels(world.config.topics.partitions);
    let common = Arc::new(Common {
        seed,
        gateways: Mutex::new(vec![world.address]),
        kept_from: Default::default(),
    });
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let channel = client % channels.len();
        let name = channels[channel].clone();
        // Where it stands before anything has happened.
        let (_, token) = Subscriber::join(world.address, Transport::LongPoll, &name).await;
        let random = StdRng::seed_from_u64(random.random());
        clients.spawn(follow(common.clone(), channel, name, token, random));
    }

    let mut posted = [0; 2];
    let mut second = None;
    while posted.iter().any(|posted| *posted < EVENTS) {
        let channel = random.random_range(0..channels.len());
        let burst = random.random_range(1..20).min(EVENTS - posted[channel]);
        if burst > 0 {
            let padding = "x".repeat(random.random_range(0..4000));
            let numbers = posted[channel]..posted[channel] + burst;
            let events = numbers.map(|n| json!({"type": "n", "data": {"n": n, "padding": padding}}));
            world.post_events(&channels[channel], events.collect()).await;
            posted[channel] += burst;
        }
        match random.random_range(0..10) {
            // The last events stay, so that every client sees the end.
            0 if has_retention && posted[channel] > 10 => {
                let from = i64::from(random.random_range(0..posted[channel] - 10));
                // Noted first: who misses something may look before the call is back.
                common.kept_from[channel].fetch_max(from, Ordering::SeqCst);
                world.retain_from(&channels[channel], from).await;
            }
            1 => match second.take() {
                None => {
                    let stop = CancellationToken::new();
                    let address = world.gateway_until(stop.clone()).await;
                    common.gateways.lock().expect("no panic").push(address);
                    second = Some(stop);
                }
                Some(stop) => {
                    common.gateways.lock().expect("no panic").truncate(1);
                    stop.cancel();
                }
            },
            2..6 => tokio::time::sleep(Duration::from_millis(random.random_range(0..20))).await,
            _ => {}
        }
    }
    let mut gaps = 0;
    while let Some(ended) = within("the clients reach the end", clients.join_next()).await {
        gaps += ended.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    world.stopping.cancel();
    if let Some(stop) = second {
        stop.cancel();
    }
    assert!(gaps == 0 || has_retention, "seed {seed}: a gap where nothing was taken");
    gaps
}

/// Two channels on partitions of their own, so that an event's number is its offset.
fn channels(partitions: i32) -> [String; 2] {
    let partition = |name: &str| partition_for_key(name.as_bytes(), partitions);
    let other = (0..)
        .map(|n| format!("c{n}"))
        .find(|name| partition(name) != partition("c"));
    ["c".to_owned(), other.expect("there is more than one partition")]
}

/// A client that stays nowhere for long, to the last event; returns how many gaps it was told of.
async fn follow(common: Arc<Common>, channel: usize, name: String, mut token: String, mut random: StdRng) -> usize {
    let (mut next, mut gaps, mut may_skip) = (0, 0, false);
    let of = |n: u32| format!("seed {}, channel {name}, event {n}", common.seed);
    while next < EVENTS {
        let gateway = {
            let gateways = common.gateways.lock().expect("no panic");
            gateways[random.random_range(0..gateways.len())]
        };
        let transport = TRANSPORTS[random.random_range(0..TRANSPORTS.len())];
        let mut subscriber = Subscriber::start(gateway, transport, &name, Some(&token));
        for _ in 0..random.random_range(1..60) {
            // It also leaves when nothing comes for a while.
            let patience = Duration::from_millis(random.random_range(20..300));
            match tokio::time::timeout(patience, subscriber.next()).await {
                Ok(Push::Event(event)) => {
                    let n = event.data["n"].as_u64().expect("a number") as u32;
                    assert!(n >= next, "{}: told again, {next} is next", of(n));
                    assert!(
                        n == next || may_skip,
                        "{}: {next} was lost in silence by {transport:?}",
                        of(n)
                    );
                    let kept_from = common.kept_from[channel].load(Ordering::SeqCst);
                    assert!(
                        n == next || i64::from(n) <= kept_from,
                        "{}: {next} on were kept, and missed",
                        of(n)
                    );
                    (next, may_skip, token) = (n + 1, false, event.token);
                }
                Ok(Push::Gap(_)) => {
                    gaps += 1;
                    may_skip = true;
                }
                // The token of a subscription may be ahead of a gap that is told next, and behind nothing that was told.
                Ok(Push::Subscribed(_) | Push::Bye(_)) => {}
                Ok(Push::End(_)) | Err(_) => break,
            }
        }
        drop(subscriber);
        // Sometimes it is away for long enough to miss a lot.
        if random.random_bool(0.5) {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..500))).await;
        }
    }
    gaps
}
