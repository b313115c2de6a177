//! When the log is away, submissions are refused in bounded time, whole, and go on by themselves when it is back.

use std::time::{Duration, Instant};

use barnabas_tests::fault::LogAway;
use barnabas_tests::http;
use barnabas_tests::job::is_end;
use barnabas_tests::job::{self, Job};
use barnabas_tests::site::{Engine, Site, addresses, contacts_csv, jobs_path, wait_for};
use barnabas_tests::subscriber::{Follower, Transport, events_path};
use hyper::StatusCode;

/// What the gateway is given to answer, and what it may take beside that.
const DEADLINE_MS: u64 = 2000;
const BOUND: Duration = Duration::from_secs(40);

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_kafka_means_503_in_bounded_time_and_nothing_half_produced() {
    refused_while_away_and_taken_afterwards(Engine::Kafka, Site::take_log_away).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_kafka_means_503_in_bounded_time_and_nothing_half_produced() {
    refused_while_away_and_taken_afterwards(Engine::Kafka, Site::kill_broker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_embedded_log_means_503_in_bounded_time_and_nothing_half_produced() {
    refused_while_away_and_taken_afterwards(Engine::Embedded, Site::take_log_away).await;
}

async fn refused_while_away_and_taken_afterwards(engine: Engine, take_away: fn(&Site) -> LogAway<'_>) {
    let mut site = Site::with_a_log_of_its_own(engine);
    site.set("BARNABAS_JOBS_DEADLINE_MS", DEADLINE_MS);
    site.set("BARNABAS_EVENTS_DEADLINE_MS", DEADLINE_MS);
    let (gateway, _importer) = site.gateway_and_importer();
    let to = gateway.address();
    let mut follower = Follower::new(to, &[Transport::WebSocket], "c", None);
    follower.join().await;
    job::submit(to, "c", contacts_csv("before", 10)).await;
    follower.until(is_end).await;

    let away = take_away(&site);
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
    drop(away);

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
    // The job store and the importer have come back too.
    wait_for("an import that was submitted afterwards", BOUND, || {
        site.told(&job.id).last().is_some_and(|kind| kind == "job.completed")
    })
    .await;
    follower
        .until(|event| is_end(event) && event.subject.as_ref() == Some(&job.id))
        .await;
    follower.unbroken();
    let contacts = site.contacts();
    assert!(
        addresses("after", 1000)
            .iter()
            .all(|address| contacts.contains(address))
    );
    // A job that was refused may have been taken all the same, but then it is told of once, as any other.
    for job in site.assert_jobs_are_whole() {
        let told = || site.told(&job);
        wait_for("the end of every job", BOUND, || {
            told().last().is_some_and(|kind| kind == "job.completed")
        })
        .await;
        assert_eq!(
            told().iter().filter(|kind| *kind == "job.completed").count(),
            1,
            "{:?}",
            told()
        );
    }
}
