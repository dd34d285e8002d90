"""The door for torchrun: `torchrun --nproc-per-node N -m tldist.worker CONFIG.yaml` trains without Ray."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tldist import config
from tldist.config import UserError
from tldist.guard import control
from tldist.train.worker import run


def main() -> None:
    """Train as one of torchrun's workers, or as the only one; the config file names its run_dir."""
    if len(sys.argv) != 2:
        sys.exit("usage: torchrun --nproc-per-node N -m tldist.worker CONFIG.yaml")
    try:
        settings = config.load(Path(sys.argv[1]))
        if not settings.run_dir:
            raise UserError(f"{sys.argv[1]} names no run_dir: add a line run_dir: FOLDER")
        run_dir = Path(settings.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        if os.environ.get("RANK", "0") == "0":
            control.forget_stop(run_dir)
        with control.stopping_on_signals(run_dir):
            told = run(config.to_json(settings))
        sys.exit(75 if "stopped" in told else 0)
    except UserError as error:
        print(f"tldist: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
