// Effects of taking heads out, against one of the scores of what heads look like.
const caused = boardOf();
boards.push(caused);

function drawCause() {
  const cause = ATLAS.cause;
  byId("cause").hidden = !cause;
  if (!cause) return;
  const effect = columnNamed("effect");
  const name = state.against && cause.against[state.against] ? state.against : Object.keys(cause.against)[0];
  const [score, found] = [columnNamed(name), cause.against[name]];
  byId("cause-about").textContent = cause.about;
  fill(byId("cause-controls"), el("label", { class: "field" }, "Across", causeChoice(cause, name)));
  const plot = el("div", { class: "plot" });
  const rho = found.rho === null ? "" :
    `Rank correlation of ${score.label} with the size of the effect: ${found.rho.toFixed(2)} over ${
      plural(found.heads, "head")} (Spearman).`;
  const estimates = cause.estimates.filter(([, value]) => value !== null)
    .map(([what, value]) => `the ${what} estimate ${value.toFixed(2)}`);
  fill(byId("cause-plot"), plot, el("p", { class: "about" }, rho, estimates.length
    ? ` With the effect itself: ${estimates.join(", ")}.` : ""));
  const marks = new Map([...found.over.map((row) => [row, "over"]), ...found.under.map((row) => [row, "under"])]);
  fill(plot, scatterDrawing(caused, score, effect, plot.clientWidth || 520, {
    sy: signedScale(effect),
    under: (x, y, rows, right) => causeBars(effect, x, y, rows, right),
    over: (x, y, rows, size) => causeNames(effect, marks, x, y, rows, size),
  }));
  markPoints();
  fill(byId("cause-heads"),
    found.sentences.length ? el("p", { class: "said", id: "cause-said" }, found.sentences.join(" ")) : null,
    ...causeList("Looks important, does little", found.over, score, effect, cause.metric,
      `In the upper quarter by ${score.label}, in the lower half by the size of the effect. Ringed in the plot.`),
    ...causeList("Does much, does not look it", found.under, score, effect, cause.metric,
      `In the upper quarter by the size of the effect, in the lower half by ${score.label}. Ringed with dashes.`),
  );
}

function causeChoice(cause, name) {
  return el("select", { onchange: (event) => change({ against: event.target.value }) },
    ATLAS.groups.map((group) => {
      const columns = MEASURED.filter((c) => c.group === group && cause.against[c.name]);
      return columns.length ? el("optgroup", { label: group }, columns.map((c) =>
        el("option", { value: c.name, selected: c.name === name }, c.label))) : null;
    }));
}

// The line of no effect, and two standard errors of each head.
function causeBars(effect, x, y, rows, right) {
  const [least, most] = [sortedValues(effect)[0], sortedValues(effect).at(-1)];
  const inside = (value) => Math.min(Math.max(value, Math.min(least, 0)), Math.max(most, 0));
  const bars = effect.spread && rows.length <= 600 ? rows.filter((row) => effect.spread[row] !== null) : [];
  return [
    least <= 0 && most >= 0 ? svg("line", { class: "zero", x1: 50, x2: right, y1: y(0), y2: y(0) }) : null,
    ...bars.map((row) => svg("line", { class: "bars", x1: x(row), x2: x(row),
      y1: y(inside(effect.values[row] - 2 * effect.spread[row])),
      y2: y(inside(effect.values[row] + 2 * effect.spread[row])) })),
  ];
}

// Rings and names of the heads that are listed; a name that would lie on another is left to the list.
function causeNames(effect, marks, x, y, rows, size) {
  const marked = rows.filter((row) => marks.has(row));
  const ring = size * 0.8;
  const taken = marked.map((row) => [x(row) - ring, y(effect.values[row]) - ring,
    x(row) + ring, y(effect.values[row]) + ring]);
  const parts = [];
  for (const row of marked) {
    const [at, up] = [x(row), y(effect.values[row])];
    parts.push(svg("circle", { class: `called ${marks.get(row)}`, cx: at, cy: up, r: ring }));
    const wide = 6.6 * HEADS.name[row].length;
    const left = at - size - wide > 56;
    const spots = [[at, up - size - 4, "middle"], [at, up + size + 12, "middle"],
      ...(left ? [[at - size - 4, up + 4, "end"]] : [])];
    const free = spots.find(([nx, ny, anchor]) => {
      const x1 = anchor === "end" ? nx - wide : nx - wide / 2;
      const box = [x1 - 2, ny - 11, x1 + wide + 2, ny + 3];
      const clear = x1 > 52 && ny > 12 && taken.every((b) => b[2] < box[0] || b[0] > box[2] || b[3] < box[1] || b[1] > box[3]);
      if (clear) taken.push(box);
      return clear;
    });
    if (free) {
      parts.push(svg("text", { class: "name", x: free[0], y: free[1], "text-anchor": free[2] }, HEADS.name[row]));
    }
  }
  return parts;
}

function causeList(title, rows, score, effect, metric, about) {
  const measured = sortedValues(score).length;
  const sizes = effect.values.map((value) => (value === null ? null : Math.abs(value)));
  const place = (row) => 1 + sizes.filter((size) => size !== null && size > sizes[row]).length;
  const error = (row) => (effect.spread && effect.spread[row] !== null ? plusMinus(effect.spread[row]) : "");
  return [
    el("h3", {}, title),
    el("p", { class: "about" }, rows.length ? about : "No head does by this score."),
    shortTable(["head", score.label, "rank", `${metric} changes by`, "rank by size"], rows.map((row) => [
      headLink(row), number(score.values[row]), `${rankOf(score, row)} of ${measured}`,
      `${effect.values[row] > 0 ? "+" : ""}${number(effect.values[row])}${error(row)}`, `${place(row)}`,
    ])),
  ];
}
