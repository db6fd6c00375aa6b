// The cluster: its coordinators, nodes and queue, and what was decided of late.

import { action } from "./actions.js";
import { Facts, h, say, section, Table } from "./dom.js";
import { ago, count, isFinal, loss, plural, span, state } from "./format.js";
import { ask, Stream } from "./live.js";

const DECISIONS_MS = 5_000;
const RANK = { running: 0, starting: 0, stopping: 0, queued: 1 };

/** Those that run, those that wait as they are planned, then the newest of the others. */
export function inOrder(jobs) {
  const rank = (job) => RANK[job.state] ?? 2;
  const priority = (job) => job.wish?.priority ?? 0;
  return [...jobs].sort((a, b) => {
    if (rank(a) !== rank(b)) return rank(a) - rank(b);
    if (rank(a) === 1 && priority(a) !== priority(b)) return priority(b) - priority(a);
    return rank(a) === 2 ? b.job - a.job : a.job - b.job;
  });
}

const steps = (job) => ({
  text: job.total_steps > 0 ? `${count(job.step)} / ${count(job.total_steps)}` : job.step > 0 ? count(job.step) : "-",
  class: "steps",
  share: job.total_steps > 0 && !isFinal(job.state) ? job.step / job.total_steps : null,
});

function nodeState(node) {
  if (node.lost) return { text: "✕ lost", class: "state failed" };
  if (!node.connected) return { text: "◌ out of touch", class: "state warn" };
  return node.drained ? { text: "◑ drained", class: "state warn" } : { text: "● connected", class: "state running" };
}

function coordinatorState(view) {
  if (view.alarm) return { text: "✕ alarm", class: "state failed" };
  if (view.alive === false) return { text: "✕ away", class: "state failed" };
  if (view.read_only) return { text: "◑ read-only", class: "state warn" };
  if (view.leads) return { text: "★ leads", class: "state running" };
  return view.voter ? { text: "● votes", class: "state" } : { text: "◔ catches up", class: "state warn" };
}

export class ClusterView {
  title = "Cluster";

  constructor(link) {
    this.link = link;
    this.facts = new Facts(["Jobs", "Nodes", "Slots", "Leader", "Log"]);
    this.jobs = new Table("Jobs", [
      { head: "Job", cell: (job) => ({ text: `job-${job.job}`, href: `#/jobs/${job.job}` }) },
      { head: "Name", cell: (job) => job.name },
      { head: "State", cell: (job) => state(job.state) },
      { head: "Ranks", number: true, wide: true, cell: (job) => count(job.world_size) },
      { head: "Step", number: true, cell: steps },
      { head: "Loss", number: true, cell: (job) => loss(job.loss) },
      { head: "Tokens/s", number: true, wide: true, cell: (job) => count(job.tokens_per_s) },
      { head: "Memory", number: true, wide: true, cell: (job) => (job.memory_mib == null ? "-" : `${count(job.memory_mib)} MiB`) },
      { head: "Since", wide: true, cell: (job) => ago(job.finished_unix_ms ?? job.submitted_unix_ms) },
      { head: "Why", cell: (job) => ({ text: job.stall?.what ?? job.reason, class: job.stall ? "why warn" : "why" }) },
    ], (job) => job.job, "No job was submitted yet: fleet submit JOB.toml");
    this.offered = "";
    this.nodes = new Table("Nodes", [
      { head: "Node", cell: (node) => ({ text: `node-${node.node}`, class: "id" }) },
      { head: "Name", cell: (node) => node.name },
      { head: "State", cell: nodeState },
      { head: "Slots used", number: true, cell: (node) => ({ text: `${node.slots_used} / ${node.slots}`, class: "steps", share: node.slots ? node.slots_used / node.slots : 0 }) },
      { head: "Device", wide: true, cell: (node) => node.device },
      { head: "Labels", wide: true, cell: (node) => Object.entries(node.labels).map(([name, value]) => `${name}=${value}`).join(" ") || "-" },
      { head: "Heard", wide: true, cell: (node) => (node.heard_ms_ago == null ? "-" : node.heard_ms_ago < 3000 ? "now" : `${span(node.heard_ms_ago)} ago`) },
      { head: "Version", wide: true, cell: (node) => node.version },
    ], (node) => node.node, "No node has joined yet: worker join");
    this.coordinators = new Table("Coordinators", [
      { head: "Coordinator", cell: (view) => ({ text: `replica-${view.address.replica}`, class: "id" }) },
      { head: "State", cell: coordinatorState },
      { head: "Log at", number: true, cell: (view) => count(view.matched_index) },
      { head: "Address", wide: true, cell: (view) => view.address.client },
      { head: "Version", wide: true, cell: (view) => view.version },
    ], (view) => view.address.replica, "");
    this.decisions = h("ol", { class: "decisions", role: "log", "aria-live": "off" });
    this.alarms = h("div", { class: "alarms", role: "alert" });
    this.actions = h("div", { class: "actions" });
    this.element = h("div", {},
      h("h1", {}, "Cluster"), this.alarms, this.facts.element,
      section("Queue", this.jobs.element),
      h("div", { class: "two" },
        section("Nodes", this.nodes.element, this.actions),
        section("Coordinators", this.coordinators.element)),
      section("Decisions", this.decisions));
    this.stream = new Stream(() => "/api/v1/stream", { overview: (seen) => this.show(seen) }, (how) => link(how));
    this.decide();
  }

  show(seen) {
    const { cluster, coordinators, nodes, jobs, totals } = seen;
    this.link(seen.stale ? "stale" : "live", seen);
    this.element.classList.toggle("old", seen.stale);
    this.facts.update({
      Jobs: `${count(cluster.jobs_running)} running, ${count(cluster.jobs_queued)} queued`,
      Nodes: `${count(totals.nodes_connected)} of ${count(totals.nodes)} connected`,
      Slots: `${count(totals.slots_used)} of ${count(totals.slots)} used`,
      Leader: cluster.leader == null ? "none" : `replica-${cluster.leader}, term ${count(cluster.term)}`,
      Log: `${count(cluster.commit_index)} entries`,
    });
    this.jobs.update(inOrder(jobs), totals.jobs > jobs.length ? `${plural(totals.jobs - jobs.length, "more job is", "more jobs are")} not shown: fleet jobs` : "");
    this.nodes.update(nodes, totals.nodes > nodes.length ? `${plural(totals.nodes - nodes.length, "more node is", "more nodes are")} not shown: fleet nodes` : "");
    this.coordinators.update(coordinators);
    const alarms = [
      cluster.read_only && `read-only: ${cluster.read_only}`,
      ...coordinators.map((view) => view.alarm && `replica-${view.address.replica}: ${view.alarm}`),
    ].filter(Boolean);
    if (alarms.join() !== this.told) {
      this.told = alarms.join();
      this.alarms.replaceChildren(...alarms.map((text) => h("p", {}, text)));
    }
    const offers = nodes.map((node) => `${node.node} ${node.drained}`).join();
    if (offers !== this.offered) {
      this.offered = offers;
      const offered = nodes.map((node) => {
        const what = node.drained ? "undrain" : "drain";
        return action(what, `${what} node-${node.node}`, `/api/v1/nodes/${node.node}/${what}`);
      });
      this.actions.replaceChildren(...offered.filter(Boolean));
    }
  }

  async decide() {
    if (!document.hidden) {
      const decisions = await ask("/api/v1/events").catch(() => null);
      if (decisions && decisions[0]?.number !== this.newest) {
        this.newest = decisions[0]?.number;
        this.decisions.replaceChildren(...decisions.slice(0, 12).map((of) => h("li", {}, h("time", {}, new Date(of.unix_ms).toLocaleString("en-GB")), say(h("span"), of.why))));
      }
    }
    if (!this.closed) this.timer = setTimeout(() => this.decide(), DECISIONS_MS);
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    this.stream.end();
  }
}
