//! What a rank is made of: `assemble` puts an executor and a strategy together for a job, which `fleet_learn` then trains. `generate` writes
//! texts from a model directory, `logits` shows what a model computes, `eval` how well it
//! predicts, `merge` makes one model of it and its adapters, `plan` says what a job will need, `serve` answers over HTTP, `local` trains a job in
//! this process.

pub mod assemble;
pub mod choice;
pub mod eval;
pub mod fits;
mod gang;
pub mod generate;
pub mod host_model;
pub mod local;
pub mod logits;
pub mod merge;
mod place;
pub mod plan;
pub mod quantise;
pub mod serve;
