// onnxruntime-web: on the GPU by WebGPU, or on the CPU by WebAssembly with threads.
import { firstLine, isShortOfMemory, Refusal } from './refusal.js';

const MOST_THREADS = 8;

/** What runs here: 'webgpu' where the browser offers a GPU, else 'wasm'. */
export async function bestDevice() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter ? 'webgpu' : 'wasm';
}

export class Runtime {
  /** @param {'webgpu' | 'wasm'} device */
  static async start(device) {
    const runtime = new Runtime();
    // Two builds of the same thing; only the one in use is ever fetched.
    runtime.ort = await import(device === 'webgpu' ? './ort/ort.webgpu.min.mjs' : './ort/ort.wasm.min.mjs');
    runtime.device = device;
    // Threads need memory that workers share, which browsers give isolated pages only; see service-worker.js.
    runtime.threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, MOST_THREADS) : 1;
    runtime.ort.env.wasm.numThreads = runtime.threads;
    runtime.ort.env.logLevel = 'error';
    return runtime;
  }

  get called() {
    const threads = `${this.threads} thread${this.threads > 1 ? 's' : ''}`;
    return this.device === 'webgpu' ? 'WebGPU' : `WebAssembly, ${threads}`;
  }

  /** A graph, ready to run; `onCpu` for one that is not worth the way to the GPU. */
  async session(bytes, name, onCpu = false) {
    try {
      return await this.ort.InferenceSession.create(bytes, {
        executionProviders: [this.device === 'webgpu' && !onCpu ? 'webgpu' : 'wasm'],
        logSeverityLevel: 3,
      });
    } catch (error) {
      if (isShortOfMemory(error)) throw new Refusal(`There is not enough memory for ${name}; close other tabs, or choose int8 or a smaller model.`);
      throw new Refusal(`${name} cannot be run by onnxruntime-web ${this.ort.env.versions?.web ?? ''} (${firstLine(error)}); export the model again with 'spar export'.`);
    }
  }

  tensor(type, data, dims) {
    return new this.ort.Tensor(type, data, dims);
  }
}
