//! When a record whose handler failed is tried again, and where it waits.
//!
//! | policy | it waits | order | cost |
//! | --- | --- | --- | --- |
//! | [`RetryPolicy::Blocking`] | in its place: what stands behind it in its partition or key waits too | kept | offsets stay behind it |
//! | [`RetryPolicy::NonBlocking`] | on a retry topic, one for each delay | given up for what is retried | one more record for each try |
//! | [`RetryPolicy::BlockingThenNonBlocking`] | first the one, then the other | given up after the first | both |
//!
//! What is hopeless, or has failed as often as the policy allows, becomes a dead letter.

use std::time::Duration;

use rand::RngExt as _;

use super::dead_letter::header;
use crate::log::{ProducerRecord, Record, TopicPartition};

/// Attempts of [`BackOff::fixed`] and [`BackOff::exponential`] unless others are asked for, the first counted.
const DEFAULT_MAX_ATTEMPTS: u32 = 10;

/// How long to wait before each further attempt, and how many there are.
#[derive(Clone, Debug, PartialEq)]
pub struct BackOff {
    delays: Delays,
    /// `None`: no end.
    max_attempts: Option<u32>,
    jitter: f64,
}

#[derive(Clone, Debug, PartialEq)]
enum Delays {
    /// The last one is used again when there are more attempts.
    Intervals(Vec<Duration>),
    Exponential {
        initial: Duration,
        multiplier: f64,
        max: Duration,
    },
}

impl BackOff {
    /// Always the same delay. 10 attempts, the first counted.
    pub fn fixed(delay: Duration) -> Self {
        Self::new(Delays::Intervals(vec![delay]), Some(DEFAULT_MAX_ATTEMPTS))
    }

    /// These delays one after the other: one attempt more than there are delays.
    pub fn intervals(delays: impl IntoIterator<Item = Duration>) -> Self {
        let delays: Vec<_> = delays.into_iter().collect();
        let attempts = u32::try_from(delays.len()).unwrap_or(u32::MAX).saturating_add(1);
        Self::new(Delays::Intervals(delays), Some(attempts))
    }

    /// Each delay `multiplier` times the one before, up to `max`. 10 attempts, the first counted.
    pub fn exponential(initial: Duration, multiplier: f64, max: Duration) -> Self {
        let delays = Delays::Exponential {
            initial,
            multiplier,
            max,
        };
        Self::new(delays, Some(DEFAULT_MAX_ATTEMPTS))
    }

    fn new(delays: Delays, max_attempts: Option<u32>) -> Self {
        Self {
            delays,
            max_attempts,
            jitter: 0.0,
        }
    }

    /// Attempts at most, the first counted; 1 at least.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(attempts.max(1));
        self
    }

    /// Never gives up.
    #[must_use]
    pub fn infinite(mut self) -> Self {
        self.max_attempts = None;
        self
    }

    /// Lengthens each delay by a random part of up to `fraction` of it (0.2: up to a fifth), so that what failed together does
    /// not come back together. Never shortens one.
    #[must_use]
    pub fn jitter(mut self, fraction: f64) -> Self {
        self.jitter = fraction.clamp(0.0, 1.0);
        self
    }

    /// How long to wait after `failed` attempts (1 at least); `None`: no further attempt.
    pub fn delay(&self, failed: u32) -> Option<Duration> {
        if self.max_attempts.is_some_and(|max| failed >= max) {
            return None;
        }
        let nth = failed.saturating_sub(1);
        let delay = match &self.delays {
            Delays::Intervals(delays) => delays.get(nth as usize).or(delays.last()).copied().unwrap_or_default(),
            Delays::Exponential {
                initial,
                multiplier,
                max,
            } => {
                let seconds = initial.as_secs_f64() * multiplier.max(1.0).powf(f64::from(nth));
                Duration::try_from_secs_f64(seconds).map_or(*max, |delay| delay.min(*max))
            }
        };
        Some(match self.jitter > 0.0 {
            true => delay.mul_f64(1.0 + rand::rng().random_range(0.0..=self.jitter)),
            false => delay,
        })
    }

    /// Attempts at most, the first counted; `None`: no end.
    pub fn attempts(&self) -> Option<u32> {
        self.max_attempts
    }

    /// The longest wait, jitter included; zero when there is no second attempt.
    pub fn longest(&self) -> Duration {
        if self.max_attempts == Some(1) {
            return Duration::ZERO;
        }
        let longest = match &self.delays {
            Delays::Intervals(delays) => delays.iter().max().copied().unwrap_or_default(),
            Delays::Exponential { max, .. } => *max,
        };
        longest.mul_f64(1.0 + self.jitter)
    }
}

/// The retry topics of a consumer: a record that fails goes from one to the next, and from the last to the dead letters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryTopics {
    delays: Vec<Duration>,
}

impl RetryTopics {
    /// One retry topic for each of these delays, of a millisecond at least.
    pub fn new(delays: impl IntoIterator<Item = Duration>) -> Self {
        let least = Duration::from_millis(1);
        Self {
            delays: delays.into_iter().map(|delay| delay.max(least)).collect(),
        }
    }

    /// The delays, in order.
    pub fn delays(&self) -> &[Duration] {
        &self.delays
    }

    /// The names of the retry topics of `group` for `topic`, in order: `{topic}.{group}.retry.{delay}` with a delay such as
    /// `500ms`, `5s`, `2m` or `1h`. A delay that comes a second time has `-2` behind it.
    pub fn names(&self, topic: &str, group: &str) -> Vec<String> {
        let name = |(nth, delay): (usize, &Duration)| {
            let before = self.delays[..nth].iter().filter(|other| *other == delay).count();
            let again = match before {
                0 => String::new(),
                before => format!("-{}", before + 1),
            };
            format!("{topic}.{group}.retry.{}{again}", in_words(*delay))
        };
        self.delays.iter().enumerate().map(name).collect()
    }
}

/// What becomes of a record whose handler failed with an error that may pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RetryPolicy {
    /// It becomes a dead letter.
    #[default]
    None,
    /// It is tried again in its place. What stands behind it, in its partition or of its key, waits.
    Blocking(BackOff),
    /// It waits on retry topics; what stands behind it goes on.
    NonBlocking(RetryTopics),
    /// First in its place as often as the back-off says, then on retry topics.
    BlockingThenNonBlocking(BackOff, RetryTopics),
}

impl RetryPolicy {
    /// The back-off in place.
    pub fn back_off(&self) -> Option<&BackOff> {
        match self {
            Self::Blocking(back_off) | Self::BlockingThenNonBlocking(back_off, _) => Some(back_off),
            Self::None | Self::NonBlocking(_) => None,
        }
    }

    /// The retry topics.
    pub fn topics(&self) -> Option<&RetryTopics> {
        match self {
            Self::NonBlocking(topics) | Self::BlockingThenNonBlocking(_, topics) => Some(topics),
            Self::None | Self::Blocking(_) => None,
        }
    }
}

/// The delay of a retry topic of `group` for `source`, from its name; `None`: it is none.
pub fn delay_of_topic(topic: &str, source: &str, group: &str) -> Option<Duration> {
    let rest = topic.strip_prefix(source)?.strip_prefix('.')?.strip_prefix(group)?;
    let words = rest.strip_prefix(".retry.")?;
    parse_delay(words.split_once('-').map_or(words, |(words, _)| words))
}

/// A delay as the names of retry topics have it, such as `500ms`, `5s`, `2m` or `1h`.
pub fn parse_delay(words: &str) -> Option<Duration> {
    let number = words.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_ms = match &words[number.len()..] {
        "h" => 3_600_000,
        "m" => 60_000,
        "s" => 1000,
        "ms" => 1,
        _ => return None,
    };
    Some(Duration::from_millis(number.parse::<u64>().ok()?.checked_mul(unit_ms)?))
}

/// A record whose only purpose is the stamp that its retry topic gives it.
pub(super) fn clock_record(partition: &TopicPartition) -> ProducerRecord {
    ProducerRecord::to(partition.topic.clone())
        .partition(partition.partition)
        .header(header::CLOCK, "")
}

/// Whether a record of a retry topic is a [`clock_record`]. No record that failed comes there with this header.
pub(crate) fn is_clock_record(record: &Record) -> bool {
    record.headers.last(header::CLOCK).is_some()
}

fn in_words(delay: Duration) -> String {
    let ms = delay.as_millis();
    let units = [(3_600_000, "h"), (60_000, "m"), (1000, "s")];
    let whole = units.iter().find(|(unit, _)| ms.is_multiple_of(*unit) && ms > 0);
    match whole {
        Some((unit, name)) => format!("{}{name}", ms / unit),
        None => format!("{ms}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn delays(back_off: &BackOff, count: u32) -> Vec<Option<u128>> {
        (1..=count)
            .map(|failed| back_off.delay(failed).map(|delay| delay.as_millis()))
            .collect()
    }

    #[test]
    fn an_exponential_back_off_grows_to_its_maximum() {
        let back_off = BackOff::exponential(ms(100), 2.0, ms(2000)).max_attempts(8);
        let expected = [100, 200, 400, 800, 1600, 2000, 2000].map(Some);
        assert_eq!(delays(&back_off, 7), expected);
        assert_eq!(back_off.delay(8), None, "eight attempts have seven waits between them");
        assert_eq!(back_off.infinite().delay(u32::MAX), Some(ms(2000)));
    }

    #[test]
    fn intervals_are_used_once_each_unless_there_is_no_end() {
        let back_off = BackOff::intervals([ms(1), ms(5)]);
        assert_eq!(delays(&back_off, 3), [Some(1), Some(5), None]);
        assert_eq!(delays(&back_off.infinite(), 4), [Some(1), Some(5), Some(5), Some(5)]);
        assert_eq!(BackOff::fixed(ms(3)).max_attempts(1).delay(1), None);
    }

    #[test]
    fn jitter_only_lengthens() {
        let back_off = BackOff::fixed(ms(1000)).jitter(0.5).infinite();
        let delays: Vec<_> = (1..200).filter_map(|failed| back_off.delay(failed)).collect();
        assert!(delays.iter().all(|delay| (ms(1000)..=ms(1500)).contains(delay)));
        assert!(delays.iter().any(|delay| *delay != delays[0]));
        assert_eq!(back_off.longest(), ms(1500));
    }

    #[test]
    fn each_delay_has_a_topic_of_its_own() {
        let delays = [1000, 5000, 30_000, 5000, 90_000, 120_000, 3_600_000, 250].map(ms);
        let names = RetryTopics::new(delays).names("orders", "billing");
        let expected = ["1s", "5s", "30s", "5s-2", "90s", "2m", "1h", "250ms"];
        assert_eq!(names, expected.map(|delay| format!("orders.billing.retry.{delay}")));
        let read = names.iter().map(|name| delay_of_topic(name, "orders", "billing"));
        assert_eq!(read.collect::<Vec<_>>(), delays.map(Some));
        assert_eq!(delay_of_topic("orders.billing.redrive", "orders", "billing"), None);
    }
}
