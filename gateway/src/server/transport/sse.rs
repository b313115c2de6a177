//! Server-Sent Events: one response that goes on, over hyper's streaming body.
//!
//! Every event carries an `id`, and so does the greeting, so that a browser that comes back by itself resumes without a line of code. A
//! client that does not read is parked: its outbox takes nothing more until it does.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderName, header};
use hyper::body::Frame;
use serde_json::json;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::{greeting, join_all, retry_ms};
use crate::server::App;
use crate::server::feed::{Cover, Format, Ready, Subscribed, sse_message};
use crate::server::outbox::{Limits, Outbox};

/// How often a comment says that the stream is alive.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// Starts the stream of one channel, or of several under tokens that cover them all.
pub(super) async fn stream(app: &App, ready: Vec<Ready>, several: bool) -> Response {
    let limits = Limits {
        bytes: app.config.push.backlog_bytes,
        pieces: usize::MAX,
    };
    let outbox = Arc::new(Outbox::new(limits));
    let cover = several.then(|| Arc::new(Cover::new(app.feed.topic_id(), ready.iter().map(Ready::position))));
    outbox.push_control(format!("retry: {}\n", retry_ms()).into());
    for ready in &ready {
        let token = ready.token(&app.feed);
        // A stream of several channels has its id when all of them have been greeted.
        let id = cover.is_none().then(|| token.to_string());
        let greeting = greeting(ready, &token).to_string();
        outbox.push_control(sse_message("hello", id.as_deref(), greeting.as_bytes()));
    }
    let subscribed = join_all(app, ready, &outbox, Format::Sse, cover.as_ref()).await;
    let body = EventStream {
        outbox,
        heartbeat: Box::pin(sleep(HEARTBEAT)),
        stopping: Box::pin(app.stopping.clone().cancelled_owned()),
        said_bye: false,
        _subscribed: subscribed,
    };
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::new(body)).into_response()
}

/// The body: what the outbox holds, heartbeats, and a farewell.
struct EventStream {
    outbox: Arc<Outbox>,
    heartbeat: Pin<Box<Sleep>>,
    stopping: Pin<Box<WaitForCancellationFutureOwned>>,
    said_bye: bool,
    _subscribed: Vec<Subscribed>,
}

impl hyper::body::Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        if !this.said_bye && this.stopping.as_mut().poll(cx).is_ready() {
            this.said_bye = true;
            let bye = json!({"code": "shutdown", "retry_ms": retry_ms()});
            this.outbox
                .push_control(sse_message("bye", None, bye.to_string().as_bytes()));
            this.outbox.close();
        }
        if let Poll::Ready(piece) = this.outbox.poll_take(cx) {
            return Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))));
        }
        if this.heartbeat.as_mut().poll(cx).is_ready() {
            this.heartbeat.as_mut().reset(Instant::now() + HEARTBEAT);
            // Polled once more so that the timer wakes this task the next time; it cannot be ready now.
            let _ = this.heartbeat.as_mut().poll(cx);
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b":\n\n")))));
        }
        Poll::Pending
    }
}
