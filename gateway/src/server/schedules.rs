//! `/v1/schedules`: an event is posted now and becomes a record of its topic at a time, after a delay, or at each time of a cron
//! expression. The gateways fire what is due ([`crate::patterns::schedule`]).
//!
//! A schedule's event goes to a topic that is open for posting, as with `POST /v1/topics/{topic}/events`. An id names a schedule:
//! posting another with the same id replaces it, so a request that had no answer is repeated with the same id.
//!
//! There are schedules where there is a topic that is open for posting; a node that has `schedules.fire = false` takes them, and leaves
//! firing them to others.

use std::time::{Duration, SystemTime};

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use data_encoding::BASE64URL_NOPAD;
use http::{HeaderMap, StatusCode, header};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use uuid::Uuid;

use super::body::Incoming;
use super::event::rfc3339;
use super::events::Encoding;
use super::topic_events::TopicEvent;
use super::trace::given_traceparent;
use super::{App, Error};
use crate::log;
use crate::patterns;
use crate::patterns::schedule::{self, Cron, NEVER_MS, Pending, Schedule, Scheduler, SchedulerSettings, When};

/// Schedules of a page, if the client does not say, and at most.
const PAGE: (usize, usize) = (100, 1000);

/// Look-ups at a time: each reads a partition, or the topic. More wait.
const LOOKS: usize = 4;

/// The longest delay that is taken, a hundred years.
const MAX_AFTER_S: u64 = 100 * 366 * 24 * 60 * 60;

/// Takes schedules in, and looks them up.
#[derive(Debug)]
pub struct Schedules {
    scheduler: Scheduler,
    looks: Semaphore,
}

impl Schedules {
    pub(super) fn new(scheduler: Scheduler) -> Self {
        Self {
            scheduler,
            looks: Semaphore::new(LOOKS),
        }
    }
}

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/schedules", post(submit).get(list))
        .route("/v1/schedules/{id}", get(look_up).delete(cancel))
}

/// Fires what is due. Without it no schedule would fire, so when it cannot go on the gateway stops.
pub(super) async fn fire(app: App) {
    let settings = SchedulerSettings::new(app.config.topics.schedules());
    if let Err(error) = schedule::run(app.log.clone(), settings, app.stopping.clone()).await {
        tracing::error!(%error, "schedules cannot be fired any more, the gateway stops: {error}");
        app.stopping.cancel();
    }
}

/// A schedule as it is posted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PostedSchedule {
    id: Option<String>,
    /// RFC 3339.
    at: Option<String>,
    after_s: Option<u64>,
    cron: Option<String>,
    time_zone: Option<String>,
    event: PostedEvent,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PostedEvent {
    topic: String,
    #[serde(rename = "type")]
    event_type: String,
    data: Option<Box<RawValue>>,
    id: Option<String>,
    subject: Option<String>,
    partitionkey: Option<String>,
}

/// A schedule as it is shown.
#[derive(Debug, Serialize)]
struct ShownSchedule<'a> {
    id: &'a str,
    /// `None` for one that fires no more.
    due: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cron: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_zone: Option<&'a str>,
    /// Why its event could not be produced.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<&'a str>,
    event: ShownEvent<'a>,
}

#[derive(Debug, Serialize)]
struct ShownEvent<'a> {
    topic: &'a str,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    event_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    partitionkey: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a RawValue>,
}

impl<'a> ShownSchedule<'a> {
    fn of(pending: &'a Pending) -> Self {
        let event = &pending.event;
        let text = |bytes: &'a bytes::Bytes| std::str::from_utf8(bytes).ok();
        Self {
            id: &pending.id,
            due: (pending.due_ms != NEVER_MS).then(|| rfc3339(pending.due_ms)),
            cron: pending.cron.as_ref().map(Cron::expression),
            time_zone: pending.cron.as_ref().map(Cron::time_zone),
            refused: pending.refused.as_deref(),
            event: ShownEvent {
                topic: &event.topic,
                event_type: event.headers.last_str("ce_type"),
                subject: event.headers.last_str("ce_subject"),
                partitionkey: event.key.as_ref().and_then(text),
                data: event
                    .value
                    .as_ref()
                    .and_then(|value| serde_json::from_slice(value).ok()),
            },
        }
    }
}

async fn submit(State(app): State<App>, headers: HeaderMap, body: Body) -> Result<Response, Error> {
    let mut incoming = Incoming::new(&headers, body, app.config.http.stall_timeout);
    let schedule = match receive(&app, &headers, &mut incoming).await {
        Ok(schedule) => schedule,
        Err(error) => {
            incoming.drain().await;
            return Err(error);
        }
    };
    let submitted = app.schedules()?.scheduler.submit(schedule);
    let submitted = within_deadline(&app, submitted).await?;
    let location = format!("/v1/schedules/{}", path_segment(&submitted.id));
    let shown = Json(ShownSchedule::of(&submitted)).into_response();
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)], shown).into_response())
}

/// The schedule of a request, if nothing is wrong with it.
async fn receive(app: &App, headers: &HeaderMap, incoming: &mut Incoming) -> Result<Schedule, Error> {
    if headers.contains_key("idempotency-key") {
        let detail = "a schedule is posted again with the same id, not with an Idempotency-Key";
        return Err(Error::bad_request("bad-idempotency-key", detail));
    }
    if Encoding::of(headers)? != Encoding::Plain {
        let detail = "a schedule is application/json";
        return Err(Error::refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "content-type",
            detail,
        ));
    }
    incoming.allow(app.config.events.max_body_bytes as u64)?;
    let body = incoming.read_all().await?;
    let posted: PostedSchedule =
        serde_json::from_slice(&body).map_err(|error| Error::bad_request("bad-schedule", error.to_string()))?;
    let when = when(&posted)?;
    let PostedEvent {
        topic,
        event_type,
        data,
        id,
        subject,
        partitionkey,
    } = posted.event;
    app.topic_events.producer(&topic)?;
    let event = TopicEvent {
        event_type,
        data,
        id,
        subject,
        partitionkey,
    };
    let mut event = event.into_record(&topic)?;
    if let Some(traceparent) = given_traceparent(headers) {
        event.headers.push("traceparent", traceparent);
    }
    Ok(Schedule {
        id: posted.id.unwrap_or_else(|| Uuid::now_v7().to_string()),
        when,
        event,
    })
}

fn when(posted: &PostedSchedule) -> Result<When, Error> {
    let bad_when = |detail: &str| Error::bad_request("bad-when", detail);
    if posted.time_zone.is_some() && posted.cron.is_none() {
        return Err(bad_when("time_zone goes with cron; a time in `at` has its offset"));
    }
    match (&posted.at, posted.after_s, &posted.cron) {
        (Some(at), None, None) => {
            let time: Timestamp = at.parse().map_err(|error| {
                Error::bad_request(
                    "bad-time",
                    format!("at must be a time as in RFC 3339, with its offset: {error}"),
                )
            })?;
            let since = Duration::from_millis(u64::try_from(time.as_millisecond()).unwrap_or(0));
            Ok(When::At(SystemTime::UNIX_EPOCH + since))
        }
        (None, Some(after_s), None) if after_s <= MAX_AFTER_S => Ok(When::After(Duration::from_secs(after_s))),
        (None, Some(_), None) => Err(Error::bad_request("bad-time", "after_s is at most a hundred years")),
        (None, None, Some(cron)) => {
            let time_zone = posted.time_zone.as_deref().unwrap_or("UTC");
            Cron::new(cron, time_zone).map(When::Cron).map_err(refuse)
        }
        _ => Err(bad_when("one of at, after_s and cron must be given")),
    }
}

async fn cancel(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, Error> {
    within_deadline(&app, app.schedules()?.scheduler.cancel(&id)).await?;
    Ok(StatusCode::ACCEPTED)
}

async fn look_up(State(app): State<App>, Path(id): Path<String>) -> Result<Response, Error> {
    let schedules = app.schedules()?;
    let look = async {
        let _permit = schedules.looks.acquire().await;
        schedules.scheduler.get(&id).await
    };
    match within_deadline(&app, look).await? {
        Some(pending) => Ok(Json(ShownSchedule::of(&pending)).into_response()),
        None => Err(Error::not_found(
            "unknown-schedule",
            format!("there is no schedule {id:?}"),
        )),
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PageQuery {
    limit: Option<usize>,
    after: Option<String>,
    /// Begin with those whose event was refused, which come last.
    #[serde(default)]
    refused: bool,
}

#[derive(Debug, Serialize)]
struct ShownPage<'a> {
    schedules: Vec<ShownSchedule<'a>>,
    /// What `after` is for the next page; null at the end.
    next: Option<String>,
}

async fn list(
    State(app): State<App>,
    query: Result<Query<PageQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Error> {
    let bad_query = |detail: String| Error::bad_request("bad-query", detail);
    let Query(query) = query.map_err(|rejection| bad_query(rejection.body_text()))?;
    let limit = query.limit.unwrap_or(PAGE.0);
    if limit == 0 || limit > PAGE.1 {
        return Err(bad_query(format!("limit must be 1 to {}", PAGE.1)));
    }
    let from = query.after.as_deref().map(|after| {
        let after = BASE64URL_NOPAD.decode(after.as_bytes()).ok();
        let after = after.and_then(|after| String::from_utf8(after).ok());
        let parsed = after.as_deref().and_then(|after| after.split_once(' '));
        let parsed = parsed.and_then(|(due_ms, id)| Some((due_ms.parse().ok()?, id.into())));
        parsed.ok_or_else(|| bad_query("after must be what `next` of another page was".to_owned()))
    });
    let from = from.transpose()?;
    let from = from.or_else(|| query.refused.then(|| (NEVER_MS, "".into())));
    let schedules = app.schedules()?;
    let look = async {
        let _permit = schedules.looks.acquire().await;
        schedules.scheduler.list(from, limit).await
    };
    let page = within_deadline(&app, look).await?;
    let next = page
        .next
        .map(|(due_ms, id)| BASE64URL_NOPAD.encode(format!("{due_ms} {id}").as_bytes()));
    let schedules = page.schedules.iter().map(ShownSchedule::of).collect();
    Ok(Json(ShownPage { schedules, next }).into_response())
}

impl App {
    fn schedules(&self) -> Result<&Schedules, Error> {
        let none = || {
            Error::not_found(
                "no-schedules",
                "no topic is open for posting, so there is nothing to schedule",
            )
        };
        self.schedules.as_ref().ok_or_else(none)
    }
}

async fn within_deadline<T>(app: &App, work: impl Future<Output = Result<T, patterns::Error>>) -> Result<T, Error> {
    let done = timeout(app.config.events.deadline, work).await;
    let done = done.map_err(|elapsed| Error::unavailable("log-unavailable", elapsed))?;
    done.map_err(refuse)
}

/// An id as it stands in a path.
fn path_segment(id: &str) -> String {
    let mut segment = String::new();
    for byte in id.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => segment.push(char::from(byte)),
            byte => segment += &format!("%{byte:02X}"),
        }
    }
    segment
}

/// What is wrong with a schedule is the client's mistake.
fn refuse(error: patterns::Error) -> Error {
    match error {
        patterns::Error::Cron { .. } => Error::bad_request("bad-cron", error.to_string()),
        patterns::Error::TimeZone(_) => Error::bad_request("unknown-time-zone", error.to_string()),
        patterns::Error::Setting { setting: "id", reason } => Error::bad_request("bad-id", reason),
        patterns::Error::Log(log::Error::RecordTooLarge { max_bytes, .. }) => Error::refused(
            StatusCode::PAYLOAD_TOO_LARGE,
            "event-too-large",
            format!("an event, with its schedule, is larger than {max_bytes} bytes"),
        ),
        patterns::Error::Log(log::Error::InvalidTopic { topic, .. }) => Error::bad_request(
            "bad-event",
            format!("topic {topic} is compacted: an event for it needs a partitionkey"),
        ),
        error => error.into(),
    }
}
