// Keeps the page for when there is no network. The model's files are kept by files.js, once their hash is right.

const SHELL = "page";

self.addEventListener("install", (event) => {
  event.waitUntil(keep().then(() => self.skipWaiting()));
});
self.addEventListener("activate", (event) => {
  event.waitUntil(self.clients.claim());
});

async function keep() {
  const [store, listed] = await Promise.all([caches.open(SHELL), fetch("files.json")]);
  // Not the runtimes for other browsers: what this one takes comes along as it is loaded.
  const wanted = (await listed.json()).filter((path) => !path.startsWith("wasm/") && !path.startsWith("model/"));
  await store.addAll(["./", ...wanted]);
}

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== self.location.origin || url.searchParams.has("sha256")) return;
  event.respondWith(answer(request));
});

// What the network has comes first: a page that was put up anew shows at once.
async function answer(request) {
  const store = await caches.open(SHELL);
  try {
    const response = await fetch(request);
    // A browser without room for it answers all the same.
    if (response.ok) await store.put(request, response.clone()).catch(() => {});
    return response;
  } catch (error) {
    const held = await store.match(request, { ignoreSearch: true });
    if (held) return held;
    throw error;
  }
}
