//! The fingerprint of a request: whether a repeated key comes with the request that it came with first.

use data_encoding::HEXLOWER;
use http::{HeaderMap, Method, Uri, header};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// SHA-256 of a request's method, path, query, content type and body, in hexadecimal.
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
            // Where one part ends must not be a matter of opinion.
            sha256.update((part.len() as u64).to_be_bytes());
            sha256.update(part);
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
}
