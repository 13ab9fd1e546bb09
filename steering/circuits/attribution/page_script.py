"""The script of the page: a classic one, since browsers refuse modules and fetch on file://. Text goes in as textContent alone."""

SCRIPT = r"""
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const marks = new Map([...document.querySelectorAll(".node")].map((mark) => [Number(mark.dataset.n), mark]));
  const links = document.getElementById("links"), detail = document.getElementById("detail");
  const nodes = document.getElementById("nodes"), edges = document.getElementById("edges"), errors = document.getElementById("errors");
  const leaf = (kind) => kind === "logit" || kind === "token";
  const ranked = [...data.nodes.keys()].filter((n) => !leaf(data.nodes[n].kind))
    .sort((a, b) => data.nodes[b].influence - data.nodes[a].influence);
  const into = new Map(), out = new Map();
  data.edges.forEach((edge, e) => {
    if (!out.has(edge[0])) out.set(edge[0], []);
    if (!into.has(edge[1])) into.set(edge[1], []);
    out.get(edge[0]).push(e);
    into.get(edge[1]).push(e);
  });
  const most = 50, drawing = document.querySelector(".drawing");
  let chosen = null, visible = new Set(), factor = 0;

  function make(tag, text, name) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  }
  function number(value) {
    const size = Math.abs(value);
    const text = size && (size < 0.001 || size >= 1e5) ? value.toExponential(1) : value.toPrecision(3);
    return (value > 0 ? "+" : "") + text.replaceAll("-", "\u2212");
  }
  function draw() {
    const kept = Math.round(ranked.length * nodes.value / 100);
    visible = new Set(ranked.slice(0, kept).filter((n) => errors.checked || data.nodes[n].kind !== "error"));
    data.nodes.forEach((node, n) => { if (leaf(node.kind)) visible.add(n); });
    nodes.nextElementSibling.textContent = String(kept);
    const own = chosen === null ? null : new Set([...largestOf(into), ...largestOf(out)]);
    const limit = Math.round(data.edges.length * (edges.value / 100) ** 2);
    edges.nextElementSibling.textContent = String(limit);
    const shown = [], near = new Set([chosen]);
    data.edges.forEach((edge, e) => {
      if (!visible.has(edge[0]) || !visible.has(edge[1])) return;
      if (own ? own.has(e) : e < limit) { shown.push(e); near.add(edge[0]); near.add(edge[1]); }
    });
    const largest = Math.max(...shown.map((e) => data.edges[e][3]), 1e-12);
    links.replaceChildren(...shown.map((e) => line(data.edges[e], largest)));
    marks.forEach((mark, n) => {
      mark.toggleAttribute("hidden", !visible.has(n));
      mark.classList.toggle("dim", chosen !== null && !near.has(n));
      mark.classList.toggle("chosen", n === chosen);
    });
  }
  function largestOf(lists) {  // as many as the tables show: among more lines none can be followed
    return [...(lists.get(chosen) || [])].sort((a, b) => Math.abs(data.edges[b][2]) - Math.abs(data.edges[a][2])).slice(0, most);
  }
  function line(edge, largest) {
    const [a, b] = [marks.get(edge[0]).dataset, marks.get(edge[1]).dataset];
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const middle = (Number(a.y) + Number(b.y)) / 2;
    path.setAttribute("d", `M${a.x} ${a.y}C${a.x} ${middle} ${b.x} ${middle} ${b.x} ${b.y}`);
    path.setAttribute("class", edge[2] < 0 ? "link minus" : "link");
    path.setAttribute("stroke-width", String(0.4 + 3 * Math.sqrt(edge[3] / largest)));
    return path;
  }
  function table(title, list, side) {
    const made = [make("h3", `${title} (${list.length})`)];
    if (!list.length) return made;
    const body = make("tbody");
    [...list].sort((a, b) => Math.abs(data.edges[b][2]) - Math.abs(data.edges[a][2])).slice(0, most).forEach((e) => {
      const edge = data.edges[e], other = edge[side], row = make("tr"), name = make("td");
      const button = make("button", data.nodes[other].label, "to");
      button.addEventListener("click", () => choose(other));
      name.append(button);
      const last = make("td", undefined, "cp");
      last.append(data.columns ? runner(edge[0], edge[1]) : copier(command(edge[0], edge[1])));
      row.append(name, make("td", number(edge[2]), "n"), last);
      body.append(row);
    });
    const whole = make("table");
    whole.append(body);
    made.push(whole);
    if (list.length > most) made.push(make("p", `and ${list.length - most} smaller ones`, "soft"));
    return made;
  }
  function command(source, target) {
    const asked = target === undefined || data.nodes[target].kind === "logit" ? "" : ` --target ${data.nodes[target].id}`;
    return `${data.command}${data.nodes[source].id}${asked}`;
  }
  function copier(text) {
    const button = make("button", "command", "copy");
    button.title = text;
    button.addEventListener("click", () => {
      const field = make("textarea", text);
      document.body.append(field);
      field.select();
      const done = document.execCommand("copy");
      field.remove();
      button.textContent = done ? "copied" : "press Ctrl+C";
      setTimeout(() => { button.textContent = "command"; }, 1500);
    });
    return button;
  }
  function controls() {
    const line = make("p", "Run the model with it at ", "soft"), field = make("input", undefined, "factor");
    field.type = "number";
    field.step = "any";
    field.value = String(factor);
    field.setAttribute("aria-label", "factor");
    field.addEventListener("input", () => { factor = field.valueAsNumber; });
    line.append(field, make("span", " times its value "), runner(chosen));
    const outcome = make("div");
    outcome.id = "outcome";
    outcome.setAttribute("aria-live", "polite");
    return [line, outcome];
  }
  function runner(source, target) {
    const button = make("button", "run", "copy"), times = data.nodes[source].label;
    button.title = "set " + times + " to the factor times its value, in the graph and in the model";
    button.addEventListener("click", async () => {
      const place = document.getElementById("outcome") || detail.appendChild(Object.assign(make("div"), { id: "outcome" }));
      const asked = { node: data.nodes[source].id, factor, targets: [] };
      if (target !== undefined && data.nodes[target].kind === "feature") asked.targets.push(data.nodes[target].id);
      place.replaceChildren(make("p", "running the model\u2026", "soft"));
      button.disabled = true;
      try {
        const body = JSON.stringify(asked), headers = { "content-type": "application/json" };
        const answer = await fetch("/intervene", { method: "POST", headers, body }), found = await answer.json();
        if (found.error) throw new Error(found.error);
        const first = found.changes.filter((row) => target !== undefined && row.node === data.nodes[target].id);
        place.replaceChildren(outcome(found, [...first, ...found.changes.filter((row) => !first.includes(row))]));
      } catch (error) {
        place.replaceChildren(make("p", String(error.message)));
      }
      button.disabled = false;
    });
    return button;
  }
  function outcome(found, rows) {
    const box = make("div", undefined, "outcome"), label = new Map(data.nodes.map((node) => [node.id, node.label]));
    box.append(make("h3", `${label.get(found.node)} at ${found.factor} times its value: change of`));
    rows.slice(0, 8).forEach((row) => {
      const whole = make("table"), body = make("tbody");
      Object.entries(data.columns).forEach(([key, name]) => {
        const line = make("tr");
        line.append(make("td", name), make("td", number(row[key]), "n"));
        body.append(line);
      });
      whole.append(make("caption", label.get(row.node)), body);
      box.append(whole);
    });
    return box;
  }
  function choose(n) {
    chosen = n === chosen ? null : n;
    if (chosen === null) detail.replaceChildren(make("p", "Nothing chosen.", "soft"));
    else {
      const node = data.nodes[chosen], facts = make("dl", undefined, "facts");
      node.facts.forEach(([name, value]) => {
        const pair = make("div");
        pair.append(make("dt", name), make("dd", value));
        facts.append(pair);
      });
      const parts = [make("h2", node.label), make("code", node.id), facts];
      if (node.kind !== "logit" && data.columns) parts.push(...controls());
      else if (node.kind !== "logit") {
        parts.push(make("p", "To set it to 0, \u22121 and 2 times its value in the model, or as an edge's command does:", "soft"));
        parts.push(make("code", command(chosen)), make("span", " "), copier(command(chosen)));
      }
      if (node.kind === "feature" || node.kind === "logit") parts.push(...table("reads from", into.get(chosen) || [], 0));
      if (node.kind !== "logit") parts.push(...table("read by", out.get(chosen) || [], 1));
      detail.replaceChildren(...parts);
    }
    draw();
  }
  marks.forEach((mark, n) => {
    mark.addEventListener("click", () => choose(n));
    mark.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(n); } });
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && chosen !== null) choose(chosen); });
  for (const input of [nodes, edges, errors]) input.addEventListener("input", draw);
  edges.value = 100 * Math.sqrt(Math.min(1, 80 / Math.max(1, data.edges.length)));
  draw();
  drawing.scrollLeft = drawing.scrollWidth;  // to the logits
})();
"""
