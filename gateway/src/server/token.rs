//! The resume token: a place in the notifications topic from which nothing is missed and nothing repeated. It is the same on every
//! transport, and what a submitted job or posted event answers with.
//!
//! It names the topic by its identity and the next offset of each partition that is read. To a client it is opaque: base64url of
//! version, the first bytes of the topic's id, and partition and offset as variable-length numbers; for one channel 14 to 20
//! characters.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;

use crate::log::{NextOffset, TopicId};

const VERSION: u8 = 1;
/// Bytes of the topic's id that a token carries: enough to tell a topic from its predecessors.
const TOPIC_BYTES: usize = 6;
/// Partitions that a token may name: what is longer was not made here.
const MAX_PARTITIONS: usize = 1024;

/// Where a subscriber goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    topic: [u8; TOPIC_BYTES],
    positions: BTreeMap<i32, NextOffset>,
}

/// A text that is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not a resume token")]
pub struct TokenError;

impl Token {
    /// The place before `next` of one partition.
    pub fn at(topic: TopicId, partition: i32, next: NextOffset) -> Self {
        Self::of(topic, [(partition, next)])
    }

    /// A place in several partitions.
    pub fn of(topic: TopicId, positions: impl IntoIterator<Item = (i32, NextOffset)>) -> Self {
        Self {
            topic: beginning(topic),
            positions: positions.into_iter().collect(),
        }
    }

    /// Whether it names a place in this topic, and not in one that had its name before or in another gateway's.
    pub fn is_of(&self, topic: TopicId) -> bool {
        self.topic == beginning(topic)
    }

    /// Where to go on in a partition, if the token names it.
    pub fn position(&self, partition: i32) -> Option<NextOffset> {
        self.positions.get(&partition).copied()
    }

    /// All places, by partition.
    pub fn positions(&self) -> impl Iterator<Item = (i32, NextOffset)> {
        self.positions.iter().map(|(partition, next)| (*partition, *next))
    }
}

fn beginning(TopicId(id): TopicId) -> [u8; TOPIC_BYTES] {
    let mut beginning = [0; TOPIC_BYTES];
    beginning.copy_from_slice(&id[..TOPIC_BYTES]);
    beginning
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = vec![VERSION];
        bytes.extend(self.topic);
        for (partition, NextOffset(next)) in &self.positions {
            push_number(&mut bytes, u64::from(partition.cast_unsigned()));
            push_number(&mut bytes, next.cast_unsigned());
        }
        f.write_str(&BASE64URL_NOPAD.encode(&bytes))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let bytes = BASE64URL_NOPAD.decode(text.as_bytes()).map_err(|_| TokenError)?;
        let (version, rest) = bytes.split_first().ok_or(TokenError)?;
        let (topic, mut rest) = rest.split_first_chunk().ok_or(TokenError)?;
        let mut positions = BTreeMap::new();
        while !rest.is_empty() {
            let partition = i32::try_from(take_number(&mut rest)?).map_err(|_| TokenError)?;
            let next = i64::try_from(take_number(&mut rest)?).map_err(|_| TokenError)?;
            // In order and each once, as they are written: one place has one token.
            let is_next = positions.last_key_value().is_none_or(|(last, _)| *last < partition);
            if !is_next || positions.len() == MAX_PARTITIONS {
                return Err(TokenError);
            }
            positions.insert(partition, NextOffset(next));
        }
        if *version != VERSION || positions.is_empty() {
            return Err(TokenError);
        }
        Ok(Self {
            topic: *topic,
            positions,
        })
    }
}

/// LEB128: seven bits a byte, the lowest first.
fn push_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_number(bytes: &mut &[u8]) -> Result<u64, TokenError> {
    let mut number = 0;
    // Nine bytes hold every offset: they are not negative.
    for index in 0..9 {
        let (byte, rest) = bytes.split_first().ok_or(TokenError)?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            // The shortest form only.
            return if *byte == 0 && index > 0 {
                Err(TokenError)
            } else {
                Ok(number)
            };
        }
    }
    Err(TokenError)
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    const TOPIC: TopicId = TopicId([7; 16]);

    #[test]
    fn a_token_is_read_back_as_it_was() {
        for next in [0, 1, 127, 128, 1_000_000_000, i64::MAX] {
            for partition in [0, 7, 128, i32::MAX] {
                let token = Token::at(TOPIC, partition, NextOffset(next));
                assert_eq!(token.to_string().parse(), Ok(token.clone()));
                assert_eq!(token.position(partition), Some(NextOffset(next)));
            }
        }
        let token = Token::of(TOPIC, [(5, NextOffset(1)), (2, NextOffset(300))]);
        assert_eq!(token.to_string().parse(), Ok(token));
    }

    #[test]
    fn a_token_of_one_channel_is_short_and_fits_into_a_url() {
        let text = Token::at(TOPIC, 7, NextOffset(5_000_000_000)).to_string();
        assert!(text.len() <= 20, "{text}");
        assert!(
            text.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        );
    }

    #[test]
    fn a_token_belongs_to_its_topic() {
        let token = Token::at(TOPIC, 0, NextOffset(0));
        assert!(token.is_of(TOPIC));
        assert!(!token.is_of(TopicId([8; 16])));
    }

    #[test]
    fn what_is_not_a_token_is_refused() {
        let token = Token::at(TOPIC, 7, NextOffset(300)).to_string();
        for cut in 0..token.len() {
            assert_eq!(token[..cut].parse::<Token>(), Err(TokenError), "{cut}");
        }
        let encode = |bytes: &[u8]| BASE64URL_NOPAD.encode(&[&[1, 7, 7, 7, 7, 7, 7], bytes].concat());
        let (no_position, not_shortest, twice, too_large) = (
            encode(&[]),
            encode(&[0x80, 0, 1]),
            encode(&[1, 1, 1, 2]),
            encode(&[0xff; 12]),
        );
        for text in [
            &no_position,
            &not_shortest,
            &twice,
            &too_large,
            "!",
            "AgcHBwcHBwcB",
            &format!("{token}="),
        ] {
            assert_eq!(text.parse::<Token>(), Err(TokenError), "{text}");
        }
    }

    #[test]
    fn whatever_is_read_is_written_the_same() {
        let mut random = StdRng::seed_from_u64(1);
        for _ in 0..20_000 {
            let mut bytes = vec![VERSION];
            bytes.extend((0..random.random_range(6..16)).map(|_| random.random_range(0..=255_u8)));
            let text = BASE64URL_NOPAD.encode(&bytes);
            if let Ok(token) = text.parse::<Token>() {
                assert_eq!(token.to_string(), text);
            }
        }
    }
}
