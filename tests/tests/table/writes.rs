//! Writing: what was written can be read, and what is checked is never overtaken.

use std::collections::BTreeSet;
use std::time::Duration;

use barnabas::log::TopicSpec;
use barnabas::patterns::table::{Error, Revision, TableSettings};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;
use tokio::task::JoinSet;

use super::support::{Bench, Numbers, held, until, within};

on_both_logs!(
    who_waits_for_a_write_reads_it_ten_thousand_times_from_two_processes,
    concurrent_increments_from_several_processes_lose_none,
    of_many_that_create_a_key_one_does,
    an_update_of_what_has_changed_is_refused_and_leaves_nothing,
    a_refusal_is_never_about_something_older_than_the_writer_knows,
    writes_without_conditions_go_through_the_same_lanes,
    conditions_need_a_checked_table,
    a_write_that_the_log_refuses_is_nobody_elses_trouble,
    a_checked_table_does_not_write_when_keys_have_moved,
    a_write_whose_lane_is_taken_again_and_again_fails_in_time,
);

async fn who_waits_for_a_write_reads_it_ten_thousand_times_from_two_processes(engine: Engine) {
    let bench = Bench::new(engine, 4).await;
    let mut writers = JoinSet::new();
    for name in ["a", "b"] {
        let table = bench.open().await;
        writers.spawn(async move {
            for number in 0..5000 {
                let key = format!("{name}-{}", number % 50);
                let revision = table.put(&key, &number).await.expect("put");
                within("applied", table.wait_applied(revision)).await.expect("applied");
                let entry = table.entry(&key).expect("readable").expect("it is there");
                assert_eq!((*entry.value, entry.revision), (number, revision));
            }
            table
        });
    }
    let tables = writers.join_all().await;
    until("both are equal", || held(&tables[0]) == held(&tables[1])).await;
    assert_eq!(held(&tables[0]), bench.expected());
}

/// Adds one until it succeeds; how often it did not.
async fn increment(table: &Numbers, key: &str) -> u32 {
    for refused in 0.. {
        let entry = table.entry(key).expect("readable");
        let written = match entry {
            None => table.create(&key.to_owned(), &1).await,
            Some(entry) => table.update(&key.to_owned(), &(*entry.value + 1), entry.revision).await,
        };
        match written {
            Ok(revision) => {
                let own = table.entry(key).expect("readable").expect("it is there");
                assert!(own.revision >= revision, "what was written can be read");
                return refused;
            }
            Err(Error::Conflict { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!("it goes on for ever");
}

async fn concurrent_increments_from_several_processes_lose_none(engine: Engine) {
    let (processes, tasks, each) = match engine {
        Engine::Embedded => (3, 4, 50),
        Engine::Kafka => (2, 4, 10),
    };
    let bench = Bench::new(engine, 2).await;
    let mut running = JoinSet::new();
    for process in 0..processes {
        let table = bench.open_checked().await;
        for task in 0..tasks {
            let table = table.clone();
            running.spawn(async move {
                let own = format!("of-{process}-{task}");
                for _ in 0..each {
                    within("an increment", increment(&table, "shared")).await;
                    within("an increment", increment(&table, &own)).await;
                }
            });
        }
    }
    within("all increments", running.join_all()).await;
    let expected = bench.expected();
    assert_eq!(expected["shared"], (processes * tasks * each) as u64);
    assert_eq!(expected.len(), 1 + processes * tasks);
    assert!(
        expected.iter().all(|(key, sum)| key == "shared" || *sum == each as u64),
        "{expected:?}"
    );
    // Each number stands there once: none was written over by one that was refused later.
    let written: Vec<_> = bench
        .records()
        .into_iter()
        .filter(|record| record.2 == "shared")
        .collect();
    let numbers: BTreeSet<_> = written.iter().map(|record| &record.3).collect();
    assert_eq!(numbers.len(), written.len());
}

async fn of_many_that_create_a_key_one_does(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let tables = [bench.open_checked().await, bench.open_checked().await];
    let mut running = JoinSet::new();
    for number in 0..10 {
        let table = tables[number % 2].clone();
        running.spawn(async move { table.create(&"key".to_owned(), &(number as u64)).await });
    }
    let ended = within("all", running.join_all()).await;
    let created: Vec<Revision> = ended.iter().filter_map(|ended| ended.as_ref().ok().copied()).collect();
    assert_eq!(created.len(), 1, "{ended:?}");
    for error in ended.into_iter().filter_map(Result::err) {
        match error {
            Error::Conflict { current, .. } => assert_eq!(current, Some(created[0])),
            error => panic!("{error}"),
        }
    }
    assert_eq!(bench.records().len(), 1);
    // Deleted, it can be created again.
    within("deleted", tables[0].delete(&"key".to_owned()))
        .await
        .expect("deleted");
    within("created", tables[1].create(&"key".to_owned(), &11))
        .await
        .expect("created");
    assert_eq!(bench.expected()["key"], 11);
}

async fn an_update_of_what_has_changed_is_refused_and_leaves_nothing(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let table = bench.open_checked().await;
    let key = "key".to_owned();
    let first = within("created", table.create(&key, &1)).await.expect("created");
    let second = within("updated", table.update(&key, &2, first)).await.expect("updated");
    assert!(second > first);
    match within("refused", table.update(&key, &3, first)).await {
        Err(Error::Conflict { key, current }) => assert_eq!((key.as_str(), current), ("key", Some(second))),
        other => panic!("{other:?}"),
    }
    let deleted = within("refused", table.delete_at(&key, first)).await;
    assert!(matches!(deleted, Err(Error::Conflict { .. })), "{deleted:?}");
    within("deleted", table.delete_at(&key, second)).await.expect("deleted");
    match within("refused", table.update(&key, &4, second)).await {
        Err(Error::Conflict { current: None, .. }) => {}
        other => panic!("{other:?}"),
    }
    let values: Vec<_> = bench.records().into_iter().map(|record| record.3).collect();
    let last = values.last().map(String::as_str);
    assert_eq!(last, Some(""), "{values:?}");
    assert!(
        !values.contains(&"3".to_owned()) && !values.contains(&"4".to_owned()),
        "{values:?}"
    );
    assert_eq!(held(&bench.open().await), bench.expected());
}

/// A process that hears of a revision from another may have read less: it reads on before it refuses.
async fn a_refusal_is_never_about_something_older_than_the_writer_knows(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let (here, there) = (bench.open_checked().await, bench.open_checked().await);
    let key = "key".to_owned();
    let mut at = within("created", here.create(&key, &0)).await.expect("created");
    let rounds = match engine {
        Engine::Embedded => 100,
        Engine::Kafka => 6,
    };
    for number in 1..rounds {
        let table = [&here, &there][number % 2];
        let value = number as u64;
        let update = table.update(&key, &value, at);
        at = within("updated", update)
            .await
            .expect("it was told the newest revision");
    }
    assert_eq!(bench.expected()["key"], rounds as u64 - 1);
}

async fn writes_without_conditions_go_through_the_same_lanes(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    let table = bench.open_checked().await;
    let mut running = JoinSet::new();
    for number in 0..200u64 {
        let table = table.clone();
        running.spawn(async move {
            let key = format!("key-{}", number % 20);
            let revision = table.put(&key, &number).await.expect("put");
            assert!(table.entry(&key).expect("readable").expect("there").revision >= revision);
            revision
        });
    }
    let revisions: BTreeSet<_> = within("all", running.join_all()).await.into_iter().collect();
    assert_eq!(revisions.len(), 200, "each write has a place of its own");
    assert_eq!(held(&table), bench.expected());
}

async fn conditions_need_a_checked_table(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let table = bench.open().await;
    let key = "key".to_owned();
    let at = table.put(&key, &1).await.expect("put");
    for refused in [
        table.create(&"other".to_owned(), &1).await,
        table.update(&key, &2, at).await,
        table.delete_at(&key, at).await,
    ] {
        assert!(matches!(refused, Err(Error::NotChecked)), "{refused:?}");
    }
}

async fn a_write_that_the_log_refuses_is_nobody_elses_trouble(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let settings = bench.settings().checked();
    let log = bench.another_log().await;
    let table = barnabas::patterns::table::Table::<String, String>::open(&log, settings);
    let table = table.await.expect("a table");
    within("ready", table.ready()).await.expect("ready");
    let mut running = JoinSet::new();
    for number in 0..20 {
        let table = table.clone();
        running.spawn(async move {
            let value = match number {
                7 => "x".repeat(2 * TopicSpec::DEFAULT_MAX_MESSAGE_BYTES),
                _ => "small".to_owned(),
            };
            (number, table.put(&format!("key-{number}"), &value).await)
        });
    }
    for (number, written) in within("all", running.join_all()).await {
        match written {
            Ok(_) => assert_ne!(number, 7),
            Err(Error::Log(barnabas::log::Error::RecordTooLarge { .. })) => assert_eq!(number, 7),
            Err(error) => panic!("{number}: {error}"),
        }
    }
    assert_eq!(table.state().keys, 19);
}

async fn a_checked_table_does_not_write_when_keys_have_moved(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let table = bench.open_checked().await;
    within("created", table.create(&"key".to_owned(), &1))
        .await
        .expect("created");
    bench.set_partitions(4).await;
    until("it knows", || table.state().next_offsets.len() == 4).await;
    let refused = within("refused", table.put(&"key".to_owned(), &2)).await;
    assert!(
        matches!(refused, Err(Error::PartitionsRaised { partitions: 4, .. })),
        "{refused:?}"
    );
    let again = bench.open_with(TableSettings { ..bench.settings() }.checked()).await;
    let at = again.entry("key").expect("readable").expect("there").revision;
    within("updated", again.update(&"key".to_owned(), &3, at))
        .await
        .expect("updated");
    assert_eq!(held(&bench.open().await)["key"], 3);
}

async fn a_write_whose_lane_is_taken_again_and_again_fails_in_time(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let settings = TableSettings {
        write_timeout: Duration::from_millis(500),
        ..bench.settings().checked()
    };
    let table = bench.open_with(settings).await;
    let mut taking = JoinSet::new();
    for _ in 0..4 {
        let (log, lane) = (bench.another_log().await, format!("{}.table-0", bench.topic));
        taking.spawn(async move {
            loop {
                // They take it from each other too.
                drop(log.transactional_producer(&lane).await);
            }
        });
    }
    // Some are made in between.
    let refused = async {
        loop {
            if let Err(error) = table.put(&"key".to_owned(), &1).await {
                return error;
            }
        }
    };
    let refused = within("a refusal", refused).await;
    assert!(matches!(refused, Error::Log(_)), "{refused}");
    taking.shutdown().await;
    within("written", async {
        while table.put(&"key".to_owned(), &2).await.is_err() {}
    })
    .await;
    assert_eq!(bench.expected()["key"], 2);
}
