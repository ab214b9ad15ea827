// Two plots in plain SVG: horizontal bars with intervals, and lines over steps or cut-offs. They are drawn at the
// width they have on screen, so that text keeps its size, and again when the width changes.
"use strict";

function ticksBetween(low, high, wanted) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power)
    .reduce((best, each) => (Math.abs(span / each - wanted) < Math.abs(span / best - wanted) ? each : best));
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) ticks.push(k * step);
  return ticks;
}

// Calls draw(width) now and whenever the container's width has changed.
function drawn(container, draw) {
  let width = 0;
  const observer = new ResizeObserver((entries) => {
    const now = Math.floor(entries[0].contentRect.width);
    // Drawn in the next frame: a plot that changes its height while sizes are observed makes the browser complain.
    if (now > 0 && now !== width) { width = now; requestAnimationFrame(() => draw(now)); }
  });
  observer.observe(container);
}

// Shortens an SVG text to `room` pixels; the whole string stays reachable as its title.
function fitText(node, room) {
  const whole = node.textContent;
  let shown = whole;
  while (shown.length > 3 && node.getComputedTextLength() > room) {
    shown = shown.slice(0, -1);
    node.textContent = shown.trimEnd() + "…";
  }
  if (shown !== whole) node.append(svg("title", {}, whole));
}

// bars: [{name, value, interval: [low, high] | null, colour, oracle, strong}], drawn in the order given.
function barPlot(container, bars, description) {
  const holder = html("div");
  container.append(holder);
  drawn(holder, (width) => {
    const labelRoom = Math.round(Math.min(190, width * 0.34));
    const valueRoom = 50;
    const pitch = 30;
    const height = bars.length * pitch + 28;
    const highest = Math.max(1e-9, ...bars.map((bar) => Math.max(bar.value, bar.interval ? bar.interval[1] : 0)));
    const ticks = ticksBetween(0, highest, width < 420 ? 3 : 5);
    const right = width - valueRoom;
    const x = (value) => labelRoom + 12 + ((right - labelRoom - 12) * value) / highest;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": description });
    for (const tick of ticks) {
      picture.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 0, y2: height - 26 }),
        svg("text", { x: x(tick), y: height - 8, "text-anchor": "middle" }, metricTick(tick)));
    }
    const labels = bars.map((bar, row) => {
      const middle = row * pitch + pitch / 2;
      const label = svg("text", { class: bar.strong ? "strong" : null, x: labelRoom, y: middle + 4, "text-anchor": "end" }, bar.name);
      picture.append(label,
        svg("rect", { class: bar.oracle ? "bar-oracle" : "bar", colour: bar.colour, x: x(0), y: middle - 7, width: Math.max(0, x(bar.value) - x(0)), height: 14, rx: 2 }),
        svg("text", { class: bar.strong ? "strong" : null, x: width, y: middle + 4, "text-anchor": "end" }, metric(bar.value)));
      if (bar.interval) {
        const [low, high] = bar.interval.map(x);
        picture.append(svg("path", { class: "whisker-back", d: `M${low} ${middle}H${high}` }),
          svg("path", { class: "whisker", d: `M${low} ${middle}H${high}M${low} ${middle - 4}v8M${high} ${middle - 4}v8` }));
      }
      return label;
    });
    holder.replaceChildren(picture);
    labels.forEach((label) => fitText(label, labelRoom));
  });
}

// groups: [{name, note, bars}], a small plot for each, on one scale.
function groupedBars(container, groups, description) {
  // Groups of a few users have intervals that would flatten all others: they do not set the scale and are cut by it.
  const large = groups.filter((group) => group.users >= 30);
  const highest = Math.max(1e-9, ...(large.length ? large : groups).flatMap((group) => group.bars.map((bar) => Math.max(bar.value, bar.interval ? bar.interval[1] : 0))));
  const legend = html("ul", { class: "legend" }, (groups[0] ? groups[0].bars : []).map((bar) => html("li", {}, html("i", { class: "swatch", colour: bar.colour, "aria-hidden": "true" }), bar.name)));
  const grid = html("div", { class: "slice-grid" }, groups.map((group) => {
    const holder = html("div");
    drawn(holder, (width) => {
      const pitch = 13;
      const x = (value) => 2 + ((width - 52) * Math.min(value, highest)) / highest;
      const picture = svg("svg", { viewBox: `0 0 ${width} ${group.bars.length * pitch + 4}`, height: group.bars.length * pitch + 4, role: "img",
        "aria-label": `${description}, ${group.name}: ` + group.bars.map((bar) => `${bar.name} ${metric(bar.value)}`).join(", ") });
      group.bars.forEach((bar, row) => {
        const middle = row * pitch + pitch / 2 + 2;
        picture.append(svg("rect", { class: "bar", colour: bar.colour, x: x(0), y: middle - 4, width: Math.max(0.5, x(bar.value) - x(0)), height: 8, rx: 1 }, svg("title", {}, `${bar.name} ${metric(bar.value)}`)));
        if (bar.interval) picture.append(svg("path", { class: "whisker", d: `M${x(bar.interval[0])} ${middle}H${x(bar.interval[1])}` }));
        picture.append(svg("text", { class: bar.strong ? "strong" : null, x: width, y: middle + 4, "text-anchor": "end" }, metric(bar.value)));
      });
      holder.replaceChildren(picture);
    });
    return html("figure", {}, html("h4", {}, group.name), html("p", { class: "note" }, group.note), holder);
  }));
  container.append(legend, grid);
}

function lineSwatch(series) {
  return svg("svg", { viewBox: "0 0 20 10", "aria-hidden": "true" },
    svg("path", { class: `series ${series.kind || ""}`, colour: series.colour, "stroke-dasharray": series.dash, d: "M1 5H19" }));
}

// options: {series: [{name, points: [[x, y]], colour, dash, kind, dots}], xTicks, xFormat, yFormat, xName, zero, height,
// tickFormat, legendTable, at, description}. The legend shows the values at the cursor (pointer, or arrow keys on the plot).
function linePlot(container, options) {
  const { series, yFormat } = options;
  const tickFormat = options.tickFormat || yFormat;
  const xs = [...new Set(series.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const place = options.even ? (value) => xs.indexOf(value) : (value) => value;
  const holder = html("div");
  const at = html(options.legendTable ? "p" : "li", { class: "legend-at" });
  const values = series.map(() => html("b"));
  const legend = html("ul", { class: options.legendTable ? "legend legend-table" : "legend" },
    series.map((line, index) => html("li", {}, lineSwatch(line), html("span", {}, line.name), values[index])),
    options.legendTable ? null : at);
  container.append(holder, options.legendTable ? at : "", legend);
  let cursor = options.at === undefined ? xs[xs.length - 1] : options.at;
  let moveCursor = () => {};

  function show(value) {
    cursor = value;
    at.textContent = `${options.xName} ${options.xFormat(value)}`;
    series.forEach((line, index) => {
      const point = line.points.reduce((best, each) => (Math.abs(each[0] - value) < Math.abs(best[0] - value) ? each : best));
      values[index].textContent = yFormat(point[1]);
    });
    moveCursor(value);
  }

  drawn(holder, (width) => {
    const height = options.height || 220;
    const ys = series.flatMap((line) => line.points.map((point) => point[1]));
    let low = Math.min(...ys);
    let high = Math.max(...ys);
    if (options.zero) low = Math.min(0, low);
    if (high === low) { high += Math.abs(high) * 0.1 || 1; low -= options.zero ? 0 : Math.abs(low) * 0.1 || 1; }
    const inner = ticksBetween(low, high, 4);
    const pitch = inner.length > 1 ? inner[1] - inner[0] : high - low;
    low = Math.min(low, Math.floor(low / pitch + 1e-6) * pitch);
    high = Math.max(high, Math.ceil(high / pitch - 1e-6) * pitch);
    const yTicks = ticksBetween(low, high, Math.round((high - low) / pitch));
    const left = 12 + 7 * Math.max(...yTicks.map((tick) => tickFormat(tick).length));
    const [first, last] = [place(xs[0]), place(xs[xs.length - 1])];
    const pad = options.even ? 14 : 4;
    const x = (value) => left + pad + ((width - left - 2 * pad - 2) * (place(value) - first)) / (last - first || 1);
    const y = (value) => 8 + ((height - 38) * (high - value)) / (high - low);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": options.description });
    for (const tick of yTicks) {
      picture.append(svg("line", { class: "grid", x1: left, x2: width, y1: y(tick), y2: y(tick) }),
        svg("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, tickFormat(tick)));
    }
    const xTicks = options.even ? xs : ticksBetween(xs[0], xs[xs.length - 1], width < 340 ? 3 : 5);
    for (const tick of xTicks) picture.append(svg("text", { x: x(tick), y: height - 8, "text-anchor": "middle" }, options.xFormat(tick)));
    const line = svg("line", { class: "cursor", y1: 8, y2: height - 30 });
    picture.append(line);
    for (const each of series) {
      const path = each.points.map((point, index) => `${index ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("");
      picture.append(svg("path", { class: `series ${each.kind || ""}`, colour: each.colour, "stroke-dasharray": each.dash, d: path }));
      if (each.dots || each.points.length === 1) {
        for (const point of each.points) picture.append(svg("circle", { class: "dot", colour: each.colour, cx: x(point[0]), cy: y(point[1]), r: 2.6 }));
      }
    }
    moveCursor = (value) => { line.setAttribute("x1", x(value)); line.setAttribute("x2", x(value)); };
    picture.addEventListener("pointermove", (event) => {
      const scale = width / picture.getBoundingClientRect().width;
      const wanted = (event.clientX - picture.getBoundingClientRect().left) * scale;
      show(xs.reduce((best, value) => (Math.abs(x(value) - wanted) < Math.abs(x(best) - wanted) ? value : best)));
    });
    picture.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      show(xs[Math.min(xs.length - 1, Math.max(0, xs.indexOf(cursor) + step))]);
    });
    holder.replaceChildren(picture);
    show(cursor);
  });
}
