// What the colours of the map mean: a scale, with the number of heads along it.
function drawLegend() {
  const column = metricColumn();
  fill(byId("scale-legend"), column ? [el("h3", {}, column.label),
    el("p", { class: "about" }, column.description, column.unit ? ` Unit: ${unitLong(column.unit)}.` : ""),
    rampFigure(column)] : []);
}

function rampFigure(column) {
  const [wide, high, bars] = [400, 78, 40];
  const scale = scaleFor(column, state.scale, true);
  const counts = new Array(bars).fill(0);
  for (const value of sortedValues(column)) {
    counts[Math.min(bars - 1, Math.floor(scale.at(value) * bars))] += 1;
  }
  const most = Math.max(...counts);
  const missing = COUNT - sortedValues(column).length;
  const parts = [];
  counts.forEach((count, i) => {
    const x = (i * wide) / bars;
    const colour = css(rampColour((i + 0.5) / bars, scale.both));
    if (count) {
      const tall = Math.max(1.5, 40 * (count / most));
      parts.push(svg("rect", { x: x + 0.5, y: 42 - tall, width: wide / bars - 1, height: tall,
        fill: "var(--faint)", "fill-opacity": 0.55 }));
    }
    parts.push(svg("rect", { x, y: 45, width: wide / bars + 0.6, height: 10, fill: colour }));
  });
  let end = -1e9;
  for (const tick of scale.ticks) {
    const x = tick.at * wide;
    const half = tick.text.length * 3.1;
    if (x - half < end + 6) continue;
    end = x + half;
    parts.push(svg("line", { x1: x, x2: x, y1: 55, y2: 59, class: "axis" }));
    const anchor = x < half ? "start" : x > wide - half ? "end" : "middle";
    parts.push(svg("text", { x, y: 71, "text-anchor": anchor }, tick.text));
  }
  const words = `${plural(sortedValues(column).length, "head")} from ` +
    `${number(sortedValues(column)[0])} to ${number(sortedValues(column).at(-1))}`;
  return el("div", { class: "ramp" },
    svg("svg", { viewBox: `-2 0 ${wide + 4} ${high}`, width: "100%", role: "img",
      "aria-label": `Colour scale of ${column.label}, ${scale.mode}: ${words}` }, parts),
    missing ? el("p", { class: "about" }, `${plural(missing, "head")} not measured (hatched).`) : null);
}
