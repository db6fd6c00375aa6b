//! Rows of tables, strictly: what is not as the format says is refused, because a lenient reader loses rows without a word.
//!
//! CSV is RFC 4180 in UTF-8, with another separator where its first rows show one. TSV is what people write: tabs and line ends separate, and a quote is a character like others. Rows
//! end with `\n` or `\r\n`, or with `\r` where the first row does; empty lines are skipped.

use crate::chunks::Ends;
use crate::documents::no_field;
use crate::separator;
use serde_json::{Map, Value};
use std::borrow::Cow;

/// How the fields of a row stand beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Csv,
    Tsv,
}

impl Dialect {
    fn separator(self) -> char {
        match self {
            Dialect::Csv => ',',
            Dialect::Tsv => '\t',
        }
    }
}

/// The first row of a table, which names the fields of the others.
#[derive(Debug)]
pub(crate) struct Header {
    names: Vec<String>,
    line: u64,
    separator: char,
    newline: char,
    dialect: Dialect,
}

/// What is wrong in which line, from 1.
pub(crate) type Wrong = (u64, String);

/// A row and its line.
type Object = (u64, Map<String, Value>);

impl Header {
    /// That of a file which begins with `text`, the rows behind it, and the line of the first of them. `None`: there are no rows.
    pub fn read(text: &str, dialect: Dialect) -> Result<Option<(Header, &str, u64)>, Wrong> {
        let mut rows = Rows::new(text, dialect);
        let Some(Row { line, fields }) = rows.next().transpose()? else { return Ok(None) };
        let names = fields.iter().map(|name| name.trim().to_owned()).collect();
        let Rows { separator, newline, .. } = rows;
        Ok(Some((Header { names, line, separator, newline, dialect }, rows.rest, rows.line)))
    }

    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Line ends of rows behind it.
    pub fn lines(&self, text: &str) -> u64 {
        text.matches(self.newline).count() as u64
    }

    /// Rows of `text`, which begins with this line, each with its own line, or what is wrong with one.
    fn rows<'t>(&self, line: u64, text: &'t str) -> impl Iterator<Item = Result<Row<'t>, Wrong>> + use<'t> {
        let &Header { separator, newline, dialect, .. } = self;
        let wanted = self.names.len();
        let rows = Rows { rest: text, line, newline, separator, dialect, goes_on: false };
        rows.map(move |row| {
            let row = row?;
            match row.fields.len() {
                found if found == wanted => Ok(row),
                found => Err((row.line, wrong_length(found, wanted, dialect, separator))),
            }
        })
    }

    /// The text field of every row, or what is wrong with one; as a whole where there is no such field.
    pub fn texts<'t>(
        &self,
        line: u64,
        text: &'t str,
        field: &str,
    ) -> Result<impl Iterator<Item = Result<String, Wrong>> + use<'t>, Wrong> {
        let column = column(self, field)?;
        Ok(self.rows(line, text).map(move |row| Ok(row?.fields.swap_remove(column).into_owned())))
    }

    /// Every row as an object of texts, or what is wrong with one; as a whole where two fields have one name.
    pub fn objects(
        &self,
        line: u64,
        text: &str,
    ) -> Result<impl Iterator<Item = Result<Object, Wrong>>, Wrong> {
        let names = &self.names;
        if let Some(what) = other_separator(self, "a table of one field") {
            return Err((self.line, what));
        }
        if let Some((at, twice)) = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)) {
            let what = format!(
                "there are two columns `{twice}` (the second is number {}); rename one of them",
                at + 1
            );
            return Err((self.line, what));
        }
        Ok(self.rows(line, text).map(move |row| {
            let row = row?;
            let values = row.fields.into_iter().map(|field| Value::String(field.into_owned()));
            Ok((row.line, names.iter().cloned().zip(values).collect()))
        }))
    }
}

/// Finds where rows end in the bytes of a table.
pub(crate) struct RowEnds {
    separator: u8,
    newline: u8,
    dialect: Dialect,
    at: Place,
}

/// What the next byte is in.
#[derive(Clone, Copy)]
enum Place {
    Begin,
    Field,
    Quoted,
    /// Behind a quote in a quoted field: its last one, or the first of two.
    Quote,
}

impl RowEnds {
    /// Of a file that begins with `head`.
    pub fn of(head: &str, dialect: Dialect) -> RowEnds {
        let Rows { separator, newline, .. } = Rows::new(head, dialect);
        RowEnds { separator: separator as u8, newline: newline as u8, dialect, at: Place::Begin }
    }
}

impl Ends for RowEnds {
    fn last(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut last = None;
        for (at, &byte) in bytes.iter().enumerate() {
            self.at = match self.at {
                Place::Begin if byte == b'"' && self.dialect == Dialect::Csv => Place::Quoted,
                Place::Quoted if byte == b'"' => Place::Quote,
                Place::Quoted => Place::Quoted,
                Place::Quote if byte == b'"' => Place::Quoted,
                _ if byte == self.separator => Place::Begin,
                _ if byte == self.newline => {
                    last = Some(at + 1);
                    Place::Begin
                }
                _ => Place::Field,
            };
        }
        last
    }
}

/// Where the text field stands.
fn column(header: &Header, field: &str) -> Result<usize, Wrong> {
    let names = || header.names.iter().map(String::as_str);
    let refused = |what| Err((header.line, what));
    let mut found = names().enumerate().filter(|(_, name)| *name == field).map(|(at, _)| at);
    match (found.next(), found.next()) {
        (Some(_), Some(_)) => refused(format!("there are two columns `{field}`; rename one of them")),
        (Some(at), None) => Ok(at),
        (None, _) => refused(
            other_separator(header, &format!("no field `{field}`"))
                .unwrap_or_else(|| format!("{} (the first row names the fields)", no_field(field, names()))),
        ),
    }
}

/// What is wrong with a header of one field that seems to be several.
fn other_separator(header: &Header, what: &str) -> Option<String> {
    let [one] = header.names.as_slice() else { return None };
    let others = [(',', ".csv"), ('\t', ".tsv"), (';', ""), ('|', "")];
    let is_other = |(separator, _): &(char, &str)| *separator != header.separator && one.contains(*separator);
    let (separator, extension) = others.into_iter().find(is_other)?;
    Some(match (separator, header.dialect) {
        (';' | '|', _) => format!(
            "{what}: its fields seem to be separated by `{separator}`, and few of its first rows have as many; put texts with one in quotes, \
             or separate fields by commas (.csv) or tabs (.tsv)"
        ),
        (_, Dialect::Csv) => format!(
            "{what}: its fields seem to be separated by {separator:?}, and few of its first rows have as many; name such a file {extension}"
        ),
        (_, Dialect::Tsv) => {
            format!("{what}: its fields seem to be separated by {separator:?}; name such a file {extension}")
        }
    })
}

fn wrong_length(found: usize, wanted: usize, dialect: Dialect, separator: char) -> String {
    let why = match dialect {
        Dialect::Csv => &format!("a field with {separator:?} or line ends stands in quotes"),
        Dialect::Tsv => {
            "a field of a TSV has no tabs or line ends, and quotes do not change that; such text goes to CSV or JSON Lines"
        }
    };
    format!("{found} fields where the first row has {wanted}; {why}")
}

struct Row<'t> {
    /// Where it begins, from 1.
    line: u64,
    fields: Vec<Cow<'t, str>>,
}

/// Reads row by row; an error has the line where its row begins.
struct Rows<'t> {
    rest: &'t str,
    line: u64,
    newline: char,
    separator: char,
    dialect: Dialect,
    /// Whether the row goes on behind the field that was read last.
    goes_on: bool,
}

impl<'t> Rows<'t> {
    fn new(text: &'t str, dialect: Dialect) -> Rows<'t> {
        let newline = newline(text, dialect);
        let is_csv = dialect == Dialect::Csv;
        if let Some((separator, rest)) = separator::named(text, newline).filter(|_| is_csv) {
            return Rows { rest, line: 2, newline, separator, dialect, goes_on: false };
        }
        let shown = separator::shown(text, newline).filter(|_| is_csv);
        let separator = shown.unwrap_or(dialect.separator());
        Rows { rest: text, line: 1, newline, separator, dialect, goes_on: false }
    }

    /// Goes to the end of a row with something wrong in it.
    fn skip(&mut self) {
        if std::mem::take(&mut self.goes_on) {
            let end = self.rest.find(self.newline).map_or(self.rest.len(), |at| at + 1);
            self.rest = &self.rest[end..];
            self.line += 1;
        }
    }

    /// The next field and whether the row goes on after it. What comes after a field is consumed with it.
    fn field(&mut self) -> Result<(Cow<'t, str>, bool), String> {
        match self.rest.strip_prefix('"') {
            Some(inside) if self.dialect == Dialect::Csv => self.quoted(inside),
            _ => self.plain(),
        }
    }

    fn plain(&mut self) -> Result<(Cow<'t, str>, bool), String> {
        let separator = self.separator;
        let end = self.rest.find([separator, self.newline]).unwrap_or(self.rest.len());
        let field = &self.rest[..end];
        let goes_on = self.rest[end..].starts_with(separator);
        self.goes_on = goes_on;
        self.line += u64::from(!goes_on);
        self.rest = self.rest.get(end + 1..).unwrap_or_default();
        let field = if goes_on { field } else { field.strip_suffix('\r').unwrap_or(field) };
        // Of a row that ends so the next one would be a part.
        let other = match (self.newline, self.dialect) {
            ('\r', _) => Some('\n'),
            (_, Dialect::Csv) => Some('\r'),
            (_, Dialect::Tsv) => None,
        };
        if let Some(other) = other.filter(|other| field.contains(*other)) {
            return Err(format!(
                "a row of this file ends with {:?}, and here is a {other:?} outside of quotes; make all line ends the same, and put \
                 those of a text in quotes",
                self.newline
            ));
        }
        Ok((field.into(), goes_on))
    }

    /// A field whose opening quote is behind `inside`'s beginning.
    fn quoted(&mut self, inside: &'t str) -> Result<(Cow<'t, str>, bool), String> {
        let mut end = 0;
        let mut doubled = false;
        loop {
            let Some(quote) = inside[end..].find('"') else {
                (self.rest, self.goes_on) = ("", false);
                return Err("a quote is opened and never closed".into());
            };
            end += quote;
            if !inside[end + 1..].starts_with('"') {
                break;
            }
            doubled = true;
            end += 2;
        }
        let field = &inside[..end];
        self.line += field.matches(self.newline).count() as u64;
        self.rest = &inside[end + 1..];
        let (after, goes_on) = self.plain()?;
        if !after.is_empty() {
            return Err(format!(
                "text follows the closing quote of a field: {:?}; quotes inside a quoted field are doubled",
                after.chars().take(20).collect::<String>()
            ));
        }
        Ok((if doubled { field.replace("\"\"", "\"").into() } else { field.into() }, goes_on))
    }
}

/// What ends the rows: the first line end that is in no quotes.
fn newline(text: &str, dialect: Dialect) -> char {
    let mut in_quotes = false;
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '"' if dialect == Dialect::Csv => in_quotes = !in_quotes,
            '\r' if !in_quotes && chars.peek() != Some(&'\n') => return '\r',
            '\n' if !in_quotes => return '\n',
            _ => {}
        }
    }
    '\n'
}

impl<'t> Iterator for Rows<'t> {
    type Item = Result<Row<'t>, (u64, String)>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.rest.is_empty() {
            let line = self.line;
            let empty = self.rest.starts_with(self.newline) || self.rest.starts_with("\r\n");
            let mut fields = Vec::new();
            loop {
                match self.field() {
                    Ok((field, goes_on)) => {
                        fields.push(field);
                        if !goes_on {
                            break;
                        }
                    }
                    Err(what) => {
                        self.skip();
                        return Some(Err((line, what)));
                    }
                }
            }
            if !empty {
                return Some(Ok(Row { line, fields }));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(dialect: Dialect, text: &str) -> Result<Vec<String>, String> {
        let told = |(line, what): Wrong| format!("line {line}: {what}");
        let Some((header, rest, line)) = Header::read(text, dialect).map_err(told)? else {
            return Ok(Vec::new());
        };
        let texts = header.texts(line, rest, "text").map_err(told)?;
        texts.map(|text| text.map_err(told)).collect()
    }

    fn csv(text: &str) -> Result<Vec<String>, String> {
        read(Dialect::Csv, text)
    }

    fn tsv(text: &str) -> Result<Vec<String>, String> {
        read(Dialect::Tsv, text)
    }

    #[test]
    fn a_quote_in_a_tsv_is_a_character() {
        let rows = "id\ttext\r\n1\t\"Hello\" she said\n2\t5\" pipe\n3\t\"Stop, he cried\n\n4\t\"a \"\"b\"\"\"\n5\tc\rd\n6\t";
        let texts = ["\"Hello\" she said", "5\" pipe", "\"Stop, he cried", "\"a \"\"b\"\"\"", "c\rd", ""];
        assert_eq!(tsv(rows).unwrap(), texts);
    }

    #[test]
    fn rows_of_another_length_are_named() {
        let error = tsv("id\ttext\n1\ta\n\n2\n").unwrap_err();
        assert!(error.contains("line 4: 1 fields where the first row has 2"), "{error}");
        assert!(tsv("id\ttext\n1\ta\tb\n").unwrap_err().contains("line 2: 3 fields"));
        assert!(tsv("text\tid\n\"a\nb\"\t1\n").unwrap_err().contains("JSON Lines"));
        assert!(csv("id,text\n1,a, b\n").unwrap_err().contains("line 2: 3 fields"));
        assert!(csv("text,id\n\"a\nb\",1\n\"c\"\n").unwrap_err().contains("line 4: 1 fields"));
    }

    #[test]
    fn csv_is_read_by_its_standard() {
        let rows = "id,text\n1,\"a, \"\"b\"\"\r\nc\"\r\n2,5\" pipe\n3, \"d\"\n4,\"\"\n5,\"\"\"\"\n6,e";
        assert_eq!(csv(rows).unwrap(), ["a, \"b\"\r\nc", "5\" pipe", " \"d\"", "", "\"", "e"]);
        assert_eq!(csv("id,text\r1,a\r2,b\r").unwrap(), ["a", "b"]);
        assert_eq!(
            csv("text,id\r\"a\nb\",1\rc,2").unwrap(),
            ["a\nb", "c"],
            "of an old Mac, with a line end in a text"
        );
        assert_eq!(csv("\"te\nxt\",text\r1,a\r").unwrap(), ["a"]);
        assert_eq!(csv("").unwrap(), [] as [&str; 0]);
        assert_eq!(csv("id;text\n1;\"a; b\"\n2;c, d\n").unwrap(), ["a; b", "c, d"], "with another separator");
        assert_eq!(csv(" id , text \n1, a \n").unwrap(), [" a "], "white space belongs to a field");
    }

    #[test]
    fn line_ends_of_two_kinds_never_make_one_row_of_two() {
        for (text, line) in [("text\na\rb\n", 2), ("text\ra\rb\nc\r", 3), ("text,id\r\na\rb,1\r\n", 2)] {
            let error = csv(text).unwrap_err();
            assert!(
                error.contains(&format!("line {line}: a row of this file ends with")),
                "{text:?}: {error}"
            );
        }
        assert!(tsv("text\ra\rb\nc\r").unwrap_err().contains("make all line ends the same"));
        assert_eq!(csv("text\na\r\nb\r").unwrap(), ["a", "b"]);
    }

    #[test]
    fn quotes_that_are_wrong_name_the_row_where_they_begin() {
        let error = csv("id,text\n1,\"unclosed quote here\n2,second\n3,third\n").unwrap_err();
        assert!(error.contains("line 2: a quote is opened and never closed"), "{error}");
        let error = csv("text,id\na,1\n\"b\nc\"d,2\n").unwrap_err();
        assert!(error.contains("line 3: text follows the closing quote of a field: \"d\""), "{error}");
        assert!(csv("id,text\n1,\"he \\\"said\\\"\"\n").unwrap_err().contains("are doubled"));
        assert!(csv("id,text\n1,\"swallows\n2,\"other\"\n").unwrap_err().contains("line 2: text follows"));
        assert!(csv("\"id,text\n1,a\n").unwrap_err().contains("line 1: a quote is opened"));
    }

    #[test]
    fn rows_behind_a_wrong_one_are_read() {
        let rows = "text,id\na,1\n\"b\"x,2\nc\rd,3\ne\nf,4\n";
        let (header, rest, line) = Header::read(rows, Dialect::Csv).unwrap().unwrap();
        let found: Vec<Result<String, u64>> =
            header.texts(line, rest, "text").unwrap().map(|text| text.map_err(|(line, _)| line)).collect();
        assert_eq!(found, [Ok("a".into()), Err(3), Err(4), Err(5), Ok("f".into())]);
    }

    #[test]
    fn a_header_that_does_not_fit_says_why() {
        let error = |dialect, text| read(dialect, text).unwrap_err();
        assert!(
            error(Dialect::Csv, "text,id,text\na,1,b\n").contains("line 1: there are two columns `text`")
        );
        let ragged = error(Dialect::Csv, "id;text\n1;a;b\n");
        assert!(ragged.contains("separated by `;`, and few of its first rows have as many"), "{ragged}");
        assert!(error(Dialect::Csv, "id\ttext\n1\ta\tb\n").contains("name such a file .tsv"));
        let header = Header::read("id,text\n1,a\n", Dialect::Tsv).unwrap().unwrap().0;
        let rows = header.objects(1, "").err().unwrap().1;
        assert!(rows.contains("a table of one field: its fields seem to be separated by ','"), "{rows}");
        assert!(error(Dialect::Tsv, "id,text\n1,a\n").contains("name such a file .csv"));
        assert!(error(Dialect::Csv, "id,body\n1,x\n").contains("set data.text_field to one of: id, body"));
        let long = error(Dialect::Csv, &format!("\"a\nb\",{}\n", "x".repeat(1000)));
        assert!(long.len() < 300 && !long.contains('\n'), "{long}");
    }

    proptest! {
        /// The library that others use writes; what it wrote is read back whole.
        #[test]
        fn what_a_csv_library_writes_is_read_back(texts in proptest::collection::vec("[a,\"\n\r é]{0,12}", 0..8), crlf: bool) {
            let terminator = if crlf { ::csv::Terminator::CRLF } else { ::csv::Terminator::Any(b'\n') };
            let mut writer = ::csv::WriterBuilder::new().terminator(terminator).from_writer(Vec::new());
            writer.write_record(["text", "id"]).unwrap();
            for text in &texts {
                writer.write_record([text.as_str(), "1"]).unwrap();
            }
            let written = String::from_utf8(writer.into_inner().unwrap()).unwrap();
            prop_assert_eq!(csv(&written).unwrap(), texts);
        }

        /// Wherever a table is cut that way its rows stay whole.
        #[test]
        fn parts_that_end_with_rows_have_the_same_rows(texts in proptest::collection::vec("[a,\"\n]{0,6}", 0..8), size in 1usize..20) {
            let mut writer = ::csv::Writer::from_writer(Vec::new());
            writer.write_record(["text", "id"]).unwrap();
            for text in &texts {
                writer.write_record([text.as_str(), "1"]).unwrap();
            }
            let written = String::from_utf8(writer.into_inner().unwrap()).unwrap();
            let (header, rest, mut line) = Header::read(&written, Dialect::Csv).unwrap().unwrap();
            let mut ends = RowEnds::of(&written, Dialect::Csv);
            let (mut found, mut part, mut end) = (Vec::new(), Vec::new(), None);
            for bytes in rest.as_bytes().chunks(size) {
                let seen = part.len();
                part.extend(bytes);
                end = ends.last(bytes).map(|at| seen + at).or(end);
                if let Some(end) = end.take() {
                    let later = part.split_off(end);
                    let text = String::from_utf8(std::mem::replace(&mut part, later)).unwrap();
                    found.extend(header.texts(line, &text, "text").unwrap().map(Result::unwrap));
                    line += header.lines(&text);
                }
            }
            prop_assert!(part.is_empty());
            prop_assert_eq!(found, texts);
        }

        #[test]
        fn a_tsv_loses_nothing(texts in proptest::collection::vec("[a,\"' é\\\\]{0,12}", 0..8)) {
            let rows: String = texts.iter().map(|text| format!("1\t{text}\n")).collect();
            prop_assert_eq!(tsv(&format!("id\ttext\n{rows}")).unwrap(), texts);
        }

        #[test]
        fn arbitrary_tables_never_panic(text in "[text,\t\"\r\n]{0,40}") {
            let _ = (csv(&text), tsv(&text));
        }
    }

    #[test]
    fn a_first_line_that_names_the_separator_is_none_of_the_rows() {
        let read = csv;
        assert_eq!(read("sep=,\ntext,n\n\"a, b\",1\nc,2\n").unwrap(), ["a, b", "c"]);
        assert_eq!(read("sep=;\r\nn;text\r\n1;\"a; b\"\r\n").unwrap(), ["a; b"]);
        assert_eq!(read("\"sep=\t\"\nn\ttext\n1\ta, b\n").unwrap(), ["a, b"]);
        assert!(
            read("sep=;\nn;text\n1\n").unwrap_err().contains("line 3"),
            "lines are counted from the file's first"
        );
        assert_eq!(read("text\nsep=;\n").unwrap(), ["sep=;"]);
    }
}
