//! One partition's schedules: commands change them, and what is due fires.
//!
//! A window's transaction has the changed schedules and the events of those that are due, so that each fires once whoever owns the
//! partition. Beside its offset it notes what is due first after it: a new owner need not look at what is before.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::nearest::{Key, Nearest};
use super::pending::{NEVER_MS, Pending, over};
use super::{Error, commands_topic};
use crate::log::{self, ProducerRecord, Record};
use crate::patterns::owner::State;

/// What is noted when nothing is pending.
const NOTHING: &str = "nothing";

pub(super) struct Firing {
    /// The topic of schedules, and the partition.
    topic: Arc<str>,
    partition: i32,
    /// Most schedules that fire in one transaction.
    window: usize,
    nearest: Nearest,
    /// Of these events one was refused. They fire one at a time until it is known which.
    suspect: Option<Suspect>,
    /// Due schedules whose events were refused, and why.
    refused: HashMap<Arc<str>, String>,
}

enum Suspect {
    /// Those for a topic.
    Topic(Arc<str>),
    /// All: it was not said which topic has refused. That of the schedules may have: they wait until that is known to be written.
    All { is_own_written: bool },
}

/// Changes of schedules, and events.
#[derive(Default)]
pub(super) struct Window {
    /// What becomes of schedules; `None`: they are over. In the order of ids, so that the same window gives the same transaction.
    changes: BTreeMap<Arc<str>, Option<Pending>>,
    /// The schedules that fire, with the topics of their events.
    fired: Vec<(Arc<str>, Arc<str>)>,
    /// Their events.
    events: Vec<ProducerRecord>,
}

impl Firing {
    /// With what was restored of the partition.
    pub(super) fn new(topic: Arc<str>, partition: i32, window: usize, nearest: Nearest) -> Self {
        Self {
            topic,
            partition,
            window,
            nearest,
            suspect: None,
            refused: HashMap::new(),
        }
    }

    /// What is fired for one that is due, and what becomes of it. Of the times of a cron schedule that have passed the last one
    /// fires, for all of them.
    fn fire(pending: &Pending, now_ms: i64) -> (ProducerRecord, Option<Pending>) {
        let Some(cron) = &pending.cron else {
            return (pending.event_due(pending.due_ms), None);
        };
        let last_ms = cron.last_ms(now_ms).ok().flatten().unwrap_or(pending.due_ms);
        let event = pending.event_due(last_ms.max(pending.due_ms));
        let mut next = pending.clone();
        match cron.next_ms(now_ms) {
            Ok(next_ms) => next.due_ms = next_ms,
            Err(error) => {
                tracing::error!(schedule = %pending.id, %error, "a schedule has no next time");
                next.refuse(error.to_string());
            }
        }
        (event, Some(next))
    }

    fn record(&self, id: &str, pending: Option<&Pending>) -> Result<ProducerRecord, Error> {
        let record = match pending {
            Some(pending) => pending.to_record(&self.topic)?,
            None => over(&self.topic, id),
        };
        Ok(record.partition(self.partition))
    }
}

impl State for Firing {
    type Window = Window;

    fn apply(&self, window: &mut Window, command: &Record) {
        match Pending::from_record(command) {
            Ok((id, pending)) => {
                window.changes.insert(id.into(), pending);
            }
            Err(reason) => tracing::warn!(
                topic = %commands_topic(&self.topic), partition = self.partition, offset = command.offset, reason,
                "passing over a command that cannot be read"
            ),
        }
    }

    /// In the order of due times.
    fn add_due(&self, window: &mut Window, by_ms: i64) {
        // With no event beside it, so that a refusal is not taken for that of another.
        let mut is_suspect_in = matches!(self.suspect, Some(Suspect::All { .. })) && !self.refused.is_empty();
        let due = self.nearest.iter().take_while(|((due_ms, _), _)| *due_ms <= by_ms);
        for (_, pending) in due {
            if window.events.len() >= self.window {
                break;
            }
            // A command has come first.
            if window.changes.contains_key(&pending.id) {
                continue;
            }
            if let Some(Suspect::All { is_own_written: false }) = self.suspect {
                // As it stands: it is to be seen whether that is written.
                window.changes.insert(pending.id.clone(), Some(pending.clone()));
                break;
            }
            if let Some(reason) = self.refused.get(&pending.id) {
                let mut refused = pending.clone();
                refused.refuse(reason.clone());
                window.changes.insert(pending.id.clone(), Some(refused));
                continue;
            }
            let topic = &pending.event.topic;
            let is_suspect = match &self.suspect {
                None => false,
                Some(Suspect::Topic(suspect)) => suspect == topic,
                Some(Suspect::All { .. }) => true,
            };
            if is_suspect && std::mem::replace(&mut is_suspect_in, true) {
                continue;
            }
            let (event, next) = Self::fire(pending, by_ms);
            window.events.push(event);
            window.changes.insert(pending.id.clone(), next);
            window.fired.push((pending.id.clone(), topic.clone()));
        }
    }

    /// Changed schedules first, then events.
    fn derive(&self, window: &mut Window, _: i64) -> Result<Vec<ProducerRecord>, Error> {
        let changes = window.changes.iter();
        let changes = changes.map(|(id, pending)| self.record(id, pending.as_ref()));
        let mut records = changes.collect::<Result<Vec<_>, Error>>()?;
        records.append(&mut window.events);
        Ok(records)
    }

    fn note(&self, window: &Window) -> String {
        let kept = self
            .nearest
            .iter()
            .map(|(key, _)| key)
            .find(|(_, id)| !window.changes.contains_key(id));
        let changed = window
            .changes
            .values()
            .flatten()
            .map(|pending| (pending.due_ms, pending.id.clone()));
        let behind = self.nearest.horizon().cloned();
        let first = changed.chain(kept.cloned()).chain(behind).min();
        first.map_or_else(|| NOTHING.to_owned(), |(due_ms, id)| format!("{due_ms} {id}"))
    }

    fn keep(&mut self, window: Window, now_ms: i64) {
        if let Some(Suspect::All { is_own_written }) = &mut self.suspect {
            *is_own_written |= !window.changes.is_empty();
        }
        for (id, pending) in window.changes {
            if self.refused.remove(&id).is_some() {
                self.suspect = None;
            }
            match pending {
                Some(pending) => self.nearest.put(pending),
                None => self.nearest.remove(&id),
            }
        }
        if self.due_ms().is_none_or(|due_ms| due_ms > now_ms) {
            self.suspect = None;
        }
    }

    /// An event that its topic refuses must not hold up the others: its schedule is set aside, with the reason.
    fn refused(&mut self, window: &Window, error: &log::Error) {
        let (topic, is_for_all) = match error {
            log::Error::UnknownTopic(topic) => (Some(topic.as_str()), true),
            log::Error::UnknownPartition(partition) => (Some(partition.topic.as_ref()), false),
            log::Error::InvalidTopic { topic, .. } | log::Error::RecordTooLarge { topic, .. } => {
                (Some(topic.as_str()), false)
            }
            log::Error::Unauthorized(_) => (None, false),
            _ => return,
        };
        let is_own_written = matches!(self.suspect, Some(Suspect::All { is_own_written: true }));
        if topic.is_none() && (window.fired.is_empty() || !is_own_written) {
            self.suspect = Some(Suspect::All { is_own_written: false });
            self.refused.clear();
            return;
        }
        let is_refused = |to: &str| topic.is_none_or(|topic| topic == to);
        let mut fired = window.fired.iter().filter(|(_, to)| is_refused(to));
        let count = fired.clone().count();
        if count > 1 && !is_for_all {
            self.suspect = fired.next().map(|(_, topic)| Suspect::Topic(topic.clone()));
            return;
        }
        for (id, topic) in fired {
            tracing::error!(schedule = %id, %topic, %error, "the event of a schedule is refused; it fires no more");
            self.refused.insert(id.clone(), error.to_string());
        }
    }

    fn due_ms(&self) -> Option<i64> {
        let first = self.nearest.iter().next().map(|(key, _)| key.0);
        first.filter(|due_ms| *due_ms != NEVER_MS)
    }

    fn is_dry(&self) -> bool {
        self.nearest.len() == 0 && self.nearest.horizon().is_some()
    }

    fn len(&self) -> usize {
        self.nearest.len()
    }
}

/// Before which nothing is pending, from what was noted.
pub(super) fn floor(noted: &str) -> Option<Key> {
    if noted == NOTHING {
        return Some((NEVER_MS, "".into()));
    }
    let (due_ms, id) = noted.split_once(' ')?;
    Some((due_ms.parse().ok()?, id.into()))
}

#[cfg(test)]
mod tests {
    use super::super::Cron;
    use super::super::nearest::Bounds;
    use super::*;

    const HOUR_MS: i64 = 3_600_000;

    fn firing() -> Firing {
        let bounds = Bounds {
            schedules: 3,
            bytes: usize::MAX,
        };
        Firing::new("schedules".into(), 0, 10, Nearest::new(bounds, None))
    }

    fn pending(id: &str, due_ms: i64) -> Pending {
        Pending {
            id: id.into(),
            due_ms,
            cron: None,
            event: ProducerRecord::to("events").key(id.to_owned()).value("{}"),
            refused: None,
        }
    }

    fn command(record: ProducerRecord) -> Record {
        Record {
            offset: 0,
            timestamp_ms: 0,
            key: record.key,
            value: record.value,
            headers: record.headers,
        }
    }

    fn submit(pending: Pending) -> Record {
        command(pending.to_record("schedules.commands").expect("a record"))
    }

    fn cancel(id: &str) -> Record {
        command(over("schedules.commands", id))
    }

    /// A window that is committed: its records as topic, key and due time, and what it notes.
    fn window(firing: &mut Firing, now_ms: i64, commands: &[Record]) -> (Vec<String>, String) {
        let mut window = Window::default();
        for command in commands {
            firing.apply(&mut window, command);
        }
        firing.add_due(&mut window, now_ms);
        let records = firing.derive(&mut window, now_ms).expect("records");
        let note = firing.note(&window);
        firing.keep(window, now_ms);
        let said = records.into_iter().map(|record| {
            let key = String::from_utf8_lossy(record.key.as_deref().unwrap_or_default()).into_owned();
            match (record.headers.last_str(super::super::DUE_MS), record.value) {
                (Some(due_ms), _) => format!("{} {key} due {due_ms}", record.topic),
                (None, Some(_)) => format!("{} {key}", record.topic),
                (None, None) => format!("{} {key} over", record.topic),
            }
        });
        (said.collect(), note)
    }

    #[test]
    fn what_is_due_fires_once_in_the_order_of_due_times() {
        let mut firing = firing();
        let commands = [
            submit(pending("b", 20)),
            submit(pending("a", 30)),
            submit(pending("c", 10)),
        ];
        assert_eq!(
            window(&mut firing, 0, &commands),
            (
                vec![
                    "schedules a".to_owned(),
                    "schedules b".to_owned(),
                    "schedules c".to_owned()
                ],
                "10 c".to_owned()
            )
        );
        assert_eq!(firing.due_ms(), Some(10));
        assert_eq!(window(&mut firing, 9, &[]).0, Vec::<String>::new(), "none is early");
        assert_eq!(
            window(&mut firing, 20, &[]),
            (
                [
                    "schedules b over",
                    "schedules c over",
                    "events c due 10",
                    "events b due 20"
                ]
                .map(str::to_owned)
                .to_vec(),
                "30 a".to_owned()
            )
        );
        assert_eq!(window(&mut firing, 40, &[]).1, NOTHING);
        assert!(window(&mut firing, 50, &[]).0.is_empty() && firing.due_ms().is_none());
    }

    #[test]
    fn a_command_of_the_same_window_comes_before_the_time() {
        let mut firing = firing();
        window(&mut firing, 0, &[submit(pending("a", 10)), submit(pending("b", 10))]);
        let (records, _) = window(&mut firing, 10, &[cancel("a"), submit(pending("b", 20))]);
        assert_eq!(records, ["schedules a over", "schedules b"]);
        let (records, _) = window(&mut firing, 20, &[]);
        assert_eq!(records, ["schedules b over", "events b due 20"]);
    }

    #[test]
    fn of_the_missed_times_of_a_cron_schedule_the_last_fires_for_all() {
        let mut firing = firing();
        let hourly = Pending {
            cron: Some(Cron::new("0 * * * *", "UTC").expect("cron")),
            ..pending("hourly", HOUR_MS)
        };
        window(&mut firing, 0, &[submit(hourly)]);
        let (records, note) = window(&mut firing, HOUR_MS + 5, &[]);
        assert_eq!(records[1], format!("events hourly due {HOUR_MS}"));
        assert_eq!(note, format!("{} hourly", 2 * HOUR_MS));
        let (records, note) = window(&mut firing, 6 * HOUR_MS + 5, &[]);
        assert_eq!(records[1..], [format!("events hourly due {}", 6 * HOUR_MS)]);
        assert_eq!(note, format!("{} hourly", 7 * HOUR_MS));
    }

    #[test]
    fn what_memory_cannot_hold_is_noted_and_makes_the_partition_dry() {
        let mut firing = firing();
        let commands: Vec<Record> = (1..=5)
            .map(|number| submit(pending(&number.to_string(), number)))
            .collect();
        window(&mut firing, 0, &commands);
        assert_eq!(firing.len(), 3);
        let (records, note) = window(&mut firing, 10, &[]);
        assert_eq!((records.len(), note.as_str()), (6, "4 4"));
        assert!(firing.is_dry());
        assert_eq!(floor(&note), Some((4, "4".into())));
        assert_eq!(floor(""), None);
    }

    /// Fires windows at 10 while the log refuses every transaction that has an event of one of `bad`. Returns the keys of the events that have fired.
    fn fire_despite(firing: &mut Firing, error: &log::Error, bad: &[&str]) -> Vec<String> {
        let mut fired = Vec::new();
        for _ in 0..10 {
            let mut window = Window::default();
            firing.add_due(&mut window, 10);
            let records = firing.derive(&mut window, 10).expect("records");
            let events = records.iter().filter(|record| record.topic.as_ref() == "events");
            let keys = events.filter_map(|record| record.key.clone());
            let keys: Vec<String> = keys.map(|key| String::from_utf8_lossy(&key).into_owned()).collect();
            if keys.iter().any(|key| bad.contains(&key.as_str())) {
                firing.refused(&window, error);
            } else {
                fired.extend(keys);
                firing.keep(window, 10);
            }
        }
        fired
    }

    #[test]
    fn a_refused_event_is_found_among_others_and_set_aside() {
        let errors = [
            log::Error::RecordTooLarge {
                topic: "events".to_owned(),
                size_bytes: 2,
                max_bytes: 1,
            },
            log::Error::InvalidTopic {
                topic: "events".to_owned(),
                reason: "it takes no record without a key".to_owned(),
            },
            log::Error::Unauthorized("append to a topic".to_owned()),
        ];
        for error in errors {
            let mut firing = firing();
            window(&mut firing, 0, &["a", "b", "c"].map(|id| submit(pending(id, 10))));
            assert_eq!(fire_despite(&mut firing, &error, &["b"]), ["a", "c"], "{error}");
            assert_eq!((firing.len(), firing.due_ms()), (1, None));
            let (_, refused) = firing.nearest.iter().next().expect("it is kept");
            assert_eq!(refused.refused, Some(error.to_string()));
            assert!(firing.suspect.is_none());
        }
    }

    #[test]
    fn no_event_is_set_aside_when_it_is_the_owner_who_may_not_write() {
        let mut firing = firing();
        window(&mut firing, 0, &["a", "b"].map(|id| submit(pending(id, 10))));
        let error = log::Error::Unauthorized("append to a topic".to_owned());
        for _ in 0..10 {
            let mut window = Window::default();
            firing.add_due(&mut window, 10);
            firing.derive(&mut window, 10).expect("records");
            firing.refused(&window, &error);
        }
        // Whatever the last attempt was, the one after it is allowed.
        let mut fired = fire_despite(&mut firing, &error, &[]);
        fired.sort();
        assert_eq!(fired, ["a", "b"]);
    }
}
