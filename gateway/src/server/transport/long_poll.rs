//! Long-poll: a request that waits for the next events and is answered with them and the token to ask again with. Nothing is
//! kept between two polls, so any node can answer any of them.

use std::sync::Arc;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::header;

use super::join_all;
use crate::server::App;
use crate::server::feed::{Cover, Format, Ready, end_all};
use crate::server::outbox::{Limits, Outbox};
use crate::server::token::Token;

/// Events of a page at most; the client asks again for more.
const PAGE_EVENTS: usize = 300;
/// A poll that has to be served from the log waits for that so long at least.
const REPLAY_WAIT: Duration = Duration::from_secs(1);

/// Waits for events and answers with what is there. The token can have moved even when there is nothing: the way to the next
/// event may be long, and the client goes on from where this poll has come.
pub(super) async fn answer(app: &App, ready: Vec<Ready>, wait: Duration) -> Response {
    let limits = Limits {
        bytes: app.config.push.backlog_bytes,
        pieces: PAGE_EVENTS,
    };
    let outbox = Arc::new(Outbox::new(limits));
    let subscribed = join_all(app, ready, &outbox, Format::Json, None).await;
    let is_live = subscribed.iter().all(|subscribed| subscribed.is_live());
    let wait = if is_live { wait } else { wait.max(REPLAY_WAIT) };
    tokio::select! {
        () = outbox.waits() => {}
        () = tokio::time::sleep(wait) => {}
        () = app.stopping.cancelled() => {}
    }
    // Ended first: what the outbox holds then is all that the token says was sent.
    let positions = end_all(&subscribed).await;
    outbox.close();
    let mut events = Vec::new();
    while let Some(event) = outbox.take().await {
        events.push(event);
    }
    let body = page(&events, &Cover::new(app.feed.topic_id(), positions).token());
    (
        [
            (header::CONTENT_TYPE, "application/json"),
            (header::CACHE_CONTROL, "no-store"),
        ],
        body,
    )
        .into_response()
}

fn page(events: &[Bytes], token: &Token) -> Bytes {
    let mut body = BytesMut::with_capacity(events.iter().map(|event| event.len() + 1).sum::<usize>() + 64);
    body.put_slice(b"{\"events\":[");
    for (i, event) in events.iter().enumerate() {
        if i > 0 {
            body.put_u8(b',');
        }
        body.put_slice(event);
    }
    body.put_slice(b"],\"token\":\"");
    body.put_slice(token.to_string().as_bytes());
    body.put_slice(b"\"}");
    body.freeze()
}
