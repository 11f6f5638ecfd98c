// The line that follows pointer and focus, and words for those who listen.
const hint = byId("hint");

function showHint(near, ...lines) {
  fill(hint, ...lines.filter(Boolean).map((line) => (line instanceof Node ? line : el("div", {}, line))));
  hint.hidden = false;
  const box = near instanceof Element ? near.getBoundingClientRect()
    : { left: near.clientX, right: near.clientX, top: near.clientY, bottom: near.clientY };
  const gap = 12;
  const wide = hint.offsetWidth;
  const high = hint.offsetHeight;
  const left = Math.min(Math.max((box.left + box.right - wide) / 2, 8), innerWidth - wide - 8);
  const above = box.top - high - gap;
  hint.style.left = `${Math.max(left, 8)}px`;
  hint.style.top = `${above > 8 ? above : box.bottom + gap}px`;
}

function hideHint() {
  hint.hidden = true;
}

function say(text) {
  byId("spoken").textContent = text;
}

// Name, kind and one or two numbers of a head, as lines of a hint.
function headLines(row, columns) {
  const kind = kindOf(row);
  const numbers = columns.filter(Boolean).map((column) => {
    const rank = rankOf(column, row);
    const measured = sortedValues(column).length;
    const place = rank === null || allSame(column) ? "" : ` (${rank} of ${measured})`;
    return `${column.label} ${withUnit(column, column.values[row])}${place}`;
  });
  return [
    el("div", {}, el("b", {}, HEADS.name[row]), kind ? `  ${kind}` : ""),
    ...numbers,
    kind && HEADS.reason[row] ? el("div", { class: "small" }, HEADS.reason[row]) : null,
  ];
}
