// All tiles at once, as small pictures in the cells of the map.
function thumbnails(spots, cell, width, height) {
  const sharp = Math.max(2, window.devicePixelRatio || 1);
  const canvas = el("canvas", { width: Math.round(width * sharp), height: Math.round(height * sharp) });
  const c2 = canvas.getContext("2d");
  c2.imageSmoothingQuality = "high";
  const palette = Array.from({ length: 256 }, (_, level) => rampColour(level / 255));
  for (const { row, x, y } of spots) {
    if (!TILES.has(row)) continue;
    const piece = readTile(TILES.get(row)[0]);
    const [rows, columns] = [piece.queries.length, piece.keys.length];
    const small = el("canvas", { width: columns, height: rows });
    const pixels = small.getContext("2d");
    const image = pixels.createImageData(columns, rows);
    for (let i = 0; i < rows * columns; i += 1) {
      const unseen = piece.causal && i % columns > Math.floor(i / columns);
      image.data.set([...palette[piece.raw[i]], unseen ? 0 : 255], 4 * i);
    }
    pixels.putImageData(image, 0, 0);
    c2.drawImage(small, (x + 1) * sharp, (y + 1) * sharp, (cell.wide - 2) * sharp, (cell.high - 2) * sharp);
  }
  return svg("image", { href: canvas.toDataURL(), width, height, "aria-hidden": "true" });
}
