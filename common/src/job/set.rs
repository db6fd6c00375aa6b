//! `--set key=value`: one value that replaces what the job file says.

use super::error::JobFileError;
use super::formats;
use super::value::{Kind, Value};

/// The dotted key and the value. The value is read as a TOML number, boolean, quoted text, list or inline table; anything else is text.
pub(super) fn parse(text: &str) -> Result<(String, Value), JobFileError> {
    let (key, typed) = match text.split_once('=') {
        Some((key, typed)) if !key.trim().is_empty() => (key.trim(), typed),
        _ => return Err(JobFileError::Set { text: text.to_owned() }),
    };
    let place = format!("--set {text}").into();
    let kind = formats::toml_value(typed, &place).unwrap_or_else(|| Kind::Text(typed.to_owned()));
    Ok((key.to_owned(), Value { place, kind, typed: Some(typed.to_owned()) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        parse(text).unwrap().1
    }

    #[test]
    fn a_value_is_a_toml_scalar_or_list_and_else_text() {
        assert_eq!(value("learning_rate=1e-3").float(), Some(1e-3));
        assert_eq!(value("max_steps=10").int(), Some(10));
        assert_eq!(value("log_to_db=false").bool(), Some(false));
        assert_eq!(value("run_name=7").text(), Some("7"));
        assert_eq!(value("data.path=/a b/c=d.txt").text(), Some("/a b/c=d.txt"));
        assert_eq!(value("data.path=[\"a\", 'b']").texts(), Some(vec!["a".into(), "b".into()]));
        assert_eq!(value("run_name=2026-11-22").text(), Some("2026-11-22"));
        assert_eq!(value("run_name=").text(), Some(""));
        assert_eq!(value("precision=bf16-mixed").text(), Some("bf16-mixed"));
        assert_eq!(parse("data.path=x").unwrap().0, "data.path");
    }

    #[test]
    fn a_key_without_a_value_is_refused() {
        for bad in ["max_steps", "=3", " =3"] {
            assert_eq!(
                parse(bad).unwrap_err().to_string(),
                format!("`--set {bad}` is not of the form key=value, such as --set learning_rate=1e-3")
            );
        }
    }
}
