//! Who owns what: the partitions of each group's members, and the newest producer of each transactional id. All of it is
//! memory, for a member or producer ends with the process.
//!
//! Assignment is cooperative and sticky: a partition that must move is marked as revoked and stays its owner's until the owner
//! releases it; everything else stays where it is. A member learns by looking at [`Coordinator::owned`] whenever it is notified.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::catalog::{Partition, Topic};
use super::writer::MemberOffsets;
use crate::log::{Error, MemberDescription, Result};

/// Groups and transactional ids.
#[derive(Debug, Default)]
pub(super) struct Coordinator {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    groups: HashMap<String, Group>,
    epochs: HashMap<String, u64>,
    last_member: u64,
}

#[derive(Debug, Default)]
struct Group {
    members: BTreeMap<u64, Member>,
    /// By the partition's row, in which the order of topics and partitions is that of their making.
    owners: BTreeMap<i64, Owner>,
}

#[derive(Debug)]
struct Member {
    topics: Vec<String>,
    partitions: BTreeMap<i64, Arc<Partition>>,
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Owner {
    member: u64,
    revoked: bool,
}

/// A partition that a member owns.
#[derive(Clone, Debug)]
pub(super) struct Owned {
    pub(super) partition: Arc<Partition>,
    /// It is to be released.
    pub(super) revoked: bool,
}

impl Coordinator {
    /// Makes a producer the newest of its id: all earlier ones are fenced. Returns its epoch.
    pub(super) fn fence(&self, transactional_id: &str) -> u64 {
        let mut state = self.state();
        let epoch = state.epochs.entry(transactional_id.to_owned()).or_default();
        *epoch += 1;
        *epoch
    }

    pub(super) fn check_epoch(&self, transactional_id: &str, epoch: u64) -> Result<()> {
        match self.state().epochs.get(transactional_id) {
            Some(newest) if *newest == epoch => Ok(()),
            _ => Err(Error::Fenced(transactional_id.to_owned())),
        }
    }

    /// Whether the member owns all of the partitions, be they revoked or not.
    pub(super) fn check_owner(&self, offsets: &MemberOffsets) -> Result<()> {
        let state = self.state();
        let owners = state.groups.get(&offsets.group).map(|group| &group.owners);
        let owns = |row| {
            owners
                .and_then(|owners| owners.get(row))
                .is_some_and(|owner| owner.member == offsets.member)
        };
        if offsets.offsets.iter().all(|(partition, _)| owns(&partition.row)) {
            Ok(())
        } else {
            Err(Error::UnknownMember {
                group: offsets.group.clone(),
            })
        }
    }

    /// Adds a member for these partitions; it is notified whenever what it owns changes, at once too.
    pub(super) fn join(
        &self,
        group: &str,
        topics: &[String],
        partitions: Vec<Arc<Partition>>,
        changed: Arc<Notify>,
    ) -> u64 {
        let mut state = self.state();
        state.last_member += 1;
        let id = state.last_member;
        let group = state.groups.entry(group.to_owned()).or_default();
        group.members.insert(
            id,
            Member {
                topics: topics.to_vec(),
                partitions: by_row(partitions),
                changed,
            },
        );
        group.assign();
        id
    }

    /// Gives a member other topics, with their partitions.
    pub(super) fn subscribe(&self, group: &str, member: u64, topics: &[String], partitions: Vec<Arc<Partition>>) {
        let mut state = self.state();
        let Some(group) = state.groups.get_mut(group) else {
            return;
        };
        if let Some(member) = group.members.get_mut(&member) {
            member.topics = topics.to_vec();
            member.partitions = by_row(partitions);
        }
        group.assign();
    }

    /// Gives members the partitions that their topics have now: there may be more, or none any more.
    pub(super) fn topics_changed(&self, topics: &[Arc<Topic>]) {
        for group in self.state().groups.values_mut() {
            for member in group.members.values_mut() {
                let subscribed = topics
                    .iter()
                    .filter(|topic| member.topics.iter().any(|name| **name == *topic.name));
                let partitions = subscribed.flat_map(|topic| &topic.partitions);
                member.partitions = partitions.map(|partition| (partition.row, partition.clone())).collect();
            }
            group.assign();
        }
    }

    pub(super) fn leave(&self, group: &str, member: u64) {
        let mut state = self.state();
        let Some(left) = state.groups.get_mut(group) else {
            return;
        };
        left.members.remove(&member);
        if left.members.is_empty() {
            state.groups.remove(group);
        } else {
            left.assign();
        }
    }

    /// Takes a partition from its member, which has let go of it or did not in time.
    pub(super) fn release(&self, group: &str, member: u64, partition: i64) {
        let mut state = self.state();
        let Some(group) = state.groups.get_mut(group) else {
            return;
        };
        if group.owners.get(&partition).is_some_and(|owner| owner.member == member) {
            group.owners.remove(&partition);
            group.assign();
        }
    }

    /// What a member owns now.
    pub(super) fn owned(&self, group: &str, member: u64) -> Vec<Owned> {
        let state = self.state();
        let Some(group) = state.groups.get(group) else {
            return Vec::new();
        };
        let Some(known) = group.members.get(&member) else {
            return Vec::new();
        };
        let owned = group.owners.iter().filter(|(_, owner)| owner.member == member);
        let owned = owned.filter_map(|(row, owner)| {
            Some(Owned {
                partition: known.partitions.get(row)?.clone(),
                revoked: owner.revoked,
            })
        });
        owned.collect()
    }

    /// The members of each group that has some.
    pub(super) fn members(&self) -> HashMap<String, Vec<MemberDescription>> {
        let state = self.state();
        let groups = state.groups.iter();
        groups.map(|(name, group)| (name.clone(), group.describe())).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Group {
    fn describe(&self) -> Vec<MemberDescription> {
        let describe = |(id, member): (&u64, &Member)| {
            let owned = self.owners.iter().filter(|(_, owner)| owner.member == *id);
            let mut partitions: Vec<_> = owned
                .filter_map(|(row, _)| Some(member.partitions.get(row)?.name.clone()))
                .collect();
            partitions.sort();
            MemberDescription {
                member: id.to_string(),
                client: "barnabas".to_owned(),
                // They are all in this process.
                host: "localhost".to_owned(),
                partitions,
            }
        };
        self.members.iter().map(describe).collect()
    }

    /// Gives what nobody owns to the members with the least, and marks as revoked what must move for the numbers to differ
    /// by one at most.
    fn assign(&mut self) {
        let members = &self.members;
        self.owners.retain(|row, owner| {
            members
                .get(&owner.member)
                .is_some_and(|member| member.partitions.contains_key(row))
        });
        let mut load: BTreeMap<u64, usize> = self.members.keys().map(|id| (*id, 0)).collect();
        for owner in self.owners.values().filter(|owner| !owner.revoked) {
            *load.entry(owner.member).or_default() += 1;
        }
        // What is revoked already is on its way to somebody; it counts for nobody until it is released.
        let mut free: Vec<i64> = self
            .members
            .values()
            .flat_map(|member| member.partitions.keys().copied())
            .collect();
        free.sort_unstable();
        free.dedup();
        free.retain(|row| !self.owners.contains_key(row));
        for row in free {
            let takers = self
                .members
                .iter()
                .filter(|(_, member)| member.partitions.contains_key(&row));
            if let Some((id, _)) = takers.min_by_key(|(id, _)| (load[*id], **id)) {
                *load.entry(*id).or_default() += 1;
                self.owners.insert(
                    row,
                    Owner {
                        member: *id,
                        revoked: false,
                    },
                );
            }
        }
        let waiting = self.owners.values().filter(|owner| owner.revoked).count();
        let mut wanted = load;
        // Give the revoked ones in thought to the poorest, so that no more is revoked than must be.
        for _ in 0..waiting {
            if let Some(poorest) = wanted.values_mut().min() {
                *poorest += 1;
            }
        }
        while let Some((row, from, to)) = self.one_too_many(&wanted) {
            self.owners.insert(
                row,
                Owner {
                    member: from,
                    revoked: true,
                },
            );
            *wanted.entry(from).or_default() -= 1;
            *wanted.entry(to).or_default() += 1;
        }
        self.members.values().for_each(|member| member.changed.notify_one());
    }

    /// A partition that should move: from a member with at least two more than another that could have it.
    fn one_too_many(&self, load: &BTreeMap<u64, usize>) -> Option<(i64, u64, u64)> {
        self.owners
            .iter()
            .rev()
            .filter(|(_, owner)| !owner.revoked)
            .find_map(|(row, owner)| {
                let takers = self
                    .members
                    .iter()
                    .filter(|(_, member)| member.partitions.contains_key(row));
                let (poorest, _) = takers.min_by_key(|(id, _)| (load[*id], **id))?;
                (load[&owner.member] >= load[poorest] + 2).then_some((*row, owner.member, *poorest))
            })
    }
}

fn by_row(partitions: Vec<Arc<Partition>>) -> BTreeMap<i64, Arc<Partition>> {
    let by_row = partitions.into_iter().map(|partition| (partition.row, partition));
    by_row.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::TopicPartition;

    fn partitions(count: i64) -> Vec<Arc<Partition>> {
        (0..count)
            .map(|row| Arc::new(Partition::new(row, TopicPartition::new("t", row as i32))))
            .collect()
    }

    /// Rows that each member owns, with what is revoked as negative - 1.
    fn owned(coordinator: &Coordinator, member: u64) -> Vec<i64> {
        let row = |owned: Owned| {
            if owned.revoked {
                -owned.partition.row - 1
            } else {
                owned.partition.row
            }
        };
        coordinator.owned("g", member).into_iter().map(row).collect()
    }

    fn release_all(coordinator: &Coordinator, members: &[u64]) {
        for member in members {
            for owned in coordinator
                .owned("g", *member)
                .into_iter()
                .filter(|owned| owned.revoked)
            {
                coordinator.release("g", *member, owned.partition.row);
            }
        }
    }

    #[test]
    fn only_what_must_move_is_revoked_and_it_moves_when_released() {
        let coordinator = Coordinator::default();
        let notify = || Arc::new(Notify::new());
        let first = coordinator.join("g", &[], partitions(6), notify());
        assert_eq!(owned(&coordinator, first), [0, 1, 2, 3, 4, 5]);
        let second = coordinator.join("g", &[], partitions(6), notify());
        assert_eq!(owned(&coordinator, first), [0, 1, 2, -4, -5, -6]);
        assert!(owned(&coordinator, second).is_empty(), "nothing is owned twice");
        release_all(&coordinator, &[first]);
        assert_eq!(owned(&coordinator, second), [3, 4, 5]);
        let third = coordinator.join("g", &[], partitions(6), notify());
        release_all(&coordinator, &[first, second]);
        assert_eq!(
            [first, second, third].map(|member| owned(&coordinator, member).len()),
            [2, 2, 2]
        );
        coordinator.leave("g", first);
        assert_eq!([second, third].map(|member| owned(&coordinator, member).len()), [3, 3]);
    }

    #[test]
    fn a_member_too_many_owns_nothing_until_another_leaves() {
        let coordinator = Coordinator::default();
        let notify = || Arc::new(Notify::new());
        let first = coordinator.join("g", &[], partitions(1), notify());
        let second = coordinator.join("g", &[], partitions(1), notify());
        assert_eq!(
            (owned(&coordinator, first).len(), owned(&coordinator, second).len()),
            (1, 0)
        );
        coordinator.leave("g", first);
        assert_eq!(owned(&coordinator, second), [0]);
    }
}
