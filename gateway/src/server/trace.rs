//! W3C trace context: what comes in goes on into the records, and who brings none begins a trace.

use http::HeaderMap;

/// The `traceparent` of a request, or that of a new trace if it has none, or one that is not valid.
pub(super) fn traceparent(headers: &HeaderMap) -> String {
    given_traceparent(headers).unwrap_or_else(|| format!("00-{:032x}-{:016x}-00", non_zero_u128(), non_zero_u64()))
}

/// The `traceparent` of a request, if it has a valid one.
pub(super) fn given_traceparent(headers: &HeaderMap) -> Option<String> {
    let given = headers.get("traceparent")?.to_str().ok()?;
    is_valid(given).then(|| given.to_owned())
}

/// Version 00 of <https://www.w3.org/TR/trace-context/#traceparent-header>.
fn is_valid(value: &str) -> bool {
    let mut parts = value.split('-');
    let mut hex = |len: usize| {
        parts
            .next()
            .filter(|part| part.len() == len && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
    };
    let is_set = |part: &str| part.bytes().any(|b| b != b'0');
    hex(2) == Some("00")
        && hex(32).is_some_and(is_set)
        && hex(16).is_some_and(is_set)
        && hex(2).is_some()
        && parts.next().is_none()
}

fn non_zero_u128() -> u128 {
    rand::random::<u128>().max(1)
}

fn non_zero_u64() -> u64 {
    rand::random::<u64>().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_valid_traceparent_goes_on_and_any_other_is_replaced() {
        let valid = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let mut headers = HeaderMap::new();
        assert!(is_valid(&traceparent(&headers)));
        headers.insert("traceparent", valid.parse().expect("a value"));
        assert_eq!(traceparent(&headers), valid);
        for invalid in [
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "",
        ] {
            headers.insert("traceparent", invalid.parse().expect("a value"));
            let made = traceparent(&headers);
            assert!(made != invalid && is_valid(&made), "{invalid}");
        }
    }
}
