// What the reader chose. It stands in the address after "#", so that a view can be linked.
const DEFAULTS = {
  head: null, metric: ATLAS.metric, order: "index", scale: "auto", kinds: null, theme: "auto",
  x: null, y: null, sort: null, against: null,
};
const state = { ...DEFAULTS };
const watchers = [];

// Calls back after any of these keys changed, and once at the start.
function watch(keys, callback) {
  watchers.push({ keys, callback });
}

function change(patch) {
  const changed = Object.keys(patch).filter((key) => patch[key] !== state[key]);
  if (!changed.length) return;
  Object.assign(state, patch);
  writeAddress();
  for (const { keys, callback } of watchers) {
    if (keys.some((key) => changed.includes(key))) callback(changed);
  }
}

// "3.5", or "decoder.cross.3.5" where layer and head do not say enough
function headKey(row) {
  const place = manyPanels ? `${panelOf(row).id}.` : "";
  return `${place}${HEADS.layer[row]}.${HEADS.head[row]}`;
}

function rowOfKey(key) {
  const row = ROWS.find((r) => headKey(r) === key);
  return row === undefined ? null : row;
}

function writeAddress() {
  const parts = [];
  for (const key of Object.keys(DEFAULTS)) {
    const value = state[key];
    if (value === DEFAULTS[key]) continue;
    const text = key === "head" ? headKey(value) : key === "kinds" ? value.join(",") : value;
    parts.push(`${key}=${encodeURIComponent(text)}`);
  }
  try {
    history.replaceState(null, "", parts.length ? `#${parts.join("&")}` : "#");
  } catch {
    // a page inside a frame without rights to its address still works
  }
}

function readAddress() {
  const read = { ...DEFAULTS };
  for (const part of location.hash.slice(1).split("&")) {
    const [key, raw] = part.split("=");
    if (raw === undefined || !(key in DEFAULTS)) continue;
    let text;
    try {
      text = decodeURIComponent(raw);
    } catch {
      continue;
    }
    if (key === "head") read.head = rowOfKey(text);
    else if (key === "kinds") {
      const kinds = text.split(",").filter((kind) => KIND_NAMES.includes(kind));
      if (kinds.length) read.kinds = kinds;
    } else if (["metric", "x", "y", "against"].includes(key)) {
      if (key === "metric" && (text === "kind" || (text === "tile" && TILES.size))) read[key] = text;
      else if (MEASURED.some((column) => column.name === text)) read[key] = text;
    } else if (key === "order" && ["index", "value", "kind"].includes(text)) read.order = text;
    else if (key === "scale" && ["linear", "log", "rank"].includes(text)) read.scale = text;
    else if (key === "theme" && ["light", "dark"].includes(text)) read.theme = text;
    else if (key === "sort" && /^-?\w+$/.test(text)) read.sort = text;
  }
  if (read.metric !== "kind" && read.metric !== "tile" && !MEASURED.includes(columnNamed(read.metric))) {
    read.metric = "kind";
  }
  if (read.metric === "kind" && !HEADS.kind && MEASURED.length) read.metric = MEASURED[0].name;
  return read;
}

// The column that colours the map; null where it is coloured by kind or shows pieces of maps.
const metricColumn = () => (["kind", "tile"].includes(state.metric) ? null : columnNamed(state.metric));
const isShown = (row) => !state.kinds || state.kinds.includes(kindOf(row));

function openHead(row) {
  change({ head: row });
  byId("card").focus({ preventScroll: true });
}
