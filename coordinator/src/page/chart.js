// Curves, as the server draws them.

import { h, say } from "./dom.js";

/** Between two looks at a curve that moves. */
const PAUSE_MS = 1_000;

/** A figure with one picture, made anew when it is wanted, at most once in a while and only while it is on the screen. */
export class Chart {
  /** `query()` gives what is drawn, as URLSearchParams, or null for nothing; `of` is "runs" or "profiles". */
  constructor(title, query, height = 220, of = "runs") {
    Object.assign(this, { title, query, height, of, wanted: true, seen: false, busy: false });
    this.note = h("p", { class: "empty" });
    this.place = h("div", { class: "picture" });
    this.element = h("figure", { "aria-label": title }, this.place, this.note);
    this.watcher = new IntersectionObserver((entries) => {
      this.seen = entries.at(-1).isIntersecting;
      this.draw();
    });
    this.watcher.observe(this.element);
    this.resized = new ResizeObserver(() => {
      if (this.width && Math.abs(this.width - this.element.clientWidth) > 24) this.want();
    });
    this.resized.observe(this.element);
  }

  /** What it shows has changed. */
  want() {
    this.wanted = true;
    this.draw();
  }

  async draw() {
    if (!this.wanted || !this.seen || this.busy || this.closed) return;
    Object.assign(this, { wanted: false, busy: true, width: this.element.clientWidth });
    const query = this.query();
    try {
      if (query) await this.fetch(query);
      else this.place.replaceChildren();
      say(this.note, "");
    } catch (error) {
      say(this.note, error.message);
      // A server that is away comes back.
      this.wanted = true;
    }
    setTimeout(() => {
      this.busy = false;
      this.draw();
    }, PAUSE_MS);
  }

  async fetch(query) {
    query.set("in", "page");
    query.set("width", Math.max(280, Math.min(1600, Math.round(this.width))));
    query.set("height", this.height);
    const answer = await fetch(`/api/v1/${this.of}/plot.svg?${query}`);
    const text = await answer.text();
    if (!answer.ok) throw new Error(text.trim());
    const picture = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
    if (picture.nodeName !== "svg") throw new Error("the picture cannot be read");
    this.place.replaceChildren(document.importNode(picture, true));
  }

  close() {
    this.closed = true;
    this.watcher.disconnect();
    this.resized.disconnect();
  }
}
