//! A view is built anew beside the live one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barnabas::patterns::Error;
use barnabas_tests::conformance::{make_topic, within};
use barnabas_tests::projection::{Asked, Entry, random_entries};

use super::support::{Stage, Store, on_all, seeded};

on_all!(
    readers_see_a_whole_view_at_every_moment_of_a_rebuild,
    a_topic_made_anew_is_projected_anew,
);

const KEYS: i64 = 300;

fn set(number: i64) -> Entry {
    Entry::Set {
        key: format!("k{}", number % KEYS),
        value: format!("v{number}"),
        number,
    }
}

/// The number of each key.
fn numbers(rows: &[String]) -> BTreeMap<String, i64> {
    let row = |row: &String| {
        let mut cells = row.split('|');
        let key = cells.next().expect("a key").to_owned();
        (key, cells.nth(1).expect("a number").parse().expect("a number"))
    };
    rows.iter().map(row).collect()
}

async fn readers_see_a_whole_view_at_every_moment_of_a_rebuild(store: Store) {
    let stage = Arc::new(Stage::new(store).await);
    stage.append(&(0..6000).map(set).collect::<Vec<_>>()).await;
    let first = stage.start().await;
    within("a view", first.ready()).await.expect("it is live");

    let stopping = Arc::new(AtomicBool::new(false));
    let appending = tokio::spawn({
        let (stage, stopping) = (stage.clone(), stopping.clone());
        async move {
            let mut next = 6000;
            while !stopping.load(Ordering::Relaxed) {
                stage.append(&(next..next + 40).map(set).collect::<Vec<_>>()).await;
                next += 40;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    });
    let reading = tokio::task::spawn_blocking({
        let (stage, stopping) = (stage.clone(), stopping.clone());
        move || {
            let (mut last, mut reads) = (numbers(&stage.rows()), 0);
            while !stopping.load(Ordering::Relaxed) {
                let now = numbers(&stage.rows());
                assert_eq!(now.len() as i64, KEYS, "each key has a row");
                for (key, number) in &now {
                    assert!(*number >= last[key], "{key} went back from {} to {number}", last[key]);
                }
                last = now;
                reads += 1;
            }
            reads
        }
    });
    within("a rebuild", first.rebuild()).await.expect("it is live");
    assert!(stage.asked.try_query("SELECT doubled FROM entries").is_none());
    let mut raised = stage.work.clone();
    raised.version = 2;
    let second = stage.start_with(&raised).await;
    within("the new version", second.ready()).await.expect("it is live");
    let ended = within("the old version's end", first.ended())
        .await
        .expect_err("it is superseded");
    assert!(
        matches!(
            &ended,
            Error::Superseded {
                version: 1,
                live: 2,
                ..
            }
        ),
        "{ended}"
    );
    stopping.store(true, Ordering::Relaxed);
    appending.await.expect("it appends");
    assert!(reading.await.expect("all that it read was whole") > 5);
    stage.until_folded().await;
    let wrong = stage
        .asked
        .query("SELECT key FROM entries WHERE doubled IS NULL OR doubled <> number * 2");
    assert_eq!(wrong, Vec::<String>::new());
    let tables = match stage.asked {
        Asked::Sqlite(_) => "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'entries%'",
        Asked::Postgres(_) => "SELECT tablename FROM pg_tables WHERE tablename LIKE 'entries%'",
    };
    stage
        .until("the old generations are dropped", || {
            stage.asked.query(tables) == ["entries_g3"]
        })
        .await;
    // The old version may be started again by mistake.
    let third = stage.start().await;
    let ended = within("an end", third.ended()).await.expect_err("it is superseded");
    assert!(matches!(ended, Error::Superseded { .. }), "{ended}");
    second.shutdown().await.expect("a good end");
    // Other columns of the same version are a mistake too.
    let mut changed = raised.settings();
    changed.view = changed
        .view
        .column("forgotten", barnabas::patterns::projection::ColumnType::Text);
    let fourth = barnabas::patterns::projection::Projection::start(
        &stage.log,
        raised.open_database(),
        changed,
        raised.projector(),
    );
    let ended = within("an end", fourth.await.expect("it starts").ended()).await;
    assert!(
        matches!(&ended, Err(Error::Setting { setting: "version", .. })),
        "{ended:?}"
    );
}

async fn a_topic_made_anew_is_projected_anew(store: Store) {
    let mut random = seeded("anew");
    let stage = Stage::new(store).await;
    stage.append(&random_entries(&mut random, 0..500, 50)).await;
    let projection = stage.start().await;
    stage.until_folded().await;
    projection.shutdown().await.expect("a good end");
    stage.log.delete_topic(&stage.work.topic).await.expect("deleted");
    let spec = barnabas::log::TopicSpec::new(stage.work.topic.as_str(), 4);
    make_topic(&stage.log, spec).await;
    stage.append(&random_entries(&mut random, 500..600, 50)).await;
    let projection = stage.start().await;
    stage.until_folded().await;
    projection.shutdown().await.expect("a good end");
}
