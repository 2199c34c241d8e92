// What a model needs of a browser, asked before anything is downloaded.

import { megabytes } from "./files.js";

// (module (func (result v128) i32.const 0 i8x16.splat)): valid where WebAssembly has vectors of 128 bits.
const SIMD = Uint8Array.of(
  0,
  97,
  115,
  109,
  1,
  0,
  0,
  0,
  1,
  5,
  1,
  96,
  0,
  1,
  123,
  3,
  2,
  1,
  0,
  10,
  8,
  1,
  6,
  0,
  65,
  0,
  253,
  15,
  11,
);
/** Bytes that a WebAssembly program can have with LiteRT.js 2.5.3: its threads share memory of this size. */
export const MOST = 2 ** 31;

/**
 * Why this browser can't run the model, in a sentence; empty if nothing speaks against it.
 * @param {{memory: number}} model what it takes, in bytes.
 * @param {typeof globalThis} browser
 */
export function obstacle(model, browser = globalThis) {
  if (!browser.isSecureContext) {
    return "This page needs https or an address on this machine: elsewhere browsers give it neither hashes nor a store.";
  }
  if (typeof browser.WebAssembly !== "object" || !browser.WebAssembly.validate(SIMD)) {
    return "This browser has no WebAssembly SIMD, which the model's kernels need: use a newer one (2021 or later).";
  }
  if (model.memory > MOST) {
    return (
      `This model needs about ${megabytes(model.memory)} of memory, and a page gets ${megabytes(MOST)} at most: ` +
      "run its bundle with LiteRT-LM instead."
    );
  }
  // In GiB, rounded, and no more than 8 (or 32) so that it tells little of a visitor; some browsers don't say.
  const held = browser.navigator.deviceMemory * 2 ** 30;
  if (held < 2 * model.memory) {
    return (
      `This model needs about ${megabytes(model.memory)} of memory, and this device has ${megabytes(held)} in all: ` +
      "use one that has more."
    );
  }
  return "";
}

/** Why WebGPU is not tried in this browser, as a part of a sentence; empty if nothing speaks against it. */
export async function gpuObstacle(browser = globalThis) {
  if (!browser.navigator.gpu) return "this browser has none";
  // LiteRT.js waits for a GPU inside its program (2.5.3).
  if (!("Suspending" in browser.WebAssembly)) return "this browser has no JavaScript Promise Integration";
  const adapter = await browser.navigator.gpu.requestAdapter().catch(() => null);
  return adapter ? "" : "this browser gives it no device";
}
