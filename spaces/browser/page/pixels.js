// From an upright RGB picture to what the network reads: `InputPixels` of src/spar_hf/input_pixels_spar.py.
import { Refusal } from './refusal.js';
import { resize } from './resample.js';

const wanted = (size, height, width) => {
  if (!size) return [height, width];
  const [[rule, value]] = Object.entries(size);
  if (rule === 'max_pixels') {
    const scale = Math.min(1, Math.sqrt(value / (height * width)));
    return [Math.max(1, Math.floor(height * scale)), Math.max(1, Math.floor(width * scale))];
  }
  const ruling = (rule === 'shortest_edge' ? Math.min : Math.max)(height, width);
  // The ruling side is exact and the other rounded down, as in CLIP's processor.
  return [Math.max(1, Math.floor((value * height) / ruling)), Math.max(1, Math.floor((value * width) / ruling))];
};

/**
 * Height and width for the network: what the processor says, and no more than `maxPixels`.
 * @param {object} processor `image_processor` of processor_config.json
 */
export function inputSize(processor, height, width, maxPixels) {
  const least = ([h, w]) => [Math.max(h, processor.min_side_px), Math.max(w, processor.min_side_px)];
  const own = least(processor.do_resize ? wanted(processor.size, height, width) : [height, width]);
  return own[0] * own[1] > maxPixels ? least(wanted({ max_pixels: maxPixels }, height, width)) : own;
}

/**
 * Normalised values as the network reads them, one channel after the other.
 * @param {{rgb: Uint8ClampedArray, height: number, width: number}} picture
 * @returns {{values: Float32Array, height: number, width: number}}
 */
export function inputValues(processor, picture, maxPixels) {
  const [height, width] = inputSize(processor, picture.height, picture.width, maxPixels);
  if (height * width > processor.max_input_pixels)
    throw new Refusal(
      `The picture would be ${height}x${width} pixels for the model; at most ${processor.max_input_pixels} are allowed. Choose a smaller size.`,
      height * width,
    );
  const pixels = resize(picture.rgb, [picture.height, picture.width], [height, width], processor.resample);
  const area = height * width, values = new Float32Array(3 * area), f = Math.fround;
  for (let c = 0; c < 3; c++) {
    const mean = f(processor.image_mean[c]), std = f(processor.image_std[c]);
    // In 32 bits after every step, as NumPy does it.
    const table = Float32Array.from({ length: 256 }, (_, value) => f(f(f(value) / f(255)) - mean) / std);
    for (let i = 0; i < area; i++) values[c * area + i] = table[pixels[3 * i + c]];
  }
  return { values, height, width };
}
