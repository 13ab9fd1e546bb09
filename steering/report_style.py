"""Style of the reports, inline because a page must open from file:// alone."""

# Nine hues after Okabe and Ito, darker on light ground and lighter on dark; points differ in shape too, so that nothing rests on colour.
STYLE = """
:root{color-scheme:light dark;--page:#fbfaf8;--card:#fff;--text:#1d1c1a;--soft:#6a665f;--line:#e2ded6;--grid:#efece6;--pos:0 104 168;
  --neg:190 84 0;--yes:#00724f;--mark:255 214 102;--k0:#0068a8;--k1:#c45a00;--k2:#00805b;--k3:#a8437d;--k4:#8a6d00;--k5:#5b4fc0;
  --k6:#b3261e;--k7:#2f7f86;--k8:#6b5a47;--control:#7a756f;--baseline:#1d1c1a}
@media(prefers-color-scheme:dark){
:root{--page:#161514;--card:#1f1e1c;--text:#eae6df;--soft:#a09a90;--line:#37342f;--grid:#2a2825;--pos:86 180 233;--neg:255 150 60;
  --yes:#4fcf9f;--mark:150 110 0;--k0:#62b6ea;--k1:#ff9d4d;--k2:#3ecf9c;--k3:#e68dc0;--k4:#d9bd3f;
  --k5:#a79cff;--k6:#ff7b6e;--k7:#6cc9d1;--k8:#c9b08f;
  --control:#8d8880;--baseline:#eae6df}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:84rem;padding:1.6rem 1.5rem 4rem;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:0 0 .3rem}
p{margin:.3rem 0;overflow-wrap:anywhere;max-width:70rem}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1.1rem 1.3rem;margin:1.2rem 0;min-width:0}
.soft{color:var(--soft);font-size:.87rem}
.facts{display:flex;flex-wrap:wrap;gap:.1rem 1.6rem;margin:.6rem 0 0;font-size:.92rem}
.facts dt{display:inline;color:var(--soft)}
.facts div{overflow-wrap:anywhere}
.facts dd{display:inline;margin:0 0 0 .4rem}
.verdict{border-left:5px solid var(--yes);font-size:1.05rem}
.verdict ul{margin:.3rem 0 0;padding:0;list-style:none}
.verdict li{padding:.2rem 0 .2rem 1.7rem;position:relative;overflow-wrap:anywhere}
.verdict li::before{content:"\\2022";position:absolute;left:.5rem}
.verdict li.yes::before{content:"\\2713";color:var(--yes);font-weight:700}
.verdict li.no{color:var(--soft)}
.verdict li.no::before{content:"\\25cb"}
.pareto{display:grid;grid-template-columns:minmax(0,1fr) 15rem;gap:1.4rem;align-items:start}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}
svg .axis{stroke:var(--line)}
svg .grid{stroke:var(--grid)}
svg .zero{stroke:var(--soft);stroke-dasharray:3 3}
svg rect.control{fill:var(--control);opacity:.13}
.series{transition:opacity .12s}
.series path,.series line{stroke:var(--c);fill:none;stroke-width:1.8}
.series line{stroke-width:1.3;opacity:.6}
.series .dot{fill:var(--c);stroke:var(--card);stroke-width:1.2}
.series.unreached .dot,.series .dot.open{fill:var(--card);stroke:var(--c);stroke-width:2}
.series .ring{fill:none;stroke:var(--c);stroke-width:1.2}
.series.control path{stroke-dasharray:5 4}
.legend{list-style:none;margin:0;padding:0;font-size:.9rem}
.legend li{display:flex;gap:.55rem;align-items:center;padding:.16rem .4rem;border-radius:6px;cursor:default}
.legend li:hover,.legend li:focus{background:var(--grid);outline:0}
.legend svg{width:1.5rem;height:1rem;flex:none}
.legend span{overflow-wrap:anywhere;min-width:0}
.scroll{overflow-x:auto;margin:.6rem -.3rem 0;padding:0 .3rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.38rem .5rem;border-bottom:1px solid var(--line);vertical-align:middle}
th{font-weight:600;vertical-align:bottom;line-height:1.25}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td small.beyond{color:rgb(var(--neg))}
td small,td .soft{display:block;color:var(--soft);font-size:.78rem;font-weight:400}
td.m{min-width:10rem;max-width:19rem;font-weight:600;overflow-wrap:anywhere;position:sticky;left:0;background:var(--card)}
tr.chosen td.m{background:var(--grid)}
td.w{min-width:11rem;padding-block:0}
tr.control td.m,tr.baseline td.m{font-weight:400}
tr.chosen{background:var(--grid)}
.whisker line{stroke:var(--c);stroke-width:2}
.whisker .zero{stroke:var(--soft);stroke-width:1}
.whisker circle{fill:var(--c)}
.cos td,.cos th{text-align:center;padding:.3rem .35rem;font-variant-numeric:tabular-nums;border:1px solid var(--card);white-space:nowrap}
.cos{width:auto}
.cos th[scope=row]{text-align:left;font-weight:400;padding-right:.8rem}
.cos th[scope=col]{font-weight:400;color:var(--soft)}
details{border-top:1px solid var(--line);padding:.5rem 0}
summary{cursor:pointer;font-weight:600;overflow-wrap:anywhere}
summary .soft{font-weight:400}
.samples{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:.2rem 1.3rem;margin:.6rem 0}
.samples>*{grid-column:var(--column);grid-row:var(--row)}
.samples h3{font-size:.87rem;margin:0;color:var(--soft);font-weight:600;border-bottom:2px solid var(--line);padding-bottom:.2rem}
.samples h3.broken{border-color:rgb(var(--neg))}
.samples p{font:.86rem/1.55 Georgia,"Times New Roman",serif;white-space:pre-wrap;margin:.35rem 0;unicode-bidi:isolate}
.samples .none{color:var(--soft);font-style:italic}
.samples b{font-weight:700}
.samples .t{font:.75rem system-ui,sans-serif;color:var(--soft);white-space:nowrap}
mark{background:rgb(var(--mark));color:inherit;border-radius:3px;padding:0 2px}
pre{font:.84rem/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin:.4rem 0;
  background:var(--page);border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem}
.pairs{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1rem;margin:.5rem 0 0;font-size:.9rem}
.pairs dt{color:var(--soft)}
.pairs dd{margin:0;overflow-wrap:anywhere}
i{font-style:normal;color:var(--soft)}
i.n::before{content:"\\21b5"}
i.t::before{content:"\\21e5"}
i.q::before{content:"\\240d"}
i.x{border:1px solid;border-radius:3px;font-size:.8em;padding:0 1px}
@media(max-width:760px){
body{padding:.9rem .7rem 3rem}h1{font-size:1.45rem}section{padding:.8rem .8rem}
.pareto{grid-template-columns:minmax(0,1fr)}.legend{columns:2}
.samples{grid-template-columns:minmax(0,1fr)}.samples h3{margin-top:.6rem}
svg.plot text{font-size:19px}svg.plot .name{display:none}td.m{min-width:7.5rem;max-width:7.5rem}
.samples>*{grid-column:auto;grid-row:auto}.pairs{grid-template-columns:1fr}.pairs dd{margin-bottom:.4rem}}
@media print{section{break-inside:avoid;border:0}details{display:block}}
"""
