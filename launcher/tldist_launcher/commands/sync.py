"""`tldist sync`: upload what runs kept in RUN_DIR/wandb, through W&B's own sync."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tldist.config import TrainingFailed, UserError
from tldist.tracking import wandb, wandb_files

REACH_TIMEOUT_S = 10


def sync_command(words: Sequence[str]) -> int:
    """Upload the named run directories, or all under runs/. Raises UserError where that cannot begin."""
    if flags := [word for word in words if word.startswith("-")]:
        raise UserError(f"tldist sync has no flag {flags[0]}: it takes run directories (default: all under runs/)")
    waiting = {run_dir: found for run_dir in _run_dirs(words) if (found := wandb_files.unsent(run_dir))}
    if not waiting:
        print("nothing waits to be uploaded")
        return 0
    _check_machine()
    failed = [run_dir for run_dir, folders in waiting.items() if not _upload(run_dir, folders)]
    if failed:
        raise TrainingFailed(
            f"not all was uploaded, nothing is lost: say `tldist sync {' '.join(map(str, failed))}` again later"
        )
    return 0


def _run_dirs(words: Sequence[str]) -> list[Path]:
    if not words:
        return sorted({folder.parent for folder in Path("runs").rglob("wandb") if folder.is_dir()})
    given = [Path(word).expanduser() for word in words]
    for run_dir in given:
        if not (run_dir / "wandb").is_dir():
            raise UserError(f"{run_dir} holds nothing for W&B: give the folder that a run printed as `run:`")
    return given


def _check_machine() -> None:
    """W&B's own sync would try for minutes."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("Weights & Biases is not installed: pip install wandb")
    if wandb.login() is None:
        raise UserError("there is no W&B login: say `wandb login`, or set WANDB_API_KEY, then `tldist sync` again")
    url = wandb.server()
    try:
        urllib.request.urlopen(url, timeout=REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"cannot reach {url} ({reason}): nothing was uploaded, try again from a machine that can"
        ) from error


def _upload(run_dir: Path, folders: Sequence[Path]) -> bool:
    """One run; its parts are sent in the order in which they were written."""
    print(f"{run_dir}: {len(folders)} part{'' if len(folders) == 1 else 's'}", flush=True)
    own = {"WANDB_DATA_DIR": run_dir / "wandb", "WANDB_CACHE_DIR": run_dir / "wandb" / "cache", "WANDB_MODE": "online"}
    environment = os.environ | {name: str(value) for name, value in own.items()}
    words = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", *map(str, folders)]
    if subprocess.run(words, env=environment, check=False).returncode:
        return False
    for folder in folders:
        (folder / wandb_files.UNSENT).unlink(missing_ok=True)
    return not wandb_files.unsent(run_dir)
