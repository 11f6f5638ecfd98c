// The map of heads: depth from left to right, or downwards where there is no room for that.
const cells = new Map(); // row -> <g>
let cursor = 0; // the head that Tab reaches

function drawMapControls() {
  const groups = ATLAS.groups.map((name) => [name, MEASURED.filter((c) => c.group === name)])
    .filter(([, columns]) => columns.length);
  const metric = el("select", { id: "metric", onchange: () => change({ metric: metric.value, scale: "auto" }) },
    HEADS.kind || !MEASURED.length ? el("option", { value: "kind" }, "kind") : null,
    TILES.size ? el("option", { value: "tile" }, "a piece of its map") : null,
    groups.map(([name, columns]) => el("optgroup", { label: name },
      columns.map((c) => el("option", { value: c.name }, c.label)))));
  const order = el("select", { id: "order", onchange: () => change({ order: order.value }) },
    el("option", { value: "index" }, "head number"),
    el("option", { value: "value" }, "value, highest first"),
    HEADS.kind ? el("option", { value: "kind" }, "kind") : null);
  const scale = el("select", { id: "scale", onchange: () => change({ scale: scale.value }) });
  const scaleField = el("label", { class: "field" }, "Colour scale", scale);
  fill(byId("map-controls"), el("label", { class: "field" }, "Colour by", metric),
    el("label", { class: "field" }, "Order within a layer", order), scaleField);
  const show = () => {
    const column = metricColumn();
    metric.value = state.metric;
    order.value = state.order;
    scaleField.hidden = !column;
    if (column) {
      fill(scale, modesOf(column).map((mode) => el("option", { value: mode }, mode)));
      scale.value = scaleFor(column, state.scale).mode;
    }
  };
  watch(["metric", "order", "scale"], show);
  show();
}

function drawMap() {
  const box = byId("maps");
  const focused = document.activeElement && document.activeElement.classList.contains("cell");
  cells.clear();
  const figure = box.parentElement;
  const wide = figure.clientWidth;
  const figures = ATLAS.panels.map((panel, i) => panelFigure(panel, i, wide));
  fill(box, figures.map((f) => f.node));
  const used = Math.max(...figures.map((f) => f.wide));
  byId("legend").classList.toggle("wide", manyPanels || wide - used < 320);
  byId("map-about").textContent = mapWords();
  showFilter();
  showOpen();
  if (focused) focusHead(cursor, false);
}

function mapWords() {
  if (state.metric === "tile") {
    const longest = Math.max(...ATLAS.tiles.texts.map(([tokens]) => tokens.length));
    return `Every square is a head’s own map over up to ${longest} tokens: rows are queries, columns keys` +
      `${HEADS.kind ? "; the mark in its corner is the kind" : ""}.`;
  }
  const column = metricColumn();
  const what = column ? `its colour is the ${column.label}, its shape the kind`
    : "its colour and shape are its kind";
  if (!HEADS.kind) return column ? `Every square is a head; its colour is the ${column.label}.` : "";
  return `Every mark is a head; ${what}.`;
}

function panelFigure(panel, index, wide) {
  const rows = ROWS.filter((row) => HEADS.panel[row] === index);
  const layers = [...new Set(rows.map((row) => HEADS.layer[row]))].sort((a, b) => a - b);
  const perLayer = layers.map((layer) => inOrder(rows.filter((row) => HEADS.layer[row] === layer)));
  const most = Math.max(...perLayer.map((list) => list.length));
  const { cell, across } = layout(layers.length, most, wide);
  const [left, top] = [36, 24];
  const [columns, lines] = across ? [layers.length, most] : [most, layers.length];
  const width = left + columns * cell.wide + 4;
  const height = top + lines * cell.high + 4;
  const spots = [];
  const grid = svg("svg", { class: state.metric === "tile" ? "tiled" : null, width, height, viewBox: `0 0 ${width} ${height}`, role: "grid",
    "aria-label": `${panelText(panel) || "Heads"}: ${layers.length} layers, up to ${most} heads each` });
  grid.append(...axes(layers, most, cell, across, left, top));
  perLayer.forEach((list, l) => {
    const line = svg("g", { role: "row", "aria-label": `Layer ${layers[l]}` });
    list.forEach((row, h) => {
      const [x, y] = across ? [l, h] : [h, l];
      const spot = { row, x: left + x * cell.wide, y: top + y * cell.high };
      spots.push(spot);
      line.append(cellFor(row, spot.x, spot.y, cell));
    });
    grid.append(line);
  });
  if (state.metric === "tile") grid.prepend(thumbnails(spots, cell, width, height));
  const node = el("figure", { class: "panel" },
    manyPanels ? el("figcaption", {}, panelText(panel)) : null, grid);
  return { node, wide: width };
}

// Cells as large as fit. Depth runs from left to right, unless that makes cells too small or a
// tall strip of a few layers with many heads.
function layout(layers, heads, wide) {
  const room = wide - 46;
  const few = layers * heads <= 160;
  const square = state.metric === "tile"; // a map is as high as it is wide
  const fit = (n) => Math.floor(room / n);
  const strip = heads > 2 * layers && fit(heads) >= 20;
  const across = !strip && (fit(layers) >= 20 || fit(layers) >= fit(heads));
  const n = across ? layers : heads;
  const lines = across ? heads : layers;
  const cellWide = Math.max(15, Math.min(fit(n), few && lines <= 16 ? (square ? (lines > 6 ? 72 : 92) : 76) : 44));
  if (square) return { across, cell: { wide: cellWide, high: cellWide } };
  const tallest = lines > 24 ? 24 : few ? 46 : 34;
  return { across, cell: { wide: cellWide, high: Math.max(15, Math.min(cellWide, tallest)) } };
}

function axes(layers, heads, cell, across, left, top) {
  const parts = [];
  const named = state.order === "index";
  const every = (size, count) => [1, 2, 4, 5, 10, 20].find((s) => s * size >= (count > 99 ? 30 : 21)) || 40;
  const put = (n, name, horizontal, strong) => {
    const size = horizontal ? cell.wide : cell.high;
    const attributes = horizontal
      ? { x: left + (n + 0.5) * size, y: top - 7, "text-anchor": "middle" }
      : { x: left - 7, y: top + (n + 0.5) * size + 4, "text-anchor": "end" };
    parts.push(svg("text", strong ? { ...attributes, class: "strong" } : attributes, name));
  };
  const step = every(across ? cell.wide : cell.high, layers.length);
  layers.forEach((layer, n) => { if (n % step === 0) put(n, `${n === 0 && layer === 0 ? "L0" : layer}`, across); });
  if (named) {
    const skip = every(across ? cell.high : cell.wide, heads);
    for (let h = 0; h < heads; h += skip) put(h, h === 0 ? "H0" : String(h), !across);
  }
  return parts;
}

function inOrder(rows) {
  const byIndex = (a, b) => HEADS.head[a] - HEADS.head[b];
  const byKind = (a, b) => KIND_NAMES.indexOf(kindOf(a)) - KIND_NAMES.indexOf(kindOf(b));
  const column = metricColumn();
  const value = (row) => (column.values[row] === null ? -Infinity : column.values[row]);
  const byValue = (a, b) => (value(b) === value(a) ? 0 : value(b) - value(a));
  const first = state.order === "kind" || (state.order === "value" && !column) ? byKind
    : state.order === "value" ? byValue : () => 0;
  return [...rows].sort((a, b) => first(a, b) || byIndex(a, b));
}

function cellFor(row, x, y, cell) {
  const kind = kindOf(row);
  const column = metricColumn();
  const value = column ? column.values[row] : null;
  const [wide, high] = [cell.wide - 2, cell.high - 2];
  const withNumber = column && wide >= 44 && high >= 30;
  const tiled = state.metric === "tile";
  const size = tiled ? Math.min(10, wide / 3) : withNumber ? 13
    : Math.min(wide - 4, high - 6, 17) * (column ? 0.72 : 1);
  let colour = null;
  const box = svg("rect", { width: wide, height: high, rx: 3 });
  if (tiled) box.setAttribute("class", TILES.has(row) ? "clear" : "none");
  else if (!column) box.setAttribute("class", "tint");
  else if (value === null) box.setAttribute("fill", "url(#hatch)");
  else {
    const scale = currentScale(column);
    colour = rampColour(scale.at(value), scale.both);
    box.setAttribute("fill", css(colour));
  }
  const ink = colour ? inkOn(colour) : null;
  const words = column ? `, ${column.label} ${withUnit(column, value)}` : "";
  const lines = () => headLines(row, column ? [column] : defaultColumns());
  const node = svg("g", {
    class: `cell ${column ? "" : kindClass(kind)}`, transform: `translate(${x + 1} ${y + 1})`,
    role: "gridcell", tabindex: row === cursor ? 0 : -1, "data-head": row,
    "aria-label": `${longName(row)}${kind ? `, ${kind}` : ""}${words}`,
    onclick: () => { cursor = row; hideHint(); openHead(row); },
    onmouseenter: () => showHint(node, ...lines()), onmouseleave: hideHint,
    onfocus: () => { cursor = row; if (node.matches(":focus-visible")) showHint(node, ...lines()); },
    onblur: hideHint, onkeydown: (event) => mapKey(event, row),
  }, box);
  if (kind) {
    const [left, top] = tiled ? [wide - size - 2.5, 2.5]
      : [(wide - size) / 2, withNumber ? high / 2 - 15 : (high - size) / 2];
    const mark = svg("path", { d: shapeOf(kind), transform: `translate(${left} ${top}) scale(${size / 16})` });
    if (ink) { mark.setAttribute("fill", ink); mark.setAttribute("fill-opacity", 0.65); }
    else mark.setAttribute("class", column ? `ink ${kindClass(kind)}` : "ink");
    node.append(mark);
  }
  if (withNumber) {
    const text = svg("text", { x: wide / 2, y: high / 2 + 13, "text-anchor": "middle" }, number(value));
    if (ink) text.style.fill = ink;
    node.append(text);
  }
  node.append(svg("rect", { class: "ring", width: wide, height: high, rx: 3 }));
  cells.set(row, node);
  return node;
}

const currentScale = (() => {
  let last = null;
  return (column) => {
    if (!last || last.column !== column || last.wanted !== state.scale) {
      last = { column, wanted: state.scale, scale: scaleFor(column, state.scale, true) };
    }
    return last.scale;
  };
})();

// Two columns that say something of any head.
function defaultColumns() {
  return ["sink_mass", "entropy_share", "residual_share"].map(columnNamed)
    .filter((c) => c && MEASURED.includes(c)).slice(0, 2);
}

// The nearest head in the direction of the arrow, by where the heads are drawn.
function mapKey(event, row) {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    hideHint();
    openHead(row);
    return;
  }
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const jump = event.key === "Home" ? ROWS[0] : event.key === "End" ? ROWS[COUNT - 1] : null;
  if (!way && jump === null) return;
  event.preventDefault();
  const next = jump === null ? towards(row, way) : jump;
  if (next !== null) {
    focusHead(next, true);
    if (state.head !== null) change({ head: next });
  }
}

function towards(row, [dx, dy]) {
  const from = cells.get(row).getBoundingClientRect();
  let best = null;
  let least = Infinity;
  for (const [other, node] of cells) {
    if (other === row || !isShown(other)) continue;
    const box = node.getBoundingClientRect();
    const along = (box.left - from.left) * dx + (box.top - from.top) * dy;
    const aside = Math.abs((box.left - from.left) * dy) + Math.abs((box.top - from.top) * dx);
    if (along < 2) continue;
    const far = along + aside * 12;
    if (far < least) { least = far; best = other; }
  }
  return best;
}

function focusHead(row, scroll) {
  const before = cells.get(cursor);
  if (before) before.setAttribute("tabindex", -1);
  cursor = row;
  cells.get(row).setAttribute("tabindex", 0);
  cells.get(row).focus({ preventScroll: !scroll });
}

function showFilter() {
  for (const [row, node] of cells) node.classList.toggle("dim", !isShown(row));
}

function showOpen() {
  for (const [row, node] of cells) {
    node.classList.toggle("open", row === state.head);
    if (row === state.head) node.setAttribute("aria-current", "true");
    else node.removeAttribute("aria-current");
  }
}
