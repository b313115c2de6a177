//! One token for all transports, over networks that fail.

use std::time::Duration;

use barnabas_tests::http;
use barnabas_tests::on_both_logs;
use barnabas_tests::proxy::{Proxy, Weather};
use barnabas_tests::site::{Engine, Site};
use barnabas_tests::subscriber::{Follower, Push, Subscriber, TRANSPORTS, Transport, events_path};
use hyper::{Method, StatusCode};
use std::net::SocketAddr;

on_both_logs!(
    each_transport_goes_on_where_another_stopped,
    what_is_posted_while_a_client_is_away_is_told_when_it_is_back,
    a_foreign_token_is_told_and_never_answered_with_silence,
    resets_lose_and_repeat_nothing,
);

/// Long enough for what must not come to be seen.
const WHILE: Duration = Duration::from_millis(300);

async fn publish(to: SocketAddr, channel: &str, number: usize) -> String {
    let event = format!(r#"{{"type":"count","data":{number}}}"#);
    let answer = http::post(to, &events_path(channel), "application/json", event)
        .await
        .expect("an answer");
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
    answer.header("barnabas-token").to_owned()
}

fn is_number(number: usize) -> impl Fn(&barnabas_tests::subscriber::Event) -> bool {
    move |event| event.data == number
}

fn numbers(follower: &Follower) -> Vec<u64> {
    follower
        .unbroken()
        .iter()
        .filter_map(|event| event.data.as_u64())
        .collect()
}

async fn each_transport_goes_on_where_another_stopped(engine: Engine) {
    let site = Site::new(engine);
    let gateway = site.gateway("gateway");
    let to = gateway.address();
    // Every transport follows every other, itself among them.
    let mut way = Vec::new();
    for from in TRANSPORTS {
        for then in TRANSPORTS {
            way.extend([from, then]);
        }
    }
    let mut follower = Follower::new(to, &way, "c", None);
    follower.join().await;
    let count = way.len();
    for number in 0..count {
        publish(to, "c", number).await;
        publish(to, "another", number).await;
        follower.until(is_number(number)).await;
        follower.disconnect();
    }
    assert_eq!(numbers(&follower), (0..count as u64).collect::<Vec<_>>());
    assert_eq!(follower.connections, count);
}

async fn what_is_posted_while_a_client_is_away_is_told_when_it_is_back(engine: Engine) {
    let site = Site::new(engine);
    let mut gateway = site.gateway("gateway");
    let to = gateway.address();
    let mut followers = Vec::new();
    for transport in TRANSPORTS {
        let mut follower = Follower::new(to, &[transport], "c", None);
        follower.join().await;
        follower.disconnect();
        followers.push(follower);
    }
    for number in 0..20 {
        publish(to, "c", number).await;
    }
    // A new process has nothing in memory: the rest comes from the log.
    gateway.kill();
    gateway.start();
    publish(to, "c", 20).await;
    for follower in &mut followers {
        follower.until(is_number(20)).await;
        assert_eq!(numbers(follower), (0..=20).collect::<Vec<_>>());
    }
}

async fn a_foreign_token_is_told_and_never_answered_with_silence(engine: Engine) {
    let elsewhere = Site::new(engine);
    let foreign = {
        let gateway = elsewhere.gateway("gateway");
        publish(gateway.address(), "c", 0).await
    };
    let site = Site::new(engine);
    let gateway = site.gateway("gateway");
    publish(gateway.address(), "c", 1).await;
    for transport in TRANSPORTS {
        for token in [foreign.as_str(), "nonsense", "%00%ff", "AAAAAAAAAAAAAAAAAAAA"] {
            let mut subscriber = Subscriber::start(gateway.address(), transport, "c", Some(token));
            let said = loop {
                match subscriber.next().await {
                    Push::Subscribed(_) => {}
                    other => break other,
                }
            };
            assert!(
                matches!(&said, Push::Gap(_))
                    || matches!(&said, Push::End(why) if why.contains("400") || why.contains("error")),
                "{transport:?} with {token:?} was told {said:?}"
            );
        }
    }
}

async fn resets_lose_and_repeat_nothing(engine: Engine) {
    const EVENTS: usize = 200;
    let site = Site::new(engine);
    let gateway = site.gateway("gateway");
    let to = gateway.address();
    let proxy = Proxy::start([to]).await;
    let followers: Vec<_> = TRANSPORTS
        .into_iter()
        .map(|transport| Follower::new(proxy.address(), &[transport], "c", None))
        .collect();
    let mut following = Vec::new();
    for mut follower in followers {
        follower.join().await;
        following.push(tokio::spawn(async move {
            follower.until(is_number(EVENTS - 1)).await;
            follower
        }));
    }
    for number in 0..EVENTS {
        publish(to, "c", number).await;
        if number % 10 == 9 {
            proxy.reset();
        }
    }
    for follower in following {
        let follower = follower.await.expect("it has followed to the end");
        assert_eq!(numbers(&follower), (0..EVENTS as u64).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swallowed_upgrade_leaves_the_other_transports_alone() {
    let site = Site::new(Engine::Embedded);
    let gateway = site.gateway("gateway");
    let proxy = Proxy::start([gateway.address()]).await;
    proxy.set(Weather::UpgradeSwallowed);
    let mut web_socket = Subscriber::start(proxy.address(), Transport::WebSocket, "c", None);
    assert!(tokio::time::timeout(WHILE, web_socket.next()).await.is_err());
    for transport in [Transport::Sse, Transport::LongPoll] {
        let (mut subscriber, _) = Subscriber::join(proxy.address(), transport, "c").await;
        publish(gateway.address(), "c", 7).await;
        assert_eq!(subscriber.event().await.data, 7);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stripped_upgrade_is_answered_with_an_error_of_http() {
    let site = Site::new(Engine::Embedded);
    let gateway = site.gateway("gateway");
    let proxy = Proxy::start([gateway.address()]).await;
    proxy.set(Weather::UpgradeStripped);
    let mut web_socket = Subscriber::start(proxy.address(), Transport::WebSocket, "c", None);
    assert!(matches!(web_socket.next().await, Push::End(_)));
    let plain = http::request(Method::GET, "/v1/ws")
        .body(http::whole(""))
        .expect("a request");
    let answer = http::send(gateway.address(), plain).await.expect("an answer");
    assert!(
        answer.status.is_client_error() && !answer.code().is_empty(),
        "{answer:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_gateway_tells_every_stream_when_to_come_back() {
    let site = Site::new(Engine::Embedded);
    let mut gateway = site.gateway("gateway");
    let mut subscribers = Vec::new();
    for transport in [Transport::WebSocket, Transport::Sse] {
        subscribers.push(Subscriber::join(gateway.address(), transport, "c").await.0);
    }
    gateway.stop();
    for subscriber in &mut subscribers {
        match subscriber.next().await {
            Push::Bye(bye) => assert!(bye["retry_ms"].is_u64(), "{bye}"),
            other => panic!("{other:?} instead of a farewell"),
        }
        assert!(matches!(subscriber.next().await, Push::End(_)));
    }
}
