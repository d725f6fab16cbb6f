// A picture's file as upright 8-bit RGB over white, the browser's own decoder: `read_image` of image_io_spar.py.
import { firstLine, Refusal } from './refusal.js';

const UNREADABLE = 'is no picture that this browser can read, or it is damaged; save it as PNG or JPEG.';

/** @returns {Promise<{rgb: Uint8ClampedArray, height: number, width: number}>} */
export async function readPicture(file, limits) {
  const name = file.name ? `“${file.name}”` : 'The picture';
  if (file.size > limits.max_file_bytes)
    throw new Refusal(`${name} has ${(file.size / 1e6).toFixed(0)} MB; at most ${(limits.max_file_bytes / 1e6).toFixed(0)} MB are read. Shrink it.`);
  let bitmap;
  try {
    // No colour profile is applied, as Pillow applies none; the EXIF orientation is.
    bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none', imageOrientation: 'from-image' });
  } catch (error) {
    throw new Refusal(`${name} ${UNREADABLE}`);
  }
  const { width, height } = bitmap;
  if (width * height > limits.max_image_pixels || Math.max(width, height) > limits.max_image_ratio * Math.min(width, height))
    throw new Refusal(`${name} has ${height}x${width} pixels, more than is read. Shrink it or cut it into pieces.`);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  if (!context) throw new Refusal(`${name} has ${height}x${width} pixels, more than this browser draws. Shrink it.`);
  context.fillStyle = '#fff';
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  let data;
  try {
    ({ data } = context.getImageData(0, 0, width, height));
  } catch (error) {
    throw new Refusal(`${name} has ${height}x${width} pixels, more than this browser holds (${firstLine(error)}). Shrink it.`);
  }
  const rgb = new Uint8ClampedArray(3 * width * height);
  for (let from = 0, to = 0; to < rgb.length; from += 4, to += 3) {
    rgb[to] = data[from];
    rgb[to + 1] = data[from + 1];
    rgb[to + 2] = data[from + 2];
  }
  return { rgb, height, width };
}
