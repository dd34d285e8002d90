"""The Python door: `import tldist` alone, two runs in one process, and a process that is left as it was."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tldist
from tldist.config import RunConfig, UserError

TINY: dict[str, Any] = {
    "weights": "none",
    "strategy": "full",
    "epochs": 1,
    "batch_size": 8,
    "data__image_size": 32,
    "data__loader": "torchvision",
    "train__precision": "fp32",
    "tracking__wandb": "offline",
}


def as_it_is() -> dict[str, Any]:
    return {
        "variables": dict(os.environ),
        "pixels": Image.MAX_IMAGE_PIXELS,
        "cudnn": torch.backends.cudnn.deterministic,
        "threads": torch.get_num_threads(),
        "generator": torch.get_rng_state().tolist(),
        "handlers": list(logging.getLogger().handlers),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)},
        "folder": Path.cwd(),
    }


def test_two_runs_one_after_the_other_leave_the_process_as_it_was(photos: Path, tmp_path: Path) -> None:
    before = as_it_is()
    runs = []
    for seed in (1, 2):
        config = tldist.configure("folder", root=photos, run_dir=tmp_path / str(seed), seed=seed, **TINY)
        runs.append(tldist.fit(config, quiet=True))
        assert as_it_is() == before
    first, second = runs
    assert [run.summary["seed"] for run in runs] == [1, 2]
    assert first.history.evals[-1]["val_top1"] == first.summary["val_top1"]
    assert first.evaluate().top1 == pytest.approx(first.summary["best_val_top1"])
    (photo, text) = next((photos / "val" / "ants").iterdir()), tmp_path / "notes.jpg"
    text.write_text("no picture")
    good, bad = first.predict([photo, text], top=2)
    assert {name for name, _ in good.top} == {"ants", "bees"}
    assert bad.problem
    assert first.model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    assert second.report().exists()
    assert list((tmp_path / "2" / "wandb").glob("offline-run-*"))
    again = tldist.open_run(tmp_path / "1")
    assert again.summary == first.summary


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"strateg": "full"}, r"no 'strateg' \(did you mean 'strategy'\?\)"),
        ({"train__emaa": 0.9}, r"no flag 'train.emaa' \(did you mean 'train.ema'\?\)"),
        ({"strategy": "fulll"}, r"did you mean 'full'\?"),
        ({"epochs": 0}, "--train.epochs is 0: give a value above 0"),
    ],
)
def test_a_mistake_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        tldist.configure("folder", **values)


def test_a_run_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run with a model"):
        tldist.open_run(tmp_path)


def test_the_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    tldist.plan(tldist.configure("folder", strategy="gradual", epochs=4))
    assert "+layer4" in capsys.readouterr().out


def test_importing_tldist_imports_nothing_heavy() -> None:
    code = "import sys, tldist; tldist.__version__; sys.exit(bool({'torch', 'yaml', 'rich'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


def test_the_example_of_the_docs_runs(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    real = tldist.configure

    def smaller(recipe: str, **values: Any) -> RunConfig:
        return real(recipe, **{**values, **TINY, "tracking__wandb": "disabled", "train__ema": 0.9, "run_dir": "runs/a"})

    monkeypatch.setattr(tldist, "configure", smaller, raising=False)
    exec(compile(code, "docs/api.md", "exec"), {})
    assert (tmp_path / "runs" / "a" / "report.html").exists()
