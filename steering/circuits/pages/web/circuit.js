"use strict";
// Which edges are drawn, and what the one pointed at is. All names and numbers come from the elements that are there already.
(() => {
  const graph = document.getElementById("graph"), form = document.getElementById("filters"), status = document.getElementById("status");
  const paths = [...graph.querySelectorAll("path.e")].sort((a, b) => a.dataset.n - b.dataset.n); // the strongest first
  const rows = [...document.querySelectorAll("#edges tbody tr")];
  const nodes = [...graph.querySelectorAll(".node")].sort((a, b) => a.dataset.node - b.dataset.node);
  const fields = form.elements, kinds = [...form.querySelectorAll("[name=kind]")];
  let shown = [];

  function most(edges) { // the slider is logarithmic, since circuits that somebody can read are small
    return Math.round(Math.max(edges, 1) ** (fields.most.value / 100));
  }

  function update() {
    const wanted = new Set(kinds.filter((box) => box.checked).map((box) => box.value));
    const low = Number(fields.low.value), high = fields.high.value === "" ? Infinity : Number(fields.high.value);
    const all = fields.set.value === "all";
    const fit = paths.filter((path) => {
      const { kind, layer } = path.dataset;
      return (all || path.classList.contains("in")) && wanted.has(kind) && low <= layer && layer <= high;
    });
    shown = fit.slice(0, most(fit.length));
    const drawn = new Set(shown), active = new Set(shown.flatMap((path) => [path.dataset.from, path.dataset.to]));
    paths.forEach((path, n) => {
      path.classList.toggle("off", !drawn.has(path));
      rows[n].hidden = !drawn.has(path);
    });
    nodes.forEach((node) => node.classList.toggle("idle", !active.has(node.dataset.node)));
    fields.count.value = shown.length.toLocaleString("en");
    fields.most.setAttribute("aria-valuetext", `${shown.length} edges`);
    choose([], "");
    rest();
  }

  function choose(edges, text) {
    const ends = new Set(edges.flatMap((path) => [path.dataset.from, path.dataset.to])), hot = new Set(edges);
    graph.classList.toggle("chosen", edges.length > 0);
    paths.forEach((path, n) => {
      path.classList.toggle("hot", hot.has(path));
      rows[n].classList.toggle("hot", hot.has(path));
    });
    nodes.forEach((node) => node.classList.toggle("hot", ends.has(node.dataset.node)));
    status.textContent = text || `${shown.length.toLocaleString("en")} edges drawn`;
  }

  const ofEdge = (path) => choose([path], path.querySelector("title").textContent);

  function ofNode(node) {
    const own = shown.filter((path) => path.dataset.from === node.dataset.node || path.dataset.to === node.dataset.node);
    const names = own.slice(0, 4).map((path) => path.querySelector("title").textContent).join(", ");
    choose(own, `${node.dataset.name}: ${own.length} edges${own.length ? `: ${names}${own.length > 4 ? ", …" : ""}` : ""}`);
  }

  const NEAR = [[0, 0], [3, 0], [-3, 0], [0, 3], [0, -3], [5, 0], [-5, 0]]; // thin lines are hard to hit
  function under(event) {
    for (const [x, y] of NEAR) {
      const found = document.elementFromPoint(event.clientX + x, event.clientY + y)?.closest?.(".node, path.e");
      if (found && graph.contains(found)) return found;
    }
    return null;
  }

  let last = null;
  graph.addEventListener("pointermove", (event) => {
    const found = under(event);
    if (found === last) return;
    last = found;
    if (found === null) choose([], "");
    else if (found.matches(".node")) ofNode(found);
    else ofEdge(found);
  });
  graph.addEventListener("pointerleave", () => { last = null; choose([], ""); });

  // One stop of the tab key for the drawing and one for the table; the arrow keys go on from there.
  const usable = { node: () => nodes.filter((node) => !node.classList.contains("idle")), row: () => rows.filter((row) => !row.hidden) };
  function rest() {
    for (const [kind, all] of [["node", nodes], ["row", rows]]) {
      all.forEach((one) => one.setAttribute("tabindex", "-1"));
      usable[kind]()[0]?.setAttribute("tabindex", "0");
    }
  }
  function walk(container, kind, look) {
    container.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      const all = usable[kind](), at = all.indexOf(document.activeElement);
      if (step === undefined || at < 0) return;
      event.preventDefault();
      all[Math.min(Math.max(at + step, 0), all.length - 1)].focus();
    });
    container.addEventListener("focusin", (event) => {
      const one = event.target.closest(kind === "node" ? ".node" : "tr");
      if (one === null) return;
      [...usable[kind]()].forEach((other) => other.setAttribute("tabindex", other === one ? "0" : "-1"));
      look(one);
    });
    container.addEventListener("focusout", () => choose([], ""));
  }
  walk(graph, "node", ofNode);
  walk(document.querySelector("#edges tbody"), "row", (row) => ofEdge(paths[row.dataset.n]));
  document.querySelector("#edges tbody").addEventListener("pointerover", (event) => {
    const row = event.target.closest("tr");
    if (row) ofEdge(paths[row.dataset.n]);
  });
  document.querySelector("#edges tbody").addEventListener("pointerleave", () => choose([], ""));

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  fields.set.forEach?.((radio) => radio.addEventListener("change", () => { fields.most.value = 100; update(); }));
  form.hidden = false;
  update();
})();
