// Shows an exported folder of features: the table, a feature's page, the features of a token. The address after # is the whole state.
"use strict";

const one = selector => document.querySelector(selector);
// Text as searches compare it: without case, accents composed, one kind of apostrophe; as sae/features/text.py has it.
const folded = text => text.normalize("NFC").replace(/[’‘ʼ＇]/g, "'").toLowerCase().normalize("NFC");
const PAGE = 100, KEPT = 8;  // rows of the table at a time; files of pages kept in memory
const KEYS = {"j": "next feature of the list", "k": "the one before", "[": "feature with the number below", "]": "with the number above",
  "/": "search", "r": "a random feature", "u": "up to the list", "?": "this help", "Esc": "leave the field or this help"};
const NUMBERS = {density: "density", count: "count", max: "max", mean: "mean", fvu: "FVU rise if removed"};
let stats = null, vocabulary = null, tokensPerFile = 0, serial = 0;
const loading = new Map(), pages = new Map(), postings = new Map(), place = new Map();

// What the data files call.
const SAE = {
  stats(data) {
    stats = data;
    for (const [name, values] of Object.entries(stats.columns)) stats.columns[name] = values.map(value => value ?? NaN);  // JSON has no NaN
    stats.features.forEach((j, i) => place.set(j, i));
    const star = new Set(stats.stars);
    stats.text = stats.features.map((j, i) => [j, stats.labels[j] ?? "", star.has(j) ? "★" : "", ...stats.fires[i],
      ...(stats.promotes[i] ?? []), stats.explanations[j] ?? ""].join(" ")).map(folded);
    stats.starred = star;
    route();
  },
  pages(number, data) {
    pages.set(number, data);
    if (pages.size > KEPT) {
      const oldest = pages.keys().next().value;
      pages.delete(oldest);
      loading.delete(file("d", oldest));
    }
  },
  vocabulary(data, size) { vocabulary = Object.entries(data).map(([id, text]) => ({id: +id, text, lower: folded(text.trim())})); tokensPerFile = size; },
  postings(number, data) { postings.set(number, data); },
};

const file = (folder, number) => `${folder}/${String(number).padStart(4, "0")}.js`;

function load(name) {
  if (!loading.has(name)) {
    loading.set(name, new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = name;
      script.onload = () => { script.remove(); done(); };
      script.onerror = () => { loading.delete(name); failed(new Error(`${name} cannot be read: copy the whole folder again`)); };
      document.head.append(script);
    }));
  }
  return loading.get(name);
}

async function inflate(text) {
  if (!window.DecompressionStream) throw new Error("this browser is too old to unpack the pages: one of 2023 or later can");
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const stream = new DecompressionStream("deflate"), writer = stream.writable.getWriter();
  writer.write(bytes).then(() => writer.close()).catch(() => {});  // what is wrong with the bytes is said by the reading side
  return new Response(stream.readable).text();
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const shown = text => text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
const words = list => list.map(word => element("code", {}, shown(word)));
const short = value => Number.isNaN(value) ? "" : Math.abs(value) >= 1000 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));

// The address: #/PATH?PARAMETERS; a list is named by its parameters q (search) and sort.
function address() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  return {path: path.split("/"), params: new URLSearchParams(query ?? "")};
}

function link(path, params, changes = {}) {
  const next = new URLSearchParams(params);
  for (const [name, value] of Object.entries(changes)) value === null || value === "" ? next.delete(name) : next.set(name, value);
  const query = next.toString();
  return `#/${path}${query ? "?" + query : ""}`;
}

let listed = {key: null, rows: []};
function list(params) {
  const key = `${params.get("q") ?? ""}\n${params.get("sort") ?? ""}`;
  if (listed.key !== key) listed = {key, rows: select(params.get("q") ?? "", params.get("sort") ?? "")};
  return listed.rows;
}

function select(query, sort) {
  const tests = folded(query).split(/\s+/).filter(Boolean).map(word => {
    const limit = word.match(/^(density|count|max|mean|fvu|feature)(<=|>=|<|>|=)([0-9.e+-]+)$/);
    if (!limit) return i => stats.text[i].includes(word);
    const column = limit[1] === "feature" ? stats.features : stats.columns[limit[1]], bound = Number(limit[3]);
    return {"<": i => column[i] < bound, ">": i => column[i] > bound, "<=": i => column[i] <= bound, ">=": i => column[i] >= bound,
      "=": i => column[i] === bound}[limit[2]];
  });
  const rows = [...stats.features.keys()].filter(i => tests.every(test => test(i)));
  const name = sort.replace(/^-/, ""), down = sort.startsWith("-") ? -1 : 1;
  const column = name === "feature" ? stats.features : name === "label" ? stats.features.map(j => stats.labels[j] ?? "\uffff")
    : name === "fires" ? stats.fires.map(list => list.join(" ")) : stats.columns[name];
  if (column) rows.sort((a, b) => (column[a] < column[b] ? -down : column[a] > column[b] ? down : a - b));
  return rows;
}

async function route() {
  if (!stats) return;
  const {path, params} = address(), turn = ++serial, search = one("#search");
  if (document.activeElement !== search) search.value = params.get(path[0] === "t" ? "token" : "q") ?? "";
  search.placeholder = path[0] === "t" ? "a token, for example the" : "word, or density>0.01";
  try {
    let made;
    if (path[0] === "f") made = await featureView(Number(path[1]), params);
    else if (path[0] === "t") made = await tokenView(params.get("token") ?? "");
    else if (path[0] === "random") return random(params);
    else made = tableView(params);
    if (turn === serial) show(...made);
  } catch (error) {
    if (turn === serial) show("Not possible", element("p", {class: "failed", role: "alert"}, error.message));
  }
}

function show(title, ...content) {
  document.title = title;
  one("#main").replaceChildren(...content);
  if (document.activeElement !== one("#search")) { one("#main").focus({preventScroll: true}); scrollTo(0, 0); }
}

function tableView(params) {
  const rows = list(params), last = Math.max(1, Math.ceil(rows.length / PAGE));
  const page = Math.min(last, Math.max(1, Number(params.get("page")) || 1)), sort = params.get("sort") ?? "";
  const head = [["feature", "feature"], ["label", "label"], ...Object.entries(NUMBERS), ["fires", "fires on"], ["", "promotes"]].map(([name, text]) => {
    const numeric = name in NUMBERS || name === "feature" ? "num" : undefined;
    if (!name) return element("th", {}, text);
    const next = sort === "-" + name || (sort !== name && !numeric) ? name : "-" + name;
    const direction = sort === name ? "ascending" : sort === "-" + name ? "descending" : undefined;
    const button = element("button", {}, text);
    button.addEventListener("click", () => { location.hash = link("", params, {sort: next, page: null}); });
    return element("th", {class: numeric, "aria-sort": direction}, button);
  });
  const body = rows.slice((page - 1) * PAGE, page * PAGE).map(i => {
    const j = stats.features[i], label = stats.labels[j] ?? "";
    return element("tr", {}, element("td", {class: "num"}, element("a", {href: link(`f/${j}`, params, {page: null})}, String(j))),
      element("td", {title: stats.explanations[j]}, stats.starred.has(j) ? element("span", {class: "star"}, "★ ") : "", label),
      ...Object.keys(NUMBERS).map(name => element("td", {class: "num"}, name === "density" ? short(100 * stats.columns[name][i]) + "%" : short(stats.columns[name][i]))),
      element("td", {class: "tok"}, ...words(stats.fires[i])), element("td", {class: "tok"}, ...words(stats.promotes[i] ?? [])));
  });
  const steps = element("nav", {class: "place"}, step("‹ before", link("", params, {page: page - 1}), page > 1),
    `page ${page} of ${last}`, step("next ›", link("", params, {page: page + 1}), page < last));
  return [stats.heading, element("h1", {}, stats.heading),
    element("p", {class: "soft"}, `${stats.site}, ${stats.tokens.toLocaleString("en")} tokens scanned; ${rows.length.toLocaleString("en")} of ` +
      `${stats.features.length.toLocaleString("en")} features`), steps,
    element("section", {class: "scroll"}, element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body)))];
}

function step(text, href, possible) {
  return element("a", possible ? {href} : {class: "off"}, text);
}

async function featureView(j, params) {
  if (!place.has(j)) throw new Error(Number.isNaN(j) ? "the address names no feature" : `feature ${j} is not in this folder`);
  const number = Math.floor(place.get(j) / stats.shard);
  await load(file("d", number));
  const html = await inflate(pages.get(number)[j]);
  const rows = list(params), at = rows.indexOf(place.get(j)), to = i => link(`f/${stats.features[rows[i]]}`, params);
  const where = at < 0 ? "not in this list" : `${(at + 1).toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  const nav = element("nav", {class: "place"}, step("‹ before", at > 0 ? to(at - 1) : "", at > 0),
    element("a", {href: link("", params, {page: Math.floor(Math.max(at, 0) / PAGE) + 1})}, where),
    step("next ›", at >= 0 && at + 1 < rows.length ? to(at + 1) : "", at >= 0 && at + 1 < rows.length));
  const view = element("div");
  view.innerHTML = html;  // made by our own renderer, in which all text is escaped; the page's policy runs no script in it
  for (const a of view.querySelectorAll('a[href^="#/f/"]')) a.href = link(a.getAttribute("href").slice(2), params);
  return [`Feature ${j}`, nav, view];
}

async function tokenView(query) {
  await load("tokens.js");
  const wanted = folded(query.trim());
  const title = [element("h1", {}, "Which features like a token"),
    element("p", {class: "soft"}, "Type it above. The percentage is the share of the feature's activation that falls on the token.")];
  if (!wanted) return ["By token", ...title];
  const rank = token => token.text === query ? 0 : token.text.trim() === query.trim() ? 1 : token.lower === wanted ? 2 : token.lower.startsWith(wanted) ? 3 : 4;
  const found = vocabulary.filter(token => token.lower.includes(wanted)).sort((a, b) => rank(a) - rank(b) || a.text.length - b.text.length || a.id - b.id);
  const best = found.slice(0, 12);
  await Promise.all([...new Set(best.map(token => file("t", Math.floor(token.id / tokensPerFile))))].map(load));
  const cards = best.map(token => element("section", {}, element("h2", {}, ...words([token.text])), element("ol", {},
    ...postings.get(Math.floor(token.id / tokensPerFile))[token.id].slice(0, 20).map(([j, share]) => element("li", {},
      element("a", {href: `#/f/${j}`}, String(j)), element("span", {class: "k"}, stats.labels[j] ?? "", ...words(stats.fires[place.get(j)])),
      element("span", {}, `${short(share / 10)}%`))))));
  const count = !found.length ? "No feature has such a token among its strongest."
    : best.length < found.length ? `The ${best.length} nearest of ${found.length.toLocaleString("en")} tokens.` : `Tokens found: ${found.length}.`;
  return [`By token: ${query}`, ...title, element("p", {class: "soft"}, count), element("div", {class: "likes"}, ...cards)];
}

function random(params) {
  const rows = list(params);
  if (rows.length) location.replace(link(`f/${stats.features[rows[Math.floor(Math.random() * rows.length)]]}`, params));
}

function help() {
  const dialog = one("#keys"), entries = Object.entries(KEYS).flatMap(([key, text]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, text)]);
  const close = element("button", {}, "close");
  close.addEventListener("click", () => dialog.close());
  dialog.replaceChildren(element("h2", {}, "Keys"), element("dl", {}, ...entries), element("p", {class: "soft"},
    "Search takes words, all of which must occur in number, label, tokens or explanation, and limits such as max>5 or density<0.001."), close);
  dialog.showModal();
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const search = one("#search"), {path, params} = address();
  if (event.key === "Escape" && document.activeElement === search) return search.blur();
  if (event.target === search || one("dialog[open]")) return;
  const j = Number(path[1]), go = hash => { event.preventDefault(); location.hash = hash; };
  if (event.key === "/") { event.preventDefault(); search.focus(); search.select(); }
  else if (event.key === "?") help();
  else if (event.key === "r") { event.preventDefault(); random(params); }
  else if (path[0] === "f" && event.key === "u") go(link("", params));
  else if (path[0] === "f" && (event.key === "[" || event.key === "]")) {
    const next = j + (event.key === "]" ? 1 : -1);
    if (place.has(next)) go(link(`f/${next}`, params));
  } else if (path[0] === "f" && (event.key === "j" || event.key === "k")) {
    const rows = list(params), next = rows[rows.indexOf(place.get(j)) + (event.key === "j" ? 1 : -1)];
    if (next !== undefined) go(link(`f/${stats.features[next]}`, params));
  } else if (event.key === "j" || event.key === "k") {
    const links = [...document.querySelectorAll("tbody a")], at = links.indexOf(document.activeElement);
    links[Math.max(0, Math.min(links.length - 1, at + (event.key === "j" ? 1 : -1)))]?.focus();
  }
}

let waiting = 0;
one("#search").addEventListener("input", event => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const {path, params} = address(), token = path[0] === "t";
    const next = token ? link("t", {}, {token: event.target.value}) : link("", params, {q: event.target.value, page: null});
    history.replaceState(null, "", next);
    route();
  }, 120);
});
one("#search").addEventListener("keydown", event => { if (event.key === "Enter") document.querySelector("tbody a, .likes a")?.focus(); });
one("#help").addEventListener("click", help);
addEventListener("keydown", key);
addEventListener("hashchange", route);
