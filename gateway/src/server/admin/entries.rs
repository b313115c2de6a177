//! A page of what stands on a compacted topic now: the last record of each key, in the order of keys.
//!
//! Invariant: of the records that were put, the last of each key from `from` to `horizon` is here, and none else. What lies behind the
//! horizon is found by putting them all anew, with the horizon for a start. So memory is bounded, however many keys there are.
//!
//! A key belongs to a partition: on a topic to which partitions were added, the same key may stand in two.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;

use crate::log::{Batch, Record};

/// A key, and the partition in which it stands.
pub(super) type Place = (Bytes, i32);

/// What is held while a topic is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) entries: usize,
    pub(super) bytes: usize,
}

#[derive(Debug)]
pub(super) struct Entries {
    /// With what keys begin that are wanted.
    prefix: Bytes,
    /// What is before it is not wanted.
    from: Option<Place>,
    /// What is not before it has been dropped.
    horizon: Option<Place>,
    bounds: Bounds,
    by_key: BTreeMap<Place, Record>,
    bytes: usize,
}

impl Entries {
    pub(super) fn new(prefix: impl Into<Bytes>, from: Option<Place>, bounds: Bounds) -> Self {
        Self {
            prefix: prefix.into(),
            from,
            horizon: None,
            bounds,
            by_key: BTreeMap::new(),
            bytes: 0,
        }
    }

    /// Takes the records of a batch, in order. Those without a key stand for nothing.
    pub(super) fn put(&mut self, batch: Batch) {
        // The last of each key is enough.
        let mut last = HashMap::new();
        for record in batch.records {
            if let Some(key) = record.key.clone()
                && key.starts_with(&self.prefix)
            {
                last.insert(key, record);
            }
        }
        for (key, record) in last {
            self.put_one((key, batch.partition.partition), record);
        }
    }

    fn put_one(&mut self, place: Place, record: Record) {
        let is_outside = self.horizon.as_ref().is_some_and(|horizon| place >= *horizon)
            || self.from.as_ref().is_some_and(|from| place < *from);
        if is_outside {
            return;
        }
        if let Some(before) = self.by_key.remove(&place) {
            self.bytes -= before.size_bytes();
        }
        // A tombstone.
        if record.value.is_none() {
            return;
        }
        self.bytes += record.size_bytes();
        self.by_key.insert(place, record);
        // One is always kept, or nothing behind it would ever be shown.
        while self.by_key.len() > self.bounds.entries.max(1)
            || (self.bytes > self.bounds.bytes && self.by_key.len() > 1)
        {
            let Some((place, last)) = self.by_key.pop_last() else {
                return;
            };
            self.bytes -= last.size_bytes();
            self.horizon = Some(place);
        }
    }

    /// The first of them, `most` at most, with their partitions, and where the next page begins; `None`: nothing is left.
    pub(super) fn into_page(mut self, most: usize) -> (Vec<(i32, Record)>, Option<Place>) {
        let mut next = self.horizon;
        while self.by_key.len() > most {
            next = self.by_key.pop_last().map(|(place, _)| place);
        }
        let page = self.by_key.into_iter();
        (page.map(|((_, partition), record)| (partition, record)).collect(), next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{Headers, NextOffset, TopicPartition};

    const ROOMY: Bounds = Bounds {
        entries: 100,
        bytes: 1000,
    };

    /// A batch of keys and values; no value is a tombstone.
    fn batch(partition: i32, records: &[(&'static str, Option<&'static str>)]) -> Batch {
        let record = |(offset, (key, value)): (usize, &(&'static str, Option<&'static str>))| Record {
            offset: i64::try_from(offset).expect("few"),
            timestamp_ms: 0,
            key: Some(Bytes::from_static(key.as_bytes())),
            value: value.map(|value| Bytes::from_static(value.as_bytes())),
            headers: Headers::new(),
        };
        Batch {
            partition: TopicPartition::new("table", partition),
            records: records.iter().enumerate().map(record).collect(),
            next_offset: NextOffset(0),
            caught_up: false,
        }
    }

    /// Keys and values of a page, and the key where the next begins.
    fn page(entries: Entries, most: usize) -> (Vec<String>, Option<String>) {
        let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
        let (page, next) = entries.into_page(most);
        let shown = page.iter().map(|(partition, record)| {
            let key = record.key.as_ref().map(text).unwrap_or_default();
            let value = record.value.as_ref().map(text).unwrap_or_default();
            format!("{key}={value}@{partition}")
        });
        (shown.collect(), next.map(|(key, _)| text(&key)))
    }

    #[test]
    fn the_last_of_each_key_is_shown_in_the_order_of_keys() {
        let mut entries = Entries::new("", None, ROOMY);
        entries.put(batch(
            0,
            &[("b", Some("1")), ("a", Some("1")), ("c", Some("1")), ("b", Some("2"))],
        ));
        entries.put(batch(0, &[("c", None), ("a", Some("3"))]));
        entries.put(batch(1, &[("a", Some("other"))]));
        assert_eq!(
            page(entries, 10),
            (vec!["a=3@0".into(), "a=other@1".into(), "b=2@0".into()], None)
        );
    }

    #[test]
    fn keys_that_begin_otherwise_are_left_out() {
        let mut entries = Entries::new("us", None, ROOMY);
        entries.put(batch(
            0,
            &[
                ("u", Some("1")),
                ("us", Some("1")),
                ("user", Some("1")),
                ("vus", Some("1")),
            ],
        ));
        assert_eq!(page(entries, 10).0, ["us=1@0", "user=1@0"]);
    }

    #[test]
    fn what_is_dropped_is_on_the_next_page() {
        let bounds = Bounds { entries: 2, ..ROOMY };
        let (mut from, mut seen, mut pages) = (None, Vec::new(), 0);
        loop {
            let mut entries = Entries::new("", from, bounds);
            for key in ["e", "a", "d", "b", "c"] {
                entries.put(batch(0, &[(key, Some("1"))]));
                assert!(entries.by_key.len() <= 2);
            }
            let (page, next) = entries.into_page(2);
            seen.extend(page.into_iter().filter_map(|(_, record)| record.key));
            pages += 1;
            from = next;
            if from.is_none() {
                break;
            }
        }
        assert_eq!((seen.concat(), pages), (b"abcde".to_vec(), 3));
    }

    #[test]
    fn no_page_leaves_out_what_was_dropped_before_there_was_room_again() {
        let mut entries = Entries::new("", None, Bounds { entries: 2, ..ROOMY });
        for (key, value) in [
            ("a", Some("1")),
            ("b", Some("1")),
            ("c", Some("1")),
            ("a", None),
            ("d", Some("1")),
        ] {
            entries.put(batch(0, &[(key, value)]));
        }
        assert_eq!(page(entries, 2), (vec!["b=1@0".into()], Some("c".into())));
    }

    #[test]
    fn a_page_that_is_shorter_than_what_is_held_ends_where_the_next_begins() {
        let mut entries = Entries::new("", None, ROOMY);
        entries.put(batch(0, &[("a", Some("1")), ("b", Some("1")), ("c", Some("1"))]));
        assert_eq!(page(entries, 1), (vec!["a=1@0".into()], Some("b".into())));
    }

    #[test]
    fn bytes_are_bounded_and_one_that_is_larger_is_shown_all_the_same() {
        let bounds = Bounds { bytes: 5, ..ROOMY };
        let mut entries = Entries::new("", None, bounds);
        entries.put(batch(0, &[("a", Some("much longer"))]));
        entries.put(batch(0, &[("b", Some("1"))]));
        assert_eq!(page(entries, 10), (vec!["a=much longer@0".into()], Some("b".into())));
        let mut entries = Entries::new("", None, bounds);
        entries.put(batch(0, &[("a", Some("1")), ("b", Some("1"))]));
        entries.put(batch(0, &[("a", None), ("b", Some("2"))]));
        entries.put(batch(0, &[("c", Some("1"))]));
        assert_eq!(
            page(entries, 10),
            (vec!["b=2@0".into(), "c=1@0".into()], None),
            "what is gone takes no room"
        );
    }
}
