// Which view stands on the page, and how the page stands with the cluster.

import { ClusterView } from "./cluster.js";
import { CompareView } from "./compare.js";
import { say } from "./dom.js";
import { JobView } from "./job.js";
import { ModelsView } from "./models.js";

const LINKS = {
  live: "live",
  stale: "no leader: what is shown may be old",
  lost: "out of touch: trying again",
  ended: "the job has ended",
};

const main = document.getElementById("main");
const status = document.getElementById("link");
let view = null;
let shown = null;

function link(how) {
  status.className = how;
  say(status, LINKS[how]);
}

/** `#/jobs/7`, `#/compare?run=job-7` and the like. */
function route() {
  const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
  return { path: path || "/", query: new URLSearchParams(query) };
}

function make(path, query) {
  const job = path.match(/^\/jobs\/(?:job-)?([0-9]+)$/);
  if (job) return new JobView(link, Number(job[1]));
  if (path === "/compare") return new CompareView(link, query);
  if (path === "/models") return new ModelsView(link);
  return new ClusterView(link);
}

function go() {
  const { path, query } = route();
  if (path !== shown) {
    const first = shown === null;
    view?.close();
    shown = path;
    view = make(path, query);
    main.replaceChildren(view.element);
    document.title = `${view.title} · fleet`;
    for (const a of document.querySelectorAll("nav a")) {
      if (a.getAttribute("href") === `#${path}`) a.setAttribute("aria-current", "page");
      else a.removeAttribute("aria-current");
    }
    if (!first) main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  view.query?.(query);
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", go);
go();
