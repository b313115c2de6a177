//! What the tests share: a topic, a database, and projections of the one into the other.

use std::time::{Duration, Instant};

use barnabas::log::{Log, TopicSpec};
use barnabas::patterns::dead_letter::dead_letter_topic;
use barnabas::patterns::projection::Projection;
use barnabas_tests::conformance::{append_all, make_topic, unique};
use barnabas_tests::kafka::brokers;
use barnabas_tests::oracle::{OracleRecord, read_embedded, read_kafka};
use barnabas_tests::postgres::Postgres;
use barnabas_tests::projection::{Asked, Entry, ProjectionWork, fold};
use barnabas_tests::site::Engine;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tempfile::TempDir;

/// Makes a test of each function for each log and each database.
macro_rules! on_all {
    ($($name:ident),+ $(,)?) => {
        $crate::projection::support::on_all!(@in embedded_sqlite, Embedded, Sqlite, $($name),+);
        $crate::projection::support::on_all!(@in embedded_postgres, Embedded, Postgres, $($name),+);
        $crate::projection::support::on_all!(@in kafka_sqlite, Kafka, Sqlite, $($name),+);
        $crate::projection::support::on_all!(@in kafka_postgres, Kafka, Postgres, $($name),+);
    };
    (@in $module:ident, $engine:ident, $database:ident, $($name:ident),+) => {
        mod $module {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let engine = barnabas_tests::site::Engine::$engine;
                let database = $crate::projection::support::DatabaseKind::$database;
                super::$name($crate::projection::support::Store { engine, database }).await;
            })+
        }
    };
}

pub(crate) use on_all;

/// Within it everything that a test waits for has happened.
const SOON: Duration = Duration::from_secs(90);

pub const PARTITIONS: i32 = 4;

/// Which log, and which database.
#[derive(Clone, Copy, Debug)]
pub struct Store {
    pub engine: Engine,
    pub database: DatabaseKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseKind {
    Sqlite,
    Postgres,
}

/// A topic, a view, and who asks.
pub struct Stage {
    pub work: ProjectionWork,
    pub log: Log,
    pub asked: Asked,
    pub engine: Engine,
    pub folder: TempDir,
}

impl Stage {
    pub async fn new(store: Store) -> Self {
        let folder = TempDir::new().expect("a folder");
        let file = folder.path().join("views").join("view.sqlite");
        std::fs::create_dir(folder.path().join("views")).expect("a folder");
        let (asked, database) = match store.database {
            DatabaseKind::Sqlite => (Asked::Sqlite(file.clone()), file.display().to_string()),
            DatabaseKind::Postgres => {
                let postgres = Postgres::start();
                let url = postgres.url(postgres.address());
                (Asked::Postgres(Box::new(postgres)), url)
            }
        };
        let work = ProjectionWork {
            log: match store.engine {
                Engine::Embedded => folder.path().join("log").display().to_string(),
                Engine::Kafka => brokers(),
            },
            database,
            group: unique("entries"),
            topic: unique("entries"),
            view: "entries".to_owned(),
            version: 1,
        };
        let log = work.open_log().await.expect("a log");
        make_topic(&log, TopicSpec::new(work.topic.as_str(), PARTITIONS)).await;
        for spec in work.settings().topics(&log).await.expect("topics") {
            make_topic(&log, spec).await;
        }
        Self {
            work,
            log,
            asked,
            engine: store.engine,
            folder,
        }
    }

    pub async fn start(&self) -> Projection {
        self.start_with(&self.work).await
    }

    pub async fn start_with(&self, work: &ProjectionWork) -> Projection {
        let started = Projection::start(&self.log, work.open_database(), work.settings(), work.projector());
        started.await.expect("it starts")
    }

    pub async fn append(&self, entries: &[Entry]) {
        let records: Vec<_> = entries.iter().map(|entry| entry.record(&self.work.topic)).collect();
        append_all(&self.log, records).await;
    }

    fn read(&self, topic: &str) -> Vec<OracleRecord> {
        match self.engine {
            Engine::Embedded => read_embedded(self.work.log.as_ref(), topic),
            Engine::Kafka => read_kafka(&self.work.log, topic),
        }
    }

    /// What stands on the topic.
    pub fn records(&self) -> Vec<OracleRecord> {
        self.read(&self.work.topic)
    }

    /// The dead letters.
    pub fn letters(&self) -> Vec<OracleRecord> {
        self.read(&dead_letter_topic(&self.work.topic, &self.work.group))
    }

    /// The rows that the view should have.
    pub fn fold(&self) -> Vec<String> {
        fold(&self.records())
    }

    /// The rows that readers see.
    pub fn rows(&self) -> Vec<String> {
        self.asked.query(&self.select())
    }

    fn select(&self) -> String {
        let collation = match self.asked {
            Asked::Sqlite(_) => "",
            Asked::Postgres(_) => " COLLATE \"C\"",
        };
        format!(
            "SELECT key, value, number FROM {} ORDER BY key{collation}",
            self.work.view
        )
    }

    /// What readers see, if there is a view.
    pub fn try_rows(&self) -> Option<Vec<String>> {
        self.asked.try_query(&self.select())
    }

    pub fn positions(&self) -> Vec<String> {
        self.asked
            .query("SELECT generation, topic_partition, next_offset FROM projection_positions ORDER BY 1, 2")
    }

    pub fn execute(&self, sql: &str) {
        self.asked.execute(sql);
    }

    /// Has the database refuse each change of a row in the first generation.
    pub fn forbid_updates(&self) {
        let table = format!("\"{}_g1\"", self.work.view);
        self.execute(&match self.asked {
            Asked::Sqlite(_) => format!(
                "CREATE TRIGGER forbid BEFORE UPDATE ON {table} BEGIN SELECT RAISE(ABORT, 'a row is changed'); END"
            ),
            Asked::Postgres(_) => format!(
                "CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                 RAISE EXCEPTION 'a row is changed' USING ERRCODE = 'check_violation'; END $$; \
                 CREATE TRIGGER forbid BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION forbid()"
            ),
        });
    }

    pub async fn until_folded(&self) {
        let expected = self.fold();
        self.until("the view is the fold", || self.try_rows().as_ref() == Some(&expected))
            .await;
    }

    pub async fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + SOON;
        while !is_so() {
            if Instant::now() > deadline {
                let rows = self.try_rows();
                panic!("not within {SOON:?}: {what}; rows: {:?}", rows.map(|rows| rows.len()));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// A random number generator whose seed is printed.
pub fn seeded(test: &str) -> StdRng {
    let seed = std::env::var("BARNABAS_TEST_SEED").ok();
    let seed = seed.map_or_else(|| rand::rng().random(), |seed| seed.parse().expect("a number"));
    eprintln!("{test}: BARNABAS_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}
