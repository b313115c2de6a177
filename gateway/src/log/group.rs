//! Consuming as a member of a group: the partitions of the subscribed topics are shared among the members, and what is done is
//! committed.
//!
//! A [`GroupMember`] is a handle; its engine polls in a thread or task of its own, so a slow handler never makes the group
//! believe that the member is gone. Rebalances are cooperative: only partitions that move are revoked, and they move when the
//! member has released them.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::{Batch, Error, NextOffset, Result, StartAt, TopicPartition, embedded, kafka};

/// How a member takes part in a group.
#[derive(Clone, Debug)]
pub struct GroupSettings {
    /// The group.
    pub group: String,
    /// The topics it subscribes; none for now: it owns nothing until [`GroupMember::subscribe`].
    pub topics: Vec<String>,
    /// Where a partition starts that has no committed offset, and one whose committed offset is no longer kept. Default
    /// [`StartAt::Start`]: nothing is skipped. Only `Start` and `End` are allowed.
    pub start_at: StartAt,
    /// After it a member that cannot be heard loses its partitions (`session.timeout.ms`). Default 10 s.
    pub session_timeout: Duration,
    /// How long a revoked partition waits for [`GroupMember::release`] before it is taken. Default 30 s.
    pub release_timeout: Duration,
    /// Who the member is across restarts (`group.instance.id`, static membership): one that comes back within the session timeout
    /// has its partitions again without a rebalance, and one that shuts down keeps them for as long. Of two at the same time one ends
    /// with [`Error::FencedMember`]: the older one, under [`GroupProtocol::Consumer`] the newer one, so that one that was killed can come
    /// back only after its session. When answers of a broker are lost, as when it stands still for longer than the session, the older one
    /// can be the member itself: start it again. Default `None`. The embedded log ends with its members: it has no use for it.
    pub instance_id: Option<String>,
    /// How members and brokers agree on who has what. Default [`GroupProtocol::Classic`]. All members of a group use the same. The
    /// embedded log has but one.
    pub protocol: GroupProtocol,
}

/// Kafka's protocols for groups (`group.protocol`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GroupProtocol {
    /// A member computes the assignment, cooperatively and sticky.
    #[default]
    Classic,
    /// The broker does (KIP-848, Kafka 4.0). It has the session timeout too (`group.consumer.session.timeout.ms`): the one of the
    /// settings does not count.
    Consumer,
}

impl GroupSettings {
    /// Membership of `group` for `topics`, everything else at its default.
    pub fn new(group: impl Into<String>, topics: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            group: group.into(),
            topics: topics.into_iter().map(Into::into).collect(),
            start_at: StartAt::Start,
            session_timeout: Duration::from_secs(10),
            release_timeout: Duration::from_secs(30),
            instance_id: None,
            protocol: GroupProtocol::default(),
        }
    }
}

/// What a group has committed for a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedOffset {
    /// Where the group goes on.
    pub next_offset: NextOffset,
    /// What the committing member noted beside it; empty when nothing.
    pub metadata: String,
}

impl From<NextOffset> for CommittedOffset {
    /// With nothing noted beside it.
    fn from(next_offset: NextOffset) -> Self {
        Self {
            next_offset,
            metadata: String::new(),
        }
    }
}

/// Something happened to the member.
#[derive(Debug)]
pub enum GroupEvent {
    /// These partitions are the member's from now on; records of them follow, from the offset given. With it comes what was noted
    /// when it was committed; nothing when it was not, or is no longer kept.
    Assigned(Vec<(TopicPartition, CommittedOffset)>),
    /// These partitions go to another member, which waits until [`GroupMember::release`] is called with them. No more records
    /// of them are returned; committing what is done is still possible until then.
    Revoked(Vec<TopicPartition>),
    /// These partitions have been taken already: nothing can be committed for them.
    Lost(Vec<TopicPartition>),
    /// Records of a partition of the member's.
    Records(Batch),
}

/// Who the member is in its group's present generation, as a transaction needs it to commit offsets for it.
#[derive(Clone, Debug)]
pub struct GroupMetadata {
    pub(super) engine: GroupMetadataEngine,
}

#[derive(Clone, Debug)]
pub(super) enum GroupMetadataEngine {
    Embedded(embedded::EmbeddedGroupMetadata),
    Kafka(kafka::KafkaGroupMetadata),
}

/// A member of a consumer group. Dropping it leaves the group; what was not committed is consumed again by another.
#[derive(Debug)]
pub struct GroupMember {
    group: String,
    commands: mpsc::Sender<GroupCommand>,
    events: mpsc::Receiver<Result<MemberEvent>>,
    /// The last seek of each partition in its present assignment, so that what was read before it is dropped.
    seeks: HashMap<TopicPartition, u64>,
    /// How often partitions have gone as far as the application knows: it released them, or was told that they are lost.
    departures: AtomicU64,
}

/// What an engine tells its member.
#[derive(Debug)]
pub(super) enum MemberEvent {
    Assigned(Vec<(TopicPartition, CommittedOffset)>),
    Revoked(Vec<TopicPartition>),
    Lost(Vec<TopicPartition>),
    /// `seek` is the number of the last `GroupCommand::Seek` of the partition since its assignment, 0 before the first.
    Records {
        seek: u64,
        batch: Batch,
    },
}

/// What a member asks of its engine.
#[derive(Debug)]
pub(super) enum GroupCommand {
    Subscribe {
        topics: Vec<String>,
        reply: oneshot::Sender<Result<()>>,
    },
    Release {
        partitions: Vec<TopicPartition>,
    },
    /// `departures` as in `Metadata`.
    Commit {
        offsets: Vec<(TopicPartition, CommittedOffset)>,
        departures: u64,
        reply: oneshot::Sender<Result<()>>,
    },
    Committed {
        partitions: Vec<TopicPartition>,
        reply: oneshot::Sender<Result<Vec<Option<CommittedOffset>>>>,
    },
    Seek {
        partition: TopicPartition,
        to: NextOffset,
        seek: u64,
        reply: oneshot::Sender<Result<()>>,
    },
    Pause {
        partitions: Vec<TopicPartition>,
        reply: oneshot::Sender<Result<()>>,
    },
    Resume {
        partitions: Vec<TopicPartition>,
        reply: oneshot::Sender<Result<()>>,
    },
    /// `departures` are those that the application knows of.
    Metadata {
        departures: u64,
        reply: oneshot::Sender<Result<GroupMetadata>>,
    },
}

impl GroupMember {
    pub(super) fn new(
        group: String,
        commands: mpsc::Sender<GroupCommand>,
        events: mpsc::Receiver<Result<MemberEvent>>,
    ) -> Self {
        Self {
            group,
            commands,
            events,
            seeks: HashMap::new(),
            departures: AtomicU64::new(0),
        }
    }

    /// The group.
    pub fn group(&self) -> &str {
        &self.group
    }

    /// The next event; waits until there is one. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while the log cannot be reached (the member goes on trying: call again),
    /// [`Error::Unauthorized`], [`Error::Closed`] when the log has ended.
    pub async fn next(&mut self) -> Result<GroupEvent> {
        loop {
            match self.events.recv().await.ok_or(Error::Closed)?? {
                MemberEvent::Assigned(partitions) => return Ok(GroupEvent::Assigned(partitions)),
                MemberEvent::Revoked(partitions) => {
                    self.seeks.retain(|partition, _| !partitions.contains(partition));
                    return Ok(GroupEvent::Revoked(partitions));
                }
                MemberEvent::Lost(partitions) => {
                    *self.departures.get_mut() += 1;
                    self.seeks.retain(|partition, _| !partitions.contains(partition));
                    return Ok(GroupEvent::Lost(partitions));
                }
                MemberEvent::Records { seek, batch } => {
                    if seek == self.seeks.get(&batch.partition).copied().unwrap_or(0) {
                        return Ok(GroupEvent::Records(batch));
                    }
                }
            }
        }
    }

    /// Subscribes these topics in place of those before. Partitions come and go with it as in every rebalance.
    ///
    /// # Errors
    /// [`Error::UnknownTopic`].
    pub async fn subscribe(&self, topics: Vec<String>) -> Result<()> {
        self.ask(|reply| GroupCommand::Subscribe { topics, reply }).await
    }

    /// Lets go of revoked partitions, after what is done was committed.
    pub async fn release(&self, partitions: Vec<TopicPartition>) -> Result<()> {
        let room = self.commands.reserve().await.map_err(|_| Error::Closed)?;
        self.departures.fetch_add(1, Ordering::Relaxed);
        room.send(GroupCommand::Release { partitions });
        Ok(())
    }

    /// Commits where the group goes on, and returns when that is acknowledged.
    ///
    /// # Errors
    /// [`Error::UnknownMember`] when one of the partitions is no longer the member's, or any has gone that the application did not
    /// know to be gone when it called: nothing of the call is committed.
    pub fn commit(
        &self,
        offsets: Vec<(TopicPartition, CommittedOffset)>,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        let departures = self.departures.load(Ordering::Relaxed);
        self.ask(move |reply| GroupCommand::Commit {
            offsets,
            departures,
            reply,
        })
    }

    /// What the group has committed for each of the partitions, in their order; `None` where it has committed nothing.
    pub fn committed(
        &self,
        partitions: Vec<TopicPartition>,
    ) -> impl Future<Output = Result<Vec<Option<CommittedOffset>>>> + Send + use<> {
        self.ask(|reply| GroupCommand::Committed { partitions, reply })
    }

    /// Goes on from another offset of a partition of the member's. Records from before the seek are no longer returned once
    /// it is answered.
    ///
    /// # Errors
    /// [`Error::UnknownMember`] when the partition is not the member's.
    pub async fn seek(&mut self, partition: TopicPartition, to: NextOffset) -> Result<()> {
        let seek = self.seeks.get(&partition).copied().unwrap_or(0) + 1;
        self.seeks.insert(partition.clone(), seek);
        self.ask(|reply| GroupCommand::Seek {
            partition,
            to,
            seek,
            reply,
        })
        .await
    }

    /// Stops returning records of partitions until they are resumed or assigned anew. Batches read before the pause was
    /// answered can still be returned by [`GroupMember::next`].
    pub async fn pause(&self, partitions: Vec<TopicPartition>) -> Result<()> {
        self.ask(|reply| GroupCommand::Pause { partitions, reply }).await
    }

    /// Returns records of paused partitions again, from where they stopped.
    pub async fn resume(&self, partitions: Vec<TopicPartition>) -> Result<()> {
        self.ask(|reply| GroupCommand::Resume { partitions, reply }).await
    }

    /// Who the member is now, for [`super::Transaction::send_offsets`]. Take it anew after each rebalance.
    ///
    /// # Errors
    /// [`Error::UnknownMember`] when partitions have gone that the application did not know to be gone when it called: Kafka
    /// takes offsets from every present member, whichever partitions are its own.
    pub fn metadata(&self) -> impl Future<Output = Result<GroupMetadata>> + Send + use<> {
        let departures = self.departures.load(Ordering::Relaxed);
        self.ask(move |reply| GroupCommand::Metadata { departures, reply })
    }

    /// The answer does not borrow the member, which can be asked for events meanwhile.
    fn ask<T: Send, C>(&self, command: C) -> impl Future<Output = Result<T>> + Send + use<T, C>
    where
        C: FnOnce(oneshot::Sender<Result<T>>) -> GroupCommand,
    {
        let (reply, answer) = oneshot::channel();
        let (command, commands) = (command(reply), self.commands.clone());
        async move {
            commands.send(command).await.map_err(|_| Error::Closed)?;
            answer.await.map_err(|_| Error::Closed)?
        }
    }
}

/// A group as seen from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupDescription {
    /// The group.
    pub group: String,
    /// Its members now.
    pub members: Vec<MemberDescription>,
    /// The partitions that its members have and those for which it has committed offsets, in order.
    pub partitions: Vec<PartitionLag>,
}

impl GroupDescription {
    /// Brings together what an engine knows. Partitions of which `end` knows nothing are no more, and are left out.
    pub(super) fn new(
        group: String,
        members: Vec<MemberDescription>,
        committed: &[(TopicPartition, NextOffset)],
        end: impl Fn(&TopicPartition) -> Option<i64>,
    ) -> Self {
        let assigned = members.iter().flat_map(|member| &member.partitions);
        let mut all: BTreeMap<_, _> = assigned.map(|partition| (partition, None)).collect();
        all.extend(committed.iter().map(|(partition, offset)| (partition, Some(*offset))));
        let lag = |(partition, committed): (&TopicPartition, _)| {
            Some(PartitionLag {
                partition: partition.clone(),
                committed,
                end: end(partition)?,
            })
        };
        let partitions = all.into_iter().filter_map(lag).collect();
        Self {
            group,
            members,
            partitions,
        }
    }
}

/// A member of a group as seen from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberDescription {
    /// Its id in the group.
    pub member: String,
    /// What its program calls itself (`client.id`).
    pub client: String,
    /// Where it is.
    pub host: String,
    /// What it has, in order. Nothing while the group shares its partitions out.
    pub partitions: Vec<TopicPartition>,
}

/// How far a group is behind in one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionLag {
    /// The partition.
    pub partition: TopicPartition,
    /// Where the group goes on. `None`: a member has the partition, and the group has committed nothing for it yet.
    pub committed: Option<NextOffset>,
    /// The end of the partition.
    pub end: i64,
}

impl PartitionLag {
    /// The offsets between what is committed and the end. `None`: nothing is committed, and only the group's members know whether they
    /// have begun at the start or at the end.
    pub fn lag(&self) -> Option<i64> {
        match self.committed {
            Some(committed) => Some((self.end - committed.0).max(0)),
            // Where nothing ever was, the start is the end.
            None => (self.end == 0).then_some(0),
        }
    }
}
