// The data card with its leakage audit, what the run cost, the exact configs, and the hashes at the foot of the page.
"use strict";

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

function simpleTable(label, head, rows, narrow = true) {
  return html("div", { class: narrow ? "table-scroll narrow" : "table-scroll", tabindex: 0, role: "region", "aria-label": label }, html("table", {},
    html("thead", {}, html("tr", {}, head.map((name, index) => html("th", { scope: "col", class: index ? null : "text" }, name)))),
    html("tbody", {}, rows.map(([name, ...cells]) => html("tr", {}, html("th", { scope: "row", class: "text" }, name), cells.map((cell) => html("td", {}, cell)))))));
}

const aUser = (seconds, users) => (isNumber(seconds) && users > 0 ? `${quantity(seconds / users)} s` : "–");

// An accelerator is what JAX does not call a CPU; where the devices are CPUs there is no accelerator-second to count.
function renderCost(report) {
  const body = byId("cost-body");
  if (!report.timing.length) { replace(body, notice("No timings were recorded for this run.")); return; }
  const users = report.metrics.users;
  const total = report.timing.reduce((sum, step) => sum + step.seconds, 0);
  const accelerated = report.timing.filter((step) => isNumber(step.device_seconds) && step.device !== "cpu");
  const onCpu = report.timing.some((step) => step.device === "cpu");
  const notes = ["Wall-clock time of the steps that were finished before this report was written; a user is one of those evaluated."];
  if (accelerated.length) notes.push("Accelerator-seconds are seconds times the devices that the step had.");
  else notes.push(onCpu ? "It trained and decoded on CPUs: no accelerator-seconds." : "The devices were not recorded.");
  const row = (name, seconds, step) => [name, duration(seconds), total ? `${((100 * seconds) / total).toFixed(1)} %` : "–", aUser(seconds, users),
    ...(accelerated.length ? [step && step.device !== "cpu" && isNumber(step.device_seconds) ? `${aUser(step.device_seconds, users)} (${step.device})` : "–"] : [])];
  const rows = report.timing.map((step) => row(upper(step.step), step.seconds, step));
  const device = accelerated.reduce((sum, step) => sum + step.device_seconds, 0);
  rows.push(["In all", duration(total), "", aUser(total, users), ...(accelerated.length ? [aUser(device, users)] : [])]);
  const decodes = report.decoding.filter((made) => isNumber(made.seconds) && made.users > 0).map((made) => [made.name, count(made.users), duration(made.seconds), duration(made.compile_seconds),
    `${quantity((1000 * (made.seconds - (made.compile_seconds || 0))) / made.users)} ms`, quantity(made.tokens_per_second)]);
  replace(body, html("p", { class: "note" }, notes.join(" ")),
    simpleTable("Time of each step", ["Step", "Time", "Share", "A user", ...(accelerated.length ? ["Accelerator-seconds a user"] : [])], rows),
    decodes.length ? html("div", { class: "subhead" }, html("h3", {}, "Decoding"), html("p", { class: "note" }, "Of the last run of each decode; a user's time is without compiling.")) : null,
    decodes.length ? simpleTable("Decoding", ["Decode", "Users", "Time", "of it compiling", "A user", "Tokens per second"], decodes, false) : null);
}

function renderConfigs(report) {
  const body = byId("configs-body");
  if (!report.configs.length) { replace(body, notice("No artefact of this report has a gin config in its manifest.")); return; }
  replace(body, html("p", { class: "note" }, "The operative gin config that each artefact's manifest holds: everything that was set when it was made, defaults too. The same text is shown once."),
    report.configs.map(({ names, gin }) => html("details", {}, html("summary", {}, names.join(", ")), html("pre", { tabindex: 0 }, gin))));
}

function renderProvenance(report) {
  const rows = Object.entries({ dataset: report.dataset.hash, template: report.dataset.template, ...(isRecord(report.metrics.made_from) ? report.metrics.made_from : {}) });
  replace(byId("provenance"), html("p", {}, "Made from, by hash:"), html("dl", {}, rows.map(([name, value]) => [html("dt", {}, words(name)), html("dd", {}, html("code", {}, isHash(value) ? value : plain(value)))])));
}
