// On a page that compares: heads whose kind changed, and the largest changes of any number.
function drawChanges() {
  const section = byId("changes");
  section.hidden = !ATLAS.changes;
  if (!ATLAS.changes) return;
  const { kinds, largest } = ATLAS.changes;
  const named = (kind) => el("span", { class: "head" }, glyph(kind), kind);
  const blocks = [];
  if (HEADS.kind) {
    blocks.push(el("div", {}, el("h3", {}, `Kind: ${plural(kinds.length, "head")} changed`),
      shortTable(["head", "kind before", "kind after"], kinds.map(([row, before, after]) =>
        [headLink(row), named(before), named(after)]), 12),
      copyable(kinds.map(([row]) => row), "changed")));
  }
  for (const [unit, rows] of Object.entries(largest)) {
    if (!rows.length) continue;
    blocks.push(el("div", {}, el("h3", {}, "Largest changes"),
      el("p", { class: "about" }, `Size in ${unit}.`),
      shortTable(["head", "number", "before", "after", "size"], rows.map((change) => [
        headLink(change.row), el("button", { type: "button", class: "link",
          onclick: () => showOnMap(change.column) }, change.label),
        number(change.before), number(change.after), number(change.size)]), 12)));
  }
  fill(byId("changed"), blocks);
}

function showOnMap(name) {
  change({ metric: name, scale: "auto" });
  byId("map").scrollIntoView();
}
