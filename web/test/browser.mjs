// A real Chromium, and the project's own server of a folder.

import { spawn } from "node:child_process";
import { createConnection, createServer } from "node:net";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

export const PYTHON = new URL("../../.venv/bin/python", import.meta.url).pathname;
export const PROJECT = new URL("../..", import.meta.url).pathname;

/** What tests are told by the environment; `nox -s browser` sets it. */
export function told(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set: run these tests by \`nox -s browser\``);
  return value;
}

/** Chromium, for the length of a test file, with options of its command line. */
export function launch(...options) {
  return chromium.launch({ executablePath: told("CHROMIUM"), args: ["--no-sandbox", ...options] });
}

/** Serve `folder` as `make page SERVE=yes` does; `url`, and `close`. */
export async function serve(folder) {
  const child = spawn(PYTHON, ["-m", "pipeline.serve", folder, "--port", "0"], {
    cwd: PROJECT,
    stdio: ["ignore", "pipe", "inherit"],
  });
  for await (const line of createInterface({ input: child.stdout })) {
    if (line.startsWith("http")) return { url: line, close: () => child.kill("SIGINT") };
  }
  throw new Error(`the server of ${folder} did not start`);
}

/** A way to the server at `url` that breaks off inside the first answer to a request for `path`. */
export async function breaking(url, path) {
  const port = Number(new URL(url).port);
  let broken = false;
  const proxy = createServer((near) => {
    const far = createConnection(port, "127.0.0.1");
    let breaks = false;
    let come = 0;
    near.on("data", (bytes) => {
      if (!broken && bytes.toString("latin1").includes(`GET /${path}`)) {
        // Inside this answer, not before it: Chromium asks again by itself where nothing has come.
        breaks = true;
        come = 0;
      }
      far.write(bytes);
    });
    far.on("data", (bytes) => {
      come += bytes.length;
      if (breaks && come > 100_000) {
        broken = true;
        near.destroy();
        far.destroy();
      } else near.write(bytes);
    });
    for (const [one, other] of [
      [near, far],
      [far, near],
    ]) {
      one.on("error", () => other.destroy());
      one.on("close", () => other.destroy());
    }
  });
  await new Promise((resolve) => proxy.listen(0, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${proxy.address().port}/`, close: () => proxy.close() };
}

/** A tab with what its console said that should not be there. */
export async function tab(context) {
  const page = await context.newPage();
  page.setDefaultTimeout(180_000); // a machine that does other things as well
  const errors = [];
  page.on("console", (message) => {
    if (message.type() === "error") errors.push(message.text());
  });
  page.on("pageerror", (error) => errors.push(String(error)));
  return { page, errors };
}

/** The rules of axe that something on the page breaks seriously, with where. */
export async function faults(page, axe) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => globalThis.axe.run());
  return violations
    .filter(({ impact }) => ["serious", "critical"].includes(impact))
    .map(({ id, nodes }) => `${id}: ${nodes.map(({ target }) => target.join(" ")).join(", ")}`);
}
