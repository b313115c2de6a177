//! Consumers as separate processes on a real Kafka, killed, paused and cut off: what the log and the ledgers of their handlers say
//! afterwards.
//!
//! Seeds are printed; `BARNABAS_TEST_SEED` runs one again. `BARNABAS_TEST_KILLS` sets how often the tests of random kills kill,
//! `BARNABAS_TEST_CUTS` how many answers are cut off, `BARNABAS_TEST_RETRIED` how many records are retried in one.

mod embedded;
mod kills;
mod pauses;
mod retries;
mod transactions;

use std::time::{Duration, Instant};

use barnabas_tests::consumer::{Crew, SOON};
use barnabas_tests::oracle::TopicEnds;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// A random number generator whose seed is printed.
fn seeded(test: &str) -> StdRng {
    let seed = setting("BARNABAS_TEST_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("{test}: BARNABAS_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// A number from the environment.
fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number: {text}")))
}

/// How often a test of random kills kills.
fn kills() -> u64 {
    const KILLS: u64 = 12;
    setting("BARNABAS_TEST_KILLS").unwrap_or(KILLS)
}

/// Stops a worker of a crew with SIGSTOP while its transaction is open. Between two looks at it, whatever it had sent has been done.
async fn pause_in_transaction(crew: &mut Crew, slot: &str, output: &TopicEnds) {
    let deadline = Instant::now() + SOON;
    loop {
        crew.worker(slot).pause();
        let (first, second) = tokio::task::block_in_place(|| {
            let first = output.is_open();
            std::thread::sleep(Duration::from_millis(100));
            (first, output.is_open())
        });
        if first && second {
            return;
        }
        crew.worker(slot).resume();
        assert!(Instant::now() < deadline, "no transaction was open at any look");
        tokio::time::sleep(Duration::from_millis(7)).await;
    }
}
