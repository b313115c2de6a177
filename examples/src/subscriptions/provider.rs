//! A payment provider as they are: an HTTP server that is away at times. It listens on a free port of this machine.

use std::collections::HashSet;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Renewal;

/// Bytes of a payment at most.
const MAX_BODY_BYTES: usize = 1024;

/// A running provider. Ends when dropped.
pub(super) struct Provider {
    address: SocketAddr,
    books: Arc<Books>,
    _running: DropGuard,
}

struct Books {
    /// Payments that are taken before it goes away.
    before_outage: usize,
    outage: Duration,
    pages: Mutex<Pages>,
}

#[derive(Default)]
struct Pages {
    /// The idempotency keys of what is paid.
    paid: HashSet<String>,
    away_until: Option<Instant>,
    declined: Option<String>,
    refused: usize,
}

impl Provider {
    /// One that takes some payments, and is then away for a while.
    pub(super) async fn start(before_outage: usize, outage: Duration) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let books = Arc::new(Books {
            before_outage,
            outage,
            pages: Mutex::default(),
        });
        let running = CancellationToken::new();
        tokio::spawn(serve(listener, books.clone(), running.clone()));
        Ok(Self {
            address,
            books,
            _running: running.drop_guard(),
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on a user's card is declined.
    pub(super) fn decline(&self, user: &str) {
        self.books.pages().declined = Some(user.to_owned());
    }

    /// Payments that were not taken.
    pub(super) fn refused(&self) -> usize {
        self.books.pages().refused
    }
}

async fn serve(listener: TcpListener, books: Arc<Books>, running: CancellationToken) {
    // Dropped at the end, and the connections with it.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = running.cancelled() => return,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let Ok((connection, _)) = accepted else { continue };
        let books = books.clone();
        let service = service_fn(move |request| {
            let books = books.clone();
            async move { Ok::<_, Infallible>(books.answer(request).await) }
        });
        connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(connection), service));
    }
}

impl Books {
    async fn answer(&self, request: Request<Incoming>) -> Response<Empty<Bytes>> {
        let key = request.headers().get("idempotency-key");
        let key = key.and_then(|key| key.to_str().ok()).map(str::to_owned);
        let body = Limited::new(request.into_body(), MAX_BODY_BYTES).collect().await;
        let payment = body.ok().and_then(|body| serde_json::from_slice(&body.to_bytes()).ok());
        let status = match (key, payment) {
            (Some(key), Some(payment)) => self.take(key, &payment),
            _ => StatusCode::BAD_REQUEST,
        };
        let mut response = Response::new(Empty::new());
        *response.status_mut() = status;
        response
    }

    fn take(&self, key: String, payment: &Renewal) -> StatusCode {
        let mut pages = self.pages();
        if pages.paid.contains(&key) {
            return StatusCode::OK;
        }
        if pages.paid.len() == self.before_outage && pages.away_until.is_none() {
            println!("            --- the provider goes away for {:?} ---", self.outage);
            pages.away_until = Some(Instant::now() + self.outage);
        }
        let is_away = pages.away_until.is_some_and(|until| Instant::now() < until);
        let status = match is_away {
            true => StatusCode::SERVICE_UNAVAILABLE,
            false if pages.declined.as_ref() == Some(&payment.user) => StatusCode::PAYMENT_REQUIRED,
            false => StatusCode::CREATED,
        };
        match status == StatusCode::CREATED {
            true => _ = pages.paid.insert(key),
            false => pages.refused += 1,
        }
        status
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
