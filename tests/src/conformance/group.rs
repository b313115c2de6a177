//! Consumer groups.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use barnabas::log::{
    CommittedOffset, Error, GroupEvent, GroupMember, GroupSettings, Log, NextOffset, ProducerRecord, ProducerSettings,
    TopicPartition,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{DEADLINE, Positions, append_all, append_values, new_topic, next_event, text, texts, unique, within};

fn committed(next_offset: i64) -> CommittedOffset {
    CommittedOffset {
        next_offset: NextOffset(next_offset),
        metadata: String::new(),
    }
}

async fn join(log: &Log, group: &str, topic: &str) -> GroupMember {
    within("joining", log.join_group(GroupSettings::new(group, [topic])))
        .await
        .expect("a member")
}

/// Waits for an assignment; returns where each partition starts.
async fn assignment(member: &mut GroupMember) -> Positions {
    loop {
        if let GroupEvent::Assigned(partitions) = next_event(member).await
            && !partitions.is_empty()
        {
            return partitions
                .into_iter()
                .map(|(partition, start)| (partition, start.next_offset.0))
                .collect();
        }
    }
}

/// The next `count` records of a member, in the order in which they come.
async fn records(member: &mut GroupMember, count: usize) -> Vec<String> {
    let mut values = Vec::new();
    while values.len() < count {
        if let GroupEvent::Records(batch) = next_event(member).await {
            values.extend(texts(&batch.records));
        }
    }
    values
}

/// A member that commits each batch and says what it has handled, until it is told to leave.
fn run_member(
    mut member: GroupMember,
    handled: mpsc::UnboundedSender<(usize, String)>,
    number: usize,
) -> CancellationToken {
    let leave = CancellationToken::new();
    let leaving = leave.clone();
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                () = leaving.cancelled() => return,
                event = member.next() => event.expect("an event"),
            };
            match event {
                GroupEvent::Records(batch) => {
                    let next = CommittedOffset {
                        next_offset: batch.next_offset,
                        metadata: String::new(),
                    };
                    if member.commit(vec![(batch.partition, next)]).await.is_ok() {
                        for record in &batch.records {
                            handled.send((number, text(record))).expect("the test listens");
                        }
                    }
                }
                GroupEvent::Revoked(partitions) => member.release(partitions).await.expect("released"),
                GroupEvent::Assigned(_) | GroupEvent::Lost(_) => {}
            }
        }
    });
    leave
}

/// 1 → 3 → 2 members: every record is handled, and in the end all who are there have a share.
pub async fn members_share_the_partitions_as_they_come_and_go(log: Log) {
    let (topic, group) = (new_topic(&log, 6).await, unique("group"));
    let (handled, mut results) = mpsc::unbounded_channel();
    let stop_producing = CancellationToken::new();
    let (producing, stopped) = (log.clone(), stop_producing.clone());
    let producer_topic = topic.clone();
    let produced = tokio::spawn(async move {
        let mut count = 0;
        while !stopped.is_cancelled() {
            let record = |i: i32| {
                ProducerRecord::to(producer_topic.clone())
                    .partition(i % 6)
                    .value((count + i).to_string())
            };
            append_all(&producing, (0..60).map(record)).await;
            count += 60;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        count
    });
    let mut members = vec![run_member(join(&log, &group, &topic).await, handled.clone(), 0)];
    let mut seen: HashMap<String, usize> = HashMap::new();
    let wait_for =
        async |numbers: &[usize], results: &mut mpsc::UnboundedReceiver<_>, seen: &mut HashMap<String, usize>| {
            let mut missing: HashSet<usize> = numbers.iter().copied().collect();
            while !missing.is_empty() {
                let (number, value) = within("every member handles something", results.recv())
                    .await
                    .expect("a record");
                missing.remove(&number);
                *seen.entry(value).or_default() += 1;
            }
        };
    wait_for(&[0], &mut results, &mut seen).await;
    for number in [1, 2] {
        members.push(run_member(join(&log, &group, &topic).await, handled.clone(), number));
    }
    wait_for(&[0, 1, 2], &mut results, &mut seen).await;
    members[0].cancel();
    wait_for(&[1, 2], &mut results, &mut seen).await;
    stop_producing.cancel();
    let count = produced.await.expect("produced");
    while seen.len() < count as usize {
        let (_, value) = within("every record is handled", results.recv())
            .await
            .expect("a record");
        *seen.entry(value).or_default() += 1;
    }
    assert_eq!(seen.len(), count as usize);
    members.iter().for_each(CancellationToken::cancel);
}

/// A member that joins later goes on where the last commit says.
pub async fn goes_on_from_what_was_committed(log: Log) {
    let (topic, group) = (new_topic(&log, 1).await, unique("group"));
    let partition = TopicPartition::new(topic.clone(), 0);
    append_values(&log, &topic, ["0", "1", "2"]).await;
    let mut member = join(&log, &group, &topic).await;
    assert_eq!(assignment(&mut member).await[&partition], 0);
    assert_eq!(
        member.committed(vec![partition.clone()]).await.expect("an answer"),
        [None]
    );
    assert_eq!(records(&mut member, 3).await, ["0", "1", "2"]);
    within("a commit", member.commit(vec![(partition.clone(), committed(2))]))
        .await
        .expect("committed");
    drop(member);
    let mut member = join(&log, &group, &topic).await;
    assert_eq!(assignment(&mut member).await[&partition], 2);
    assert_eq!(records(&mut member, 1).await, ["2"]);
    assert_eq!(
        member.committed(vec![partition]).await.expect("an answer"),
        [Some(committed(2))]
    );
}

/// Its partitions go to another, which gets again what was not committed.
pub async fn a_member_that_is_gone_is_replaced(log: Log) {
    let (topic, group) = (new_topic(&log, 2).await, unique("group"));
    let record = |i: i32| ProducerRecord::to(topic.clone()).partition(i % 2).value(i.to_string());
    append_all(&log, (0..10).map(record)).await;
    let mut first = join(&log, &group, &topic).await;
    assert_eq!(records(&mut first, 10).await.len(), 10);
    drop(first);
    let mut second = join(&log, &group, &topic).await;
    let mut again = records(&mut second, 10).await;
    again.sort_by_key(|value| value.parse::<i32>().expect("a number"));
    assert_eq!(again, (0..10).map(|i| i.to_string()).collect::<Vec<_>>());
}

/// What is noted beside an offset comes back.
pub async fn commits_metadata_with_the_offset(log: Log) {
    let (topic, group) = (new_topic(&log, 1).await, unique("group"));
    let partition = TopicPartition::new(topic.clone(), 0);
    append_values(&log, &topic, ["0"]).await;
    let mut member = join(&log, &group, &topic).await;
    assignment(&mut member).await;
    let noted = CommittedOffset {
        next_offset: NextOffset(1),
        metadata: "above: 3-5".to_owned(),
    };
    within("a commit", member.commit(vec![(partition.clone(), noted.clone())]))
        .await
        .expect("committed");
    assert_eq!(
        member.committed(vec![partition.clone()]).await.expect("an answer"),
        [Some(noted.clone())]
    );
    // A transaction commits it too, and the next member is told at once.
    let mut producer = log.transactional_producer(&unique("tx")).await.expect("a producer");
    let aborted = CommittedOffset {
        metadata: "aborted".to_owned(),
        ..noted.clone()
    };
    let committed = CommittedOffset {
        next_offset: NextOffset(0),
        metadata: "above: 1-2".to_owned(),
    };
    for (offset, commit) in [(committed.clone(), true), (aborted, false)] {
        let mut transaction = producer.begin();
        let metadata = within("metadata", member.metadata()).await.expect("metadata");
        transaction.send_offsets(metadata, [(partition.clone(), offset)]);
        let ended = match commit {
            true => within("a commit", transaction.commit()).await,
            false => within("an abort", transaction.abort()).await,
        };
        ended.expect("ended");
    }
    drop(member);
    let mut member = join(&log, &group, &topic).await;
    let GroupEvent::Assigned(assigned) = next_event(&mut member).await else {
        panic!("not assigned first");
    };
    assert_eq!(assigned, [(partition, committed)]);
}

/// A paused partition is silent while others go on; a seek goes back.
pub async fn pauses_and_resumes_and_seeks(log: Log) {
    let (topic, group) = (new_topic(&log, 2).await, unique("group"));
    let paused = TopicPartition::new(topic.clone(), 0);
    let mut member = join(&log, &group, &topic).await;
    let mut assigned = 0;
    while assigned < 2 {
        assigned += assignment(&mut member).await.len();
    }
    within("a pause", member.pause(vec![paused.clone()]))
        .await
        .expect("paused");
    let record = |partition: i32, value: &str| {
        ProducerRecord::to(topic.clone())
            .partition(partition)
            .value(value.to_owned())
    };
    append_all(&log, [record(0, "held"), record(1, "through")]).await;
    assert_eq!(records(&mut member, 1).await, ["through"]);
    within("a resume", member.resume(vec![paused.clone()]))
        .await
        .expect("resumed");
    assert_eq!(records(&mut member, 1).await, ["held"]);
    append_all(&log, [record(0, "second")]).await;
    assert_eq!(records(&mut member, 1).await, ["second"]);
    within("a seek", member.seek(paused, NextOffset(0)))
        .await
        .expect("sought");
    assert_eq!(records(&mut member, 2).await, ["held", "second"]);
}

/// A member that retention has overtaken goes on with what is kept, also when it has sought before.
pub async fn goes_on_when_retention_has_overtaken_it(log: Log) {
    let (topic, group) = (new_topic(&log, 1).await, unique("group"));
    let partition = TopicPartition::new(topic.clone(), 0);
    let mut member = join(&log, &group, &topic).await;
    assignment(&mut member).await;
    append_values(&log, &topic, ["first"]).await;
    assert_eq!(records(&mut member, 1).await, ["first"]);
    within("a pause", member.pause(vec![partition.clone()]))
        .await
        .expect("paused");
    within("a seek", member.seek(partition.clone(), NextOffset(0)))
        .await
        .expect("sought");
    append_values(&log, &topic, (1..10).map(|n| n.to_string())).await;
    log.delete_records(&partition, 8).await.expect("deleted");
    within("a resume", member.resume(vec![partition]))
        .await
        .expect("resumed");
    assert_eq!(records(&mut member, 2).await, ["8", "9"]);
}

/// A member that pauses and resumes all the time reads each record once and in order, also those that had been read ahead.
pub async fn reads_each_record_once_however_often_it_pauses(log: Log) {
    const RECORDS: usize = 100;
    let (topic, group) = (new_topic(&log, 1).await, unique("group"));
    let partition = TopicPartition::new(topic.clone(), 0);
    let mut member = join(&log, &group, &topic).await;
    assignment(&mut member).await;
    let appending = tokio::spawn({
        let (log, topic) = (log.clone(), topic.clone());
        async move {
            for first in (0..RECORDS).step_by(10) {
                append_values(&log, &topic, (first..first + 10).map(|n| n.to_string())).await;
            }
        }
    });
    let mut read = Vec::new();
    while read.len() < RECORDS {
        if let GroupEvent::Records(batch) = next_event(&mut member).await {
            read.extend(texts(&batch.records));
            within("a pause", member.pause(vec![partition.clone()]))
                .await
                .expect("paused");
            within("a resume", member.resume(vec![partition.clone()]))
                .await
                .expect("resumed");
        }
    }
    appending.await.expect("all appended");
    assert_eq!(read, (0..RECORDS).map(|n| n.to_string()).collect::<Vec<_>>());
}

/// A partition that has to move waits for its release for as long as it takes; those that stay are read all the while.
pub async fn reads_what_stays_while_what_goes_is_not_released(log: Log) {
    let (topic, group) = (new_topic(&log, 2).await, unique("group"));
    let settings = GroupSettings {
        release_timeout: DEADLINE * 2,
        ..GroupSettings::new(&group, [topic.as_str()])
    };
    let mut first = within("a member", log.join_group(settings)).await.expect("a member");
    assert_eq!(assignment(&mut first).await.len(), 2);
    let mut second = join(&log, &group, &topic).await;
    let going = loop {
        if let GroupEvent::Revoked(partitions) = next_event(&mut first).await {
            break partitions;
        }
    };
    let stays = (0..2)
        .find(|number| going.iter().all(|gone| gone.partition != *number))
        .expect("one stays");
    for value in ["0", "1", "2"] {
        let record = ProducerRecord::to(topic.clone()).partition(stays).value(value);
        append_all(&log, [record]).await;
        match next_event(&mut first).await {
            GroupEvent::Records(batch) => assert_eq!(
                (batch.partition.partition, texts(&batch.records)),
                (stays, vec![value.to_owned()])
            ),
            other => panic!("{other:?}"),
        }
    }
    first.release(going.clone()).await.expect("released");
    let moved: Vec<_> = assignment(&mut second).await.into_keys().collect();
    assert_eq!(moved, going);
}

/// Only the owner moves a partition's offset.
pub async fn refuses_the_commit_of_a_partition_it_does_not_own(log: Log) {
    let (topic, group) = (new_topic(&log, 1).await, unique("group"));
    let partition = TopicPartition::new(topic.clone(), 0);
    append_values(&log, &topic, ["0"]).await;
    let mut owner = join(&log, &group, &topic).await;
    assignment(&mut owner).await;
    let idle = join(&log, &group, &topic).await;
    let refused = within("a refusal", idle.commit(vec![(partition.clone(), committed(1))])).await;
    assert!(matches!(refused, Err(Error::UnknownMember { .. })), "{refused:?}");
    let unowned = within(
        "a refusal",
        owner.commit(vec![(TopicPartition::new(topic, 0), committed(1))]),
    )
    .await;
    assert!(unowned.is_ok(), "{unowned:?}");
}

/// What was taken away and has come back is another assignment: it begins where somebody else may have left it.
pub async fn refuses_the_commit_of_an_assignment_that_is_over(log: Log) {
    let (topic, group) = (new_topic(&log, 2).await, unique("group"));
    append_values(&log, &topic, ["0", "1", "2", "3"]).await;
    let settings = GroupSettings {
        release_timeout: Duration::from_millis(200),
        ..GroupSettings::new(&group, [topic.as_str()])
    };
    let mut member = within("a member", log.join_group(settings)).await.expect("a member");
    assert_eq!(assignment(&mut member).await.len(), 2);
    let mut other = join(&log, &group, &topic).await;
    let moved = assignment(&mut other).await;
    drop(other);
    let is_back = async {
        loop {
            let groups = log.groups().await.expect("groups");
            let found = groups.iter().find(|found| found.group == group).expect("the group");
            let partitions = found.members.iter().map(|member| member.partitions.len());
            if partitions.collect::<Vec<_>>() == [2] {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    within("the member has all again", is_back).await;
    // For the member to hear of it. The application has not looked since the first assignment.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let offsets: Vec<_> = moved.into_keys().map(|partition| (partition, committed(1))).collect();
    let refused = within("a refusal", member.commit(offsets.clone())).await;
    assert!(matches!(refused, Err(Error::UnknownMember { .. })), "{refused:?}");
    assert_eq!(assignment(&mut member).await.len(), offsets.len());
    let known = within("a commit", member.commit(offsets)).await;
    assert!(known.is_ok(), "{known:?}");
}

/// Members and lag of a group can be seen from outside.
pub async fn is_listed_with_its_lag(log: Log) {
    let (topic, group) = (new_topic(&log, 1).await, unique("group"));
    let partition = TopicPartition::new(topic.clone(), 0);
    append_values(&log, &topic, ["0", "1", "2"]).await;
    let mut member = join(&log, &group, &topic).await;
    assignment(&mut member).await;
    within("a commit", member.commit(vec![(partition.clone(), committed(1))]))
        .await
        .expect("committed");
    let groups = within("the groups", log.groups()).await.expect("groups");
    let found = groups.iter().find(|found| found.group == group).expect("the group");
    assert_eq!(found.members.len(), 1);
    assert_eq!(found.members[0].partitions, std::slice::from_ref(&partition));
    assert!(!found.members[0].member.is_empty() && !found.members[0].host.is_empty());
    let lag = found
        .partitions
        .iter()
        .find(|lag| lag.partition == partition)
        .expect("the partition");
    assert_eq!((lag.committed, lag.end, lag.lag()), (Some(NextOffset(1)), 3, Some(2)));
}

/// A partition for which nothing is committed is seen when a member has it, and nobody says how far behind it is.
pub async fn shows_partitions_without_an_offset(log: Log) {
    let (topic, group) = (new_topic(&log, 3).await, unique("group"));
    let partition = |number| TopicPartition::new(topic.clone(), number);
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    for number in [0, 1] {
        let record = ProducerRecord::to(topic.as_str()).partition(number).value("0");
        within("an append", producer.append(record)).await.expect("appended");
    }
    let mut member = join(&log, &group, &topic).await;
    assignment(&mut member).await;
    within("a commit", member.commit(vec![(partition(0), committed(1))]))
        .await
        .expect("committed");
    let groups = within("the groups", log.groups()).await.expect("groups");
    let found = groups.iter().find(|found| found.group == group).expect("the group");
    let lags = found.partitions.iter().map(|lag| {
        (
            lag.partition.clone(),
            lag.committed.map(|committed| committed.0),
            lag.end,
            lag.lag(),
        )
    });
    let lags: Vec<_> = lags.collect();
    assert_eq!(
        lags,
        [
            (partition(0), Some(1), 1, Some(0)),
            (partition(1), None, 1, None),
            // Whether it begins at the start or at the end: there is nothing.
            (partition(2), None, 0, Some(0)),
        ]
    );
}

/// What a group has committed of a topic that is gone does not keep the others from being seen.
pub async fn is_listed_when_one_of_its_topics_is_gone(log: Log) {
    let (kept, gone, group) = (new_topic(&log, 1).await, new_topic(&log, 1).await, unique("group"));
    let partition = TopicPartition::new(kept.clone(), 0);
    for topic in [&kept, &gone] {
        let mut member = join(&log, &group, topic).await;
        assignment(&mut member).await;
        let place = TopicPartition::new(topic.clone(), 0);
        within("a commit", member.commit(vec![(place, committed(0))]))
            .await
            .expect("committed");
    }
    within("a deletion", log.delete_topic(&gone)).await.expect("deleted");
    let groups = within("the groups", log.groups()).await.expect("groups");
    let found = groups.iter().find(|found| found.group == group).expect("the group");
    let partitions: Vec<_> = found.partitions.iter().map(|lag| lag.partition.clone()).collect();
    assert_eq!(partitions, [partition]);
}
