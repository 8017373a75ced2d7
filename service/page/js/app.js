// The page: reads what is asked (a file, an id, a position, or the address), asks once, shows the answer.

import * as api from "./api.js";
import * as view from "./view.js";

const at = (id) => document.getElementById(id);
let about = null; // /v1/info
let latest = 0; // only the newest question may show its answer

// "12:34:56 -00:12:34", "188.7, -0.2" are positions; anything else is an id.
function queryOf(text) {
  const plain = text.trim().replaceAll("−", "-");
  const words = plain.replaceAll(",", " ").split(/\s+/);
  const angle = /^[+-]?\d+(\.\d*)?([:hdm°'"s]\d*(\.\d*)?)*$/;
  if (words.length >= 2 && words.length % 2 === 0 && words.every((word) => angle.test(word))) {
    const half = words.length / 2;
    const [ra, dec] = [words.slice(0, half).join(" "), words.slice(half).join(" ")];
    return { position: { ra, dec, radius_arcsec: 60 } };
  }
  return { object_id: plain };
}

function request() {
  const out = { preview: true };
  const k = Math.round(Number(at("k").value));
  if (k >= 1) out.k = Math.min(k, 100); // left empty, the index chooses for every property
  const target = document.querySelector("input[name=target]:checked").value;
  if (target) out.target = target;
  const method = document.querySelector("input[name=method]:checked").value;
  if (method !== "knn") out.method = method;
  if (Number(at("exclude").value) > 0) out.exclude_arcsec = Number(at("exclude").value);
  return out;
}

async function ask(query, files = []) {
  const mine = ++latest;
  view.problem(null);
  at("status").textContent = files.length ? `Reading ${files.map((file) => file.name).join(", ")} …` : "Searching …";
  for (const button of [at("go"), at("random")]) button.disabled = true;
  try {
    const read = Number(at("scale").value) > 0 ? { pixel_scale_arcsec: at("scale").value } : {};
    const answer = await api.estimate(query ? { query, ...request() } : request(), files, read);
    const id = answer.query.object_id;
    const record = files.length || !id ? null : (await api.object(id)).object;
    if (mine !== latest) return;
    at("start").hidden = true;
    view.show(answer, record, files, (next) => lookup(next), files.length ? (id) => why(id, files, read) : null);
    if (about) view.provenance(about, answer.request_id);
    at("status").textContent = "";
    at("results").focus({ preventScroll: true });
  } catch (error) {
    if (mine !== latest) return;
    at("status").textContent = "";
    view.problem(error);
  } finally {
    if (mine === latest) for (const button of [at("go"), at("random")]) button.disabled = false;
  }
}

// What in the uploaded files makes them resemble one of the hits: hundreds of passes of the model, so only when asked.
async function why(id, files, read) {
  const mine = latest;
  at("status").textContent = `Hiding the upload piece by piece, against ${id} …`;
  try {
    const { explanation } = await api.estimate({ ...request(), preview: false, explain: { object_id: id } }, files, read);
    if (mine === latest) view.explained(explanation);
  } catch (error) {
    if (mine === latest) view.unexplained(error);
  } finally {
    if (mine === latest) at("status").textContent = "";
  }
}

// A question by text also goes into the address, so that it can be shared and gone back to.
function lookup(text) {
  const hash = `#${encodeURIComponent(text)}`;
  if (location.hash === hash) fromAddress();
  else location.hash = hash;
}

function fromAddress() {
  const text = decodeURIComponent(location.hash.slice(1));
  if (!text) return;
  at("text").value = text;
  window.scrollTo({ top: 0, behavior: "instant" });
  ask(queryOf(text));
}

function upload(list) {
  const files = [...list].slice(0, 2);
  if (files.length === 0) return;
  at("text").value = "";
  history.replaceState(null, "", location.pathname);
  ask(null, files);
}

async function random() {
  try {
    lookup((await api.randomObjects(1)).objects[0].object_id);
  } catch (error) {
    view.problem(error);
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (text) lookup(text);
  else view.problem(new api.Problem("Type an object id or a position, or drop a file."));
});
at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  api.keep(at("key-text").value);
  location.reload(); // begins anew, with the key; what the address asks for is asked again
});
at("random").addEventListener("click", random);
at("file").addEventListener("change", (event) => { upload(event.target.files); event.target.value = ""; });
window.addEventListener("hashchange", fromAddress);

// The whole page takes drops; a file dropped beside the box must not replace the page.
for (const name of ["dragover", "dragleave", "drop"]) {
  window.addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") upload(event.dataTransfer.files);
  });
}

fromAddress();
api.info().then((found) => {
  about = found;
  view.provenance(found);
  at("methods").hidden = !found.indexes[0].methods.includes("head");
}, view.problem);
if (!location.hash) {
  api.randomObjects(24).then((found) => { if (latest === 0) view.samples(found.objects, lookup); }, () => {});
}
