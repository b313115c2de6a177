//! `Idempotency-Key`: a request that is repeated is done once and answered the same, by any node and after a crash.
//!
//! ```text
//! request ─▶ look up ─▶ lane: claim ══▶ {prefix}.idempotency ══▶ ledger: verdict ─┬─ won ─▶ one transaction: work + answer ─▶ 202
//!               ▲                                                                 ├─ answered ─▶ the same 202, or 422
//!               └──────────────────────── when it has ended ──────────────────────┴─ claimed by another
//! ```
//! The topic of keys is the only judge. A claim is a plain append; in the log's order the first that finds its key free holds
//! it, so all nodes agree on the holder without a word to each other. A claim names the transactional id under which its
//! request will be done, and the answer is in that transaction. A holder says every second that it lives; one that is silent for
//! three may be dead or slow, and nobody can tell which: so who doubts it makes a producer under its transactional id. From then on the answer is on the log
//! or never will be, and the key is released. What a crash leaves behind:
//!
//! - before the claim is on the log: nothing; a repeat is the first request;
//! - with the claim on the log, before or within the transaction: a claim that is doubted three seconds later, or
//!   released at once by its own node when that starts again; the fence aborts what is open;
//! - when the commit has begun: the fence waits until the brokers have carried it out; the answer stands before the release,
//!   which therefore means nothing;
//! - after the commit: the answer, also if nobody ever heard it.
//!
//! Invariant: of the transactions that hold an answer to a key within its time one is committed. Only what was done (202) is
//! kept; what was refused, or failed with nothing done, leaves the key free. Who does not send a key comes by none of this.

mod file;
mod fingerprint;
mod lane;
mod ledger;
mod note;
mod warden;

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::file::FileError;
use self::fingerprint::Fingerprint;
pub(crate) use self::fingerprint::Fingerprinter;
use self::lane::{Kind, Lane, Reply, Waiting};
use self::ledger::{Ledger, Standing};
use self::note::Answered;
use self::warden::Warden;
use super::config::Config;
use super::data_dir::DataDir;
use super::jobs::{Job, LaneContext};
use super::{Error, StartError, events};
use crate::log::{Producer, ProducerRecord};

/// The request header.
const HEADER: &str = "idempotency-key";

/// Bytes of a key at most.
const MAX_KEY_BYTES: usize = 255;

/// Small requests that wait for the lane. When the queue is full a request waits for a place, within its deadline.
const WAITING: usize = 1024;
/// Large requests that wait for theirs, likewise.
const WAITING_LARGE: usize = 16;

/// What a client called its request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IdempotencyKey(Arc<str>);

/// A request with a key.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    key: Arc<str>,
    fingerprint: Fingerprint,
}

/// What a request wants done, once.
#[derive(Debug)]
pub(crate) enum Work {
    /// A job is submitted.
    Job(Job),
    /// Events are appended.
    Events {
        /// They.
        records: Vec<ProducerRecord>,
        /// Their room among what waits for the log.
        _room: OwnedSemaphorePermit,
    },
}

/// What is told to everybody who sends the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// The job, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) job: Option<String>,
    /// The resume token that the job's submitter got.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
}

/// Does requests that have a key. A part of [`super::App`].
#[derive(Debug)]
pub struct Idempotency {
    ledger: Ledger,
    small: mpsc::Sender<Waiting>,
    large: mpsc::Sender<Waiting>,
    large_bytes: u64,
}

impl Idempotency {
    /// Opens the ledger, readies the producers and starts all that works on keys. It ends when no more requests come after
    /// `context.drained`.
    ///
    /// # Errors
    /// The file cannot be used, or the log not.
    pub(super) async fn start(
        config: &Config,
        data: &DataDir,
        context: LaneContext,
        producer: &Producer,
        tasks: &TaskTracker,
    ) -> Result<Self, StartError> {
        let topic = context.log.describe_topic(&config.topics.idempotency()).await?;
        let ledger = Ledger::open(&data.path, topic).map_err(|error| match error {
            FileError::Io(error) => StartError::Data(error),
            error => StartError::Data(std::io::Error::other(error)),
        })?;
        // The lanes need the ledger to their end.
        let ended = CancellationToken::new();
        let working = Arc::new(ended.clone().drop_guard());
        let start = async |queue, name, kind| {
            let id = format!("{}.gateway.{}.{name}", config.topics.prefix, data.node);
            let shared = (ledger.clone(), producer.clone());
            let lane = Lane::new(context.clone(), shared, queue, id, kind, config.idempotency.retention).await?;
            let working = Arc::clone(&working);
            tasks.spawn(async move {
                lane.run().await;
                drop(working);
            });
            Ok::<_, StartError>(())
        };
        let (small, queue) = mpsc::channel(WAITING);
        start(queue, "keyed", Kind::Shared).await?;
        let (large, queue) = mpsc::channel(WAITING_LARGE);
        start(queue, "keyed-large", Kind::Single).await?;
        // Not before the lanes have said which producers are this node's.
        tasks.spawn(ledger.clone().run(context.log.clone(), ended.clone()));
        let warden = Warden {
            ledger: ledger.clone(),
            log: context.log.clone(),
            producer: producer.clone(),
        };
        tasks.spawn(warden.run(ended));
        Ok(Self {
            ledger,
            small,
            large,
            large_bytes: config.jobs.large_bytes,
        })
    }

    /// Does a request, or finds what was answered to it before. While it is under way elsewhere this waits: such a claim ends
    /// within seconds, also when its node has died, and the client gets the answer that it came for; 409 is only for what takes
    /// longer than the request itself may.
    ///
    /// # Errors
    /// 422 when the key came with another request before, 409 when the request is still under way at the deadline, 503 when the
    /// log does not answer by then.
    pub(super) async fn answer(&self, request: Request, mut work: Work, within: Duration) -> Result<Answer, Error> {
        let deadline = Instant::now() + within;
        let late = |elapsed| Error::unavailable("log-unavailable", elapsed);
        loop {
            let found = timeout_at(deadline, self.ledger.look_up(&request.key)).await;
            let found = found
                .map_err(late)?
                .map_err(|error| Error::unavailable("keys-unavailable", error))?;
            let standing = match found {
                Some(standing) => standing,
                None => match timeout_at(deadline, self.claim(&request, work)).await.map_err(late)?? {
                    Reply::Done(answer) => return Ok(answer),
                    Reply::Failed(error) => return Err(events::refuse(error)),
                    Reply::Lost(back, standing) => {
                        work = *back;
                        standing
                    }
                },
            };
            let ended = match standing {
                Standing::Answered(Answered {
                    fingerprint, answer, ..
                }) => {
                    request.check(&fingerprint)?;
                    return Ok(answer);
                }
                // It may fail, and then the key is this request's, also if that one was another.
                Standing::Claimed(ended) => ended,
            };
            timeout_at(deadline, ended.cancelled())
                .await
                .map_err(|_| Error::in_progress("a request with this key is still under way; ask again"))?;
        }
    }

    /// Hands a request to its lane. Who stops waiting takes it back, if it is not begun.
    async fn claim(&self, request: &Request, work: Work) -> Result<Reply, Error> {
        let queue = if work.size_bytes() > self.large_bytes {
            &self.large
        } else {
            &self.small
        };
        let (reply, answer) = oneshot::channel();
        let request = request.clone();
        let gone = || Error::unavailable("stopping", "the lanes have ended");
        let sent = queue.send(Waiting { request, work, reply }).await;
        sent.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

impl IdempotencyKey {
    /// The key of a request, if it has one: a string in quotes as RFC 8941 writes it, or the same without quotes.
    ///
    /// # Errors
    /// 400 when it is empty, too long, there twice, or not made of visible ASCII characters (within quotes also spaces).
    pub(crate) fn of(headers: &HeaderMap) -> Result<Option<Self>, Error> {
        let mut values = headers.get_all(HEADER).iter();
        let Some(value) = values.next() else { return Ok(None) };
        let bad = |detail: &str| Error::bad_request("bad-idempotency-key", format!("Idempotency-Key {detail}"));
        if values.next().is_some() {
            return Err(bad("is there more than once"));
        }
        let text = value.to_str().map_err(|_| bad("is not ASCII"))?.trim();
        let key = match text.strip_prefix('"') {
            Some(quoted) => unquoted(quoted).ok_or_else(|| bad("is in quotes that are not those of RFC 8941"))?,
            None if text.bytes().all(|b| b.is_ascii_graphic() && !b"\"\\,;".contains(&b)) => text.to_owned(),
            None => return Err(bad("has characters that must stand in quotes")),
        };
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(bad(&format!("must have 1 to {MAX_KEY_BYTES} bytes")));
        }
        Ok(Some(Self(key.into())))
    }

    /// The request that has this key and fingerprint.
    pub(crate) fn request(self, fingerprint: Fingerprinter) -> Request {
        Request {
            key: self.0,
            fingerprint: fingerprint.finish(),
        }
    }
}

/// What stands before the closing quote, if nothing stands behind it.
fn unquoted(text: &str) -> Option<String> {
    let mut key = String::new();
    let mut characters = text.chars();
    loop {
        match characters.next()? {
            '"' => return characters.next().is_none().then_some(key),
            '\\' => key.push(characters.next().filter(|c| matches!(c, '"' | '\\'))?),
            c @ ' '..='~' => key.push(c),
            _ => return None,
        }
    }
}

impl Request {
    fn check(&self, first: &Fingerprint) -> Result<(), Error> {
        if *first == self.fingerprint {
            return Ok(());
        }
        Err(Error::refused(
            StatusCode::UNPROCESSABLE_ENTITY,
            "idempotency-key-reused",
            "this Idempotency-Key came with another request before",
        ))
    }
}

impl Work {
    fn size_bytes(&self) -> u64 {
        match self {
            Self::Job(job) => job.body.size_bytes,
            Self::Events { records, .. } => records.iter().map(|record| record.size_bytes() as u64).sum(),
        }
    }

    fn job(&self) -> Option<&Job> {
        match self {
            Self::Job(job) => Some(job),
            Self::Events { .. } => None,
        }
    }

    fn events(&self) -> &[ProducerRecord] {
        match self {
            Self::Job(_) => &[],
            Self::Events { records, .. } => records,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(values: &[&str]) -> Result<Option<String>, &'static str> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(HEADER, value.parse().expect("a value"));
        }
        match IdempotencyKey::of(&headers) {
            Ok(key) => Ok(key.map(|key| key.0.to_string())),
            Err(error) => Err(error.code()),
        }
    }

    #[test]
    fn a_key_is_the_same_with_quotes_and_without() {
        assert_eq!(key(&[]), Ok(None));
        let uuid = "8e03978e-40d5-43e8-bc93-6894a57f9324";
        assert_eq!(key(&[uuid]), Ok(Some(uuid.to_owned())));
        assert_eq!(key(&[&format!("\"{uuid}\"")]), Ok(Some(uuid.to_owned())));
        assert_eq!(key(&[r#" "a \"b\" \\ c" "#]), Ok(Some(r#"a "b" \ c"#.to_owned())));
        let longest = "x".repeat(MAX_KEY_BYTES);
        assert_eq!(key(&[&longest]), Ok(Some(longest.clone())));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let too_long = "x".repeat(MAX_KEY_BYTES + 1);
        let quoted = format!("\"{too_long}\"");
        for values in [
            &[""][..],
            &["\"\""],
            &["a b"],
            &["a,b"],
            &["\"a"],
            &["\"a\"b"],
            &["a\"b"],
            &[r#""a\b""#],
            &["\u{e9}"],
            &["\"a\tb\""],
            &["a", "a"],
            &[&too_long],
            &[&quoted],
        ] {
            assert_eq!(key(values), Err("bad-idempotency-key"), "{values:?}");
        }
    }
}
