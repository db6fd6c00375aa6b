//! A page of HTML that needs nothing but itself. Every text goes through `escape`.

use fleet_plot::{Chart, STYLE, Stands, escape};

/// A page that is being written.
pub struct Html {
    text: String,
}

const LOOK: &str = include_str!("html.css");

impl Html {
    /// With a title and a line below it.
    pub fn new(title: &str, below: &str) -> Html {
        let (title, below) = (escape(title), escape(below));
        // What is here asks for nothing from anywhere, and this says so to the browser.
        let policy = "default-src 'none'; style-src 'unsafe-inline'";
        let text = format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>{LOOK}{STYLE}</style>\n\
             <main>\n<h1>{title}</h1>\n<p>{below}</p>\n"
        );
        Html { text }
    }

    pub fn heading(&mut self, text: &str) {
        self.text += &format!("<h2>{}</h2>\n", escape(text));
    }

    pub fn line(&mut self, text: &str) {
        self.text += &format!("<p>{}</p>\n", escape(text));
    }

    /// Lines as a program wrote them.
    pub fn lines(&mut self, lines: &[String]) {
        let lines: Vec<String> = lines.iter().map(|line| escape(line)).collect();
        self.text += &format!("<pre>{}</pre>\n", lines.join("\n"));
    }

    /// Names and what they stand for.
    pub fn facts(&mut self, facts: &[(String, String)]) {
        self.text += "<table>\n";
        for (name, value) in facts {
            self.text +=
                &format!("<tr><th scope=\"row\">{}</th><td>{}</td></tr>\n", escape(name), escape(value));
        }
        self.text += "</table>\n";
    }

    pub fn table(&mut self, heading: &[&str], rows: &[Vec<String>]) {
        let head: String =
            heading.iter().map(|name| format!("<th scope=\"col\">{}</th>", escape(name))).collect();
        self.text += &format!("<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n");
        for row in rows {
            let cells: String = row.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
            self.text += &format!("<tr>{cells}</tr>\n");
        }
        self.text += "</tbody></table>\n";
    }

    pub fn chart(&mut self, chart: &Chart) {
        self.text += &format!("<figure>{}</figure>\n", chart.svg(Stands::InPage));
    }

    pub fn end(mut self) -> String {
        self.text += "</main>\n</html>\n";
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_users_wrote_is_text_wherever_it_stands() {
        let evil = "<img src=x onerror=alert(1)>";
        let mut page = Html::new(evil, evil);
        page.heading(evil);
        page.line(evil);
        page.lines(&[evil.to_owned()]);
        page.facts(&[(evil.to_owned(), evil.to_owned())]);
        page.table(&[evil], &[vec![evil.to_owned()]]);
        page.chart(&Chart { title: evil.to_owned(), ..Chart::default() });
        let text = page.end();
        assert!(!text.contains("<img"), "{text}");
        assert!(text.matches("&lt;img").count() >= 9, "{text}");
    }
}
