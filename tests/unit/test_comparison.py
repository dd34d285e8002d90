"""The statistics of a study: as scipy and the textbooks have them, and honest where seeds tell nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tldist.study.statistics import Difference, against, all_pairs, corrected, frontier, mean_of, paired

RNG = np.random.default_rng(0)


def by_seed(values: list[float]) -> dict[tuple[int], float]:
    return {(seed,): value for seed, value in enumerate(values)}


def test_mean_and_interval_are_students() -> None:
    values = [0.81, 0.84, 0.80, 0.83, 0.79]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    found = mean_of(values)
    assert (found.n, found.mean) == (5, pytest.approx(0.814))
    assert found.half == pytest.approx((high - low) / 2)
    assert mean_of([0.8]).half is None


def test_seeds_that_agree_to_the_image_are_no_certainty() -> None:
    """Three of 146 / 153: the width of rounding, grain / sqrt(12), not nought; what differs by more keeps its own."""
    half = mean_of([146 / 153] * 3, 1 / 153).half
    assert half == pytest.approx(stats.t.ppf(0.975, 2) / 153 / 36**0.5)
    wide = [0.81, 0.84, 0.80]
    assert mean_of(wide, 1 / 153) == mean_of(wide)


def test_paired_is_the_paired_t_test() -> None:
    first, second = RNG.normal(0.8, 0.02, 6).tolist(), RNG.normal(0.79, 0.02, 6).tolist()
    found = paired(("a", by_seed(first)), ("b", by_seed(second)))
    assert found is not None
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue)
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.mean, found.half) == (pytest.approx((low + high) / 2), pytest.approx((high - low) / 2))


def test_pairing_sees_what_the_seeds_hide() -> None:
    """Seeds differ by points, the arms by half a point in each: unpaired it would be noise."""
    luck = [0.70, 0.85, 0.78, 0.81, 0.74]
    better = [value + 0.005 + tiny for value, tiny in zip(luck, (0.001, -0.001, 0.0, 0.0005, -0.0005), strict=True)]
    assert np.asarray(stats.ttest_ind(better, luck))[1] > 0.5
    (difference,) = corrected(all_pairs({"better": by_seed(better), "plain": by_seed(luck)}))
    assert difference.is_real


def test_only_shared_blocks_count() -> None:
    found = paired(("a", {(0,): 1.0, (1,): 2.0, (2,): 9.0}), ("b", {(0,): 0.0, (1,): 1.0, (5,): 3.0}))
    assert found is not None
    assert (found.seeds, found.mean) == (2, 1.0)
    assert paired(("a", {(0,): 1.0}), ("b", {(1,): 1.0})) is None


def test_a_seed_s_pairs_are_one_witness() -> None:
    """What a seed does to a difference it does to all of its pairs: counted singly, they would call luck real."""
    luck = {0: 0.05, 1: 0.03, 2: -0.02}
    b = {(seed, other): RNG.normal(0.8, 0.02) for seed in luck for other in "wxyz"}
    tiny = {block: RNG.normal(0, 0.001) for block in b}
    a = {block: value + luck[block[0]] + tiny[block] for block, value in b.items()}
    found = paired(("a", a), ("b", b))
    assert found is not None
    means = [np.mean([a[seed, other] - b[seed, other] for other in "wxyz"]) for seed in luck]
    by_hand = np.asarray(stats.ttest_1samp(means, 0))
    assert (found.seeds, found.p) == (3, pytest.approx(by_hand[1]))
    assert by_hand[1] > 0.05
    singly = np.asarray(stats.ttest_1samp([a[block] - b[block] for block in b], 0))
    assert singly[1] < 0.05
    one = paired(("a", {block: value for block, value in a.items() if block[0] == 0}), ("b", b))
    assert one is not None
    assert (one.seeds, one.half, one.p) == (1, None, None)


@pytest.mark.parametrize("seeds", [2, 3])
def test_few_seeds_of_many_arms_call_noise_real_in_one_comparison_of_twenty(seeds: int) -> None:
    """A seed shifts the difference by as much as single runs differ, and nine other choices share it."""
    rounds, real = 1000, 0
    for _ in range(rounds):
        shift, runs = RNG.normal(0, 0.01, seeds), RNG.normal(0, 0.01, (seeds, 9))
        a = {(seed, other): shift[seed] + runs[seed, other] for seed in range(seeds) for other in range(9)}
        (difference,) = corrected(all_pairs({"a": a, "b": dict.fromkeys(a, 0.0)}))
        real += difference.is_real
    assert 0 < real <= 0.05 * rounds + 3 * (0.05 * 0.95 * rounds) ** 0.5


def test_one_pair_proves_nothing() -> None:
    (difference,) = corrected(all_pairs({"a": by_seed([0.9]), "b": by_seed([0.1])}))
    assert (difference.p, difference.corrected_p, difference.is_real) == (None, None, False)


def test_one_image_more_in_every_seed_is_no_proof() -> None:
    """Three equal differences have no spread, which is the grain's doing: 1 of 153 images may be rounding."""
    grain = 1 / 153
    a, b = by_seed([0.80 + grain] * 3), by_seed([0.80] * 3)
    (naive,), (fair,) = corrected(all_pairs({"a": a, "b": b})), corrected(all_pairs({"a": a, "b": b}, grain))
    assert naive.is_real
    assert not fair.is_real
    (ten,) = corrected(all_pairs({"a": by_seed([0.80 + 10 * grain] * 3), "b": b}, grain))
    assert ten.is_real


def test_equal_arms_do_not_differ() -> None:
    (difference,) = corrected(all_pairs({"a": by_seed([0.5, 0.6]), "b": by_seed([0.5, 0.6])}))
    assert (difference.mean, difference.p, difference.is_real) == (0.0, 1.0, False)


def test_holm_steps_down() -> None:
    """Holm's procedure by hand, as R's p.adjust(c(0.01, 0.04, 0.03, 0.005), 'holm') has it."""
    raw = [Difference("a", str(i), 3, 0.1, 0.1, p) for i, p in enumerate((0.01, 0.04, 0.03, 0.005))]
    assert [d.corrected_p for d in corrected(raw)] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [d.is_real for d in corrected(raw)] == [True, False, False, True]


def test_noise_is_called_real_in_at_most_one_study_of_twenty() -> None:
    """Six equal arms, fifteen comparisons: without Holm's correction a third of such studies would find something."""
    studies, found, uncorrected = 300, 0, 0
    for _ in range(studies):
        arms = {str(i): by_seed(RNG.normal(0.8, 0.02, 5).tolist()) for i in range(6)}
        differences = corrected(all_pairs(arms))
        found += any(d.is_real for d in differences)
        uncorrected += any(d.p is not None and d.p < 0.05 for d in differences)
    assert found <= 0.05 * studies + 3 * (0.05 * 0.95 * studies) ** 0.5
    assert uncorrected > 0.2 * studies


def test_against_leaves_the_arm_itself_out() -> None:
    arms = {name: by_seed([1.0, 2.0]) for name in "abc"}
    assert [(d.first, d.second) for d in against("b", arms)] == [("b", "a"), ("b", "c")]


@pytest.mark.parametrize(
    ("lower_is_better", "expected"), [(False, ["cheap", "middle", "dear"]), (True, ["cheap", "low"])]
)
def test_the_frontier_is_what_nothing_beats_in_both(lower_is_better: bool, expected: list[str]) -> None:
    points = {"dear": (9.0, 0.9), "cheap": (1.0, 0.5), "beaten": (5.0, 0.6), "middle": (4.0, 0.7), "low": (6.0, 0.3)}
    assert frontier(points, lower_is_better) == expected
