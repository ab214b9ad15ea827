// Header, results table with its choice of tie rule, and the two plots of ranking metrics.
"use strict";

const TIES = {
  mean_rank: ["Mean rank", "Items with equal scores share the mean of their ranks."],
  expected: ["Expected", "Metrics averaged over all orders of items with equal scores."],
  optimistic: ["Optimistic", "The target stands before all items with the same score: an upper bound."],
  pessimistic: ["Pessimistic", "The target stands behind all items with the same score: a lower bound."],
};
const DASHES = [null, "7 3", "2 3", "9 3 2 3", "4 2", "1 4"];
const KINDS = ["calrec", "other", "baseline", "oracle"];
const SHOWN = "ndcg@10";
const isOurs = (row) => row.kind === "calrec" || row.kind === "other";

function orderedRows(rows) {
  const kindOf = (row) => Math.max(0, KINDS.indexOf(row.kind));
  return rows.map((row, index) => ({ row, index }))
    .sort((a, b) => kindOf(a.row) - kindOf(b.row) || a.index - b.index).map(({ row }) => row);
}

function colours(rows) {
  const seen = { calrec: 0, baseline: 0, oracle: 0 };  // rankings of others go on in CALRec's colours
  const named = {};
  for (const row of rows) {
    const kind = row.kind === "other" ? "calrec" : KINDS.includes(row.kind) ? row.kind : "baseline";
    const number = seen[kind]++;
    named[row.name] = kind === "oracle" ? "oracle" : `${kind}-${(number % (kind === "calrec" ? 4 : 6)) + 1}`;
  }
  return named;
}

// Recall, NDCG and MRR in this order, cut-offs rising; a report names others freely, they stay in metrics.json.
function metricColumns(rows) {
  const keys = [...new Set(rows.flatMap((row) => Object.keys(row.metrics || {})))];
  const family = (name) => keys.filter((key) => key === name || key.startsWith(name + "@"))
    .sort((a, b) => Number(a.split("@")[1] || 0) - Number(b.split("@")[1] || 0));
  return [...family("recall"), ...family("ndcg"), ...family("mrr")];
}

function valuesUnder(row, ties, standard) {
  if (row.ties && row.ties[ties]) return row.ties[ties];
  return ties === standard ? row.metrics || {} : {};
}

function renderHeader(report) {
  const { metrics, dataset } = report;
  const facts = [
    ["Split", metrics.split], ["Users evaluated", count(metrics.users)], ["Catalogue", `${count(metrics.items)} items`],
    ["Interactions", count(dataset.interactions)],
    ["Ranking depth", metrics.depth >= metrics.items ? "whole catalogue" : `${count(metrics.depth)} items`],
    ["Ties", (TIES[metrics.ties] || [words(metrics.ties)])[0].toLowerCase()],
  ];
  replace(byId("facts"), facts.filter(([, value]) => value !== undefined && value !== null)
    .map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))));

  const best = (kind) => metrics.rows.filter((row) => row.kind === kind && row.metrics && isNumber(row.metrics[SHOWN]))
    .sort((a, b) => b.metrics[SHOWN] - a.metrics[SHOWN])[0];
  const told = (row) => {
    const interval = row.interval && row.interval[SHOWN];
    return [html("strong", {}, row.name), ` ${metric(row.metrics[SHOWN])}`, interval ? ` (${metric(interval[0])} to ${metric(interval[1])})` : ""];
  };
  const against = (row) => (metrics.comparisons || []).find((each) => row && baseline && each.view === "as_it_stands" && each.metric === SHOWN && each.a === row.name && each.b === baseline.name);
  const parts = [];
  const [calrec, other, baseline, oracle] = KINDS.map(best);
  if (calrec) parts.push("NDCG@10: ", told(calrec), ".");
  if (other) parts.push(calrec ? " Made by others: " : "NDCG@10: ", told(other), ".");
  if (baseline) parts.push(calrec || other ? " Best baseline: " : "Best baseline, NDCG@10: ", told(baseline), ".");
  const tested = against(calrec || other);
  if (tested) parts.push(` Difference ${signed(tested.difference)}, p ${pValue(tested.p_holm, metrics.bootstrap.resamples)} after Holm's correction.`);
  if (oracle) parts.push(" Ceiling: ", told(oracle), ".");
  replace(byId("summary"), parts.flat(Infinity).map((part) => (part instanceof Node ? part : document.createTextNode(part))));
}

// The values of a row, and its interval of the headline metric, in a view and under a tie rule; views have the standard one.
function shownOf(row, view, ties, standard) {
  if (view !== "as_it_stands") return { values: (row.views && row.views[view] && row.views[view].metrics) || {}, interval: row.views && row.views[view] && row.views[view].interval[SHOWN] };
  return { values: valuesUnder(row, ties, standard), interval: ties === standard && row.interval ? row.interval[SHOWN] : null };
}

function renderTable(report, rows, named, ties, view) {
  const standard = report.metrics.ties;
  const columns = metricColumns(rows);
  const compared = rows.filter((row) => row.kind !== "oracle");
  const best = Object.fromEntries(columns.map((key) => [key, Math.max(...compared.map((row) => shownOf(row, view, ties, standard).values[key] ?? -1))]));
  const hasIntervals = rows.some((row) => row.interval && row.interval[SHOWN]);
  const head = html("tr", {}, html("th", { scope: "col" }, "Ranking"), columns.flatMap((key) => [
    html("th", { scope: "col" }, key === "mrr" && report.metrics.depth < report.metrics.items ? `MRR@${report.metrics.depth}` : metricLabel(key)),
    key === SHOWN && hasIntervals ? html("th", { scope: "col" }, "interval") : null]));
  const bodies = KINDS.map((kind) => {
    const group = rows.filter((row) => (KINDS.includes(row.kind) ? row.kind : "baseline") === kind);
    if (!group.length) return null;
    return html("tbody", {}, group.map((row) => {
      const { values, interval } = shownOf(row, view, ties, standard);
      const swatch = html("i", { class: kind === "oracle" ? "swatch swatch-oracle" : "swatch", colour: named[row.name], "aria-hidden": "true" });
      const cells = columns.flatMap((key) => {
        const isBest = kind !== "oracle" && isNumber(values[key]) && values[key] === best[key] && best[key] > 0;
        const cell = html("td", { class: isBest ? "best" : null }, metric(values[key]));
        if (key !== SHOWN || !hasIntervals) return [cell];
        return [cell, html("td", { class: "interval" }, interval ? `${metric(interval[0])}–${metric(interval[1])}` : "–")];
      });
      return html("tr", { class: `row-${kind === "other" ? "calrec" : kind}` }, html("th", { scope: "row" }, swatch, row.name), cells);
    }));
  });
  replace(byId("results-table"), html("table", { class: "results" }, html("caption", { class: "visually-hidden" }, `Ranking metrics, ties: ${(TIES[ties] || [ties])[0]}`), html("thead", {}, head), bodies.filter(Boolean)));
}

function renderResults(report) {
  const { metrics } = report;
  const rows = orderedRows(metrics.rows || []);
  if (!rows.length) {
    replace(byId("results-table"), notice("No ranking has been evaluated yet: metrics.json holds no rows."));
    byId("interval-plot").parentNode.remove();
    return;
  }
  const named = colours(rows);
  const available = Object.keys(TIES).filter((ties) => ties === metrics.ties || rows.some((row) => row.ties && row.ties[ties]));
  const intervals = rows.some((row) => row.interval && row.interval[SHOWN]);
  const notes = [];
  if (rows.some((row) => row.kind === "oracle")) notes.push("The oracle knows the probabilities that the purchases were drawn from: it is a ceiling, not a competitor.");
  if (intervals) {
    const made = metrics.bootstrap || {};
    const how = [isNumber(made.level) ? `${100 * made.level} %` : null, isNumber(made.resamples) ? `${count(made.resamples)} resamples of the users` : "over users"];
    notes.push(`The interval of NDCG@10 is a bootstrap (${how.filter(Boolean).join(", ")}), with ties by ${(TIES[metrics.ties] || [metrics.ties])[0].toLowerCase()}.`);
  }
  if (metrics.population === "ranked") notes.push("Only users whom every ranking covers are counted.");
  for (const row of rows) {
    if (row.users_without_ranking > 0 && metrics.population !== "ranked") notes.push(`${row.name} has no list for ${count(row.users_without_ranking)} users, who count as misses.`);
  }
  const cutRows = rows.filter((row) => row.leave_out_history && row.leave_out_history !== "none");
  if (cutRows.length) notes.push(`Made with rank.leave_out_history: ${cutRows.map((row) => `${row.name} (${row.leave_out_history})`).join(", ")}.`);
  notes.push("Bold: the highest value of a column, without the oracle.");
  replace(byId("results-note"), document.createTextNode(notes.join(" ")));
  const state = { ties: metrics.ties, view: "as_it_stands" };
  const views = Object.keys(VIEW_NAMES).filter((view) => view === "as_it_stands" || rows.some((row) => row.views && row.views[view]));
  const show = (changed) => {
    Object.assign(state, changed);
    const plainView = state.view === "as_it_stands";
    byId("ties-control").hidden = !plainView;
    const ties = plainView ? state.ties : metrics.ties;
    const counts = { last_left_out: metrics.targets_last_item, history_left_out: metrics.targets_in_history, equal_text: metrics.targets_of_shared_text }[state.view];
    const told = plainView ? "" : `${VIEW_NAMES[state.view][1]}${isNumber(counts) ? ` It concerns the targets of ${count(counts)} users.` : ""} `;
    replace(byId("ties-note"), document.createTextNode(told + (TIES[ties] || [ties, ""])[1] + (metrics.depth < metrics.items
      ? ` Rankings end at depth ${count(metrics.depth)} of ${count(metrics.items)} items: a target beyond it counts as not found.` : "")));
    renderTable(report, rows, named, ties, state.view);
  };
  if (views.length > 1) replace(byId("view-control"), choice("Ranking", "view", views.map((view) => [view, VIEW_NAMES[view][0]]), "as_it_stands", (view) => show({ view }), false));
  if (available.length > 1) replace(byId("ties-control"), choice("Ties", "ties", available.map((ties) => [ties, TIES[ties][0]]), metrics.ties, (ties) => show({ ties })));
  show({});
  renderIntervals(rows, named);
  renderCutoffs(rows, named);
}

function renderIntervals(rows, named) {
  const bars = rows.filter((row) => row.metrics && isNumber(row.metrics[SHOWN])).map((row) => ({
    name: row.name, value: row.metrics[SHOWN], interval: row.interval && row.interval[SHOWN] && row.interval[SHOWN].every(isNumber) ? row.interval[SHOWN] : null,
    colour: named[row.name], oracle: row.kind === "oracle", strong: isOurs(row),
  }));
  const figure = byId("interval-plot");
  if (!bars.length) { figure.remove(); return; }
  const whiskers = bars.some((bar) => bar.interval);
  figure.append(html("div", { class: "figure-head" }, html("h3", {}, "NDCG@10")),
    html("p", { class: "note" }, whiskers ? "Whiskers: bootstrap interval over users." : "No bootstrap intervals in metrics.json."));
  barPlot(figure, bars, "NDCG@10: " + bars.map((bar) => `${bar.name} ${metric(bar.value)}`).join(", "));
}

function renderCutoffs(rows, named) {
  const figure = byId("cutoff-plot");
  const families = [["recall", "Recall"], ["ndcg", "NDCG"]].filter(([family]) => metricColumns(rows).filter((key) => key.startsWith(family + "@")).length > 1);
  if (!families.length) { figure.remove(); return; }
  const body = html("div");
  const baselines = rows.filter((row) => row.kind === "baseline");
  const show = (family) => {
    const cuts = metricColumns(rows).filter((key) => key.startsWith(family + "@")).map((key) => Number(key.split("@")[1]));
    const series = rows.map((row) => ({
      name: row.name, colour: named[row.name], kind: isOurs(row) ? "series-strong" : "", dots: isOurs(row), dash: row.kind === "oracle" ? "5 5" : DASHES[baselines.indexOf(row) % DASHES.length],
      points: cuts.map((cut) => [cut, row.metrics[`${family}@${cut}`]]).filter((point) => isNumber(point[1])),
    })).filter((line) => line.points.length);
    body.replaceChildren();
    linePlot(body, {
      series, even: true, zero: true, height: Math.max(220, rows.length * 30 - 30), legendTable: true, at: cuts.includes(10) ? 10 : cuts[cuts.length - 1],
      xName: "Cut-off", xFormat: String, yFormat: metric, tickFormat: metricTick,
      description: `${family} by cut-off: ` + series.map((line) => `${line.name} ${line.points.map(([cut, value]) => `${metric(value)} at ${cut}`).join(", ")}`).join("; "),
    });
  };
  figure.append(html("div", { class: "figure-head" }, html("h3", {}, "By cut-off"), families.length > 1 ? choice("Metric", "cutoff-family", families, families[0][0], show, false) : null),
    html("p", { class: "note" }, "Move over the plot, or use the arrow keys on it, to read values."), body);
  show(families[0][0]);
}
