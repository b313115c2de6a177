//! Settings of the importer beside the gateway's.

use std::path::PathBuf;

use barnabas::server::config::TopicsConfig;
use barnabas::server::{Config, ConfigError};
use phonenumber::country;

use super::database::Database;

/// The job type whose chunks are imported.
pub const JOB_TYPE: &str = "import-contacts";

/// File of the default database, in the data folder.
const DATABASE_FILE: &str = "contacts.sqlite";

/// The settings that are not the gateway's, for `--help`.
pub const HELP: &str = "  DATABASE_URL
        where contacts go, sqlite: or postgres: [contacts.sqlite in the data folder]
  CONTACTS_REGION
        country of phone numbers without a country code [US]
";

/// How contacts are imported.
#[derive(Clone, Debug)]
pub struct ImporterSettings {
    /// The consumer group in which importers share the work. Default `{prefix}.contacts-importer`.
    pub group: String,
    /// The topic of chunks: that of the job type `import-contacts`.
    pub topic: String,
    /// The gateway's own topics.
    pub topics: TopicsConfig,
    /// Workers of this process: one can read rows while another writes. Default 2.
    pub workers: usize,
    /// Where phone numbers without a country code are from. Default `US`, `CONTACTS_REGION`.
    pub region: country::Id,
}

impl ImporterSettings {
    /// Settings that fit the gateway's, everything else at its default.
    pub fn new(config: &Config) -> Self {
        let job_type = config.jobs.types.get(JOB_TYPE);
        Self {
            // Installations that share a broker must not share a group: each would rebalance the others.
            group: format!("{}.contacts-importer", config.topics.prefix),
            topic: job_type.map_or(JOB_TYPE, |job_type| &job_type.topic).to_owned(),
            topics: config.topics.clone(),
            workers: 2,
            region: country::US,
        }
    }

    /// Settings of this process.
    ///
    /// # Errors
    /// `CONTACTS_REGION` is no country's code of two letters.
    pub fn load(config: &Config) -> Result<Self, ConfigError> {
        let mut settings = Self::new(config);
        if let Ok(region) = std::env::var("CONTACTS_REGION") {
            settings.region = region
                .parse()
                .map_err(|_| invalid("CONTACTS_REGION", "not a country's code of two letters, such as US"))?;
        }
        Ok(settings)
    }
}

/// The database that `DATABASE_URL` names; if it is not set, `contacts.sqlite` in the data folder.
///
/// # Errors
/// `DATABASE_URL` is no URL of a database that can be used.
pub fn database(config: &Config) -> Result<Database, ConfigError> {
    match std::env::var("DATABASE_URL") {
        Ok(url) => Database::at(&url).map_err(|error| invalid("DATABASE_URL", error)),
        Err(_) => {
            let file: PathBuf = config.data.dir.join(DATABASE_FILE);
            std::fs::create_dir_all(&config.data.dir).map_err(|error| invalid("BARNABAS_DATA_DIR", error))?;
            Ok(Database::in_file(&file))
        }
    }
}

fn invalid(setting: &str, reason: impl ToString) -> ConfigError {
    ConfigError {
        setting: setting.to_owned(),
        reason: reason.to_string(),
    }
}
