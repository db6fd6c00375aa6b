// Runs in one picture, chosen by checkboxes. Environment besides: RUNS (their ids, with commas).

import { assert, run, shot, tell, tooWide, until } from "./browser.mjs";

const runs = process.env.RUNS.split(",");

await run(async (open) => {
  const page = await open("#/compare");
  const lines = () => page.locator("figure[aria-label='Runs compared'] path.line:not(.faint)").count();
  for (const run of runs) await page.getByRole("checkbox", { name: run }).check();
  // A line in the picture and a stroke in its legend for each.
  await until("a line for each run", lines, (count) => count === 2 * runs.length);
  assert.equal(new URL(page.url()).hash, `#/compare?${runs.map((run) => `run=${run}`).join("&")}&metric=loss`);
  await shot(page, "compare-light");
  await page.getByLabel("log scale").check();
  await page.getByRole("slider").fill("5");
  await until("what was before it was smoothed", () => page.locator("path.faint").count(), (count) => count >= runs.length);
  const again = await open(new URL(page.url()).hash, { colorScheme: "dark" });
  await again.getByRole("checkbox", { name: runs[0] }).waitFor();
  assert.equal(await again.getByRole("checkbox", { name: runs[0] }).isChecked(), true, "what is chosen stands in the address");
  await until("the same picture", () => again.locator("path.faint").count(), (count) => count >= runs.length);
  await shot(again, "compare-dark");
  await page.getByRole("checkbox", { name: runs[0] }).uncheck();
  await until("a line less", () => page.locator("path.faint").count(), (count) => count === runs.length - 1);
  const saved = await page.request.get(new URL(await page.getByRole("link", { name: "Save as SVG" }).getAttribute("href"), page.url()).href);
  assert.match(await saved.text(), /^<svg .*prefers-color-scheme/s);

  const phone = await open(new URL(page.url()).hash, { viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true });
  await until("its picture", () => phone.locator("figure svg").count(), (count) => count > 0);
  assert.equal(await tooWide(phone), 0);
  await shot(phone, "compare-phone");

  const models = await open("#/models");
  await models.getByRole("cell", { name: "onnx", exact: true }).waitFor();
  await models.getByRole("link", { name: "profile-2" }).click();
  await models.getByRole("table", { name: "Features" }).getByText("much").waitFor();
  await until("both distributions", () => models.locator("figure[aria-label='length'] path.line").count(), (count) => count === 4);
  await shot(models, "models-light");
  tell("compared");
});
