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
