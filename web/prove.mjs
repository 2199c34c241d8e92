// Whether prompts are those of transformers: `node prove.mjs PAGE CASES.json` prints the first difference, or nothing.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [page, cases] = process.argv.slice(2);
const { Text, TRIMMED_OTHERWISE } = await import(pathToFileURL(`${page}/text.js`));
const model = JSON.parse(readFileSync(`${page}/page.json`, "utf8"));
const tokenizer = JSON.parse(readFileSync(`${page}/${model.files.tokenizer.path}`, "utf8"));
const text = new Text(tokenizer, { ...model.chat, start: null });

function difference({ messages, prompt, ids }) {
  if (messages?.every(({ content }) => content.search(TRIMMED_OTHERWISE) < 0)) {
    let rendered;
    try {
      rendered = text.render(messages);
    } catch (error) {
      return `the template fails: ${error.message}`;
    }
    if (rendered !== prompt) return `${JSON.stringify(rendered)} instead of ${JSON.stringify(prompt)}`;
  }
  const found = text.encode(prompt);
  return found.join() === ids.join() ? "" : `${JSON.stringify(prompt)} is [${found}] instead of [${ids}]`;
}

process.stdout.write(JSON.parse(readFileSync(cases, "utf8")).map(difference).find(Boolean) ?? "");
