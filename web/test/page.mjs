// The page as a visitor has it, and what its model computes.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { serve, tab, told } from "./browser.mjs";

export const FOLDER = join(told("ROOT"), "page");
export const expected = JSON.parse(readFileSync(told("EXPECTED"), "utf8"));

/** Keep figures for `nox -s browser -- record`. */
export function measure(figures) {
  const file = told("MEASURED");
  const held = existsSync(file) ? JSON.parse(readFileSync(file, "utf8")) : {};
  writeFileSync(file, JSON.stringify({ ...held, ...figures }));
}

/** A copy of the page's folder, served, after `change` has been made to it: its `url`, and `close`. */
export async function changed(change) {
  const folder = mkdtempSync(join(tmpdir(), "page-"));
  cpSync(FOLDER, folder, { recursive: true });
  change(folder);
  const server = await serve(folder);
  const close = () => {
    server.close();
    rmSync(folder, { recursive: true });
  };
  return { url: server.url, close };
}

/** Put `bytes` in a page's folder in the place of a file, whose record in page.json follows. */
export function replace(folder, name, bytes) {
  const place = join(folder, "page.json");
  const model = JSON.parse(readFileSync(place, "utf8"));
  const { path } = model.files[name];
  rmSync(join(folder, path));
  writeFileSync(join(folder, path), bytes);
  model.files[name] = { path, size: bytes.length, sha256: createHash("sha256").update(bytes).digest("hex") };
  writeFileSync(place, JSON.stringify(model));
}

/** The page in a browser that has never seen it; `change` is put into the browser before anything runs. */
export async function opened(browser, url, change = undefined) {
  const context = await browser.newContext();
  if (change) await context.addInitScript(change);
  const { page, errors } = await tab(context);
  await page.goto(url);
  await page.waitForFunction(
    () => !document.getElementById("load").disabled || !document.getElementById("obstacle").hidden,
  );
  return { context, page, errors };
}

export async function ask(page, question) {
  await page.fill("#ask", question);
  await page.press("#ask", "Enter");
  await settled(page);
  return page.locator("#talk article.assistant p").last().textContent();
}

export function settled(page) {
  return page.waitForFunction(
    () => document.getElementById("stop").disabled && !document.getElementById("send").disabled,
  );
}

/** Ask the page's worker, loaded with the page's own model, in a worker beside the page's. */
export function worked(page, kind, requests) {
  return page.evaluate(
    async ([kind, requests]) => {
      const worker = new Worker("worker.js");
      const once = (id, kind, request) =>
        new Promise((resolve, reject) => {
          worker.onmessage = ({ data }) => {
            if (data.kind === "done") resolve(data);
            if (data.kind === "failed") reject(new Error(data.message));
          };
          worker.postMessage({ id, kind, ...request });
        });
      const model = await (await fetch("page.json")).json();
      await once(1, "load", { model, threads: 2 });
      const answers = [];
      for (const request of requests) answers.push(await once(2, kind, request));
      worker.terminate();
      return answers;
    },
    [kind, requests],
  );
}

/** Logits that differ by no more are those of kernels that rounded each activation alike: as in tools/browser.py. */
const ALIKE = 1e-5;

/** Hold logits against the interpreter's: how many rows, how far apart, how many alike, divergence (nats), top-1. */
export function held(cases, found) {
  const sums = { positions: 0, most: 0, alike: 0, kld: 0, same: 0 };
  cases.forEach(({ rows }, place) => {
    rows.forEach((row, step) => {
      const other = Array.from(Object.values(found[place].rows[step]));
      assert.equal(other.length, row.length);
      const [left, right] = [logProbabilities(row), logProbabilities(other)];
      sums.positions += 1;
      const apart = Math.max(...row.map((value, token) => Math.abs(value - other[token])));
      sums.most = Math.max(sums.most, apart);
      sums.alike += apart <= ALIKE;
      sums.kld += left.reduce((sum, value, token) => sum + Math.exp(value) * (value - right[token]), 0);
      sums.same += best(row) === best(other);
    });
  });
  const { positions, most, alike, kld, same } = sums;
  return { positions, most, alike: alike / positions, kld: kld / positions, top1: same / positions };
}

function best(values) {
  return values.indexOf(Math.max(...values));
}

function logProbabilities(logits) {
  const top = Math.max(...logits);
  const mass = Math.log(logits.reduce((sum, value) => sum + Math.exp(value - top), 0));
  return logits.map((value) => value - top - mass);
}
