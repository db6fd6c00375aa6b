// What may be changed from here. The server names in its overview (`may`) what it grants to this page: on loopback nothing.

import { h } from "./dom.js";

/** A button that asks once more before it changes anything; null where the server does not grant it. */
export function action(may, name, label, path) {
  if (!may?.includes(name)) return null;
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
