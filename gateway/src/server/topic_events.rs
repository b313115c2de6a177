//! `POST /v1/topics/{topic}/events`: events become records of a topic that is open for posting, for the services behind it.
//!
//! A body is one event or an array of them: `{"type","data"?,"id"?,"subject"?,"partitionkey"?}`, or CloudEvents 1.0 (structured,
//! batch or binary mode). A record's key is the event's `partitionkey`; without one the partitions take turns. The answer comes
//! when the log has acknowledged all of them. Of a request that fails, the first ones may have been written; with an
//! `Idempotency-Key` all are written at once, and once.

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::routing::post;
use http::{HeaderMap, Method, StatusCode, Uri};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::timeout;

use super::body::Incoming;
use super::event::PlainEvent;
use super::events::{CloudEvent, Encoding, append_all, check_attribute, one_or_several, plain_record};
use super::idempotency::{Fingerprinter, IdempotencyKey, Work};
use super::trace::given_traceparent;
use super::{App, Error};
use crate::log::ProducerRecord;

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/topics/{topic}/events", post(publish))
}

async fn publish(
    State(app): State<App>,
    Path(topic): Path<String>,
    RawQuery(query): RawQuery,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Error> {
    let mut incoming = Incoming::new(&headers, body, app.config.http.stall_timeout);
    let received = async {
        let key = IdempotencyKey::of(&headers)?;
        if key.is_some() {
            incoming.fingerprint(Fingerprinter::new(&method, &uri, &headers));
        }
        Ok((
            receive(&app, &topic, query.as_deref(), &headers, &mut incoming).await?,
            key,
        ))
    };
    let (records, key) = match received.await {
        Ok(received) => received,
        Err(error) => {
            incoming.drain().await;
            return Err(error);
        }
    };
    let deadline = app.config.events.deadline;
    let request = key
        .zip(incoming.take_fingerprint())
        .map(|(key, print)| key.request(print));
    match request {
        Some(request) => {
            app.idempotency.answer(request, Work::Events(records), deadline).await?;
        }
        None => {
            let appended = timeout(deadline, append_all(&app, records)).await;
            appended.map_err(|elapsed| Error::unavailable("log-unavailable", elapsed))??;
        }
    }
    Ok(StatusCode::ACCEPTED)
}

/// The records of a request, if nothing is wrong with it.
async fn receive(
    app: &App,
    topic: &str,
    query: Option<&str>,
    headers: &HeaderMap,
    incoming: &mut Incoming,
) -> Result<Vec<ProducerRecord>, Error> {
    if !app.config.events.topics.iter().any(|open| open == topic) {
        return Err(Error::not_found(
            "unknown-topic",
            format!("there is no topic {topic:?} that is open for posting"),
        ));
    }
    if query.is_some_and(|query| !query.is_empty()) {
        return Err(Error::bad_request("bad-query", "posting events takes no query"));
    }
    let encoding = Encoding::of(headers)?;
    incoming.allow(app.config.events.max_body_bytes as u64)?;
    let body = incoming.read_all().await?;
    let mut records = records(encoding, topic, headers, &body)?;
    if records.is_empty() {
        return Err(Error::bad_request("no-event", "there is no event in the body"));
    }
    if let Some(traceparent) = given_traceparent(headers) {
        for record in &mut records {
            record.headers.push("traceparent", traceparent.clone());
        }
    }
    Ok(records)
}

fn records(encoding: Encoding, topic: &str, headers: &HeaderMap, body: &[u8]) -> Result<Vec<ProducerRecord>, Error> {
    if encoding == Encoding::Plain {
        let events = one_or_several::<TopicEvent>(body)?.into_iter();
        return events.map(|event| event.into_record(topic)).collect();
    }
    let events = encoding.cloud_events(headers, body)?.into_iter();
    let record = |event: CloudEvent| {
        let key = event.attribute("partitionkey").map(|key| key.to_owned().into());
        let mut record = event.into_record(topic);
        record.key = key;
        record
    };
    Ok(events.map(record).collect())
}

/// A plain event of a topic.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TopicEvent {
    #[serde(rename = "type")]
    event_type: String,
    data: Option<Box<RawValue>>,
    id: Option<String>,
    subject: Option<String>,
    /// What must stay in order has the same.
    partitionkey: Option<String>,
}

impl TopicEvent {
    fn into_record(self, topic: &str) -> Result<ProducerRecord, Error> {
        if let Some(key) = &self.partitionkey {
            check_attribute("partitionkey", key)?;
        }
        let event = PlainEvent {
            event_type: self.event_type,
            data: self.data,
            id: self.id,
            subject: self.subject,
        };
        let mut record = plain_record(topic, "", event)?;
        record.key = self.partitionkey.map(Into::into);
        Ok(record)
    }
}
