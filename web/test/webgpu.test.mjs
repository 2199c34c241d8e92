// The page where there is WebGPU: Chromium's own in software, for which no GPU is needed.

import assert from "node:assert/strict";
import { readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { launch, serve } from "./browser.mjs";
import { ask, changed, expected, FOLDER, held, measure, opened, replace } from "./page.mjs";

const { files } = JSON.parse(readFileSync(join(FOLDER, "page.json"), "utf8"));
const recorded = JSON.parse(readFileSync(join(FOLDER, files.recorded.path), "utf8"));
let browser;
let server;

before(async () => {
  browser = await launch("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader");
  server = await serve(FOLDER);
});
after(async () => {
  await browser?.close();
  server?.close();
});

/** What the page's own modules compute on WebGPU, whether the page would use it or not. */
function computed(page, cases) {
  return page.evaluate(async (cases) => {
    const [{ open }, { logits }] = await Promise.all([import("./engine.js"), import("./gpu.js")]);
    const model = await (await fetch("page.json")).json();
    const files = {};
    for (const [name, { path }] of Object.entries(model.files)) {
      if (path.endsWith(".tflite")) files[name] = new Uint8Array(await (await fetch(path)).arrayBuffer());
    }
    const sections = await open(files, { gpu: true });
    const found = [];
    for (const { ids, from } of cases) {
      const rows = await logits(sections, ids, from);
      found.push({ rows: rows.map((row) => Array.from(row)) });
    }
    return { whole: sections.models.decoder.isFullyAccelerated, found };
  }, cases);
}

test("the shipped model runs on WebGPU, and says there what was recorded", async () => {
  const { context, page, errors } = await opened(browser, server.url);
  assert.match(await page.textContent("#facts"), /WebGPU where it says what was judged, else WebAssembly/);
  assert.ok((await ask(page, expected.words[0].question)).length > 3);
  assert.match(await page.textContent("#facts"), /KernelsWebGPU, whose answers/);
  assert.deepEqual(errors, []);
  await page.reload();
  const cases = [expected.int8[1], expected.int8[3]];
  const { whole, found } = await computed(page, cases);
  assert.equal(whole, true);
  measure({ webgpu: held(cases, found) });
  await context.close();
});

const OTHERWISE = {
  "of another model": (rows) => rows.map(({ tokens, logs }) => ({ tokens: tokens.map((token) => token ^ 1), logs })),
  "that are no numbers": (rows) => rows.map(({ tokens, logs }) => ({ tokens, logs: logs.map(() => null) })),
  "of which the last is another one": (rows) =>
    rows.map(({ tokens, logs }, place) => ({ tokens, logs: place < rows.length - 1 ? logs : logs.toReversed() })),
};
for (const [what, otherwise] of Object.entries(OTHERWISE)) {
  test(`recorded logits ${what}: it stays on WebAssembly, and says so`, async () => {
    const { url, close } = await changed((folder) => {
      replace(folder, "recorded", Buffer.from(JSON.stringify({ ...recorded, rows: otherwise(recorded.rows) })));
    });
    const { context, page, errors } = await opened(browser, url);
    assert.ok((await ask(page, expected.words[0].question)).length > 3);
    assert.match(
      await page.textContent("#facts"),
      /WebAssembly, \d threads\. Not WebGPU: what it says is \S+ nats from what was judged, and 0\.01 is the most/,
    );
    assert.deepEqual(errors, []);
    await context.close();
    close();
  });
}

test("a model of which WebGPU runs a part stays on WebAssembly with LiteRT-LM's words", async () => {
  const { url, close } = await changed((folder) => replace(folder, "decoder", readFileSync(expected.part)));
  const { context, page, errors } = await opened(browser, url);
  const { question, text } = expected.words[1];
  assert.equal(await ask(page, question), text);
  assert.match(
    await page.textContent("#facts"),
    /WebAssembly, \d threads\. Not WebGPU: LiteRT\.js runs only a part of this model there, not its GATHER_ND\./,
  );
  assert.deepEqual(errors, []);
  await context.close();
  close();
});

test("WebGPU that fails is told, and WebAssembly answers", async () => {
  const { url, close } = await changed((folder) => rmSync(join(folder, "wasm", "litert_wasm_jspi_internal.wasm")));
  const { context, page } = await opened(browser, url);
  const { question, text } = expected.words[1];
  assert.equal(await ask(page, question), text);
  assert.match(await page.textContent("#facts"), /WebAssembly, \d threads\. Not WebGPU: it failed: /);
  await context.close();
  close();
});
