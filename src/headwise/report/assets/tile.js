// A small piece of a real map: rows are queries, columns keys, with the words they stand for.
const TILES = new Map(); // row -> its tiles
for (const tile of ATLAS.tiles.entries) {
  if (!TILES.has(tile.head)) TILES.set(tile.head, []);
  TILES.get(tile.head).push(tile);
}

// A token as something to look at: what cannot be seen gets a sign.
function visible(token, longest = 60) {
  const signs = { "\n": "⏎", "\r": "␍", "\t": "⇥", "": "∅" };
  if (token in signs) return signs[token];
  const text = token.replace(/[\n\r\t]/g, (c) => signs[c])
    .replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}]/gu, "�");
  const letters = [...text];
  return letters.length > longest ? `${letters.slice(0, longest - 1).join("")}…` : text;
}

// As the name of a token in a sentence: spaces at the ends show as open boxes.
const quoted = (token) => `“${visible(token, 24).replace(/^ +| +$/g, (s) => "␣".repeat(s.length))}”`;

// The rows of a lower triangle, filled up with zeros.
function square(triangle, size) {
  const out = new Uint8Array(size * size);
  for (let r = 0, from = 0; r < size; from += r + 1, r += 1) {
    out.set(triangle.subarray(from, from + r + 1), r * size);
  }
  return out;
}

function readTile(tile) {
  const [queries, places] = ATLAS.tiles.texts[tile.tokens];
  const [keys, keyPlaces] = ATLAS.tiles.texts[tile.keys];
  const raw = tile.causal ? square(bytes(tile.weights), keys.length) : bytes(tile.weights);
  const weight = (r, c) => (raw[r * keys.length + c] / 255) ** 2;
  // the first token may stand apart from the others, which follow one another
  const apart = (at) => (at && at.length > 1 && at[1] > at[0] + 1 ? 4 : 0);
  return { raw, queries, keys, places, keyPlaces, weight, causal: tile.causal,
    own: tile.tokens === tile.keys, rowGap: apart(places), keyGap: apart(keyPlaces) };
}

function tileFigure(tile) {
  const piece = readTile(tile);
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label":
    `Attention from ${piece.queries.length} queries, in rows, to ${piece.keys.length} keys, in columns` });
  const line = el("p", { class: "pairline", "aria-live": "polite" });
  const words = el("p", { class: "words", lang: "" });
  const at = { row: piece.queries.length - 1, key: null };
  let place = null;

  const paint = () => { place = paintTile(canvas, piece, at); };
  const point = (row, key) => {
    const moved = row !== at.row;
    Object.assign(at, { row, key });
    paint();
    if (moved) paintWords();
    tellPair(line, piece, at);
  };
  const spans = piece.keys.map((token, c) => el("span", { class: "word",
    onmouseenter: () => (piece.own ? point(c, null) : point(at.row, c)),
    onclick: () => (piece.own ? point(c, null) : point(at.row, c)) }, visible(token)));
  const paintWords = () => spans.forEach((span, c) => {
    const colour = rampColour(Math.sqrt(piece.weight(at.row, c)));
    const strong = piece.weight(at.row, c) > 0.002;
    span.style.background = strong ? css(colour) : "none";
    span.style.color = strong ? inkOn(colour) : "inherit";
    span.classList.toggle("query", piece.own && c === at.row);
    span.classList.toggle("unseen-yet", piece.causal && c > at.row);
  });
  const follow = (event) => {
    const box = canvas.getBoundingClientRect();
    const c = place.keyAt(event.clientX - box.left);
    const r = place.rowAt(event.clientY - box.top);
    if (r >= 0 && r < piece.queries.length && c >= 0 && c < piece.keys.length) point(r, c);
  };
  canvas.addEventListener("pointermove", follow);
  canvas.addEventListener("pointerdown", follow);
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!way) return;
    event.preventDefault();
    const row = Math.min(Math.max(at.row + way[0], 0), piece.queries.length - 1);
    const last = piece.causal ? row : piece.keys.length - 1;
    point(row, Math.min(Math.max((at.key === null ? at.row : at.key) + way[1], 0), last));
  });
  // tokens that bring no spaces of their own (ids, word pieces) are set apart
  const glue = piece.keys.some((token) => /^[\s\u0120\u2581]/.test(token)) ? null : " ";
  fill(words, spans.flatMap((span, c) => [c === 1 && piece.keyGap ? " … " : c ? glue : null, span]));
  paintWords();
  tellPair(line, piece, at);
  const figure = el("div", {}, canvas, line, words);
  drawnToWidth(canvas, paint);
  return { figure, paint: () => { paint(); paintWords(); } };
}

function tellPair(line, piece, at) {
  const query = piece.queries[at.row];
  const named = (token, places, i) => `${quoted(token)}${places ? ` (token ${places[i]})` : ""}`;
  const asking = named(query, piece.places, at.row);
  if (at.key === null) {
    let total = 0;
    for (let c = 0; c < piece.keys.length; c += 1) total += piece.weight(at.row, c);
    const rest = total > 0.985 ? "all of it in this piece" : `${number(Math.min(total, 1))} of it in this piece`;
    fill(line, `Attention of ${asking}, ${rest}. Move over the map or the words.`);
    return;
  }
  fill(line, `${asking} to ${named(piece.keys[at.key], piece.keyPlaces, at.key)}: `, el("b", {}, number(piece.weight(at.row, at.key))));
}

// Draws the map with labels where they can be read; returns where it lies, in CSS pixels.
function paintTile(canvas, piece, at) {
  const wide = canvas.clientWidth || 376;
  const [rows, columns] = [piece.queries.length, piece.keys.length];
  const labels = (wide - 62) / columns >= 4.6;
  const [left, top] = labels ? [62, 58] : [1, 1];
  const size = Math.min((wide - left - piece.keyGap - 1) / columns, 26);
  const high = top + size * rows + piece.rowGap + 1;
  const x = (c) => left + c * size + (c > 0 ? piece.keyGap : 0);
  const y = (r) => top + r * size + (r > 0 ? piece.rowGap : 0);
  const sharp = window.devicePixelRatio || 1;
  canvas.width = Math.round(wide * sharp);
  canvas.height = Math.round(high * sharp);
  canvas.style.height = `${high}px`;
  const c2 = canvas.getContext("2d");
  c2.scale(sharp, sharp);
  const style = getComputedStyle(PAGE);
  for (let r = 0; r < rows; r += 1) {
    for (let c = 0; c < columns; c += 1) {
      if (piece.causal && c > r) break; // not seen: left blank
      c2.fillStyle = css(rampColour(piece.raw[r * columns + c] / 255));
      c2.fillRect(x(c), y(r), size + 0.4, size + 0.4);
    }
  }
  c2.strokeStyle = style.getPropertyValue("--line");
  c2.strokeRect(left - 0.5, top - 0.5, x(columns) - left + 1, y(rows) - top + 1);
  if (labels) {
    const step = Math.max(1, Math.ceil(8.5 / size));
    c2.font = `${Math.min(11, Math.max(8.5, size * 0.9))}px system-ui, sans-serif`;
    const draw = (token, strong) => {
      c2.fillStyle = style.getPropertyValue(strong ? "--ink" : "--muted");
      c2.fillText(visible(token.replace(/^ +| +$/g, "") || token, 9), 0, 0);
    };
    c2.textBaseline = "middle";
    for (let r = 0; r < rows; r += 1) {
      if (r % step && r !== at.row) continue;
      c2.save();
      c2.textAlign = "right";
      c2.translate(left - 5, y(r) + size / 2);
      draw(piece.queries[r], r === at.row);
      c2.restore();
    }
    for (let c = 0; c < columns; c += 1) {
      if (c % step && c !== at.key) continue;
      c2.save();
      c2.textAlign = "left";
      c2.translate(x(c) + size / 2, top - 5);
      c2.rotate(-Math.PI / 2);
      draw(piece.keys[c], c === at.key);
      c2.restore();
    }
  }
  c2.strokeStyle = style.getPropertyValue("--ink");
  c2.lineWidth = 1.25;
  if (at.key !== null) {
    c2.strokeRect(x(at.key), y(at.row), size, size);
  } else c2.strokeRect(left, y(at.row), x(columns) - left, size);
  const back = (start, gap) => (at) => {
    const past = at - start;
    return past < size ? Math.floor(past / size) : Math.max(1, Math.floor((past - gap) / size));
  };
  return { keyAt: back(left, piece.keyGap), rowAt: back(top, piece.rowGap) };
}
