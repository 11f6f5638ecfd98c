// One head: why it has its kind, a piece of its map, all its numbers with their place among all.
const card = byId("card");
let explained = false; // descriptions of all numbers are open
let large = false;
let cardTile = null;

function drawCard() {
  const row = state.head;
  cardTile = null;
  card.hidden = row === null;
  if (row === null) {
    fill(card);
    return;
  }
  const kind = kindOf(row);
  card.setAttribute("aria-label", longName(row));
  card.dataset.row = row;
  card.classList.toggle("large", large);
  fill(card,
    el("header", {}, el("h2", {}, longName(row)), el("div", { class: "walk" },
      walkButton("‹", "Head before", row - 1), walkButton("›", "Next head", row + 1),
      el("button", { type: "button", class: "quiet", "aria-label": "Close", onclick: closeCard }, "✕"))),
    kind ? el("p", { class: "is" }, glyph(kind), kind) : null,
    HEADS.reason[row] ? el("p", { class: "reason" }, HEADS.reason[row]) : null,
    tilePart(row), twinsPart(row), numbersPart(row));
  if (cardTile) cardTile.paint();
  card.scrollTop = 0;
}

function walkButton(sign, words, target) {
  return el("button", { type: "button", class: "quiet", "aria-label": words,
    disabled: target < 0 || target >= COUNT,
    onclick: () => openHead(target) }, sign);
}

function closeCard() {
  const row = state.head;
  change({ head: null });
  if (row !== null && cells.has(row)) focusHead(row, false);
}

function tilePart(row) {
  const tiles = TILES.get(row) || [];
  if (!tiles.length) return null;
  const box = el("div", {});
  const show = (tile) => {
    cardTile = tileFigure(tile);
    fill(box, cardTile.figure);
  };
  show(tiles[0]);
  const choose = tiles.length > 1 ? el("select", { "aria-label": "Which piece",
    onchange: (event) => { show(tiles[Number(event.target.value)]); cardTile.paint(); } },
  tiles.map((tile, i) => el("option", { value: i }, tile.name || `piece ${i + 1}`))) : null;
  return el("div", {}, el("div", { class: "between" }, el("h3", {}, "A piece of its map"), choose,
    el("button", { type: "button", class: "link enlarge", onclick: (event) => {
      large = !large;
      card.classList.toggle("large", large);
      event.target.textContent = large ? "smaller" : "larger";
    } }, large ? "smaller" : "larger")), box);
}

function twinsPart(row) {
  const twins = ATLAS.neighbours[row];
  if (!twins || !twins.length) return null;
  return el("div", {}, el("h3", {}, "Most similar heads"), el("ul", { class: "twins" },
    twins.map(([other, similarity, error]) => el("li", {}, headLink(other),
      el("span", { class: "n" }, `${number(similarity)}${error ? plusMinus(error) : ""}`)))));
}

function numbersPart(row) {
  const toggle = el("button", { type: "button", class: "link", onclick: () => {
    explained = !explained;
    for (const what of card.querySelectorAll(".what")) what.hidden = !explained;
    toggle.textContent = explained ? "hide what they mean" : "say what they mean";
  } }, explained ? "hide what they mean" : "say what they mean");
  const missing = ATLAS.columns.filter((c) => !MEASURED.includes(c)).map((column) => column.label);
  return el("div", {},
    ATLAS.groups.map((name, i) => {
      const columns = MEASURED.filter((column) => column.group === name);
      if (!columns.length) return null;
      return el("div", {}, el("div", { class: "between" }, el("h3", {}, name), i === 0 ? toggle : null),
        el("dl", { class: "metrics" }, columns.map((column) => metricLine(column, row))));
    }),
    missing.length ? el("p", { class: "reason" }, `Not measured on any head: ${missing.join(", ")}.`) : null);
}

function metricLine(column, row) {
  const value = column.values[row];
  const rank = rankOf(column, row);
  const error = column.spread ? column.spread[row] : null;
  const what = el("dd", { class: "what" }, column.description || "No description was given.",
    column.unit ? ` (${unitLong(column.unit)})` : "");
  what.hidden = !explained;
  const name = el("button", { type: "button", class: "name", "aria-expanded": String(explained),
    title: column.description, onclick: () => {
      what.hidden = !what.hidden;
      name.setAttribute("aria-expanded", String(!what.hidden));
    } }, column.label);
  const unit = unitText(column.unit);
  const shown = value === null ? el("span", { class: "value" }, el("small", {}, "not measured"))
    : el("span", { class: "value" }, number(value),
      el("small", {}, error ? plusMinus(error) : "",
        unit ? ` ${unit}` : "",
        column.before ? `, ${number(column.before[row])} → ${number(column.after[row])}` : ""));
  return el("div", { class: "metric" }, el("dt", {}, name, shown), what,
    rank === null ? null : el("dd", { class: "place" }, crowd(column, value), el("span", {},
      allSame(column) ? "the same in all" : `${rank} of ${sortedValues(column).length}`)));
}

// Where this head stands among all: a stroke for each, a thick one for this.
function crowd(column, value) {
  const scale = scaleFor(column);
  const values = sortedValues(column);
  const step = Math.max(1, Math.floor(values.length / 300));
  let path = "";
  for (let i = 0; i < values.length; i += step) path += `M${(scale.at(values[i]) * 200).toFixed(1)} 3v8`;
  const x = (scale.at(value) * 200).toFixed(1);
  return svg("svg", { viewBox: "-2 0 204 14", height: 14, preserveAspectRatio: "none",
    "aria-hidden": "true" },
  svg("path", { d: path, class: "crowd", "vector-effect": "non-scaling-stroke" }),
  svg("path", { d: `M${x} 0v14`, class: "here", "vector-effect": "non-scaling-stroke" }));
}
