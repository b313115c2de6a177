//! The subcommands of the binary, against a gateway that runs.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use barnabas::patterns::retry::{BackOff, RetryPolicy};
use serde_json::Value;

use super::admin::{Group, until};
use super::support::{DEADLINE, Gateway};

/// Runs `barnabas` with these words, in a folder of the test's own so that no settings file is found.
async fn barnabas(folder: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_barnabas"));
    command
        .args(words)
        .env_clear()
        .env("USER", "eve")
        .current_dir(folder)
        .stdin(Stdio::null());
    let running = tokio::task::spawn_blocking(move || command.output());
    tokio::time::timeout(DEADLINE, running)
        .await
        .expect("an end in time")
        .expect("no panic")
        .expect("the binary")
}

/// What a subcommand that did its work has printed.
async fn told(gateway: &Gateway, words: &[&str]) -> String {
    let url = format!("--gateway=http://{}", gateway.address);
    let output = barnabas(gateway.folder.path(), &[words, &[url.as_str()]].concat()).await;
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// The status and the complaint of one that did not.
async fn refused(gateway: &Gateway, words: &[&str]) -> (Option<i32>, String) {
    let url = format!("--gateway=http://{}", gateway.address);
    let output = barnabas(gateway.folder.path(), &[words, &[url.as_str()]].concat()).await;
    assert!(output.stdout.is_empty(), "{output:?}");
    (
        output.status.code(),
        String::from_utf8(output.stderr).expect("text").trim_end().to_owned(),
    )
}

#[tokio::test]
async fn a_blocked_record_is_listed_and_skipped() {
    let gateway = Gateway::start().await;
    let hour = BackOff::fixed(Duration::from_secs(3600));
    let group = Group::start(&gateway, RetryPolicy::Blocking(hour)).await;
    for value in ["poison 1", "renewal 2"] {
        group.append(&gateway, "user 7\u{1b}[2J", value).await;
    }
    let body = until(&gateway, "/v1/admin/blocked", |body| !body["blocked"][0].is_null()).await;
    let partition = body["blocked"][0]["partition"].to_string();
    let listed = told(&gateway, &["blocked", "ls"]).await;
    assert!(
        !listed.contains('\u{1b}'),
        "a key does not steer the terminal: {listed}"
    );
    let row = listed.lines().nth(1).expect("a row");
    for cell in [group.name.as_str(), &group.topic, "user 7", "retriable declined"] {
        assert!(row.contains(cell), "{cell}: {listed}");
    }
    let json = told(&gateway, &["blocked", "ls", "--json"]).await;
    assert_eq!(
        serde_json::from_str::<Value>(&json).expect("JSON")["blocked"][0]["key"],
        "user 7\u{1b}[2J"
    );

    let (name, topic) = (group.name.as_str(), group.topic.as_str());
    let skip = [
        "blocked",
        "skip",
        name,
        topic,
        &partition,
        "9",
        "--key",
        "user 7\u{1b}[2J",
    ];
    let (status, complaint) = refused(&gateway, &skip).await;
    assert_eq!(status, Some(69));
    assert!(complaint.starts_with("barnabas: 409 Conflict refused: "), "{complaint}");
    let skip = [
        "blocked",
        "skip",
        name,
        topic,
        &partition,
        "0",
        "--key",
        "user 7\u{1b}[2J",
    ];
    assert_eq!(told(&gateway, &skip).await, "done\n");
    until(&gateway, "/v1/admin/blocked", |body| {
        body["blocked"] == serde_json::json!([])
    })
    .await;
    let listed = told(&gateway, &["blocked", "ls"]).await;
    assert_eq!(listed.lines().count(), 1, "only the head: {listed}");
    let path = format!("/v1/admin/groups/{name}/actions");
    let actions = until(&gateway, &path, |body| body["actions"][0]["done"] == true).await;
    assert_eq!(actions["actions"][0]["by"], "eve");
    let groups = told(&gateway, &["groups"]).await;
    assert!(
        groups
            .lines()
            .any(|line| line.starts_with(name) && line.contains(topic)),
        "{groups}"
    );
    group.consumer.shutdown().await.expect("a good end");
    gateway.stop().await;
}

#[tokio::test]
async fn a_key_that_is_no_text_is_named_in_base64() {
    let gateway = Gateway::start().await;
    let hour = BackOff::fixed(Duration::from_secs(3600));
    let group = Group::start(&gateway, RetryPolicy::Blocking(hour)).await;
    group.append(&gateway, [0xff, 0], "poison 1").await;
    let body = until(&gateway, "/v1/admin/blocked", |body| !body["blocked"][0].is_null()).await;
    let partition = body["blocked"][0]["partition"].to_string();
    let listed = told(&gateway, &["blocked", "ls"]).await;
    assert!(listed.contains(" base64:/wA= "), "{listed}");
    let (name, topic) = (group.name.as_str(), group.topic.as_str());
    let skip = ["blocked", "skip", name, topic, &partition, "0", "--key-base64", "/wA="];
    assert_eq!(told(&gateway, &skip).await, "done\n");
    group.consumer.shutdown().await.expect("a good end");
    gateway.stop().await;
}

#[tokio::test]
async fn dead_letters_are_shown_redriven_and_discarded() {
    let gateway = Gateway::start().await;
    let group = Group::start(&gateway, RetryPolicy::None).await;
    for number in 0..5 {
        group.append(&gateway, "user", format!("hopeless {number}")).await;
    }
    until(&gateway, "/v1/admin/dead-letters", |body| {
        body["topics"][0]["waiting"] == 5
    })
    .await;
    let topic = format!("{}.{}.dlt", group.topic, group.name);
    let listed = told(&gateway, &["dlq", "ls"]).await;
    let cells: Vec<_> = listed.lines().nth(1).expect("a row").split_whitespace().collect();
    assert_eq!(cells, [topic.as_str(), &group.name, "5", "5"]);
    let shown = told(&gateway, &["dlq", "show", &topic, "--filter", "less 3"]).await;
    assert!(shown.contains("value: hopeless 3\n"), "{shown}");
    assert!(shown.contains("bn-error-message: not a card\n"), "{shown}");
    assert_eq!(shown.matches("value: ").count(), 1);
    let place = shown.split_whitespace().next().expect("where it stands");

    assert_eq!(
        told(&gateway, &["dlq", "discard", &topic, place]).await,
        "1 dead letters\n"
    );
    group.ill.store(false, Ordering::SeqCst);
    assert_eq!(
        told(&gateway, &["dlq", "redrive", &topic, "--all"]).await,
        "4 dead letters\n"
    );
    assert_eq!(told(&gateway, &["dlq", "show", &topic]).await, "");
    let all = told(&gateway, &["dlq", "show", &topic, "--all"]).await;
    assert_eq!(
        (
            all.matches("redriven  by eve").count(),
            all.matches("discarded  by eve").count()
        ),
        (4, 1)
    );
    group.consumer.shutdown().await.expect("a good end");
    gateway.stop().await;
}

#[tokio::test]
async fn topics_are_planned_before_they_are_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let topics = async |words: &[&str]| {
        let data = format!("--data-dir={}", folder.path().display());
        barnabas(folder.path(), &[&["topics"], words, &[data.as_str()]].concat()).await
    };
    let lines = |output: &Output| {
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).lines().count()
    };
    let planned = topics(&["plan"]).await;
    assert!(lines(&planned) > 3, "{planned:?}");
    assert_eq!(topics(&["plan"]).await.stdout, planned.stdout, "a plan changes nothing");
    assert_eq!(lines(&topics(&["apply"]).await), lines(&planned));
    assert_eq!(
        String::from_utf8_lossy(&topics(&["plan"]).await.stdout),
        "all topics are as they should be\n"
    );
    let consumer = ["plan", "--consumer=billing", "--topic=import-contacts", "--retry=1s,2m"];
    let planned = topics(&consumer).await;
    let told = String::from_utf8_lossy(&planned.stdout);
    for name in [
        "import-contacts.billing.retry.1s",
        "import-contacts.billing.retry.2m",
        "import-contacts.billing.dlt",
    ] {
        assert!(told.contains(name), "{name}: {planned:?}");
    }
    let unknown = topics(&["plan", "--consumer=billing", "--topic=nothing"]).await;
    assert_eq!(unknown.status.code(), Some(69));
    assert!(
        String::from_utf8_lossy(&unknown.stderr).contains("nothing"),
        "{unknown:?}"
    );
}

#[tokio::test]
async fn a_wrong_command_line_and_a_gateway_that_is_not_there_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    for (words, complaint) in [
        (
            &["blocked"][..],
            "ls, retry, skip, dead-letter, ignore or block is missing",
        ),
        (&["blocked", "jump"], "blocked jump is not known"),
        (&["blocked", "skip", "g", "t", "x", "0"], "PARTITION: x is not a number"),
        (&["blocked", "skip", "g", "t", "0", "0", "more"], "more is not expected"),
        (
            &["dlq", "redrive", "t"],
            "say which: PARTITION-OFFSET..., or --filter TEXT, or --all",
        ),
        (
            &["dlq", "discard", "t", "17"],
            "17 is not PARTITION-OFFSET, such as 0-17",
        ),
        (
            &["topics", "plan", "--topic", "t"],
            "--consumer and --topic go together, --retry with them",
        ),
        (
            &["groups", "--gateway", "ftp://x"],
            "--gateway ftp://x: it begins with http://",
        ),
    ] {
        let output = barnabas(folder.path(), words).await;
        assert_eq!(output.status.code(), Some(64), "{words:?}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(complaint), "{words:?}: {said}");
    }
    let output = barnabas(folder.path(), &["groups", "--gateway", "http://127.0.0.1:1"]).await;
    assert_eq!(output.status.code(), Some(69));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("barnabas: http://127.0.0.1:1: "));
}
