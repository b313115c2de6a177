//! Where a record goes that its handler could not do: to the next retry topic, or to the dead letters.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::log::{
    self, CleanupPolicy, Headers, Log, ProducerRecord, Record, Timestamps, TopicDescription, TopicPartition,
};
use crate::patterns::dead_letter::{dead_letter_topic, header, marks_topic, redrive_topic};
use crate::patterns::retry::{BackOff, RetryPolicy};
use crate::patterns::{Error, control, now_ms};

const MAX_MESSAGE_BYTES: usize = 1024;

/// What a consumer consumes, and what becomes of failures there.
#[derive(Debug)]
pub(super) struct Routes {
    routes: HashMap<Arc<str>, Arc<Route>>,
}

/// One consumed topic.
#[derive(Clone, Debug)]
pub(super) struct Route {
    /// Attempts that a record has behind it when it comes to this topic.
    pub(super) attempts_before: u32,
    /// How long a record waits on this topic; `None`: it does not.
    pub(super) held_for: Option<Duration>,
    /// Whether records stand here first: elsewhere their headers say where they did.
    pub(super) is_source: bool,
    /// Attempts in place.
    back_off: Option<BackOff>,
    /// Where a record goes that failed and may be tried again.
    next: Hop,
    /// Where a hopeless one goes.
    dead: Hop,
}

/// A way to another topic.
#[derive(Clone, Debug)]
pub(super) struct Hop {
    topic: Arc<str>,
    /// How long the record waits there; `None`: it is a dead letter.
    delay: Option<Duration>,
}

impl Routes {
    /// The routes of a group, whose topics are checked.
    ///
    /// # Errors
    /// [`Error::MissingTopics`], [`Error::PartitionCounts`] for a topic beside another with fewer partitions,
    /// [`Error::RetentionTooShort`] for one that would forget a record before its next attempt, [`Error::WritersTimes`] for a retry
    /// topic, or that of what stands still, that does not stamp records itself.
    pub(super) async fn new(log: &Log, group: &str, topics: &[String], retry: &RetryPolicy) -> Result<Self, Error> {
        let mut missing = Vec::new();
        for spec in control::topics(group) {
            let found = described(log, &spec.name, &mut missing).await?;
            if let (Some(found), Timestamps::LogAppend) = (found, spec.timestamps) {
                check_timestamps(&found)?;
            }
        }
        described(log, &marks_topic(group), &mut missing).await?;
        let mut routes = HashMap::new();
        for topic in topics {
            routes.extend(checked(log, topic, group, retry, &mut missing).await?);
        }
        match missing.is_empty() {
            true => Ok(Self { routes }),
            false => Err(Error::MissingTopics(missing)),
        }
    }

    /// These routes with those of further topics, if there are any. A topic that cannot be consumed yet is told and left out.
    pub(super) async fn with(
        &self,
        log: &Log,
        group: &str,
        topics: &[String],
        retry: &RetryPolicy,
    ) -> Result<Option<Self>, Error> {
        let mut found = HashMap::new();
        for topic in topics.iter().filter(|topic| !self.routes.contains_key(topic.as_str())) {
            let mut missing = Vec::new();
            let checked = checked(log, topic, group, retry, &mut missing).await;
            match checked {
                Err(Error::Log(error)) => return Err(error.into()),
                Err(error) => tracing::error!(group, topic, "a topic matches and is not consumed: {error}"),
                Ok(_) if !missing.is_empty() => {
                    let error = Error::MissingTopics(missing);
                    tracing::error!(group, topic, "a topic matches and is not consumed: {error}");
                }
                Ok(routes) => {
                    tracing::info!(group, topic, "a topic matches and is consumed from now on");
                    found.extend(routes);
                }
            }
        }
        if found.is_empty() {
            return Ok(None);
        }
        found.extend(self.routes.clone());
        Ok(Some(Self { routes: found }))
    }

    /// The topics on which records stand first.
    pub(super) fn sources(&self) -> Vec<String> {
        self.topics(true)
    }

    /// The topics to which they come later.
    pub(super) fn retries(&self) -> Vec<String> {
        self.topics(false)
    }

    fn topics(&self, is_source: bool) -> Vec<String> {
        let routes = self.routes.iter().filter(|(_, route)| route.is_source == is_source);
        routes.map(|(topic, _)| topic.to_string()).collect()
    }

    pub(super) fn of(&self, topic: &str) -> Option<Arc<Route>> {
        self.routes.get(topic).cloned()
    }
}

/// The routes of a topic and of those beside it. Topics that do not exist are noted as missing.
async fn checked(
    log: &Log,
    topic: &str,
    group: &str,
    retry: &RetryPolicy,
    missing: &mut Vec<String>,
) -> Result<Vec<(Arc<str>, Arc<Route>)>, Error> {
    let mut routes = Vec::new();
    let Some(source) = described(log, topic, missing).await? else {
        return Ok(routes);
    };
    check_retention(&source, retry.back_off().map(BackOff::longest).unwrap_or_default())?;
    for (topic, route) in of_topic(topic, group, retry) {
        let Some(found) = described(log, &topic, missing).await? else {
            continue;
        };
        if found.partitions < source.partitions {
            return Err(Error::PartitionCounts {
                left: source.name,
                left_partitions: source.partitions,
                right: found.name,
                right_partitions: found.partitions,
            });
        }
        if let Some(route) = route {
            check_retention(&found, route.held_for.unwrap_or_default())?;
            if route.held_for.is_some() {
                check_timestamps(&found)?;
            }
            routes.push((topic.into(), Arc::new(route)));
        }
    }
    Ok(routes)
}

async fn described(log: &Log, topic: &str, missing: &mut Vec<String>) -> Result<Option<TopicDescription>, Error> {
    match log.describe_topic(topic).await {
        Ok(found) => Ok(Some(found)),
        Err(log::Error::UnknownTopic(_)) => {
            missing.push(topic.to_owned());
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn check_retention(topic: &TopicDescription, wait: Duration) -> Result<(), Error> {
    match topic.retention {
        Some(retention) if topic.cleanup != CleanupPolicy::Compact && retention <= wait => {
            Err(Error::RetentionTooShort {
                topic: topic.name.clone(),
                retention,
                wait,
            })
        }
        _ => Ok(()),
    }
}

/// Clocks of its writers would make what waits there early.
fn check_timestamps(topic: &TopicDescription) -> Result<(), Error> {
    match topic.timestamps {
        Timestamps::LogAppend => Ok(()),
        Timestamps::Create => Err(Error::WritersTimes(topic.name.clone())),
    }
}

/// `topic` and the topics beside it, those that are consumed with their routes.
fn of_topic(topic: &str, group: &str, retry: &RetryPolicy) -> Vec<(String, Option<Route>)> {
    let dead = Hop {
        topic: dead_letter_topic(topic, group).into(),
        delay: None,
    };
    let hops: Vec<Hop> = retry.topics().map_or_else(Vec::new, |retry| {
        let names = retry.names(topic, group).into_iter();
        let hop = |(name, delay): (String, &Duration)| Hop {
            topic: name.into(),
            delay: Some(*delay),
        };
        names.zip(retry.delays()).map(hop).collect()
    });
    let next = |nth: usize| hops.get(nth).unwrap_or(&dead).clone();
    let source = Route {
        attempts_before: 0,
        held_for: None,
        is_source: true,
        back_off: retry.back_off().cloned(),
        next: next(0),
        dead: dead.clone(),
    };
    // What operators send back begins anew.
    let redriven = Route {
        is_source: false,
        ..source.clone()
    };
    let in_place = retry.back_off().map_or(1, |back_off| back_off.attempts().unwrap_or(1));
    let mut routes = vec![
        (topic.to_owned(), Some(source)),
        (redrive_topic(topic, group), Some(redriven)),
    ];
    for (attempts_before, (nth, hop)) in (in_place..).zip(hops.iter().enumerate()) {
        let route = Route {
            attempts_before,
            held_for: hop.delay,
            is_source: false,
            back_off: None,
            next: next(nth + 1),
            dead: dead.clone(),
        };
        routes.push((hop.topic.to_string(), Some(route)));
    }
    routes.push((dead.topic.to_string(), None));
    routes
}

impl Route {
    /// How long to wait in place after so many failures here; `None`: no longer in place.
    pub(super) fn delay(&self, failed: u32) -> Option<Duration> {
        self.back_off.as_ref()?.delay(failed)
    }

    /// Whether a failed record goes to the dead letters.
    pub(super) fn is_dead_letter(&self, retriable: bool) -> bool {
        self.hop(retriable).delay.is_none()
    }

    /// Where a failed record goes.
    pub(super) fn hop(&self, retriable: bool) -> &Hop {
        if retriable { &self.next } else { &self.dead }
    }
}

impl Hop {
    pub(super) fn topic(&self) -> &str {
        &self.topic
    }

    /// The record as it goes: key, value and headers are kept, and so is the number of the partition.
    pub(super) fn record(
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
pub(super) struct Why<'a> {
    pub(super) group: &'a str,
    pub(super) attempts: u32,
    pub(super) kind: &'static str,
    pub(super) message: &'a str,
}

/// The first bytes of a message, whole characters only.
fn cut(message: &str) -> &str {
    &message[..message.floor_char_boundary(MAX_MESSAGE_BYTES)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(retry: &RetryPolicy) -> Vec<String> {
        let routes = of_topic("orders", "billing", retry);
        let line = |(topic, route): &(String, Option<Route>)| match route {
            None => format!("{topic} is not consumed"),
            Some(route) => {
                let (before, next, dead) = (route.attempts_before, route.next.topic(), route.dead.topic());
                format!("{topic} +{before} -> {next}, {dead}")
            }
        };
        routes.iter().map(line).collect()
    }

    #[test]
    fn a_failed_record_goes_from_topic_to_topic_and_at_last_to_the_dead_letters() {
        let topics = crate::patterns::retry::RetryTopics::new([1, 5].map(Duration::from_secs));
        let dlt = "orders.billing.dlt";
        assert_eq!(
            routes(&RetryPolicy::NonBlocking(topics.clone())),
            [
                format!("orders +0 -> orders.billing.retry.1s, {dlt}"),
                format!("orders.billing.redrive +0 -> orders.billing.retry.1s, {dlt}"),
                format!("orders.billing.retry.1s +1 -> orders.billing.retry.5s, {dlt}"),
                format!("orders.billing.retry.5s +2 -> {dlt}, {dlt}"),
                format!("{dlt} is not consumed"),
            ]
        );
        let back_off = BackOff::fixed(Duration::from_secs(1)).max_attempts(3);
        assert_eq!(
            routes(&RetryPolicy::BlockingThenNonBlocking(back_off, topics))[2],
            format!("orders.billing.retry.1s +3 -> orders.billing.retry.5s, {dlt}")
        );
        assert_eq!(routes(&RetryPolicy::None)[0], format!("orders +0 -> {dlt}, {dlt}"));
    }

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
