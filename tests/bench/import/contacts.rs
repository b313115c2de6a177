//! An address book of any size, always the same: names of several languages, one e-mail address each, phone numbers of six
//! countries as people write them. One row in 200 is bad, in one of four ways.

use std::io::{self, Write};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

const FIRST: &[&str] = &[
    "Amalia", "Barnabas", "Frieda", "Olga", "Karl", "Pepi", "Jeremias", "Artur", "Gisa", "Zoë", "Jiří", "Łukasz",
    "Maël", "José", "Ngozi", "Aoife", "Hiroko", "Priya", "Sören", "Inês",
];
const LAST: &[&str] = &[
    "Klamm",
    "Lasemann",
    "Brunswick",
    "Gerstäcker",
    "Schwarzer",
    "Westwest",
    "Galater",
    "Bürgel",
    "Erlanger",
    "Momus",
    "Novák",
    "O'Brien",
    "Tanaka",
    "García Márquez",
    "Okafor",
    "Nowak",
    "Silva",
    "Lefèvre",
    "Singh",
    "Brown",
];
const DOMAINS: &[&str] = &[
    "example.org",
    "example.com",
    "mail.example.net",
    "castle.example",
    "village.example.org",
];

/// Writes a header line and `rows` rows, and returns how many of them are bad.
///
/// # Errors
/// Those of the writer.
pub fn write_csv(to: &mut impl Write, rows: u64) -> io::Result<u64> {
    let mut random = StdRng::seed_from_u64(1883);
    let mut bad = 0;
    writeln!(to, "name,email,phone")?;
    for row in 1..=rows {
        let first = pick(&mut random, FIRST);
        let last = pick(&mut random, LAST);
        let email = format!("{}.{row}@{}", first.to_ascii_lowercase(), pick(&mut random, DOMAINS));
        // The local part in ASCII, as nearly all are.
        let email = email.replace(|c: char| !c.is_ascii(), "x");
        let phone = phone(&mut random);
        if row % 200 == 100 {
            bad += 1;
            match random.random_range(0..4) {
                0 => writeln!(to, "{first} {last},{},{phone}", email.replace('@', " at "))?,
                1 => writeln!(to, "{first} {last},{email},ask {first}")?,
                2 => writeln!(to, "{first} {last},,")?,
                _ => writeln!(to, "{first} {last},{email}")?,
            }
        } else if row % 10 == 0 {
            writeln!(to, "\"{last}, {first}\",{email},{phone}")?;
        } else if row % 7 == 0 {
            writeln!(to, "{first} {last},{email},")?;
        } else {
            writeln!(to, "{first} {last},{email},{phone}")?;
        }
    }
    Ok(bad)
}

fn pick<'a>(random: &mut StdRng, from: &[&'a str]) -> &'a str {
    from[random.random_range(0..from.len())]
}

/// A number that can exist.
fn phone(random: &mut StdRng) -> String {
    let mut digits = |count: u32| random.random_range(0..10_u64.pow(count));
    let (a, b, c) = (digits(3), digits(3), digits(4));
    match digits(2) % 7 {
        0 => format!("(212) 7{:02}-{c:04}", a % 100),
        1 => format!("415-6{:02}-{c:04}", a % 100),
        2 => format!("+1 312 9{:02} {c:04}", a % 100),
        3 => format!("+420 60{} {b:03} {a:03}", 1 + c % 8),
        4 => format!("+44 7400 {a:03}{b:03}"),
        5 => format!("+33 6 {:02} {:02} {:02} {:02}", 40 + a % 40, b % 100, c % 100, c / 100),
        _ => format!("+4915123{a:03}{:02}", b % 100),
    }
}
