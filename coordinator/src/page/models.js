// What was made of checkpoints, and what data looked like when runs used them.

import { h, say, section, Table } from "./dom.js";
import { ago, count, short } from "./format.js";
import { exportColumns } from "./job.js";
import { ask } from "./live.js";

const LOOK_MS = 5_000;

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
      { head: "From", number: true, wide: true, cell: (feature) => short(feature.edges[0]) },
      { head: "To", number: true, wide: true, cell: (feature) => short(feature.edges.at(-1)) },
    ], (feature) => feature.name, "");
    this.chosen = h("h3");
    this.one = h("div", { hidden: true }, this.chosen, this.features.element);
    this.element = h("div", {}, h("h1", {}, "Models and data"), section("Exports", this.exports.element), section("Drift profiles", this.profiles.element, this.one));
    this.look();
  }

  /** The profile that the address names. */
  async query(query) {
    const profile = query.get("profile");
    this.one.hidden = !profile;
    if (!profile) return;
    const view = await ask(`/api/v1/profiles/${encodeURIComponent(profile)}`).catch((error) => say(this.chosen, error.message) && null);
    if (!view) return;
    say(this.chosen, view.record.name);
    this.features.update(view.record.features);
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
  }
}
