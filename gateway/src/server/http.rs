//! The HTTP connection loop: accepts sockets, serves the routes on each with deadlines, and ends in bounded time.
//!
//! `axum::serve` has no deadline for a request's head and waits for open streams for ever, so this is hyper's own loop. At the
//! limit of connections nothing more is accepted: the kernel's queue holds the rest, and then refuses.
//!
//! Invariant: when [`serve`] returns, no connection of it is left, except for sockets that a transport has taken over.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::config::HttpConfig;

/// Bytes of a connection's read buffer at most: what an upload is read in.
const READ_BUFFER_BYTES: usize = 64 * 1024;
/// The limit of open files that is assumed where it cannot be asked.
const ASSUMED_OPEN_FILES: usize = 1024;
/// How long accepting pauses after an error such as "too many open files", which would return at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A connection's place among those allowed. It is in each request's extensions: who takes the socket over keeps it.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionPermit {
    _permit: Arc<OwnedSemaphorePermit>,
}

/// Serves `router` until `stopping`, then waits for the connections to end, for `shutdown_grace` at most.
pub(super) async fn serve(listener: TcpListener, router: Router, config: &HttpConfig, stopping: CancellationToken) {
    let permits = Arc::new(Semaphore::new(max_connections(config)));
    let connections = TaskTracker::new();
    let cut_off = CancellationToken::new();
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(config.header_timeout)
        .max_header_size(config.max_header_bytes)
        .max_headers(config.max_headers)
        .max_buf_size(READ_BUFFER_BYTES.max(config.max_header_bytes));
    while let Some((stream, permit)) = accept(&listener, &permits, &stopping).await {
        let ends = Ends {
            stopping: stopping.clone(),
            cut_off: cut_off.clone(),
        };
        connections.spawn(connection(builder.clone(), stream, permit, router.clone(), ends));
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(config.shutdown_grace, connections.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            connections = connections.len(),
            "{} connections did not end in time and are cut off",
            connections.len()
        );
        cut_off.cancel();
        connections.wait().await;
    }
}

/// How a connection is told to end: when it is done with its request, and then at once.
struct Ends {
    stopping: CancellationToken,
    cut_off: CancellationToken,
}

/// The next connection and its permit; `None` when the gateway stops.
async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
    stopping: &CancellationToken,
) -> Option<(TcpStream, ConnectionPermit)> {
    let next = async {
        let permit = Arc::clone(permits).acquire_owned().await.ok()?;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let permit = ConnectionPermit {
                        _permit: Arc::new(permit),
                    };
                    return Some((stream, permit));
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "no connection can be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = stopping.cancelled() => None,
        connection = next => connection,
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
    )
}

async fn connection(builder: http1::Builder, stream: TcpStream, permit: ConnectionPermit, router: Router, ends: Ends) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection was gone at once: {error}");
        return;
    }
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(permit.clone());
        let response = router.clone().oneshot(request.map(Body::new));
        async move { response.await.map_err(|never: Infallible| match never {}) }
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = ends.stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                () = ends.cut_off.cancelled() => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended: {error}");
    }
}

fn max_connections(config: &HttpConfig) -> usize {
    let limit = config.max_connections.unwrap_or_else(|| open_files() / 5 * 4);
    limit.clamp(1, Semaphore::MAX_PERMITS)
}

/// The process's limit of open files, as `/proc` says it.
fn open_files() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|rest| rest.split_whitespace().next());
    match soft {
        Some("unlimited") => Semaphore::MAX_PERMITS,
        Some(number) => number.parse().unwrap_or(ASSUMED_OPEN_FILES),
        None => ASSUMED_OPEN_FILES,
    }
}
