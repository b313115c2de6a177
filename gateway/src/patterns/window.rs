//! Windows of event time: what happened in each minute, whenever one hears of it.
//!
//! ```text
//! commands of a key, each with its time ──▶ Windowed, the aggregate of an atomic store ──▶ state: the open windows
//!                                                                                     └══▶ each window's result, once
//! ```
//! [`Windows`] says which windows a time belongs to. [`Windowed`] keeps a value for each open window of a key, and makes of it an
//! [`Aggregate`] for [`AtomicStore::run`](super::atomic_store::AtomicStore::run): a value and the commands in it are one
//! transaction, and so are a result and the closing of its window.
//!
//! The clock of a key is the latest time that it has seen. A window is closed when that clock has passed its end by the grace, or
//! when the window is over by the clock on the wall too and nothing has come for the key for a while ([`Windowed::idle`]).
//!
//! Invariant: each command counts in every window of its time, or, if one of them is closed, is counted as late.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::atomic_store::{Aggregate, Derived};
use super::millis;
use crate::log::ProducerRecord;

/// How time is cut into windows. Those of all keys begin at the same times, counted from the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    size_ms: i64,
    hop_ms: i64,
    grace_ms: i64,
}

impl Windows {
    /// One window after the other: each time is in one. A size is a millisecond at least.
    pub fn tumbling(size: Duration) -> Self {
        Self::hopping(size, size)
    }

    /// A window of `size` begins every `hop`, so that they overlap and a time is in several. A hop is a millisecond at least, and
    /// the size at most, for there would be times in no window.
    pub fn hopping(size: Duration, hop: Duration) -> Self {
        let size_ms = millis(size).max(1);
        Self {
            size_ms,
            hop_ms: millis(hop).clamp(1, size_ms),
            grace_ms: 0,
        }
    }

    /// How much later than another command of its key one may come, by their own times, and still count. Default 0.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace_ms = millis(grace);
        self
    }

    /// The beginnings of the windows that a time is in, the latest first. A window ends before the next begins: its end is not in it.
    pub fn starts(&self, time_ms: i64) -> impl Iterator<Item = i64> + use<> {
        let Self { size_ms, hop_ms, .. } = *self;
        let latest = time_ms.saturating_sub(time_ms.rem_euclid(hop_ms));
        let earlier = move |start: &i64| start.checked_sub(hop_ms);
        std::iter::successors(Some(latest), earlier).take_while(move |start| time_ms.saturating_sub(*start) < size_ms)
    }

    /// The end of the window that begins at a time: the first millisecond that is not in it.
    pub fn end(&self, start_ms: i64) -> i64 {
        start_ms.saturating_add(self.size_ms)
    }
}

/// The value of a window of a key.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct WindowValue<'a, V> {
    /// The key.
    pub key: &'a str,
    /// The window's first millisecond, since the Unix epoch.
    pub start_ms: i64,
    /// The first millisecond behind it.
    pub end_ms: i64,
    /// What was made of the window's commands.
    pub value: &'a V,
}

/// The open windows of a key, and what is known of those that are closed: the state on the store's topic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpenWindows<V> {
    /// The values by the beginnings of their windows.
    pub open: BTreeMap<i64, V>,
    /// Commands that came when a window of theirs was closed, and did not count there.
    pub late: u64,
    /// The key's clock: its latest time.
    pub latest_ms: i64,
    /// Windows that end here, or before, are closed.
    pub closed_ms: i64,
    /// When a command was last applied, by the owner's clock.
    pub seen_ms: i64,
    /// Windows whose values have changed since they were last told.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    untold: BTreeSet<i64>,
    #[serde(default)]
    told_ms: i64,
    /// A command was applied since the last derivation.
    #[serde(skip)]
    moved: bool,
    #[serde(skip)]
    held_since: HeldSince,
}

/// Since when the key's owner holds it. What came while nobody did is still on its way: no key is idle since before then. It is the
/// owner's alone, so states that differ in it do not differ.
#[derive(Clone, Copy, Debug, Default)]
struct HeldSince(Option<i64>);

impl PartialEq for HeldSince {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<V> Default for OpenWindows<V> {
    fn default() -> Self {
        Self {
            open: BTreeMap::new(),
            late: 0,
            latest_ms: i64::MIN,
            closed_ms: i64::MIN,
            seen_ms: 0,
            untold: BTreeSet::new(),
            told_ms: 0,
            moved: false,
            held_since: HeldSince::default(),
        }
    }
}

type Time<C> = Box<dyn Fn(&C) -> i64 + Send + Sync>;
type Add<C, V> = Box<dyn Fn(&mut V, &C) + Send + Sync>;
type Tell<V> = Box<dyn Fn(WindowValue<'_, V>) -> ProducerRecord + Send + Sync>;

/// An aggregate of commands `C` by key and window. Counting what happens in each minute:
///
/// ```
/// use std::time::Duration;
///
/// use barnabas::log::ProducerRecord;
/// use barnabas::patterns::window::{Windowed, Windows};
/// use serde::Deserialize;
///
/// #[derive(Deserialize)]
/// struct Seen {
///     at_ms: i64,
/// }
///
/// let minutes = Windows::tumbling(Duration::from_secs(60)).grace(Duration::from_secs(10));
/// let counts = Windowed::new(minutes, |seen: &Seen| seen.at_ms, |count: &mut u64, _| *count += 1)
///     .on_close(|minute| ProducerRecord::to("counts").key(minute.key.to_owned()).value(minute.value.to_string()));
/// ```
pub struct Windowed<C, V> {
    windows: Windows,
    idle_ms: i64,
    time: Time<C>,
    add: Add<C, V>,
    update_every_ms: i64,
    update: Option<Tell<V>>,
    close: Option<Tell<V>>,
}

impl<C, V> Windowed<C, V> {
    /// Cuts the commands of each key into windows by `time` (milliseconds since the Unix epoch), and adds each to the values of its
    /// windows, which begin as `V::default()`. Commands of one window may come in any order, so `add` should not care for it.
    ///
    /// A time from a clock that nobody can trust, such as a visitor's, must be bounded by who submits the command: one that lies far
    /// ahead closes all windows before it.
    pub fn new(
        windows: Windows,
        time: impl Fn(&C) -> i64 + Send + Sync + 'static,
        add: impl Fn(&mut V, &C) + Send + Sync + 'static,
    ) -> Self {
        Self {
            windows,
            idle_ms: 60_000,
            time: Box::new(time),
            add: Box::new(add),
            update_every_ms: 0,
            update: None,
            close: None,
        }
    }

    /// Closes windows that are over when nothing has come for their key for so long, since its owner holds it. What is still under way
    /// then, as in a consumer that submits commands, is late. Default 60 s.
    #[must_use]
    pub fn idle(mut self, idle: Duration) -> Self {
        self.idle_ms = millis(idle);
        self
    }

    /// Appends a record with the value of each window that has changed, every so often and when it is closed. Default: none.
    #[must_use]
    pub fn on_update(
        mut self,
        every: Duration,
        record: impl Fn(WindowValue<'_, V>) -> ProducerRecord + Send + Sync + 'static,
    ) -> Self {
        self.update_every_ms = millis(every);
        self.update = Some(Box::new(record));
        self
    }

    /// Appends a record with a window's value when it is closed: once, in the transaction that closes it. Default: none.
    #[must_use]
    pub fn on_close(mut self, record: impl Fn(WindowValue<'_, V>) -> ProducerRecord + Send + Sync + 'static) -> Self {
        self.close = Some(Box::new(record));
        self
    }

    fn value<'a>(&self, key: &'a str, start_ms: i64, value: &'a V) -> WindowValue<'a, V> {
        WindowValue {
            key,
            start_ms,
            end_ms: self.windows.end(start_ms),
            value,
        }
    }

    /// Closes the windows that end at `horizon_ms` or before.
    fn close(&self, key: &str, state: &mut OpenWindows<V>, horizon_ms: i64, events: &mut Vec<ProducerRecord>) {
        while let Some((&start_ms, _)) = state.open.first_key_value()
            && self.windows.end(start_ms) <= horizon_ms
            && let Some(value) = state.open.remove(&start_ms)
        {
            state.closed_ms = state.closed_ms.max(self.windows.end(start_ms));
            let update = self.update.as_ref().filter(|_| state.untold.remove(&start_ms));
            for record in update.into_iter().chain(&self.close) {
                events.push(record(self.value(key, start_ms, &value)));
            }
        }
    }

    /// Tells what has changed if it is time, and else when it will be.
    fn tell(
        &self,
        key: &str,
        state: &mut OpenWindows<V>,
        now_ms: i64,
        events: &mut Vec<ProducerRecord>,
    ) -> Option<i64> {
        let Some(record) = &self.update else {
            state.untold.clear();
            return None;
        };
        if state.untold.is_empty() {
            return None;
        }
        let due_ms = state.told_ms.saturating_add(self.update_every_ms);
        // A clock that was set back must not silence the key.
        if now_ms < due_ms && now_ms >= state.told_ms {
            return Some(due_ms);
        }
        for start_ms in std::mem::take(&mut state.untold) {
            let value = state.open.get(&start_ms);
            events.extend(value.map(|value| record(self.value(key, start_ms, value))));
        }
        state.told_ms = now_ms;
        None
    }
}

impl<C, V> Aggregate for Windowed<C, V>
where
    C: DeserializeOwned + Send + 'static,
    V: Clone + Default + PartialEq + Serialize + DeserializeOwned + Send + 'static,
{
    type State = OpenWindows<V>;
    type Command = C;

    fn apply(&self, _: &str, state: &mut Option<Self::State>, command: C) {
        let state = state.get_or_insert_default();
        let time_ms = (self.time)(&command);
        state.moved = true;
        state.latest_ms = state.latest_ms.max(time_ms);
        let closed_ms = state
            .latest_ms
            .saturating_sub(self.windows.grace_ms)
            .max(state.closed_ms);
        let mut is_late = false;
        for start_ms in self.windows.starts(time_ms) {
            if self.windows.end(start_ms) <= closed_ms {
                is_late = true;
                continue;
            }
            (self.add)(state.open.entry(start_ms).or_default(), &command);
            state.untold.insert(start_ms);
        }
        state.late += u64::from(is_late);
    }

    fn derive(&self, key: &str, state: &mut Self::State, now_ms: i64) -> Derived {
        if std::mem::take(&mut state.moved) {
            state.seen_ms = now_ms;
        }
        let grace_ms = self.windows.grace_ms;
        let held_since_ms = *state.held_since.0.get_or_insert(now_ms);
        let idle_at_ms = state.seen_ms.max(held_since_ms).saturating_add(self.idle_ms);
        let mut horizon_ms = state.latest_ms.saturating_sub(grace_ms);
        if now_ms >= idle_at_ms {
            horizon_ms = horizon_ms.max(now_ms.saturating_sub(grace_ms));
        }
        let mut events = Vec::new();
        self.close(key, state, horizon_ms, &mut events);
        let tell_at_ms = self.tell(key, state, now_ms, &mut events);
        let first = state.open.first_key_value();
        let close_at_ms =
            first.map(|(start_ms, _)| self.windows.end(*start_ms).saturating_add(grace_ms).max(idle_at_ms));
        Derived {
            events,
            again_at_ms: tell_at_ms.into_iter().chain(close_at_ms).min(),
        }
    }
}

impl<C, V> fmt::Debug for Windowed<C, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Windowed")
            .field("windows", &self.windows)
            .field("idle_ms", &self.idle_ms)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn starts(windows: Windows, time_ms: i64) -> Vec<i64> {
        windows.starts(time_ms).collect()
    }

    #[test]
    fn a_time_is_in_one_tumbling_window_whose_end_is_the_next_ones() {
        let windows = Windows::tumbling(SECOND);
        for (time_ms, start_ms) in [
            (0, 0),
            (999, 0),
            (1000, 1000),
            (-1, -1000),
            (-1000, -1000),
            (-1001, -2000),
        ] {
            assert_eq!(starts(windows, time_ms), [start_ms], "{time_ms}");
        }
        assert_eq!(windows.end(-1000), 0);
        assert_eq!(starts(Windows::tumbling(Duration::from_millis(7)), 20), [14]);
    }

    #[test]
    fn hopping_windows_overlap_and_leave_no_time_out() {
        let windows = Windows::hopping(SECOND * 3, SECOND);
        assert_eq!(starts(windows, 3000), [3000, 2000, 1000]);
        assert_eq!(starts(windows, 2999), [2000, 1000, 0]);
        assert_eq!(starts(windows, -1), [-1000, -2000, -3000]);
        let uneven = Windows::hopping(Duration::from_millis(2500), SECOND);
        assert_eq!(starts(uneven, 3400), [3000, 2000, 1000]);
        assert_eq!(starts(uneven, 3500), [3000, 2000]);
        let wide = Windows::hopping(SECOND, SECOND * 5);
        assert_eq!(starts(wide, 4500), [4000], "a hop is the size at most");
        assert_eq!(starts(Windows::tumbling(Duration::ZERO), 5), [5]);
    }

    #[test]
    fn times_at_the_ends_of_time_are_in_windows_too() {
        let windows = Windows::hopping(SECOND * 2, SECOND);
        for time_ms in [i64::MIN, i64::MIN + 1, i64::MAX] {
            assert!(!starts(windows, time_ms).is_empty(), "{time_ms}");
        }
        assert_eq!(windows.end(i64::MAX - 1), i64::MAX);
    }

    /// Sums of numbers that come as `(time, number)`, told as `closed 0-1000 7` or `open …`.
    struct Bench {
        sums: Windowed<(i64, u64), u64>,
        state: Option<OpenWindows<u64>>,
        again_at_ms: Option<i64>,
    }

    impl Bench {
        fn new(windows: Windows) -> Self {
            let record = |what: &'static str| {
                move |of: WindowValue<'_, u64>| {
                    ProducerRecord::to("told").value(format!("{what} {}-{} {}", of.start_ms, of.end_ms, of.value))
                }
            };
            let sums = Windowed::new(windows, |number: &(i64, u64)| number.0, |sum, number| *sum += number.1)
                .idle(SECOND * 5)
                .on_update(SECOND, record("open"))
                .on_close(record("closed"));
            Self {
                sums,
                state: None,
                again_at_ms: None,
            }
        }

        /// Applies numbers at a time of the owner's clock and says what follows. The state goes by way of the log.
        fn at(&mut self, now_ms: i64, numbers: &[(i64, u64)]) -> Vec<String> {
            for number in numbers {
                self.sums.apply("key", &mut self.state, *number);
            }
            let state = self.state.as_mut().expect("a state");
            let derived = self.sums.derive("key", state, now_ms);
            self.again_at_ms = derived.again_at_ms;
            let json = serde_json::to_vec(state).expect("JSON");
            let read: OpenWindows<u64> = serde_json::from_slice(&json).expect("a state");
            assert_eq!(read, *state, "nothing is lost on the log");
            let text = |record: ProducerRecord| {
                let value = record.value.expect("a value");
                String::from_utf8(value.to_vec()).expect("text")
            };
            derived.events.into_iter().map(text).collect()
        }

        fn late(&self) -> u64 {
            self.state.as_ref().expect("a state").late
        }
    }

    #[test]
    fn a_window_is_closed_once_when_a_later_time_has_passed_it_by_the_grace() {
        let mut bench = Bench::new(Windows::tumbling(SECOND).grace(SECOND / 2));
        assert_eq!(bench.at(10_000, &[(100, 1), (900, 2)]), ["open 0-1000 3"]);
        assert_eq!(
            bench.at(11_000, &[(1499, 4), (200, 8)]),
            ["open 0-1000 11", "open 1000-2000 4"]
        );
        assert_eq!(
            bench.at(12_000, &[(1500, 16)]),
            ["closed 0-1000 11", "open 1000-2000 20"]
        );
        assert!(bench.at(13_000, &[(999, 32)]).is_empty());
        assert_eq!(bench.late(), 1);
        assert_eq!(bench.at(14_000, &[(1000, 64)]), ["open 1000-2000 84"]);
    }

    #[test]
    fn a_late_command_is_counted_even_in_the_batch_that_makes_it_late() {
        let mut bench = Bench::new(Windows::tumbling(SECOND));
        assert_eq!(
            bench.at(10_000, &[(999, 1), (1000, 2), (999, 4), (5000, 8), (1500, 16)]),
            [
                "open 0-1000 1",
                "closed 0-1000 1",
                "open 1000-2000 2",
                "closed 1000-2000 2",
                "open 5000-6000 8"
            ]
        );
        assert_eq!(bench.late(), 2);
    }

    #[test]
    fn a_command_may_be_late_for_one_hopping_window_and_in_time_for_another() {
        let mut bench = Bench::new(Windows::hopping(SECOND * 2, SECOND));
        bench.at(10_000, &[(1500, 1)]);
        assert_eq!(
            bench.at(11_000, &[(2100, 2)]),
            ["closed 0-2000 1", "open 1000-3000 3", "open 2000-4000 2"]
        );
        assert_eq!(bench.at(12_000, &[(1900, 4)]), ["open 1000-3000 7"]);
        assert_eq!(bench.late(), 1);
    }

    #[test]
    fn windows_are_closed_by_the_clock_when_nothing_more_comes() {
        let mut bench = Bench::new(Windows::tumbling(SECOND).grace(SECOND));
        bench.at(10_000, &[(9100, 1), (10_000, 2)]);
        assert_eq!(
            bench.again_at_ms,
            Some(15_000),
            "idle, and over for longer than the grace"
        );
        assert!(bench.at(14_999, &[]).is_empty());
        assert_eq!(bench.at(15_000, &[]), ["closed 9000-10000 1", "closed 10000-11000 2"]);
        assert_eq!(bench.again_at_ms, None);
        assert_eq!(bench.at(16_000, &[(10_999, 4), (11_000, 8)]), ["open 11000-12000 8"]);
        assert_eq!(bench.late(), 1, "it came when its window was closed");
    }

    #[test]
    fn a_window_that_is_not_over_is_not_closed_because_its_key_is_idle() {
        let mut bench = Bench::new(Windows::tumbling(SECOND * 60));
        bench.at(1000, &[(1000, 1)]);
        assert_eq!(bench.again_at_ms, Some(60_000));
        assert!(bench.at(59_999, &[]).is_empty());
        assert_eq!(bench.at(60_000, &[]), ["closed 0-60000 1"]);
    }

    #[test]
    fn a_new_owner_is_not_idle_before_it_has_read_what_waits() {
        let mut bench = Bench::new(Windows::tumbling(SECOND));
        bench.at(10_000, &[(9500, 1)]);
        let json = serde_json::to_vec(&bench.state).expect("JSON");
        bench.state = serde_json::from_slice(&json).expect("a state");
        assert!(bench.at(100_001, &[]).is_empty());
        assert_eq!(bench.at(100_002, &[(9600, 2)]), ["open 9000-10000 3"]);
        assert_eq!((bench.late(), bench.again_at_ms), (0, Some(105_002)));
        let json = serde_json::to_vec(&bench.state).expect("JSON");
        bench.state = serde_json::from_slice(&json).expect("a state");
        bench.at(200_000, &[]);
        assert_eq!(bench.at(205_000, &[]), ["closed 9000-10000 3"]);
    }

    #[test]
    fn updates_are_told_as_often_as_they_may_and_none_is_forgotten() {
        let mut bench = Bench::new(Windows::tumbling(SECOND * 60));
        assert_eq!(bench.at(10_000, &[(1, 1)]), ["open 0-60000 1"]);
        assert!(bench.at(10_400, &[(2, 1)]).is_empty());
        assert_eq!(bench.again_at_ms, Some(11_000));
        assert!(bench.at(10_999, &[(3, 1)]).is_empty());
        assert_eq!(bench.at(11_000, &[]), ["open 0-60000 3"]);
        assert!(bench.at(12_500, &[]).is_empty(), "nothing has changed");
        assert_eq!(
            bench.at(500, &[(4, 1)]),
            ["open 0-60000 4"],
            "a clock set back silences nobody"
        );
    }
}
