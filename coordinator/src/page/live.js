// Server-sent events that go on by themselves: over a leader's end, a coordinator's restart, a sleeping laptop, a hidden tab.

/** Longer than between two beats of the server. */
const SILENCE_MS = 30_000;
const PAUSE_MS = 1_500;

/** Follows `address(lastId)`. `handlers` take parsed data by the name of the event, `link` hears "lost" when it has to begin anew. */
export class Stream {
  constructor(address, handlers, link) {
    Object.assign(this, { address, handlers, link, last: null, ended: false });
    this.visible = () => (document.hidden ? this.pause() : this.open());
    document.addEventListener("visibilitychange", this.visible);
    this.open();
  }

  open() {
    if (this.source || this.ended) return;
    clearTimeout(this.again);
    this.source = new EventSource(this.address(this.last));
    const heard = () => {
      clearTimeout(this.silence);
      this.silence = setTimeout(() => this.retry(), SILENCE_MS);
    };
    this.source.addEventListener("open", heard);
    this.source.addEventListener("beat", heard);
    // A refusal ends an EventSource for good, a cut connection does not; both are begun anew here, at one pace.
    this.source.addEventListener("error", () => this.retry());
    for (const [name, handle] of Object.entries(this.handlers)) {
      this.source.addEventListener(name, (message) => {
        heard();
        if (message.lastEventId) this.last = Number(message.lastEventId);
        handle(JSON.parse(message.data));
      });
    }
    heard();
  }

  retry() {
    this.pause();
    if (this.ended) return;
    this.link("lost");
    this.again = setTimeout(() => this.open(), PAUSE_MS);
  }

  pause() {
    clearTimeout(this.silence);
    clearTimeout(this.again);
    this.source?.close();
    this.source = null;
  }

  /** For good: nothing more comes, or nobody looks any more. */
  end() {
    this.ended = true;
    this.pause();
    document.removeEventListener("visibilitychange", this.visible);
  }
}

/** JSON of the API; an error has the server's own line. */
export async function ask(path) {
  const answer = await fetch(path, { headers: { accept: "application/json" } });
  if (!answer.ok) throw new Error((await answer.text()).trim() || `HTTP ${answer.status}`);
  return answer.json();
}
