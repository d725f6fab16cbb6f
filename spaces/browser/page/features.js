// Patch features as pictures: principal components and similarity, `pca_picture` of visualize.py and `heat` of
// demo/payload.py.
import { coverage, enlarge } from './grid.js';

const BLOCK = 8, ROUNDS = 200;   // directions iterated together; their number over three makes it converge fast

/** Rows of length 1, in place of the rows of an (n, dim) matrix. */
export function unit(rows, dim) {
  const out = new Float32Array(rows.length);
  for (let start = 0; start < rows.length; start += dim) {
    let sum = 0;
    for (let i = start; i < start + dim; i++) sum += rows[i] * rows[i];
    const length = Math.max(Math.sqrt(sum), 1e-12);
    for (let i = start; i < start + dim; i++) out[i] = rows[i] / length;
  }
  return out;
}

const dot = (a, b) => { let sum = 0; for (let i = 0; i < a.length; i++) sum += a[i] * b[i]; return sum; };

function orthonormal(vectors) {
  vectors.forEach((vector, index) => {
    for (let again = 0; again < 2; again++)
      for (const other of vectors.slice(0, index)) {
        const part = dot(vector, other);
        for (let i = 0; i < vector.length; i++) vector[i] -= part * other[i];
      }
    const length = Math.sqrt(dot(vector, vector));
    for (let i = 0; i < vector.length; i++) vector[i] = length > 1e-300 ? vector[i] / length : 0;
  });
  return vectors;
}

/** Eigenvectors of a small symmetric matrix (rows of arrays), by rotations of Jacobi, largest eigenvalue first. */
function eigenvectors(matrix) {
  const n = matrix.length, a = matrix.map((row) => [...row]);
  const v = a.map((_, i) => a.map((_, j) => (i === j ? 1 : 0)));
  for (let sweep = 0; sweep < 30; sweep++)
    for (let p = 0; p < n; p++)
      for (let q = p + 1; q < n; q++) {
        if (Math.abs(a[p][q]) < 1e-300) continue;
        const angle = 0.5 * Math.atan2(2 * a[p][q], a[p][p] - a[q][q]), c = Math.cos(angle), s = Math.sin(angle);
        for (let k = 0; k < n; k++) [a[k][p], a[k][q]] = [c * a[k][p] + s * a[k][q], c * a[k][q] - s * a[k][p]];
        for (let k = 0; k < n; k++) [a[p][k], a[q][k]] = [c * a[p][k] + s * a[q][k], c * a[q][k] - s * a[p][k]];
        for (let k = 0; k < n; k++) [v[k][p], v[k][q]] = [c * v[k][p] + s * v[k][q], c * v[k][q] - s * v[k][p]];
      }
  const order = a.map((_, i) => i).sort((i, j) => a[j][j] - a[i][i]);
  return order.map((j) => v.map((row) => row[j]));
}

/** The first directions of a symmetric positive matrix (dim x dim), by subspace iteration. */
function mainDirections(matrix, dim, count) {
  const size = Math.min(dim, BLOCK);
  const times = (vector) => Float64Array.from({ length: dim }, (_, i) => dot(matrix.subarray(i * dim, (i + 1) * dim), vector));
  let seed = 1;
  const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647 - 0.5;
  let basis = orthonormal(Array.from({ length: size }, () => Float64Array.from({ length: dim }, random)));
  for (let round = 0; round < ROUNDS; round++) {
    const next = basis.map(times);
    const small = basis.map((left) => next.map((right) => dot(left, right)));
    const turned = eigenvectors(small).map((weights) => {
      const sum = new Float64Array(dim);
      weights.forEach((weight, k) => { for (let i = 0; i < dim; i++) sum[i] += weight * next[k][i]; });
      return sum;
    });
    orthonormal(turned);
    const moved = Math.max(...turned.slice(0, count).map((vector, k) => 1 - Math.abs(dot(vector, basis[k]))));
    basis = turned;
    if (moved < 1e-13) break;
  }
  return basis.slice(0, count);
}

function quantile(sorted, share) {
  const at = share * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}

/**
 * The first three principal components as red, green and blue, at a size.
 * @param {Float32Array} features rows x columns x dim, each patch of length 1
 * @returns {Uint8ClampedArray} RGBA
 */
export function pcaPicture(features, grid, dim, size, covered) {
  const n = grid[0] * grid[1], mean = new Float64Array(dim);
  for (let i = 0; i < features.length; i++) mean[i % dim] += features[i] / n;
  const centred = Float64Array.from(features, (value, i) => value - mean[i % dim]);
  const matrix = new Float64Array(dim * dim);
  for (let p = 0; p < n; p++) {
    const row = centred.subarray(p * dim, (p + 1) * dim);
    for (let i = 0; i < dim; i++) for (let j = 0, value = row[i]; j <= i; j++) matrix[i * dim + j] += value * row[j];
  }
  for (let i = 0; i < dim; i++) for (let j = i + 1; j < dim; j++) matrix[i * dim + j] = matrix[j * dim + i];
  const colours = new Float32Array(3 * n).fill(0.5);
  mainDirections(matrix, dim, Math.min(3, dim)).forEach((direction, c) => {
    let strongest = 0;
    direction.forEach((value, i) => { if (Math.abs(value) > Math.abs(direction[strongest])) strongest = i; });
    const sign = Math.sign(direction[strongest]) || 1;
    const parts = Float64Array.from({ length: n }, (_, p) => sign * dot(centred.subarray(p * dim, (p + 1) * dim), direction));
    const sorted = parts.slice().sort(), low = quantile(sorted, 0.01), high = quantile(sorted, 0.99);
    if (high - low >= 1e-6) parts.forEach((part, p) => { colours[3 * p + c] = Math.min(1, Math.max(0, (part - low) / (high - low))); });
  });
  const large = enlarge(colours, grid, size, covered, 3), out = new Uint8ClampedArray(4 * size[0] * size[1]);
  for (let i = 0; i < size[0] * size[1]; i++) {
    for (let c = 0; c < 3; c++) out[4 * i + c] = 255 * large[3 * i + c];   // a clamped array rounds
    out[4 * i + 3] = 255;
  }
  return out;
}

/** Cosines of all patches with the one at a place (x and y, 0 to 1), at a size. */
export function similarity(features, grid, dim, size, covered, { x, y }) {
  const row = Math.min(Math.floor(y * covered[0] * grid[0]), grid[0] - 1);
  const column = Math.min(Math.floor(x * covered[1] * grid[1]), grid[1] - 1);
  const at = (row * grid[1] + column) * dim, chosen = features.subarray(at, at + dim);
  const cosines = new Float32Array(grid[0] * grid[1]);
  for (let p = 0; p < cosines.length; p++) cosines[p] = dot(features.subarray(p * dim, (p + 1) * dim), chosen);
  return enlarge(cosines, grid, size, covered);
}

/** The picture in grey, warm where the cosine is high. */
export function heatPicture(shown, cosines, stops) {
  let low = Infinity, high = -Infinity;
  for (const value of cosines) { if (value < low) low = value; if (value > high) high = value; }
  const out = new Uint8ClampedArray(shown.length);
  for (let i = 0, p = 0; i < cosines.length; i++, p += 4) {
    const position = high > low ? ((cosines[i] - low) / (high - low)) * (stops.length - 1) : 0;
    const index = Math.min(Math.floor(position), stops.length - 2), rest = position - index;
    const grey = 0.299 * shown[p] + 0.587 * shown[p + 1] + 0.114 * shown[p + 2];
    for (let c = 0; c < 3; c++) out[p + c] = Math.floor(0.4 * grey + 0.6 * ((1 - rest) * stops[index][c] + rest * stops[index + 1][c]));
    out[p + 3] = 255;
  }
  return { pixels: out, low, high };
}

/** Coverage of both axes of the pixels that the network saw. */
export const coverageOf = (image, record) => image.map((side) => coverage(side, record.patch_px, record.size_rule));
