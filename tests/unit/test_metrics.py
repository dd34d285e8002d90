"""Peak memory belongs to the phase it is asked about, and asking for it never fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tldist.metrics import peak_memory_gib, reset_peak_memory

CPU = torch.device("cpu")
GIB = 2**30


def test_the_peak_is_of_the_time_since_the_last_reset() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_gib(CPU)
    big = np.ones(GIB // 4, dtype=np.uint8)  # a mapping of its own, given back at once
    assert peak_memory_gib(CPU) > before + 0.2
    del big
    assert peak_memory_gib(CPU) > before + 0.2
    reset_peak_memory(CPU)
    assert peak_memory_gib(CPU) < before + 0.1


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
