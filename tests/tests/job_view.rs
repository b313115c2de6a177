//! `GET /v1/jobs/{id}`, through the front door: submitted over HTTP, worked on through the log, looked up over HTTP.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{GroupEvent, GroupSettings, Log, Producer, ProducerSettings};
use barnabas::server::config::TopicsConfig;
use barnabas::server::job_state::Reject;
use barnabas::server::job_store::{JobCommand, command_record};
use barnabas::server::{Config, Server};
use barnabas_tests::http;
use hyper::Method;
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Whatever does not happen within it does not happen.
const DEADLINE: Duration = Duration::from_secs(60);

/// A job id of the year 2020.
const OLD_ID: &str = "016f5e66-e800-7000-8000-000000000000";

/// Where the log is kept.
#[derive(Clone, Copy)]
enum Engine {
    Embedded,
    Kafka,
}

/// A data folder, and topics of its own.
struct Place {
    engine: Engine,
    folder: TempDir,
    topics: TopicsConfig,
}

impl Place {
    fn new(engine: Engine) -> Self {
        Self {
            engine,
            folder: tempfile::tempdir().expect("a folder"),
            topics: TopicsConfig {
                prefix: format!("view-{}", Uuid::now_v7().simple()),
                ..TopicsConfig::default()
            },
        }
    }

    async fn log(&self) -> Log {
        let opened = match self.engine {
            Engine::Embedded => Log::open_embedded(EmbeddedSettings::new(self.folder.path())).await,
            Engine::Kafka => Log::connect_kafka(KafkaSettings::new(barnabas_tests::kafka::brokers())).await,
        };
        opened.expect("a log")
    }

    async fn delete_job_topics(&self) {
        let log = self.log().await;
        for topic in [self.topics.jobs(), self.topics.job_commands()] {
            log.delete_topic(&topic).await.expect("deleted");
        }
        log.close().await;
    }

    async fn gateway(&self) -> Gateway {
        self.gateway_with(|_| ()).await
    }

    async fn gateway_with(&self, change: impl FnOnce(&mut Config)) -> Gateway {
        self.gateway_on(self.log().await, change).await
    }

    async fn gateway_on(&self, log: Log, change: impl FnOnce(&mut Config)) -> Gateway {
        let mut config = Config::for_tests(self.folder.path());
        config.topics = self.topics.clone();
        change(&mut config);
        let stopping = CancellationToken::new();
        let server = Server::start(config, log.clone(), stopping.clone())
            .await
            .expect("a gateway");
        Gateway {
            topics: self.topics.clone(),
            producer: log.producer(ProducerSettings::default()).await.expect("a producer"),
            log,
            address: server.address(),
            stopping,
            serving: tokio::spawn(server.serve()),
        }
    }
}

struct Gateway {
    topics: TopicsConfig,
    log: Log,
    producer: Producer,
    address: SocketAddr,
    stopping: CancellationToken,
    serving: JoinHandle<()>,
}

impl Gateway {
    async fn stop(self) {
        self.stopping.cancel();
        within(self.serving).await.expect("no panic");
        self.log.close().await;
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let answer = http::get(self.address, path).await.expect("an answer");
        (answer.status.as_u16(), answer.json())
    }

    /// The status of a look-up once the view has read the log to its end.
    async fn get_caught_up(&self, path: &str) -> u16 {
        within(async {
            loop {
                match self.get(path).await {
                    (503, problem) => assert_eq!(problem["code"], "job-view-behind"),
                    (status, _) => return status,
                }
            }
        })
        .await
    }

    /// The job when it has ended.
    async fn get_end(&self, path: &str) -> Value {
        let request = http::request(Method::GET, path).header("prefer", "wait=50");
        let request = request.body(http::whole("")).expect("a request");
        let answer = http::send(self.address, request).await.expect("an answer");
        assert_eq!(
            (answer.status.as_u16(), answer.header("preference-applied")),
            (200, "wait=50")
        );
        answer.json()
    }

    /// Submits contacts and returns the job's path.
    async fn submit(&self, rows: usize) -> String {
        let mut body = "name,email,phone\n".to_owned();
        for row in 0..rows {
            body.push_str(&format!("n{row},n{row}@example.org,\n"));
        }
        let path = "/v1/jobs/import-contacts?channel=c";
        let answer = http::post(self.address, path, "text/csv", body)
            .await
            .expect("an answer");
        assert_eq!(answer.status.as_u16(), 202, "{answer:?}");
        answer.header("location").to_owned()
    }

    async fn command(&self, path: &str, command: JobCommand) {
        let job = path.rsplit('/').next().expect("an id");
        let record = command_record(&self.topics, job, &command).expect("a record");
        self.producer.append(record).await.expect("appended");
    }

    async fn complete(&self, path: &str, chunks: u32) -> Value {
        for chunk in 0..chunks {
            let done = JobCommand::Done {
                chunk,
                ok: 1,
                rejected: 1,
                rejects: vec![Reject {
                    line: u64::from(chunk) + 2,
                    reason: "e-mail: no @".to_owned(),
                }],
            };
            self.command(path, done).await;
        }
        let job = self.get_end(path).await;
        assert_eq!(job["state"], "completed", "{job}");
        job
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .expect("it happens in time")
}

async fn a_job_can_be_looked_up_from_the_202_to_its_end(engine: Engine) {
    let place = Place::new(engine);
    let gateway = place.gateway().await;
    let first = gateway.submit(3).await;
    assert_eq!(gateway.get_caught_up(&first).await, 200);
    for _ in 0..20 {
        let path = gateway.submit(3).await;
        let (status, body) = gateway.get(&path).await;
        assert_eq!((status, body["state"].as_str()), (200, Some("accepted")), "{body}");
        assert_eq!(body["rows"]["total"], 3);
    }
    let path = gateway.submit(1200).await;
    gateway.command(&path, JobCommand::Started { chunk: 1 }).await;
    let completed = gateway.complete(&path, 3).await;
    assert_eq!(completed["id"], path.rsplit('/').next().expect("an id"));
    assert_eq!(
        (&completed["type"], &completed["channel"]),
        (&"import-contacts".into(), &"c".into())
    );
    assert_eq!(completed["chunks"], serde_json::json!({"done": 3, "total": 3}));
    assert_eq!(
        completed["rows"],
        serde_json::json!({"ok": 3, "rejected": 3, "total": 1200})
    );
    assert_eq!(
        completed["rejects"][2],
        serde_json::json!({"line": 4, "reason": "e-mail: no @"})
    );
    let submitted = completed["submitted"].as_str().expect("a time");
    assert!(completed["updated"].as_str().expect("a time") >= submitted);

    let path = gateway.submit(1).await;
    let failed = JobCommand::Failed {
        chunk: 0,
        code: "bad-header".to_owned(),
        message: "no e-mail column".to_owned(),
    };
    gateway.command(&path, failed).await;
    let body = gateway.get_end(&path).await;
    assert_eq!(body["state"], "failed");
    assert_eq!(
        body["error"],
        serde_json::json!({"code": "bad-header", "message": "no e-mail column"})
    );
    gateway.stop().await;
}

async fn a_job_whose_store_is_behind_is_accepted_and_not_unknown(engine: Engine) {
    let place = Place::new(engine);
    let log = place.log().await;
    let plan = log.plan_topics(&place.topics.specs()).await.expect("a plan");
    log.apply_topics(&plan).await.expect("topics");
    // It takes the store's partitions and does nothing with them.
    let idle = GroupSettings::new(place.topics.jobs(), [place.topics.job_commands()]);
    let mut idle = log.join_group(idle).await.expect("a member");
    while !matches!(within(idle.next()).await.expect("an event"), GroupEvent::Assigned(_)) {}
    let gateway = place.gateway_on(log, |_| ()).await;
    assert_eq!(
        gateway.get_caught_up(&format!("/v1/jobs/{}", Uuid::now_v7())).await,
        404
    );
    let mut jobs = Vec::new();
    for rows in 1..5 {
        let path = gateway.submit(rows).await;
        let (status, job) = gateway.get(&path).await;
        assert_eq!(
            (status, &job["state"], &job["rows"]["total"]),
            (200, &"accepted".into(), &rows.into()),
            "{job}"
        );
        jobs.push(path);
    }
    drop(idle);
    for path in jobs {
        gateway.complete(&path, 1).await;
    }
    gateway.stop().await;
}

async fn a_job_that_is_not_there_is_unknown_expired_or_none(engine: Engine) {
    let place = Place::new(engine);
    let gateway = place.gateway().await;
    // The view has caught up once it shows a job.
    gateway.complete(&gateway.submit(1).await, 1).await;
    let young = format!("/v1/jobs/{}", Uuid::now_v7());
    for (path, status, code) in [
        (young.as_str(), 404, "unknown-job"),
        (&format!("/v1/jobs/{OLD_ID}"), 410, "job-expired"),
        ("/v1/jobs/import-contacts", 404, "unknown-job"),
        ("/v1/jobs/00000000-0000-4000-8000-000000000000", 404, "unknown-job"),
    ] {
        let (answered, problem) = gateway.get(path).await;
        assert_eq!((answered, problem["code"].as_str()), (status, Some(code)), "{path}");
    }
    gateway.stop().await;
}

async fn a_restarted_gateway_still_knows_its_jobs_and_goes_on_with_them(engine: Engine) {
    let place = Place::new(engine);
    let gateway = place.gateway().await;
    let (ended, open) = (gateway.submit(1).await, gateway.submit(1).await);
    let completed = gateway.complete(&ended, 1).await;
    gateway.stop().await;
    let gateway = place.gateway().await;
    assert_eq!(gateway.get(&ended).await, (200, completed.clone()));
    gateway.complete(&open, 1).await;
    gateway.stop().await;
    // The file is a cache: without it the log brings everything back.
    for suffix in ["", "-wal", "-shm"] {
        let file = place.folder.path().join(format!("jobs.sqlite{suffix}"));
        if file.exists() {
            std::fs::remove_file(file).expect("removed");
        }
    }
    let gateway = place.gateway().await;
    assert_eq!(gateway.get_caught_up(&open).await, 200);
    assert_eq!(gateway.get(&open).await.1["state"], "completed");
    assert_eq!(gateway.get(&ended).await, (200, completed));
    gateway.stop().await;
}

async fn a_view_of_a_topic_made_anew_forgets_what_stood_on_the_old_one(engine: Engine) {
    let place = Place::new(engine);
    let gateway = place.gateway().await;
    let path = gateway.submit(1).await;
    gateway.complete(&path, 1).await;
    gateway.stop().await;
    place.delete_job_topics().await;
    let gateway = place.gateway().await;
    let status = gateway.get_caught_up(&path).await;
    assert_eq!(status, 404);
    gateway.complete(&gateway.submit(1).await, 1).await;
    gateway.stop().await;
}

async fn a_node_without_a_view_says_so(engine: Engine) {
    let place = Place::new(engine);
    let gateway = place.gateway_with(|config| config.jobs.view = false).await;
    let path = gateway.submit(1).await;
    let (status, problem) = gateway.get(&path).await;
    assert_eq!((status, problem["code"].as_str()), (404, Some("no-job-view")));
    assert!(!place.folder.path().join("jobs.sqlite").exists());
    gateway.stop().await;
}

/// Each case on each engine.
macro_rules! on_both_engines {
    ($($case:ident),* $(,)?) => {
        mod embedded {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(super::Engine::Embedded).await;
                }
            )*
        }
        mod kafka {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(super::Engine::Kafka).await;
                }
            )*
        }
    };
}

on_both_engines!(
    a_job_can_be_looked_up_from_the_202_to_its_end,
    a_job_that_is_not_there_is_unknown_expired_or_none,
    a_job_whose_store_is_behind_is_accepted_and_not_unknown,
    a_restarted_gateway_still_knows_its_jobs_and_goes_on_with_them,
    a_view_of_a_topic_made_anew_forgets_what_stood_on_the_old_one,
    a_node_without_a_view_says_so,
);
