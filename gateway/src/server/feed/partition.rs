//! One partition of the notifications topic on this node: how far its feed is, and who is behind.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::history::History;
use super::subscription::Subscription;

/// What `dispatched` says while the partition is not fed.
const NOT_FED: i64 = -1;

/// A partition.
#[derive(Debug)]
pub(crate) struct Partition {
    pub(super) number: i32,
    /// Everything before it has been, or is being, pushed to the subscriptions that are live.
    dispatched: AtomicI64,
    /// Everything before it has been pushed to them.
    completed: AtomicI64,
    /// Held while a batch is pushed. Who holds it sees all channels at one place.
    pub(super) pushing: tokio::sync::Mutex<()>,
    interest: Mutex<Interest>,
    behind: Mutex<Vec<Arc<Subscription>>>,
    /// Notified when a subscription falls behind, or one that is behind can take more.
    pub(super) behind_changed: Arc<Notify>,
    history: Mutex<History>,
}

/// Who needs the partition.
#[derive(Debug)]
struct Interest {
    count: usize,
    /// Since when nobody does.
    idle_since: Instant,
}

/// Keeps a partition fed while it is held.
#[derive(Debug)]
pub(crate) struct Interested(pub(super) Arc<Partition>);

impl Drop for Interested {
    fn drop(&mut self) {
        let mut interest = self.0.interest();
        interest.count -= 1;
        interest.idle_since = Instant::now();
    }
}

impl Partition {
    pub(super) fn new(number: i32, history_bytes: usize) -> Self {
        Self {
            number,
            dispatched: AtomicI64::new(NOT_FED),
            completed: AtomicI64::new(NOT_FED),
            pushing: tokio::sync::Mutex::new(()),
            interest: Mutex::new(Interest {
                count: 0,
                idle_since: Instant::now(),
            }),
            behind: Mutex::default(),
            behind_changed: Arc::new(Notify::new()),
            history: Mutex::new(History::new(history_bytes)),
        }
    }

    /// How far the feed has come; below 0 while the partition is not fed.
    pub(super) fn dispatched(&self) -> i64 {
        self.dispatched.load(Ordering::Acquire)
    }

    pub(super) fn is_fed(&self) -> bool {
        self.dispatched() != NOT_FED
    }

    pub(super) fn publish_dispatched(&self, next: i64) {
        self.dispatched.store(next, Ordering::Release);
    }

    pub(super) fn publish_not_fed(&self) {
        self.publish_dispatched(NOT_FED);
    }

    /// How far the feed is done.
    pub(super) fn completed(&self) -> i64 {
        self.completed.load(Ordering::Acquire)
    }

    pub(super) fn publish_completed(&self, next: i64) {
        self.completed.store(next, Ordering::Release);
    }

    pub(super) fn interested(self: &Arc<Self>) -> Interested {
        self.interest().count += 1;
        Interested(self.clone())
    }

    /// Stops being fed if nobody has needed it for so long. Returns whether it did.
    pub(super) fn let_go(&self, linger: Duration) -> bool {
        let interest = self.interest();
        let lets_go = interest.count == 0 && interest.idle_since.elapsed() >= linger && self.is_fed();
        if lets_go {
            self.publish_not_fed();
        }
        lets_go
    }

    /// Has the replay feed a subscription.
    pub(super) fn fall_behind(&self, subscription: Arc<Subscription>) {
        self.behind().push(subscription);
        self.behind_changed.notify_one();
    }

    /// Who is behind now; those who have caught up go live, those who have ended are forgotten.
    pub(super) fn still_behind(&self) -> Vec<Arc<Subscription>> {
        let mut behind = self.behind();
        behind.retain(|subscription| !subscription.try_go_live());
        behind.clone()
    }

    pub(super) fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn behind(&self) -> MutexGuard<'_, Vec<Arc<Subscription>>> {
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interest(&self) -> MutexGuard<'_, Interest> {
        self.interest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
