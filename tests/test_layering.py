"""Imports go strictly downward, and heavy packages stay in their rooms (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Rooms from the ground up. A module may import its own level's rooms only where the pair is listed below.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("tldist_kernels",),
    ("tldist.config", "tldist.comparison"),
    ("tldist.transfer_gain",),
    ("tldist.dist", "tldist.hang"),
    ("tldist.watchdog",),
    ("tldist.digit_nets",),
    ("tldist.backbones", "tldist.plan"),
    ("tldist.optim", "tldist.objectives"),
    ("tldist.data", "tldist.batchnorm", "tldist.features"),
    ("tldist.rules",),
    (
        "tldist.prefix",
        "tldist.engine",
        "tldist.calibration",
        "tldist.checkpoint",
        "tldist.control",
        "tldist.flops",
        "tldist.metrics",
    ),
    ("tldist.saver", "tldist.tracking", "tldist.fisher"),
    ("tldist.evaluate", "tldist.plots", "tldist.recipes", "tldist.run", "tldist.study"),
    ("tldist.inputs",),
    (
        "tldist.phase",
        "tldist.preview",
        "tldist.report",
        "tldist.mirror",
        "tldist.trained",
        "tldist.study_plots",
    ),
    ("tldist.exported", "tldist.predict", "tldist.scores"),
    ("tldist.export",),
    ("tldist.resume",),
    ("tldist.fit", "tldist.study_report"),
    ("tldist.summary",),
    ("tldist.worker", "tldist.forgetting"),
    ("tldist.find_lr", "tldist.transfer_score"),
    ("tldist_benchmarks",),
    ("tldist_launcher",),
)
HEAVY = {
    "ray": ("tldist_launcher",),
    "deepspeed": ("tldist.engine.zero",),
    "wandb": ("tldist.tracking.wandb", "tldist.tracking.wandb_rows"),
    "nvidia": ("tldist.data.dali", "tldist.data.decode"),
    "onnxruntime": ("tldist.exported",),
    "triton": ("tldist_kernels", "tldist_benchmarks"),
}
OWN = ("tldist", "tldist_kernels", "tldist_launcher", "tldist_benchmarks")


def modules() -> dict[str, ast.Module]:
    found = {}
    for folder in (ROOT / "tldist", ROOT / "kernels", ROOT / "launcher", ROOT / "benchmarks"):
        base = folder.parent if folder.name == "tldist" else folder
        for path in folder.rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def level(name: str) -> int | None:
    return next((i for i, rooms in enumerate(LEVELS) if any(inside(name, room) for room in rooms)), None)


def room(name: str) -> str:
    return next(r for rooms in LEVELS for r in rooms if inside(name, r))


def upward(trees: dict[str, ast.Module]) -> list[str]:
    wrong = []
    for name, tree in trees.items():
        for target in imports(tree):
            here, there = level(name), level(target)
            if here is None or there is None:
                continue
            if there > here or (there == here and room(target) != room(name)):
                wrong.append(f"{name} imports {target}")
    return wrong


def misplaced(trees: dict[str, ast.Module]) -> list[str]:
    return [
        f"{name} imports {target}"
        for name, tree in trees.items()
        for target in imports(tree)
        if (rooms := HEAVY.get(target.split(".")[0])) and not any(inside(name, r) for r in rooms)
    ]


def test_every_module_has_a_level() -> None:
    assert [name for name in modules() if level(name) is None] == ["tldist"]


def test_imports_go_down() -> None:
    assert upward(modules()) == []


def test_heavy_packages_stay_in_their_rooms() -> None:
    assert misplaced(modules()) == []


def test_kernels_import_torch_and_triton_alone() -> None:
    import sys

    allowed = {"torch", "triton", "tldist_kernels", "numpy"} | set(sys.stdlib_module_names)
    found = {t.split(".")[0] for n, tree in modules().items() if inside(n, "tldist_kernels") for t in imports(tree)}
    assert found <= allowed


@pytest.mark.parametrize(
    ("name", "source", "check"),
    [
        ("tldist.plan", "from tldist.fit import fit", upward),
        ("tldist.checkpoint", "from tldist.engine import build_engine", upward),
        ("tldist.fit", "def f():\n    import ray", misplaced),
        ("tldist.data.loader", "from nvidia.dali import fn", misplaced),
        ("tldist_benchmarks.strategies", "from tldist_launcher.cli import main", upward),
    ],
)
def test_the_check_catches(name: str, source: str, check: object) -> None:
    assert callable(check)
    assert check({name: ast.parse(source)})


def test_no_top_level_init() -> None:
    """`kernels` is another package's name on the index; the folders here only hold packages."""
    assert not [f for f in ("kernels", "launcher", "benchmarks") if (ROOT / f / "__init__.py").exists()]
