"""Style and script of the pages, inline because a page must open from file:// alone."""

# One hue, so that it reads the same to the colour-blind; the strongest shade still leaves text readable on it. Firing tokens are
# underlined as well, and the one a row is about is bold under a thick line, so that nothing rests on colour alone.
STYLE = """
:root{color-scheme:light dark;--page:#fbfaf8;--card:#fff;--text:#1d1c1a;--soft:#6a665f;--line:#e2ded6;--hot:224 108 20;
  --link:#8a3f00;--low:#2f6690}
@media(prefers-color-scheme:dark){
:root{--page:#161514;--card:#1f1e1c;--text:#eae6df;--soft:#a09a90;--line:#37342f;--hot:255 140 50;
  --link:#ffb070;--low:#7fb4de}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:112rem;padding:1rem 1.25rem 3rem;background:var(--page);color:var(--text);font:15px/1.45 system-ui,sans-serif}
a{color:var(--link)}
h1{font-size:1.6rem;margin:.2rem 0}
h2{font-size:1rem;margin:0 0 .5rem}
p{margin:.2rem 0;overflow-wrap:anywhere}
.soft{color:var(--soft);font-size:.87rem}
h3{font-size:.9rem;margin:.7rem 0 .1rem}h3 .soft{font-weight:400}
.label{font-weight:600;color:var(--link)}.star{color:rgb(var(--hot))}
.note{white-space:pre-wrap;max-width:60rem}
nav{display:flex;gap:1.2rem;flex-wrap:wrap}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;min-width:0}
.top{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(17rem,100%),1fr));gap:1rem;margin:1rem 0}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(35rem,100%),1fr));gap:1rem;margin-bottom:1rem}
dl{display:grid;grid-template-columns:auto 1fr;gap:.15rem .8rem;margin:0}
dt{color:var(--soft)}
dd{margin:0;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;display:block}
svg rect{fill:rgb(var(--hot))}
svg path{fill:rgb(var(--hot))}
svg .neg{fill:var(--low)}
svg text{fill:var(--soft);font:10px system-ui,sans-serif}
svg line{stroke:var(--line)}
.buckets{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(40rem,100%),1fr));gap:0 2rem}
.why{margin-top:1rem}.why dl{gap:.35rem .8rem}
.pairs{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:0 1.2rem}
.near .pairs{grid-template-columns:minmax(0,1fr);gap:.7rem}
ol{list-style:none;margin:0;padding:0}
ol li{display:flex;justify-content:space-between;gap:.5rem;border-bottom:1px solid var(--line)}
code,.row,.tok{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:.84rem}
code{white-space:pre;overflow:hidden;text-overflow:ellipsis}
li span{font-variant-numeric:tabular-nums;color:var(--soft)}
.k{flex:1;overflow:hidden;white-space:nowrap;text-overflow:ellipsis}
.down span{color:var(--low)}
.row{display:grid;grid-template-columns:4.3rem 7.8rem minmax(0,1fr);align-items:baseline;
  border-bottom:1px solid var(--line);line-height:1.75}
.row>*{overflow:hidden;white-space:pre}
.row:focus{outline:2px solid rgb(var(--hot)/.6)}
.v,.g{user-select:none;-webkit-user-select:none}
.v{font-variant-numeric:tabular-nums}
.g{color:var(--soft);text-overflow:ellipsis;padding-right:.6rem}
.w{unicode-bidi:isolate;mask-image:linear-gradient(to left,transparent,#000 1.2rem)}
.l{display:inline-block;width:45%;overflow:hidden;direction:rtl;vertical-align:bottom;
  mask-image:linear-gradient(to right,transparent,#000 1.2rem)}
.l>span{direction:ltr;unicode-bidi:isolate}
.row:focus{display:block}
.row:focus .w{white-space:pre-wrap;overflow-wrap:anywhere;mask-image:none}
.row:focus .l{display:inline;direction:ltr;mask-image:none}
.row:focus .v,.row:focus .g{display:inline-block;margin-right:.8rem;vertical-align:bottom}
b{font-weight:inherit;border-bottom:1px solid rgb(var(--hot));border-radius:2px}
.a4,.a5,.a6{border-bottom-width:2px}
.a7,.a8,.a9{border-bottom-width:3px}
b.c{font-weight:700}
b.m{--hot:40 120 230}
.a1{background:rgb(var(--hot)/.07)}
.a2{background:rgb(var(--hot)/.13)}
.a3{background:rgb(var(--hot)/.19)}
.a4{background:rgb(var(--hot)/.25)}
.a5{background:rgb(var(--hot)/.31)}
.a6{background:rgb(var(--hot)/.37)}
.a7{background:rgb(var(--hot)/.43)}
.a8{background:rgb(var(--hot)/.49)}
.a9{background:rgb(var(--hot)/.55)}
u{text-decoration:none;opacity:.5}
i{font-style:normal;color:var(--soft)}
i.s{font-size:0}i.s::before{content:"\\b7";font-size:.84rem}
i.n,i.t,i.q{display:inline-block;white-space:pre;font-size:0;line-height:0;position:relative;top:.22em}
i.n::before,i.t::before,i.q::before{font-size:.84rem;line-height:normal}
i.n::before{content:"\\21b5"}
i.t::before{content:"\\21e5"}
i.q::before{content:"\\240d"}
i.x{border:1px solid;border-radius:3px;font-size:.8em;padding:0 1px}
input{font:inherit;padding:.35rem .6rem;width:min(26rem,100%);border:1px solid var(--line);border-radius:6px;
  background:var(--card);color:inherit}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:baseline}
td code{display:inline-block;max-width:14rem;overflow:hidden;text-overflow:ellipsis;vertical-align:bottom}
td.num,th.num{text-align:right;font-variant-numeric:tabular-nums}
td:last-child{white-space:pre;max-width:40rem;overflow:hidden;text-overflow:ellipsis}
th button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-decoration:underline}
th[aria-sort=ascending] button::after{content:" \\25b2"}
th[aria-sort=descending] button::after{content:" \\25bc"}
@media(max-width:640px){
body{padding:.6rem}.row{grid-template-columns:4.3rem minmax(0,1fr)}.l{width:35%}
.row .g{display:none}section{padding:.6rem}}
@media print{.row>*{white-space:pre-wrap}}
"""

# Classic script: browsers refuse modules and fetch on file://. Rows sort by their cells' data-v, filter by their text.
TABLE_SCRIPT = """
const body = document.querySelector("tbody"), rows = [...body.rows], count = document.getElementById("count");
document.getElementById("filter").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  let shown = 0;
  for (const row of rows) {
    row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    shown += !row.hidden;
  }
  count.textContent = shown + " of " + rows.length;
});
document.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
  const head = button.parentElement, down = head.getAttribute("aria-sort") !== "descending";
  document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const compare = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? String(key(a)).localeCompare(key(b)) : key(a) - key(b);
  rows.sort((a, b) => down ? compare(b, a) : compare(a, b)).forEach(row => body.append(row));
}));
"""
