// Any number against any other, a point a head.
// A plot's points, and which of them the arrow keys are at; the open head is marked in every plot.
const boardOf = () => ({ nodes: new Map(), cursor: 0 });
const related = boardOf();
const boards = [related];

function scatterPair() {
  const names = MEASURED.map((column) => column.name);
  const pick = (wanted, otherwise) => columnNamed([wanted, ...otherwise].find((n) => names.includes(n)) || names[0]);
  return [pick(state.x, ["sink_mass", "entropy"]), pick(state.y, ["residual_share", "induction_score", names[1]])];
}

function drawScatter() {
  const box = byId("scatter");
  if (MEASURED.length < 2) {
    box.hidden = true;
    byId("relations").hidden = !PAIRS.size;
    return;
  }
  const [cx, cy] = scatterPair();
  const choose = (key, now) => el("select", { onchange: (event) => change({ [key]: event.target.value }) },
    ATLAS.groups.map((name) => {
      const columns = MEASURED.filter((c) => c.group === name);
      return columns.length ? el("optgroup", { label: name }, columns.map((c) =>
        el("option", { value: c.name, selected: c === now }, c.label))) : null;
    }));
  const plot = el("div", { class: "plot" });
  const words = el("p", { class: "about" });
  fill(box, el("h3", {}, "Two numbers of every head"),
    el("div", { class: "controls" }, el("label", { class: "field" }, "Across", choose("x", cx)),
      el("label", { class: "field" }, "Up", choose("y", cy))), plot, words);
  const draw = () => { fill(plot, scatterDrawing(related, cx, cy, plot.clientWidth || 520)); markPoints(); };
  draw();
  const rows = ROWS.filter((row) => cx.values[row] !== null && cy.values[row] !== null);
  const rho = rankCorrelation(rows.map((r) => cx.values[r]), rows.map((r) => cy.values[r]));
  words.textContent = rho === null ? "" :
    `Rank correlation ${rho.toFixed(2)} over ${plural(rows.length, "head")} (Spearman).`;
}

// under(x, y, rows, right), over(x, y, rows, size): what stands behind the points, and before them.
function scatterDrawing(board, cx, cy, wide, { sy = scaleFor(cy), under = () => [], over = () => [] } = {}) {
  const high = Math.round(Math.min(440, Math.max(300, wide * 0.75)));
  const [left, right, top, bottom] = [50, 12, 10, 40];
  const sx = scaleFor(cx);
  const x = (t) => left + 8 + t * (wide - left - right - 16);
  const y = (t) => high - bottom - 8 - t * (high - top - bottom - 16);
  const parts = [];
  for (const tick of sx.ticks) {
    parts.push(svg("line", { x1: x(tick.at), x2: x(tick.at), y1: top, y2: high - bottom, class: "axis" }),
      svg("text", { x: x(tick.at), y: high - bottom + 15, "text-anchor": "middle" }, tick.text));
  }
  for (const tick of sy.ticks) {
    parts.push(svg("line", { x1: left, x2: wide - right, y1: y(tick.at), y2: y(tick.at), class: "axis" }),
      svg("text", { x: left - 6, y: y(tick.at) + 4, "text-anchor": "end" }, tick.text));
  }
  const title = (column, scale) => `${column.label}${unitText(column.unit) ? `, ${unitText(column.unit)}` : ""}` +
    `${scale.mode.includes("log") ? `, ${scale.mode} scale` : ""}`;
  parts.push(svg("text", { x: wide - right, y: high - 6, "text-anchor": "end", class: "strong" }, title(cx, sx)),
    svg("text", { x: 12, y: top, "text-anchor": "end", class: "strong", transform: `rotate(-90 12 ${top})` },
      title(cy, sy)));
  board.nodes.clear();
  const rows = ROWS.filter((row) => cx.values[row] !== null && cy.values[row] !== null)
    .sort((a, b) => cx.values[a] - cx.values[b] || cy.values[a] - cy.values[b]);
  if (rows.length && !rows.includes(board.cursor)) board.cursor = rows[0];
  const px = (row) => x(sx.at(cx.values[row]));
  const py = (value) => y(sy.at(value));
  const size = rows.length > 500 ? 9 : rows.length > 120 ? 11.5 : 14;
  const points = rows.map((row, i) => {
    const node = svg("g", { class: `point ${kindClass(kindOf(row))}`, role: "button",
      tabindex: row === board.cursor ? 0 : -1, transform:
        `translate(${(px(row) - size / 2).toFixed(1)} ${(py(cy.values[row]) - size / 2).toFixed(1)})`,
      "aria-label": `${longName(row)}: ${cx.label} ${number(cx.values[row])}, ${cy.label} ${number(cy.values[row])}`,
      onclick: () => { hideHint(); openHead(row); },
      onmouseenter: () => showHint(node, ...headLines(row, [cx, cy])), onmouseleave: hideHint,
      onfocus: () => { if (node.matches(":focus-visible")) showHint(node, ...headLines(row, [cx, cy])); },
      onblur: hideHint,
      onkeydown: (event) => pointKey(event, board, rows, i) },
    svg("path", { d: shapeOf(kindOf(row)), transform: `scale(${size / 16})`, "vector-effect": "non-scaling-stroke" }));
    board.nodes.set(row, node);
    return node;
  });
  return svg("svg", { width: wide, height: high, viewBox: `0 0 ${wide} ${high}`, role: "group",
    "aria-label": `${rows.length} heads by ${cx.label} and ${cy.label}; arrow keys go from left to right` },
  parts, under(px, py, rows, wide - right), points, over(px, py, rows, size));
}

function pointKey(event, board, rows, i) {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    hideHint();
    openHead(rows[i]);
    return;
  }
  const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
  const next = step ? rows[i + step] : undefined;
  if (next === undefined) return;
  event.preventDefault();
  board.nodes.get(board.cursor)?.setAttribute("tabindex", -1);
  board.cursor = next;
  board.nodes.get(next).setAttribute("tabindex", 0);
  board.nodes.get(next).focus();
}

function markPoints() {
  for (const [row, node] of boards.flatMap((board) => [...board.nodes])) {
    node.classList.toggle("dim", !isShown(row));
    node.classList.toggle("open", row === state.head);
  }
}

// Spearman: the correlation of ranks, ties sharing their mean rank; null if one does not vary.
function rankCorrelation(a, b) {
  const ranks = (values) => {
    const order = values.map((_, i) => i).sort((i, j) => values[i] - values[j]);
    const out = new Array(values.length);
    for (let i = 0; i < order.length;) {
      let j = i;
      while (j < order.length && values[order[j]] === values[order[i]]) j += 1;
      for (let k = i; k < j; k += 1) out[order[k]] = (i + j - 1) / 2;
      i = j;
    }
    return out;
  };
  if (a.length < 3) return null;
  const [p, q] = [ranks(a), ranks(b)];
  const middle = (a.length - 1) / 2;
  let [pq, pp, qq] = [0, 0, 0];
  for (let i = 0; i < p.length; i += 1) {
    pq += (p[i] - middle) * (q[i] - middle);
    pp += (p[i] - middle) ** 2;
    qq += (q[i] - middle) ** 2;
  }
  return pp && qq ? pq / Math.sqrt(pp * qq) : null;
}
