// An exported model that is ready to run: pictures and words in, label maps and features out; `OnnxPipeline` of
// src/spar_onnx/pipeline.py.
import constants from './constants.js';
import { Exported } from './exported.js';
import { inputValues } from './pixels.js';
import { firstLine, isShortOfMemory, Refusal } from './refusal.js';
import { Runtime } from './runtime.js';
import { WordReader } from './tokens.js';
import { unit } from './features.js';

const BATCH = 64;   // prompts encoded at once
const MEGABYTE = 1e6;

export class Model {
  /**
   * @param {{address: string} | {files: File[]}} from an exported folder
   * @param {string | null} dtype null for the first that is there
   * @param {'webgpu' | 'wasm'} device
   * @param {(text: string, share?: number) => void} progress
   */
  static async load(from, dtype, device, progress) {
    const model = new Model();
    progress('Reading the model');
    model.exported = await Exported.open(from);
    model.dtype = dtype ?? model.exported.dtypes[0];
    if (!model.exported.dtypes.includes(model.dtype))
      throw new Refusal(`${model.exported.called} holds graphs of ${model.exported.dtypes.join(', ')} and none of ${model.dtype}; choose one of them, or export with --dtype ${model.dtype}.`);
    model.words = new WordReader(model.exported.tokenizer, model.exported.tokenizerConfig, model.exported.record.text);
    progress('Starting onnxruntime');
    model.runtime = await Runtime.start(device);
    for (const name of ['vision_model', 'text_model', 'label_map']) {
      const bytes = await model.exported.graph(name, model.dtype, (done, total) =>
        progress(`Fetching ${name}, ${(done / MEGABYTE).toFixed(1)}${total ? ` of ${(total / MEGABYTE).toFixed(1)}` : ''} MB`, total ? done / total : undefined));
      progress(`Preparing ${name}`);
      model[name] = await model.runtime.session(bytes, `${model.exported.called}/${model.exported.file(name, model.dtype)}`, name === 'label_map');
    }
    model.texts = new Map();   // unit features of each name, by name: a word is encoded once
    return model;
  }

  async run(name, feeds, outputs, what, pixels = null) {
    let found;
    try {
      found = await this[name].run(feeds, outputs);
    } catch (error) {
      if (isShortOfMemory(error)) throw new Refusal(`Memory is short: ${what} does not fit. ${pixels ? 'Choose a smaller size' : 'Close other tabs, or shrink the picture'}.`, pixels);
      throw new Refusal(`${name} failed on ${what} (${firstLine(error)}); ${this.runtime.device === 'webgpu' ? 'choose WebAssembly under Model' : 'try a smaller size, or export the model again'}.`);
    }
    return found;
  }

  /**
   * One vector a name, the mean over templates of unit text features, at unit length.
   * @param {string[]} names
   * @returns {Promise<Float32Array>} names x dim
   */
  async encodeNames(names, progress) {
    const { templates } = this.exported, fresh = names.filter((name) => !this.texts.has(name));
    const prompts = fresh.flatMap((name) => templates.map((template) => template.replace('{}', () => name)));
    const sums = new Map();
    for (let start = 0; start < prompts.length; start += BATCH) {
      progress(`Reading the words, ${start} of ${prompts.length} sentences`, start / prompts.length);
      const texts = prompts.slice(start, start + BATCH), { ids, dims } = this.words.batch(texts);
      const { text_embeds: found } = await this.run('text_model', { input_ids: this.runtime.tensor('int64', ids, dims) }, ['text_embeds'], `${texts.length} sentences`);
      const dim = found.dims[1], rows = unit(found.data, dim);
      texts.forEach((_, k) => {
        const name = fresh[Math.floor((start + k) / templates.length)];
        if (!sums.has(name)) sums.set(name, new Float32Array(dim));
        const sum = sums.get(name);
        for (let i = 0; i < dim; i++) sum[i] += rows[k * dim + i];
      });
      found.dispose();
    }
    for (const [name, sum] of sums) this.texts.set(name, unit(sum, sum.length));
    const dim = this.texts.get(names[0]).length, out = new Float32Array(names.length * dim);
    names.forEach((name, k) => out.set(this.texts.get(name), k * dim));
    return out;
  }

  /**
   * Patch features of a picture.
   * @returns {Promise<{embeds: Float32Array, grid: number[], dim: number, image: number[], ms: number}>} `image`: height
   *   and width that the network saw
   */
  async features(picture, maxPixels, progress) {
    const { values, height, width } = inputValues(this.exported.image, picture, maxPixels);
    const patch = this.exported.record.patch_px;
    if (Math.min(height, width) < patch)
      throw new Refusal(`The picture is ${height}x${width} pixels and the model reads patches of ${patch}; both sides must be at least that. Enlarge it.`);
    progress(`Looking at ${width} × ${height} pixels`);
    const started = performance.now();
    const { patch_embeds: found } = await this.run('vision_model', { pixel_values: this.runtime.tensor('float32', values, [1, 3, height, width]) }, ['patch_embeds'], `a picture of ${width} × ${height} pixels`, width * height);
    const embeds = await found.getData(), ms = performance.now() - started;
    if (!embeds.every(Number.isFinite)) throw new Refusal('The features hold NaN or infinite numbers; choose float32 under Model.');
    const [, rows, columns, dim] = found.dims;
    return { embeds, grid: [rows, columns], dim, image: [height, width], ms };
  }

  /**
   * The class of each pixel.
   * @param {object} features see `features`
   * @param {{names: string[], classIds: number[]}} vocabulary
   * @param {[number, number]} size height and width of the label map
   * @param {number} threshold pixels whose best class is less probable have none; 0 for no threshold
   * @returns {Promise<Int16Array>} -1 for no class
   */
  async labelMap(features, texts, { classIds }, size, threshold, progress) {
    progress(`Drawing ${size[1]} × ${size[0]} pixels`);
    // The names of a class add up their probabilities, and so do those that only compete; each is one group.
    const classes = [...new Set(classIds)].sort((a, b) => a - b), t = (...args) => this.runtime.tensor(...args);
    const whole = (numbers) => t('int64', BigInt64Array.from(numbers, BigInt), [numbers.length]);
    const feeds = {
      patch_embeds: t('float32', features.embeds, [...features.grid, features.dim]),
      text_embeds: t('float32', texts, [classIds.length, features.dim]),
      class_ids: whole(classIds.map((id) => classes.indexOf(id))),
      size_hw: whole(size),
      image_hw: whole(features.image),
      contending: t('bool', new Uint8Array(classIds.length).fill(1), [classIds.length]),
      logit_scale: t('float32', Float32Array.of(constants.logit_scale), []),
      with_probabilities: t('bool', Uint8Array.of(threshold > 0 ? 1 : 0), []),
    };
    const outputs = threshold > 0 ? ['labels', 'probabilities'] : ['labels'];
    const { labels, probabilities } = await this.run('label_map', feeds, outputs, `a label map of ${size[1]} × ${size[0]} pixels`);
    const ids = Int16Array.from(labels.data, (group) => classes[group]);
    if (threshold > 0) probabilities.data.forEach((probability, i) => { if (probability < threshold) ids[i] = -1; });
    return ids;
  }
}
