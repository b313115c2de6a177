//! What a channel may be called.

use super::Error;

/// Characters of a channel's name at most.
pub(crate) const MAX_CHANNEL_NAME: usize = 128;

/// Whether a name may be a channel's: 1 to 128 of `A-Za-z0-9._:-`.
pub(crate) fn is_channel_name(name: &str) -> bool {
    (1..=MAX_CHANNEL_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:-".contains(&b))
}

/// Refuses a name that no channel may have.
///
/// # Errors
/// 400 `bad-channel`.
pub(crate) fn check_channel_name(name: &str) -> Result<(), Error> {
    if is_channel_name(name) {
        return Ok(());
    }
    Err(Error::bad_request(
        "bad-channel",
        format!("a channel's name is 1 to {MAX_CHANNEL_NAME} of A-Za-z0-9._:-"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_plain() {
        for (name, is_one) in [
            ("a", true),
            ("tenant:user-1_x.Y", true),
            (&"x".repeat(128), true),
            (&"x".repeat(129), false),
            ("", false),
            ("a b", false),
            ("a/b", false),
            ("é", false),
        ] {
            assert_eq!(is_channel_name(name), is_one, "{name}");
        }
    }
}
