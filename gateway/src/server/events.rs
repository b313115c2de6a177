//! `POST /v1/channels/{channel}/events`: what a service has to say to a channel becomes records of the notifications topic.
//!
//! A body is one event or an array of them, plain or as CloudEvents 1.0 (structured, batch or binary mode). All events of a request
//! have one key, so they stand on one partition in their order. The answer comes when the log has acknowledged all of them;
//! of a request that fails, the first ones may have been written.

use std::collections::BTreeMap;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use http::{HeaderMap, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use tokio::time::timeout;

use super::body::{Incoming, media_type};
use super::channel_name::check_channel_name;
use super::event::{Event, PlainEvent};
use super::jobs::ProduceError;
use super::token::Token;
use super::trace::given_traceparent;
use super::{App, Error, TOKEN_HEADER};
use crate::log::{self, Appended, NextOffset, Producer, ProducerRecord};

/// Bytes of an attribute such as an event's type or id at most.
const MAX_ATTRIBUTE_BYTES: usize = 1024;

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/channels/{channel}/events", post(publish))
}

async fn publish(
    State(app): State<App>,
    Path(channel): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Error> {
    let mut incoming = Incoming::new(&headers, body, app.config.http.stall_timeout);
    let records = match receive(&app, &channel, query.as_deref(), &headers, &mut incoming).await {
        Ok(records) => records,
        Err(error) => {
            incoming.drain().await;
            return Err(error);
        }
    };
    let last = timeout(app.config.events.deadline, append_all(&app.producer, records))
        .await
        .map_err(|elapsed| Error::unavailable("log-unavailable", elapsed))??;
    let token = token_after(&app, &last);
    Ok((StatusCode::ACCEPTED, [(TOKEN_HEADER, token.to_string())]).into_response())
}

fn token_after(app: &App, appended: &Appended) -> Token {
    Token::at(
        app.notifications.id,
        appended.partition.partition,
        NextOffset::after(appended.offset),
    )
}

/// The records of a request, if nothing is wrong with it.
async fn receive(
    app: &App,
    channel: &str,
    query: Option<&str>,
    headers: &HeaderMap,
    incoming: &mut Incoming,
) -> Result<Vec<ProducerRecord>, Error> {
    check_channel_name(channel)?;
    if query.is_some_and(|query| !query.is_empty()) {
        return Err(Error::bad_request("bad-query", "posting events takes no query"));
    }
    let encoding = Encoding::of(headers)?;
    incoming.allow(app.config.events.max_body_bytes as u64)?;
    let body = incoming.read_all().await?;
    let mut records = encoding.records(&app.notifications.name, channel, headers, &body)?;
    if let Some(traceparent) = given_traceparent(headers) {
        for record in &mut records {
            record.headers.push("traceparent", traceparent.clone());
        }
    }
    Ok(records)
}

/// Publishes one plain event and returns the token just after it.
///
/// # Errors
/// 400 for an event that is not as it has to be, 503 when the log does not acknowledge it in time.
pub(super) async fn publish_one(app: &App, channel: &str, event: PlainEvent) -> Result<Token, Error> {
    check_channel_name(channel)?;
    let record = plain_record(&app.notifications.name, channel, event)?;
    let appended = timeout(app.config.events.deadline, append_all(&app.producer, vec![record])).await;
    let appended = appended.map_err(|elapsed| Error::unavailable("log-unavailable", elapsed))??;
    Ok(token_after(app, &appended))
}

/// Appends records in their order, and says where the last stands. When it returns none of them waits for the log any more.
pub(super) async fn append_all(producer: &Producer, records: Vec<ProducerRecord>) -> Result<Appended, Error> {
    // What is refused is refused whole, before the first is written.
    for record in &records {
        producer.check(record).await.map_err(refuse)?;
    }
    let mut deliveries = Vec::with_capacity(records.len());
    let mut failed = None;
    for record in records {
        match producer.send(record).await {
            Ok(delivery) => deliveries.push(delivery),
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    let mut last = None;
    for delivery in deliveries {
        match delivery.await {
            Ok(appended) => last = Some(appended),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    match failed {
        Some(error) => Err(refuse(error)),
        None => last.ok_or_else(|| Error::bad_request("no-event", "there is no event in the body")),
    }
}

/// The error of an append. An event that its topic does not take is the client's mistake.
pub(super) fn refuse(error: impl Into<ProduceError>) -> Error {
    match error.into() {
        ProduceError::Log(error @ log::Error::InvalidTopic { .. }) => {
            Error::bad_request("bad-event", error.to_string())
        }
        ProduceError::Log(log::Error::RecordTooLarge { max_bytes, .. }) => Error::refused(
            StatusCode::PAYLOAD_TOO_LARGE,
            "event-too-large",
            format!("an event is larger than {max_bytes} bytes"),
        ),
        error => error.into(),
    }
}

/// How events are written in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Plain,
    CloudEvent,
    CloudEventBatch,
    CloudEventBinary,
}

impl Encoding {
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Error> {
        let (media_type, charset) = media_type(headers);
        let is_json = media_type == "application/json" || media_type.ends_with("+json");
        let encoding = match media_type.as_str() {
            "application/cloudevents+json" => Self::CloudEvent,
            "application/cloudevents-batch+json" => Self::CloudEventBatch,
            // Data is optional, and so is its type then.
            _ if headers.contains_key("ce-specversion") && (is_json || media_type.is_empty()) => Self::CloudEventBinary,
            "application/json" => Self::Plain,
            _ => {
                return Err(Error::refused(
                    StatusCode::UNSUPPORTED_MEDIA_TYPE,
                    "content-type",
                    format!("events are application/json or application/cloudevents+json, not {media_type:?}"),
                ));
            }
        };
        check_charset(charset.as_deref())?;
        Ok(encoding)
    }

    fn records(
        self,
        topic: &str,
        channel: &str,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Result<Vec<ProducerRecord>, Error> {
        if self == Self::Plain {
            let events = one_or_several(body)?.into_iter();
            return events.map(|event| plain_record(topic, channel, event)).collect();
        }
        let events = self.cloud_events(headers, body)?.into_iter();
        Ok(events
            .map(|event| event.into_record(topic).key(channel.to_owned()))
            .collect())
    }

    /// The events of a body that is not plain.
    pub(super) fn cloud_events(self, headers: &HeaderMap, body: &[u8]) -> Result<Vec<CloudEvent>, Error> {
        match self {
            Self::Plain => Ok(Vec::new()),
            Self::CloudEvent => {
                let event: Structured = serde_json::from_slice(body).map_err(bad_json)?;
                Ok(vec![CloudEvent::structured(event)?])
            }
            Self::CloudEventBatch => {
                let events: Vec<Structured> = serde_json::from_slice(body).map_err(bad_json)?;
                events.into_iter().map(CloudEvent::structured).collect()
            }
            Self::CloudEventBinary => Ok(vec![CloudEvent::binary(headers, body)?]),
        }
    }
}

/// Events are text in UTF-8.
pub(super) fn check_charset(charset: Option<&str>) -> Result<(), Error> {
    match charset {
        None | Some("utf-8" | "utf8") => Ok(()),
        Some(charset) => Err(Error::refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "charset",
            format!("the charset must be utf-8, not {charset}"),
        )),
    }
}

pub(super) fn bad_json(error: serde_json::Error) -> Error {
    Error::bad_request("bad-event", error.to_string())
}

/// One plain event, or an array of them.
pub(super) fn one_or_several<T: DeserializeOwned>(body: &[u8]) -> Result<Vec<T>, Error> {
    if body.trim_ascii_start().starts_with(b"[") {
        return serde_json::from_slice(body).map_err(bad_json);
    }
    Ok(vec![serde_json::from_slice(body).map_err(bad_json)?])
}

/// The record of a plain event.
pub(super) fn plain_record(topic: &str, channel: &str, plain: PlainEvent) -> Result<ProducerRecord, Error> {
    check_attribute("type", &plain.event_type)?;
    let mut event = Event::new(channel, plain.event_type);
    if let Some(id) = plain.id {
        check_attribute("id", &id)?;
        event.id = id;
    }
    if let Some(subject) = &plain.subject {
        check_attribute("subject", subject)?;
    }
    event.subject = plain.subject;
    event.data = plain.data;
    Ok(event.into_record(topic))
}

/// An attribute's text, such as a type or an id, must be short and on one line.
pub(super) fn check_attribute(name: &str, value: &str) -> Result<(), Error> {
    if value.is_empty() || value.len() > MAX_ATTRIBUTE_BYTES || value.contains(char::is_control) {
        return Err(Error::bad_request(
            "bad-event",
            format!("{name} must have 1 to {MAX_ATTRIBUTE_BYTES} bytes and no control characters"),
        ));
    }
    Ok(())
}

/// A CloudEvent in structured mode, as it comes.
type Structured = BTreeMap<String, Box<RawValue>>;

/// A CloudEvent: its attributes by name, extensions among them, and its data.
pub(super) struct CloudEvent {
    attributes: BTreeMap<String, String>,
    data: Option<Vec<u8>>,
}

impl CloudEvent {
    fn structured(mut fields: Structured) -> Result<Self, Error> {
        let data = fields.remove("data").map(|data| data.get().as_bytes().to_vec());
        if fields.contains_key("data_base64") {
            return Err(Error::bad_request(
                "bad-event",
                "data must be JSON, data_base64 is not taken",
            ));
        }
        let mut attributes = BTreeMap::new();
        for (name, value) in fields {
            let value = match serde_json::from_str(value.get()).map_err(bad_json)? {
                serde_json::Value::Null => continue,
                serde_json::Value::String(text) => text,
                value @ (serde_json::Value::Bool(_) | serde_json::Value::Number(_)) => value.to_string(),
                _ => return Err(Error::bad_request("bad-event", format!("{name} must be a string"))),
            };
            attributes.insert(name, value);
        }
        // It is JSON here whatever it says, and the record's content type says so.
        attributes.remove("datacontenttype");
        Self { attributes, data }.checked()
    }

    fn binary(headers: &HeaderMap, body: &[u8]) -> Result<Self, Error> {
        let mut attributes = BTreeMap::new();
        for (name, value) in headers {
            if let Some(name) = name.as_str().strip_prefix("ce-") {
                let value = percent_decoded(value.as_bytes())
                    .ok_or_else(|| Error::bad_request("bad-event", format!("ce-{name} is not UTF-8")))?;
                attributes.insert(name.to_owned(), value);
            }
        }
        let data = (!body.is_empty())
            .then(|| serde_json::from_slice::<&RawValue>(body).map(|data| data.get().as_bytes().to_vec()))
            .transpose()
            .map_err(bad_json)?;
        Self { attributes, data }.checked()
    }

    fn checked(self) -> Result<Self, Error> {
        for (name, value) in &self.attributes {
            let is_name = !name.is_empty()
                && name.len() <= 64
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            if !is_name {
                return Err(Error::bad_request(
                    "bad-event",
                    format!("{name:?} is not a CloudEvents attribute"),
                ));
            }
            check_attribute(name, value)?;
        }
        for required in ["id", "source", "specversion", "type"] {
            if !self.attributes.contains_key(required) {
                return Err(Error::bad_request("bad-event", format!("{required} is missing")));
            }
        }
        if self.attributes["specversion"] != "1.0" {
            return Err(Error::bad_request("bad-event", "specversion must be 1.0"));
        }
        Ok(self)
    }

    /// An attribute's value.
    pub(super) fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }

    /// The record that carries it, without a key.
    pub(super) fn into_record(self, topic: &str) -> ProducerRecord {
        let mut record = ProducerRecord::to(topic);
        for (name, value) in self.attributes {
            record = record.header(format!("ce_{name}"), value);
        }
        if let Some(data) = self.data {
            record = record.header("content-type", "application/json").value(data);
        }
        record
    }
}

/// A header's value as CloudEvents' HTTP binding writes it.
fn percent_decoded(value: &[u8]) -> Option<String> {
    let hex = |digit: u8| char::from(digit).to_digit(16);
    let mut decoded = Vec::with_capacity(value.len());
    let mut rest = value;
    while let Some(first) = rest.first() {
        let (byte, len) = match rest {
            [b'%', high, low, ..] => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => ((high * 16 + low) as u8, 3),
                _ => (b'%', 1),
            },
            _ => (*first, 1),
        };
        decoded.push(byte);
        rest = &rest[len..];
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Record;

    fn headers(given: &[(&'static str, &str)]) -> HeaderMap {
        given
            .iter()
            .map(|(name, value)| (name.parse().expect("a name"), value.parse().expect("a value")))
            .collect()
    }

    /// The events that a request makes, as a feed reads them from the log.
    fn events(given: &[(&'static str, &str)], body: &str) -> Result<Vec<Event>, Error> {
        let headers = headers(given);
        let records = Encoding::of(&headers)?.records("n", "c", &headers, body.as_bytes())?;
        let read = |record: ProducerRecord| Record {
            offset: 0,
            timestamp_ms: 0,
            key: record.key,
            value: record.value,
            headers: record.headers,
        };
        Ok(records
            .into_iter()
            .map(|record| Event::from_record(&read(record), String::new).expect("an event"))
            .collect())
    }

    fn summary(event: &Event) -> (&str, &str, Option<&str>, Option<&str>) {
        let data = event.data.as_ref().map(|data| data.get());
        (&event.id, &event.event_type, event.subject.as_deref(), data)
    }

    const JSON: &[(&str, &str)] = &[("content-type", "application/json; charset=UTF-8")];

    #[test]
    fn one_event_or_several_in_order() {
        let one = events(JSON, r#"{"type":"t","id":"1","subject":"s","data":{"a": 1}}"#).expect("an event");
        assert_eq!(summary(&one[0]), ("1", "t", Some("s"), Some(r#"{"a": 1}"#)));
        let several = events(JSON, r#" [{"type":"a","id":"1"},{"type":"b","id":"2"}]"#).expect("events");
        let types: Vec<_> = several.iter().map(|event| event.event_type.as_str()).collect();
        assert_eq!(types, ["a", "b"]);
        assert_eq!(one[0].channel, "c");
    }

    #[test]
    fn what_is_not_an_event_is_refused() {
        for body in [
            r#"{"type":"t","dta":1}"#,
            r#"{"data":1}"#,
            r#"{"type":""}"#,
            r#"{"type":"t","id":""}"#,
            r#"{"type":"t\nx"}"#,
            r#"{"type":"t"} {"type":"t"}"#,
            "\"t\"",
            "",
        ] {
            let error = events(JSON, body).expect_err(body);
            assert_eq!(
                (error.status(), error.code()),
                (StatusCode::BAD_REQUEST, "bad-event"),
                "{body}"
            );
        }
        for media_type in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/json; charset=latin1",
            "",
        ] {
            let error = events(&[("content-type", media_type)], r#"{"type":"t"}"#).expect_err(media_type);
            assert_eq!(error.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE, "{media_type}");
        }
    }

    #[test]
    fn cloud_events_come_in_three_ways() {
        let body = r#"{"specversion":"1.0","id":"1","source":"/x","type":"t","subject":"s","rank":7,"data":[1]}"#;
        let expected = ("1", "t", Some("s"), Some("[1]"));
        let one = events(&[("content-type", "application/cloudevents+json")], body).expect("an event");
        assert_eq!(summary(&one[0]), expected);
        let batch = &[("content-type", "application/cloudevents-batch+json")];
        let two = events(batch, &format!("[{body},{body}]")).expect("events");
        assert_eq!((two.len(), summary(&two[1])), (2, expected));
        let binary = &[
            ("content-type", "application/json"),
            ("ce-specversion", "1.0"),
            ("ce-id", "1"),
            ("ce-source", "/x"),
            ("ce-type", "t"),
            ("ce-subject", "s"),
        ];
        assert_eq!(summary(&events(binary, "[1]").expect("an event")[0]), expected);
        assert_eq!(
            summary(&events(&binary[1..], "").expect("an event")[0]),
            ("1", "t", Some("s"), None)
        );
    }

    #[test]
    fn a_cloud_event_keeps_all_its_attributes() {
        let headers = headers(&[
            ("content-type", "application/json"),
            ("ce-specversion", "1.0"),
            ("ce-id", "1"),
            ("ce-source", "/%C3%A9%20x%2"),
            ("ce-type", "t"),
            ("ce-time", "2026-01-01T00:00:00Z"),
            ("ce-rank", "7"),
        ]);
        let record = &Encoding::of(&headers)
            .and_then(|e| e.records("n", "c", &headers, b"1"))
            .expect("a record")[0];
        for (name, value) in [
            ("ce_source", "/é x%2"),
            ("ce_time", "2026-01-01T00:00:00Z"),
            ("ce_rank", "7"),
            ("content-type", "application/json"),
        ] {
            assert_eq!(record.headers.last_str(name), Some(value), "{name}");
        }
    }

    #[test]
    fn an_incomplete_cloud_event_is_refused() {
        let media_type = &[("content-type", "application/cloudevents+json")];
        for body in [
            r#"{"specversion":"1.0","id":"1","type":"t"}"#,
            r#"{"specversion":"0.3","id":"1","source":"/x","type":"t"}"#,
            r#"{"specversion":"1.0","id":"1","source":"/x","type":"t","data_base64":"AA=="}"#,
            r#"{"specversion":"1.0","id":"1","source":"/x","type":"t","Big":"x"}"#,
            r#"{"specversion":"1.0","id":"1","source":"/x","type":{}}"#,
        ] {
            assert_eq!(events(media_type, body).expect_err(body).code(), "bad-event", "{body}");
        }
    }
}
