// Gemma 3 270M in Chromium, in turns with LiteRT-LM: `nox -s browser_gemma3`.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { after, before, test } from "node:test";
import { launch, PROJECT, PYTHON, serve, told } from "./browser.mjs";
import { ask, expected, FOLDER, measure, opened } from "./page.mjs";

let browser;
let server;

before(async () => {
  browser = await launch();
  server = await serve(FOLDER);
});
after(async () => {
  await browser?.close();
  server?.close();
});

/** LiteRT-LM's answer, by a process of its own. */
function answered(question) {
  const folder = dirname(told("EXPECTED"));
  const words = ["-m", "tools.browser_real", told("ROOT"), folder, "--answer", question];
  return JSON.parse(execFileSync(PYTHON, words, { cwd: PROJECT, maxBuffer: 1e8, stdio: ["ignore", "pipe", "ignore"] }));
}

test("it answers as LiteRT-LM does, at no less than 0.3 of its speed", async () => {
  const { context, page, errors } = await opened(browser, server.url);
  await page.locator("details").evaluate((details) => {
    details.open = true;
  });
  await page.selectOption("#sampler", "greedy");
  await page.fill("#count", String(expected.answer));
  await page.click("#load");
  await page.waitForFunction(() => document.getElementById("status").textContent.startsWith("Loaded in"));
  await page.reload(); // what is kept is not downloaded
  await page.waitForFunction(() => !document.getElementById("load").disabled);
  await page.locator("details").evaluate((details) => {
    details.open = true;
  });
  await page.selectOption("#sampler", "greedy");
  await page.fill("#count", String(expected.answer));
  const begun = performance.now();
  await page.click("#load");
  await page.waitForFunction(() => document.getElementById("status").textContent.startsWith("Loaded in"));
  const opening = (performance.now() - begun) / 1000;
  const turns = { page: [], litert_lm: [] };
  for (const question of expected.questions) {
    turns.litert_lm.push(answered(question));
    const text = await ask(page, question);
    const [, decode, prefill] = (await page.textContent("#status")).match(/([\d.]+) a second;.* ([\d.]+) a second\./);
    turns.page.push({ text, decode: Number(decode), prefill: Number(prefill) });
    await page.click("#anew");
  }
  const model = JSON.parse(readFileSync(join(FOLDER, "page.json"), "utf8"));
  const sections = Object.values(model.files).filter(({ path }) => path.endsWith(".tflite"));
  const [, held, unit] = (await page.textContent("#facts")).match(/Memory([\d.]+) (MB|GB)/);
  measure({
    ...turns,
    opening,
    bytes: sections.reduce((sum, { size }) => sum + size, 0),
    memory: Number(held) * { MB: 1e6, GB: 1e9 }[unit],
  });
  const ratios = turns.page.map(({ decode }, place) => decode / turns.litert_lm[place].decode).sort((a, b) => a - b);
  assert.ok(ratios[ratios.length >> 1] >= 0.3, `of LiteRT-LM's speed: ${ratios}`);
  assert.deepEqual(errors, []);
  await context.close();
});

test("its logits are no farther from the interpreter's than its limit lets int8 be", async () => {
  const { context, page } = await opened(browser, server.url);
  const found = await page.evaluate(async (recorded) => {
    const names = ["engine", "gpu", "files"];
    const [{ open }, { apart, logits }, { bytesOf }] = await Promise.all(names.map((name) => import(`./${name}.js`)));
    const model = await (await fetch("page.json")).json();
    const files = {};
    for (const [name, file] of Object.entries(model.files)) {
      if (file.path.endsWith(".tflite")) files[name] = await bytesOf(file, () => {});
    }
    const sections = await open(files, { threads: 2, gpu: false });
    const all = [];
    for (const { ids, prefilled, rows } of recorded) all.push(...apart(rows, await logits(sections, ids, prefilled)));
    return { limit: model.kld, all };
  }, expected.recorded);
  const positions = found.all.length;
  const mean = (name) => found.all.reduce((sum, row) => sum + row[name], 0) / positions;
  const figures = {
    positions,
    most: Math.max(...found.all.map(({ most }) => most)),
    kld: mean("kld"),
    top1: mean("same"),
  };
  measure(figures);
  assert.ok(positions >= 64);
  assert.ok(figures.kld <= found.limit, `${figures.kld} nats`);
  await context.close();
});
