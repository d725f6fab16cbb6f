// A result of the worker as the viewers' values (as demo/payload.py makes them) and as files to keep.
import constants from './constants.js';
import { labelMapPng } from './png.js';

const NO_CLASS = 65535;   // of a pixel in the viewer
const percent = (fraction) => (fraction > 0 && fraction < 0.0005 ? '< 0.1 %' : `${(100 * fraction).toFixed(1)} %`);
const milliseconds = (ms) => (ms >= 10_000 ? `${(ms / 1000).toFixed(1)} s` : `${ms.toFixed(0)} ms`);
const colour = (id) => constants.palette[id % constants.palette.length];

function canvasOf([height, width], rgba) {
  const canvas = document.createElement('canvas');
  Object.assign(canvas, { width, height });
  canvas.getContext('2d').putImageData(new ImageData(new Uint8ClampedArray(rgba), width, height), 0, 0);
  return canvas;
}

const asBlob = (canvas) => new Promise((done) => canvas.toBlob(done, 'image/png'));

let addresses = [];   // of the pictures that are shown; those before them are let go
const address = async (canvas) => URL.createObjectURL(await asBlob(canvas));
const renew = (fresh) => { setTimeout((old) => old.forEach(URL.revokeObjectURL), 5000, addresses); addresses = fresh; };

/** The value of page/viewer.js. */
export async function segmentValue(found, model, key) {
  const { size, small, rgba, areas, classes, grid, ms } = found;
  const ids = new Uint8ClampedArray(4 * small.length).fill(255);
  small.forEach((id, i) => { const shown = id < 0 ? NO_CLASS : id; ids.set([shown & 255, shown >> 8, 0], 4 * i); });
  const image = await address(canvasOf(size, rgba)), labels = await address(canvasOf(size, ids));
  renew([image, labels]);
  const entries = areas.map(({ id, fraction }) => ({
    id: id < 0 ? NO_CLASS : id,
    label: id < 0 ? 'no class' : classes[id][0],
    names: id < 0 ? 'no word names these pixels well enough' : classes[id].join(', '),
    colour: id < 0 ? null : colour(id),
    area: percent(fraction),
    fraction,
  }));
  const title = `${model.called}, one pass`, note = `${grid[1]} × ${grid[0]} patches · ${milliseconds(ms)}`;
  const description = `${title}: ${entries.slice(0, 8).map((entry) => `${entry.label} ${entry.area}`).join(', ')}`;
  return { key, image, panels: [{ title, note, labels, description }], classes: entries, bars: true };
}

/** The value of page/features.js. */
export async function featureValue(found, model, place) {
  const [height, width] = found.size;
  const pictures = [];
  for (const [title, rgba] of [['Principal components of the features', found.pca], ['Similarity to the chosen patch', found.heat]])
    pictures.push({ title, source: await address(canvasOf(found.size, rgba)), width, height });
  renew(pictures.map((picture) => picture.source));
  const [rows, columns] = found.grid;
  const note = `${columns} × ${rows} patches of ${found.dim} numbers, from ${model.called} in one pass. Cosine: ${found.low.toFixed(2)} to ${found.high.toFixed(2)}.`;
  return { pictures, place: [place.x, place.y], grid: found.grid, note };
}

// --- files -----------------------------------------------------------------------------------------------------

const tinted = ({ small, rgba }, opacity) => {
  const out = new Uint8ClampedArray(rgba);
  small.forEach((id, i) => {
    if (id >= 0) for (let c = 0; c < 3; c++) out[4 * i + c] = (1 - opacity) * rgba[4 * i + c] + opacity * colour(id)[c];
  });
  return out;
};

const cut = (context, text, width) => {
  if (context.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 0 && context.measureText(`${text.slice(0, end)}…`).width > width) end--;
  return `${text.slice(0, end)}…`;
};

/** The tinted picture, and a legend under it. */
export function overlayPng(found, opacity = 0.6) {
  const [height, width] = found.size, picture = canvasOf(found.size, tinted(found, opacity));
  const text = Math.min(26, Math.max(14, Math.round(Math.sqrt(width * height) / 44))), line = Math.round(1.6 * text);
  const columns = Math.max(1, Math.min(4, found.areas.length, Math.floor(width / (14 * text))));
  const lines = Math.ceil(found.areas.length / columns), canvas = document.createElement('canvas');
  Object.assign(canvas, { width, height: height + lines * line + 2 * text });
  const context = canvas.getContext('2d'), column = (width - text) / columns;
  context.fillStyle = '#fff';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0);
  Object.assign(context, { font: `${text}px system-ui, sans-serif`, textBaseline: 'middle' });
  found.areas.forEach(({ id, fraction }, k) => {
    const left = text + column * Math.floor(k / lines), middle = height + text + line * ((k % lines) + 0.5);
    if (id >= 0) {
      context.fillStyle = `rgb(${colour(id).join(' ')})`;
      context.fillRect(left, middle - 0.55 * text, 1.1 * text, 1.1 * text);
      context.strokeStyle = '#8c8c8c';
      context.strokeRect(left, middle - 0.55 * text, 1.1 * text, 1.1 * text);
    }
    context.fillStyle = '#202124';
    const share = percent(fraction), room = column - 4 * text - context.measureText(share).width;
    context.fillText(cut(context, id < 0 ? 'no class' : found.classes[id][0], room), left + 2 * text, middle);
    context.fillText(share, left + column - 1.5 * text - context.measureText(share).width, middle);
  });
  return asBlob(canvas);
}

export const mapPng = (found) => labelMapPng(found.ids, ...found.whole, constants.palette);

/** The classes with their areas, and what they were made with; the fields of the other page's file. */
export function classesJson(found, model, threshold) {
  const area = new Map(found.areas.map(({ id, fraction }) => [id, fraction]));
  const facts = {
    model: model.called,
    method: model.method,
    dtype: model.dtype,
    background_threshold: threshold || null,
    size_hw: found.whole,
    input_hw: found.image,
    grid_hw: found.grid,
    encode_ms: Math.round(10 * found.ms) / 10,
    classes: found.classes.map((names, id) => ({ id, label: names[0], names, area_fraction: area.get(id) ?? 0 })),
    no_class: area.get(-1) ?? 0,
  };
  return new Blob([`${JSON.stringify(facts, null, 2)}\n`], { type: 'application/json' });
}

export function save(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(URL.revokeObjectURL, 10_000, link.href);
}
