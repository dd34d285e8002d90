"""RunConfig: everything a run depends on, in frozen sections; each part of tldist receives its own section.

Mistakes of the user are raised as `UserError` with the mend in words; the command line prints that one
sentence and exits with code 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import pydantic
import tyro
import yaml

ModelName = Literal[
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "efficientnet_b4",
    "efficientnet_b7",
    "convnext_base",
    "vit_b_16",
]
StrategyName = Literal[
    "scratch",
    "feature_extraction",
    "partial",
    "full",
    "discriminative",
    "two_phase",
    "lp_ft",
    "gradual",
    "by_hand",
]
Precision = Literal["bf16", "fp16", "fp32"]
AugmentName = Literal["none", "basic", "lecture"]

STRATEGIES: tuple[StrategyName, ...] = tuple(name for name in get_args(StrategyName) if name != "by_hand")
"""Those that need no plan from the user."""


class UserError(ValueError):
    """A mistake in what the user asked for: one sentence that says what is wrong and what to do."""


class TrainingFailed(RuntimeError):  # noqa: N818 - it states how the run ended
    """A run that started and did not reach its end; says why, and where to read more."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


@dataclass(frozen=True)
class Section:
    """Base of the sections: unknown keys in a saved config are errors, not silence."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = {"extra": "forbid"}


@dataclass(frozen=True)
class ModelConfig(Section):
    """The backbone and its new head."""

    name: ModelName = "resnet18"
    """A torchvision backbone."""
    weights: str = "default"
    """A torchvision weights name (default: its best), a .safetensors or .pth file, or none."""
    head: Literal["linear", "mlp", "mlp_bn"] = "linear"
    """linear, or a lecture head: mlp (3.1: 256 units, dropout) or mlp_bn (8.1: 512 units, BatchNorm, dropout)."""


@dataclass(frozen=True)
class StrategyConfig(Section):
    """Which stages train, when, and at what share of the base learning rate."""

    name: StrategyName = "feature_extraction"
    """The fine-tuning strategy."""
    trainable_stages: int = 2
    """partial, and the first phase of two_phase: stages that train, counted from the output, head included."""
    unfreeze: Literal["epochs", "plateau"] = "epochs"
    """gradual: the next stage, top down, every --strategy.epochs-per-stage epochs, or when validation top-1 has not
    risen by --train.min-delta for --strategy.patience epochs."""
    epochs_per_stage: int = 1
    """gradual by epochs: epochs before the next stage is unfrozen."""
    patience: int = 2
    """gradual on a plateau: epochs without improvement before the next stage is unfrozen."""
    backbone_lr: float = 1.0
    """Learning rate of pre-trained stages as a multiple of the head's (ignored by scratch)."""
    decay: float = 0.3
    """discriminative: each stage's rate is this times that of the stage above (lecture 5.1: 0.1 to 0.5)."""
    first_phase: float = 0.67
    """two_phase and lp_ft: share of the epochs spent in the first phase (the lecture's 20 of 30)."""
    second_phase_lr: float = 0.1
    """two_phase and lp_ft: multiple on all learning rates once everything is unfrozen."""
    second_phase_from: Literal["last", "best"] = "last"
    """two_phase and lp_ft: go on from the first phase's last weights, or from its best on validation."""
    optimizer_state: Literal["carry", "reset"] = "carry"
    """At a phase boundary: keep the moments of what trained before, or start all of them anew (ULMFiT's loop)."""
    phases: tuple[str, ...] = ()
    """by_hand: one '[EPOCHS:] PATTERN=MULTIPLE|frozen, ...' per phase; the first pattern that fits a parameter wins.
    A pattern is a stage, norm (every normalisation layer), or a name with * ('layer1.0.*')."""


@dataclass(frozen=True)
class DataConfig(Section):
    """The image folder or shards, how they are read, and what is done to the images."""

    root: str = ""
    """Folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or with train-*.tar and val-*.tar (`tldist data shard`)."""
    batch_size: int = 32
    """Images per optimizer step, over all workers together."""
    image_size: int = 224
    """Side of the square the network sees."""
    augment: AugmentName = "basic"
    """none; basic: random-resized-crop and flip; lecture: the list of lecture 7.2."""
    mixup: float = 0.0
    """Alpha of Mixup's Beta(alpha, alpha); 0 is off. With CutMix on too, each batch draws one of the two."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta(alpha, alpha); 0 is off."""
    mix_at: Literal["input", "cut"] = "input"
    """Mixup of images, or of the features where the frozen prefix ends (manifold mixup, Verma et al., 2019)."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """auto: DALI where it is installed, else torchvision."""
    threads: int = 0
    """Loader threads per worker; 0: the machine's cores shared among its workers."""
    pixels: Literal["off", "memory", "disk"] = "off"
    """Decode each file once a run; keep its pixels in memory, or on the run directory's disk, for torchvision's loader.
    They are kept at the size that evaluation resizes to: training crops are cut from a smaller picture, and softer."""
    shuffle_window: int = 10_000
    """Of shards, which are read nearly in order: an image comes at most about so many images earlier or later than it
    is stored, in an order of the shards drawn anew each epoch. An image folder is shuffled in full."""
    classes: tuple[str, ...] = ()
    """Use only these classes (default: all)."""
    train_images_per_class: int = 0
    """Train on this many images of each class, drawn by the seed; 0: all."""


@dataclass(frozen=True)
class OptimConfig(Section):
    """The optimizer and its schedule; learning rates are for the head, stages take multiples of it."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    base_lr: float = 1e-3
    """Peak learning rate of the head."""
    weight_decay: float = 0.01
    """Decoupled for AdamW, L2 for SGD; never on biases and normalisation parameters."""
    momentum: float = 0.9
    """SGD's momentum (Nesterov off)."""
    schedule: Literal["cosine", "constant", "cosine_restarts", "onecycle"] = "cosine"
    """Learning rate over each phase (gradual: over the whole plan), after the warm-up."""
    warmup_epochs: float = 0.5
    """Linear warm-up at the start of each phase, in epochs (at most half of the phase); onecycle rises by itself."""
    final_lr: float = 0.0
    """Where a cosine ends, as a share of the peak."""
    restart_epochs: float = 2.0
    """cosine_restarts: length of the first cycle, in epochs (SGDR's T_0)."""
    restart_factor: float = 2.0
    """cosine_restarts: each cycle is this times as long as the one before (SGDR's T_mult)."""
    clip_norm: float = 1.0
    """Clip the global gradient norm at this; 0 is off."""
    l2_sp: float = 0.0
    """L2-SP: pull pre-trained weights towards their start with this strength, in place of weight decay; 0 is off."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """The loop."""

    epochs: int = 10
    """Epochs over all phases."""
    precision: Precision = "bf16"
    """bf16 and fp16 run under autocast with fp32 master weights; fp16 scales the loss and needs a GPU."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    batchnorm: Literal["train", "eval", "sync"] = "train"
    """BatchNorm in stages that train: a worker's batch statistics, the source's (eval), or those of all workers'
    batches together (sync). Frozen stages are always eval."""
    accumulate: int = 1
    """Pass each worker's share of a batch through the network in this many parts: the same step in less memory."""
    ema: float = 0.0
    """Evaluate and save an exponential moving average of the weights with this decay (0.999, say); 0 is off."""
    early_stop: int = 0
    """Stop after this many epochs without improvement and restore the best weights; 0 is off."""
    max_skipped: int = 20
    """A step whose gradients are not finite is left out and counted; stop after this many in a row. (fp16 needs up to
    17 to find its loss scale.)"""
    min_delta: float = 0.0
    """Rise of validation top-1 that counts as an improvement, for early stopping and for unfreezing on a plateau."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, once per phase: of the frozen prefix, and on GPUs of what trains. auto: where the phase has
    enough work to win the compile time back."""


@dataclass(frozen=True)
class CacheConfig(Section):
    """What the frozen prefix computed, kept so that it is computed once."""

    features: str = "off"
    """off; exact: for deterministic transforms, bit for bit the uncached run; views:K: K augmented views of each
    image, an approximation: epoch e shows view e mod K."""
    dir: str = ""
    """Keep the features in this folder, which all workers must share, for later runs that compute the same (default:
    in the run directory, and removed at the end of their phase)."""
    gib: float = 0.0
    """Most the features may take on disk, in GiB; 0: half of what is free."""

    @property
    def views(self) -> int:
        """Views kept of each training image; 0: no cache."""
        if self.features == "off":
            return 0
        return 1 if self.features == "exact" else int(self.features.removeprefix("views:"))


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """What stands on the disk should the run be interrupted. The end of every epoch is always saved."""

    minutes: float = 10.0
    """Also save inside an epoch, when the last checkpoint is this old; 0: by steps alone."""
    steps: int = 0
    """Also save inside an epoch, each time so many of its steps are done; 0: by time alone."""
    keep: int = 2
    """Keep so many of the last checkpoints, besides the best: should one be damaged, the one before it is used."""


@dataclass(frozen=True)
class EngineConfig(Section):
    """How the live suffix is replicated and stepped."""

    kind: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """auto: ddp with more than one worker, else single. DeepSpeed's ZeRO keeps a share on each worker: zero1 of the
    optimizer's state, zero2 of the gradients too, zero3 of the weights too."""
    offload: Literal["none", "optimizer"] = "none"
    """zero1, zero2, zero3 on GPUs; optimizer: keep the optimizer's share, and step it, in the host's memory."""


@dataclass(frozen=True)
class LaunchConfig(Section):
    """Where the workers run."""

    workers: int | str = 1
    """Worker processes: one per GPU, or sharing the cores where there is none. 2:8 is elastic: start with 2 to 8, as
    many as there are, and go on with fewer when a node is lost and with more when one comes. The images of a step and
    the learning rate stay as they are; fewer workers pass more images each, in more parts."""
    kind: Literal["auto", "ray", "local"] = "auto"
    """ray: Ray Train, on this machine or on the cluster at RAY_ADDRESS; local: one worker, in this process.
    auto: ray with more than one worker or with RAY_ADDRESS set, else local."""
    restarts: int = 3
    """Workers that die without a word (a lost node, the kernel's out-of-memory killer) are started again, from the last
    checkpoint, at most so many times without a new one."""

    @property
    def least(self) -> int:
        """Workers with which the run goes on."""
        return int(str(self.workers).partition(":")[0])

    @property
    def most(self) -> int:
        """Workers that it uses where they are to be had."""
        return int(str(self.workers).rpartition(":")[2])

    hang_minutes: float = 10.0
    """Stop a run in which no step, evaluation batch or the like ends for so long, and name the worker that the others
    wait for; compiling and slow storage count too. 0: off."""


@dataclass(frozen=True)
class TrackingConfig(Section):
    """Who watches."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where there is a login, else offline (upload later with `wandb sync`)."""
    project: str = "tldist"
    """Project in Weights & Biases."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl; each costs one all-reduce and one copy to the host."""


@dataclass(frozen=True)
class RunConfig(Section):
    """A complete run. Recipes return one; the command line overrides single fields."""

    recipe: Annotated[str, tyro.conf.Suppress] = "custom"
    """Name of the recipe this came from."""
    run_dir: str = ""
    """Where everything the run writes goes (default: runs/RECIPE-STRATEGY-TIME)."""
    seed: int = 0
    """Seeds the head, the order of images, augmentation and mixing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def validate(self) -> None:
        """Raise UserError for values no run can use; needs neither data nor devices."""
        if not re.fullmatch(r"-?\d+(:\d+)?", str(self.launch.workers)):
            raise UserError(f"--launch.workers '{self.launch.workers}' is no number: give one, or two as in 2:8")
        for bad, sentence in _rules(self):
            if bad:
                raise UserError(sentence)


def _rules(c: RunConfig) -> list[tuple[bool, str]]:
    """(is it wrong?, the sentence to say) for every rule that spans no machine."""
    positive = {
        "--data.batch-size": c.data.batch_size,
        "--data.image-size": c.data.image_size,
        "--train.epochs": c.train.epochs,
        "--launch.workers": c.launch.least,
        "--tracking.log-every": c.tracking.log_every,
        "--strategy.trainable-stages": c.strategy.trainable_stages,
        "--strategy.epochs-per-stage": c.strategy.epochs_per_stage,
        "--optim.base-lr": c.optim.base_lr,
        "--strategy.backbone-lr": c.strategy.backbone_lr,
        "--strategy.second-phase-lr": c.strategy.second_phase_lr,
        "--strategy.patience": c.strategy.patience,
        "--optim.restart-epochs": c.optim.restart_epochs,
        "--train.accumulate": c.train.accumulate,
        "--train.max-skipped": c.train.max_skipped,
        "--checkpoint.keep": c.checkpoint.keep,
    }
    not_negative = {
        "--data.mixup": c.data.mixup,
        "--data.cutmix": c.data.cutmix,
        "--data.threads": c.data.threads,
        "--data.shuffle-window": c.data.shuffle_window,
        "--data.train-images-per-class": c.data.train_images_per_class,
        "--optim.weight-decay": c.optim.weight_decay,
        "--optim.warmup-epochs": c.optim.warmup_epochs,
        "--optim.clip-norm": c.optim.clip_norm,
        "--optim.l2-sp": c.optim.l2_sp,
        "--train.early-stop": c.train.early_stop,
        "--train.min-delta": c.train.min_delta,
        "--cache.gib": c.cache.gib,
        "--checkpoint.minutes": c.checkpoint.minutes,
        "--launch.restarts": c.launch.restarts,
        "--checkpoint.steps": c.checkpoint.steps,
        "--launch.hang-minutes": c.launch.hang_minutes,
        "--seed": c.seed,
    }
    shares = {
        "--optim.momentum": c.optim.momentum,
        "--train.label-smoothing": c.train.label_smoothing,
        "--optim.final-lr": c.optim.final_lr,
        "--train.ema": c.train.ema,
    }
    rules = [(not v > 0, f"{flag} is {v}: give a value above 0") for flag, v in positive.items()]
    rules += [(not v >= 0, f"{flag} is {v}: give 0 or more") for flag, v in not_negative.items()]
    rules += [(not 0 <= v < 1, f"{flag} is {v}: give a share from 0 to below 1") for flag, v in shares.items()]
    numbers = {**positive, **not_negative}.items()
    rules += [(math.isinf(v), f"{flag} is {v}: give a finite number") for flag, v in numbers]
    workers, batch = c.launch.most, c.data.batch_size
    return [
        *rules,
        (
            c.launch.least > workers,
            f"--launch.workers {c.launch.workers} asks for more workers at least than at most: write the smaller first",
        ),
        (
            batch % max(workers, 1) != 0,
            f"--data.batch-size {batch} cannot be shared evenly by {workers} workers: use a multiple of {workers}",
        ),
        (
            c.engine.kind == "single" and workers > 1,
            f"--engine.kind single runs one worker, not {workers}: use ddp or --launch.workers 1",
        ),
        (
            c.engine.offload != "none" and not c.engine.kind.startswith("zero"),
            f"--engine.offload {c.engine.offload} is DeepSpeed's, and --engine.kind is {c.engine.kind}: "
            "use zero1, zero2 or zero3 with it",
        ),
        (
            c.launch.kind == "local" and workers > 1,
            f"--launch.kind local runs one worker, not {workers}: use ray or --launch.workers 1",
        ),
        (c.seed >= 2**63, f"--seed is {c.seed}: give a number below 2^63"),
        (
            c.model.name.startswith("vit") and c.data.image_size % 16 != 0,
            f"--data.image-size {c.data.image_size} does not divide into {c.model.name}'s 16-pixel patches: "
            "use a multiple of 16",
        ),
        (
            c.model.head == "mlp_bn" and _smallest_pass(c) < 2,
            f"--data.batch-size {batch} gives a worker one image at a time, and the BatchNorm of --model.head mlp_bn "
            "needs two: use a larger batch, less --train.accumulate, or another head",
        ),
        (
            c.train.accumulate > batch // max(workers, 1),
            f"--train.accumulate {c.train.accumulate} is more than a worker's {batch // max(workers, 1)} images of a "
            "step: use less, or a larger --data.batch-size",
        ),
        (
            not 1 <= c.optim.restart_factor < math.inf,
            f"--optim.restart-factor is {c.optim.restart_factor}: give 1 or more",
        ),
        (
            c.optim.l2_sp > 0 and (c.strategy.name == "scratch" or c.model.weights == "none"),
            "--optim.l2-sp pulls towards pre-trained weights, and this run starts without any: leave it out",
        ),
        *_cache_rules(c),
        (
            not 0 < c.strategy.decay <= 1,
            f"--strategy.decay is {c.strategy.decay}: give a factor above 0 and at most 1",
        ),
        (
            not 0 < c.strategy.first_phase < 1,
            f"--strategy.first-phase is {c.strategy.first_phase}: give a share between 0 and 1",
        ),
    ]


def _smallest_pass(c: RunConfig) -> int:
    """Images of a worker's smallest pass, over all numbers of workers that the run may have."""
    most, batch = max(c.launch.most, 1), c.data.batch_size
    limit = max(-(-(batch // most) // max(c.train.accumulate, 1)), 1)
    shares = [batch // n for n in range(max(c.launch.least, 1), most + 1) if batch % n == 0]
    return min((share // -(-share // limit) for share in shares if share), default=batch)


def _cache_rules(c: RunConfig) -> list[tuple[bool, str]]:
    """Features can be kept only of what is the same each time."""
    kind, mixed = c.cache.features, c.data.mixup > 0 or c.data.cutmix > 0
    known = kind in ("off", "exact") or re.fullmatch(r"views:[1-9]\d{0,3}", kind) is not None
    return [
        (not known, f"--cache.features '{kind}' is not known: give off, exact or views:K (views:4, say)"),
        (
            kind == "exact" and c.data.augment != "none",
            f"--cache.features exact needs the same picture in every epoch, and --data.augment {c.data.augment} draws "
            "new ones: use --data.augment none, or views:K to keep K augmented views",
        ),
        (
            kind != "off" and mixed and c.data.mix_at == "input",
            "--cache.features keeps features of single images, and Mixup or CutMix of images needs the prefix anew for "
            "every mixture: use --data.mix-at cut (manifold mixup), or switch mixing off",
        ),
        (
            c.data.mix_at == "cut" and c.data.cutmix > 0,
            "--data.mix-at cut mixes features, and CutMix pastes boxes of pixels: use --data.mixup there",
        ),
    ]


_ADAPTER = pydantic.TypeAdapter(RunConfig)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as plain nested dicts and lists."""
    return _ADAPTER.dump_python(config, mode="json")


def to_json(config: RunConfig) -> str:
    """The one string a worker receives."""
    return _ADAPTER.dump_json(config).decode()


def from_json(text: str) -> RunConfig:
    """The config a launcher sent."""
    return _ADAPTER.validate_json(text)


def save(config: RunConfig, path: Path) -> None:
    """Write `config.yaml`."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def load(path: Path, base: RunConfig | None = None) -> RunConfig:
    """Read a `config.yaml` over `base` (default: the defaults); a bad key or value is named with its place."""
    try:
        values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            raise UserError(f"{path} is not a config file: write sections and values, as in a run's config.yaml")
        return _ADAPTER.validate_python(_merge(to_dict(base or RunConfig()), values))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from error


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _first_problem(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown key '{place}'{nearest(place, flags())}"
    return f"{place}: {first['msg']} (found {first['input']!r})"


def flags(cls: type = RunConfig, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every settable field by its dotted name, as in config.yaml: `data.batch_size` -> its dataclass field."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if dataclasses.is_dataclass(default):
            found |= flags(type(default), f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = f
    return found
