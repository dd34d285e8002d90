"""A run's parts, as `worker.run` builds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tldist import dist
from tldist.checkpoints.saver import Saver
from tldist.config import RunConfig
from tldist.data.batches import Worker, steps_per_epoch
from tldist.data.load.bad_images import BadImages
from tldist.data.load.loader import Loader, Read
from tldist.data.source.index import Index
from tldist.engine import Numerics
from tldist.guard.control import Control
from tldist.guard.watchdog import Watchdog
from tldist.models.backbones import StagedModel
from tldist.objectives.anchor import Pull
from tldist.plans import Plan
from tldist.tracking.events import EventLog


@dataclass(frozen=True)
class Run:
    """What stays the same from the first phase to the last."""

    config: RunConfig
    plan: Plan
    model: StagedModel
    index: Index
    train_loader: Loader
    eval_loader: Loader
    numbers: Numerics
    log: EventLog
    run_dir: Path
    saver: Saver
    control: Control
    peak: tuple[float, str] = (0.0, "unknown")
    """FLOP/s that a worker's device could do, and where the figure is from."""
    pull: Pull | None = None
    """What L2-SP and EWC hold, and how hard; None without them."""
    watchdog: Watchdog = field(default_factory=Watchdog)
    """Hears of every step; one that was not started only listens."""
    target_loader: Loader | None = None
    """Of the second domain that training shows, unlabelled, where the strategy has one."""
    train_pixels: Read | None = None
    """What the training loader reads instead of files."""
    bad_images: BadImages = field(default_factory=BadImages)
    """What the loaders could not read."""

    @property
    def worker(self) -> Worker:
        """This worker's place among all."""
        return Worker(dist.rank(), dist.world_size())

    @property
    def share(self) -> int:
        """This worker's images of a step."""
        return self.config.data.batch_size // dist.world_size()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return steps_per_epoch(len(self.index.train.paths), self.config.data.batch_size)

    def close_loaders(self) -> None:
        """Stop their threads."""
        for loader in (self.train_loader, self.eval_loader, self.target_loader):
            if loader is not None:
                loader.close()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole plan, if it does not end early."""
        return self.plan.epochs * self.steps_per_epoch

    @property
    def images_per_step(self) -> int:
        """Images that go through the network in one step, over all workers: as many of each domain."""
        return self.config.data.batch_size * (1 if self.index.target is None else 2)

    @property
    def pass_size(self) -> int:
        """Images, of each domain, that go through the network at once: a worker's share of a step, or a part of it.

        As many as with the most workers that were asked for: fewer of them take more passes, in the same memory.
        """
        workers = max(dist.world_size(), self.config.launch.most)
        return -(-(self.config.data.batch_size // workers) // self.config.train.accumulate)
