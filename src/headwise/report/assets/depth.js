// Small multiples over depth: what layers do, and how the heads of each layer spread.
const FIRST_OVER_DEPTH = [
  "sink_mass", "entropy_share", "mean_distance", "local_8", "induction_score",
  "previous_token_score", "retrieval_score", "residual_share", "similarity",
];
let allOverDepth = false;
const depthCharts = []; // { mark(layer) } of every chart, so that they point at the same layer

function drawDepth() {
  const layers = ATLAS.layers.columns.filter((c) => c.values.some((v) => v !== null));
  const first = FIRST_OVER_DEPTH.map(columnNamed).filter((c) => c && MEASURED.includes(c));
  const heads = allOverDepth || first.length < 3 ? MEASURED : first;
  depthCharts.length = 0;
  const grid = getComputedStyle(byId("multiples")).gridTemplateColumns; // "260px 260px 260px"
  const wide = Math.max(120, Math.floor(Number.parseFloat(grid)) || 260);
  const charts = [
    ...layers.map((column) => depthChart(column, layerSeries(column), false, wide)),
    ...heads.map((column) => depthChart(column, headSeries(column), true, wide)),
  ];
  fill(byId("multiples"), charts);
  const about = byId("depth-about");
  const several = manyPanels;
  const names = manyPanels ? ATLAS.panels.map((panel, i) => el("span", { class: "series" },
    svg("svg", { width: 26, height: 8, "aria-hidden": "true" },
      svg("path", { d: "M1 4H25", class: `mean s${i % 3}` })), panelText(panel))) : [];
  byId("depth").hidden = !charts.length;
  fill(about, layers.length ? "Numbers of the layers first, then of the heads. " : "",
    "For heads, the line is the mean of a layer's heads, dots are single heads, the band their range. ",
    several ? el("span", {}, names) : null);
  const more = byId("depth-more");
  more.hidden = MEASURED.length <= first.length || first.length < 3;
  more.textContent = allOverDepth ? "Show fewer" : `Show all ${MEASURED.length} numbers of the heads`;
}

// [{ style, points: [{ layer, mean, low, high, all }] }], one a stack
function layerSeries(column) {
  const stacks = [...new Set(ATLAS.layers.stack)];
  return stacks.map((stack) => ({
    style: Math.max(0, ATLAS.panels.findIndex((panel) => panel.stack === stack)),
    name: stack,
    points: ATLAS.layers.layer.map((layer, i) => ({ layer, mean: column.values[i], stack: ATLAS.layers.stack[i] }))
      .filter((p) => p.stack === stack && p.mean !== null),
  }));
}

function headSeries(column) {
  return ATLAS.panels.map((panel, i) => {
    const byLayer = new Map();
    for (const row of ROWS) {
      const value = column.values[row];
      if (HEADS.panel[row] !== i || value === null || value === undefined) continue;
      if (!byLayer.has(HEADS.layer[row])) byLayer.set(HEADS.layer[row], []);
      byLayer.get(HEADS.layer[row]).push(value);
    }
    const points = [...byLayer].sort((a, b) => a[0] - b[0]).map(([layer, all]) => ({
      layer, all, mean: all.reduce((a, b) => a + b, 0) / all.length,
      low: Math.min(...all), high: Math.max(...all),
    }));
    return { style: i, name: panelText(panel), points };
  });
}

function depthChart(column, series, ofHeads, wide) {
  const [high, left, bottom, top] = [128, 38, 18, 8];
  const points = series.flatMap((s) => s.points);
  const lows = points.map((p) => (ofHeads ? p.low : p.mean));
  const highs = points.map((p) => (ofHeads ? p.high : p.mean));
  const fake = { values: [...lows, ...highs], unit: column.unit };
  const scale = scaleFor(fake);
  const last = Math.max(1, ...points.map((p) => p.layer));
  const x = (layer) => left + 4 + (layer / last) * (wide - left - 10);
  const y = (value) => top + (1 - scale.at(value)) * (high - top - bottom);
  const zero = scale.ticks.filter((tick) => tick.text === "0");
  const ends = [...new Set([scale.ticks[0], ...zero, scale.ticks.at(-1)])].filter(Boolean);
  const parts = ends.flatMap((tick) => {
    const at = top + (1 - tick.at) * (high - top - bottom);
    return [svg("line", { x1: left, x2: wide, y1: at, y2: at, class: "axis" }),
      svg("text", { x: left - 5, y: at + 4, "text-anchor": "end" }, tick.text)];
  });
  parts.push(svg("text", { x: x(0), y: high - 3, "text-anchor": "middle" }, "0"),
    svg("text", { x: x(last), y: high - 3, "text-anchor": "end" }, `layer ${last}`));
  for (const one of series) {
    const style = `s${one.style % 3}`;
    if (ofHeads && one.points.length) {
      const there = one.points.map((p) => `${x(p.layer).toFixed(1)} ${y(p.high).toFixed(1)}`);
      const back = [...one.points].reverse().map((p) => `${x(p.layer).toFixed(1)} ${y(p.low).toFixed(1)}`);
      parts.push(svg("path", { d: `M${there.join("L")}L${back.join("L")}Z`, class: `band ${style}` }));
      const dots = one.points.flatMap((p) => p.all.map((v) =>
        `M${(x(p.layer) - 1.3).toFixed(1)} ${y(v).toFixed(1)}a1.3 1.3 0 1 0 2.6 0a1.3 1.3 0 1 0 -2.6 0Z`));
      parts.push(svg("path", { d: dots.join(""), class: `dots ${style}` }));
    }
    const line = one.points.map((p) => `${x(p.layer).toFixed(1)} ${y(p.mean).toFixed(1)}`);
    if (line.length === 1) line.push(line[0]); // a round cap makes a point of it
    if (line.length) parts.push(svg("path", { d: `M${line.join("L")}`, class: `mean ${style}` }));
  }
  const now = svg("path", { class: "now" });
  const said = el("span", {}, unitText(column.unit));
  const drawing = svg("svg", { viewBox: `0 0 ${wide} ${high}`, width: wide, height: high, role: "img",
    "aria-label": depthWords(column, series) }, parts, now);
  const chart = {
    mark(layer) {
      if (layer === null) {
        now.removeAttribute("d");
        said.textContent = unitText(column.unit);
        return;
      }
      now.setAttribute("d", `M${x(layer).toFixed(1)} ${top}V${high - bottom}`);
      const there = series.flatMap((s) => s.points.filter((p) => p.layer === layer));
      said.textContent = `L${layer}: ${there.length ? there.map((p) => number(p.mean)).join(" / ") : "–"}`;
    },
  };
  depthCharts.push(chart);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * wide;
    const layer = Math.round(((at - left - 4) / (wide - left - 10)) * last);
    for (const each of depthCharts) each.mark(Math.min(Math.max(layer, 0), last));
  });
  drawing.addEventListener("pointerleave", () => { for (const each of depthCharts) each.mark(null); });
  return el("figure", { class: "multiple", title: column.description },
    el("figcaption", {}, column.label, said), drawing);
}

function depthWords(column, series) {
  const parts = series.filter((s) => s.points.length).map((s) => {
    const top = s.points.reduce((a, b) => (b.mean > a.mean ? b : a));
    const bottom = s.points.reduce((a, b) => (b.mean < a.mean ? b : a));
    return `${s.name ? `${s.name}: ` : ""}highest at layer ${top.layer} (${number(top.mean)}), ` +
      `lowest at layer ${bottom.layer} (${number(bottom.mean)})`;
  });
  return `${column.label} over depth. ${parts.join("; ")}`;
}
