//! Whether what a run learns is written by a chat template: then the model is to be asked by it, too.

use fleet_common::job::{ChatTemplate, Job, Model};
use fleet_data::chat::Templates;
use fleet_data::{DataFiles, TokenCache};
use fleet_learn::{Error, Result};
use std::path::PathBuf;

/// Rows that become conversations where there is a template, as a cache calls them; the others do where a template is asked for.
const CONVERSATIONS: [&str; 3] = ["messages", "conversations", "instruction and output"];

/// Of a job that was trained, so that its data are tokenised.
pub(crate) fn are_learnt(job: &Job) -> Result<bool> {
    let (Some(rows), Model::Pretrained(dir)) = (&job.data.rows, &job.model) else { return Ok(false) };
    match &rows.chat_template {
        Some(ChatTemplate::None) => return Ok(false),
        Some(_) => return Ok(true),
        None => {}
    }
    let files = DataFiles::find(job, &|_| ())?;
    let (cache, _) = TokenCache::build_or_open(job, &files, &|_| ())?;
    let Some(meta) = &cache.meta().rows else { return Ok(false) };
    if meta.chat_template.is_some() {
        return Ok(true);
    }
    let adapter = job.adapter.as_ref().and_then(|adapter| adapter.path.clone());
    let templates = Templates::of_changed(dir, &adapter.into_iter().collect::<Vec<PathBuf>>());
    let templates = templates.map_err(|e| Error::Input(e.to_string()))?;
    let has_template = templates.choose(None, false).is_ok();
    Ok(has_template && meta.report.formats.iter().any(|format| CONVERSATIONS.contains(&format.as_str())))
}
