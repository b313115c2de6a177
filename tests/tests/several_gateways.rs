//! Many channels, and several gateways behind one address: each subscriber sees all of its own and nothing else, wherever it
//! comes back and whichever gateway has taken the job.

use std::net::SocketAddr;

use barnabas_tests::http;
use barnabas_tests::job::{self, Job, assert_completed, is_end};
use barnabas_tests::on_both_logs;
use barnabas_tests::proxy::Proxy;
use barnabas_tests::site::{Engine, Gateway, Importer, Site, addresses, contacts_csv};
use barnabas_tests::subscriber::{Follower, Push, Subscriber, TRANSPORTS, Transport, events_path};
use hyper::{Method, StatusCode};

on_both_logs!(fifty_channels_each_see_all_of_their_own_and_nothing_else);

const CHANNELS: usize = 50;

/// The gateways of a site with its importers: three on Kafka, the one that there can be on the embedded log.
fn gateways(site: &Site, engine: Engine) -> (Vec<Gateway>, Vec<Importer>) {
    match engine {
        Engine::Embedded => (vec![site.gateway_with_importer("gateway")], Vec::new()),
        Engine::Kafka => (
            ["one", "two", "three"].map(|name| site.gateway(name)).into(),
            ["importer-1", "importer-2"].map(|name| site.importer(name)).into(),
        ),
    }
}

async fn balancer(gateways: &[Gateway]) -> Proxy {
    Proxy::start(gateways.iter().map(Gateway::address)).await
}

/// Rows of each channel's import: they differ, so that no event can be taken for another's.
fn rows(channel: usize) -> usize {
    10 + channel
}

async fn fifty_channels_each_see_all_of_their_own_and_nothing_else(engine: Engine) {
    let site = Site::new(engine);
    let (gateways, _importers) = gateways(&site, engine);
    let balancer = balancer(&gateways).await;
    let address = balancer.address();
    let mut followers = Vec::new();
    for channel in 0..CHANNELS {
        let transport = TRANSPORTS[channel % TRANSPORTS.len()];
        let mut follower = Follower::new(address, &[transport], &format!("channel-{channel}"), None);
        follower.join().await;
        followers.push(follower);
    }
    let submissions = (0..CHANNELS).map(|channel| {
        let csv = contacts_csv(&format!("k-{channel}"), rows(channel));
        tokio::spawn(async move { job::submit(address, &format!("channel-{channel}"), csv).await })
    });
    let submissions: Vec<_> = submissions.collect();
    for (channel, (submission, follower)) in submissions.into_iter().zip(&mut followers).enumerate() {
        let job = submission.await.expect("it is submitted");
        // In the middle all connections are cut: each comes back, to whichever gateway is next.
        if channel == CHANNELS / 2 {
            balancer.reset();
        }
        follower.until(is_end).await;
        assert_completed(follower.unbroken(), &job.id, rows(channel) as u64, 0);
    }
    let mut all: Vec<String> = (0..CHANNELS)
        .flat_map(|channel| addresses(&format!("k-{channel}"), rows(channel)))
        .collect();
    all.sort();
    assert_eq!(site.contacts(), all);
}

async fn state(at: SocketAddr, job: &Job, wait: &str) -> http::Answer {
    let request = http::request(Method::GET, &job.location).header("prefer", wait);
    let request = request.body(http::whole("")).expect("a request");
    http::send(at, request).await.expect("an answer")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_taken_by_one_gateway_on_kafka_is_seen_at_every_other() {
    const JOBS: usize = 12;
    let site = Site::new(Engine::Kafka);
    let (gateways, _importers) = gateways(&site, Engine::Kafka);
    let mut followers = Vec::new();
    for gateway in &gateways {
        for transport in TRANSPORTS {
            let mut follower = Follower::new(gateway.address(), &[transport], "c", None);
            follower.join().await;
            followers.push(follower);
        }
    }
    let mut seen = vec![0; followers.len()];
    for number in 0..JOBS {
        let at = gateways[number % gateways.len()].address();
        let job = job::submit(at, "c", contacts_csv(&format!("k-{number}"), 20)).await;
        // At once, at another one: it may not know of the job yet, and must not say that there is none.
        let other = gateways[(number + 1) % gateways.len()].address();
        let answer = state(other, &job, "wait=20").await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        assert_eq!(answer.json()["state"], "completed", "{answer:?}");
        for (follower, seen) in followers.iter_mut().zip(&mut seen) {
            follower.until(is_end).await;
            assert_completed(&follower.unbroken()[*seen..], &job.id, 20, 0);
            *seen = follower.events.len();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_from_gateway_to_gateway_on_kafka_misses_and_repeats_nothing() {
    const EVENTS: u64 = 120;
    let site = Site::new(Engine::Kafka);
    let (mut gateways, _importers) = gateways(&site, Engine::Kafka);
    let balancer = balancer(&gateways).await;
    let address = balancer.address();
    let mut ways: Vec<Vec<Transport>> = TRANSPORTS.map(|transport| vec![transport]).into();
    ways.push(TRANSPORTS.into());
    let mut following = Vec::new();
    for way in &ways {
        let mut follower = Follower::new(address, way, "c", None);
        follower.join().await;
        following.push(tokio::spawn(async move {
            follower.until(|event| event.data == EVENTS - 1).await;
            follower
        }));
    }
    for number in 0..EVENTS {
        // By the gateway that is never killed: what a client repeats after a refusal may stand twice.
        let event = format!(r#"{{"type":"count","data":{number}}}"#);
        let path = events_path("c");
        let answer = http::post(gateways[0].address(), &path, "application/json", event).await;
        assert_eq!(answer.expect("an answer").status, StatusCode::ACCEPTED);
        match number % 40 {
            9 => balancer.reset(),
            19 => gateways[1].kill(),
            24 => gateways[2].process().pause(),
            29 => gateways[1].start(),
            34 => {
                // Who waits for the one that says nothing gives it up.
                balancer.reset();
                gateways[2].process().resume();
            }
            _ => {}
        }
    }
    for follower in following {
        let follower = follower.await.expect("it has followed to the end");
        let numbers: Vec<u64> = follower
            .unbroken()
            .iter()
            .filter_map(|event| event.data.as_u64())
            .collect();
        assert_eq!(numbers, (0..EVENTS).collect::<Vec<_>>());
        assert!(follower.connections > 3, "{}", follower.connections);
    }
    // A token of any gateway holds at any other, from the first event on.
    let (_, start) = Subscriber::join(gateways[0].address(), Transport::Sse, "other").await;
    for (number, gateway) in gateways.iter().enumerate() {
        let event = format!(r#"{{"type":"count","data":{number}}}"#);
        let answer = http::post(gateway.address(), &events_path("other"), "application/json", event).await;
        assert_eq!(answer.expect("an answer").status, StatusCode::ACCEPTED);
    }
    for gateway in &gateways {
        for transport in TRANSPORTS {
            let mut late = Subscriber::start(gateway.address(), transport, "other", Some(&start));
            for number in 0..gateways.len() {
                assert_eq!(late.event().await.data, number, "{transport:?}");
            }
            let more = tokio::time::timeout(std::time::Duration::from_millis(100), late.next()).await;
            assert!(!matches!(more, Ok(Push::Event(_))), "{more:?}");
        }
    }
}
