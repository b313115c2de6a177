//! What operators see and do over HTTP, with a consumer on the same log.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barnabas::log::{ProducerRecord, ProducerSettings, Record, TopicSpec};
use barnabas::patterns::consumer::{ConsumerBuilder, ConsumerHandle, Context, Handler, HandlerError, ProcessingOrder};
use barnabas::patterns::retry::{BackOff, RetryPolicy, RetryTopics};
use barnabas::server::event::Event;
use serde_json::{Value, json};
use uuid::Uuid;

use super::support::{DEADLINE, Gateway};

const EVE: &[(&str, &str)] = &[("barnabas-operator", "eve")];

/// Fails for records with a value that begins with `poison` or `hopeless`.
struct Renewals {
    ill: Arc<AtomicBool>,
}

impl Handler for Renewals {
    async fn handle(&self, _: &mut Context, record: &Record) -> Result<(), HandlerError> {
        let value = record.value.as_deref().unwrap_or_default();
        match self.ill.load(Ordering::SeqCst) {
            true if value.starts_with(b"poison") => Err(HandlerError::retriable("declined")),
            true if value.starts_with(b"hopeless") => Err(HandlerError::non_retriable("not a card")),
            _ => Ok(()),
        }
    }
}

pub struct Group {
    pub name: String,
    pub topic: String,
    pub ill: Arc<AtomicBool>,
    pub consumer: ConsumerHandle,
}

impl Group {
    pub async fn start(gateway: &Gateway, retry: RetryPolicy) -> Self {
        let id = Uuid::now_v7().simple().to_string();
        let (topic, name) = (format!("renewals-{id}"), format!("billing-{id}"));
        make_topics(gateway, &[TopicSpec::new(&topic, 2)]).await;
        let builder = ConsumerBuilder::new(&name, [&topic])
            .order(ProcessingOrder::Key)
            .retry(retry)
            .commit_interval(Duration::from_millis(20));
        make_topics(gateway, &builder.topics(&gateway.log).await.expect("topics")).await;
        let ill = Arc::new(AtomicBool::new(true));
        let consumer = builder.start(&gateway.log, Renewals { ill: ill.clone() }).await;
        Self {
            name,
            topic,
            ill,
            consumer: consumer.expect("a consumer"),
        }
    }

    pub async fn append(&self, gateway: &Gateway, key: impl AsRef<[u8]>, value: impl Into<bytes::Bytes>) {
        let producer = gateway
            .log
            .producer(ProducerSettings::default())
            .await
            .expect("a producer");
        let record = ProducerRecord::to(self.topic.as_str())
            .key(key.as_ref().to_vec())
            .value(value);
        producer.append(record).await.expect("appended");
    }
}

async fn make_topics(gateway: &Gateway, wanted: &[TopicSpec]) {
    let plan = gateway.log.plan_topics(wanted).await.expect("a plan");
    gateway.log.apply_topics(&plan).await.expect("topics");
}

/// Asks until something can be said of the answer.
pub async fn until(gateway: &Gateway, path: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let asking = async {
        loop {
            let answer = gateway.get(path, &[]).await;
            if answer.status == 200 {
                let body = answer.json();
                if is_so(&body) {
                    return body;
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, asking)
        .await
        .unwrap_or_else(|_| panic!("{path}: not in time"))
}

#[tokio::test]
async fn an_operator_sees_a_blocked_key_and_skips_its_record() {
    let gateway = Gateway::start().await;
    let hour = BackOff::fixed(Duration::from_secs(3600));
    let group = Group::start(&gateway, RetryPolicy::Blocking(hour)).await;
    for value in ["poison 1", "renewal 2"] {
        group.append(&gateway, "user-7", value).await;
    }
    let blocked =
        until(&gateway, "/v1/admin/blocked", |body| !body["blocked"][0].is_null()).await["blocked"][0].clone();
    assert_eq!(
        (&blocked["group"], &blocked["key"]),
        (&json!(group.name), &json!("user-7"))
    );
    assert_eq!(
        (&blocked["state"], &blocked["message"]),
        (&json!("blocked"), &json!("declined"))
    );
    let place = format!("{}/{}/key/user-7", group.topic, blocked["partition"]);
    assert_eq!(blocked["place"], place, "what tells it apart");
    let of = |group: &str| {
        let group = group.to_owned();
        move |body: &Value| {
            let groups = body["groups"].as_array().expect("groups");
            groups.iter().find(|other| other["group"] == group.as_str()).cloned()
        }
    };
    let path = format!("/v1/admin/groups/{}/commands", group.name);
    let skip = |offset: &Value| {
        json!({
            "action": "skip", "topic": blocked["topic"], "partition": blocked["partition"], "key": "user-7", "offset": offset,
        })
        .to_string()
    };
    let wrong = gateway.post(&path, EVE, skip(&json!(9))).await.problem();
    assert_eq!(wrong, (409, "refused".to_owned(), None));
    let right = gateway.post(&path, EVE, skip(&blocked["offset"])).await;
    assert_eq!((right.status.as_u16(), right.json()), (200, json!({ "done": true })));
    until(&gateway, "/v1/admin/blocked", |body| body["blocked"] == json!([])).await;
    let own = of(&group.name);
    let caught_up = |body: &Value| own(body).is_some_and(|group| group["lag"] == 0 && group["operated"] == true);
    let groups = until(&gateway, "/v1/admin/groups", caught_up).await;
    let own = own(&groups).expect("the group");
    assert_eq!(own["members"].as_array().map(Vec::len), Some(1));
    let member = &own["members"][0]["member"];
    let sources = own["partitions"].as_array().expect("partitions").iter();
    for partition in sources.filter(|partition| partition["topic"] == group.topic.as_str()) {
        assert_eq!(partition["member"], *member);
    }

    let done = format!("/v1/admin/groups/{}/actions", group.name);
    let actions = until(&gateway, &done, |body| body["actions"][0]["done"] == true).await;
    let told: Vec<_> = actions["actions"].as_array().expect("actions").iter().collect();
    assert_eq!(told.len(), 2, "newest first");
    assert_eq!(
        (&told[0]["by"], &told[0]["action"], &told[0]["done"]),
        (&json!("eve"), &json!("skip"), &json!(true))
    );
    assert_eq!((&told[1]["done"], &told[1]["offset"]), (&json!(false), &json!(9)));
    let again = gateway.post(&path, EVE, skip(&blocked["offset"])).await.problem();
    assert_eq!(
        again,
        (409, "refused".to_owned(), None),
        "nothing is blocked there any more"
    );
    group.consumer.shutdown().await.expect("a good end");
    gateway.stop().await;
}

#[tokio::test]
async fn an_operator_looks_through_dead_letters_and_redrives_them() {
    let gateway = Gateway::start().await;
    let group = Group::start(&gateway, RetryPolicy::None).await;
    for number in 0..5 {
        group.append(&gateway, "user", format!("hopeless {number}")).await;
    }
    group.append(&gateway, "user", &b"hopeless \xff"[..]).await;
    let topic = format!("{}.{}.dlt", group.topic, group.name);
    let there = |body: &Value| body["topics"][0]["waiting"] == 6;
    let topics = until(&gateway, "/v1/admin/dead-letters", there).await;
    assert_eq!(
        (&topics["topics"][0]["topic"], &topics["topics"][0]["records"]),
        (&json!(topic), &json!(6))
    );

    let path = format!("/v1/admin/dead-letters/{topic}");
    let page = gateway.get(&format!("{path}?limit=4"), &[]).await.json();
    let records = page["records"].as_array().expect("records").clone();
    assert_eq!(records.len(), 4);
    assert_eq!(records[0]["value_base64"], "aG9wZWxlc3Mg/w==");
    assert_eq!(
        (&records[1]["value"], &records[1]["state"]),
        (&json!("hopeless 4"), &json!("waiting"))
    );
    let reason = json!({ "name": "bn-error-message", "value": "not a card" });
    assert!(records[0]["headers"].as_array().expect("headers").contains(&reason));
    assert_eq!(page["matching"], 6, "from this page on");
    let next = page["next"].as_str().expect("a cursor");
    let rest = gateway.get(&format!("{path}?limit=4&before={next}"), &[]).await.json();
    assert_eq!(
        (rest["records"].as_array().map(Vec::len), &rest["next"]),
        (Some(2), &Value::Null)
    );
    assert_eq!(rest["matching"], 2);
    let found = gateway
        .get(&format!("{path}?filter=less%203&state=waiting"), &[])
        .await
        .json();
    assert_eq!(
        (found["records"].as_array().map(Vec::len), &found["matching"]),
        (Some(1), &json!(1))
    );

    let one = json!({ "records": [{ "partition": records[1]["partition"], "offset": records[1]["offset"] }] });
    let discarded = gateway.post(&format!("{path}/discard"), EVE, one.to_string()).await;
    assert_eq!(discarded.json(), json!({ "records": 1 }));
    group.ill.store(false, Ordering::SeqCst);
    let redriven = gateway.post(&format!("{path}/redrive"), EVE, r#"{"filter":""}"#).await;
    assert_eq!(redriven.json(), json!({ "records": 5 }));
    until(&gateway, "/v1/admin/dead-letters", |body| {
        body["topics"][0]["waiting"] == 0
    })
    .await;
    let all = gateway.get(&path, &[]).await.json();
    let discarded = all["records"]
        .as_array()
        .expect("records")
        .iter()
        .find(|record| record["state"] == "discarded");
    assert_eq!(discarded.expect("one")["by"], "eve");

    for (path, body, expected) in [
        (format!("{path}/redrive"), "{}", (400, "bad-selection")),
        (
            "/v1/admin/dead-letters/nothing/redrive".to_owned(),
            r#"{"filter":""}"#,
            (404, "unknown-topic"),
        ),
        (
            "/v1/admin/groups/nobody/commands".to_owned(),
            "{}",
            (400, "bad-command"),
        ),
        (
            "/v1/admin/groups/nobody/commands".to_owned(),
            r#"{"action":"skip","topic":"t","partition":0,"offset":0}"#,
            (404, "unknown-group"),
        ),
    ] {
        let (status, code, _) = gateway.post(&path, EVE, body).await.problem();
        assert_eq!((status, code.as_str()), expected, "{path}");
    }
    let (status, code, _) = gateway.get(&format!("{path}?before=x"), &[]).await.problem();
    assert_eq!((status, code.as_str()), (400, "bad-query"));
    group.consumer.shutdown().await.expect("a good end");
    gateway.stop().await;
}

#[tokio::test]
async fn pages_of_dead_letters_leave_out_none_when_clocks_differ() {
    let gateway = Gateway::start().await;
    let group = Group::start(&gateway, RetryPolicy::None).await;
    let topic = format!("{}.{}.dlt", group.topic, group.name);
    let producer = gateway.log.producer(ProducerSettings::default()).await;
    let producer = producer.expect("a producer");
    let now_ms = 1_790_000_000_000;
    for (number, behind_ms) in [0, 5000, 1000, 9000, 0, 4000].into_iter().enumerate() {
        let mut record = ProducerRecord::to(topic.as_str())
            .partition(i32::from(number == 2))
            .value(number.to_string());
        record.timestamp_ms = Some(now_ms - behind_ms);
        producer.append(record).await.expect("appended");
    }
    let there = |body: &Value| body["topics"][0]["records"] == 6;
    until(&gateway, "/v1/admin/dead-letters", there).await;
    let mut seen = Vec::new();
    let mut path = format!("/v1/admin/dead-letters/{topic}?limit=2");
    loop {
        let page = gateway.get(&path, &[]).await.json();
        let values = page["records"].as_array().expect("records").iter();
        seen.extend(values.map(|record| record["value"].as_str().expect("text").to_owned()));
        let Some(next) = page["next"].as_str() else { break };
        path = format!("/v1/admin/dead-letters/{topic}?limit=2&before={next}");
    }
    seen.sort();
    assert_eq!(seen, ["0", "1", "2", "3", "4", "5"]);
    group.consumer.shutdown().await.expect("a good end");
    gateway.stop().await;
}

#[tokio::test]
async fn retry_topics_say_what_waits_and_until_when() {
    let gateway = Gateway::start().await;
    let topics = RetryTopics::new([Duration::from_secs(600)]);
    let group = Group::start(&gateway, RetryPolicy::NonBlocking(topics)).await;
    for _ in 0..3 {
        group.append(&gateway, "user", "poison").await;
    }
    let waiting = |body: &Value| body["topics"][0]["waiting"] == 3;
    let body = until(&gateway, "/v1/admin/retry-topics", waiting).await;
    let told = &body["topics"][0];
    assert_eq!(
        (&told["source"], &told["delay_ms"]),
        (&json!(group.topic), &json!(600_000))
    );
    let now_ms = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970")
        .as_millis();
    let due_ms = told["next_due_ms"].as_u64().expect("a time");
    assert!((now_ms as u64 + 500_000..now_ms as u64 + 600_001).contains(&due_ms));
    group.consumer.shutdown().await.expect("a good end");
    gateway.stop().await;
}

#[tokio::test]
async fn changes_are_told_on_the_channel_of_operators() {
    let gateway = Gateway::start().await;
    let hour = BackOff::fixed(Duration::from_secs(3600));
    let group = Group::start(&gateway, RetryPolicy::Blocking(hour)).await;
    group.append(&gateway, "well", "renewal").await;
    let topic = gateway.config.topics.notifications();
    let number = std::sync::atomic::AtomicU32::new(0);
    // The gateway finds the group within some seconds; what happens later is told.
    let told = async |event_type: &str| -> Event {
        let telling = async {
            loop {
                let key = format!("user-{}", number.fetch_add(1, Ordering::Relaxed));
                group.append(&gateway, &key, "poison").await;
                let records = gateway.records(&topic, 0).await.concat();
                let events = records
                    .iter()
                    .filter_map(|record| Event::from_record(record, String::new).ok());
                if let Some(event) = events.into_iter().find(|event| event.event_type == event_type) {
                    return event;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(DEADLINE, telling)
            .await
            .unwrap_or_else(|_| panic!("{event_type}: not in time"))
    };
    let event = told("group.blocked").await;
    assert_eq!(event.channel, "barnabas.admin");
    let data: Value = serde_json::from_str(event.data.expect("data").get()).expect("JSON");
    assert_eq!(
        (&data["group"], &data["topic"]),
        (&json!(group.name), &json!(group.topic))
    );
    let command = json!({
        "action": "skip", "topic": data["topic"], "partition": data["partition"], "key": data["key"], "offset": data["offset"],
    });
    let path = format!("/v1/admin/groups/{}/commands", group.name);
    assert_eq!(gateway.post(&path, EVE, command.to_string()).await.status, 200);
    let event = told("group.unblocked").await;
    let unblocked: Value = serde_json::from_str(event.data.expect("data").get()).expect("JSON");
    for same in ["group", "key", "place"] {
        assert!(unblocked[same].is_string(), "{same}");
        assert_eq!(unblocked[same], data[same]);
    }
    told("group.action").await;
    // What is too large for the channel, as each quote in it is two bytes there and twice, keeps nothing else from being told.
    group.append(&gateway, &"\"".repeat(300_000), "poison").await;
    group.append(&gateway, "after", "poison").await;
    let is_told = async {
        loop {
            let records = gateway.records(&topic, 0).await.concat();
            let is_after = |record: &Record| {
                let event = Event::from_record(record, String::new).ok();
                let data: Option<Value> = event.and_then(|event| serde_json::from_str(event.data?.get()).ok());
                data.is_some_and(|data| data["key"] == "after")
            };
            if records.iter().any(is_after) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(DEADLINE, is_told).await.expect("told in time");
    group.consumer.shutdown().await.expect("a good end");
    gateway.stop().await;
}
