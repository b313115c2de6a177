//! Cuts a job's body into chunks of whole rows while it streams by.
//!
//! A [`Cutter`] sees every byte once, keeps none but the CSV header, and ends with a [`Plan`]: where each chunk stands in the body.
//! Rows of CSV are those of `csv-core`, which the `csv` crate reads with too, so that a newline within quotes is no boundary
//! here that it is not for a worker. Lines are counted by line feeds, from 1.
//!
//! Invariant: the chunks, one behind the other, are all rows of the body in their order; blank lines before a chunk's first
//! row are left out, so that counting line feeds from its `first_line` gives the line of each of its rows.

use bytes::Bytes;

use crate::server::config::BodyFormat;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The most that a chunk may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Rows.
    pub(super) rows: u32,
    /// Bytes, with the header line.
    pub(super) bytes: usize,
}

/// Where the chunks of a body are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// What stands before the rows of each chunk: the header line of CSV with its line feed, nothing for NDJSON.
    pub(super) header: Bytes,
    /// The chunks in order.
    pub(super) chunks: Vec<Chunk>,
    /// Rows of all chunks.
    pub(super) rows: u64,
}

/// Some whole rows of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Where they begin in the body.
    pub(super) start: u64,
    /// The line of the body on which the first of them begins, from 1.
    pub(super) first_line: u64,
    /// Their bytes.
    pub(super) len: u32,
    /// How many they are.
    pub(super) rows: u32,
}

/// A body that cannot be cut.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub(super) struct CutError {
    /// Stable.
    pub(super) code: &'static str,
    /// The line, from 1.
    pub(super) line: u64,
    /// For people; names the line.
    pub(super) detail: String,
}

impl CutError {
    fn new(code: &'static str, line: u64, detail: impl FnOnce(u64) -> String) -> Self {
        Self {
            code,
            line,
            detail: detail(line),
        }
    }
}

/// Finds the chunks of a body that is pushed through it.
pub(super) struct Cutter {
    limits: Limits,
    rows: Rows,
    text: TextCheck,
    /// The first bytes, until it is known whether they are a byte order mark.
    beginning: Option<Vec<u8>>,
    header: Vec<u8>,
    /// Whether the next row is the header line.
    header_wanted: bool,
    /// Bytes of the body that have been looked at.
    position: u64,
    /// The line at `position`.
    line: u64,
    last_byte: u8,
    /// Where the row at `position` began; `None` between rows.
    row: Option<RowStart>,
    open: Option<Chunk>,
    chunks: Vec<Chunk>,
    row_count: u64,
}

#[derive(Clone, Copy)]
struct RowStart {
    position: u64,
    line: u64,
}

impl Cutter {
    pub(super) fn new(format: BodyFormat, limits: Limits) -> Self {
        Self {
            limits,
            rows: Rows::new(format),
            text: TextCheck::default(),
            beginning: Some(Vec::new()),
            header: Vec::new(),
            header_wanted: format == BodyFormat::Csv,
            position: 0,
            line: 1,
            last_byte: 0,
            row: None,
            open: None,
            chunks: Vec::new(),
            row_count: 0,
        }
    }

    /// Looks at the next bytes of the body.
    ///
    /// # Errors
    /// They are not text in UTF-8, or a row is larger than a chunk may be.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), CutError> {
        let Some(beginning) = &mut self.beginning else {
            return self.scan(bytes);
        };
        beginning.extend_from_slice(bytes);
        if beginning.len() < BYTE_ORDER_MARK.len() {
            return Ok(());
        }
        self.scan_beginning()
    }

    /// The plan of a body that is complete.
    ///
    /// # Errors
    /// CSV without a header line, or with a quote that is never closed; text that ends within a character.
    pub(super) fn finish(mut self) -> Result<Plan, CutError> {
        self.scan_beginning()?;
        if !self.text.is_complete() {
            return Err(not_utf8(self.line));
        }
        if let Some(row) = self.row {
            // A line feed ends the last row, unless a quote is open.
            if self.rows.end_of_row(b"\n").is_none() {
                return Err(CutError::new("unbalanced-quote", row.line, |line| {
                    format!("the row on line {line} has a quote that is never closed")
                }));
            }
            self.end_row(row)?;
        }
        if self.header_wanted {
            return Err(CutError::new("no-header", 1, |line| {
                format!("the file is empty: line {line} must be a header line")
            }));
        }
        self.chunks.extend(self.open);
        Ok(Plan {
            header: self.header.into(),
            chunks: self.chunks,
            rows: self.row_count,
        })
    }

    fn scan_beginning(&mut self) -> Result<(), CutError> {
        let Some(beginning) = self.beginning.take() else {
            return Ok(());
        };
        if beginning.starts_with(b"\xff\xfe") || beginning.starts_with(b"\xfe\xff") {
            return Err(CutError::new("not-utf-8", 1, |line| {
                format!("line {line} begins as UTF-16; save the file as UTF-8")
            }));
        }
        let text = beginning.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&beginning);
        self.position = (beginning.len() - text.len()) as u64;
        self.scan(text)
    }

    fn scan(&mut self, mut bytes: &[u8]) -> Result<(), CutError> {
        self.check_text(bytes)?;
        while !bytes.is_empty() {
            let row = match self.row {
                Some(row) => row,
                None => {
                    let blank = bytes.iter().take_while(|byte| self.rows.is_blank(**byte)).count();
                    let (between, rest) = bytes.split_at(blank);
                    self.skip(between);
                    bytes = rest;
                    if bytes.is_empty() {
                        break;
                    }
                    let (position, line) = (self.position, self.line);
                    *self.row.insert(RowStart { position, line })
                }
            };
            let end = self.rows.end_of_row(bytes);
            let (of_row, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
            self.pass(row, of_row)?;
            bytes = rest;
            if end.is_some() {
                self.end_row(row)?;
            }
        }
        Ok(())
    }

    fn check_text(&mut self, bytes: &[u8]) -> Result<(), CutError> {
        if let Err(at) = self.text.check(bytes) {
            return Err(not_utf8(self.line + count_line_feeds(&bytes[..at])));
        }
        if let Some(at) = bytes.iter().position(|byte| *byte == 0) {
            let line = self.line + count_line_feeds(&bytes[..at]);
            return Err(CutError::new("not-text", line, |line| {
                format!("line {line} has a zero byte; the file must be text in UTF-8, not UTF-16")
            }));
        }
        Ok(())
    }

    /// Passes what stands between rows. csv-core ends a row at a carriage return: the line feed behind it belongs to that row.
    fn skip(&mut self, bytes: &[u8]) {
        if let (b'\r', Some(b'\n'), Some(open)) = (self.last_byte, bytes.first(), &mut self.open)
            && open.end() == self.position
        {
            open.len += 1;
        }
        self.last_byte = *bytes.last().unwrap_or(&self.last_byte);
        self.position += bytes.len() as u64;
        self.line += count_line_feeds(bytes);
    }

    /// Passes bytes of a row.
    fn pass(&mut self, row: RowStart, bytes: &[u8]) -> Result<(), CutError> {
        self.last_byte = *bytes.last().unwrap_or(&self.last_byte);
        self.position += bytes.len() as u64;
        self.line += count_line_feeds(bytes);
        let size = self.position + self.carriage_return_slack() - row.position;
        if size + self.header.len() as u64 > self.limits.bytes as u64 {
            let limit = self.limits.bytes;
            return Err(CutError::new("row-too-large", row.line, |line| {
                format!("the row on line {line} is larger than {limit} bytes with its header; is a quote not closed?")
            }));
        }
        if self.header_wanted {
            self.header.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// The byte that the line feed behind a carriage return will take.
    fn carriage_return_slack(&self) -> u64 {
        u64::from(self.last_byte == b'\r')
    }

    fn end_row(&mut self, row: RowStart) -> Result<(), CutError> {
        self.row = None;
        if self.header_wanted {
            return self.end_header(row);
        }
        self.row_count += 1;
        let end = self.position + self.carriage_return_slack();
        if let Some(open) = &mut self.open {
            let size = end - open.start + self.header.len() as u64;
            if open.rows < self.limits.rows && size <= self.limits.bytes as u64 {
                open.rows += 1;
                open.len = (self.position - open.start) as u32;
                return Ok(());
            }
        }
        let next = Chunk {
            start: row.position,
            first_line: row.line,
            len: (self.position - row.position) as u32,
            rows: 1,
        };
        self.chunks.extend(self.open.replace(next));
        Ok(())
    }

    fn end_header(&mut self, row: RowStart) -> Result<(), CutError> {
        self.header_wanted = false;
        if !self.header.ends_with(b"\n") {
            self.header.push(b'\n');
        }
        if self.header.len() > self.limits.bytes / 2 {
            return Err(CutError::new("header-too-large", row.line, |line| {
                format!("the header on line {line} leaves no room for rows in a chunk")
            }));
        }
        Ok(())
    }
}

impl Chunk {
    fn end(&self) -> u64 {
        self.start + u64::from(self.len)
    }
}

/// Where rows end.
enum Rows {
    Csv(Box<csv_core::Reader>),
    Ndjson,
}

impl Rows {
    fn new(format: BodyFormat) -> Self {
        match format {
            BodyFormat::Csv => Self::Csv(Box::new(csv_core::Reader::new())),
            BodyFormat::Ndjson => Self::Ndjson,
        }
    }

    /// Whether a byte between two rows belongs to neither.
    fn is_blank(&self, byte: u8) -> bool {
        match self {
            Self::Csv(_) => matches!(byte, b'\r' | b'\n'),
            Self::Ndjson => byte.is_ascii_whitespace(),
        }
    }

    /// How many of `bytes`, which go on with a row, belong to it; `None` when it does not end in them.
    fn end_of_row(&mut self, bytes: &[u8]) -> Option<usize> {
        let Self::Csv(reader) = self else {
            return bytes.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
        };
        // What the fields hold is of no interest here, only how far csv-core reads.
        let (mut fields, mut ends) = ([0; 1024], [0; 64]);
        let mut read = 0;
        while read < bytes.len() {
            let (result, bytes_read, _, _) = reader.read_record(&bytes[read..], &mut fields, &mut ends);
            read += bytes_read;
            if matches!(result, csv_core::ReadRecordResult::Record) {
                return Some(read);
            }
        }
        None
    }
}

/// Whether a stream of bytes is UTF-8, whatever pieces it comes in.
#[derive(Default)]
struct TextCheck {
    /// The beginning of a character whose end has not come yet.
    begun: Vec<u8>,
}

impl TextCheck {
    /// # Errors
    /// Where in `bytes` they stop being UTF-8.
    fn check(&mut self, bytes: &[u8]) -> Result<(), usize> {
        let mut checked = 0;
        while !self.begun.is_empty() {
            let Some(byte) = bytes.get(checked) else { return Ok(()) };
            self.begun.push(*byte);
            checked += 1;
            match std::str::from_utf8(&self.begun) {
                Ok(_) => self.begun.clear(),
                Err(error) if error.error_len().is_some() => return Err(checked - 1),
                Err(_) => {}
            }
        }
        if let Err(error) = std::str::from_utf8(&bytes[checked..]) {
            let valid = checked + error.valid_up_to();
            if error.error_len().is_some() {
                return Err(valid);
            }
            self.begun.extend_from_slice(&bytes[valid..]);
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.begun.is_empty()
    }
}

fn not_utf8(line: u64) -> CutError {
    CutError::new("not-utf-8", line, |line| {
        format!("line {line} is not UTF-8; save the file as UTF-8")
    })
}

fn count_line_feeds(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    const LIMITS: Limits = Limits {
        rows: 500,
        bytes: 256 * 1024,
    };

    fn plan_in_pieces(format: BodyFormat, limits: Limits, body: &[u8], piece: usize) -> Result<Plan, CutError> {
        let mut cutter = Cutter::new(format, limits);
        for piece in body.chunks(piece) {
            cutter.push(piece)?;
        }
        cutter.finish()
    }

    /// The plan, which must not depend on the pieces that the body came in.
    fn plan(format: BodyFormat, limits: Limits, body: impl AsRef<[u8]>) -> Result<Plan, CutError> {
        let body = body.as_ref();
        let whole = plan_in_pieces(format, limits, body, body.len().max(1));
        for piece in [1, 2, 3, 7] {
            let in_pieces = plan_in_pieces(format, limits, body, piece);
            match (&whole, &in_pieces) {
                (Ok(_), Ok(_)) => assert_eq!(whole, in_pieces, "in pieces of {piece}"),
                // Of several mistakes another may be seen first.
                _ => assert!(
                    in_pieces.is_err() && whole.is_err(),
                    "in pieces of {piece}: {in_pieces:?}"
                ),
            }
        }
        whole
    }

    fn csv(body: impl AsRef<[u8]>) -> Plan {
        plan(BodyFormat::Csv, LIMITS, body).expect("a plan")
    }

    fn csv_error(body: impl AsRef<[u8]>) -> (&'static str, u64) {
        let error = plan(BodyFormat::Csv, LIMITS, body).expect_err("an error");
        assert!(
            error.detail.contains(&format!("line {}", error.line)),
            "{}",
            error.detail
        );
        (error.code, error.line)
    }

    fn text<'a>(body: &'a str, chunk: &Chunk) -> &'a str {
        &body[chunk.start as usize..chunk.end() as usize]
    }

    #[test]
    fn a_newline_within_quotes_ends_no_row() {
        let body = "name,note\nAda,\"first\nsecond\"\nBob,\"a \"\"quote\"\"\r\nand more\"\nCy,\n";
        let limits = Limits { rows: 1, ..LIMITS };
        let plan = plan(BodyFormat::Csv, limits, body).expect("a plan");
        let rows: Vec<_> = plan
            .chunks
            .iter()
            .map(|chunk| (text(body, chunk), chunk.first_line))
            .collect();
        let expected = [
            ("Ada,\"first\nsecond\"\n", 2),
            ("Bob,\"a \"\"quote\"\"\r\nand more\"\n", 4),
            ("Cy,\n", 6),
        ];
        assert_eq!(rows, expected);
        assert_eq!(&plan.header[..], b"name,note\n");
    }

    #[test]
    fn a_carriage_return_and_line_feed_stay_together() {
        let body = "a,b\r\n1,2\r\n3,4\r\n";
        let limits = Limits { rows: 1, ..LIMITS };
        let plan = plan(BodyFormat::Csv, limits, body).expect("a plan");
        let rows: Vec<_> = plan
            .chunks
            .iter()
            .map(|chunk| (text(body, chunk), chunk.first_line))
            .collect();
        assert_eq!(rows, [("1,2\r\n", 2), ("3,4\r\n", 3)]);
    }

    #[test]
    fn a_chunk_is_full_at_exactly_its_rows() {
        for (rows, expected) in [
            (499, vec![499]),
            (500, vec![500]),
            (501, vec![500, 1]),
            (1000, vec![500, 500]),
        ] {
            let plan = csv(format!("a\n{}", "x\n".repeat(rows)));
            let sizes: Vec<u32> = plan.chunks.iter().map(|chunk| chunk.rows).collect();
            assert_eq!((sizes, plan.rows), (expected, rows as u64));
        }
    }

    #[test]
    fn a_chunk_is_full_at_exactly_its_bytes() {
        let limits = Limits { rows: 500, bytes: 20 };
        // The header takes 4, each row 8: two rows fit exactly.
        for end in ["\n", "\r"] {
            let header = "abc\n";
            let row = format!("1234567{end}");
            let body = header.to_owned() + &row.repeat(5);
            let plan = plan(BodyFormat::Csv, limits, &body).expect("a plan");
            let sizes: Vec<usize> = plan
                .chunks
                .iter()
                .map(|chunk| chunk.len as usize + header.len())
                .collect();
            let expected: &[usize] = if end == "\n" {
                &[20, 20, 12]
            } else {
                &[12, 12, 12, 12, 12]
            };
            assert_eq!(sizes, expected, "{end:?}");
        }
        let crlf = plan(BodyFormat::Csv, limits, "abc\r\n123456\r\n123456\r\n123456").expect("a plan");
        assert!(
            crlf.chunks
                .iter()
                .all(|chunk| chunk.len as usize + crlf.header.len() <= 20)
        );
    }

    #[test]
    fn characters_of_several_bytes_may_stand_at_every_limit() {
        let limits = Limits { rows: 500, bytes: 32 };
        let body = format!("näme\n{}", "Žofie 😀\nčaj\n".repeat(20));
        let plan = plan(BodyFormat::Csv, limits, &body).expect("a plan");
        let chunks: String = plan.chunks.iter().map(|chunk| text(&body, chunk)).collect();
        assert_eq!(format!("näme\n{chunks}"), body);
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_header() {
        let plan = csv("\u{feff}a,b\n1,2\n");
        assert_eq!(&plan.header[..], b"a,b\n");
        assert_eq!((plan.chunks[0].start, plan.chunks[0].len), (7, 4));
    }

    #[test]
    fn blank_lines_are_no_rows_and_shift_no_line_number() {
        let body = "\n\na\n\n\n1\n\n2\n\n";
        let limits = Limits { rows: 1, ..LIMITS };
        let plan = plan(BodyFormat::Csv, limits, body).expect("a plan");
        let lines: Vec<u64> = plan.chunks.iter().map(|chunk| chunk.first_line).collect();
        assert_eq!((plan.rows, lines), (2, vec![6, 8]));
    }

    #[test]
    fn a_header_alone_is_a_job_without_rows() {
        for body in ["a,b", "a,b\n", "a,b\r\n\r\n"] {
            let plan = csv(body);
            assert_eq!((plan.chunks.len(), plan.rows), (0, 0));
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        assert_eq!(csv_error(""), ("no-header", 1));
        assert_eq!(csv_error("\n\r\n"), ("no-header", 1));
        assert_eq!(csv_error("a\n1\n\"2\n3\n4"), ("unbalanced-quote", 3));
        assert_eq!(csv_error(b"a\n1\n\xe9t\xe9\n"), ("not-utf-8", 3));
        assert_eq!(csv_error(b"a\n1\n2\xc3"), ("not-utf-8", 3));
        assert_eq!(csv_error(b"\xff\xfea\0,\0b\0"), ("not-utf-8", 1));
        assert_eq!(csv_error(b"\xfe\xff\0a"), ("not-utf-8", 1));
        assert_eq!(csv_error(b"a\0\n\0"), ("not-text", 1));
        assert_eq!(
            csv_error(format!("a\n1\n{}\n", "x".repeat(256 * 1024))),
            ("row-too-large", 3)
        );
        assert_eq!(
            csv_error(format!("a\n1\n\"{}", "x\n".repeat(256 * 1024))),
            ("row-too-large", 3)
        );
        assert_eq!(csv_error("x".repeat(200 * 1024)), ("header-too-large", 1));
    }

    #[test]
    fn lines_of_json_are_rows_and_empty_ones_are_not() {
        let body = "{\"a\":1}\r\n\n  \n[2]\n\n3";
        let limits = Limits { rows: 2, ..LIMITS };
        let plan = plan(BodyFormat::Ndjson, limits, body).expect("a plan");
        let chunks: Vec<_> = plan
            .chunks
            .iter()
            .map(|c| (text(body, c), c.first_line, c.rows))
            .collect();
        assert_eq!(chunks, [("{\"a\":1}\r\n\n  \n[2]\n", 1, 2), ("3", 6, 1)]);
        assert!(plan.header.is_empty());
        assert_eq!(
            super::tests::plan(BodyFormat::Ndjson, LIMITS, " \n")
                .expect("a plan")
                .rows,
            0
        );
    }

    #[test]
    fn chunks_of_random_bodies_are_their_rows() {
        for seed in 0..300 {
            let mut random = StdRng::seed_from_u64(seed);
            let end = ["\n", "\r\n"][random.random_range(0..2)];
            let limits = Limits {
                rows: random.random_range(1..20),
                bytes: random.random_range(200..600),
            };
            let rows: Vec<String> = (0..random.random_range(0..100))
                .map(|_| random_row(&mut random) + end)
                .collect();
            let header = format!("name,note{end}");
            let body = header.clone() + &rows.concat();
            let plan = plan(BodyFormat::Csv, limits, &body).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert_eq!(plan.rows, rows.len() as u64, "seed {seed}");
            let mut rest = rows.as_slice();
            let mut line = 2;
            for chunk in &plan.chunks {
                let (of_chunk, behind) = rest.split_at(chunk.rows as usize);
                rest = behind;
                assert_eq!(text(&body, chunk), of_chunk.concat(), "seed {seed}");
                assert_eq!(chunk.first_line, line, "seed {seed}");
                assert!(chunk.rows <= limits.rows && chunk.len as usize + plan.header.len() <= limits.bytes);
                line += count_line_feeds(of_chunk.concat().as_bytes());
            }
            assert!(rest.is_empty(), "seed {seed}");
        }
    }

    fn random_row(random: &mut StdRng) -> String {
        const PIECES: &[&str] = &["a", "é", "😀", " ", "\"\"", ",", "\n", "\r\n", "\r"];
        let mut quoted = || {
            let pieces: String = (0..random.random_range(0..12))
                .map(|_| PIECES[random.random_range(0..PIECES.len())])
                .collect();
            format!("\"{pieces}\"")
        };
        format!("x{},{}", "y".repeat(quoted().len()), quoted())
    }
}
