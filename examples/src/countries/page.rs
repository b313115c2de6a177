//! A page on loopback that shows the three tables live: each is followed by a watcher, whose updates go to the browser as server-sent
//! events. Two buttons change Countries.
//!
//! A browser that is slow has updates wait in its watcher, which keeps the last state of each key only.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use barnabas::patterns::table::{Table, Update};
use barnabas::server::program::Failure;
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderValue, ORIGIN};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Country, Event, TimeZone};

/// Updates on their way to one browser.
const WAITING_UPDATES: usize = 16;

const HTML: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/page.js");
const STYLE: &str = include_str!("page/page.css");

/// The tables of the three services.
#[derive(Clone, Debug)]
pub(super) struct Stores {
    pub(super) countries: Table<String, Country>,
    pub(super) time_zones: Table<String, TimeZone>,
    pub(super) events: Table<String, Event>,
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

/// Serves the page until `stopping`.
pub(super) async fn serve(address: SocketAddr, stores: Stores, stopping: CancellationToken) -> Result<(), Failure> {
    if !address.ip().is_loopback() {
        return Err("the page asks nobody who they are: it listens on loopback only".into());
    }
    let listener = TcpListener::bind(address).await?;
    println!("http://{}", listener.local_addr()?);
    let connections = TaskTracker::new();
    loop {
        let (stream, _) = tokio::select! {
            () = stopping.cancelled() => break,
            accepted = listener.accept() => accepted?,
        };
        let (stores, stopping) = (stores.clone(), stopping.clone());
        connections.spawn(async move {
            let service = service_fn(|request| answer(&stores, &stopping, request));
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = stopping.cancelled() => {}
                ended = connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a browser has gone");
                    }
                }
            }
        });
    }
    connections.close();
    connections.wait().await;
    Ok(())
}

async fn answer(
    stores: &Stores,
    stopping: &CancellationToken,
    request: Request<Incoming>,
) -> Result<Answer, Infallible> {
    if !is_own(&request) {
        return Ok(status(StatusCode::FORBIDDEN));
    }
    let answer = match (request.method(), request.uri().path()) {
        (&Method::GET, "/") => whole("text/html; charset=utf-8", HTML),
        (&Method::GET, "/page.js") => whole("text/javascript; charset=utf-8", SCRIPT),
        (&Method::GET, "/page.css") => whole("text/css; charset=utf-8", STYLE),
        (&Method::GET, "/stores") => follow(stores, stopping),
        (&Method::PUT, path) => match path.strip_prefix("/countries/").map(str::to_owned) {
            Some(code) => put(stores, code, request).await,
            None => status(StatusCode::NOT_FOUND),
        },
        (&Method::DELETE, path) => match path.strip_prefix("/countries/") {
            Some(code) => written(stores.countries.delete(&code.to_owned()).await),
            None => status(StatusCode::NOT_FOUND),
        },
        _ => status(StatusCode::NOT_FOUND),
    };
    Ok(answer)
}

/// Whether it comes from the page itself: pages of other sites can reach loopback too.
fn is_own<B>(request: &Request<B>) -> bool {
    let header = |name| {
        request
            .headers()
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let Some(host) = header(HOST) else { return false };
    let is_loopback = host
        .parse::<SocketAddr>()
        .is_ok_and(|address| address.ip().is_loopback())
        || host.split(':').next() == Some("localhost");
    is_loopback && header(ORIGIN).is_none_or(|origin| origin == format!("http://{host}"))
}

/// Most bytes of a country.
const COUNTRY_BYTES: usize = 4096;

async fn put(stores: &Stores, code: String, request: Request<Incoming>) -> Answer {
    let body = http_body_util::Limited::new(request.into_body(), COUNTRY_BYTES);
    let Ok(body) = body.collect().await else {
        return status(StatusCode::PAYLOAD_TOO_LARGE);
    };
    match serde_json::from_slice::<Country>(&body.to_bytes()) {
        Ok(country) if country.utc_offset_minutes.abs() <= 14 * 60 => {
            written(stores.countries.put(&code, &country).await)
        }
        Ok(_) | Err(_) => status(StatusCode::UNPROCESSABLE_ENTITY),
    }
}

fn written<T>(written: Result<T, barnabas::patterns::table::Error>) -> Answer {
    match written {
        Ok(_) => status(StatusCode::NO_CONTENT),
        Err(error) => {
            tracing::error!(%error, "a country was not written: {error}");
            status(StatusCode::SERVICE_UNAVAILABLE)
        }
    }
}

fn status(code: StatusCode) -> Answer {
    let mut answer = whole("text/plain", "");
    *answer.status_mut() = code;
    answer
}

fn whole(content_type: &'static str, body: &'static str) -> Answer {
    with_headers(content_type, Full::new(Bytes::from_static(body.as_bytes())).boxed())
}

fn with_headers(content_type: &'static str, body: BoxBody<Bytes, Infallible>) -> Answer {
    let mut answer = Response::new(body);
    for (name, value) in [
        (CONTENT_TYPE, content_type),
        (CACHE_CONTROL, "no-cache"),
        (
            CONTENT_SECURITY_POLICY,
            "default-src 'self'; base-uri 'none'; object-src 'none'",
        ),
    ] {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}

/// Server-sent events of what changes in the three tables.
fn follow(stores: &Stores, stopping: &CancellationToken) -> Answer {
    let (updates, received) = mpsc::channel(WAITING_UPDATES);
    tell("countries", stores.countries.clone(), updates.clone(), stopping.clone());
    tell(
        "time-zones",
        stores.time_zones.clone(),
        updates.clone(),
        stopping.clone(),
    );
    tell("events", stores.events.clone(), updates, stopping.clone());
    with_headers("text/event-stream", Updates(received).boxed())
}

/// Sends what changes in one table until the browser has gone.
fn tell<V>(store: &'static str, table: Table<String, V>, updates: mpsc::Sender<Bytes>, stopping: CancellationToken)
where
    V: Serialize + DeserializeOwned + Send + Sync + 'static,
{
    let follow = async move {
        let mut watch = table.watch_all();
        loop {
            let update = tokio::select! {
                update = watch.next() => update,
                () = updates.closed() => return,
                () = stopping.cancelled() => return,
            };
            let said = match update {
                Ok(Update::Snapshot(entries)) => {
                    let all: serde_json::Map<_, _> = entries
                        .iter()
                        .map(|(key, entry)| (key.clone(), json!(&*entry.value)))
                        .collect();
                    json!({"store": store, "all": all})
                }
                Ok(Update::Changed(key, entry)) => json!({"store": store, "key": key, "value": &*entry.value}),
                Ok(Update::Deleted(key) | Update::Unreadable(key, _)) => json!({"store": store, "key": key}),
                Err(_) => return,
            };
            if updates.send(format!("data: {said}\n\n").into()).await.is_err() {
                return;
            }
        }
    };
    tokio::spawn(follow);
}

/// A body that goes on as long as there are updates.
struct Updates(mpsc::Receiver<Bytes>);

impl Body for Updates {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0
            .poll_recv(cx)
            .map(|update| update.map(|update| Ok(Frame::data(update))))
    }
}
