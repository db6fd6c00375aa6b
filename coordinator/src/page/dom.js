// Elements. Text is only ever text: nothing here parses markup.

/** An element with attributes and children. What is null is left out; `onclick` and the like are listeners. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

/** Changes a text only where it differs, so that a selection in it stays. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
  return element;
}

/** A heading with what belongs below it, as a landmark. */
export function section(title, ...children) {
  const id = `s-${title.toLowerCase().replace(/[^a-z]+/g, "-")}`;
  return h("section", { "aria-labelledby": id }, h("h2", { id }, title), ...children);
}

/** Names and values that change. */
export class Facts {
  constructor(names) {
    this.values = new Map(names.map((name) => [name, h("dd", {}, "-")]));
    this.element = h("dl", { class: "facts" }, [...this.values].map(([name, value]) => h("div", {}, h("dt", {}, name), value)));
  }

  update(values) {
    for (const [name, element] of this.values) {
      const value = values[name];
      element.parentElement.hidden = value == null;
      say(element, value ?? "");
    }
  }
}

/** A table whose rows stay the same elements while what is in them changes: focus, selection and scrolling stay, too.
 *
 * A column has a `head`, and `cell(item)` that gives a text or `{text, href, class, share}`; `number` stands right, `wide` is left out on a phone.
 */
export class Table {
  constructor(caption, columns, key, empty) {
    Object.assign(this, { columns, key, rows: new Map() });
    const heads = columns.map(({ head, number, wide }) => h("th", { scope: "col", role: "columnheader", class: kind(number, wide) }, head));
    this.body = h("tbody", { role: "rowgroup" });
    const head = h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads));
    this.table = h("table", { role: "table", "aria-label": caption }, head, this.body);
    this.empty = h("p", { class: "empty" }, empty);
    this.more = h("p", { class: "empty", hidden: true });
    const scroll = h("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" }, this.table);
    this.element = h("div", { class: caption.toLowerCase().replace(/[^a-z]+/g, "-") }, scroll, this.empty, this.more);
  }

  /** `more`: what is said below of those that are left out. */
  update(items, more = "") {
    const before = this.rows;
    this.rows = new Map();
    const order = items.map((item) => {
      const key = String(this.key(item));
      const row = before.get(key) ?? this.columns.map(({ number, wide }, at) => h(at === 0 ? "th" : "td", { scope: at === 0 ? "row" : null, role: at === 0 ? "rowheader" : "cell", class: kind(number, wide) }));
      this.rows.set(key, row);
      this.columns.forEach(({ cell }, at) => fill(row[at], cell(item)));
      return row[0].parentElement ?? h("tr", { role: "row" }, row);
    });
    const same = order.length === this.body.children.length && order.every((row, at) => row === this.body.children[at]);
    if (!same) this.body.replaceChildren(...order);
    this.table.hidden = items.length === 0;
    this.empty.hidden = items.length > 0;
    this.more.hidden = !more;
    say(this.more, more);
  }
}

const kind = (number, wide) => [number && "number", wide && "wide"].filter(Boolean).join(" ") || null;

function fill(cell, value) {
  if (value instanceof Node) {
    if (cell.firstChild !== value) cell.replaceChildren(value);
    return;
  }
  const { text, href, class: name, share } = typeof value === "object" && value ? value : { text: value ?? "" };
  if (href == null && name == null && share == null) {
    say(cell, String(text));
    return;
  }
  let inner = cell.firstElementChild;
  const tag = href == null ? "SPAN" : "A";
  if (inner?.tagName !== tag) {
    inner = h(tag.toLowerCase());
    cell.replaceChildren(inner);
  }
  if (href != null && inner.getAttribute("href") !== href) inner.setAttribute("href", href);
  if (name != null) inner.className = name;
  say(inner, String(text));
  if (share != null) {
    const bar = cell.children[1] ?? cell.appendChild(h("progress", { max: "1", "aria-hidden": "true" }));
    bar.value = share;
  } else cell.children[1]?.remove();
}
