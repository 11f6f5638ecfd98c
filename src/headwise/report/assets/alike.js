// How alike any two heads attend, as a matrix of all heads by all heads.
const PAIRS = new Map(Object.entries(ATLAS.alike).map(([name, text]) =>
  [name, new Uint16Array(bytes(text).buffer)])); // little-endian, as every browser's machine
const alikeView = { order: "index", of: [...PAIRS.keys()][0] };

// Cosine of two heads' maps; null where it was not measured.
function similarityOf(a, b, name = "similarity") {
  if (a === b) return 1;
  const [low, high] = a < b ? [a, b] : [b, a];
  const pairs = PAIRS.get(name);
  if (pairs) {
    const value = pairs[low * COUNT - (low * (low + 1)) / 2 + high - low - 1];
    return value === 65535 ? null : value / 65534;
  }
  if (name !== "similarity") return null;
  for (const [from, to] of [[low, high], [high, low]]) {
    const entry = ATLAS.neighbours[from].find(([row]) => row === to);
    if (entry) return entry[1];
  }
  return null;
}

function orderedAlike() {
  const order = [...ROWS];
  if (alikeView.order === "kind") {
    order.sort((a, b) => KIND_NAMES.indexOf(kindOf(a)) - KIND_NAMES.indexOf(kindOf(b)) || a - b);
  } else if (alikeView.order === "value") {
    order.sort((a, b) => (sinkOf(b) ?? -1) - (sinkOf(a) ?? -1) || a - b);
  }
  return order;
}

function drawAlike() {
  const box = byId("alike");
  if (!PAIRS.size) {
    box.hidden = true;
    return;
  }
  const choose = (key, options) => {
    const select = el("select", { onchange: () => { alikeView[key] = select.value; drawAlike(); } },
      options.filter(Boolean).map(([value, text]) => el("option", { value }, text)));
    select.value = alikeView[key];
    return select;
  };
  const order = orderedAlike();
  const measured = columnNamed(alikeView.of);
  fill(box, el("h3", {}, "Which heads attend alike"),
    el("div", { class: "controls" },
      el("label", { class: "field" }, "Ordered by", choose("order", [["index", "layer and head"],
        HEADS.kind && ["kind", "kind"], columnNamed("sink_mass") && ["value", "mass on sinks"]])),
      PAIRS.size > 1 ? el("label", { class: "field" }, "Compared", choose("of", [
        ["similarity", "whole maps"], ["similarity_rest", "all but the first key"]])) : null),
    matrixDrawing(order, Math.min(box.clientWidth || 480, 500)),
    el("p", { class: "about" }, "Cosine of every two heads’ maps",
      measured ? ` (${measured.label})` : "", ": ", el("span", { class: "ends" }, "0",
        svg("svg", { width: 90, height: 10, "aria-hidden": "true" }, Array.from({ length: 30 }, (_, i) =>
          svg("rect", { x: i * 3, width: 3.3, height: 10, fill: css(rampColour(i / 29)) }))), "1")));
}

// One pixel a pair, four bytes at a time: a thousand heads are a million pairs.
function matrixPicture(order) {
  const canvas = el("canvas", { width: COUNT, height: COUNT });
  const c2 = canvas.getContext("2d");
  const image = c2.createImageData(COUNT, COUNT);
  const pixels = new Uint32Array(image.data.buffer);
  const packed = (r, g, b, alpha) => ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;
  const palette = Uint32Array.from({ length: 256 }, (_, i) => packed(...rampColour(i / 255), 255));
  const unknown = packed(128, 128, 128, 60);
  const pairs = PAIRS.get(alikeView.of);
  for (let i = 0; i < COUNT; i += 1) {
    pixels[i * COUNT + i] = palette[255];
    for (let j = 0; j < i; j += 1) {
      const [low, high] = order[i] < order[j] ? [order[i], order[j]] : [order[j], order[i]];
      const level = pairs[low * COUNT - (low * (low + 1)) / 2 + high - low - 1];
      const colour = level === 65535 ? unknown : palette[Math.round((level / 65534) * 255)];
      pixels[i * COUNT + j] = colour;
      pixels[j * COUNT + i] = colour;
    }
  }
  c2.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

function matrixDrawing(order, wide) {
  const from = 26;
  const size = wide - from - 2;
  const drawing = svg("svg", { class: "matrix", width: wide, height: wide, viewBox: `0 0 ${wide} ${wide}`,
    role: "img", "aria-label": `Similarity of the maps of all ${COUNT} heads, each with each` },
  svg("image", { href: matrixPicture(order), x: from, y: from, width: size, height: size }),
  groupMarks(order, from, size));
  const pairAt = (event) => {
    const area = drawing.getBoundingClientRect();
    const place = (at) => Math.floor(((at - from * (area.width / wide)) / (size * (area.width / wide))) * COUNT);
    const [i, j] = [place(event.clientY - area.top), place(event.clientX - area.left)];
    return i >= 0 && j >= 0 && i < COUNT && j < COUNT ? [order[i], order[j]] : null;
  };
  drawing.addEventListener("pointermove", (event) => {
    const pair = pairAt(event);
    if (!pair) {
      hideHint();
      return;
    }
    const [a, b] = pair;
    const similarity = similarityOf(a, b, alikeView.of);
    showHint(event, el("b", {}, a === b ? HEADS.name[a] : `${HEADS.name[a]} and ${HEADS.name[b]}`),
      HEADS.kind ? (kindOf(a) === kindOf(b) ? kindOf(a) : `${kindOf(a)}, ${kindOf(b)}`) : "",
      `cosine ${similarity === null ? "not measured" : number(similarity)}`);
  });
  drawing.addEventListener("pointerleave", hideHint);
  drawing.addEventListener("click", (event) => {
    const pair = pairAt(event);
    hideHint();
    if (pair) openHead(pair[0]);
  });
  return drawing;
}

// Along both sides: the layer where a new one begins, or the glyph of a kind at its middle.
function groupMarks(order, from, size) {
  if (alikeView.order === "value") return [];
  const byKind = alikeView.order === "kind";
  const key = (row) => (byKind ? kindOf(row) : `${HEADS.panel[row]}.${HEADS.layer[row]}`);
  const starts = order.map((row, i) => (i === 0 || key(row) !== key(order[i - 1]) ? i : -1)).filter((i) => i >= 0);
  const at = (i) => from + (i / COUNT) * size;
  let last = -1e9;
  return starts.flatMap((start, n) => {
    const end = starts[n + 1] ?? COUNT;
    const place = byKind ? at((start + end) / 2) : at(start);
    if (place - last < (byKind ? 12 : 22)) return [];
    last = place;
    if (byKind) {
      const kind = kindOf(order[start]);
      return [[place - 5, from - 15], [from - 15, place - 5]].map(([x, y]) => svg("path", { d: shapeOf(kind),
        class: `ink ${kindClass(kind)}`, transform: `translate(${x} ${y}) scale(.62)` }));
    }
    const name = `${n === 0 ? "L" : ""}${HEADS.layer[order[start]]}`;
    return [svg("line", { x1: place, x2: place, y1: from - 5, y2: from, class: "axis" }),
      svg("line", { x1: from - 5, x2: from, y1: place, y2: place, class: "axis" }),
      svg("text", { x: place, y: from - 8, "text-anchor": n ? "middle" : "start" }, name),
      svg("text", { x: from - 7, y: place + (n ? 4 : 9), "text-anchor": "end" }, name)];
  });
}
