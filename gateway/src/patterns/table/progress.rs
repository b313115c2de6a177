//! How far a table is read, and whether it still is: what the replica says and everybody else waits for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use uuid::Uuid;

use super::entry::Revision;
use super::error::Error;

#[derive(Clone, Debug)]
enum Phase {
    Loading,
    Ready,
    Ended(Error),
}

#[derive(Debug)]
pub(super) struct Progress {
    phase: watch::Sender<Phase>,
    partitions: AtomicI32,
    passed_over: AtomicU64,
    applied: Mutex<Applied>,
    moved: Notify,
}

#[derive(Debug, Default)]
pub(super) struct Applied {
    /// Where reading goes on in each partition.
    next_offsets: Vec<i64>,
    /// Writes that are waited for by what their records are marked with, and where they were seen.
    awaited: HashMap<Uuid, Option<Revision>>,
}

impl Applied {
    /// Whether writes are waited for at all.
    pub(super) fn awaits(&self) -> bool {
        !self.awaited.is_empty()
    }

    pub(super) fn saw(&mut self, write: Uuid, at: Revision) {
        if let Some(seen) = self.awaited.get_mut(&write) {
            *seen = Some(at);
        }
    }

    fn next_offset(&self, partition: i32) -> Option<i64> {
        self.next_offsets.get(usize::try_from(partition).ok()?).copied()
    }
}

impl Progress {
    pub(super) fn new(partitions: i32) -> Self {
        Self {
            phase: watch::Sender::new(Phase::Loading),
            partitions: AtomicI32::new(partitions),
            passed_over: AtomicU64::new(0),
            applied: Mutex::default(),
            moved: Notify::new(),
        }
    }

    /// The partitions of the topic, as far as it is known.
    pub(super) fn partitions(&self) -> i32 {
        self.partitions.load(Ordering::Relaxed)
    }

    pub(super) fn set_partitions(&self, partitions: i32) {
        self.partitions.store(partitions, Ordering::Relaxed);
    }

    pub(super) fn passed_over(&self) -> u64 {
        self.passed_over.load(Ordering::Relaxed)
    }

    pub(super) fn pass_over(&self) {
        self.passed_over.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn next_offsets(&self) -> Vec<i64> {
        self.applied().next_offsets.clone()
    }

    pub(super) fn applied(&self) -> MutexGuard<'_, Applied> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A partition is read up to there. The first of each is said in their order.
    pub(super) fn reach(&self, partition: i32, next_offset: i64) {
        let mut applied = self.applied();
        match applied.next_offsets.get_mut(partition.cast_unsigned() as usize) {
            Some(known) => *known = next_offset,
            None => applied.next_offsets.push(next_offset),
        }
        drop(applied);
        self.moved.notify_waiters();
    }

    pub(super) fn set_ready(&self) {
        self.phase.send_replace(Phase::Ready);
    }

    pub(super) fn end(&self, error: Error) {
        self.phase.send_replace(Phase::Ended(error));
        self.moved.notify_waiters();
    }

    /// Why nothing is read any more.
    pub(super) fn ended(&self) -> Option<Error> {
        match &*self.phase.borrow() {
            Phase::Ended(error) => Some(error.clone()),
            Phase::Loading | Phase::Ready => None,
        }
    }

    /// Waits until nothing is read any more.
    pub(super) async fn until_ended(&self) -> Error {
        let mut phase = self.phase.subscribe();
        match phase
            .wait_for(|phase| matches!(phase, Phase::Ended(_)))
            .await
            .as_deref()
        {
            Ok(Phase::Ended(error)) => error.clone(),
            // The sender is here as long as `self` is.
            Ok(Phase::Loading | Phase::Ready) | Err(_) => Error::Log(crate::log::Error::Closed),
        }
    }

    pub(super) async fn ready(&self) -> Result<(), Error> {
        let mut phase = self.phase.subscribe();
        match phase
            .wait_for(|phase| !matches!(phase, Phase::Loading))
            .await
            .as_deref()
        {
            Ok(Phase::Ended(error)) => Err(error.clone()),
            Ok(Phase::Loading | Phase::Ready) => Ok(()),
            // As above.
            Err(_) => Err(Error::Log(crate::log::Error::Closed)),
        }
    }

    pub(super) async fn wait_applied(&self, revision: Revision) -> Result<(), Error> {
        let Revision { partition, offset } = revision;
        self.wait_until(|applied| applied.next_offset(partition).is_some_and(|next| next > offset))
            .await
    }

    /// From now on it is noted where these writes are seen.
    pub(super) fn await_writes(&self, writes: impl IntoIterator<Item = Uuid>) {
        self.applied()
            .awaited
            .extend(writes.into_iter().map(|write| (write, None)));
    }

    /// Waits until all of these writes were seen.
    pub(super) async fn wait_seen(&self, writes: &[Uuid]) -> Result<(), Error> {
        self.wait_until(|applied| {
            let is_seen = |write| applied.awaited.get(write).is_none_or(Option::is_some);
            writes.iter().all(is_seen)
        })
        .await
    }

    /// Where a write was seen, which is not waited for any longer.
    pub(super) fn take_seen(&self, write: Uuid) -> Option<Revision> {
        self.applied().awaited.remove(&write).flatten()
    }

    async fn wait_until(&self, is_so: impl Fn(&Applied) -> bool) -> Result<(), Error> {
        loop {
            // Before the look, so that no move is missed.
            let moved = self.moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            if is_so(&self.applied()) {
                return Ok(());
            }
            if let Some(error) = self.ended() {
                return Err(error);
            }
            moved.await;
        }
    }
}
