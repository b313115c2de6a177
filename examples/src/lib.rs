//! Programs that show how services stand on Barnabas. So far one: [`contacts`], the import of contacts.

pub mod command_line;
pub mod contacts;
