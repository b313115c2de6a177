//! Projections on both logs and into both databases: what readers see is the fold of the events, whatever is killed, taken away, replayed
//! or built anew meanwhile.
//!
//! Seeds are printed; `BARNABAS_TEST_SEED` runs one again.

mod kills;
mod outages;
mod rebuilds;
mod support;

use barnabas::log::{self, TopicPartition, partition_for_key};
use barnabas::patterns::Error;
use barnabas_tests::conformance::{append_all, within};
use barnabas_tests::projection::{Entry, random_entries};

use self::support::{PARTITIONS, Stage, Store, on_all, seeded};

on_all!(
    the_view_is_the_fold_of_ten_thousand_events,
    an_older_event_does_not_move_a_row_back,
    what_cannot_be_projected_becomes_a_dead_letter_and_the_rest_is_projected,
    instances_share_the_partitions_and_one_takes_over_from_the_other,
    events_that_retention_took_before_they_were_projected_are_missed_loudly,
);

async fn the_view_is_the_fold_of_ten_thousand_events(store: Store) {
    let mut random = seeded("fold");
    let stage = Stage::new(store).await;
    let (before, after) = (
        random_entries(&mut random, 0..5000, 500),
        random_entries(&mut random, 5000..10_000, 500),
    );
    stage.append(&before).await;
    let projection = stage.start().await;
    within("a view", projection.ready()).await.expect("it is live");
    // Complete from the first moment on.
    assert_eq!(stage.rows(), stage.fold());
    stage.append(&after).await;
    stage.until_folded().await;
    assert!(stage.rows().len() > 300, "most keys are set");
    projection.shutdown().await.expect("a good end");
    // What was shut down goes on where it was.
    stage.append(&random_entries(&mut random, 10_000..10_100, 500)).await;
    let projection = stage.start().await;
    stage.until_folded().await;
    projection.shutdown().await.expect("a good end");
    assert_eq!(stage.letters().len(), 0);
}

async fn an_older_event_does_not_move_a_row_back(store: Store) {
    let stage = Stage::new(store).await;
    let set = |number: i64| Entry::Set {
        key: format!("k{}", number % 50),
        value: format!("v{number}"),
        number,
    };
    stage.append(&(0..500).map(set).collect::<Vec<_>>()).await;
    let projection = stage.start().await;
    stage.until_folded().await;
    projection.shutdown().await.expect("a good end");
    // From now on any change of a row fails, and its event would become a dead letter.
    stage.forbid_updates();
    let end = stage.positions();
    stage.execute("UPDATE projection_positions SET next_offset = 0");
    let projection = stage.start().await;
    stage.until("all is read again", || stage.positions() == end).await;
    projection.shutdown().await.expect("a good end");
    assert_eq!(stage.rows(), stage.fold());
    assert_eq!(stage.letters().len(), 0);
}

async fn what_cannot_be_projected_becomes_a_dead_letter_and_the_rest_is_projected(store: Store) {
    let stage = Stage::new(store).await;
    let set = |key: &str, value: &str, number: i64| Entry::Set {
        key: key.to_owned(),
        value: value.to_owned(),
        number,
    };
    let projection = stage.start().await;
    within("a view", projection.ready()).await.expect("it is live");
    // A value that the database does not take a second time.
    stage.execute(&format!(
        "CREATE UNIQUE INDEX once ON \"{}_g1\" (value)",
        stage.work.view
    ));
    let topic = &stage.work.topic;
    let mut records = vec![
        set("a", "first", 1).record(topic),
        set("a", "first", 1).record(topic).key("json").value("{"),
        set("a", "first", 1)
            .record(topic)
            .key("type")
            .value(r#"{"event":"unheard of"}"#),
        Entry::Panicking.record(topic),
        Entry::Hopeless.record(topic).header("mine", "kept"),
        set("b", "first", 2).record(topic).partition(0),
    ];
    records
        .extend((3..300).map(|number| set(&format!("k{}", number % 40), &format!("v{number}"), number).record(topic)));
    append_all(&stage.log, records).await;
    let mut expected = stage.fold();
    stage
        .until("the rest is projected", || {
            let rows = stage.rows();
            rows.iter()
                .filter(|row| row.starts_with('k'))
                .eq(expected.iter().filter(|row| row.starts_with('k')))
                && stage.letters().len() == 5
        })
        .await;
    projection.shutdown().await.expect("a good end");
    // Which of the two that say the same came first is not certain across partitions; one of them did.
    let rows = stage.rows();
    expected.retain(|row| rows.contains(row) || row.starts_with('k'));
    assert_eq!(rows, expected);
    assert_eq!(rows.iter().filter(|row| row.contains("|first|")).count(), 1);
    let letters = stage.letters();
    let sources = stage.records();
    for letter in &letters {
        let number = |name: &str| letter.header(name).parse::<i64>().expect("a number");
        let source = sources.iter().find(|record| {
            i64::from(record.partition) == number("bn-origin-partition") && record.offset == number("bn-origin-offset")
        });
        let source = source.expect("it stands on the topic");
        assert_eq!((&source.key, &source.value), (&letter.key, &letter.value));
        assert_eq!(source.partition, letter.partition);
        assert_eq!(number("bn-origin-timestamp"), source.timestamp_ms);
        assert_eq!(letter.header("bn-origin-topic"), topic);
        assert_eq!(letter.header("bn-group"), stage.work.group);
    }
    let letter_of = |text: &str| {
        let letter = letters
            .iter()
            .find(|letter| letter.header("bn-error-message").contains(text));
        letter.unwrap_or_else(|| panic!("{text}: {letters:?}"))
    };
    assert_eq!(letter_of("told to panic").header("bn-error-kind"), "panic");
    assert_eq!(letter_of("told to fail").header("bn-error-kind"), "non-retriable");
    assert_eq!(letter_of("told to fail").header("mine"), "kept");
    assert_eq!(letter_of("unheard of").key_text(), "type");
    assert_eq!(letter_of("EOF").key_text(), "json");
    let refused = ["UNIQUE constraint", "unique constraint"];
    assert!(letters.iter().any(|letter| {
        refused
            .iter()
            .any(|text| letter.header("bn-error-message").contains(text))
    }));
}

async fn instances_share_the_partitions_and_one_takes_over_from_the_other(store: Store) {
    let mut random = seeded("instances");
    let stage = Stage::new(store).await;
    let one = stage.start().await;
    let other = stage.start().await;
    let (one_is, other_is) = tokio::join!(within("a view", one.ready()), within("a view", other.ready()));
    one_is.and(other_is).expect("it is live for both");
    stage.append(&random_entries(&mut random, 0..2000, 100)).await;
    stage.until_folded().await;
    one.shutdown().await.expect("a good end");
    stage.append(&random_entries(&mut random, 2000..4000, 100)).await;
    stage.until_folded().await;
    other.shutdown().await.expect("a good end");
    assert_eq!(stage.letters().len(), 0);
}

async fn events_that_retention_took_before_they_were_projected_are_missed_loudly(store: Store) {
    let mut random = seeded("retention");
    let stage = Stage::new(store).await;
    stage.append(&random_entries(&mut random, 0..200, 20)).await;
    let projection = stage.start().await;
    stage.until_folded().await;
    projection.shutdown().await.expect("a good end");
    let known = stage.rows();
    let taken = TopicPartition::new(stage.work.topic.as_str(), 1);
    let projected = stage.log.offset(&taken, log::StartAt::End).await.expect("an end");
    stage.append(&random_entries(&mut random, 200..400, 20)).await;
    stage.log.delete_records(&taken, projected + 1).await.expect("deleted");
    let projection = stage.start().await;
    let ended = within("an end", projection.ended())
        .await
        .expect_err("events are missing");
    assert!(
        matches!(
            &ended,
            Error::Log(log::Error::OffsetOutOfRange { partition, offset, start, .. })
                if *partition == taken && *offset == projected && *start == projected + 1
        ),
        "{ended}"
    );
    // Of the partition that has lost some the view says what it said.
    let of_taken = |rows: Vec<String>| -> Vec<String> {
        let is_taken = |row: &String| {
            let key = row.split('|').next().unwrap_or_default();
            partition_for_key(key.as_bytes(), PARTITIONS) == taken.partition
        };
        rows.into_iter().filter(is_taken).collect()
    };
    let known = of_taken(known);
    assert!(!known.is_empty());
    assert_eq!(of_taken(stage.rows()), known);
    // A new version begins with what is kept.
    let mut raised = stage.work.clone();
    raised.version = 2;
    let projection = stage.start_with(&raised).await;
    within("a view", projection.ready()).await.expect("it is live");
    projection.shutdown().await.expect("a good end");
    assert_eq!(stage.rows(), stage.fold());
}
