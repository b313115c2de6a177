//! `POST /v1/topics/{topic}/events`: events become records of a topic that is open for posting, for the services behind it.
//!
//! A body is one event or an array of them: `{"type","data"?,"id"?,"subject"?,"partitionkey"?}`, or one on each line (NDJSON, also as
//! `navigator.sendBeacon` sends text), or CloudEvents 1.0 (structured, batch or binary mode). A record's key is the event's
//! `partitionkey`; without one the partitions take turns. The answer comes when the log has acknowledged all of them. Of a request that
//! is refused nothing is written; of one that fails with 503, the first ones may have been; with an `Idempotency-Key` all are written at
//! once, and once.
//!
//! Invariant: the events that wait for the log have no more than `events.queue_bytes` together. Past it a request is refused whole, at
//! once, with 429: nothing is dropped that was taken, and nothing waits to be taken.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::routing::post;
use http::{HeaderMap, Method, StatusCode, Uri};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::timeout;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::body::{Incoming, media_type};
use super::config::{EventsConfig, ProducerProfile};
use super::event::PlainEvent;
use super::events::{
    CloudEvent, Encoding, append_all, bad_json, check_attribute, check_charset, one_or_several, plain_record,
};
use super::idempotency::{Fingerprinter, IdempotencyKey, Work};
use super::trace::given_traceparent;
use super::{App, Error};
use crate::log::{self, Log, Producer, ProducerRecord, ProducerSettings};

/// What a record is taken to hold beside its key, value and headers.
const OVERHEAD_BYTES: usize = 256;

/// The topics that are open for posting, and the room for what waits for the log.
#[derive(Debug)]
pub struct TopicEvents {
    producers: BTreeMap<String, Producer>,
    queue: Arc<Semaphore>,
    queue_bytes: u32,
}

impl TopicEvents {
    /// Readies a producer for each profile that is asked for. `commands` is the one of the profile `command`.
    pub(super) async fn start(config: &EventsConfig, log: &Log, commands: &Producer) -> log::Result<Self> {
        let mut telemetry = None;
        let mut producers = BTreeMap::new();
        for topic in &config.topics {
            // Theirs whose events they are: they are not made here.
            log.describe_topic(&topic.name).await?;
            let producer = match (topic.profile, &telemetry) {
                (ProducerProfile::Command, _) => commands.clone(),
                (ProducerProfile::Telemetry, Some(producer)) => Producer::clone(producer),
                (ProducerProfile::Telemetry, None) => {
                    let producer = log.producer(ProducerSettings::telemetry()).await?;
                    telemetry.insert(producer).clone()
                }
            };
            producers.insert(topic.name.clone(), producer);
        }
        Ok(Self {
            producers,
            queue: Arc::new(Semaphore::new(config.queue_bytes as usize)),
            queue_bytes: config.queue_bytes,
        })
    }

    /// The producer of a topic.
    ///
    /// # Errors
    /// The topic is not open for posting.
    pub(super) fn producer(&self, topic: &str) -> Result<&Producer, Error> {
        self.producers.get(topic).ok_or_else(|| {
            Error::not_found(
                "unknown-topic",
                format!("there is no topic {topic:?} that is open for posting"),
            )
        })
    }

    /// Room for these records, until they are acknowledged. Those that are more than all the room have it for themselves.
    fn room(&self, records: &[ProducerRecord]) -> Result<OwnedSemaphorePermit, Error> {
        let bytes: usize = records.iter().map(|record| OVERHEAD_BYTES + record.size_bytes()).sum();
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.queue_bytes);
        let room = self.queue.clone().try_acquire_many_owned(bytes);
        room.map_err(|_| Error::QueueFull("too many events wait for the log; none of these was taken".to_owned()))
    }
}

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
    let room = app.topic_events.room(&records)?;
    let deadline = app.config.events.deadline;
    let request = key
        .zip(incoming.take_fingerprint())
        .map(|(key, print)| key.request(print));
    match request {
        Some(request) => {
            let work = Work::Events { records, _room: room };
            app.idempotency.answer(request, work, deadline).await?;
        }
        None => {
            let producer = app.topic_events.producer(&topic)?.clone();
            // They wait for the log, and need their room, also when nobody waits for the answer any more.
            let appending = app.tasks.spawn(async move {
                let appended = append_all(&producer, records).await;
                drop(room);
                appended
            });
            let appended = timeout(deadline, appending).await;
            let appended = appended.map_err(|elapsed| Error::unavailable("log-unavailable", elapsed))?;
            appended.map_err(Error::internal)??;
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
    app.topic_events.producer(topic)?;
    if query.is_some_and(|query| !query.is_empty()) {
        return Err(Error::bad_request("bad-query", "posting events takes no query"));
    }
    let form = Form::of(headers)?;
    incoming.allow(app.config.events.max_body_bytes as u64)?;
    let body = incoming.read_all().await?;
    let mut records = form.records(topic, headers, &body)?;
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

/// How events are written in a request.
enum Form {
    /// A plain event on each line.
    Lines,
    /// As for channels.
    Other(Encoding),
}

impl Form {
    fn of(headers: &HeaderMap) -> Result<Self, Error> {
        match media_type(headers) {
            (media_type, charset) if ["application/x-ndjson", "text/plain"].contains(&media_type.as_str()) => {
                check_charset(charset.as_deref())?;
                Ok(Self::Lines)
            }
            _ => Encoding::of(headers).map(Self::Other),
        }
    }

    fn records(self, topic: &str, headers: &HeaderMap, body: &[u8]) -> Result<Vec<ProducerRecord>, Error> {
        match self {
            Self::Lines => lines(topic, body),
            Self::Other(Encoding::Plain) => {
                let events = one_or_several::<TopicEvent>(body)?.into_iter();
                events.map(|event| event.into_record(topic)).collect()
            }
            Self::Other(encoding) => {
                let events = encoding.cloud_events(headers, body)?.into_iter();
                let record = |event: CloudEvent| {
                    let key = event.attribute("partitionkey").map(|key| key.to_owned().into());
                    let mut record = event.into_record(topic);
                    record.key = key;
                    record
                };
                Ok(events.map(record).collect())
            }
        }
    }
}

/// The record of each line that is not empty. The first that is no event is named, and nothing is taken.
fn lines(topic: &str, body: &[u8]) -> Result<Vec<ProducerRecord>, Error> {
    let lines = body.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).zip(1..);
    let record = |(line, number): (&[u8], u64)| {
        let event: Result<TopicEvent, _> = serde_json::from_slice(line);
        let record = event.map_err(bad_json).and_then(|event| event.into_record(topic));
        record.map_err(|error| error.at_line(number))
    };
    lines.filter(|(line, _)| !line.is_empty()).map(record).collect()
}

/// A plain event of a topic.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TopicEvent {
    #[serde(rename = "type")]
    pub(super) event_type: String,
    pub(super) data: Option<Box<RawValue>>,
    pub(super) id: Option<String>,
    pub(super) subject: Option<String>,
    /// What must stay in order has the same.
    pub(super) partitionkey: Option<String>,
}

impl TopicEvent {
    pub(super) fn into_record(self, topic: &str) -> Result<ProducerRecord, Error> {
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
