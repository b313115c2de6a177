//! What operators see, live: what the groups write about themselves becomes events of the channel `barnabas.admin`.
//!
//! The gateways share this work as members of one group, so each change is told once. What was written while no gateway ran is not
//! told: who looks first asks for the state, and then hears of changes.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::value::to_raw_value;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::groups::told;
use super::{Groups, Operated};
use crate::log::{self, Batch, CommittedOffset, GroupEvent, GroupSettings, StartAt};
use crate::patterns::control::{Blocked, ControlRecord, blocked_topic, control_topic};
use crate::patterns::dead_letter::dead_letter_topic;
use crate::server::App;
use crate::server::event::Event;

/// The channel.
pub(crate) const CHANNEL: &str = "barnabas.admin";

/// How often new groups are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Tells changes until the gateway stops.
pub(in crate::server) async fn run(app: App) {
    let mut topics = BTreeSet::new();
    loop {
        tokio::select! {
            () = app.stopping.cancelled() => return,
            ended = tell(&app, &topics) => if let Err(error) = ended {
                tracing::warn!(%error, "operators are not told of changes for now: {error}");
            },
            changed = changed_topics(&app, &topics) => topics = changed,
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until there are other topics to read than these, and returns them.
async fn changed_topics(app: &App, topics: &BTreeSet<String>) -> BTreeSet<String> {
    loop {
        match Groups::read(&app.log).await {
            Ok(all) => {
                let now = topics_of(&all);
                if now != *topics {
                    return now;
                }
            }
            Err(error) => tracing::debug!(%error, "groups cannot be listed: {error}"),
        }
        sleep(LOOK_EVERY).await;
    }
}

fn topics_of(all: &Groups) -> BTreeSet<String> {
    let mut topics = BTreeSet::new();
    for Operated { group, sources, .. } in &all.operated {
        let letters = sources.iter().map(|source| dead_letter_topic(source, group));
        topics.extend([blocked_topic(group), control_topic(group)].into_iter().chain(letters));
    }
    topics.retain(|topic| all.topics.contains_key(topic));
    topics
}

/// Tells what is written to these topics, until that fails.
async fn tell(app: &App, topics: &BTreeSet<String>) -> log::Result<()> {
    if topics.is_empty() {
        return std::future::pending().await;
    }
    let group = format!("{}.admin", app.config.topics.prefix);
    let mut member = app
        .log
        .join_group(GroupSettings {
            start_at: StartAt::End,
            ..GroupSettings::new(group, topics)
        })
        .await?;
    loop {
        match member.next().await? {
            GroupEvent::Records(batch) => {
                for event in events(&batch) {
                    match app.producer.append(event.into_record(&app.notifications.name)).await {
                        // What is told is larger than what was written. The page asks for the state when it hears of the next.
                        Err(error @ log::Error::RecordTooLarge { .. }) => {
                            tracing::warn!(partition = %batch.partition, %error, "operators are not told of one change: {error}");
                        }
                        appended => drop(appended?),
                    }
                }
                let offset = CommittedOffset::from(batch.next_offset);
                match member.commit(vec![(batch.partition, offset)]).await {
                    Ok(()) | Err(log::Error::UnknownMember { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            GroupEvent::Revoked(partitions) => member.release(partitions).await?,
            GroupEvent::Assigned(_) | GroupEvent::Lost(_) => {}
        }
    }
}

fn events(batch: &Batch) -> Vec<Event> {
    let topic = &*batch.partition.topic;
    let event = |event_type: &str, data: Value| {
        let mut event = Event::new(CHANNEL, event_type);
        event.data = to_raw_value(&data).ok();
        event
    };
    if let Some(group) = topic.strip_suffix(".blocked") {
        let each = batch.records.iter().filter_map(|record| {
            let place = std::str::from_utf8(record.key.as_ref()?).ok()?;
            let (event_type, mut data) = match &record.value {
                Some(value) => ("group.blocked", json!(serde_json::from_slice::<Blocked>(value).ok()?)),
                None => ("group.unblocked", unblocked(place)?),
            };
            data["group"] = json!(group);
            data["place"] = json!(place);
            Some(event(event_type, data))
        });
        return each.collect();
    }
    if let Some(group) = topic.strip_suffix(".control") {
        let each = batch.records.iter().filter_map(|record| {
            let (id, action) = ControlRecord::read(record)?;
            let mut data = match &action {
                ControlRecord::Outcome(outcome) => {
                    json!({ "id": id.to_string(), "done": outcome.done, "reason": outcome.reason })
                }
                action => told(id, record.timestamp_ms, action)?,
            };
            data["group"] = json!(group);
            Some(event("group.action", data))
        });
        return each.collect();
    }
    // Of dead letters only that there are some: they can be large, and are looked at one by one.
    let is_new = !batch.records.is_empty();
    is_new
        .then(|| {
            event(
                "group.dead-letter",
                json!({ "topic": topic, "records": batch.records.len() }),
            )
        })
        .into_iter()
        .collect()
}

/// The place that the key of a record on a blocked topic names: `topic/partition[/key/…|/base64/…|/offset/…]`.
fn unblocked(key: &str) -> Option<Value> {
    let mut parts = key.splitn(4, '/');
    let (topic, partition) = (parts.next()?, parts.next()?.parse::<i32>().ok()?);
    let mut place = json!({ "topic": topic, "partition": partition });
    match (parts.next(), parts.next()) {
        (Some("key"), Some(key)) => place["key"] = json!(key),
        (Some("base64"), Some(key)) => place["key_base64"] = json!(key),
        (Some("offset"), Some(offset)) => place["offset"] = json!(offset.parse::<i64>().ok()?),
        _ => {}
    }
    Some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_tombstone_is_in_its_key() {
        assert_eq!(
            unblocked("renewals/3"),
            Some(json!({ "topic": "renewals", "partition": 3 }))
        );
        let place = unblocked("renewals/3/key/a/b");
        assert_eq!(
            place,
            Some(json!({ "topic": "renewals", "partition": 3, "key": "a/b" }))
        );
        let place = unblocked("renewals/3/offset/17");
        assert_eq!(
            place,
            Some(json!({ "topic": "renewals", "partition": 3, "offset": 17 }))
        );
        assert_eq!(unblocked("renewals"), None);
    }
}
