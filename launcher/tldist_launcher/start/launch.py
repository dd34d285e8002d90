"""Start a run wherever its config says: in this process, or on Ray's workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tldist.config import RunConfig
from tldist.train import launch as local


def launch(settings: RunConfig, quiet: bool = False) -> Path:
    """Run to the end and return the run directory.

    Raises UserError, TrainingFailed with the reason, or Stopped where a signal asked for it.
    """
    return local.launch(settings, quiet, _on_ray)


def resume(settings: RunConfig, run_dir: Path, quiet: bool = False) -> Path:
    """Go on with an interrupted run in its directory; `tldist.train.launch.resume` says how."""
    return local.resume(settings, run_dir, quiet, _on_ray)


def _on_ray(settings: RunConfig, watch: Callable[[Callable[[], Any], Any], None]) -> object:
    from tldist_launcher.start.ray import train_on_ray  # imports ray, which takes seconds

    return train_on_ray(settings, watch)
