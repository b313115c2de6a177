//! Errors of handlers, answered as RFC 9457 problem details with a stable `code`.
//!
//! A client's mistake is told in detail, with the line where it is in a file. Of our own failures the client learns the code
//! only; the cause is logged here, once.

use std::error::Error as StdError;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use crate::log;

/// What a client is told to wait before it tries again.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// The content type of all refusals.
const PROBLEM: &str = "application/problem+json";

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is wrong, or cannot be done; the client is told why.
    #[error("{code}: {detail}")]
    Refused {
        /// 400 to 499.
        status: StatusCode,
        /// Stable, such as `unknown-job-type`.
        code: &'static str,
        /// For people.
        detail: String,
        /// The line of the uploaded file, from 1.
        line: Option<u64>,
    },
    /// The same request is being done. 409 with `Retry-After`.
    #[error("request-in-progress: {0}")]
    InProgress(String),
    /// As much as may wait is waiting. Nothing of the request was done. 429 with `Retry-After`.
    #[error("queue-full: {0}")]
    QueueFull(String),
    /// It cannot be done now; the same request may succeed later. 503 with `Retry-After`.
    #[error("{code}: {cause}")]
    Unavailable {
        /// Stable, such as `log-unavailable`.
        code: &'static str,
        /// For the log.
        #[source]
        cause: Box<dyn StdError + Send + Sync>,
    },
    /// It should not have happened. 500.
    #[error("{0}")]
    Internal(#[source] Box<dyn StdError + Send + Sync>),
}

impl Error {
    /// A request that is refused, and why.
    pub fn refused(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self::Refused {
            status,
            code,
            detail: detail.into(),
            line: None,
        }
    }

    /// 400: something in the request is not as it has to be.
    pub fn bad_request(code: &'static str, detail: impl Into<String>) -> Self {
        Self::refused(StatusCode::BAD_REQUEST, code, detail)
    }

    /// 404: there is no such thing.
    pub fn not_found(code: &'static str, detail: impl Into<String>) -> Self {
        Self::refused(StatusCode::NOT_FOUND, code, detail)
    }

    /// 409: the same request is being done; try again later.
    pub fn in_progress(detail: impl Into<String>) -> Self {
        Self::InProgress(detail.into())
    }

    /// The same refusal, of this line of the body.
    #[must_use]
    pub fn at_line(mut self, at: u64) -> Self {
        if let Self::Refused { line, .. } = &mut self {
            *line = Some(at);
        }
        self
    }

    /// 503: try again later.
    pub fn unavailable(code: &'static str, cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Unavailable {
            code,
            cause: cause.into(),
        }
    }

    /// 500.
    pub fn internal(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Internal(cause.into())
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Refused { status, .. } => *status,
            Self::InProgress(_) => StatusCode::CONFLICT,
            Self::QueueFull(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The stable name of what is wrong.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Refused { code, .. } | Self::Unavailable { code, .. } => code,
            Self::InProgress(_) => "request-in-progress",
            Self::QueueFull(_) => "queue-full",
            Self::Internal(_) => "internal",
        }
    }
}

impl From<log::Error> for Error {
    /// What the log could not do now is 503. That a record's fate is not known is 503 too: only the client can repeat it.
    fn from(error: log::Error) -> Self {
        match error {
            log::Error::Indefinite(_) | log::Error::Closed | log::Error::Fenced(_) => {
                Self::unavailable("log-unavailable", error)
            }
            error if error.is_retriable() => Self::unavailable("log-unavailable", error),
            error => Self::internal(error),
        }
    }
}

/// RFC 9457, with our `code` and `line`.
#[derive(Serialize)]
struct Problem<'a> {
    title: &'a str,
    status: u16,
    code: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u64>,
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = self.status();
        let (detail, line) = match &self {
            Self::Refused { detail, line, .. } => (Some(detail.as_str()), *line),
            Self::InProgress(detail) | Self::QueueFull(detail) => (Some(detail.as_str()), None),
            Self::Unavailable { code, cause } => {
                tracing::warn!(code, error = %cause, "a request was answered 503: {cause}");
                (None, None)
            }
            Self::Internal(cause) => {
                tracing::error!(error = %cause, "a request failed: {cause}");
                (None, None)
            }
        };
        let problem = Problem {
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            code: self.code(),
            detail,
            line,
        };
        let body = serde_json::to_vec(&problem).expect("strings and numbers are always JSON");
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if matches!(
            self,
            Self::InProgress(_) | Self::QueueFull(_) | Self::Unavailable { .. }
        ) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER.as_secs()));
        }
        response
    }
}

/// Gives what the router refuses before a handler, such as a method that a path does not have, the form of all other refusals.
pub(super) async fn name_refusals(response: Response) -> Response {
    let status = response.status();
    let is_named = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|content_type| content_type == PROBLEM);
    if !status.is_client_error() || is_named {
        return response;
    }
    let (code, detail) = match status {
        StatusCode::METHOD_NOT_ALLOWED => ("method-not-allowed", "this path does not take this method"),
        StatusCode::NOT_FOUND => ("not-found", "there is nothing at this path"),
        StatusCode::BAD_REQUEST => ("bad-path", "this path cannot be read"),
        _ => ("refused", "this cannot be done"),
    };
    let mut refusal = Error::refused(status, code, detail).into_response();
    if let Some(methods) = response.headers().get(header::ALLOW) {
        refusal.headers_mut().insert(header::ALLOW, methods.clone());
    }
    refusal
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn body(error: Error) -> (StatusCode, serde_json::Value) {
        let response = error.into_response();
        let status = response.status();
        let bytes = axum::body::to_bytes(response.into_body(), 4096).await.expect("a body");
        (status, serde_json::from_slice(&bytes).expect("JSON"))
    }

    #[tokio::test]
    async fn a_refusal_says_what_is_wrong_and_where() {
        let error = Error::Refused {
            status: StatusCode::UNPROCESSABLE_ENTITY,
            code: "not-utf-8",
            detail: "line 3 is not UTF-8".to_owned(),
            line: Some(3),
        };
        let expected = serde_json::json!({
            "title": "Unprocessable Entity", "status": 422, "code": "not-utf-8", "detail": "line 3 is not UTF-8", "line": 3,
        });
        assert_eq!(body(error).await, (StatusCode::UNPROCESSABLE_ENTITY, expected));
    }

    #[tokio::test]
    async fn our_own_failures_say_nothing_more_than_their_code() {
        let (status, problem) = body(Error::internal("secret")).await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(!problem.to_string().contains("secret"));
        let (status, problem) = body(log::Error::Unavailable("secret".to_owned()).into()).await;
        assert_eq!(
            (status, &problem["code"]),
            (StatusCode::SERVICE_UNAVAILABLE, &"log-unavailable".into())
        );
        assert!(!problem.to_string().contains("secret"));
    }

    #[test]
    fn what_may_succeed_later_says_when_to_try_again() {
        for error in [
            Error::unavailable("log-unavailable", "gone"),
            Error::in_progress("wait"),
            Error::QueueFull("wait".to_owned()),
        ] {
            assert_eq!(error.into_response().headers()[header::RETRY_AFTER], "2");
        }
    }
}
