//! The page and the browser client: from the binary, or in development from a folder.
//!
//! Everything is revalidated on each load (`no-cache` and an ETag), so that a page and its modules are always of one version.
//! The pages may load nothing from elsewhere and run no inline script.

use std::hash::{DefaultHasher, Hash, Hasher};

use axum::Router;
use axum::extract::Request;
use axum::response::{IntoResponse, Redirect, Response};
use http::{HeaderValue, Method, StatusCode, header};
use tower_http::services::ServeDir;

use super::config::WebConfig;
use super::{App, Error};

const CONTENT_SECURITY_POLICY: &str =
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'";

/// A file of `web/public/`.
struct Asset {
    path: &'static str,
    content_type: &'static str,
    bytes: &'static [u8],
}

/// Written by `build.rs`, sorted by path.
static ASSETS: &[Asset] = include!(concat!(env!("OUT_DIR"), "/assets.rs"));

/// Whatever no other route answers.
pub(crate) fn routes(config: &WebConfig) -> Router<App> {
    let router = match &config.dir {
        Some(dir) => Router::new().fallback_service(ServeDir::new(dir)),
        None => Router::new().fallback(embedded),
    };
    router.layer(axum::middleware::map_response(protect))
}

async fn embedded(request: Request) -> Response {
    let path = request.uri().path().trim_start_matches('/');
    let Some(asset) = find(path) else {
        if find(&format!("{path}/")).is_some() {
            // A page of its own stands in a folder; in development it is the same.
            return Redirect::temporary(&format!("/{path}/")).into_response();
        }
        return Error::not_found("not-found", format!("there is nothing at /{path}")).into_response();
    };
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let refusal = Error::refused(
            StatusCode::METHOD_NOT_ALLOWED,
            "method-not-allowed",
            "pages are only read",
        );
        return ([(header::ALLOW, "GET, HEAD")], refusal).into_response();
    }
    let etag = etag(asset.bytes);
    let known = request.headers().get(header::IF_NONE_MATCH);
    if known.is_some_and(|known| known.as_bytes() == etag.as_bytes()) {
        return (StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response();
    }
    let headers = [
        (header::CONTENT_TYPE, asset.content_type.to_owned()),
        (header::ETAG, etag),
    ];
    (headers, asset.bytes).into_response()
}

/// The asset at a path; a folder stands for its `index.html`.
fn find(path: &str) -> Option<&'static Asset> {
    let by_path = |path: &str| {
        let index = ASSETS.binary_search_by(|asset| asset.path.cmp(path)).ok()?;
        Some(&ASSETS[index])
    };
    if path.is_empty() || path.ends_with('/') {
        by_path(&format!("{path}index.html"))
    } else {
        by_path(path)
    }
}

/// The same for the same bytes in the same build, which is all that revalidation asks.
fn etag(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("\"{:016x}\"", hasher.finish())
}

async fn protect(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}
