// The API page: openapi.json, readable, from this host alone.

import { element } from "./dom.js";

// One request a reader can paste, for each call worth one.
const EXAMPLES = {
  "/v1/embed/image": "curl -s -F file=@cutout.fits HOST/v1/embed/image",
  "/v1/embed/spectrum": "curl -s -F file=@coadd.fits -F file=@spectrum.csv HOST/v1/embed/spectrum",
  "/v1/search": `curl -s HOST/v1/search -H 'content-type: application/json' -d '{"query": {"object_id": "ID"}, "target": "image", "k": 5}'
curl -s HOST/v1/search -F image=@cutout.fits -F spectrum=@coadd.fits -F 'request={"k": 5};type=application/json'`,
  "/v1/estimate": "curl -s --data-binary @spectrum.fits 'HOST/v1/estimate?modality=spectrum'",
  "/v1/objects": "curl -s 'HOST/v1/objects?ra=12:34:56&dec=-00:12:34&radius_arcsec=30&format=csv'",
  "/v1/objects/{object_id}": "curl -s HOST/v1/objects/ID",
  "/v1/lists/{kind}": "curl -s 'HOST/v1/lists/isolated?modality=spectrum&limit=20&format=csv'",
  "/v1/info": "curl -s HOST/v1/info",
  "/scs": "curl -s 'HOST/scs?RA=188.7&DEC=-0.2&SR=0.1'",
};

const last = (ref) => ref.split("/").at(-1);

function typeOf(schema) {
  if (!schema) return "";
  if (schema.$ref) return last(schema.$ref);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return several.map(typeOf).join(" | ");
  if (schema.type === "array") return `[${typeOf(schema.items)}]`;
  return schema.format === "binary" ? "file" : schema.type ?? "object";
}

function table(head, rows) {
  if (rows.length === 0) return null;
  return element("table", {},
    element("tr", {}, ...head.map((text) => element("th", {}, text))),
    ...rows.map((row) => element("tr", {}, ...row.map((cell, i) => element("td", {}, i === 0 ? element("code", {}, cell) : cell)))));
}

function fields(schema, all) {
  const found = schema?.$ref ? all[last(schema.$ref)] : schema;
  const needed = new Set(found?.required ?? []);
  return table(["field", "type", ""], Object.entries(found?.properties ?? {}).map(([name, part]) =>
    [name, typeOf(part), [needed.has(name) ? "required" : "", part.description ?? ""].filter(Boolean).join(". ")]));
}

function operation(path, method, said, all) {
  const body = said.requestBody?.content ?? {};
  const parameters = (said.parameters ?? []).map((p) => [p.name, typeOf(p.schema), p.description ?? ""]);
  const answer = said.responses?.["200"]?.content?.["application/json"]?.schema;
  const example = EXAMPLES[path]?.replaceAll("HOST", location.origin);
  const section = (title, node) => (node ? [element("h3", {}, title), node] : []);
  return element("details", { class: "card operation" },
    element("summary", {}, element("span", { class: `method ${method}` }, method.toUpperCase()), element("code", {}, path), element("span", { class: "quiet" }, said.summary)),
    element("div", { class: "inside" },
      element("p", {}, (said.description ?? "").replaceAll("`", "")),
      said.security?.length ? element("p", { class: "quiet" }, "Wants an API key: -H 'Authorization: Bearer KEY'.") : null,
      ...section("Try", example ? element("pre", {}, example) : null),
      ...section("Parameters", table(["name", "type", ""], parameters)),
      ...Object.entries(body).filter(([, part]) => part.schema?.format !== "binary").flatMap(([type, part]) => section(`Body: ${type}`, fields(part.schema, all))),
      ...section("Body: the bytes of one file", rawTypes(body)),
      ...section("Answer", answer ? fields(answer, all) : null)));
}

function rawTypes(body) {
  const types = Object.entries(body).filter(([, part]) => part.schema?.format === "binary").map(([type]) => type);
  return types.length ? element("p", {}, types.join(", ")) : null;
}

const spec = await (await fetch("/openapi.json")).json();
const all = spec.components.schemas;
const groups = new Map();
for (const [path, methods] of Object.entries(spec.paths)) {
  for (const [method, said] of Object.entries(methods)) {
    const tag = said.tags?.[0] ?? "other";
    groups.set(tag, [...(groups.get(tag) ?? []), operation(path, method, said, all)]);
  }
}
const queries = ["ObjectQuery", "PositionQuery", "Position", "VectorQuery", "UploadQuery", "Combine", "ErrorModel"].filter((name) => all[name]);
document.getElementById("docs").replaceChildren(
  ...[...groups].flatMap(([tag, operations]) => [element("h2", { class: "docs-group" }, tag), ...operations]),
  element("h2", { class: "docs-group" }, "Shapes"),
  ...queries.map((name) => element("details", { class: "card operation" },
    element("summary", {}, element("code", {}, name), element("span", { class: "quiet" }, (all[name].description ?? "").split("\n")[0])),
    element("div", { class: "inside" }, fields(all[name], all)))));
