//! Pushing, through the front door, on the embedded log: every transport, resuming, gaps, clients that do not read, and farewells.

use std::collections::BTreeSet;

use barnabas::log::{ProducerRecord, ProducerSettings, partition_for_key};
use barnabas_tests::conformance::within;
use barnabas_tests::http;
use barnabas_tests::subscriber::{Event, Follower, Push, Subscriber, TRANSPORTS, Transport, events_path};
use barnabas_tests::world::World;
use http_body_util::BodyExt as _;
use hyper::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

fn numbers(events: &[Event]) -> Vec<u64> {
    events
        .iter()
        .map(|event| event.data.as_u64().expect("a number"))
        .collect()
}

async fn next_numbers(subscriber: &mut Subscriber, last: u64) -> Vec<u64> {
    numbers(&within("events", subscriber.events_until(|event| event.data == last)).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_transport_pushes_what_is_posted_in_order() {
    let world = World::new().await;
    for transport in TRANSPORTS {
        let channel = format!("live-{transport:?}");
        let (mut subscriber, _) = within("a subscription", Subscriber::join(world.address, transport, &channel)).await;
        world.post("another", [99]).await;
        for start in [0, 10, 20] {
            world.post(&channel, start..start + 10).await;
        }
        assert_eq!(
            next_numbers(&mut subscriber, 29).await,
            (0..30).collect::<Vec<u64>>(),
            "{transport:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_token_resumes_on_every_transport() {
    let world = World::new().await;
    let mut follower = Follower::new(world.address, &TRANSPORTS, "c", None);
    within("a subscription", follower.join()).await;
    for round in 0..12u32 {
        world.post("c", round * 10..round * 10 + 10).await;
        within("the round", follower.until(|event| event.data == round * 10 + 9)).await;
        follower.disconnect();
        // While nobody listens.
        world.post("c", [1000 + round]).await;
        world.post("other", [round]).await;
        within("what was missed", follower.until(|event| event.data == 1000 + round)).await;
    }
    assert_eq!(follower.unbroken().len(), 12 * 11);
    assert!(follower.connections > 12);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_token_of_a_post_is_just_behind_its_last_event() {
    let world = World::new().await;
    world.post("c", 0..5).await;
    let token = world.post("c", 5..8).await;
    world.post("c", 8..10).await;
    for transport in TRANSPORTS {
        let mut subscriber = Subscriber::start(world.address, transport, "c", Some(&token));
        assert_eq!(next_numbers(&mut subscriber, 9).await, [8, 9], "{transport:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_can_start_in_the_past() {
    let world = World::new().await;
    world.post("c", 0..5).await;
    world.post("elsewhere", 0..50).await;
    for (query, expected) in [
        ("since=earliest", vec![0, 1, 2, 3, 4]),
        ("since=-1h", vec![0, 1, 2, 3, 4]),
        ("last=1", vec![4]),
    ] {
        let answer = world.get(&format!("{}?{query}&wait=5", events_path("c"))).await;
        let events: Vec<Event> = serde_json::from_value(answer.json()["events"].clone()).expect("events");
        assert_eq!(numbers(&events), expected, "{query}");
    }
    let answer = world.get(&format!("{}?last=1&wait=0", events_path("never"))).await;
    assert_eq!(answer.json()["events"], json!([]));
    for (query, code) in [
        ("since=yesterday", "bad-since"),
        ("last=2", "bad-query"),
        ("aftre=x", "bad-query"),
        ("after=x", "bad-token"),
    ] {
        let answer = world.get(&format!("{}?{query}", events_path("c"))).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (StatusCode::BAD_REQUEST, code),
            "{query}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_retention_has_taken_is_said_as_a_gap_and_the_rest_is_pushed() {
    let world = World::new().await;
    let token = world.post("c", [0]).await;
    world.post("c", 1..10).await;
    let last = world.post("c", [10]).await;
    world.retain_from("c", 8).await;
    for transport in TRANSPORTS {
        let mut subscriber = Subscriber::start(world.address, transport, "c", Some(&token));
        let gap = loop {
            match within("a gap", subscriber.next()).await {
                Push::Gap(gap) => break gap,
                Push::Subscribed(_) => {}
                other => panic!("{transport:?}: {other:?}"),
            }
        };
        let gap = gap.get("gap").unwrap_or(&gap);
        assert_eq!(
            (&gap["reason"], &gap["from"]),
            (&json!("retention"), &json!(token)),
            "{transport:?}"
        );
        assert_eq!(next_numbers(&mut subscriber, 10).await, [8, 9, 10], "{transport:?}");
        let mut resumed = Subscriber::start(world.address, transport, "c", Some(&last));
        world.post("c", [11]).await;
        assert_eq!(next_numbers(&mut resumed, 11).await.last(), Some(&11));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_from_elsewhere_is_a_gap_and_never_all_of_history() {
    let (world, elsewhere) = (World::new().await, World::new().await);
    world.post("c", 0..5).await;
    let foreign = elsewhere.post("c", 0..3).await;
    for transport in TRANSPORTS {
        let mut subscriber = Subscriber::start(world.address, transport, "c", Some(&foreign));
        let gap = loop {
            match within("a gap", subscriber.next()).await {
                Push::Gap(gap) => break gap,
                Push::Subscribed(_) => {}
                other => panic!("{transport:?}: {other:?}"),
            }
        };
        let gap = gap.get("gap").unwrap_or(&gap);
        assert_eq!(gap["reason"], "topic-recreated", "{transport:?}");
        world.post("c", [7]).await;
        assert_eq!(within("an event", subscriber.event()).await.data, 7, "{transport:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_answers_any_poll() {
    let mut world = World::new().await;
    let nodes = [world.address, world.another_gateway().await];
    let mut token = world.post("c", [0]).await;
    for n in 1..20u32 {
        world.post("c", [n]).await;
        let path = format!("{}?after={token}&wait=10", events_path("c"));
        let request = http::request(Method::GET, &path)
            .body(http::whole(""))
            .expect("a request");
        let answer = within("an answer", http::send(nodes[n as usize % 2], request))
            .await
            .expect("an answer")
            .json();
        assert_eq!(answer["events"][0]["data"], n);
        assert_eq!(answer["events"].as_array().map(Vec::len), Some(1));
        token = answer["token"].as_str().expect("a token").to_owned();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_channels_share_a_stream_and_its_token_covers_them_all() {
    let world = World::new().await;
    let channels = ["a", "b", "c", "d", "e"];
    let query: String = channels.iter().map(|channel| format!("&channel={channel}")).collect();
    let mut token: Option<String> = None;
    let mut seen = BTreeSet::new();
    for round in 0..5u32 {
        let after = token
            .as_ref()
            .map(|token| format!("&after={token}"))
            .unwrap_or_default();
        if token.is_none() {
            let answer = world.get(&format!("/v1/events?wait=0{query}")).await.json();
            token = Some(answer["token"].as_str().expect("a token").to_owned());
            continue;
        }
        for (i, channel) in channels.iter().enumerate() {
            world.post(channel, [round * 10 + i as u32]).await;
        }
        // One poll may bring only what has come so far.
        let mut after = after;
        while seen.len() < channels.len() * round as usize {
            let answer = world.get(&format!("/v1/events?wait=10{query}{after}")).await.json();
            for event in answer["events"].as_array().expect("events") {
                assert!(seen.insert(event["data"].as_u64().expect("a number")), "twice: {event}");
            }
            token = Some(answer["token"].as_str().expect("a token").to_owned());
            after = format!("&after={}", token.as_deref().expect("a token"));
        }
    }
    assert_eq!(seen.len(), 20);
}

/// Two channels of one partition.
fn neighbours(partitions: i32) -> [String; 2] {
    let partition = |name: &str| partition_for_key(name.as_bytes(), partitions);
    let other = (0..)
        .map(|n| format!("c{n}"))
        .find(|name| partition(name) == partition("c"));
    ["c".to_owned(), other.expect("some name")]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poll_of_two_channels_of_one_partition_makes_its_way() {
    const EACH: u32 = 500;
    let world = World::new().await;
    let channels = neighbours(world.config.topics.partitions);
    let query: String = channels.iter().map(|channel| format!("&channel={channel}")).collect();
    let answer = world.get(&format!("/v1/events?wait=0{query}")).await.json();
    let mut token = answer["token"].as_str().expect("a token").to_owned();
    for n in 0..EACH {
        for channel in &channels {
            world.post(channel, [n]).await;
        }
    }
    let mut seen = BTreeSet::new();
    let mut polls = 0;
    while seen.len() < 2 * EACH as usize {
        let answer = world
            .get(&format!("/v1/events?wait=10{query}&after={token}"))
            .await
            .json();
        for event in answer["events"].as_array().expect("events") {
            let place = (event["channel"].to_string(), event["data"].as_u64());
            assert!(seen.insert(place), "twice: {event}");
        }
        token = answer["token"].as_str().expect("a token").to_owned();
        polls += 1;
        assert!(polls <= 20, "{} events after {polls} polls", seen.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_to_a_stream_of_several_channels_is_told_the_gap_of_each() {
    let world = World::with(|config| config.push.history_bytes = 1).await;
    let channels = neighbours(world.config.topics.partitions);
    let query: String = channels.iter().map(|channel| format!("&channel={channel}")).collect();
    let answer = world.get(&format!("/v1/events?wait=0{query}")).await.json();
    let token = answer["token"].as_str().expect("a token");
    for channel in &channels {
        world.post(channel, 0..10).await;
    }
    world.retain_from("c", 15).await;
    // The greetings and gaps have no id, so a connection that is cut between them begins them anew.
    let request = http::request(Method::GET, &format!("/v1/events?after={token}{query}"))
        .header("accept", "text/event-stream")
        .body(http::whole(""))
        .expect("a request");
    let mut body = http::open(world.address, request).await.expect("a stream").into_body();
    let mut text = String::new();
    while !text.contains("\nevent: event") {
        let frame = within("a frame", body.frame()).await.expect("no end").expect("a frame");
        text.push_str(&String::from_utf8_lossy(&frame.into_data().expect("data")));
    }
    let until_id = &text[..text.find("\nid: ").expect("an id")];
    assert_eq!(until_id.matches("event: hello").count(), 2, "{text}");
    assert_eq!(until_id.matches("event: gap").count(), 2, "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_parked_and_gets_everything_later() {
    let world = World::with(|config| {
        config.push.backlog_bytes = 64 * 1024;
        config.push.history_bytes = 256 * 1024;
    })
    .await;
    let mut lazy = tokio::net::TcpStream::connect(world.address)
        .await
        .expect("a connection");
    let head = format!(
        "GET {} HTTP/1.1\r\nhost: {}\r\naccept: text/event-stream\r\n\r\n",
        events_path("c"),
        world.address
    );
    lazy.write_all(head.as_bytes()).await.expect("sent");
    let mut read = vec![0; 16 * 1024];
    let mut text = String::new();
    while !text.contains("event: hello") {
        let length = within("a hello", lazy.read(&mut read)).await.expect("bytes");
        text.push_str(&String::from_utf8_lossy(&read[..length]));
    }
    let (mut eager, _) = within(
        "a subscription",
        Subscriber::join(world.address, Transport::WebSocket, "c"),
    )
    .await;
    // 20 MiB: more than the outbox, the history and the kernel take.
    let producer = world
        .log
        .producer(ProducerSettings::default())
        .await
        .expect("a producer");
    let padding = "x".repeat(10_000);
    for n in 0..2000u32 {
        let value = json!({"type": "n", "data": {"n": n, "padding": padding}}).to_string();
        let record = ProducerRecord::to(world.config.topics.notifications())
            .key("c")
            .value(value);
        producer.append(record).await.expect("appended");
    }
    let others = within("the others go on", eager.events_until(|event| event.data["n"] == 1999)).await;
    assert_eq!(others.len(), 2000);
    let mut numbers = Vec::new();
    while numbers.last() != Some(&1999) {
        let length = within("the rest", lazy.read(&mut read)).await.expect("bytes");
        assert!(length > 0, "the stream ended after {:?}", numbers.last());
        text.push_str(&String::from_utf8_lossy(&read[..length]));
        while let Some(end) = text.find("\n\n") {
            let message: String = text.drain(..end + 2).collect();
            assert!(!message.contains("event: gap"), "{message}");
            if let Some(at) = message.find("{\"n\":") {
                let digits: String = message[at + 5..].chars().take_while(char::is_ascii_digit).collect();
                numbers.push(digits.parse::<u32>().expect("a number"));
            }
        }
    }
    assert_eq!(numbers, (0..2000).collect::<Vec<u32>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_subscribers_of_all_transports_each_see_everything_once() {
    let world = World::new().await;
    let token = world.post("c", [0]).await;
    let mut subscribers = Vec::new();
    for i in 0..300 {
        let transport = TRANSPORTS[i % 3];
        let address = world.address;
        let token = token.clone();
        // They come while events are posted.
        subscribers.push(tokio::spawn(async move {
            let mut follower = Follower::new(address, &[transport], "c", Some(&token));
            within("all events", follower.until(|event| event.data == 200)).await;
            numbers(follower.unbroken())
        }));
        if i % 3 == 0 {
            world.post("c", [1 + i as u32 / 3 * 2, 2 + i as u32 / 3 * 2]).await;
        }
    }
    for subscriber in subscribers {
        assert_eq!(subscriber.await.expect("a subscriber"), (1..=200).collect::<Vec<u64>>());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_stops_says_when_to_come_back() {
    let world = World::new().await;
    let mut subscribers = Vec::new();
    for transport in [Transport::WebSocket, Transport::Sse] {
        subscribers.push((
            transport,
            within("a subscription", Subscriber::join(world.address, transport, "c"))
                .await
                .0,
        ));
    }
    world.stopping.cancel();
    for (transport, mut subscriber) in subscribers {
        match within("a farewell", subscriber.next()).await {
            Push::Bye(bye) => assert!(
                bye["retry_ms"].as_u64().is_some_and(|ms| ms > 0),
                "{transport:?}: {bye}"
            ),
            other => panic!("{transport:?}: {other:?}"),
        }
        match within("the end", subscriber.next()).await {
            Push::End(why) => assert!(transport != Transport::WebSocket || why.starts_with("1012"), "{why}"),
            other => panic!("{transport:?}: {other:?}"),
        }
    }
}
