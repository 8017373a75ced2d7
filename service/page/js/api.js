// Calls to the service. Every failure becomes a Problem with a sentence a person can act on.

export class Problem extends Error {
  constructor(message, requestId = null, status = null) {
    super(message);
    this.requestId = requestId;
    this.status = status; // 401: a key is wanted
  }
}

// The API key, where the service asks for one: as long as the tab lives, and seen by this page alone.
const KEY = "astroclip-key";
export const keep = (key) => sessionStorage.setItem(KEY, key.trim());

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  try {
    return await fetch(path, { ...options, headers });
  } catch {
    throw new Problem("The service does not answer. Is it still running?");
  }
}

async function call(path, options) {
  const response = await request(path, options);
  const body = await response.json().catch(() => null);
  if (response.ok && body) return body;
  if (response.status === 401 && !sessionStorage.getItem(KEY)) {
    throw new Problem("This service answers those who hold an API key. Whoever runs it gives them out.", null, 401);
  }
  const said = body?.error;
  throw new Problem(said?.message ?? `The service answered ${response.status}.`, said?.request_id, response.status);
}

// Where an <img> finds a picture: a tag cannot send a key, so with one the picture is fetched here.
export async function picture(url) {
  if (!sessionStorage.getItem(KEY) || !url.startsWith("/")) return url;
  const response = await request(url);
  return response.ok ? URL.createObjectURL(await response.blob()) : url;
}

const json = (path, body) =>
  call(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

export const info = () => call("/v1/info");
export const object = (id) => call(`/v1/objects/${encodeURIComponent(id)}`);
export const randomObjects = (count) => call(`/v1/objects?random=${count}`);
export const spectrum = (url) => call(url);

// request: {query?, target?, k, exclude_arcsec?, preview, explain?}; files: 0, 1 or 2 File; read: options for reading files.
export async function estimate(request, files, read) {
  if (files.length === 0) return json("/v1/estimate", request);
  if (files.length === 1) {
    // The bytes say whether it is an image or a spectrum; the type a browser guesses from a name does not.
    const plain = Object.entries(request).map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : value]);
    const parameters = new URLSearchParams([...plain, ...Object.entries(read)]);
    const headers = { "content-type": "application/octet-stream" };
    return call(`/v1/estimate?${parameters}`, { method: "POST", headers, body: files[0] });
  }
  const [first, second] = looksLikeSpectrum(files[0]) || looksLikeImage(files[1]) ? [files[1], files[0]] : files;
  try {
    return await both(first, second, request, read);
  } catch (problem) {
    // Two FITS files do not tell by name which is which: try the other way round before giving up.
    return both(second, first, request, read).catch(() => { throw problem; });
  }
}

function both(image, spectrumFile, request, read) {
  const form = new FormData();
  form.append("image", image);
  form.append("spectrum", spectrumFile);
  form.append("request", JSON.stringify(request));
  const parameters = new URLSearchParams(read);
  return call(`/v1/estimate?${parameters}`, { method: "POST", body: form });
}

const looksLikeImage = (file) => /\.(png|jpe?g)$/i.test(file.name);
const looksLikeSpectrum = (file) => /\.(csv|txt|dat|ecsv)$/i.test(file.name) || /^(spec|coadd|spectra)[-_]/i.test(file.name);
