//! The states of one partition in memory, and the window of commands that is about to change them.
//!
//! A [`Window`] works on copies; [`States::keep`] takes them over once their transaction is committed. Undoing a window is
//! dropping it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::{Aggregate, Derived, Error, commands_topic};
use crate::log::{ProducerRecord, Record, TopicPartition};
use crate::patterns::consumer::{FailureKind, said};
use crate::patterns::hop::{Hop, Why};
use crate::patterns::owner::State;

/// What the committed log says of each key of a partition.
pub(crate) struct States<A: Aggregate> {
    aggregate: Arc<A>,
    bounds: Bounds,
    /// The partition of the state topic.
    partition: TopicPartition,
    kept: HashMap<Arc<str>, Kept<A::State>>,
    /// When which key is to be derived again.
    due: BTreeSet<(i64, Arc<str>)>,
    /// While restoring: keys whose last state cannot be read, and why.
    unreadable: BTreeMap<String, Error>,
}

/// What bounds the memory and the windows of a partition.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Most commands, and most due keys, of one window.
    pub(super) window_commands: usize,
    /// How long an ended key stays after its last change.
    pub(super) keep_ended_ms: i64,
    /// Retention of the state topic; `None`: for ever.
    pub(super) retention_ms: Option<i64>,
}

struct Kept<S> {
    state: S,
    /// The time of its last record.
    written_ms: i64,
    again_at_ms: Option<i64>,
}

/// The keys touched since the last commit.
pub(crate) struct Window<S> {
    /// In key order, so that the same window always gives the same transaction.
    touched: BTreeMap<Arc<str>, Touched<S>>,
    /// Commands that could not be read, as they are kept.
    dead_letters: Vec<ProducerRecord>,
}

struct Touched<S> {
    state: Option<S>,
    /// The commands that were applied to it.
    applied: Vec<Bytes>,
    again_at_ms: Option<i64>,
    changed: bool,
}

impl<S> Default for Window<S> {
    fn default() -> Self {
        Self {
            touched: BTreeMap::new(),
            dead_letters: Vec::new(),
        }
    }
}

impl<A: Aggregate> State for States<A> {
    type Window = Window<A::State>;

    fn apply(&self, window: &mut Window<A::State>, command: &Record) {
        let failed = match decode(command) {
            Ok((key, value)) => self.change(window, key, value).err(),
            Err(reason) => Some((FailureKind::NonRetriable, reason)),
        };
        let Some((kind, reason)) = failed else { return };
        let store = &self.partition.topic;
        let commands = TopicPartition::new(commands_topic(store), self.partition.partition);
        tracing::warn!(
            topic = %commands.topic, partition = commands.partition, offset = command.offset,
            reason, "a command that cannot be applied is kept as a dead letter"
        );
        let why = Why {
            group: store,
            attempts: 1,
            kind: kind.as_str(),
            message: &reason,
        };
        let dead_letters = Hop::to_dead_letters(&commands.topic, store);
        let letter = dead_letters.record(&commands, command, true, &why);
        window.dead_letters.push(letter);
    }

    fn add_due(&self, window: &mut Window<A::State>, by_ms: i64) {
        let room = self.bounds.window_commands;
        for (_, key) in self.due.iter().take_while(|(at_ms, _)| *at_ms <= by_ms).take(room) {
            if !window.touched.contains_key(key) {
                self.touch(window, key.clone());
            }
        }
    }

    /// Each key of the window is derived once. The records are changed states (a tombstone for a removed one), then events, then
    /// commands that could not be read.
    fn derive(&self, window: &mut Window<A::State>, now_ms: i64) -> Result<Vec<ProducerRecord>, Error> {
        let (mut records, mut events) = (Vec::new(), Vec::new());
        for (key, touched) in &mut window.touched {
            if let Some(state) = &mut touched.state {
                let derived: Derived = self.aggregate.derive(key, state, now_ms);
                events.extend(derived.events);
                // A time that has passed already would never let the owner rest.
                touched.again_at_ms = derived.again_at_ms.map(|at_ms| at_ms.max(now_ms + 1));
            }
            touched.changed = touched.state.as_ref() != self.kept.get(key).map(|kept| &kept.state);
            if touched.changed {
                records.push(self.record(key, touched.state.as_ref(), now_ms)?);
            }
        }
        records.append(&mut events);
        records.append(&mut window.dead_letters);
        Ok(records)
    }

    fn keep(&mut self, window: Window<A::State>, now_ms: i64) {
        for (key, touched) in window.touched {
            let written_ms = self.forget_key(&key).map(|kept| kept.written_ms);
            if let Some(state) = touched.state {
                let written_ms = written_ms.filter(|_| !touched.changed).unwrap_or(now_ms);
                self.insert(key, state, written_ms, touched.again_at_ms);
            }
        }
    }

    fn due_ms(&self) -> Option<i64> {
        self.due.first().map(|(at_ms, _)| *at_ms)
    }

    fn forget(&mut self, now_ms: i64) {
        let forgotten: Vec<Arc<str>> = self
            .kept
            .iter()
            .filter(|(_, kept)| self.is_forgotten(&kept.state, kept.written_ms, now_ms))
            .map(|(key, _)| key.clone())
            .collect();
        for key in forgotten {
            self.forget_key(&key);
        }
    }

    fn len(&self) -> usize {
        self.kept.len()
    }
}

impl<A: Aggregate> States<A> {
    /// No states yet.
    pub(super) fn new(aggregate: Arc<A>, bounds: Bounds, partition: TopicPartition) -> Self {
        Self {
            aggregate,
            bounds,
            partition,
            kept: HashMap::new(),
            due: BTreeSet::new(),
            unreadable: BTreeMap::new(),
        }
    }

    /// Takes over a record of the state topic. Open keys become due, so that nothing an earlier owner still had to say, or had
    /// set a time for, is forgotten.
    pub(super) fn restore(&mut self, record: &Record, now_ms: i64) {
        let Some(key) = record.key.as_ref().and_then(|key| std::str::from_utf8(key).ok()) else {
            tracing::warn!(
                topic = %self.partition.topic, partition = self.partition.partition, offset = record.offset,
                "passing over a state without a readable key"
            );
            return;
        };
        self.forget_key(key);
        self.unreadable.remove(key);
        let Some(value) = &record.value else { return };
        let state: A::State = match serde_json::from_slice(value) {
            Ok(state) => state,
            Err(_) if self.is_expired(record.timestamp_ms, now_ms) => return,
            Err(cause) => {
                let error = Error::UnreadableState {
                    partition: self.partition.clone(),
                    key: key.to_owned(),
                    offset: record.offset,
                    cause,
                };
                self.unreadable.insert(key.to_owned(), error);
                return;
            }
        };
        if self.is_forgotten(&state, record.timestamp_ms, now_ms) {
            return;
        }
        let again_at_ms = (!self.aggregate.is_ended(&state)).then_some(now_ms);
        self.insert(key.into(), state, record.timestamp_ms, again_at_ms);
    }

    /// With all records taken over. A state that cannot be read must not be overwritten by what the next command makes of nothing.
    pub(super) fn restored(mut self) -> Result<Self, Error> {
        match self.unreadable.pop_first() {
            None => Ok(self),
            Some((_, error)) => Err(error),
        }
    }

    /// Applies a command in the window. One that cannot be read, or makes the aggregate panic, changes nothing.
    fn change(&self, window: &mut Window<A::State>, key: &str, value: &Bytes) -> Result<(), (FailureKind, String)> {
        let command = parse(value)?;
        if !window.touched.contains_key(key) {
            self.touch(window, key.into());
        }
        let Some(touched) = window.touched.get_mut(key) else {
            return Ok(());
        };
        let applied = catch_unwind(AssertUnwindSafe(|| {
            self.aggregate.apply(key, &mut touched.state, command);
        }));
        let Err(panic) = applied else {
            touched.applied.push(value.clone());
            return Ok(());
        };
        // What it has made of the state is not known: the commands before it are applied again.
        touched.state = self.kept.get(key).map(|kept| kept.state.clone());
        for value in &touched.applied {
            self.aggregate.apply(key, &mut touched.state, parse(value)?);
        }
        let reason = format!("the aggregate panicked: {}", said(&*panic));
        Err((FailureKind::Panic, reason))
    }

    fn touch(&self, window: &mut Window<A::State>, key: Arc<str>) {
        let state = self.kept.get(&key).map(|kept| kept.state.clone());
        window.touched.insert(
            key,
            Touched {
                state,
                applied: Vec::new(),
                again_at_ms: None,
                changed: false,
            },
        );
    }

    fn insert(&mut self, key: Arc<str>, state: A::State, written_ms: i64, again_at_ms: Option<i64>) {
        if let Some(at_ms) = again_at_ms {
            self.due.insert((at_ms, key.clone()));
        }
        let kept = Kept {
            state,
            written_ms,
            again_at_ms,
        };
        self.kept.insert(key, kept);
    }

    fn forget_key(&mut self, key: &str) -> Option<Kept<A::State>> {
        let (key, kept) = self.kept.remove_entry(key)?;
        if let Some(at_ms) = kept.again_at_ms {
            self.due.remove(&(at_ms, key));
        }
        Some(kept)
    }

    fn is_forgotten(&self, state: &A::State, written_ms: i64, now_ms: i64) -> bool {
        let age_ms = now_ms.saturating_sub(written_ms);
        let ended = self.aggregate.is_ended(state) && age_ms > self.bounds.keep_ended_ms;
        ended || self.is_expired(written_ms, now_ms)
    }

    /// Whether the log forgets what was written then.
    fn is_expired(&self, written_ms: i64, now_ms: i64) -> bool {
        let retention_ms = self.bounds.retention_ms;
        retention_ms.is_some_and(|retention_ms| now_ms.saturating_sub(written_ms) > retention_ms)
    }

    fn record(&self, key: &str, state: Option<&A::State>, now_ms: i64) -> Result<ProducerRecord, Error> {
        let record = ProducerRecord::to(self.partition.topic.clone())
            .partition(self.partition.partition)
            .key(key.to_owned())
            .timestamp_ms(now_ms);
        Ok(match state {
            Some(state) => record.value(serde_json::to_vec(state)?),
            None => record,
        })
    }
}

/// Key and value of a command.
fn decode(record: &Record) -> Result<(&str, &Bytes), String> {
    let key = record.key.as_ref().ok_or("it has no key")?;
    let key = std::str::from_utf8(key).map_err(|_| "its key is not UTF-8")?;
    Ok((key, record.value.as_ref().ok_or("it has no value")?))
}

fn parse<C: DeserializeOwned>(value: &Bytes) -> Result<C, (FailureKind, String)> {
    serde_json::from_slice(value).map_err(|error| (FailureKind::NonRetriable, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::dead_letters_topic;
    use super::*;
    use crate::log::Headers;
    use crate::patterns::dead_letter::header;

    /// Adds numbers; 0 removes the key, 9 ends it, 5 asks to be derived 100 ms later, and 13 panics half-way.
    struct Sums;

    impl Aggregate for Sums {
        type State = u32;
        type Command = u32;

        fn apply(&self, _: &str, state: &mut Option<u32>, number: u32) {
            match number {
                0 => *state = None,
                13 => {
                    *state = Some(1_000_000);
                    panic!("an unlucky number");
                }
                number => *state = Some(state.unwrap_or(0) + number),
            }
        }

        fn derive(&self, key: &str, state: &mut u32, now_ms: i64) -> Derived {
            Derived {
                events: vec![
                    ProducerRecord::to("events")
                        .key(key.to_owned())
                        .value(state.to_string()),
                ],
                again_at_ms: (*state == 5).then_some(now_ms + 100),
            }
        }

        fn is_ended(&self, state: &u32) -> bool {
            *state == 9
        }
    }

    fn states() -> States<Sums> {
        let bounds = Bounds {
            window_commands: 2,
            keep_ended_ms: 1000,
            retention_ms: Some(10_000),
        };
        States::new(Arc::new(Sums), bounds, TopicPartition::new("sums", 3))
    }

    /// Commits a window of commands and returns its records as topic, key and value.
    fn window(states: &mut States<Sums>, now_ms: i64, commands: &[(&str, u32)]) -> Vec<String> {
        let mut window = Window::default();
        for (key, command) in commands {
            let applied = states.change(&mut window, key, &command.to_string().into());
            applied.expect("it can be applied");
        }
        states.add_due(&mut window, now_ms);
        let records = states.derive(&mut window, now_ms).expect("numbers are JSON");
        states.keep(window, now_ms);
        let text = |bytes: Option<bytes::Bytes>| bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        records
            .into_iter()
            .map(|record| {
                assert_eq!(record.topic.as_ref() == "sums", record.partition == Some(3));
                let (key, value) = (text(record.key).expect("a key"), text(record.value));
                format!("{} {key} {}", record.topic, value.as_deref().unwrap_or("removed"))
            })
            .collect()
    }

    fn record(key: &str, value: Option<&str>, timestamp_ms: i64) -> Record {
        Record {
            offset: 0,
            timestamp_ms,
            key: Some(key.to_owned().into()),
            value: value.map(|value| value.to_owned().into()),
            headers: Headers::new(),
        }
    }

    #[test]
    fn a_window_writes_each_changed_key_once() {
        let mut states = states();
        let records = window(&mut states, 1, &[("b", 1), ("a", 2), ("b", 3)]);
        assert_eq!(records, ["sums a 2", "sums b 4", "events a 2", "events b 4"]);
        assert_eq!(
            window(&mut states, 2, &[("a", 0), ("b", 1)]),
            ["sums a removed", "sums b 5", "events b 5"]
        );
        assert_eq!(states.len(), 1);
    }

    #[test]
    fn a_dropped_window_has_changed_nothing() {
        let mut states = states();
        window(&mut states, 1, &[("a", 1)]);
        let mut dropped = Window::default();
        for key in ["a", "b"] {
            let applied = states.change(&mut dropped, key, &"7".into());
            applied.expect("it can be applied");
        }
        states.derive(&mut dropped, 2).expect("numbers are JSON");
        drop(dropped);
        assert_eq!(window(&mut states, 3, &[("a", 1)]), ["sums a 2", "events a 2"]);
        assert_eq!(states.len(), 1);
    }

    #[test]
    fn a_due_key_is_derived_again_without_being_written_again() {
        let mut states = states();
        window(&mut states, 1, &[("a", 5)]);
        assert_eq!(states.due_ms(), Some(101));
        assert!(window(&mut states, 100, &[]).is_empty());
        assert_eq!(window(&mut states, 101, &[]), ["events a 5"]);
        assert_eq!(states.due_ms(), Some(201));
        window(&mut states, 150, &[("a", 1)]);
        assert_eq!(states.due_ms(), None);
    }

    #[test]
    fn a_new_owner_derives_every_open_key_a_window_at_a_time() {
        let mut states = states();
        for key in ["a", "b", "c"] {
            states.restore(&record(key, Some("5"), 1), 50);
        }
        states.restore(&record("ended", Some("9"), 1), 50);
        states.restore(&record("removed", Some("1"), 1), 50);
        states.restore(&record("removed", None, 2), 50);
        let mut states = states.restored().expect("all can be read");
        assert_eq!(states.len(), 4);
        assert_eq!(window(&mut states, 50, &[]), ["events a 5", "events b 5"]);
        assert_eq!(window(&mut states, 50, &[]), ["events c 5"]);
        assert_eq!(states.due_ms(), Some(150));
    }

    #[test]
    fn a_command_that_makes_the_aggregate_panic_is_a_dead_letter_and_changes_nothing() {
        let mut states = states();
        window(&mut states, 1, &[("a", 1)]);
        let mut next = Window::default();
        for (key, number) in [("a", 2), ("a", 13), ("b", 13), ("a", 3), ("a", 13), ("b", 4)] {
            let command = Record {
                offset: i64::from(number),
                ..record(key, Some(&number.to_string()), 1)
            };
            states.apply(&mut next, &command);
        }
        let records = states.derive(&mut next, 2).expect("numbers are JSON");
        let of = |topic: &str| -> Vec<_> {
            let records = records.iter().filter(|record| record.topic.as_ref() == topic);
            records.map(|record| record.value.clone().expect("a value")).collect()
        };
        assert_eq!(of("sums"), ["6", "4"]);
        let letters: Vec<_> = records
            .iter()
            .filter(|record| *record.topic == dead_letters_topic("sums"))
            .collect();
        assert_eq!(letters.len(), 3);
        for letter in letters {
            assert_eq!(letter.headers.last_str(header::ERROR_KIND), Some("panic"));
            let message = letter.headers.last_str(header::ERROR_MESSAGE).expect("a message");
            assert!(message.contains("an unlucky number"), "{message}");
        }
    }

    #[test]
    fn a_state_that_cannot_be_read_is_named_and_nothing_is_made_of_its_key() {
        let unreadable = |records: &[(&str, Option<&str>)]| {
            let mut states = states();
            for (offset, (key, value)) in (0..).zip(records) {
                let record = Record {
                    offset,
                    ..record(key, *value, 1)
                };
                states.restore(&record, 50);
            }
            states.restored().err().map(|error| error.to_string())
        };
        let named = unreadable(&[("good", Some("1")), ("bad", Some("{"))]).expect("it cannot be read");
        assert!(named.contains("\"bad\" at offset 1 of sums-3"), "{named}");
        assert_eq!(unreadable(&[("bad", Some("{")), ("bad", Some("1"))]), None);
        assert_eq!(unreadable(&[("bad", Some("{")), ("bad", None)]), None);
        let mut states = states();
        states.restore(&record("bad", Some("{"), 0), 10_001);
        assert!(states.restored().is_ok(), "the log forgets it too");
    }

    #[test]
    fn memory_forgets_what_has_ended_and_what_the_log_forgets() {
        let mut states = states();
        window(&mut states, 0, &[("ended", 9), ("open", 1)]);
        window(&mut states, 8000, &[("moved", 1)]);
        states.forget(1000);
        assert_eq!(states.len(), 3);
        states.forget(1001);
        assert_eq!(states.len(), 2);
        states.forget(10_001);
        assert_eq!(states.len(), 1);
        assert_eq!(
            window(&mut states, 10_002, &[("moved", 1)]),
            ["sums moved 2", "events moved 2"]
        );
        for (key, value) in [("ended", "9"), ("open", "1")] {
            states.restore(&record(key, Some(value), 0), 10_003);
        }
        assert_eq!(
            states.len(),
            1,
            "and does not take it back from a log that has not been cleaned yet"
        );
    }
}
