"""`tldist`: the command line. One function per command; mistakes are one sentence and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tldist.config import TrainingFailed, UserError, nearest
from tldist.guard.control import Stopped

Command = Callable[[Sequence[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, 1 the run failed (of predict: some files could not be read; of export: the file did not compute the same),
    2 a mistake in what was asked, 75 stopped by a signal and saved: start it again, a run with --resume (EX_TEMPFAIL of
    sysexits.h), 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_help())
        return 0
    try:
        name, rest = words[0], words[1:]
        if name not in COMMANDS:
            raise UserError(f"there is no command '{name}'{nearest(name, COMMANDS)}: choose from {', '.join(COMMANDS)}")
        command, usage, text = COMMANDS[name]
        if name not in ("train", "plan", "bench") and {"-h", "--help"} & set(rest):
            print(f"usage: tldist {usage}\n\n{text}{_details(name)}")
            return 0
        return command(rest)
    except UserError as error:
        print(f"tldist: {error}", file=sys.stderr)
        return 2
    except TrainingFailed as error:
        print(f"tldist: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"tldist: {stopped}", file=sys.stderr)
        return 75
    except BrokenPipeError:  # whoever read our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("tldist: interrupted", file=sys.stderr)
        return 130


def _help() -> str:
    lines = "\n".join(f"  tldist {usage:<56} {text}" for _, usage, text in COMMANDS.values())
    title, more = (
        "Transfer learning on images, at full speed and right.",
        "Add --help to train, plan or bench NAME for all flags.",
    )
    return f"{title}\n\n{lines}\n\n{more}"


DETAILS = {
    "data": "commands.data",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "predict": "commands.predict",
    "study": "study.command",
    "submit": "slurm.submit",
}
"""Command -> the module whose HELP says more about it."""


def _details(name: str) -> str:
    """What a command's own module adds to its help."""
    if name not in DETAILS:
        return ""
    return f"\n\n{importlib.import_module(f'tldist_launcher.{DETAILS[name]}').HELP}"


def _train(words: Sequence[str]) -> int:
    from tldist_launcher.start.arguments import parse_resume, parse_run
    from tldist_launcher.start.launch import launch, resume

    interrupted = parse_resume(words)
    run_dir = launch(parse_run(words, "train", ("--resume",))) if interrupted is None else resume(*interrupted)
    print(f"run: {run_dir}")
    return 0


def _submit(words: Sequence[str]) -> int:
    from tldist_launcher.slurm.submit import submit

    return submit(words)


def _runs(words: Sequence[str]) -> int:
    from tldist_launcher.slurm.runs import runs_command

    return runs_command(words)


def _logs(words: Sequence[str]) -> int:
    from tldist_launcher.slurm.runs import logs_command

    return logs_command(words)


def _plan(words: Sequence[str]) -> int:
    from tldist.train.plan_table import print_plan
    from tldist_launcher.start.arguments import parse_run

    print_plan(parse_run(words, "plan"))
    return 0


def _find_lr(words: Sequence[str]) -> int:
    from tldist_launcher.commands.find_lr import find_lr

    find_lr(words)
    return 0


def _fisher(words: Sequence[str]) -> int:
    from tldist_launcher.commands.forgetting import fisher_command

    return fisher_command(words)


def _forgetting(words: Sequence[str]) -> int:
    from tldist_launcher.commands.forgetting import forgetting_command

    return forgetting_command(words)


def _transfer_score(words: Sequence[str]) -> int:
    from tldist_launcher.commands.transfer import score_command

    return score_command(words)


def _transfer_gain(words: Sequence[str]) -> int:
    from tldist_launcher.commands.transfer import gain_command

    return gain_command(words)


def _study(words: Sequence[str]) -> int:
    if words and words[0] == "transfer-gain":
        return _transfer_gain(words[1:])
    from tldist_launcher.study.command import study_command

    return study_command(words)


def _demo(words: Sequence[str]) -> int:
    from tldist_launcher.commands.demo import demo
    from tldist_launcher.start.arguments import parse_flags

    flags = parse_flags(words, {"--run-dir": "runs/demo"}, "demo")
    demo(Path(flags["--run-dir"]).expanduser())
    return 0


def _data(words: Sequence[str]) -> int:
    from tldist_launcher.commands import data

    commands = {
        "fetch": data.fetch_command,
        "check": data.check_command,
        "preview": data.preview_command,
        "shard": data.shard_command,
        "make": data.make_command,
    }
    if not words or words[0] not in commands:
        given = words[0] if words else ""
        raise UserError(f"tldist data needs a command{nearest(given, commands)}: {', '.join(commands)}")
    return commands[words[0]](words[1:])


def _evaluate(words: Sequence[str]) -> int:
    from tldist_launcher.commands.evaluate import evaluate_command

    return evaluate_command(words)


def _export(words: Sequence[str]) -> int:
    from tldist_launcher.commands.export import export_command

    return export_command(words)


def _predict(words: Sequence[str]) -> int:
    from tldist_launcher.commands.predict import predict_command

    return predict_command(words)


def _bench(words: Sequence[str]) -> int:
    from tldist_launcher.commands.bench import bench_command

    return bench_command(words)


def _sync(words: Sequence[str]) -> int:
    from tldist_launcher.commands.sync import sync_command

    return sync_command(words)


def _doctor(words: Sequence[str]) -> int:
    from tldist_launcher.commands.doctor import doctor_rows, print_doctor
    from tldist_launcher.start.arguments import parse_flags

    parse_flags(words, {}, "doctor")
    rows = doctor_rows()
    print_doctor(rows)
    return 1 if any(row.fatal for row in rows) else 0


COMMANDS: dict[str, tuple[Command, str, str]] = {
    "train": (
        _train,
        "train RECIPE [--section.flag VALUE ...]",
        "fine-tune; --config FILE repeats a run, --resume RUN_DIR goes on",
    ),
    "submit": (
        _submit,
        "submit RECIPE --nodes N [--flag VALUE ...]",
        "train on a Slurm cluster, or run a --study; --dry-run prints the script",
    ),
    "runs": (_runs, "runs [FOLDER]", "run directories below it, and how each stands"),
    "logs": (_logs, "logs RUN_DIR [--follow]", "what a run printed, and goes on to print"),
    "plan": (
        _plan,
        "plan RECIPE [--section.flag VALUE ...]",
        "phases, learning rates, parameters; no GPU, no data",
    ),
    "find-lr": (
        _find_lr,
        "find-lr RECIPE [--section.flag VALUE ...]",
        "suggest a rate; also --steps, --lowest, --highest, --json, --plot",
    ),
    "transfer-score": (
        _transfer_score,
        "transfer-score RECIPE --models NAME[:WEIGHTS],... [--flag ...]",
        "rank source models for the recipe's images; also --json FILE",
    ),
    "transfer-gain": (
        _transfer_gain,
        "transfer-gain RECIPE [--seeds N] [--section.flag ...]",
        "fine-tuned against scratch: helps, no difference, or hurts",
    ),
    "fisher": (
        _fisher,
        "fisher RUN_DIR [--labels model|data] [--images N]",
        "how much each weight matters to a finished run, for --optim.ewc",
    ),
    "forgetting": (
        _forgetting,
        "forgetting RUN_DIR EARLIER_RUN_DIR ... [--json FILE]",
        "what a run's network still knows of earlier runs' tasks",
    ),
    "study": (
        _study,
        "study FILE|NAME [--workers N] [--gpus-per-trial F]",
        "a grid or a search over any flags; also --dir, --seeds, flags of train",
    ),
    "demo": (_demo, "demo [--run-dir DIR]", "every strategy on digits, in minutes, offline"),
    "data": (
        _data,
        "data fetch NAME --root DIR | check | preview ROOT | shard ROOT OUT | make",
        "write a data set, look through or at one, or pack it into tar shards",
    ),
    "evaluate": (
        _evaluate,
        "evaluate RUN [--data.root OTHER] [--json]",
        "top-1, top-5, each class, calibration of a finished run",
    ),
    "export": (
        _export,
        "export RUN --format onnx|torch_export [--out FILE]",
        "the best model as a file, proven on real images",
    ),
    "predict": (
        _predict,
        "predict RUN|FILE PATH... [--top 3] [--json|--csv]",
        "classes of images, with calibrated confidences",
    ),
    "bench": (
        _bench,
        "bench strategies | engines | scaling | loaders | kernels [...]",
        "measure; bench report: into the docs; bench compare A B: tell a change from noise",
    ),
    "sync": (
        _sync,
        "sync [RUN_DIR ...]",
        "upload what runs kept offline to Weights & Biases; default: all under runs/",
    ),
    "doctor": (_doctor, "doctor", "what this machine has, and what is missing"),
}


if __name__ == "__main__":
    sys.exit(main())
