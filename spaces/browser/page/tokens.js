// Texts to token ids: `WordReader` of src/spar_onnx/words.py, on @huggingface/tokenizers.
import { Tokenizer } from './tokenizers.js';
import { firstLine, Refusal } from './refusal.js';

const PUNCTUATION = /[!-/:-@[-`{-~]/g;

export class WordReader {
  /**
   * @param {object} tokenizer tokenizer.json
   * @param {object} config tokenizer_config.json
   * @param {object} side `text` of export.json: how the text tower reads
   */
  constructor(tokenizer, config, side) {
    this.side = side;
    try {
      this.tokenizer = new Tokenizer(tokenizer, config);
      const bare = this.tokenizer.encode('a', { add_special_tokens: false }).ids;
      const whole = this.tokenizer.encode('a').ids;
      const start = whole.findIndex((_, at) => bare.every((id, k) => whole[at + k] === id));
      this.before = whole.slice(0, start);
      this.after = whole.slice(start + bare.length);
    } catch (error) {
      throw new Refusal(`The model's tokenizer.json cannot be read (${firstLine(error)}); export the model again with 'spar export'.`);
    }
  }

  asRead(text) {
    const { strip_punctuation: strips, lowercase } = this.side;
    const words = strips ? text.replaceAll('_', ' ').replace(PUNCTUATION, '').trim().split(/\s+/u).join(' ') : text;
    return lowercase ? words.toLowerCase() : words;
  }

  /** Ids of one text, cut to what the tower reads. */
  ids(text) {
    const room = this.side.max_tokens - this.before.length - this.after.length;
    const own = this.tokenizer.encode(this.asRead(text), { add_special_tokens: false }).ids;
    return [...this.before, ...own.slice(0, room), ...this.after];
  }

  /** Ids of texts, filled up to one length: {ids: BigInt64Array, dims: [texts, length]}. */
  batch(texts) {
    const rows = texts.map((text) => this.ids(text));
    const length = this.side.fills ? this.side.max_tokens : Math.max(...rows.map((row) => row.length));
    const ids = new BigInt64Array(rows.length * length).fill(BigInt(this.side.pad_id));
    rows.forEach((row, index) => row.forEach((id, at) => { ids[index * length + at] = BigInt(id); }));
    return { ids, dims: [rows.length, length] };
  }
}
