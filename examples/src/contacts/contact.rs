//! One row of an address book: right, or rejected with a reason in plain words that names the field.

use csv::StringRecord;
use email_address::{EmailAddress, Options};
use phonenumber::country;
use phonenumber::{Mode, PhoneNumber};

use super::columns::Columns;

/// Characters of a name at most.
const MAX_NAME_CHARS: usize = 200;
/// Characters of a phone number at most, with all its spaces: more is no number, and is not worth parsing.
const MAX_PHONE_CHARS: usize = 40;
/// What Google puts between several values in one field.
const SEPARATOR: &str = ":::";

/// A contact in normal form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contact {
    /// What it is known by: its e-mail address, else its phone number.
    pub key: String,
    /// Its name; may be empty.
    pub name: String,
    /// Its e-mail address, in lower case.
    pub email: Option<String>,
    /// Its phone number in E.164.
    pub phone: Option<String>,
}

impl Contact {
    /// Reads a row. A phone number without country code is one of `region`.
    ///
    /// # Errors
    /// Why the row is rejected, for the person who uploaded it.
    pub fn parse(row: &StringRecord, columns: &Columns, region: country::Id) -> Result<Self, String> {
        if row.len() != columns.count {
            return Err(format!("row: {} fields, the header has {}", row.len(), columns.count));
        }
        let name = name(row, columns)?;
        let email = first(row, &columns.emails).map(email).transpose()?;
        let phone = first(row, &columns.phones)
            .map(|text| phone(text, region))
            .transpose()?;
        let key = email
            .clone()
            .or_else(|| phone.clone())
            .ok_or("e-mail and phone: both are empty")?;
        Ok(Self {
            key,
            name,
            email,
            phone,
        })
    }
}

fn first<'a>(row: &'a StringRecord, columns: &[usize]) -> Option<&'a str> {
    let values = columns.iter().filter_map(|&column| row.get(column));
    values
        .flat_map(|value| value.split(SEPARATOR))
        .map(str::trim)
        .find(|value| !value.is_empty())
}

fn name(row: &StringRecord, columns: &Columns) -> Result<String, String> {
    let mut name = String::new();
    let parts = columns.names.iter().filter_map(|&column| row.get(column));
    // Control characters count as spaces: PostgreSQL takes no NUL, and no name has one.
    for word in parts.flat_map(|part| part.split(|c: char| c.is_whitespace() || c.is_control())) {
        if !name.is_empty() && !word.is_empty() {
            name.push(' ');
        }
        name.push_str(word);
    }
    if name.chars().nth(MAX_NAME_CHARS).is_some() {
        return Err(format!("name: longer than {MAX_NAME_CHARS} characters"));
    }
    Ok(name)
}

fn email(text: &str) -> Result<String, String> {
    const OPTIONS: Options = Options {
        minimum_sub_domains: 2,
        allow_domain_literal: false,
        allow_display_text: false,
    };
    let (local, domain) = text.rsplit_once('@').ok_or("e-mail: no @")?;
    if local.is_empty() {
        return Err("e-mail: nothing before the @".to_owned());
    }
    if domain.is_empty() {
        return Err("e-mail: nothing after the @".to_owned());
    }
    if !domain.contains('.') {
        return Err("e-mail: no dot after the @".to_owned());
    }
    if text.contains(char::is_whitespace) {
        return Err("e-mail: a space in the address".to_owned());
    }
    match EmailAddress::parse_with_options(text, OPTIONS) {
        Ok(_) => Ok(text.to_lowercase()),
        Err(_) => Err("e-mail: not an address".to_owned()),
    }
}

fn phone(text: &str, region: country::Id) -> Result<String, String> {
    if !text.bytes().any(|b| b.is_ascii_digit()) {
        return Err("phone: no digits".to_owned());
    }
    if text.chars().nth(MAX_PHONE_CHARS).is_some() {
        return Err(format!("phone: longer than {MAX_PHONE_CHARS} characters"));
    }
    let number: PhoneNumber =
        phonenumber::parse(Some(region), text).map_err(|_| "phone: not a phone number".to_owned())?;
    if !number.is_valid() {
        return Err("phone: no such number can exist".to_owned());
    }
    Ok(number.format().mode(Mode::E164).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(header: &str, row: &str) -> Result<Contact, String> {
        let columns = Columns::detect(&header.split(',').collect()).expect("a known header");
        Contact::parse(&row.split(',').collect(), &columns, country::US)
    }

    fn plain(row: &str) -> Result<Contact, String> {
        parse("name,email,phone", row)
    }

    #[test]
    fn values_are_brought_to_their_normal_form() {
        let contact = plain("  Olga \t Barnabas , Olga@Example.ORG ,(201) 555-0123").expect("a right row");
        assert_eq!(contact.name, "Olga Barnabas");
        assert_eq!(contact.email.as_deref(), Some("olga@example.org"));
        assert_eq!(contact.phone.as_deref(), Some("+12015550123"));
        assert_eq!(contact.key, "olga@example.org");
    }

    #[test]
    fn a_contact_without_an_address_is_known_by_its_phone() {
        let contact = plain("Frieda,,+420 601 123 456").expect("a right row");
        assert_eq!((contact.key.as_str(), contact.email), ("+420601123456", None));
    }

    #[test]
    fn the_reason_names_the_field() {
        let reason = |row| plain(row).expect_err("a wrong row");
        assert_eq!(reason("K,k.example.org,"), "e-mail: no @");
        assert_eq!(reason("K,@example.org,"), "e-mail: nothing before the @");
        assert_eq!(reason("K,k@,"), "e-mail: nothing after the @");
        assert_eq!(reason("K,k@castle,"), "e-mail: no dot after the @");
        assert_eq!(reason("K,k k@example.org,"), "e-mail: a space in the address");
        assert_eq!(reason("K,k@exa..mple.org,"), "e-mail: not an address");
        assert_eq!(reason("K,k@example.org,1"), "phone: not a phone number");
        assert_eq!(
            reason("K,k@example.org,+1 111 111 1111"),
            "phone: no such number can exist"
        );
        assert_eq!(reason("K,k@example.org,call me"), "phone: no digits");
        assert_eq!(reason("K,,"), "e-mail and phone: both are empty");
        assert_eq!(reason("K,k@example.org"), "row: 2 fields, the header has 3");
        assert!(reason(&format!("{},k@example.org,", "k".repeat(201))).starts_with("name: longer"));
    }

    #[test]
    fn of_several_values_in_a_field_the_first_counts() {
        let header = "First Name,Last Name,E-mail 1 - Value,Phone 1 - Value";
        let contact = parse(header, "Pepi,K,p@example.org ::: q@example.org,").expect("a right row");
        assert_eq!(
            (contact.name.as_str(), contact.key.as_str()),
            ("Pepi K", "p@example.org")
        );
    }

    #[test]
    fn an_empty_column_leaves_the_word_to_the_next() {
        let header = "First Name,Last Name,E-mail Address,E-mail 2 Address,Mobile Phone,Home Phone";
        let contact = parse(header, "Momus,,,m@example.org,,+1 201 555 0123").expect("a right row");
        assert_eq!(
            (contact.key.as_str(), contact.phone.as_deref()),
            ("m@example.org", Some("+12015550123"))
        );
    }

    #[test]
    fn control_characters_never_reach_the_database() {
        assert_eq!(plain("a\0b,k@example.org,").expect("a right row").name, "a b");
        assert!(plain("K,k\0@example.org,").is_err());
    }
}
