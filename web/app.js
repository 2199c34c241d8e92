// The page: what is said, what runs, and how far loading is. The model itself is in worker.js.

import { megabytes } from "./files.js";
import { gpuObstacle, obstacle } from "./needs.js";

const $ = (id) => document.getElementById(id);
const THREADS = Math.min(navigator.hardwareConcurrency || 1, 8);
/** Milliseconds that loading waits for the service worker. */
const PATIENCE = 3000;
const said = [];
let model = null;
let worker = null;
let ready = null;
let answering = 0;
let kept = null;

/** A request to the worker; `news` are told while it runs. */
class Worked {
  constructor() {
    this.worker = new Worker("worker.js");
    this.last = 0;
    this.open = new Map();
    this.worker.onmessage = ({ data: { id, kind, ...rest } }) => {
      const { news, resolve, reject } = this.open.get(id);
      if (kind === "news") news?.(rest);
      else this.open.delete(id);
      if (kind === "done") resolve(rest);
      if (kind === "failed") reject(new Error(rest.message));
    };
    this.worker.onerror = (event) => {
      event.preventDefault();
      const failure = new Error(
        `The model stopped: ${event.message || "its worker could not start"}. Load the page again.`,
      );
      for (const { reject } of this.open.values()) reject(failure);
      this.open.clear();
    };
  }

  ask(kind, request, news) {
    const id = ++this.last;
    return new Promise((resolve, reject) => {
      this.open.set(id, { news, resolve, reject });
      this.worker.postMessage({ id, kind, ...request });
    });
  }

  stop(id) {
    this.worker.postMessage({ id, kind: "stop" });
  }
}

async function begin() {
  try {
    const response = await fetch("page.json");
    model = await response.json();
  } catch {
    return refuse("page.json is missing beside this page: put up the whole folder that `make page` wrote.");
  }
  document.title = `${model.name}, in your browser`;
  $("name").textContent = model.name;
  if (model.sampler.top_k === 1) $("sampler").value = "greedy";
  $("count").max = String(model.max_tokens);
  show({});
  const why = obstacle(model);
  if (why) return refuse(why);
  const sizes = Object.values(model.files).map((file) => file.size);
  $("load").textContent = `Load the model (${megabytes(sizes.reduce((sum, size) => sum + size, 0))})`;
  $("load").disabled = false;
  $("send").disabled = false;
  say("Loads once, and stays in this browser for the next time. Sending a message loads it too.");
  // What is loaded before the service worker is there would be missing without a network.
  kept = navigator.serviceWorker?.register("sw.js").then(
    () => navigator.serviceWorker.ready,
    () => {},
  );
}

function refuse(why) {
  $("obstacle").textContent = why;
  $("obstacle").hidden = false;
}

function say(text) {
  $("status").textContent = text;
}

/** Load the model, once; a failure may be followed by another try. */
function load() {
  ready ??= loading().catch((error) => {
    ready = null;
    $("load").disabled = false;
    throw error;
  });
  return ready;
}

async function loading() {
  const begun = performance.now();
  $("obstacle").hidden = true;
  $("load").disabled = true;
  $("progress").hidden = false;
  say("Loading …");
  await Promise.race([kept, new Promise((resolve) => setTimeout(resolve, PATIENCE))]);
  try {
    let without = await gpuObstacle();
    let opened = null;
    if (!without) {
      opened = await start(true);
      without = opened.refused;
    }
    if (without) opened = await start(false);
    $("load").hidden = true;
    show({ ...opened, without });
    say(`Loaded in ${((performance.now() - begun) / 1000).toFixed(1)} s.`);
  } finally {
    $("progress").hidden = true;
  }
}

/** Load the model in a worker of its own: what a GPU took is free again where it is refused. */
function start(gpu) {
  worker?.worker.terminate();
  worker = new Worked();
  return worker.ask("load", { model, threads: THREADS, gpu }, ({ come, total }) => {
    $("progress").value = come / total;
    if (come < total) say(`Loading: ${megabytes(come)} of ${megabytes(total)}`);
    else say(gpu ? "Trying the model on WebGPU …" : "Opening the model …");
  });
}

async function send() {
  const question = $("ask").value;
  if (answering || !question.trim()) return;
  $("ask").value = "";
  said.push({ role: "user", content: question });
  write("user", question);
  const answer = write("assistant", "");
  answering = -1;
  busy(true);
  try {
    await load();
    answering = worker.last + 1;
    const count = Math.max(1, Number($("count").value) || 512);
    const sampler = $("sampler").value === "greedy" ? { top_k: 1 } : model.sampler;
    const done = await worker.ask("answer", { messages: said, count, sampler }, ({ piece }) => {
      answer.append(piece);
    });
    answer.textContent = done.text;
    said.push({ role: "assistant", content: done.text });
    const why = { stop: "", length: " It reached its greatest length.", stopped: " Stopped." }[done.ended];
    say(
      `${done.tokens} tokens, ${done.decode_per_second.toFixed(1)} a second; first after ${done.first_token.toFixed(2)} s; ` +
        `${done.prompt_tokens} tokens read, ${done.prefill_per_second.toFixed(0)} a second.${why}`,
    );
    show({ memory: done.memory });
  } catch (error) {
    // The question goes back where it was: nothing of a failed turn stays in the conversation.
    said.pop();
    answer.closest("article").previousElementSibling.remove();
    answer.closest("article").remove();
    $("ask").value ||= question;
    say("");
    refuse(error.message);
  } finally {
    answering = 0;
    busy(false);
    $("ask").focus();
  }
}

function busy(now) {
  $("send").disabled = now;
  $("stop").disabled = !now;
  $("anew").disabled = now || !said.length;
  $("talk").setAttribute("aria-busy", String(now));
}

function stop() {
  if (answering > 0) worker.stop(answering);
}

function write(role, text) {
  const turn = document.createElement("article");
  turn.className = role;
  const who = document.createElement("h3");
  who.textContent = role === "user" ? "You" : "The model";
  const words = document.createElement("p");
  words.dir = "auto";
  words.textContent = text;
  turn.append(who, words);
  $("talk").append(turn);
  return words;
}

const shown = {};
function show(news) {
  Object.assign(shown, news);
  const link = document.createElement("a");
  link.href = "report.html";
  link.textContent = "the report";
  const verdict = [`passed ${model.verdict.checks} checks: `, link];
  const rows = {
    Checkpoint: [model.model],
    Revision: [model.revision],
    "Decoder's sha256": [model.files.decoder.sha256],
    Verdict: model.verdict.passed ? verdict : ["did not pass: ", link],
    Kernels: [kernels()],
    Memory: [shown.memory ? megabytes(shown.memory) : `about ${megabytes(model.memory)}, when loaded`],
  };
  $("facts").replaceChildren(
    ...Object.entries(rows).flatMap(([name, parts]) => {
      const term = document.createElement("dt");
      term.textContent = name;
      const value = document.createElement("dd");
      value.append(...parts);
      return [term, value];
    }),
  );
}

function kernels() {
  const { threads, without } = shown;
  if (!threads) return "WebGPU where it says what was judged, else WebAssembly";
  if (!without) return "WebGPU, whose answers to the page's own questions are those that were judged";
  const count = threads === 1 ? "one thread" : `${threads} threads`;
  const why = self.crossOriginIsolated ? "" : " (a page in a frame, or without its headers, gets no more)";
  return `WebAssembly, ${count}${why}. Not WebGPU: ${without}.`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!$("send").disabled) send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("stop").addEventListener("click", stop);
$("load").addEventListener("click", () =>
  load().catch((error) => {
    say("");
    refuse(error.message);
  }),
);
$("anew").addEventListener("click", () => {
  said.length = 0;
  $("talk").replaceChildren();
  busy(false);
  $("ask").focus();
});

begin();
