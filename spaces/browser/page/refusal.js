// What a visitor is told: one line that names the input, the rule and the remedy.
export class Refusal extends Error {
  constructor(message, pixels = null) {
    super(message);
    this.pixels = pixels;   // that were too many for the network: the page offers a smaller size
  }
}

// What WebAssembly, the browser and onnxruntime say when memory runs out, or would be over the 4 GB that 32 bits name.
// Their errors have no class of their own.
const SHORT = /out of memory|bad_alloc|failed to allocate|allocation failed|could not allocate|memory access out of|array buffer alloc|cannot enlarge memory|buffer size .* exceeds|invalid typed array length|safeintonoverflow|device .*lost/i;

export const isShortOfMemory = (error) => SHORT.test(String(error?.message ?? error));

export const firstLine = (error) => String(error?.message ?? error).split('\n')[0].slice(0, 200);
