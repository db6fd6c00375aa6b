// A browser in which anything fails that a page of fleet must not do: a request that leaves the coordinator, a script that is not its own, an
// error that nobody caught. Environment: PAGE (address), PLAYWRIGHT (the package's folder), CHROMIUM (the program), SHOTS (a folder).
// What happens is told on stdout, one JSON object a line; whoever started this acts on it.

import assert from "node:assert/strict";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const { PAGE, PLAYWRIGHT, CHROMIUM, SHOTS } = process.env;
const { chromium } = await import(pathToFileURL(join(PLAYWRIGHT, "index.mjs")));

/** How long anything may take on a machine that does much else at the same time. */
export const PATIENCE = 60_000;
export { assert };

export const tell = (what, more = {}) => console.log(JSON.stringify({ did: what, ...more }));

/** Runs `test(open)`, where `open(path, options)` gives a page; fails where a page did what it must not. */
export async function run(test) {
  const browser = await chromium.launch({ executablePath: CHROMIUM, args: ["--disable-gpu", "--disable-dev-shm-usage"] });
  const wrong = [];
  const open = async (path = "", { base = PAGE, ...options } = {}) => {
    const context = await browser.newContext({ viewport: { width: 1360, height: 900 }, reducedMotion: "reduce", ...options });
    context.setDefaultTimeout(PATIENCE);
    context.on("request", (request) => {
      const url = new URL(request.url());
      if (url.origin !== new URL(base).origin) wrong.push(`a request left the coordinator: ${url}`);
    });
    const page = await context.newPage();
    page.on("pageerror", (error) => wrong.push(`an error that nobody caught: ${error.stack ?? error}`));
    page.on("dialog", (dialog) => (wrong.push(`a dialog: ${dialog.message()}`), dialog.dismiss()));
    page.on("console", (message) => {
      if (/content security policy/i.test(message.text())) wrong.push(message.text());
    });
    await page.addInitScript(() => {
      addEventListener("securitypolicyviolation", (event) => console.error(`Content Security Policy: ${event.violatedDirective} ${event.blockedURI}`));
    });
    await page.goto(new URL(path, base).href);
    return page;
  };
  try {
    await test(open);
    assert.deepEqual(wrong, []);
    tell("passed");
  } finally {
    await browser.close();
  }
}

export async function shot(page, name, options = { fullPage: true }) {
  await page.screenshot({ path: join(SHOTS, `${name}.png`), ...options });
  tell("took a picture", { name });
}

/** Waits until `see()` gives what `is` wants. */
export async function until(what, see, is) {
  const begun = Date.now();
  let seen;
  do {
    seen = await see();
    if (is(seen)) return seen;
    await new Promise((resolve) => setTimeout(resolve, 100));
  } while (Date.now() - begun < PATIENCE);
  throw new Error(`still not so: ${what}; seen: ${JSON.stringify(seen)}`);
}

/** Where the line of the first picture with this title ends, and how many places it has. */
export const curve = (page, title) => page.evaluate((title) => {
  const figure = [...document.querySelectorAll("figure")].find((figure) => figure.getAttribute("aria-label") === title);
  const lines = [...(figure?.querySelectorAll("path.line.s0") ?? [])];
  const says = figure?.querySelector("desc")?.textContent ?? "";
  return { places: lines.reduce((sum, line) => sum + line.getAttribute("d").split(/[ML ]/).length, 0), says };
}, title);

/** How far the page can be scrolled to the side. */
export const tooWide = (page) => page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
