//! The view: its columns, the changes of its rows, and both as SQL.
//!
//! Each row also has `event_topic`, `event_partition` and `event_offset`, the place of the event that wrote it last. No statement here changes
//! or removes a row that a later event of the same partition has written.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;

use serde::Serialize;
use serde_json::Value;

use super::database::{Cell, Statement};
use crate::log::TopicPartition;
use crate::patterns::Error;
use crate::patterns::consumer::Cause;

/// The longest name of a view or column, so that the names made of it fit into PostgreSQL's 63 bytes.
const MAX_NAME_BYTES: usize = 48;

/// Columns at most.
const MAX_COLUMNS: usize = 100;

/// Rows of one statement. Few sizes, so that each is prepared once; times [`MAX_COLUMNS`] they stay below what SQLite takes.
const STATEMENT_ROWS: [usize; 3] = [64, 8, 1];

/// The columns that each row has beside its own.
const PLACE: [&str; 3] = ["event_topic", "event_partition", "event_offset"];

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColumnType {
    /// Text. A list or an object of a row becomes its JSON.
    Text,
    /// A whole number of 64 bits with its sign.
    Integer,
    /// A floating point number of 64 bits.
    Real,
    /// True or false. In SQLite 1 or 0.
    Boolean,
}

/// A view as it should be: its name, its columns, and by which of them its rows are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ViewSpec {
    name: String,
    /// The first of them are the key.
    columns: Vec<(String, ColumnType)>,
    keys: usize,
    indexes: Vec<Vec<String>>,
}

/// What an event does to a view.
#[derive(Clone, Debug, PartialEq)]
pub enum Change<R> {
    /// This is the row of its key from now on. Its fields are the columns: one that it does not name is NULL.
    Upsert(R),
    /// The row with these values of the key's columns goes; with fewer values than those, all rows whose keys begin with them.
    Delete(Vec<Value>),
}

impl<R> Change<R> {
    /// The row with this key goes, or, with fewer values than the key has columns, all rows whose keys begin with them.
    pub fn delete(key: impl IntoIterator<Item = impl Into<Value>>) -> Self {
        Self::Delete(key.into_iter().map(Into::into).collect())
    }
}

/// A change in the values of columns.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum RowChange {
    Upsert(Vec<Cell>),
    /// As many as the key has columns, or fewer.
    Delete(Vec<Cell>),
}

impl ViewSpec {
    /// A view without columns. In a name there are 1 to 48 of `a-z0-9_`, a letter first.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            columns: Vec::new(),
            keys: 0,
            indexes: Vec::new(),
        }
    }

    /// Adds a column to the key, which one row has at most. It is never NULL.
    #[must_use]
    pub fn key(mut self, name: impl Into<String>, column_type: ColumnType) -> Self {
        self.columns.insert(self.keys, (name.into(), column_type));
        self.keys += 1;
        self
    }

    /// Adds another column.
    #[must_use]
    pub fn column(mut self, name: impl Into<String>, column_type: ColumnType) -> Self {
        self.columns.push((name.into(), column_type));
        self
    }

    /// Adds an index of columns by which rows are looked for. The key has one anyway.
    #[must_use]
    pub fn index(mut self, columns: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.indexes.push(columns.into_iter().map(Into::into).collect());
        self
    }

    /// Its name: that of the SQL view which readers ask.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// # Errors
    /// [`Error::Setting`] for what no database would take.
    pub(super) fn check(&self) -> Result<(), Error> {
        let invalid = |reason| Err(self.invalid(reason));
        let names: HashSet<&str> = self.columns.iter().map(|(name, _)| name.as_str()).collect();
        for name in names.iter().copied().chain([self.name.as_str()]) {
            self.check_name(name)?;
        }
        if names.len() < self.columns.len() || PLACE.iter().any(|place| names.contains(place)) {
            return invalid(format!(
                "a column has the name of another, or one of {}",
                PLACE.join(", ")
            ));
        }
        if self.keys == 0 || self.columns.len() > MAX_COLUMNS {
            return invalid(format!("a view has a key, and {MAX_COLUMNS} columns at most"));
        }
        let mut columns = self.indexes.iter().flatten();
        if let Some(column) = columns.find(|column| !names.contains(column.as_str())) {
            return invalid(format!("there is no column {column} for an index"));
        }
        match self.columns[..self.keys]
            .iter()
            .find(|(_, key)| *key == ColumnType::Real)
        {
            Some((name, _)) => invalid(format!("{name} is of the key and no exact value")),
            None => Ok(()),
        }
    }

    /// # Errors
    /// [`Error::Setting`] for a name that would need care.
    pub(super) fn check_name(&self, name: &str) -> Result<(), Error> {
        let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        let is_legal = name.starts_with(|first: char| first.is_ascii_lowercase())
            && name.len() <= MAX_NAME_BYTES
            && name.bytes().all(legal);
        match is_legal {
            true => Ok(()),
            false => Err(self.invalid(format!(
                "{name:?} is not made of 1 to {MAX_NAME_BYTES} of a-z0-9_, a letter first"
            ))),
        }
    }

    fn invalid(&self, reason: String) -> Error {
        Error::Setting {
            setting: "view",
            reason: format!("{}: {reason}", self.name),
        }
    }

    /// The change as values of columns.
    ///
    /// # Errors
    /// The row or key does not fit the columns.
    pub(super) fn encode<R: Serialize>(&self, change: Change<R>) -> Result<RowChange, Cause> {
        match change {
            Change::Upsert(row) => {
                let Value::Object(mut fields) = serde_json::to_value(row)? else {
                    return Err("a row is a struct or a map, whose fields are the columns".into());
                };
                let cell = |(place, column): (usize, &(String, ColumnType))| {
                    let (name, column_type) = column;
                    let value = fields.remove(name).unwrap_or(Value::Null);
                    self.cell(place, name, *column_type, value)
                };
                let cells = self.columns.iter().enumerate().map(cell).collect::<Result<_, _>>()?;
                match fields.keys().next() {
                    Some(name) => Err(format!("the view {} has no column for {name}", self.name).into()),
                    None => Ok(RowChange::Upsert(cells)),
                }
            }
            Change::Delete(key) => {
                if key.is_empty() || key.len() > self.keys {
                    let columns = self.keys;
                    return Err(format!("a key of {} values for {columns} columns", key.len()).into());
                }
                let values = key.into_iter().zip(&self.columns).enumerate();
                let cell = |(place, (value, (name, column_type))): (usize, (Value, &(String, ColumnType)))| {
                    self.cell(place, name, *column_type, value)
                };
                Ok(RowChange::Delete(values.map(cell).collect::<Result<_, _>>()?))
            }
        }
    }

    fn cell(&self, place: usize, name: &str, column_type: ColumnType, value: Value) -> Result<Cell, Cause> {
        if value.is_null() && place < self.keys {
            return Err(format!("the key's column {name} is null").into());
        }
        let wrong = |value: &Value| Cause::from(format!("the column {name} is no {column_type:?}: {value}"));
        Ok(match (column_type, value) {
            (ColumnType::Text, Value::Null) => Cell::Text(None),
            (ColumnType::Text, Value::String(text)) => Cell::Text(Some(text)),
            (ColumnType::Text, value @ (Value::Array(_) | Value::Object(_))) => Cell::Text(Some(value.to_string())),
            (ColumnType::Integer, Value::Null) => Cell::Integer(None),
            (ColumnType::Integer, value) => Cell::Integer(Some(value.as_i64().ok_or_else(|| wrong(&value))?)),
            (ColumnType::Real, Value::Null) => Cell::Real(None),
            (ColumnType::Real, value) => Cell::Real(Some(value.as_f64().ok_or_else(|| wrong(&value))?)),
            (ColumnType::Boolean, Value::Null) => Cell::Boolean(None),
            (ColumnType::Boolean, Value::Bool(yes)) => Cell::Boolean(Some(yes)),
            (_, value) => return Err(wrong(&value)),
        })
    }

    /// The columns and indexes as text, equal for equal ones.
    pub(super) fn definition(&self) -> String {
        let mut text = self.columns_with_types();
        for index in &self.indexes {
            let _ = write!(text, "; {}", quoted(index)); // A String takes all text.
        }
        text
    }

    /// The statements that make the table of a generation.
    pub(super) fn create(&self, generation: i64) -> Vec<Statement> {
        let table = self.table(generation);
        let columns = self.columns_with_types();
        let key = quoted(self.columns[..self.keys].iter().map(|(name, _)| name));
        let create = format!(
            "CREATE TABLE {table} ({columns}, event_topic TEXT NOT NULL, event_partition BIGINT NOT NULL, \
             event_offset BIGINT NOT NULL, PRIMARY KEY ({key}))"
        );
        let mut statements = vec![Statement::new(create)];
        for (number, index) in self.indexes.iter().enumerate() {
            let name = format!("\"{}_g{generation}_{number}\"", self.name);
            statements.push(Statement::new(format!(
                "CREATE INDEX {name} ON {table} ({})",
                quoted(index)
            )));
        }
        statements
    }

    pub(super) fn drop(&self, generation: i64) -> Statement {
        Statement::new(format!("DROP TABLE IF EXISTS {}", self.table(generation)))
    }

    /// What the SQL view of a generation selects.
    pub(super) fn select(&self, generation: i64) -> String {
        let columns = quoted(self.columns.iter().map(|(name, _)| name));
        format!("SELECT {columns} FROM {}", self.table(generation))
    }

    /// The name of the SQL view, quoted.
    pub(super) fn quoted_name(&self) -> String {
        format!("\"{}\"", self.name)
    }

    /// The statements that change the rows of a generation, in the order of the changes. Of several changes of a key only the last is made.
    pub(super) fn apply<'a>(
        &self,
        generation: i64,
        changes: impl Iterator<Item = (&'a TopicPartition, i64, &'a RowChange)>,
    ) -> Vec<Statement> {
        let mut statements = Vec::new();
        // In the order of the keys: two instances that change the same rows lock them in the same order.
        let mut last: BTreeMap<String, Placed<'_>> = BTreeMap::new();
        for (partition, offset, change) in changes {
            let placed = Placed {
                partition,
                offset,
                change,
            };
            let key = match change {
                RowChange::Upsert(cells) => &cells[..self.keys],
                RowChange::Delete(key) => key,
            };
            if key.len() < self.keys {
                self.write(generation, &mut last, &mut statements);
                statements.push(self.delete(generation, key, &placed));
            } else {
                last.insert(format!("{key:?}"), placed);
            }
        }
        self.write(generation, &mut last, &mut statements);
        statements
    }

    fn write(&self, generation: i64, last: &mut BTreeMap<String, Placed<'_>>, statements: &mut Vec<Statement>) {
        let mut upserts = Vec::with_capacity(last.len());
        for placed in std::mem::take(last).into_values() {
            match placed.change {
                RowChange::Upsert(cells) => upserts.push((cells, placed)),
                RowChange::Delete(key) => statements.push(self.delete(generation, key, &placed)),
            }
        }
        let mut rest = upserts.as_slice();
        for rows in STATEMENT_ROWS {
            while let Some((some, others)) = rest.split_at_checked(rows) {
                let cells = |(cells, placed): &(&Vec<Cell>, Placed<'_>)| {
                    let cells: Vec<Cell> = cells.iter().cloned().chain(placed.cells()).collect();
                    cells
                };
                let cells = some.iter().flat_map(cells);
                statements.push(Statement::new(self.upsert(generation, rows)).cells(cells));
                rest = others;
            }
        }
    }

    fn upsert(&self, generation: i64, rows: usize) -> String {
        let table = self.table(generation);
        let names: Vec<&str> = self
            .columns
            .iter()
            .map(|(name, _)| name.as_str())
            .chain(PLACE)
            .collect();
        let row = |row: usize| {
            let values: Vec<_> = (1..=names.len())
                .map(|n| format!("${}", row * names.len() + n))
                .collect();
            format!("({})", values.join(", "))
        };
        let values: Vec<_> = (0..rows).map(row).collect();
        let set = names[self.keys..].iter();
        let set: Vec<_> = set.map(|name| format!("\"{name}\" = excluded.\"{name}\"")).collect();
        format!(
            "INSERT INTO {table} AS old ({}) VALUES {} ON CONFLICT ({}) DO UPDATE SET {} \
             WHERE old.event_topic <> excluded.event_topic OR old.event_partition <> excluded.event_partition \
                OR old.event_offset < excluded.event_offset",
            quoted(&names),
            values.join(", "),
            quoted(&names[..self.keys]),
            set.join(", ")
        )
    }

    fn delete(&self, generation: i64, key: &[Cell], placed: &Placed<'_>) -> Statement {
        let keys = self.columns.iter().zip(1..).take(key.len());
        let keys: Vec<_> = keys.map(|((name, _), n)| format!("\"{name}\" = ${n}")).collect();
        let (topic, partition, offset) = (key.len() + 1, key.len() + 2, key.len() + 3);
        let delete = format!(
            "DELETE FROM {} WHERE {} AND (event_topic <> ${topic} OR event_partition <> ${partition} OR event_offset <= ${offset})",
            self.table(generation),
            keys.join(" AND ")
        );
        Statement::new(delete).cells(key.iter().cloned()).cells(placed.cells())
    }

    fn table(&self, generation: i64) -> String {
        format!("\"{}_g{generation}\"", self.name)
    }

    fn columns_with_types(&self) -> String {
        let column = |(place, (name, column_type)): (usize, &(String, ColumnType))| {
            let sql = match column_type {
                ColumnType::Text => "TEXT",
                ColumnType::Integer => "BIGINT",
                ColumnType::Real => "DOUBLE PRECISION",
                ColumnType::Boolean => "BOOLEAN",
            };
            let null = if place < self.keys { " NOT NULL" } else { "" };
            format!("\"{name}\" {sql}{null}")
        };
        let columns: Vec<_> = self.columns.iter().enumerate().map(column).collect();
        columns.join(", ")
    }
}

/// A change and where its event stands.
struct Placed<'a> {
    partition: &'a TopicPartition,
    offset: i64,
    change: &'a RowChange,
}

impl Placed<'_> {
    fn cells(&self) -> [Cell; 3] {
        let TopicPartition { topic, partition } = self.partition;
        [(&**topic).into(), (*partition).into(), self.offset.into()]
    }
}

fn quoted(names: impl IntoIterator<Item = impl AsRef<str>>) -> String {
    let names = names.into_iter().map(|name| format!("\"{}\"", name.as_ref()));
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec() -> ViewSpec {
        ViewSpec::new("installed_apps")
            .key("site", ColumnType::Text)
            .key("app", ColumnType::Text)
            .column("version", ColumnType::Text)
            .column("seats", ColumnType::Integer)
    }

    #[test]
    fn a_row_that_does_not_fit_its_columns_is_refused() {
        let encode = |row: Value| spec().encode(Change::Upsert(row)).map_err(|error| error.to_string());
        let text = |text: &str| Cell::Text(Some(text.to_owned()));
        let row = json!({"site": "s", "app": "a", "version": ["1", 2]});
        let cells = vec![text("s"), text("a"), text(r#"["1",2]"#), Cell::Integer(None)];
        assert_eq!(encode(row), Ok(RowChange::Upsert(cells)));
        for (row, reason) in [
            (json!({"site": "s"}), "the key's column app is null"),
            (json!({"site": "s", "app": 1}), "the column app is no Text: 1"),
            (
                json!({"site": "s", "app": "a", "seats": 1.5}),
                "the column seats is no Integer: 1.5",
            ),
            (
                json!({"site": "s", "app": "a", "sits": 1}),
                "the view installed_apps has no column for sits",
            ),
            (json!("s"), "a row is a struct or a map, whose fields are the columns"),
        ] {
            assert_eq!(encode(row), Err(reason.to_owned()));
        }
        let delete = |key: &[&str]| spec().encode(Change::<Value>::delete(key.iter().copied()));
        assert!(delete(&["s"]).is_ok() && delete(&["s", "a"]).is_ok());
        assert!(delete(&[]).is_err() && delete(&["s", "a", "1"]).is_err());
    }

    #[test]
    fn names_that_would_need_care_are_refused() {
        assert!(spec().check().is_ok());
        for spec in [
            ViewSpec::new("apps"),
            ViewSpec::new("Apps").key("site", ColumnType::Text),
            ViewSpec::new("apps; drop").key("site", ColumnType::Text),
            ViewSpec::new("apps").key("event_offset", ColumnType::Text),
            ViewSpec::new("apps").key("weight", ColumnType::Real),
            spec().column("app", ColumnType::Text),
            spec().index(["nothing"]),
        ] {
            assert!(spec.check().is_err(), "{spec:?}");
        }
    }

    #[test]
    fn the_last_change_of_a_key_is_made_and_those_around_a_wide_delete_keep_their_order() {
        let partition = TopicPartition::new("apps", 0);
        let upsert = |app: &str| {
            let row = json!({"site": "s", "app": app});
            spec().encode(Change::Upsert(row)).expect("it fits")
        };
        let delete = |key: &[&str]| {
            spec()
                .encode(Change::<Value>::delete(key.iter().copied()))
                .expect("it fits")
        };
        let changes = [
            upsert("b"),
            upsert("a"),
            delete(&["s", "b"]),
            delete(&["s"]),
            upsert("c"),
        ];
        let placed = changes
            .iter()
            .zip(0..)
            .map(|(change, offset)| (&partition, offset, change));
        let statements = spec().apply(1, placed);
        let words: Vec<_> = statements
            .iter()
            .map(|statement| (statement.sql().split(' ').next().expect("a word"), statement.len()))
            .collect();
        assert_eq!(words, [("DELETE", 5), ("INSERT", 7), ("DELETE", 4), ("INSERT", 7)]);
    }
}
