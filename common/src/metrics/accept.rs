//! Which format a scrape is answered in.

/// Of a page of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format 0.0.4: what everything reads.
    Text,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    /// The one that a reader likes best, by its Accept header (RFC 9110, section 12.5.1). What is unknown gets the text.
    pub fn wanted(accept: &str) -> Format {
        let (mut text, mut open) = (0.0, 0.0);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let (mut quality, mut version) = (1.0, None);
            for (name, value) in parts.filter_map(|parameter| parameter.split_once('=')) {
                let value = value.trim().trim_matches('"');
                match name.trim().to_ascii_lowercase().as_str() {
                    "q" => quality = value.parse().unwrap_or(0.0),
                    "version" => version = Some(value.to_owned()),
                    _ => {}
                }
            }
            let (best, known) = match kind.as_str() {
                "application/openmetrics-text" => (&mut open, "1.0.0"),
                "text/plain" | "text/*" | "*/*" => (&mut text, "0.0.4"),
                _ => continue,
            };
            if version.is_none_or(|version| version == known) {
                *best = f64::max(*best, quality);
            }
        }
        if open > 0.0 && open >= text { Format::OpenMetrics } else { Format::Text }
    }

    /// For the Content-Type header.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::Text => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reader_chooses_and_who_says_nothing_known_gets_the_text() {
        for accept in [
            "application/openmetrics-text",
            "application/openmetrics-text; version=1.0.0",
            // Prometheus 2.42, of Debian 12, and 3.
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
        ] {
            assert_eq!(Format::wanted(accept), Format::OpenMetrics, "{accept}");
        }
        for accept in [
            "",
            "*/*",
            "application/json",
            "text/html, */*;q=0.8",
            "application/openmetrics-text; version=2.0.0",
            "application/openmetrics-text; q=0",
            "application/openmetrics-text; q=x",
            "application/openmetrics-text; q=0.1, text/plain; q=0.9",
            ";;;=,q=,\u{0}",
        ] {
            assert_eq!(Format::wanted(accept), Format::Text, "{accept}");
        }
    }
}
