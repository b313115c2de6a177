//! Which column of an export holds what. The header line alone decides; names are compared without case.

use csv::StringRecord;

/// Where a row's values stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns {
    /// Parts of the name, in the order in which they are joined.
    pub names: Vec<usize>,
    /// E-mail addresses; the first that is not empty counts.
    pub emails: Vec<usize>,
    /// Phone numbers; the first that is not empty counts.
    pub phones: Vec<usize>,
    /// Fields of the header, and so of each row.
    pub count: usize,
}

/// No export that is known has this header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// None of the columns that make an address book.
    #[error(
        "the first line has to name the columns: name, email and phone, or those of an export of Google Contacts or Outlook"
    )]
    Unknown,
    /// Some of its columns are not there.
    #[error("{export}: there is no column for the {missing}")]
    Missing {
        /// What the file seems to be.
        export: &'static str,
        /// What lacks.
        missing: &'static str,
    },
}

struct Export {
    name: &'static str,
    /// Only this export has them: one is enough to know it.
    marks: &'static [&'static str],
    /// The first list of which a column exists gives the name.
    names: &'static [&'static [&'static str]],
    emails: &'static [&'static str],
    phones: &'static [&'static str],
}

const EXPORTS: &[Export] = &[
    Export {
        name: "export of Google Contacts",
        marks: &["e-mail 1 - value", "phone 1 - value"],
        names: &[
            &["first name", "middle name", "last name"],
            &["given name", "additional name", "family name"],
            &["name"],
        ],
        emails: &["e-mail 1 - value", "e-mail 2 - value", "e-mail 3 - value"],
        phones: &["phone 1 - value", "phone 2 - value", "phone 3 - value"],
    },
    Export {
        name: "export of Outlook",
        marks: &["e-mail address", "mobile phone", "business phone", "home phone"],
        names: &[&["first name", "middle name", "last name"], &["name"]],
        emails: &["e-mail address", "e-mail 2 address", "e-mail 3 address"],
        phones: &[
            "mobile phone",
            "primary phone",
            "home phone",
            "business phone",
            "other phone",
        ],
    },
    Export {
        name: "plain list",
        marks: &["email", "e-mail", "phone"],
        names: &[&["name"]],
        emails: &["email", "e-mail"],
        phones: &["phone"],
    },
];

impl Columns {
    /// Finds the columns.
    ///
    /// # Errors
    /// The header is of no known export, or has no column for the name, the e-mail or the phone.
    pub fn detect(header: &StringRecord) -> Result<Self, BadHeader> {
        let header: Vec<String> = header.iter().map(|name| name.trim().to_lowercase()).collect();
        let find = |names: &[&str]| -> Vec<usize> {
            let position = |name: &&str| header.iter().position(|column| column == name);
            names.iter().filter_map(position).collect()
        };
        let export = EXPORTS
            .iter()
            .find(|export| !find(export.marks).is_empty())
            .ok_or(BadHeader::Unknown)?;
        let missing = |missing| BadHeader::Missing {
            export: export.name,
            missing,
        };
        let columns = Self {
            names: export
                .names
                .iter()
                .map(|names| find(names))
                .find(|found| !found.is_empty())
                .ok_or_else(|| missing("name"))?,
            emails: find(export.emails),
            phones: find(export.phones),
            count: header.len(),
        };
        if columns.emails.is_empty() {
            return Err(missing("e-mail"));
        }
        if columns.phones.is_empty() {
            return Err(missing("phone"));
        }
        Ok(columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(header: &str) -> Result<Columns, BadHeader> {
        Columns::detect(&header.split(',').collect())
    }

    fn columns(names: &[usize], emails: &[usize], phones: &[usize], count: usize) -> Result<Columns, BadHeader> {
        Ok(Columns {
            names: names.to_vec(),
            emails: emails.to_vec(),
            phones: phones.to_vec(),
            count,
        })
    }

    #[test]
    fn a_plain_list_may_have_its_columns_in_any_order_and_case() {
        assert_eq!(detect("name,email,phone"), columns(&[0], &[1], &[2], 3));
        assert_eq!(detect("PHONE, E-Mail ,note,Name"), columns(&[3], &[1], &[0], 4));
    }

    #[test]
    fn the_old_export_of_google_is_known() {
        let header = "Name,Given Name,Additional Name,Family Name,Birthday,E-mail 1 - Type,E-mail 1 - Value,Phone 1 - Type,Phone 1 - Value";
        assert_eq!(detect(header), columns(&[1, 2, 3], &[6], &[8], 9));
    }

    #[test]
    fn the_new_export_of_google_is_known() {
        let header = "First Name,Middle Name,Last Name,E-mail 1 - Label,E-mail 1 - Value,E-mail 2 - Value,Phone 1 - Label,Phone 1 - Value";
        assert_eq!(detect(header), columns(&[0, 1, 2], &[4, 5], &[7], 8));
    }

    #[test]
    fn the_export_of_outlook_is_known_and_a_mobile_phone_goes_first() {
        let header = "Title,First Name,Last Name,Business Phone,Mobile Phone,E-mail Address";
        assert_eq!(detect(header), columns(&[1, 2], &[5], &[4, 3], 6));
    }

    #[test]
    fn a_column_that_lacks_is_named() {
        let message = |header| detect(header).map_err(|error| error.to_string());
        assert_eq!(
            message("name,email"),
            Err("plain list: there is no column for the phone".to_owned())
        );
        assert_eq!(
            message("First Name,Mobile Phone"),
            Err("export of Outlook: there is no column for the e-mail".to_owned())
        );
        assert_eq!(
            message("E-mail 1 - Value,Phone 1 - Value"),
            Err("export of Google Contacts: there is no column for the name".to_owned())
        );
        assert_eq!(detect("a,b,c"), Err(BadHeader::Unknown));
    }
}
