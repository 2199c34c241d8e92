// The model's files: fetched with progress, held against their sha256, and kept for the next time.

const STORE = "model-files";

/**
 * The bytes of a file, from what the browser keeps or from where the page is.
 * @param {{path: string, size: number, sha256: string}} file
 * @param {(bytes: number) => void} advance told of every piece that has come.
 * @returns {Promise<Uint8Array>}
 */
export async function bytesOf(file, advance) {
  const url = `${file.path}?sha256=${file.sha256}`;
  const store = await caches.open(STORE).catch(() => null);
  const held = await store?.match(url);
  if (held) {
    const bytes = new Uint8Array(await held.arrayBuffer());
    if ((await sha256(bytes)) === file.sha256) {
      advance(bytes.length);
      return bytes;
    }
    await store.delete(url);
  }
  const bytes = await download(url, file, advance);
  const found = await sha256(bytes);
  if (found !== file.sha256) {
    throw new Error(
      `${file.path} is not the file that was judged: its sha256 begins with ${found.slice(0, 12)}, not with ` +
        `${file.sha256.slice(0, 12)}. Load again; if it stays so, the file was changed where this page is kept.`,
    );
  }
  // A browser without room for it loads it again the next time.
  await store?.put(url, new Response(bytes)).catch(() => {});
  return bytes;
}

async function download(url, file, advance) {
  const bytes = new Uint8Array(file.size);
  let place = 0;
  try {
    // Not from the browser's own cache: what was damaged would come from there again.
    const response = await fetch(url, { cache: "no-store" });
    if (!response.ok) throw new Error(`the answer was ${response.status}`);
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (place + value.length > file.size) throw new Error("more came than was said");
      bytes.set(value, place);
      place += value.length;
      advance(value.length);
    }
    if (place < file.size) throw new Error("it ended early");
  } catch (error) {
    throw new Error(
      `The download of ${file.path} broke off after ${megabytes(place)} of ${megabytes(file.size)} ` +
        `(${error.message}). Look at the connection and load again.`,
    );
  }
  return bytes;
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A size for people. */
export function megabytes(bytes) {
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}
