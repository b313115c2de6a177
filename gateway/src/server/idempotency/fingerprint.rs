//! The fingerprint of a request: whether a repeated key comes with the request that it came with first.

use data_encoding::HEXLOWER;
use http::{HeaderMap, Method, Uri, header};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// SHA-256 of a request's method, path, query, content type, `ce-` headers and body, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Fingerprint(String);

/// A fingerprint whose body is streaming by.
#[derive(Clone, Debug)]
pub(crate) struct Fingerprinter(Sha256);

impl Fingerprinter {
    /// Begins with everything but the body.
    pub(crate) fn new(method: &Method, uri: &Uri, headers: &HeaderMap) -> Self {
        let mut sha256 = Sha256::new();
        let content_type = headers
            .get(header::CONTENT_TYPE)
            .map_or(&[][..], |value| value.as_bytes());
        let path_and_query = uri.path_and_query().map_or("", |path| path.as_str());
        for part in [method.as_str().as_bytes(), path_and_query.as_bytes(), content_type] {
            add(&mut sha256, part);
        }
        // A CloudEvent in binary mode has all but its data there.
        let mut attributes: Vec<_> = headers
            .iter()
            .filter(|(name, _)| name.as_str().starts_with("ce-"))
            .collect();
        attributes.sort_by_key(|(name, _)| name.as_str());
        for (name, value) in attributes {
            add(&mut sha256, name.as_str().as_bytes());
            add(&mut sha256, value.as_bytes());
        }
        Self(sha256)
    }

    /// Takes the next bytes of the body.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The fingerprint of the complete request.
    pub(crate) fn finish(self) -> Fingerprint {
        Fingerprint(HEXLOWER.encode(&self.0.finalize()))
    }
}

/// Adds a part, of which it is said where it ends: that must not be a matter of opinion.
fn add(sha256: &mut Sha256, part: &[u8]) {
    sha256.update((part.len() as u64).to_be_bytes());
    sha256.update(part);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(method: Method, uri: &'static str, content_type: &'static str, pieces: &[&str]) -> Fingerprint {
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, content_type.parse().expect("a value"))]);
        let mut fingerprinter = Fingerprinter::new(&method, &Uri::from_static(uri), &headers);
        for piece in pieces {
            fingerprinter.update(piece.as_bytes());
        }
        fingerprinter.finish()
    }

    #[test]
    fn every_part_of_a_request_counts_and_the_pieces_of_its_body_do_not() {
        let of = |uri, content_type, pieces: &[&str]| fingerprint(Method::POST, uri, content_type, pieces);
        let request = of("/a?b=1", "text/csv", &["name\n", "Ada\n"]);
        assert_eq!(request, of("/a?b=1", "text/csv", &["name\nAda\n"]));
        let others = [
            fingerprint(Method::PUT, "/a?b=1", "text/csv", &["name\nAda\n"]),
            of("/a", "text/csv", &["name\nAda\n"]),
            of("/a?b=2", "text/csv", &["name\nAda\n"]),
            of("/a?b=1", "application/json", &["name\nAda\n"]),
            of("/a?b=1", "text/csvn", &["ame\nAda\n"]),
            of("/a?b=1", "text/csv", &["name\nAda"]),
        ];
        for (index, other) in others.iter().enumerate() {
            assert_ne!(&request, other, "{index}");
        }
    }

    #[test]
    fn the_attributes_of_a_cloud_event_in_binary_mode_count_in_any_order() {
        let of = |attributes: &[(&'static str, &str)]| {
            let headers = attributes.iter().map(|(name, value)| {
                let value = value.parse().expect("a value");
                (http::HeaderName::from_static(name), value)
            });
            Fingerprinter::new(&Method::POST, &Uri::from_static("/a"), &headers.collect()).finish()
        };
        let request = of(&[("ce-id", "1"), ("ce-type", "placed"), ("user-agent", "a")]);
        assert_eq!(
            request,
            of(&[("ce-type", "placed"), ("ce-id", "1"), ("user-agent", "b")])
        );
        assert_ne!(request, of(&[("ce-id", "2"), ("ce-type", "placed")]));
        assert_ne!(request, of(&[("ce-id", "1"), ("ce-type", "cancelled")]));
        assert_ne!(request, of(&[("ce-id", "1")]));
    }
}
