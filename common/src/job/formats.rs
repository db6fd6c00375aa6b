//! TOML, YAML and JSON with comments into `Value`s that know their line. What the keys mean is not decided here.

use super::error::JobFileError;
use super::value::{Kind, Place, Value};
use jsonc_parser::ast;
use jsonc_parser::common::Ranged;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use std::path::Path;
use toml::de::{DeTable, DeValue};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Toml,
    Yaml,
    Json,
}

impl Format {
    pub fn of(path: &Path) -> Result<Format, JobFileError> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        match extension.as_str() {
            "toml" => Ok(Format::Toml),
            "yaml" | "yml" => Ok(Format::Yaml),
            "json" | "jsonc" => Ok(Format::Json),
            _ => Err(JobFileError::Extension { path: path.to_owned() }),
        }
    }

    /// The top-level table. `file` names the file in errors.
    pub fn parse(self, text: &str, file: &str) -> Result<Vec<(String, Value)>, JobFileError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let lines = Lines { text, file };
        match self {
            Format::Toml => toml_file(&lines),
            Format::Yaml => yaml_file(&lines),
            Format::Json => json_file(&lines),
        }
    }
}

struct Lines<'a> {
    text: &'a str,
    file: &'a str,
}

impl Lines<'_> {
    fn place(&self, byte: usize) -> Place {
        self.line(
            1 + self.text.as_bytes()[..byte.min(self.text.len())].iter().filter(|b| **b == b'\n').count()
                as u64,
        )
    }

    fn line(&self, line: u64) -> Place {
        format!("{}:{line}", self.file).into()
    }

    fn syntax(&self, place: Place, what: &str, message: &str) -> JobFileError {
        let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
        JobFileError::Syntax { place, message: format!("not valid {what}: {message}") }
    }

    fn not_a_table(&self, place: Place, given: &Value) -> JobFileError {
        JobFileError::Syntax {
            place,
            message: format!("a job file is a table of settings, not {}", given.describe()),
        }
    }
}

// ---- TOML -------------------------------------------------------------------------------------------------------------

fn toml_file(lines: &Lines<'_>) -> Result<Vec<(String, Value)>, JobFileError> {
    let table = DeTable::parse(lines.text).map_err(|error| {
        let place = lines.place(error.span().map_or(0, |span| span.start));
        lines.syntax(place, "TOML", error.message())
    })?;
    toml_table(table.get_ref(), lines)
}

fn toml_table(table: &DeTable<'_>, lines: &Lines<'_>) -> Result<Vec<(String, Value)>, JobFileError> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
        .into_iter()
        .map(|(key, value)| {
            let place = lines.place(key.span().start);
            let kind = toml_kind(value.get_ref(), &place, lines)?;
            Ok((key.get_ref().to_string(), Value::new(&place, kind)))
        })
        .collect()
}

fn toml_kind(value: &DeValue<'_>, place: &Place, lines: &Lines<'_>) -> Result<Kind, JobFileError> {
    let bad = |message: String| lines.syntax(place.clone(), "TOML", &message);
    Ok(match value {
        DeValue::String(text) => Kind::Text(text.to_string()),
        DeValue::Boolean(b) => Kind::Bool(*b),
        DeValue::Integer(n) => {
            let digits = n.as_str().replace('_', "");
            Kind::Int(
                i64::from_str_radix(&digits, n.radix())
                    .map_err(|_| bad(format!("{n} does not fit 64 bits")))?,
            )
        }
        DeValue::Float(x) => {
            let digits = x.as_str().replace('_', "");
            Kind::Float(digits.parse().map_err(|_| bad(format!("{x} is not a number")))?)
        }
        DeValue::Datetime(date) => Kind::Text(date.to_string()),
        DeValue::Array(items) => {
            let mut list = Vec::with_capacity(items.len());
            for item in items.iter() {
                let place = lines.place(item.span().start);
                list.push(Value::new(&place, toml_kind(item.get_ref(), &place, lines)?));
            }
            Kind::List(list)
        }
        DeValue::Table(table) => Kind::Table(toml_table(table, lines)?),
    })
}

/// A value as TOML writes it in one line; `None` where the text is none.
pub(super) fn toml_value(text: &str, place: &Place) -> Option<Kind> {
    let parsed = DeValue::parse(text.trim()).ok()?;
    if matches!(parsed.get_ref(), DeValue::Datetime(_)) {
        return None;
    }
    let mut kind = toml_kind(parsed.get_ref(), place, &Lines { text, file: "" }).ok()?;
    put(place, &mut kind);
    Some(kind)
}

/// All that is in a value stands where it does.
fn put(place: &Place, kind: &mut Kind) {
    let inner: Vec<&mut Value> = match kind {
        Kind::List(items) => items.iter_mut().collect(),
        Kind::Table(entries) => entries.iter_mut().map(|(_, value)| value).collect(),
        _ => return,
    };
    for value in inner {
        value.place = place.clone();
        put(place, &mut value.kind);
    }
}

// ---- JSON with comments -----------------------------------------------------------------------------------------------

fn json_file(lines: &Lines<'_>) -> Result<Vec<(String, Value)>, JobFileError> {
    // comments and trailing commas are taken, the rest of JSON5 is not
    let options = jsonc_parser::ParseOptions {
        allow_comments: true,
        allow_trailing_commas: true,
        allow_loose_object_property_names: false,
        allow_missing_commas: false,
        allow_single_quoted_strings: false,
        allow_hexadecimal_numbers: false,
        allow_unary_plus_numbers: false,
        allow_bare_decimal_point_numbers: false,
        allow_non_finite_numbers: false,
        allow_extended_string_escapes: false,
    };
    let parsed = jsonc_parser::parse_to_ast(lines.text, &Default::default(), &options).map_err(|error| {
        lines.syntax(lines.line(error.line_display() as u64), "JSON", &error.kind().to_string())
    })?;
    match parsed.value {
        None => Ok(Vec::new()),
        Some(ast::Value::Object(object)) => json_object(&object, lines),
        Some(other) => {
            let place = lines.place(other.start());
            let given = json_value(&other, lines)?;
            Err(lines.not_a_table(place, &given))
        }
    }
}

fn json_object(object: &ast::Object<'_>, lines: &Lines<'_>) -> Result<Vec<(String, Value)>, JobFileError> {
    let mut entries: Vec<(String, Value)> = Vec::with_capacity(object.properties.len());
    for property in &object.properties {
        let key = property.name.as_str().to_owned();
        let mut value = json_value(&property.value, lines)?;
        value.place = lines.place(property.start());
        if entries.iter().any(|(seen, _)| *seen == key) {
            return Err(JobFileError::Twice { place: value.place, key });
        }
        entries.push((key, value));
    }
    Ok(entries)
}

fn json_value(value: &ast::Value<'_>, lines: &Lines<'_>) -> Result<Value, JobFileError> {
    let place = lines.place(value.start());
    let kind = match value {
        ast::Value::StringLit(text) => Kind::Text(text.value.to_string()),
        ast::Value::BooleanLit(b) => Kind::Bool(b.value),
        ast::Value::NullKeyword(_) => Kind::Null,
        ast::Value::NumberLit(number) => {
            number.value.parse().map(Kind::Int).or_else(|_| number.value.parse().map(Kind::Float)).map_err(
                |_| lines.syntax(place.clone(), "JSON", &format!("{} is not a number", number.value)),
            )?
        }
        ast::Value::Array(array) => {
            Kind::List(array.elements.iter().map(|item| json_value(item, lines)).collect::<Result<_, _>>()?)
        }
        ast::Value::Object(object) => Kind::Table(json_object(object, lines)?),
    };
    Ok(Value::new(&place, kind))
}

// ---- YAML -------------------------------------------------------------------------------------------------------------

fn yaml_file(lines: &Lines<'_>) -> Result<Vec<(String, Value)>, JobFileError> {
    let parsed: serde_saphyr::Spanned<YamlNode> = serde_saphyr::from_str(lines.text).map_err(|error| {
        let place = error.location().map_or_else(|| lines.file.into(), |at| lines.line(at.line()));
        let message = error.without_snippet().to_string();
        // the place is already named
        let message = message.split(" at line ").next().unwrap_or(&message).to_owned();
        lines.syntax(place, "YAML", &message)
    })?;
    let place = lines.line(parsed.referenced.line().max(1));
    match yaml_value(parsed, lines)? {
        Value { kind: Kind::Table(entries), .. } => Ok(entries),
        Value { kind: Kind::Null, .. } => Ok(Vec::new()),
        other => Err(lines.not_a_table(place, &other)),
    }
}

fn yaml_value(node: serde_saphyr::Spanned<YamlNode>, lines: &Lines<'_>) -> Result<Value, JobFileError> {
    let place = lines.line(node.referenced.line());
    let kind = match node.value {
        YamlNode::Scalar(kind) => kind,
        YamlNode::List(items) => {
            Kind::List(items.into_iter().map(|item| yaml_value(item, lines)).collect::<Result<_, _>>()?)
        }
        YamlNode::Table(entries) => {
            let mut table: Vec<(String, Value)> = Vec::with_capacity(entries.len());
            for (key, node) in entries {
                let value = yaml_value(node, lines)?;
                if table.iter().any(|(seen, _)| *seen == key) {
                    return Err(JobFileError::Twice { place: value.place, key });
                }
                table.push((key, value));
            }
            Kind::Table(table)
        }
    };
    Ok(Value::new(&place, kind))
}

enum YamlNode {
    Scalar(Kind),
    List(Vec<serde_saphyr::Spanned<YamlNode>>),
    Table(Vec<(String, serde_saphyr::Spanned<YamlNode>)>),
}

impl<'de> Deserialize<'de> for YamlNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NodeVisitor;
        impl<'de> Visitor<'de> for NodeVisitor {
            type Value = YamlNode;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a scalar, a list or a table")
            }
            fn visit_unit<E>(self) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Kind::Null))
            }
            fn visit_none<E>(self) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Kind::Null))
            }
            fn visit_bool<E>(self, b: bool) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Kind::Bool(b)))
            }
            fn visit_i64<E>(self, n: i64) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Kind::Int(n)))
            }
            fn visit_u64<E>(self, n: u64) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(i64::try_from(n).map_or(Kind::Float(n as f64), Kind::Int)))
            }
            fn visit_f64<E>(self, x: f64) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Kind::Float(x)))
            }
            fn visit_str<E>(self, text: &str) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Kind::Text(text.to_owned())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<YamlNode, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(YamlNode::List(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<YamlNode, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(YamlNode::Table(entries))
            }
        }
        deserializer.deserialize_any(NodeVisitor)
    }
}
