// The browser of single users: history, ranking, completions and target of each.
"use strict";

const HIT_CUT = 10;
const FIRST_SHOWN = { history: 8, completions: 8 };
const LISTED = 400; // users in the list at once; a search finds the others

const rankText = (rank) => (Number.isInteger(rank) ? count(rank) : rank.toLocaleString("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 }));

// The target's place in one ranking: {rank, tied, text, hit}; rank is null where the ranking does not reach the target.
function placeOf(user, ranking) {
  const entry = ranking && user.rankings[ranking];
  if (!entry) return { rank: null, hit: false, absent: true, text: "not ranked" };
  if (!entry.rank) return { rank: null, hit: false, text: `not in the first ${count(entry.depth)}` };
  const [first, last] = entry.rank;
  const rank = (first + last) / 2;
  return { rank, hit: rank <= HIT_CUT, text: rankText(rank), ties: first === last ? "" : `tied ${count(first)}–${count(last)}` };
}

// A tag may go to the next line without taking the last word along.
const spaced = (tags) => tags.map((tag) => [" ", tag]);

function itemNode(report, reference, tags = []) {
  const [title, brand, category, price, identifier] = report.items[reference];
  const meta = [brand, category, price].filter(Boolean).join(" · ");
  return html("div", { class: "name" }, title || html("em", {}, `untitled item ${identifier}`), spaced(tags), meta ? html("div", { class: "meta" }, meta) : null);
}

function historyPanel(report, user) {
  const { items, earlier } = user.history;
  const hidden = Math.max(0, items.length - FIRST_SHOWN.history);
  const entries = items.map((reference, index) => html("li", { hidden: index < hidden }, html("span", {}, count(earlier + index + 1)),
    itemNode(report, reference, reference === user.target ? [html("span", { class: "tag good" }, "the target, bought before")] : []), html("span", { class: "side" }, html("span", {}, user.history.dates[index]))));
  const list = html("ol", { class: "items" }, entries);
  const more = hidden ? html("p", { class: "history-more" }, html("button", { type: "button", class: "link", onclick: () => {
    entries.forEach((entry) => { entry.hidden = false; });
    more.remove();
  } }, `Show ${count(hidden)} earlier`)) : null;
  const size = items.length + earlier;
  const note = `${count(size)} ${size === 1 ? "purchase" : "purchases"}, oldest first.` + (earlier ? ` The first ${count(earlier)} are left out of this page.` : "");
  return html("div", { class: "panel" }, html("h4", {}, "History"), html("p", { class: "note" }, note), more, list);
}

function rankingPanel(report, user, ranking, place) {
  const entry = user.rankings[ranking];
  if (!entry) return html("div", { class: "panel" }, html("h4", {}, "Ranking"), notice("This ranking has no row for this user."));
  const bought = new Set(user.history.items);
  const completions = user.completions[report.completions_of[ranking]];
  const format = scoreFormat(entry.scores);
  const rows = entry.items.map((reference, index) => {
    const [score, source] = [entry.scores[index], entry.sources[index]];
    const tags = [];
    if (reference === user.target) tags.push(html("span", { class: "tag good" }, "target"));
    if (bought.has(reference)) tags.push(html("span", { class: "tag" }, "bought before"));
    const from = source === -1 || !completions ? null : source < 0 ? "a completion not shown"
      : html("button", { type: "button", class: "link", onclick: () => pointTo(source) }, `completion ${source + 1}`);
    return html("li", { class: reference === user.target ? "is-target" : null }, html("span", {}, index + 1), itemNode(report, reference, tags),
      html("span", { class: "side" }, from ? html("span", {}, from) : null, html("b", { "data-label": "score" }, format(score))));
  });
  const shown = entry.items.includes(user.target);
  const note = `The first ${count(entry.items.length)} of ${count(entry.depth)} ranked items, with their scores${completions ? " and the completions that gave them" : ""}.` + (shown ? "" : ` The target: ${place.rank === null ? "" : "rank "}${place.text}.`);
  return html("div", { class: "panel" }, html("h4", {}, `Ranking ${ranking}`), html("p", { class: "note" }, note), html("ol", { class: "items" }, rows));
}

function pointTo(group) {
  const row = byId(`completion-${group}`);
  if (!row) return;
  if (row.hidden) byId("all-completions").click();
  document.querySelectorAll(".items li.flash").forEach((each) => each.classList.remove("flash"));
  row.classList.add("flash");
  row.scrollIntoView({ block: "center" });
  row.focus();
}

function completionsPanel(report, user, ranking) {
  const name = report.completions_of[ranking];
  if (!name) return html("div", { class: "panel" }, html("h4", {}, "Completions"), notice(`No completions belong to the ranking ${ranking}.`));
  const made = user.completions[name];
  if (!made || !made.texts.length) return html("div", { class: "panel" }, html("h4", {}, `Completions ${name}`), notice("No completion was made for this user."));
  const rows = made.texts.map((text, index) => {
    const tags = [];
    if (made.targets.includes(index)) tags.push(html("span", { class: "tag good" }, "target's text"));
    if (made.times[index] > 1) tags.push(html("span", { class: "tag" }, `${made.times[index]} times`));
    if (made.unfinished.includes(index)) tags.push(html("span", { class: "tag" }, "no end within the limit"));
    const [tokens, logProb] = [made.tokens[index], made.log_probs[index]];
    return html("li", { id: `completion-${index}`, tabindex: -1, hidden: index >= FIRST_SHOWN.completions, class: made.targets.includes(index) ? "is-target" : null }, html("span", {}, index + 1),
      html("div", { class: "name" }, report.texts[text] || html("em", {}, "empty"), spaced(tags)),
      html("span", { class: "side" }, html("span", {}, isNumber(tokens) ? `${count(tokens)} ${tokens === 1 ? "token" : "tokens"}` : ""),
        html("span", { title: "probability" }, isNumber(logProb) ? probability(logProb) : ""),
        html("b", { "data-label": "log-probability" }, isNumber(logProb) ? logProb.toFixed(2).replace("-", "−") : "–")));
  });
  const hidden = rows.filter((row) => row.hidden).length;
  const more = hidden ? html("p", { class: "more" }, html("button", { type: "button", class: "link", id: "all-completions", onclick: () => {
    rows.forEach((row) => { row.hidden = false; });
    more.remove();
  } }, `Show ${count(hidden)} more`)) : null;
  const left = made.distinct - made.texts.length;
  const note = `${count(made.of)} ${made.of === 1 ? "completion" : "completions"}, ${count(made.distinct)} distinct, with probabilities and log-probabilities in nats, most probable first.` + (left ? ` ${count(left)} less probable ones are not in this page.` : "");
  return html("div", { class: "panel" }, html("h4", {}, `Completions ${name}`), html("p", { class: "note" }, note), html("ol", { class: "items" }, rows), more);
}

const probability = (logProb) => { const value = Math.exp(logProb); return value >= 0.0005 ? `${(100 * value).toFixed(value >= 0.1 ? 0 : value >= 0.01 ? 1 : 2)} %` : value.toExponential(0).replace("e", " e"); };

function renderUsers(report) {
  const body = byId("users-body");
  const { users, rankings } = report;
  if (!users.length) { replace(body, notice("The dataset has no users to show.")); return; }
  const state = { ranking: rankings[0] || null, query: "", filter: "all", user: 0 };
  const list = html("ol", { class: "user-list", "aria-label": "Users" });
  const filterHolder = html("div");
  const detail = html("div", { class: "user-detail" });
  const announced = html("p", { class: "visually-hidden", "aria-live": "polite" });
  let visible = [];

  const matches = (user) => {
    if (state.filter !== "all" && placeOf(user, state.ranking).hit !== (state.filter === "hits")) return false;
    if (!state.query) return true;
    const titles = [user.target, ...user.history.items].map((reference) => report.items[reference][0] || "");
    return [user.id, ...titles].some((text) => text.toLowerCase().includes(state.query));
  };

  function showFilter() {
    if (!state.ranking) return;
    const hits = users.filter((user) => placeOf(user, state.ranking).hit).length;
    replace(filterHolder, choice("Show", "user-filter", [["all", `All ${count(users.length)}`], ["hits", `Hits ${count(hits)}`], ["misses", `Misses ${count(users.length - hits)}`]], state.filter, (value) => {
      state.filter = value;
      showList();
    }, false));
  }

  function showList() {
    visible = users.map((user, index) => index).filter((index) => matches(users[index]));
    if (visible.length && !visible.includes(state.user)) state.user = visible[0];
    const listed = visible.slice(0, LISTED);
    replace(list, visible.length ? listed.map((index) => {
      const place = placeOf(users[index], state.ranking);
      return html("li", {}, html("button", { type: "button", "data-user": index, "aria-current": index === state.user ? "true" : null, onclick: () => select(index) }, html("span", {}, users[index].id),
        html("span", { class: place.hit ? "rank hit" : "rank" }, place.rank === null ? "–" : rankText(place.rank))));
    }).concat(visible.length > listed.length ? html("li", { class: "empty" }, `${count(visible.length - listed.length)} more: search, or step on with Next.`) : []) : html("li", { class: "empty" }, "No user matches."));
    announced.textContent = `${visible.length} users match.`;
    showUser();
  }

  function select(index) {
    state.user = index;
    list.querySelectorAll("button").forEach((button) => {
      if (Number(button.dataset.user) === index) {
        button.setAttribute("aria-current", "true");
        list.scrollTop = Math.max(0, button.offsetTop - list.offsetTop - list.clientHeight / 2);
      } else button.removeAttribute("aria-current");
    });
    showUser();
  }

  function showUser() {
    if (!visible.length) { replace(detail, notice("No user matches the search and the filter.")); return; }
    const user = users[state.user];
    const place = placeOf(user, state.ranking);
    const position = visible.indexOf(state.user);
    const step = (by, label) => html("button", { type: "button", class: "plain", "data-step": by, disabled: visible[position + by] === undefined, onclick: () => {
      select(visible[position + by]);
      const again = detail.querySelector(`[data-step="${by}"]`);
      (again.disabled ? detail.querySelector("[data-step]:not(:disabled)") : again)?.focus({ preventScroll: true });
    } }, label);
    const head = html("div", { class: "user-head" }, html("h3", {}, user.id),
      state.ranking && !place.absent ? html("span", { class: `badge ${place.hit ? "hit" : "miss"}` }, place.hit ? `Hit at ${rankText(place.rank)}` : "Miss") : html("span", { class: "badge" }, "Not ranked"),
      html("div", { class: "steps" }, `${position + 1} of ${visible.length}`, step(-1, "Previous"), step(1, "Next")));
    const ranks = rankings.map((ranking) => {
      const { text, ties } = placeOf(user, ranking);
      return html("div", {}, html("dt", {}, ranking), html("dd", {}, ties ? html("span", {}, ties, " ") : null, html("b", {}, text)));
    });
    const target = html("div", { class: "target" }, html("p", { class: "label" }, "Target, bought next", user.target_date ? ` on ${user.target_date}` : ""),
      html("div", { class: "title" }, itemNode(report, user.target)), ranks.length ? html("div", { class: "ranks" }, html("p", { class: "label" }, "Its rank in"), html("dl", {}, ranks)) : null);
    replace(detail, head, target, historyPanel(report, user),
      state.ranking ? rankingPanel(report, user, state.ranking, place) : html("div", { class: "panel" }, html("h4", {}, "Ranking"), notice("No rankings belong to this report.")),
      state.ranking ? completionsPanel(report, user, state.ranking) : null);
  }

  const search = html("label", {}, html("span", { class: "field-label" }, "Search users and titles"),
    html("input", { type: "search", autocomplete: "off", spellcheck: "false", oninput: (event) => { state.query = event.target.value.trim().toLowerCase(); showList(); } }));
  const picker = rankings.length > 1 ? html("label", {}, html("span", { class: "field-label" }, "Ranking"), html("select", { onchange: (event) => {
    state.ranking = event.target.value;
    showFilter();
    showList();
  } }, rankings.map((ranking) => html("option", { value: ranking }, ranking)))) : null;
  const notes = [`${count(users.length)} of ${count(report.sample.of)} users, drawn with seed ${report.sample.seed}`];
  if (state.ranking) notes.push(`A hit has its target among the first ${HIT_CUT} of the chosen ranking${users.length < report.sample.of ? `. Half of these users are hits of ${report.sample.ranking} (as far as there are that many), so their share says nothing about the whole` : ""}`);
  replace(body, html("p", { class: "note" }, notes.join(". ") + "."), announced,
    html("div", { class: "browser" }, html("div", { class: "browser-side" }, picker, search, filterHolder, list), detail));
  showFilter();
  showList();
}
