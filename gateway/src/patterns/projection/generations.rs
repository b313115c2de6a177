//! What a database knows of a view: its generations, and how far each has read every partition.
//!
//! ```text
//! projection_generations   view, generation, version, state: building ─▶ live ─▶ old
//! projection_positions     view, generation, topic, partition: the next offset
//! {view}_g{generation}     the rows
//! {view}                   a SQL view of the rows of the live generation
//! ```
//! Invariant: the rows of a generation are what its events say up to the positions that stand beside them. Positions and rows change in one
//! transaction, which begins by moving the positions from where its author believes them to be: of two authors one does nothing.

use std::collections::BTreeMap;

use super::database::{Cell, Database, DatabaseError, Statement};
use super::view::{RowChange, ViewSpec};
use crate::log::{TopicDescription, TopicPartition};
use crate::patterns::Error;

const TABLES: [&str; 2] = [
    "CREATE TABLE IF NOT EXISTS projection_generations (view_name TEXT NOT NULL, generation BIGINT NOT NULL, \
     version BIGINT NOT NULL, definition TEXT NOT NULL, topics TEXT NOT NULL, state TEXT NOT NULL, \
     PRIMARY KEY (view_name, generation))",
    "CREATE TABLE IF NOT EXISTS projection_positions (view_name TEXT NOT NULL, generation BIGINT NOT NULL, \
     topic TEXT NOT NULL, topic_id TEXT NOT NULL, topic_partition BIGINT NOT NULL, next_offset BIGINT NOT NULL, \
     PRIMARY KEY (view_name, generation, topic, topic_partition))",
];

/// Where each partition is read on.
pub(super) type Positions = BTreeMap<TopicPartition, i64>;

/// A partition's way in one transaction.
#[derive(Clone, Debug)]
pub(super) struct Move {
    pub(super) partition: TopicPartition,
    pub(super) from: i64,
    pub(super) to: i64,
}

/// A view in a database.
#[derive(Clone, Debug)]
pub(super) struct Generations {
    pub(super) database: Database,
    pub(super) view: ViewSpec,
    pub(super) version: u32,
    /// The identity of each topic by its name.
    pub(super) topics: BTreeMap<String, String>,
}

/// One of its generations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Generation {
    pub(super) number: i64,
    pub(super) state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nobody reads it yet.
    Building,
    /// It is what readers see.
    Live,
    /// Another has taken its place, or will: it is of an older version than the live one.
    Old,
}

/// A generation as it stands in its table.
struct Row {
    generation: Generation,
    version: i64,
    definition: String,
    topics: String,
}

impl Generations {
    pub(super) fn new<'a>(
        database: Database,
        view: ViewSpec,
        version: u32,
        topics: impl IntoIterator<Item = &'a TopicDescription>,
    ) -> Self {
        let identity = |topic: &TopicDescription| (topic.name.clone(), format!("{:?}", topic.id));
        Self {
            database,
            view,
            version,
            topics: topics.into_iter().map(identity).collect(),
        }
    }

    /// The generation to project into: the live one if it is of this version and these topics, else the one that is built for them, else a
    /// new one. Made anew under its old name, a topic is another one.
    ///
    /// # Errors
    /// [`Error::Superseded`], [`Error::Setting`] for columns that have changed and a version that has not.
    pub(super) async fn find(&self) -> Result<Generation, Error> {
        let tables = TABLES.map(Statement::new);
        self.database.transact(tables.into()).await?;
        loop {
            let rows = self.rows().await?;
            self.check_version(&rows)?;
            let ours = rows.iter().filter(|row| row.version == i64::from(self.version));
            if ours.clone().any(|row| row.definition != self.definition()) {
                let (view, version) = (self.view.name(), self.version);
                return Err(Error::Setting {
                    setting: "version",
                    reason: format!("columns or topics of {view} have changed: version {version} has to be raised"),
                });
            }
            let of_topics = ours.filter(|row| row.topics == self.topics());
            let in_state = |state| of_topics.clone().rfind(|row| row.generation.state == state);
            if let Some(row) = in_state(State::Live).or_else(|| in_state(State::Building)) {
                return Ok(row.generation);
            }
            // Nothing when another instance has made it meanwhile.
            if let Some(generation) = self.create_after(&rows).await? {
                return Ok(generation);
            }
        }
    }

    /// A new generation beside those there are.
    ///
    /// # Errors
    /// [`Error::Superseded`].
    pub(super) async fn create(&self) -> Result<Generation, Error> {
        loop {
            let rows = self.rows().await?;
            self.check_version(&rows)?;
            if let Some(generation) = self.create_after(&rows).await? {
                return Ok(generation);
            }
        }
    }

    async fn create_after(&self, rows: &[Row]) -> Result<Option<Generation>, Error> {
        let number = rows.iter().map(|row| row.generation.number).max().unwrap_or(0) + 1;
        let insert = "INSERT INTO projection_generations (view_name, generation, version, definition, topics, state) \
                      VALUES ($1, $2, $3, $4, $5, 'building') ON CONFLICT DO NOTHING";
        let mut statements = vec![
            Statement::new(insert)
                .cell(self.view.name())
                .cell(number)
                .cell(i64::from(self.version))
                .cell(self.definition().as_str())
                .cell(self.topics().as_str())
                .must_change(1),
        ];
        statements.extend(self.view.create(number));
        let is_made = self.database.transact(statements).await?;
        Ok(is_made.then_some(Generation {
            number,
            state: State::Building,
        }))
    }

    fn check_version(&self, rows: &[Row]) -> Result<(), Error> {
        let newer = |row: &&Row| row.generation.state == State::Live && row.version > i64::from(self.version);
        match rows.iter().find(newer) {
            Some(row) => Err(Error::Superseded {
                view: self.view.name().to_owned(),
                version: self.version,
                live: row.version,
            }),
            None => Ok(()),
        }
    }

    async fn rows(&self) -> Result<Vec<Row>, DatabaseError> {
        let select = "SELECT generation, version, definition, topics, state FROM projection_generations \
                      WHERE view_name = $1 ORDER BY generation";
        let rows = self
            .database
            .query(Statement::new(select).cell(self.view.name()))
            .await?;
        let row = |cells: Vec<Cell>| {
            let [number, version, definition, topics, state] = columns(cells)?;
            Ok(Row {
                generation: Generation {
                    number: number.integer()?,
                    state: match state.text()?.as_str() {
                        "building" => State::Building,
                        "live" => State::Live,
                        _ => State::Old,
                    },
                },
                version: version.integer()?,
                definition: definition.text()?,
                topics: topics.text()?,
            })
        };
        rows.into_iter().map(row).collect()
    }

    /// What has become of a generation.
    pub(super) async fn state(&self, generation: i64) -> Result<State, DatabaseError> {
        let rows = self.rows().await?;
        let ours = rows.iter().find(|row| row.generation.number == generation);
        let is_newer = |row: &Row| row.generation.state == State::Live && row.version > i64::from(self.version);
        Ok(match ours {
            Some(row) if !rows.iter().any(is_newer) => row.generation.state,
            _ => State::Old,
        })
    }

    /// Where a generation reads on, in the partitions that it knows.
    pub(super) async fn positions(&self, generation: i64) -> Result<Positions, DatabaseError> {
        let select = "SELECT topic, topic_partition, next_offset FROM projection_positions \
                      WHERE view_name = $1 AND generation = $2";
        let select = Statement::new(select).cell(self.view.name()).cell(generation);
        let position = |cells: Vec<Cell>| {
            let [topic, partition, next_offset] = columns(cells)?;
            let partition = i32::try_from(partition.integer()?)
                .map_err(|_| DatabaseError::Broken("a partition has no such number".to_owned()))?;
            Ok((TopicPartition::new(topic.text()?, partition), next_offset.integer()?))
        };
        self.database.query(select).await?.into_iter().map(position).collect()
    }

    /// Takes note of partitions that a generation does not know yet.
    pub(super) async fn begin(&self, generation: i64, starts: &Positions) -> Result<(), DatabaseError> {
        let insert = "INSERT INTO projection_positions (view_name, generation, topic, topic_id, topic_partition, next_offset) \
                      VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING";
        let begin = |(partition, start): (&TopicPartition, &i64)| {
            Statement::new(insert)
                .cell(self.view.name())
                .cell(generation)
                .cell(&*partition.topic)
                .cell(self.topics.get(&*partition.topic).map_or("", String::as_str))
                .cell(partition.partition)
                .cell(*start)
        };
        self.database
            .transact(starts.iter().map(begin).collect())
            .await
            .map(drop)
    }

    /// What moves positions from where they are believed to be, and changes rows. The transaction does nothing when one is elsewhere.
    pub(super) fn statements<'a>(
        &self,
        generation: i64,
        moves: &[Move],
        changes: impl Iterator<Item = (&'a TopicPartition, i64, &'a RowChange)>,
    ) -> Vec<Statement> {
        let update = "UPDATE projection_positions SET next_offset = $1 \
                      WHERE view_name = $2 AND generation = $3 AND topic = $4 AND topic_partition = $5 AND next_offset = $6";
        let update = |Move { partition, from, to }: &Move| {
            Statement::new(update)
                .cell(*to)
                .cell(self.view.name())
                .cell(generation)
                .cell(&*partition.topic)
                .cell(partition.partition)
                .cell(*from)
                .must_change(1)
        };
        let mut statements: Vec<_> = moves.iter().map(update).collect();
        statements.extend(self.view.apply(generation, changes));
        statements
    }

    /// Makes a generation the live one, unless that would take readers back: the live one has read on further, or is of a newer version.
    /// False: not now.
    pub(super) async fn switch(&self, generation: i64) -> Result<bool, DatabaseError> {
        // A row that is written stays locked, so that what is compared stays so.
        let hold = "UPDATE projection_generations SET state = state WHERE view_name = $1";
        let hold_positions = "UPDATE projection_positions SET next_offset = next_offset WHERE view_name = $1";
        let make_live = "UPDATE projection_generations SET state = 'live' \
             WHERE view_name = $1 AND generation = $2 AND state = 'building' \
               AND NOT EXISTS (SELECT 1 FROM projection_generations live WHERE live.view_name = $1 \
                   AND live.state = 'live' AND live.version > projection_generations.version) \
               AND NOT EXISTS (SELECT 1 FROM projection_generations live \
                   JOIN projection_positions there ON there.view_name = $1 AND there.generation = live.generation \
                   JOIN projection_positions here ON here.view_name = $1 AND here.generation = $2 \
                        AND here.topic_id = there.topic_id AND here.topic_partition = there.topic_partition \
                   WHERE live.view_name = $1 AND live.state = 'live' AND here.next_offset < there.next_offset)";
        let retire = "UPDATE projection_generations SET state = 'old' \
                      WHERE view_name = $1 AND generation <> $2 AND state = 'live'";
        let of_view = |sql: &'static str| Statement::new(sql).cell(self.view.name());
        let mut statements = vec![
            of_view(hold),
            of_view(hold_positions),
            of_view(make_live).cell(generation).must_change(1),
            of_view(retire).cell(generation),
        ];
        let view = self
            .database
            .replace_view(&self.view.quoted_name(), &self.view.select(generation));
        statements.extend(view);
        self.database.transact(statements).await
    }

    /// Drops the generations before one.
    pub(super) async fn drop_before(&self, generation: i64) -> Result<(), DatabaseError> {
        for row in self.rows().await? {
            let number = row.generation.number;
            if number >= generation {
                continue;
            }
            let remove = |table: &str| {
                let delete = format!("DELETE FROM {table} WHERE view_name = $1 AND generation = $2");
                Statement::new(delete).cell(self.view.name()).cell(number)
            };
            // First the positions: who still projects into it finds them gone before its table is.
            let statements = vec![
                remove("projection_positions"),
                remove("projection_generations"),
                self.view.drop(number),
            ];
            self.database.transact(statements).await?;
        }
        Ok(())
    }

    /// Drops all generations, and the SQL view.
    pub(super) async fn remove(&self) -> Result<(), DatabaseError> {
        self.database.transact(TABLES.map(Statement::new).into()).await?;
        let mut statements = vec![Statement::new(format!(
            "DROP VIEW IF EXISTS {}",
            self.view.quoted_name()
        ))];
        for table in ["projection_positions", "projection_generations"] {
            let delete = format!("DELETE FROM {table} WHERE view_name = $1");
            statements.push(Statement::new(delete).cell(self.view.name()));
        }
        let rows = self.rows().await?;
        statements.extend(rows.iter().map(|row| self.view.drop(row.generation.number)));
        self.database.transact(statements).await.map(drop)
    }

    /// What may not change unless the version does.
    fn definition(&self) -> String {
        let topics: Vec<_> = self.topics.keys().map(String::as_str).collect();
        format!("{}; of {}", self.view.definition(), topics.join(", "))
    }

    /// The topics as they are now: another text when one of them was made anew.
    fn topics(&self) -> String {
        let topic = |(name, id): (&String, &String)| format!("{name}@{id}");
        self.topics.iter().map(topic).collect::<Vec<_>>().join(" ")
    }
}

fn columns<const N: usize>(cells: Vec<Cell>) -> Result<[Cell; N], DatabaseError> {
    cells
        .try_into()
        .map_err(|cells| DatabaseError::Broken(format!("{cells:?} has another number of columns")))
}
