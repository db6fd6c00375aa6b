//! Shapes as PNG: a line covers of each pixel as much as its distance says, and letters are lines.

use crate::Chart;
use crate::glyphs;
use crate::shapes::{Anchor, COLOURS, DASHES, Ink, Place, Shape};
use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};
use std::io::Write;

/// Pixels for each one of the chart.
const SCALE: f64 = 2.0;

type Colour = [u8; 3];

const PAPER: Colour = [255, 255, 255];
const TEXT: Colour = [28, 33, 40];
const MUTE: Colour = [89, 99, 110];
const RULE: Colour = [217, 222, 227];
/// Those of the light half of `style.css`.
const SERIES: [Colour; COLOURS] = [
    [9, 105, 218],
    [188, 76, 0],
    [26, 127, 100],
    [168, 50, 121],
    [138, 109, 0],
    [58, 147, 196],
    [111, 66, 193],
    [92, 102, 112],
];

pub fn render(chart: &Chart, shapes: &[Shape]) -> Vec<u8> {
    let mut canvas = Canvas::new(f64::from(chart.width) * SCALE, f64::from(chart.height) * SCALE);
    for shape in shapes {
        match shape {
            Shape::Line { points, ink } => {
                let (colour, width, opacity, dashes) = match ink {
                    Ink::Grid => (RULE, 1.0, 1.0, &[][..]),
                    Ink::Axis => (MUTE, 1.0, 1.0, &[][..]),
                    Ink::Series(n) => (SERIES[n % COLOURS], 1.6, 1.0, DASHES[n % COLOURS]),
                    Ink::Faint(n) => (SERIES[n % COLOURS], 1.0, 0.28, &[][..]),
                };
                let points: Vec<Place> = points.iter().map(|(x, y)| (x * SCALE, y * SCALE)).collect();
                for piece in dashed(&points, dashes) {
                    canvas.cover(&piece, width * SCALE);
                }
                canvas.paint(colour, opacity);
            }
            Shape::Area { upper, lower, series } => {
                canvas.between(upper, lower);
                canvas.paint(SERIES[series % COLOURS], 0.72);
            }
            Shape::Text { at, text, anchor, size } => {
                let unit = size.px() * 0.7 / 6.0 * SCALE;
                let narrow = unit * 0.78;
                let wide = text.chars().count() as f64 * glyphs::ADVANCE * narrow;
                let left = at.0 * SCALE
                    - match anchor {
                        Anchor::Start => 0.0,
                        Anchor::Middle => wide / 2.0,
                        Anchor::End => wide,
                    };
                for (n, letter) in text.chars().enumerate() {
                    let left = left + n as f64 * glyphs::ADVANCE * narrow;
                    let place = |(x, y): (f64, f64)| (left + x * narrow, at.1 * SCALE + (y - 6.0) * unit);
                    for stroke in glyphs::strokes(letter) {
                        let stroke: Vec<Place> = stroke.into_iter().map(place).collect();
                        canvas.cover(&stroke, 1.15 * SCALE);
                    }
                }
                canvas.paint(if size.px() > 12.0 { TEXT } else { MUTE }, 1.0);
            }
        }
    }
    canvas.encode()
}

/// The strokes of a pattern along a line.
fn dashed(points: &[Place], pattern: &[f64]) -> Vec<Vec<Place>> {
    if pattern.is_empty() || points.len() < 2 {
        return vec![points.to_vec()];
    }
    let mut lengths = pattern.iter().map(|length| length * SCALE).cycle();
    let (mut left, mut draws) = (lengths.next().unwrap_or(1.0), true);
    let mut pieces = vec![vec![points[0]]];
    for two in points.windows(2) {
        let (mut from, to) = (two[0], two[1]);
        loop {
            let way = (to.0 - from.0).hypot(to.1 - from.1);
            if way < left {
                left -= way;
                if draws && let Some(piece) = pieces.last_mut() {
                    piece.push(to);
                }
                break;
            }
            let share = left / way;
            from = (from.0 + share * (to.0 - from.0), from.1 + share * (to.1 - from.1));
            match draws {
                true => pieces.last_mut().into_iter().for_each(|piece| piece.push(from)),
                false => pieces.push(vec![from]),
            }
            draws = !draws;
            left = lengths.next().unwrap_or(1.0);
        }
    }
    pieces
}

struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<Colour>,
    /// How much of each pixel what is being drawn covers.
    mask: Vec<f32>,
    /// Rows of the mask that are in use.
    rows: std::ops::Range<usize>,
}

impl Canvas {
    fn new(width: f64, height: f64) -> Canvas {
        let (width, height) = (width as usize, height as usize);
        Canvas {
            width,
            height,
            pixels: vec![PAPER; width * height],
            mask: vec![0.0; width * height],
            rows: 0..0,
        }
    }

    /// Pixels from `low` to `high`, as far as they are there.
    fn span(low: f64, high: f64, count: usize) -> std::ops::Range<usize> {
        let clamp = |at: f64| at.clamp(0.0, count as f64) as usize;
        clamp(low.floor())..clamp(high.ceil())
    }

    fn use_rows(&mut self, rows: &std::ops::Range<usize>) {
        self.rows = match self.rows.is_empty() {
            true => rows.clone(),
            false => self.rows.start.min(rows.start)..self.rows.end.max(rows.end),
        };
    }

    /// A line, round at its ends.
    fn cover(&mut self, points: &[Place], width: f64) {
        let reach = width / 2.0 + 0.5;
        let ends = points.windows(2).map(|two| (two[0], two[1]));
        let dot = points.first().filter(|_| points.len() == 1).map(|point| (*point, *point));
        for ((ax, ay), (bx, by)) in ends.chain(dot) {
            let rows = Canvas::span(ay.min(by) - reach, ay.max(by) + reach, self.height);
            let columns = Canvas::span(ax.min(bx) - reach, ax.max(bx) + reach, self.width);
            let (dx, dy) = (bx - ax, by - ay);
            let square = (dx * dx + dy * dy).max(1e-12);
            for y in rows.clone() {
                for x in columns.clone() {
                    let (px, py) = (x as f64 + 0.5 - ax, y as f64 + 0.5 - ay);
                    let along = ((px * dx + py * dy) / square).clamp(0.0, 1.0);
                    let far = (px - along * dx).hypot(py - along * dy);
                    let covered = (reach - far).clamp(0.0, 1.0) as f32;
                    let mask = &mut self.mask[y * self.width + x];
                    *mask = mask.max(covered);
                }
            }
            self.use_rows(&rows);
        }
    }

    /// All between two lines over the same rising x.
    fn between(&mut self, upper: &[Place], lower: &[Place]) {
        for (above, below) in upper.windows(2).zip(lower.windows(2)) {
            let (left, right) = (above[0].0 * SCALE, above[1].0 * SCALE);
            for x in Canvas::span(left, right, self.width) {
                let at = ((x as f64 + 0.5 - left) / (right - left).max(1e-9)).clamp(0.0, 1.0);
                let y = |line: &[Place]| (line[0].1 + at * (line[1].1 - line[0].1)) * SCALE;
                let (top, bottom) = (y(above), y(below));
                let rows = Canvas::span(top, bottom, self.height);
                for row in rows.clone() {
                    let covered = (bottom.min(row as f64 + 1.0) - top.max(row as f64)).clamp(0.0, 1.0) as f32;
                    let mask = &mut self.mask[row * self.width + x];
                    *mask = mask.max(covered);
                }
                self.use_rows(&rows);
            }
        }
    }

    /// Colours what is covered, and begins anew.
    fn paint(&mut self, colour: Colour, opacity: f32) {
        let span = self.rows.start * self.width..self.rows.end * self.width;
        for (pixel, mask) in self.pixels[span.clone()].iter_mut().zip(&mut self.mask[span]) {
            let share = std::mem::take(mask) * opacity;
            if share > 0.0 {
                for (old, new) in pixel.iter_mut().zip(colour) {
                    *old = (f32::from(*old) + share * (f32::from(new) - f32::from(*old))).round() as u8;
                }
            }
        }
        self.rows = 0..0;
    }

    /// PNG (W3C, third edition): eight bits of red, green and blue, each row as it is.
    fn encode(&self) -> Vec<u8> {
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
        let rows = self.pixels.chunks(self.width.max(1));
        for row in rows {
            let bytes: Vec<u8> = std::iter::once(0).chain(row.iter().flatten().copied()).collect();
            zlib.write_all(&bytes).expect("a vector takes everything");
        }
        let data = zlib.finish().expect("a vector takes everything");
        let size = [self.width as u32, self.height as u32].map(u32::to_be_bytes).concat();
        let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
        chunk(b"IHDR", &[&size[..], &[8, 2, 0, 0, 0]].concat(), &mut out);
        chunk(b"IDAT", &data, &mut out);
        chunk(b"IEND", &[], &mut out);
        out
    }
}

fn chunk(kind: &[u8; 4], data: &[u8], out: &mut Vec<u8>) {
    out.extend((data.len() as u32).to_be_bytes());
    let named = [&kind[..], data].concat();
    let mut crc = Crc::new();
    crc.update(&named);
    out.extend(named);
    out.extend(crc.sum().to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Series;
    use flate2::read::ZlibDecoder;
    use std::io::Read;

    /// The pixels of a PNG that `encode` made.
    fn pixels(png: &[u8], width: usize) -> Vec<Colour> {
        let length = u32::from_be_bytes(png[33..37].try_into().unwrap()) as usize;
        let mut raw = Vec::new();
        ZlibDecoder::new(&png[41..41 + length]).read_to_end(&mut raw).unwrap();
        let rows = raw.chunks(1 + 3 * width).map(|row| &row[1..]);
        rows.flat_map(|row| row.chunks(3).map(|rgb| [rgb[0], rgb[1], rgb[2]]).collect::<Vec<_>>()).collect()
    }

    #[test]
    fn a_line_is_where_its_numbers_are() {
        let points = vec![(0.0, 1.0), (1.0, 1.0)];
        let series = vec![Series { name: String::new(), points }];
        let chart = Chart { series, width: 100, height: 60, x: String::new(), ..Chart::default() };
        let png = chart.png();
        assert_eq!(png[..8], *b"\x89PNG\r\n\x1a\n");
        assert_eq!(png[16..24], [0, 0, 0, 200, 0, 0, 0, 120]);
        let pixels = pixels(&png, 200);
        let blue: Vec<usize> = (0..pixels.len()).filter(|at| pixels[*at] == SERIES[0]).collect();
        assert!(blue.len() > 100, "{}", blue.len());
        let rows: std::collections::BTreeSet<usize> = blue.iter().map(|at| at / 200).collect();
        assert!(rows.len() <= 4, "a level line has few rows: {rows:?}");
    }

    #[test]
    fn dashes_leave_gaps_of_their_length() {
        let pieces = dashed(&[(0.0, 0.0), (40.0, 0.0)], &[5.0, 5.0]);
        let ends: Vec<(f64, f64)> =
            pieces.iter().map(|piece| (piece[0].0, piece[piece.len() - 1].0)).collect();
        assert_eq!(ends, [(0.0, 10.0), (20.0, 30.0), (40.0, 40.0)]);
    }
}
