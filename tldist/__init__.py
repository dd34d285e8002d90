"""Transfer learning on images: frozen prefixes that cost what they must, unfreezing that is right.

`tldist.configure`, `plan`, `fit` and `open_run` are the door for Python (docs/api.md); torch is imported when one of
them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tldist.api import FinishedRun, configure, fit, open_run, plan

__version__ = "0.1.0"
__all__ = ["FinishedRun", "configure", "fit", "open_run", "plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tldist' has no attribute '{name}'")
    from tldist import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
