// Numbers, times and states for people.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (n) => (n == null ? "-" : whole.format(n));
export const loss = (x) => (x == null ? "-" : x.toFixed(4));
export const short = (x) => (x == null ? "-" : x === 0 ? "0" : Math.abs(x) >= 1e-3 && Math.abs(x) < 1e5 ? String(Number(x.toPrecision(4))) : x.toExponential(2));

export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (n >= 1000 && at < units.length - 1) [n, at] = [n / 1000, at + 1];
  return `${at === 0 ? n : n.toFixed(n < 10 ? 2 : 1)} ${units[at]}`;
}

export function span(ms) {
  const s = Math.max(0, Math.floor(ms / 1000));
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min`;
  return s < 172800 ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86400)} d`;
}

export const ago = (unixMs) => (unixMs == null ? "-" : `${span(Date.now() - unixMs)} ago`);
export const clock = (unixMs) => new Date(unixMs).toLocaleTimeString("en-GB");

/** A state is told by a sign and a word, and not by its colour alone. */
const SIGNS = { queued: "○", starting: "◔", running: "●", stopping: "◑", succeeded: "✓", failed: "✕", cancelled: "■", open: "●" };
export const state = (name) => ({ text: `${SIGNS[name] ?? "·"} ${name}`, class: `state ${name}` });

export const isFinal = (name) => ["succeeded", "failed", "cancelled"].includes(name);
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;
