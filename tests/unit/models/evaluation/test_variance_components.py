"""Every formula against simulated episodes whose true accuracies are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from models.evaluation import variance_components as episodic
from models.evaluation.variance_components import Components

#: p_e ~ Beta(14, 6): mean 0.7, standard deviation 0.1.
ALPHA, BETA = 14.0, 6.0
MEAN = ALPHA / (ALPHA + BETA)
BETWEEN = ALPHA * BETA / ((ALPHA + BETA) ** 2 * (ALPHA + BETA + 1))
WITHIN = MEAN * (1 - MEAN) - BETWEEN
TRUE = Components(BETWEEN, BETWEEN, BETWEEN, WITHIN, measured=math.nan)


def coin_flips(random, pilots, episodes, queries):
    """Answers bool [pilots, E, Q] of episodes whose accuracy is drawn from the Beta distribution."""
    accuracy = random.beta(ALPHA, BETA, (pilots, episodes, 1))
    return random.random((pilots, episodes, queries)) < accuracy


def one_class(right):
    return np.zeros(right.shape, dtype=np.int64)


def mean_accuracies(random, pilots, episodes, queries):
    """The accuracy [pilots] that each of many pilots would report."""
    accuracy = random.beta(ALPHA, BETA, (pilots, episodes))
    return random.binomial(queries, accuracy).mean(1) / queries


def error_of_a_share(share, draws):
    """Three standard errors of a simulated share."""
    return 3 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize(("episodes", "queries"), [(4, 50), (6, 50), (15, 50), (6, 400)])
def test_the_interval_covers_the_true_accuracy_in_95_of_100_pilots(episodes, queries):
    pilots = 2000
    right = coin_flips(np.random.default_rng(episodes), pilots, episodes, queries)
    found = [episodic.estimate(pilot, one_class(pilot)) for pilot in right]
    covered = np.mean([pilot.low <= MEAN <= pilot.high for pilot in found])
    assert covered == pytest.approx(0.95, abs=error_of_a_share(0.95, pilots))
    alone = np.mean([_inside_wilson(pilot) for pilot in right])
    assert alone < 0.93  # the interval of queries as though all were of one episode misses too often


def _inside_wilson(right):
    low, high = episodic.wilson(int(right.sum()), right.size)
    return low <= MEAN <= high


@pytest.mark.parametrize(("episodes", "queries"), [(2, 20), (5, 40)])
def test_where_episodes_do_not_differ_the_interval_covers_no_less(episodes, queries):
    """Two accuracies are often equal: then Student's t alone would have no width at all."""
    pilots = 2000
    right = np.random.default_rng(1).random((pilots, episodes, queries)) < MEAN
    found = [episodic.estimate(pilot, one_class(pilot)) for pilot in right]
    covered = np.mean([pilot.low <= MEAN <= pilot.high for pilot in found])
    assert covered >= 0.95
    spread = right.mean(2).std(1, ddof=1) / math.sqrt(episodes)
    by_t = abs(right.mean((1, 2)) - MEAN) <= stats.t.ppf(0.975, episodes - 1) * spread
    assert np.mean(by_t) < covered - 0.01


def test_both_variances_are_unbiased():
    pilots, episodes, queries = 2000, 6, 30
    right = coin_flips(np.random.default_rng(2), pilots, episodes, queries)
    measured, within = np.array([episodic.moments(pilot, one_class(pilot)) for pilot in right]).T
    between = measured - within / queries
    for found, true in ((between, BETWEEN), (within, WITHIN)):
        assert found.mean() == pytest.approx(true, abs=3 * found.std() / math.sqrt(pilots))
    floored = [episodic.variance_components(pilot, one_class(pilot)).between for pilot in right[:50]]
    assert floored == pytest.approx(np.maximum(between[:50], 0).tolist())


def test_with_classes_of_unequal_difficulty_both_variances_are_unbiased():
    """Of 5 classes with 6 queries each, some far harder: only flips within a class are chance."""
    random = np.random.default_rng(3)
    pilots, episodes, ways, each = 2000, 6, 5, 6
    accuracy = random.beta(1.5, 1.0, (pilots, episodes, 1, ways))
    right = (random.random((pilots, episodes, each, ways)) < accuracy).reshape(pilots, episodes, -1)
    classes = np.tile(np.arange(ways), (episodes, each))
    measured, within = np.array([episodic.moments(pilot, classes) for pilot in right]).T
    beta = stats.beta(1.5, 1.0)
    true_within = beta.mean() * (1 - beta.mean()) - beta.var()  # E[p (1 - p)]
    true_between = beta.var() / ways
    between = measured - within / (each * ways)
    for found, true in ((between, true_between), (within, true_within)):
        assert found.mean() == pytest.approx(true, abs=3 * found.std() / math.sqrt(pilots))
    blind = np.array([episodic.moments(pilot, one_class(pilot)) for pilot in right])[:, 1]
    assert blind.mean() > 1.2 * true_within  # what ignoring the classes would say


def test_an_episode_with_a_single_query_of_a_class_counts_as_one_class():
    right = np.array([[True, False, True, True], [True, True, False, False]])
    classes = np.array([[0, 0, 0, 1], [0, 0, 0, 1]])
    _, within = episodic.moments(right, classes)
    assert within == pytest.approx((4 / 3 * 3 / 16 + 4 / 3 * 1 / 4) / 2)


def test_the_interval_of_the_variance_between_episodes_covers_it():
    """Beta is not normal, and the method says it takes it so: a little is allowed for that."""
    pilots, episodes, queries = 2000, 8, 100
    right = coin_flips(np.random.default_rng(4), pilots, episodes, queries)
    found = [episodic.variance_components(pilot, one_class(pilot)) for pilot in right]
    covered = np.mean([pilot.between_low <= BETWEEN <= pilot.between_high for pilot in found])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_the_formula_gives_the_variance_of_the_mean():
    random = np.random.default_rng(5)
    for episodes, queries in ((4, 10), (4, 200), (12, 25)):
        simulated = mean_accuracies(random, 40_000, episodes, queries).var()
        assert TRUE.variance(queries) / episodes == pytest.approx(simulated, rel=0.03)


def test_the_best_number_of_queries_gives_the_least_variance_for_its_cost():
    """For a budget, other numbers of queries are simulated with as many episodes as they leave."""
    random = np.random.default_rng(6)
    episode_cost, query_cost, budget = 60.0, 1.0, 6000.0
    best = round(episodic.best_queries(TRUE, episode_cost, query_cost))
    simulated = {}
    for queries in (best // 4, best, best * 4):
        episodes = round(budget / (episode_cost + queries * query_cost))
        paid = episodes * (episode_cost + queries * query_cost) / budget  # rounding to whole episodes
        simulated[queries] = mean_accuracies(random, 30_000, episodes, queries).var() * paid
    assert min(simulated, key=simulated.__getitem__) == best
    assert all(found > 1.1 * simulated[best] for queries, found in simulated.items() if queries != best)


def test_as_many_episodes_as_needed_give_the_wanted_half_width_on_average():
    queries, wanted, pilots = 50, 0.04, 1000
    needed = episodic.episodes_needed(TRUE, queries, wanted)
    right = coin_flips(np.random.default_rng(7), pilots, needed, queries)
    widths = np.array([episodic.estimate(pilot, one_class(pilot)).half_width for pilot in right])
    assert math.sqrt(np.mean(widths**2)) == pytest.approx(wanted, rel=0.03)
    assert episodic.half_width(TRUE, queries, needed) <= wanted
    assert episodic.half_width(TRUE, queries, needed - 1) > wanted


@pytest.mark.parametrize("wanted", [0.5, 0.2, 0.1, 0.03, 0.01, 0.004])
def test_the_episodes_needed_are_the_fewest(wanted):
    counted = next(e for e in range(2, 100_000) if episodic.half_width(TRUE, 50, e) <= wanted)
    assert episodic.episodes_needed(TRUE, 50, wanted) == counted


def test_one_episode_has_an_accuracy_and_no_interval():
    found = episodic.estimate(np.array([[True, True, False, True]]), np.array([[0, 1, 0, 1]]))
    assert (found.value, found.low, found.high, found.half_width) == (0.75, None, None, None)
    assert found.components is None
    assert "one episode" in found.interval


def test_all_right_in_every_episode_is_not_certainty():
    right = np.ones((4, 10), dtype=bool)
    found = episodic.estimate(right, one_class(right))
    assert found.value == 1.0
    assert 0.9 < found.low < found.high == pytest.approx(1.0)
    assert found.interval.startswith("Wilson")


def test_episodes_alike_by_luck_do_not_narrow_the_interval_below_the_coin_flips():
    right = np.tile(np.arange(10) < 8, (4, 1))
    found = episodic.estimate(right, one_class(right))
    assert found.components.between == 0
    assert found.components.between_high > 0
    flips = 10 / 9 * 0.8 * 0.2 / (4 * 10)
    assert found.half_width == pytest.approx(stats.norm.ppf(0.975) * math.sqrt(flips))


def test_where_episodes_do_not_differ_any_number_of_queries_pays():
    assert episodic.best_queries(replace(TRUE, between=0.0), 60.0, 0.01) == math.inf


def test_the_variance_between_two_episodes_is_never_said_to_be_more_than_an_accuracy_can_vary():
    right = np.array([[True] * 9 + [False], [True] + [False] * 9])
    found = episodic.variance_components(right, one_class(right))
    assert found.between_low < found.between == found.between_high == 0.25
