//! The administrative requests that rdkafka does not wrap: a topic's identity, the offsets and members of groups, the change of single topic
//! settings, and the offsets of many partitions at once. Each blocks its thread until it is answered or its time is over.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::ptr::{self, NonNull};
use std::slice;
use std::time::{Duration, Instant};

use rdkafka::TopicPartitionList;
use rdkafka::bindings as sys;
use rdkafka::client::Client;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::types::RDKafkaRespErr;

use super::event::LogContext;
use crate::log::{MemberDescription, NextOffset, TopicId, TopicPartition};

/// Groups that are asked about at a time.
const ASKED_AT_ONCE: usize = 100;

type Result<T> = std::result::Result<T, KafkaError>;

/// What each group has committed.
pub(super) type GroupOffsets = HashMap<String, Vec<(TopicPartition, NextOffset)>>;

/// A topic's identity and number of partitions.
pub(super) fn describe_topic(client: &Client<LogContext>, topic: &str, within: Duration) -> Result<(TopicId, i32)> {
    let name = CString::new(topic)?;
    let mut names = [name.as_ptr()];
    // SAFETY: `names` is an array of one C string; the collection copies it and is destroyed below.
    let topics = unsafe { sys::rd_kafka_TopicCollection_of_topic_names(names.as_mut_ptr(), 1) };
    let answer = request(
        client,
        sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS,
        within,
        // SAFETY: client, topics, options and queue are alive during the call, which copies what it needs.
        |options, queue| unsafe { sys::rd_kafka_DescribeTopics(client.native_ptr(), topics, options, queue) },
    );
    // SAFETY: made above, destroyed once, not used again.
    unsafe { sys::rd_kafka_TopicCollection_destroy(topics) };
    let answer = answer?;
    // SAFETY: the answer is alive until the end of this function, and everything read from it lives as long. A result of
    // another type is null. The array has `count` elements.
    unsafe {
        let result = sys::rd_kafka_event_DescribeTopics_result(answer.0.as_ptr());
        if result.is_null() {
            return Err(KafkaError::AdminOp(RDKafkaErrorCode::InvalidType));
        }
        let mut count = 0;
        let found = sys::rd_kafka_DescribeTopics_result_topics(result, &raw mut count);
        if count == 0 {
            return Err(KafkaError::AdminOp(RDKafkaErrorCode::UnknownTopicOrPartition));
        }
        let found = *found;
        let error = sys::rd_kafka_TopicDescription_error(found);
        if !error.is_null() {
            let code = sys::rd_kafka_error_code(error);
            if code != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
                return Err(KafkaError::AdminOp(code.into()));
            }
        }
        let id = sys::rd_kafka_TopicDescription_topic_id(found);
        let (high, low) = (
            sys::rd_kafka_Uuid_most_significant_bits(id),
            sys::rd_kafka_Uuid_least_significant_bits(id),
        );
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&high.to_be_bytes());
        bytes[8..].copy_from_slice(&low.to_be_bytes());
        let mut partitions = 0;
        sys::rd_kafka_TopicDescription_partitions(found, &raw mut partitions);
        Ok((TopicId(bytes), i32::try_from(partitions).unwrap_or(i32::MAX)))
    }
}

/// Changes one setting of a topic and leaves the others.
pub(super) fn alter_topic(
    client: &Client<LogContext>,
    topic: &str,
    setting: &str,
    value: &str,
    within: Duration,
) -> Result<()> {
    let (name, setting, value) = (CString::new(topic)?, CString::new(setting)?, CString::new(value)?);
    // SAFETY: the strings are copied; the resource is destroyed below. An error that is returned is ours to destroy.
    let (mut resource, refused) = unsafe {
        let resource =
            sys::rd_kafka_ConfigResource_new(sys::rd_kafka_ResourceType_t::RD_KAFKA_RESOURCE_TOPIC, name.as_ptr());
        let error = sys::rd_kafka_ConfigResource_add_incremental_config(
            resource,
            setting.as_ptr(),
            sys::rd_kafka_AlterConfigOpType_t::RD_KAFKA_ALTER_CONFIG_OP_TYPE_SET,
            value.as_ptr(),
        );
        let refused = !error.is_null();
        if refused {
            sys::rd_kafka_error_destroy(error);
        }
        (resource, refused)
    };
    let answer = if refused {
        Err(KafkaError::AdminOp(RDKafkaErrorCode::InvalidArgument))
    } else {
        request(
            client,
            sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_INCREMENTALALTERCONFIGS,
            within,
            // SAFETY: all arguments are alive during the call, which copies what it needs; the array has one element.
            |options, queue| unsafe {
                sys::rd_kafka_IncrementalAlterConfigs(client.native_ptr(), &raw mut resource, 1, options, queue);
            },
        )
    };
    // SAFETY: made above, destroyed once, not used again.
    unsafe { sys::rd_kafka_ConfigResource_destroy(resource) };
    let answer = answer?;
    // SAFETY: the answer is alive until the end of this function, and everything read from it lives as long. A result of
    // another type is null. The array has `count` elements.
    unsafe {
        let result = sys::rd_kafka_event_IncrementalAlterConfigs_result(answer.0.as_ptr());
        if result.is_null() {
            return Err(KafkaError::AdminOp(RDKafkaErrorCode::InvalidType));
        }
        let mut count = 0;
        let resources = sys::rd_kafka_IncrementalAlterConfigs_result_resources(result, &raw mut count);
        for i in 0..count {
            let code = sys::rd_kafka_ConfigResource_error(*resources.add(i));
            if code != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
                return Err(KafkaError::AdminOp(code.into()));
            }
        }
    }
    Ok(())
}

/// All offsets that the groups have committed, asked for by a consumer's client. Groups are asked for [`ASKED_AT_ONCE`] at a time: each needs
/// a request of its own.
pub(super) fn group_offsets(client: &Client<LogContext>, groups: &[&str], within: Duration) -> Result<GroupOffsets> {
    let mut offsets = HashMap::new();
    for some in groups.chunks(ASKED_AT_ONCE) {
        let names: Vec<_> = some
            .iter()
            .map(|name| CString::new(*name))
            .collect::<std::result::Result<_, _>>()?;
        let answers = requests(
            client,
            sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_LISTCONSUMERGROUPOFFSETS,
            within,
            names.iter().map(|name| {
                move |options, queue| {
                    // SAFETY: the name is copied, no partitions stand for all. Client, options and queue are alive during the
                    // call, which copies what it needs of an array of one element; that is destroyed once, after it.
                    unsafe {
                        let mut wanted = sys::rd_kafka_ListConsumerGroupOffsets_new(name.as_ptr(), ptr::null());
                        sys::rd_kafka_ListConsumerGroupOffsets(client.native_ptr(), &raw mut wanted, 1, options, queue);
                        sys::rd_kafka_ListConsumerGroupOffsets_destroy(wanted);
                    }
                }
            }),
        )?;
        for answer in &answers {
            let (group, found) = read_group_offsets(answer)?;
            offsets.insert(group, found);
        }
    }
    Ok(offsets)
}

fn read_group_offsets(answer: &Answer) -> Result<(String, Vec<(TopicPartition, NextOffset)>)> {
    let mut offsets = Vec::new();
    // SAFETY: the answer is alive until the end of this function, and everything read from it lives as long. A result of
    // another type is null. The arrays have as many elements as they say, and the group and each topic are C strings.
    unsafe {
        let result = sys::rd_kafka_event_ListConsumerGroupOffsets_result(answer.0.as_ptr());
        if result.is_null() {
            return Err(KafkaError::AdminOp(RDKafkaErrorCode::InvalidType));
        }
        let mut count = 0;
        let groups = sys::rd_kafka_ListConsumerGroupOffsets_result_groups(result, &raw mut count);
        if count == 0 {
            return Err(KafkaError::AdminOp(RDKafkaErrorCode::GroupIdNotFound));
        }
        let group = *groups;
        let error = sys::rd_kafka_group_result_error(group);
        if !error.is_null() {
            return Err(KafkaError::AdminOp(sys::rd_kafka_error_code(error).into()));
        }
        let name = CStr::from_ptr(sys::rd_kafka_group_result_name(group)).to_string_lossy();
        let partitions = sys::rd_kafka_group_result_partitions(group);
        if !partitions.is_null() && (*partitions).cnt > 0 {
            for element in slice::from_raw_parts((*partitions).elems, (*partitions).cnt as usize) {
                if element.offset >= 0 {
                    let topic = CStr::from_ptr(element.topic).to_string_lossy();
                    offsets.push((
                        TopicPartition::new(&*topic, element.partition),
                        NextOffset(element.offset),
                    ));
                }
            }
        }
        Ok((name.into_owned(), offsets))
    }
}

/// The members of groups, of whichever protocol. Nobody is in a group that is gone, or is none of consumers.
pub(super) fn group_members(
    client: &Client<LogContext>,
    groups: &[&str],
    within: Duration,
) -> Result<BTreeMap<String, Vec<MemberDescription>>> {
    let mut members = BTreeMap::new();
    for some in groups.chunks(ASKED_AT_ONCE) {
        let names: Vec<_> = some
            .iter()
            .map(|name| CString::new(*name))
            .collect::<std::result::Result<_, _>>()?;
        let mut pointers: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
        let answer = request(
            client,
            sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBECONSUMERGROUPS,
            within,
            // SAFETY: client, names, options and queue are alive during the call, which copies what it needs of an array that has as
            // many elements as it says.
            |options, queue| unsafe {
                sys::rd_kafka_DescribeConsumerGroups(
                    client.native_ptr(),
                    pointers.as_mut_ptr(),
                    pointers.len(),
                    options,
                    queue,
                );
            },
        )?;
        read_group_members(&answer, &mut members)?;
    }
    Ok(members)
}

fn read_group_members(answer: &Answer, members: &mut BTreeMap<String, Vec<MemberDescription>>) -> Result<()> {
    // SAFETY: the answer is alive until the end of this function, and everything read from it lives as long. A result of another type is
    // null. The array has `count` elements and each group `member_count` members; names, ids and hosts are C strings.
    unsafe {
        let result = sys::rd_kafka_event_DescribeConsumerGroups_result(answer.0.as_ptr());
        if result.is_null() {
            return Err(KafkaError::AdminOp(RDKafkaErrorCode::InvalidType));
        }
        let text = |text| CStr::from_ptr(text).to_string_lossy().into_owned();
        let mut count = 0;
        let groups = sys::rd_kafka_DescribeConsumerGroups_result_groups(result, &raw mut count);
        for i in 0..count {
            let group = *groups.add(i);
            // One that cannot be described has no members in its description.
            let described = (0..sys::rd_kafka_ConsumerGroupDescription_member_count(group)).map(|j| {
                let member = sys::rd_kafka_ConsumerGroupDescription_member(group, j);
                let assignment = sys::rd_kafka_MemberDescription_assignment(member);
                let mut partitions = read_partitions(sys::rd_kafka_MemberAssignment_partitions(assignment));
                partitions.sort();
                MemberDescription {
                    member: text(sys::rd_kafka_MemberDescription_consumer_id(member)),
                    client: text(sys::rd_kafka_MemberDescription_client_id(member)),
                    host: text(sys::rd_kafka_MemberDescription_host(member))
                        .trim_start_matches('/')
                        .to_owned(),
                    partitions,
                }
            });
            let name = text(sys::rd_kafka_ConsumerGroupDescription_group_id(group));
            members.insert(name, described.collect());
        }
    }
    Ok(())
}

/// The partitions of a list.
///
/// # Safety
/// The list is null, or alive.
unsafe fn read_partitions(list: *const sys::rd_kafka_topic_partition_list_t) -> Vec<TopicPartition> {
    // SAFETY: it is alive, has `cnt` elements, and each has a topic that is a C string.
    unsafe {
        if list.is_null() || (*list).cnt <= 0 {
            return Vec::new();
        }
        slice::from_raw_parts((*list).elems, (*list).cnt as usize)
            .iter()
            .map(|element| {
                let topic = CStr::from_ptr(element.topic).to_string_lossy();
                TopicPartition::new(&*topic, element.partition)
            })
            .collect()
    }
}

/// Replaces the time in each element of `list` (or `Beginning`, `End`) by the offset that it stands for. Elements can have an
/// error of their own.
pub(super) fn offsets_for_times(
    client: &Client<LogContext>,
    list: TopicPartitionList,
    within: Duration,
) -> Result<TopicPartitionList> {
    // SAFETY: client and list are alive during the call, which changes the list in place and keeps nothing of it.
    let code = unsafe { sys::rd_kafka_offsets_for_times(client.native_ptr(), list.ptr(), millis(within)) };
    if code == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
        Ok(list)
    } else {
        Err(KafkaError::OffsetFetch(code.into()))
    }
}

/// What a group has committed, as `committed_offsets` has filled it in: partition, offset (negative: none), metadata. rdkafka's
/// own way to the metadata panics when another program has written it in no UTF-8.
pub(super) fn read_committed(list: &TopicPartitionList) -> Vec<(TopicPartition, i64, String)> {
    if list.count() == 0 {
        return Vec::new();
    }
    // SAFETY: the list is alive and has `count` elements, each with a topic that is a C string, and metadata that is null or
    // has `metadata_size` bytes.
    unsafe {
        slice::from_raw_parts((*list.ptr()).elems, list.count())
            .iter()
            .map(|element| {
                let metadata = if element.metadata.is_null() {
                    String::new()
                } else {
                    let bytes = slice::from_raw_parts(element.metadata.cast::<u8>(), element.metadata_size);
                    String::from_utf8_lossy(bytes).into_owned()
                };
                let topic = CStr::from_ptr(element.topic).to_string_lossy();
                (
                    TopicPartition::new(&*topic, element.partition),
                    element.offset,
                    metadata,
                )
            })
            .collect()
    }
}

/// The answer to an administrative request. Owns its event.
struct Answer(NonNull<sys::rd_kafka_event_t>);

impl Drop for Answer {
    fn drop(&mut self) {
        // SAFETY: the event came from rd_kafka_queue_poll, which passes its ownership, and is destroyed once.
        unsafe { sys::rd_kafka_event_destroy(self.0.as_ptr()) }
    }
}

/// Sends a request by `send` and waits for its answer.
fn request(
    client: &Client<LogContext>,
    operation: sys::rd_kafka_admin_op_t,
    within: Duration,
    send: impl FnOnce(*const sys::rd_kafka_AdminOptions_t, *mut sys::rd_kafka_queue_t),
) -> Result<Answer> {
    let answer = requests(client, operation, within, [send])?.pop();
    answer.ok_or(KafkaError::AdminOp(RDKafkaErrorCode::OperationTimedOut))
}

/// Sends requests of one kind, one by each of `sends`, and waits for the answers on a queue of their own. They come in any order.
fn requests<S>(
    client: &Client<LogContext>,
    operation: sys::rd_kafka_admin_op_t,
    within: Duration,
    sends: impl IntoIterator<Item = S>,
) -> Result<Vec<Answer>>
where
    S: FnOnce(*const sys::rd_kafka_AdminOptions_t, *mut sys::rd_kafka_queue_t),
{
    // librdkafka answers each request within its time: the second is for the answers to come through.
    let deadline = Instant::now() + within + Duration::from_secs(1);
    let (mut sent, mut answers) = (0, Vec::new());
    // SAFETY: the client is alive. Queue and options are made here and destroyed once, after their last use; a request that
    // is answered after its queue is gone is dropped by librdkafka. A null error buffer of size 0 is allowed.
    unsafe {
        let queue = sys::rd_kafka_queue_new(client.native_ptr());
        let options = sys::rd_kafka_AdminOptions_new(client.native_ptr(), operation);
        sys::rd_kafka_AdminOptions_set_request_timeout(options, millis(within), ptr::null_mut(), 0);
        for send in sends {
            send(options, queue);
            sent += 1;
        }
        while answers.len() < sent {
            let left = deadline.saturating_duration_since(Instant::now());
            match NonNull::new(sys::rd_kafka_queue_poll(queue, millis(left))) {
                Some(answer) => answers.push(Answer(answer)),
                None => break,
            }
        }
        sys::rd_kafka_AdminOptions_destroy(options);
        sys::rd_kafka_queue_destroy(queue);
    }
    if answers.len() < sent {
        return Err(KafkaError::AdminOp(RDKafkaErrorCode::OperationTimedOut));
    }
    for answer in &answers {
        // SAFETY: the event is alive.
        let code = unsafe { sys::rd_kafka_event_error(answer.0.as_ptr()) };
        if code != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(KafkaError::AdminOp(code.into()));
        }
    }
    Ok(answers)
}

fn millis(duration: Duration) -> i32 {
    duration.as_millis().try_into().unwrap_or(i32::MAX)
}
