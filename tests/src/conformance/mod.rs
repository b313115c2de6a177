//! What the log's interface means: one case each, run against every engine by `tests/tests/conformance_*.rs`.
//!
//! A case makes topics and groups of its own, so all run side by side on one log. It waits for facts, each within
//! [`DEADLINE`].

pub mod append;
pub mod group;
pub mod position;
pub mod topics;
pub mod transaction;

use std::collections::HashMap;
use std::time::Duration;

use barnabas::log::{
    Batch, CleanupPolicy, GroupEvent, GroupMember, Log, ProducerRecord, ProducerSettings, Reader, Record, StartAt,
    TopicPartition, TopicSpec,
};
use rand::random;

/// Runs every case against the log that an expression opens, each as a test of its own. The second expression is an async
/// function that has a topic of that log compacted soon.
#[macro_export]
macro_rules! conformance {
    ($log:expr, $hurry:expr) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn a_compacted_partition_keeps_the_last_of_each_key() {
            let log = $log.await;
            $crate::conformance::position::a_compacted_partition_keeps_the_last_of_each_key(log, $hurry).await;
        }
        $crate::conformance!($log;
            append: reads_back_what_was_appended,
            append: stamps_records_by_the_clock_that_the_topic_names,
            append: keeps_the_order_within_a_partition,
            append: places_keys_as_the_java_client_does,
            append: spreads_records_without_a_key,
            append: keeps_headers_and_null_keys_and_values,
            append: refuses_a_record_that_is_too_large,
            append: refuses_an_unknown_topic_and_partition,
            append: acknowledges_without_waiting_when_asked,
            position: of_many_partitions_is_found_at_once,
            position: reads_from_an_offset_and_from_a_time,
            position: an_empty_partition_is_caught_up_at_once,
            position: says_once_that_it_has_caught_up,
            position: a_truncated_partition_starts_later,
            position: an_offset_that_is_not_kept_is_refused,
            position: a_partition_that_ends_in_transactions_is_caught_up,
            position: a_compacted_topic_refuses_a_record_without_a_key,
            position: retention_moves_the_start,
            position: a_reassigned_partition_returns_nothing_of_before,
            group: members_share_the_partitions_as_they_come_and_go,
            group: goes_on_from_what_was_committed,
            group: a_member_that_is_gone_is_replaced,
            group: commits_metadata_with_the_offset,
            group: pauses_and_resumes_and_seeks,
            group: goes_on_when_retention_has_overtaken_it,
            group: reads_each_record_once_however_often_it_pauses,
            group: reads_what_stays_while_what_goes_is_not_released,
            group: refuses_the_commit_of_a_partition_it_does_not_own,
            group: refuses_the_commit_of_an_assignment_that_is_over,
            group: is_listed_when_one_of_its_topics_is_gone,
            group: is_listed_with_its_lag,
            group: shows_partitions_without_an_offset,
            transaction: is_visible_as_a_whole_or_not_at_all,
            transaction: dropped_is_aborted,
            transaction: commits_offsets_with_its_records,
            transaction: is_fenced_by_a_newer_producer,
            transaction: can_be_larger_than_memory_would_like,
            transaction: with_a_bad_record_leaves_nothing,
            topics: are_planned_and_applied,
            topics: are_listed,
            topics: that_are_compacted_are_told_from_others,
            topics: made_again_have_another_identity,
            topics: refuse_what_would_move_keys,
            topics: with_bad_names_are_refused,
        );
    };
    ($log:expr; $($module:ident: $case:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let log = $log.await;
                $crate::conformance::$module::$case(log).await;
            }
        )*
    };
}

/// Within it everything that a case waits for must have happened.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Fails the test when a future is not ready within [`DEADLINE`].
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {DEADLINE:?}"),
    }
}

/// A name that no other test uses.
pub fn unique(stem: &str) -> String {
    format!("{stem}-{:08x}", random::<u32>())
}

/// A new topic; returns its name. It keeps records for ever, since cases write old timestamps.
pub async fn new_topic(log: &Log, partitions: i32) -> String {
    let spec = TopicSpec {
        retention: None,
        ..TopicSpec::new(unique("topic"), partitions)
    };
    make_topic(log, spec).await
}

/// A new compacted topic; returns its name.
pub async fn new_compacted_topic(log: &Log, partitions: i32) -> String {
    let spec = TopicSpec {
        cleanup: CleanupPolicy::Compact,
        ..TopicSpec::new(unique("compacted"), partitions)
    };
    make_topic(log, spec).await
}

/// Makes a topic and waits until it can be used.
pub async fn make_topic(log: &Log, spec: TopicSpec) -> String {
    let plan = log.plan_topics(std::slice::from_ref(&spec)).await.expect("a plan");
    within("applying the plan", log.apply_topics(&plan))
        .await
        .expect("a topic");
    spec.name
}

/// Appends values without keys to partition 0 and waits for all of them; returns the offset of the first.
pub async fn append_values(log: &Log, topic: &str, values: impl IntoIterator<Item = impl Into<String>>) -> i64 {
    let records = values
        .into_iter()
        .map(|value| ProducerRecord::to(topic).partition(0).value(value.into()));
    append_all(log, records)
        .await
        .first()
        .copied()
        .expect("at least one value")
}

/// Appends records in order and waits for all of them; returns their offsets.
pub async fn append_all(log: &Log, records: impl IntoIterator<Item = ProducerRecord>) -> Vec<i64> {
    let producer = within("a producer", log.producer(ProducerSettings::default()))
        .await
        .expect("a producer");
    let mut deliveries = Vec::new();
    for record in records {
        deliveries.push(producer.send(record).await.expect("room in the queue"));
    }
    let mut offsets = Vec::new();
    for delivery in deliveries {
        offsets.push(within("an acknowledgement", delivery).await.expect("appended").offset);
    }
    offsets
}

/// A reader of a partition.
pub async fn reader_at(log: &Log, topic: &str, partition: i32, at: StartAt) -> Reader {
    let mut reader = within("a reader", log.reader(topic)).await.expect("a reader");
    within("an assignment", reader.assign(partition, at))
        .await
        .expect("assigned");
    reader
}

/// Everything from where a reader stands until it has caught up with one partition.
pub async fn read_to_end(reader: &mut Reader) -> Vec<Record> {
    let mut records = Vec::new();
    loop {
        let batch = within("a batch", reader.next()).await.expect("a batch");
        records.extend(batch.records);
        if batch.caught_up {
            return records;
        }
    }
}

/// All records of a partition, first to last.
pub async fn read_partition(log: &Log, topic: &str, partition: i32) -> Vec<Record> {
    read_to_end(&mut reader_at(log, topic, partition, StartAt::Start).await).await
}

/// The next batch that has records.
pub async fn next_records(reader: &mut Reader) -> Batch {
    loop {
        let batch = within("records", reader.next()).await.expect("a batch");
        if !batch.records.is_empty() {
            return batch;
        }
    }
}

/// The next event of a member, batches without records left out.
pub async fn next_event(member: &mut GroupMember) -> GroupEvent {
    loop {
        match within("a group event", member.next()).await.expect("an event") {
            GroupEvent::Records(batch) if batch.records.is_empty() => {}
            event => return event,
        }
    }
}

/// Text of a record's value.
pub fn text(record: &Record) -> String {
    String::from_utf8(record.value.as_ref().expect("a value").to_vec()).expect("UTF-8")
}

/// Texts of records' values.
pub fn texts(records: &[Record]) -> Vec<String> {
    records.iter().map(text).collect()
}

/// Partitions with their offsets, to be compared in any order.
pub type Positions = HashMap<TopicPartition, i64>;
