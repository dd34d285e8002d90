"""What more workers bring: step time and efficiency per strategy, time in all-reduce, and a cost model beside them.

`tldist bench scaling`, or `python -m tldist_benchmarks.scaling`; docs/benchmarks.md says what is measured and assumed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as td

from tldist import dist
from tldist.config import ModelName, StrategyName, UserError
from tldist.objectives.base import StepOutput
from tldist_benchmarks import harness, page, results, scaling_view
from tldist_benchmarks.cost_model import BUCKET_BYTES
from tldist_benchmarks.harness import Measured, Series, show, synchronize
from tldist_benchmarks.phase import Phase, Training, check_training
from tldist_benchmarks.pool import build_run, draw_pool
from tldist_benchmarks.workers import Group, Machine, Machines, Place, Start, machines

STRATEGIES: tuple[StrategyName, ...] = ("full", "partial", "feature_extraction")
"""Everything trains; the last stage and the head; the head."""
MOST_ON_CPU = 4
"""Workers on a machine without GPUs, where --workers is not given: all sizes of group are alive at once."""


@dataclass(frozen=True)
class Settings:
    """The flags of `tldist bench scaling`."""

    model: ModelName = "resnet50"
    image_size: int = 224
    batch_size: int = 8
    """weak: images of each worker, however many there are; strong: of all together."""
    scaling: Literal["weak", "strong"] = "weak"
    workers: int = 0
    """On each machine, at most (default: its GPUs, or its cores up to MOST_ON_CPU)."""
    threads: int = 0
    """Of each worker, however many there are (default: a machine's cores shared by the most workers)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: Literal["on", "off"] = "off"
    rounds: int = 7
    steps: int = 3
    """Steps of an epoch; a turn is one epoch with all-reduce, one without, and as many all-reduces alone."""
    gpu_tflops: float = 170.0
    """Extrapolation: TFLOP/s that one GPU sustains. Default: 17 % of an H100's 989 (MLPerf's ResNet-50 record);
    tldist's full ResNet-50 made 160 on an H200."""
    gpu_batch_size: int = 256
    """Extrapolation: images of each GPU."""
    gpus_per_node: int = 8
    node_gb_per_s: float = 360.0
    """Extrapolation: bus bandwidth of an all-reduce inside a node, as nccl-tests tell it."""
    network_gb_per_s: float = 40.0
    """Extrapolation: the same between nodes. Default: one 400 Gb/s adapter a node, at 80 %."""
    network_latency_us: float = 20.0
    """Extrapolation: of one hop between nodes."""
    json: str = ""
    """Also write rows, the model and the environment to this file."""
    out: str = "benchmarks/results"
    """Folder for the CSV and the chart."""


# In a worker


class Worker:
    """One rank of a group: a phase per strategy, all alive."""

    def __init__(self, place: Place, settings: Settings) -> None:
        self.place, self.settings, self.device = place, settings, dist.local_device()
        self.folder = tempfile.TemporaryDirectory(prefix="tldist-bench-")
        self.phases = {strategy: self._phase(strategy) for strategy in STRATEGIES}

    def _phase(self, strategy: StrategyName) -> Phase:
        s, world = self.settings, self.place.world
        (run_dir := Path(self.folder.name) / strategy).mkdir()
        batch_size = s.batch_size * (world if s.scaling == "weak" else 1)
        training = Training(s.model, s.image_size, batch_size, s.precision, s.compile, strategy)
        pool = draw_pool(s.steps * s.batch_size, s.image_size, self.device)
        return Phase(build_run(training.config(run_dir), pool, s.steps * batch_size, self.device))

    def facts(self) -> dict[str, Any]:
        """Of this machine."""
        return harness.facts(self.device)

    def work(self, strategy: str) -> dict[str, float]:
        """What a step has to do, per image, and the bytes that an all-reduce gets."""
        live = self.phases[strategy].live
        trained = [p for p in live.engine.objective.parameters() if p.requires_grad]
        gflops = {f"{part}_gflops": getattr(live.flops, part) / 1e9 for part in ("prefix", "forward", "backward")}
        return {**gflops, "reduced_mb": sum(p.numel() * p.element_size() for p in trained) / 1e6}

    def turn(self, strategy: str) -> dict[str, float]:
        """Milliseconds of a step; of several workers also without all-reduce, and of the all-reduce alone."""
        phase = self.phases[strategy]
        found = phase.step()
        if self.place.world > 1:
            with phase.engine_as(_Apart(phase.live.engine)):
                found["apart_ms"] = phase.step()["step_ms"]
            found["all_reduce_ms"] = self._all_reduce_ms(int(self.work(strategy)["reduced_mb"] * 1e6))
        return found

    def _all_reduce_ms(self, reduced_bytes: int) -> float:
        """All that a step reduces, in buckets as large as DDP's, which are handed over at once."""
        gradients = torch.zeros(reduced_bytes // 4, device=self.device)
        buckets = gradients.split(BUCKET_BYTES // 4)
        dist.barrier()
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(self.settings.steps):
            waiting = [td.all_reduce(bucket, async_op=True) for bucket in buckets]
            for work in waiting:
                work.wait()  # type: ignore[union-attr]
        synchronize(self.device)
        return (time.perf_counter() - started) * 1e3 / self.settings.steps


class _Apart:
    """An engine whose workers keep their gradients to themselves: the same step without all-reduce.

    Their replicas drift apart, which costs no time and is nobody's result.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def forward_backward(self, features: Any, targets: Any, share: float = 1.0, reduce: bool = True) -> StepOutput:
        return self.engine.forward_backward(features, targets, share, reduce=False)


# In the bench


def group_sizes(per_machine: int, machines: int) -> list[list[int]]:
    """Workers on each machine, group by group: one machine is filled in doubling steps, then whole machines double.

    >>> group_sizes(2, 2)
    [[1], [2], [2, 2]]
    """
    return [[n] for n in _doubling(per_machine)] + [[per_machine] * m for m in _doubling(machines) if m > 1]


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({*(2**k for k in range(most.bit_length()) if 2**k < most), most})


def resolved(settings: Settings, found: Sequence[Machine]) -> Settings:
    """With the number of workers and threads that defaults stand for. Raises UserError."""
    smallest = min(found, key=lambda machine: (machine.gpus, machine.cores))
    places, what = (smallest.gpus, "GPUs") if smallest.gpus else (smallest.cores, "cores")
    most = settings.workers or smallest.gpus or min(smallest.cores, MOST_ON_CPU)
    if most > places:
        raise UserError(f"--workers {most}, but {smallest.host} has {places} {what}: use at most {places}")
    sizes = [sum(size) for size in group_sizes(most, len(found))]
    if settings.scaling == "strong":
        if any(settings.batch_size % size for size in sizes):
            raise UserError(f"--batch-size {settings.batch_size} does not share evenly among {sizes} workers")
        check_training(settings.model, settings.image_size, settings.batch_size // sizes[-1])
    return replace(settings, workers=most, threads=settings.threads or max(1, smallest.cores // most))


def open_groups(settings: Settings, found: Machines) -> dict[int, Group]:
    """A group of every size, by its number of workers."""
    groups = {}
    for size in group_sizes(settings.workers, len(found.found)):
        show(f"starting a group of {sum(size)} on {len(size)} machine{'s' if len(size) > 1 else ''}")
        groups[sum(size)] = found.group(size, settings.threads, Worker, settings)
    return groups


def measure(settings: Settings, groups: Mapping[int, Group]) -> Measured:
    """All rounds of all strategies on all groups, and what each strategy has to do."""

    def turn(group: Group, strategy: str) -> Callable[[], dict[str, float]]:
        return lambda: _slowest(group.ask("turn", strategy))

    turns = {scaling_view.name(s, n): turn(group, s) for s in STRATEGIES for n, group in groups.items()}
    measured = harness.take_turns(turns, settings.rounds, show)
    for strategy in STRATEGIES:
        work = groups[1].ask("work", strategy)[0]
        measured[scaling_view.name(strategy, 1)] |= {key: Series((value,)) for key, value in work.items()}
    return measured


def _slowest(answers: Sequence[dict[str, float]]) -> dict[str, float]:
    """A step is over when its last worker has finished."""
    return {key: max(answer[key] for answer in answers) for key in answers[0]}


def run(settings: Settings, start: Start | None) -> None:
    """Measure, print, write. Raises UserError and TrainingFailed."""
    check_training(settings.model, settings.image_size, settings.batch_size)
    with machines(start) as found:
        settings = resolved(settings, found.found)
        groups = open_groups(settings, found)
        facts = groups[1].ask("facts")[0]
        measured = measure(settings, groups)
        used = {
            "machines": len(found.found),
            "most_workers": max(groups),
            "device": "cuda" if found.found[0].gpus else "cpu",
        }
    result, path = results.write(f"scaling-{settings.model}", settings, facts, measured, **used)
    shown = scaling_view.points(result)
    results.write_json(settings.json, result, shown, extrapolated=scaling_view.extrapolated(result))
    page.show(result, scaling_view.view(result), path)


def bench(words: Sequence[str], start: Start | None = None) -> int:
    """The command. Raises UserError and TrainingFailed."""
    return harness.command(words, Settings, "scaling", __doc__ or "", lambda settings: run(settings, start))


if __name__ == "__main__":
    from tldist_benchmarks import scaling  # by the name that workers know

    harness.main(scaling.bench)
