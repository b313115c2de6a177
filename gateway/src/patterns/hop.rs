//! A record on its way from the topic where it failed to another: what is kept of it, and what its headers say.

use std::sync::Arc;
use std::time::Duration;

use super::dead_letter::{dead_letter_topic, header};
use super::now_ms;
use crate::log::{Headers, ProducerRecord, Record, TopicPartition};

const MAX_MESSAGE_BYTES: usize = 1024;

/// A way to another topic.
#[derive(Clone, Debug)]
pub(in crate::patterns) struct Hop {
    pub(in crate::patterns) topic: Arc<str>,
    /// How long the record waits there; `None`: it is a dead letter.
    pub(in crate::patterns) delay: Option<Duration>,
}

impl Hop {
    /// The way to the dead letters of `group` from `topic`.
    pub(in crate::patterns) fn to_dead_letters(topic: &str, group: &str) -> Self {
        Self {
            topic: dead_letter_topic(topic, group).into(),
            delay: None,
        }
    }

    pub(in crate::patterns) fn topic(&self) -> &str {
        &self.topic
    }

    /// The record as it goes: key, value and headers are kept, and so is the number of the partition.
    pub(in crate::patterns) fn record(
        &self,
        from: &TopicPartition,
        record: &Record,
        from_source: bool,
        why: &Why<'_>,
    ) -> ProducerRecord {
        let mut headers = Headers::new();
        for (name, value) in record.headers.iter() {
            let is_origin = header::ORIGIN.contains(&name);
            if !header::ALL.contains(&name) || is_origin && !from_source {
                headers.push(name, value.clone());
            }
        }
        if from_source {
            headers.push(header::ORIGIN_TOPIC, from.topic.to_string());
            headers.push(header::ORIGIN_PARTITION, from.partition.to_string());
            headers.push(header::ORIGIN_OFFSET, record.offset.to_string());
            headers.push(header::ORIGIN_TIMESTAMP, record.timestamp_ms.to_string());
        }
        headers.push(header::GROUP, why.group.to_owned());
        headers.push(header::ATTEMPT, why.attempts.to_string());
        headers.push(header::ERROR_KIND, why.kind);
        headers.push(header::ERROR_MESSAGE, cut(why.message).to_owned());
        if let Some(delay) = self.delay {
            let delay_ms = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
            headers.push(header::BACK_OFF_MS, delay_ms.to_string());
            headers.push(header::DUE_MS, now_ms().saturating_add(delay_ms).to_string());
        }
        ProducerRecord {
            topic: self.topic.clone(),
            partition: Some(from.partition),
            key: record.key.clone(),
            value: record.value.clone(),
            headers,
            timestamp_ms: None,
        }
    }
}

/// Why a record leaves its topic.
pub(in crate::patterns) struct Why<'a> {
    pub(in crate::patterns) group: &'a str,
    pub(in crate::patterns) attempts: u32,
    pub(in crate::patterns) kind: &'static str,
    pub(in crate::patterns) message: &'a str,
}

/// The first kilobyte of a message, whole characters only.
pub(in crate::patterns) fn cut(message: &str) -> &str {
    &message[..message.floor_char_boundary(MAX_MESSAGE_BYTES)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_a_hop_are_replaced_and_the_origin_is_kept() {
        let hop = Hop {
            topic: "orders.billing.dlt".into(),
            delay: None,
        };
        let long = "ä".repeat(2000);
        let why = |attempts| Why {
            group: "billing",
            attempts,
            kind: "panic",
            message: &long,
        };
        let record = Record {
            offset: 7,
            timestamp_ms: 70,
            key: Some("k".into()),
            value: Some("v".into()),
            headers: Headers::new()
                .with("mine", "1")
                .with(header::ORIGIN_OFFSET, "forged")
                .with("mine", "2"),
        };
        let first = hop.record(&TopicPartition::new("orders", 3), &record, true, &why(1));
        assert_eq!(
            (first.partition, first.key.clone(), first.value.clone()),
            (Some(3), record.key, record.value)
        );
        let on_retry_topic = Record {
            offset: 9,
            timestamp_ms: 90,
            key: first.key,
            value: first.value,
            headers: first.headers,
        };
        let second = hop.record(
            &TopicPartition::new("orders.billing.retry.1s", 3),
            &on_retry_topic,
            false,
            &why(2),
        );
        let of = |name: &str| -> Vec<&str> {
            let named = second.headers.iter().filter(|(other, _)| *other == name);
            named
                .map(|(_, value)| std::str::from_utf8(value).expect("text"))
                .collect()
        };
        assert_eq!(of("mine"), ["1", "2"]);
        assert_eq!(of(header::ORIGIN_TOPIC), ["orders"]);
        assert_eq!(of(header::ORIGIN_OFFSET), ["7"]);
        assert_eq!(of(header::ORIGIN_TIMESTAMP), ["70"]);
        assert_eq!(of(header::ATTEMPT), ["2"]);
        assert_eq!(of(header::ERROR_KIND), ["panic"]);
        assert_eq!(of(header::ERROR_MESSAGE)[0].len(), MAX_MESSAGE_BYTES);
    }
}
