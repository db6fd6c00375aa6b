// Runs beside each other in one picture. What is chosen stands in the address, so that it can be sent and kept.

import { Chart } from "./chart.js";
import { h, say, section } from "./dom.js";
import { ago, count, isFinal, loss } from "./format.js";
import { ask } from "./live.js";

const LOOK_MS = 2_000;
/** As many as there are colours that are told apart. */
const RUNS_MAX = 16;

export class CompareView {
  title = "Compare";

  constructor(link, query) {
    this.link = link;
    this.chosen = new Set(query.getAll("run").slice(0, RUNS_MAX));
    this.runs = new Map();
    this.list = h("ul", { class: "runs" });
    this.empty = h("p", { class: "empty" }, "No run has recorded anything yet.");
    this.metric = h("select", { onchange: () => this.changed() }, h("option", {}, query.get("metric") ?? "loss"));
    this.log = h("input", { type: "checkbox", checked: query.get("log") === "1", onchange: () => this.changed() });
    this.smooth = h("input", { type: "range", min: "0", max: "50", value: query.get("smooth") ?? "0", oninput: () => this.changed() });
    this.smoothed = h("output", {}, this.smooth.value);
    this.picture = h("a", { class: "aside", download: "curves.svg" }, "Save as SVG");
    this.chart = new Chart("Runs compared", () => this.drawn(), 420);
    const tools = h("div", { class: "tools" },
      h("label", {}, "Metric ", this.metric), h("label", {}, this.log, " log scale"),
      h("label", {}, "Mean of ", this.smooth, " ", this.smoothed, " points"), this.picture);
    this.element = h("div", {}, h("h1", {}, "Compare runs"),
      h("div", { class: "compare" }, section("Runs", h("fieldset", {}, h("legend", { class: "unseen" }, "Runs to draw"), this.list), this.empty), section("Curves", tools, this.chart.element)));
    this.changed();
    this.look();
  }

  /** What is drawn, or null where no run is chosen. */
  drawn() {
    if (this.chosen.size === 0) return null;
    const query = new URLSearchParams([...this.chosen].map((run) => ["run", run]));
    query.set("metric", this.metric.value);
    if (this.log.checked) query.set("log", "1");
    if (this.smooth.value !== "0") query.set("smooth", this.smooth.value);
    return query;
  }

  changed() {
    say(this.smoothed, this.smooth.value);
    const query = this.drawn();
    history.replaceState(null, "", query ? `#/compare?${query}` : "#/compare");
    this.picture.hidden = !query;
    if (query) this.picture.setAttribute("href", `/api/v1/runs/plot.svg?${query}`);
    for (const [run, row] of this.runs) row.box.disabled = !row.box.checked && this.chosen.size >= RUNS_MAX && !this.chosen.has(run);
    this.chart.want();
  }

  /** Which runs there are, and which series the chosen ones have. */
  async look() {
    try {
      const [jobs, own] = await Promise.all([ask("/api/v1/jobs"), ask("/api/v1/runs")]);
      this.link("live");
      const trains = jobs.filter((job) => job.step > 0 || job.total_steps > 0).reverse();
      this.show([
        ...trains.map((job) => ({ run: `job-${job.job}`, name: job.name, moves: !isFinal(job.state), about: `step ${count(job.step)}, loss ${loss(job.loss)}` })),
        ...own.map((run) => ({ run: `run-${run.run.Own}`, name: run.name, moves: run.state === "open", about: `${count(run.points)} points, ${ago(run.started_unix_ms)}` })),
      ]);
      await this.names();
    } catch {
      this.link("lost");
    }
    if (!this.closed) this.timer = setTimeout(() => this.look(), LOOK_MS);
  }

  show(runs) {
    this.empty.hidden = runs.length > 0;
    let moves = false;
    for (const { run, name, about, moves: does } of runs) {
      let row = this.runs.get(run);
      if (!row) {
        const box = h("input", { type: "checkbox", checked: this.chosen.has(run), onchange: () => {
          if (box.checked) this.chosen.add(run);
          else this.chosen.delete(run);
          this.changed();
          this.names();
        } });
        row = { box, about: h("small") };
        this.runs.set(run, row);
        this.list.append(h("li", {}, h("label", {}, box, " ", say(h("b"), name), ` ${run} `, row.about)));
      }
      say(row.about, about);
      moves ||= does && this.chosen.has(run);
    }
    if (moves) this.chart.want();
  }

  async names() {
    const all = await Promise.all([...this.chosen].map((run) => ask(`/api/v1/runs/${run}/series`).catch(() => [])));
    const names = [...new Set([this.metric.value, "loss", ...all.flat().map(({ name }) => name)])].sort();
    if (names.join() === [...this.metric.options].map((option) => option.value).join()) return;
    const chosen = this.metric.value;
    this.metric.replaceChildren(...names.map((name) => h("option", { selected: name === chosen }, name)));
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    this.chart.close();
  }
}
