// Facts under the title, the theme, and the kinds as a filter.
function drawTop() {
  fill(byId("facts"), ATLAS.facts.map(([what, value]) =>
    el("div", {}, el("dt", {}, what), el("dd", {}, value))));

  fill(byId("notes"), ATLAS.notes.map((note) => el("p", { class: "note" }, note)));

  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    PAGE.dataset.theme = state.theme === "auto" ? (system.matches ? "dark" : "light") : state.theme;
    button.textContent = `Theme: ${state.theme}`;
    change({ painted: `${PAGE.dataset.theme}` });
  };
  system.addEventListener("change", apply);
  button.addEventListener("click", () => {
    const order = ["auto", "light", "dark"];
    change({ theme: order[(order.indexOf(state.theme) + 1) % order.length] });
  });
  watch(["theme"], apply);
  apply();

  // paper is light
  addEventListener("beforeprint", () => {
    PAGE.dataset.theme = "light";
    change({ painted: "light for paper" });
  });
  addEventListener("afterprint", apply);

  // links to sections move the page, not the address, which holds the view
  for (const link of document.querySelectorAll('a[href^="#"]')) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const target = byId(link.getAttribute("href").slice(1));
      target.scrollIntoView();
      target.setAttribute("tabindex", "-1");
      target.focus({ preventScroll: true });
    });
  }
}

function drawKinds() {
  const box = byId("kinds");
  if (!KIND_NAMES.length) {
    box.hidden = true;
    return;
  }
  const meanings = new Map(ATLAS.kinds.map((entry) => [entry.kind, entry.meaning]));
  const draw = () => {
    const focused = document.activeElement && document.activeElement.dataset.kind;
    fill(box, KIND_NAMES.map((kind) => el("button", {
      type: "button", class: "kind", "data-kind": kind,
      "aria-pressed": !state.kinds || state.kinds.includes(kind) ? "true" : "false",
      onclick: () => toggleKind(kind),
    }, glyph(kind), el("span", {}, kind), el("b", {}, KIND_COUNTS.get(kind)),
    meanings.get(kind) ? el("small", {}, meanings.get(kind)) : null)),
    state.kinds ? el("button", { type: "button", class: "link", "data-kind": "",
      onclick: () => change({ kinds: null }) }, "show all kinds") : null);
    if (focused) {
      const again = [...box.children].find((child) => child.dataset.kind === focused);
      if (again) again.focus();
    }
  };
  watch(["kinds"], () => {
    draw();
    say(state.kinds ? `showing ${plural(ROWS.filter(isShown).length, "head")}` : "showing all heads");
  });
  draw();
}

// From "all", the first click shows one kind alone; further clicks add and take away.
function toggleKind(kind) {
  if (!state.kinds) return change({ kinds: [kind] });
  const next = state.kinds.includes(kind) ? state.kinds.filter((k) => k !== kind)
    : KIND_NAMES.filter((k) => k === kind || state.kinds.includes(k));
  return change({ kinds: next.length && next.length < KIND_NAMES.length ? next : null });
}
