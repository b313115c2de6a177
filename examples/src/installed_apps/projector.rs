//! What happens to apps on sites, and what this service keeps of it.

use std::fmt;

use barnabas::patterns::consumer::Cause;
use barnabas::patterns::projection::{Change, ColumnType, ProjectionSettings, Projector, ViewSpec};
use serde::{Deserialize, Serialize};

/// The name of the view.
pub const VIEW: &str = "installed_apps";

/// An event of the service that installs apps. Each says all that there is to know of its app, so that nobody has to ask. Records have the
/// site as their key: what happens on a site stays in order.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum AppEvent {
    Installed {
        site: String,
        app: String,
        version: String,
    },
    Updated {
        site: String,
        app: String,
        version: String,
    },
    Uninstalled {
        site: String,
        app: String,
    },
    /// With all its apps.
    SiteClosed {
        site: String,
    },
}

impl AppEvent {
    /// The site on which it happened.
    pub fn site(&self) -> &str {
        match self {
            Self::Installed { site, .. }
            | Self::Updated { site, .. }
            | Self::Uninstalled { site, .. }
            | Self::SiteClosed { site } => site,
        }
    }
}

/// An installed app: a row of the view.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct InstalledApp {
    pub site: String,
    pub app: String,
    pub version: String,
    /// The first part of the version. The first version of the projection did not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub major: Option<i64>,
}

impl fmt::Display for InstalledApp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} on {}", self.app, self.version, self.site)
    }
}

/// Keeps the apps that are installed. As its second version it knows major versions too.
#[derive(Clone, Copy, Debug)]
pub struct InstalledApps {
    /// The version of the projection: 1 or 2.
    pub version: u32,
}

impl InstalledApps {
    /// The settings of this version.
    pub fn settings(self, group: String, topic: String) -> ProjectionSettings {
        let view = ViewSpec::new(VIEW)
            .key("site", ColumnType::Text)
            .key("app", ColumnType::Text)
            .column("version", ColumnType::Text)
            .index(["app"]);
        ProjectionSettings {
            version: self.version,
            ..ProjectionSettings::new(
                group,
                [topic],
                match self.version {
                    1 => view,
                    _ => view.column("major", ColumnType::Integer),
                },
            )
        }
    }
}

impl Projector for InstalledApps {
    type Event = AppEvent;
    type Row = InstalledApp;

    fn project(&self, event: AppEvent) -> Result<Vec<Change<InstalledApp>>, Cause> {
        Ok(vec![match event {
            AppEvent::Installed { site, app, version } | AppEvent::Updated { site, app, version } => {
                let major = match self.version {
                    1 => None,
                    _ => Some(version.split('.').next().unwrap_or_default().parse()?),
                };
                Change::Upsert(InstalledApp {
                    site,
                    app,
                    version,
                    major,
                })
            }
            AppEvent::Uninstalled { site, app } => Change::delete([site, app]),
            AppEvent::SiteClosed { site } => Change::delete([site]),
        }])
    }
}
