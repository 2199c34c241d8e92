// What was put up as a Space, from there.

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { test } from "node:test";
import { launch, serve, told } from "./browser.mjs";
import { ask, expected, opened } from "./page.mjs";

const space = told("SPACE");
const skip = !existsSync(space) && "nothing was put up: something is not committed";

test("a Space answers with LiteRT-LM's words, and shows the report", { skip }, async () => {
  const browser = await launch();
  const server = await serve(space);
  const { page, errors } = await opened(browser, server.url);
  const { question, text } = expected.words[1];
  assert.equal(await ask(page, question), text);
  assert.deepEqual(errors, []);
  await page.click("#facts a");
  await page.waitForURL("**/report.html");
  assert.match(await page.textContent("h1"), /tiny-gemma3n/);
  await browser.close();
  server.close();
});
