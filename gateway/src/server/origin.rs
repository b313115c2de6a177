//! Who may call from a browser: pages of the gateway's own origin and those of the allow-list.
//!
//! While there is no authentication, what protects a gateway on loopback is that other sites' pages cannot use the visitor's
//! browser against it. So a foreign `Origin` may neither change anything nor upgrade, and the `Host` must be one that leads here
//! without a name server's help: with a name of their own that points to 127.0.0.1 they would be of the same origin.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};

use super::Error;
use super::config::ListenConfig;

/// What other origins' pages may send, beyond what every page may.
const ALLOWED_HEADERS: &str = "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, Prefer, traceparent";
/// What they may read of an answer.
const EXPOSED_HEADERS: &str = "Barnabas-Token, Location, Retry-After";

/// The origins that may call.
#[derive(Debug)]
pub(super) struct Origins {
    allowed: Vec<String>,
    loopback_only: bool,
}

/// Where a request comes from.
#[derive(Debug, PartialEq, Eq)]
enum Caller {
    /// No page, or one of ours.
    Own,
    /// A page of an origin of the list.
    Allowed,
    /// Any other page.
    Foreign,
}

impl Origins {
    pub(super) fn new(config: &ListenConfig) -> Self {
        Self {
            allowed: config.allowed_origins.clone(),
            loopback_only: config.address.ip().is_loopback() && !config.insecure,
        }
    }

    fn caller(&self, headers: &HeaderMap) -> Caller {
        let Some(origin) = headers.get(header::ORIGIN) else {
            return Caller::Own;
        };
        let origin = origin.to_str().unwrap_or_default().to_ascii_lowercase();
        if self.allowed.contains(&origin) {
            return Caller::Allowed;
        }
        // Not the scheme: a proxy may have taken TLS off.
        match origin.split_once("://") {
            Some((_, authority)) if host(headers).is_some_and(|host| host.eq_ignore_ascii_case(authority)) => {
                Caller::Own
            }
            _ => Caller::Foreign,
        }
    }

    fn host_leads_here(&self, headers: &HeaderMap) -> bool {
        let Some(authority) = host(headers) else {
            // HTTP/1.0, which no browser speaks.
            return !headers.contains_key(header::HOST);
        };
        let authority = authority.to_ascii_lowercase();
        let listed = |origin: &String| origin.split_once("://").is_some_and(|(_, host)| host == authority);
        !self.loopback_only || is_loopback(&authority) || self.allowed.iter().any(listed)
    }
}

fn host(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::HOST)?.to_str().ok()
}

/// Whether `host` or `host:port` is this machine for every browser.
fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    };
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || host.ends_with(".localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// Refuses what foreign pages may not do, and tells browsers what allowed ones may.
pub(super) async fn check(State(origins): State<Arc<Origins>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if !origins.host_leads_here(headers) {
        return Error::refused(
            StatusCode::FORBIDDEN,
            "host-not-allowed",
            "this gateway answers to localhost, and to the hosts of its allowed origins",
        )
        .into_response();
    }
    let caller = origins.caller(headers);
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if caller == Caller::Foreign && (changes || headers.contains_key(header::UPGRADE)) {
        return Error::refused(
            StatusCode::FORBIDDEN,
            "origin-not-allowed",
            "pages of this origin may not call this gateway",
        )
        .into_response();
    }
    if caller != Caller::Allowed {
        return next.run(request).await;
    }
    let origin = headers.get(header::ORIGIN).cloned();
    let preflight = request.method() == Method::OPTIONS && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if preflight {
        StatusCode::NO_CONTENT.into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    }
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
    headers.insert(
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static(EXPOSED_HEADERS),
    );
    if preflight {
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_METHODS,
            HeaderValue::from_static("GET, POST, DELETE"),
        );
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            HeaderValue::from_static(ALLOWED_HEADERS),
        );
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins() -> Origins {
        Origins::new(&ListenConfig {
            allowed_origins: vec!["https://app.example.org".to_owned()],
            ..ListenConfig::default()
        })
    }

    fn headers(host: &str, origin: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().expect("a value"));
        headers.insert(header::ORIGIN, origin.parse().expect("a value"));
        headers
    }

    #[test]
    fn pages_are_told_apart_by_their_origin() {
        for (host, origin, caller) in [
            ("localhost:8080", "http://localhost:8080", Caller::Own),
            ("localhost:8080", "https://LOCALHOST:8080", Caller::Own),
            ("localhost:8080", "http://localhost:9090", Caller::Foreign),
            ("localhost:8080", "http://evil.example", Caller::Foreign),
            ("localhost:8080", "null", Caller::Foreign),
            ("localhost:8080", "https://app.example.org", Caller::Allowed),
        ] {
            assert_eq!(origins().caller(&headers(host, origin)), caller, "{host} {origin}");
        }
        assert_eq!(origins().caller(&HeaderMap::new()), Caller::Own);
    }

    #[test]
    fn only_names_that_are_loopback_everywhere_lead_here() {
        for (host, leads) in [
            ("localhost", true),
            ("127.0.0.1:8080", true),
            ("127.8.0.1", true),
            ("[::1]:8080", true),
            ("page.localhost:80", true),
            ("app.example.org", true),
            ("evil.example:8080", false),
            ("127.0.0.1.evil.example", false),
            ("10.0.0.1", false),
        ] {
            assert_eq!(origins().host_leads_here(&headers(host, "null")), leads, "{host}");
        }
    }
}
