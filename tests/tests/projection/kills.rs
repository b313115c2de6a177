//! A worker of its own process is killed when it has written rows and not yet committed them.
//!
//! The database holds it there: in SQLite a trigger on the rows takes seconds, and in PostgreSQL one that is deferred to the commit.

use std::time::Duration;

use barnabas_tests::conformance::append_all;
use barnabas_tests::oracle::{OracleRecord, read_embedded, read_kafka};
use barnabas_tests::process::{Process, program};
use barnabas_tests::projection::{Asked, Entry, fold, random_entries};
use barnabas_tests::site::Engine;
use rusqlite::{Connection, ErrorCode};

use super::support::{Stage, Store, on_all, seeded};

on_all!(a_worker_killed_between_rows_and_commit_leaves_neither);

const KILLS: i64 = 20;
const EVENTS: i64 = 60;
const KEYS: u32 = 40;

/// How often in a row the database's lock has to be held for it to be the trigger that holds it.
const LOOKS: u32 = 15;
const LOOK_STEP: Duration = Duration::from_millis(20);

impl Stage {
    /// Appends with a log that is open for no longer: the embedded one serves one process at a time.
    async fn append_in_turn(&self, entries: &[Entry]) {
        let log = self.work.open_log().await.expect("a log");
        append_all(&log, entries.iter().map(|entry| entry.record(&self.work.topic))).await;
        log.close().await;
    }

    fn worker(&self) -> Process {
        let work = serde_json::to_string(&self.work).expect("work is JSON");
        let output = self.folder.path().join("worker");
        Process::start(&program("projection-worker"), &[work], &[], &output)
    }

    /// Makes the trigger that holds a transaction while `hold` says so.
    fn make_hold(&self) {
        let table = format!("\"{}_g1\"", self.work.view);
        self.execute("CREATE TABLE hold (is_on BIGINT NOT NULL)");
        self.execute("INSERT INTO hold VALUES (0)");
        match &self.asked {
            Asked::Sqlite(_) => {
                self.execute(
                    "CREATE VIEW slow AS WITH RECURSIVE count (n) AS \
                     (SELECT 1 UNION ALL SELECT n + 1 FROM count WHERE n < 50000000) SELECT n FROM count",
                );
                for event in ["INSERT", "UPDATE"] {
                    self.execute(&format!(
                        "CREATE TRIGGER hold_{event} AFTER {event} ON {table} WHEN (SELECT is_on FROM hold) = 1 \
                         BEGIN SELECT max(n) FROM slow; END"
                    ));
                }
            }
            Asked::Postgres(_) => self.execute(&format!(
                "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                 IF (SELECT is_on FROM hold) = 1 THEN PERFORM pg_sleep(60); END IF; RETURN NULL; END $$; \
                 CREATE CONSTRAINT TRIGGER hold AFTER INSERT OR UPDATE ON {table} DEFERRABLE INITIALLY DEFERRED \
                 FOR EACH ROW EXECUTE FUNCTION hold()"
            )),
        }
    }

    /// Waits until a transaction is held.
    async fn until_held(&self) {
        let mut held = 0;
        let is_held = || match &self.asked {
            Asked::Sqlite(file) => {
                let connection = Connection::open(file).expect("the file opens");
                connection.busy_timeout(Duration::ZERO).expect("it need not wait");
                let begun = connection.execute_batch("BEGIN IMMEDIATE");
                begun.is_err_and(|error| error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy))
            }
            Asked::Postgres(postgres) => {
                let held = "SELECT count(*) FROM pg_stat_activity WHERE query ILIKE 'commit%' AND state = 'active'";
                postgres.query(held) != ["0"]
            }
        };
        let needed = match self.asked {
            Asked::Sqlite(_) => LOOKS,
            Asked::Postgres(_) => 1,
        };
        self.until("a transaction is held", || {
            while held < needed {
                if !is_held() {
                    held = 0;
                    return false;
                }
                held += 1;
                std::thread::sleep(LOOK_STEP);
            }
            true
        })
        .await;
    }

    /// Rows and positions as they stand.
    fn state(&self) -> (Vec<String>, Vec<String>) {
        (self.rows(), self.positions())
    }

    fn records_in_turn(&self) -> Vec<OracleRecord> {
        match self.engine {
            Engine::Embedded => read_embedded(self.work.log.as_ref(), &self.work.topic),
            Engine::Kafka => read_kafka(&self.work.log, &self.work.topic),
        }
    }

    async fn until_equal(&self) {
        let expected = fold(&self.records_in_turn());
        self.until("the view is the fold", || self.try_rows().as_ref() == Some(&expected))
            .await;
    }
}

async fn a_worker_killed_between_rows_and_commit_leaves_neither(store: Store) {
    let mut random = seeded("kills");
    let stage = Stage::new(store).await;
    stage.log.close().await;
    let mut next = 0;
    let mut more = || {
        next += EVENTS;
        random_entries(&mut random, next - EVENTS..next, KEYS)
    };
    stage.append_in_turn(&more()).await;
    let worker = stage.worker();
    stage.until_equal().await;
    worker.stop();
    stage.make_hold();
    for kill in 0..KILLS {
        stage.append_in_turn(&more()).await;
        let before = stage.state();
        stage.execute("UPDATE hold SET is_on = 1");
        let worker = stage.worker();
        stage.until_held().await;
        worker.kill();
        if let Asked::Postgres(postgres) = &stage.asked {
            // A server notices late that its client has gone. It would commit after all, which is right too.
            postgres.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ILIKE 'commit%'");
        }
        assert_eq!(stage.state(), before, "neither rows nor offsets were committed");
        stage.execute("UPDATE hold SET is_on = 0");
        if kill % 5 == 4 {
            let worker = stage.worker();
            stage.until_equal().await;
            worker.stop();
        }
    }
    assert_eq!(stage.rows(), fold(&stage.records_in_turn()));
}
