// Keys, the streaming of steered text, and the import of notes. Every page works without it but for those.
"use strict";

const one = selector => document.querySelector(selector);
const typing = element => element.matches("textarea, select, input:not([type=range], [type=checkbox], [type=file])");

function say(sentence) {
  const place = one("#failure");
  place.textContent = sentence;
  place.hidden = !sentence;
}

// A key does what the element that names it does: a link is followed, a button pressed, a field entered.
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (event.key === "Escape" && typing(document.activeElement)) return document.activeElement.blur();
  if (event.key === "?" && one("dialog[open]")) return one("dialog[open]").close();
  if (typing(event.target) || one("dialog[open]")) return;
  const rows = [...document.querySelectorAll("tbody a.open")];
  const target = one(`[data-key="${CSS.escape(event.key)}"]`);
  if (target) {
    event.preventDefault();
    if (event.key === "?") one("#keys").showModal();
    else if (target.matches("input")) { target.focus(); target.select(); }
    else target.click();
  } else if (rows.length && (event.key === "j" || event.key === "k")) {
    const at = rows.indexOf(document.activeElement) + (event.key === "j" ? 1 : -1);
    rows[Math.max(0, Math.min(rows.length - 1, at))].focus();
  }
});
one("nav.head button")?.addEventListener("click", () => one("#keys").showModal());

one("#import")?.addEventListener("change", async event => {
  try {
    const reply = await fetch("/notes/import", {method: "POST", body: await event.target.files[0].arrayBuffer()}), answer = await reply.json();
    if (reply.ok) location.search = "?imported=" + answer.entries;
    else say(answer.error);
  } catch {
    say("The server does not answer; see its terminal.");
  }
});

// A label or note that was begun is not left without a word.
let begun = Boolean(one(".editor[data-begun]"));
one(".editor")?.addEventListener("input", () => { begun = true; });
one(".editor")?.addEventListener("submit", () => { begun = false; });
addEventListener("beforeunload", event => { if (begun) event.preventDefault(); });

// Empty fields of a filter say nothing, so they stay out of the address.
one(".filters")?.addEventListener("formdata", ({formData}) => {
  for (const [name, value] of [...formData]) if (value === "") formData.delete(name);
  if (formData.get("how") === "text") formData.delete("how");
});

const form = one("#steer");
if (form) steering(form);

function steering(form) {
  let stopper = null;
  for (const row of form.querySelectorAll(".strength")) {
    const [slider, field] = row.querySelectorAll("[type=range], [type=number]");
    slider.addEventListener("input", () => { field.value = slider.value; remember(); });
    field.addEventListener("input", () => { slider.value = field.value; remember(); });
    row.querySelector(".drop").addEventListener("click", () => { row.remove(); remember(); });
    if (!row.querySelector(".range").hidden) range(row, slider, field);
  }
  form.addEventListener("input", remember);
  one("#stop").addEventListener("click", () => stopper?.abort());
  one("#run").addEventListener("click", () => { if (form.reportValidity()) write(); });

  // Up to which strengths a feature works: measured while the page is already used, and shown when it is there.
  async function range(row, slider, field) {
    const place = row.querySelector(".range"), number = row.querySelector("[name=feature]").value;
    place.textContent = "measuring how far it works …";
    let reply;
    try {
      do {
        if (reply) await new Promise(resolve => setTimeout(resolve, 3000));
        reply = await fetch("/api/range?feature=" + number);
      } while (reply.status === 503);  // the model is at work on long texts
    } catch {
      place.textContent = "";
      return;
    }
    const found = await reply.json();
    if (!found.sentence) {
      place.textContent = "how far it works is not known: " + (found.why || found.error);
      return;
    }
    const low = -(found.down.coefficient ?? Infinity), high = found.up.coefficient ?? Infinity;
    for (const [name, end] of [["--low", low], ["--high", high]]) {
      const share = Math.min(1, Math.max(0, (end - slider.min) / (slider.max - slider.min)));
      slider.style.setProperty(name, `calc(.55rem + ${share} * (100% - 1.1rem))`);  // where the thumb's middle is
    }
    slider.classList.add("measured");
    place.title = found.details;
    const mark = () => {
      const strength = Number(field.value), beyond = strength < low || strength > high;
      row.classList.toggle("beyond", beyond);
      place.textContent = (beyond ? "beyond its range: " : "") + found.sentence;
    };
    for (const input of [slider, field]) input.addEventListener("input", mark);
    mark();
  }

  function remember() {
    const address = new URLSearchParams(new FormData(form));
    address.delete("add");
    history.replaceState(null, "", "?" + address);
    one(".both").classList.add("stale");
  }

  function running(is) {
    one("#run").disabled = is;
    one("#stop").hidden = !is;
  }

  async function write() {
    remember();
    const data = new FormData(form), strengths = data.getAll("strength"), features = {};
    data.getAll("feature").forEach((feature, i) => { features[feature] = strengths[i]; });
    const wanted = {prompt: data.get("prompt"), features};
    for (const name of ["max_new_tokens", "temperature", "top_p", "seed"]) wanted[name] = data.get(name);
    for (const side of document.querySelectorAll(".both section")) {
      side.querySelector(".written").textContent = wanted.prompt;
      side.querySelector(".facts").textContent = "seed " + (wanted.seed || "0");
      side.querySelector(".written").classList.remove("refusal");
    }
    one(".both").classList.remove("stale");
    const hint = data.getAll("feature").length ? "" : "No feature is added, so both texts are the same.";
    say(hint);
    running(true);
    stopper = new AbortController();
    const waiting = setTimeout(() => say("Waiting: the model is at work on another text."), 1000);
    try {
      const reply = await fetch("/api/steer", {method: "POST", body: JSON.stringify(wanted), signal: stopper.signal});
      clearTimeout(waiting);
      say(hint);
      if (reply.ok) await read(reply.body.pipeThrough(new TextDecoderStream()).getReader());
      else say((await reply.json()).error);
    } catch (error) {
      if (error.name !== "AbortError") say("The server does not answer; see its terminal.");
      else say(hint);
    } finally {
      clearTimeout(waiting);
      running(false);
    }
  }

  async function read(reader) {
    let waiting = "", whole = false;
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
      const events = (waiting + chunk.value).split("\n\n");
      waiting = events.pop();
      for (const event of events) {
        const piece = JSON.parse(event.slice("data: ".length));
        if (piece.error) say(piece.error);
        whole ||= Boolean(piece.done || piece.error);
        if (piece.side) show(piece);
      }
    }
    if (!whole) say("The server stopped in the middle of the text; see its terminal.");
  }

  function show({side, text, failure, nats_per_token: nats}) {
    const written = one(`#${side} .written`), facts = one(`#${side} .facts`);
    if (text) written.append(text);
    if (failure) {
      written.textContent = failure;
      written.classList.add("refusal");
    }
    if (nats !== undefined) facts.textContent += `, ${nats.toFixed(2)} nats per token`;
  }
}
