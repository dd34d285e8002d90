"""What the engines cost and save: step time beside DDP, and the bytes that a worker holds, in the real loop.

`tldist bench engines`, or `python -m tldist_benchmarks.engines`; docs/engines.md says what the figures mean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from tldist import dist
from tldist.config import ModelName, UserError
from tldist.engine.base import HeldBytes
from tldist.objectives.base import StepOutput
from tldist.report import plots
from tldist_benchmarks import harness, page, results
from tldist_benchmarks.harness import Measured, Series, show
from tldist_benchmarks.phase import Phase, Training, check_training
from tldist_benchmarks.pool import build_run, draw_pool
from tldist_benchmarks.results import Result, View
from tldist_benchmarks.workers import Group, Place, machines

Kind = Literal["ddp", "zero1", "zero2", "zero3"]
KINDS: tuple[Kind, ...] = ("ddp", "zero1", "zero2", "zero3")
PARTS = ("weights", "gradients", "optimizer")


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
    """Steps of an epoch, which is an engine's turn."""
    json: str = ""
    """Also write rows and the environment to this file."""
    out: str = "benchmarks/results"
    """Folder for the CSV."""


class Worker:
    """One rank: a phase per engine, all alive. Its answers are of this rank."""

    def __init__(self, place: Place, settings: Settings) -> None:
        s = settings
        self.device, self.folder = dist.local_device(), tempfile.TemporaryDirectory(prefix="tldist-bench-")
        pool = draw_pool(s.steps * s.batch_size, s.image_size, self.device)
        self.phases: dict[str, Phase] = {}
        for kind in KINDS:
            (run_dir := Path(self.folder.name) / kind).mkdir()
            batch_size = s.batch_size * place.world
            training = Training(s.model, s.image_size, batch_size, s.precision, "off", engine=kind)
            run = build_run(training.config(run_dir), pool, s.steps * batch_size, self.device)
            self.phases[kind] = Phase(run)

    def facts(self) -> dict[str, Any]:
        """Of this machine."""
        return harness.facts(self.device)

    def turn(self, kind: str) -> dict[str, float]:
        """An epoch. Waiting for others is in the step's time, as in training."""
        return self.phases[kind].step()

    def held(self, kind: str) -> HeldBytes:
        """The most that is held whenever the backward pass of an epoch's step has finished a gradient, or ended."""
        phase, counts = self.phases[kind], list[HeldBytes]()
        engine = phase.live.engine

        def count(_: torch.Tensor | None = None) -> None:
            counts.append(engine.held_bytes())

        trained = [p for p in engine.objective.parameters() if p.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(count) for parameter in trained]
        with phase.engine_as(_Watched(engine, count)):
            phase.epoch()
        for hook in hooks:
            hook.remove()
        return HeldBytes(*(max(getattr(c, part) for c in counts) for part in PARTS))


class _Watched:
    """An engine that tells `look` when its backward pass has ended."""

    def __init__(self, engine: Any, look: Any) -> None:
        self.engine, self.look = engine, look

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def forward_backward(self, *arguments: Any, **named: Any) -> StepOutput:
        output = self.engine.forward_backward(*arguments, **named)
        self.look()
        return output


def measure(group: Group, rounds: int) -> Measured:
    """Rank 0's step times, and its bytes (padding makes all shares equal)."""
    turns = {kind: lambda kind=kind: group.ask("turn", kind)[0] for kind in KINDS}
    measured = harness.take_turns(turns, rounds, show)
    for kind in KINDS:
        held = asdict(group.ask("held", kind)[0])
        measured[kind] |= {f"{part}_mib": Series((count / 2**20,)) for part, count in held.items()}
    return measured


def rows(measured: Measured) -> list[dict[str, Any]]:
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
            **{f"{part}_mib": measured[kind][f"{part}_mib"].median for part in PARTS},
        }
        for kind in measured
    ]


def table(same: Mapping[str, Any], found: list[dict[str, Any]]) -> Table:
    """Times over ddp's, and MiB."""
    flags = "{model}, {image_size} px, {batch_size} images on each of {workers} workers, {precision}; MiB"
    columns = ("step ms", "p20", "p80", "over ddp", "p20", "p80", "CPU ms", "over ddp", *PARTS)
    made = results.table(flags.format_map(same), "engine", columns)
    for row in found:
        times = [f"{row[key]:.0f}" for key in ("step_ms", "step_ms_p20", "step_ms_p80")]
        ratios = [f"{row[key]:.3f}" for key in ("over_ddp", "over_ddp_p20", "over_ddp_p80")]
        sizes = [f"{row[f'{part}_mib']:.1f}" for part in PARTS]
        made.add_row(row["variant"], *times, *ratios, f"{row['cpu_ms']:.0f}", f"{row['cpu_over_ddp']:.3f}", *sizes)
    return made


def view(result: Result) -> View:
    """Times and bytes; bars of the times."""
    found = rows(result.variants)
    over = {row["variant"]: row["over_ddp"] for row in found}
    title = f"{result.same['model']}: step time over DDP's"
    return View([table(result.same, found)], plots.bars(title, over, lambda ratio: f"{ratio:.2f}"))


def run(settings: Settings) -> None:
    """Measure, print, write. Raises UserError and TrainingFailed."""
    s = settings
    check_training(s.model, s.image_size, s.batch_size)
    with machines() as found:
        machine = found.found[0]
        if machine.gpus and s.workers > machine.gpus:
            raise UserError(f"--workers {s.workers}, but this machine has {machine.gpus} GPUs: use at most as many")
        threads = max(1, machine.cores // s.workers)
        group = found.group([s.workers], threads, Worker, s)
        facts = group.ask("facts")[0]
        measured = measure(group, s.rounds)
    result, path = results.write(f"engines-{s.model}", s, facts, measured)
    results.write_json(s.json, result, rows(result.variants))
    page.show(result, view(result), path)


def bench(words: Sequence[str]) -> int:
    """The command. Raises UserError."""
    return harness.command(words, Settings, "engines", __doc__ or "", run)


if __name__ == "__main__":
    from tldist_benchmarks import engines  # by the name that workers know

    harness.main(engines.bench)
