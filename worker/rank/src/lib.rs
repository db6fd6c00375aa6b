//! What a rank is made of: `assemble` puts an executor and a strategy together for a job, which `fleet_learn` then trains. `generate` continues a
//! text from a model directory, `logits` shows what a model computes, `eval` how well it
//! predicts, `plan` what a job will need.

pub mod assemble;
pub mod choice;
pub mod eval;
pub mod fits;
mod gang;
pub mod generate;
pub mod host_model;
pub mod logits;
pub mod machine;
mod place;
pub mod plan;
