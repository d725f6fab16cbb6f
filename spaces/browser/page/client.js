// The page's side of the worker: a call is a promise, with progress on the way; cancelling ends the worker.

export class Client {
  /** @param {(text: string, share?: number) => void} progress @param {(text: string) => void} note */
  constructor(progress, note) {
    Object.assign(this, { progress, note, calls: new Map(), next: 0 });
  }

  start() {
    this.worker = new Worker(new URL('worker.js', import.meta.url), { type: 'module' });
    this.worker.onerror = (event) => this.fail(`The worker failed (${event.message || 'it did not start'}); load the page again.`);
    this.worker.onmessage = ({ data: { id, result, error, text, share, note } }) => {
      if (note) return this.note(note);
      if (text) return this.progress(text, share);
      const call = this.calls.get(id);
      this.calls.delete(id);
      if (error) call?.failed(Object.assign(new Error(error.message), { pixels: error.pixels }));
      else call?.done(result);
    };
  }

  call(kind, request) {
    if (!this.worker) this.start();
    const id = ++this.next;
    return new Promise((done, failed) => {
      this.calls.set(id, { done, failed });
      this.worker.postMessage({ id, kind, ...request });
    });
  }

  fail(message) {
    for (const { failed } of this.calls.values()) failed(new Error(message));
    this.calls.clear();
  }

  /** Ends whatever runs; its calls fail with null, which is no error. The model has to be loaded again. */
  cancel() {
    this.worker?.terminate();
    this.worker = null;
    for (const { failed } of this.calls.values()) failed(null);
    this.calls.clear();
  }
}
