//! What the end to end tests share.

pub mod ack_cutter;
pub mod conformance;
pub mod consumer;
pub mod fault;
pub mod http;
pub mod job;
pub mod kafka;
pub mod oracle;
pub mod postgres;
pub mod process;
pub mod projection;
pub mod proxy;
pub mod raw;
pub mod site;
pub mod store;
pub mod subscriber;
pub mod windows;
pub mod worker;
pub mod world;

/// Makes a test of each function, once for each log: `embedded::name` and `kafka::name`. The functions take the
/// [`site::Engine`].
#[macro_export]
macro_rules! on_both_logs {
    ($($name:ident),+ $(,)?) => {
        mod embedded {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name($crate::site::Engine::Embedded).await;
            })+
        }
        mod kafka {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name($crate::site::Engine::Kafka).await;
            })+
        }
    };
}
