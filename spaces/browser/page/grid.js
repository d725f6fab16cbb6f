// Where a grid of patches lies over a picture: `grid_spar.py`.

/** The pixels of an axis that the grid covers, over those of the picture. */
export function coverage(pixels, patch, rule) {
  const extent = { floor: Math.floor(pixels / patch) * patch, pad: Math.ceil(pixels / patch) * patch, stretch: pixels }[rule];
  return pixels / extent;
}

function positions(size, grid, covered) {
  return Array.from({ length: size }, (_, i) => {
    const at = Math.min(grid - 1, Math.max(0, ((i + 0.5) / size) * covered * grid - 0.5));
    const before = Math.floor(at);
    return { before, after: Math.min(before + 1, grid - 1), weight: at - before };
  });
}

/**
 * Values on a grid at the pixels of a picture, bilinear.
 * @param {Float32Array} values rows x columns x channels
 * @param {[number, number]} grid rows and columns
 * @param {[number, number]} size height and width wanted
 * @param {[number, number]} covered see `coverage`, per axis
 */
export function enlarge(values, grid, size, covered, channels = 1) {
  const down = positions(size[0], grid[0], covered[0]), across = positions(size[1], grid[1], covered[1]);
  const out = new Float32Array(size[0] * size[1] * channels);
  let to = 0;
  for (const y of down)
    for (const x of across)
      for (let c = 0; c < channels; c++) {
        const value = (row, column) => values[(row * grid[1] + column) * channels + c];
        const above = value(y.before, x.before) * (1 - x.weight) + value(y.before, x.after) * x.weight;
        const below = value(y.after, x.before) * (1 - x.weight) + value(y.after, x.after) * x.weight;
        out[to++] = above * (1 - y.weight) + below * y.weight;
      }
  return out;
}
