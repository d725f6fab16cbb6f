// Keeps the page for offline use, and adds the headers that let it have threads. The build writes BUILD above:
// {version, files, first}: all files of the page, and those that are fetched at once.
const ISOLATED = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Cross-Origin-Resource-Policy': 'cross-origin',
};
const STORE = `spar-page-${BUILD.version}`;
const FILES = new Set(BUILD.files.map((name) => new URL(name, self.registration.scope).href));

async function isolated(response) {
  if (response.type === 'opaque' || response.status === 0) return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATED)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

async function answer(request) {
  const url = new URL(request.url);
  url.search = url.hash = '';
  const name = url.href === self.registration.scope ? new URL('index.html', url).href : url.href;
  if (!FILES.has(name)) return isolated(await fetch(request));
  const store = await caches.open(STORE);
  const kept = await store.match(name);
  if (kept) return isolated(kept);
  const response = await fetch(name, { cache: 'no-cache' });
  if (response.ok) await store.put(name, response.clone());   // the runtime's other build, say: when it is first used
  return isolated(response);
}

self.addEventListener('install', (event) => {
  const urls = BUILD.first.map((name) => new Request(new URL(name, self.registration.scope), { cache: 'no-cache' }));
  event.waitUntil(caches.open(STORE).then((store) => store.addAll(urls)).then(() => self.skipWaiting()));
});

self.addEventListener('activate', (event) => {
  event.waitUntil((async () => {
    for (const name of await caches.keys()) if (name.startsWith('spar-page-') && name !== STORE) await caches.delete(name);
    await self.clients.claim();
  })());
});

self.addEventListener('fetch', (event) => {
  const here = new URL(event.request.url).origin === location.origin;
  if (event.request.method === 'GET' && here) event.respondWith(answer(event.request));
});
