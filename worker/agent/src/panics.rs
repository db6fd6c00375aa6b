//! Work that panics is a fault of fleet. What then matters is that nobody waits for it for ever: every task that somebody depends on is watched,
//! and its panic becomes an error of the one gang, connection or question that it served.

use std::any::Any;
use std::future::Future;
use tokio::task::JoinError;

/// Runs blocking work on a thread of its own. The error says what it panicked with.
pub fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = Result<T, String>> {
    let work = tokio::task::spawn_blocking(work);
    async move { work.await.map_err(said) }
}

/// What a task that is gone panicked with.
pub fn said(error: JoinError) -> String {
    match error.try_into_panic() {
        Ok(payload) => words(payload.as_ref()),
        Err(_) => "it was called off".to_owned(),
    }
}

fn words(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without words").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Ends the process if the thread that holds it panics: one that nothing can replace.
pub struct Vital(pub &'static str);

impl Drop for Vital {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "error: the {} panicked, without which no rank can be supervised: the worker ends",
                self.0
            );
            std::process::abort();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;

    #[tokio::test]
    async fn blocking_work_gives_what_it_made_or_what_it_panicked_with_in_one_line() {
        assert_eq!(blocking(|| 7).await, Ok(7));
        let index = blocking(|| [1, 2, 3].iter().position(|n| *n == 9).expect("a\n  nine")).await;
        assert_eq!(index, Err("a nine".to_owned()));
        let odd = blocking(|| std::panic::panic_any(7)).await;
        assert_eq!(odd, Err("a panic without words".to_owned()));
    }
}
