// One job: how it does, its curves, where the time of a step goes and for whom ranks wait, its lines, checkpoints and exports.

import { action } from "./actions.js";
import { Chart } from "./chart.js";
import { Facts, h, say, section, Table } from "./dom.js";
import { ago, bytes, count, loss, short, span, state } from "./format.js";
import { ask, Stream } from "./live.js";
import { Log } from "./log.js";

/** Events before the newest that are read when a job is opened, and at once for earlier lines. */
const EVENTS = 500;
/** Looks for earlier lines at once. */
const LOOKS_MAX = 40;
const PARTS = ["data", "forward", "backward", "communication", "waiting", "optimizer", "checkpoint"];
/** Pictures that every training job has; what else it records has one each. */
const USUAL = [
  ["loss", ["loss", "eval_loss"]],
  ["learning rate", ["lr"]],
  ["tokens per second", ["tokens_per_s"], 25],
  ["memory in MiB", ["memory_mib"]],
];
const isUsual = (name) => name.endsWith("_s") || name.startsWith("memory_mib[") || ["loss", "eval_loss", "lr"].includes(name);

export class JobView {
  constructor(link, id) {
    Object.assign(this, { link, id, title: `job-${id}`, charts: [], names: new Set() });
    this.heading = h("h1", {}, `job-${id}`);
    this.badge = h("span");
    this.reason = h("p", { class: "reason", "aria-live": "polite" });
    this.stall = h("p", { class: "alarms", role: "alert", hidden: true });
    this.progress = h("progress", { max: "1", value: "0", "aria-label": "Steps done" });
    this.facts = new Facts(["Step", "Loss", "Evaluation loss", "Learning rate", "Tokens/s", "Memory", "Ranks", "Nodes", "Start", "Submitted", "Ended"]);
    this.error = h("div", { class: "alarms", hidden: true });
    this.figures = h("div", { class: "figures" });
    this.times = this.chart("seconds of a step", ["step_times"], { height: 240 });
    this.now = new Table("Parts of a step", [
      { head: "Part", cell: ({ name }) => ({ text: name, class: `part s${PARTS.indexOf(name)}` }) },
      { head: "Seconds", number: true, cell: ({ seconds }) => short(seconds) },
      { head: "Share", number: true, cell: ({ share }) => ({ text: `${(100 * share).toFixed(1)}%`, class: "steps", share }) },
    ], ({ name }) => name, "Told with the first steps.");
    this.ranks = new Table("Ranks", [
      { head: "Rank", cell: ({ rank }) => ({ text: `rank ${rank}`, class: "id" }) },
      { head: "Node", cell: ({ node }) => node },
      { head: "Own memory", number: true, cell: ({ pss, most }) => (pss == null ? "-" : { text: `${count(pss)} MiB`, class: "steps", share: pss / most }) },
      { head: "Resident", number: true, wide: true, cell: ({ rss }) => (rss == null ? "-" : `${count(rss)} MiB`) },
    ], ({ rank }) => rank, "No rank has a place yet.");
    this.memory = new Map();
    this.waits = h("ol", { class: "decisions", role: "log", "aria-label": "Who waited for whom" });
    this.waitsNote = h("p", { class: "empty" }, "No rank has kept the others waiting while this page was open.");
    this.log = new Log(() => this.older());
    this.checkpoints = new Table("Checkpoints", [
      { head: "Step", number: true, cell: (view) => count(view.checkpoint.step) },
      { head: "Loss", number: true, cell: (view) => loss(view.checkpoint.loss) },
      { head: "Size", number: true, cell: (view) => bytes(view.checkpoint.bytes) },
      { head: "Saved", cell: (view) => ago(view.unix_ms) },
      { head: "On", cell: (view) => view.places.map((place) => place.name).join(", ") || "-" },
      { head: "Path", wide: true, cell: (view) => view.checkpoint.path },
    ], (view) => view.checkpoint.step, "None is recorded.");
    this.exports = new Table("Exports", exportColumns(), (view) => view.export, "None was made.");
    this.settings = h("dl", { class: "settings" });
    this.actions = h("p", { class: "actions" });
    this.training = h("div", {},
      section("Curves", this.figures),
      section("Where the time goes", h("div", { class: "two uneven" }, this.times.element, this.now.element)));
    this.element = h("div", {},
      h("div", { class: "head" }, this.heading, this.badge, h("a", { class: "aside", href: `#/compare?run=job-${id}` }, "compare")),
      this.reason, this.stall, this.progress, this.facts.element, this.actions, this.error,
      this.training,
      h("div", { class: "two" }, section("Ranks", this.ranks.element), section("Waiting", this.waitsNote, this.waits)),
      section("Log", this.log.element),
      h("div", { class: "two" }, section("Checkpoints", this.checkpoints.element), section("Exports", this.exports.element)),
      section("Settings", h("details", {}, h("summary", {}, "All settings of this job"), this.settings)));
    USUAL.forEach(([title, metrics, smooth = 0]) => this.figures.append(this.chart(title, metrics, { smooth }).element));
    this.begin();
  }

  chart(title, metrics, { height, smooth = 0 } = {}) {
    const query = [["run", `job-${this.id}`], ...metrics.map((metric) => ["metric", metric]), ["smooth", smooth]];
    const chart = new Chart(title, () => new URLSearchParams(query), height);
    this.charts.push(chart);
    return chart;
  }

  async begin() {
    try {
      const job = await ask(`/api/v1/jobs/${this.id}`);
      this.first = Math.max(1, job.events - EVENTS + 1);
      this.show({ job, stale: false });
      this.set(job.job_json);
      // A program records no curves of its own.
      this.training.hidden = job.job_json === "";
      this.log.older.hidden = this.first === 1;
    } catch (error) {
      say(this.reason, error.message);
      if (!this.closed) this.timer = setTimeout(() => this.begin(), 2_000);
      return;
    }
    if (this.closed) return;
    const begin = this.first;
    const address = (last) => `/api/v1/jobs/${this.id}/stream?from=${last == null ? begin : last + 1}`;
    this.stream = new Stream(address, {
      job: (seen) => this.show(seen),
      events: (events) => this.take(events),
      refused: (message) => (say(this.reason, message), this.stream.end()),
      end: () => (this.look(), this.stream.end(), this.link("ended")),
    }, (how) => this.link(how));
    this.look();
    // Where the newest events have no line.
    setTimeout(() => this.log.count === 0 && this.log.older.click(), 1_500);
  }

  show({ job, stale }) {
    this.job = job;
    this.link(stale ? "stale" : "live");
    this.element.classList.toggle("old", stale);
    say(this.heading, job.name || this.title);
    const { text, class: name } = state(job.state);
    this.badge.className = name;
    say(this.badge, text);
    say(this.reason, `${this.title}: ${job.reason}`);
    this.progress.hidden = !(job.total_steps > 0);
    this.progress.value = job.total_steps > 0 ? job.step / job.total_steps : 0;
    this.numbers();
    this.stall.hidden = !job.stall;
    if (job.stall) {
      say(this.stall, `stands still for ${span(Date.now() - job.stall.since_unix_ms)}: ${job.stall.what}`);
      if (job.stall.what !== this.waited) this.waitsFor(job.stall.since_unix_ms, job.stall.what);
    }
    this.waited = job.stall?.what;
    this.error.hidden = !job.error;
    if (job.error && !this.error.firstChild) this.error.append(h("p", {}, job.error.message), h("pre", {}, job.error.last_lines.join("\n")));
    this.places();
    const offered = job.finished_unix_ms == null;
    if (offered !== this.offered) {
      this.offered = offered;
      this.actions.replaceChildren(...[offered && action("cancel", `cancel ${this.title}`, `/api/v1/jobs/${this.id}/cancel`)].filter(Boolean));
    }
  }

  /** Its numbers, of the job and of its newest events. */
  numbers() {
    const { job } = this;
    this.facts.update({
      Step: job.total_steps > 0 ? `${count(job.step)} of ${count(job.total_steps)}` : null,
      Loss: job.loss == null ? null : loss(job.loss),
      "Evaluation loss": job.eval_loss == null ? null : loss(job.eval_loss),
      "Learning rate": this.rate == null ? null : short(this.rate),
      "Tokens/s": job.tokens_per_s == null ? null : count(job.tokens_per_s),
      Memory: job.memory_mib == null ? null : `${count(job.memory_mib)} MiB`,
      Ranks: count(job.world_size),
      Nodes: job.parts.map((part) => part.name).join(", ") || null,
      Start: job.generation > 1 ? `no. ${job.generation}` : null,
      Submitted: ago(job.submitted_unix_ms),
      Ended: job.finished_unix_ms == null ? null : ago(job.finished_unix_ms),
    });
  }

  /** Which rank is where, and what it needs. */
  places() {
    const ranks = [];
    for (const part of this.job.parts) {
      for (let n = 0; n < part.ranks && ranks.length < 256; n += 1) ranks.push({ rank: ranks.length, node: part.name, ...this.memory.get(ranks.length) });
    }
    const most = Math.max(1, ...ranks.map(({ pss }) => pss ?? 0));
    this.ranks.update(ranks.map((rank) => ({ ...rank, most })), this.job.world_size > ranks.length && ranks.length > 0 ? `of ${count(this.job.world_size)} ranks` : "");
  }

  /** A batch of `{index, unix_ms, body}`. */
  take(events) {
    const lines = [];
    let moved = false;
    for (const { unix_ms, body } of events) {
      const [kind, of] = Object.entries(body)[0];
      if (kind === "Log") lines.push({ unix_ms, ...of });
      else if (kind === "Step") this.rate = of.lr;
      else if (kind === "Times") this.time(of);
      else if (kind === "Memory") of.pss_mib.forEach((pss, n) => this.memory.set(of.first_rank + n, { pss, rss: of.rss_mib[n] }));
      else if (kind === "LeftOut") lines.push({ unix_ms, rank: null, level: "warn", line: `${of.lines} lines are only in the files of the node` });
      else if (kind === "Checkpoint") this.late();
      else if (kind === "Metrics") of.values.forEach(([name]) => this.name(name));
      if (kind === "Log" && of.rank == null && / slow|wait/.test(of.line)) this.waitsFor(unix_ms, of.line);
      if (kind === "Step") this.name("grad_norm");
      moved ||= ["Step", "Eval", "Times", "Metrics", "Memory"].includes(kind);
    }
    this.log.add(lines);
    if (!moved) return;
    this.numbers();
    this.places();
    this.charts.forEach((chart) => chart.want());
  }

  /** What this job records besides has a picture of its own. */
  name(name) {
    if (this.names.has(name) || isUsual(name) || this.names.size >= 24) return;
    this.names.add(name);
    this.figures.append(this.chart(name, [name]).element);
  }

  time(times) {
    const parts = PARTS.map((name) => ({ name, seconds: times[`${name}_s`] }));
    const whole = parts.reduce((sum, { seconds }) => sum + seconds, 0) || 1;
    this.now.update(parts.map((part) => ({ ...part, share: part.seconds / whole })));
  }

  waitsFor(unixMs, what) {
    this.waitsNote.hidden = true;
    this.waits.prepend(h("li", {}, h("time", {}, new Date(unixMs).toLocaleTimeString("en-GB")), say(h("span"), what)));
    if (this.waits.children.length > 50) this.waits.lastChild.remove();
  }

  /** Lines before the first one that is shown: a fast job has many steps between two of them. */
  async older() {
    for (let looks = 0, found = 0; looks < LOOKS_MAX && found === 0 && this.first > 1 && !this.closed; looks += 1) {
      const from = Math.max(1, this.first - EVENTS);
      const { events } = await ask(`/api/v1/jobs/${this.id}/events?from=${from}`);
      const lines = events.filter(({ index, body }) => index < this.first && body.Log);
      this.log.add(lines.map(({ unix_ms, body }) => ({ unix_ms, ...body.Log })), true);
      [this.first, found] = [from, lines.length];
    }
    return this.first > 1;
  }

  /** Soon, once for all that happens meanwhile. */
  late() {
    clearTimeout(this.soon);
    this.soon = setTimeout(() => this.look(), 500);
  }

  async look() {
    if (this.closed) return;
    const [checkpoints, exports] = await Promise.all([
      ask(`/api/v1/jobs/${this.id}/checkpoints`).catch(() => null),
      ask("/api/v1/exports").catch(() => null),
    ]);
    if (checkpoints) this.checkpoints.update([...checkpoints].reverse());
    if (exports) this.exports.update(exports.filter((view) => view.record.job === this.id));
  }

  set(json) {
    if (!json) return;
    const all = [];
    const walk = (key, value) => {
      if (value && typeof value === "object" && !Array.isArray(value)) Object.entries(value).forEach(([name, inner]) => walk(key ? `${key}.${name}` : name, inner));
      else if (value != null) all.push([key, typeof value === "string" ? value : JSON.stringify(value)]);
    };
    walk("", JSON.parse(json));
    this.settings.replaceChildren(...all.map(([key, value]) => h("div", {}, h("dt", {}, key), say(h("dd"), value))));
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    clearTimeout(this.soon);
    this.stream?.end();
    this.charts.forEach((chart) => chart.close());
  }
}

/** Of any table of exports. */
export function exportColumns() {
  return [
    { head: "Export", cell: (view) => ({ text: `export-${view.export}`, class: "id" }) },
    { head: "Format", cell: (view) => view.record.format },
    { head: "Checkpoint", cell: (view) => ({ text: `job-${view.record.job} step ${count(view.record.step)}`, href: `#/jobs/${view.record.job}` }) },
    { head: "Size", number: true, cell: (view) => bytes(view.record.bytes) },
    { head: "Made", cell: (view) => ago(view.unix_ms) },
    { head: "Path", wide: true, cell: (view) => view.record.path },
  ];
}
