// The service worker's side of the page: it keeps the page for offline use, and isolates it, which threads need.

const controlled = () => new Promise((done) => {
  if (navigator.serviceWorker.controller) done();
  else navigator.serviceWorker.addEventListener('controllerchange', done, { once: true });
});

export const offline = {
  says: 'needs the network',

  /** Whether to go on: false where the page is loaded anew, now with the headers that isolate it. */
  async start() {
    if (!navigator.serviceWorker) return true;
    try {
      await navigator.serviceWorker.register('service-worker.js');
      await controlled();
      this.says = 'works offline';
    } catch (error) {
      this.says = `needs the network (${error.name}: no service worker here)`;
      return true;
    }
    if (crossOriginIsolated || sessionStorage.getItem('isolated')) return true;
    sessionStorage.setItem('isolated', 'tried');   // once: in another site's frame no header helps
    location.reload();
    return false;
  },
};
