"""The command line: every mistake is one clear sentence and exit code 2; nothing is lost."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torchvision

from tldist import config
from tldist.config import RunConfig, UserError
from tldist.train.launch import preflight
from tldist_launcher.cli import main
from tldist_launcher.start.arguments import flag_types, parse_run

# The contract: scripts in the field rely on these names.
FLAGS = """--strategy.name --engine.kind --launch.workers --model.name --model.weights --data.root --data.batch-size
--data.augment --data.mixup --data.cutmix --train.epochs --train.precision --tracking.wandb --seed --run-dir"""

QUICK = [
    "--model.weights", "none", "--strategy.name", "full", "--data.image-size", "32", "--data.batch-size", "8",
    "--train.epochs", "1", "--tracking.wandb", "disabled",
]  # fmt: skip


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a failing command prints: exit code 2, one sentence on stderr, no traceback."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("tldist: ")
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err + output.out
    return output.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "no command 'trian' (did you mean 'train'?)"),
        (["train"], "name a recipe"),
        (["train", "hymenopter"], "no recipe 'hymenopter' (did you mean 'hymenoptera'?)"),
        (["train", "folder", "--strategy.name", "gradul"], "'gradul' is not known (did you mean 'gradual'?)"),
        (["train", "folder", "--strategy.name=nonsense"], "choose from scratch, feature_extraction"),
        (["train", "folder", "--data.batchsize", "3"], "no flag --data.batchsize (did you mean '--data.batch-size'?)"),
        (["train", "folder", "--train.epochs", "many"], "--train.epochs 'many' is not a whole number"),
        (["train", "folder", "--optim.base-lr", "fast"], "--optim.base-lr 'fast' is not a number"),
        (["train", "folder", "--train.epochs"], "--train.epochs needs a value"),
        (["train", "folder", "--train.epochs", "0"], "--train.epochs is 0: give a value above 0"),
        (["train", "folder", "--data.mixup", "-1"], "--data.mixup is -1.0: give 0 or more"),
        (["train", "folder", "--optim.base-lr", "nan"], "--optim.base-lr is nan"),
        (["train", "folder", "--model.name", "resnet19"], "(did you mean 'resnet18'?)"),
        (["train", "folder", "--train.precision", "fp8"], "choose from bf16, fp16, fp32"),
        (["train", "folder"], "--data.root is missing"),
        (["train", "folder", "--data.root", "/no/such/folder"], "does not exist"),
        (["train", "folder", "--data.batch-size", "7", "--launch.workers", "2"], "use a multiple of 2"),
        (["train", "folder", "--engine.kind", "single", "--launch.workers", "2"], "single runs one worker"),
        (["train", "folder", "--launch.workers", "two"], "'two' is no number: give one, or two as in 2:8"),
        (["train", "folder", "--launch.workers", "4:2"], "write the smaller first"),
        (["train", "folder", "--launch.workers", "0:2"], "--launch.workers is 0: give a value above 0"),
        (["train", "folder", "--data.batch-size", "30", "--launch.workers", "2:4"], "use a multiple of 4"),
        (["train", "folder", "--checkpoint.keep", "0"], "--checkpoint.keep is 0: give a value above 0"),
        (["train", "folder", "--launch.kind", "local", "--launch.workers", "2"], "local runs one worker"),
        (["train", "folder", "--engine.offload", "optimizer"], "use zero1, zero2 or zero3 with it"),
        (["train", "folder", "--train.compile", "graphs", "--engine.kind", "zero2"], "use ddp, or --train.compile on"),
        (["train", "--config", "/no/such.yaml"], "cannot read the config file"),
        (["plan", "folder", "--strategy.name", "partial", "--strategy.trainable-stages", "9"], "has 6 stages"),
        (["train", "folder", "extra"], "'extra' is no flag"),
        (["train", "folder", "-x"], "'-x' is no flag"),
        (["train", "folder", "--data.root"], "--data.root needs a value"),
        (["train", "folder", "--seed", "1", "2"], "--seed takes one value"),
        (["train", "folder", "--seed", str(2**64)], "give a number below 2^63"),
        (["train", "folder", "--strategy.backbone-lr", "0"], "--strategy.backbone-lr is 0.0: give a value above 0"),
        (["train", "folder", "--optim.momentum", "1.5"], "--optim.momentum is 1.5: give a share"),
        (["train", "folder", "--optim.base-lr", "inf"], "give a finite number"),
        (["plan", "folder", "--model.name", "vit_b_16", "--data.image-size", "100"], "use a multiple of 16"),
        (["train", "folder", "--model.head", "mlp_bn", "--data.batch-size", "1"], "needs two"),
        (["data"], "needs a command"),
        (["data", "chek", "x"], "did you mean 'check'?"),
        (["data", "fetch", "minst", "--root", "x"], "no data set 'minst' (did you mean 'mnist'?)"),
        (["data", "fetch", "digits"], "say where to write"),
        (["data", "fetch", "digits", "--roto", "x"], "no flag --roto (did you mean '--root'?)"),
        (["data", "check", "/no/such/folder"], "does not exist"),
        (["doctor", "--now"], "no flag --now"),
    ],
)
def test_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in said(arguments, capsys)


def test_the_demo_deletes_nobodys_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.jpg").touch()
    assert "holds something else than a demo" in said(["demo", "--run-dir", str(tmp_path)], capsys)
    assert "cannot write to" in said(["demo", "--run-dir", str(tmp_path / "photo.jpg" / "x")], capsys)
    assert (tmp_path / "photo.jpg").exists()


@pytest.mark.parametrize(
    "command", ["find-lr", "demo", "data", "evaluate", "export", "predict", "doctor", "submit", "runs", "logs"]
)
def test_help_of_small_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: tldist {command}" in capsys.readouterr().out


def test_a_mistake_found_late_leaves_no_run_directory(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(_: str) -> None:
        raise UserError("found in the worker")

    run_dir = tmp_path / "run"
    monkeypatch.setattr("tldist.train.worker.run", late)
    assert "found in the worker" in said(
        ["train", "folder", *QUICK, "--data.root", str(photos), "--run-dir", str(run_dir)], capsys
    )
    assert not run_dir.exists()
    run_dir.mkdir()
    (run_dir / "mine.txt").touch()
    said(["train", "folder", *QUICK, "--data.root", str(photos), "--run-dir", str(run_dir)], capsys)
    assert [path.name for path in run_dir.iterdir()] == ["mine.txt"]


def test_more_workers_than_the_machine_has(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    arguments = ["--launch.workers", str(cores + 1), "--data.batch-size", str(8 * (cores + 1))]
    assert f"this machine has {cores}" in said(["train", "folder", "--data.root", str(photos), *arguments], capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--train.precision", "fp16"], "fp16 needs a GPU"),
        (["--train.compile", "graphs"], "there is no GPU: use auto"),
        (["--engine.kind", "zero1", "--engine.offload", "optimizer"], "there is no GPU: drop it"),
    ],
)
def test_what_needs_a_gpu(
    photos: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert says in said(["train", "folder", "--data.root", str(photos), *words], capsys)


def test_data_mistakes(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    (root / "val" / "ant").mkdir()
    shutil.copy(next((root / "val" / "ants").iterdir()), root / "val" / "ant" / "x.jpg")
    message = said(["train", "folder", "--data.root", str(root)], capsys)
    assert "'ant'" in message
    assert "did you mean 'ants'?" in message
    shutil.rmtree(root / "val" / "ant")
    (root / "train" / "wasps").mkdir()
    assert "'wasps'" in said(["train", "folder", "--data.root", str(root)], capsys)


def test_batch_larger_than_the_data(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = said(["train", "folder", *QUICK, "--data.root", str(photos), "--data.batch-size", "64"], capsys)
    assert "more than the 40 training images" in message
    few = ["--data.train-images-per-class", "3"]
    message = said(["train", "folder", *QUICK, "--data.root", str(photos), *few], capsys)
    assert "more than the 6 training images" in message
    few = ["--data.train-images-per-class", "21"]
    message = said(["train", "folder", *QUICK, "--data.root", str(photos), *few], capsys)
    assert "has 20 usable images" in message


def test_weights_mistakes(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "resnet50.safetensors"
    safetensors.torch.save_file(torchvision.models.resnet50(weights=None).state_dict(), other)
    base = ["train", "folder", "--data.root", str(photos), "--run-dir", str(tmp_path / "run")]
    assert "are not resnet18's" in said([*base, "--model.weights", str(other)], capsys)
    assert "no weights file" in said([*base, "--model.weights", str(tmp_path / "none.safetensors")], capsys)
    assert not (tmp_path / "run").exists()  # nothing half-made


def test_run_directories(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A full run, its repetition from its config, and two directories that cannot be used."""
    run_dir = tmp_path / "run"
    assert main(["train", "folder", *QUICK, "--data.root", str(photos), "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"run: {run_dir}"
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    taken = said(["train", "folder", *QUICK, "--data.root", str(photos), "--run-dir", str(run_dir)], capsys)
    assert "already holds a run" in taken
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    again = tmp_path / "again"
    assert main(["train", "--config", str(run_dir / "config.yaml"), "--run-dir", str(again)]) == 0
    first, second = (json.loads((d / "summary.json").read_text()) for d in (run_dir, again))
    assert first["val_top1"] == second["val_top1"]
    assert config.load(again / "config.yaml").data == config.load(run_dir / "config.yaml").data
    (tmp_path / "file").touch()
    blocked = said(
        ["train", "folder", *QUICK, "--data.root", str(photos), "--run-dir", str(tmp_path / "file/x")], capsys
    )
    assert "cannot write the run directory" in blocked


def test_bad_config_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    for text, says in [
        ("data: {mixupp: 1}", "unknown key 'data.mixupp' (did you mean 'data.mixup'?)"),
        ("train: {epochs: lots}", "train.epochs"),
        ("- 1", "is not a config file"),
        ("a: [", "is not YAML"),
    ]:
        path.write_text(text)
        assert says in said(["train", "folder", "--config", str(path)], capsys)


def test_the_contract_of_flags() -> None:
    assert set(FLAGS.split()) <= set(flag_types())


def test_a_config_stands_over_the_recipe_and_flags_over_both(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {epochs: 3}\noptim: {base_lr: 0.5}\nrun_dir: old\n")
    made = parse_run(["hymenoptera", "--config", str(path), "--train.epochs", "4"], "train")
    assert (made.train.epochs, made.optim.base_lr, made.recipe, made.run_dir) == (4, 0.5, "hymenoptera", "")
    assert parse_run(["demo", "--data.classes", "1", "2"], "plan").data.classes == ("1", "2")
    assert parse_run(["folder", "--data.batch_size=64"], "plan").data.batch_size == 64


def test_config_round_trips(tmp_path: Path) -> None:
    made = RunConfig(seed=7)
    assert config.from_json(config.to_json(made)) == made
    config.save(made, tmp_path / "c.yaml")
    assert config.load(tmp_path / "c.yaml") == made
    with pytest.raises(UserError, match="cannot read"):
        config.load(tmp_path)


@pytest.mark.parametrize("strategy", ["gradual", "two_phase", "discriminative", "feature_extraction"])
def test_plan_prints_phases_without_data(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "hymenoptera", "--strategy.name", strategy, "--model.name", "resnet50"]) == 0
    text = capsys.readouterr().out
    assert "layer4" in text
    assert {"feature_extraction": "2,049,000"}.get(strategy, "25,557,032") in text
    assert ("frozen" in text) == (strategy != "discriminative")


def notes(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What `tldist plan` says under its table."""
    assert main(["plan", "folder", *words]) == 0
    return capsys.readouterr().out.rpartition("┘\n")[2].splitlines()


def test_the_plan_says_only_what_is_not_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert notes(capsys, "--strategy.name", "full") == [
        "Peak learning rates of adamw; cosine over the run, warm-up of 0.5 epochs at the start.",
        "The head is counted for 1000 classes.",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--strategy.name gradual", "cosine over the whole plan, warm-up of 0.5 epochs at each phase's start"),
        ("--strategy.name two_phase --optim.warmup-epochs 0", "cosine over each phase, no warm-up"),
        (
            "--optim.warmup-epochs 1 --optim.final-lr 0.1",
            "cosine down to 0.1 of the peak over the run, warm-up of 1 epoch",
        ),
        ("--optim.schedule cosine_restarts", "cosine with restarts (first cycle 2 epochs, each next 2 times as long)"),
        ("--optim.schedule onecycle", "onecycle over the run, which rises by itself"),
        ("--optim.schedule onecycle --strategy.name gradual", "warm-up of 0.5 epochs at the start of each later phase"),
        ("--strategy.name lp_ft --strategy.second-phase-from best", "Phase 'all' goes on from the best weights so far"),
        ("--strategy.name gradual --strategy.optimizer-state reset", "Every phase starts its optimizer anew"),
        ("--train.early-stop 3", "The run stops after 3 epochs without gain and restores the best weights"),
        ("--train.early-stop 1 --train.min-delta 0.01", "A gain is a rise of validation top-1 by more than 0.01"),
        ("--train.ema 0.999", "A moving average of the weights (decay 0.999) is evaluated and saved"),
        ("--train.accumulate 4", "A worker's share of a batch passes in 4 parts"),
        ("--train.batchnorm eval", "keeps the source's statistics"),
        ("--train.batchnorm sync", "sees all workers' batches together"),
        ("--optim.clip-norm 0", "Gradients are not clipped"),
        ("--optim.clip-norm 5", "Gradients are clipped at norm 5"),
        ("--optim.l2-sp 0.01", "L2-SP of 0.01 in place of weight decay"),
        ("--data.mixup 0.2 --data.mix-at cut", "Mixup of the features at the cut"),
        ("--cache.features views:4", "Features of the frozen prefix are kept (views:4)"),
        ("--data.pixels memory", "Decoded pixels are kept (memory)"),
    ],
)
def test_the_plan_says_what_its_table_cannot(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = words.split()
    said_lines = notes(capsys, *given)
    assert sum(says in line for line in said_lines) == 1
    assert len(said_lines) <= 5


def test_the_plan_of_a_plateau(capsys: pytest.CaptureFixture[str]) -> None:
    """The last phase has no length of its own, and the hand-written one a line for each rule."""
    words = ["--strategy.name", "gradual", "--strategy.unfreeze", "plateau", "--strategy.patience", "1"]
    assert main(["plan", "folder", *words]) == 0
    text = capsys.readouterr().out
    assert text.count("without gain") == 5
    assert text.count("1 epoch ") == 5
    assert text.count("the rest") == 1
    assert main(["plan", "folder", "--strategy.name", "by_hand", "--strategy.phases", "norm=1, head=1, *=frozen"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "folder: by_hand of resnet18, 10 epochs"
    assert [word for line in lines[2:6] for word in line.split() if "=" in word] == ["norm=1,", "head=1,", "*=frozen"]
    assert max(len(line) for line in lines[1:12]) < 50


def test_the_plans_in_the_docs_are_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """But for the two lines under a table that stand there once."""
    text = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
    blocks = [block for block in text.split("```")[1::2] if block.startswith("\n$ tldist plan")]
    assert len(blocks) == 13
    for block in blocks:
        command, _, shown = block.lstrip().replace("\\\n>", "").partition("\n")
        assert main(shlex.split(command.removeprefix("$ tldist "))) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed if line in shown] == shown.splitlines()
        assert all(line.startswith(("The head is", "Frozen stages")) for line in printed if line not in shown)


def test_data_check_lists_what_is_skipped(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    whole = next((root / "train" / "ants").iterdir())
    (root / "train" / "ants" / "cut.jpg").write_bytes(whole.read_bytes()[:500])
    (root / "train" / "bees" / "note.txt").write_text("hello")
    assert main(["data", "check", str(root)]) == 0
    text = capsys.readouterr().out
    assert "train: 40 images" in text
    assert "skipped: 2" in text
    assert "train/ants/cut.jpg: truncated" in text
    assert "train/bees/note.txt" in text


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"tldist {name}" in text for name in ("train", "plan", "find-lr", "demo", "data", "doctor"))
    with pytest.raises(SystemExit) as stop:
        main(["train", "hymenoptera", "--help"])
    assert stop.value.code == 0
    assert "--data.batch-size" in capsys.readouterr().out


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_start_shows_how_far_it_has_looked_at_the_images(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty minutes of it for a million photos; a log file is spared."""
    for name in ("NO_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    settings = parse_run(["folder", "--data.root", str(shutil.copytree(photos, tmp_path / "new")), *QUICK], "train")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    index = preflight(settings)
    images = len(index.train) + len(index.val)
    assert "looking at images" in terminal.getvalue()
    assert f"{images}/{images}" in terminal.getvalue()
    monkeypatch.undo()
    capsys.readouterr()
    preflight(settings)
    assert capsys.readouterr() == ("", "")
