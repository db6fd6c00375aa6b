//! Rows of Parquet, a row group at a time, by the reader of Apache's arrow-rs.

use crate::DataError;
use crate::blocks::{Block, Contents, Take};
use crate::chunks::CHUNK;
use crate::documents::no_field;
use ::parquet::basic::{ConvertedType, Type as Physical};
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::Field;
use ::parquet::schema::types::Type;
use serde_json::{Map, Number, Value};
use std::fs::File;
use std::io::Seek;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

/// A row, and about how many bytes it takes.
type Measured = (Map<String, Value>, usize);

/// Gives the rows of a file: the wanted field of them, or all but those that hold bytes. False where no more are wanted.
pub(crate) fn blocks(path: &Path, file: &File, field: Option<&str>, take: Take) -> Result<bool, DataError> {
    let damaged = |what: String| {
        let cure = match what.contains("Disabled feature") {
            true => "write it with the compression snappy, zstd, gzip or none",
            false => "fetch it again, or write its rows as JSON Lines",
        };
        let what = format!("its Parquet data cannot be read ({}); {cure}", what.replace('\n', " "));
        crate::text::not_text(path, what)
    };
    let read = |source| DataError::Read { path: path.to_owned(), source };
    let mut file = file.try_clone().map_err(read)?;
    file.rewind().map_err(read)?;
    // What is damaged makes the reader panic at times.
    let guarded = |work: &mut dyn FnMut() -> ::parquet::errors::Result<Option<Measured>>| {
        catch_unwind(AssertUnwindSafe(work))
            .map_err(|_| damaged("its reader fails".into()))?
            .map_err(|e| damaged(e.to_string()))
    };
    let opened = catch_unwind(AssertUnwindSafe(|| SerializedFileReader::new(file)));
    let reader =
        opened.map_err(|_| damaged("its reader fails".into()))?.map_err(|e| damaged(e.to_string()))?;
    let wanted = wanted(path, reader.metadata().file_metadata().schema(), field)?;
    let (mut rows, mut bytes, mut number) = (Vec::new(), 0, 0u64);
    let mut records = reader.get_row_iter(Some(wanted)).map_err(|e| damaged(e.to_string()))?;
    let mut next = || match records.next().transpose()? {
        None => Ok(None),
        Some(row) => {
            let mut size = 0;
            let columns = row.into_columns().into_iter();
            Ok(Some((columns.map(|(name, field)| (name, value(field, &mut size))).collect(), size)))
        }
    };
    let mut give = |rows: &mut Vec<Map<String, Value>>, number: &mut u64| {
        let rows = std::mem::take(rows);
        let row = *number + 1;
        *number += rows.len() as u64;
        take(Block { contents: Contents::Records { row, rows }, is_damaged: false })
    };
    while let Some((row, size)) = guarded(&mut next)? {
        rows.push(row);
        bytes += size;
        if bytes >= CHUNK || rows.len() >= ROWS_MAX {
            bytes = 0;
            if !give(&mut rows, &mut number)? {
                return Ok(false);
            }
        }
    }
    give(&mut rows, &mut number)
}

/// Rows of a block, where they are short.
const ROWS_MAX: usize = 8192;

/// The part of a file's schema that is read.
fn wanted(path: &Path, schema: &Type, field: Option<&str>) -> Result<Type, DataError> {
    let refused = |what| DataError::Row { path: path.to_owned(), line: 1, what };
    let fields = schema.get_fields();
    let chosen: Vec<Arc<Type>> = match field {
        None => fields.iter().filter(|field| !holds_bytes(field)).cloned().collect(),
        Some(name) => match fields.iter().find(|field| field.name() == name) {
            None => return Err(refused(no_field(name, fields.iter().map(|field| field.name())))),
            Some(field) if holds_bytes(field) => {
                return Err(refused(format!(
                    "the column `{name}` holds bytes and no text; set data.text_field"
                )));
            }
            Some(field) => vec![field.clone()],
        },
    };
    if chosen.is_empty() {
        return Err(refused("it has no column but such of bytes".into()));
    }
    let built = Type::group_type_builder(schema.name()).with_fields(chosen).build();
    built.map_err(|e| refused(e.to_string()))
}

fn holds_bytes(field: &Type) -> bool {
    if !field.is_primitive() {
        return field.get_fields().iter().any(|field| holds_bytes(field));
    }
    let is_text =
        matches!(field.get_basic_info().converted_type(), ConvertedType::NONE | ConvertedType::BSON);
    is_text && matches!(field.get_physical_type(), Physical::BYTE_ARRAY | Physical::FIXED_LEN_BYTE_ARRAY)
}

/// As JSON has it; adds the bytes of its texts to `size`. Times are numbers, decimals texts.
fn value(field: Field, size: &mut usize) -> Value {
    *size += 8;
    match field {
        Field::Null | Field::Bytes(_) => Value::Null,
        Field::Bool(is) => Value::Bool(is),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) | Field::Date(n) | Field::TimeMillis(n) => n.into(),
        Field::Long(n) | Field::TimeMicros(n) | Field::TimestampMillis(n) | Field::TimestampMicros(n) => {
            n.into()
        }
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::Float16(x) => number(x.into()),
        Field::Float(x) => number(x.into()),
        Field::Double(x) => number(x),
        decimal @ Field::Decimal(_) => Value::String(decimal.to_string()),
        Field::Str(text) => {
            *size += text.len();
            Value::String(text)
        }
        Field::Group(row) => {
            row.into_columns().into_iter().map(|(name, field)| (name, value(field, size))).collect()
        }
        Field::ListInternal(list) => list.elements().iter().map(|field| value(field.clone(), size)).collect(),
        Field::MapInternal(map) => map
            .entries()
            .iter()
            .map(|(key, field)| {
                let name = match key {
                    Field::Str(name) => name.clone(),
                    other => other.to_string(),
                };
                (name, value(field.clone(), size))
            })
            .collect(),
    }
}

fn number(x: f64) -> Value {
    Number::from_f64(x).map_or(Value::Null, Value::Number)
}
