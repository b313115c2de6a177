//! What happened when, counted in hopping windows, and what an oracle makes of the same commands by looking at every window there is.

use std::collections::BTreeMap;
use std::time::Duration;

use barnabas::log::ProducerRecord;
use barnabas::patterns::atomic_store::{Aggregate, command_record};
use barnabas::patterns::window::{Windowed, Windows};
use rand::RngExt as _;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use crate::oracle::OracleRecord;

const KEYS: usize = 5;

/// The size of a window.
pub const SIZE_MS: i64 = 20_000;
const HOP_MS: i64 = 10_000;
const GRACE_MS: i64 = 15_000;
/// Between what happened and what happened next.
const STEP_MS: i64 = 100;

/// A command: something happened.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Happened {
    at_ms: i64,
}

/// What is known of a key.
#[derive(Debug, Default, PartialEq)]
pub struct Fold {
    /// The values of its open windows.
    pub open: BTreeMap<i64, u64>,
    /// Those of the closed ones.
    pub closed: BTreeMap<i64, u64>,
    /// How many commands came late.
    pub late: u64,
}

/// Windows that overlap, with grace.
pub fn hopping() -> Windows {
    let ms = |ms: i64| Duration::from_millis(ms.unsigned_abs());
    Windows::hopping(ms(SIZE_MS), ms(HOP_MS)).grace(ms(GRACE_MS))
}

/// Counts what happened in each window, and tells closed ones on the topic `results`.
pub fn counts(windows: Windows, idle: Duration, results: &str) -> impl Aggregate + use<> {
    let results = results.to_owned();
    let count = |count: &mut u64, _: &Happened| *count += 1;
    let counts = Windowed::new(windows, |happened: &Happened| happened.at_ms, count);
    counts.idle(idle).on_close(move |window| {
        let json = serde_json::to_vec(&window).expect("JSON");
        ProducerRecord::to(results.as_str())
            .key(window.key.to_owned())
            .value(json)
    })
}

/// The command that something has happened then, for one of a few keys.
///
/// # Panics
/// Never: it is JSON.
pub fn command(store: &str, key: usize, at_ms: i64) -> ProducerRecord {
    command_record(store, &format!("type-{}", key % KEYS), &Happened { at_ms }).expect("JSON")
}

/// Commands of what happened as the `numbers` say, most a little out of order, and some far too late.
pub fn random_commands(random: &mut StdRng, store: &str, numbers: std::ops::Range<i64>) -> Vec<ProducerRecord> {
    let one = |number: i64| {
        let behind_ms = match random.random_range(0..50) {
            0 => random.random_range(0..120_000),
            _ => random.random_range(0..20_000),
        };
        command(store, random.random_range(0..KEYS), number * STEP_MS - behind_ms)
    };
    numbers.map(one).collect()
}

/// What the states and results say.
///
/// # Panics
/// If a result is told twice, or something is not as it should be.
pub fn written(states: &[OracleRecord], results: &[OracleRecord]) -> BTreeMap<String, Fold> {
    let mut folds: BTreeMap<String, Fold> = BTreeMap::new();
    for record in states {
        let fold = folds.entry(record.key_text()).or_default();
        let state = record.json();
        let open = state["open"].as_object().expect("an object").iter();
        let number = |value: &serde_json::Value| value.as_u64().expect("a number");
        fold.open = open
            .map(|(start, value)| (start.parse().expect("a time"), number(value)))
            .collect();
        fold.late = number(&state["late"]);
    }
    for record in results {
        let result = record.json();
        assert_eq!(result["key"], record.key_text());
        let (start, end) = (
            result["start_ms"].as_i64().expect("a time"),
            result["end_ms"].as_i64().expect("a time"),
        );
        assert_eq!(end - start, SIZE_MS);
        let fold = folds.entry(record.key_text()).or_default();
        let earlier = fold.closed.insert(start, result["value"].as_u64().expect("a number"));
        assert_eq!(earlier, None, "a result is told once: {record:?}");
    }
    folds
}

/// What the commands say.
///
/// # Panics
/// If one of them is none.
pub fn expected(commands: &[OracleRecord]) -> BTreeMap<String, Fold> {
    let mut folds: BTreeMap<String, (Fold, i64)> = BTreeMap::new();
    for record in commands {
        let at_ms = record.json()["at_ms"].as_i64().expect("a time");
        let (fold, latest) = folds.entry(record.key_text()).or_insert((Fold::default(), i64::MIN));
        *latest = at_ms.max(*latest);
        let mut is_late = false;
        // Every window that there is.
        for start in (-100..1000).map(|nth| nth * HOP_MS) {
            if start <= at_ms && at_ms < start + SIZE_MS {
                match start + SIZE_MS + GRACE_MS <= *latest {
                    true => is_late = true,
                    false => *fold.open.entry(start).or_default() += 1,
                }
            }
        }
        fold.late += u64::from(is_late);
    }
    let close = |(key, (mut fold, latest)): (String, (Fold, i64))| {
        let still_open = fold
            .open
            .iter()
            .filter(|(start, _)| *start + SIZE_MS + GRACE_MS > latest);
        let still_open: BTreeMap<i64, u64> = still_open.map(|(start, value)| (*start, *value)).collect();
        fold.closed = std::mem::replace(&mut fold.open, still_open);
        fold.closed.retain(|start, _| !fold.open.contains_key(start));
        (key, fold)
    };
    folds.into_iter().map(close).collect()
}
