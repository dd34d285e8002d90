"""What the meters tell, and that peak memory belongs to the phase it is asked about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_ranks

from tldist import dist
from tldist.train.metrics import Reading, TrainMeter, peak_memory_gib, reset_peak_memory

CPU = torch.device("cpu")
GIB = 2**30


def _peaks() -> list[float]:
    reset_peak_memory(CPU)
    found = [peak_memory_gib(CPU)]
    big = np.ones(GIB // 4, dtype=np.uint8)  # a mapping of its own, given back at once
    found.append(peak_memory_gib(CPU))
    del big
    found.append(peak_memory_gib(CPU))
    reset_peak_memory(CPU)
    return [*found, peak_memory_gib(CPU)]


def test_the_peak_is_of_the_time_since_the_last_reset() -> None:
    """In a process of its own: other tests' threads give memory back whenever they like."""
    ((before, held, freed, again),) = run_ranks(_peaks, 1)
    assert held > before + 0.2
    assert freed > before + 0.2
    assert again < before + 0.1


def test_a_system_without_proc_tells_the_peak_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = peak_memory_gib(CPU)

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    reset_peak_memory(CPU)
    assert peak_memory_gib(CPU) == pytest.approx(expected, rel=0.5)


def test_a_status_without_the_line_tells_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name:\tpython\n")
    assert peak_memory_gib(CPU) > 0.05


def _read_twice() -> list[Reading]:
    """Three steps, the second of them left out; then none."""
    dist.init(CPU)
    meter = TrainMeter(CPU)
    for skipped, norm in ((0.0, 1.0), (1.0, float("nan")), (0.0, 3.0)):
        meter.stepped(torch.tensor(skipped), torch.tensor(norm))
    found = [meter.drain((10.0 + dist.rank(), 0.5)), meter.drain()]
    dist.close()
    return found


def test_gradient_norms_of_steps_left_out_do_not_count_and_workers_add_what_is_their_own() -> None:
    one = Reading(None, None, 2.0, 3.0, [[10.0, 0.5], [11.0, 0.5]])
    assert run_ranks(_read_twice, 2) == [[one, Reading(None, None, None, None, [[], []])]] * 2
