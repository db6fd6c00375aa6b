// Lines of a job's ranks, the newest at the end.

import { h, say } from "./dom.js";
import { clock } from "./format.js";

/** Lines that are kept on the screen. */
const LINES_MAX = 2_000;

export class Log {
  /** `older()` loads what was before, and resolves to whether there is more. */
  constructor(older) {
    this.list = h("ol", { class: "log", role: "log", "aria-label": "Log lines", "aria-live": "polite", tabindex: "0" });
    this.level = h("select", { onchange: () => this.filter() }, ["all lines", "warnings and errors"].map((text) => h("option", {}, text)));
    this.follow = h("input", { type: "checkbox", checked: true });
    this.note = h("span", { class: "note" }, "no lines yet");
    this.older = h("button", { type: "button", onclick: async () => {
      this.older.disabled = true;
      const more = await older().catch(() => true);
      Object.assign(this.older, { disabled: false, hidden: !more });
    } }, "Earlier lines");
    const tools = h("div", { class: "tools" }, h("label", {}, "Show ", this.level), h("label", {}, this.follow, " follow"), this.older, this.note);
    this.element = h("div", {}, tools, this.list);
    this.count = 0;
  }

  /** `lines`: `{unix_ms, rank, level, line}`, in their order. */
  add(lines, before = false) {
    if (lines.length === 0) return;
    const elements = lines.map(({ unix_ms, rank, level, line }) => h("li", { class: level === "info" ? null : level },
      h("time", {}, clock(unix_ms)), h("b", {}, rank == null ? "fleet" : `rank ${rank}`), say(h("span"), line)));
    if (before) this.list.prepend(...elements);
    else this.list.append(...elements);
    while (this.list.children.length > LINES_MAX) (before ? this.list.lastChild : this.list.firstChild).remove();
    this.count += lines.length;
    say(this.note, `${this.list.children.length} lines`);
    if (this.follow.checked && (!before || this.count === lines.length)) this.list.scrollTop = this.list.scrollHeight;
  }

  filter() {
    this.list.classList.toggle("grave", this.level.selectedIndex === 1);
  }
}
