// Kinds as colour and shape; metrics as colour.
const SHAPES = {
  sink: "M1.5 3H14.5L8 14Z",
  "previous-token": "M13 1.5V14.5L2 8Z",
  induction: "M8 .6L10 5.7L15.4 6L11.2 9.5L12.6 14.8L8 11.8L3.4 14.8L4.8 9.5L.6 6L6 5.7Z",
  duplicate: "M1.5 3.2H14.5V6.6H1.5ZM1.5 9.4H14.5V12.8H1.5Z",
  retrieval: "M8 .8L15.2 8L8 15.2L.8 8Z",
  local: "M2.4 2.4H13.6V13.6H2.4Z",
  broad: "M8 1A7 7 0 1 1 8 15A7 7 0 1 1 8 1ZM8 4A4 4 0 1 0 8 12A4 4 0 1 0 8 4Z",
  positional: "M6.3 1.5H9.7V6.3H14.5V9.7H9.7V14.5H6.3V9.7H1.5V6.3H6.3Z",
  delimiter: "M3.4 1.5H6.6V14.5H3.4ZM9.4 1.5H12.6V14.5H9.4Z",
  mixed: "M8 5A3 3 0 1 1 8 11A3 3 0 1 1 8 5Z",
  other: "M2 6.8H14V9.2H2Z",
};

const KIND_NAMES = (() => {
  if (!HEADS.kind) return [];
  const present = new Set(HEADS.kind);
  const known = ATLAS.kinds.map((entry) => entry.kind).filter((kind) => present.has(kind));
  return [...known, ...[...present].filter((kind) => !known.includes(kind)).sort()];
})();
const KIND_COUNTS = new Map(KIND_NAMES.map((kind) => [
  kind, HEADS.kind.filter((k) => k === kind).length,
]));
const kindOf = (row) => (HEADS.kind ? HEADS.kind[row] : null);
const known = (kind) => kind !== null && Object.hasOwn(SHAPES, kind);
const kindClass = (kind) => `k-${known(kind) ? kind : "other"}`;
const shapeOf = (kind) => SHAPES[known(kind) ? kind : "other"];

function glyph(kind) {
  return svg("svg", { class: `glyph ${kindClass(kind)}`, viewBox: "0 0 16 16",
    "aria-hidden": "true" }, svg("path", { d: shapeOf(kind) }));
}

// The head's glyph, name and a button that opens its card.
function headLink(row, text = HEADS.name[row]) {
  return el("span", { class: "head" }, HEADS.kind ? glyph(kindOf(row)) : null,
    el("button", { type: "button", class: "link", onclick: () => openHead(row),
      "aria-label": `${longName(row)}${HEADS.kind ? `, ${kindOf(row)}` : ""}: open its card` },
      text));
}

const RAMPS = {
  light: {
    up: ["#f3f0e9", "#d3e2da", "#9cc9c4", "#5ba6b4", "#2f7a9f", "#23517f", "#1b2a57"],
    both: ["#7a3a10", "#b96a2c", "#e2ab78", "#f3f0e9", "#a3bcdf", "#4f7bbf", "#1f418a"],
  },
  dark: {
    up: ["#22262c", "#24415a", "#2a6580", "#3b8d93", "#70b492", "#b6d58d", "#f6efa6"],
    both: ["#f4ad72", "#bb6f33", "#6b4729", "#23272e", "#2d4c79", "#4b7ec6", "#a0c6ff"],
  },
};

const isDark = () => PAGE.dataset.theme === "dark";
const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

// t in 0..1 -> [r, g, b]
function rampColour(t, both = false) {
  const stops = RAMPS[isDark() ? "dark" : "light"][both ? "both" : "up"];
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const a = channels(stops[low]);
  const b = channels(stops[low + 1]);
  return a.map((value, i) => Math.round(value + (b[i] - value) * (place - low)));
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;

// Black or white, whichever is read more easily on this colour.
function inkOn(rgb) {
  const [r, g, b] = rgb.map((value) => {
    const c = value / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#14161a" : "#ffffff";
}
