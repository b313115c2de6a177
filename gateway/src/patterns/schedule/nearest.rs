//! The schedules that are due next, as many as memory is given for.
//!
//! Invariant: of the schedules that were put, all between `floor` and `horizon` are here, and none else. What lies behind the horizon
//! is found again by putting them all anew, with the horizon for a floor.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::pending::Pending;

/// Which of two schedules comes first: that which is due first, then by id.
pub(super) type Key = (i64, Arc<str>);

/// How many schedules are held in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) schedules: usize,
    pub(super) bytes: usize,
}

#[derive(Debug)]
pub(super) struct Nearest {
    bounds: Bounds,
    /// What is before it is not wanted.
    floor: Option<Key>,
    /// What is not before it has been dropped.
    horizon: Option<Key>,
    by_due: BTreeMap<Key, Pending>,
    due_ms: HashMap<Arc<str>, i64>,
    bytes: usize,
}

impl Nearest {
    pub(super) fn new(bounds: Bounds, floor: Option<Key>) -> Self {
        Self {
            bounds,
            floor,
            horizon: None,
            by_due: BTreeMap::new(),
            due_ms: HashMap::new(),
            bytes: 0,
        }
    }

    /// Takes a schedule in the place of any of the same id.
    pub(super) fn put(&mut self, pending: Pending) {
        self.remove(&pending.id);
        let key = (pending.due_ms, pending.id.clone());
        let is_outside = self.horizon.as_ref().is_some_and(|horizon| key >= *horizon)
            || self.floor.as_ref().is_some_and(|floor| key < *floor);
        if is_outside {
            return;
        }
        self.bytes += pending.size_bytes();
        self.due_ms.insert(pending.id.clone(), pending.due_ms);
        self.by_due.insert(key, pending);
        // One is always kept, or nothing would ever fire.
        while self.by_due.len() > self.bounds.schedules.max(1)
            || (self.bytes > self.bounds.bytes && self.by_due.len() > 1)
        {
            let Some((key, last)) = self.by_due.pop_last() else {
                return;
            };
            self.bytes -= last.size_bytes();
            self.due_ms.remove(&key.1);
            self.horizon = Some(key);
        }
    }

    pub(super) fn remove(&mut self, id: &str) {
        if let Some((id, due_ms)) = self.due_ms.remove_entry(id)
            && let Some(removed) = self.by_due.remove(&(due_ms, id))
        {
            self.bytes -= removed.size_bytes();
        }
    }

    /// In the order in which they are due.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, &Pending)> {
        self.by_due.iter()
    }

    /// What was dropped begins here; `None`: nothing was.
    pub(super) fn horizon(&self) -> Option<&Key> {
        self.horizon.as_ref()
    }

    /// From now on schedules before the floor are taken too. All of them must have been put, and be over by now.
    pub(super) fn lift_floor(&mut self) {
        self.floor = None;
    }

    pub(super) fn len(&self) -> usize {
        self.by_due.len()
    }

    pub(super) fn into_pending(self) -> Vec<Pending> {
        self.by_due.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::ProducerRecord;
    use crate::patterns::schedule::pending::Pending;

    fn pending(id: &str, due_ms: i64) -> Pending {
        Pending {
            id: id.into(),
            due_ms,
            cron: None,
            event: ProducerRecord::to("t"),
            refused: None,
        }
    }

    fn ids(nearest: &Nearest) -> Vec<&str> {
        nearest.iter().map(|(_, pending)| pending.id.as_ref()).collect()
    }

    fn nearest(schedules: usize, floor: Option<Key>) -> Nearest {
        Nearest::new(
            Bounds {
                schedules,
                bytes: usize::MAX,
            },
            floor,
        )
    }

    #[test]
    fn the_nearest_are_kept_whatever_the_order_in_which_they_come() {
        let mut nearest = nearest(2, None);
        for (id, due_ms) in [("c", 30), ("a", 10), ("d", 40), ("b", 20)] {
            nearest.put(pending(id, due_ms));
        }
        assert_eq!(ids(&nearest), ["a", "b"]);
        assert_eq!(nearest.horizon(), Some(&(30, "c".into())));
    }

    #[test]
    fn the_last_of_an_id_counts() {
        let mut nearest = nearest(3, None);
        for (id, due_ms) in [("a", 10), ("b", 20), ("a", 30)] {
            nearest.put(pending(id, due_ms));
        }
        assert_eq!(ids(&nearest), ["b", "a"]);
        nearest.remove("b");
        nearest.remove("unknown");
        assert_eq!(ids(&nearest), ["a"]);
        assert_eq!(nearest.bytes, pending("a", 30).size_bytes());
    }

    #[test]
    fn what_was_dropped_is_found_behind_the_horizon_even_when_all_are_due_at_once() {
        let all: Vec<Pending> = (0..10).map(|number| pending(&number.to_string(), 5)).collect();
        let (mut floor, mut found) = (None, Vec::new());
        loop {
            let mut nearest = nearest(3, floor);
            all.iter().cloned().for_each(|pending| nearest.put(pending));
            found.extend(ids(&nearest).into_iter().map(str::to_owned));
            floor = nearest.horizon().cloned();
            if floor.is_none() {
                break;
            }
        }
        assert_eq!(found, (0..10).map(|number| number.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn bytes_are_bounded_too_but_one_is_always_kept() {
        let bounds = Bounds {
            schedules: 10,
            bytes: 1,
        };
        let mut nearest = Nearest::new(bounds, None);
        nearest.put(pending("b", 20));
        nearest.put(pending("a", 10));
        assert_eq!(ids(&nearest), ["a"]);
    }
}
