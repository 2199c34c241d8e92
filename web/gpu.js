// Whether sections that were opened on WebGPU say what was recorded of the interpreter when the page was made.

import { Context } from "./engine.js";

/** The logits after each of `ids` from the place `from` on, those before it in the cache by prefill. */
export async function logits(sections, ids, from) {
  const context = new Context(sections);
  try {
    await context.prefill(ids.slice(0, from));
    const rows = [];
    for (const token of ids.slice(from)) rows.push(await context.decode(token));
    return rows;
  } finally {
    context.close();
  }
}

/**
 * Why sections that were opened on WebGPU are not used, as a part of a sentence; empty if they are.
 * @param {Sections} sections
 * @param {{ids: number[], prefilled: number, rows: {tokens: number[], logs: number[]}[]}} recorded
 * @param {number} limit mean divergence, in nats.
 */
export async function refusal(sections, recorded, limit) {
  if (!sections.models.decoder.isFullyAccelerated) {
    return ["LiteRT.js runs only a part of this model there", ...sections.lacking].join(", not its ");
  }
  const rows = apart(recorded.rows, await logits(sections, recorded.ids, recorded.prefilled));
  const found = rows.reduce((sum, { kld }) => sum + kld, 0) / rows.length;
  // Not `>`: NaN is refused.
  if (found <= limit) return "";
  return `what it says is ${found.toPrecision(2)} nats from what was judged, and ${limit} is the most`;
}

/**
 * How far logits are from what was recorded, row by row: KL(recorded || logits) in nats, over the tokens that are
 * recorded and all others as one; the largest difference of a recorded log-probability; whether the likeliest is the same.
 */
export function apart(rows, logits) {
  return rows.map(({ tokens, logs }, place) => {
    const all = logProbabilities(logits[place]);
    const found = tokens.map((token) => all[token]);
    const [left, right] = [logs, found].map((known) => [...known, others(known)]);
    return {
      kld: left.reduce((sum, log, at) => sum + Math.exp(log) * (log - right[at]), 0),
      most: Math.max(...logs.map((log, at) => Math.abs(log - found[at]))),
      same: Number(all[tokens[0]] === all.reduce((most, log) => Math.max(most, log))),
    };
  });
}

/** The logarithm of what `logs` leave of the probability: never nothing, for they are rounded. */
function others(logs) {
  return Math.log(Math.max(1e-6, 1 - logs.reduce((sum, log) => sum + Math.exp(log), 0)));
}

function logProbabilities(logits) {
  const top = logits.reduce((most, value) => Math.max(most, value), -Infinity);
  const mass = Math.log(logits.reduce((sum, value) => sum + Math.exp(value - top), 0));
  return logits.map((value) => value - top - mass);
}
