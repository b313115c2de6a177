//! How subscribers are reached: WebSocket, Server-Sent Events and long-poll, all over the same [`super::feed`] and with the same
//! token.
//!
//! A transport makes an [`super::outbox::Outbox`], puts its greeting into it, joins the channels, and carries what comes out to
//! its client. On its checklist: a heartbeat, a bound for a client that does not read, and `stopping`.

mod ask;
mod close;
mod long_poll;
mod sse;
mod websocket;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{HeaderMap, StatusCode, header};
use serde_json::json;

use self::ask::{Ask, Pairs};
use super::feed::{Cover, Format, Partition, Ready, Subscribed, hold_still, sse_id};
use super::outbox::Outbox;
use super::token::Token;
use super::{App, Error};

pub(super) fn routes() -> Router<App> {
    let routes = Router::new()
        .route("/v1/ws", get(websocket::upgrade))
        .route("/v1/channels/{channel}/events", get(one_channel))
        .route("/v1/events", get(several_channels));
    #[cfg(feature = "conformance")]
    let routes = routes.route("/v1/conformance/echo", get(websocket::upgrade_to_echo));
    routes
}

async fn one_channel(
    State(app): State<App>,
    Path(channel): Path<String>,
    pairs: Pairs,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let ask = Ask::of_one(&app.config.push, channel, pairs, &headers)?;
    serve(&app, ask, &headers, false).await
}

async fn several_channels(State(app): State<App>, pairs: Pairs, headers: HeaderMap) -> Result<Response, Error> {
    let ask = Ask::of_several(&app.config.push, pairs, &headers)?;
    serve(&app, ask, &headers, true).await
}

async fn serve(app: &App, ask: Ask, headers: &HeaderMap, several: bool) -> Result<Response, Error> {
    let is_stream = wants(headers, "text/event-stream");
    if !is_stream && !wants(headers, "application/json") {
        let detail = "events are text/event-stream or application/json";
        return Err(Error::refused(StatusCode::NOT_ACCEPTABLE, "accept", detail));
    }
    let mut ready = Vec::with_capacity(ask.channels.len());
    for (channel, start) in ask.channels {
        ready.push(app.feed.resolve(&channel, start).await?);
    }
    match is_stream {
        true => Ok(sse::stream(app, ready, several).await.into_response()),
        false => Ok(long_poll::answer(app, ready, ask.wait).await.into_response()),
    }
}

/// Whether a media type is acceptable. An event stream has to be named: what accepts anything gets JSON.
fn wants(headers: &HeaderMap, media_type: &str) -> bool {
    let mut accepted = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .peekable();
    let is_json = media_type == "application/json";
    if accepted.peek().is_none() {
        return is_json;
    }
    let ranges = accepted.flat_map(|value| value.split(','));
    let mut ranges = ranges.map(|range| range.split(';').next().unwrap_or("").trim());
    ranges.any(|range| range.eq_ignore_ascii_case(media_type) || is_json && matches!(range, "*/*" | "application/*"))
}

/// What a client is told before its first event of a channel.
fn greeting(ready: &Ready, token: &Token) -> serde_json::Value {
    let mut greeting = json!({"channel": ready.channel(), "token": token.to_string(), "resumed": ready.resumed});
    if let Some(found) = ready.found {
        greeting["last"] = found.into();
    }
    greeting
}

/// Says the gaps, then begins to push. Streams of several channels have a cover.
async fn join_all(
    app: &App,
    ready: Vec<Ready>,
    outbox: &Arc<Outbox>,
    format: Format,
    cover: Option<&Arc<Cover>>,
) -> Vec<Subscribed> {
    for ready in &ready {
        if let Some(gap) = &ready.gap {
            outbox.push_control(gap.write(ready.channel(), format, cover.is_none()));
        }
    }
    if let (Format::Sse, Some(cover)) = (format, cover) {
        // Only now, when all gaps are said: who comes back from here has been told of each.
        outbox.push_control(sse_id(&cover.token().to_string()));
    }
    let partitions: Vec<Arc<Partition>> = ready.iter().map(|ready| ready.partition().clone()).collect();
    let _still = hold_still(partitions.iter()).await;
    let join = |(i, ready)| {
        app.feed
            .join(ready, outbox.clone(), format, cover.map(|cover| (cover.clone(), i)))
    };
    ready.into_iter().enumerate().map(join).collect()
}

/// When a client that is sent away should come back, in milliseconds: spread out, so that they do not all come at once.
fn retry_ms() -> u64 {
    500 + rand::random_range(0..4500)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_stream_has_to_be_asked_for() {
        let accept = |value: &str| HeaderMap::from_iter([(header::ACCEPT, value.parse().expect("a value"))]);
        for (headers, stream, json) in [
            (HeaderMap::new(), false, true),
            (accept("*/*"), false, true),
            (accept("text/event-stream"), true, false),
            (accept("text/event-stream;q=1, application/json"), true, true),
            (accept("application/*"), false, true),
            (accept("text/html"), false, false),
        ] {
            assert_eq!(
                (
                    wants(&headers, "text/event-stream"),
                    wants(&headers, "application/json")
                ),
                (stream, json)
            );
        }
    }
}
