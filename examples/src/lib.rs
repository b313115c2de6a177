//! Programs that show how services stand on Barnabas. So far one: [`contacts`], the import of contacts.

pub mod contacts;
