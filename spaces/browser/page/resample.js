// Pillow's Image.resize of 8-bit RGB: a filter stretched over what it shrinks, rows first and then columns, weights in
// fixed point of 22 bits, and 8 bits in between. tests/test_static_page.py compares it with Pillow, bit by bit.

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const A = -0.5;   // of Keys' cubic
const cubic = (x) => (x < 1 ? ((A + 2) * x - (A + 3)) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * A : 0);

// By Pillow's number of the filter: reach in pixels, and weight at a distance of 0 or more.
const FILTERS = {
  1: [3, (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0)],                       // Lanczos
  2: [1, (x) => (x < 1 ? 1 - x : 0)],                                       // bilinear
  3: [2, cubic],                                                            // bicubic
  4: [0.5, (x, side) => ((side < 0 ? x < 0.5 : x <= 0.5) ? 1 : 0)],         // box: open at the left, closed at the right
  5: [1, (x) => (x < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)],   // Hamming
};
const BITS = 22;

// For each pixel of an axis of `to` pixels: the first pixel of `from` that it reads, and the weights from there on.
function taps(from, to, [reach, weight]) {
  const scale = from / to, stretch = Math.max(scale, 1);
  const found = [];
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach * stretch + 0.5));
    const end = Math.min(from, Math.trunc(centre + reach * stretch + 0.5));
    const weights = [];
    let sum = 0;
    for (let j = first; j < end; j++) {
      const x = (j - centre + 0.5) * (1 / stretch);
      weights.push(weight(Math.abs(x), Math.sign(x)));
      sum += weights[weights.length - 1];
    }
    const fixed = weights.map((w) => { const scaled = (w / sum) * 2 ** BITS; return Math.trunc(scaled + (scaled < 0 ? -0.5 : 0.5)); });
    found.push({ first, weights: Int32Array.from(fixed) });
  }
  return found;
}

// One axis: `lines` lines of pixels that lie `step` apart, each line `stride` after the one before.
function along(source, target, axis, lines, sourceStep, sourceStride, targetStep, targetStride) {
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < axis.length; i++) {
      const { first, weights } = axis[i];
      let red = 1 << (BITS - 1), green = red, blue = red;
      let at = line * sourceStride + first * sourceStep;
      for (let k = 0; k < weights.length; k++, at += sourceStep) {
        red += source[at] * weights[k];
        green += source[at + 1] * weights[k];
        blue += source[at + 2] * weights[k];
      }
      const to = line * targetStride + i * targetStep;
      target[to] = red >> BITS;                 // a clamped array: below 0 is 0, above 255 is 255
      target[to + 1] = green >> BITS;
      target[to + 2] = blue >> BITS;
    }
  }
}

function nearest(rgb, [height, width], [toHeight, toWidth]) {
  const out = new Uint8ClampedArray(3 * toHeight * toWidth);
  for (let y = 0, to = 0; y < toHeight; y++) {
    const row = Math.floor(((y + 0.5) * height) / toHeight);
    for (let x = 0; x < toWidth; x++, to += 3) {
      const from = 3 * (row * width + Math.floor(((x + 0.5) * width) / toWidth));
      for (let c = 0; c < 3; c++) out[to + c] = rgb[from + c];
    }
  }
  return out;
}

/**
 * RGB at another size.
 * @param {Uint8ClampedArray} rgb height x width x 3
 * @param {[number, number]} from height and width
 * @param {[number, number]} to height and width wanted
 * @param {number} resample Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming
 */
export function resize(rgb, from, to, resample) {
  if (from[0] === to[0] && from[1] === to[1]) return rgb;
  if (resample === 0) return nearest(rgb, from, to);
  const filter = FILTERS[resample];
  if (!filter) throw new Error(`there is no filter ${resample}; Pillow's are 0 to 5`);
  let [height, width] = from, pixels = rgb;
  if (to[1] !== width) {
    const out = new Uint8ClampedArray(3 * height * to[1]);
    along(pixels, out, taps(width, to[1], filter), height, 3, 3 * width, 3, 3 * to[1]);
    [pixels, width] = [out, to[1]];
  }
  if (to[0] !== height) {
    const out = new Uint8ClampedArray(3 * to[0] * width);
    along(pixels, out, taps(height, to[0], filter), width, 3 * width, 3, 3 * width, 3);
    pixels = out;
  }
  return pixels;
}
