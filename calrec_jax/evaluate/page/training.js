// Curves of each training stage.
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
