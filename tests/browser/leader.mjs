// The page of a coordinator that does not lead goes on when the leader is killed. Environment besides: JOB.

import { assert, curve, run, tell, until } from "./browser.mjs";

const { JOB } = process.env;

await run(async (open) => {
  const cluster = await open();
  const leads = () => cluster.getByText(/^replica-[0-9]+, term/).first().textContent({ timeout: 1_000 }).catch(() => "none");
  const before = await until("somebody leads", leads, (text) => text.startsWith("replica"));
  const job = await open(`#/jobs/${JOB}`);
  const first = await until("a curve of the loss", () => curve(job, "loss"), ({ places }) => places > 3);
  const newest = () => job.getByText(/^[0-9,]+ of [0-9,]+$/).first().textContent();
  const step = await newest();
  tell("kill the leader", { leader: before });
  const after = await until("another one leads", leads, (text) => text.startsWith("replica") && text.split(",")[0] !== before.split(",")[0]);
  await until("the page is live again", () => cluster.locator("#link").textContent(), (text) => text === "live");
  await until("steps go on", newest, (text) => text !== step);
  const behind = await newest();
  await until("steps go on after that", newest, (text) => text !== behind);
  await until("the curve goes on", () => curve(job, "loss"), ({ says }) => says !== first.says);
  assert.equal(await job.locator(".old").count(), 0, "nothing is marked as old");
  tell("went on", { after });
});
