//! The patterns that make event-driven services right, on either engine of [`crate::log`].
