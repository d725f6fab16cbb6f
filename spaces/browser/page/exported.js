// A folder of `spar export`, by address or from disk: its record read and checked, its files verified and kept.
import constants from './constants.js';
import { firstLine, Refusal } from './refusal.js';

const AGAIN = "export the model again with 'spar export'";
const KEPT = 'spar-models';   // the browser's store of files that came from addresses
const SUFFIXES = { float32: '', float16: '_fp16', int8: '_int8' };
const NEEDED = ['patch_px', 'size_rule', 'text', 'files', 'dtypes'];

const digestOf = async (bytes) =>
  [...new Uint8Array(await crypto.subtle.digest('SHA-256', bytes))].slice(0, 8).map((b) => b.toString(16).padStart(2, '0')).join('');

/** Bytes of a response, telling `progress` how many of how many have come. */
async function received(response, progress) {
  const encoded = response.headers.get('Content-Encoding');
  const total = encoded ? 0 : Number(response.headers.get('Content-Length')) || 0;
  const parts = [], reader = response.body.getReader();
  let done = 0;
  for (let next = await reader.read(); !next.done; next = await reader.read()) {
    parts.push(next.value);
    done += next.value.length;
    progress?.(done, total);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** Files under an address. Graphs are fetched once and kept; small files are asked for anew and kept for offline use. */
class Address {
  constructor(base) {
    // The page of a model on the Hub, to where its files are.
    const hub = /^https:\/\/huggingface\.co\/[^/?#]+\/[^/?#]+\/?$/.test(base);
    this.base = `${base.replace(/\/$/, '')}${hub ? '/resolve/main' : ''}/`;
    this.called = decodeURIComponent((hub ? base.replace(/\/$/, '') : this.base.replace(/(\/resolve\/[^/]+)?\/$/, '')).split('/').pop());
  }

  async read(name, digest, progress) {
    const address = new URL(name, this.base).href, store = await caches.open(KEPT);
    const kept = await (await store.match(address))?.arrayBuffer();
    if (kept && digest && (await digestOf(kept)) === digest) return new Uint8Array(kept);
    let response, bytes;
    try {
      response = await fetch(address, { cache: 'no-cache' });
      if (response.ok) bytes = await received(response, progress);
    } catch (error) {
      if (kept && !digest) return new Uint8Array(kept);   // offline
      throw new Refusal(`${address} cannot be reached; check the address and the network. Its server must let other pages read it (CORS).`);
    }
    if (!response.ok) throw new Refusal(`${address} is missing (the server says ${response.status}); check the address, or ${AGAIN}.`);
    if (digest && (await digestOf(bytes)) !== digest) throw corrupt(address);
    await store.put(address, new Response(bytes)).catch(() => self.postMessage({ note: 'the browser has no room to keep the model, so it is fetched again next time' }));
    return bytes;
  }
}

/** Files of a folder that the visitor chose; each path begins with the folder's name. */
class Disk {
  constructor(files) {
    this.called = (files[0]?.webkitRelativePath || 'folder').split('/')[0];
    this.files = new Map([...files].map((file) => [file.webkitRelativePath.split('/').slice(1).join('/') || file.name, file]));
  }

  async read(name, digest) {
    const file = this.files.get(name);
    if (!file) throw new Refusal(`${this.called}/${name} is missing; ${name === 'export.json' ? "choose a folder of 'spar export --format onnx'" : AGAIN}.`);
    const bytes = new Uint8Array(await file.arrayBuffer());
    if (digest && (await digestOf(bytes)) !== digest) throw corrupt(`${this.called}/${name}`);
    return bytes;
  }
}

const corrupt = (name) => new Refusal(`${name} is corrupt or of another export: its check sum differs; ${AGAIN}.`);

async function json(source, name) {
  const bytes = await source.read(name);
  try {
    const content = JSON.parse(new TextDecoder().decode(bytes));
    if (content && typeof content === 'object' && !Array.isArray(content)) return content;
  } catch (error) {
    throw new Refusal(`${source.called}/${name} cannot be read (${firstLine(error)}); ${AGAIN}.`);
  }
  throw new Refusal(`${source.called}/${name} holds no JSON object; ${AGAIN}.`);
}

export class Exported {
  /** @param {{address: string} | {files: File[]}} from */
  static async open(from) {
    const source = from.files ? new Disk(from.files) : new Address(from.address);
    const record = await json(source, 'export.json');
    if (record.layout !== constants.layout)
      throw new Refusal(
        `${source.called} was exported by spar-hf ${String(record.spar_hf).slice(0, 40)} in layout ${String(record.layout).slice(0, 40)}, and this page reads layout ${constants.layout}; ${AGAIN}, or open the page of that version.`,
      );
    if (record.format !== 'onnx')
      throw new Refusal(`${source.called} holds programs of ${String(record.format).slice(0, 40)}, which PyTorch runs; give a folder of 'spar export --format onnx'.`);
    const lacking = NEEDED.filter((key) => !(key in record));
    if (lacking.length) throw new Refusal(`${source.called}/export.json lacks ${lacking.join(', ')}; ${AGAIN}.`);
    const exported = new Exported();
    Object.assign(exported, { source, record, called: source.called });
    const stored = await json(source, 'processor_config.json');
    exported.templates = stored.templates ?? constants.templates;
    exported.image = stored.image_processor ?? {};
    const fields = ['do_resize', 'resample', 'image_mean', 'image_std', 'min_side_px', 'max_input_pixels', 'max_image_pixels', 'max_image_ratio', 'max_file_bytes'];
    const absent = fields.filter((field) => exported.image[field] === undefined);
    if (absent.length) throw new Refusal(`${source.called}/processor_config.json lacks ${absent.join(', ')}; ${AGAIN}.`);
    exported.tokenizer = await json(source, 'tokenizer.json');
    exported.tokenizerConfig = await json(source, 'tokenizer_config.json');
    return exported;
  }

  /** The arithmetics that it holds graphs of. */
  get dtypes() {
    return Object.keys(SUFFIXES).filter((dtype) => dtype in this.record.dtypes);
  }

  /** The file of a graph: vision_model, text_model or label_map, the last of which is in fp32 always. */
  file(name, dtype) {
    return `onnx/${name}${name === 'label_map' ? '' : SUFFIXES[dtype]}.onnx`;
  }

  /** Bytes of a graph. */
  graph(name, dtype, progress) {
    const file = this.file(name, dtype), digest = this.record.files[file];
    if (!digest) throw new Refusal(`${this.called} has no ${file}; ${AGAIN}.`);
    return this.source.read(file, digest, progress);
  }
}
