//! The two memberships of a consumer: one of its group, for the topics it was told to consume, and one of `{group}.retry`, for retry
//! topics and what operators send back.
//!
//! They are two because a group balances the number of partitions of its members, not their work: among one group's partitions the
//! idle ones of retry topics would push those with work to one member.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::future::try_join;

use super::ConsumerBuilder;
use super::commit::Mark;
use super::routes::Routes;
use crate::log::{self, CommittedOffset, GroupEvent, GroupMember, GroupMetadata, GroupSettings, Log, TopicPartition};

pub(super) struct Members {
    sources: GroupMember,
    retries: GroupMember,
    retry_topics: HashSet<Arc<str>>,
}

/// The group in which the retry topics of `group` are consumed.
pub(crate) fn retry_group(group: &str) -> String {
    format!("{group}.retry")
}

/// Something for the sources and something for the retries.
struct Split<T> {
    sources: Vec<T>,
    retries: Vec<T>,
}

impl Members {
    pub(super) async fn join(
        log: &Log,
        settings: &ConsumerBuilder,
        routes: &Routes,
        release_timeout: std::time::Duration,
    ) -> log::Result<Self> {
        let of = |group: String, topics: Vec<String>| GroupSettings {
            session_timeout: settings.session_timeout,
            release_timeout,
            instance_id: settings.instance_id.clone(),
            protocol: settings.protocol,
            ..GroupSettings::new(group, topics)
        };
        let sources = GroupSettings {
            start_at: settings.start_at,
            ..of(settings.group.clone(), routes.sources())
        };
        let retries = of(retry_group(&settings.group), routes.retries());
        Ok(Self {
            retry_topics: retries.topics.iter().map(|topic| topic.as_str().into()).collect(),
            sources: log.join_group(sources).await?,
            retries: log.join_group(retries).await?,
        })
    }

    /// Subscribes the topics of other routes.
    pub(super) async fn subscribe(&mut self, routes: &Routes) -> log::Result<()> {
        let (sources, retries) = (routes.sources(), routes.retries());
        self.retry_topics = retries.iter().map(|topic| topic.as_str().into()).collect();
        self.retries.subscribe(retries).await?;
        self.sources.subscribe(sources).await
    }

    /// The next event of either. Cancel safe.
    pub(super) async fn next(&mut self) -> log::Result<GroupEvent> {
        tokio::select! {
            event = self.sources.next() => event,
            event = self.retries.next() => event,
        }
    }

    pub(super) async fn pause(&self, partitions: Vec<TopicPartition>) -> log::Result<()> {
        let Split { sources, retries } = self.split(partitions, |partition| partition);
        if !sources.is_empty() {
            self.sources.pause(sources).await?;
        }
        if !retries.is_empty() {
            self.retries.pause(retries).await?;
        }
        Ok(())
    }

    pub(super) async fn resume(&self, partitions: Vec<TopicPartition>) -> log::Result<()> {
        let Split { sources, retries } = self.split(partitions, |partition| partition);
        if !sources.is_empty() {
            self.sources.resume(sources).await?;
        }
        if !retries.is_empty() {
            self.retries.resume(retries).await?;
        }
        Ok(())
    }

    pub(super) async fn release(&self, partitions: Vec<TopicPartition>) -> log::Result<()> {
        let Split { sources, retries } = self.split(partitions, |partition| partition);
        if !sources.is_empty() {
            self.sources.release(sources).await?;
        }
        if !retries.is_empty() {
            self.retries.release(retries).await?;
        }
        Ok(())
    }

    /// Commits the offsets of all marks.
    pub(super) fn commit(&self, marks: &[Mark]) -> impl Future<Output = log::Result<()>> + Send + use<> {
        let Split { sources, retries } = self.split(offsets(marks), |(partition, _)| partition);
        let commit = |member: &GroupMember, offsets: Vec<_>| {
            let is_empty = offsets.is_empty();
            let commit = member.commit(offsets);
            async move { if is_empty { Ok(()) } else { commit.await } }
        };
        let both = try_join(commit(&self.sources, sources), commit(&self.retries, retries));
        async move { both.await.map(|_| ()) }
    }

    /// What is committed for the partitions of the marks, in no order.
    pub(super) fn committed(
        &self,
        marks: &[Mark],
    ) -> impl Future<Output = log::Result<Vec<(TopicPartition, Option<CommittedOffset>)>>> + Send + use<> {
        let Split { sources, retries } = self.split(offsets(marks), |(partition, _)| partition);
        let committed = |member: &GroupMember, offsets: Vec<(TopicPartition, _)>| {
            let partitions: Vec<_> = offsets.into_iter().map(|(partition, _)| partition).collect();
            let is_empty = partitions.is_empty();
            let committed = member.committed(partitions.clone());
            async move {
                let committed = if is_empty { Vec::new() } else { committed.await? };
                Ok(partitions.into_iter().zip(committed))
            }
        };
        let both = try_join(committed(&self.sources, sources), committed(&self.retries, retries));
        async move { both.await.map(|(sources, retries)| sources.chain(retries).collect()) }
    }

    /// The offsets of all marks, with the members that commit them.
    pub(super) fn owned_offsets(
        &self,
        marks: &[Mark],
    ) -> impl Future<Output = log::Result<Vec<(GroupMetadata, Vec<(TopicPartition, CommittedOffset)>)>>> + Send + use<>
    {
        let Split { sources, retries } = self.split(offsets(marks), |(partition, _)| partition);
        let members = [(&self.sources, sources), (&self.retries, retries)];
        let with_metadata = members
            .into_iter()
            .filter(|(_, offsets)| !offsets.is_empty())
            .map(|(member, offsets)| (member.metadata(), offsets));
        let with_metadata: Vec<_> = with_metadata.collect();
        async move {
            let mut owned = Vec::new();
            for (metadata, offsets) in with_metadata {
                owned.push((metadata.await?, offsets));
            }
            Ok(owned)
        }
    }

    fn split<T>(&self, all: Vec<T>, partition: impl Fn(&T) -> &TopicPartition) -> Split<T> {
        let (retries, sources) = all
            .into_iter()
            .partition(|one| self.retry_topics.contains(&partition(one).topic));
        Split { sources, retries }
    }
}

fn offsets(marks: &[Mark]) -> Vec<(TopicPartition, CommittedOffset)> {
    let offset = |mark: &Mark| (mark.partition.clone(), mark.offset.clone());
    marks.iter().map(offset).collect()
}
