//! The database goes away and comes back.

use std::time::Duration;

use barnabas_tests::fault::SqliteLock;
use barnabas_tests::projection::{Asked, random_entries};
use barnabas_tests::proxy::{Proxy, Weather};

use super::support::{Stage, Store, on_all, seeded};

/// How long the projection has SQLite wait for a lock, before it tries again itself.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

on_all!(
    a_database_that_is_away_at_first_is_waited_for,
    a_database_that_goes_away_and_comes_back_misses_nothing,
);

async fn a_database_that_is_away_at_first_is_waited_for(store: Store) {
    let mut random = seeded("away");
    let mut stage = Stage::new(store).await;
    stage.append(&random_entries(&mut random, 0..500, 50)).await;
    let way = match &stage.asked {
        Asked::Sqlite(file) => {
            std::fs::remove_dir(file.parent().expect("a folder")).expect("it is empty");
            None
        }
        Asked::Postgres(postgres) => {
            let way = Proxy::start([postgres.address()]).await;
            way.set(Weather::Silent);
            stage.work.database = postgres.url(way.address());
            Some(way)
        }
    };
    let projection = stage.start().await;
    match (&stage.asked, &way) {
        (Asked::Sqlite(file), _) => std::fs::create_dir(file.parent().expect("a folder")).expect("a folder"),
        (Asked::Postgres(_), Some(way)) => {
            stage.until("it has been tried", || way.accepted() > 0).await;
            way.set(Weather::Clear);
        }
        (Asked::Postgres(_), None) => unreachable!("there is a way to a server"),
    }
    stage.until_folded().await;
    projection.shutdown().await.expect("a good end");
}

async fn a_database_that_goes_away_and_comes_back_misses_nothing(store: Store) {
    let mut random = seeded("outage");
    let mut stage = Stage::new(store).await;
    let way = match &stage.asked {
        Asked::Sqlite(_) => None,
        Asked::Postgres(postgres) => {
            let way = Proxy::start([postgres.address()]).await;
            stage.work.database = postgres.url(way.address());
            Some(way)
        }
    };
    let projection = stage.start().await;
    stage.append(&random_entries(&mut random, 0..1000, 50)).await;
    stage.until_folded().await;
    let more = random_entries(&mut random, 1000..4000, 50);
    for (round, some) in more.chunks(500).enumerate() {
        match (&stage.asked, &way) {
            (Asked::Sqlite(file), _) => {
                let lock = SqliteLock::take(file);
                let before = stage.positions();
                stage.append(some).await;
                if round == 0 {
                    // So long that SQLite itself gives up waiting.
                    tokio::time::sleep(BUSY_TIMEOUT + Duration::from_secs(2)).await;
                }
                assert_eq!(stage.positions(), before, "nothing is projected meanwhile");
                drop(lock);
            }
            (Asked::Postgres(_), Some(way)) => {
                let accepted = way.accepted();
                way.set(Weather::Silent);
                way.reset();
                // What was on its way has arrived by then.
                stage
                    .until("it has been tried again", || way.accepted() > accepted)
                    .await;
                let before = stage.positions();
                stage.append(some).await;
                assert_eq!(stage.positions(), before, "nothing is projected meanwhile");
                way.set(Weather::Clear);
                // In the middle of what comes next.
                way.reset();
            }
            (Asked::Postgres(_), None) => unreachable!("there is a way to a server"),
        }
    }
    stage.until_folded().await;
    projection.shutdown().await.expect("a good end");
    assert_eq!(stage.letters().len(), 0);
}
