// What is shown: the query, the estimates, trust in plain sentences, the neighbours, and provenance.

import * as api from "./api.js";
import { definitions, element, number, pretty, unit } from "./dom.js";
import { estimateStrip, spectrumPlot } from "./plot.js";

const at = (id) => document.getElementById(id);

// record: the query's own catalogue row where it is an object of the index, else null; files: what was uploaded;
// why: asks what made a hit match, null where nothing was uploaded.
export function show(answer, record, files, search, why) {
  const redshift = answer.estimates.find((e) => e.name === "redshift")?.value ?? null;
  at("query").replaceChildren(query(answer, record, files, redshift));
  at("estimates-title").textContent = answer.method === "head" ? "What its embedding says" : "What its neighbours say";
  at("estimates").replaceChildren(...estimates(answer, record));
  at("trust").replaceChildren(trust(answer));
  at("hits-note").textContent = searchNote(answer);
  at("hits").replaceChildren(...answer.hits.map((hit, i) => card(hit, i, search, why)));
  at("results").hidden = false;
}

function image(url, attributes) {
  const node = element("img", attributes);
  api.picture(url).then((found) => {
    node.addEventListener("load", () => URL.revokeObjectURL(found), { once: true }); // does nothing to a plain address
    node.src = found;
  }, () => {});
  return node;
}

// --- the query ---------------------------------------------------------------------------------------------------------

function query(answer, record, files, redshift) {
  const asked = answer.query;
  const picture = asked.image ?? record?.previews.image;
  const facts = definitions([
    ["Asked with", asked.modalities.join(" + ")],
    ["File", files.map((file) => file.name).join("\n")],
    ["Object", asked.object_id],
    ["RA, Dec", asked.ra === null ? null : `${asked.ra.toFixed(5)}, ${asked.dec.toFixed(5)}`],
    ...Object.entries(asked.quality).flatMap(([kind, q]) => [
      [`S/N, ${kind}`, q.snr === null ? null : number(q.snr, 3)],
      [`Masked, ${kind}`, q.masked_fraction > 0 ? `${(100 * q.masked_fraction).toFixed(1)} %` : null],
    ]),
  ]);
  const body = element("div", { class: "query-body" },
    picture ? image(picture, { class: "cutout", alt: "The query's image" }) : null,
    element("div", { class: "facts" }, facts));
  const box = element("div", {}, body);
  const draw = (spectrum) => box.append(
    spectrumPlot(spectrum, { width: 440, height: 150, axis: true, redshift, label: "The query's spectrum" }));
  if (asked.spectrum) draw(asked.spectrum);
  else if (record?.previews.spectrum) api.spectrum(record.previews.spectrum).then(draw, () => {});
  box.append(element("div", { id: "why", class: "why", "aria-live": "polite" }));
  return box;
}

// --- why a hit matches -------------------------------------------------------------------------------------------------

export function explained(explanation) {
  const parts = Object.entries(explanation).flatMap(([kind, found]) => [
    element("h3", {}, `Why ${found.against.object_id}?`),
    element("img", { class: kind, src: found.plot, alt: `What in the ${kind} makes it resemble ${found.against.object_id}` }),
    element("p", { class: "legend" }, `Amber: hiding it lowers the similarity (${number(found.score, 3)}), by at most ` +
      `${number(Math.max(...found.drop), 2)} a window; blue: hiding it raises it. Scattered over the ${kind}, as many hidden pixels ` +
      `change it by ${number(found.control, 1)}.`)]);
  at("why").replaceChildren(...parts);
  at("why").scrollIntoView({ block: "nearest" });
}

export function unexplained(error) {
  at("why").replaceChildren(element("p", { class: "problem" }, error.message));
}

// --- estimates ---------------------------------------------------------------------------------------------------------

function estimates(answer, record) {
  const known = answer.estimates.filter((e) => e.value !== null);
  if (known.length === 0) return [element("p", { class: "quiet" }, "The neighbours have no measured properties.")];
  const rows = known.map((e) => {
    const values = answer.hits.slice(0, e.k ?? answer.hits.length).map((hit) => hit.properties[e.name]).filter((v) => typeof v === "number");
    const truth = record?.properties[e.name] ?? null;
    const said = `${pretty(e.name)} ${number(e.value)}, between ${number(e.lo)} and ${number(e.hi)}`;
    return element("div", { class: "estimate" },
      element("span", { class: "name" }, pretty(e.name)),
      element("span", { class: "value" },
        element("b", {}, number(e.value)), unit(e.unit), element("span", { class: "quiet" }, `  ${number(e.lo, 3)} – ${number(e.hi, 3)}`)),
      estimateStrip(e, values, truth, said));
  });
  const percent = Math.round(100 * known[0].coverage);
  const calibrated = known.every((e) => e.calibrated);
  const band = answer.method === "head" ? `the fitted head's ${percent} % interval`
    : calibrated ? `holds the truth of ${percent} % of objects like the survey's` : `${percent} % of the neighbours' weight`;
  const legend = `Band: ${band}. Dots: the neighbours used.` + (record ? " Diamond: the catalogue's own value." : "");
  return [...rows, element("p", { class: "legend" }, legend)];
}

// --- trust -------------------------------------------------------------------------------------------------------------

function trust(answer) {
  const p = answer.trust.ood_p;
  const notes = answer.trust.flags.map((flag) => element("li", { class: REMARKS.has(flag.code) ? null : "warn" }, flag.message));
  if (p !== null && !answer.trust.flags.some((flag) => flag.code === "out_of_distribution")) {
    notes.unshift(element("li", { class: p > USUAL ? "good" : null }, familiarity(p)));
  }
  const pair = answer.trust.disagreement_p;
  if (pair !== null && !answer.trust.flags.some((flag) => flag.code === "modalities_disagree")) {
    notes.push(element("li", { class: pair > USUAL ? "good" : null }, `Image and spectrum fit together: ${share(pair)} of the survey's pairs fit no better.`));
  }
  const used = answer.estimates.filter((e) => e.n_eff > 0).map((e) => e.k);
  if (used.length) {
    const [least, most] = [Math.min(...used), Math.max(...used)];
    notes.push(element("li", {}, `The estimates rest on ${least === most ? most : `${least} to ${most}`} neighbours, by property.`));
  }
  if (notes.length === 0) notes.push(element("li", {}, "The index cannot say how usual this query is."));
  return element("ul", { class: "notes" }, ...notes);
}

// Flags that say what was done, not that something is amiss.
const REMARKS = new Set(["nearest_object", "own_object_left_out", "several_objects", "wavelength_sorted_merged", "resampled"]);

const USUAL = 0.2; // above: nothing to remark; low values the service itself flags

function share(p) {
  const percent = 100 * p;
  return percent < 1 ? "fewer than 1\u00a0%" : `${Math.round(percent)}\u00a0%`;
}

function familiarity(p) {
  if (p > USUAL) return `It looks like the survey's galaxies: ${share(p)} of them are as unusual.`;
  return `It is somewhat unusual: only ${share(p)} of the survey's galaxies are as unusual.`;
}

function searchNote(answer) {
  const { mode, candidates, expected_recall: recall } = answer.search;
  const how = mode === "exact" ? "compared exactly" : `searched by ${mode}, recall ${number(recall, 3)}`;
  return `${candidates.toLocaleString("en")} embeddings ${how}`;
}

// --- neighbours --------------------------------------------------------------------------------------------------------

function card(hit, i, search, why) {
  const picture = hit.previews.image
    ? image(hit.previews.image, { class: "cutout", alt: `Image of ${hit.object_id}`, loading: "lazy" })
    : element("div", { class: "none" }, "no image");
  const body = element("div", { class: "body" },
    element("button", { type: "button", class: "id", title: "Search with this object", onclick: () => search(hit.object_id) }, hit.object_id),
    definitions([
      ["Similarity", hit.score.toFixed(3)],
      ["Percentile", hit.percentile === null ? null : percentile(hit.percentile)],
      ["Redshift", typeof hit.properties.redshift === "number" ? hit.properties.redshift.toFixed(4) : null],
      ["log M", typeof hit.properties.log_stellar_mass === "number" ? hit.properties.log_stellar_mass.toFixed(2) : null],
    ]),
    why ? element("button", { type: "button", class: "ask-why", onclick: () => why(hit.object_id) }, "Why?") : null);
  if (hit.previews.spectrum) {
    api.spectrum(hit.previews.spectrum).then(
      (found) => body.append(spectrumPlot(found, { label: `Spectrum of ${hit.object_id}` })), () => {});
  }
  return element("li", { class: "hit" },
    element("div", { class: "pair" }, picture, element("span", { class: "rank" }, String(i + 1)),
      element("span", { class: "via" }, `by ${hit.modality}`)),
    body);
}

// As many digits as it takes to tell the best from each other.
const percentile = (p) => (p >= 99.995 ? "> 99.99" : p >= 99 ? p.toFixed(2) : p.toFixed(1));

// --- provenance and samples --------------------------------------------------------------------------------------------

export function provenance(info, requestId = null) {
  const index = info.indexes[0], model = info.models[0];
  at("provenance").replaceChildren(
    element("p", {}, `${index.survey}: ${index.counts.objects.toLocaleString("en")} objects. Index `,
      element("code", {}, `${index.id} ${index.manifest_sha256.slice(0, 12)}`), ", model ",
      element("code", {}, `${model.id} ${model.sha256.slice(0, 12)}`), `, preprocessing ${model.preprocess_version}, on ${model.device}.`,
      requestId ? element("span", {}, " Request ", element("code", {}, requestId), ".") : null),
    element("p", {}, info.citations.join("; ")));
}

export function samples(objects, search) {
  const shown = objects.filter((o) => o.previews.image);
  at("samples").replaceChildren(...shown.map((o) =>
    element("button", { type: "button", "aria-label": `Search with ${o.object_id}`, title: o.object_id, onclick: () => search(o.object_id) },
      image(o.previews.image, { alt: "" }))));
  at("start").hidden = shown.length === 0;
}

export function problem(error) {
  const box = at("problem");
  box.hidden = error === null;
  at("key").hidden = error?.status !== 401;
  if (error === null) return;
  at("results").hidden = true; // an old answer under a new error would be taken for the new one
  box.replaceChildren(error.message, error.requestId ? element("div", { class: "quiet" }, `Request ${error.requestId}`) : "");
}
