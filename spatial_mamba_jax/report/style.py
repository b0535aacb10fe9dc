"""The style sheet of a report.

Numbers never break. What is wider than a phone scrolls on its own.
"""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --text: #1c2127; --muted: #57606b;
  --rule: #dde1e6; --grid: #e6e9ed; --tint: #eef4fa;
  --train: #0072b2; --ema: #d55e00; --raw: #00805c;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1a1e24; --text: #e6e9ed; --muted: #a2abb6;
    --rule: #333a43; --grid: #2a3038; --tint: #1f2c38;
    --train: #56b4e9; --ema: #f0883e; --raw: #3fc89c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); max-width: 68rem; margin: 0 auto;
  padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem; }
h3 { font-size: .9375rem; font-weight: 600; margin: 0; }
p { margin: .4rem 0; }
.note { border-left: 4px solid var(--ema); padding-left: .75rem; }
.quiet, .unit, small, .axis { color: var(--muted); font-weight: 400; }
small, .unit, .quiet, figcaption { font-size: .8125rem; }

.facts { display: grid; gap: .75rem; margin: 1.25rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.facts > div, .card, .chart { background: var(--card); padding: .75rem 1rem;
  border: 1px solid var(--rule); border-radius: .5rem; min-width: 0; }
dt { font-size: .8125rem; color: var(--muted); }
dd { margin: 0; font-size: 1.25rem; font-weight: 600; line-height: 1.4; }
dd.value { white-space: nowrap; }
dd small { display: block; white-space: normal; }

.card { overflow-x: auto; padding-block: .35rem; font-size: .875rem; }
table { border-collapse: collapse; font-size: inherit; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: baseline;
  padding: .35rem .75rem .35rem 0; border-top: 1px solid var(--rule); }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; }
tr > :last-child { padding-right: 0; }
.number { text-align: right; white-space: nowrap; }
.scores { width: fit-content; max-width: 100%; }
.scores th { font-weight: 400; color: var(--muted); }
.scores .number { padding-inline: .75rem; }
.scores th.number { white-space: normal; }
.scores .best { background: var(--tint); }
.scores .score > * { font-weight: 600; color: var(--text); }
.times th { font-weight: 400; }
.times small { display: block; }
.share { width: 40%; white-space: nowrap; }
.share .number { display: inline-block; width: 3.5rem; }
.bar { display: inline-block; height: .65em; margin-left: .75rem;
  min-width: 1px; width: calc((100% - 4.5rem) * var(--share));
  background: var(--train); border-radius: 1px; }
.fields th { width: 45%; font-weight: 400; color: var(--muted); }
.fields th, .fields td { overflow-wrap: anywhere; }

.charts { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.chart { display: flex; flex-direction: column; padding-bottom: .5rem; }
.legend { list-style: none; margin: .25rem 0 0; padding: 0; display: flex;
  flex-wrap: wrap; gap: 0 1rem; font-size: .8125rem; color: var(--muted); }
.legend svg { width: 26px; height: 10px; margin-right: .4rem; }
.chart header { padding-bottom: 1.4rem; }
.plot { position: relative; height: 8rem; font-size: .75rem; line-height: 1;
  margin: auto .75rem 1.4rem calc(var(--letters) + .6rem);
  color: var(--muted); font-variant-numeric: tabular-nums; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot span { position: absolute; white-space: nowrap; }
.plot .y { right: calc(100% + .4rem); transform: translateY(50%); }
.plot .x { top: calc(100% + .4rem); transform: translateX(-50%); }
.plot span.best { bottom: calc(100% + .25rem); transform: translateX(-50%); }
.axis { font-size: .75rem; text-align: center; margin: 0; }
path { fill: none; stroke: var(--train); stroke-width: 2;
  vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.grid { stroke: var(--grid); stroke-width: 1; }
path.best { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 2 3; }
.ema { stroke: var(--ema); }
.raw { stroke: var(--raw); }
.d1 { stroke-dasharray: 7 4; }
.d2 { stroke-dasharray: 2 3; }
.d3 { stroke-dasharray: 8 3 2 3; }
.dot { stroke-width: 6; stroke-linecap: round; stroke-dasharray: none; }

figure { margin: 0; width: fit-content; max-width: 100%; }
figure img { display: block; margin-top: .4rem; max-width: 100%; height: auto;
  border-radius: .25rem; }
figcaption { margin: .35rem 0; color: var(--muted); }

@media (max-width: 36rem) {
  .fields tr { display: flex; flex-wrap: wrap; gap: 0 1rem;
    justify-content: space-between; padding: .35rem 0;
    border-top: 1px solid var(--rule); }
  .fields tr:first-child { border-top: 0; }
  .fields th, .fields td { width: auto; min-width: 0; padding: 0;
    border-top: 0; }
  .share { width: auto; }
  .bar { display: none; }
  body { padding-inline: .75rem; }
  .card { padding-inline: .75rem; }
  .scores { font-size: .8125rem; }
  .scores th { padding-right: .3rem; }
  .scores .number { padding-inline: .25rem; }
}
@media print {
  :root { color-scheme: light; --page: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  img { max-height: 24cm; }
  tr, img, .chart, .facts > div { break-inside: avoid; }
}
"""
