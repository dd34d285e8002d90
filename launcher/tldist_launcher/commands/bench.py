"""`tldist bench`: hands over to tldist_benchmarks, which an installation may lack."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from tldist.config import UserError, nearest


def bench_command(words: Sequence[str]) -> int:
    """`NAME [--flag VALUE ...]`. Raises UserError."""
    if words and words[0] in {"-h", "--help"}:
        names = " | ".join(name for name in BENCHES if name != "compare")
        print(f"usage: tldist bench {names} [--flag VALUE ...]\n       tldist bench compare A B [--flag VALUE ...]\n")
        print("--help after a name lists its flags.")
        return 0
    if not words or words[0] not in BENCHES:
        given = words[0] if words else ""
        raise UserError(f"tldist bench needs a name{nearest(given, BENCHES)}: {' or '.join(BENCHES)}")
    try:
        return BENCHES[words[0]](words[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "tldist_benchmarks":
            raise
        raise UserError(
            "tldist bench needs the package tldist_benchmarks, and it is not installed: run it from the source tree"
        ) from error


def _strategies(words: Sequence[str]) -> int:
    from tldist_benchmarks import strategies

    return strategies.bench(words)


def _kernels(words: Sequence[str]) -> int:
    from tldist_benchmarks import kernels

    return kernels.bench(words)


def _engines(words: Sequence[str]) -> int:
    from tldist_benchmarks import engines

    return engines.bench(words)


def _loaders(words: Sequence[str]) -> int:
    from tldist_benchmarks import loaders

    return loaders.bench(words)


def _scaling(words: Sequence[str]) -> int:
    from tldist_benchmarks import scaling
    from tldist_launcher.commands.bench_nodes import on_ray

    return scaling.bench(words, on_ray if os.environ.get("RAY_ADDRESS") else None)


def _report(words: Sequence[str]) -> int:
    from tldist_benchmarks import report

    return report.bench(words)


def _compare(words: Sequence[str]) -> int:
    from tldist_benchmarks import compare

    return compare.bench(words)


BENCHES: dict[str, Callable[[Sequence[str]], int]] = {
    "strategies": _strategies,
    "engines": _engines,
    "scaling": _scaling,
    "loaders": _loaders,
    "kernels": _kernels,
    "report": _report,
    "compare": _compare,
}
