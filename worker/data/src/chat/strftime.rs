//! `strftime`, as Python has it in the C locale.

use std::fmt::Write;
use time::OffsetDateTime;

/// Of a format; a template has no use for more.
const FORMAT_MAX: usize = 1 << 10;

/// The time in a format such as `%d %b %Y`; what is no directive stays. A `-` behind the percent sign drops leading zeros.
pub(super) fn strftime(format: &str, now: OffsetDateTime) -> Result<String, String> {
    if format.len() > FORMAT_MAX {
        return Err(format!("strftime_now has a format of {} bytes; the most is {FORMAT_MAX}", format.len()));
    }
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let directive = &rest[at + 1..];
        let (bare, directive) = match directive.strip_prefix('-') {
            Some(directive) => (true, directive),
            None => (false, directive),
        };
        let Some(letter) = directive.chars().next() else {
            out.push_str(&rest[at..]);
            return Ok(out);
        };
        let behind = &directive[letter.len_utf8()..];
        match field(letter, now) {
            Some(Field::Text(text)) => out.push_str(&text),
            Some(Field::Number(number, _)) if bare => write_to(&mut out, format_args!("{number}")),
            Some(Field::Number(number, width)) => write_to(&mut out, format_args!("{number:0width$}")),
            None => out.push_str(&rest[at..rest.len() - behind.len()]),
        }
        rest = behind;
    }
    out.push_str(rest);
    Ok(out)
}

fn write_to(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a string takes all");
}

enum Field {
    Text(String),
    /// With this many digits at least.
    Number(i64, usize),
}

fn field(letter: char, now: OffsetDateTime) -> Option<Field> {
    let composed = |format| strftime(format, now).ok().map(Field::Text);
    let number = |number: i64, width| Some(Field::Number(number, width));
    let weekday = now.weekday();
    let short = |name: String| Some(Field::Text(name[..3].to_owned())); // names of English days and months
    let half = i64::from((now.hour() + 11) % 12 + 1);
    match letter {
        '%' => Some(Field::Text("%".into())),
        'Y' => number(i64::from(now.year()), 4),
        'y' => number(i64::from(now.year().rem_euclid(100)), 2),
        'm' => number(i64::from(u8::from(now.month())), 2),
        'd' => number(i64::from(now.day()), 2),
        'e' => Some(Field::Text(format!("{:2}", now.day()))),
        'j' => number(i64::from(now.ordinal()), 3),
        'H' => number(i64::from(now.hour()), 2),
        'I' => number(half, 2),
        'M' => number(i64::from(now.minute()), 2),
        'S' => number(i64::from(now.second()), 2),
        'f' => number(i64::from(now.microsecond()), 6),
        'w' => number(i64::from(weekday.number_days_from_sunday()), 1),
        'u' => number(i64::from(weekday.number_from_monday()), 1),
        'p' => Some(Field::Text(if now.hour() < 12 { "AM" } else { "PM" }.into())),
        'A' => Some(Field::Text(weekday.to_string())),
        'a' => short(weekday.to_string()),
        'B' => Some(Field::Text(now.month().to_string())),
        'b' | 'h' => short(now.month().to_string()),
        'F' => composed("%Y-%m-%d"),
        'T' | 'X' => composed("%H:%M:%S"),
        'R' => composed("%H:%M"),
        'D' | 'x' => composed("%m/%d/%y"),
        'c' => composed("%a %b %e %H:%M:%S %Y"),
        'z' | 'Z' => Some(Field::Text(String::new())), // Python's naive time has no zone
        'n' => Some(Field::Text("\n".into())),
        't' => Some(Field::Text("\t".into())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_python_has_it() {
        let now = OffsetDateTime::from_unix_timestamp(1_722_812_709).unwrap(); // Sunday, 4 August 2024, 23:05:09
        let of = |format| strftime(format, now).unwrap();
        assert_eq!(of("%d %b %Y, %A %-d %B"), "04 Aug 2024, Sunday 4 August");
        assert_eq!(
            of("%Y-%m-%d %H:%M:%S %y %I %-I %p %j %a %u %w"),
            "2024-08-04 23:05:09 24 11 11 PM 217 Sun 7 0"
        );
        assert_eq!(
            of("%F|%T|%R|%D|%c|%e|%Z%%"),
            "2024-08-04|23:05:09|23:05|08/04/24|Sun Aug  4 23:05:09 2024| 4|%"
        );
        assert_eq!(of("\u{e9} 100% %- %Q %"), "\u{e9} 100% %- %Q %");
        assert!(strftime(&"x".repeat(2000), now).unwrap_err().contains("2000 bytes"));
    }
}
