//! What was answered 202 survives a gateway that is killed at any moment, whole and once; what was not is there whole or not at all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use barnabas_tests::http;
use barnabas_tests::job::try_submit;
use barnabas_tests::on_both_logs;
use barnabas_tests::site::{Engine, Site, contacts_csv, wait_for};
use barnabas_tests::subscriber::events_path;
use hyper::StatusCode;

on_both_logs!(
    jobs_that_were_taken_survive_kills_of_the_gateway_whole,
    events_that_were_taken_survive_kills_of_the_gateway_in_order,
);

const CLIENTS: usize = 6;
const KILLS: usize = 4;
const SOON: Duration = Duration::from_secs(60);

/// Lets the gateway run for a random while, in which some requests end and some do not.
async fn a_while() {
    tokio::time::sleep(Duration::from_millis(rand::random_range(100..700))).await;
}

async fn jobs_that_were_taken_survive_kills_of_the_gateway_whole(engine: Engine) {
    let site = Site::new(engine);
    let mut gateway = site.gateway("gateway");
    let to = gateway.address();
    let (stopping, submitted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients = (0..CLIENTS).map(|client| {
        let (stopping, submitted) = (Arc::clone(&stopping), Arc::clone(&submitted));
        tokio::spawn(async move {
            let mut taken = Vec::new();
            for number in 0.. {
                if stopping.load(Ordering::Relaxed) {
                    break;
                }
                // Every fifth is large: it has a transaction to itself, of many chunks.
                let rows = if number % 5 == 4 { 30_000 } else { 1 + number % 1500 };
                let csv = contacts_csv(&format!("k-{client}-{number}"), rows);
                match try_submit(to, "c", csv).await {
                    Ok(answer) if answer.status == StatusCode::ACCEPTED => {
                        taken.push(answer.header("location").rsplit('/').next().expect("an id").to_owned());
                        submitted.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(answer) => assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{answer:?}"),
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
            taken
        })
    });
    let clients: Vec<_> = clients.collect();
    for _ in 0..KILLS {
        a_while().await;
        gateway.kill();
        gateway.start();
    }
    wait_for("several jobs of each client", SOON, || {
        submitted.load(Ordering::Relaxed) > 3 * CLIENTS
    })
    .await;
    stopping.store(true, Ordering::Relaxed);
    let mut taken = Vec::new();
    for client in clients {
        taken.extend(client.await.expect("a client ends"));
    }
    let whole = site.assert_jobs_are_whole();
    let lost: Vec<_> = taken.iter().filter(|job| !whole.contains(*job)).collect();
    assert!(lost.is_empty(), "answered 202 and lost: {lost:?}");
    // Each of them is told of, once, also those whose submitter got no answer.
    let accepted = || {
        let mut times: BTreeMap<String, usize> = BTreeMap::new();
        for event in site.records(&site.notifications_topic()) {
            if event.header("ce_type") == "job.accepted" {
                *times.entry(event.header("ce_subject").to_owned()).or_default() += 1;
            }
        }
        times
    };
    wait_for("job.accepted of every job", SOON, || accepted().len() == whole.len()).await;
    assert!(accepted().values().all(|times| *times == 1), "{:?}", accepted());
}

async fn events_that_were_taken_survive_kills_of_the_gateway_in_order(engine: Engine) {
    let site = Site::new(engine);
    let mut gateway = site.gateway("gateway");
    let to = gateway.address();
    let stopping = Arc::new(AtomicBool::new(false));
    let client = tokio::spawn({
        let stopping = Arc::clone(&stopping);
        async move {
            let mut taken = Vec::new();
            for number in 0u64.. {
                if stopping.load(Ordering::Relaxed) {
                    break;
                }
                let event = format!(r#"{{"type":"count","data":{number}}}"#);
                match http::post(to, &events_path("c"), "application/json", event).await {
                    Ok(answer) if answer.status == StatusCode::ACCEPTED => taken.push(number),
                    Ok(answer) => assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{answer:?}"),
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
            taken
        }
    });
    for _ in 0..KILLS {
        a_while().await;
        gateway.kill();
        gateway.start();
    }
    stopping.store(true, Ordering::Relaxed);
    let taken = client.await.expect("the client ends");
    let there: Vec<u64> = site
        .records(&site.notifications_topic())
        .iter()
        .map(|event| event.json().as_u64().expect("a number"))
        .collect();
    assert!(there.is_sorted(), "{there:?}");
    let lost: Vec<_> = taken.iter().filter(|number| !there.contains(number)).collect();
    assert!(!taken.is_empty() && lost.is_empty(), "answered 202 and lost: {lost:?}");
    // One client without repetition: nothing is there twice.
    assert!(there.windows(2).all(|pair| pair[0] != pair[1]), "{there:?}");
}
