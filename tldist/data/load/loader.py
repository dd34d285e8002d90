"""The loader protocol: what every loader takes, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from tldist.data.batches import BatchPlan
from tldist.data.source.shards import Place

IN_FLIGHT = 3
"""Batches being prepared while one is used: enough to ride over a slow image, little memory."""
ERASED = (124, 116, 104)
"""Erased pixels take ImageNet's mean colour, which is 0 after normalisation."""
POLICY_FILL = 128
"""What a policy's shifts and turns leave empty, as in DALI's library."""

Read = Callable[[int, Place, list[int]], Tensor]
"""(position in the split, file or tar's member, box) -> that box (top, left, height, width) of its image, upright, as
uint8 RGB (C, height, width)."""


@dataclass(frozen=True)
class Batch:
    """images_NHWC: uint8 on the worker's device; labels_N: int64 there; plan: what is shown."""

    images_NHWC: Tensor
    labels_N: Tensor
    plan: BatchPlan

    @property
    def ids_N(self) -> np.ndarray:
        """Positions in the split."""
        return self.plan.ids_N


class Loader(Protocol):
    """Turns plans into batches, in order, working ahead of the consumer."""

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """Yield one batch for each plan. `BadImages` decides what replaces an image that cannot be read: the plan of
        a yielded batch names what it really shows."""
        ...

    def close(self) -> None:
        """Stop threads and free buffers."""
        ...
