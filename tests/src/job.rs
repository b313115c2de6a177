//! Submitting imports, and what must be told of each.

use std::net::SocketAddr;

use hyper::StatusCode;

use crate::http::{self, Answer, Broken};
use crate::site::jobs_path;
use crate::subscriber::Event;

/// A job that was taken in.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// Where its state can be asked for.
    pub location: String,
    /// A subscriber that begins here misses nothing of it.
    pub token: String,
}

impl Job {
    /// From the answer to its submission.
    ///
    /// # Panics
    /// If that is not a 202 without a body, with a place and a token.
    pub fn of(answer: &Answer) -> Self {
        assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
        assert!(answer.body.is_empty(), "{answer:?}");
        let location = answer.header("location").to_owned();
        let id = location.strip_prefix("/v1/jobs/").unwrap_or_default().to_owned();
        let token = answer.header("barnabas-token").to_owned();
        assert!(!id.is_empty() && !token.is_empty(), "{answer:?}");
        Self { id, location, token }
    }
}

/// Submits an import.
///
/// # Errors
/// The connection was refused or broke off.
pub async fn try_submit(to: SocketAddr, channel: &str, csv: impl Into<bytes::Bytes>) -> Result<Answer, Broken> {
    http::post(to, &jobs_path(channel), "text/csv", csv).await
}

/// Submits an import that must be taken in.
///
/// # Panics
/// If it is not.
pub async fn submit(to: SocketAddr, channel: &str, csv: impl Into<bytes::Bytes>) -> Job {
    Job::of(&try_submit(to, channel, csv).await.expect("an answer"))
}

/// Whether an event is a job's last.
pub fn is_end(event: &Event) -> bool {
    matches!(event.event_type.as_str(), "job.completed" | "job.failed")
}

/// Checks what was told of a completed job: accepted, consumed, progress that only grows, and one completion with all in it.
///
/// # Panics
/// If something else was told.
pub fn assert_completed(events: &[Event], job: &str, ok: u64, rejected: u64) {
    let told = format!("{events:#?}");
    let types: Vec<&str> = events.iter().map(|event| event.event_type.as_str()).collect();
    let [first, second, progress @ .., last] = types.as_slice() else {
        panic!("too few events: {told}");
    };
    assert_eq!(
        (*first, *second, *last),
        ("job.accepted", "job.consumed", "job.completed"),
        "{told}"
    );
    assert!(progress.iter().all(|kind| *kind == "job.progress"), "{told}");
    let mut before = (0, 0);
    for event in events {
        assert_eq!(event.subject.as_deref(), Some(job), "{told}");
        let count = |pointer: &str| event.data.pointer(pointer).and_then(serde_json::Value::as_u64);
        if let (Some(chunks), Some(ok), Some(rejected)) =
            (count("/chunks/done"), count("/rows/ok"), count("/rows/rejected"))
        {
            assert!(before <= (chunks, ok + rejected), "it went back: {told}");
            before = (chunks, ok + rejected);
        }
    }
    let end = &events[events.len() - 1].data;
    assert_eq!(end["chunks"]["done"], end["chunks"]["total"], "{told}");
    let rows = serde_json::json!({"ok": ok, "rejected": rejected, "total": ok + rejected});
    assert_eq!(end["rows"], rows, "{told}");
}
