//! A chunk record: what its headers say, and what becomes of its rows. Pure; nothing here fails on what a stranger sends.

use std::str::FromStr;

use barnabas::log::Record;
use barnabas::server::job_state::{MAX_REJECTS, Reject};
use barnabas::server::job_store::JobCommand;
use csv::{ReaderBuilder, StringRecord};
use phonenumber::country;

use super::columns::Columns;
use super::contact::Contact;

/// A contact and the row that it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourcedContact {
    /// The job. Ids are UUIDs of version 7, so a later job has a greater one.
    pub job: String,
    /// The line in the uploaded file, from 1.
    pub line: u64,
    /// The contact.
    pub contact: Contact,
}

/// What a chunk holds.
#[derive(Debug, PartialEq)]
pub struct Chunk {
    /// Its job.
    pub job: String,
    /// Its index in the job, from 0.
    pub index: u32,
    /// The rows that are right.
    pub contacts: Vec<SourcedContact>,
    /// What the worker answers when they are in the database; `Failed` when the chunk is hopeless.
    pub answer: JobCommand,
}

/// The record names no job and chunk to which anything could be answered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the record has no valid header {0}")]
pub struct Stray(pub &'static str);

impl Chunk {
    /// Reads a record of the job type's topic.
    ///
    /// # Errors
    /// [`Stray`] when it cannot even be said which chunk of which job it is.
    pub fn parse(record: &Record, region: country::Id) -> Result<Self, Stray> {
        let (job, index) = identity(record)?;
        let mut contacts = Vec::new();
        let answer = match rows(record, job, region, &mut contacts) {
            Ok(rejects) => JobCommand::Done {
                chunk: index,
                ok: contacts.len() as u64,
                rejected: rejects.len() as u64,
                rejects: rejects.into_iter().take(MAX_REJECTS).collect(),
            },
            Err(Hopeless { code, message }) => {
                contacts.clear();
                JobCommand::Failed {
                    chunk: index,
                    code: code.to_owned(),
                    message,
                }
            }
        };
        Ok(Self {
            job: job.to_owned(),
            index,
            contacts,
            answer,
        })
    }
}

/// The job of a record and its index in it.
///
/// # Errors
/// [`Stray`] names the header that lacks.
pub fn identity(record: &Record) -> Result<(&str, u32), Stray> {
    let job = record.headers.last_str("bn-job").filter(|job| !job.is_empty());
    let job = job.ok_or(Stray("bn-job"))?;
    Ok((job, number(record, "bn-chunk").ok_or(Stray("bn-chunk"))?))
}

struct Hopeless {
    code: &'static str,
    message: String,
}

fn hopeless(code: &'static str, message: impl ToString) -> Hopeless {
    let message = message.to_string();
    Hopeless { code, message }
}

fn number<T: FromStr>(record: &Record, header: &str) -> Option<T> {
    record.headers.last_str(header)?.parse().ok()
}

/// Sorts the rows into contacts and rejects.
fn rows(
    record: &Record,
    job: &str,
    region: country::Id,
    contacts: &mut Vec<SourcedContact>,
) -> Result<Vec<Reject>, Hopeless> {
    let first_line: u64 =
        number(record, "bn-first-line").ok_or_else(|| hopeless("bad-chunk", "the header bn-first-line is missing"))?;
    let text = std::str::from_utf8(record.value.as_deref().unwrap_or_default())
        .map_err(|_| hopeless("not-utf-8", "the file is not UTF-8"))?;
    let mut reader = ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let bad_csv = |error: csv::Error| hopeless("bad-csv", error);
    let columns = Columns::detect(reader.headers().map_err(bad_csv)?).map_err(|e| hopeless("bad-header", e))?;
    let mut line = Lines::new(text, first_line);
    let mut rejects = Vec::new();
    let mut row = StringRecord::new();
    loop {
        let from = reader.position().byte() as usize;
        if !reader.read_record(&mut row).map_err(bad_csv)? {
            return Ok(rejects);
        }
        let line = line.of_row(from);
        match Contact::parse(&row, &columns, region) {
            Ok(contact) => contacts.push(SourcedContact {
                job: job.to_owned(),
                line,
                contact,
            }),
            Err(reason) => rejects.push(Reject { line, reason }),
        }
    }
}

/// Counts the lines of the uploaded file. Line feeds within quotes count, and so do blank lines between rows.
struct Lines<'a> {
    text: &'a str,
    /// Where the last row began; none before the first.
    last: Option<usize>,
    line: u64,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str, first_line: u64) -> Self {
        Self {
            text,
            last: None,
            line: first_line,
        }
    }

    /// The line of the row that the reader found when it stood at `from`: what ends the row before, and blank lines, are skipped.
    fn of_row(&mut self, from: usize) -> u64 {
        let bytes = self.text.as_bytes();
        let blank = bytes[from..].iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
        let start = from + blank;
        if let Some(last) = self.last.replace(start) {
            self.line += bytes[last..start].iter().filter(|&&b| b == b'\n').count() as u64;
        }
        self.line
    }
}

#[cfg(test)]
mod tests {
    use barnabas::log::Headers;

    use super::*;

    fn record(first_line: u64, value: impl AsRef<[u8]>) -> Record {
        Record {
            offset: 0,
            timestamp_ms: 0,
            key: None,
            value: Some(value.as_ref().to_vec().into()),
            headers: Headers::new()
                .with("bn-job", "j")
                .with("bn-chunk", "3")
                .with("bn-first-line", first_line.to_string()),
        }
    }

    fn parse(first_line: u64, value: impl AsRef<[u8]>) -> Chunk {
        Chunk::parse(&record(first_line, value), country::US).expect("a chunk")
    }

    fn code(value: impl AsRef<[u8]>) -> String {
        match parse(2, value).answer {
            JobCommand::Failed { chunk: 3, code, .. } => code,
            answer => panic!("{answer:?}"),
        }
    }

    #[test]
    fn lines_are_those_of_the_uploaded_file_whatever_stands_within_quotes() {
        let text = "name,email,phone\r\nA,a@x.org,\r\n\"B\r\nb\r\nb\",b,\r\n\r\nC,c@x.org,\r\nD,d,\r\n";
        let chunk = parse(100, text);
        let lines: Vec<_> = chunk.contacts.iter().map(|contact| contact.line).collect();
        assert_eq!(lines, [100, 105]);
        let JobCommand::Done {
            ok, rejected, rejects, ..
        } = chunk.answer
        else {
            panic!("{:?}", chunk.answer)
        };
        assert_eq!((ok, rejected), (2, 2));
        let lines: Vec<_> = rejects.iter().map(|reject| reject.line).collect();
        assert_eq!(lines, [101, 106]);
    }

    #[test]
    fn a_header_with_a_newline_in_quotes_shifts_no_line() {
        let chunk = parse(3, "name,email,\"pho\nne\",phone\nA,a@x.org,,\nB,b@x.org,,");
        let lines: Vec<_> = chunk.contacts.iter().map(|contact| contact.line).collect();
        assert_eq!(lines, [3, 4]);
    }

    #[test]
    fn a_chunk_names_at_most_a_hundred_rejects_and_counts_all() {
        let text = format!("name,email,phone\n{}", "K,k,\n".repeat(250));
        let JobCommand::Done {
            ok, rejected, rejects, ..
        } = parse(2, text).answer
        else {
            panic!("it is done")
        };
        assert_eq!((ok, rejected, rejects.len()), (0, 250, 100));
    }

    #[test]
    fn a_chunk_that_nothing_can_be_made_of_fails_its_job() {
        assert_eq!(code("a,b,c\n1,2,3\n"), "bad-header");
        assert_eq!(code(b"name,email,phone\n\xff,,\n"), "not-utf-8");
        let mut incomplete = record(2, "name,email,phone\n");
        incomplete.headers = Headers::new().with("bn-job", "j").with("bn-chunk", "3");
        let answer = Chunk::parse(&incomplete, country::US).expect("a chunk").answer;
        assert!(matches!(answer, JobCommand::Failed { code, .. } if code == "bad-chunk"));
    }

    #[test]
    fn a_record_of_nobody_is_a_stray() {
        let mut stray = record(2, "name,email,phone\n");
        stray.headers = Headers::new().with("bn-chunk", "3");
        assert_eq!(Chunk::parse(&stray, country::US), Err(Stray("bn-job")));
        stray.headers = Headers::new().with("bn-job", "j").with("bn-chunk", "three");
        assert_eq!(Chunk::parse(&stray, country::US), Err(Stray("bn-chunk")));
    }
}
