//! The job store: who knows when a job is done. It turns what the gateway and the workers say of a job into the job's state
//! and the job's events.
//!
//! ```text
//! gateway: register ─┐                                          ┌══ {prefix}.jobs ══▶ job view
//! workers: started, ─┴▶ {prefix}.jobs.commands ─▶ atomic store ─┴══ {prefix}.notifications ══▶ browsers
//!          done, failed
//! ```
//!
//! Invariant: it is the only writer of a job's events, which stand on the log in this order: `job.accepted`, `job.consumed`,
//! any number of `job.progress`, and exactly one of `job.completed` and `job.failed`. A job without chunks goes from the first
//! to the last.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::config::TopicsConfig;
use super::event::Event;
use super::job_state::{JobData, JobError, JobState, Phase, Reject, Stage, Told};
use crate::log::{Log, ProducerRecord};
use crate::patterns::Error;
use crate::patterns::atomic_store::{self, Aggregate, AtomicStore, AtomicStoreSettings, Derived};

/// While a job moves, its channel hears of it this often. The promise is every 250 ms; the rest is for the way there.
const PROGRESS_EVERY_MS: i64 = 150;

/// How long the store rests when the log cannot be reached.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What is said of a job on `{prefix}.jobs.commands`, key = job id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum JobCommand {
    /// By the gateway, in the transaction that writes the chunks, after them.
    Register {
        /// The job type.
        job_type: String,
        /// Where the job's events go.
        channel: String,
        /// Number of chunks, which may be 0.
        chunks: u32,
        /// Number of rows.
        rows: u64,
        /// When it was submitted, in milliseconds since the Unix epoch.
        submitted_ms: i64,
        /// W3C trace context.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        traceparent: Option<String>,
    },
    /// By a worker when it first sees the job; may repeat.
    Started {
        /// The chunk that it saw.
        chunk: u32,
    },
    /// By a worker when a chunk is durably processed; may repeat and counts once.
    Done {
        /// The chunk.
        chunk: u32,
        /// Rows taken.
        ok: u64,
        /// Rows not taken.
        rejected: u64,
        /// Which rows, and why: at most 100.
        #[serde(default)]
        rejects: Vec<Reject>,
    },
    /// By a worker when a chunk can never be processed: the job fails.
    Failed {
        /// The chunk.
        chunk: u32,
        /// For programs.
        code: String,
        /// For people.
        message: String,
    },
}

/// The record that says `command` of a job.
///
/// # Errors
/// [`Error::Encode`], which no command causes.
pub fn command_record(topics: &TopicsConfig, job: &str, command: &JobCommand) -> Result<ProducerRecord, Error> {
    atomic_store::command_record(&topics.jobs(), job, command)
}

/// Owns this process's share of the jobs until `stopping`. Their topics must exist.
///
/// # Errors
/// Those of [`AtomicStore::run`] that trying again does not help; the others are logged.
pub async fn run(log: Log, topics: TopicsConfig, stopping: CancellationToken) -> Result<(), Error> {
    loop {
        let settings = AtomicStoreSettings::new(topics.jobs());
        let jobs = Jobs::new(&topics.notifications());
        match AtomicStore::run(log.clone(), settings, jobs, stopping.clone()).await {
            Err(error) if error.is_retriable() => tracing::warn!(%error, "the job store starts again: {error}"),
            ended => return ended,
        }
        tokio::select! {
            () = stopping.cancelled() => return Ok(()),
            () = tokio::time::sleep(RETRY_AFTER) => {}
        }
    }
}

/// The state that a registration begins; no other command begins one.
pub(super) fn new_state(command: JobCommand) -> Option<JobState> {
    let JobCommand::Register {
        job_type,
        channel,
        chunks,
        rows,
        submitted_ms,
        traceparent,
    } = command
    else {
        return None;
    };
    let state = JobState::new(job_type, channel, submitted_ms, chunks, rows);
    Some(JobState { traceparent, ..state })
}

/// Jobs as an aggregate of their commands.
#[derive(Clone, Debug)]
pub struct Jobs {
    notifications: Arc<str>,
}

impl Jobs {
    /// Jobs whose events go to the topic `notifications`.
    pub fn new(notifications: &str) -> Self {
        Self {
            notifications: notifications.into(),
        }
    }

    fn event(&self, job: &str, state: &JobState, event_type: &str, data: JobData<'_>, now_ms: i64) -> ProducerRecord {
        let mut event = Event::new(state.channel.as_str(), event_type);
        event.time_ms = now_ms;
        event.subject = Some(job.to_owned());
        event.data = match data.to_json() {
            Ok(data) => Some(data),
            Err(error) => {
                tracing::error!(job, %error, "the data of a job's event cannot be written");
                None
            }
        };
        let record = event.into_record(&self.notifications);
        match &state.traceparent {
            Some(traceparent) => record.header("traceparent", traceparent.clone()),
            None => record,
        }
    }
}

impl Aggregate for Jobs {
    type State = JobState;
    type Command = JobCommand;

    fn apply(&self, job: &str, state: &mut Option<JobState>, command: JobCommand) {
        let Some(state) = state else {
            *state = new_state(command);
            if state.is_none() {
                // Its registration stands before whatever a worker says of it: the job is past retention, or ended long ago.
                tracing::debug!(job, "passing over a command for a job that is not known");
            }
            return;
        };
        let counted = match command {
            // Submitting is repeated when its outcome was not known.
            JobCommand::Register { .. } => false,
            JobCommand::Started { .. } => {
                state.start();
                true
            }
            JobCommand::Done {
                chunk,
                ok,
                rejected,
                rejects,
            } => state.finish_chunk(chunk, ok, rejected, rejects),
            JobCommand::Failed { chunk, code, message } => state.fail_chunk(chunk, JobError { code, message }),
        };
        if !counted {
            tracing::debug!(job, "passing over a command that changes nothing");
        }
    }

    fn derive(&self, job: &str, state: &mut JobState, now_ms: i64) -> Derived {
        let mut derived = Derived::default();
        if state.told.stage < Stage::Accepted {
            let data = state.data_when_registered();
            derived
                .events
                .push(self.event(job, state, "job.accepted", data, now_ms));
            state.told.stage = Stage::Accepted;
        }
        // A job without chunks was never consumed.
        if state.told.stage < Stage::Consumed && state.phase != Phase::Accepted && state.chunks > 0 {
            let data = state.data().without_error();
            derived
                .events
                .push(self.event(job, state, "job.consumed", data, now_ms));
            state.told = Told::now(Stage::Consumed, state, now_ms);
        }
        let (stage, event_type) = match state.phase {
            _ if state.told.stage == Stage::Ended => return derived,
            Phase::Completed => (Stage::Ended, "job.completed"),
            Phase::Failed => (Stage::Ended, "job.failed"),
            Phase::Running if state.done.len() > state.told.chunks => (Stage::Consumed, "job.progress"),
            Phase::Running | Phase::Accepted => return derived,
        };
        let next_ms = state.told.at_ms.saturating_add(PROGRESS_EVERY_MS);
        // A clock that was set back must not silence the job.
        if stage == Stage::Ended || now_ms >= next_ms || now_ms < state.told.at_ms {
            derived
                .events
                .push(self.event(job, state, event_type, state.data(), now_ms));
            state.told = Told::now(stage, state, now_ms);
        } else {
            derived.again_at_ms = Some(next_ms);
        }
        derived
    }

    fn is_ended(&self, state: &JobState) -> bool {
        state.is_ended() && state.told.stage == Stage::Ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Record;

    /// A job on its own: windows of commands at given times, and the events that follow.
    struct Bench {
        jobs: Jobs,
        state: Option<JobState>,
        again_at_ms: Option<i64>,
    }

    impl Bench {
        fn new() -> Self {
            Self {
                jobs: Jobs::new("notifications"),
                state: None,
                again_at_ms: None,
            }
        }

        /// Applies a window and returns type and data of its events.
        fn window(&mut self, now_ms: i64, commands: impl IntoIterator<Item = JobCommand>) -> Vec<(String, String)> {
            for command in commands {
                self.jobs.apply("job-1", &mut self.state, command);
            }
            let Some(state) = &mut self.state else {
                return Vec::new();
            };
            let derived = self.jobs.derive("job-1", state, now_ms);
            self.again_at_ms = derived.again_at_ms;
            derived.events.into_iter().map(read).collect()
        }

        fn types(&mut self, now_ms: i64, commands: impl IntoIterator<Item = JobCommand>) -> Vec<String> {
            self.window(now_ms, commands)
                .into_iter()
                .map(|(event_type, _)| event_type)
                .collect()
        }
    }

    fn read(record: ProducerRecord) -> (String, String) {
        let record = Record {
            offset: 0,
            timestamp_ms: 0,
            key: record.key,
            value: record.value,
            headers: record.headers,
        };
        assert_eq!(record.headers.last_str("traceparent"), Some("00-1-2-01"));
        let event = Event::from_record(&record, String::new).expect("an event");
        assert_eq!((event.channel.as_str(), event.subject.as_deref()), ("c", Some("job-1")));
        (event.event_type, event.data.expect("data").get().to_owned())
    }

    fn register(chunks: u32) -> JobCommand {
        JobCommand::Register {
            job_type: "import-contacts".into(),
            channel: "c".into(),
            chunks,
            rows: u64::from(chunks) * 10,
            submitted_ms: 1,
            traceparent: Some("00-1-2-01".into()),
        }
    }

    fn done(chunk: u32) -> JobCommand {
        JobCommand::Done {
            chunk,
            ok: 9,
            rejected: 1,
            rejects: vec![Reject {
                line: u64::from(chunk) * 10 + 2,
                reason: "e-mail: no @".into(),
            }],
        }
    }

    fn failed(chunk: u32) -> JobCommand {
        JobCommand::Failed {
            chunk,
            code: "bad-header".into(),
            message: "no e-mail column".into(),
        }
    }

    #[test]
    fn commands_are_read_as_workers_write_them() {
        let command = |json| serde_json::from_str::<JobCommand>(json).expect("a command");
        assert_eq!(
            command(r#"{"command":"started","chunk":0}"#),
            JobCommand::Started { chunk: 0 }
        );
        assert_eq!(
            command(
                r#"{"command":"done","chunk":0,"ok":9,"rejected":1,"rejects":[{"line":2,"reason":"e-mail: no @"}]}"#
            ),
            done(0)
        );
        assert_eq!(
            command(r#"{"command":"failed","chunk":3,"code":"bad-header","message":"no e-mail column"}"#),
            failed(3)
        );
        assert_eq!(
            command(
                r#"{"command":"register","job_type":"import-contacts","channel":"c","chunks":4,"rows":40,"submitted_ms":1,"traceparent":"00-1-2-01"}"#
            ),
            register(4)
        );
    }

    #[test]
    fn stages_are_told_in_order_each_with_its_numbers() {
        let mut job = Bench::new();
        let zero = r#"{"chunks":{"done":0,"total":2},"rows":{"ok":0,"rejected":0,"total":20},"rejects":[]}"#;
        assert_eq!(job.window(1000, [register(2)]), [("job.accepted".into(), zero.into())]);
        let started = [JobCommand::Started { chunk: 0 }, JobCommand::Started { chunk: 1 }];
        assert_eq!(job.window(1100, started), [("job.consumed".into(), zero.into())]);
        assert_eq!(
            job.window(2000, [done(1)]),
            [(
                "job.progress".into(),
                r#"{"chunks":{"done":1,"total":2},"rows":{"ok":9,"rejected":1,"total":20},"rejects":[{"line":12,"reason":"e-mail: no @"}]}"#.into()
            )]
        );
        let (event_type, data) = job.window(2001, [done(0)]).remove(0);
        assert_eq!(event_type, "job.completed");
        assert!(data.starts_with(
            r#"{"chunks":{"done":2,"total":2},"rows":{"ok":18,"rejected":2,"total":20},"rejects":[{"line":2"#
        ));
        assert_eq!(job.again_at_ms, None);
    }

    #[test]
    fn done_before_started_is_consumed_first_and_late_commands_say_nothing() {
        let mut job = Bench::new();
        assert_eq!(
            job.types(1, [register(1), done(0), done(0), JobCommand::Started { chunk: 0 }]),
            ["job.accepted", "job.consumed", "job.completed"]
        );
        let ended = job.state.clone();
        assert!(job.types(2, [done(0), failed(0), register(5)]).is_empty());
        assert_eq!(job.state, ended);
        assert!(job.jobs.is_ended(&ended.expect("a state")));
    }

    #[test]
    fn progress_is_throttled_and_its_last_step_is_not_lost() {
        let mut job = Bench::new();
        assert_eq!(
            job.types(1000, [register(10), done(0)]),
            ["job.accepted", "job.consumed"]
        );
        assert!(job.types(1010, [done(1)]).is_empty());
        assert_eq!(job.again_at_ms, Some(1000 + PROGRESS_EVERY_MS));
        assert!(job.types(999 + PROGRESS_EVERY_MS, [done(2)]).is_empty());
        assert_eq!(job.types(1000 + PROGRESS_EVERY_MS, []), ["job.progress"]);
        assert_eq!(job.again_at_ms, None, "nothing moves, nothing is due");
        assert!(
            job.types(1001 + PROGRESS_EVERY_MS, [done(2)]).is_empty(),
            "a repeated chunk is no progress"
        );
        assert_eq!(job.again_at_ms, None);
        assert_eq!(job.types(5000, [done(3)]), ["job.progress"]);
        assert_eq!(
            job.types(900, [done(4)]),
            ["job.progress"],
            "a clock set back does not silence the job"
        );
    }

    #[test]
    fn a_failed_job_says_why_in_its_last_event_only() {
        let mut job = Bench::new();
        let events = job.window(1, [register(2), done(1), failed(0), done(0)]);
        let types: Vec<&str> = events.iter().map(|(event_type, _)| event_type.as_str()).collect();
        assert_eq!(types, ["job.accepted", "job.consumed", "job.failed"]);
        let error = r#""error":{"code":"bad-header","message":"no e-mail column"}"#;
        assert_eq!(
            events.iter().map(|(_, data)| data.contains(error)).collect::<Vec<_>>(),
            [false, false, true]
        );
        assert!(events[0].1.contains(r#""done":0"#) && events[2].1.contains(r#""done":1"#));
    }

    #[test]
    fn a_job_without_chunks_completes_at_once() {
        let mut job = Bench::new();
        assert_eq!(job.types(1, [register(0)]), ["job.accepted", "job.completed"]);
        assert!(job.types(2, [done(0)]).is_empty());
    }

    #[test]
    fn ten_thousand_chunks_complete_once() {
        let mut job = Bench::new();
        let mut types = job.types(0, [register(10_000)]);
        for chunk in 0..10_000u32 {
            types.extend(job.types(i64::from(chunk), [done(chunk), done(chunk / 2)]));
        }
        assert_eq!(
            types.iter().filter(|event_type| *event_type == "job.completed").count(),
            1
        );
        assert_eq!(types.last().map(String::as_str), Some("job.completed"));
        assert_eq!(
            types.len(),
            2 + 9_999 / PROGRESS_EVERY_MS as usize + 1,
            "accepted, consumed, progress as often as it may be told, completed"
        );
    }

    #[test]
    fn a_command_for_an_unknown_job_makes_none() {
        let mut job = Bench::new();
        assert!(
            job.types(1, [done(0), failed(1), JobCommand::Started { chunk: 2 }])
                .is_empty()
        );
        assert_eq!(job.state, None);
    }
}
