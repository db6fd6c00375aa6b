//! How many tokens a `tokenizer.json` has. Reads nothing else of it; the data package does the tokenising.

use std::collections::BTreeMap;
use std::path::Path;

/// A tokenizer of a million tokens takes some 50 MB.
const FILE_MAX: u64 = 256 << 20;

#[derive(serde::Deserialize)]
struct File {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(serde::Deserialize)]
struct Model {
    vocab: BTreeMap<String, u32>,
}

#[derive(serde::Deserialize)]
struct Added {
    id: u32,
}

/// One more than the highest id. The error is one line that names the file.
pub(super) fn count(path: &Path) -> Result<u32, String> {
    let shown = path.display();
    let size = std::fs::metadata(path).map_err(|e| format!("cannot read {shown}: {e}"))?.len();
    if size > FILE_MAX {
        return Err(format!("{shown} has {size} bytes, too many for a tokenizer.json"));
    }
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {shown}: {e}"))?;
    let file: File =
        serde_json::from_str(&text).map_err(|e| format!("{shown} is not a tokenizer.json: {e}"))?;
    let ids = file.model.vocab.into_values().chain(file.added_tokens.into_iter().map(|token| token.id));
    ids.max().and_then(|id| id.checked_add(1)).ok_or_else(|| format!("{shown} has no tokens"))
}
