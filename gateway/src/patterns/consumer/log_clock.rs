//! What time it is by a log's clock, without asking any other clock what time it is.
//!
//! A log that stamps records itself ([`crate::log::Timestamps::LogAppend`]) tells its time with each of them: a record of 12:00:00
//! that is here says that it is 12:00:00 there, or later, and five seconds on this machine's monotonic clock after that it is 12:00:05
//! or later. How late it was when it came here does not matter: what follows is a lower bound, and the highest one counts. So nothing is
//! ever early by it, whatever the wall clocks of those who write and read say. A fresh stamp makes it tight.
//!
//! Each partition has one of its own, since the clock is that of its leader.

use tokio::time::Instant;

use crate::patterns::millis;

/// A lower bound of a log's time.
#[derive(Debug, Default)]
pub(super) struct LogClock {
    /// A stamp, in milliseconds since the Unix epoch, and when it was here.
    seen: Option<(i64, Instant)>,
}

impl LogClock {
    /// Takes note of a stamp that was here at `now`.
    pub(super) fn see(&mut self, stamp_ms: i64, now: Instant) {
        if self.at_least(now).is_none_or(|known_ms| known_ms < stamp_ms) {
            self.seen = Some((stamp_ms, now));
        }
    }

    /// What time it is there at least; `None`: nothing is known.
    pub(super) fn at_least(&self, now: Instant) -> Option<i64> {
        let (stamp_ms, seen) = self.seen?;
        Some(stamp_ms.saturating_add(millis(now.saturating_duration_since(seen))))
    }

    /// When it will be `time_ms` there at the latest.
    pub(super) fn when(&self, time_ms: i64) -> Option<Instant> {
        let (stamp_ms, seen) = self.seen?;
        let after_ms = u64::try_from(time_ms.saturating_sub(stamp_ms)).unwrap_or(0);
        seen.checked_add(std::time::Duration::from_millis(after_ms))
    }
}

/// When a wait of `wait_ms` from a stamp on is over: stamps are cut to whole milliseconds, so one more.
pub(super) fn due_ms(stamp_ms: i64, wait_ms: i64) -> i64 {
    stamp_ms.saturating_add(wait_ms).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_old_stamp_says_little_and_a_fresh_one_says_more() {
        let mut clock = LogClock::default();
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        assert_eq!((clock.at_least(start), clock.when(1)), (None, None));
        clock.see(1_000, start);
        assert_eq!(clock.at_least(after(500)), Some(1_500));
        assert_eq!(clock.when(3_000), Some(after(2_000)));
        clock.see(1_400, after(500));
        assert_eq!(
            clock.when(3_000),
            Some(after(2_000)),
            "it says less than the one before"
        );
        clock.see(2_900, after(600));
        assert_eq!(clock.when(3_000), Some(after(700)));
        assert_eq!(clock.when(100), Some(after(600)), "what is over is over");
    }
}
