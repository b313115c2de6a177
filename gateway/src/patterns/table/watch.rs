//! Following a table: [`Watch`] one key, [`WatchAll`] all of them. Both say first how things stand.
//!
//! A watcher is told that a key has changed, and reads the map itself when it comes to it: so a slow one is told of the last state only,
//! and what waits for it is no more than keys.
//!
//! Invariant: who watches is entered before it looks, and told after the map has changed: no change is missed.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;

use super::Table;
use super::entry::{Entry, Key, Revision};
use super::error::Error;

/// Changed keys that wait for a watcher of all; when there are more, it is told anew how all stand.
const WAITING_KEYS: usize = 10_000;

/// Who follows a table.
#[derive(Debug)]
pub(super) struct Watchers<K>(Mutex<Entered<K>>);

#[derive(Debug)]
struct Entered<K> {
    keys: HashMap<K, Vec<Arc<Notify>>>,
    all: Vec<Weak<Waiting<K>>>,
}

impl<K> Default for Watchers<K> {
    fn default() -> Self {
        Self(Mutex::new(Entered {
            keys: HashMap::new(),
            all: Vec::new(),
        }))
    }
}

impl<K: Eq + Hash + Clone> Watchers<K> {
    /// Says that a key has changed.
    pub(super) fn tell(&self, key: &K) {
        let mut entered = self.entered();
        if let Some(watchers) = entered.keys.get(key) {
            watchers.iter().for_each(|watcher| watcher.notify_one());
        }
        entered.all.retain(|watcher| {
            let watcher = watcher.upgrade();
            if let Some(watcher) = &watcher {
                watcher.push(key);
            }
            watcher.is_some()
        });
    }

    /// Enters one that follows all keys, and drops those that are gone: on a quiet table nothing else would.
    fn enter(&self, waiting: &Arc<Waiting<K>>) {
        let mut entered = self.entered();
        entered.all.retain(|watcher| watcher.strong_count() > 0);
        entered.all.push(Arc::downgrade(waiting));
    }

    fn entered(&self) -> MutexGuard<'_, Entered<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows one key. See [`Table::watch`].
#[derive(Debug)]
pub struct Watch<K: Key, V> {
    table: Table<K, V>,
    key: K,
    changed: Arc<Notify>,
    /// What was told last; the outer `None`: nothing was.
    told: Option<Option<Revision>>,
}

impl<K: Key, V: Serialize + DeserializeOwned + Send + Sync + 'static> Watch<K, V> {
    pub(super) fn new(table: Table<K, V>, key: K) -> Self {
        let changed = Arc::new(Notify::new());
        let mut entered = table.shared.watchers.entered();
        entered.keys.entry(key.clone()).or_default().push(changed.clone());
        drop(entered);
        Self {
            table,
            key,
            changed,
            told: None,
        }
    }

    /// How the key stands: at once when first called, then when it has changed; `None`: it is not there. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Unreadable`]: the next call goes on. Any other is that with which the table has ended.
    pub async fn next(&mut self) -> Result<Option<Entry<V>>, Error> {
        let shared = &self.table.shared;
        loop {
            let entry = shared.entry(&self.key);
            let at = match &entry {
                Ok(entry) => entry.as_ref().map(|entry| entry.revision),
                Err(Error::Unreadable { revision, .. }) => Some(*revision),
                Err(_) => None,
            };
            if self.told != Some(at) {
                self.told = Some(at);
                return entry;
            }
            tokio::select! {
                () = self.changed.notified() => {}
                error = shared.progress.until_ended() => return Err(error),
            }
        }
    }
}

impl<K: Key, V> Drop for Watch<K, V> {
    fn drop(&mut self) {
        let mut entered = self.table.shared.watchers.entered();
        if let Some(watchers) = entered.keys.get_mut(&self.key) {
            watchers.retain(|watcher| !Arc::ptr_eq(watcher, &self.changed));
            if watchers.is_empty() {
                entered.keys.remove(&self.key);
            }
        }
    }
}

/// What a watcher of all keys is told.
#[derive(Debug)]
pub enum Update<K, V> {
    /// How all keys stand that can be read: first of all, and again for a watcher that was too slow. What is not in it is not there.
    Snapshot(Vec<(K, Entry<V>)>),
    /// A key has changed.
    Changed(K, Entry<V>),
    /// A key is no longer there.
    Deleted(K),
    /// A key has a value that cannot be read: [`Error::Unreadable`].
    Unreadable(K, Error),
}

/// Follows all keys. See [`Table::watch_all`].
#[derive(Debug)]
pub struct WatchAll<K, V> {
    table: Table<K, V>,
    waiting: Arc<Waiting<K>>,
}

#[derive(Debug)]
struct Waiting<K> {
    keys: Mutex<Keys<K>>,
    changed: Notify,
}

#[derive(Debug)]
struct Keys<K> {
    order: VecDeque<K>,
    known: HashSet<K>,
    /// There is more to say than keys can be kept for.
    all: bool,
}

impl<K> Default for Waiting<K> {
    /// All is still to be said.
    fn default() -> Self {
        Self {
            keys: Mutex::new(Keys::all()),
            changed: Notify::new(),
        }
    }
}

enum Next<K> {
    All,
    Key(K),
}

impl<K: Eq + Hash + Clone> Waiting<K> {
    fn push(&self, key: &K) {
        let mut keys = self.keys();
        if keys.all || keys.known.contains(key) {
            return;
        }
        if keys.order.len() == WAITING_KEYS {
            *keys = Keys::all();
        } else {
            keys.known.insert(key.clone());
            keys.order.push_back(key.clone());
        }
        drop(keys);
        self.changed.notify_one();
    }

    fn take(&self) -> Option<Next<K>> {
        let mut keys = self.keys();
        if keys.all {
            keys.all = false;
            return Some(Next::All);
        }
        let key = keys.order.pop_front()?;
        keys.known.remove(&key);
        Some(Next::Key(key))
    }

    fn keys(&self) -> MutexGuard<'_, Keys<K>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K> Keys<K> {
    fn all() -> Self {
        Self {
            order: VecDeque::new(),
            known: HashSet::new(),
            all: true,
        }
    }
}

impl<K: Key, V: Serialize + DeserializeOwned + Send + Sync + 'static> WatchAll<K, V> {
    pub(super) fn new(table: Table<K, V>) -> Self {
        let waiting = Arc::default();
        table.shared.watchers.enter(&waiting);
        Self { table, waiting }
    }

    /// What has changed: a snapshot when first called. The same state may be told twice. Cancel safe.
    ///
    /// # Errors
    /// That with which the table has ended.
    pub async fn next(&mut self) -> Result<Update<K, V>, Error> {
        let shared = &self.table.shared;
        loop {
            match self.waiting.take() {
                Some(Next::All) => return Ok(Update::Snapshot(self.table.entries())),
                Some(Next::Key(key)) => {
                    return Ok(match shared.entry(&key) {
                        Ok(Some(entry)) => Update::Changed(key, entry),
                        Ok(None) => Update::Deleted(key),
                        Err(error) => Update::Unreadable(key, error),
                    });
                }
                None => tokio::select! {
                    () = self.waiting.changed.notified() => {}
                    error = shared.progress.until_ended() => return Err(error),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchers_that_are_gone_are_dropped_though_nothing_changes() {
        let watchers = Watchers::<String>::default();
        let stays: Arc<Waiting<_>> = Arc::default();
        watchers.enter(&stays);
        for _ in 0..10 {
            watchers.enter(&Arc::default());
        }
        assert!(watchers.entered().all.len() <= 2);
        assert!(stays.take().is_some(), "who stays is told how all stand");
        watchers.tell(&"key".to_owned());
        assert!(stays.take().is_some(), "who stays is told of changes");
    }
}
