//! Numbers for people.

use time::OffsetDateTime;

/// `1234567` as `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `4_012_345` as `4.01 M`.
pub fn short(n: u64) -> String {
    let x = n as f64;
    match n {
        0..=999 => n.to_string(),
        1_000..=999_999 => format!("{:.1} k", x / 1e3),
        1_000_000..=999_999_999 => format!("{:.2} M", x / 1e6),
        _ => format!("{:.2} G", x / 1e9),
    }
}

/// `3725` seconds as `1:02:05`.
pub fn clock(seconds: u64) -> String {
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

/// `412 ms`, `1.24 s`, `73 s`.
pub fn seconds(s: f64) -> String {
    match s {
        s if s < 0.9995 => format!("{:.0} ms", 1000.0 * s),
        s if s < 10.0 => format!("{s:.2} s"),
        s => format!("{s:.0} s"),
    }
}

/// `12 s`, `3 min`, `5 h`, `2 d` for an age in milliseconds.
pub fn age(ms: u64) -> String {
    match ms / 1000 {
        s @ 0..=119 => format!("{s} s"),
        s @ 120..=7199 => format!("{} min", s / 60),
        s @ 7200..=172_799 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

/// `2026-03-01 14:05:09 UTC`, of milliseconds since 1970.
pub fn date(unix_ms: u64) -> String {
    let Ok(at) = OffsetDateTime::from_unix_timestamp((unix_ms / 1000) as i64) else { return "-".to_owned() };
    let (day, clock) = (at.date(), at.time());
    format!("{day} {:02}:{:02}:{:02} UTC", clock.hour(), clock.minute(), clock.second())
}

/// A loss with four decimals, `-` where there is none.
pub fn loss(x: Option<f64>) -> String {
    x.map_or("-".to_owned(), |x| format!("{x:.4}"))
}

/// Learning rates and the like: three digits, in scientific form.
pub fn small(x: f64) -> String {
    format!("{x:.2e}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([thousands(7), thousands(1234), thousands(1_234_567)], ["7", "1,234", "1,234,567"]);
        assert_eq!([seconds(0.0123), seconds(0.9999), seconds(72.6)], ["12 ms", "1.00 s", "73 s"]);
        assert_eq!([short(999), short(1500), short(4_012_345)], ["999", "1.5 k", "4.01 M"]);
        assert_eq!([clock(5), clock(65), clock(3725)], ["0:05", "1:05", "1:02:05"]);
        assert_eq!(
            [age(1500), age(180_000), age(7_200_000), age(200_000_000)],
            ["1 s", "3 min", "2 h", "2 d"]
        );
        assert_eq!(date(1_772_373_909_500), "2026-03-01 14:05:09 UTC");
        assert_eq!(loss(Some(f64::NAN)), "NaN");
        assert_eq!(small(0.0005), "5.00e-4");
    }
}
