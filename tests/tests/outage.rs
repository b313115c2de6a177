//! When the log is away, submissions are refused in bounded time, whole, and go on by themselves when it is back.

use std::time::{Duration, Instant};

use barnabas_tests::http;
use barnabas_tests::job::{self, Job};
use barnabas_tests::kafka::KafkaNode;
use barnabas_tests::site::{Site, contacts_csv, jobs_path, wait_for};
use barnabas_tests::subscriber::events_path;
use hyper::StatusCode;

/// What the gateway is given to answer, and what it may take beside that.
const DEADLINE_MS: u64 = 2000;
const BOUND: Duration = Duration::from_secs(40);

/// How the broker goes away and comes back.
struct Outage {
    begin: fn(&KafkaNode),
    end: fn(&KafkaNode),
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_kafka_means_503_in_bounded_time_and_nothing_half_produced() {
    refused_while_away_and_taken_afterwards(Outage {
        begin: KafkaNode::pause,
        end: KafkaNode::resume,
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_kafka_means_503_in_bounded_time_and_nothing_half_produced() {
    refused_while_away_and_taken_afterwards(Outage {
        begin: KafkaNode::kill,
        end: KafkaNode::restart,
    })
    .await;
}

async fn refused_while_away_and_taken_afterwards(outage: Outage) {
    let node = KafkaNode::start();
    let mut site = Site::on_kafka(node.brokers());
    site.set("BARNABAS_JOBS_DEADLINE_MS", DEADLINE_MS);
    site.set("BARNABAS_EVENTS_DEADLINE_MS", DEADLINE_MS);
    let gateway = site.gateway("gateway");
    let to = gateway.address();
    job::submit(to, "other", contacts_csv("before", 10)).await;

    (outage.begin)(&node);
    // A small job, a large one, and an event; each more than once, so that none leaves something behind that blocks the next.
    for round in 0..2 {
        for (path, content_type, body) in [
            (jobs_path("c"), "text/csv", contacts_csv(&format!("lost-{round}"), 10)),
            (
                jobs_path("c"),
                "text/csv",
                contacts_csv(&format!("large-{round}"), 30_000),
            ),
            (events_path("c"), "application/json", r#"{"type":"lost"}"#.to_owned()),
        ] {
            let refused = tokio::time::timeout(BOUND, http::post(to, &path, content_type, body));
            let refused = refused.await.expect("it is bounded").expect("an answer");
            assert_eq!(
                (refused.status, refused.code().as_str()),
                (StatusCode::SERVICE_UNAVAILABLE, "log-unavailable")
            );
            assert!(!refused.header("retry-after").is_empty(), "{refused:?}");
        }
    }
    (outage.end)(&node);

    // The same gateway works again, without help.
    let began = Instant::now();
    let job = loop {
        let answer = job::try_submit(to, "c", contacts_csv("after", 1000))
            .await
            .expect("an answer");
        if answer.status != StatusCode::SERVICE_UNAVAILABLE {
            break Job::of(&answer);
        }
        assert!(began.elapsed() < BOUND, "it does not come back: {answer:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    site.assert_jobs_are_whole();
    let chunks = site.records(&site.chunks_topic());
    assert!(chunks.iter().any(|chunk| chunk.header("bn-job") == job.id));
    // The job store has come back too: it tells of the job.
    let told = || {
        let events = site.records(&site.notifications_topic()).into_iter();
        events.filter(|event| event.header("ce_subject") == job.id).count() == 1
    };
    wait_for("job.accepted on the log", BOUND, told).await;
}
