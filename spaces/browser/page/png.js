// A label map as PNG, its pixel values the class ids: `label_map_image` of src/spar_hf/visualize.py.

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});

function chunk(type, data) {
  const out = new Uint8Array(12 + data.length), view = new DataView(out.buffer);
  view.setUint32(0, data.length);
  for (let i = 0; i < 4; i++) out[4 + i] = type.charCodeAt(i);
  out.set(data, 8);
  let crc = 0xffffffff;
  for (let i = 4; i < 8 + data.length; i++) crc = TABLE[(crc ^ out[i]) & 255] ^ (crc >>> 8);
  view.setUint32(8 + data.length, ~crc >>> 0);
  return out;
}

const zlib = async (bytes) =>
  new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(new CompressionStream('deflate'))).arrayBuffer());

/**
 * @param {Int16Array} ids height x width, -1 for no class, which becomes the highest value
 * @param {number[][]} colours of the classes, for the palette
 * @returns {Promise<Blob>} 8 bits with a palette for ids up to 254, else 16-bit grey
 */
export async function labelMapPng(ids, height, width, colours) {
  let highest = 0;
  for (const id of ids) if (id > highest) highest = id;
  const deep = highest > 254, bytes = deep ? 2 : 1, stride = 1 + bytes * width;
  const rows = new Uint8Array(stride * height);   // each row begins with its filter, 0: none
  for (let y = 0, i = 0; y < height; y++)
    for (let x = 0, to = y * stride + 1; x < width; x++, i++) {
      if (deep) rows[to++] = (ids[i] & 0xffff) >> 8;
      rows[to++] = ids[i] & 255;
    }
  const header = new Uint8Array(13), view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header.set([8 * bytes, deep ? 0 : 3, 0, 0, 0], 8);
  const palette = new Uint8Array(768);
  colours.slice(0, 255).forEach((colour, id) => palette.set(colour, 3 * id));
  return new Blob(
    [
      Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10),
      chunk('IHDR', header),
      ...(deep ? [] : [chunk('PLTE', palette)]),
      chunk('IDAT', await zlib(rows)),
      chunk('IEND', new Uint8Array()),
    ],
    { type: 'image/png' },
  );
}
