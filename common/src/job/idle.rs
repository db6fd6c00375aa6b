//! Settings that a job gives and that change nothing in it.

use super::fields::Fields;
use super::{ActivationCheckpointing, Job, Model, Strategy, Warning};
use crate::model::Family;

pub(super) fn warnings(f: &Fields, job: &Job) -> Vec<Warning> {
    let mut all = Vec::new();
    if job.data.validation_fraction == 0.0 {
        let idle = ["eval.eval_steps", "eval.batch_size", "eval.max_eval_examples"];
        let given = idle.into_iter().filter(|name| f.is_given(name));
        all.extend(given.filter(|_| job.eval.eval_steps > 0).map(|name| {
            let spelling = f.spelling(name);
            format!("`{spelling}` counts for nothing: `data.validation_fraction` is 0, so that there is no text to evaluate on")
        }));
    }
    if job.data.rows.is_some() {
        let clean = &job.data.clean;
        let cleaning = [
            ("data.clean.remove_html", clean.remove_html),
            ("data.clean.normalize_whitespace", clean.normalize_whitespace),
            ("data.clean.min_chars", clean.min_chars > 0),
        ];
        let wanted = cleaning.into_iter().find(|(_, is_wanted)| *is_wanted);
        all.extend(wanted.map(|(name, _)| {
            let spelling = f.spelling(name);
            format!("`{spelling}` counts for nothing: texts are cleaned, and the rows of this job are taken as they stand")
        }));
    }
    if job.adapter.as_ref().is_some_and(|adapter| adapter.dropout == Some(1.0)) {
        let spelling = f.spelling("adapter.dropout");
        all.push(format!("`{spelling}` is 1: the matrices of the adapter see nothing in training, so that they never change; 0.05 is usual"));
    }
    if job.strategy == Strategy::Ddp && f.is_given("reshard_after_forward") {
        all.push("`reshard_after_forward` counts for nothing under `strategy` = \"ddp\", where every rank has all weights".into());
    }
    if let (ActivationCheckpointing::First(count), Some(blocks)) =
        (job.activation_checkpointing, blocks(&job.model))
        && count as usize > blocks
    {
        let spelling = f.spelling("activation_checkpointing");
        all.push(format!("`{spelling}` ({count}) is more than the model has blocks ({blocks}): all of them are computed again"));
    }
    all.into_iter().map(Warning).collect()
}

/// Of a new model. One that is there is read where it runs.
fn blocks(model: &Model) -> Option<usize> {
    let Model::New(config) = model else { return None };
    let family = Family::find(config.get("model_type")?.as_str()?)?;
    family.decoder(config).ok().map(|decoder| decoder.layers)
}

#[cfg(test)]
mod tests {
    use super::super::parse_toml;

    #[test]
    fn what_counts_for_nothing_is_said() {
        let cases = [
            (
                "eval_steps = 20\ndata = { path = \"x\", validation_fraction = 0 }",
                Some("`eval_steps` counts for nothing"),
            ),
            ("eval_steps = 0\ndata = { path = \"x\", validation_fraction = 0 }", None),
            ("eval_steps = 20\ndata.path = \"x\"", None),
            (
                "strategy = \"ddp\"\nreshard_after_forward = false\ndata.path = \"x\"",
                Some("where every rank has all weights"),
            ),
            ("strategy = \"fsdp\"\nreshard_after_forward = false\ndata.path = \"x\"", None),
            (
                "gradient_checkpointing = 99\ndata.path = \"x\"",
                Some("`gradient_checkpointing` (99) is more than the model has blocks"),
            ),
            ("activation_checkpointing = 1\ndata.path = \"x\"", None),
            (
                "lora_dropout = 1\nmodel.path = \"m\"\ndata.path = \"x\"",
                Some("`lora_dropout` is 1: the matrices of the adapter see nothing"),
            ),
            ("lora_dropout = 0.9\nmodel.path = \"m\"\ndata.path = \"x\"", None),
        ];
        for (text, wanted) in cases {
            let (_, warnings) = parse_toml(text, "/work/dir".as_ref()).unwrap();
            let said: Vec<&str> = warnings.iter().map(|warning| warning.0.as_str()).collect();
            match wanted {
                Some(wanted) => assert!(said.len() == 1 && said[0].contains(wanted), "{text}: {said:?}"),
                None => assert!(said.is_empty(), "{text}: {said:?}"),
            }
        }
    }
}
