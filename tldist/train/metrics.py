"""What a run measures: running loss and accuracy kept on the device, throughput kept free of everything else."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tldist import dist
from tldist.objectives.base import StepOutput, Targets

WARMUP_STEPS = 3
"""Steps at the start of each phase that the throughput clock leaves out: allocator, autotuning, compilation."""


@dataclass(frozen=True)
class Reading:
    """Training since the last reading; None where no pass was finite."""

    loss: float | None
    top1: float | None
    grad_norm: float | None
    """Mean over the steps, before clipping."""
    grad_norm_max: float | None
    by_worker: list[list[float]]
    """What each worker added of its own, a row for each worker."""


class TrainMeter:
    """Loss, top-1 and gradient norm over the steps since the last reading, and the steps left out, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss * n, correct, n
        self.skips = torch.zeros(3, dtype=torch.float64, device=device)  # in all, in a row, most in a row
        self.norms = torch.zeros(3, dtype=torch.float64, device=device)  # sum, steps, largest; equal on all workers

    @torch.no_grad()
    def update(self, output: StepOutput, targets: Targets) -> None:
        """Mixed images count as correct by the share of the label that was predicted. A pass whose loss is not finite
        is not counted."""
        predicted = output.logits.argmax(dim=1)
        hits = (predicted == targets.labels_N).double()
        if targets.partner_labels_N is not None and targets.weight_N is not None:
            partner_hits = (predicted == targets.partner_labels_N).double()
            hits = torch.lerp(partner_hits, hits, targets.weight_N.double())
        loss = output.loss.double()
        row = torch.stack([loss, hits.mean(), torch.ones_like(loss)]) * len(predicted)
        self.sums += torch.where(loss.isfinite(), row, 0.0)

    def stepped(self, skipped: Tensor, grad_norm: Tensor) -> None:
        """After a step: 1.0 where it was left out, else 0.0, and its gradient norm, which then does not count."""
        in_all, in_a_row, most = self.skips.unbind()
        in_all += skipped
        in_a_row.add_(1).mul_(skipped)
        torch.maximum(most, in_a_row, out=most)
        total, steps, largest = self.norms.unbind()
        norm = torch.where(skipped > 0, 0.0, grad_norm.double())
        total += norm
        steps += 1 - skipped
        torch.maximum(largest, norm, out=largest)

    def drain(self, mine: Sequence[float] = ()) -> Reading:
        """Read over all workers what was counted since the last call, and begin anew; each worker adds `mine`.

        One all-reduce, one copy to the host.
        """
        rows = torch.zeros(dist.world_size(), len(mine), dtype=torch.float64)
        rows[dist.rank()] = torch.tensor(mine, dtype=torch.float64)
        summed = dist.all_sum(torch.cat([self.sums, rows.flatten().to(self.sums.device)]))
        loss, correct, n, total, steps, largest, *own = torch.cat([summed[:3], self.norms, summed[3:]]).tolist()
        self.sums.zero_()
        self.norms.zero_()
        return Reading(
            loss / n if n else None,
            correct / n if n else None,
            total / steps if steps else None,
            largest if steps else None,
            [own[i * len(mine) : (i + 1) * len(mine)] for i in range(dist.world_size())],
        )

    @property
    def most_skipped(self) -> Tensor:
        """The most steps in a row that were left out, on the device."""
        return self.skips[2]

    def drain_skipped(self) -> int:
        """Count the steps left out since the last call; one copy to the host."""
        in_all = self.skips[0]
        skipped = int(in_all)
        in_all.zero_()
        return skipped


@dataclass
class Window:
    """Steady training time: images over all workers, seconds, and the seconds of them spent waiting for data."""

    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    def __add__(self, other: Window) -> Window:
        return Window(self.images + other.images, self.seconds + other.seconds, self.wait_seconds + other.wait_seconds)

    @property
    def images_per_s(self) -> float:
        """0.0 while nothing was measured."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def data_wait_share(self) -> float:
        """Share of the time in which this worker waited for its loader."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0


class ThroughputClock:
    """Counts training steps and nothing else: it stands during evaluation, checkpoints and a phase's warm-up.

    `start` and `stop` synchronise the device; between them only `step` and `waited` are called, which do not.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phase = Window()
        self.first_step_s = 0.0
        """What the phase's first step took, compilation included."""
        self._window = Window()
        self._since = 0.0
        self._warmup_left = WARMUP_STEPS

    def start(self) -> None:
        """Begin a window; whatever an earlier one held is forgotten."""
        self._synchronize()
        self._window, self._since = Window(), time.perf_counter()

    def waited(self, seconds: float) -> None:
        """The loader kept the step waiting."""
        self._window.wait_seconds += seconds

    def step(self, images: int) -> None:
        """A step over `images` (of all workers) was launched."""
        self._window.images += images
        if self._warmup_left:
            since, first = self._since, self._warmup_left == WARMUP_STEPS
            self._warmup_left -= 1
            self.start()
            if first:
                self.first_step_s = self._since - since

    def stop(self) -> Window:
        """End the window, count it into the phase, and return it; nothing is counted during the warm-up."""
        self._synchronize()
        if self._warmup_left or not self._window.images:
            return Window()
        self._window.seconds = time.perf_counter() - self._since
        self.phase = self.phase + self._window
        window, self._window = self._window, Window()
        return window

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak for `peak_memory_gib`. Where the system does not allow it, the old peak goes on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS: proc(5)


def peak_memory_gib(device: torch.device) -> float:
    """This worker's peak since the last reset: allocated device memory, or resident memory on the CPU. No device sync.

    Without Linux's /proc the peak is of the whole process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return (_resident_peak_kib() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20


def _resident_peak_kib() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def count_parameters(named: dict[str, Tensor]) -> int:
    """Elements over all tensors."""
    return sum(t.numel() for t in named.values())
