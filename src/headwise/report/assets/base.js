// Data, elements and numbers. Text from the atlas only ever becomes text nodes and attributes.
const ATLAS = JSON.parse(document.getElementById("atlas").textContent);
const HEADS = ATLAS.heads;
const COUNT = HEADS.layer.length;
const ROWS = Array.from({ length: COUNT }, (_, row) => row);
const MEASURED = ATLAS.columns.filter((column) => column.values.some((v) => v !== null));
const PAGE = document.documentElement;
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const columnNamed = (name) => ATLAS.columns.find((column) => column.name === name) || null;

// el("p", { class: "about", onclick: f }, "text", child): an element with children
function el(tag, attributes = {}, ...children) {
  return dress(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return dress(document.createElementNS(SVG, tag), attributes, children);
}

function dress(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null));
  return node;
}

// A number to read: three decimals where that says something, otherwise significant digits.
function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 5e-4) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size >= 100) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1);
  return value.toFixed(size < 0.01 ? 4 : 3);
}

// A tick on an axis: as few digits as tell it from its neighbours.
function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(0).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

// An error to two digits, after the number it belongs to.
const plusMinus = (error) => ` ± ${tickText(Number(error.toPrecision(2)))}`;

const UNITS = { share: "", score: "", index: "", name: "", cosine: "cosine", ratio: "ratio" };
const unitText = (unit) => (unit in UNITS ? UNITS[unit] : unit);
const unitLong = (unit) => ({ share: "share, 0 to 1", score: "score, -1 to 1" })[unit] || unit;

function withUnit(column, value) {
  const unit = value === null ? "" : unitText(column.unit);
  return unit ? `${number(value)} ${unit}` : number(value);
}

// Values that were measured, ascending, once for each column.
const sortedValues = (() => {
  const known = new Map();
  return (column) => {
    if (!known.has(column)) {
      const values = column.values.filter((v) => v !== null).sort((a, b) => a - b);
      known.set(column, values);
    }
    return known.get(column);
  };
})();

// 1 for the largest; heads with the same value share a rank.
function rankOf(column, row) {
  const value = column.values[row];
  if (value === null) return null;
  const values = sortedValues(column);
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return values.length - low + 1;
}

const allSame = (column) => sortedValues(column)[0] === sortedValues(column).at(-1);

function quantile(values, share) {
  if (!values.length) return null;
  const place = share * (values.length - 1);
  const low = Math.floor(place);
  const high = Math.ceil(place);
  return values[low] + (values[high] - values[low]) * (place - low);
}

// Several stacks or attentions: a head then needs them in its name.
const panelText = (panel) =>
  [panel.stack, panel.attention && `${panel.attention}-attention`].filter(Boolean).join(", ");
const panelOf = (row) => ATLAS.panels[HEADS.panel[row]];
const manyPanels = ATLAS.panels.length > 1;

function longName(row) {
  const place = manyPanels ? ` of ${panelText(panelOf(row))}` : "";
  return `Layer ${HEADS.layer[row]}, head ${HEADS.head[row]}${place}`;
}

// Bytes of a base64 text.
function bytes(text) {
  const raw = atob(text);
  const out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) out[i] = raw.charCodeAt(i);
  return out;
}

function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

// Anything that is drawn to its width is drawn again when that changes.
function drawnToWidth(node, draw) {
  let last = Math.floor(node.clientWidth); // what is drawn now fits this
  new ResizeObserver(() => {
    const width = Math.floor(node.clientWidth);
    if (width && Math.abs(width - last) > 1) {
      last = width;
      requestAnimationFrame(() => draw());
    }
  }).observe(node);
}
