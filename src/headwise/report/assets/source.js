// Where the numbers come from, what they mean, and by which rules a kind is given.
const ABOUT = [
  ["model", "Model"], ["model_class", "Class"], ["revision", "Revision"], ["weights_hash", "Weights"],
  ["dtype", "Precision"], ["device", "Device"], ["platform", "Platform"], ["threads", "Threads"],
  ["seconds", "Time"], ["peak_memory_bytes", "Peak memory"],
  ["peak_device_memory_bytes", "Peak device memory"], ["date", "Date"],
];

function drawSource() {
  const from = ATLAS.provenance;
  const rows = [];
  const add = (title, ...content) => rows.push(el("dt", {}, title), el("dd", {}, ...content));
  for (const [key, title] of ABOUT) {
    const value = from[key];
    if (value === null || value === undefined || value === "") continue;
    if (key === "seconds") add(title, `${number(value)} s`);
    else if (key.endsWith("_bytes")) add(title, `${number(value / 1e6)} MB`);
    else if (key === "weights_hash") add(title, el("code", {}, value));
    else add(title, String(value));
  }
  if (from.versions) add("Versions", Object.entries(from.versions).map(([n, v]) => `${n} ${v}`).join(", "));
  const settings = Object.entries(from.settings || {});
  if (settings.length) add("Settings", settings.map(([n, v]) => `${n} ${JSON.stringify(v)}`).join(", "));
  const others = Object.entries(from).filter(([key, value]) => value !== null
    && !ABOUT.some(([name]) => name === key) && !["texts", "versions", "settings", "command"].includes(key));
  for (const [key, value] of others) add(key, typeof value === "string" ? value : JSON.stringify(value));
  const texts = from.texts || [];
  if (!ATLAS.columns.some((column) => column.spread)) add("Spread", "One sample, so no standard errors.");
  if (ATLAS.left_out.length) add("Left out here", `For size: ${ATLAS.left_out.join("; ")}. The atlas file has them.`);
  fill(byId("provenance"), el("dl", { class: "source" }, rows),
    from.command ? copyBlock(String(from.command), "The command that made this", "command") : null,
    texts.length ? textsTable(texts) : null);
  drawRules();
  drawDefinitions();
}

function textsTable(texts) {
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ["text", "tokens", "SHA-256"].map((title, i) =>
      el("th", { scope: "col", class: i === 1 ? "n" : null }, title)))),
    el("tbody", {}, texts.map((text) => el("tr", {}, el("td", {}, text.name || "unnamed"),
      el("td", { class: "n" }, number(text.tokens)), el("td", {}, el("code", {}, text.sha256 || "–")))))));
}

function drawRules() {
  fill(byId("rules"), el("table", {}, el("thead", {}, el("tr", {}, ["kind", "what it does", "rule"].map((title) =>
    el("th", { scope: "col" }, title)))),
  el("tbody", {}, ATLAS.kinds.map(({ kind, meaning, rules }) => el("tr", {},
    el("th", { scope: "row" }, el("span", { class: "head" }, glyph(kind), kind)), el("td", {}, meaning),
    el("td", {}, rules.length ? rules.map((rule) => el("div", {}, el("code", {}, rule))) : "no rule above is met"))))));
}

function drawDefinitions() {
  fill(byId("definitions"), el("table", {}, el("thead", {}, el("tr", {},
    ["column", "unit", "what it is", "source"].map((title) => el("th", { scope: "col" }, title)))),
  el("tbody", {}, ATLAS.definitions.map((column) => el("tr", { "data-column": column.name },
    el("td", {}, el("code", {}, column.name), column.table === "layers" ? " (layers)" : ""),
    el("td", {}, column.unit), el("td", {}, column.description), el("td", {}, linked(column.source)))))));
}

// "arXiv 2309.17453" becomes a link; everything else stays text.
function linked(text) {
  const parts = [];
  let from = 0;
  for (const match of text.matchAll(/arXiv[ :](\d{4}\.\d{4,5})/g)) {
    parts.push(text.slice(from, match.index), el("a", { href: `https://arxiv.org/abs/${match[1]}`,
      rel: "noopener noreferrer", target: "_blank" }, match[0]));
    from = match.index + match[0].length;
  }
  return [...parts, text.slice(from)];
}
