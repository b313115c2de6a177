//! Topics: what would change, changing it, and taking them away. Groups: who is in them, and how far they are.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use rusqlite::{Connection, params};

use super::EmbeddedLog;
use super::catalog::{Topic, TopicSettings};
use super::cleaner::{delete_before, delete_rows};
use super::schema::row_id;
use crate::log::{
    CleanupPolicy, Error, GroupDescription, NextOffset, Result, Timestamps, TopicChange, TopicDescription,
    TopicPartition, TopicPlan, TopicSpec,
};

impl EmbeddedLog {
    pub(in crate::log) async fn plan_topics(&self, wanted: &[TopicSpec]) -> Result<TopicPlan> {
        let mut plan = TopicPlan::default();
        for spec in wanted {
            spec.check()?;
            match self.topic(&spec.name) {
                Ok(topic) => plan.changes.extend(spec.changes_to(&topic.description())?),
                Err(_) => plan.changes.push(TopicChange::Create(spec.clone())),
            }
        }
        Ok(plan)
    }

    pub(in crate::log) async fn apply_topics(&self, plan: &TopicPlan) -> Result<()> {
        for change in &plan.changes {
            let name = match change {
                TopicChange::Create(spec) => {
                    spec.check()?;
                    let spec = spec.clone();
                    self.write(move |connection| create(connection, &spec)).await?;
                    change_name(change)
                }
                TopicChange::AddPartitions { topic, from, to } => {
                    let (row, from, to) = (self.topic(topic)?.row, *from, *to);
                    self.write(move |connection| add_partitions(connection, row, from, to))
                        .await?;
                    change_name(change)
                }
                TopicChange::Alter { topic, setting, to, .. } => {
                    let known = self.topic(topic)?;
                    let settings = altered(topic, known.settings, setting, to)?;
                    let row = known.row;
                    self.write(move |connection| alter(connection, row, settings)).await?;
                    change_name(change)
                }
            };
            self.reload(name.to_owned()).await?;
        }
        Ok(())
    }

    pub(in crate::log) async fn describe_topic(&self, topic: &str) -> Result<TopicDescription> {
        Ok(self.topic(topic)?.description())
    }

    pub(in crate::log) fn partition_counts(&self) -> BTreeMap<String, i32> {
        let topics = self.topics();
        topics.iter().map(|topic| with_partitions(topic)).collect()
    }

    pub(in crate::log) fn compacted_topics(&self) -> BTreeMap<String, i32> {
        let mut topics = self.topics();
        topics.retain(|topic| topic.settings.cleanup.compacts());
        topics.iter().map(|topic| with_partitions(topic)).collect()
    }

    pub(in crate::log) async fn delete_topic(&self, topic: &str) -> Result<()> {
        let topic = self.topic(topic)?;
        topic.partitions.iter().for_each(|partition| partition.delete());
        let row = topic.row;
        self.write(move |connection| {
            for delete in [
                "DELETE FROM committed WHERE partition IN (SELECT id FROM partitions WHERE topic = ?1)",
                "DELETE FROM segments WHERE partition IN (SELECT id FROM partitions WHERE topic = ?1)",
                "DELETE FROM partitions WHERE topic = ?1",
                "DELETE FROM topics WHERE id = ?1",
            ] {
                connection.execute(delete, [row])?;
            }
            Ok(())
        })
        .await?;
        self.reload(topic.name.to_string()).await?;
        for partition in &topic.partitions {
            delete_rows(self, row_id(partition.row, 0), row_id(partition.row + 1, 0)).await?;
        }
        Ok(())
    }

    pub(in crate::log) async fn delete_records(&self, partition: &TopicPartition, before: i64) -> Result<()> {
        let partition = self.partition(partition)?;
        if before > partition.end() {
            return Err(partition.out_of_range(before));
        }
        delete_before(self, &partition, before).await
    }

    pub(in crate::log) async fn groups(&self) -> Result<Vec<GroupDescription>> {
        let rows = self.read_pool().run(|connection| {
            let mut select = connection.prepare_cached("SELECT group_id, partition, next_offset FROM committed")?;
            let rows = select.query_map([], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?, row.get(2)?))
            })?;
            Ok(rows.collect::<rusqlite::Result<Vec<(String, i64, i64)>>>()?)
        });
        let rows = rows.await?;
        let topics = self.topics();
        let all = || topics.iter().flat_map(|topic| &topic.partitions);
        let names: HashMap<_, _> = all().map(|partition| (partition.row, &partition.name)).collect();
        let ends: HashMap<_, _> = all().map(|partition| (&partition.name, partition.end())).collect();
        let mut groups: BTreeMap<String, (Vec<_>, Vec<_>)> = BTreeMap::new();
        for (group, row, committed) in rows {
            if let Some(name) = names.get(&row) {
                let (_, offsets) = groups.entry(group).or_default();
                offsets.push(((*name).clone(), NextOffset(committed)));
            }
        }
        for (group, members) in self.coordinator().members() {
            groups.entry(group).or_default().0 = members;
        }
        let describe = |(group, (members, offsets)): (_, (_, Vec<_>))| {
            GroupDescription::new(group, members, &offsets, |partition| ends.get(partition).copied())
        };
        Ok(groups.into_iter().map(describe).collect())
    }

    /// Makes memory say what the file says of a topic. One at a time: a partition has one place in memory, and who read the file first
    /// must not have the last word.
    async fn reload(&self, topic: String) -> Result<()> {
        let _alone = self.0.reloading.lock().await;
        let log = self.clone();
        self.read_pool()
            .run(move |connection| log.0.catalog.reload(connection, &topic))
            .await?;
        self.coordinator().topics_changed(&self.topics());
        Ok(())
    }
}

/// A topic's name and how many partitions it has.
fn with_partitions(topic: &Topic) -> (String, i32) {
    let partitions = i32::try_from(topic.partitions.len()).unwrap_or(i32::MAX);
    (topic.name.to_string(), partitions)
}

fn change_name(change: &TopicChange) -> &str {
    match change {
        TopicChange::Create(spec) => &spec.name,
        TopicChange::AddPartitions { topic, .. } | TopicChange::Alter { topic, .. } => topic,
    }
}

fn create(connection: &Connection, spec: &TopicSpec) -> Result<()> {
    let inserted = connection.execute(
        "INSERT OR IGNORE INTO topics (name, topic_id, cleanup, retention_ms, max_message_bytes, timestamps)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            spec.name,
            rand::random::<[u8; 16]>(),
            spec.cleanup.as_str(),
            spec.retention.map(ms),
            spec.max_message_bytes as i64,
            spec.timestamps.as_str()
        ],
    )?;
    if inserted == 0 {
        return Ok(()); // Another made it meanwhile.
    }
    add_partitions(connection, connection.last_insert_rowid(), 0, spec.partitions)
}

fn add_partitions(connection: &Connection, topic: i64, from: i32, to: i32) -> Result<()> {
    let mut insert = connection.prepare_cached(
        "INSERT OR IGNORE INTO partitions (topic, partition, start_offset, end_offset, cleaned_offset) VALUES (?1, ?2, 0, 0, 0)",
    )?;
    for partition in from..to {
        insert.execute(params![topic, partition])?;
    }
    Ok(())
}

fn alter(connection: &Connection, topic: i64, settings: TopicSettings) -> Result<()> {
    connection.execute(
        "UPDATE topics SET cleanup = ?2, retention_ms = ?3, max_message_bytes = ?4, timestamps = ?5 WHERE id = ?1",
        params![
            topic,
            settings.cleanup.as_str(),
            settings.retention.map(ms),
            settings.max_message_bytes as i64,
            settings.timestamps.as_str()
        ],
    )?;
    Ok(())
}

/// The settings of a topic with one of them changed to a value in Kafka's words.
fn altered(topic: &str, mut settings: TopicSettings, setting: &str, to: &str) -> Result<TopicSettings> {
    let number = to.parse::<i64>().ok();
    match (setting, number, CleanupPolicy::parse(to)) {
        ("cleanup.policy", _, Some(cleanup)) => settings.cleanup = cleanup,
        ("message.timestamp.type", ..) if let Some(timestamps) = Timestamps::parse(to) => {
            settings.timestamps = timestamps
        }
        ("retention.ms", Some(-1), _) => settings.retention = None,
        ("retention.ms", Some(ms @ 0..), _) => settings.retention = Some(Duration::from_millis(ms.unsigned_abs())),
        ("max.message.bytes", Some(bytes @ 1..), _) => settings.max_message_bytes = bytes.unsigned_abs() as usize,
        _ => {
            let reason = format!("{setting} cannot be {to}");
            return Err(Error::InvalidTopic {
                topic: topic.to_owned(),
                reason,
            });
        }
    }
    Ok(settings)
}

fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
