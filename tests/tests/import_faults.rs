//! The contacts import while gateways and importers are killed and stopped: what browsers see and what is in the database stays
//! exact.
//!
//! So that a fault hits where it is meant to, importers are held up at their database, which the test locks as another program
//! would, and the log is taken away for as long as nothing may be said.

use std::time::Duration;

use barnabas_tests::job::{self, assert_completed, is_end};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::{Engine, Gateway, Importer, Site, addresses, contacts_csv, wait_for};
use barnabas_tests::subscriber::{Event, Follower, Transport};

on_both_logs!(
    an_importer_killed_after_the_insert_and_before_the_commit_doubles_nothing,
    an_importer_killed_again_and_again_loses_and_doubles_nothing,
    a_killed_gateway_comes_back_and_its_subscribers_see_the_completion,
);

const SOON: Duration = Duration::from_secs(60);

/// Rows of an import in whose middle something is killed, and of each of its chunks: so many that the end is far.
const MANY_ROWS: usize = 20_000;
const CHUNK_ROWS: usize = 4;

/// A dead member of a group is given up after this: the least that a broker allows by default.
const SESSION_MS: u64 = 6000;

/// Gateway, importer, and a subscriber that has seen an import, so that everything runs and nothing is still being assigned.
async fn warm(site: &mut Site) -> (Gateway, Option<Importer>, Follower) {
    site.set("BARNABAS_KAFKA_SESSION_TIMEOUT_MS", SESSION_MS);
    let (gateway, importer) = site.gateway_and_importer();
    let mut follower = Follower::new(gateway.address(), &[Transport::WebSocket], "c", None);
    follower.join().await;
    job::submit(gateway.address(), "c", contacts_csv("warm", 1)).await;
    follower.until(is_end).await;
    follower.events.clear();
    (gateway, importer, follower)
}

/// Ends the importer as a power cut would, with the gateway if it is in it.
fn kill_importer(gateway: &mut Gateway, importer: &mut Option<Importer>) {
    match importer {
        Some(importer) => importer.kill(),
        None => gateway.kill(),
    }
}

fn start_importer(gateway: &mut Gateway, importer: &mut Option<Importer>) {
    match importer {
        Some(importer) => importer.start(),
        None => gateway.start(),
    }
}

fn is_progress(event: &Event) -> bool {
    event.event_type == "job.progress" && event.data["chunks"]["done"].as_u64() > Some(0)
}

/// Contacts of the import and of [`warm`].
fn all_addresses(name: &str, rows: usize) -> Vec<String> {
    let mut all = addresses(name, rows);
    all.extend(addresses("warm", 1));
    all.sort();
    all
}

/// Checks what a subscriber saw of a job that took all rows, and that it is what stands on the log.
fn assert_saw_all(follower: &Follower, site: &Site, job: &str, rows: usize) {
    assert_completed(follower.unbroken(), job, rows as u64, 0);
    let types: Vec<String> = follower.events.iter().map(|event| event.event_type.clone()).collect();
    assert_eq!(types, site.told(job));
}

async fn an_importer_killed_after_the_insert_and_before_the_commit_doubles_nothing(engine: Engine) {
    const ROWS: usize = 1000;
    let mut site = Site::with_a_log_of_its_own(engine);
    let (mut gateway, mut importer, mut follower) = warm(&mut site).await;
    let lock = site.hold_up_importers();
    let job = job::submit(gateway.address(), "c", contacts_csv("buergel", ROWS)).await;
    follower.until(|event| event.event_type == "job.consumed").await;
    // With the log away it can insert, and can neither say so nor commit.
    let away = site.take_log_away();
    drop(lock);
    wait_for("contacts in the database", SOON, || site.contact_count() > 1).await;
    kill_importer(&mut gateway, &mut importer);
    drop(away);
    // What was on its way to a stopped broker arrives all the same; the commit comes after it and was never sent.
    let said = site.done_commands(&job.id);
    start_importer(&mut gateway, &mut importer);
    follower.until(is_end).await;
    let chunks = ROWS.div_ceil(500);
    let repeated = || site.done_commands(&job.id) == said + chunks;
    wait_for("every chunk is done by the one that was started again", SOON, repeated).await;
    assert_saw_all(&follower, &site, &job.id, ROWS);
    assert_eq!(site.contacts(), all_addresses("buergel", ROWS));
}

async fn an_importer_killed_again_and_again_loses_and_doubles_nothing(engine: Engine) {
    const KILLS: usize = 3;
    let mut site = Site::new(engine);
    site.chunk_rows(CHUNK_ROWS as u32);
    let (mut gateway, mut importer, mut follower) = warm(&mut site).await;
    let mut lock = site.hold_up_importers();
    let job = job::submit(gateway.address(), "c", contacts_csv("momus", MANY_ROWS)).await;
    for kill in 1..=KILLS {
        lock = site.let_import(lock, kill * MANY_ROWS / 5);
        // Somewhere between saying what was inserted, committing, and beginning the next.
        kill_importer(&mut gateway, &mut importer);
        assert!(site.contact_count() < MANY_ROWS, "it was over before it was killed");
        drop(lock);
        start_importer(&mut gateway, &mut importer);
        lock = site.hold_up_importers();
    }
    drop(lock);
    follower.until(is_end).await;
    assert_saw_all(&follower, &site, &job.id, MANY_ROWS);
    assert_eq!(site.contacts(), all_addresses("momus", MANY_ROWS));
}

async fn a_killed_gateway_comes_back_and_its_subscribers_see_the_completion(engine: Engine) {
    let mut site = Site::new(engine);
    site.chunk_rows(CHUNK_ROWS as u32);
    let (mut gateway, _importer, _) = warm(&mut site).await;
    let address = gateway.address();
    // Each has a transport of its own, and one takes another after each cut.
    let ways: [&[Transport]; 4] = [
        &[Transport::WebSocket],
        &[Transport::Sse],
        &[Transport::LongPoll],
        &[Transport::Sse, Transport::WebSocket, Transport::LongPoll],
    ];
    let mut followers: Vec<Follower> = ways
        .iter()
        .map(|ways| Follower::new(address, ways, "c", None))
        .collect();
    for follower in &mut followers {
        follower.join().await;
    }
    let lock = site.hold_up_importers();
    let job = job::submit(address, "c", contacts_csv("sortini", MANY_ROWS)).await;
    let lock = site.let_import(lock, MANY_ROWS / 10);
    let progress = followers[0].until(is_progress).await;
    assert!(progress.data["chunks"]["done"].as_u64() < Some((MANY_ROWS / CHUNK_ROWS) as u64));
    gateway.kill();
    drop(lock);
    gateway.start();
    for follower in &mut followers {
        follower.until(is_end).await;
        assert!(follower.connections > 1, "it was never cut off: {follower:?}");
        assert_saw_all(follower, &site, &job.id, MANY_ROWS);
    }
    assert_eq!(site.contacts(), all_addresses("sortini", MANY_ROWS));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_importer_on_kafka_that_was_given_up_and_goes_on_changes_nothing() {
    const ROWS: usize = 1000;
    let mut site = Site::new(Engine::Kafka);
    let (gateway, importer, mut follower) = warm(&mut site).await;
    let paused = importer.expect("on Kafka it is a process of its own");
    let lock = site.hold_up_importers();
    let job = job::submit(gateway.address(), "c", contacts_csv("galater", ROWS)).await;
    follower.until(|event| event.event_type == "job.consumed").await;
    paused.process().pause();
    let _other = site.importer("other");
    drop(lock);
    follower.until(is_end).await;
    let said = site.done_commands(&job.id);
    // It has chunks in hand that are no longer its own, inserts them, and says so.
    paused.process().resume();
    wait_for("the answer of the one that was given up", SOON, || {
        site.done_commands(&job.id) > said
    })
    .await;
    // What is behind that answer has been told of when a later job is over.
    job::submit(gateway.address(), "c", contacts_csv("later", 10)).await;
    let mut later = Follower::new(
        gateway.address(),
        &[Transport::Sse],
        "c",
        follower.events.last().map(|last| last.token.as_str()),
    );
    later.until(is_end).await;
    assert_saw_all(&follower, &site, &job.id, ROWS);
    assert_eq!(site.contact_count(), 1 + ROWS + 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_gateway_ends_its_imports_after_it_is_started_again() {
    let mut site = Site::new(Engine::Embedded);
    site.chunk_rows(CHUNK_ROWS as u32);
    let (mut gateway, _, mut follower) = warm(&mut site).await;
    let lock = site.hold_up_importers();
    let job = job::submit(gateway.address(), "c", contacts_csv("erlanger", MANY_ROWS)).await;
    let lock = site.let_import(lock, MANY_ROWS / 10);
    drop(lock);
    gateway.stop();
    assert!(site.contact_count() < MANY_ROWS, "it was over before it was stopped");
    gateway.start();
    follower.until(is_end).await;
    assert_saw_all(&follower, &site, &job.id, MANY_ROWS);
    assert_eq!(site.contacts(), all_addresses("erlanger", MANY_ROWS));
}
