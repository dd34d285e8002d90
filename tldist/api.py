"""The Python door: what `import tldist` offers. Each name is imported when it is first used (`tldist/__init__.py`).

config = tldist.configure("folder", root="photos", strategy="gradual", epochs=10)
tldist.plan(config)
run = tldist.fit(config)
run.summary["val_top1"]; run.predict(["a.jpg"]); run.export("model.onnx")
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tldist import dist
from tldist.config import RunConfig, UserError, nearest, with_values
from tldist.recipes import recipe as recipe_of
from tldist.report.run_page import write_report
from tldist.rules import validate
from tldist.tracking import runlog
from tldist.tracking.runlog import RunLog
from tldist.train.launch import launch, launch_kind
from tldist.train.plan_table import print_plan
from tldist.trained import model
from tldist.trained.export import Parity
from tldist.trained.export import export as export_file
from tldist.trained.exported import SUFFIXES
from tldist.trained.model import Trained, validation_images
from tldist.trained.predict import Prediction, predict
from tldist.trained.scores import Scores, logits_and_labels, scores

SHORT = {
    "root": "data.root",
    "batch_size": "data.batch_size",
    "model": "model.name",
    "weights": "model.weights",
    "strategy": "strategy.name",
    "epochs": "train.epochs",
    "workers": "launch.workers",
    "run_dir": "run_dir",
    "seed": "seed",
}
"""Names that `configure` takes alone; every other field is `section__field`."""


def configure(recipe: str = "folder", **values: Any) -> RunConfig:
    """Return a checked config: a recipe with some of its fields set.

    Args:
        recipe: `folder`, `hymenoptera`, `cifar10`, ... (`tldist train --help` lists them).
        values: root, batch_size, model, weights, strategy, epochs, workers, run_dir, seed, and every other field of a
            config as `section__field` (`train__ema=0.999`).

    Raises:
        UserError: a name is unknown, a value is of a wrong kind, or no run can use it.
    """
    known = [*SHORT, *(name for name in values if "__" in name)]
    if unknown := [name for name in values if name not in known]:
        raise UserError(
            f"configure takes no '{unknown[0]}'{nearest(unknown[0], SHORT)}: use {', '.join(SHORT)}, or section__field"
        )
    dotted = {SHORT.get(name, name.replace("__", ".", 1)): value for name, value in values.items()}
    config = with_values(recipe_of(recipe), {name: _plain(value) for name, value in dotted.items()})
    validate(config)
    return config


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def plan(config: RunConfig) -> None:
    """Print the phases: what trains in each, at which rate, for how long. Needs no data and no GPU."""
    print_plan(config)


def fit(config: RunConfig, quiet: bool = False) -> FinishedRun:
    """Train to the end, in this process, or on Ray where the config asks for more than one worker.

    Args:
        config: from `configure`, or any RunConfig; it is checked again.
        quiet: print no progress.

    Raises:
        UserError: the config, the data or the machine do not fit the run; nothing is left in its directory.
        TrainingFailed: the run did not reach its end; the sentence says why.
        Stopped: a signal asked it to stop, and all is saved.
    """
    on_ray = None
    if launch_kind(config) == "ray":
        starters = tuple(entry_points(group="tldist.start", name="ray"))
        on_ray = starters[0].load() if starters else None
    return open_run(launch(config, quiet, on_ray))


def open_run(run_dir: str | Path) -> FinishedRun:
    """Open a finished run by its directory. Raises UserError if it holds no model."""
    folder = Path(run_dir).expanduser()
    return FinishedRun(folder, model.open_run(folder))


@dataclass(frozen=True)
class FinishedRun:
    """A run directory and its best model."""

    run_dir: Path
    trained: Trained

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of summary.json (docs/monitoring.md): val_top1, images_per_s, ..."""
        path = self.run_dir / "summary.json"
        if not path.exists():
            raise UserError(
                f"{self.run_dir} has not reached its end: go on with `tldist train --resume {self.run_dir}`"
            )
        return json.loads(path.read_text())

    @property
    def history(self) -> RunLog:
        """The rows of metrics.jsonl: `history.train`, `history.evals`, `history.phases`, `history.notices`."""
        return runlog.read(self.run_dir)

    @property
    def model(self) -> model.StagedModel:
        """The best epoch's network, images_NCHW -> logits_NC, in eval mode.

        `model.torchvision_state()` has its weights under torchvision's names.
        """
        return self.trained.model

    def predict(self, paths: Iterable[str | Path], top: int = 3, batch_size: int = 32) -> list[Prediction]:
        """Return one Prediction per file, in order; `problem` says why a file could not be read."""
        classifier = self.trained.classifier(dist.local_device())
        return list(predict(classifier, [Path(path) for path in paths], top, batch_size))

    def evaluate(self, root: str | Path = "", batch_size: int = 32) -> Scores:
        """Score the model on the run's validation images, or on the `val` split under another `root`.

        Raises UserError (the images are gone, or of other classes) and DecodeError (an image cannot be read).
        """
        judged = validation_images(self.run_dir, self.trained.card, str(root))
        classifier = self.trained.classifier(dist.local_device())
        logits_NC, labels_N = logits_and_labels(classifier, judged, batch_size)
        return scores(logits_NC, labels_N, self.trained.card.classes, self.trained.card.temperature)

    def export(self, path: str | Path, with_preprocessing: bool = False) -> Parity:
        """Write the model as an .onnx or .pt2 file and prove it on the run's validation images.

        Raises NotTheSame where a logit differs, and UserError for another suffix or missing packages.
        """
        kinds = {suffix: kind for kind, suffix in SUFFIXES.items()}
        path = Path(path).expanduser()
        if path.suffix not in kinds:
            raise UserError(f"{path} is no file that can be exported to: end its name with {' or '.join(kinds)}")
        judged = validation_images(self.run_dir, self.trained.card)
        return export_file(self.trained, judged, path, kinds[path.suffix], with_preprocessing)

    def report(self) -> Path:
        """Write report.html anew and return its path."""
        return write_report(self.run_dir)
