// What was made of checkpoints, and what data looked like when runs used them.

import { Chart } from "./chart.js";
import { h, say, section, Table } from "./dom.js";
import { ago, count, short } from "./format.js";
import { exportColumns } from "./job.js";
import { ask } from "./live.js";

const LOOK_MS = 5_000;
/** Pictures of one profile. */
const PICTURES_MAX = 24;

/** Population stability index: how far two distributions over the same bins are apart; null where their bins differ. */
export function psi(one, other) {
  if (!other || one.edges.join() !== other.edges.join()) return null;
  const shares = ({ counts }) => {
    const all = counts.reduce((sum, count) => sum + count, 0) || 1;
    return counts.map((count) => Math.max(count / all, 1e-4));
  };
  const [p, q] = [shares(one), shares(other)];
  return p.reduce((sum, share, bin) => sum + (share - q[bin]) * Math.log(share / q[bin]), 0);
}

/** What is said of it as a rule. */
const drift = (value) => (value == null ? "-" : value < 0.1 ? { text: `${value.toFixed(3)} none`, class: "state" } : value < 0.25 ? { text: `${value.toFixed(3)} some`, class: "state warn" } : { text: `${value.toFixed(3)} much`, class: "state failed" });

export class ModelsView {
  title = "Models and data";

  constructor(link) {
    this.link = link;
    this.exports = new Table("Exports", exportColumns(), (view) => view.export, "Nothing was exported yet.");
    this.profiles = new Table("Drift profiles", [
      { head: "Profile", cell: (view) => ({ text: `profile-${view.profile}`, href: `#/models?profile=${view.profile}` }) },
      { head: "Name", cell: (view) => view.record.name },
      { head: "Run", cell: (view) => (view.record.run.Job ? `job-${view.record.run.Job}` : `run-${view.record.run.Own}`) },
      { head: "Features", number: true, cell: (view) => count(view.record.features.length) },
      { head: "Made", cell: (view) => ago(view.unix_ms) },
    ], (view) => view.profile, "No profile of data was recorded yet.");
    this.features = new Table("Features", [
      { head: "Feature", cell: (feature) => feature.name },
      { head: "Samples", number: true, cell: (feature) => count(feature.samples) },
      { head: "Mean", number: true, cell: (feature) => short(feature.mean) },
      { head: "Deviation", number: true, cell: (feature) => short(feature.std_dev) },
      { head: "Drift (PSI)", number: true, cell: (feature) => drift(feature.psi) },
      { head: "From", number: true, wide: true, cell: (feature) => short(feature.edges[0]) },
      { head: "To", number: true, wide: true, cell: (feature) => short(feature.edges.at(-1)) },
    ], (feature) => feature.name, "");
    this.chosen = h("h3");
    this.figures = h("div", { class: "figures" });
    this.charts = [];
    this.one = h("div", { hidden: true }, this.chosen, this.features.element, this.figures);
    this.element = h("div", {}, h("h1", {}, "Models and data"), section("Exports", this.exports.element), section("Drift profiles", this.profiles.element, this.one));
    this.look();
  }

  /** The profile that the address names. */
  async query(query) {
    const profile = query.get("profile");
    this.one.hidden = !profile;
    if (!profile) return;
    try {
      const view = await ask(`/api/v1/profiles/${encodeURIComponent(profile)}`);
      const before = (await ask("/api/v1/profiles")).find((other) => other.profile < view.profile && other.record.name === view.record.name);
      this.draw(view, before && (await ask(`/api/v1/profiles/${before.profile}`)));
    } catch (error) {
      say(this.chosen, error.message);
    }
  }

  /** A profile beside the one of the same name before it. */
  draw(view, before) {
    say(this.chosen, before ? `${view.record.name}: profile-${view.profile} beside profile-${before.profile}` : `${view.record.name}: profile-${view.profile}`);
    const earlier = (name) => before?.record.features.find((feature) => feature.name === name);
    this.features.update(view.record.features.map((feature) => ({ ...feature, psi: psi(feature, earlier(feature.name)) })));
    this.charts.forEach((chart) => chart.close());
    const profiles = [view, before].filter(Boolean).map(({ profile }) => ["profile", `profile-${profile}`]);
    this.charts = view.record.features.slice(0, PICTURES_MAX).map(({ name }) => new Chart(name, () => new URLSearchParams([...profiles, ["feature", name]]), 200, "profiles"));
    this.figures.replaceChildren(...this.charts.map((chart) => chart.element));
  }

  async look() {
    try {
      const [exports, profiles] = await Promise.all([ask("/api/v1/exports"), ask("/api/v1/profiles")]);
      this.link("live");
      this.exports.update(exports);
      this.profiles.update(profiles);
    } catch {
      this.link("lost");
    }
    if (!this.closed) this.timer = setTimeout(() => this.look(), LOOK_MS);
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    this.charts.forEach((chart) => chart.close());
  }
}
