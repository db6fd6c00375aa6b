//! Small jobs on a small text, made anew in each test.

use std::fmt::Write;

/// A job file that trains a Llama of some 100,000 parameters. Every step is reported.
#[derive(Clone, Debug)]
pub struct TinyJob {
    pub run_name: &'static str,
    pub max_steps: u64,
    /// Per rank.
    pub batch_size: u32,
    pub save_steps: u64,
    /// Lines before the tables.
    pub more: &'static str,
}

impl Default for TinyJob {
    fn default() -> Self {
        TinyJob { run_name: "tiny", max_steps: 20, batch_size: 4, save_steps: 0, more: "" }
    }
}

impl TinyJob {
    /// TOML; the data is `corpus.jsonl` in the working directory.
    pub fn toml(&self) -> String {
        let TinyJob { run_name, max_steps, batch_size, save_steps, more } = self;
        format!(
            r#"run_name = "{run_name}"
output_dir = "out"
seed = 7
device = "cpu"
threads_per_rank = 1
max_seq_len = 64
batch_size = {batch_size}
max_steps = {max_steps}
logging_steps = 1
{more}

[model]
vocab_size = 320
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
tie_word_embeddings = true

[data]
path = "corpus.jsonl"
validation_fraction = 0.1

[optimizer]
learning_rate = 1e-3
warmup_steps = 5

[checkpoint]
save_steps = {save_steps}
save_total_limit = 9

[eval]
eval_steps = 0
"#
        )
    }
}

/// `documents` documents of some hundred words in JSONL, the same every time.
pub fn corpus(documents: usize) -> String {
    const WORDS: &str = "harbour winter the of and lantern a slowly crossed river stone morning over their letters forgotten \
                         machine to learned in quiet counting northern light";
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut word = || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words[(state % words.len() as u64) as usize]
    };
    let mut text = String::new();
    for _ in 0..documents {
        let line: Vec<&str> = (0..120).map(|_| word()).collect();
        writeln!(text, r#"{{"text": "{}."}}"#, line.join(" ")).expect("a String takes any text");
    }
    text
}
