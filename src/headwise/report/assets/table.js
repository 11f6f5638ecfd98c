// All numbers of all heads, to sort, to read and to take away.
const FIRST_IN_TABLE = [
  "sink_mass", "entropy", "effective_keys", "mean_distance", "previous_token_score",
  "induction_score", "retrieval_score", "residual_share", "similarity",
];
let wholeTable = false;
let everyRow = false;
const PAGE_ROWS = 40;

function tableColumns() {
  const first = FIRST_IN_TABLE.map(columnNamed).filter((c) => c && MEASURED.includes(c));
  return wholeTable || first.length < 3 ? MEASURED : first;
}

function sortedRows() {
  const rows = ROWS.filter(isShown);
  if (!state.sort) return rows;
  const down = state.sort.startsWith("-");
  const name = state.sort.replace("-", "");
  if (name === "kind") {
    rows.sort((a, b) => (KIND_NAMES.indexOf(kindOf(a)) - KIND_NAMES.indexOf(kindOf(b))) * (down ? -1 : 1) || a - b);
    return rows;
  }
  const column = columnNamed(name);
  if (!column) return rows;
  // what was not measured stands at the end either way
  const key = (row) => (column.values[row] === null ? -Infinity : column.values[row] * (down ? 1 : -1));
  return rows.sort((a, b) => (key(b) === key(a) ? a - b : key(b) > key(a) ? 1 : -1));
}

function drawTable() {
  const whole = el("input", { type: "checkbox" });
  whole.checked = wholeTable;
  whole.addEventListener("change", () => { wholeTable = whole.checked; drawRows(); });
  fill(byId("table-controls"),
    el("label", { class: "tick" }, whole, `all ${MEASURED.length} columns`),
    el("button", { type: "button", class: "push", onclick: downloadTable }, "Download CSV"));
  byId("table-more").addEventListener("click", () => { everyRow = true; drawRows(); });
  drawRows();
}

function drawRows() {
  const columns = tableColumns();
  const rows = sortedRows();
  const shown = everyRow ? rows : rows.slice(0, PAGE_ROWS);
  const box = byId("rows");
  box.classList.add("all");
  const focused = document.activeElement && document.activeElement.dataset.sort;
  fill(box, el("table", {},
    el("thead", {}, el("tr", {}, sortTitle("head", null, false), HEADS.kind ? sortTitle("kind", "kind", false) : null,
      columns.map((c) => sortTitle(c.label, c.name, true, c)))),
    el("tbody", {}, shown.map((row) => el("tr", {}, el("th", { scope: "row" }, headLink(row)),
      HEADS.kind ? el("td", {}, kindOf(row)) : null,
      columns.map((c) => el("td", { class: `n${sortName() === c.name ? " sorted" : ""}` }, number(c.values[row]))))))));
  if (focused !== undefined) {
    const again = [...box.querySelectorAll(".sort")].find((b) => b.dataset.sort === focused);
    if (again) again.focus();
  }
  const more = byId("table-more");
  more.hidden = shown.length === rows.length;
  more.textContent = `Show all ${rows.length} heads`;
}

const sortName = () => (state.sort || "").replace("-", "") || null;

function sortTitle(text, name, numeric, column = null) {
  const active = name === sortName();
  const down = active && (state.sort || "").startsWith("-");
  const next = name === null ? null : numeric ? (active && down ? name : `-${name}`) : active && !down ? `-${name}` : name;
  const sign = !active || name === null ? "" : down ? " ↓" : " ↑";
  return el("th", { scope: "col", class: numeric ? "n" : null,
    "aria-sort": active && name !== null ? (down ? "descending" : "ascending") : null },
  el("button", { type: "button", class: "sort", "data-sort": name || "",
    title: column ? `${column.name}: ${column.description}` : null,
    onclick: () => change({ sort: next }) }, text + sign));
}

function csvText() {
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    let text = String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`; // no formulas
    return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  const places = manyPanels ? ["stack", "attention"] : [];
  const titles = [...places, "layer", "head", ...(HEADS.kind ? ["kind"] : []), ...ATLAS.columns.map((c) => c.name)];
  const lines = ROWS.map((row) => [
    ...places.map((key) => panelOf(row)[key]), HEADS.layer[row], HEADS.head[row],
    ...(HEADS.kind ? [kindOf(row)] : []), ...ATLAS.columns.map((c) => c.values[row]),
  ]);
  return [titles, ...lines].map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
}

function downloadTable() {
  const address = URL.createObjectURL(new Blob([csvText()], { type: "text/csv" }));
  const name = ATLAS.title.replace(/[^\w.-]+/g, "-").replace(/^[-.]+/, "") || "atlas";
  const link = el("a", { href: address, download: `${name}.csv` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
