//! How a record's headers stand in their column: for each the length of the name, the name, the length of the value, the value;
//! lengths are 32-bit little-endian. No headers: NULL.

use bytes::{Buf, Bytes};

use crate::log::{Error, Headers, Result};

pub(super) fn encode(headers: &Headers) -> Option<Vec<u8>> {
    if headers.is_empty() {
        return None;
    }
    // Exactly: a large transaction holds those of all its records.
    let size_bytes = headers.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
    let mut encoded = Vec::with_capacity(size_bytes);
    for (name, value) in headers.iter() {
        for part in [name.as_bytes(), value] {
            encoded.extend_from_slice(&(part.len() as u32).to_le_bytes());
            encoded.extend_from_slice(part);
        }
    }
    Some(encoded)
}

pub(super) fn decode(mut encoded: Bytes) -> Result<Headers> {
    let mut headers = Headers::new();
    while !encoded.is_empty() {
        let name = part(&mut encoded)?;
        let name = std::str::from_utf8(&name).map_err(|_| damaged())?.to_owned();
        headers.push(name, part(&mut encoded)?);
    }
    Ok(headers)
}

fn part(encoded: &mut Bytes) -> Result<Bytes> {
    if encoded.len() < 4 {
        return Err(damaged());
    }
    let length = encoded.get_u32_le() as usize;
    if encoded.len() < length {
        return Err(damaged());
    }
    Ok(encoded.split_to(length))
}

fn damaged() -> Error {
    Error::Storage("the headers of a record are damaged".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_as_they_were() {
        let headers = Headers::new().with("a", "1").with("a", "").with("b", vec![0u8, 255]);
        assert_eq!(
            decode(encode(&headers).expect("headers").into()).expect("decoded"),
            headers
        );
        assert_eq!(encode(&Headers::new()), None);
    }

    #[test]
    fn damaged_headers_are_an_error() {
        let encoded = encode(&Headers::new().with("name", "value")).expect("headers");
        for length in 1..encoded.len() {
            assert!(decode(Bytes::copy_from_slice(&encoded[..length])).is_err(), "{length}");
        }
    }
}
