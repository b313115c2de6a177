//! The state of a job: what its store knows of it, and what it has said of it.
//!
//! It stands as JSON on the topic `{prefix}.jobs`, key = job id, where the job view reads it. What has been said to the job's
//! channel ([`Told`]) is part of it, so that an event and the memory of having sent it are one transaction.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Rejected rows that a job shows: the first of them by line.
pub const MAX_REJECTS: usize = 100;

/// A longer reason or message is cut, in characters: whoever writes them, a state must fit into a record.
const MAX_TEXT_CHARS: usize = 300;

/// A job from its registration on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobState {
    /// What is to be done with each chunk.
    pub job_type: String,
    /// Where the job's events go.
    pub channel: String,
    /// When it was submitted, in milliseconds since the Unix epoch.
    pub submitted_ms: i64,
    /// The submitter's trace, which the job's events carry on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// Where it stands.
    pub phase: Phase,
    /// Number of chunks.
    pub chunks: u32,
    /// Chunks that are done.
    pub done: ChunkSet,
    /// Number of rows.
    pub rows: u64,
    /// Rows that were taken.
    pub ok: u64,
    /// Rows that were not.
    pub rejected: u64,
    /// The first [`MAX_REJECTS`] rejected rows by line.
    pub rejects: Vec<Reject>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<JobError>,
    /// What the channel has been told.
    pub told: Told,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Registered; no worker has seen it.
    Accepted,
    /// A worker has seen its first chunk.
    Running,
    /// Every chunk is done.
    Completed,
    /// It can never be completed.
    Failed,
}

/// A row that was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reject {
    /// Its line in the uploaded file, from 1.
    pub line: u64,
    /// Why, for the person who uploaded it.
    pub reason: String,
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    /// For programs.
    pub code: String,
    /// For people.
    pub message: String,
}

/// What the channel has been told of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Told {
    /// The last stage told.
    pub stage: Stage,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// The number of done chunks told with it.
    pub chunks: u32,
}

impl Told {
    /// `stage` was told with the state as it is.
    pub fn now(stage: Stage, state: &JobState, now_ms: i64) -> Self {
        Self {
            stage,
            at_ms: now_ms,
            chunks: state.done.len(),
        }
    }
}

/// The stages of which a channel is told, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Nothing.
    #[default]
    Nothing,
    /// `job.accepted`.
    Accepted,
    /// `job.consumed`, and any number of `job.progress`.
    Consumed,
    /// `job.completed` or `job.failed`: the last.
    Ended,
}

impl JobState {
    /// A job as registered. One without chunks is completed.
    pub fn new(job_type: String, channel: String, submitted_ms: i64, chunks: u32, rows: u64) -> Self {
        Self {
            job_type,
            channel,
            submitted_ms,
            traceparent: None,
            phase: if chunks == 0 { Phase::Completed } else { Phase::Accepted },
            chunks,
            done: ChunkSet::default(),
            rows,
            ok: 0,
            rejected: 0,
            rejects: Vec::new(),
            error: None,
            told: Told::default(),
        }
    }

    /// Whether nothing can change it any more.
    pub fn is_ended(&self) -> bool {
        matches!(self.phase, Phase::Completed | Phase::Failed)
    }

    /// A worker has seen the job.
    pub fn start(&mut self) {
        if self.phase == Phase::Accepted {
            self.phase = Phase::Running;
        }
    }

    /// A chunk is done. It counts once, and not after the end; a chunk that the job does not have counts never. Says whether
    /// it counted.
    pub fn finish_chunk(&mut self, chunk: u32, ok: u64, rejected: u64, rejects: Vec<Reject>) -> bool {
        if self.is_ended() || chunk >= self.chunks || !self.done.insert(chunk) {
            return false;
        }
        self.start();
        self.ok = self.ok.saturating_add(ok);
        self.rejected = self.rejected.saturating_add(rejected);
        self.add_rejects(rejects);
        if self.done.len() == self.chunks {
            self.phase = Phase::Completed;
        }
        true
    }

    /// A chunk can never be done, so the job has failed; unless it has ended, or the chunk is done after all. Says whether it
    /// counted.
    pub fn fail_chunk(&mut self, chunk: u32, error: JobError) -> bool {
        if self.is_ended() || chunk >= self.chunks || self.done.contains(chunk) {
            return false;
        }
        self.phase = Phase::Failed;
        self.error = Some(JobError {
            code: cut(error.code),
            message: cut(error.message),
        });
        true
    }

    /// What the job's events carry: `{"chunks":{"done","total"},"rows":{"ok","rejected","total"},"rejects":[…],"error"?}`.
    pub fn data(&self) -> JobData<'_> {
        JobData {
            chunks: ChunkCounts {
                done: self.done.len(),
                total: self.chunks,
            },
            rows: RowCounts {
                ok: self.ok,
                rejected: self.rejected,
                total: self.rows,
            },
            rejects: &self.rejects,
            error: self.error.as_ref(),
        }
    }

    /// The same as it was at the registration.
    pub fn data_when_registered(&self) -> JobData<'_> {
        JobData {
            chunks: ChunkCounts {
                done: 0,
                total: self.chunks,
            },
            rows: RowCounts {
                ok: 0,
                rejected: 0,
                total: self.rows,
            },
            rejects: &[],
            error: None,
        }
    }

    fn add_rejects(&mut self, rejects: Vec<Reject>) {
        self.rejects.extend(rejects.into_iter().map(|reject| Reject {
            line: reject.line,
            reason: cut(reject.reason),
        }));
        self.rejects.sort_by_key(|reject| reject.line);
        self.rejects.truncate(MAX_REJECTS);
    }
}

/// Numbers of a job, as its events and `GET /v1/jobs/{id}` show them.
#[derive(Debug, Serialize)]
pub struct JobData<'a> {
    chunks: ChunkCounts,
    rows: RowCounts,
    rejects: &'a [Reject],
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a JobError>,
}

#[derive(Debug, Serialize)]
struct ChunkCounts {
    done: u32,
    total: u32,
}

#[derive(Debug, Serialize)]
struct RowCounts {
    ok: u64,
    rejected: u64,
    total: u64,
}

impl JobData<'_> {
    /// The numbers alone, without the error.
    #[must_use]
    pub fn without_error(self) -> Self {
        Self { error: None, ..self }
    }

    /// As JSON text.
    ///
    /// # Errors
    /// None that its types can cause.
    pub fn to_json(&self) -> Result<Box<RawValue>, serde_json::Error> {
        serde_json::value::to_raw_value(self)
    }
}

/// A set of chunk indices, kept as sorted ranges: chunks are done roughly in order, so a large job has few of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(u32, u32)>", into = "Vec<(u32, u32)>")]
pub struct ChunkSet {
    /// First and last index of each range; sorted, and neither overlapping nor touching.
    ranges: Vec<(u32, u32)>,
    len: u32,
}

impl ChunkSet {
    /// Adds an index and says whether it was new.
    pub fn insert(&mut self, index: u32) -> bool {
        // The first range that ends at or behind the index.
        let at = self.ranges.partition_point(|(_, last)| *last < index);
        if self.ranges.get(at).is_some_and(|(first, _)| *first <= index) {
            return false;
        }
        let joins_left = at > 0 && self.ranges[at - 1].1 + 1 == index;
        let joins_right = self.ranges.get(at).is_some_and(|(first, _)| *first == index + 1);
        match (joins_left, joins_right) {
            (true, true) => {
                self.ranges[at - 1].1 = self.ranges[at].1;
                self.ranges.remove(at);
            }
            (true, false) => self.ranges[at - 1].1 = index,
            (false, true) => self.ranges[at].0 = index,
            (false, false) => self.ranges.insert(at, (index, index)),
        }
        self.len += 1;
        true
    }

    /// Whether the index is in the set.
    pub fn contains(&self, index: u32) -> bool {
        let at = self.ranges.partition_point(|(_, last)| *last < index);
        self.ranges.get(at).is_some_and(|(first, _)| *first <= index)
    }

    /// Number of indices.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl From<Vec<(u32, u32)>> for ChunkSet {
    fn from(ranges: Vec<(u32, u32)>) -> Self {
        let len = ranges.iter().fold(0u32, |len, (first, last)| {
            len.saturating_add(last.saturating_sub(*first).saturating_add(1))
        });
        Self { ranges, len }
    }
}

impl From<ChunkSet> for Vec<(u32, u32)> {
    fn from(set: ChunkSet) -> Self {
        set.ranges
    }
}

fn cut(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(MAX_TEXT_CHARS) {
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::rngs::StdRng;
    use rand::seq::SliceRandom;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn job(chunks: u32) -> JobState {
        JobState::new("import-contacts".into(), "c".into(), 1, chunks, u64::from(chunks) * 10)
    }

    #[test]
    fn a_chunk_set_counts_each_index_once_in_any_order() {
        for seed in 0..50 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut indices: Vec<u32> = (0..200).chain(0..200).collect();
            indices.shuffle(&mut rng);
            indices.truncate(rng.random_range(0..=400));
            let (mut set, mut oracle) = (ChunkSet::default(), BTreeSet::new());
            for index in indices {
                assert_eq!(set.contains(index), oracle.contains(&index), "seed {seed}");
                assert_eq!(set.insert(index), oracle.insert(index), "seed {seed}");
                assert_eq!(set.len() as usize, oracle.len(), "seed {seed}");
            }
            let json = serde_json::to_string(&set).expect("JSON");
            assert_eq!(serde_json::from_str::<ChunkSet>(&json).expect("a set"), set);
        }
    }

    #[test]
    fn a_chunk_set_in_order_is_one_range() {
        let mut set = ChunkSet::default();
        assert!((0..10_000).all(|index| set.insert(index)));
        assert!(set.insert(u32::MAX) && !set.insert(u32::MAX));
        assert_eq!(
            serde_json::to_string(&set).expect("JSON"),
            "[[0,9999],[4294967295,4294967295]]"
        );
    }

    #[test]
    fn ten_thousand_chunks_each_twice_complete_once() {
        let mut job = job(10_000);
        let mut chunks: Vec<u32> = (0..10_000).chain(0..10_000).collect();
        chunks.shuffle(&mut StdRng::seed_from_u64(7));
        let ends = chunks
            .into_iter()
            .filter(|chunk| job.finish_chunk(*chunk, 9, 1, Vec::new()) && job.is_ended())
            .count();
        assert_eq!((ends, job.phase), (1, Phase::Completed));
        assert_eq!((job.ok, job.rejected), (90_000, 10_000));
    }

    #[test]
    fn nothing_changes_a_job_after_its_end() {
        let mut failed = job(2);
        assert!(failed.fail_chunk(
            1,
            JobError {
                code: "bad-header".into(),
                message: "m".into()
            }
        ));
        let mut completed = job(1);
        assert!(completed.finish_chunk(0, 10, 0, Vec::new()));
        for mut job in [failed, completed, job(0)] {
            let before = job.clone();
            job.start();
            assert!(!job.finish_chunk(0, 10, 0, Vec::new()));
            assert!(!job.fail_chunk(
                0,
                JobError {
                    code: "late".into(),
                    message: String::new()
                }
            ));
            assert_eq!(job, before);
        }
    }

    #[test]
    fn a_chunk_that_the_job_does_not_have_is_ignored() {
        let mut job = job(2);
        assert!(!job.finish_chunk(2, 1, 0, Vec::new()));
        assert_eq!((job.phase, job.ok), (Phase::Accepted, 0));
    }

    #[test]
    fn the_first_hundred_rejects_by_line_are_kept_and_long_reasons_are_cut() {
        let mut job = job(3);
        let rejects = |lines: std::ops::Range<u64>| {
            lines
                .map(|line| Reject {
                    line,
                    reason: "ä".repeat(400),
                })
                .collect::<Vec<_>>()
        };
        assert!(job.finish_chunk(2, 0, 100, rejects(1000..1100)));
        assert!(job.finish_chunk(0, 0, 60, rejects(1..61)));
        assert!(job.finish_chunk(1, 0, 10, rejects(500..510)));
        let lines: Vec<u64> = job.rejects.iter().map(|reject| reject.line).collect();
        assert_eq!(lines, (1..61).chain(500..510).chain(1000..1030).collect::<Vec<_>>());
        assert_eq!(job.rejected, 170);
        assert_eq!(job.rejects[0].reason.chars().count(), MAX_TEXT_CHARS + 1);
    }
}
