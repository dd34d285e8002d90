"""The Weights & Biases mirror of `metrics.jsonl`: written by rank 0, unable to slow or to stop a run.

Rows go through a bounded queue to a thread of their own: a log call waits for the socket of wandb-core, and a
table of 32 thumbnails takes 0.2 s (two Xeon cores). Whatever fails there ends the mirror with one notice.
"""

from __future__ import annotations

import configparser
import contextlib
import io
import netrc
import os
import queue
import re
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Row = dict[str, Any]
Notice = Callable[[str], None]

INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 60
"""How long the end of a run waits for uploads; what is left stays on disk for `wandb sync`."""
QUEUE_ROWS = 10_000
MAX_SAMPLES = 32
THUMBNAIL_PX = 224
MAX_CHART_CLASSES = 50
"""Above this a confusion matrix of C x C cells is unreadable: only its largest cells are kept."""

_MODES = {"run": "online", "shared": "online", "dryrun": "offline"}
"""Older names that WANDB_MODE may hold."""
_SECTIONS = {
    "images_per_s": "throughput/images_per_s",
    "tflops_per_s": "throughput/tflops_per_s",
    "mfu": "throughput/mfu",
    "data_wait_share": "throughput/data_wait_share",
    "peak_mem_gib": "memory/peak_gib",
    "phase": "phase",
    "epoch": "epoch",
}
_BOOKKEEPING = ("event", "time", "step")


class WandbSink:
    """Mirrors the rows of one run; see `open`. None of its methods raises or waits for the network."""

    def __init__(self, run: Any, notice: Notice) -> None:
        self._run = run
        self._notice = notice
        self._queue: queue.Queue[Row | None] = queue.Queue(QUEUE_ROWS)
        self._trouble: str | None = None
        self._told = False
        self._exit_code = 0
        # A resumed online run starts where the server's history ends; W&B steps never go backwards.
        self._last_step = int(run.step or 0)
        self._thread = threading.Thread(target=self._drain, name="wandb-sink", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        mode: str,
        *,
        run_dir: Path,
        project: str,
        name: str,
        config: dict[str, Any],
        tags: Sequence[str],
        run_id: str | None,
        notice: Notice,
    ) -> WandbSink | None:
        """Start the mirror; None where it is disabled or cannot start (then `notice` has said why).

        `mode` is auto, online, offline or disabled; auto follows WANDB_MODE, else is online where there is a
        login. A `run_id` continues that run. Files go to RUN_DIR/wandb.
        """
        try:
            mode = _resolve(mode)
            if mode == "disabled":
                return None
            if mode == "online" and login() is None:
                mode = "offline"
                notice(f"W&B: no login, the run is kept in {run_dir / 'wandb'}; {_upload(run_dir)}")
            settings = {"project": project, "name": name, "config": config, "id": run_id}
            settings |= {"resume": "allow" if run_id else None, "tags": [tag[:64] for tag in tags if tag]}
            return cls(_init_or_offline(mode, run_dir, settings, notice), notice)
        except Exception as error:
            notice(f"W&B: off for this run ({_brief(error)}); metrics.jsonl has everything")
            _teardown()
            return None

    @property
    def run_id(self) -> str:
        """What a resumed run passes to `open`."""
        return self._run.id

    def write(self, event: Mapping[str, Any]) -> None:
        """Mirror one row of `metrics.jsonl`; kinds it does not know are passed over."""
        if self._trouble is None:
            try:
                self._queue.put_nowait(dict(event))
            except queue.Full:
                self._trouble = "it takes no more rows"
        self._tell()

    def close(self, failed: bool = False) -> None:
        """Finish the run, as failed where it did: at most `FINISH_TIMEOUT_S` and a few seconds."""
        self._exit_code = int(failed)
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=1)
        # A queue that overflowed belongs to a wandb-core that hangs: no point in waiting for it.
        self._thread.join(FINISH_TIMEOUT_S + 10 if self._trouble is None else 1)
        if self._thread.is_alive():
            self._trouble = self._trouble or "it does not answer"
            _kill_service()  # or W&B's own exit hook would wait for it for ever
            self._thread.join(5)
        self._tell()

    def _tell(self) -> None:
        """Say what went wrong, once, on the caller's thread."""
        if self._trouble is not None and not self._told:
            self._told = True
            self._notice(f"W&B: stopped ({self._trouble}); training goes on and metrics.jsonl has everything")

    def _drain(self) -> None:
        try:
            while (event := self._queue.get()) is not None:
                self._log(event)
            self._run.finish(exit_code=self._exit_code)
        except Exception as error:
            self._trouble = self._trouble or _brief(error)
        # finish() returns up to a second before the file is written; the end of wandb-core waits for it.
        _teardown()

    def _log(self, event: Row) -> None:
        kind = event.get("event")
        if kind == "run":
            self._run.config.update({"run": _plain(event)}, allow_val_change=True)
        elif kind == "end":
            self._run.summary.update(_summary(event))
        elif kind in _ROWS:
            step = int(event.get("step", self._last_step))
            if step >= self._last_step:
                self._last_step = step
                self._run.log(_ROWS[kind](event), step=step)


def login() -> str | None:
    """Where a W&B login was found: a variable's name or the netrc file; None without one."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        known = netrc.netrc(path).authenticators(_host())
    except (OSError, netrc.NetrcParseError):
        return None
    return str(path) if known and known[2] else None


def _host() -> str:
    """The W&B server's name: WANDB_BASE_URL, else the settings file of `wandb login --host`, else the cloud."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    file = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, UnicodeDecodeError, configparser.Error):
        file.read(folder / "settings")
    saved = file.get("default", "base_url", fallback="")
    url = os.environ.get("WANDB_BASE_URL") or saved or "https://api.wandb.ai"
    return urlsplit(url).netloc


def _resolve(mode: str) -> str:
    """online, offline or disabled; an empty WANDB_MODE, which wandb refuses, is unset."""
    if not os.environ.get("WANDB_MODE", "unset"):
        del os.environ["WANDB_MODE"]
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online")
    return _MODES.get(mode, mode)


def _init_or_offline(mode: str, run_dir: Path, settings: Row, notice: Notice) -> Any:
    """Start the run; offline where the server does not answer."""
    try:
        return _init(mode, run_dir, settings)
    except Exception as error:
        if mode != "online":
            raise
        _teardown()  # the failed start still holds the run's id
        notice(f"W&B: no connection ({_brief(error)}), the run is kept offline; {_upload(run_dir)}")
        return _init("offline", run_dir, settings)


def _init(mode: str, run_dir: Path, settings: Row) -> Any:
    import wandb

    folder = (run_dir / "wandb").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Tables are staged here until they are uploaded; W&B's own choice is the home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(folder))
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "cache"))
    quiet = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
    )
    wandb.setup(wandb.Settings(silent=True))  # or the login is announced before `quiet` is read
    run = wandb.init(mode=mode, dir=str(run_dir.resolve()), settings=quiet, **settings)  # pyright: ignore[reportArgumentType]
    run.define_metric("val/top1", summary="max")
    run.define_metric("val/loss", summary="min")
    return run


def _phase_row(event: Row) -> Row:
    return {"phase": event.get("phase"), "phase_name": event.get("name")} | _named(
        event, "phase/", skip=("phase", "name", "epoch")
    )


def _train_row(event: Row) -> Row:
    rates = event.get("lr")
    rates = rates if isinstance(rates, dict) else {}
    return {f"lr/{stage}": rate for stage, rate in rates.items()} | _named(event, "train/")


def _eval_row(event: Row) -> Row:
    # Not through _SECTIONS: an eval row counts finished epochs, a train row the one under way.
    numbers = _numbers(event)
    return {f"val/{key.replace('val_', '')}": value for key, value in numbers.items() if key != "phase"}


def _summary(event: Row) -> Row:
    """The end's values; those of a phase as `per_phase/2_layer4/mfu`, which W&B can plot where a list is only text."""
    row = _plain(event)
    phases = row.pop("per_phase", None)
    for i, phase in enumerate(phases if isinstance(phases, list) else [], start=1):
        name = re.sub(r"\W+", "_", str(phase.get("name", ""))).strip("_")
        row |= {f"per_phase/{i}_{name}/{key}": value for key, value in _numbers(phase).items()}
    return row


def _inputs_row(event: Row) -> Row:
    import wandb

    return {"data/inputs": wandb.Image(event["path"], caption="what training sees")}


def _predictions_row(event: Row) -> Row:
    row: Row = {}
    if event.get("confusion_CC"):
        row["val/confusion"] = _confusion_chart(event["classes"], event["confusion_CC"])
    if event.get("samples"):
        row["val/predictions"] = _sample_table(event["samples"])
    return row


_ROWS: dict[str, Callable[[Row], Row]] = {
    "phase": _phase_row,
    "train": _train_row,
    "eval": _eval_row,
    "predictions": _predictions_row,
    "inputs": _inputs_row,
}


def _numbers(event: Row) -> Row:
    return {k: v for k, v in event.items() if k not in _BOOKKEEPING and isinstance(v, int | float)}


def _named(event: Row, prefix: str, skip: Sequence[str] = ()) -> Row:
    """The numbers of a row under W&B's section names; what has no section of its own goes under `prefix`."""
    return {_SECTIONS.get(k, prefix + k): v for k, v in _numbers(event).items() if k not in skip}


def _confusion_chart(classes: Sequence[str], counts_CC: Sequence[Sequence[int]]) -> Any:
    """W&B's own confusion chart from counts; `wandb.plot.confusion_matrix` wants every label instead."""
    import wandb

    cells: Any = [
        [actual, predicted, int(n)]
        for actual, counts_C in zip(classes, counts_CC, strict=True)
        for predicted, n in zip(classes, counts_C, strict=True)
    ]
    if len(classes) > MAX_CHART_CLASSES:
        cells = sorted(cells, key=lambda cell: -cell[2])[: MAX_CHART_CLASSES**2]
    columns: Any = ["Actual", "Predicted", "nPredictions"]
    return wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=wandb.Table(columns=columns, data=cells),
        fields={column: column for column in columns},
        string_fields={"title": "Validation confusion matrix"},
    )


def _sample_table(samples: Sequence[Row]) -> Any:
    import wandb

    table = wandb.Table(columns=["image", "label", "predicted", "confidence", "correct"])
    for sample in samples[:MAX_SAMPLES]:
        label, predicted = str(sample["label"]), str(sample["predicted"])
        image = _thumbnail(Path(sample["path"]))
        picture = None if image is None else wandb.Image(image, caption=predicted, file_type="jpg")
        table.add_data(picture, label, predicted, float(sample["confidence"]), label == predicted)
    return table


def _thumbnail(path: Path) -> Any:
    """A small upright copy of an image file or tar's member; None where it cannot be read."""
    from PIL import Image, ImageOps

    from tldist.data.shards import read_path

    try:
        with Image.open(io.BytesIO(read_path(path))) as image:
            image.draft("RGB", (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
            small = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:
        return None
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return small


def _plain(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in _BOOKKEEPING and value is not None}


def _upload(run_dir: Path) -> str:
    return f"upload it with `wandb sync {shlex.quote(str(run_dir / 'wandb'))}/offline-run-*`"


def _brief(error: Exception) -> str:
    """The first line of an error, short enough for a notice."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160].rstrip(": ")


def _teardown() -> None:
    """Let go of wandb-core; also takes W&B's exit hook away, which prints a traceback if the process died."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


def _kill_service() -> None:
    """End a wandb-core that hangs. W&B has no public call for it; the test tells when this one moves."""
    with contextlib.suppress(Exception):
        from wandb.sdk import wandb_setup

        service: Any = wandb_setup.singleton().ensure_service()
        service._proc._process.kill()
