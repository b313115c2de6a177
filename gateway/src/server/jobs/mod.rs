//! `POST /v1/jobs/{job-type}`: a file becomes chunk records and a registration, all in one transaction.
//!
//! ```text
//! body ──▶ chunk: is it text, where do rows end? ──▶ plan ─┐
//!      └─▶ spool: memory or a file without a name ─────────┴─▶ lane: transaction of chunks + registration ──▶ 202
//! ```
//! The body is received whole before the first record is written, so that a slow client holds no transaction open. A job type is
//! configuration only: its topic, format and limits.

mod chunk;
mod lane;
mod spool;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use http::{HeaderMap, Method, StatusCode, Uri, header};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use self::chunk::{CutError, Cutter, Limits, Plan};
pub(crate) use self::lane::{
    Job, LARGE_TRANSACTION_TIMEOUT, LaneContext, PRODUCER_PAUSE, ProduceError, TRANSACTION_BYTES, TRANSACTION_JOBS,
};
use self::lane::{JobTopic, Lane, Queue, Waiting};
use self::spool::{Spool, Spooled};
use super::body::{Incoming, media_type};
use super::channel_name::check_channel_name;
use super::config::{BodyFormat, Config, JobTypeConfig};
use super::data_dir::DataDir;
use super::idempotency::{Answer, Fingerprinter, IdempotencyKey, Work};
use super::token::Token;
use super::trace::traceparent;
use super::{App, Error, StartError, TOKEN_HEADER, event};

/// Small jobs that wait for a lane. When the queue is full a request waits for a place, within its deadline.
const WAITING_JOBS: usize = 1024;
/// Large jobs that wait for a lane, likewise.
const WAITING_LARGE_JOBS: usize = 16;
/// The folder of bodies on their way, in the data folder.
const SPOOL_DIR: &str = "spool";
/// What each begun MiB of a job adds to its deadline.
const DEADLINE_PER_MIB: Duration = Duration::from_secs(1);

/// Takes jobs in. A part of [`App`].
#[derive(Debug)]
pub struct Jobs {
    types: BTreeMap<String, JobType>,
    spool: Spool,
    small: mpsc::Sender<Waiting>,
    large: mpsc::Sender<Waiting>,
    large_bytes: u64,
    deadline: Duration,
}

#[derive(Debug)]
struct JobType {
    config: JobTypeConfig,
    topic: Arc<JobTopic>,
}

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/jobs/{job_type}", post(submit))
}

impl Jobs {
    /// Readies the spool and the producers, and starts the lanes. They end when no more jobs come after `context.drained`.
    ///
    /// # Errors
    /// The spool's folder cannot be made, or the log not used.
    pub(super) async fn start(
        config: &Config,
        data: &DataDir,
        context: LaneContext,
        tasks: &TaskTracker,
    ) -> Result<Self, StartError> {
        let spool = Spool::new(data.path.join(SPOOL_DIR), config.jobs.memory_bytes).map_err(StartError::Data)?;
        let mut types = BTreeMap::new();
        for (name, job_type) in &config.jobs.types {
            let topic = Arc::new(JobTopic {
                job_type: name.clone(),
                topic: job_type.topic.as_str().into(),
                partitions: context.log.describe_topic(&job_type.topic).await?.partitions,
                format: job_type.format,
            });
            let config = job_type.clone();
            types.insert(name.clone(), JobType { config, topic });
        }
        let transactional_id = |lane: String| format!("{}.gateway.{}.{lane}", config.topics.prefix, data.node);
        let (small, waiting) = queue(WAITING_JOBS);
        for lane in 0..config.jobs.lanes {
            let id = transactional_id(lane.to_string());
            tasks.spawn(Lane::shared(context.clone(), waiting.clone(), id).await?.run());
        }
        let (large, waiting) = queue(WAITING_LARGE_JOBS);
        for lane in 0..config.jobs.large_lanes {
            let id = transactional_id(format!("large-{lane}"));
            tasks.spawn(Lane::single(context.clone(), waiting.clone(), id).await?.run());
        }
        Ok(Self {
            types,
            spool,
            small,
            large,
            large_bytes: config.jobs.large_bytes,
            deadline: config.jobs.deadline,
        })
    }

    /// Waits until the job is on the log, within its deadline. Who stops waiting takes the job back, if it is not begun.
    async fn produce(&self, job: Job) -> Result<Token, Error> {
        let deadline = self.deadline(&job);
        let queue = if job.body.size_bytes > self.large_bytes {
            &self.large
        } else {
            &self.small
        };
        let produced = async {
            let (reply, answer) = oneshot::channel();
            queue.send(Waiting { job, reply }).await.map_err(|_| Gone)?;
            answer.await.map_err(|_| Gone)
        };
        match tokio::time::timeout(deadline, produced).await {
            Ok(Ok(produced)) => Ok(produced?),
            Ok(Err(gone)) => Err(Error::unavailable("stopping", gone)),
            Err(elapsed) => Err(Error::unavailable("log-unavailable", elapsed)),
        }
    }
}

impl Jobs {
    /// Within it a job is on the log, or its submitter is told that it is not known.
    fn deadline(&self, job: &Job) -> Duration {
        let mib = u32::try_from(job.body.size_bytes.div_ceil(1024 * 1024)).unwrap_or(u32::MAX);
        self.deadline + DEADLINE_PER_MIB * mib
    }
}

impl From<ProduceError> for Error {
    fn from(error: ProduceError) -> Self {
        match error {
            ProduceError::Log(error) => error.into(),
            error => Self::internal(error),
        }
    }
}

/// The lanes have ended.
#[derive(Debug, thiserror::Error)]
#[error("the lanes have ended")]
struct Gone;

fn queue(size: usize) -> (mpsc::Sender<Waiting>, Queue) {
    let (sender, receiver) = mpsc::channel(size);
    (sender, Arc::new(Mutex::new(receiver)))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SubmitQuery {
    channel: String,
}

async fn submit(
    State(app): State<App>,
    Path(job_type): Path<String>,
    query: Result<Query<SubmitQuery>, QueryRejection>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Error> {
    let mut incoming = Incoming::new(&headers, body, app.config.http.stall_timeout);
    let received = async {
        if let Some(key) = IdempotencyKey::of(&headers)? {
            incoming.fingerprint(Fingerprinter::new(&method, &uri, &headers));
            let job = receive(&app.jobs, &job_type, query, &headers, &mut incoming).await?;
            return Ok((job, Some(key)));
        }
        Ok((
            receive(&app.jobs, &job_type, query, &headers, &mut incoming).await?,
            None,
        ))
    };
    let (job, key) = match received.await {
        Ok(received) => received,
        Err(error) => {
            incoming.drain().await;
            return Err(error);
        }
    };
    let (id, channel) = (job.id.clone(), job.channel.clone());
    let Some(request) = key
        .zip(incoming.take_fingerprint())
        .map(|(key, print)| key.request(print))
    else {
        let token = app.jobs.produce(job).await?.to_string();
        return Ok(accepted(&headers, Representation { id, channel, token }));
    };
    let deadline = app.jobs.deadline(&job);
    let answer = app.idempotency.answer(request, Work::Job(job), deadline).await?;
    let Answer {
        job: Some(id),
        token: Some(token),
    } = answer
    else {
        return Err(Error::internal("the answer to an idempotency key is not that of a job"));
    };
    Ok(accepted(&headers, Representation { id, channel, token }))
}

/// The job of a request, complete, if nothing is wrong with it.
async fn receive(
    jobs: &Jobs,
    job_type: &str,
    query: Result<Query<SubmitQuery>, QueryRejection>,
    headers: &HeaderMap,
    incoming: &mut Incoming,
) -> Result<Job, Error> {
    let Some(JobType { config, topic }) = jobs.types.get(job_type) else {
        return Err(Error::not_found(
            "unknown-job-type",
            format!("there is no job type {job_type:?}"),
        ));
    };
    let Query(SubmitQuery { channel }) =
        query.map_err(|rejection| Error::bad_request("bad-query", rejection.body_text()))?;
    check_channel_name(&channel)?;
    check_content_type(config.format, headers)?;
    incoming.allow(config.max_body_bytes)?;
    let (body, plan) = receive_body(incoming, &jobs.spool, config).await?;
    Ok(Job {
        id: Uuid::now_v7().to_string(),
        to: Arc::clone(topic),
        channel,
        traceparent: traceparent(headers),
        submitted_ms: event::now_ms(),
        plan,
        body,
    })
}

/// CSV and NDJSON have several names. A charset must be UTF-8.
fn check_content_type(format: BodyFormat, headers: &HeaderMap) -> Result<(), Error> {
    let accepted: &[&str] = match format {
        BodyFormat::Csv => &["text/csv", "application/csv", "application/vnd.ms-excel"],
        BodyFormat::Ndjson => &["application/x-ndjson", "application/ndjson", "application/jsonl"],
    };
    let (media_type, charset) = media_type(headers);
    if !accepted.contains(&media_type.as_str()) {
        return Err(Error::refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "content-type",
            format!("this job type takes {}, not {media_type:?}", accepted[0]),
        ));
    }
    match charset.as_deref() {
        None | Some("utf-8" | "utf8" | "us-ascii") => Ok(()),
        Some(charset) => Err(Error::refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "charset",
            format!("the charset must be utf-8, not {charset}"),
        )),
    }
}

/// Receives a body to its end, checking and cutting it on the way.
async fn receive_body(
    incoming: &mut Incoming,
    spool: &Spool,
    config: &JobTypeConfig,
) -> Result<(Spooled, Plan), Error> {
    let limits = Limits {
        rows: config.chunk_rows,
        bytes: config.chunk_bytes,
    };
    let mut cutter = Cutter::new(config.format, limits);
    let mut upload = spool.upload();
    while let Some(bytes) = incoming.next().await? {
        cutter.push(&bytes)?;
        upload.push(&bytes).await.map_err(spool_failed)?;
    }
    let plan = cutter.finish()?;
    Ok((upload.finish().await.map_err(spool_failed)?, plan))
}

/// The disk is full, most likely.
fn spool_failed(error: io::Error) -> Error {
    Error::unavailable("spool-unavailable", error)
}

impl From<CutError> for Error {
    fn from(error: CutError) -> Self {
        Self::Refused {
            status: StatusCode::UNPROCESSABLE_ENTITY,
            code: error.code,
            detail: error.detail,
            line: Some(error.line),
        }
    }
}

/// A job as its submitter needs it.
#[derive(Serialize)]
struct Representation {
    id: String,
    channel: String,
    token: String,
}

/// 202: nothing in the body unless the client prefers it.
fn accepted(headers: &HeaderMap, job: Representation) -> Response {
    let location = format!("/v1/jobs/{}", job.id);
    let fields = [(header::LOCATION, location), (TOKEN_HEADER, job.token.clone())];
    if !prefers_representation(headers) {
        return (StatusCode::ACCEPTED, fields).into_response();
    }
    let applied = [("preference-applied", "return=representation")];
    (StatusCode::ACCEPTED, fields, applied, Json(job)).into_response()
}

/// Whether the client asks for the job in the answer (RFC 7240).
fn prefers_representation(headers: &HeaderMap) -> bool {
    headers
        .get_all("prefer")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|preference| preference.trim().eq_ignore_ascii_case("return=representation"))
}
