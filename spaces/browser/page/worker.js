// The work, off the page's thread: one request at a time, by messages {id, kind, ...} answered by {id, result | error}
// and, on the way, {id, text, share}. To cancel, the page ends this worker and starts another.
import constants from './constants.js';
import { coverageOf, heatPicture, pcaPicture, similarity, unit } from './features.js';
import { Model } from './model.js';
import { readPicture } from './picture.js';
import { firstLine, isShortOfMemory, Refusal } from './refusal.js';
import { bestDevice } from './runtime.js';
import { resize } from './resample.js';
import { flatNames, parseWords } from './words.js';

const BOX = 4, BICUBIC = 3;
let model = null, opened = null, seen = null, kept = null;   // model, picture, its features, its features as pictures

async function load({ from, dtype, device }, progress) {
  model = seen = kept = null;
  const wanted = device ?? (await bestDevice());
  let note = '';
  try {
    model = await Model.load(from, dtype, wanted, progress);
  } catch (error) {
    if (device || wanted === 'wasm') throw error;
    note = `WebGPU failed (${firstLine(error)}), so WebAssembly runs`;
    model = await Model.load(from, dtype, 'wasm', progress);
  }
  const { called, dtypes, record, image } = model.exported;
  return { called, dtypes, dtype: model.dtype, runs: model.runtime.called, note, method: record.method, most: image.max_input_pixels };
}

/** The picture as it is shown: at most 1280 pixels a side, and small ones enlarged by a whole factor. */
function shown({ rgb, height, width }) {
  const longer = Math.max(height, width), shrink = constants.shown_px / longer;
  const factor = Math.max(1, Math.round(constants.min_shown_px / longer));
  const size = [height, width].map((side) => (shrink < 1 ? Math.max(1, Math.round(side * shrink)) : side * factor));
  const pixels = resize(rgb, [height, width], size, shrink < 1 ? BOX : BICUBIC);
  const rgba = new Uint8ClampedArray(4 * size[0] * size[1]).fill(255);
  for (let i = 0; i < size[0] * size[1]; i++) for (let c = 0; c < 3; c++) rgba[4 * i + c] = pixels[3 * i + c];
  return { size, rgba };
}

/** The picture and its features, both made once. */
async function look({ picture, key, maxPixels }, progress) {
  if (opened?.key !== key) {
    progress('Opening the picture');
    opened = seen = null;
    const read = await readPicture(picture, model.exported.image);
    opened = { key, read, shown: shown(read) };
  }
  if (seen?.of !== opened || seen.maxPixels !== maxPixels) {
    seen = kept = null;
    seen = { of: opened, maxPixels, ...(await model.features(opened.read, maxPixels, progress)) };
  }
}

async function segment(request, progress) {
  const classes = parseWords(request.words);
  const vocabulary = flatNames(classes, request.threshold > 0 && classes.length === 1 ? constants.everyday_words : []);
  await look(request, progress);
  const texts = await model.encodeNames(vocabulary.names, progress);
  const { read, shown: { size, rgba } } = opened, whole = [read.height, read.width];
  const ids = await model.labelMap(seen, texts, vocabulary, whole, request.threshold, progress);
  const counts = new Map();
  for (const id of ids) counts.set(id, (counts.get(id) ?? 0) + 1);
  const areas = [...counts].map(([id, count]) => ({ id, fraction: count / ids.length })).sort((a, b) => b.fraction - a.fraction);
  const small = new Int16Array(size[0] * size[1]);   // each pixel takes the id that lies nearest
  const near = (i, axis) => Math.floor(((i + 0.5) * whole[axis]) / size[axis]);
  for (let y = 0, to = 0; y < size[0]; y++) for (let x = 0, row = near(y, 0) * whole[1]; x < size[1]; x++) small[to++] = ids[row + near(x, 1)];
  return { classes, areas, ids, whole, small, size, rgba, grid: seen.grid, image: seen.image, ms: seen.ms };
}

async function features(request, progress) {
  await look(request, progress);
  const { size, rgba } = opened.shown, covered = coverageOf(seen.image, model.exported.record);
  if (!kept) {
    progress('Finding the main directions');
    const rows = unit(seen.embeds, seen.dim);
    kept = { rows, covered, pca: pcaPicture(rows, seen.grid, seen.dim, size, covered) };
  }
  const cosines = similarity(kept.rows, seen.grid, seen.dim, size, covered, request.place);
  const heat = heatPicture(rgba, cosines, constants.heat);
  return { size, pca: kept.pca, heat: heat.pixels, low: heat.low, high: heat.high, grid: seen.grid, dim: seen.dim };
}

const KINDS = { load, segment, features };
let last = Promise.resolve();

self.onmessage = ({ data: { id, kind, ...request } }) => {
  const progress = (text, share) => self.postMessage({ id, text, share });
  last = last.then(async () => {
    try {
      self.postMessage({ id, result: await KINDS[kind](request, progress) });
    } catch (error) {
      const short = !(error instanceof Refusal) && isShortOfMemory(error);
      const message = error instanceof Refusal ? error.message : short ? 'Memory is short for this picture; close other tabs, or shrink it.' : `Something failed here (${firstLine(error)}); load the page again.`;
      self.postMessage({ id, error: { message, pixels: error.pixels ?? null } });
    }
  });
};
