"""`tldist bench`: hands over to tldist_benchmarks, which an installation may lack."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tldist.config import UserError, nearest


def bench_command(words: Sequence[str]) -> int:
    """`NAME [--flag VALUE ...]`. Raises UserError."""
    if words and words[0] in {"-h", "--help"}:
        print(f"usage: tldist bench {' | '.join(BENCHES)} [--flag VALUE ...]\n\n--help after a name lists its flags.")
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

    kernels.main(words)
    return 0


def _engines(words: Sequence[str]) -> int:
    from tldist_benchmarks import engines

    return engines.bench(words)


def _loaders(words: Sequence[str]) -> int:
    from tldist_benchmarks import loaders

    return loaders.bench(words)


BENCHES: dict[str, Callable[[Sequence[str]], int]] = {
    "strategies": _strategies,
    "kernels": _kernels,
    "engines": _engines,
    "loaders": _loaders,
}
