// The model, beside the page so that the page never waits. A classic worker: LiteRT.js loads its script by importScripts.

const modules = Promise.all([import("./engine.js"), import("./text.js"), import("./files.js"), import("./gpu.js")]);
let loaded = null;
let stopped = 0;

self.onmessage = async ({ data: { id, kind, ...request } }) => {
  if (kind === "stop") {
    stopped = id;
    return;
  }
  try {
    const result = await ACTIONS[kind](request, (news) => self.postMessage({ id, kind: "news", ...news }), id);
    self.postMessage({ id, kind: "done", ...result });
  } catch (error) {
    self.postMessage({ id, kind: "failed", message: said(error) });
  }
};

const ACTIONS = {
  /** Load the files of `model` (page.json), and say how they run, or why WebGPU does not. */
  async load({ model, threads, gpu }, tell) {
    const [engine, text, { bytesOf }, webgpu] = await modules;
    const sizes = Object.values(model.files).map((file) => file.size);
    const total = sizes.reduce((sum, size) => sum + size, 0);
    let come = 0;
    const held = {};
    for (const [name, file] of Object.entries(model.files)) {
      held[name] = await bytesOf(file, (bytes) => {
        come += bytes;
        tell({ come, total });
      });
    }
    const { tokenizer, recorded, ...files } = held;
    const words = new text.Text(read(tokenizer), model.chat);
    let sections;
    try {
      sections = await engine.open(files, { threads, gpu });
      const refused = gpu && (await webgpu.refusal(sections, read(recorded), model.kld));
      if (refused) return { refused };
    } catch (error) {
      if (gpu) return { refused: `it failed: ${said(error)}` };
      throw error;
    }
    loaded = { model, text: words, sections };
    return { threads: sections.threads, memory: sections.memory };
  },

  /** The prompt of a conversation, and its tokens. */
  async render({ messages }) {
    const prompt = loaded.text.render(messages);
    return { prompt, ids: loaded.text.encode(prompt) };
  },

  /** The logits after each of `ids` from the place `from` on, those before it in the cache by prefill. */
  async logits({ ids, from }) {
    const [, , , { logits }] = await modules;
    return { rows: await logits(loaded.sections, ids, from) };
  },

  /** The answer to a conversation, or to a bare prompt, piece by piece: at most `count` tokens, by `sampler`. */
  async answer({ messages, prompt, count, sampler }, tell, id) {
    const [{ Context, sample }, { whole }] = await modules;
    const { text, sections, model } = loaded;
    const ids = text.encode(prompt ?? text.render(messages));
    const context = new Context(sections);
    const begun = performance.now();
    try {
      await context.prefill(ids.slice(0, -1));
      const read = performance.now();
      const said = [];
      let token = ids.at(-1);
      let shown = "";
      let first = 0;
      let ended = "length";
      while (said.length < count) {
        if (stopped === id) {
          ended = "stopped";
          break;
        }
        token = sample(await context.decode(token), sampler, random);
        first ||= performance.now() - begun;
        if (model.stop.includes(token)) {
          ended = "stop";
          break;
        }
        said.push(token);
        const now = whole(text.decode(said));
        if (now.length > shown.length && now.startsWith(shown)) {
          tell({ piece: now.slice(shown.length) });
          shown = now;
        }
        await turn();
      }
      const seconds = (performance.now() - read) / 1000;
      return {
        text: text.decode(said),
        ended,
        prompt_tokens: ids.length,
        tokens: said.length,
        first_token: first / 1000,
        prefill_per_second: (ids.length - 1) / ((read - begun) / 1000),
        decode_per_second: (said.length + (ended === "stop" ? 1 : 0)) / seconds,
        memory: sections.memory,
      };
    } finally {
      context.close();
    }
  },
};

function read(bytes) {
  return JSON.parse(new TextDecoder().decode(bytes));
}

function random() {
  return crypto.getRandomValues(new Uint32Array(1))[0] / 2 ** 32;
}

// Lets a message in, such as `stop`; a timer would wait 4 ms.
function turn() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

function said(error) {
  return error instanceof Error ? error.message : String(error);
}
