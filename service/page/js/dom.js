// Building elements. Text is always set as text, so nothing from a file or a catalogue becomes markup.

export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function definitions(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element("dl", {}, ...known.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

export const number = (value, digits = 4) =>
  value === null || value === undefined ? "–" : String(Number(Number(value).toPrecision(digits)));

const NAMES = {
  redshift: "Redshift",
  log_stellar_mass: "Stellar mass, log M/M☉",
  log_metallicity: "Metallicity, log Z/Z☉",
  age_gyr: "Age",
  log_ssfr: "Specific star formation, log sSFR/yr",
  dust_av: "Dust, A(V)",
};
export const pretty = (name) => NAMES[name] ?? name.replaceAll("_", " ");
// The logarithms' units stand in their names already.
export const unit = (text) => (text && !text.startsWith("dex") ? ` ${text}` : "");
