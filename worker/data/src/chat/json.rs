//! `tojson`: a value as Python's `json.dumps` writes it, without the escapes for HTML of Jinja's own.

use super::python::FUEL_BYTES;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use std::fmt::Write;

/// Of values within values.
const DEPTH_MAX: usize = 100;

pub(super) fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let separators: Option<Vec<String>> = options.get("separators")?;
    let indent = match options.get::<Option<Value>>("indent")? {
        None => None,
        Some(indent) if indent.is_none() => None,
        Some(indent) => Some(indent_of(&indent)?),
    };
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(refused("tojson takes two separators".into())),
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut writer = Writer { state, out: String::new(), paid: 0, indent, item, key, ascii, sorted };
    writer.value(value, 0)?;
    Ok(writer.out)
}

fn refused(what: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

fn indent_of(indent: &Value) -> Result<String, Error> {
    match (indent.as_str(), indent.as_usize()) {
        (Some(text), _) if text.len() <= DEPTH_MAX => Ok(text.to_owned()),
        (_, Some(width)) if width <= DEPTH_MAX => Ok(" ".repeat(width)),
        _ => Err(refused(format!("tojson cannot indent by {indent}"))),
    }
}

struct Writer<'a> {
    state: &'a State<'a, 'a>,
    out: String,
    /// Bytes of `out` that were charged.
    paid: usize,
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(refused(format!("tojson is given values within values, {DEPTH_MAX} deep")));
        }
        self.pay()?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq => {
                let items = value.try_iter()?.checked();
                self.list('[', ']', depth, items, |writer, item| writer.value(&item, depth + 1))?;
            }
            ValueKind::Map => {
                let keys = value.try_iter()?.checked().collect::<Result<Vec<Value>, Error>>()?;
                let name = |key: Value| Ok((key_name(&key)?, value.get_item(&key)?));
                let mut pairs = keys.into_iter().map(name).collect::<Result<Vec<_>, Error>>()?;
                if self.sorted {
                    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.list('{', '}', depth, pairs.into_iter().map(Ok), |writer, (name, item)| {
                    writer.string(&name);
                    writer.out.push_str(&writer.key.clone());
                    writer.value(&item, depth + 1)
                })?;
            }
            kind => return Err(refused(format!("tojson cannot write a value that is {kind}"))),
        }
        Ok(())
    }

    fn list<T>(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: impl Iterator<Item = Result<T, Error>>,
        mut write: impl FnMut(&mut Self, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut is_empty = true;
        for item in items {
            if !is_empty {
                self.out.push_str(&self.item.clone());
            }
            is_empty = false;
            self.line(depth + 1);
            write(self, item?)?;
        }
        if !is_empty {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(self.out, "\\u{unit:04x}").expect("a string takes all");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    fn pay(&mut self) -> Result<(), Error> {
        let due = (self.out.len() - self.paid) / FUEL_BYTES;
        self.paid += due * FUEL_BYTES;
        self.state.consume_fuel(due as u64 + 1)
    }
}

/// JSON has only texts for keys.
fn key_name(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::Number => Ok(number(key)),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        kind => Err(refused(format!("tojson cannot write a key that is {kind}"))),
    }
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => match float {
            float if float.is_nan() => "NaN".into(),
            float if float.is_infinite() => (if float > 0.0 { "Infinity" } else { "-Infinity" }).into(),
            float => super::python::float(float),
        },
        _ => value.to_string(),
    }
}
