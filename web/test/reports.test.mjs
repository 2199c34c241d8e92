// The pages that verify, evaluate and tune write, in light and dark, on a desk, a telephone and paper.

import assert from "node:assert/strict";
import { copyFileSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { after, before, test } from "node:test";
import axe from "axe-core";
import { faults, launch, serve, tab, told } from "./browser.mjs";

const PAGES = told("REPORTS").split(":");
const FORMS = {
  light: { colorScheme: "light" },
  dark: { colorScheme: "dark" },
  telephone: { colorScheme: "light", viewport: { width: 360, height: 740 } },
  "dark telephone": { colorScheme: "dark", viewport: { width: 360, height: 740 } },
};
const folder = mkdtempSync(join(tmpdir(), "reports-"));
let browser;
let server;

before(async () => {
  writeFileSync(join(folder, "_headers"), "");
  // What a browser asks for by itself is no matter of the page.
  writeFileSync(join(folder, "favicon.ico"), "");
  PAGES.forEach((file, place) => {
    copyFileSync(file, join(folder, `${place}-${basename(file)}`));
  });
  browser = await launch();
  server = await serve(folder);
});
after(async () => {
  await browser?.close();
  server?.close();
  rmSync(folder, { recursive: true });
});

PAGES.forEach((file, place) => {
  const path = `${place}-${basename(file)}`;
  for (const [form, options] of Object.entries(FORMS)) {
    test(`${file}, ${form}: no console error, no serious finding of axe, nothing sticks out`, async () => {
      const context = await browser.newContext(options);
      const { page, errors } = await tab(context);
      await page.goto(server.url + path);
      assert.ok((await page.locator("h1").count()) === 1);
      assert.ok(
        await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth),
        "it is wider than the screen",
      );
      assert.deepEqual(await faults(page, axe.source), []);
      assert.deepEqual(errors, []);
      await context.close();
    });
  }
  test(`${file}, on paper: it prints, black on white`, async () => {
    const context = await browser.newContext({ colorScheme: "dark" });
    const { page } = await tab(context);
    await page.goto(server.url + path);
    await page.emulateMedia({ media: "print" });
    const pdf = await page.pdf({ format: "A4", printBackground: true });
    assert.ok(pdf.length > 5000);
    const [ink, ground] = await page.evaluate(() => {
      const style = getComputedStyle(document.body);
      return [style.color, style.backgroundColor].map((color) =>
        color
          .match(/\d+/g)
          .slice(0, 3)
          .reduce((sum, part) => sum + Number(part), 0),
      );
    });
    assert.ok(ink < 200 && ground > 700, `ink ${ink}, ground ${ground} of 765`);
    await context.close();
  });
});
