//! The contacts import, whole: from the submission to the database, with every stage told.

use barnabas_tests::http;
use barnabas_tests::job::{self, Job, assert_completed, is_end};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::{Engine, Site, addresses, contacts_csv};
use barnabas_tests::subscriber::{Follower, Subscriber, TRANSPORTS, Transport};
use hyper::StatusCode;

on_both_logs!(
    a_thousand_rows_become_a_thousand_contacts_and_every_stage_is_told,
    bad_rows_are_told_by_line_and_do_not_stop_the_rest,
    a_file_without_rows_completes,
);

async fn a_thousand_rows_become_a_thousand_contacts_and_every_stage_is_told(engine: Engine) {
    let site = Site::new(engine);
    let (gateway, _importer) = site.gateway_and_importer();
    let mut subscribers = Vec::new();
    for transport in TRANSPORTS {
        subscribers.push(Subscriber::join(gateway.address(), transport, "castle").await.0);
    }
    let job = job::submit(gateway.address(), "castle", contacts_csv("klamm", 1000)).await;
    for subscriber in &mut subscribers {
        assert_completed(&subscriber.events_until(is_end).await, &job.id, 1000, 0);
    }
    assert_eq!(site.contacts(), addresses("klamm", 1000));

    // Who comes late with the token of the submission is told the same.
    for transport in TRANSPORTS {
        let mut late = Subscriber::start(gateway.address(), transport, "castle", Some(&job.token));
        assert_completed(&late.events_until(is_end).await, &job.id, 1000, 0);
    }
    let state = http::get(gateway.address(), &job.location).await.expect("an answer");
    assert_eq!(
        (state.status, &state.json()["state"]),
        (StatusCode::OK, &"completed".into())
    );
    assert_chunks(&site, &job, 1000);
}

/// Chunks as workers of any language rely on them.
fn assert_chunks(site: &Site, job: &Job, rows: usize) {
    let mut chunks = site.records(&site.chunks_topic());
    chunks.sort_by_key(|chunk| chunk.header("bn-chunk").parse::<u32>().expect("a number"));
    let (mut line, mut row) = (2, 0);
    for (index, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk.header("bn-job"), job.id);
        assert_eq!(chunk.header("bn-chunk"), index.to_string());
        assert_eq!(chunk.header("bn-chunks"), chunks.len().to_string());
        assert_eq!(chunk.header("bn-first-line"), line.to_string());
        assert_eq!(chunk.header("bn-channel"), "castle");
        assert_eq!(chunk.header("traceparent").len(), 55);
        let text = String::from_utf8(chunk.value.clone()).expect("text");
        assert!(text.starts_with("name,email,phone\n"), "{text}");
        let rows_here: usize = chunk.header("bn-rows").parse().expect("a number");
        assert_eq!(text.lines().count(), rows_here + 1);
        line += rows_here;
        row += rows_here;
    }
    assert_eq!(row, rows);
}

async fn bad_rows_are_told_by_line_and_do_not_stop_the_rest(engine: Engine) {
    let site = Site::new(engine);
    let (gateway, _importer) = site.gateway_and_importer();
    let csv = "name,email,phone\n\"Amalia,\nBarnabas's sister\",amalia@example.org,\nMomus,not an address,\nFrieda,frieda@example.org,\n";
    let job = job::submit(gateway.address(), "c", csv).await;
    let mut subscriber = Subscriber::start(gateway.address(), Transport::Sse, "c", Some(&job.token));
    let events = subscriber.events_until(is_end).await;
    assert_completed(&events, &job.id, 2, 1);
    let rejects = events[events.len() - 1].data["rejects"]
        .as_array()
        .expect("a list")
        .clone();
    assert_eq!((rejects.len(), &rejects[0]["line"]), (1, &4.into()), "{rejects:?}");
    assert!(
        rejects[0]["reason"].as_str().is_some_and(|reason| !reason.is_empty()),
        "{rejects:?}"
    );
    assert_eq!(site.contacts(), ["amalia@example.org", "frieda@example.org"]);
}

async fn a_file_without_rows_completes(engine: Engine) {
    let site = Site::new(engine);
    let gateway = site.gateway("gateway");
    let job = job::submit(gateway.address(), "c", "name,email,phone\n").await;
    let mut follower = Follower::new(gateway.address(), &[Transport::WebSocket], "c", Some(&job.token));
    let end = follower.until(is_end).await;
    assert_eq!(end.event_type, "job.completed");
    assert_eq!(end.data["rows"]["total"], 0);
}
