// Draw everything; a part that fails says so and leaves the others standing.
function part(id, draw) {
  return (...given) => {
    try {
      draw(...given);
    } catch (error) {
      PAGE.dataset.errors = String(Number(PAGE.dataset.errors) + 1);
      PAGE.dataset.error = `${id}: ${error.message}`;
      const box = byId(id);
      if (box) box.append(el("p", { class: "note" }, `This part could not be drawn: ${error.message}`));
      console.error(error);
    }
  };
}

Object.assign(state, readAddress());
const parts = {
  top: part("top", drawTop), kinds: part("map", drawKinds), controls: part("map", drawMapControls),
  map: part("map", drawMap), legend: part("map", drawLegend), card: part("card", drawCard),
  cause: part("cause", drawCause), depth: part("depth", drawDepth), changes: part("changes", drawChanges), unused: part("unused", drawUnused),
  scatter: part("relations", drawScatter), alike: part("relations", drawAlike),
  table: part("table", drawTable), rows: part("table", drawRows), source: part("source", drawSource),
};
// the card first: it takes room from everything else
for (const name of ["top", "card", "kinds", "controls", "map", "legend", "cause", "depth", "changes", "unused",
  "scatter", "alike", "table", "source"]) parts[name]();

for (const link of document.querySelectorAll(".bar nav a")) {
  link.hidden = byId(link.getAttribute("href").slice(1)).hidden;
}
watch(["metric", "order", "scale", "painted"], () => { parts.map(); parts.legend(); });
watch(["painted"], () => { parts.alike(); if (cardTile) cardTile.paint(); });
watch(["kinds"], () => { showFilter(); markPoints(); });
watch(["kinds", "sort"], parts.rows);
watch(["head"], () => { parts.card(); showOpen(); markPoints(); });
watch(["x", "y"], parts.scatter);
watch(["against"], parts.cause);
drawnToWidth(document.querySelector("main"), () => { parts.map(); parts.cause(); parts.depth(); parts.scatter(); parts.alike(); });
byId("depth-more").addEventListener("click", () => { allOverDepth = !allOverDepth; parts.depth(); });
addEventListener("hashchange", () => change(readAddress()));
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.head !== null) closeCard();
});
addEventListener("scroll", hideHint, { passive: true });

PAGE.dataset.heads = String(cells.size);
PAGE.dataset.drawn = "yes";
