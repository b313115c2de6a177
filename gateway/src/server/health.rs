//! Whether the process is alive, and whether it can do its work: for load balancers and orchestrators.

use axum::Router;
use axum::extract::State;
use axum::response::IntoResponse;
use axum::routing::get;
use http::{StatusCode, header};

use super::App;

pub(crate) fn routes() -> Router<App> {
    Router::new()
        .route("/healthz/live", get(live))
        .route("/healthz/ready", get(ready))
}

/// The process answers.
async fn live() -> impl IntoResponse {
    answer(StatusCode::OK, "live\n")
}

/// The topics are there and the producers warm, for the gateway answers nothing before; and it is not stopping.
async fn ready(State(app): State<App>) -> impl IntoResponse {
    if app.stopping.is_cancelled() {
        return answer(StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
    }
    answer(StatusCode::OK, "ready\n")
}

fn answer(status: StatusCode, text: &'static str) -> impl IntoResponse {
    (status, [(header::CACHE_CONTROL, "no-store")], text)
}
