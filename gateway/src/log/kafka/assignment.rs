//! What a member of a group was assigned, as Kafka's consumers write it for each other (`ConsumerProtocolAssignment`): a version, then topics with
//! their partitions. Numbers are big-endian; what a newer version adds comes behind.

use crate::log::TopicPartition;

/// The partitions of an assignment, in order; those that could be read, if it breaks off or is something else.
pub(super) fn assigned_partitions(bytes: &[u8]) -> Vec<TopicPartition> {
    let mut partitions = Vec::new();
    // What follows the point where it breaks off is not known, and what comes before it is.
    let _ = read(bytes, &mut partitions);
    partitions.sort();
    partitions
}

fn read(mut rest: &[u8], partitions: &mut Vec<TopicPartition>) -> Option<()> {
    let _version = take::<2>(&mut rest)?;
    let topics = i32::from_be_bytes(take(&mut rest)?);
    for _ in 0..topics {
        let length = usize::try_from(i16::from_be_bytes(take(&mut rest)?)).ok()?;
        let (name, behind) = rest.split_at_checked(length)?;
        rest = behind;
        let topic = std::str::from_utf8(name).ok()?;
        let count = i32::from_be_bytes(take(&mut rest)?);
        for _ in 0..count {
            partitions.push(TopicPartition::new(topic, i32::from_be_bytes(take(&mut rest)?)));
        }
    }
    Some(())
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, behind) = rest.split_first_chunk::<N>()?;
    *rest = behind;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASSIGNMENT: &[u8] =
        b"\0\x01\0\0\0\x02\0\x01b\0\0\0\x01\0\0\0\x05\0\x01a\0\0\0\x02\0\0\0\x01\0\0\0\0\xff\xff\xff\xff";

    #[test]
    fn the_partitions_of_all_topics_are_read() {
        let [a0, a1, b5] = [("a", 0), ("a", 1), ("b", 5)].map(|(topic, number)| TopicPartition::new(topic, number));
        assert_eq!(assigned_partitions(ASSIGNMENT), [a0, a1, b5]);
    }

    #[test]
    fn one_that_breaks_off_or_lies_ends_where_it_does() {
        for end in 0..ASSIGNMENT.len() {
            let all = assigned_partitions(ASSIGNMENT);
            assert!(
                assigned_partitions(&ASSIGNMENT[..end])
                    .iter()
                    .all(|read| all.contains(read)),
                "{end}"
            );
        }
        assert_eq!(assigned_partitions(b"\0\0\x7f\xff\xff\xff"), []);
        assert_eq!(assigned_partitions(b"\0\0\0\0\0\x01\xff\xfftopic"), []);
    }
}
