//! A schedule as it stands on the log, on the topic of commands as on that of schedules: the key is its id, the value its event's,
//! the headers are the envelope and those of its event. No value: it is cancelled, or over.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Cron, DUE_MS, Error, MAX_ID_BYTES, SCHEDULE_ID};
use crate::log::{Headers, ProducerRecord, Record};

/// The header of a schedule with everything of it but its id and what the event's record has.
const ENVELOPE: &str = "bn-schedule";

/// The header with the key of the event's record, if it has one.
const EVENT_KEY: &str = "bn-schedule-key";

/// A schedule that waits for its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Its id.
    pub id: Arc<str>,
    /// When it fires next, in milliseconds since the Unix epoch; [`NEVER_MS`] for one whose event was refused.
    pub due_ms: i64,
    /// When it fires again.
    pub cron: Option<Cron>,
    /// The event.
    pub event: ProducerRecord,
    /// Why the event could not be produced. It fires no more until it is submitted again.
    pub refused: Option<String>,
}

/// The due time of what does not fire.
pub const NEVER_MS: i64 = i64::MAX;

#[derive(Serialize, Deserialize)]
struct Envelope {
    due_ms: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cron: Option<Cron>,
    topic: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    partition: Option<i32>,
    /// The event has no value: a tombstone for its topic.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_tombstone: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

impl Pending {
    /// As a record for one of the topics.
    pub(super) fn to_record(&self, topic: &str) -> Result<ProducerRecord, Error> {
        let envelope = Envelope {
            due_ms: self.due_ms,
            cron: self.cron.clone(),
            topic: self.event.topic.to_string(),
            partition: self.event.partition,
            is_tombstone: self.event.value.is_none(),
            refused: self.refused.clone(),
        };
        let mut record = over(topic, &self.id).header(ENVELOPE, serde_json::to_vec(&envelope)?);
        if let Some(key) = &self.event.key {
            record.headers.push(EVENT_KEY, key.clone());
        }
        for (name, value) in own_headers(&self.event.headers) {
            record.headers.push(name, value.clone());
        }
        record.value = Some(self.event.value.clone().unwrap_or_default());
        Ok(record)
    }

    /// From a record: the id, and the schedule unless it is over.
    pub(super) fn from_record(record: &Record) -> Result<(&str, Option<Self>), String> {
        let id = record.key.as_ref().ok_or("it has no key")?;
        let id = std::str::from_utf8(id).map_err(|_| "its key is not UTF-8")?;
        // It is noted beside offsets, where there is little room.
        if id.len() > MAX_ID_BYTES {
            return Err(format!("its key has more than {MAX_ID_BYTES} bytes"));
        }
        let Some(value) = &record.value else {
            return Ok((id, None));
        };
        let envelope = record.headers.last(ENVELOPE).ok_or("it has no header bn-schedule")?;
        let envelope: Envelope = serde_json::from_slice(envelope).map_err(|error| error.to_string())?;
        let mut event = ProducerRecord::to(envelope.topic);
        event.partition = envelope.partition;
        event.key = record.headers.last(EVENT_KEY).cloned();
        event.value = (!envelope.is_tombstone).then(|| value.clone());
        for (name, value) in own_headers(&record.headers) {
            event.headers.push(name, value.clone());
        }
        let pending = Self {
            id: id.into(),
            due_ms: envelope.due_ms,
            cron: envelope.cron,
            event,
            refused: envelope.refused,
        };
        Ok((id, Some(pending)))
    }

    /// It fires no more, for this reason.
    pub(super) fn refuse(&mut self, reason: String) {
        self.due_ms = NEVER_MS;
        self.refused = Some(reason);
    }

    /// The event as it is produced for a due time. A CloudEvent of a schedule that comes again has an id of its own each time, or
    /// consumers would take it for the same, and every one the time at which it was due.
    pub(super) fn event_due(&self, due_ms: i64) -> ProducerRecord {
        let mut event = self.event.clone();
        event.headers = Headers::new();
        for (name, value) in self.event.headers.iter() {
            match (name, &self.cron) {
                ("ce_id", Some(_)) => {
                    let id = format!("{}/{due_ms}", String::from_utf8_lossy(value));
                    event.headers.push(name, id);
                }
                ("ce_time", _) => event.headers.push(name, rfc3339(due_ms)),
                (DUE_MS | SCHEDULE_ID, _) => {}
                _ => event.headers.push(name, value.clone()),
            }
        }
        event
            .header(SCHEDULE_ID, self.id.to_string())
            .header(DUE_MS, due_ms.to_string())
    }

    /// What it is taken to hold in memory.
    pub(super) fn size_bytes(&self) -> usize {
        /// Beside what can be counted: the entries of two maps, and a record's parts.
        const OVERHEAD_BYTES: usize = 512;
        let cron = self
            .cron
            .as_ref()
            .map_or(0, |cron| cron.expression().len() + cron.time_zone().len());
        OVERHEAD_BYTES + self.id.len() + self.event.topic.len() + self.event.size_bytes() + cron
    }
}

/// The record that says that a schedule is over, or shall be.
pub(super) fn over(topic: &str, id: &str) -> ProducerRecord {
    ProducerRecord::to(topic).key(id.to_owned())
}

/// The event's own among the headers of a schedule.
fn own_headers(headers: &Headers) -> impl Iterator<Item = (&str, &Bytes)> {
    headers
        .iter()
        .filter(|(name, _)| *name != ENVELOPE && *name != EVENT_KEY)
}

fn rfc3339(time_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(time_ms).map_or_else(|_| String::new(), |time| format!("{time:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(cron: Option<Cron>) -> Pending {
        let event = ProducerRecord::to("renewals")
            .partition(2)
            .key(vec![0xff])
            .value("{}")
            .header("ce_id", "7")
            .header("ce_time", "2020-01-01T00:00:00Z")
            .header("x", vec![0xfe]);
        Pending {
            id: "ada".into(),
            due_ms: 1_767_225_600_000,
            cron,
            event,
            refused: None,
        }
    }

    fn read(record: ProducerRecord) -> Record {
        Record {
            offset: 0,
            timestamp_ms: 0,
            key: record.key,
            value: record.value,
            headers: record.headers,
        }
    }

    #[test]
    fn a_schedule_is_read_as_it_was_written() {
        let mut schedules = vec![
            pending(None),
            pending(Some(Cron::new("0 0 1 * *", "UTC").expect("cron"))),
        ];
        schedules.push(Pending {
            event: ProducerRecord::to("compacted").key("gone"),
            refused: Some("too large".to_owned()),
            ..pending(None)
        });
        schedules.push(Pending {
            event: ProducerRecord::to("keyless").value(""),
            ..pending(None)
        });
        for schedule in schedules {
            let record = read(schedule.to_record("schedules").expect("a record"));
            assert_eq!(Pending::from_record(&record), Ok(("ada", Some(schedule))));
        }
        assert_eq!(Pending::from_record(&read(over("schedules", "ada"))), Ok(("ada", None)));
    }

    #[test]
    fn each_time_of_a_cron_schedule_is_an_event_of_its_own() {
        let once = pending(None).event_due(1_767_225_600_000);
        assert_eq!(once.headers.last_str("ce_id"), Some("7"));
        assert_eq!(once.headers.last_str("ce_time"), Some("2026-01-01T00:00:00.000Z"));
        assert_eq!(once.headers.last_str(DUE_MS), Some("1767225600000"));
        assert_eq!(once.headers.last_str(SCHEDULE_ID), Some("ada"));
        assert_eq!(once.headers.last("x").map(|value| &value[..]), Some(&[0xfe][..]));
        let again = pending(Some(Cron::new("0 0 1 * *", "UTC").expect("cron"))).event_due(1_767_225_600_000);
        assert_eq!(again.headers.last_str("ce_id"), Some("7/1767225600000"));
    }
}
