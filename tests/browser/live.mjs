// A job is watched while it trains. Environment besides: JOB (its number), PROGRAM (that of a job whose name and output are hostile).

import { assert, curve, run, shot, tell, tooWide, until } from "./browser.mjs";

const { JOB, PROGRAM } = process.env;

await run(async (open) => {
  const page = await open();
  await page.getByRole("heading", { name: "Cluster" }).waitFor();
  await page.getByRole("link", { name: `job-${JOB}`, exact: true }).waitFor();
  for (const table of ["Jobs", "Nodes", "Coordinators"]) {
    await page.getByRole("table", { name: table }).getByRole("columnheader").first().waitFor();
  }
  await until("the link is live", () => page.locator("#link").textContent(), (text) => text === "live");
  // A job that waits says why.
  await page.getByText("waits for more nodes").first().waitFor();
  tell("saw the cluster");
  await shot(page, "cluster-light");

  // By keyboard alone from the top of the page into the job: skip link, brand, views, then the table.
  await page.evaluate(() => document.activeElement?.blur());
  for (let n = 0; n < 40; n += 1) {
    await page.keyboard.press("Tab");
    const at = await page.evaluate(() => document.activeElement?.getAttribute("href"));
    if (at === `#/jobs/${JOB}`) break;
  }
  await page.keyboard.press("Enter");
  await page.waitForURL(`**/#/jobs/${JOB}`);
  assert.equal(await page.evaluate(() => document.activeElement?.id), "main");
  tell("walked to the job by keyboard");

  const first = await until("a curve of the loss", () => curve(page, "loss"), ({ places }) => places > 5);
  const steps = ({ says }) => Number(/at ([0-9]+), lowest/.exec(says)?.[1]);
  await until("the curve grows", () => curve(page, "loss"), (now) => steps(now) > steps(first));
  for (const title of ["learning rate", "tokens per second"]) await until(`a curve of ${title}`, () => curve(page, title), ({ places }) => places > 2);
  tell("saw the curve grow", { from: first.says, to: (await curve(page, "loss")).says });

  await until("a part of a step", () => page.getByRole("table", { name: "Parts of a step" }).getByText("backward").count(), (count) => count > 0);
  await page.getByRole("table", { name: "Checkpoints" }).getByRole("row").nth(1).waitFor();
  await page.evaluate(() => scrollTo(0, document.body.scrollHeight));
  await until("the parts of a step as areas", () => page.locator("figure[aria-label='seconds of a step'] path.area").count(), (count) => count >= 7);
  await page.evaluate(() => scrollTo(0, 0));
  await shot(page, "job-light");

  await page.goto(`${page.url().split("#")[0]}#/jobs/${PROGRAM}`);
  const hostile = "<img src=x onerror=document.title='taken'>";
  await page.getByRole("heading", { name: hostile }).waitFor();
  await until("the hostile line is text", () => page.getByRole("log", { name: "Log lines" }).textContent(), (text) => text.includes("<script>"));
  assert.equal(await page.locator("main img, main script").count(), 0);
  assert.notEqual(await page.title(), "taken");
  tell("nothing came of hostile names");

  for (const [name, path] of [["cluster", ""], ["job", `#/jobs/${JOB}`]]) {
    const dark = await open(path, { colorScheme: "dark" });
    await dark.getByRole("heading", { level: 1 }).waitFor();
    await until("it has its content", () => dark.locator("tbody tr").count(), (count) => count > 0);
    if (name === "job") await until("its curve", () => curve(dark, "loss"), ({ places }) => places > 5);
    await shot(dark, `${name}-dark`);
    await dark.context().close();

    const phone = await open(path, { viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true });
    await until("it has its content", () => phone.locator("tbody tr").count(), (count) => count > 0);
    if (name === "job") await until("its curve", () => curve(phone, "loss"), ({ places }) => places > 5);
    assert.equal(await tooWide(phone), 0, `${name} can be scrolled to the side`);
    await shot(phone, `${name}-phone`);
    await phone.context().close();
  }
});
