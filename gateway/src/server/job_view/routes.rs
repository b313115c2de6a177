//! `GET /v1/jobs/{id}`: where a job stands now, or, with `Prefer: wait=N`, when it has ended.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde::Serialize;
use uuid::Uuid;

use super::{Job, JobViewError};
use crate::server::event::{now_ms, rfc3339};
use crate::server::job_state::{JobData, Phase};
use crate::server::{App, Error};

/// The longest wait that is granted.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// A job submitted less than this ago may not have reached the view yet, although its submitter was answered.
const YOUNG_MS: i64 = 10_000;

/// How long a look-up waits for such a job before it says that there is none.
const YOUNG_WAIT: Duration = Duration::from_secs(1);

const PREFER: HeaderName = HeaderName::from_static("prefer");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// The routes of the job view.
pub(crate) fn routes() -> Router<App> {
    // It is a job id; the name is that of the route that submits, for one path can have one name only.
    Router::new().route("/v1/jobs/{job_type}", get(job))
}

#[derive(Serialize)]
struct Body<'a> {
    id: String,
    #[serde(rename = "type")]
    job_type: &'a str,
    channel: &'a str,
    state: Phase,
    #[serde(flatten)]
    data: JobData<'a>,
    submitted: String,
    updated: String,
}

async fn job(State(app): State<App>, Path(id): Path<String>, headers: HeaderMap) -> Result<Response, Error> {
    let Some(view) = &app.job_view else {
        let detail = "this node does not keep the state of jobs; ask another";
        return Err(Error::refused(StatusCode::NOT_FOUND, "no-job-view", detail));
    };
    let unknown = || Error::not_found("unknown-job", format!("there is no job {id}"));
    let uuid = Uuid::try_parse(&id).map_err(|_| unknown())?;
    let submitted_ms = submitted_ms(uuid).ok_or_else(unknown)?;
    let wait = wanted_wait(&headers);
    let may_come = || !view.is_caught_up() || now_ms().saturating_sub(submitted_ms) < YOUNG_MS;
    let patience = |job: Option<&Job>| match job {
        // Those who wait are let go when the gateway stops: their clients ask another node, or again.
        _ if app.stopping.is_cancelled() => Duration::ZERO,
        Some(job) if job.state.is_ended() => Duration::ZERO,
        Some(_) => wait.unwrap_or_default(),
        None if may_come() => wait.unwrap_or_default().max(YOUNG_WAIT),
        None => Duration::ZERO,
    };
    let found = tokio::select! {
        found = view.find_patiently(uuid, patience) => found?,
        () = app.stopping.cancelled() => view.find(uuid).await?,
    };
    let job = match found {
        Some(job) => job,
        None if !view.is_caught_up() => {
            let cause = "the job view has not read the log to its end yet";
            return Err(Error::unavailable("job-view-behind", cause));
        }
        None if view.is_past_retention(submitted_ms) => {
            let detail = format!("job {id} is older than states are kept");
            return Err(Error::refused(StatusCode::GONE, "job-expired", detail));
        }
        // Its submitter may have been answered although its store has not come to it.
        None => view
            .find_registration(&app.log, &app.config.topics, uuid, submitted_ms)
            .await?
            .ok_or_else(unknown)?,
    };
    let mut response = Json(body(uuid, &job)).into_response();
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(wait) = wait
        && let Ok(applied) = HeaderValue::try_from(format!("wait={}", wait.as_secs()))
    {
        response.headers_mut().insert(PREFERENCE_APPLIED, applied);
    }
    Ok(response)
}

fn body(id: Uuid, job: &Job) -> Body<'_> {
    Body {
        id: id.to_string(),
        job_type: &job.state.job_type,
        channel: &job.state.channel,
        state: job.state.phase,
        data: job.state.data(),
        submitted: rfc3339(job.state.submitted_ms),
        updated: rfc3339(job.updated_ms),
    }
}

/// The time that a UUID v7 carries; job ids are such.
fn submitted_ms(id: Uuid) -> Option<i64> {
    if id.get_version_num() != 7 {
        return None;
    }
    let (seconds, nanos) = id.get_timestamp()?.to_unix();
    i64::try_from(seconds)
        .ok()?
        .checked_mul(1000)?
        .checked_add(i64::from(nanos / 1_000_000))
}

/// The seconds of `Prefer: wait=N` (RFC 7240), at most [`MAX_WAIT`]. What is not understood is ignored, as the RFC wants it.
fn wanted_wait(headers: &HeaderMap) -> Option<Duration> {
    headers
        .get_all(PREFER)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .find_map(|preference| {
            let (name, value) = preference.split(';').next()?.split_once('=')?;
            if !name.trim().eq_ignore_ascii_case("wait") {
                return None;
            }
            let seconds: u64 = value.trim().trim_matches('"').parse().ok()?;
            Some(Duration::from_secs(seconds).min(MAX_WAIT))
        })
}

impl From<JobViewError> for Error {
    fn from(error: JobViewError) -> Self {
        match error {
            JobViewError::Log(error) => error.into(),
            error => Self::internal(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_is_found_among_preferences_and_bounded() {
        let wait = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(PREFER, HeaderValue::from_static(value));
            }
            wanted_wait(&headers).map(|wait| wait.as_secs())
        };
        assert_eq!(wait(&[]), None);
        assert_eq!(wait(&["return=representation"]), None);
        assert_eq!(wait(&["return=representation, Wait=10;x=y"]), Some(10));
        assert_eq!(wait(&["respond-async", "wait=\"7\""]), Some(7));
        assert_eq!(wait(&["wait=99999999999"]), Some(60));
        assert_eq!(wait(&["wait=-1"]), None);
        assert_eq!(wait(&["wait"]), None);
    }

    #[test]
    fn a_job_id_carries_its_time_and_nothing_else_is_one() {
        let now = now_ms();
        let submitted = submitted_ms(Uuid::now_v7()).expect("a time");
        assert!((submitted - now).abs() < 60_000);
        assert_eq!(submitted_ms(Uuid::nil()), None);
    }
}
