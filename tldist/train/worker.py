"""One worker's run: builds the parts in order, fits, closes. Ray, torchrun and a plain process call the same `run`."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import logging
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tldist import config, dist
from tldist.checkpoints.saver import Saver
from tldist.config import DOMAINS, OptimConfig, RunConfig, UserError
from tldist.data.load.bad_images import BadImages
from tldist.data.load.loader import Loader, Read
from tldist.data.load.open import open_loader
from tldist.data.load.pixels import open_pixels
from tldist.data.presets import AugmentSpec, augment_spec
from tldist.data.source.domains import build_domains
from tldist.data.source.index import Index, Split, build_index, load_index, save_index, with_train_subset
from tldist.data.source.verify import Progress
from tldist.engine import numerics
from tldist.guard.control import Control, Stopped
from tldist.guard.watchdog import Watchdog
from tldist.models import backbones
from tldist.models.flops import peak_flops
from tldist.objectives.anchor import Pull, joined
from tldist.objectives.ewc import ewc
from tldist.optim import is_anchored
from tldist.plans import Plan, build_plan
from tldist.report.run_page import write_report
from tldist.rules import validate, validate_device
from tldist.tracking.events import EventLog
from tldist.tracking.wandb import STOPPED, WandbSink
from tldist.train.fit import fit
from tldist.train.mirror import error_event, open_wandb, predictions_event, weights_events
from tldist.train.preview import contact_sheet
from tldist.train.resume import FitResult
from tldist.train.run import Run
from tldist.train.summary import announce, summarize


def run(config_json: str) -> dict[str, Any]:
    """Train as the config says, on this worker; returns the summary (on every worker), or `{"stopped": why}`.

    `config_json` is the only thing that crosses from a launcher. The run directory must exist and be shared by
    all workers.
    """
    started = time.time()
    settings = config.from_json(config_json)
    device = dist.local_device()
    with process_settings(device):
        torch.set_num_threads(max(1, dist.cores() // dist.local_workers()))
        if device.type == "cpu":
            keep_freed_memory()
        made_group = dist.init(device, settings.launch.hang_minutes)
        try:
            with sole_writer(Path(settings.run_dir)):
                return _logged(settings, device, started)
        except Exception:
            _keep_traceback(settings)
            raise
        finally:
            if made_group:
                dist.close()


@contextlib.contextmanager
def process_settings(device: torch.device) -> Iterator[None]:
    """Leave torch's switches and the host's and this device's generators as they were: a notebook goes on after a run.

    What malloc was told stays: glibc cannot be asked what it was told before, and only its speed changes.
    """
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    used = [] if device.type == "cpu" else [device]  # by default each worker would open all GPUs here
    with torch.random.fork_rng(devices=used):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.backends.cudnn.deterministic = deterministic


def _logged(settings: RunConfig, device: torch.device, started: float) -> dict[str, Any]:
    log = EventLog(Path(settings.run_dir) / "metrics.jsonl" if dist.is_main() else None)
    try:
        with watchdog_of(settings) as watchdog:
            return _run(settings, device, log, started, watchdog)
    except Exception as error:
        log.write(**error_event(error))
        raise
    finally:
        log.close()


@contextlib.contextmanager
def sole_writer(run_dir: Path, wait_s: float = 60.0) -> Iterator[None]:
    """On the main worker: wait until no other process writes this run directory.

    Workers whose driver was killed, or whose group lost a member, may go on for seconds until they are ended. Raises
    RuntimeError where one does not end.
    """
    if not dist.is_main():
        yield
        return
    (run_dir / "logs").mkdir(exist_ok=True)
    deadline = time.monotonic() + wait_s
    with (run_dir / "logs" / "writer").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"another worker still writes {run_dir}: end it, then resume") from error
                time.sleep(0.2)
        yield


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system, which hands it out anew page by page.

    A step frees and takes the same activations again: a full ResNet-50 step took 20 % longer without this on two Zen
    5 cores (docs/results.md). Other C libraries have no such setting.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def _keep_traceback(settings: RunConfig) -> None:
    _keep(settings, traceback.format_exc())


def _keep(settings: RunConfig, text: str) -> None:
    """In this worker's own log."""
    logs = Path(settings.run_dir) / "logs"
    with contextlib.suppress(OSError):  # of a full disk it was told
        logs.mkdir(exist_ok=True)
        with (logs / f"rank{dist.rank()}.log").open("a") as file:
            file.write(text)


def watchdog_of(settings: RunConfig) -> Watchdog:
    """This worker's, not yet started."""
    return Watchdog(Path(settings.run_dir), dist.rank(), dist.world_size(), 60 * settings.launch.hang_minutes)


def _run(
    settings: RunConfig, device: torch.device, log: EventLog, started: float, watchdog: Watchdog
) -> dict[str, Any]:
    parts = build(settings, device, log, watchdog)
    sink, monitor = open_wandb(parts)
    if sink is not None:
        log.mirrors.append(sink.write)
    exit_code = 0
    try:
        announce(parts, sink)
        if dist.is_main():
            show_inputs(parts, sink)
        result = fit(parts)
        watchdog.beat("writing the last checkpoint")
        parts.saver.close()
        watchdog.beat("writing the results")
        return finish(parts, result, sink, started)
    except Stopped as stopped:
        parts.saver.close()
        log.write("notice", text=str(stopped))
        exit_code = STOPPED
        return {"stopped": str(stopped)}
    except BaseException as error:
        exit_code = 1
        with contextlib.suppress(Exception):  # of two failures the first is told
            parts.saver.close()
        if sink is not None:
            sink.write(error_event(error))
        raise
    finally:
        parts.close_loaders()
        if sink is not None:
            sink.close(exit_code)
        if monitor is not None:
            monitor.close()
            if monitor.trouble:
                _keep(settings, f"W&B: nothing of this node ({monitor.trouble})\n")


def build(settings: RunConfig, device: torch.device, log: EventLog, watchdog: Watchdog | None = None) -> Run:
    """Index, loaders, model and plan, in that order."""
    validate(settings)
    validate_device(settings, device.type)
    # Some of cuDNN's algorithms add in an order of their own: a run would not repeat, nor resume, to the bit.
    torch.backends.cudnn.deterministic = True
    numbers = numerics(settings.train.precision, device)
    data, share = settings.data, settings.data.batch_size // dist.world_size()
    plan = plan_of(settings)
    peak = peak_flops(device, numbers.dtype)  # before the loaders' threads share the cores
    watchdog = watchdog or Watchdog()
    index = shared_index(settings)  # may take long, and nothing is late before the first beat
    watchdog.beat("building the model and the loaders")
    bad = BadImages(data.on_bad_image == "skip", Path(settings.run_dir) / "logs", dist.rank())
    pixels = open_pixels(data, index, Path(settings.run_dir), device)
    if pixels.notice:
        log.write("notice", text=pixels.notice)
    index = pixels.index
    model = backbones.build(
        settings.model,
        len(index.classes),
        data.image_size,
        settings.seed,
        pretrained=plan.pretrained,
    ).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loader(spec: AugmentSpec, split: Split, read: Read | None) -> Loader:
        return open_loader(data, spec, share, device, read, bad, in_shards=split.members is not None)

    spec = augment_spec(data.augment)
    return Run(
        config=settings,
        plan=plan,
        model=model,
        index=index,
        train_loader=loader(spec, index.train, pixels.train),
        eval_loader=loader(AugmentSpec(), index.val, pixels.val),
        target_loader=None if index.target is None else loader(spec, index.target, pixels.target),
        train_pixels=pixels.train,
        bad_images=bad,
        numbers=numbers,
        log=log,
        run_dir=Path(settings.run_dir),
        saver=Saver(Path(settings.run_dir) / "checkpoints", settings.checkpoint.keep),
        control=Control(Path(settings.run_dir), settings.checkpoint.minutes, device),
        peak=peak,
        watchdog=watchdog,
        pull=pull_of(settings.optim, model),
    )


def pull_of(settings: OptimConfig, model: backbones.StagedModel) -> Pull | None:
    """What holds the weights that training starts from: L2-SP, EWC, or both. Raises UserError."""
    pulls = [ewc(settings.ewc, settings.ewc_from, model)] if settings.ewc else []
    if settings.l2_sp:
        source = {name: p.detach().clone() for name, p in model.named_parameters() if is_anchored(name, p)}
        pulls.append(Pull(settings.l2_sp, source))
    return joined(pulls) if pulls else None


def plan_of(settings: RunConfig) -> Plan:
    """The configured strategy's plan for the configured model; needs neither weights nor data. Raises UserError."""
    parameters = backbones.parameter_names(settings.model) if settings.strategy.name == "by_hand" else None
    stages = backbones.stage_names(settings.model.name)
    return build_plan(settings.strategy, stages, settings.train.epochs, parameters)


def shared_index(settings: RunConfig) -> Index:
    """The index that all workers use: the launcher's from the run directory, or (under torchrun) rank 0's.

    Looking through a large data set for the first time outlasts any collective's timeout, so the other ranks
    watch for the file; should rank 0 fail, torchrun ends them.
    """
    path = Path(settings.run_dir) / "index.json"
    if dist.is_main() and not path.exists():
        save_index(data_index(settings), path)
    while not path.exists():
        time.sleep(0.2)
    return load_index(path)


def data_index(settings: RunConfig, progress: Progress | None = None) -> Index:
    """The images the config asks for; `progress` is called now and then while files are being verified.

    Raises UserError, also for a batch that is larger than the training set.
    """
    data, shown = settings.data, DOMAINS.get(settings.strategy.name)
    if shown is None:
        index = build_index(data.root, data.classes, progress)
    else:
        index = build_domains(data.root, shown, data.classes, progress)
    bad = [item for item in index.skipped if item.is_bad_image]
    if bad and settings.data.on_bad_image == "error":
        raise UserError(
            f"{len(bad)} of the images under {index.root} cannot be used, the first {bad[0].path}: {bad[0].reason}: "
            f"mend or remove them (`tldist data check {index.root}` lists all), or train without them with "
            "--data.on-bad-image skip"
        )
    index = with_train_subset(index, settings.data.train_images_per_class, settings.seed)
    batch = settings.data.batch_size
    for whose, split in (("", index.train), ("target's ", index.target)):
        if split is not None and batch > (images := len(split)):
            raise UserError(
                f"--data.batch-size {batch} is more than the {whose}{images} training images: use {images} or fewer"
            )
    return index


def show_inputs(parts: Run, sink: WandbSink | None) -> None:
    """Draw plots/inputs.jpg, once a run: a contact sheet of what training sees."""
    path = parts.run_dir / "plots" / "inputs.jpg"
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    sheet = contact_sheet(
        parts.config.data,
        parts.index,
        parts.config.seed,
        parts.train_loader,
        parts.share,
        parts.bad_images,
        parts.train_pixels,
    )
    with contextlib.suppress(OSError):  # a full disk: training goes on without the picture
        sheet.save(path, quality=90)
        if sink is not None:
            sink.write({"event": "inputs", "path": str(path), "step": 0})


def finish(parts: Run, result: FitResult, sink: WandbSink | None, started: float) -> dict[str, Any]:
    """Write predictions, summary and report; returns the summary."""
    summary = summarize(parts, result, sink, started)
    if dist.is_main():
        told = parts.saver.folder / "best" / "predictions.json"
        if told.exists():  # else the best epoch's checkpoint was lost, which was said
            (parts.run_dir / "predictions.json").write_text(told.read_text())
            if sink is not None:
                sink.write(predictions_event(parts.index, json.loads(told.read_text()), result.state.step))
        if sink is not None:
            for files in weights_events(parts):
                sink.write(files)
        draft = parts.run_dir / ".summary.json"  # --resume takes a run with a summary for one that is done
        draft.write_text(json.dumps(summary, indent=1))
        draft.replace(parts.run_dir / "summary.json")
        parts.log.write("end", **summary)
        _report(parts)
    return summary


def _report(parts: Run) -> None:
    # The weights and numbers are safe by now; a picture that cannot be drawn must not fail the run.
    try:
        write_report(parts.run_dir, Path(parts.index.root))
    except Exception as error:
        logging.getLogger("tldist").exception("report")
        parts.log.write("notice", text=f"report.html could not be written: {error}")
