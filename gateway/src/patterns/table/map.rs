//! The map in memory: what every key's last record says, in shards that readers and the one writer lock for an instant.
//!
//! Invariant: what the map holds depends on what stands on the topic only, not on the order in which partitions were read. A key is at
//! home in the partition that its hash names among those there are now; what stands there counts. What stands in another, because the
//! topic had fewer partitions when it was written, counts only as long as the home has nothing to say.

use std::borrow::Borrow;
use std::collections::hash_map::{Entry as Slot, HashMap};
use std::hash::{BuildHasher, Hash};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use foldhash::fast::RandomState;

use super::entry::Revision;

/// A reader meets the writer in one of so many shards.
const SHARDS: usize = 256;

/// What a record says of its key.
#[derive(Debug)]
pub(super) enum Said<V> {
    Value(Arc<V>),
    /// Its value cannot be read, and why.
    Unreadable(Arc<str>),
}

impl<V> Clone for Said<V> {
    fn clone(&self) -> Self {
        match self {
            Self::Value(value) => Self::Value(value.clone()),
            Self::Unreadable(reason) => Self::Unreadable(reason.clone()),
        }
    }
}

/// A key's last record.
#[derive(Debug)]
pub(super) struct Kept<V> {
    pub(super) said: Said<V>,
    pub(super) revision: Revision,
}

impl<V> Clone for Kept<V> {
    fn clone(&self) -> Self {
        Self {
            said: self.said.clone(),
            revision: self.revision,
        }
    }
}

/// Not with the standard library's hasher, which is slower: a read hashes its key twice, to find the shard and in it.
type Keys<K, V> = HashMap<K, Kept<V>, RandomState>;
type Shard<K, V> = RwLock<Keys<K, V>>;

#[derive(Debug)]
pub(super) struct Map<K, V> {
    hasher: RandomState,
    shards: Box<[Shard<K, V>]>,
    keys: AtomicUsize,
    unreadable: AtomicUsize,
}

impl<K: Eq + Hash + Clone, V> Map<K, V> {
    pub(super) fn new() -> Self {
        Self {
            hasher: RandomState::default(),
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            keys: AtomicUsize::new(0),
            unreadable: AtomicUsize::new(0),
        }
    }

    /// Keys with a record, readable or not.
    pub(super) fn keys(&self) -> usize {
        self.keys.load(Ordering::Relaxed)
    }

    /// Keys whose value cannot be read.
    pub(super) fn unreadable(&self) -> usize {
        self.unreadable.load(Ordering::Relaxed)
    }

    pub(super) fn get<Q>(&self, key: &Q) -> Option<Arc<V>>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        match &read(self.shard(key)).get(key)?.said {
            Said::Value(value) => Some(value.clone()),
            Said::Unreadable(_) => None,
        }
    }

    pub(super) fn kept<Q>(&self, key: &Q) -> Option<Kept<V>>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        read(self.shard(key)).get(key).cloned()
    }

    /// All keys with their values, shard by shard.
    pub(super) fn all(&self) -> Vec<(K, Kept<V>)> {
        let mut all = Vec::with_capacity(self.keys());
        for shard in &self.shards {
            all.extend(read(shard).iter().map(|(key, kept)| (key.clone(), kept.clone())));
        }
        all
    }

    /// Takes in a record, `said` being `None` for a tombstone; whether anything changed.
    pub(super) fn apply(&self, key: K, said: Option<Said<V>>, at: Revision, home: i32) -> bool {
        let mut shard = write(self.shard(&key));
        let counts = |kept: &Kept<V>| at.partition == kept.revision.partition || is_nearer(at.partition, kept, home);
        match (shard.entry(key), said) {
            (Slot::Occupied(slot), _) if !counts(slot.get()) => false,
            (Slot::Occupied(mut slot), Some(said)) => {
                self.count_unreadable(&said, 1);
                let before = slot.insert(Kept { said, revision: at });
                self.count_unreadable(&before.said, -1);
                true
            }
            (Slot::Occupied(slot), None) => {
                let before = slot.remove();
                self.count_unreadable(&before.said, -1);
                self.keys.fetch_sub(1, Ordering::Relaxed);
                true
            }
            (Slot::Vacant(slot), Some(said)) => {
                self.count_unreadable(&said, 1);
                self.keys.fetch_add(1, Ordering::Relaxed);
                slot.insert(Kept { said, revision: at });
                true
            }
            (Slot::Vacant(_), None) => false,
        }
    }

    /// Forgets what stood in a partition before an offset, and returns those keys.
    pub(super) fn forget_before(&self, partition: i32, offset: i64) -> Vec<K> {
        let mut forgotten = Vec::new();
        for shard in &self.shards {
            write(shard).retain(|key, kept| {
                let is_gone = kept.revision.partition == partition && kept.revision.offset < offset;
                if is_gone {
                    self.count_unreadable(&kept.said, -1);
                    self.keys.fetch_sub(1, Ordering::Relaxed);
                    forgotten.push(key.clone());
                }
                !is_gone
            });
        }
        forgotten
    }

    fn count_unreadable(&self, said: &Said<V>, by: isize) {
        if let Said::Unreadable(_) = said {
            self.unreadable.fetch_add(by.cast_unsigned(), Ordering::Relaxed);
        }
    }

    fn shard<Q>(&self, key: &Q) -> &Shard<K, V>
    where
        Q: Hash + ?Sized,
    {
        // The map in the shard uses the lowest and highest bits of a hash of its own.
        &self.shards[(self.hasher.hash_one(key) >> 16) as usize % SHARDS]
    }
}

/// Whether a record counts beside what is kept from another partition. Of two that are both not at home the higher partition counts.
fn is_nearer<V>(partition: i32, kept: &Kept<V>, home: i32) -> bool {
    partition == home || kept.revision.partition != home && partition > kept.revision.partition
}

// A panic while the lock was held cannot leave a map half changed: all that can panic there is the hashing of a key, before the change.
fn read<K, V>(shard: &Shard<K, V>) -> RwLockReadGuard<'_, Keys<K, V>> {
    shard.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<K, V>(shard: &Shard<K, V>) -> RwLockWriteGuard<'_, Keys<K, V>> {
    shard.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(partition: i32, offset: i64) -> Revision {
        Revision { partition, offset }
    }

    fn value(value: u32) -> Option<Said<u32>> {
        Some(Said::Value(Arc::new(value)))
    }

    #[test]
    fn what_stands_at_home_counts_in_whatever_order_partitions_are_read() {
        let old = |map: &Map<&str, u32>| map.apply("a", value(1), at(0, 9), 2);
        let new = |map: &Map<&str, u32>| map.apply("a", value(2), at(2, 0), 2);
        for order in [[&old as &dyn Fn(&_) -> bool, &new], [&new, &old]] {
            let map = Map::new();
            for apply in order {
                apply(&map);
            }
            assert_eq!(map.get("a").as_deref(), Some(&2));
        }
    }

    #[test]
    fn the_end_of_a_key_elsewhere_does_not_end_it_at_home() {
        let map = Map::new();
        assert!(map.apply("a", value(1), at(0, 0), 2));
        assert!(map.apply("a", value(2), at(2, 0), 2));
        assert!(!map.apply("a", None, at(0, 1), 2));
        assert_eq!(map.get("a").as_deref(), Some(&2));
        assert!(map.apply("a", None, at(2, 1), 2));
        assert_eq!((map.get("a"), map.keys()), (None, 0));
    }

    #[test]
    fn keys_that_cannot_be_read_are_counted_as_long_as_they_stand() {
        let map: Map<&str, u32> = Map::new();
        map.apply("a", Some(Said::Unreadable("not a number".into())), at(0, 0), 0);
        assert_eq!((map.keys(), map.unreadable(), map.get("a")), (1, 1, None));
        map.apply("a", value(1), at(0, 1), 0);
        assert_eq!((map.keys(), map.unreadable()), (1, 0));
        map.apply("a", Some(Said::Unreadable("not a number".into())), at(0, 2), 0);
        assert_eq!(map.forget_before(0, 3), ["a"]);
        assert_eq!((map.keys(), map.unreadable()), (0, 0));
    }
}
