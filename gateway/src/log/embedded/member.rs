//! The task behind a [`crate::log::GroupMember`]: it tells the member what it owns and reads that for it.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::catalog::Partition;
use super::cursor::Cursors;
use super::writer::MemberOffsets;
use super::{EmbeddedGroupMetadata, EmbeddedLog};
use crate::log::group::{GroupCommand, GroupMetadataEngine, MemberEvent};
use crate::log::{
    CommittedOffset, Error, GroupMember, GroupMetadata, GroupSettings, NextOffset, Result, StartAt, TopicPartition,
};

/// Commands of a member that wait for its task. When the queue is full the member waits.
const WAITING_COMMANDS: usize = 16;
/// Events that wait for the member. When the queue is full nothing more is read.
const WAITING_EVENTS: usize = 8;

pub(super) fn start(log: EmbeddedLog, settings: GroupSettings) -> Result<GroupMember> {
    let cursors = Cursors::default();
    let partitions = subscribed(&log, &settings)?;
    let member = log
        .coordinator()
        .join(&settings.group, &settings.topics, partitions, cursors.changed.clone());
    let (commands, command_queue) = mpsc::channel(WAITING_COMMANDS);
    let (events, event_queue) = mpsc::channel(WAITING_EVENTS);
    let group = settings.group.clone();
    let stopping = log.stopping().clone();
    let membership = Membership { log, settings, member };
    let Membership { log, settings, .. } = &membership;
    // Partitions that were added before the group knew of the member.
    log.coordinator()
        .subscribe(&settings.group, member, &settings.topics, subscribed(log, settings)?);
    let task = MemberTask {
        membership,
        commands: command_queue,
        events,
        cursors,
        revoked: HashMap::new(),
        departures: 0,
    };
    tokio::spawn(task.run(stopping));
    Ok(GroupMember::new(group, commands, event_queue))
}

fn subscribed(log: &EmbeddedLog, settings: &GroupSettings) -> Result<Vec<Arc<Partition>>> {
    let mut partitions = Vec::new();
    for topic in &settings.topics {
        partitions.extend(log.topic(topic)?.partitions.iter().cloned());
    }
    Ok(partitions)
}

/// A place in the group, left when dropped.
struct Membership {
    log: EmbeddedLog,
    settings: GroupSettings,
    member: u64,
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.log.coordinator().leave(&self.settings.group, self.member);
    }
}

struct MemberTask {
    membership: Membership,
    commands: mpsc::Receiver<GroupCommand>,
    events: mpsc::Sender<Result<MemberEvent>>,
    /// One for each partition that the member owns and that is not revoked; the tag is the number of its last seek.
    cursors: Cursors,
    /// Partitions that the member was told to release, and when they are taken all the same.
    revoked: HashMap<i64, (TopicPartition, Instant)>,
    /// How often partitions have gone: released, or lost.
    departures: u64,
}

impl MemberTask {
    /// Runs until the member is dropped or the log closed.
    async fn run(mut self, stopping: CancellationToken) {
        loop {
            if self.tell_changes().await.is_err() {
                return;
            }
            let changed = self.cursors.changed.clone();
            let events = self.events.clone();
            let deadline = self.revoked.values().map(|(_, deadline)| *deadline).min();
            tokio::select! {
                biased;
                () = stopping.cancelled() => return,
                command = self.commands.recv() => match command {
                    Some(command) => self.obey(command).await,
                    None => return,
                },
                () = sleep_until_some(deadline) => self.take_overdue().await,
                room = events.reserve() => {
                    let Ok(room) = room else { return };
                    match self.cursors.read(self.membership.log.read_pool()).await {
                        Ok(Some((seek, batch))) => room.send(Ok(MemberEvent::Records { seek, batch })),
                        Ok(None) => {
                            drop(room);
                            tokio::select! {
                                () = stopping.cancelled() => return,
                                command = self.commands.recv() => match command {
                                    Some(command) => self.obey(command).await,
                                    None => return,
                                },
                                () = sleep_until_some(deadline) => self.take_overdue().await,
                                () = changed.notified() => {}
                            }
                        }
                        // Retention has overtaken the member: it goes on as a new one would.
                        Err(Error::OffsetOutOfRange { partition, .. }) => {
                            drop(room);
                            self.restart(&partition);
                        }
                        Err(error) => room.send(Err(error)),
                    }
                }
            }
        }
    }

    /// Tells the member what it has got and what it must give back since the last time.
    async fn tell_changes(&mut self) -> Result<()> {
        let Membership { log, settings, member } = &self.membership;
        let owned = log.coordinator().owned(&settings.group, *member);
        let mut new = Vec::new();
        let mut taken = Vec::new();
        for owned in &owned {
            let row = owned.partition.row;
            let known = self.cursors.iter().any(|cursor| cursor.partition.row == row);
            if owned.revoked && !self.revoked.contains_key(&row) {
                self.cursors.remove(row);
                let name = owned.partition.name.clone();
                self.revoked
                    .insert(row, (name.clone(), Instant::now() + settings.release_timeout));
                taken.push(name);
            } else if !owned.revoked && !known {
                new.push(owned.partition.clone());
            }
        }
        // What went with its topic.
        let gone: Vec<i64> = self.cursors.iter().map(|cursor| cursor.partition.row).collect();
        let gone = gone
            .into_iter()
            .filter(|row| owned.iter().all(|owned| owned.partition.row != *row));
        let lost: Vec<_> = gone
            .filter_map(|row| self.cursors.remove(row))
            .map(|cursor| cursor.partition.name.clone())
            .collect();
        if !lost.is_empty() {
            self.departures += 1;
            self.tell(MemberEvent::Lost(lost)).await?;
        }
        if !taken.is_empty() {
            self.tell(MemberEvent::Revoked(taken)).await?;
        }
        if !new.is_empty() {
            let mut assigned = Vec::new();
            let committed = self
                .membership
                .log
                .committed(&self.membership.settings.group, new.clone())
                .await?;
            for (partition, committed) in new.into_iter().zip(committed) {
                let start = self.start_of(&partition, committed);
                let position = start.next_offset.0;
                assigned.push((partition.name.clone(), start));
                self.revoked.remove(&partition.row);
                self.cursors.insert(partition, position, 0);
            }
            self.tell(MemberEvent::Assigned(assigned)).await?;
        }
        Ok(())
    }

    /// Hands an event over, obeying commands while the member has no room for it.
    async fn tell(&mut self, event: MemberEvent) -> Result<()> {
        let events = self.events.clone();
        loop {
            tokio::select! {
                room = events.reserve() => {
                    room.map_err(|_| Error::Closed)?.send(Ok(event));
                    return Ok(());
                }
                command = self.commands.recv() => match command {
                    Some(command) => self.obey(command).await,
                    None => return Err(Error::Closed),
                }
            }
        }
    }

    /// Where a partition starts: at the committed offset while it is kept, else as the settings say.
    fn start_of(&self, partition: &Partition, committed: Option<CommittedOffset>) -> CommittedOffset {
        let kept = partition.start()..=partition.end();
        match committed {
            Some(committed) if kept.contains(&committed.next_offset.0) => committed,
            _ if self.membership.settings.start_at == StartAt::End => NextOffset(partition.end()).into(),
            _ => NextOffset(partition.start()).into(),
        }
    }

    fn restart(&mut self, name: &TopicPartition) {
        if let Ok(partition) = self.membership.log.partition(name) {
            let position = self.start_of(&partition, None).next_offset.0;
            // What the member asked for with its last seek goes on.
            let seek = self.cursors.find(&name.topic, name.partition).map(|cursor| cursor.tag);
            self.cursors.insert(partition, position, seek.unwrap_or(0));
        }
    }

    async fn take_overdue(&mut self) {
        let now = Instant::now();
        let overdue: Vec<i64> = self
            .revoked
            .iter()
            .filter(|(_, (_, at))| *at <= now)
            .map(|(row, _)| *row)
            .collect();
        let mut lost = Vec::new();
        for row in overdue {
            lost.extend(self.revoked.remove(&row).map(|(name, _)| name));
            self.membership
                .log
                .coordinator()
                .release(&self.membership.settings.group, self.membership.member, row);
        }
        if !lost.is_empty() {
            self.departures += 1;
            // A member that is gone has nothing to lose; the next event finds that out.
            let _ = self.tell(MemberEvent::Lost(lost)).await;
        }
    }

    async fn obey(&mut self, command: GroupCommand) {
        // In each arm the asker may have given up waiting; what it asked for is done all the same.
        match command {
            GroupCommand::Subscribe { topics, reply } => {
                let Membership { log, settings, member } = &mut self.membership;
                settings.topics = topics;
                let subscribed = subscribed(log, settings).map(|partitions| {
                    log.coordinator()
                        .subscribe(&settings.group, *member, &settings.topics, partitions);
                });
                let _ = reply.send(subscribed);
            }
            GroupCommand::Release { partitions } => {
                self.departures += 1;
                let Membership { log, settings, member } = &self.membership;
                let released = self.revoked.extract_if(|_, (name, _)| partitions.contains(name));
                let released: Vec<i64> = released.map(|(row, _)| row).collect();
                for row in released {
                    log.coordinator().release(&settings.group, *member, row);
                }
            }
            GroupCommand::Commit { departures, reply, .. } if departures != self.departures => {
                let _ = reply.send(Err(self.unknown_member()));
            }
            GroupCommand::Commit { offsets, reply, .. } => {
                // The writer answers; this task need not wait.
                match self.member_offsets(offsets) {
                    Ok(offsets) => self.membership.log.commit_offsets(offsets, reply).await,
                    Err(error) => {
                        let _ = reply.send(Err(error));
                    }
                }
            }
            GroupCommand::Committed { partitions, reply } => {
                let _ = reply.send(self.committed(&partitions).await);
            }
            GroupCommand::Seek {
                partition,
                to,
                seek,
                reply,
            } => {
                let _ = reply.send(self.seek(&partition, to.0, seek));
            }
            GroupCommand::Pause { partitions, reply } => {
                let _ = reply.send(self.set_paused(&partitions, true));
            }
            GroupCommand::Resume { partitions, reply } => {
                let _ = reply.send(self.set_paused(&partitions, false));
            }
            GroupCommand::Metadata { departures, reply } if departures != self.departures => {
                let _ = reply.send(Err(self.unknown_member()));
            }
            GroupCommand::Metadata { reply, .. } => {
                let engine = EmbeddedGroupMetadata {
                    group: self.membership.settings.group.clone(),
                    member: self.membership.member,
                };
                let _ = reply.send(Ok(GroupMetadata {
                    engine: GroupMetadataEngine::Embedded(engine),
                }));
            }
        }
    }

    fn unknown_member(&self) -> Error {
        Error::UnknownMember {
            group: self.membership.settings.group.clone(),
        }
    }

    fn member_offsets(&self, offsets: Vec<(TopicPartition, CommittedOffset)>) -> Result<MemberOffsets> {
        let Membership { log, settings, member } = &self.membership;
        let offsets = offsets
            .into_iter()
            .map(|(name, committed)| Ok((log.partition(&name)?, committed)));
        Ok(MemberOffsets {
            group: settings.group.clone(),
            member: *member,
            offsets: offsets.collect::<Result<_>>()?,
        })
    }

    async fn committed(&self, partitions: &[TopicPartition]) -> Result<Vec<Option<CommittedOffset>>> {
        let log = &self.membership.log;
        let partitions = partitions
            .iter()
            .map(|name| log.partition(name))
            .collect::<Result<_>>()?;
        log.committed(&self.membership.settings.group, partitions).await
    }

    fn seek(&mut self, name: &TopicPartition, to: i64, seek: u64) -> Result<()> {
        let unknown = self.unknown_member();
        let cursor = self.cursors.find(&name.topic, name.partition).ok_or(unknown)?;
        let (partition, paused) = (cursor.partition.clone(), cursor.paused);
        if !(partition.start()..=partition.end()).contains(&to) {
            return Err(partition.out_of_range(to));
        }
        self.cursors.insert(partition, to, seek);
        if let Some(cursor) = self.cursors.find(&name.topic, name.partition) {
            cursor.paused = paused;
        }
        Ok(())
    }

    fn set_paused(&mut self, partitions: &[TopicPartition], paused: bool) -> Result<()> {
        for name in partitions {
            if let Some(cursor) = self.cursors.find(&name.topic, name.partition) {
                cursor.paused = paused;
            }
        }
        Ok(())
    }
}

async fn sleep_until_some(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
