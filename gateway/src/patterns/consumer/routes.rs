//! Where a record goes that its handler could not do: to the next retry topic, or to the dead letters.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::log::{self, CleanupPolicy, Log, Timestamps, TopicDescription};
use crate::patterns::dead_letter::{marks_topic, redrive_topic};
use crate::patterns::hop::Hop;
use crate::patterns::retry::{BackOff, RetryPolicy};
use crate::patterns::{Error, control};

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

impl Routes {
    /// The routes of a group, whose topics are checked.
    ///
    /// # Errors
    /// [`Error::MissingTopics`], [`Error::PartitionCounts`] for a topic beside another with fewer partitions,
    /// [`Error::RetentionTooShort`] for one that would forget a record before its next attempt, [`Error::WritersTimes`] for a retry
    /// topic, or that of what stands still, that does not stamp records itself.
    pub(super) async fn new(log: &Log, group: &str, topics: &[String], retry: &RetryPolicy) -> Result<Self, Error> {
        let mut missing = Vec::new();
        for spec in [control::blocked_spec(group), control::control_spec(group)] {
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
    let dead = Hop::to_dead_letters(topic, group);
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
}
