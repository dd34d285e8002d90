"""Which room may import which (docs/architecture.md shows the rooms), and where heavy packages may be imported.

A room is a package, or a module that lies directly in a top-level package. `ALLOWED` is complete and minimal: an import
between two rooms that is not listed fails, and so does a listed pair that no line of code uses.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tldist", "tldist_kernels", "tldist_launcher", "tldist_benchmarks")

ALLOWED: dict[str, str] = {
    "api": "config dist recipes report rules tracking train trained",
    "backbones": "models",
    "checkpoints": "config optim",
    "data": "config data.source objectives",
    "data.load": "config data data.source dist",
    "data.make": "config data data.load data.source",
    "data.source": "config",
    "engine": "config dist objectives optim plans",
    "guard": "dist",
    "models": "config dist plans",
    "objectives": "checkpoints config dist models tldist_kernels",
    "optim": "config models plans",
    "plans": "config",
    "recipes": "config",
    "report": "data.source tracking",
    "rules": "config data",
    "study": "report tracking",
    "tldist": "api",
    "tldist_benchmarks": (
        "checkpoints config data data.load data.make data.source dist engine models objectives report "
        "tldist_kernels tracking train"
    ),
    "tldist_launcher": (
        "config guard tldist_launcher.commands tldist_launcher.slurm tldist_launcher.start tldist_launcher.study train"
    ),
    "tldist_launcher.commands": (
        "config data data.load data.make data.source dist guard objectives recipes report rules "
        "tldist_benchmarks tldist_launcher.start tracking train trained transfer"
    ),
    "tldist_launcher.slurm": (
        "config data.source rules study tldist_launcher.commands tldist_launcher.start "
        "tldist_launcher.study tracking train"
    ),
    "tldist_launcher.start": "config dist guard recipes rules tracking train",
    "tldist_launcher.study": "config dist guard recipes rules study tldist_launcher.start tracking train",
    "tracking": "data.source",
    "train": (
        "checkpoints config data data.load data.source dist engine guard models objectives optim plans "
        "report rules tldist_kernels tracking"
    ),
    "trained": "checkpoints config data data.load data.source dist models tldist_kernels train",
    "transfer": "checkpoints config data data.load data.source dist engine models objectives tracking train",
    "worker": "config guard train",
}
"""Room -> the rooms it imports, by name without `tldist.`; `tldist_launcher` and `tldist_benchmarks` by their own."""

HEAVY = {
    "ray": ("tldist_launcher",),
    "deepspeed": ("tldist.engine.zero",),
    "wandb": ("tldist.tracking.wandb", "tldist.tracking.wandb_rows", "tldist.tracking.wandb_files"),
    "nvidia": ("tldist.data.load.dali", "tldist.data.load.decode"),
    "onnxruntime": ("tldist.trained.exported",),
    "triton": ("tldist_kernels", "tldist_benchmarks"),
}


def modules() -> dict[str, ast.Module]:
    trees = {}
    for folder in (ROOT / "tldist", ROOT / "kernels", ROOT / "launcher", ROOT / "benchmarks"):
        base = folder.parent if folder.name == "tldist" else folder
        for path in folder.rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            trees[name] = ast.parse(path.read_text())
    return trees


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that the source names in an import, at any depth, or in `importlib.import_module("...")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room(module: str, packages: set[str]) -> str:
    """The package a module lies in; of modules directly in a top-level package, the module itself."""
    if module in PACKAGES:
        return module
    parts = module.split(".") if module in packages else module.split(".")[:-1]
    if len(parts) == 1:
        return module.removeprefix("tldist.") if parts[0] == "tldist" else parts[0]
    # What lies below train/ is one room: `inputs` reads the run that `train` builds, and `train` opens the inputs.
    return ".".join(parts[:2] if parts[1] == "train" else parts).removeprefix("tldist.")


def edges(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    graph: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for target in imports(tree):
            while target and target not in trees:
                target = target.rpartition(".")[0]
            if target and target != name and target not in PACKAGES:
                graph[name].add(target)
    return graph


def pairs(trees: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """(room, room it imports) over all modules."""
    packages = {name for name in trees if any(other.startswith(name + ".") for other in trees)}
    return {
        (here, there)
        for name, targets in edges(trees).items()
        for target in targets
        if (here := room(name, packages)) != (there := room(target, packages))
    }


def allowed() -> set[tuple[str, str]]:
    return {(here, there) for here, rooms in ALLOWED.items() for there in rooms.split()}


def misplaced(trees: dict[str, ast.Module]) -> list[str]:
    return [
        f"{name} imports {target}"
        for name, tree in trees.items()
        for target in imports(tree)
        if (rooms := HEAVY.get(target.split(".")[0])) and not any(inside(name, r) for r in rooms)
    ]


def test_rooms_import_only_what_the_table_allows() -> None:
    assert sorted(pairs(modules()) - allowed()) == []


def test_every_pair_of_the_table_is_used() -> None:
    assert sorted(allowed() - pairs(modules())) == []


def test_neither_modules_nor_rooms_form_a_circle() -> None:
    list(TopologicalSorter(edges(modules())).static_order())
    graph: dict[str, set[str]] = {}
    for here, there in pairs(modules()):
        graph.setdefault(here, set()).add(there)
    list(TopologicalSorter(graph).static_order())


def test_heavy_packages_stay_in_their_rooms() -> None:
    assert misplaced(modules()) == []


def test_kernels_import_torch_and_triton_alone() -> None:
    known = {"torch", "triton", "tldist_kernels", "numpy"} | set(sys.stdlib_module_names)
    used = {t.split(".")[0] for n, tree in modules().items() if inside(n, "tldist_kernels") for t in imports(tree)}
    assert used <= known


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("tldist.plans", "from tldist.train.fit import fit"),
        ("tldist.checkpoints.checkpoint", "from tldist.engine import build_engine"),
        ("tldist.guard.hang", "import importlib\nimportlib.import_module('tldist.data.load.dali')"),
        ("tldist_benchmarks.strategies", "from tldist_launcher.cli import main"),
    ],
)
def test_the_table_catches(name: str, source: str) -> None:
    assert pairs(modules() | {name: ast.parse(source)}) - allowed()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("tldist.train.fit", "def f():\n    import ray"),
        ("tldist.data.load.loader", "from nvidia.dali import fn"),
        ("tldist.report.plots", "import importlib\nimportlib.import_module('wandb.proto.wandb_internal_pb2')"),
    ],
)
def test_heavy_packages_are_caught(name: str, source: str) -> None:
    assert misplaced({name: ast.parse(source)})


@pytest.mark.parametrize("folder", ["kernels", "launcher", "benchmarks"])
def test_no_top_level_init(folder: str) -> None:
    """`kernels` is another package's name on the index; the folders here only hold packages."""
    assert not (ROOT / folder / "__init__.py").exists()
