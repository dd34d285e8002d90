"""Data parallel: gradients are averaged over workers while the backward pass still runs."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tldist import dist
from tldist.engine.single import SingleEngine
from tldist.objectives.base import Objective


class DDPEngine(SingleEngine):
    """torch's DDP over the live suffix alone, rebuilt at each phase boundary.

    DDP fixes its set of parameters when it is built: a parameter unfrozen under a live wrapper is never reduced
    and the replicas drift apart without an error. So the wrapper never outlives its phase. BatchNorm statistics
    are averaged before they are used (see dist.average_), not broadcast from rank 0 at every step.
    """

    def wrap(self, objective: Objective) -> nn.Module:
        """The objective under DDP; every parameter in it takes part in every step, so none is looked for."""
        self.made_group = dist.join_alone(self.numerics.device)
        with warnings.catch_warnings():
            # torch 2.15 prefers forward_sync_buffers, which 2.11 does not have.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)

    def accumulating(self, on: bool) -> AbstractContextManager[object]:
        """Gradients stay on this worker until the step's last pass."""
        assert isinstance(self.module, DistributedDataParallel)
        return self.module.no_sync() if on else nullcontext()

    def close(self) -> None:
        """Drop the reducer and its hooks with the wrapper."""
        super().close()
        self.module = self.objective
        if self.made_group:
            dist.close()
