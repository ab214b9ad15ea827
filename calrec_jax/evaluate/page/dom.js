// Building blocks of the page. Everything from data becomes a text node or an attribute: no string is ever parsed as HTML.
"use strict";

// The namespace is read from an <svg> of the page, so that the file holds no address at all.
const SVG_NAMESPACE = document.getElementById("svg-anchor").namespaceURI;

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "colour") node.style.setProperty("--colour", `var(--${value})`);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

const html = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG_NAMESPACE, tag), attributes, children);
const byId = (id) => document.getElementById(id);
const replace = (node, ...children) => node.replaceChildren(...children.flat(Infinity).filter(Boolean));
const notice = (...text) => html("p", { class: "notice" }, ...text);

const isRecord = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const count = (value) => (isNumber(value) ? value.toLocaleString("en-US", { maximumFractionDigits: 2 }) : "–");
const words = (name) => String(name).replaceAll("_", " ");
const upper = (text) => String(text).replace(/^./, (letter) => letter.toUpperCase());
const sentence = (name) => upper(words(name));

// Ranking metrics as papers print them: .0812, and 1.0000 only where it is reached.
function metric(value, digits = 4) {
  if (!isNumber(value)) return "–";
  return value.toFixed(digits).replace(/^(-?)0\./, "$1.");
}

// Scores of one list share their decimals, so that they can be compared down the column.
function scoreFormat(values) {
  const largest = Math.max(0, ...values.filter(isNumber).map(Math.abs));
  const digits = largest >= 1000 ? 1 : largest >= 1 ? 3 : largest >= 0.01 ? 4 : 6;
  return (value) => (isNumber(value) ? value.toFixed(digits).replace("-", "−") : "–");
}

// The same on an axis, without the zeros at the end.
const metricTick = (value) => (value === 0 ? "0" : metric(value).replace(/0{1,3}$/, ""));

// Any other quantity, to a few significant digits.
function quantity(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(1).replace("e+", "e");
  if (size >= 100) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

function metricLabel(key) {
  if (key === "mrr") return "MRR";
  const [name, cut] = key.split("@");
  return { recall: "R", ndcg: "NDCG", mrr: "MRR" }[name] + "@" + cut;
}

// A long hash, shortened for the eye; the whole is in metrics.json and data_card.json, and in the title here.
const isHash = (value) => typeof value === "string" && /^[0-9a-f]{40,}$/.test(value);
const shortHash = (value) => html("code", { title: value }, value.slice(0, 16), "…");

// A labelled group of radio buttons drawn as one segmented control; `options` are [value, label] pairs.
function choice(legend, name, options, chosen, onchange, legendShown = true) {
  const inputs = options.map(([value, label]) => html("label", {},
    html("input", { type: "radio", name, value, checked: value === chosen, onchange: () => onchange(value) }),
    html("span", {}, label)));
  return html("fieldset", { class: "choice" },
    html("legend", { class: legendShown ? null : "visually-hidden" }, legend), html("div", { class: "choice-options" }, inputs));
}

// A labelled choice from a list; `options` are [value, label] pairs.
function select(label, options, chosen, onchange) {
  return html("label", { class: "select" }, html("span", { class: "field-label" }, label), html("select", { onchange: (event) => onchange(event.target.value) },
    options.map(([value, text]) => html("option", { value, selected: value === chosen }, text))));
}

// The compressed data of a script element, or null where it is empty; the browser's own gzip, nothing is loaded.
async function unpack(id) {
  const text = byId(id).textContent.trim();
  if (!text) return null;
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
