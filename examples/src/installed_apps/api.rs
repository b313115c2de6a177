//! `GET /sites/{site}/apps` and `GET /apps/{app}`, answered from the view, on loopback.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::projector::InstalledApp;
use super::store::Store;

type Answer = Result<Json<Vec<InstalledApp>>, StatusCode>;

/// A running API.
#[derive(Debug)]
pub struct Api {
    /// Where it listens.
    pub address: SocketAddr,
    stopping: CancellationToken,
    serving: JoinHandle<io::Result<()>>,
}

impl Api {
    /// Serves what stands in the database, on a free port.
    ///
    /// # Errors
    /// Nothing can be listened on.
    pub async fn start(store: Store) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let routes = Router::new()
            .route("/sites/{site}/apps", get(of_site))
            .route("/apps/{app}", get(of_app))
            .with_state(store);
        let stopping = CancellationToken::new();
        Ok(Self {
            address: listener.local_addr()?,
            stopping: stopping.clone(),
            serving: tokio::spawn(async move {
                let serve = axum::serve(listener, routes);
                serve.with_graceful_shutdown(stopping.cancelled_owned()).await
            }),
        })
    }

    /// Stops when the answers that are under way are given.
    ///
    /// # Errors
    /// It had ended before.
    pub async fn stop(self) -> io::Result<()> {
        self.stopping.cancel();
        self.serving.await?
    }
}

async fn of_site(State(store): State<Store>, Path(site): Path<String>) -> Answer {
    answer(store.of_site(&site).await)
}

async fn of_app(State(store): State<Store>, Path(app): Path<String>) -> Answer {
    answer(store.of_app(&app).await)
}

fn answer(found: sqlx::Result<Vec<InstalledApp>>) -> Answer {
    found.map(Json).map_err(|error| {
        tracing::warn!(%error, "the view cannot be read: {error}");
        StatusCode::SERVICE_UNAVAILABLE
    })
}
