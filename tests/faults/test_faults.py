"""Two faults, and with TLDIST_LONG all, once each, in a run of four epochs. `make faults` tries them more often, and
loses a node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import long
from faults import FAULTS, try_fault
from harness import bench, default_weights, photos
from runs import Bench, Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores"),
]


@pytest.fixture(scope="module")
def undisturbed(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, Run]]:
    folder = tmp_path_factory.mktemp("faults")
    with bench(photos(shared_data, folder), default_weights(), folder, epochs=4) as made:
        yield made


# A flipped bit takes the way of a file cut short from its digest on; tests/unit/test_checkpoint.py flips many.
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("killed worker", "checkpoint cut short") else pytest.param(name, marks=long)
        for name in FAULTS
        if name != "a bit flipped"
    ],
)
def test_a_fault_costs_a_few_steps_and_no_bit(undisturbed: tuple[Bench, Run], name: str) -> None:
    trial = try_fault(*undisturbed, name, seed="once", number=0)
    if trial.skipped:
        pytest.skip(trial.skipped)
    assert not trial.problems, trial.moment
