"""What the engines cost and save: step time beside DDP, and the bytes that a worker holds.

`tldist bench engines`, or `python -m tldist_benchmarks.engines`; docs/engines.md says what the figures mean.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.table import Table

from tldist import backbones, dist
from tldist.config import EngineConfig, ModelConfig, ModelName, OptimConfig
from tldist.engine import Engine, build_engine, numerics
from tldist.engine.base import HeldBytes
from tldist.objectives.base import Targets
from tldist.objectives.supervised import Supervised
from tldist.plan import Phase
from tldist.worker import keep_freed_memory
from tldist_benchmarks import harness, report
from tldist_benchmarks.harness import Measured, show, synchronize
from tldist_benchmarks.pool import CLASSES

KINDS = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Settings:
    """The flags of `tldist bench engines`."""

    model: ModelName = "resnet50"
    image_size: int = 224
    batch_size: int = 8
    """Of one worker."""
    workers: int = 2
    """Processes: one per GPU, or sharing the cores where there is none."""
    precision: Literal["bf16", "fp32"] = "bf16"
    rounds: int = 7
    steps: int = 2
    """Steps of an engine's turn."""
    json: str = ""
    """Also write rows and the environment to this file."""
    out: str = "benchmarks/results"
    """Folder for the CSV."""


class Variant:
    """One engine around a whole network, kept alive."""

    def __init__(self, kind: str, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        s = settings
        model = backbones.build(ModelConfig(name=s.model, weights="none"), CLASSES, s.image_size, 0).to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _, network = model.cut(0)
        phase = Phase("all", 1, tuple((stage, 1.0) for stage in backbones.stage_names(s.model)))
        objective = Supervised(network.train(), 0.1)
        config = EngineConfig(kind=kind)  # type: ignore[arg-type]
        self.engine: Engine = build_engine(config, objective, phase, OptimConfig(), numerics(s.precision, device), {})
        images = torch.randn(s.batch_size, 3, s.image_size, s.image_size, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.targets = Targets(torch.arange(s.batch_size, device=device) % CLASSES)

    def turn(self) -> dict[str, float]:
        """Waiting for the others is in the time, as in training; other processes leave the CPU's own time alone."""
        dist.barrier()
        started, worked = time.perf_counter(), time.process_time()
        for _ in range(self.settings.steps):
            self.engine.forward_backward(self.images, self.targets)
            self.engine.step(1.0)
        synchronize(self.device)
        steps = self.settings.steps
        cpu_ms = (time.process_time() - worked) * 1e3 / steps
        return {"step_ms": (time.perf_counter() - started) * 1e3 / steps, "cpu_ms": cpu_ms}

    def held(self) -> HeldBytes:
        """The most that is held whenever the backward pass has finished a gradient, and at its end."""
        counts: list[HeldBytes] = []

        def count(_: torch.Tensor) -> None:
            counts.append(self.engine.held_bytes())

        trained = [p for p in self.engine.objective.parameters() if p.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(count) for parameter in trained]
        self.engine.forward_backward(self.images, self.targets)
        counts.append(self.engine.held_bytes())
        for hook in hooks:
            hook.remove()
        self.engine.step(1.0)
        return HeldBytes(*(max(getattr(c, part) for c in counts) for part in ("weights", "gradients", "optimizer")))


def _worker(rank: int, port: int, settings: Settings, answers: Any) -> None:
    """One rank: builds every engine, lets them take turns, counts."""
    world, place = str(settings.workers), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    torch.set_num_threads(max(1, dist.cores() // settings.workers))
    keep_freed_memory()
    device = dist.local_device()
    dist.init(device)
    say = show if rank == 0 else lambda _: None
    variants = {kind: Variant(kind, settings, device) for kind in KINDS}
    measured = harness.take_turns({kind: v.turn for kind, v in variants.items()}, settings.rounds, say)
    held = {kind: variant.held() for kind, variant in variants.items()}
    answers.put((rank, measured, held, harness.facts(device)))
    dist.barrier()
    dist.close()


def measure(settings: Settings) -> tuple[Measured, dict[str, HeldBytes], dict[str, Any]]:
    """Rank 0's step times and bytes (padding makes all shares equal), and the facts of the machine."""
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), _free_port()
    workers = [context.Process(target=_worker, args=(r, port, settings, answers)) for r in range(settings.workers)]
    for worker in workers:
        worker.start()
    found = []
    while len(found) < len(workers):
        if answers.empty():
            time.sleep(0.2)
            if any(worker.exitcode for worker in workers):
                for worker in workers:
                    worker.terminate()
                raise RuntimeError("a worker of the bench failed: its traceback is above")
            continue
        found.append(answers.get())
    for worker in workers:
        worker.join()
    _, measured, held, facts = min(found, key=lambda answer: answer[0])
    return measured, held, facts


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rows(measured: Measured, held: dict[str, HeldBytes]) -> list[dict[str, Any]]:
    """One row an engine; a ratio is the median of the rounds' ratios."""
    ddp, ddp_cpu = measured["ddp"]["step_ms"], measured["ddp"]["cpu_ms"]
    return [
        {
            "bench": "engines",
            "variant": kind,
            "step_ms": (step := measured[kind]["step_ms"]).median,
            "step_ms_p20": step.percentile(0.2),
            "step_ms_p80": step.percentile(0.8),
            "over_ddp": step.over(ddp).median,
            "over_ddp_p20": step.over(ddp).percentile(0.2),
            "over_ddp_p80": step.over(ddp).percentile(0.8),
            "cpu_ms": measured[kind]["cpu_ms"].median,
            "cpu_over_ddp": measured[kind]["cpu_ms"].over(ddp_cpu).median,
            **{f"{part}_mib": count / 2**20 for part, count in asdict(held[kind]).items()},
        }
        for kind in KINDS
    ]


def table(settings: Settings, found: list[dict[str, Any]]) -> Table:
    """Times over ddp's, and MiB."""
    s = settings
    title = f"{s.model}, {s.image_size} px, {s.batch_size} images on each of {s.workers} workers, {s.precision}; MiB"
    held = ("weights", "gradients", "optimizer")
    columns = ("step ms", "p20", "p80", "over ddp", "p20", "p80", "CPU ms", "over ddp", *held)
    made = report.table(title, "engine", columns)
    for row in found:
        times = [f"{row[key]:.0f}" for key in ("step_ms", "step_ms_p20", "step_ms_p80")]
        ratios = [f"{row[key]:.3f}" for key in ("over_ddp", "over_ddp_p20", "over_ddp_p80")]
        sizes = [f"{row[f'{part}_mib']:.1f}" for part in held]
        made.add_row(row["variant"], *times, *ratios, f"{row['cpu_ms']:.0f}", f"{row['cpu_over_ddp']:.3f}", *sizes)
    return made


def run(settings: Settings) -> None:
    """Measure, print, write. Raises UserError."""
    measured, held, facts = measure(settings)
    found = rows(measured, held)
    report.print_tables(table(settings, found))
    sizes = {k: {f"{part}_mib": harness.Series((n / 2**20,)) for part, n in asdict(h).items()} for k, h in held.items()}
    both = {kind: {**metrics, **sizes[kind]} for kind, metrics in measured.items()}
    report.write(f"engines-{settings.model}", settings, facts, both, found, {})


def bench(words: Sequence[str]) -> int:
    """The command. Raises UserError."""
    return harness.command(words, Settings, "engines", __doc__ or "", run)


if __name__ == "__main__":
    harness.main(bench)
