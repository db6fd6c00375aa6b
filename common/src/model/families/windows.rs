//! How far the layers of a model see: `layer_types`, which all families spell alike.

use crate::model::{Object, Settings};
use serde_json::Value;

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

/// For each of `layers` whether `layer_types` gives it a window; `None` where there is no such list. What transformers refuses is refused,
/// and what fleet does not compute.
pub fn listed(s: &Settings, layers: usize) -> Result<Option<Vec<bool>>, String> {
    const KEY: &str = "layer_types";
    let Some(value) = s.get(KEY) else { return Ok(None) };
    let list = value.as_array().ok_or(format!("{KEY} is {value}, not a list of texts"))?;
    if list.len() != layers {
        return Err(format!("{KEY} has {} entries, and the model {layers} layers", list.len()));
    }
    let slides = |kind: &Value| match kind.as_str() {
        Some(SLIDING) => Ok(true),
        Some(FULL) => Ok(false),
        _ => Err(format!("{KEY} has {kind}; fleet computes {FULL} and {SLIDING}")),
    };
    list.iter().map(slides).collect::<Result<_, _>>().map(Some)
}

/// The window of each layer: `window` where `layer_types` says so, without it where `otherwise` does. `off` is what a file says that has no window.
pub fn read(
    s: &Settings,
    layers: usize,
    window: Option<usize>,
    off: &str,
    otherwise: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>, String> {
    let given = listed(s, layers)?;
    if window.is_none() && given.as_ref().is_some_and(|list| list.contains(&true)) {
        return Err(format!("layer_types has {SLIDING}, and {off}: there is no window for it"));
    }
    let slides = |layer: usize| given.as_ref().map_or_else(|| otherwise(layer), |list| list[layer]);
    Ok((0..layers).map(|layer| window.filter(|_| slides(layer))).collect())
}

/// Writes the window, and `layer_types`.
pub fn write(json: &mut Object, windows: &[Option<usize>]) {
    json.insert("sliding_window".into(), windows.iter().flatten().next().copied().into());
    let kind = |window: &Option<usize>| if window.is_some() { SLIDING } else { FULL };
    json.insert("layer_types".into(), windows.iter().map(kind).collect());
}
