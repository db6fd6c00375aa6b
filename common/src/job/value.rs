//! A job file's contents before they mean anything: scalars, lists and tables, each with the place it was written at.
//! The three formats and `--set` all end here; nothing below this file knows which one a value came from.

use std::sync::Arc;

/// Where a value was written, ready to print: `job.toml:12` or `--set lr=3`.
pub(super) type Place = Arc<str>;

#[derive(Clone, Debug)]
pub(super) struct Value {
    pub place: Place,
    pub kind: Kind,
    /// The text as typed, for `--set` alone, where `run_name=7` has no quotes to say that it is text.
    pub typed: Option<String>,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Value>),
    Table(Vec<(String, Value)>),
}

impl Value {
    pub fn new(place: &Place, kind: Kind) -> Self {
        Value { place: place.clone(), kind, typed: None }
    }

    /// The value as text: a string, or whatever `--set` was given.
    pub fn text(&self) -> Option<&str> {
        match (&self.kind, &self.typed) {
            (Kind::Text(text), _) => Some(text),
            (Kind::Int(_) | Kind::Float(_) | Kind::Bool(_) | Kind::Table(_), Some(typed)) => Some(typed),
            _ => None,
        }
    }

    pub fn int(&self) -> Option<i64> {
        match self.kind {
            Kind::Int(n) => Some(n),
            // 1e3 is how some write a thousand; beyond 2^53 a float no longer names one integer
            Kind::Float(x) if x.fract() == 0.0 && x.abs() <= 9_007_199_254_740_992.0 => Some(x as i64),
            _ => None,
        }
    }

    pub fn float(&self) -> Option<f64> {
        match self.kind {
            Kind::Int(n) => Some(n as f64),
            Kind::Float(x) if x.is_finite() => Some(x),
            _ => None,
        }
    }

    pub fn bool(&self) -> Option<bool> {
        match self.kind {
            Kind::Bool(b) => Some(b),
            _ => None,
        }
    }

    /// A list of texts; one text is a list of one.
    pub fn texts(&self) -> Option<Vec<String>> {
        match &self.kind {
            Kind::List(items) => items.iter().map(|item| item.text().map(str::to_owned)).collect(),
            _ => self.text().map(|text| vec![text.to_owned()]),
        }
    }

    /// A list of numbers; one number is a list of one.
    pub fn floats(&self) -> Option<Vec<f64>> {
        match &self.kind {
            Kind::List(items) => items.iter().map(Value::float).collect(),
            _ => self.float().map(|number| vec![number]),
        }
    }

    /// Whether both say the same: `1` and `1.0` do.
    pub fn same(&self, other: &Value) -> bool {
        match (&self.kind, &other.kind) {
            (Kind::List(a), Kind::List(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.same(b)),
            (Kind::Bool(a), Kind::Bool(b)) => a == b,
            (Kind::Null, Kind::Null) => true,
            (Kind::Int(_) | Kind::Float(_), Kind::Int(_) | Kind::Float(_)) => self.float() == other.float(),
            _ => self.text().is_some() && self.text() == other.text(),
        }
    }

    /// What was given, for an error: `the text "abc"`, `3`, `a table`.
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Null => "null".into(),
            Kind::Bool(b) => b.to_string(),
            Kind::Int(n) => n.to_string(),
            Kind::Float(x) => format!("{x:?}"),
            Kind::Text(text) => {
                let short: String = text.chars().take(60).collect();
                let dots = if short.len() < text.len() { "..." } else { "" };
                format!("the text {:?}", format!("{short}{dots}"))
            }
            Kind::List(items) => format!("a list of {}", items.len()),
            Kind::Table(_) => "a table".into(),
        }
    }
}
