"""`torchrun ... hanging_worker.py HOW CONFIG`: the real worker, with a loader that goes wrong on rank 1.

In the second epoch's third batch it sleeps for ever (`sleep`), does so in C without letting other threads run (`gil`),
or stops its process (`stop`); `slow` takes half a second for every batch on every rank, of training and of evaluation.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tldist import config, worker
from tldist.data.load.loader import Batch
from tldist.train.inputs.inputs import ImageInputs

HOW = sys.argv.pop(1)
MARK = Path(config.load(Path(sys.argv[1])).run_dir) / "hangs"
real_train, real_val = ImageInputs.train, ImageInputs.val


def hang() -> None:
    MARK.touch()
    if HOW == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if HOW == "gil":
        ctypes.PyDLL(None).sleep(3600)
    while True:
        time.sleep(3600)


def train(self: ImageInputs, epoch: int, first: int = 0) -> Iterator[Batch]:
    for place, batch in enumerate(real_train(self, epoch, first), start=first):
        if HOW == "slow":
            time.sleep(0.5)
        elif self.run.worker.rank == self.run.worker.world_size - 1 and (epoch, place) == (1, 2):
            hang()
        yield batch


def val(self: ImageInputs) -> Iterator[Batch]:
    for batch in real_val(self):
        if HOW == "slow":
            time.sleep(0.5)
        yield batch


ImageInputs.train, ImageInputs.val = train, val

if __name__ == "__main__":
    worker.main()
