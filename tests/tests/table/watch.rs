//! Following a table.

use std::collections::BTreeMap;

use barnabas::patterns::table::{Error, Update};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;

use super::support::{Bench, within};

on_both_logs!(
    a_watcher_of_a_key_is_told_how_it_stands_and_what_changes,
    a_watcher_of_all_keys_can_follow_the_table,
    a_slow_watcher_is_told_anew_how_all_stand,
);

async fn a_watcher_of_a_key_is_told_how_it_stands_and_what_changes(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    let table = bench.open().await;
    let mut watch = table.watch("key".to_owned());
    let next = async |watch: &mut barnabas::patterns::table::Watch<String, u64>| {
        let told = within("it is told", watch.next()).await;
        told.map(|entry| entry.map(|entry| *entry.value))
    };
    assert_eq!(next(&mut watch).await.expect("readable"), None);
    table.put(&"other".to_owned(), &9).await.expect("put");
    table.put(&"key".to_owned(), &1).await.expect("put");
    assert_eq!(next(&mut watch).await.expect("readable"), Some(1));
    bench.append([bench.record("key", "no number")]).await;
    assert!(matches!(next(&mut watch).await, Err(Error::Unreadable { .. })));
    // Of what changes while nobody asks the last state is told.
    let mut last = None;
    for number in 2..100 {
        last = Some(table.put(&"key".to_owned(), &number).await.expect("put"));
    }
    within("applied", table.wait_applied(last.expect("some")))
        .await
        .expect("applied");
    assert_eq!(next(&mut watch).await.expect("readable"), Some(99));
    table.delete(&"key".to_owned()).await.expect("deleted");
    assert_eq!(next(&mut watch).await.expect("readable"), None);
}

async fn a_watcher_of_all_keys_can_follow_the_table(engine: Engine) {
    let bench = Bench::new(engine, 3).await;
    bench
        .append((0..100).map(|number| bench.record(format!("key-{number}"), number)))
        .await;
    let table = bench.open().await;
    let mut watch = table.watch_all();
    let writer = table.clone();
    let writing = tokio::spawn(async move {
        for number in 0..300u64 {
            let key = format!("key-{}", number % 150);
            match number % 5 {
                0 => writer.delete(&key).await.expect("deleted"),
                _ => writer.put(&key, &(1000 + number)).await.expect("put"),
            };
        }
        writer.put(&"last".to_owned(), &1).await.expect("put");
    });
    let mut followed = BTreeMap::new();
    let mut snapshots = 0;
    // The last is in a partition of its own, and can be told before what was written earlier in the others.
    while !followed.contains_key("last") || followed != bench.expected() {
        match within("an update", watch.next()).await.expect("it goes on") {
            Update::Snapshot(entries) => {
                snapshots += 1;
                followed = entries.into_iter().map(|(key, entry)| (key, *entry.value)).collect();
            }
            Update::Changed(key, entry) => drop(followed.insert(key, *entry.value)),
            Update::Deleted(key) => drop(followed.remove(&key)),
            Update::Unreadable(key, error) => panic!("{key}: {error}"),
        }
    }
    writing.await.expect("no panic");
    assert_eq!(snapshots, 1);
    assert_eq!(followed, bench.expected());
}

async fn a_slow_watcher_is_told_anew_how_all_stand(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let table = bench.open().await;
    let mut watch = table.watch_all();
    match within("at first", watch.next()).await.expect("it goes on") {
        Update::Snapshot(entries) => assert!(entries.is_empty()),
        other => panic!("{other:?}"),
    }
    // More keys than wait for a watcher.
    bench
        .append((0..12_000).map(|number| bench.record(format!("key-{number}"), number)))
        .await;
    super::support::until("all are here", || table.state().keys == 12_000).await;
    match within("anew", watch.next()).await.expect("it goes on") {
        Update::Snapshot(entries) => assert_eq!(entries.len(), 12_000),
        other => panic!("{other:?}"),
    }
    table.put(&"one more".to_owned(), &1).await.expect("put");
    match within("then changes", watch.next()).await.expect("it goes on") {
        Update::Changed(key, entry) => assert_eq!((key.as_str(), *entry.value), ("one more", 1)),
        other => panic!("{other:?}"),
    }
}
