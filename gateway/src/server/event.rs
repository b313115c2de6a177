//! An event on its way to browsers, and how it stands in the notifications topic: CloudEvents 1.0, Kafka binding in binary
//! mode, key = channel id.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::log::{ProducerRecord, Record};

/// The type of an event that does not name its own.
const DEFAULT_TYPE: &str = "message";

/// `ce_source` of events that Barnabas makes itself.
const SOURCE: &str = "/barnabas";

/// One event of a channel.
#[derive(Clone, Debug)]
pub struct Event {
    /// The channel that it is pushed to.
    pub channel: String,
    /// Unique in its source; a UUID v7 unless the producer chose one.
    pub id: String,
    /// What happened, such as `job.progress`.
    pub event_type: String,
    /// When, in milliseconds since the Unix epoch.
    pub time_ms: i64,
    /// What it is about: the job id for job events.
    pub subject: Option<String>,
    /// The payload, JSON text as it came.
    pub data: Option<Box<RawValue>>,
}

/// A record that cannot be shown as an event.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// The record has no key, or one that is not UTF-8.
    #[error("the record has no channel id as its key")]
    NoChannel,
    /// The value is not JSON.
    #[error("the value is not JSON: {0}")]
    NotJson(#[from] serde_json::Error),
}

impl Event {
    /// An event of now with a new id.
    pub fn new(channel: impl Into<String>, event_type: impl Into<String>) -> Self {
        Self {
            channel: channel.into(),
            id: Uuid::now_v7().to_string(),
            event_type: event_type.into(),
            time_ms: now_ms(),
            subject: None,
            data: None,
        }
    }

    /// The record that carries it.
    pub fn into_record(self, topic: &str) -> ProducerRecord {
        let mut record = ProducerRecord::to(topic)
            .key(self.channel)
            .timestamp_ms(self.time_ms)
            .header("ce_specversion", "1.0")
            .header("ce_id", self.id)
            .header("ce_source", SOURCE)
            .header("ce_type", self.event_type)
            .header("ce_time", rfc3339(self.time_ms));
        if let Some(subject) = self.subject {
            record = record.header("ce_subject", subject);
        }
        if let Some(data) = self.data {
            record = record
                .header("content-type", "application/json")
                .value(String::from(Box::<str>::from(data)));
        }
        record
    }

    /// Reads an event from a record of any producer: CloudEvents in binary mode, or plain JSON without headers, which is an
    /// object `{"type","data"?,"id"?,"subject"?}` or, having no `type`, the data itself. `id` is the producer's, else
    /// `fallback_id`, and the time is the record's.
    ///
    /// # Errors
    /// A record that has no channel as its key, or a value that is not JSON.
    pub fn from_record(record: &Record, fallback_id: impl FnOnce() -> String) -> Result<Self, EventError> {
        let channel = record
            .key
            .as_ref()
            .and_then(|key| std::str::from_utf8(key).ok())
            .ok_or(EventError::NoChannel)?;
        let header = |name| record.headers.last_str(name).map(str::to_owned);
        let value: Option<&Bytes> = record.value.as_ref().filter(|value| !value.is_empty());
        let mut event = Self {
            channel: channel.to_owned(),
            id: String::new(),
            event_type: DEFAULT_TYPE.to_owned(),
            time_ms: record.timestamp_ms,
            subject: header("ce_subject"),
            data: None,
        };
        let mut id = header("ce_id");
        if let Some(event_type) = header("ce_type") {
            event.event_type = event_type;
            event.data = value.map(|value| serde_json::from_slice(value)).transpose()?;
        } else if let Some(value) = value {
            match serde_json::from_slice::<PlainEvent>(value) {
                Ok(plain) => {
                    event.event_type = plain.event_type;
                    event.data = plain.data;
                    event.subject = plain.subject;
                    id = plain.id;
                }
                Err(_) => event.data = Some(serde_json::from_slice(value)?),
            }
        }
        event.id = id.unwrap_or_else(fallback_id);
        Ok(event)
    }
}

/// An event as a plain JSON record, or as a body of `POST /v1/channels/{channel}/events`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlainEvent {
    /// What happened.
    #[serde(rename = "type")]
    pub event_type: String,
    /// The payload.
    pub data: Option<Box<RawValue>>,
    /// Unique in its source.
    pub id: Option<String>,
    /// What it is about.
    pub subject: Option<String>,
}

/// Milliseconds since the Unix epoch, now.
pub fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_millis() as i64
}

/// A time in milliseconds since the Unix epoch as RFC 3339 in UTC, with milliseconds. What is before the year -9999 or after 9999
/// is the nearest time that is not.
pub fn rfc3339(time_ms: i64) -> String {
    let (earliest, latest) = (Timestamp::MIN.as_millisecond(), Timestamp::MAX.as_millisecond());
    let time = Timestamp::from_millisecond(time_ms.clamp(earliest, latest));
    format!("{:.3}", time.unwrap_or(Timestamp::UNIX_EPOCH))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Headers;

    fn read_back(record: ProducerRecord) -> Event {
        let record = Record {
            offset: 7,
            timestamp_ms: record.timestamp_ms.unwrap_or(0),
            key: record.key,
            value: record.value,
            headers: record.headers,
        };
        Event::from_record(&record, || "fallback".to_owned()).expect("an event")
    }

    #[test]
    fn an_event_survives_its_record() {
        let mut event = Event::new("c", "job.progress");
        event.subject = Some("job-1".to_owned());
        event.data = Some(RawValue::from_string(r#"{"rows":1}"#.to_owned()).expect("JSON"));
        let back = read_back(event.clone().into_record("notifications"));
        assert_eq!(
            (back.channel, back.id, back.event_type),
            (event.channel, event.id, event.event_type)
        );
        assert_eq!((back.time_ms, back.subject), (event.time_ms, event.subject));
        assert_eq!(back.data.expect("data").get(), r#"{"rows":1}"#);
    }

    #[test]
    fn plain_json_is_an_event_or_its_data() {
        let record = |value: &'static str| ProducerRecord::to("n").key("c").value(value);
        let event = read_back(record(r#"{"type":"greeting","data":[1],"id":"x"}"#));
        assert_eq!(
            (
                event.event_type.as_str(),
                event.id.as_str(),
                event.data.expect("data").get()
            ),
            ("greeting", "x", "[1]")
        );
        let event = read_back(record("[1]"));
        assert_eq!(
            (
                event.event_type.as_str(),
                event.id.as_str(),
                event.data.expect("data").get()
            ),
            ("message", "fallback", "[1]")
        );
    }

    #[test]
    fn a_value_that_is_not_json_is_refused() {
        let record = Record {
            offset: 0,
            timestamp_ms: 0,
            key: Some("c".into()),
            value: Some("{".into()),
            headers: Headers::new().with("ce_type", "t"),
        };
        assert!(matches!(
            Event::from_record(&record, String::new),
            Err(EventError::NotJson(_))
        ));
    }

    #[test]
    fn times_are_written_as_rfc_3339() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(rfc3339(1_795_443_296_789), "2026-11-23T14:14:56.789Z");
        assert_eq!(rfc3339(-1), "1969-12-31T23:59:59.999Z");
    }
}
