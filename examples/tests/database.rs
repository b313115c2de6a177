//! The table of contacts in SQLite.

use barnabas_examples::contacts::chunk::SourcedContact;
use barnabas_examples::contacts::contact::Contact;
use barnabas_examples::contacts::database::Database;

fn contact(key: &str, name: &str, job: &str, line: u64) -> SourcedContact {
    SourcedContact {
        job: job.to_owned(),
        line,
        contact: Contact {
            key: key.to_owned(),
            name: name.to_owned(),
            email: Some(key.to_owned()),
            phone: None,
        },
    }
}

async fn the_last_row_of_the_last_job_wins_in_any_order(database: &Database, run: &str) {
    let key = |name: &str| format!("{run}-{name}@example.org");
    let rows = [
        contact(&key("a"), "first", "job-1", 2),
        contact(&key("a"), "second", "job-1", 10),
        contact(&key("a"), "third", "job-2", 3),
    ];
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]] {
        for row in order {
            database
                .upsert(std::slice::from_ref(&rows[row]))
                .await
                .expect("it is written");
        }
        let name = database.name(&key("a")).await.expect("it is read");
        assert_eq!(name.as_deref(), Some("third"), "{order:?}");
    }
    let mut many: Vec<_> = (0..1300)
        .map(|n| contact(&key(&n.to_string()), "old", "job-1", n))
        .collect();
    many.extend((0..1300).map(|n| contact(&key(&n.to_string()), "new", "job-1", n + 5000)));
    let before = database.count().await.expect("a count");
    for _ in 0..2 {
        database.upsert(&many).await.expect("keys may repeat within a batch");
        assert_eq!(database.count().await.expect("a count"), before + 1300);
    }
    assert_eq!(
        database.name(&key("1299")).await.expect("it is read").as_deref(),
        Some("new")
    );
}

#[tokio::test]
async fn the_last_row_of_the_last_job_wins_in_sqlite() {
    let folder = tempfile::tempdir().expect("a folder");
    let database = Database::in_file(&folder.path().join("contacts.sqlite"));
    database.prepare().await.expect("a table");
    the_last_row_of_the_last_job_wins_in_any_order(&database, "sqlite").await;
}

#[tokio::test]
async fn an_unknown_kind_of_database_is_refused() {
    assert!(Database::at("mysql://localhost/contacts").is_err());
    assert!(Database::at("postgres://localhost/contacts").is_ok());
}
