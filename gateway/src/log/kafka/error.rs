//! How librdkafka's errors become the log's.

use std::fmt;
use std::time::Duration;

use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};

use crate::log::{Error, TopicPartition};

/// What an operation was about, named in its errors.
#[derive(Clone, Copy, Debug)]
pub(super) enum Resource<'a> {
    Cluster,
    Topic(&'a str),
    Partition(&'a TopicPartition),
    Group(&'a str),
    TransactionalId(&'a str),
}

impl fmt::Display for Resource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster => write!(f, "the cluster"),
            Self::Topic(topic) => write!(f, "topic {topic}"),
            Self::Partition(partition) => write!(f, "topic {}", partition.topic),
            Self::Group(group) => write!(f, "group {group}"),
            Self::TransactionalId(id) => write!(f, "transactional id {id}"),
        }
    }
}

/// What was tried, on what, and how long it was waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt<'a> {
    pub(super) operation: &'static str,
    pub(super) resource: Resource<'a>,
    pub(super) within: Duration,
}

impl Attempt<'_> {
    /// The log's error for one of librdkafka's.
    pub(super) fn error(&self, error: &KafkaError) -> Error {
        match error {
            KafkaError::ClientConfig(_, reason, name, _) => Error::InvalidSetting {
                name: name.clone(),
                reason: reason.clone(),
            },
            KafkaError::ClientCreation(reason) => Error::InvalidSetting {
                name: "BARNABAS_KAFKA_*".to_owned(),
                reason: reason.clone(),
            },
            KafkaError::AdminOp(code) => self.code(*code),
            KafkaError::Canceled => Error::Closed,
            _ => match error.rdkafka_error_code() {
                Some(code) => self.code(code),
                None => Error::Unavailable(format!("{} {}: {error}", self.operation, self.resource)),
            },
        }
    }

    /// The log's error for one of librdkafka's error codes.
    pub(super) fn code(&self, code: Code) -> Error {
        match code {
            Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownTopicId | Code::UnknownPartition => {
                match self.resource {
                    Resource::Partition(partition) => Error::UnknownPartition(partition.clone()),
                    Resource::Topic(topic) => Error::UnknownTopic(topic.to_owned()),
                    _ => Error::UnknownTopic(self.resource.to_string()),
                }
            }
            Code::InvalidTopic
            | Code::InvalidConfig
            | Code::InvalidPartitions
            | Code::InvalidReplicationFactor
            | Code::PolicyViolation => Error::InvalidTopic {
                topic: match self.resource {
                    Resource::Topic(topic) => topic.to_owned(),
                    _ => self.resource.to_string(),
                },
                reason: code.to_string(),
            },
            Code::TopicAuthorizationFailed
            | Code::GroupAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::TransactionalIdAuthorizationFailed
            | Code::DelegationTokenAuthorizationFailed
            | Code::SaslAuthenticationFailed
            | Code::Authentication => Error::Unauthorized(format!("{} {}: {code}", self.operation, self.resource)),
            Code::UnknownMemberId
            | Code::IllegalGeneration
            | Code::RebalanceInProgress
            | Code::FencedInstanceId
            | Code::UnreleasedInstanceId
            | Code::FencedMemberEpoch
            | Code::StaleMemberEpoch
            | Code::AssignmentLost => Error::UnknownMember {
                group: match self.resource {
                    Resource::Group(group) => group.to_owned(),
                    _ => self.resource.to_string(),
                },
            },
            Code::OperationTimedOut | Code::MessageTimedOut | Code::RequestTimedOut | Code::TimedOutQueue => {
                Error::Timeout {
                    operation: self.operation,
                    after_ms: self.within.as_millis().try_into().unwrap_or(u64::MAX),
                }
            }
            // Not `DestroyBroker`: that is a broker that has left the cluster while the client goes on.
            Code::BrokerDestroy => Error::Closed,
            _ => Error::Unavailable(format!("{} {}: {code}", self.operation, self.resource)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_that_has_left_the_cluster_is_not_the_end_of_the_client() {
        let attempt = Attempt {
            operation: "describe",
            resource: Resource::Cluster,
            within: Duration::ZERO,
        };
        assert!(attempt.code(Code::DestroyBroker).is_retriable());
        assert!(matches!(attempt.code(Code::BrokerDestroy), Error::Closed));
    }
}
