//! What of Python a template sees that the template engine does not have, or has otherwise.

use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State};
use minijinja_contrib::pycompat;

/// Bytes of a text that one step pays for, as in the template engine.
pub(super) const FUEL_BYTES: usize = 64;

/// Adds all of it.
pub(super) fn add_to(env: &mut Environment<'_>) {
    env.set_unknown_method_callback(method);
    env.set_formatter(write);
    env.add_filter("tojson", super::json::tojson);
    env.add_filter("trim", trim);
    env.add_filter("string", string);
    env.add_filter("length", length);
    env.add_filter("count", length);
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    let is_sequence = |value: &Value| {
        value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    };
    env.add_test("sequence", is_sequence);
}

/// A number as `repr` writes it.
pub(super) fn float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value.is_finite() && value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    match value.is_finite() {
        true => format!("{value:?}"),
        false => value.to_string().to_lowercase(),
    }
}

fn text_of(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(number) if value.is_number() && !value.is_integer() => float(number),
        _ => value.to_string(),
    }
}

fn write(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number => out.write_str(&text_of(value)).map_err(Error::from),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// As `str.isspace`, which counts four control characters more than Unicode does.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn left<'a>(text: &'a str, chars: Option<&str>) -> &'a str {
    text.trim_start_matches(|c| chars.map_or_else(|| is_space(c), |chars| chars.contains(c)))
}

fn right<'a>(text: &'a str, chars: Option<&str>) -> &'a str {
    text.trim_end_matches(|c| chars.map_or_else(|| is_space(c), |chars| chars.contains(c)))
}

fn strip<'a>(text: &'a str, chars: Option<&str>) -> &'a str {
    right(left(text, chars), chars)
}

fn trim(state: &State<'_, '_>, value: &Value, chars: Option<&str>) -> Result<String, Error> {
    let text = string(state, value)?;
    Ok(strip(&text, chars).to_owned())
}

fn string(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    let text = text_of(value);
    pay(state, &text)?;
    Ok(text)
}

fn length(state: &State<'_, '_>, value: &Value) -> Result<usize, Error> {
    pay(state, value.as_str().unwrap_or_default())?;
    let none =
        || Error::new(ErrorKind::InvalidOperation, format!("a value that is {} has no length", value.kind()));
    match value.is_undefined() {
        true => Ok(0),
        false => value.len().ok_or_else(none),
    }
}

/// Methods of texts that are not in `pycompat`, or differ there; all others are its.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, name, args);
    };
    pay(state, text)?;
    if name == "join" {
        args.first().and_then(Value::as_str).map_or(Ok(()), |each| state.consume_fuel(each.len() as u64))?;
    }
    let argument = |index: usize| -> Result<Option<&str>, Error> {
        match args.get(index) {
            None => Ok(None),
            Some(none) if none.is_none() => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| wrong(name, "a text", value)),
        }
    };
    let needed = |index: usize| argument(index)?.ok_or_else(|| Error::from(ErrorKind::MissingArgument));
    Ok(match name {
        "format" if has_wide_field(text) => {
            let what = format!("a width of more than {WIDTH_DIGITS} digits in a format");
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
        "strip" => strip(text, argument(0)?).into(),
        "lstrip" => left(text, argument(0)?).into(),
        "rstrip" => right(text, argument(0)?).into(),
        "isspace" => (!text.is_empty() && text.chars().all(is_space)).into(),
        "removeprefix" => text.strip_prefix(needed(0)?).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(needed(0)?).unwrap_or(text).into(),
        "partition" => match text.split_once(separator(needed(0)?)?) {
            Some((before, behind)) => list(vec![before, needed(0)?, behind]),
            None => list(vec![text, "", ""]),
        },
        "rpartition" => match text.rsplit_once(separator(needed(0)?)?) {
            Some((before, behind)) => list(vec![before, needed(0)?, behind]),
            None => list(vec!["", "", text]),
        },
        "split" | "rsplit" => {
            let pieces = args.get(1).and_then(Value::as_i64).and_then(|most| usize::try_from(most).ok());
            let pieces = pieces.map_or(usize::MAX, |splits| splits.saturating_add(1));
            list(split(text, argument(0)?, pieces, name == "rsplit")?)
        }
        "splitlines" => list(lines(text, args.first().is_some_and(Value::is_true))),
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    })
}

/// What the engine takes for its own work on a text.
fn pay(state: &State<'_, '_>, text: &str) -> Result<(), Error> {
    state.consume_fuel((text.len() / FUEL_BYTES) as u64)
}

/// Digits of a width, of which the engine makes spaces without a limit.
const WIDTH_DIGITS: usize = 4;

fn has_wide_field(format: &str) -> bool {
    format.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > WIDTH_DIGITS)
}

fn list(texts: Vec<&str>) -> Value {
    texts.into_iter().map(Value::from).collect()
}

fn wrong(name: &str, wanted: &str, value: &Value) -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("{name} takes {wanted}, not one that is {}", value.kind()),
    )
}

fn separator(text: &str) -> Result<&str, Error> {
    match text {
        "" => Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        text => Ok(text),
    }
}

/// Into at most `pieces`, counted from the left or from the right; at white space where nothing separates.
fn split<'a>(
    text: &'a str,
    by: Option<&str>,
    pieces: usize,
    from_right: bool,
) -> Result<Vec<&'a str>, Error> {
    if let Some(by) = by {
        let by = separator(by)?;
        let mut found: Vec<&str> = match from_right {
            true => text.rsplitn(pieces, by).collect(),
            false => text.splitn(pieces, by).collect(),
        };
        if from_right {
            found.reverse();
        }
        return Ok(found);
    }
    let mut found = Vec::new();
    let mut rest = strip(text, None);
    while !rest.is_empty() {
        let end = match from_right {
            true => rest.rfind(is_space).map(|at| at + rest[at..].chars().next().map_or(0, char::len_utf8)),
            false => rest.find(is_space),
        };
        let Some(end) = end.filter(|_| found.len() + 1 < pieces) else {
            found.push(rest);
            break;
        };
        let (before, behind) = rest.split_at(end);
        found.push(if from_right { behind } else { before });
        rest = if from_right { right(before, None) } else { left(behind, None) };
    }
    if from_right {
        found.reverse();
    }
    Ok(found)
}

/// At all ends of lines that Python knows.
fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_end =
        |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let len = if rest[at..].starts_with("\r\n") {
            2
        } else {
            rest[at..].chars().next().map_or(0, char::len_utf8)
        };
        found.push(&rest[..if keep_ends { at + len } else { at }]);
        rest = &rest[at + len..];
    }
    if !rest.is_empty() {
        found.push(rest);
    }
    found
}

/// `raise_exception`: how a template refuses a conversation.
pub(super) fn raise_exception(args: Rest<Value>) -> Result<Value, Error> {
    let text = args.first().map(text_of).unwrap_or_default();
    Err(Error::new(ErrorKind::InvalidOperation, text).with_source(Raised))
}

/// Marks the error of a template that refuses.
#[derive(Debug)]
pub(super) struct Raised;

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("raised by the template")
    }
}

impl std::error::Error for Raised {}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str) -> String {
        let mut env = Environment::new();
        add_to(&mut env);
        let x = json!({"f": [1e16, 1e-5, 0.1, 1.0, 1.5e300, 123456789.25], "b": true, "n": null, "t": "a\u{7f}\u{e9}\u{1f600}<\"\\\n\u{1}", "e": {}});
        env.render_str(source, minijinja::context!(x => Value::from(minijinja::value::Serde(&x)))).unwrap()
    }

    /// Each right side is what Python prints.
    #[test]
    fn texts_numbers_and_json_are_as_in_python() {
        for (source, expected) in [
            ("{{ x.f|tojson }}", "[1e+16, 1e-05, 0.1, 1.0, 1.5e+300, 123456789.25]"),
            ("{{ x.f[0] }} {{ x.f[1] }} {{ 3.0 }} {{ x.b }} {{ x.n }}", "1e+16 1e-05 3.0 True None"),
            ("{{ x.t|tojson }}", "\"a\u{7f}\u{e9}\u{1f600}<\\\"\\\\\\n\\u0001\""),
            ("{{ x.t|tojson(ensure_ascii=true) }}", "\"a\\u007f\\u00e9\\ud83d\\ude00<\\\"\\\\\\n\\u0001\""),
            ("{{ {'b': 1, 'a': [1, none]}|tojson }}", "{\"b\": 1, \"a\": [1, null]}"),
            ("{{ {'b': 1, 'a': []}|tojson(sort_keys=true) }}", "{\"a\": [], \"b\": 1}"),
            (
                "{{ {'b': [1, 2], 'e': {}}|tojson(indent=2) }}",
                "{\n  \"b\": [\n    1,\n    2\n  ],\n  \"e\": {}\n}",
            ),
            ("{{ [1, {'a': 2}]|tojson(separators=(',', ':')) }}", "[1,{\"a\":2}]"),
            ("{{ ' \u{1c}a '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ '  a '|trim }}", "a|a|a"),
            ("{{ 'a,b,c'.rsplit(',', 1) }} {{ ' a  b c '.split() }}", "['a,b', 'c'] ['a', 'b', 'c']"),
            (
                "{{ ' a  b c '.split(none, 1) }} {{ ' a  b c '.rsplit(none, 1) }}",
                "['a', 'b c'] ['a  b', 'c']",
            ),
            ("{{ 'a</t>b'.split('</t>')[-1] }} {{ 'abc'.removeprefix('a').removesuffix('c') }}", "b b"),
            ("{{ 'a\\r\\nb\\x0bc\\n'.splitlines() }}", "['a', 'b', 'c']"),
            (
                "{{ 'a=b=c'.partition('=') }} {{ 'a=b=c'.rpartition('=') }}",
                "['a', '=', 'b=c'] ['a=b', '=', 'c']",
            ),
            (
                "{{ x.n is iterable }} {{ 'a' is sequence }} {{ x.e is sequence }} {{ 'a' is iterable }}",
                "False True True True",
            ),
        ] {
            assert_eq!(render(source), expected, "{source}");
        }
    }
}
