"""What exists while one phase runs: the cut model, its inputs, its engine, its averages and its clock."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tldist import dist
from tldist.checkpoints.checkpoint import Plateau, TrainState
from tldist.engine import Engine, build_engine, compiles
from tldist.models.backbones import Segment, StagedModel
from tldist.models.batchnorm import flat, moved_statistics, part_by_domain, set_modes, synchronise
from tldist.models.flops import StepFlops, count_flops
from tldist.models.prefix import Prefix
from tldist.objectives import Ingredients, build_objective
from tldist.objectives.anchor import AnchorPenalty
from tldist.objectives.base import Objective
from tldist.objectives.domains import rows_of
from tldist.plans import Phase
from tldist.train.inputs.inputs import Inputs, open_inputs, to_input
from tldist.train.metrics import ThroughputClock, TrainMeter, reset_peak_memory
from tldist.train.run import Run
from tldist_kernels.backend import one_thread

ONE_THREAD_FLOPS = 2e8
"""A pass of fewer FLOPs runs on one thread. A cached head's step of 1e5 took 0.5 ms so on two Zen 5 cores; with two
threads that wait for each other it took up to 30 ms beside other processes."""


@dataclass
class LivePhase:
    """Built at a phase's start, gone at its end."""

    index: int
    phase: Phase
    prefix: Prefix
    inputs: Inputs
    network: Segment
    engine: Engine
    clock: ThroughputClock
    meter: TrainMeter
    flops: StepFlops
    average: WeightAverage | None = None
    prefix_compile_s: float = 0.0
    moving: list[Tensor] = field(default_factory=list)
    """BatchNorm statistics that this worker's steps move; known once `train_mode` was called."""

    @property
    def is_compiled(self) -> bool:
        """Is what trains compiled? Its first step then compiles."""
        return self.network._compiled_call_impl is not None

    @property
    def compile_s(self) -> float:
        """Seconds of the prefix and, once the first step was taken, of what trains."""
        return self.prefix_compile_s + (self.clock.first_step_s if self.is_compiled else 0.0)

    def begin_step(self) -> None:
        """What CUDA graphs returned in earlier steps is no longer needed."""
        if self.is_compiled:
            torch.compiler.cudagraph_mark_step_begin()

    @contextmanager
    def threads(self, images: int) -> Iterator[None]:
        """On a CPU: one thread while passes over so many `images` are small."""
        small = self.clock.device.type == "cpu" and self.flops.total * images < ONE_THREAD_FLOPS
        with one_thread() if small else nullcontext():
            yield

    def evaluated(self) -> nn.Module:
        """The live suffix that evaluation and checkpoints see: its average, where one is kept."""
        return self.network if self.average is None else self.average.network

    def logits(self, features: Tensor) -> Tensor:
        """The rest of the model, for evaluation: not the compiled one, which knows one batch size and train mode."""
        return self.evaluated().forward(features)

    def train_mode(self, policy: str) -> None:
        """Train mode for what trains, with BatchNorm by `--train.batchnorm`."""
        set_modes(self.network, self.phase, policy)
        self.moving = moved_statistics(self.network)

    def _statistics(self) -> list[Tensor]:
        """What moved, in the average too: it is a copy of the network."""
        if self.average is None:
            return self.moving
        moved = {name for name, layer in self.network.named_modules() if layer.training}
        return [*self.moving, *(t for n, t in self.average.network.named_buffers() if _is_moved(n, t, moved))]

    def agree_on_statistics(self) -> None:
        """Average BatchNorm's running statistics over workers, where they moved."""
        dist.average_(self._statistics())

    def own(self) -> dict[str, Tensor]:
        """What each worker has alone until the epoch's end, a row for each of them. Collective."""
        rows = {"sums": self.meter.sums, "skips": self.meter.skips, "norms": self.meter.norms}
        if statistics := self._statistics():
            rows["statistics"] = flat(statistics)
        return {name: dist.gather_rows(row[None]) for name, row in rows.items()}

    def take_own(self, rows: dict[str, Tensor]) -> None:
        """This worker's row; where there were other numbers of workers: the mean, and of sums an equal share."""
        meter = self.meter
        meters = {"sums": [meter.sums], "skips": [meter.skips], "norms": [meter.norms]}
        for name, targets in {**meters, "statistics": self._statistics()}.items():
            if targets and name in rows:  # checkpoints from before gradient norms were logged lack them
                row = _row_of_mine(rows[name], shared=name == "sums")
                for target, value in zip(targets, row.split([t.numel() for t in targets]), strict=True):
                    target.copy_(value.view_as(target))


def _row_of_mine(rows_WK: Tensor, shared: bool) -> Tensor:
    if len(rows_WK) == dist.world_size():
        return rows_WK[dist.rank()]
    return rows_WK.sum(0) / dist.world_size() if shared else rows_WK.mean(0)


def _is_moved(name: str, buffer: Tensor, moved: set[str]) -> bool:
    return buffer.is_floating_point() and name.rpartition(".")[0] in moved


class WeightAverage:
    """An exponential moving average of a live suffix, through torch's AveragedModel.

    The decay grows with the step as (1 + t) / (10 + t) up to the one that was asked for (as in Tan and Le, 2019), so
    that a short fine-tuning is not dominated by its random head. Newly unfrozen stages join with their own weights,
    which is their average so far. BatchNorm's statistics are averaged with the weights they belong to.
    """

    def __init__(self, network: Segment, decay: float, state: dict[str, Tensor]) -> None:
        self.decay = decay
        self.averaged = AveragedModel(network, use_buffers=True)
        self.averaged.n_averaged.fill_(1)  # 0 would make the first update a copy
        self.averaged.requires_grad_(False)
        own = self.state()
        for name, value in state.items():
            if name in own:
                own[name].copy_(value)

    @property
    def network(self) -> nn.Module:
        """The averaged network."""
        return self.averaged.module

    def update(self, network: Segment, step: int) -> None:
        """After optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        self.averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self.averaged.update_parameters(network)

    def state(self) -> dict[str, Tensor]:
        """The average's own tensors by name."""
        return self.network.state_dict()


def begin_phase(run: Run, index: int, state: TrainState, resumed: bool = False) -> LivePhase:
    """Cut the model, build a new engine around the live suffix, and carry optimizer state over by name.

    A phase that is `resumed` began earlier: its counts, and the optimizer's state, are those of the checkpoint.
    """
    config, phase = run.config, run.plan.phases[index]
    reset_peak_memory(run.numbers.device)
    if not resumed:
        state.phase, state.phase_epoch, state.phase_plateau = index, state.epoch, Plateau()
        if phase.optimizer_state == "reset":
            state.optimizer = {}
    freeze(run.model, phase)
    frozen, network = run.model.cut(run.plan.cut(index))
    if config.train.batchnorm == "sync" and run.worker.world_size > 1:
        synchronise(network, run.numbers.device)
    if config.train.batchnorm == "domain" and run.index.target is not None:
        part_by_domain(network)
    prefix = Prefix(frozen, run.numbers.dtype)
    flops = count_flops(list(frozen.children()), network, config.data.image_size)
    compile_s = compile_phase(run, phase, prefix, network, flops)
    inputs = open_inputs(run, frozen, prefix)
    if inputs.cached:
        flops = replace(flops, prefix=0.0)
    objective = objective_of(run, network, prefix).to(run.numbers.device)
    objective.load_own(state.objective)
    average = WeightAverage(network, config.train.ema, state.average) if config.train.ema else None
    engine = build_engine(config.engine, objective, phase, config.optim, run.numbers, state.optimizer)
    # The engine and the average hold theirs from here on; the state keeps the moments of what this phase freezes.
    state.optimizer = {name: moments for name, moments in state.optimizer.items() if phase.multiple(name) == 0}
    state.average, state.objective = {}, {}
    device = run.numbers.device
    clock, meter = ThroughputClock(device), TrainMeter(device)
    return LivePhase(index, phase, prefix, inputs, network, engine, clock, meter, flops, average, compile_s)


def objective_of(run: Run, network: Segment, prefix: Prefix) -> Objective:
    """What the strategy minimises, around what trains."""
    config = run.config

    @torch.no_grad()
    def width(stage: str) -> int:
        side = config.data.image_size
        black = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=run.numbers.device)
        with run.numbers.autocast():
            _, output = network.eval().forward(prefix(to_input(black, run.numbers.dtype)), stage)
        return rows_of(output).shape[1]

    penalty = anchor_penalty(run, network)
    smoothing = config.train.label_smoothing
    return build_objective(Ingredients(network, config.strategy, smoothing, penalty, config.seed, width))


def freeze(model: StagedModel, phase: Phase) -> None:
    """Gradients for what the phase trains and nothing else; only ever called between engines."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(phase.multiple(name) > 0)


PAYS_FROM_FLOPS = {"cpu": 3e14, "cuda": 1e16}
"""A worker's FLOPs in a phase from which compiling wins its time back. CPU: up to half a minute to compile, 6 % saved
of a prefix at 0.8 TFLOP/s (ResNet-18, two cores of Zen 5). GPU: 29 s, 29 % saved at 113 TFLOP/s (ResNet-50, 256 images,
everything trains, H200)."""
LARGE_PASS_FLOPS = 2e12
"""A GPU waits for the host to launch a smaller pass, compiled or not: a full ResNet-50 with 32 images (8e11) gained
nothing on an H200. Passes through a frozen prefix were not measured."""


def compile_phase(run: Run, phase: Phase, prefix: Prefix, network: Segment, flops: StepFlops) -> float:
    """Compile the prefix and, on GPUs, what trains (in its first step); returns the seconds that the prefix took.

    On CPUs a compiled training step was measured at 0.88 to 0.98 times the speed of the eager one, so only the
    prefix is compiled there.
    """
    mode, device = run.config.train.compile, run.numbers.device
    if mode == "off" or (mode == "auto" and not _compiling_pays(run, phase, flops)):
        return 0.0
    if device.type == "cuda" and compiles(run.config.engine):
        network.compile(dynamic=False, mode="reduce-overhead" if mode == "graphs" else "default")
    if prefix.is_empty:
        return 0.0
    side = run.config.data.image_size
    black = torch.zeros(run.pass_size, side, side, 3, dtype=torch.uint8, device=device)
    try:
        return prefix.compile(to_input(black, run.numbers.dtype))
    except Exception as error:
        if mode != "auto":
            raise
        run.log.write("notice", text=f"the frozen prefix could not be compiled and runs as it is: {_first_line(error)}")
        return 0.0


def _compiling_pays(run: Run, phase: Phase, flops: StepFlops) -> bool:
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        return False
    epochs, views = min(phase.epochs, run.plan.epochs), run.config.cache.views
    passes = (views or epochs) * len(run.index.train) + (1 if views else epochs) * len(run.index.val)
    work = flops.prefix * passes
    if run.numbers.device.type == "cuda":
        if flops.total * run.pass_size < LARGE_PASS_FLOPS:
            return False
        work += (flops.forward + flops.backward) * epochs * len(run.index.train)
    return work / run.worker.world_size > PAYS_FROM_FLOPS[run.numbers.device.type]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def anchor_penalty(run: Run, network: Segment) -> AnchorPenalty | None:
    """What L2-SP or EWC asks for, of what trains."""
    if run.pull is None:
        return None
    held = {n: p for n, p in network.named_parameters() if p.requires_grad and n in run.pull.anchors}
    return AnchorPenalty(held, run.pull) if held else None
