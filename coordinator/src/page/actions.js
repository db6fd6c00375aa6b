// What may be changed from here: on loopback nothing, elsewhere what the login allows.

import { h } from "./dom.js";

const { may } = await fetch("/api/v1/visitor").then((answer) => answer.json()).catch(() => ({ may: [] }));

/** A button that asks once more before it changes anything; null where this page may not. */
export function action(name, label, path) {
  if (!may.includes(name)) return null;
  const note = h("span", { role: "status" });
  const button = h("button", {
    type: "button",
    onclick: async () => {
      if (!confirm(`${label}?`)) return;
      button.disabled = true;
      const answer = await fetch(path, { method: "POST" }).catch((error) => ({ ok: false, text: async () => error.message }));
      note.textContent = answer.ok ? "done" : (await answer.text()).trim();
      button.disabled = false;
    },
  }, label);
  return h("span", { class: "action" }, button, note);
}
