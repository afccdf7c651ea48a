"""Style sheet and script of the report page, inlined so that the page is one file."""

from __future__ import annotations

# Line colors: Okabe and Ito's set without yellow and black, which vanish on white or dark pages;
# dashes tell methods apart where colors do not (print, color blindness).
LINES = (
    ("#0072b2", ""),
    ("#d55e00", ""),
    ("#009e73", "6 2"),
    ("#cc79a7", ""),
    ("#e69f00", "6 2"),
    ("#56b4e9", "2 2"),
    ("#8a8f2f", ""),
    ("#888888", "8 2 2 2"),
)

_BASE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #5b6470; --rule: #d8dde3;
  --panel: #f6f7f9; --best: #0b6b3a; --none: #c5ccd4; --just: #e8590c; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e6e9ed; --soft: #9aa4b0;
  --rule: #343b44; --panel: #1c2127; --best: #5fd39a; --none: #454d57; --just: #ff8a4c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px 16px 48px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 4px; border-top: 1px solid var(--rule); padding-top: 20px; }
h3 { font-size: 14px; margin: 0 0 4px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 4px 0 12px; max-width: 76ch; }
.note, figcaption { color: var(--soft); font-size: 13px; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr));
  gap: 10px 24px; margin: 16px 0 0; }
dl.facts div { border-left: 3px solid var(--rule); padding-left: 10px; }
dt { color: var(--soft); font-size: 12px; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px;
  width: 100%; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page); }
thead th { vertical-align: bottom; font-weight: 600; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--just); }
th button::after { content: "\\2195"; color: var(--soft); font-size: 11px; padding-left: 3px; }
th[aria-sort=ascending] button::after { content: "\\2191"; color: var(--ink); }
th[aria-sort=descending] button::after { content: "\\2193"; color: var(--ink); }
td.best { font-weight: 700; color: var(--best); }
.grid-of { display: flex; flex-wrap: wrap; gap: 20px 28px; margin: 12px 0; }
.grid-of.narrow { gap: 16px 14px; }
figure { margin: 0; max-width: 100%; break-inside: avoid; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; padding: 6px 0;
  list-style: none; margin: 0; background: var(--page); }
.legend li { display: flex; align-items: center; gap: 6px; }
svg { display: block; } svg text { font-family: inherit; fill: currentColor; }
.tick { font-size: 11px; fill: var(--soft) !important; }
.cell { font-size: 10px; text-anchor: middle; pointer-events: none;
  font-variant-numeric: tabular-nums; }
.on-dark { fill: #fff !important; } .on-light { fill: #111 !important; }
rect.none { fill: none; stroke: var(--none); stroke-dasharray: 2 2; }
rect.just { stroke: var(--just); stroke-width: 2; }
rect.mark { fill: var(--just); }
.grid { stroke: var(--rule); } .event { stroke: var(--just); stroke-dasharray: 3 3; fill: none; }
.line path { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .line circle { stroke: none; }
.line.strong path { stroke-width: 3; } .band { opacity: .11; stroke: none; }
details { margin: 12px 0; } summary { cursor: pointer; }
details dt { font-size: 14px; color: var(--ink); font-weight: 600; margin-top: 8px; }
@media print { body { max-width: none; padding: 0; font-size: 12px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .scroll { overflow: visible; } th button::after { content: ""; }
  h2, h3, h2 + p, summary, .legend { break-after: avoid; } .scroll, tr { break-inside: avoid; }
  thead { display: table-header-group; } th:first-child, td:first-child { position: static; }
  :root { --page: #fff; --ink: #111; --soft: #444; --rule: #ccc; --best: #0b6b3a; --none: #bbb; } }
"""

CSS = (
    _BASE
    + "".join(
        f".s{i} path{{stroke:{color};stroke-dasharray:{dash or 'none'}}}"
        f".s{i} circle,.band.s{i}{{fill:{color}}}\n"
        for i, (color, dash) in enumerate(LINES)
    )
    + ".line.floor path{stroke-dasharray:1 4;stroke-linecap:round}\n"
)

# Sorts a table by the clicked column; cells without a value go last in both directions.
# What is folded is printed too: paper cannot be unfolded.
JS = """
document.querySelectorAll("table.sortable").forEach(function (table) {
  var heads = table.querySelectorAll("thead th");
  heads.forEach(function (head, column) {
    var button = head.querySelector("button");
    if (!button) { return; }
    button.addEventListener("click", function () {
      var first = head.dataset.first || "ascending";
      var other = first === "ascending" ? "descending" : "ascending";
      var order = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach(function (one) { one.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", order);
      var sign = order === "ascending" ? 1 : -1;
      var key = function (row) { return row.cells[column].dataset.value; };
      var rows = Array.from(table.tBodies[0].rows);
      rows.sort(function (a, b) {
        var x = key(a), y = key(b);
        if (x === "" || y === "") { return x === y ? 0 : x === "" ? 1 : -1; }
        if (column === 0 || isNaN(x) || isNaN(y)) { return sign * x.localeCompare(y); }
        return sign * (Number(x) - Number(y));
      });
      rows.forEach(function (row) { table.tBodies[0].appendChild(row); });
    });
  });
});
var folded = [];
window.addEventListener("beforeprint", function () {
  folded = Array.from(document.querySelectorAll("details:not([open])"));
  folded.forEach(function (one) { one.open = true; });
});
window.addEventListener("afterprint", function () {
  folded.forEach(function (one) { one.open = false; });
});
"""
