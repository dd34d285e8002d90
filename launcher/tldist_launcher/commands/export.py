"""`tldist export`: a run's best model as a file that is proven to compute the same."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tldist.config import UserError, nearest
from tldist.data.load.bad_images import DecodeError
from tldist.tracking.progress import bar
from tldist.trained.export import OPSET, PROOF_IMAGES, TOLERANCE, NotTheSame, export
from tldist.trained.exported import SUFFIXES
from tldist.trained.model import open_run, validation_images
from tldist_launcher.start.arguments import at_least, take_own

HELP = f"""\
  --format: onnx (operator set {OPSET}) or torch_export (a .pt2 for torch.export.load).
  --with-preprocessing: the file takes uint8 RGB pixels (batch, height, width, 3), cuts out the centre, and scales and
      normalises them. Decoding and resizing stay outside: docs/predict.md.
  --out: the file to write (default: RUN/model.onnx, RUN/model.pt2). One that is there is replaced once the new one is
      proven.
  --data.root: where the validation images are, should they have moved.
  --batch-size: images at a time in the proof (default 16).
  The file is compared with the model on the run's validation images (at most {PROOF_IMAGES}); should a logit differ by
  more than {TOLERANCE:g}, it is deleted, and the exit code is 1."""
FLAGS = {"--format": "", "--out": "", "--data.root": "", "--batch-size": "16"}


def export_command(words: Sequence[str]) -> int:
    """`export RUN --format onnx|torch_export [--with-preprocessing] [--out FILE]`."""
    flags, switches, rest = take_own(words, FLAGS, ("--with-preprocessing",), "export")
    if len(rest) != 1:
        raise UserError("name one run: tldist export RUN --format onnx")
    kind, run_dir = flags["--format"], Path(rest[0]).expanduser()
    if kind not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UserError(
            f"--format '{kind}' is not known{nearest(kind, SUFFIXES)}: choose from {known}"
            if kind
            else f"say what to write: --format {' or '.join(SUFFIXES)}"
        )
    out = _target(run_dir, kind, flags["--out"])
    batch_size = at_least("--batch-size", flags["--batch-size"], 1)
    trained = open_run(run_dir)
    judged = validation_images(run_dir, trained.card, flags["--data.root"])
    started = time.perf_counter()
    try:
        with bar("comparing on real images") as progress:
            parity = export(trained, judged, out, kind, "--with-preprocessing" in switches, batch_size, progress)
    except (NotTheSame, DecodeError) as error:
        print(f"tldist: {error}", file=sys.stderr)
        return 1
    print(
        f"proven on {parity.images} validation images: {parity.equal_top1} have the same top-1, largest difference "
        f"{parity.largest_difference:.1e} (largest logit {parity.largest_logit:.1f})"
    )
    print(f"file: {out} ({out.stat().st_size / 2**20:.1f} MiB, {time.perf_counter() - started:.0f} s)")
    return 0


def _target(run_dir: Path, kind: str, given: str) -> Path:
    out = Path(given).expanduser() if given else run_dir / f"model{SUFFIXES[kind]}"
    if given and (out.is_dir() or not out.parent.is_dir() or out.suffix != SUFFIXES[kind]):
        raise UserError(f"--out {given}: name a {SUFFIXES[kind]} file in a folder that exists")
    return out
