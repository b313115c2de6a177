//! The importer on an embedded log with a real gateway and a real database.

use std::net::SocketAddr;
use std::time::Duration;

use barnabas::log::{GroupEvent, GroupSettings, Log, ProducerSettings, Record, StartAt};
use barnabas::server::job_store::command_record;
use barnabas::server::{Config, Server};
use barnabas_examples::contacts::chunk::Chunk;
use barnabas_examples::contacts::database::Database;
use barnabas_examples::contacts::importer;
use barnabas_examples::contacts::settings::ImporterSettings;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Within it everything that is waited for must have happened.
const DEADLINE: Duration = Duration::from_secs(30);

struct Bench {
    address: SocketAddr,
    log: Log,
    config: Config,
    stopping: CancellationToken,
    served: JoinHandle<()>,
    folder: TempDir,
}

impl Bench {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let config = Config::for_tests(folder.path().join("data"));
        let log = config.open_log().await.expect("a log");
        let stopping = CancellationToken::new();
        let server = Server::start(config.clone(), log.clone(), stopping.clone())
            .await
            .expect("a gateway");
        Self {
            address: server.address(),
            log,
            config,
            stopping,
            served: tokio::spawn(server.serve()),
            folder,
        }
    }

    fn database(&self) -> Database {
        Database::in_file(&self.folder.path().join("contacts.sqlite"))
    }

    fn settings(&self) -> ImporterSettings {
        ImporterSettings::new(&self.config)
    }

    fn import_with(&self, database: Database) -> JoinHandle<Result<(), importer::Error>> {
        let run = importer::run(self.log.clone(), database, self.settings(), self.stopping.child_token());
        tokio::spawn(run)
    }

    /// Sends a request and returns the head and body of the answer.
    async fn send(&self, request: String) -> String {
        let mut connection = TcpStream::connect(self.address).await.expect("a connection");
        connection.write_all(request.as_bytes()).await.expect("it is sent");
        let mut answer = String::new();
        timeout(DEADLINE, connection.read_to_string(&mut answer))
            .await
            .expect("in time")
            .expect("it is read");
        answer
    }

    /// Submits a file and returns where its job is.
    async fn submit(&self, csv: &str) -> String {
        let answer = self
            .send(format!(
                "POST /v1/jobs/import-contacts?channel=c HTTP/1.1\r\nhost: {}\r\ncontent-type: text/csv\r\ncontent-length: \
                 {}\r\nconnection: close\r\n\r\n{csv}",
                self.address,
                csv.len()
            ))
            .await;
        assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
        let lines = answer.lines();
        let location = lines
            .filter_map(|line| line.split_once(": "))
            .find(|(name, _)| *name == "location");
        location.expect("a location").1.to_owned()
    }

    /// The state of a job at its end.
    async fn ended(&self, location: &str) -> serde_json::Value {
        let answer = self
            .send(format!(
                "GET {location} HTTP/1.1\r\nhost: {}\r\nprefer: wait=25\r\nconnection: close\r\n\r\n",
                self.address
            ))
            .await;
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }

    /// The types of the events that the channel has had.
    async fn told(&self) -> Vec<String> {
        let topic = self.config.topics.notifications();
        let mut reader = self.log.reader(&topic).await.expect("a reader");
        let mut told = Vec::new();
        let partitions = self.log.describe_topic(&topic).await.expect("a topic").partitions;
        for partition in 0..partitions {
            reader.assign(partition, StartAt::Start).await.expect("it is assigned");
            loop {
                let batch = timeout(DEADLINE, reader.next())
                    .await
                    .expect("in time")
                    .expect("a batch");
                told.extend(batch.records.iter().filter_map(event_type));
                if batch.partition.partition == partition && batch.caught_up {
                    break;
                }
            }
        }
        told
    }

    async fn stop(self) {
        self.stopping.cancel();
        self.served.await.expect("the gateway ends");
        self.log.close().await;
    }
}

fn event_type(record: &Record) -> Option<String> {
    record.headers.last_str("ce_type").map(str::to_owned)
}

fn csv(rows: usize) -> String {
    let mut csv = String::from("name,email,phone\n");
    for row in 0..rows {
        csv += &format!(
            "\"Amalia {row}, Castle\",k-{row}@example.org,+420 601 {:03} {:03}\n",
            row / 1000,
            row % 1000
        );
    }
    csv
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_becomes_contacts_and_its_wrong_rows_are_named() {
    let bench = Bench::start().await;
    let imported = bench.import_with(bench.database());
    let location = bench
        .submit(&(csv(3000) + "Wrong,no at,\nTwice,K-7@example.org,\n"))
        .await;
    let state = bench.ended(&location).await;
    assert_eq!(state["state"], "completed", "{state}");
    assert_eq!(
        state["rows"],
        serde_json::json!({"ok": 3001, "rejected": 1, "total": 3002})
    );
    assert_eq!(
        state["rejects"],
        serde_json::json!([{"line": 3002, "reason": "e-mail: no @"}])
    );
    let database = bench.database();
    assert_eq!(database.count().await.expect("a count"), 3000);
    let name = database.name("k-7@example.org").await.expect("it is read");
    assert_eq!(name.as_deref(), Some("Twice"), "the last row of a file wins");
    bench.stop().await;
    imported.await.expect("no panic").expect("a graceful stop");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_no_address_book_fails_its_job_and_no_other() {
    let bench = Bench::start().await;
    let imported = bench.import_with(bench.database());
    let bad = bench.submit("colour,shape\nred,round\n").await;
    let good = bench.submit(&csv(10)).await;
    let state = bench.ended(&bad).await;
    assert_eq!(
        (&state["state"], &state["error"]["code"]),
        (&"failed".into(), &"bad-header".into()),
        "{state}"
    );
    assert_eq!(bench.ended(&good).await["state"], "completed");
    bench.stop().await;
    imported.await.expect("no panic").expect("a graceful stop");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_between_insert_and_commit_leaves_each_contact_once_and_one_completion() {
    const ROWS: usize = 6000;
    let bench = Bench::start().await;
    let location = bench.submit(&csv(ROWS)).await;
    // It inserts all and says so for half of the chunks, but never commits: killed in between.
    let database = bench.database();
    database.prepare().await.expect("a table");
    let settings = bench.settings();
    let group = GroupSettings::new(&settings.group, [&settings.topic]);
    let mut member = bench.log.join_group(group).await.expect("a member");
    let producer = bench
        .log
        .producer(ProducerSettings::default())
        .await
        .expect("a producer");
    let mut inserted = 0;
    while inserted < ROWS {
        let event = timeout(DEADLINE, member.next())
            .await
            .expect("in time")
            .expect("an event");
        let GroupEvent::Records(batch) = event else { continue };
        for record in &batch.records {
            let chunk = Chunk::parse(record, settings.region).expect("a chunk");
            database.upsert(&chunk.contacts).await.expect("it is inserted");
            inserted += chunk.contacts.len();
            if chunk.index.is_multiple_of(2) {
                let answer = command_record(&settings.topics, &chunk.job, &chunk.answer).expect("a record");
                producer.append(answer).await.expect("it is said");
            }
        }
    }
    drop(member);
    let imported = bench.import_with(database);
    let state = bench.ended(&location).await;
    assert_eq!(state["state"], "completed", "{state}");
    assert_eq!(
        state["rows"],
        serde_json::json!({"ok": ROWS, "rejected": 0, "total": ROWS})
    );
    assert_eq!(bench.database().count().await.expect("a count"), ROWS as u64);
    let told = bench.told().await;
    assert_eq!(
        told.iter().filter(|kind| *kind == "job.completed").count(),
        1,
        "{told:?}"
    );
    bench.stop().await;
    imported.await.expect("no panic").expect("a graceful stop");
}
