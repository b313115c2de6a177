//! The import of contacts: uploaded address books become rows of a database.
//!
//! ```text
//! chunk of CSV ──▶ columns (which export is it) ──▶ contact (is the row right) ──▶ database (upsert) ──▶ done
//! ```
//!
//! [`importer`] moves chunks along this way, at least once; [`database`] makes repeating one harmless. The rest is pure.

pub mod chunk;
pub mod columns;
pub mod contact;
pub mod database;
pub mod importer;
pub mod settings;
