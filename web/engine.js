// The sections of a bundle in LiteRT.js: tokens through the embedders and the decoder, with the cache, as LiteRT-LM
// runs them and as pipeline/runtime/sections.py does in the interpreter. What they compute must be the same.

import { loadAndCompile, loadLiteRt, supportsFeature, Tensor } from "./vendor/litert.js";

const WASM = new URL("./wasm/", import.meta.url).href;
// What LiteRT-LM writes where a token may not look: 0.7 times the lowest float32.
const MASKED = Math.fround(-0.7 * 3.4028234663852886e38);
const HARMLESS = /^(INFO|WARNING|VERBOSE)\b/;
// How the runtime says which operations a GPU lacks: `GATHER_ND: Operation is not supported.`
const UNSUPPORTED = /^(?!INFO|WARNING|VERBOSE|ERROR)([A-Z][A-Z0-9_]+): /;
const EMBEDDERS = { embeddings: "embedder", per_layer_embeddings: "per_layer_embedder" };

/** Whether kernels can run in threads: the page is isolated from others, and the browser has what LiteRT.js asks for. */
async function threaded() {
  return self.crossOriginIsolated && (await supportsFeature("relaxedSimd")) && (await supportsFeature("threads"));
}

/**
 * Open sections.
 * @param {Record<string, Uint8Array>} files the TFLite files, by section.
 * @param {{threads: number, gpu: boolean}} where how many threads may run the kernels, or that WebGPU runs the decoder's.
 * @returns {Promise<Sections>}
 */
export async function open(files, where) {
  const { gpu } = where;
  const lacking = new Set();
  const threads = !gpu && (await threaded());
  const script = `${WASM}litert_wasm_threaded_internal.js`;
  self.Module = {
    locateFile: (name) => WASM + name,
    // Where a script was loaded by another one it can't know its own place, from which its threads start.
    ...(threads ? { mainScriptUrlOrBlob: script } : {}),
    // The runtime says everything as an error; what is none goes where only those look who want to. On a GPU nothing
    // is: what fails there runs on WebAssembly, and the page says why.
    printErr: (line) => {
      const lacks = gpu && UNSUPPORTED.exec(line);
      if (lacks) lacking.add(lacks[1]);
      (gpu || HARMLESS.test(line) ? console.debug : console.error)(line);
    },
  };
  // LiteRT.js opens a GPU whether it is to use one or not (2.5.3).
  if (!gpu) {
    Object.defineProperty(self.navigator, "gpu", { value: { requestAdapter: async () => null }, configurable: true });
  }
  const runtime = await loadLiteRt(WASM, { threads, jspi: gpu });
  const count = threads ? Math.max(1, where.threads) : 1;
  const models = {};
  for (const [name, bytes] of Object.entries(files)) {
    const accelerator = gpu && name === "decoder" ? "webgpu" : "wasm";
    models[name] = await loadAndCompile(bytes, {
      accelerator,
      cpuOptions: { numThreads: count },
      gpuOptions: { precision: "fp32" },
    });
  }
  return new Sections(models, runtime, count, [...lacking]);
}

/** Open sections of one model; `lacking` are operations of its that do not run on the GPU. */
export class Sections {
  constructor(models, runtime, threads, lacking) {
    this.models = models;
    this.runtime = runtime;
    this.threads = threads;
    this.lacking = lacking;
    this.signatures = models.decoder.signatures;
    const names = Object.keys(this.signatures).filter((name) => /^prefill_\d+$/.test(name));
    this.prefills = names.map((name) => Number(name.slice("prefill_".length))).sort((a, b) => a - b);
    this.shapes = Object.fromEntries(
      Object.entries(this.signatures).map(([name, runner]) => [
        name,
        Object.fromEntries(runner.getInputDetails().map((input) => [input.name, Array.from(input.shape)])),
      ]),
    );
    this.length = this.shapes.decode.mask.at(-1);
  }

  /** Bytes of memory that the runtime holds. */
  get memory() {
    return this.runtime.liteRtWasm.HEAPU8.length;
  }

  /** A cache of zeros. */
  empty() {
    const kept = Object.entries(this.shapes.decode).filter(([name]) => name.startsWith("kv_cache_"));
    return Object.fromEntries(kept.map(([name, shape]) => [name, new Tensor(new Float32Array(size(shape)), shape)]));
  }

  /**
   * The signatures that put `count` tokens into the cache, with how many each takes: the longest as often as it is
   * full, then the shortest that holds the rest.
   */
  plan(count) {
    const steps = [];
    let left = count;
    for (const length of [...this.prefills].reverse()) {
      for (; left >= length; left -= length) steps.push([`prefill_${length}`, length]);
    }
    if (left) steps.push([`prefill_${this.prefills.find((length) => length >= left)}`, left]);
    return steps;
  }

  /**
   * Run `tokens` at `position` … with `cache`, which is used up: padding stands at position 0, masked, all zero.
   * @returns {Promise<{cache: Record<string, Tensor>, logits: Float32Array | undefined}>}
   */
  async run(signature, tokens, position, cache) {
    const shapes = this.shapes[signature];
    const [padded] = shapes.input_pos;
    if (position + padded > this.length) throw new Full(this.length);
    const positions = new Int32Array(padded).map((_, row) => (row < tokens.length ? position + row : 0));
    const mask = new Float32Array(size(shapes.mask)).fill(MASKED);
    // A token sees all before it and itself; rows of padding see nothing.
    for (let row = 0; row < tokens.length; row++)
      mask.fill(0, row * this.length, row * this.length + position + row + 1);
    const own = {
      input_pos: new Tensor(positions, shapes.input_pos),
      mask: new Tensor(mask, shapes.mask),
      ...(await this.embed(tokens, shapes)),
    };
    const outputs = await this.signatures[signature].run({ ...cache, ...own });
    for (const tensor of [...Object.values(own), ...Object.values(cache)]) tensor.delete();
    const { logits, ...kept } = outputs;
    const values = await logits?.data();
    logits?.delete();
    return { cache: kept, logits: values };
  }

  async embed(tokens, shapes) {
    if (shapes.tokens) {
      const ids = new Int32Array(size(shapes.tokens));
      ids.set(tokens);
      return { tokens: new Tensor(ids, shapes.tokens) };
    }
    const inputs = {};
    for (const [name, section] of Object.entries(EMBEDDERS)) {
      if (!shapes[name]) continue;
      const rows = new Float32Array(size(shapes[name]));
      const width = size(shapes[name].slice(2));
      for (const [row, token] of tokens.entries()) {
        const ids = new Tensor(Int32Array.of(token), [1, 1]);
        const found = await this.models[section].run({ token_ids: ids });
        rows.set(found.embeddings.toTypedArray(), row * width);
        ids.delete();
        found.embeddings.delete();
      }
      inputs[name] = new Tensor(rows, shapes[name]);
    }
    return inputs;
  }
}

/** One context: tokens go in, logits come out. */
export class Context {
  constructor(sections) {
    this.sections = sections;
    this.cache = sections.empty();
    this.position = 0;
  }

  /** Put `tokens` into the cache. */
  async prefill(tokens) {
    let start = 0;
    for (const [signature, count] of this.sections.plan(tokens.length)) {
      await this.step(signature, tokens.slice(start, start + count));
      start += count;
    }
  }

  /** Put `token` into the cache and return the logits of what follows it. */
  async decode(token) {
    return this.step("decode", [token]);
  }

  async step(signature, tokens) {
    const done = await this.sections.run(signature, tokens, this.position, this.cache);
    this.cache = done.cache;
    this.position += tokens.length;
    return done.logits;
  }

  /** Free the cache. */
  close() {
    for (const tensor of Object.values(this.cache)) tensor.delete();
    this.cache = {};
  }
}

/** The cache has no room. */
export class Full extends Error {
  constructor(length) {
    super(
      `The conversation is longer than the ${length.toLocaleString("en")} tokens that this model holds. ` +
        "Start a new one, or ask for less.",
    );
  }
}

/**
 * The next token: the likeliest of `top_k` 1, else one drawn from the `top_k` likeliest, of those from the fewest that
 * have `top_p` of the probability together.
 * @param {Float32Array} logits
 * @param {{top_k: number, top_p: number, temperature: number}} sampler
 * @param {() => number} random uniform in [0, 1).
 */
export function sample(logits, sampler, random) {
  if (sampler.top_k === 1 || sampler.temperature === 0) return likeliest(logits);
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
  const kept = order.slice(0, sampler.top_k);
  const weights = kept.map((token) => Math.exp((logits[token] - logits[kept[0]]) / sampler.temperature));
  const all = weights.reduce((sum, weight) => sum + weight, 0);
  let count = 0;
  let mass = 0;
  while (count < kept.length && (count === 0 || mass < sampler.top_p * all)) mass += weights[count++];
  let draw = random() * mass;
  for (let place = 0; place < count; place++) {
    draw -= weights[place];
    if (draw < 0) return kept[place];
  }
  return kept[count - 1];
}

function likeliest(logits) {
  let best = 0;
  for (let token = 1; token < logits.length; token++) if (logits[token] > logits[best]) best = token;
  return best;
}

function size(shape) {
  return shape.reduce((product, length) => product * length, 1);
}
