"""`tldist`: the command line. One function per command; mistakes are one sentence and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tldist.config import TrainingFailed, UserError, nearest
from tldist.control import Stopped

Command = Callable[[Sequence[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, 1 the run failed, 2 a mistake in what was asked, 75 stopped by a signal and saved: start it again with
    --resume (EX_TEMPFAIL of sysexits.h), 130 interrupted.
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


def _details(name: str) -> str:
    if name != "data":
        return ""
    from tldist_launcher.data import HELP

    return f"\n\n{HELP}"


def _train(words: Sequence[str]) -> int:
    from tldist_launcher.arguments import parse_resume, parse_run
    from tldist_launcher.launch import launch, resume

    interrupted = parse_resume(words)
    run_dir = launch(parse_run(words, "train", ("--resume",))) if interrupted is None else resume(*interrupted)
    print(f"run: {run_dir}")
    return 0


def _plan(words: Sequence[str]) -> int:
    from tldist_launcher.arguments import parse_run
    from tldist_launcher.plan_table import print_plan

    print_plan(parse_run(words, "plan"))
    return 0


def _find_lr(words: Sequence[str]) -> int:
    from tldist_launcher.find_lr import find_lr

    find_lr(words)
    return 0


def _demo(words: Sequence[str]) -> int:
    from tldist_launcher.arguments import parse_flags
    from tldist_launcher.demo import demo

    flags = parse_flags(words, {"--run-dir": "runs/demo"}, "demo")
    demo(Path(flags["--run-dir"]).expanduser())
    return 0


def _data(words: Sequence[str]) -> int:
    from tldist_launcher import data

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


def _bench(words: Sequence[str]) -> int:
    from tldist_launcher.bench import bench_command

    return bench_command(words)


def _doctor(words: Sequence[str]) -> int:
    from tldist_launcher.arguments import parse_flags
    from tldist_launcher.doctor import doctor_rows, print_doctor

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
    "demo": (_demo, "demo [--run-dir DIR]", "every strategy on digits, in minutes, offline"),
    "data": (
        _data,
        "data fetch NAME --root DIR | check | preview ROOT | shard ROOT OUT | make",
        "write a data set, look through or at one, or pack it into tar shards",
    ),
    "bench": (
        _bench,
        "bench strategies | loaders | kernels | engines [--flag VALUE ...]",
        "measure this machine; rows and a chart to files",
    ),
    "doctor": (_doctor, "doctor", "what this machine has, and what is missing"),
}


if __name__ == "__main__":
    sys.exit(main())
