//! A job's events on the screen: a progress bar on a terminal, plain lines elsewhere, JSON lines on request. And the summary, which is gathered
//! from the events on the way.

use crate::json::{self, Summary};
use crate::{out, text};
use fleet_common::events::{Event, EventBody, Level, Metrics, Outcome, Step, Times};
use fleet_common::ids::Rank;
use fleet_common::protocol::{JobState, JobView};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;
use std::io::IsTerminal;
use std::time::Instant;

/// How the events are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Bar,
    Lines,
    Json,
    /// As `Lines`, without the training: a program's own output.
    Program {
        ranks: u32,
    },
}

impl Style {
    /// JSON on request, a bar on a terminal, otherwise lines.
    pub fn of_training(json: bool) -> Style {
        match (json, std::io::stdout().is_terminal()) {
            (true, _) => Style::Json,
            (false, true) => Style::Bar,
            (false, false) => Style::Lines,
        }
    }
}

/// Shows events and gathers the summary.
pub struct Report {
    style: Style,
    bar: Option<ProgressBar>,
    summary: Summary,
    first_eval: Option<f64>,
    /// The run had made steps before.
    goes_on: bool,
    /// The summary's times are those of the first step.
    first_step_alone: bool,
    /// When the process started, in milliseconds since 1970: what `first_step_s` counts from.
    started_unix_ms: Option<u64>,
    training_since: Option<Instant>,
    steps_since: u64,
    memory_mib: u64,
}

impl Report {
    /// `started_unix_ms`: when the command began that started the job.
    pub fn new(style: Style, started_unix_ms: Option<u64>) -> Report {
        Report {
            style,
            bar: None,
            summary: Summary { status: "failed", ..Summary::default() },
            first_eval: None,
            goes_on: false,
            first_step_alone: false,
            started_unix_ms,
            training_since: None,
            steps_since: 0,
            memory_mib: 0,
        }
    }

    pub fn is_json(&self) -> bool {
        self.style == Style::Json
    }

    /// Where the cluster is. Nothing is said over a program's own output.
    pub fn cluster(&mut self, json: &Value, text: &str) {
        if !matches!(self.style, Style::Program { .. }) {
            self.say(json, text);
        }
    }

    /// A line of fleet itself: JSON as given, for people the text.
    pub fn say(&mut self, json: &Value, text: &str) {
        match self.style {
            Style::Json => out::json(json),
            _ => self.note(text),
        }
    }

    /// A line for people on stderr, whatever the style.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| out::note(text)),
            None => out::note(text),
        }
    }

    pub fn submitted(&mut self, job: &str, ranks: u32) {
        self.summary.job = Some(job.to_owned());
        if self.style == Style::Json {
            out::json(&json::submitted(job, ranks));
        }
    }

    pub fn event(&mut self, event: &Event) {
        self.gather(event);
        match self.style {
            Style::Json => out::json(&json::event(event)),
            Style::Program { ranks } => program_line(&event.body, ranks),
            Style::Lines => {
                if let Some(line) = self.line(&event.body) {
                    out::output(&line);
                }
            }
            Style::Bar => self.draw(&event.body),
        }
    }

    /// A line that a rank printed, without its time.
    pub fn line_of(&mut self, rank: Rank, line: &[u8]) {
        match self.style {
            Style::Json => {
                let line = String::from_utf8_lossy(line).into_owned();
                let body = EventBody::Log { rank: Some(rank), level: Level::Info, line };
                let mut json = json::event(&Event { unix_ms: 0, body });
                json["time"] = Value::Null;
                out::json(&json);
            }
            _ => out::output_bytes(&format!("[rank {rank}] "), line),
        }
    }

    fn gather(&mut self, event: &Event) {
        let summary = &mut self.summary;
        match &event.body {
            EventBody::Step(step) => {
                summary.steps = summary.steps.max(step.step);
                summary.final_loss = Some(step.loss);
                summary.tokens_per_s = Some(step.tokens_per_s);
                if summary.first_step_s.is_none() {
                    summary.first_step_s =
                        self.started_unix_ms.map(|start| event.unix_ms.saturating_sub(start) as f64 / 1000.0);
                }
            }
            EventBody::Eval(eval) => {
                // Of a run that goes on the first one was told before.
                if !self.goes_on {
                    self.first_eval.get_or_insert(eval.loss);
                }
                summary.steps = summary.steps.max(eval.step);
                summary.eval_loss = Some(eval.loss);
            }
            EventBody::Checkpoint(checkpoint) => {
                summary.checkpoint = Some(checkpoint.path.clone());
                summary.steps = summary.steps.max(checkpoint.step);
            }
            EventBody::CheckpointFailed { step, .. } => summary.steps = summary.steps.max(*step),
            EventBody::Memory { first_rank, rss_mib, .. } => {
                self.memory_mib = rss_mib.iter().copied().max().unwrap_or_default();
                let first = *first_rank as usize;
                summary.peak_rss_mib.resize(summary.peak_rss_mib.len().max(first + rss_mib.len()), 0);
                for (peak, now) in summary.peak_rss_mib.iter_mut().skip(first).zip(rss_mib) {
                    *peak = (*peak).max(*now);
                }
            }
            EventBody::Finished(Outcome::Succeeded { steps, final_loss, tokens_per_s }) => {
                summary.steps = *steps;
                summary.final_loss = final_loss.or(summary.final_loss);
                summary.tokens_per_s = Some(*tokens_per_s);
            }
            EventBody::Finished(Outcome::Stopped { steps }) => summary.steps = *steps,
            // The first step carries the warming up of everything.
            EventBody::Times(times) => {
                let before = summary.times.filter(|_| !std::mem::take(&mut self.first_step_alone));
                self.first_step_alone = summary.times.is_none() && times.steps == 1;
                summary.times = Some(before.map_or(*times, |before| before.and(times)));
            }
            EventBody::Started { step, .. } => {
                self.steps_since = *step;
                self.goes_on |= *step > 0;
            }
            _ => {}
        }
    }

    /// One plain line; `None` where there is nothing to say.
    fn line(&self, event: &EventBody) -> Option<String> {
        Some(match event {
            EventBody::DataReady(data) => format!(
                "data: {} documents, {} tokens, vocabulary {}, {} windows to train on and {} to evaluate{} ({:.1} s)",
                text::thousands(data.documents),
                text::thousands(data.train_tokens),
                data.vocab_size,
                text::thousands(data.train_windows),
                text::thousands(data.validation_windows),
                if data.cached { ", from the cache" } else { "" },
                data.seconds,
            ),
            EventBody::Started { step, parameters, device } => {
                let from = if *step > 0 { format!(", going on after step {step}") } else { String::new() };
                format!("training {} parameters on {device}{from}", text::short(*parameters))
            }
            EventBody::Step(step) => format!(
                "step {}/{}  loss {:.4}  lr {}  grad norm {:.3}  {} tokens/s{}",
                step.step,
                step.total_steps,
                step.loss,
                text::small(step.lr),
                step.grad_norm,
                text::thousands(step.tokens_per_s.max(0.0) as u64),
                self.memory(),
            ),
            EventBody::Eval(eval) => {
                let first = self.first_eval.filter(|first| eval.loss < *first);
                let share = first.map_or(String::new(), |first| {
                    format!(" ({:.0}% of the first)", 100.0 * eval.loss / first)
                });
                format!(
                    "evaluation at step {}: loss {:.4}{share}, {:.3} bits per byte over {} tokens",
                    eval.step,
                    eval.loss,
                    eval.bits_per_byte,
                    text::thousands(eval.tokens)
                )
            }
            EventBody::Metrics(Metrics { step, values }) => {
                let values: Vec<String> =
                    values.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
                format!("step {step}: {}", values.join(", "))
            }
            EventBody::Checkpoint(checkpoint) => {
                format!(
                    "checkpoint at step {}: {} ({}B)",
                    checkpoint.step,
                    checkpoint.path,
                    text::short(checkpoint.bytes)
                )
            }
            EventBody::CheckpointFailed { step, error } => {
                format!(
                    "warning: the checkpoint at step {step} could not be saved, training goes on: {error}"
                )
            }
            EventBody::Log { rank, level, line } => {
                let who = rank.map_or("node".to_owned(), |rank| format!("rank {rank}"));
                match level {
                    Level::Info => format!("[{who}] {line}"),
                    level => format!("[{who}] {}: {line}", json::level_name(*level)),
                }
            }
            EventBody::LeftOut { lines, bytes } => format!("[node] {}", left_out(*lines, *bytes)),
            EventBody::Memory { .. }
            | EventBody::Stall(_)
            | EventBody::Listening(_)
            | EventBody::Times(_)
            | EventBody::CheckpointLost { .. }
            | EventBody::CheckpointsRemoved { .. }
            | EventBody::Finished(_) => return None,
        })
    }

    fn memory(&self) -> String {
        if self.memory_mib == 0 { String::new() } else { format!("  {} MiB per rank", self.memory_mib) }
    }

    fn draw(&mut self, event: &EventBody) {
        match event {
            EventBody::Step(step) => {
                let left = self.left(step);
                let memory = self.memory();
                let bar = self.bar.get_or_insert_with(|| new_bar(step.total_steps));
                bar.set_length(step.total_steps);
                bar.set_position(step.step);
                bar.set_message(format!(
                    "loss {:.4}  {} tokens/s{left}{memory}",
                    step.loss,
                    text::thousands(step.tokens_per_s.max(0.0) as u64)
                ));
            }
            other => {
                if let Some(line) = self.line(other) {
                    match &self.bar {
                        Some(bar) => bar.suspend(|| out::output(&line)),
                        None => out::output(&line),
                    }
                }
            }
        }
    }

    /// Time left at the pace so far.
    fn left(&mut self, step: &Step) -> String {
        let Some(since) = self.training_since else {
            // the first step carries the warming up of everything
            (self.training_since, self.steps_since) = (Some(Instant::now()), step.step);
            return String::new();
        };
        let done = step.step.saturating_sub(self.steps_since);
        if done == 0 {
            return String::new();
        }
        let seconds =
            since.elapsed().as_secs_f64() / done as f64 * step.total_steps.saturating_sub(step.step) as f64;
        format!("  {} left", text::clock(seconds.round() as u64))
    }

    /// Ends the job's display with its outcome, takes what the cluster knows better into the summary, and prints it last.
    pub fn finish(&mut self, end: End) -> Summary {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        let summary = &mut self.summary;
        match end {
            End::Job(view) => {
                summary.status = status(view.state);
                summary.job = Some(view.job.to_string());
                summary.error = view.error.as_ref().map(json::job_error);
                if summary.status == "failed" && summary.error.is_none() {
                    summary.error = Some(json::plain_error(&view.reason, None));
                }
                if let Some(checkpoint) = &view.checkpoint {
                    summary.checkpoint = Some(checkpoint.path.clone());
                }
            }
            End::Failed { message, code } => {
                summary.status = "failed";
                summary.error = Some(json::plain_error(&message, Some(code)));
            }
            End::Cancelled => summary.status = "cancelled",
        }
        if self.style == Style::Json {
            out::json(&json::summary(&self.summary));
        } else {
            let program = matches!(self.style, Style::Program { .. });
            // a program's own output stays alone on stdout
            let say = if program || self.summary.status != "succeeded" { out::note } else { out::line };
            last_words(&self.summary, self.first_eval, program).iter().for_each(|line| say(line));
        }
        self.summary.clone()
    }
}

/// How it ended.
pub enum End {
    Job(Box<JobView>),
    /// It failed outside the job: the cluster could not be started, or was lost.
    Failed {
        message: String,
        code: u8,
    },
    /// Stopped before there was a job.
    Cancelled,
}

fn status(state: JobState) -> &'static str {
    match state {
        JobState::Succeeded => "succeeded",
        JobState::Cancelled => "cancelled",
        _ => "failed",
    }
}

fn last_words(summary: &Summary, first_eval: Option<f64>, program: bool) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(error) = &summary.error {
        lines.push(format!("error: {}", error["message"].as_str().unwrap_or_default()));
        let last_lines = error["last_lines"].as_array().map_or(&[][..], Vec::as_slice);
        lines.extend(last_lines.iter().filter_map(Value::as_str).map(|line| format!("  | {line}")));
    }
    if program && summary.status == "succeeded" {
        return lines;
    }
    let job = summary.job.as_deref().unwrap_or("the job");
    let mut parts = vec![format!("{job} {}", summary.status)];
    // Not every step is told; how far one came that failed is known from the last that was.
    match (summary.status, summary.steps) {
        (_, 0) => {}
        ("failed", steps) => parts.push(format!("{steps} steps or more")),
        (_, steps) => parts.push(format!("{steps} steps")),
    }
    if let Some(loss) = summary.final_loss {
        parts.push(format!("loss {loss:.4}"));
    }
    match (first_eval, summary.eval_loss) {
        (Some(first), Some(last)) if first != last => {
            parts.push(format!("evaluation loss {first:.4} -> {last:.4} ({:.0}%)", 100.0 * last / first));
        }
        (_, Some(last)) => parts.push(format!("evaluation loss {last:.4}")),
        _ => {}
    }
    if let Some(rate) = summary.tokens_per_s.filter(|rate| *rate > 0.0) {
        parts.push(format!("{} tokens/s", text::thousands(rate as u64)));
    }
    if let Some(seconds) = summary.first_step_s {
        parts.push(format!("first step after {seconds:.1} s"));
    }
    if let Some(peak) = summary.peak_rss_mib.iter().max() {
        parts.push(format!("{peak} MiB per rank"));
    }
    lines.push(parts.join(", "));
    lines.extend(summary.times.as_ref().filter(|times| times.step_s() > 0.0).map(where_time_went));
    lines.extend(summary.checkpoint.as_ref().map(|path| format!("checkpoint: {path}")));
    lines
}

/// `a step took 0.41 s: forward 30%, backward 60%, ...`; what takes less than half of a percent is left out.
fn where_time_went(times: &Times) -> String {
    let step_s = times.step_s();
    let parts = times.parts().into_iter().map(|(name, seconds)| (name, 100.0 * seconds / step_s));
    let parts: Vec<String> =
        parts.filter(|(_, share)| *share >= 0.5).map(|(name, share)| format!("{name} {share:.0}%")).collect();
    format!("a step took {}: {}", text::seconds(step_s), parts.join(", "))
}

fn new_bar(steps: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stdout());
    let style = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style);
    bar
}

/// Says that output stands only on the nodes.
fn left_out(lines: u64, bytes: u64) -> String {
    format!(
        "... {} lines ({}B) are left out here; `fleet logs JOB --full` has all of them",
        text::thousands(lines),
        text::short(bytes)
    )
}

fn program_line(event: &EventBody, ranks: u32) {
    let (rank, level, line) = match event {
        EventBody::Log { rank, level, line } => (rank, level, line),
        EventBody::LeftOut { lines, bytes } => {
            return out::note(&format!("[node] {}", left_out(*lines, *bytes)));
        }
        _ => return,
    };
    let prefix = rank_prefix(*rank, ranks);
    match level {
        Level::Info => out::own_output(format!("{prefix}{line}\n").as_bytes()),
        _ => out::own_error(format!("{prefix}{line}\n").as_bytes()),
    }
}

/// `[rank 2] `, nothing where one rank is alone.
fn rank_prefix(rank: Option<Rank>, ranks: u32) -> String {
    match rank {
        Some(_) if ranks == 1 => String::new(),
        Some(rank) => format!("[rank {rank}] "),
        None => "[node] ".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::events::Evaluation;

    fn event(unix_ms: u64, body: EventBody) -> Event {
        Event { unix_ms, body }
    }

    fn step(step: u64, loss: f64) -> EventBody {
        EventBody::Step(Step {
            step,
            total_steps: 10,
            epoch: 0.1,
            loss,
            lr: 1e-3,
            grad_norm: 1.0,
            tokens_per_s: 1234.5,
        })
    }

    #[test]
    fn the_summary_is_gathered_from_the_events() {
        let mut report = Report::new(Style::Program { ranks: 1 }, Some(1_000));
        report.event(&event(
            1_500,
            EventBody::Memory { first_rank: 0, rss_mib: vec![100, 300], pss_mib: vec![1, 1] },
        ));
        report.event(&event(3_500, step(1, 7.0)));
        report.event(&event(
            4_000,
            EventBody::Memory { first_rank: 0, rss_mib: vec![200, 250], pss_mib: vec![1, 1] },
        ));
        report.event(&event(4_500, step(2, 6.0)));
        let eval = Evaluation { step: 2, loss: 6.5, bits_per_byte: 2.0, tokens: 9 };
        report.event(&event(4_600, EventBody::Eval(eval)));
        let summary = report.finish(End::Failed { message: "gone".into(), code: 3 });
        assert_eq!(summary.first_step_s, Some(2.5));
        assert_eq!(summary.peak_rss_mib, [200, 300]);
        assert_eq!((summary.steps, summary.final_loss, summary.eval_loss), (2, Some(6.0), Some(6.5)));
        assert_eq!((summary.status, &summary.error.unwrap()["message"]), ("failed", &Value::from("gone")));
    }

    #[test]
    fn of_a_failed_job_no_more_is_said_than_is_known() {
        let mut report = Report::new(Style::Program { ranks: 1 }, None);
        report.event(&event(0, step(1, 7.0)));
        let error = "no space left on device".to_owned();
        report.event(&event(0, EventBody::CheckpointFailed { step: 8, error }));
        let summary = report.finish(End::Failed { message: "gone".into(), code: 1 });
        let words = last_words(&summary, None, false).join("\n");
        assert!(words.contains("the job failed, 8 steps or more"), "{words}");
    }

    #[test]
    fn plain_lines_read_as_sentences() {
        let mut report = Report::new(Style::Lines, None);
        let first = EventBody::Eval(Evaluation { step: 0, loss: 8.0, bits_per_byte: 4.0, tokens: 1000 });
        report.gather(&event(0, first));
        let second = EventBody::Eval(Evaluation { step: 5, loss: 4.0, bits_per_byte: 2.0, tokens: 1000 });
        assert_eq!(
            report.line(&second).unwrap(),
            "evaluation at step 5: loss 4.0000 (50% of the first), 2.000 bits per byte over 1,000 tokens"
        );
        let mut later = Report::new(Style::Lines, None);
        later.gather(&event(0, EventBody::Started { step: 4, parameters: 1, device: "cpu".into() }));
        later.gather(&event(
            0,
            EventBody::Eval(Evaluation { step: 5, loss: 5.0, bits_per_byte: 2.0, tokens: 1000 }),
        ));
        assert_eq!(
            later.line(&second).unwrap(),
            "evaluation at step 5: loss 4.0000, 2.000 bits per byte over 1,000 tokens",
            "of a run that goes on the first one is not known"
        );
        assert_eq!(
            report.line(&step(3, 7.25)).unwrap(),
            "step 3/10  loss 7.2500  lr 1.00e-3  grad norm 1.000  1,234 tokens/s"
        );
        assert_eq!(report.line(&EventBody::Memory { first_rank: 0, rss_mib: vec![], pss_mib: vec![] }), None);
    }
}
