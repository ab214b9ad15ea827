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

// One plot a stage and metric, a line a run: validation where there is some, else training.
function renderComparedTraining() {
  const body = byId("training-body");
  const runs = compared.training;
  if (!runs.length) { replace(body, notice("No training run belongs to these reports.")); return; }
  const groups = [...new Set(runs.map((each) => each.group))];
  const alone = (group) => runs.filter((each) => each.group === group).length === 1;
  const names = [...new Set(runs.flatMap((each) => each.stages.map((stage) => stage.name)))];
  const blocks = names.map((name) => {
    const own = runs.flatMap((each) => each.stages.filter((stage) => stage.name === name && !stage.missing).map((stage) => ({ ...each, stage })));
    const metrics = [...new Set(own.flatMap((each) => each.stage.metrics.map((one) => one.name)))];
    const grid = html("div", { class: "grid-3" });
    for (const key of metrics) {
      const series = own.flatMap((each) => {
        const found = each.stage.metrics.find((one) => one.name === key);
        if (!found) return [];
        const split = found.splits.validation ? "validation" : Object.keys(found.splits)[0];
        const place = groups.indexOf(each.group);
        return [{ name: `${alone(each.group) ? each.group : `${each.group} (${each.run})`}, ${split}`, points: found.splits[split].points, colour: `calrec-${(place % 4) + 1}`, dash: DASHES[Math.floor(place / 4) % DASHES.length] }];
      });
      const figure = html("figure", {}, html("h3", {}, metricName(key)));
      grid.append(figure);
      linePlot(figure, { series, height: 170, xName: "Step", xFormat: (value) => count(Math.round(value)), yFormat: isRankingMetric(key) ? metric : quantity, tickFormat: isRankingMetric(key) ? metricTick : quantity,
        description: `${metricName(key)} of ${name} over steps: ` + series.map((line) => `${line.name} from ${quantity(line.points[0][1])} to ${quantity(line.points[line.points.length - 1][1])}`).join("; ") });
    }
    const missing = runs.filter((each) => !own.some((one) => one.run === each.run)).map((each) => each.run);
    return [html("div", { class: "subhead" }, html("h3", {}, name), missing.length ? html("p", { class: "note" }, `Without curves of this stage: ${missing.join(", ")}.`) : null), grid];
  });
  replace(body, blocks);
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
renderSlices({ metrics: compared });
renderComparedTraining();
renderRuns();
