// Comparisons with the baselines, slices, what the lists hold, and the health of generation.
"use strict";

const VIEW_NAMES = {
  as_it_stands: ["As it stands", "The ranking with everything it lists."],
  last_left_out: ["Last item left out", "The last item of the history is taken out of each list. A target that is that item counts as a miss."],
  history_left_out: ["History left out", "All items of the history are taken out of each list. A target that was bought before counts as a miss."],
  equal_text: ["By equal text", "Items with the target's text count as the target, and as one entry of the list."],
};
const SLICE_NAMES = { history_length: "History length", target_frequency: "Target in training", repeat: "Repeat or new", category: "Category", equal_text: "Equal text" };

const percent = (value, digits = 1) => (isNumber(value) ? `${(100 * value).toFixed(digits)} %` : "–");
const signed = (value) => (isNumber(value) ? `${value < 0 ? "−" : "+"}${metric(Math.abs(value))}` : "–");
// What so many resamples cannot tell from zero is shown as smaller than the smallest they can give.
const pValue = (p, resamples) => (!isNumber(p) ? "–" : p <= 1.5 / resamples ? `< ${(2 / resamples).toPrecision(1)}` : p < 0.001 ? p.toFixed(4) : p.toFixed(3));

function dataGrid(label, head, rows, classes = "results") {
  return html("div", { class: "table-scroll", tabindex: 0, role: "region", "aria-label": label }, html("table", { class: classes },
    html("thead", {}, html("tr", {}, head.map((name) => html("th", { scope: "col" }, name)))),
    html("tbody", {}, rows.map(([name, ...cells]) => html("tr", {}, html("th", { scope: "row" }, name), cells.map((cell) => (cell instanceof Node && cell.tagName === "TD" ? cell : html("td", {}, cell))))))));
}

function renderComparisons(report) {
  const { metrics } = report;
  const body = byId("comparisons-body");
  const found = metrics.comparisons || [];
  if (!found.length) { replace(body, notice("No ranking besides the baselines is in this report, so there is nothing to compare with them.")); return; }
  const resamples = (metrics.bootstrap || {}).resamples;
  const keys = [...new Set(found.map((each) => `${each.view} ${each.metric}`))];
  const main = metrics.headline || SHOWN;
  const show = (key) => {
    const [view, name] = key.split(" ");
    const chosen = found.filter((each) => each.view === view && each.metric === name);
    const rows = chosen.map((each) => [each.a, each.b, html("td", { class: each.p_holm < 0.05 ? (each.difference > 0 ? "better" : "worse") : null }, signed(each.difference)),
      html("td", { class: "interval" }, `${signed(each.interval[0])} to ${signed(each.interval[1])}`), pValue(each.p, resamples), pValue(each.p_holm, resamples)]);
    replace(body, html("p", { class: "note" }, `${metricLabel(name)} of the first ranking minus that of the second, over the same users${view === "as_it_stands" ? "" : ", both with the history left out"}. `
      + `The interval is a bootstrap over users, p a two-sided sign-flip test over users (${count(resamples)} resamples), corrected by Holm for the ${chosen.length} comparisons of this table. Coloured: p below .05 after correction.`),
    dataGrid("Comparisons", ["Ranking", "Against", "Difference", "Interval", "p", "p, Holm"], rows));
  };
  const label = (key) => { const [view, name] = key.split(" "); return metricLabel(name) + (view === "as_it_stands" ? "" : ", history left out"); };
  const first = `as_it_stands ${main}`;
  if (keys.length > 1) replace(byId("comparison-control"), select("Metric", keys.map((key) => [key, label(key)]), first, show));
  show(keys.includes(first) ? first : keys[0]);
}

function renderSlices(report) {
  const { metrics } = report;
  const body = byId("slices-body");
  const slices = metrics.slices || [];
  if (!slices.length) { replace(body, notice("metrics.json holds no slices.")); return; }
  const main = metrics.headline || SHOWN;
  const rows = orderedRows(metrics.rows || []);
  const named = colours(rows);
  const show = (name) => {
    const slice = slices.find((each) => each.name === name);
    const groups = slice.groups.filter((group) => group.users > 0);
    const empty = slice.groups.filter((group) => !group.users).map((group) => group.name);
    const figure = html("div", { class: "slice-plot" });
    const table = dataGrid(`Slices by ${words(name)}`, [SLICE_NAMES[name] || sentence(name), "Users", ...rows.map((row) => row.name)],
      slice.groups.map((group) => [group.name, count(group.users), ...rows.map((row) => {
        const own = group.rows[row.name];
        if (!own) return html("td", {}, "–");
        if (!own.interval) return html("td", {}, metric(own.metrics[main]));  // the mean of several seeds
        const [low, high] = own.interval[main];
        return html("td", { title: `${metric(low)} to ${metric(high)}` }, metric(own.metrics[main]), html("span", { class: "interval" }, ` ±${metric((high - low) / 2, 3)}`));
      })]));
    replace(body, html("p", { class: "note" }, `${metricLabel(main)} by ${slice.meaning}. ± is half the bootstrap interval.` + (empty.length ? ` Without users here: ${empty.join(", ")}.` : "")), figure, table);
    groupedBars(figure, groups.map((group) => ({ name: group.name, users: group.users, note: `${count(group.users)} ${group.users === 1 ? "user" : "users"}`, bars: rows.filter((row) => row.kind !== "oracle" && group.rows[row.name]).map((row) => ({
      name: row.name, colour: named[row.name], strong: row.kind !== "baseline", value: group.rows[row.name].metrics[main], interval: group.rows[row.name].interval && group.rows[row.name].interval[main] })) })),
    `${metricLabel(main)} by ${words(name)}`);
  };
  replace(byId("slice-control"), choice("By", "slice", slices.map((each) => [each.name, SLICE_NAMES[each.name] || sentence(each.name)]), slices[0].name, show, false));
  show(slices[0].name);
}

function renderLists(report) {
  const { metrics } = report;
  const rows = orderedRows(metrics.rows || []).filter((row) => row.beyond);
  const body = byId("lists-body");
  if (!rows.length) { replace(body, notice("metrics.json says nothing of what the lists hold.")); return; }
  const k = metrics.beyond_cutoff;
  const lists = dataGrid("What the lists hold", ["Ranking", "Coverage", "Popularity", "Lift", "Novelty", "Diversity"], rows.map(({ name, beyond }) => [name,
    percent(beyond.coverage), quantity(beyond.popularity), isNumber(beyond.popularity_lift) ? `× ${quantity(beyond.popularity_lift)}` : "–", isNumber(beyond.novelty) ? beyond.novelty.toFixed(2) : "–", isNumber(beyond.diversity) ? beyond.diversity.toFixed(3) : "–"]));
  const files = rows.filter((row) => row.findings);
  replace(body, html("p", { class: "note" }, `Of the first ${k} items of every list. Coverage: share of the catalogue that stands in some list. Popularity: how often a listed item was bought in training, and its lift over a training purchase's item. `
    + "Novelty: mean of −log2 of the share of users who bought the item. Diversity: mean distance of two items of a list, 1 minus the Jaccard index of their words."), lists,
  files.map((row) => [html("div", { class: "subhead" }, html("h3", {}, `${row.name}: ${row.file}`)), row.findings.length
    ? dataGrid(`What could not be matched in ${row.file}`, ["Could not be matched", "Count", "Examples"], row.findings.map((each) => [upper(each.what), count(each.count), html("td", { class: "text" }, each.examples.join(", "))]))
    : notice("Everything in this file was matched.")]));
}

function renderGeneration(report) {
  const made = report.metrics.generation || [];
  const body = byId("generation-body");
  if (!made.length) { replace(body, notice("No completions belong to this report.")); return; }
  const health = dataGrid("Health of generation", ["Completions", "Users", "A user", "distinct", "Of the catalogue", "No match", "Ended", "Margin, nats", "Target reached"], made.map((each) => [each.name,
    count(each.users - each.users_without_completions), quantity(each.completions_a_user), quantity(each.distinct_texts_a_user), percent(each.catalogue_share), percent(each.no_match_share, 2), percent(each.finished_share),
    isNumber(each.margin_median) ? each.margin_median.toFixed(2) : "–", percent(each.reached, 2)]));
  const errors = made.flatMap((each) => Object.entries(each.errors || {}).map(([ranking, cases]) => {
    const users = Object.values(cases).reduce((sum, value) => sum + value, 0);
    return [ranking, html("td", { class: "text" }, each.name), ...["reached_hit", "reached_miss", "not_reached_hit", "not_reached_miss"].map((name) => `${count(cases[name])} (${percent(cases[name] / users)})`)];
  }));
  replace(body, html("p", { class: "note" }, "A user's completions, how many are distinct, the share that are texts of the catalogue, that share no word with it, that ended before the limit; the median log-probability of the first distinct text over the second; and the share of users for whom some completion is the target's text."), health,
    errors.length ? [html("div", { class: "subhead" }, html("h3", {}, "Errors of generation and of ranking"), html("p", { class: "note" }, "Users by whether a completion is the target, and whether the ranking has the target among its first ten. A target that was written and not ranked is the ranking's error; one that was not written is the generation's.")),
      dataGrid("Errors of generation and of ranking", ["Ranking", "Completions", "Written, ranked", "Written, missed", "Not written, ranked", "Not written, missed"], errors)] : null);
}
