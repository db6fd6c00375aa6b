//! Curves of runs, as SVG for pages and reports and as PNG for whoever takes no SVG. Pure: numbers in, bytes out, no fonts, no files.
//!
//! A `Chart` says what is to be seen; `layout` turns it into shapes with places; `svg` and `png` write those down.

mod axis;
mod curve;
mod escape;
mod glyphs;
mod histogram;
mod layout;
mod png;
mod run;
mod shapes;
mod svg;

pub use curve::Curve;
pub use escape::escape;
pub use histogram::{Bins, histogram};
pub use run::{Run, STEP_TIMES, chart};
pub use svg::STYLE;

/// What is drawn: lines over common axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    pub title: String,
    /// What stands along the axes; may be empty.
    pub x: String,
    pub y: String,
    pub series: Vec<Series>,
    pub log: bool,
    /// Each value is the mean of so many points up to it; 0 and 1 draw them as they are. What they were is drawn faintly below.
    pub smooth: usize,
    /// The series are parts of a whole, one on top of the other.
    pub stacked: bool,
    /// In pixels.
    pub width: u32,
    pub height: u32,
}

impl Default for Chart {
    fn default() -> Chart {
        Chart {
            title: String::new(),
            x: "step".to_owned(),
            y: String::new(),
            series: Vec::new(),
            log: false,
            smooth: 0,
            stacked: false,
            width: 720,
            height: 280,
        }
    }
}

/// One line. A point whose value is no number is a gap.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    pub name: String,
    /// With rising `x`.
    pub points: Vec<(f64, f64)>,
}

/// Where an SVG is to stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stands {
    /// In a file: it brings its colours, for light and for dark.
    Alone,
    /// In a page that has `STYLE`.
    InPage,
}

impl Chart {
    pub fn svg(&self, stands: Stands) -> String {
        svg::render(self, &layout::shapes(self), stands)
    }

    /// In light colours, with two pixels for each one of `width` and `height`.
    pub fn png(&self) -> Vec<u8> {
        png::render(self, &layout::shapes(self))
    }
}
