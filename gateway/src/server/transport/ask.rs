//! What a subscriber asks for: which channels, and where each starts. The same words on every transport.

use std::time::Duration;

use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use http::HeaderMap;

use crate::server::Error;
use crate::server::channel_name::check_channel_name;
use crate::server::config::PushConfig;
use crate::server::event::now_ms;
use crate::server::feed::Start;
use crate::server::token::Token;

/// A query, name by name: `channel` and `after` may repeat.
pub(super) type Pairs = Result<Query<Vec<(String, String)>>, QueryRejection>;

/// What is asked for over plain HTTP.
#[derive(Debug)]
pub(super) struct Ask {
    /// The channels, and where each starts.
    pub(super) channels: Vec<(String, Start)>,
    /// How long a poll waits for the first event.
    pub(super) wait: Duration,
}

impl Ask {
    /// The channel stands in the path.
    pub(super) fn of_one(
        config: &PushConfig,
        channel: String,
        pairs: Pairs,
        headers: &HeaderMap,
    ) -> Result<Self, Error> {
        Self::read(config, vec![channel], pairs, headers, false)
    }

    /// The channels stand in the query.
    pub(super) fn of_several(config: &PushConfig, pairs: Pairs, headers: &HeaderMap) -> Result<Self, Error> {
        Self::read(config, Vec::new(), pairs, headers, true)
    }

    fn read(
        config: &PushConfig,
        mut channels: Vec<String>,
        pairs: Pairs,
        headers: &HeaderMap,
        channels_in_query: bool,
    ) -> Result<Self, Error> {
        let Query(pairs) = pairs.map_err(|error| bad_query(error.body_text()))?;
        let (mut after, mut since, mut last) = (Vec::new(), None, None);
        let mut wait = config.poll_wait;
        for (name, value) in pairs {
            match name.as_str() {
                "channel" if channels_in_query => channels.push(value),
                "after" => after.push(value),
                "since" => since = Some(value),
                "last" => last = Some(value),
                "wait" => {
                    let seconds = value.parse().map_err(|_| bad_query("wait is a number of seconds"))?;
                    wait = wait.min(Duration::from_secs(seconds));
                }
                _ => return Err(bad_query(format!("{name:?} is not known here"))),
            }
        }
        // A browser that comes back by itself says where it was in the header, while the URL still says where it began.
        if let Some(last_event_id) = headers.get("last-event-id") {
            after = vec![String::from_utf8_lossy(last_event_id.as_bytes()).into_owned()];
        }
        if channels.is_empty() {
            return Err(bad_query("at least one channel is needed"));
        }
        if channels.len() > config.max_channels {
            let detail = format!("at most {} channels are served at once", config.max_channels);
            return Err(Error::bad_request("too-many-channels", detail));
        }
        if after.len() > 1 && after.len() != channels.len() {
            return Err(bad_query(
                "there is either one token that covers all channels, or one for each of them in their order",
            ));
        }
        let mut starts = Vec::with_capacity(channels.len());
        for (i, channel) in channels.into_iter().enumerate() {
            check_channel_name(&channel)?;
            if starts.iter().any(|(known, _)| *known == channel) {
                return Err(bad_query(format!("channel {channel} is named twice")));
            }
            let after = after.get(if after.len() > 1 { i } else { 0 }).map(String::as_str);
            let start = read_start(after, since.as_deref(), last.as_deref())?;
            starts.push((channel, start));
        }
        Ok(Self { channels: starts, wait })
    }
}

/// Where a subscription starts: a token wins, for who has one has begun already.
///
/// # Errors
/// 400 `bad-token`, `bad-since` or `bad-query`.
pub(super) fn read_start(after: Option<&str>, since: Option<&str>, last: Option<&str>) -> Result<Start, Error> {
    match (after, since, last) {
        (_, Some(_), Some(_)) => Err(bad_query("since and last exclude each other")),
        (Some(token), ..) => Ok(Start::After(read_token(token)?)),
        (None, Some(since), None) => read_since(since),
        (None, None, Some("1")) => Ok(Start::Last),
        (None, None, Some(_)) => Err(bad_query("last can only be 1: the latest event comes first")),
        (None, None, None) => Ok(Start::Now),
    }
}

fn read_token(text: &str) -> Result<Token, Error> {
    text.parse()
        .map_err(|error| Error::bad_request("bad-token", format!("{error}")))
}

/// RFC 3339, a time ago such as `-15m`, or `earliest`.
fn read_since(text: &str) -> Result<Start, Error> {
    if text == "earliest" {
        return Ok(Start::Earliest);
    }
    let since_ms = match text.strip_prefix('-') {
        Some(ago) => ago_ms(ago).map(|ago_ms| now_ms().saturating_sub(ago_ms)),
        None => text
            .parse::<jiff::Timestamp>()
            .ok()
            .map(jiff::Timestamp::as_millisecond),
    };
    let detail = "since is a time (RFC 3339), a time ago such as -90s, -15m, -2h or -7d, or earliest";
    since_ms
        .map(Start::Since)
        .ok_or_else(|| Error::bad_request("bad-since", detail))
}

fn ago_ms(ago: &str) -> Option<i64> {
    let unit = ago.chars().next_back()?;
    let unit_ms = match unit {
        's' => 1000,
        'm' => 60_000,
        'h' => 3_600_000,
        'd' => 86_400_000,
        _ => return None,
    };
    ago[..ago.len() - 1]
        .parse::<u32>()
        .ok()
        .map(|count| i64::from(count) * unit_ms)
}

fn bad_query(detail: impl Into<String>) -> Error {
    Error::bad_request("bad-query", detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_in_each_form() {
        assert_eq!(read_since("earliest").expect("a start"), Start::Earliest);
        assert_eq!(
            read_since("1970-01-01T00:00:01.500Z").expect("a start"),
            Start::Since(1500)
        );
        assert_eq!(
            read_since("1970-01-01T01:00:00+01:00").expect("a start"),
            Start::Since(0)
        );
        match read_since("-15m").expect("a start") {
            Start::Since(ms) => assert!((now_ms() - ms - 900_000).abs() < 60_000),
            other => panic!("{other:?}"),
        }
        for wrong in [
            "",
            "-",
            "-15",
            "-m",
            "-1w",
            "15m",
            "yesterday",
            "2026-13-01T00:00:00Z",
            "-99999999999d",
            "-1é",
        ] {
            assert!(read_since(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_start_is_said_in_one_way_only() {
        assert_eq!(read_start(None, None, None).expect("a start"), Start::Now);
        assert_eq!(read_start(None, None, Some("1")).expect("a start"), Start::Last);
        for (after, since, last) in [
            (Some("no token"), None, None),
            (Some(""), None, None),
            (None, Some("-1m"), Some("1")),
            (None, None, Some("2")),
        ] {
            assert!(read_start(after, since, last).is_err(), "{after:?} {since:?} {last:?}");
        }
    }
}
