//! A hundred jobs of two hundred chunks each, while the owners of the job store and the importers are killed and given up:
//! each is complete once, with all of its chunks, on the log and at every browser.

use std::collections::BTreeMap;

use barnabas_tests::job::{self, assert_completed, is_end};
use barnabas_tests::on_both_logs;
use barnabas_tests::proxy::Proxy;
use barnabas_tests::site::{Engine, Gateway, Site, addresses, contacts_csv};
use barnabas_tests::subscriber::{Event, Follower, TRANSPORTS};

on_both_logs!(a_hundred_jobs_of_two_hundred_chunks_each_complete_once);

const JOBS: usize = 100;
/// One row each.
const CHUNKS: usize = 200;
const CHANNELS: usize = 10;
const SUBMITTERS: usize = 6;

fn channel(job: usize) -> String {
    format!("channel-{}", job % CHANNELS)
}

fn name(job: usize) -> String {
    format!("job-{job}")
}

/// Submits all jobs at gateways in turn, several at a time.
async fn submit_all(gateways: &[Gateway]) {
    let gateways: Vec<_> = gateways.iter().map(Gateway::address).collect();
    let submitters = (0..SUBMITTERS).map(|submitter| {
        let gateways = gateways.clone();
        tokio::spawn(async move {
            for job in (submitter..JOBS).step_by(SUBMITTERS) {
                let csv = contacts_csv(&name(job), CHUNKS);
                job::submit(gateways[job % gateways.len()], &channel(job), csv).await;
            }
        })
    });
    for submitter in submitters.collect::<Vec<_>>() {
        submitter.await.expect("a submitter ends");
    }
}

/// Follows until all jobs of the channel have ended, and checks what was told of each.
async fn see_all(follower: &mut Follower) {
    let mut ended = follower.events.iter().filter(|event| is_end(event)).count();
    if ended < JOBS / CHANNELS {
        follower
            .until(|event| {
                ended += usize::from(is_end(event));
                ended == JOBS / CHANNELS
            })
            .await;
    }
    let mut by_job: BTreeMap<&str, Vec<Event>> = BTreeMap::new();
    for event in follower.unbroken() {
        let job = event.subject.as_deref().expect("every event is of a job");
        by_job.entry(job).or_default().push(event.clone());
    }
    assert_eq!(by_job.len(), JOBS / CHANNELS);
    for (job, events) in by_job {
        assert_completed(&events, job, CHUNKS as u64, 0);
        let chunks = serde_json::json!({"done": CHUNKS, "total": CHUNKS});
        assert_eq!(events[events.len() - 1].data["chunks"], chunks);
    }
}

async fn a_hundred_jobs_of_two_hundred_chunks_each_complete_once(engine: Engine) {
    let mut site = Site::new(engine);
    site.chunk_rows(1);
    site.set("BARNABAS_KAFKA_SESSION_TIMEOUT_MS", 6000);
    let (mut gateways, mut importers) = match engine {
        Engine::Embedded => (vec![site.gateway_with_importer("gateway")], Vec::new()),
        Engine::Kafka => (
            Vec::from(["killed", "stopped", "third"].map(|name| site.gateway(name))),
            // Each has two workers: six write what is done.
            Vec::from(["importer-1", "importer-2", "importer-3"].map(|name| site.importer(name))),
        ),
    };
    // Every other channel is followed at the gateway that will be stopped, if there is one.
    let others = gateways.iter().enumerate().filter(|(number, _)| *number != 1);
    let balancer = Proxy::start(others.map(|(_, gateway)| gateway.address())).await;
    let stopped = gateways.get(1).map(Gateway::address);
    let mut followers = Vec::new();
    for number in 0..CHANNELS {
        let at = stopped.filter(|_| number % 2 == 1).unwrap_or(balancer.address());
        let transport = TRANSPORTS[number % TRANSPORTS.len()];
        let mut follower = Follower::new(at, &[transport], &channel(number), None);
        follower.join().await;
        followers.push(follower);
    }
    // When it is over everything runs, and the importers' database is there.
    let mut warm = Follower::new(balancer.address(), &TRANSPORTS, "warm", None);
    warm.join().await;
    job::submit(gateways[0].address(), "warm", contacts_csv("warm", 1)).await;
    warm.until(is_end).await;
    let lock = site.hold_up_importers();
    submit_all(&gateways).await;

    let lock = site.let_import(lock, JOBS * CHUNKS / 4);
    gateways[0].kill();
    if let Some(importer) = importers.first_mut() {
        importer.kill();
    }
    if let Some(gateway) = gateways.get(1) {
        // The group gives it up, and another takes its partitions.
        gateway.process().pause();
    }
    drop(lock);
    gateways[0].start();
    if let Some(importer) = importers.first_mut() {
        importer.start();
    }
    let lock = site.let_import(site.hold_up_importers(), JOBS * CHUNKS / 2);
    gateways[0].kill();
    drop(lock);
    gateways[0].start();

    for follower in followers.iter_mut().step_by(2) {
        see_all(follower).await;
    }
    if let Some(gateway) = gateways.get(1) {
        // It goes on with what it had in hand, and must not get it in.
        gateway.process().resume();
    }
    for follower in followers.iter_mut().skip(1).step_by(2) {
        see_all(follower).await;
    }
    let jobs = site.assert_jobs_are_whole();
    assert_eq!(jobs.len(), JOBS + 1);
    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    for event in site.records(&site.notifications_topic()) {
        if matches!(event.header("ce_type"), "job.completed" | "job.failed") {
            *ends.entry(event.header("ce_subject").to_owned()).or_default() += 1;
        }
    }
    assert!(
        ends.keys().eq(&jobs) && ends.values().all(|times| *times == 1),
        "{ends:?}"
    );
    let mut all: Vec<String> = (0..JOBS).flat_map(|job| addresses(&name(job), CHUNKS)).collect();
    all.extend(addresses("warm", 1));
    all.sort();
    assert_eq!(site.contacts(), all);
}
