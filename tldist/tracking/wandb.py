"""The Weights & Biases mirror of `metrics.jsonl`: written by rank 0, unable to slow or to stop a run.

Rows go through a bounded queue to a thread of their own, which also connects: a server that does not answer is waited
for 20 s, a log call waits for the socket of wandb-core, and a table of 32 thumbnails takes 0.2 s (two Xeon cores).
Whatever fails there ends the mirror with one notice.
"""

from __future__ import annotations

import configparser
import contextlib
import io
import netrc
import os
import queue
import secrets
import shlex
import string
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tldist.tracking import wandb_files, wording
from tldist.tracking.console import Console
from tldist.tracking.runlog import parse
from tldist.tracking.wandb_rows import AXES, STEPS, history_row, plain, summary
from tldist.tracking.wording import number, whole

Row = dict[str, Any]
Notice = Callable[[str], None]

INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 60
"""How long the end of a run waits for uploads; what is left stays on disk for `tldist sync`."""
STOP_TIMEOUT_S = 15
"""The same of a run that was told to stop: its place is wanted, and the process that goes on makes up for the rest."""
QUEUE_ROWS = 10_000
STOPPED = 75
"""Exit code of a run that was stopped and will go on (tldist_launcher.cli)."""

_MODES = {"run": "online", "dryrun": "offline"}
"""Older names that WANDB_MODE may hold."""
_CLOUD = ("api.forge.coreweave.com", "forge.coreweave.com", "api.wandb.ai")
"""Names of W&B's own server: the first is the default since 0.31, the last was before."""


@dataclass(frozen=True)
class Mirrored:
    """What W&B is told of a run at its start. The id stays the same however often the run is started again."""

    run_dir: Path
    run_id: str
    project: str
    name: str
    config: Row
    tags: Sequence[str] = ()
    group: str | None = None
    """Runs of one study; None: what WANDB_RUN_GROUP says."""
    nodes: int = 1
    label: str = ""
    """Of this node, in the curves of its GPUs and CPUs."""

    def settings(self) -> Row:
        """For `wandb.init`."""
        told: Row = {"project": self.project, "name": self.name, "config": self.config, "id": self.run_id}
        return told | {"group": self.group, "tags": [tag[:64] for tag in self.tags if tag], "resume": "allow"}


def new_id() -> str:
    """A run's id, as W&B makes them."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


class WandbSink:
    """Mirrors the rows of one run; see `open`. None of its methods raises or waits for the network."""

    def __init__(self, mode: str, told: Mirrored, notice: Notice) -> None:
        self.mode = mode
        self._told = told
        self._notice = notice
        self._queue: queue.Queue[Row | None] = queue.Queue(QUEUE_ROWS)
        self._notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._trouble: str | None = None
        self._told_trouble = False
        self._exit_code = 0
        self._run: Any = None
        # What W&B has: its next step, and of each kind of row the last step. Both only ever grow.
        self._step = 0
        self._seen: dict[str, int] = {}
        self._shown = io.StringIO()
        self._console = Console(self._shown)
        metrics = told.run_dir / "metrics.jsonl"
        self._before = metrics.stat().st_size if metrics.exists() else 0
        self._thread = threading.Thread(target=self._drain, name="wandb-sink", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, mode: str, told: Mirrored, notice: Notice) -> WandbSink | None:
        """Start the mirror; None where it is disabled. Whatever goes wrong later, `notice` says.

        `mode` is auto, online, offline or disabled; auto follows WANDB_MODE, else is online where there is a login.
        Files go to RUN_DIR/wandb. What earlier processes of the run wrote to metrics.jsonl and W&B lacks is made up
        for. With several nodes an online run is in W&B's shared mode, so that the others can join it (NodeMonitor).
        """
        mode = _resolve(mode)
        if mode == "disabled":
            return None
        if mode == "online" and login() is None:
            mode = "offline"
            notice(f"W&B: no login, the run is kept in {told.run_dir / 'wandb'}; {_upload(told.run_dir)}")
        if told.nodes > 1:
            if mode == "offline":
                notice("W&B: offline, so GPU and CPU of the first node alone are on record")
            else:
                mode = "shared"
        return cls(mode, told, notice)

    @property
    def run_id(self) -> str:
        """What a resumed run passes to `open`."""
        return self._told.run_id

    def write(self, event: Mapping[str, Any]) -> None:
        """Mirror one row of `metrics.jsonl`; kinds it does not know are passed over."""
        if self._trouble is None:
            try:
                self._queue.put_nowait(dict(event))
            except queue.Full:
                self._trouble = "it takes no more rows"
        self._tell()

    def close(self, exit_code: int = 0) -> None:
        """Finish the run: at most `FINISH_TIMEOUT_S` and a few seconds. STOPPED: W&B shows it as preempted."""
        self._exit_code = exit_code
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=1)
        patience_s = STOP_TIMEOUT_S if exit_code == STOPPED else FINISH_TIMEOUT_S + 10
        # A queue that overflowed belongs to a wandb-core that hangs: no point in waiting for it.
        self._thread.join(patience_s if self._trouble is None else 1)
        if self._thread.is_alive():
            self._trouble = self._trouble or "it does not answer"
            _kill_service()  # or W&B's own exit hook would wait for it for ever
            self._thread.join(5)
        self._tell()

    def _tell(self) -> None:
        """Say what happened, once, on the caller's thread."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._notice(self._notices.get_nowait())
        if self._trouble is not None and not self._told_trouble:
            self._told_trouble = True
            self._notice(f"W&B: stopped ({self._trouble}); training goes on and metrics.jsonl has everything")

    # What the thread does

    def _drain(self) -> None:
        with _variables(self._told.run_dir):
            try:
                self._start()
                self._catch_up()
                while (event := self._queue.get()) is not None:
                    self._log(event)
                self._finish()
            except Exception as error:
                self._trouble = self._trouble or _brief(error)
            # finish() returns up to a second before the file is written; the end of wandb-core waits for it.
            _teardown()

    def _finish(self) -> None:
        if self._exit_code == STOPPED:
            self._run.mark_preempting()
        try:
            self._run.finish(exit_code=self._exit_code)
        except TimeoutError:
            self._notices.put(f"W&B: not all was uploaded in {FINISH_TIMEOUT_S} s; {_upload(self._told.run_dir)}")
        else:
            (Path(self._run.dir).parent / wandb_files.UNSENT).unlink(missing_ok=True)

    def _start(self) -> None:
        """Connect, offline where the server does not answer, and find out what W&B has of this run."""
        run_dir = self._told.run_dir
        stored = wandb_files.histories(run_dir, self.run_id)
        try:
            self._run = _init(self.mode, self._told)
        except Exception as error:
            if self.mode == "offline":
                raise
            _teardown()  # the failed start still holds the run's id
            self._notices.put(f"W&B: no connection ({_brief(error)}), the run is kept offline; {_upload(run_dir)}")
            self.mode = "offline"
            self._run = _init("offline", self._told)
        if self.mode != "offline":
            (Path(self._run.dir).parent / wandb_files.UNSENT).touch()
        self._step = max((int(row.get("_step", 0)) + 1 for row in stored), default=0)
        if self.mode == "online":  # what the server has counts
            self._step = int(self._run.step or 0)
            stored = [row for row in stored if row.get("_step", 0) < self._step]
            self._seen = dict.fromkeys(("train", "eval"), self._step - 1) if self._step and not stored else {}
        for kind, key in STEPS.items():
            steps = [int(row[key]) for row in stored if key in row]
            self._seen[kind] = max(steps, default=self._seen.get(kind, -1))

    def _catch_up(self) -> None:
        """Mirror what earlier processes of this run logged, as far as it did not arrive: a kill loses some seconds."""
        if not self._before:
            return
        with (self._told.run_dir / "metrics.jsonl").open("rb") as file:
            lines = file.read(self._before).splitlines()
        for event in filter(None, map(parse, lines)):
            if event.get("event") in STEPS:
                self._log_history(event)

    def _log(self, event: Row) -> None:
        kind = event.get("event")
        if kind == "run":
            self._run.config.update({"run": plain(event)}, allow_val_change=True)
        elif kind == "end":
            self._run.summary.update(summary(event))
        elif kind == "files":
            self._log_files(event)
        else:
            self._log_history(event)
        self._log_text(event)
        if alert := _alert(event):
            self._run.alert(**alert)

    def _log_history(self, event: Row) -> None:
        """One row, unless it arrived before: a resumed run repeats the steps since its checkpoint."""
        kind, step = str(event.get("event")), whole(event, "step")
        row = None if step is not None and step <= self._seen.get(kind, -1) else history_row(event)
        if row is None:
            return
        if kind in STEPS:
            self._seen[kind] = int(event["step"])
        self._step = max(step or 0, self._step)  # W&B's own steps never go backwards
        self._run.log(row, step=None if self.mode == "shared" else self._step)

    def _log_files(self, event: Row) -> None:
        """A new version of an artifact, under its aliases. Files are referred to where they are, not copied."""
        import wandb

        artifact = wandb.Artifact(f"{event['name']}-{self.run_id}", type=event["name"], metadata=event.get("metadata"))
        for path in event["paths"]:
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=list(event["aliases"]))

    def _log_text(self, event: Row) -> None:
        """In W&B's Logs: what a log file of the job shows."""
        if event.get("event") == "error":
            self._shown.write(f"{event.get('kind')}: {event.get('text')}\n")
        self._console.feed(event)
        if text := self._shown.getvalue():
            self._shown.seek(0)
            self._shown.truncate()
            self._run.write_logs(text)


class NodeMonitor:
    """GPU and CPU of one more node, in the run that another node's sink opened in shared mode.

    A thread connects and waits; it can neither slow nor stop a run. `trouble` says why there is nothing to see.
    """

    def __init__(self, told: Mirrored) -> None:
        self.trouble: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(told,), name="wandb-node", daemon=True)
        self._thread.start()

    def _watch(self, told: Mirrored) -> None:
        with _variables(told.run_dir):
            try:
                run = _init("shared", told, x_primary=False, x_update_finish_state=False)
                self._over.wait()
                run.finish()
            except Exception as error:
                self.trouble = _brief(error)
            _teardown()

    def close(self) -> None:
        """Leave the run."""
        self._over.set()
        self._thread.join(FINISH_TIMEOUT_S + 10)
        if self._thread.is_alive():
            _kill_service()


def _alert(event: Row) -> Row | None:
    """What is worth a message: how the run ended."""
    if event.get("event") == "end":
        best, seconds = (number(event, key) for key in ("best_val_top1", "wall_s"))
        text = f"best validation top-1 {wording.fraction(best)}, after {wording.duration(seconds)}"
        return {"title": "tldist: finished", "text": text, "level": "INFO"}
    if event.get("event") == "error" and event.get("lost_peer"):
        text = (
            "if its process was lost, the launcher starts the workers again, as long as --launch.restarts allows; "
            f"if it failed, the run has ended, and logs/ says why. This worker saw: {event.get('text')}"
        )
        return {"title": "tldist: another worker is gone", "text": text[:1000], "level": "WARN"}
    if event.get("event") == "error":
        how = "diverged" if "Diverged" in str(event.get("kind")) else "failed"
        return {"title": f"tldist: {how}", "text": f"{event.get('kind')}: {event.get('text')}"[:1000], "level": "ERROR"}
    return None


def login() -> str | None:
    """Where a W&B login was found: a variable's name or the netrc file; None without one."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = urlsplit(server()).netloc
    try:
        file = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return None
    found = [file.authenticators(name) for name in (_CLOUD if host in _CLOUD else (host,))]
    return str(path) if any(known and known[2] for known in found) else None


def server() -> str:
    """The W&B server: WANDB_BASE_URL, else the settings file of `wandb login --host`, else the cloud."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    file = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, UnicodeDecodeError, configparser.Error):
        file.read(folder / "settings")
    saved = file.get("default", "base_url", fallback="")
    return os.environ.get("WANDB_BASE_URL") or saved or f"https://{_CLOUD[0]}"


def _resolve(mode: str) -> str:
    """online, offline or disabled; an empty WANDB_MODE, which wandb refuses, is unset."""
    if not os.environ.get("WANDB_MODE", "unset"):
        del os.environ["WANDB_MODE"]
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online")
    mode = _MODES.get(mode, mode)
    return "online" if mode == "shared" else mode


@contextlib.contextmanager
def _variables(run_dir: Path) -> Iterator[None]:
    """Give W&B this run's folders while its run is open, where the user names no others.

    They are taken back at the end: a later run of the same process would stage its files in this one's folder.
    """
    folder = (run_dir / "wandb").resolve()
    defaults = {
        # Tables are staged here until they are uploaded; W&B's own choice is the home directory.
        "WANDB_DATA_DIR": str(folder),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        # Or the login is announced before the settings are read. wandb.setup() would silence it, too, but it starts
        # wandb-core under a lock that it takes once more if wandb-core dies at its start, and never returns (0.31).
        "WANDB_SILENT": "true",
    }
    ours = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in ours.items():
            if os.environ.get(name) == value:
                del os.environ[name]


def _init(mode: str, told: Mirrored, **more: Any) -> Any:
    import wandb

    (told.run_dir / "wandb").mkdir(parents=True, exist_ok=True)
    if not os.environ.get("WANDB_MODE", "unset"):
        del os.environ["WANDB_MODE"]
    quiet = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        x_label=told.label or None,
        **more,
    )
    run = wandb.init(mode=mode, dir=str(told.run_dir.resolve()), settings=quiet, **told.settings())  # pyright: ignore[reportArgumentType]
    if more:
        return run
    for axis, sections in AXES.items():
        run.define_metric(axis, hidden=True)
        for section in sections:
            run.define_metric(section, step_metric=axis)
    run.define_metric("val/top1", summary="max", step_metric="val/step")
    run.define_metric("val/loss", summary="min", step_metric="val/step")
    return run


def _upload(run_dir: Path) -> str:
    return f"upload it with `tldist sync {shlex.quote(str(run_dir))}`"


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

        service: Any = wandb_setup.singleton().assert_service()
        service._proc._process.kill()
