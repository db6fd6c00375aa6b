//! "Did you mean": the known name that is nearest to an unknown one.

/// The nearest of `known`, if one is near. Dotted names are also compared by their last part, so that a key in the wrong table
/// (`hidden_size` for `model.hidden_size`) is found.
pub fn nearest<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wrong = wrong.to_lowercase();
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    known
        .into_iter()
        .map(|name| {
            let whole = strsim::damerau_levenshtein(&wrong, name);
            // a hit on the last part alone counts one more, so that the same table wins
            let part = strsim::damerau_levenshtein(&last(&wrong), &last(name)) + 1;
            (whole.min(part), name)
        })
        .filter(|(distance, name)| *distance <= allowed(&last(name)))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// A third of the name's letters may differ, two at least where the name has more than three.
fn allowed(name: &str) -> usize {
    match name.len() {
        0..=3 => 1,
        n => (n / 3).max(2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 5] = ["learning_rate", "lr", "epochs", "model.hidden_size", "eval.batch_size"];

    #[test]
    fn the_nearest_name_is_found_across_tables() {
        let cases = [
            ("learnig_rate", Some("learning_rate")),
            ("Epochs", Some("epochs")),
            ("hidden_size", Some("model.hidden_size")),
            ("modle.hidden_size", Some("model.hidden_size")),
            ("eval.batchsize", Some("eval.batch_size")),
            ("colour", None),
            ("x", None),
        ];
        for (wrong, wanted) in cases {
            assert_eq!(nearest(wrong, KNOWN), wanted, "{wrong}");
        }
    }
}
