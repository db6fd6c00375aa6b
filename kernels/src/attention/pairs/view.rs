//! What the queries of one head see, and how their scores become exponents.

use super::SIDE;
use crate::attention::slant;
use crate::{Heads, Sight};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// What one head sees.
pub struct View<'a> {
    sight: &'a Sight<'a>,
    slope: f32,
    /// Of scores: one over the root of the head's size.
    pub scale: f32,
}

impl View<'_> {
    pub fn new<'a>(shape: &Heads, sight: &'a Sight, head: usize) -> View<'a> {
        View { sight, slope: sight.slope(head), scale: 1.0 / (shape.head_dim as f32).sqrt() }
    }
    /// What scores are multiplied by to become powers of 2.
    pub fn unit(&self) -> f32 {
        self.scale * LOG2_E
    }
    /// The blocks of keys of which block `i` of queries sees something; its own is the last.
    pub fn blocks(&self, i: usize) -> Range<usize> {
        self.sight.first(i * SIDE) / SIDE..i + 1
    }
    /// Whether block `i` of queries sees all of block `j` of keys, and no slope changes its scores.
    pub fn plain(&self, i: usize, j: usize) -> bool {
        j < i && self.sight.first(i * SIDE + SIDE - 1) <= j * SIDE && self.slope == 0.0
    }
}

/// Adds what the slope says to the scores of the query at `position` with `keys`, of which the first is not after it;
/// those that it does not see become minus infinity.
#[inline(always)]
pub fn hide(scores: &mut [f32], keys: Range<usize>, position: usize, view: &View) {
    let begin = view.sight.first(position).saturating_sub(keys.start).min(keys.len());
    let end = (position + 1 - keys.start).min(keys.len());
    slant(&mut scores[begin..end], keys.start + begin, position, view.slope, view.scale);
    scores[..begin].fill(f32::NEG_INFINITY);
    scores[end..].fill(f32::NEG_INFINITY);
}
