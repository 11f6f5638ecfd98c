// Candidates to do without: heads parked on sinks that write little, and heads with a twin.
const limits = { ...ATLAS.thresholds, strict: false };

function sinkOf(row) {
  const values = ["sink_mass", "found_sink_mass"].map(columnNamed).filter(Boolean)
    .map((column) => column.values[row]).filter((value) => value !== null);
  return values.length ? Math.max(...values) : null;
}

function writesOf(row) {
  const column = columnNamed("residual_share");
  return column ? column.values[row] : null;
}

// Parked on sinks and, where that was measured, among those that write least.
function dormantHeads() {
  const writes = columnNamed("residual_share");
  const most = writes ? quantile(sortedValues(writes), limits.writes / 100) : null;
  const rows = ROWS.filter((row) => {
    const sink = sinkOf(row);
    const write = writesOf(row);
    return sink !== null && sink >= limits.sink && (most === null || (write !== null && write <= most));
  });
  return { rows: rows.sort((a, b) => writesOf(a) - writesOf(b) || sinkOf(b) - sinkOf(a)), most };
}

// From those that write most to those that write least: a head is listed when one that was kept
// before it is as similar as the limit. So every head listed has a twin that is not.
function redundantHeads() {
  const order = [...ROWS].sort((a, b) => (writesOf(b) ?? -1) - (writesOf(a) ?? -1) || a - b);
  const kept = [];
  const found = [];
  for (const row of order) {
    let twin = null;
    let best = limits.alike;
    for (const other of kept) {
      const similarity = similarityOf(row, other);
      if (similarity === null || similarity < best) continue;
      if (limits.strict && !(similarityOf(row, other, "similarity_rest") >= limits.alike)) continue;
      best = similarity;
      twin = other;
    }
    if (twin === null) kept.push(row);
    else found.push({ row, twin, similarity: best });
  }
  return found.sort((a, b) => b.similarity - a.similarity);
}

const sinksKnown = () => ROWS.some((row) => sinkOf(row) !== null);
const likenessKnown = () => PAIRS.size > 0 || ATLAS.neighbours.some((list) => list.length);

function drawUnused() {
  byId("unused").hidden = Boolean(ATLAS.changes) || (!sinksKnown() && !likenessKnown());
  if (byId("unused").hidden) return;
  drawDormant();
  drawRedundant();
}

function limitField(text, key, step, least, most, draw) {
  const input = el("input", { type: "number", step, min: least, max: most, value: limits[key] });
  input.addEventListener("change", () => {
    const value = Number(input.value);
    if (input.value === "" || !Number.isFinite(value)) return;
    limits[key] = Math.min(Math.max(value, least), most);
    input.value = limits[key];
    draw();
  });
  return el("label", { class: "field" }, text, input);
}

function drawDormant() {
  const box = byId("dormant");
  if (!sinksKnown()) {
    fill(box, el("h3", {}, "Dormant"), el("p", { class: "about" }, "Sinks were not measured."));
    return;
  }
  const { rows, most } = dormantHeads();
  const writes = columnNamed("residual_share");
  const effect = columnNamed("effect");
  const again = box.querySelector(".controls");
  const controls = again || el("div", { class: "controls" },
    limitField("Mass on sinks, at least", "sink", 0.05, 0, 1, drawDormant),
    writes ? limitField("Writes least, lowest %", "writes", 5, 0, 100, drawDormant) : null);
  const bound = most === null ? "what they write was not measured"
    : `at most ${number(most)} of the residual stream`;
  fill(box, el("h3", {}, `Dormant: ${plural(rows.length, "head")}`),
    el("p", { class: "about" }, "Most of the attention lies on sinks, and little is written: ", bound, "."),
    controls, shortTable(["head", ...(HEADS.kind ? ["kind"] : []), "on sinks", ...(writes ? ["writes"] : []),
      ...(effect ? ["effect"] : [])],
      rows.map((row) => [headLink(row), ...(HEADS.kind ? [el("span", {}, kindOf(row))] : []),
        number(sinkOf(row)), ...(writes ? [number(writesOf(row))] : []),
        ...(effect ? [number(effect.values[row])] : [])])),
    copyable(rows, "dormant"));
}

function drawRedundant() {
  const box = byId("redundant");
  if (!likenessKnown()) {
    fill(box, el("h3", {}, "Redundant"), el("p", { class: "about" }, "Similarities were not measured."));
    return;
  }
  const found = redundantHeads();
  const again = box.querySelector(".controls");
  const tick = el("input", { type: "checkbox" });
  tick.checked = limits.strict;
  tick.addEventListener("change", () => { limits.strict = tick.checked; drawRedundant(); });
  const rest = PAIRS.has("similarity_rest");
  const controls = again || el("div", { class: "controls" },
    limitField("Similarity, at least", "alike", 0.01, 0, 1, drawRedundant),
    rest ? el("label", { class: "tick" }, tick, "with the first key left out, too") : null);
  fill(box, el("h3", {}, `Redundant: ${plural(found.length, "head")}`),
    el("p", { class: "about" }, "Attends as another head does that writes more and is not listed.",
      PAIRS.size ? "" : " Only the most similar heads of each were compared."),
    controls, shortTable(["head", "like", "cosine", rest ? "without first key" : "on sinks"],
      found.map(({ row, twin, similarity }) => [headLink(row), headLink(twin), number(similarity),
        number(rest ? similarityOf(row, twin, "similarity_rest") : sinkOf(row))])),
    copyable(found.map(({ row }) => row), "redundant"));
}

// The first rows of a table, the others on request.
function shortTable(titles, rows, first = 8) {
  if (!rows.length) return null;
  const body = el("tbody", {});
  const lines = rows.map((cells) => el("tr", {}, cells.map((cell) =>
    el("td", { class: typeof cell === "string" ? "n" : null }, cell))));
  fill(body, lines.slice(0, first));
  const more = rows.length > first ? el("button", { type: "button", class: "more", onclick: (event) => {
    fill(body, lines);
    event.target.remove();
  } }, `Show all ${rows.length}`) : null;
  return el("div", {}, el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, titles.map((title) =>
      el("th", { scope: "col", class: /^(head|like|kind|number)/.test(title) ? null : "n" }, title)))), body)), more);
}

// [(layer, head), ...] for code; one list for each stack and attention, where there are several.
function copyable(rows, what) {
  if (!rows.length) return null;
  const ordered = [...rows].sort((a, b) => a - b);
  const pairs = (list) => `[${list.map((row) => `(${HEADS.layer[row]}, ${HEADS.head[row]})`).join(", ")}]`;
  const named = (panel) => `(${JSON.stringify(panel.stack)}, ${JSON.stringify(panel.attention)})`;
  const lists = ATLAS.panels.map((panel, i) => [panel, ordered.filter((row) => HEADS.panel[row] === i)])
    .filter(([, list]) => list.length).map(([panel, list]) => `${named(panel)}: ${pairs(list)}`);
  const text = manyPanels ? `{${lists.join(",\n ")}}` : pairs(ordered);
  return copyBlock(text, manyPanels ? "(stack, attention): [(layer, head), ...]" : "[(layer, head), ...]", what);
}

function copyBlock(text, title, what) {
  const pre = el("pre", { tabindex: 0, "data-list": what }, text);
  const button = el("button", { type: "button", class: "quiet", onclick: async () => {
    let done = false;
    try {
      await navigator.clipboard.writeText(text);
      done = true;
    } catch {
      const range = document.createRange(); // without rights to the clipboard: select, then copy
      range.selectNodeContents(pre);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "copied" : "press Ctrl+C";
    setTimeout(() => { button.textContent = "copy"; }, 1600);
  } }, "copy");
  return el("div", { class: "copy" }, el("div", {}, el("span", {}, title), button), pre);
}
