"""The three kernels against their references, compiled and not, and against the card's own copy bandwidth.

`tldist bench kernels` prints and writes what every bench does. `python -m tldist_benchmarks.kernels --json FILE` needs
torch alone (and triton on CUDA): for a GPU machine that has nothing else.

How it is timed. All variants of a case and a plain copy of 1 GiB take turns in every round, so that a change of
clocks meets all of them. Each turn goes over several input sets, together larger than the L2 cache (50 MB on an
H100). On CUDA a turn lies between two events behind a sleep that lets the host run ahead: `median_us` is time on the
device, `host_us` the host's time to launch, which is the larger one for small cases.
`gb_per_s` counts the bytes that must move, whatever a variant moves: every pixel needed once in, once out; logits
twice in (forward, backward) and their gradient once out; features once in, their gradient once out.
`share_of_copy` divides it by the copy's, read plus write. It is small for MMD, which is bound by arithmetic: with T
rows in both batches, 2 T^2 D operations to make the distances and as many for the gradient. Its `naive` variant,
where it fits, is the common one with all differences, (T, T, D), in memory.
Without CUDA the public op (the CPU path), the reference and the compiled reference are timed by the wall clock.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tldist_kernels import (
    HAS_TRITON,
    mix_normalize,
    mixed_cross_entropy,
    mixed_cross_entropy_reference,
    mmd,
    mmd_reference,
)
from tldist_kernels.mixing import mix_affine
from tldist_kernels.mixing_spec import Mixing, affine, affine_row
from tldist_kernels.mmd_formula import MULTIPLES

if TYPE_CHECKING:
    from tldist_benchmarks.results import Result, View

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPE = torch.bfloat16
SIDE = 224
MIX_CASES = ("none", "mixup", "cutmix", "mixup_flip", "cutmix_flip")
LOSS_SHAPES = ((1024, 1000), (4096, 1000), (256, 10), (8192, 21_841))
MMD_SHAPES = ((64, 2048), (128, 2048), (256, 2048), (256, 256))
"""Rows of each of the two batches, and their features."""
LARGEST_NAIVE_MMD = {"cuda": 2**31, "cpu": 2**27}
"""Bytes of its differences; it holds several such tensors, and the CPU takes 0.4 s a call at this size."""
CALLS_PER_TURN = 5
INPUT_BYTES = 256 * 2**20
"""Input sets are made until they pass this size: five times an H100's L2."""
SLEEP_CYCLES = 8_000_000
"""About 4 ms at an H100's 1.98 GHz, longer than the host takes to launch a turn."""

Call = Callable[[int], object]
"""A variant; its argument is the number of the input set to use."""


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    bytes_moved: int
    sets: int
    variants: dict[str, Call]


Rounds = dict[str, dict[str, list[float]]]
"""'OP/CASE/VARIANT' -> measurement -> its rounds, or a single value."""


def measure(rounds: int = 20) -> Rounds:
    """Every case on the CUDA device, or on the CPU where there is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: Rounds = {}
    for case in _cases(device):
        found |= _measure(case, device, rounds)
        torch.compiler.reset()
    return found


def rows(measured: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """One row per case and variant: medians over the rounds."""
    return [_row(measured, name) for name in measured]


def _row(measured: Mapping[str, Mapping[str, Sequence[float]]], name: str) -> dict[str, Any]:
    op, case, variant = name.split("/")
    us = measured[name]["us"]
    gb_per_s, copied = (_gb_per_s(measured[of]) for of in (name, f"{op}/{case}/copy"))
    return {
        "bench": "kernels",
        "op": op,
        "case": case,
        "variant": variant,
        "median_us": round(statistics.median(us), 2),
        "p20_us": round(_percentile(us, 0.2), 2),
        "p80_us": round(_percentile(us, 0.8), 2),
        "host_us": round(statistics.median(measured[name]["host_us"]), 2),
        "gb_per_s": round(gb_per_s, 1),
        "share_of_copy": round(gb_per_s / copied, 4),
    }


def _gb_per_s(metrics: Mapping[str, Sequence[float]]) -> float:
    return metrics["bytes_moved"][0] / statistics.median(metrics["us"]) / 1e3


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per case: how many times longer each variant takes than the op itself ("triton" or "cpu"), and its share."""
    found: dict[str, dict[str, float]] = {}
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in rows):
        by_variant = {row["variant"]: row for row in rows if (row["op"], row["case"]) == (op, case)}
        own = by_variant.get("triton") or by_variant["cpu"]
        found[f"{op}/{case}"] = {"share_of_copy": own["share_of_copy"]} | {
            f"{name}_over_{own['variant']}": round(row["median_us"] / own["median_us"], 3)
            for name, row in by_variant.items()
            if name not in (own["variant"], "copy")
        }
    return found


def _cases(device: str) -> Iterator[Case]:
    for name in MIX_CASES:
        yield _mix_case(name, device)
    for shape in LOSS_SHAPES if device == "cuda" else LOSS_SHAPES[:3]:
        yield _loss_case(*shape, device)
    for dtype in (torch.float32, DTYPE) if device == "cuda" else (torch.float32,):
        for shape in MMD_SHAPES:
            yield _mmd_case(*shape, dtype, device)


def _mix_case(name: str, device: str) -> Case:
    N = 256 if device == "cuda" else 32
    inputs = [_mix_input(N, name, device) for _ in range(_sets(N * SIDE * SIDE * 3))]
    scale_3, shift_3 = affine_row(MEAN, STD, 1, torch.device(device))
    compiled = torch.compile(mix_affine, dynamic=False)

    def op(i: int) -> object:
        images_NHWC, mixing = inputs[i]
        return mix_normalize(images_NHWC, MEAN, STD, DTYPE, **vars(mixing))

    variants: dict[str, Call] = {
        "triton" if device == "cuda" else "cpu": op,
        "compiled": lambda i: compiled(inputs[i][0], scale_3, shift_3, DTYPE, inputs[i][1]),
        "reference": lambda i: mix_affine(inputs[i][0], scale_3, shift_3, DTYPE, inputs[i][1]),
    }
    sources = 2 if name.startswith("mixup") else 1  # CutMix takes each pixel from one image or the other
    bytes_moved = N * SIDE * SIDE * 3 * (sources + DTYPE.itemsize)
    return Case("mix_normalize", name, bytes_moved, len(inputs), variants)


def _mix_input(N: int, name: str, device: str) -> tuple[torch.Tensor, Mixing]:
    """uint8 (N, 224, 224, 3); CutMix boxes of a quarter of the image, half of the images flipped."""
    images_NHWC = torch.randint(0, 256, (N, SIDE, SIDE, 3), dtype=torch.uint8, device=device)
    flip_N = torch.rand(N, device=device) < 0.5 if name.endswith("flip") else None
    if name == "none":
        return images_NHWC, Mixing()
    partner_N = torch.randperm(N, device=device)
    if name.startswith("mixup"):
        return images_NHWC, Mixing(partner_N, torch.rand(N, device=device), None, flip_N)
    corner_N2 = torch.randint(0, SIDE // 2, (N, 2), dtype=torch.int32, device=device)
    boxes_N4 = torch.cat((corner_N2, corner_N2 + SIDE // 2), dim=1)
    return images_NHWC, Mixing(partner_N, torch.zeros(N, device=device), boxes_N4, flip_N)


def _loss_case(N: int, C: int, device: str) -> Case:
    bytes_logits = N * C * DTYPE.itemsize
    inputs = [_loss_input(N, C, device) for _ in range(_sets(bytes_logits))]
    grad_N = torch.full((N,), 1 / N, device=device)
    compiled = torch.compile(mixed_cross_entropy_reference, dynamic=False)

    def forward_backward(loss: Callable[..., torch.Tensor], i: int) -> object:
        logits_NC, *targets = inputs[i]
        return torch.autograd.grad(loss(logits_NC, *targets, 0.1), logits_NC, grad_N)

    losses = {"compiled": compiled, "reference": mixed_cross_entropy_reference}
    if device == "cuda":
        losses = {"triton": mixed_cross_entropy} | losses
    else:  # the op is the reference there
        losses = {"compiled": compiled, "cpu": mixed_cross_entropy}
    variants: dict[str, Call] = {name: functools.partial(forward_backward, loss) for name, loss in losses.items()}
    return Case("mixed_cross_entropy", f"{N}x{C}", 3 * bytes_logits, len(inputs), variants)


def _loss_input(N: int, C: int, device: str) -> tuple[torch.Tensor, ...]:
    logits_NC = torch.randn(N, C, device=device).to(DTYPE).requires_grad_()
    labels_N, partner_labels_N = torch.randint(0, C, (2, N), device=device)
    return logits_NC, labels_N, partner_labels_N, torch.rand(N, device=device)


def _mmd_case(N: int, D: int, dtype: torch.dtype, device: str) -> Case:
    bytes_features = 2 * N * D * dtype.itemsize
    inputs = [torch.randn(2, N, D, device=device).to(dtype).unbind() for _ in range(_sets(bytes_features))]
    compiled = torch.compile(mmd_reference, dynamic=False)

    def forward_backward(loss: Callable[..., torch.Tensor], i: int) -> object:
        leaves = [batch_ND.requires_grad_() for batch_ND in inputs[i]]
        return torch.autograd.grad(loss(*leaves), leaves)

    losses = {"triton" if device == "cuda" else "cpu": mmd, "compiled": compiled, "reference": mmd_reference}
    if (2 * N) ** 2 * D * torch.float32.itemsize <= LARGEST_NAIVE_MMD[device]:
        losses["naive"] = _naive_mmd
    variants: dict[str, Call] = {name: functools.partial(forward_backward, loss) for name, loss in losses.items()}
    name = f"{N}x{D}_{str(dtype).removeprefix('torch.')}"
    return Case("mmd", name, 2 * bytes_features, len(inputs), variants)


def _naive_mmd(source_ND: torch.Tensor, target_MD: torch.Tensor) -> torch.Tensor:
    """mmd's default as it is commonly written, from all differences at once."""
    N = source_ND.shape[0]
    z_TD = torch.cat((source_ND, target_MD)).float()
    T = z_TD.shape[0]
    squared_TT = (z_TD[None] - z_TD[:, None]).square().sum(2)
    bandwidth = squared_TT.detach().sum() / (T * T - T)
    k_TT = torch.stack([torch.exp(-squared_TT / (bandwidth * multiple)) for multiple in MULTIPLES]).sum(0)
    return k_TT[:N, :N].mean() + k_TT[N:, N:].mean() - 2 * k_TT[:N, N:].mean()


def _sets(bytes_each: int) -> int:
    return max(2, min(64, math.ceil(INPUT_BYTES / bytes_each)))


def _measure(case: Case, device: str, rounds: int) -> Rounds:
    source = torch.zeros(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda i: target.copy_(source)} | case.variants
    bytes_moved = dict.fromkeys(calls, case.bytes_moved) | {"copy": 2 * source.numel()}
    timed = _take_turns(calls, case.sets, rounds, _turn_cuda if device == "cuda" else _turn_cpu)
    return {
        f"{case.op}/{case.name}/{name}": {
            "us": [us for us, _ in turns],
            "host_us": [host for _, host in turns],
            "bytes_moved": [float(bytes_moved[name])],
        }
        for name, turns in timed.items()
    }


Turn = Callable[[Call, list[int]], tuple[float, float]]


def _take_turns(calls: dict[str, Call], sets: int, rounds: int, turn: Turn) -> dict[str, list[tuple[float, float]]]:
    """(us on the device, us on the host) per call, of every variant in each round; compiles and warms up first."""
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        turn(call, [i % sets for i in range(3)])
    for number in range(rounds):
        indices = [(number * CALLS_PER_TURN + k) % sets for k in range(CALLS_PER_TURN)]
        for name, call in calls.items():
            timed[name].append(turn(call, indices))
    return timed


def _turn_cuda(call: Call, indices: list[int]) -> tuple[float, float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    before = time.perf_counter()
    for i in indices:
        call(i)
    host_s = time.perf_counter() - before
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / len(indices), host_s * 1e6 / len(indices)


def _turn_cpu(call: Call, indices: list[int]) -> tuple[float, float]:
    before = time.perf_counter()
    for i in indices:
        call(i)
    us = (time.perf_counter() - before) * 1e6 / len(indices)
    return us, us


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def tune(rounds: int = 20) -> None:
    """Print mix_normalize's time over its launch settings; the best goes into mixing_triton.py as its constants."""
    from tldist_kernels.mixing_triton import launch_mix_normalize

    settings = [(values, warps) for values in (1024, 2048, 4096, 8192) for warps in (2, 4, 8) if values // warps >= 256]
    for name in MIX_CASES:
        inputs = [_mix_input(256, name, "cuda") for _ in range(_sets(256 * SIDE * SIDE * 3))]

        def launch(values: int, warps: int, i: int, inputs: list[tuple[torch.Tensor, Mixing]] = inputs) -> object:
            images_NHWC, mixing = inputs[i]
            scale_3, shift_3 = affine(MEAN, STD)
            return launch_mix_normalize(
                images_NHWC, scale_3, shift_3, DTYPE, mixing, values_per_program=values, num_warps=warps
            )

        calls: dict[str, Call] = {f"{v} values, {w} warps": functools.partial(launch, v, w) for v, w in settings}
        timed = _take_turns(calls, len(inputs), rounds, _turn_cuda)
        for label, turns in timed.items():
            print(f"{name:12s} {label:22s} {statistics.median(us for us, _ in turns):8.1f} us")


def environment() -> dict[str, str]:
    """The hardware and versions that the rows were measured with."""
    on_cuda = torch.cuda.is_available()
    found = {"device": torch.cuda.get_device_name() if on_cuda else f"cpu, {torch.get_num_threads()} threads"}
    found["torch"] = str(torch.__version__)
    if HAS_TRITON:
        import triton

        found["triton"] = triton.__version__
    return found


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = ("op", "case", "variant", "median_us", "p20_us", "p80_us", "host_us", "gb_per_s", "share_of_copy")
    cells = [columns, *(tuple(str(row[column]) for column in columns) for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main(words: Sequence[str] | None = None) -> None:
    """Without the rest of tldist."""
    parser = argparse.ArgumentParser(description="Time the fused kernels against their references and a copy.")
    parser.add_argument("--json", type=Path, help="write rows, ratios and the environment to this file")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="sweep mix_normalize's launch settings instead (CUDA)")
    arguments = parser.parse_args(words)
    if arguments.tune:
        tune(arguments.rounds)
        return
    measured = measure(arguments.rounds)
    found = rows(measured)
    _print_table(found)
    result = {"environment": environment(), "rows": found, "ratios": ratios(found), "measured": measured}
    print(json.dumps(result["ratios"], indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


# As `tldist bench kernels`, with what the other benches share


@dataclass(frozen=True)
class Settings:
    """The flags of `tldist bench kernels`."""

    rounds: int = 20
    json: str = ""
    """Also write rows, ratios and the environment to this file."""
    out: str = "benchmarks/results"
    """Folder for the CSV."""


def view(result: Result) -> View:
    """A row per case and variant; bars of each op against the compiled reference."""
    from tldist.report import plots
    from tldist_benchmarks import results

    found = rows({name: {m: s.values for m, s in metrics.items()} for name, metrics in result.variants.items()})
    columns = ("us", "p20..p80", "host us", "GB/s", "of a copy", "times the op's own")
    made = results.table(f"kernels on {result.same['hardware']}", "op, case, variant", columns)
    compared = ratios(found)
    for row in found:
        of_case, own = compared[f"{row['op']}/{row['case']}"], f"{row['variant']}_over_"
        over = next((ratio for name, ratio in of_case.items() if name.startswith(own)), None)
        spread = f"{results.shown(row['p20_us'])}..{results.shown(row['p80_us'])}"
        numbers = (row["host_us"], row["gb_per_s"], row["share_of_copy"], over)
        label = f"{row['op']}, {row['case']}, {row['variant']}"
        made.add_row(label, results.shown(row["median_us"]), spread, *map(results.shown, numbers))
    bars = {
        case.replace("/", ", "): ratio
        for case, of_case in compared.items()
        for name, ratio in of_case.items()
        if name.startswith("compiled_over_")
    }
    return results.View([made], plots.bars("Time of the compiled reference,\ntimes the op's own", bars, results.shown))


def bench(words: Sequence[str]) -> int:
    """The command. Raises UserError."""
    from tldist_benchmarks import harness, page, results

    def run(settings: Settings) -> None:
        facts = harness.facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        measured = {
            variant: {metric: harness.Series(tuple(values)) for metric, values in metrics.items()}
            for variant, metrics in measure(settings.rounds).items()
        }
        triton = environment().get("triton", "none")
        result, path = results.write("kernels", settings, facts, measured, triton=triton)
        found = rows({name: {m: s.values for m, s in metrics.items()} for name, metrics in measured.items()})
        results.write_json(settings.json, result, found, compared=ratios(found))
        page.show(result, view(result), path)

    return harness.command(words, Settings, "kernels", __doc__ or "", run)


if __name__ == "__main__":
    main()
