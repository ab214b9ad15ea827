// The page of `calrec compare`: the rows of all runs, the paired differences, and what the runs' configs differ in.
"use strict";

const compared = JSON.parse(document.getElementById("report-data").textContent);

function renderComparedTable(view) {
  const rows = orderedRows(compared.rows);
  const named = colours(rows);
  const columns = metricColumns(rows);
  const seeds = rows.some((row) => row.seeds > 1);
  const cells = rows.map((row) => {
    const values = view === "as_it_stands" ? row.metrics : (row.views[view] || {}).metrics || {};
    return html("tr", { class: isOurs(row) ? "row-calrec" : `row-${row.kind}` }, html("th", { scope: "row" }, html("i", { class: "swatch", colour: named[row.name], "aria-hidden": "true" }), row.name),
      seeds ? html("td", {}, isOurs(row) ? count(row.seeds) : "") : null, columns.map((key) => html("td", {}, metric(values[key]),
        view === "as_it_stands" && row.deviation ? html("span", { class: "interval" }, ` ±${metric(row.deviation[key])}`) : null)));
  });
  replace(byId("results-table"), html("table", { class: "results" }, html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "Ranking"), seeds ? html("th", { scope: "col" }, "Seeds") : null, columns.map((key) => html("th", { scope: "col" }, key === "mrr" && compared.depth < compared.items ? `MRR@${compared.depth}` : metricLabel(key))))), html("tbody", {}, cells)));
  const level = `${100 * compared.bootstrap.level} %`;
  replace(byId("results-note"), document.createTextNode(`${VIEW_NAMES[view][1]} ${seeds ? "Several seeds: the mean, ± the standard deviation over runs. " : ""}Whiskers below: ${level} bootstrap over users${seeds ? ", whose rows of all seeds stay together" : ""}, as the rankings stand.`));
}

function renderRuns() {
  const diff = (lines) => (lines.length ? html("pre", { tabindex: 0 }, lines.join("\n")) : html("p", { class: "note" }, "No line differs."));
  replace(byId("runs-body"), html("p", { class: "note" }, "The lines in which the operative gin configs of the reports differ: − those of the one before, + those of this one."),
    compared.groups.map((group, place) => html("details", { open: place > 0 && place < 4 }, html("summary", {}, `${group.name}: ${group.runs.join(", ")}`),
      place ? [html("p", { class: "note" }, `Against ${compared.groups[0].name}:`), diff(group.config)] : html("p", { class: "note" }, "The reference."),
      group.within.map((lines, index) => [html("p", { class: "note" }, `Its run ${group.runs[index + 1]} against ${group.runs[0]}:`), diff(lines)]))));
}

const facts = [["Split", compared.split], ["Users evaluated", count(compared.users)], ["Catalogue", `${count(compared.items)} items`], ["Runs", count(compared.groups.reduce((sum, group) => sum + group.runs.length, 0))], ["Ties", TIES[compared.ties][0].toLowerCase()]];
replace(byId("facts"), facts.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))));
const comparedRows = orderedRows(compared.rows);
replace(byId("view-control"), choice("Ranking", "view", Object.entries(VIEW_NAMES).map(([view, [label]]) => [view, label]), "as_it_stands", renderComparedTable, false));
renderComparedTable("as_it_stands");
renderIntervals(comparedRows, colours(comparedRows));
renderCutoffs(comparedRows, colours(comparedRows));
renderComparisons({ metrics: compared });
renderRuns();
