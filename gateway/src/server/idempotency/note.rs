//! What stands on the topic of idempotency keys: a record's key is the idempotency key, its value a [`Note`] as JSON.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Answer;
use super::fingerprint::Fingerprint;
use crate::log::{ProducerRecord, Record};

/// What is said of a key. In the order of the log, a claim counts when the key is free at that place; an answer or the claim's
/// release ends it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "note", rename_all = "lowercase")]
pub(super) enum Note {
    /// Somebody wants to do the request. Appended outside transactions.
    Claimed(Claim),
    /// It is done. In the transaction that did it.
    Answered(Answered),
    /// The claim's transaction can never be committed any more. Appended outside transactions.
    Released {
        /// The claim.
        claim: String,
    },
}

/// Somebody's claim to a key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Claim {
    /// Of this claim alone.
    pub(super) id: String,
    /// The transactional id of the transaction that will hold the answer.
    pub(super) producer: String,
    /// The producer under that id which made the claim; another one never writes what this one has claimed.
    pub(super) incarnation: String,
    /// Milliseconds of silence after which others doubt that it will be answered. Said again, the same claim lives on.
    pub(super) patience_ms: u64,
}

/// A request that is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Answered {
    /// Of the request.
    pub(super) fingerprint: Fingerprint,
    /// What was answered.
    pub(super) answer: Answer,
    /// Until then the key stands for this request, in milliseconds since the Unix epoch. It is compared with the time of a claim's
    /// record, so that every node comes to the same end.
    pub(super) until_ms: i64,
}

impl Note {
    /// The record that says it of a key.
    pub(super) fn record(&self, topic: &str, key: &str, now_ms: i64) -> ProducerRecord {
        let value = serde_json::to_vec(self).expect("strings and numbers are always JSON");
        ProducerRecord::to(topic)
            .key(key.to_owned())
            .value(value)
            .timestamp_ms(now_ms)
    }

    /// Reads a key and what is said of it.
    ///
    /// # Errors
    /// Why the record is none of ours.
    pub(super) fn read(record: &Record) -> Result<(&str, Self), String> {
        let key = record.key.as_ref().ok_or("it has no key")?;
        let key = std::str::from_utf8(key).map_err(|_| "its key is not UTF-8")?;
        let value = record.value.as_ref().ok_or("it has no value")?;
        let note = serde_json::from_slice(value).map_err(|error| error.to_string())?;
        Ok((key, note))
    }
}

impl Claim {
    /// A new claim of a producer.
    pub(super) fn new(producer: &str, incarnation: &str, patience: Duration) -> Self {
        Self {
            id: Uuid::now_v7().to_string(),
            producer: producer.to_owned(),
            incarnation: incarnation.to_owned(),
            patience_ms: patience.as_millis() as u64,
        }
    }
}
