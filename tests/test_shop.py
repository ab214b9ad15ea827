"""The synthetic shop: same bytes from the same seed, an oracle that is right, every rule visible in what is written."""

import dataclasses
import gzip
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import ibis
import numpy as np
import pytest
from raw_data import read_files

from calrec_jax.data.prepare import prepare
from calrec_jax.data.relational import drop_repeated_items
from calrec_jax.data.shop import DAY, LAST_DAY, Oracle, Shop, load_oracle, simulate_category, write_shop
from calrec_jax.data.shop_catalogue import ALWAYS, ROLES, build_catalogue, price_point
from calrec_jax.data.shop_purchases import NEVER, Rules, Shopper, State, draw, simulate
from calrec_jax.data.shop_words import CATEGORIES
from calrec_jax.data.templates import ATTRIBUTES
from calrec_jax.errors import CalrecError

SMALL = Shop(seed=3, users=150, items=240, dirty=0.005)
OFFICE = "Office_Products"
MAIN, REFILL, ACCESSORY, STAPLE = range(len(ROLES))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_shop(tmp_path_factory.mktemp("shop"), SMALL)


@pytest.fixture(scope="module", params=list(CATEGORIES))
def sales(request):
    return simulate_category(request.param, Shop())


def histories(purchases):
    return [row[:length].tolist() for row, length in zip(purchases.items, purchases.lengths, strict=True)]


# --- files -----------------------------------------------------------------------------------------------------------


def all_bytes(files):
    paths = [*files.reviews.values(), *files.metadata.values(), *files.oracles.values()]
    return {path.name: path.read_bytes() for path in paths}


def test_same_seed_same_bytes_other_seed_others(written, tmp_path):
    first = all_bytes(written)
    assert all_bytes(write_shop(tmp_path / "again", SMALL)) == first
    other = all_bytes(write_shop(tmp_path / "other", dataclasses.replace(SMALL, seed=4)))
    assert other.keys() == first.keys() and all(other[name] != first[name] for name in first)


def test_a_category_does_not_depend_on_the_others(written, tmp_path):
    alone = all_bytes(write_shop(tmp_path, SMALL, ("Home_and_Kitchen",)))
    assert alone == {name: data for name, data in all_bytes(written).items() if "Home_and_Kitchen" in name}


def test_gzip_headers_hold_no_time(written):
    for path in [*written.reviews.values(), *written.metadata.values()]:
        assert path.read_bytes()[4:8] == bytes(4)


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as source:
        return source.read().splitlines()


def parsed(path):
    good = []
    for line in lines(path):
        try:
            good.append(json.loads(line))
        except ValueError:
            continue
    return good


def test_lines_have_the_2018_layout(written):
    required = {"overall", "verified", "reviewTime", "reviewerID", "asin", "summary", "unixReviewTime"}
    for review in parsed(written.reviews[OFFICE]):
        if not required <= review.keys():
            continue  # the dirt, counted below
        assert review.keys() <= required | {"vote", "style", "reviewText"}
        assert isinstance(review["overall"], float) and 1 <= review["overall"] <= 5
        assert re.fullmatch(r"A[0-9A-Z]{13}", review["reviewerID"]) and re.fullmatch(r"B0[0-9A-Z]{8}", review["asin"])
        month, day, year = re.fullmatch(r"(\d\d) (\d{1,2}), (\d{4})", review["reviewTime"]).groups()
        assert np.datetime64(f"{year}-{month}-{int(day):02d}", "s").astype(int) == review["unixReviewTime"]
    items = parsed(written.metadata[OFFICE])
    asins = {item["asin"] for item in items}
    assert len(asins) == SMALL.items
    for item in items:
        assert isinstance(item["category"], list) and set(item["also_buy"]) | set(item["also_view"]) <= asins
        assert item["price"] == "" or item["price"].startswith(("$", ".a-box-inner"))
        assert item["main_cat"] == "Office Products" and 3 <= len(item["title"].split()) <= 10
    assert any("&amp;" in item["title"] for item in items)


def test_dirt_is_counted_and_below_one_percent_by_default(tmp_path):
    shop = Shop(users=500)
    files = write_shop(tmp_path, shop, (OFFICE,))
    dirt = files.dirt[OFFICE]
    raw = read_files(files.reviews[OFFICE], files.metadata[OFFICE], tmp_path / "quarantine.jsonl", 0.01)
    reviews, metadata = raw.reviews, raw.metadata
    assert sum(reviews.quarantined.values()) == dirt["reviews.broken_json"] + dirt["reviews.missing_field"]
    assert reviews.quarantined["not JSON"] == dirt["reviews.broken_json"]
    assert sum(dirt[key] for key in dirt if key.startswith("reviews.")) < 0.01 * reviews.lines
    assert metadata.quarantined == {"not JSON": dirt["metadata.broken_json"]}
    items = drop_repeated_items(ibis.memtable(raw.items), ATTRIBUTES).to_pyarrow()
    assert metadata.kept - items.num_rows == dirt["metadata.repeated_item"]
    assert metadata.repaired["category taken from main_cat"] >= dirt["metadata.empty_category"]
    table = items.to_pydict()
    assert table["price"].count(None) == dirt["metadata.css_price"] + dirt["metadata.absent_price"]
    assert table["brand"].count(None) == dirt["metadata.absent_brand"]
    assert min(dirt.values()) >= 1
    rows = [json.dumps(row) for row in parsed(files.reviews[OFFICE])]
    double_orders = dirt["reviews.double_order"]  # on the same day with the same words, these repeat a line as well
    assert 0 <= sum(map(str.__eq__, rows, rows[1:])) - dirt["reviews.repeated_line"] <= double_orders


@pytest.mark.parametrize("category", list(CATEGORIES))
def test_cleaned_dump_holds_the_simulated_sequences(written, tmp_path, category):
    """Without repeated and consecutive purchases, sorted by time and line, the dump is what was simulated."""
    raw = read_files(written.reviews[category], written.metadata[category], tmp_path / "quarantine.jsonl", 0.1)
    table = raw.interactions.to_pydict()
    columns = zip(table["timestamp"], table["line"], table["user_id"], table["item_id"], strict=True)
    got = defaultdict(list)
    for time, user, item in dict.fromkeys((time, user, item) for time, _, user, item in sorted(columns)):
        if not got[user] or got[user][-1][0] != item:
            got[user].append((item, time))
    sales = simulate_category(category, SMALL)
    for number, (user, history) in enumerate(zip(sales.user_ids, histories(sales.purchases), strict=True)):
        times = LAST_DAY - DAY * sales.purchases.days[number, : len(history)]
        assert got.pop(user) == list(zip(sales.item_ids[history], times, strict=True))
    assert not got
    items = drop_repeated_items(ibis.memtable(raw.items), ATTRIBUTES).to_pyarrow()
    titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    assert [titles[item] for item in sales.item_ids] == sales.catalogue.titles


def test_double_orders_are_never_a_users_last(written):
    reviews = [review for review in parsed(written.reviews[OFFICE]) if "reviewerID" in review and "asin" in review]
    by_user = defaultdict(list)
    for review in reviews:
        if "unixReviewTime" in review:
            by_user[review["reviewerID"]].append((review["asin"], json.dumps(review, sort_keys=True)))
    doubled = 0
    for bought in by_user.values():
        distinct = list(dict.fromkeys(bought))  # repeated lines are the same line
        doubled += sum(a[0] == b[0] for a, b in itertools.pairwise(distinct))
        assert distinct[-1][0] != distinct[-2][0]
    assert doubled == written.dirt[OFFICE]["reviews.double_order"] > 0


def test_a_clean_shop_has_no_dirt(tmp_path):
    shop = dataclasses.replace(SMALL, dirty=0.0)
    files = write_shop(tmp_path, shop, (OFFICE,))
    assert set(files.dirt[OFFICE].values()) == {0}
    sales = simulate_category(OFFICE, shop)
    assert len(parsed(files.reviews[OFFICE])) == len(lines(files.reviews[OFFICE])) == sales.purchases.lengths.sum()
    assert len(lines(files.metadata[OFFICE])) == shop.items


# --- the oracle ------------------------------------------------------------------------------------------------------


def test_oracle_reads_back_sorted_and_sums_to_one(written):
    oracle = load_oracle(written.oracles[OFFICE])
    sales = simulate_category(OFFICE, SMALL)
    assert isinstance(oracle, Oracle) and oracle.probabilities.dtype == np.float32
    assert list(oracle.user_ids) == sorted(sales.user_ids) and list(oracle.item_ids) == sorted(sales.item_ids)
    np.testing.assert_allclose(oracle.probabilities.sum(axis=1), 1.0, atol=1e-5)
    column = {item: column for column, item in enumerate(oracle.item_ids)}
    order = [column[item] for item in sales.item_ids]
    np.testing.assert_array_equal(oracle.probabilities[:, order], sales.purchases.probabilities)
    last = [history[-1] for history in histories(sales.purchases)]
    assert (sales.purchases.probabilities[np.arange(SMALL.users), last] > 0).all()


def test_load_oracle_names_the_file(tmp_path):
    with pytest.raises(CalrecError, match=r"oracle_X\.npz does not exist"):
        load_oracle(tmp_path / "oracle_X.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(CalrecError, match=r"text\.npz is not an oracle"):
        load_oracle(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", user_ids=np.array(["A"]))
    with pytest.raises(CalrecError, match=r"other\.npz is not an oracle.*item_ids"):
        load_oracle(tmp_path / "other.npz")
    ids = {"user_ids": np.array(["A"]), "item_ids": np.array(["B", "C"])}
    np.savez(tmp_path / "shape.npz", **ids, probabilities=np.ones((2, 2), np.float32))
    with pytest.raises(CalrecError, match=r"shape\.npz: probabilities are \(2, 2\), not \(1, 2\)"):
        load_oracle(tmp_path / "shape.npz")


def slow_probabilities(catalogue, history, days, taste, affinity, rules):
    """The rules of docs/synthetic_shop.md, one item at a time, from the history and its days alone."""
    step, number = len(history), len(catalogue)
    last_step = {item: position for position, item in enumerate(history)}
    owned = {int(catalogue.model[item]) for item in history if catalogue.role[item] == MAIN}

    def due(since, cycle):
        return rules.rest + (1 - rules.rest) * math.exp(-0.5 * ((step - since - cycle) / rules.cycle_width) ** 2)

    def sellable(item):
        if catalogue.launch[item] < days[-1] or (history and history[-1] == item):
            return False
        if any(item == bought and day == days[-1] for bought, day in zip(history, days, strict=False)):
            return False
        return not (item in last_step and catalogue.role[item] in (MAIN, ACCESSORY))

    shelf = [item for item in range(number) if sellable(item)]
    base = {
        item: catalogue.popularity[item] * (rules.novelty if catalogue.launch[item] < ALWAYS else 1) for item in shelf
    }
    answer = np.zeros(number)

    def spread(strength, weights):
        total = sum(weights.values())
        for item, weight in weights.items():
            answer[item] += strength * weight / total if total > 0 else 0

    spread(rules.window, {i: catalogue.popularity[i] * rules.window_share[catalogue.role[i]] for i in shelf})
    for model in {int(catalogue.model[item]) for item in history if catalogue.role[item] in (MAIN, REFILL)}:
        since = max(
            p for p, i in enumerate(history) if catalogue.model[i] == model and catalogue.role[i] in (MAIN, REFILL)
        )
        fits = [i for i in shelf if catalogue.model[i] == model and catalogue.role[i] == REFILL]
        cycle = next(catalogue.cycle[i] for i in range(number) if catalogue.model[i] == model)
        weights = {i: base[i] * (rules.same_refill if i in last_step else 1) for i in fits}
        spread(rules.refill * due(since, cycle), weights)
    for item in history:
        if catalogue.role[item] == MAIN:
            fits = [i for i in shelf if catalogue.model[i] == catalogue.model[item] and catalogue.role[i] == ACCESSORY]
            strength = rules.accessory * rules.accessory_decay ** (step - last_step[item] - 1)
            spread(strength, {i: base[i] for i in fits})
    for item, since in last_step.items():
        if catalogue.role[item] == STAPLE and item in base:
            answer[item] += rules.repeat * due(since, catalogue.cycle[item])
    if history:
        last = history[-1]
        spread(rules.companion, {
            i: base[i]
            * (rules.same_brand if catalogue.brand[i] == catalogue.brand[last] else 1)
            * (rules.same_variant if catalogue.variant[i] == catalogue.variant[last] else 1)
            for i in shelf
            if catalogue.goes_with[catalogue.type[last], catalogue.type[i]]
        })  # fmt: skip
    owned_types = {catalogue.type[item] for item in history if catalogue.role[item] == MAIN}
    counts = Counter(int(catalogue.brand[item]) for item in history)
    walks = defaultdict(dict)
    for i in shelf:
        if catalogue.role[i] not in (MAIN, STAPLE):
            continue
        weight = (
            base[i] * math.exp(affinity[catalogue.brand[i]]) * (1 + rules.loyalty * counts[int(catalogue.brand[i])])
        )
        if catalogue.role[i] == MAIN:
            if int(catalogue.predecessor[catalogue.model[i]]) in owned:
                weight *= rules.upgrade
            elif catalogue.type[i] in owned_types:
                weight *= rules.second_machine
        walks[int(catalogue.department[i])][i] = weight
    total = sum(math.exp(taste[department]) for department in walks)
    for department, weights in walks.items():
        spread(rules.taste * math.exp(taste[department]) / total, weights)
    return answer / answer.sum()


@pytest.mark.parametrize("category", list(CATEGORIES))
def test_oracle_equals_a_slow_reading_of_the_rules(category):
    sales = simulate_category(category, dataclasses.replace(SMALL, new_items=0.3, launch_days=200, same_day=0.3))
    purchases = sales.purchases
    for user, history in enumerate(histories(purchases)):
        if user % 3:
            continue
        days = purchases.days[user, : len(history)]
        expected = slow_probabilities(
            sales.catalogue, history[:-1], days, purchases.taste[user], purchases.affinity[user], Rules()
        )
        np.testing.assert_allclose(
            purchases.probabilities[user], expected, rtol=1e-4, atol=1e-7, err_msg=f"user {user}"
        )


def test_rules_hold_for_an_upgrade_and_a_first_purchase():
    catalogue = build_catalogue(OFFICE, 240, 0.2, 30, np.random.default_rng(5))
    shopper, rules = Shopper(catalogue), Rules()
    successor = int(np.flatnonzero(catalogue.predecessor >= 0)[0])
    main = {int(catalogue.model[item]): int(item) for item in shopper.mains}
    old, new = main[int(catalogue.predecessor[successor])], main[successor]
    rng = np.random.default_rng(6)
    taste, affinity = (
        rng.normal(size=(1, catalogue.department.max() + 1)),
        rng.normal(size=(1, catalogue.brand.max() + 1)),
    )
    state = State.start(catalogue, taste, affinity, np.array([9]))
    np.testing.assert_allclose(
        shopper.probabilities(state)[0],
        slow_probabilities(catalogue, [], [9], taste[0], affinity[0], rules),
        atol=1e-12,
    )
    without = shopper.probabilities(state)[0, new]
    state.buy(catalogue, np.array([old]))
    state.next_day(taste, np.array([0]))
    after = shopper.probabilities(state)[0]
    np.testing.assert_allclose(
        after, slow_probabilities(catalogue, [old], [9, 0], taste[0], affinity[0], rules), atol=1e-12
    )
    assert after[old] == 0 and after[new] > 0 and without > 0


def test_draws_follow_the_probabilities():
    """Total variation between 100,000 redrawn next purchases and the oracle's row is what chance explains."""
    purchases = simulate_category(OFFICE, SMALL).purchases
    rng, draws = np.random.default_rng(0), 100_000
    for user in (0, 93):
        row = purchases.probabilities[user].astype(float)
        counts = np.bincount(
            np.concatenate([draw(np.tile(row, (2000, 1)), rng.random(2000)) for _ in range(draws // 2000)]),
            minlength=len(row),
        )
        expected_distance = np.sqrt(2 / np.pi * row * (1 - row) / draws).sum() / 2
        distance = np.abs(counts / draws - row / row.sum()).sum() / 2
        assert distance < 1.5 * expected_distance, (user, distance, expected_distance)
        assert counts[row == 0].sum() == 0


def test_oracle_is_calibrated_on_the_test_purchases(sales):
    """Of all (user, item) pairs with about the same probability, that share is bought."""
    purchases = sales.purchases
    bought = np.zeros_like(purchases.probabilities, bool)
    bought[np.arange(len(bought)), [history[-1] for history in histories(purchases)]] = True
    bins = np.digitize(purchases.probabilities, [1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5])
    probabilities = purchases.probabilities.astype(float)
    for number in range(bins.max() + 1):
        inside = bins == number
        expected, variance = probabilities[inside].sum(), (probabilities * (1 - probabilities))[inside].sum()
        assert abs(bought[inside].sum() - expected) < 4 * np.sqrt(variance) + 1, (
            number,
            bought[inside].sum(),
            expected,
        )


def test_results_do_not_depend_on_the_chunk():
    catalogue = build_catalogue(OFFICE, 240, 0.15, 45, np.random.default_rng(1))
    whole, parts = (simulate(catalogue, 50, 5, 9, 0.1, np.random.default_rng(2), chunk=chunk) for chunk in (2048, 7))
    for field in dataclasses.fields(whole):
        np.testing.assert_array_equal(getattr(whole, field.name), getattr(parts, field.name), err_msg=field.name)


# --- the rules, seen in the data -------------------------------------------------------------------------------------


def pairs(sales):
    """All (history, next item) pairs."""
    for history in histories(sales.purchases):
        for position in range(1, len(history)):
            yield history[:position], history[position]


def test_sizes(sales):
    shop, lengths = Shop(), sales.purchases.lengths
    assert len(lengths) == shop.users and len(sales.catalogue) == shop.items == len(set(sales.catalogue.titles))
    assert lengths.min() == shop.min_purchases and lengths.max() == shop.max_purchases
    assert len(set(sales.user_ids)) == shop.users and len(set(sales.item_ids)) == shop.items


def test_a_refill_follows_its_machine_when_due(sales):
    """Refills come for machines at home, at the highest rate when the cycle is over, seldom for others."""
    catalogue, chances, refilled, own, foreign = sales.catalogue, Counter(), Counter(), 0, 0
    for history, item in pairs(sales):
        supplied = {}
        for position, bought in enumerate(history):
            if catalogue.role[bought] in (MAIN, REFILL):
                supplied[catalogue.model[bought]] = (len(history) - position, catalogue.cycle[bought])
        for gap, cycle in supplied.values():
            chances[gap - cycle] += 1
        if catalogue.role[item] == REFILL:
            if catalogue.model[item] in supplied:
                gap, cycle = supplied[catalogue.model[item]]
                refilled[gap - cycle] += 1
                own += 1
            else:
                foreign += 1
    rate = {late: refilled[late] / chances[late] for late in range(-3, 3)}
    assert own > 4 * foreign
    assert rate[0] > 1.3 * max(rate[-1], rate[1]) and rate[0] > 4 * max(rate[-3], rate[2]), rate
    assert rate[0] > 0.3, rate


def test_accessories_fit_what_is_at_home_and_say_so(sales):
    catalogue, fitting, other = sales.catalogue, 0, 0
    names = {
        catalogue.model[i]: " ".join(catalogue.titles[i].split()[:3]) for i in np.flatnonzero(catalogue.role == MAIN)
    }
    for item in np.flatnonzero(catalogue.role == ACCESSORY):
        brand, line = names[catalogue.model[item]].split(" ", 1)
        assert catalogue.titles[item].endswith(
            f"for {line}" if catalogue.brands[item] == brand else f"for {brand} {line}"
        )
    for item in np.flatnonzero(catalogue.role == REFILL):
        assert catalogue.titles[item].startswith(names[catalogue.model[item]])
    for history, item in pairs(sales):
        if catalogue.role[item] == ACCESSORY:
            at_home = {catalogue.model[i] for i in history if catalogue.role[i] == MAIN}
            fitting, other = (
                fitting + (catalogue.model[item] in at_home),
                other + (catalogue.model[item] not in at_home),
            )
    assert fitting > 4 * other


def test_staples_are_bought_again_but_never_twice_in_a_row(sales):
    catalogue, again = sales.catalogue, Counter()
    for history, item in pairs(sales):
        assert history[-1] != item
        if item in history:
            assert catalogue.role[item] in (REFILL, STAPLE)
            again[int(catalogue.role[item])] += 1
    targets = sum(1 for _ in pairs(sales))
    assert again[STAPLE] > 0.08 * targets and again[REFILL] > 0.04 * targets


@pytest.mark.parametrize("category", list(CATEGORIES))
def test_companions_follow_and_share_brand_and_colour(category):
    """Against the same shop with that rule switched off."""

    def agreement(rules):
        catalogue = build_catalogue(category, 400, 0.15, 45, np.random.default_rng(1))
        purchases = simulate(catalogue, 600, 5, 12, 0.1, np.random.default_rng(2), rules)
        steps = np.array([pair for history in histories(purchases) for pair in itertools.pairwise(history)])
        before, after = steps[catalogue.role[steps[:, 0]] == STAPLE].T
        goes = catalogue.goes_with[catalogue.type[before], catalogue.type[after]]
        brand, variant = ((values[before] == values[after])[goes] for values in (catalogue.brand, catalogue.variant))
        return goes.mean(), brand.mean(), variant.mean()

    rules = Rules()
    follows, brand, variant = agreement(rules)
    assert follows > 1.3 * agreement(dataclasses.replace(rules, companion=0.0))[0]
    assert brand > 1.3 * agreement(dataclasses.replace(rules, same_brand=1.0))[1]
    assert variant > 1.2 * agreement(dataclasses.replace(rules, same_variant=1.0))[2]


def test_tastes_last_but_drift(sales):
    """Departments of purchases by the same user agree more when they are near, more than by chance when far."""
    catalogue, near, far, chance = sales.catalogue, [], [], []
    walks = [
        [catalogue.department[i] for i in history if catalogue.role[i] == STAPLE]
        for history in histories(sales.purchases)
    ]
    for number, departments in enumerate(walks):
        if len(departments) >= 5:
            near += [a == b for a, b in itertools.pairwise(departments)]
            far.append(departments[0] == departments[-1])
            if other := walks[number - 1]:
                chance.append(departments[0] == other[-1])
    assert np.mean(near) > np.mean(far) > np.mean(chance)


def test_brands_are_loved(sales):
    catalogue = sales.catalogue
    mains = [[catalogue.brand[i] for i in h if catalogue.role[i] in (MAIN, STAPLE)] for h in histories(sales.purchases)]
    own = np.mean([h[0] == h[-1] for h in mains if len(h) > 3])
    others = np.mean([h[0] == g[-1] for h, g in itertools.pairwise(mains) if h and g])
    assert own > 1.5 * others


def test_popularity_is_long_tailed(sales):
    counts = np.sort(np.bincount(sales.purchases.items[sales.purchases.items >= 0], minlength=len(sales.item_ids)))[
        ::-1
    ]
    assert 0.3 < counts[: len(counts) // 10].sum() / counts.sum() < 0.7


def test_same_day_ties_and_launches(sales):
    purchases, catalogue = sales.purchases, sales.catalogue
    inside = purchases.items >= 0
    gaps = -np.diff(purchases.days, axis=1)[inside[:, 1:]]
    assert (gaps >= 0).all() and abs((gaps == 0).mean() - Shop().same_day) < 0.02
    assert (catalogue.launch[purchases.items[inside]] >= purchases.days[inside]).all()


def test_new_items_are_test_targets_never_seen_in_training(sales):
    catalogue, purchases = sales.catalogue, sales.purchases
    targets = np.array([history[-1] for history in histories(purchases)])
    trained = np.unique(np.concatenate([history[:-2] for history in histories(purchases)]))
    cold = targets[~np.isin(targets, trained)]
    assert 0.02 < len(cold) / len(targets) < 0.08
    assert catalogue.is_new[cold].mean() > 0.9
    assert set(catalogue.role[catalogue.is_new]) == {MAIN, REFILL, ACCESSORY, STAPLE}
    words = {word for item in np.flatnonzero(~catalogue.is_new) for word in catalogue.titles[item].split()}
    known = [all(word in words or word == "20" for word in catalogue.titles[i].split()) for i in np.unique(cold)]
    assert all(known)  # the words of a new item are known, but for a successor's number


def mean_rank_ndcg(scores, targets):
    own = scores[np.arange(len(targets)), targets][:, None]
    ranks = (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2
    return float(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean())


def bm25_between(texts):
    documents = [re.findall(r"\w+", text.lower()) for text in texts]
    words = sorted({word for document in documents for word in document})
    counts = np.array([[document.count(word) for word in words] for document in documents], float)
    length, holding = counts.sum(axis=1, keepdims=True), (counts > 0).sum(axis=0)
    idf = np.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
    return counts @ (idf * counts / (counts + 1.5 * (0.25 + 0.75 * length / length.mean()))).T


def baselines(sales):
    """NDCG@10 of the four baselines and the oracle on the test purchases; ties by mean rank."""
    catalogue, purchases = sales.catalogue, sales.purchases
    known = [history[:-1] for history in histories(purchases)]
    targets, last = (np.array([history[k] for history in histories(purchases)]) for k in (-1, -2))
    number, rows = len(catalogue), np.arange(len(targets))
    popularity = np.tile(np.bincount(np.concatenate(known), minlength=number).astype(float), (len(targets), 1))
    repeater = popularity.copy()
    repeater[rows, last] = np.inf
    transitions = np.zeros((number, number))
    for history in known:
        np.add.at(transitions, (history[:-1], history[1:]), 1)
    columns = zip(catalogue.titles, catalogue.paths, catalogue.brands, catalogue.prices, strict=True)
    texts = [f"Title: {t}. Category: {' '.join(p)}. Brand: {b}. Price: ${c}." for t, p, b, c in columns]
    scores = {
        "popularity": popularity,
        "last-item repeater": repeater,
        "transitions": transitions[last],
        "BM25 of last item": bm25_between(texts)[last],
        "oracle": purchases.probabilities,
    }
    ndcg = {name: mean_rank_ndcg(values, targets) for name, values in scores.items()}
    return {"chance": float(sum(1 / np.log2(rank + 2) for rank in range(10)) / number)} | ndcg


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("category", list(CATEGORIES))
def test_baselines_stand_between_chance_and_the_oracle(category, seed):
    """The table of docs/synthetic_shop.md (`pytest -rP -k baselines` prints it)."""
    row = baselines(simulate_category(category, Shop(seed=seed)))
    print(f"| {category} | {seed} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    chance, oracle = row.pop("chance"), row.pop("oracle")
    assert 0.35 < oracle < 0.55
    assert min(row.values()) > 2 * chance, row
    assert 0.3 * oracle < max(row.values()) < 0.55 * oracle, row


# --- bad settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, r"Shop\.seed = -1"),
        ({"users": 0}, r"Shop\.users = 0"),
        ({"items": 0}, r"Shop\.items = 0"),
        ({"min_purchases": 2}, r"Shop\.min_purchases = 2 .* validation"),
        ({"max_purchases": 4}, r"Shop\.max_purchases = 4"),
        ({"new_items": 0.5}, r"Shop\.new_items"),
        ({"launch_days": 1}, r"Shop\.launch_days"),
        ({"same_day": 1.0}, r"Shop\.same_day"),
        ({"dirty": 0.5}, r"Shop\.dirty"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(CalrecError, match=message):
        Shop(**settings)


def test_categories_and_catalogue_sizes_that_cannot_be(tmp_path):
    with pytest.raises(CalrecError, match=r"no category 'Toys'\. It has: Office_Products, Home_and_Kitchen"):
        write_shop(tmp_path, SMALL, ("Toys",))
    with pytest.raises(CalrecError, match=r"Shop\.items = 60 is too small for Office_Products\. Use at least \d+"):
        write_shop(tmp_path, dataclasses.replace(SMALL, items=60), (OFFICE,))
    with pytest.raises(CalrecError, match=r"Shop\.items is too large"):
        write_shop(tmp_path, dataclasses.replace(SMALL, items=5000), (OFFICE,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dollars", "point"), [(3.0, 4.99), (4.99, 4.99), (5.0, 7.99), (21.0, 24.99), (2000.0, 949.99)]
)
def test_price_points(dollars, point):
    assert price_point(dollars) == pytest.approx(point)


def test_due_peaks_at_the_cycle():
    shopper = Shopper(build_catalogue(OFFICE, 240, 0.1, 45, np.random.default_rng(0)))
    due = shopper.due(np.arange(1, 9), np.array(3))
    assert due.argmax() == 2 and due[2] == pytest.approx(1.0) and due[-1] == pytest.approx(Rules().rest, abs=1e-6)
    assert shopper.due(np.array([0 - NEVER]), np.array(3)) == 0


# --- with the rest of the project ------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove", [True, False])
def test_prepared_targets_are_the_oracles(written, tmp_path, remove):
    """Users, items and last purchases of the prepared dataset are the oracle's, whether repeats are removed or kept."""
    paths = {"reviews": written.reviews[OFFICE], "metadata": written.metadata[OFFICE]}
    dataset = prepare(tmp_path / "out", name="shop", **paths, remove_consecutive_repeats=remove, max_bad_share=0.1)
    oracle, sales = load_oracle(written.oracles[OFFICE]), simulate_category(OFFICE, SMALL)
    assert list(dataset.user_ids) == list(oracle.user_ids) and list(dataset.item_ids) == list(oracle.item_ids)
    targets = [dataset.item_ids[dataset.target(user, "test")] for user in range(SMALL.users)]
    assert targets == [sales.item_ids[history[-1]] for history in histories(sales.purchases)]
    kept = sales.purchases.lengths.sum()
    assert len(dataset.items) == kept if remove else len(dataset.items) > kept


def test_the_document_states_the_rules_in_force():
    text = (Path(__file__).parents[1] / "docs" / "synthetic_shop.md").read_text()
    stated = dict(re.findall(r"^\| `(\w+)` \| ([\d., ]+) \|$", text, re.M))
    in_force = {name: np.atleast_1d(value).tolist() for name, value in dataclasses.asdict(Rules()).items()}
    assert {name: [float(number) for number in value.split(",")] for name, value in stated.items()} == in_force
