//! Who listens to which channel on this node.
//!
//! A channel's subscriptions stand in segments that are never changed in place: a fan-out goes over a snapshot without any
//! lock, and subscribing copies one segment.

use std::sync::Arc;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;

use super::subscription::Subscription;

/// Subscriptions of a segment at most; a fan-out lets other tasks run after each.
const SEGMENT: usize = 256;

/// Subscriptions that are gone over without a break.
pub(super) type Segment = Arc<Vec<Arc<Subscription>>>;

/// All channels that somebody listens to.
#[derive(Debug, Default)]
pub(super) struct Channels {
    by_name: DashMap<Arc<str>, Vec<Segment>>,
}

impl Channels {
    pub(super) fn insert(&self, subscription: Arc<Subscription>) {
        let mut segments = self.by_name.entry(subscription.channel.clone()).or_default();
        match segments.iter_mut().find(|segment| segment.len() < SEGMENT) {
            Some(segment) => Arc::make_mut(segment).push(subscription),
            None => segments.push(Arc::new(vec![subscription])),
        }
    }

    pub(super) fn remove(&self, subscription: &Arc<Subscription>) {
        let Entry::Occupied(mut entry) = self.by_name.entry(subscription.channel.clone()) else {
            return;
        };
        let segments = entry.get_mut();
        for segment in segments.iter_mut() {
            if let Some(index) = segment.iter().position(|known| Arc::ptr_eq(known, subscription)) {
                Arc::make_mut(segment).swap_remove(index);
                break;
            }
        }
        segments.retain(|segment| !segment.is_empty());
        if segments.is_empty() {
            entry.remove();
        }
    }

    /// Who listens to a channel now.
    pub(super) fn snapshot(&self, channel: &str) -> Vec<Segment> {
        self.by_name
            .get(channel)
            .map(|segments| segments.clone())
            .unwrap_or_default()
    }

    pub(super) fn contains(&self, channel: &str) -> bool {
        self.by_name.contains_key(channel)
    }

    /// Sends everybody away who listens to a channel of a partition.
    pub(super) fn close_all(&self, partition: i32) {
        for segments in &self.by_name {
            let subscriptions = segments.iter().flat_map(|segment| segment.iter());
            subscriptions
                .filter(|known| known.partition.number == partition)
                .for_each(|known| known.send_away());
        }
    }
}
