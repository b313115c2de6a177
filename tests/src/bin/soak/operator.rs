//! Somebody who looks at what stands still in a group and decides, as the dashboard lets people do.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use barnabas::log::Log;
use barnabas::patterns::control::{self, Action, Blocked, BlockedState, Command, Key};
use barnabas_tests::consumer::{Crew, SOON, assert_once};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// An answer that takes longer is not waited for: what was asked for may happen all the same.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// Places that are looked at in one step.
const ACTIONS: usize = 3;

pub struct Operator {
    log: Log,
    group: String,
    random: StdRng,
    /// The records that were passed over, or perhaps were.
    passed: HashSet<(i32, i64)>,
    /// The partitions and keys of which failures were passed over, or perhaps were.
    ignored: HashSet<(i32, Option<Key>)>,
}

impl Operator {
    pub fn new(crew: &Crew, seed: u64) -> Self {
        Self {
            log: crew.log().clone(),
            group: crew.settings.group.clone(),
            random: StdRng::seed_from_u64(seed),
            passed: HashSet::new(),
            ignored: HashSet::new(),
        }
    }

    /// Looks at a few of those that stand still; how often something was asked for, and how often there was an answer.
    pub async fn act(&mut self) -> (usize, usize) {
        let (mut asked, mut answers) = (0, 0);
        for blocked in self.blocked().await.into_iter().take(ACTIONS) {
            let action = match (blocked.state, self.random.random_range(0..10)) {
                (BlockedState::Ignoring, _) => Action::Block,
                (BlockedState::Blocked, 0..3) => Action::Retry,
                (BlockedState::Blocked, 3..6) => Action::Skip,
                (BlockedState::Blocked, 6) => Action::Ignore,
                (BlockedState::Blocked, _) => Action::DeadLetter,
            };
            asked += 1;
            answers += usize::from(self.ask(action, &blocked).await);
        }
        (asked, answers)
    }

    /// Passes over what still stands still, until the group has done everything.
    pub async fn end(&mut self, crew: &mut Crew) {
        let deadline = Instant::now() + SOON;
        let ends = crew.ends();
        let is_done = |crew: &Crew| {
            crew.committed()
                .iter()
                .zip(&ends)
                .all(|((offset, _), end)| offset >= end)
        };
        while !is_done(crew) {
            for blocked in self.blocked().await {
                if blocked.state == BlockedState::Blocked {
                    self.ask(Action::Skip, &blocked).await;
                }
            }
            assert!(
                Instant::now() < deadline,
                "{} stands still: {:?}",
                self.group,
                crew.committed()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Each record is in the output once, in order, but for those that stood still: they are a dead letter, once, or were passed
    /// over.
    pub fn judge(&self, crew: &mut Crew, stands_still: u64) {
        crew.stop_all();
        let letters = crew.read(&format!("{}.{}.dlt", crew.input(), crew.settings.group));
        let input = crew.read(crew.input());
        let is_passed = |number: u64| {
            let record = input.iter().find(|record| record.number() == number);
            record.is_some_and(|record| {
                let key = (record.partition, Some(Key::new(&record.key)));
                self.passed.contains(&(record.partition, record.offset)) || self.ignored.contains(&key)
            })
        };
        let (stood, others) = (0..crew.appended()).partition::<Vec<_>, _>(|number| number.is_multiple_of(stands_still));
        assert_once(others, &crew.read(crew.output()));
        let left: HashSet<u64> = letters.iter().map(|letter| letter.number()).collect();
        assert_eq!(left.len(), letters.len(), "a dead letter is there twice");
        let lost: Vec<_> = stood
            .iter()
            .filter(|number| !left.contains(number) && !is_passed(**number))
            .collect();
        assert!(lost.is_empty(), "nobody has passed over {lost:?}");
        println!(
            "operator: {} passed over, failures of {} keys for a while, {} dead letters",
            self.passed.len(),
            self.ignored.len(),
            letters.len()
        );
    }

    async fn blocked(&self) -> Vec<Blocked> {
        let looking = tokio::time::timeout(ANSWER_TIMEOUT, control::blocked(&self.log, &self.group));
        match looking.await {
            Ok(Ok(blocked)) => blocked,
            // The broker is away: the next look tells.
            Ok(Err(_)) | Err(_) => Vec::new(),
        }
    }

    /// Whether there was an answer.
    async fn ask(&mut self, action: Action, blocked: &Blocked) -> bool {
        match action {
            Action::Skip => drop(self.passed.insert((blocked.place.partition, blocked.offset))),
            Action::Ignore => drop(
                self.ignored
                    .insert((blocked.place.partition, blocked.place.key.clone())),
            ),
            Action::Retry | Action::DeadLetter | Action::Block => {}
        }
        let command = Command {
            action,
            place: blocked.place.clone(),
            offset: blocked.offset,
            by: "soak".to_owned(),
        };
        let asked = control::operate(&self.log, &self.group, command, ANSWER_TIMEOUT);
        // The append may wait for a broker that is away.
        let asked = tokio::time::timeout(2 * ANSWER_TIMEOUT, asked);
        asked.await.is_ok_and(|answer| answer.is_ok())
    }
}
