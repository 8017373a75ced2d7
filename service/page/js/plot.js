// Small plots in SVG: spectra, and the strip of an estimate among its neighbours' values.

import { number, svg } from "./dom.js";

// Vacuum wavelengths (Angstrom) of lines worth recognising.
const LINES = [
  ["[O II]", 3728.5], ["Ca K", 3934.8], ["Hβ", 4862.7], ["[O III]", 5008.2], ["Mg b", 5176.6], ["Na D", 5895.6], ["Hα", 6564.6],
];

// wave, flux: arrays of equal length, flux null where unknown. With a redshift, lines are marked where they fall.
export function spectrumPlot({ wave, flux }, { width = 220, height = 70, axis = false, redshift = null, label }) {
  const bottom = axis ? 14 : 0, top = redshift === null ? 2 : 14;
  const known = flux.filter((f) => f !== null).sort((a, b) => a - b);
  const low = quantile(known, 0.005), high = quantile(known, 0.995) || 1;
  const [first, last] = [wave[0], wave.at(-1)];
  const x = (w) => ((w - first) / (last - first)) * width;
  const y = (f) => top + (1 - (Math.min(Math.max(f, low), high) - low) / (high - low || 1)) * (height - bottom - top - 2);
  const plot = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  if (redshift !== null) plot.append(...lineMarks(redshift, first, last, x, height - bottom));
  plot.append(svg("path", { class: "curve", d: path(wave, flux, x, y) }));
  if (axis) plot.append(...wavelengthAxis(first, last, x, height));
  return plot;
}

function path(wave, flux, x, y) {
  let d = "", pen = false;
  flux.forEach((f, i) => {
    if (f === null) { pen = false; return; }
    d += `${pen ? "L" : "M"}${x(wave[i]).toFixed(1)} ${y(f).toFixed(1)}`;
    pen = true;
  });
  return d;
}

function lineMarks(redshift, first, last, x, base) {
  const marks = [];
  let free = -Infinity;
  for (const [name, rest] of LINES) {
    const wave = rest * (1 + redshift);
    if (wave < first || wave > last) continue;
    const at = x(wave).toFixed(1);
    marks.push(svg("line", { class: "mark", x1: at, x2: at, y1: 12, y2: base }));
    if (x(wave) > free) {
      marks.push(svg("text", { class: "mark-label", x: at, y: 9, "text-anchor": "middle" }, name));
      free = x(wave) + 34;
    }
  }
  return marks;
}

function wavelengthAxis(first, last, x, height) {
  const parts = [svg("line", { class: "axis", x1: 0, x2: x(last), y1: height - 13, y2: height - 13 })];
  for (let w = Math.ceil(first / 1000) * 1000; w < last; w += 1000) {
    parts.push(svg("text", { x: x(w), y: height - 2, "text-anchor": "middle" }, `${w}${w === 5000 ? " Å" : ""}`));
  }
  return parts;
}

// estimate: {value, lo, hi}; values: the neighbours' own; truth: the catalogue's value of the query, or null.
export function estimateStrip(estimate, values, truth, label) {
  const width = 400, middle = 9;
  const all = [...values, estimate.lo, estimate.hi, ...(truth === null ? [] : [truth])];
  const low = Math.min(...all), high = Math.max(...all), span = high - low || 1;
  const x = (v) => 6 + ((v - low) / span) * (width - 12);
  const strip = svg("svg", { class: "strip", viewBox: `0 0 ${width} 26`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  strip.append(
    svg("line", { class: "base", x1: 0, x2: width, y1: middle, y2: middle }),
    svg("rect", { class: "range", x: x(estimate.lo), width: Math.max(x(estimate.hi) - x(estimate.lo), 1.5), y: 1, height: 16, rx: 3 }),
    ...values.map((v) => svg("circle", { class: "dot", cx: x(v), cy: middle, r: 2.6 })),
    svg("line", { class: "centre", x1: x(estimate.value), x2: x(estimate.value), y1: 0, y2: 18 }),
  );
  if (truth !== null) {
    const t = x(truth);
    strip.append(svg("path", { class: "truth", d: `M${t} 2l5 7-5 7-5-7z` }));
  }
  strip.append(
    svg("text", { x: 0, y: 26 }, number(low, 3)),
    svg("text", { x: width, y: 26, "text-anchor": "end" }, number(high, 3)),
  );
  return strip;
}

const quantile = (sorted, q) => (sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : 0);
