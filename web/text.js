// Text and tokens: the chat template, rendered by @huggingface/jinja, and the tokenizer of the bundle.

import { Template } from "./vendor/jinja.js";
import { Tokenizer } from "./vendor/tokenizers.js";

// Jinja's `trim` removes what Python calls white space, the library's what JavaScript does. They differ in these, which
// nobody types: separators of the ASCII set, next line, the byte order mark. They are taken out.
// biome-ignore lint/suspicious/noControlCharactersInRegex: it is about control characters.
export const TRIMMED_OTHERWISE = /[\x1c-\x1f\x85\ufeff]/g;
const WHOLE = { skip_special_tokens: false, clean_up_tokenization_spaces: false };

/** Prompts of one model. */
export class Text {
  /**
   * @param {object} tokenizer the contents of tokenizer.json.
   * @param {{template: string, tokens: Record<string, string>, start: number | null}} chat the checkpoint's template,
   *     its named tokens, and the id that the first prompt begins with.
   */
  constructor(tokenizer, chat) {
    this.tokenizer = new Tokenizer(tokenizer, {});
    this.chat = chat;
    this.template = chat.template ? new Template(chat.template) : null;
  }

  /** The prompt of a conversation up to where the model is to answer; without a template what was said, joined. */
  render(messages) {
    const said = messages.map(({ role, content }) => ({ role, content: content.replace(TRIMMED_OTHERWISE, "") }));
    if (!this.template) return said.map(({ content }) => content).join("");
    return this.template.render({ messages: said, add_generation_prompt: true, ...this.chat.tokens });
  }

  /** Token ids of a prompt, which begin with the start token if the model has one. */
  encode(prompt) {
    const ids = this.tokenizer.encode(prompt, { add_special_tokens: false }).ids;
    const { start } = this.chat;
    return start === null || ids[0] === start ? ids : [start, ...ids];
  }

  /** The text of `ids`. */
  decode(ids) {
    return ids.length ? this.tokenizer.decode(ids, WHOLE) : "";
  }
}

/** `text` without the bytes of a character at its end that has not come as a whole. */
export function whole(text) {
  return text.replace(/\ufffd+$/, "");
}
