// How alike any two heads attend, as a matrix of all heads by all heads.
const PAIRS = ATLAS.alike ? (() => {
  const raw = bytes(ATLAS.alike);
  return new Uint16Array(raw.buffer.slice(0)); // written little-endian, as browsers read it
})() : null;
let alikeOrder = "index";

// Cosine of two heads' maps; null where it was not measured.
function similarityOf(a, b) {
  if (a === b) return 1;
  const [low, high] = a < b ? [a, b] : [b, a];
  if (PAIRS) {
    const value = PAIRS[low * COUNT - (low * (low + 1)) / 2 + high - low - 1];
    return value === 65535 ? null : value / 65534;
  }
  for (const [from, to] of [[low, high], [high, low]]) {
    const entry = ATLAS.neighbours[from].find(([row]) => row === to);
    if (entry) return entry[1];
  }
  return null;
}

function drawAlike() {
  const box = byId("alike");
  if (!PAIRS) {
    box.hidden = true;
    return;
  }
  const order = [...ROWS];
  if (alikeOrder === "kind") {
    order.sort((a, b) => KIND_NAMES.indexOf(kindOf(a)) - KIND_NAMES.indexOf(kindOf(b)) || a - b);
  } else if (alikeOrder === "value") {
    order.sort((a, b) => (sinkOf(b) ?? -1) - (sinkOf(a) ?? -1) || a - b);
  }
  const choose = el("select", { onchange: () => { alikeOrder = choose.value; drawAlike(); } },
    el("option", { value: "index" }, "layer and head"),
    HEADS.kind ? el("option", { value: "kind" }, "kind") : null,
    columnNamed("sink_mass") ? el("option", { value: "value" }, "mass on sinks") : null);
  choose.value = alikeOrder;
  const canvas = el("canvas", { class: "matrix", width: COUNT, height: COUNT, role: "img",
    "aria-label": `Cosine similarity of the maps of all ${COUNT} heads, ordered by ${choose.selectedOptions[0].text}` });
  const c2 = canvas.getContext("2d");
  const image = c2.createImageData(COUNT, COUNT);
  const palette = Array.from({ length: 256 }, (_, i) => rampColour(i / 255));
  for (let i = 0; i < COUNT; i += 1) {
    for (let j = 0; j < COUNT; j += 1) {
      const similarity = similarityOf(order[i], order[j]);
      const rgb = similarity === null ? [128, 128, 128] : palette[Math.round(similarity * 255)];
      image.data.set([...rgb, 255], 4 * (i * COUNT + j));
    }
  }
  c2.putImageData(image, 0, 0);
  const pairAt = (event) => {
    const area = canvas.getBoundingClientRect();
    const place = (at, from, size) => Math.min(COUNT - 1, Math.max(0, Math.floor(((at - from) / size) * COUNT)));
    return [order[place(event.clientY, area.top, area.height)], order[place(event.clientX, area.left, area.width)]];
  };
  canvas.addEventListener("pointermove", (event) => {
    const [a, b] = pairAt(event);
    const similarity = similarityOf(a, b);
    showHint(event, el("b", {}, `${HEADS.name[a]} and ${HEADS.name[b]}`),
      HEADS.kind ? `${kindOf(a)}, ${kindOf(b)}` : "",
      `cosine ${similarity === null ? "not measured" : number(similarity)}`);
  });
  canvas.addEventListener("pointerleave", hideHint);
  canvas.addEventListener("click", (event) => { hideHint(); openHead(pairAt(event)[0]); });
  fill(box, el("h3", {}, "Which heads attend alike"),
    el("div", { class: "controls" }, el("label", { class: "field" }, "Ordered by", choose)), canvas,
    el("p", { class: "about" }, "Cosine of every two heads’ maps on sampled rows: ",
      el("span", { class: "ends" }, "0", svg("svg", { width: 90, height: 10, "aria-hidden": "true" },
        Array.from({ length: 30 }, (_, i) => svg("rect", { x: i * 3, width: 3.3, height: 10,
          fill: css(rampColour(i / 29)) }))), "1")));
}
