//! Cron expressions in a time zone: when they come next, and when they came last.
//!
//! Expressions are those of Vixie cron (croner reads them), with an optional field of seconds in front. Time zones are those of the
//! IANA database: the system's, or the one that jiff brings along where the system has none.
//!
//! Where clocks are put forward, a fixed time that does not exist comes at the first second that does; one that intervals reach
//! (`*/15`) is left out. Where they are put back, a fixed time that exists twice comes once, the first time; intervals come in both
//! hours. That is Vixie cron's rule.

use std::cmp::Ordering;
use std::fmt;

use croner::parser::{CronParser, Seconds};
use croner::{CivilDate, CivilDateTime, CivilTime, CronDateTime, Resolution, Weekday, errors::CronError};
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Timestamp, ZonedDateTime};
use serde::{Deserialize, Serialize};

use crate::patterns::Error;

/// Bytes of an expression, or of a time zone's name, at most.
const MAX_BYTES: usize = 128;

/// Times that come again and again.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cron {
    expression: String,
    time_zone: String,
}

impl Cron {
    /// The times of an expression of five fields (minute, hour, day of the month, month, day of the week), or six with seconds in
    /// front, in a time zone such as `Europe/Berlin` or `UTC`.
    ///
    /// ```
    /// use barnabas::patterns::schedule::Cron;
    ///
    /// let first_of_month = Cron::new("0 9 1 * *", "Europe/Berlin")?;
    /// // From the last minute of April 2026 it is the first of May, 9 o'clock in Berlin.
    /// assert_eq!(first_of_month.next_ms(1_777_586_340_000)?, 1_777_618_800_000);
    /// # Ok::<(), barnabas::patterns::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Cron`], [`Error::TimeZone`].
    pub fn new(expression: impl Into<String>, time_zone: impl Into<String>) -> Result<Self, Error> {
        let cron = Self {
            expression: expression.into(),
            time_zone: time_zone.into(),
        };
        cron.parse()?;
        cron.zone()?;
        Ok(cron)
    }

    /// The expression.
    pub fn expression(&self) -> &str {
        &self.expression
    }

    /// The time zone.
    pub fn time_zone(&self) -> &str {
        &self.time_zone
    }

    /// The first time after a time, both in milliseconds since the Unix epoch.
    ///
    /// # Errors
    /// [`Error::Cron`] when there is none, such as a 30 February. Those of [`Cron::new`] too: an expression that came from
    /// elsewhere may not be known here.
    pub fn next_ms(&self, after_ms: i64) -> Result<i64, Error> {
        let next = self.parse()?.find_next_occurrence(&self.local(after_ms)?, false);
        Ok(next.map_err(|error| self.wrong(&error))?.0.timestamp().as_millisecond())
    }

    /// The last time that is not after a time; `None` when there was none.
    ///
    /// # Errors
    /// Those of [`Cron::new`].
    pub fn last_ms(&self, until_ms: i64) -> Result<Option<i64>, Error> {
        let last = self.parse()?.find_previous_occurrence(&self.local(until_ms)?, true);
        Ok(last.ok().map(|last| last.0.timestamp().as_millisecond()))
    }

    fn parse(&self) -> Result<croner::Cron, Error> {
        if self.expression.len() > MAX_BYTES {
            return Err(self.wrong(&format!("it has more than {MAX_BYTES} bytes")));
        }
        let parser = CronParser::builder().seconds(Seconds::Optional).build();
        parser.parse(&self.expression).map_err(|error| self.wrong(&error))
    }

    fn zone(&self) -> Result<TimeZone, Error> {
        let known = self.time_zone.len() <= MAX_BYTES;
        let zone = known.then(|| TimeZone::get(&self.time_zone).ok()).flatten();
        zone.ok_or_else(|| Error::TimeZone(self.time_zone.chars().take(MAX_BYTES).collect()))
    }

    fn local(&self, time_ms: i64) -> Result<Local, Error> {
        let time = Timestamp::from_millisecond(time_ms).map_err(|error| self.wrong(&error))?;
        Ok(Local(time.to_zoned_datetime(self.zone()?)))
    }

    fn wrong(&self, reason: &dyn fmt::Display) -> Error {
        Error::Cron {
            expression: self.expression.chars().take(MAX_BYTES).collect(),
            reason: reason.to_string(),
        }
    }
}

impl fmt::Debug for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in {}", self.expression, self.time_zone)
    }
}

/// A time in a time zone, as croner reckons with it.
#[derive(Clone)]
struct Local(ZonedDateTime);

impl CronDateTime for Local {
    fn to_civil(&self) -> CivilDateTime {
        // jiff has nothing but parts in their ranges; none is negative but the year.
        let time = self.0.datetime();
        CivilDateTime::new(
            CivilDate::from_parts_unchecked(time.year().into(), time.month() as u32, time.day() as u32),
            CivilTime::from_parts_unchecked(time.hour() as u32, time.minute() as u32, time.second() as u32),
        )
    }

    fn civil_weekday(&self) -> Weekday {
        Weekday::from_days_from_sunday(self.0.weekday().to_sunday_zero_offset() as u32)
    }

    fn resolve_civil(&self, civil: CivilDateTime) -> Result<Resolution<Self>, CronError> {
        let year = i16::try_from(civil.year()).map_err(|_| CronError::InvalidDate)?;
        let (month, day) = (civil.month() as i8, civil.day() as i8);
        let (hour, minute, second) = (civil.hour() as i8, civil.minute() as i8, civil.second() as i8);
        let time = DateTime::new(year, month, day, hour, minute, second, 0).map_err(|_| CronError::InvalidDate)?;
        let ambiguous = self.0.time_zone().to_ambiguous_zoned_datetime(time);
        let local = |time: Result<ZonedDateTime, jiff::Error>| time.map(Self).map_err(|_| CronError::InvalidTime);
        Ok(match ambiguous.offset() {
            AmbiguousOffset::Unambiguous { .. } => Resolution::Single(local(ambiguous.unambiguous())?),
            AmbiguousOffset::Fold { .. } => {
                Resolution::Ambiguous(local(ambiguous.clone().earlier())?, local(ambiguous.later())?)
            }
            AmbiguousOffset::Gap { .. } => Resolution::Gap,
        })
    }

    fn checked_add_seconds(&self, seconds: i64) -> Option<Self> {
        self.0.checked_add(SignedDuration::from_secs(seconds)).ok().map(Self)
    }

    fn cmp_instant(&self, other: &Self) -> Ordering {
        self.0.timestamp().cmp(&other.0.timestamp())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(time: &str) -> i64 {
        time.parse::<Timestamp>().expect("a time").as_millisecond()
    }

    /// The next times after one, in UTC.
    fn next(expression: &str, time_zone: &str, after: &str, count: usize) -> Vec<String> {
        let cron = Cron::new(expression, time_zone).expect("a cron expression");
        let mut times = Vec::new();
        let mut at_ms = ms(after);
        for _ in 0..count {
            at_ms = cron.next_ms(at_ms).expect("a next time");
            times.push(Timestamp::from_millisecond(at_ms).expect("a time").to_string());
        }
        times
    }

    #[test]
    fn a_time_of_day_is_that_of_its_time_zone_in_summer_and_winter() {
        assert_eq!(
            next("30 8 * * MON", "Europe/Berlin", "2026-03-20T00:00:00Z", 2),
            ["2026-03-23T07:30:00Z", "2026-03-30T06:30:00Z"]
        );
        assert_eq!(
            next("0 9 1 * *", "America/New_York", "2026-10-15T00:00:00Z", 2),
            ["2026-11-01T14:00:00Z", "2026-12-01T14:00:00Z"]
        );
    }

    #[test]
    fn a_time_that_does_not_exist_comes_when_the_clocks_have_been_put_forward() {
        // In Berlin there is no 2:30 on 29 March 2026, in New York none on 8 March.
        assert_eq!(
            next("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", 2),
            ["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]
        );
        assert_eq!(
            next("30 2 * * *", "America/New_York", "2026-03-07T12:00:00Z", 2),
            ["2026-03-08T07:00:00Z", "2026-03-09T06:30:00Z"]
        );
        assert_eq!(
            next("*/30 * * * *", "Europe/Berlin", "2026-03-29T00:15:00Z", 3),
            ["2026-03-29T00:30:00Z", "2026-03-29T01:00:00Z", "2026-03-29T01:30:00Z"],
            "intervals leave out what does not exist"
        );
    }

    #[test]
    fn a_time_that_exists_twice_comes_once_and_an_interval_in_both_hours() {
        // In Berlin 2:30 is there twice on 25 October 2026, in New York 1:30 on 1 November.
        assert_eq!(
            next("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 2),
            ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]
        );
        assert_eq!(
            next("30 1 * * *", "America/New_York", "2026-10-31T12:00:00Z", 2),
            ["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"]
        );
        assert_eq!(
            next("*/30 * * * *", "Europe/Berlin", "2026-10-25T00:15:00Z", 4),
            [
                "2026-10-25T00:30:00Z",
                "2026-10-25T01:00:00Z",
                "2026-10-25T01:30:00Z",
                "2026-10-25T02:00:00Z"
            ]
        );
    }

    #[test]
    fn leap_days_and_the_ends_of_months_are_where_the_calendar_has_them() {
        assert_eq!(
            next("0 0 29 2 *", "UTC", "2026-01-01T00:00:00Z", 2),
            ["2028-02-29T00:00:00Z", "2032-02-29T00:00:00Z"]
        );
        assert_eq!(
            next("0 0 31 * *", "UTC", "2026-01-31T00:00:00Z", 2),
            ["2026-03-31T00:00:00Z", "2026-05-31T00:00:00Z"],
            "a month without a 31st is left out"
        );
        assert_eq!(
            next("0 0 L 2 *", "UTC", "2027-01-01T00:00:00Z", 2),
            ["2027-02-28T00:00:00Z", "2028-02-29T00:00:00Z"]
        );
    }

    #[test]
    fn seconds_may_stand_in_front() {
        assert_eq!(
            next("*/20 * * * * *", "UTC", "2026-01-01T00:00:30Z", 2),
            ["2026-01-01T00:00:40Z", "2026-01-01T00:01:00Z"]
        );
    }

    #[test]
    fn the_last_time_is_found_where_many_were_missed() {
        let hourly = Cron::new("0 * * * *", "Europe/Berlin").expect("cron");
        assert_eq!(
            hourly.last_ms(ms("2026-06-10T12:34:56Z")).expect("known"),
            Some(ms("2026-06-10T12:00:00Z"))
        );
        assert_eq!(
            hourly.last_ms(ms("2026-06-10T12:00:00Z")).expect("known"),
            Some(ms("2026-06-10T12:00:00Z"))
        );
    }

    #[test]
    fn what_is_no_cron_expression_or_never_comes_says_why() {
        for wrong in [
            "",
            "* * *",
            "61 * * * *",
            "0 0 32 1 *",
            "a b c d e",
            "* * * * * * * *",
            &"*".repeat(200),
        ] {
            let error = Cron::new(wrong, "UTC").expect_err(wrong);
            assert!(matches!(error, Error::Cron { .. }), "{wrong}: {error}");
        }
        let error = Cron::new("0 0 * * *", "Europe/Nowhere").expect_err("no such time zone");
        assert!(error.to_string().contains("Europe/Nowhere"), "{error}");
        let never = Cron::new("0 0 30 2 *", "UTC").expect("it can be read");
        let error = never.next_ms(ms("2026-01-01T00:00:00Z")).expect_err("no 30 February");
        assert!(matches!(error, Error::Cron { .. }), "{error}");
    }
}
