// Curves of each training stage, the data card, the cost table and the hashes at the foot of the page.
"use strict";

const SPLIT_STYLE = {
  train: { colour: "baseline-2", kind: "series-faint" },
  validation: { colour: "calrec-1", kind: "series-strong", dots: true },
};
const METRIC_NAMES = {
  loss: "Loss", loss_next_item: "Next-item generation loss", loss_target_target: "Contrastive loss, target–target", loss_user_target: "Contrastive loss, user–target",
  tokens_per_second: "Tokens per second", learning_rate: "Learning rate", grad_norm: "Gradient norm",
};

const isRankingMetric = (key) => /^(recall|ndcg|mrr)(@|$)/.test(key);
const metricName = (key) => METRIC_NAMES[key] || (isRankingMetric(key) ? metricLabel(key) : sentence(key));

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.floor(Math.round(seconds) / 60);
  if (minutes < 60) return `${minutes} min ${String(Math.round(seconds) % 60).padStart(2, "0")} s`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function stageSummary(stage) {
  const parts = [`${count(stage.last_step)} steps`];
  const validation = (stage.metrics.find((each) => each.name === "loss") || { splits: {} }).splits.validation;
  if (validation) {
    const low = validation.best;
    parts.push(`lowest validation loss ${quantity(low[1])} at step ${count(low[0])}`);
  } else parts.push("no validation loss recorded");
  if (isNumber(stage.tokens_per_second)) parts.push(`${quantity(stage.tokens_per_second)} tokens per second (median)`);
  return parts.join(", ") + ".";
}

function renderTraining(report) {
  const body = byId("training-body");
  if (!report.training.length) {
    replace(body, notice("No training run belongs to this report."));
    return;
  }
  const blocks = [];
  for (const stage of report.training) {
    const head = html("div", { class: "subhead" }, html("h3", {}, stage.name));
    blocks.push(head);
    if (stage.missing) { blocks.push(notice(stage.missing)); continue; }
    const notes = [stageSummary(stage)];
    if (stage.averaged > 1) notes.push(`Training points are means over up to ${stage.averaged} consecutive records.`);
    if (stage.skipped_lines) notes.push(`${count(stage.skipped_lines)} ${stage.skipped_lines === 1 ? "line" : "lines"} of metrics.jsonl could not be read.`);
    head.append(html("p", { class: "note" }, notes.join(" ")));
    const grid = html("div", { class: "grid-3" });
    blocks.push(grid);
    for (const { name, splits } of stage.metrics) {
      const figure = html("figure", {}, html("h3", {}, metricName(name)));
      const series = Object.entries(splits).map(([split, { points }]) => ({ name: split, points, ...(SPLIT_STYLE[split] || { colour: "calrec-2" }) }));
      if (series.length === 1) Object.assign(series[0], { kind: "", dots: series[0].dots && series[0].points.length < 60 });
      grid.append(figure);
      linePlot(figure, {
        series, height: 170, xName: "Step", xFormat: (value) => count(Math.round(value)), yFormat: isRankingMetric(name) ? metric : quantity,
        tickFormat: isRankingMetric(name) ? metricTick : quantity,
        description: `${metricName(name)} over steps: ` + series.map((line) => `${line.name} from ${quantity(line.points[0][1])} to ${quantity(line.points[line.points.length - 1][1])}`).join("; "),
      });
    }
  }
  replace(body, blocks);
}

const isRecord = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const plain = (value) => (typeof value === "number" ? (Number.isInteger(value) ? count(value) : quantity(value))
  : value === true ? "yes" : value === false ? "no" : value === null || value === undefined ? "–"
    : isHash(value) ? shortHash(value)
      : Array.isArray(value) ? value.map(String).join(", ") || "none"
        : typeof value === "object" ? JSON.stringify(value) : String(value));

// The reading order of what preparation counts; other names follow as they come.
const FACT_ORDER = ["users", "items", "interactions", "first_day", "last_day", "length_min", "length_median", "length_mean", "length_max",
  "repeats", "consecutive_repeats", "tied", "repeated_test_targets", "tied_test_targets", "same_day_test_targets"];

// A count and its `_share` are one fact; seconds since 1970 are left to data_card.json where the day is given.
function pairs(title, record) {
  const place = (name) => (FACT_ORDER.includes(name) ? FACT_ORDER.indexOf(name) : FACT_ORDER.length);
  const names = Object.keys(record).filter((name) => !(name.endsWith("_share") && name.slice(0, -6) in record) && !(name.endsWith("_time") && name.replace(/_time$/, "_day") in record))
    .sort((a, b) => place(a) - place(b));
  const rows = names.map((name) => html("div", {}, html("dt", {}, sentence(name)),
    html("dd", {}, plain(record[name]), isNumber(record[`${name}_share`]) ? ` (${(100 * record[`${name}_share`]).toFixed(1)} %)` : null)));
  return html("div", {}, html("h3", {}, title), html("dl", { class: "pairs" }, rows));
}

const share = (part, whole) => (!isNumber(part) || !(whole > 0) ? "–" : part > 0 && part / whole < 5e-5 ? "< 0.01 %" : `${((100 * part) / whole).toFixed(2)} %`);

function dataTable(label, caption, head, rows) {
  return html("div", {}, html("p", { class: "note" }, caption), html("div", { class: "table-scroll", tabindex: 0, role: "region", "aria-label": label }, html("table", {},
    html("thead", {}, html("tr", {}, head.map((name, index) => html("th", { scope: "col", class: index ? null : "text" }, name)))),
    html("tbody", {}, rows.map(([name, ...cells]) => html("tr", {}, html("th", { scope: "row", class: "text" }, name), cells.map((cell) => html("td", {}, cell))))))));
}

// What each rule of preparation dropped. A rule counts one or more things, as `<thing>_in` and `<thing>_out`.
function rulesTable(rules) {
  const units = [...new Set(rules.flatMap((rule) => Object.keys(rule)))].filter((key) => key.endsWith("_in")).map((key) => key.slice(0, -3)).sort();
  const head = ["Rule", ...units.flatMap((unit) => [`${sentence(unit)} dropped`, "Share", "Left"])];
  const rows = rules.map((rule) => [sentence(rule.rule ?? rule.name ?? "–"), ...units.flatMap((unit) => {
    const [before, after] = [rule[`${unit}_in`], rule[`${unit}_out`]];
    const dropped = before - after;
    return dropped ? [count(dropped), share(dropped, before), count(after)] : ["0", "–", count(after)];
  })]);
  return dataTable("Rules of preparation", "What the rules of preparation dropped, in the order they ran.", head, rows);
}

// What became of the lines of the raw files: kept, dropped by a rule, or put aside as bad; repaired lines are kept ones.
function linesTables(files) {
  return Object.entries(files).filter(([, file]) => isRecord(file)).map(([role, file]) => {
    const part = (kind, verb) => Object.entries(isRecord(file[kind]) ? file[kind] : {}).map(([reason, number]) => [`${verb}: ${words(reason)}`, count(number), share(number, file.lines)]);
    const rows = [["Read", count(file.lines), "–"], ...part("dropped", "Dropped"), ...part("quarantined", "Put in quarantine"),
      ["Kept", count(file.kept), share(file.kept, file.lines)], ...part("repaired", "Kept, mended")];
    return dataTable(`Lines of ${role}`, `${sentence(role)}${file.file ? `: ${file.file}` : ""}`, ["What became of the lines", "Lines", "Share"], rows);
  });
}

function genericTable(title, records) {
  const columns = [...new Set(records.flatMap((record) => Object.keys(record)))];
  return html("div", {}, html("h3", {}, title), html("div", { class: "table-scroll", tabindex: 0, role: "region", "aria-label": title }, html("table", {},
    html("thead", {}, html("tr", {}, columns.map((name, index) => html("th", { scope: "col", class: records.every((record) => typeof record[name] === "number") && index ? null : "text" }, words(name))))),
    html("tbody", {}, records.map((record) => html("tr", {}, columns.map((name) => html("td", { class: typeof record[name] === "number" ? null : "text" }, plain(record[name])))))))));
}

function renderData(report) {
  const card = report.card;
  const body = byId("data-body");
  if (!isRecord(card) || !Object.keys(card).length) { replace(body, notice("The dataset has no data card.")); return; }
  const tables = [];
  const grids = [];
  const loose = {};
  const rules = Array.isArray(card.rules) && card.rules.length && card.rules.every(isRecord) ? rulesTable(card.rules) : null;
  const lines = isRecord(card.lines) ? html("div", { class: "pair" }, linesTables(card.lines)) : null;
  for (const [name, value] of Object.entries(card)) {
    if (["name", rules && "rules", lines && "lines"].includes(name)) continue;
    if (Array.isArray(value) && value.length && value.every(isRecord)) tables.push(genericTable(sentence(name), value));
    else if (isRecord(value)) {
      const nested = Object.entries(value).filter(([, each]) => isRecord(each));
      const flat = Object.fromEntries(Object.entries(value).filter(([, each]) => !isRecord(each)));
      if (Object.keys(flat).length) grids.push(pairs(sentence(name), flat));
      for (const [inner, each] of nested) grids.push(pairs(`${sentence(name)}: ${words(inner)}`, each));
    } else loose[name] = value;
  }
  if (Object.keys(loose).length) grids.unshift(pairs("In all", loose));
  replace(body, rules, lines, grids.length ? html("div", { class: "card-grid" }, grids) : null, tables);
}

function renderCost(report) {
  const body = byId("cost-body");
  if (!report.timing.length) { replace(body, notice("No timings were recorded for this run.")); return; }
  const total = report.timing.reduce((sum, step) => sum + step.seconds, 0);
  replace(body, html("p", { class: "note" }, "Wall-clock time of the steps that were finished before this report was written."), html("div", { class: "table-scroll narrow", tabindex: 0, role: "region", "aria-label": "Time of each step" }, html("table", {},
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "Step"), html("th", { scope: "col" }, "Time"), html("th", { scope: "col" }, "Share"))),
    html("tbody", {}, report.timing.map((step) => html("tr", {}, html("th", { scope: "row", class: "text" }, upper(step.step)), html("td", {}, duration(step.seconds)),
      html("td", {}, total ? `${((100 * step.seconds) / total).toFixed(1)} %` : "–")))),
    html("tbody", {}, html("tr", {}, html("th", { scope: "row" }, "In all"), html("td", {}, duration(total)), html("td", {}, ""))))));
}

function renderProvenance(report) {
  const rows = Object.entries({ dataset: report.dataset.hash, template: report.dataset.template, ...(isRecord(report.metrics.made_from) ? report.metrics.made_from : {}) });
  replace(byId("provenance"), html("p", {}, "Made from, by hash:"), html("dl", {}, rows.map(([name, value]) => [html("dt", {}, words(name)), html("dd", {}, html("code", {}, isHash(value) ? value : plain(value)))])));
}
