//! What a chart is made of: shapes with places, in the order in which they are painted.

pub type Place = (f64, f64);

#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// Round at its ends; one that has a single point is a dot.
    Line {
        points: Vec<Place>,
        ink: Ink,
    },
    /// Between two lines over the same `x`.
    Area {
        upper: Vec<Place>,
        lower: Vec<Place>,
        series: usize,
    },
    Text {
        at: Place,
        text: String,
        anchor: Anchor,
        size: Size,
    },
}

/// In which colour and pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ink {
    Grid,
    Axis,
    Series(usize),
    /// What a series was before it was smoothed.
    Faint(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    Title,
    Label,
}

impl Size {
    /// Of the letters, in pixels.
    pub fn px(self) -> f64 {
        match self {
            Size::Title => 13.0,
            Size::Label => 11.0,
        }
    }

    /// About how wide a text is.
    pub fn width(self, text: &str) -> f64 {
        0.56 * self.px() * text.chars().count() as f64
    }
}

/// How many colours there are; further series take them again.
pub const COLOURS: usize = 8;

/// Lengths of strokes and of the gaps behind them, of each colour: who sees no colours tells series by them.
pub const DASHES: [&[f64]; COLOURS] = [
    &[],
    &[7.0, 3.0],
    &[2.0, 3.0],
    &[9.0, 3.0, 2.0, 3.0],
    &[4.0, 2.0],
    &[12.0, 4.0],
    &[1.0, 4.0],
    &[9.0, 3.0, 2.0, 3.0, 2.0, 3.0],
];
