// The page in Chromium: what it computes and says, and what it does when something goes wrong.

import assert from "node:assert/strict";
import { cpSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { join } from "node:path";
import { after, before, test } from "node:test";
import axe from "axe-core";
import { breaking, faults, launch, serve, tab, told } from "./browser.mjs";
import { ask, changed, expected, FOLDER, held, measure, opened, replace, settled, worked } from "./page.mjs";

const SECTIONS = ["decoder", "embedder", "per_layer_embedder"];
const measured = {};
let browser;
let server;

before(async () => {
  browser = await launch();
  server = await serve(FOLDER);
});
after(async () => {
  await browser?.close();
  server?.close();
  measure(measured);
});

test("logits of the fp32 sections are the interpreter's: cache, positions and masks are right", async () => {
  const other = await changed((copy) => {
    for (const name of SECTIONS) replace(copy, name, readFileSync(join(told("ROOT"), "fp32", `${name}.tflite`)));
  });
  const { context, page } = await opened(browser, other.url);
  const found = held(expected.fp32, await worked(page, "logits", expected.fp32));
  measured.logits_fp32 = found;
  assert.ok(found.positions >= 64, `${found.positions} positions`);
  assert.ok(found.most <= 1e-3, `the largest difference is ${found.most}`);
  assert.equal(found.top1, 1);
  await context.close();
  other.close();
});

test("logits of the int8 sections are no farther from the interpreter's than another last bit puts it", async () => {
  const { context, page } = await opened(browser, server.url);
  const found = held(expected.int8, await worked(page, "logits", expected.int8));
  measured.logits_int8 = found;
  measured.kernels = expected.kernels;
  measured.unsettled = expected.unsettled;
  // An activation that rounds the other way moves all that follows it: tools/browser.py says for how little it does.
  const farthest = (name, pick) => pick(...expected.unsettled.map((draw) => draw[name]));
  for (const name of ["most", "kld"]) {
    const own = farthest(name, Math.max);
    assert.ok(found[name] <= own, `${name} ${found[name]}, with another last bit ${own}`);
  }
  const own = farthest("top1", Math.min);
  assert.ok(found.top1 >= own, `top-1 ${found.top1}, with another last bit ${own}`);
  await context.close();
});

for (const precision of ["fp32", "int8"]) {
  test(`the ${precision} step graph runs by a signature of fixed shape, and by that alone`, async () => {
    const { signature } = expected.fixed;
    const { file, cases } = expected.fixed[precision];
    const other = await changed((copy) => cpSync(join(told("EXPECTED"), "..", file), join(copy, file)));
    const { context, page } = await opened(browser, other.url);
    const found = await page.evaluate(
      async ([file, signature, cases]) => {
        const { loadAndCompile, loadLiteRt, Tensor } = await import("./vendor/litert.js");
        Object.defineProperty(navigator, "gpu", { value: { requestAdapter: async () => null }, configurable: true });
        await loadLiteRt(new URL("./wasm/", location.href).href, { threads: false });
        const bytes = new Uint8Array(await (await fetch(file)).arrayBuffer());
        const model = await loadAndCompile(bytes, { accelerator: "wasm" });
        const run = async (name, { ids, mask }) => {
          const [input_ids, attention_mask] = [ids, mask].map(
            (row) => new Tensor(Int32Array.from(row), [1, row.length]),
          );
          const { logits } = await model.signatures[name].run({ input_ids, attention_mask });
          return { rows: [Array.from(logits.toTypedArray())] };
        };
        const answers = [];
        for (const row of cases) answers.push(await run(signature, row));
        const refused = await run("serving_default", cases[0]).then(
          () => "",
          (error) => String(error),
        );
        return { answers, refused };
      },
      [file, signature, cases],
    );
    const figures = held(cases, found.answers);
    measured[`fixed_${precision}`] = figures;
    assert.match(found.refused, /does not match/);
    assert.equal(figures.top1, 1);
    if (precision === "fp32") assert.ok(figures.most <= 1e-3, `the largest difference is ${figures.most}`);
    // Where every activation rounds alike nothing is apart; it does on texts of few tokens.
    else assert.ok(figures.alike > 0.25, `${figures.alike} alike`);
    await context.close();
    other.close();
  });
}

test("prompts of all conversations are LiteRT-LM's, and so are their tokens", async () => {
  const { context, page } = await opened(browser, server.url);
  const found = await worked(
    page,
    "render",
    expected.prompts.map(({ messages }) => ({ messages })),
  );
  assert.ok(found.length > 50);
  expected.prompts.forEach(({ prompt, ids }, place) => {
    assert.equal(found[place].prompt, prompt);
    assert.deepEqual(found[place].ids, ids);
  });
  measured.prompts = found.length;
  await context.close();
});

test("eight answers are LiteRT-LM's, word for word, and the console is silent", async () => {
  const { context, page, errors } = await opened(browser, server.url);
  await page.locator("details").evaluate((details) => {
    details.open = true;
  });
  await page.selectOption("#sampler", "greedy");
  await page.fill("#count", String(expected.answer));
  assert.equal(expected.words.length, 8);
  for (const { question, text } of expected.words) {
    assert.equal(await ask(page, question), text);
    await page.click("#anew");
  }
  measured.words = expected.words.length;
  assert.equal(await page.evaluate(() => self.crossOriginIsolated), true);
  assert.match(await page.textContent("#facts"), /WebAssembly, \d threads\. Not WebGPU: this browser /);
  assert.deepEqual(errors, []);
  await context.close();
});

test("it says how far loading is, what runs, and how fast", async () => {
  const { context, page } = await opened(browser, server.url, () => {
    globalThis.told = [];
    addEventListener("DOMContentLoaded", () => {
      const [status, progress] = ["status", "progress"].map((id) => document.getElementById(id));
      new MutationObserver(() =>
        globalThis.told.push([status.textContent, progress.hidden ? null : progress.value]),
      ).observe(status, { childList: true });
    });
  });
  await ask(page, expected.words[1].question);
  const model = JSON.parse(readFileSync(join(FOLDER, "page.json"), "utf8"));
  const said = await page.evaluate(() => globalThis.told);
  const loading = said.filter(([status]) => /^Loading: [\d.]+ MB of [\d.]+ MB$/.test(status)).map(([, value]) => value);
  assert.ok(
    loading.length > 3 && loading.every((value, place) => value > 0 && value < 1 && value >= (loading[place - 1] ?? 0)),
  );
  assert.match(said.at(-1)[0], /^\d+ tokens, [\d.]+ a second; first after [\d.]+ s; \d+ tokens read, \d+ a second\.$/);
  const facts = await page.textContent("#facts");
  for (const fact of [
    model.model,
    model.revision,
    model.files.decoder.sha256,
    `passed ${model.verdict.checks} checks`,
  ]) {
    assert.ok(facts.includes(fact), fact);
  }
  assert.match(facts, /Memory[\d.]+ MB$/);
  assert.equal(await page.getAttribute("#facts a", "href"), "report.html");
  await context.close();
});

test("the sampler draws from the likeliest, as often as their probabilities say", async () => {
  const { context, page } = await opened(browser, server.url);
  const counts = await page.evaluate(async () => {
    const { sample } = await import("./engine.js");
    const logits = Float32Array.from([0, 1, 4, 2, 3]);
    const draws = 20000;
    const tried = {
      "three likeliest": { top_k: 3, top_p: 1, temperature: 2 },
      "fewest that have 0.7": { top_k: 5, top_p: 0.7, temperature: 1 },
      likeliest: { top_k: 1 },
    };
    const counted = Object.entries(tried).map(([name, sampler]) => {
      const found = [0, 0, 0, 0, 0];
      for (let draw = 0; draw < draws; draw++) found[sample(logits, sampler, () => (draw + 0.5) / draws)] += 1 / draws;
      return [name, found];
    });
    return Object.fromEntries(counted);
  });
  const softmax = (logits) => {
    const mass = logits.reduce((sum, value) => sum + Math.exp(value), 0);
    return logits.map((value) => Math.exp(value) / mass);
  };
  const near = (found, wanted) =>
    wanted.forEach((value, token) => {
      assert.ok(Math.abs(found[token] - value) < 1e-3, `${found} instead of ${wanted}`);
    });
  near(counts["three likeliest"], softmax([-Infinity, -Infinity, 2, 1, 1.5]));
  // The likeliest alone has 0.64 of it: it takes the second as well.
  near(counts["fewest that have 0.7"], softmax([-Infinity, -Infinity, 4, -Infinity, 3]));
  near(counts.likeliest, [0, 0, 1, 0, 0]);
  await context.close();
});

test("neither the page nor its worker can send anything elsewhere", async () => {
  const { context, page } = await opened(browser, server.url);
  await page.click("#load");
  await page.waitForFunction(() => document.getElementById("status").textContent.startsWith("Loaded in"));
  const other = await serve(FOLDER);
  for (const place of [page, page.workers()[0]]) {
    const blocked = await place.evaluate(
      (url) =>
        new Promise((resolve) => {
          (globalThis.document ?? globalThis).addEventListener("securitypolicyviolation", (event) =>
            resolve(event.effectiveDirective),
          );
          const sent = () => setTimeout(() => resolve("nothing"), 500);
          fetch(url, { mode: "no-cors" }).then(sent, sent);
        }),
      other.url,
    );
    assert.equal(blocked, "connect-src");
  }
  await context.close();
  other.close();
});

test("a second question is asked with the first in mind", async () => {
  const { context, page } = await opened(browser, server.url);
  const [first, second] = expected.words.slice(1, 3);
  await ask(page, first.question);
  await ask(page, second.question);
  const shown = await page.locator("#talk article p").allTextContents();
  const messages = [
    { role: "user", content: first.question },
    { role: "assistant", content: first.text },
    { role: "user", content: second.question },
  ];
  const [alone] = await worked(page, "answer", [{ messages, count: 512, sampler: { top_k: 1 } }]);
  assert.deepEqual(shown, [first.question, first.text, second.question, alone.text]);
  await context.close();
});

test("once loaded, it answers without a network and asks nobody else", async () => {
  const { context, page } = await opened(browser, server.url);
  const asked = [];
  context.on("request", (request) => asked.push(request.url()));
  const [{ question, text }] = expected.words.slice(1);
  assert.equal(await ask(page, question), text);
  await page.waitForFunction(async () => (await caches.open("page").then((store) => store.keys())).length > 10);
  await context.setOffline(true);
  await page.reload();
  await page.waitForFunction(() => !document.getElementById("load").disabled);
  assert.equal(await ask(page, question), text);
  assert.deepEqual(
    asked.filter((url) => !url.startsWith(server.url)),
    [],
  );
  await context.close();
});

test("a download that breaks off is told, and the next try goes on", async () => {
  const way = await breaking(server.url, "model/decoder.tflite");
  const { context, page } = await opened(browser, way.url);
  const [{ question, text }] = expected.words.slice(1);
  await page.fill("#ask", question);
  await page.press("#ask", "Enter");
  await page.waitForSelector("#obstacle:not([hidden])");
  assert.match(await page.textContent("#obstacle"), /decoder\.tflite broke off after .* of 2\.5 MB/);
  assert.equal(await page.inputValue("#ask"), question, "the question is back");
  await settled(page);
  assert.equal(await ask(page, question), text);
  await context.close();
  way.close();
});

const DAMAGED = {
  "with a bit that is another one": [
    (bytes) => {
      bytes[bytes.length >> 1] ^= 1;
      return bytes;
    },
    /decoder\.tflite is not the file that was judged/,
  ],
  "that ends early": [(bytes) => bytes.subarray(0, -1), /decoder\.tflite broke off after .* \(it ended early\)/],
  "that is longer": [
    (bytes) => Buffer.concat([bytes, Buffer.of(0)]),
    /decoder\.tflite broke off .*more came than was said/,
  ],
};
for (const [what, [damage, sentence]] of Object.entries(DAMAGED)) {
  test(`a file ${what} is refused, and not kept`, async () => {
    const other = await changed((copy) => {
      const file = join(copy, "model/decoder.tflite");
      const bytes = damage(readFileSync(file));
      rmSync(file);
      writeFileSync(file, bytes);
    });
    const { context, page } = await opened(browser, other.url);
    await page.click("#load");
    await page.waitForSelector("#obstacle:not([hidden])");
    assert.match(await page.textContent("#obstacle"), sentence);
    const kept = await page.evaluate(async () =>
      (await (await caches.open("model-files")).keys()).map(({ url }) => url),
    );
    assert.deepEqual(
      kept.filter((url) => url.includes("/decoder")),
      [],
    );
    await context.close();
    other.close();
  });
}

const LACKING = {
  "no WebAssembly SIMD": [
    () => {
      WebAssembly.validate = () => false;
    },
    /no WebAssembly SIMD/,
  ],
  "too little memory": [
    () => {
      Object.defineProperty(Navigator.prototype, "deviceMemory", { get: () => 0.0625 });
    },
    /this device has 67\.1 MB in all/,
  ],
  "a model over the browser's limit": [
    () => {
      const real = globalThis.fetch;
      globalThis.fetch = async (...request) => {
        const response = await real(...request);
        if (request[0] !== "page.json") return response;
        return Response.json({ ...(await response.json()), memory: 3e9 });
      };
    },
    /needs about 3\.00 GB of memory, and a page gets 2\.15 GB at most/,
  ],
};
for (const [what, [change, sentence]] of Object.entries(LACKING)) {
  test(`${what}: a sentence before anything of the model is downloaded`, async () => {
    const { context, page } = await opened(browser, server.url, change);
    const asked = [];
    context.on("request", (request) => asked.push(request.url()));
    assert.match(await page.textContent("#obstacle"), sentence);
    assert.equal(await page.isDisabled("#send"), true);
    await page.fill("#ask", "Azul");
    await page.press("#ask", "Enter");
    await page.waitForTimeout(300);
    assert.deepEqual(
      asked.filter((url) => url.includes("/model/")),
      [],
    );
    assert.equal(await page.locator("#talk article").count(), 0);
    await context.close();
  });
}

test("a browser without room to keep anything answers all the same", async () => {
  const { context, page, errors } = await opened(browser, server.url);
  await page.waitForFunction(() => navigator.serviceWorker.controller);
  const session = await context.newCDPSession(page);
  await session.send("Storage.overrideQuotaForOrigin", { origin: new URL(server.url).origin, quotaSize: 1 });
  const { question, text } = expected.words[1];
  assert.equal(await ask(page, question), text);
  const kept = await page.evaluate(async () => (await (await caches.open("model-files")).keys()).length);
  assert.equal(kept, 0);
  assert.deepEqual(errors, []);
  await context.close();
});

test("a reload amid an answer leaves a page that answers", async () => {
  const { context, page, errors } = await opened(browser, server.url);
  const [long, short] = expected.words;
  await page.fill("#ask", long.question);
  await page.press("#ask", "Enter");
  await page.waitForFunction(() => document.querySelector("#talk article.assistant p")?.textContent.length > 3);
  await page.reload();
  await page.waitForFunction(() => !document.getElementById("load").disabled);
  assert.equal(await ask(page, short.question), short.text);
  assert.deepEqual(errors, []);
  await context.close();
});

test("an answer stops when told, and what was said stays", async () => {
  const { context, page } = await opened(browser, server.url);
  await page.fill("#ask", expected.words[0].question);
  await page.press("#ask", "Enter");
  await page.waitForFunction(() => document.querySelector("#talk article.assistant p")?.textContent.length > 3);
  await page.keyboard.press("Escape");
  await settled(page);
  assert.match(await page.textContent("#status"), /Stopped/);
  assert.ok(expected.words[0].text.startsWith((await page.textContent("#talk article.assistant p")).slice(0, 4)));
  await context.close();
});

test("two tabs answer at a time", async () => {
  const { context, page } = await opened(browser, server.url);
  const second = await tab(context);
  await second.page.goto(server.url);
  await second.page.waitForFunction(() => !document.getElementById("load").disabled);
  const [, one, other] = expected.words;
  const answers = await Promise.all([ask(page, one.question), ask(second.page, other.question)]);
  assert.deepEqual(answers, [one.text, other.text]);
  await context.close();
});

test("without isolation it runs on one thread, with the same words", async () => {
  const other = await changed((copy) =>
    writeFileSync(join(copy, "_headers"), "/*\n  X-Content-Type-Options: nosniff\n"),
  );
  const { context, page } = await opened(browser, other.url);
  assert.equal(await ask(page, expected.words[1].question), expected.words[1].text);
  assert.match(await page.textContent("#facts"), /one thread/);
  await context.close();
  other.close();
});

test("in a frame of another site it answers on one thread, and says why", async () => {
  const site = createServer((_, response) => {
    response.setHeader("Content-Type", "text/html");
    response.end(
      `<title>A site</title><iframe title="The model" src="${server.url}" width="600" height="600"></iframe>`,
    );
  });
  await new Promise((resolve) => site.listen(0, "localhost", resolve));
  const context = await browser.newContext();
  const { page, errors } = await tab(context);
  await page.goto(`http://localhost:${site.address().port}/`);
  const [, frame] = page.frames();
  await frame.waitForFunction(() => !document.getElementById("load").disabled);
  assert.equal(await ask(frame, expected.words[1].question), expected.words[1].text);
  assert.match(await frame.textContent("#facts"), /one thread \(a page in a frame/);
  assert.deepEqual(errors, []);
  await context.close();
  site.close();
});

for (const scheme of ["light", "dark"]) {
  for (const [device, viewport] of Object.entries({
    desk: { width: 1280, height: 800 },
    phone: { width: 360, height: 740 },
  })) {
    test(`${scheme}, on a ${device}: by keyboard, both directions of writing, no serious finding of axe`, async () => {
      const context = await browser.newContext({ colorScheme: scheme, viewport, reducedMotion: "reduce" });
      const { page, errors } = await tab(context);
      await page.goto(server.url);
      await page.waitForFunction(() => !document.getElementById("load").disabled);
      // The first key leads to the link that skips, the next ones into the form: no mouse is needed.
      await page.keyboard.press("Tab");
      await page.keyboard.press("Enter");
      await page.keyboard.type("ⴰⵣⵓⵍ, مرحبا");
      await page.keyboard.press("Enter");
      await settled(page);
      await page.keyboard.type("مرحبا، 1 2");
      await page.keyboard.press("Enter");
      await settled(page);
      const [first, second] = await page
        .locator("#talk article.user p")
        .evaluateAll((turns) => turns.map((turn) => getComputedStyle(turn).direction));
      assert.deepEqual([first, second], ["ltr", "rtl"]);
      assert.ok(
        await page.evaluate(
          () =>
            document.fonts.check("16px 'Noto Sans Tifinagh'", "ⴰ") &&
            [...document.fonts].some(({ status }) => status === "loaded"),
        ),
      );
      assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "nothing sticks out");
      assert.deepEqual(await faults(page, axe.source), []);
      assert.deepEqual(errors, []);
      if (process.env.SHOTS)
        await page.screenshot({ path: join(process.env.SHOTS, `page-${scheme}-${device}.png`), fullPage: true });
      await context.close();
    });
  }
}

test("from click to first token, warm, and what the page weighs", async () => {
  const { context, page } = await opened(browser, server.url);
  const [{ question }] = expected.words.slice(1);
  await ask(page, question);
  const kept = ["index.html", "sw.js", ...JSON.parse(readFileSync(join(FOLDER, "files.json"), "utf8"))];
  measured.page_bytes = kept
    .filter((path) => path !== "report.html")
    .reduce((sum, path) => sum + readFileSync(join(FOLDER, path)).length, 0);
  assert.ok(measured.page_bytes <= 400_000, `${measured.page_bytes} bytes`);
  const times = [];
  for (let round = 0; round < 5; round++) {
    await page.reload();
    await page.waitForFunction(() => !document.getElementById("load").disabled);
    await page.fill("#ask", question);
    times.push(
      await page.evaluate(
        () =>
          new Promise((resolve) => {
            const begun = performance.now();
            new MutationObserver((_, observer) => {
              if (document.querySelector("#talk article.assistant p")?.textContent) {
                observer.disconnect();
                resolve((performance.now() - begun) / 1000);
              }
            }).observe(document.getElementById("talk"), { childList: true, subtree: true, characterData: true });
            document.getElementById("send").click();
          }),
      ),
    );
  }
  times.sort((a, b) => a - b);
  measured.first_token_seconds = times[2];
  assert.ok(times[2] <= 2, `${times} s`);
  await context.close();
});
