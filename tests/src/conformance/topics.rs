//! Topics: planned, applied, described, deleted.

use std::time::Duration;

use barnabas::log::{CleanupPolicy, Error, Log, Timestamps, TopicChange, TopicSpec};

use super::{append_values, make_topic, new_compacted_topic, new_topic, read_partition, unique, within};

/// A plan says what would change and changes nothing; applied, there is nothing left to plan.
pub async fn are_planned_and_applied(log: Log) {
    let mut spec = TopicSpec {
        cleanup: CleanupPolicy::CompactDelete,
        retention: Some(Duration::from_secs(3600)),
        max_message_bytes: 65_536,
        ..TopicSpec::new(unique("planned"), 2)
    };
    let plan = log.plan_topics(std::slice::from_ref(&spec)).await.expect("a plan");
    assert_eq!(plan.changes, [TopicChange::Create(spec.clone())]);
    assert!(
        matches!(log.describe_topic(&spec.name).await, Err(Error::UnknownTopic(_))),
        "planning creates nothing"
    );
    make_topic(&log, spec.clone()).await;
    let topic = log.describe_topic(&spec.name).await.expect("a topic");
    assert_eq!(
        (topic.partitions, topic.cleanup, topic.retention),
        (2, spec.cleanup, spec.retention)
    );
    assert_eq!(
        (topic.max_message_bytes, topic.timestamps),
        (65_536, Timestamps::Create)
    );
    assert!(
        log.plan_topics(std::slice::from_ref(&spec))
            .await
            .expect("a plan")
            .changes
            .is_empty()
    );
    spec.partitions = 4;
    spec.retention = Some(Duration::from_secs(7200));
    spec.timestamps = Timestamps::LogAppend;
    make_topic(&log, spec.clone()).await;
    let topic = log.describe_topic(&spec.name).await.expect("a topic");
    assert_eq!((topic.partitions, topic.retention), (4, spec.retention));
    assert_eq!(topic.timestamps, Timestamps::LogAppend);
    assert!(log.plan_topics(&[spec]).await.expect("a plan").changes.is_empty());
}

/// With their partition counts, as soon as they can be used and not when they are gone.
pub async fn are_listed(log: Log) {
    let (one, three) = (new_topic(&log, 1).await, new_topic(&log, 3).await);
    let topics = log.topics().await.expect("topics");
    assert_eq!((topics.get(&one), topics.get(&three)), (Some(&1), Some(&3)));
    assert!(topics.keys().all(|name| !name.starts_with("__")), "{topics:?}");
    within("a deletion", log.delete_topic(&one)).await.expect("deleted");
    let topics = log.topics().await.expect("topics");
    assert_eq!((topics.get(&one), topics.get(&three)), (None, Some(&3)));
}

/// Whether they also delete what is old does not matter.
pub async fn that_are_compacted_are_told_from_others(log: Log) {
    let (plain, compacted) = (new_topic(&log, 1).await, new_compacted_topic(&log, 2).await);
    let both = TopicSpec {
        cleanup: CleanupPolicy::CompactDelete,
        ..TopicSpec::new(unique("both"), 3)
    };
    let both = make_topic(&log, both).await;
    let topics = log.compacted_topics().await.expect("topics");
    let found = [&plain, &compacted, &both].map(|topic| topics.get(topic).copied());
    assert_eq!(found, [None, Some(2), Some(3)]);
}

/// A topic that was deleted and made again is another one.
pub async fn made_again_have_another_identity(log: Log) {
    let topic = new_topic(&log, 1).await;
    append_values(&log, &topic, ["old"]).await;
    let before = log.describe_topic(&topic).await.expect("a topic").id;
    assert_eq!(log.describe_topic(&topic).await.expect("a topic").id, before);
    within("a deletion", log.delete_topic(&topic)).await.expect("deleted");
    assert!(matches!(log.describe_topic(&topic).await, Err(Error::UnknownTopic(_))));
    make_topic(&log, TopicSpec::new(topic.clone(), 1)).await;
    assert_ne!(log.describe_topic(&topic).await.expect("a topic").id, before);
    assert!(
        read_partition(&log, &topic, 0).await.is_empty(),
        "nothing of the old one is left"
    );
    assert_eq!(append_values(&log, &topic, ["new"]).await, 0);
}

/// Fewer partitions never; more not where keys must stay.
pub async fn refuse_what_would_move_keys(log: Log) {
    let spec = TopicSpec {
        fixed_partitions: true,
        ..TopicSpec::new(unique("fixed"), 3)
    };
    make_topic(&log, spec.clone()).await;
    for partitions in [2, 4] {
        let plan = log
            .plan_topics(&[TopicSpec {
                partitions,
                ..spec.clone()
            }])
            .await;
        assert!(
            matches!(plan, Err(Error::InvalidTopic { .. })),
            "{partitions}: {plan:?}"
        );
    }
}

/// What Kafka would not take is not taken.
pub async fn with_bad_names_are_refused(log: Log) {
    for name in ["", ".", "..", "with space", "ümlaut", &"x".repeat(250)] {
        let plan = log.plan_topics(&[TopicSpec::new(name, 1)]).await;
        assert!(matches!(plan, Err(Error::InvalidTopic { .. })), "{name:?}: {plan:?}");
    }
    let plan = log.plan_topics(&[TopicSpec::new(unique("none"), 0)]).await;
    assert!(matches!(plan, Err(Error::InvalidTopic { .. })), "{plan:?}");
}
