"""RunConfig: everything a run depends on, in frozen sections; each part of tldist receives its own section.

Mistakes of the user are raised as `UserError` with the mend in words; the command line prints that one
sentence and exits with code 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import re
from collections.abc import Iterable, Mapping
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
    "dann_mnist",
    "dann_mnist_bn",
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
    "source_only",
    "target_only",
    "mmd",
    "dann",
]
Precision = Literal["bf16", "fp16", "fp32"]

DOMAINS: dict[StrategyName, tuple[str, ...]] = {
    "source_only": ("source",),
    "target_only": ("target",),
    "mmd": ("source", "target"),
    "dann": ("source", "target"),
}
"""Strategies between two data sets, and which of them training shows: labelled the first, unlabelled the second.
All are evaluated on the target."""
STRATEGIES: tuple[StrategyName, ...] = tuple(
    name for name in get_args(StrategyName) if name != "by_hand" and name not in DOMAINS
)
"""Those that need no plan from the user, and one data set."""


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
    """A torchvision backbone, or a small network for digits: dann_mnist (Ganin et al., 2016), _bn with BatchNorm."""
    weights: str = "default"
    """A torchvision weights name (default: its best), a .safetensors or .pth file, a run directory, or none."""
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
    align_at: str = ""
    """mmd and dann: the stage at whose output the domains are made alike (default: the last before the head)."""
    align_weight: float = 1.0
    """mmd: weight of MMD^2; dann: of the reversed gradient. Both grow from 0 to this as 2 / (1 + exp(-10 p)) - 1."""
    discriminator_units: int = 256
    """dann: width of the discriminator's two hidden layers."""
    discriminator_lr: float = 1.0
    """dann: the discriminator's learning rate as a multiple of the head's."""


@dataclass(frozen=True)
class DataConfig(Section):
    """The image folder or shards, how they are read, and what is done to the images."""

    root: str = ""
    """Folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or with train-*.tar and val-*.tar (`tldist data shard`).
    source_only, target_only, mmd and dann: a folder with two such folders, source and target."""
    batch_size: int = 32
    """Images per optimizer step, over all workers together."""
    image_size: int = 224
    """Side of the square the network sees."""
    augment: str = "basic"
    """A preset (none; basic: random-resized-crop and flip; lecture: the list of lecture 7.2; randaugment;
    trivialaugment), then single switches: lecture,hue=off,rotate-deg=30. `tldist data preview` shows it."""
    mixup: float = 0.0
    """Alpha of Mixup's Beta(alpha, alpha); 0 is off. With CutMix on too, a coin decides between the two."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta(alpha, alpha); 0 is off."""
    cutmix_share: float = 0.5
    """Where both are on: how often CutMix is taken."""
    mix_probability: float = 1.0
    """How often anything is mixed."""
    mix_per: Literal["batch", "image"] = "batch"
    """Draw how to mix once for a batch, or for each image."""
    mix_at: Literal["input", "cut"] = "input"
    """Mixup of images, or of the features where the frozen prefix ends (manifold mixup, Verma et al., 2019)."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """auto: DALI on GPUs, where it is installed; torchvision on CPUs, where it is the faster one."""
    threads: int = 0
    """Loader threads per worker; 0: the machine's cores shared among its workers."""
    pixels: Literal["off", "memory", "disk"] = "off"
    """Decode each file once a run; keep its pixels in memory, or on the run directory's disk, for torchvision's loader.
    They are kept at the size that evaluation resizes to: training crops are cut from a smaller picture, and softer."""
    shuffle_window: int = 10_000
    """Of shards, which are read nearly in order: an image comes at most about so many images earlier or later than it
    is stored, in an order of the shards drawn anew each epoch. An image folder is shuffled in full."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An image that cannot be used (truncated, empty, of an unsupported kind): stop before training, or go on without
    it; either way each is named, and counted in summary.json. `tldist data check` lists them."""
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
    ewc: float = 0.0
    """EWC: hold weights where earlier tasks left them, each by its importance to them times this (100 to 1e6, say), in
    place of weight decay; 0 is off. BatchNorm's statistics are held by --train.batchnorm eval alone."""
    ewc_from: tuple[str, ...] = ()
    """EWC: the earlier tasks' run directories (their best checkpoint) or checkpoints; `tldist fisher` each first."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """The loop."""

    epochs: int = 10
    """Epochs over all phases."""
    precision: Precision = "bf16"
    """bf16 and fp16 run under autocast with fp32 master weights; fp16 scales the loss and needs a GPU."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    batchnorm: Literal["train", "eval", "sync", "domain"] = "train"
    """BatchNorm in stages that train: a worker's batch statistics, the source's (eval), those of all workers'
    batches together (sync), or (mmd, dann) each domain's own, the target's being kept. Frozen stages: always eval."""
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
    compile: Literal["auto", "on", "off", "graphs"] = "auto"
    """torch.compile, once per phase: of the frozen prefix, and on GPUs of what trains. auto: where the phase has
    enough work to win the compile time back. graphs: on, and what trains is replayed as CUDA graphs, for passes so
    small that the GPU waits for the host. New: fast, but not yet compared with eager runs (docs/results.md)."""


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
    """auto: online where there is a login, else offline (upload later with `tldist sync`)."""
    project: str = "tldist"
    """Project in Weights & Biases."""
    group: str = ""
    """Group in Weights & Biases, for the runs of one study (default: WANDB_RUN_GROUP)."""
    upload_mib: int = 512
    """At its end the run's best and last weights go to Weights & Biases as versions of an artifact, where they are at
    most so large, in MiB; 0: none. The optimizer's state stays in the run directory."""
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


_ADAPTER = pydantic.TypeAdapter(RunConfig)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as plain nested dicts and lists."""
    return _ADAPTER.dump_python(config, mode="json")


def to_json(config: RunConfig) -> str:
    """The one string a worker receives."""
    return _ADAPTER.dump_json(config).decode()


def from_json(text: str) -> RunConfig:
    """The config a launcher sent. Raises UserError."""
    try:
        return _ADAPTER.validate_json(text)
    except pydantic.ValidationError as error:
        raise UserError(_first_problem(error)) from error


def check_types(config: RunConfig) -> None:
    """Raise UserError where a config made in Python holds a value that its field does not allow.

    Dataclasses take whatever they are given; files and the command line are checked when they are read.
    """
    given = dataclasses.asdict(config)
    try:
        allowed = dataclasses.asdict(_ADAPTER.validate_python(given))
    except pydantic.ValidationError as error:
        raise UserError(_first_problem(error)) from error
    for name in flags():
        value, converted = (functools.reduce(operator.getitem, name.split("."), values) for values in (given, allowed))
        is_nan = value != value and converted != converted  # a number, which its limits refuse
        if (value != converted and not is_nan) or isinstance(value, bool) != isinstance(converted, bool):
            raise UserError(f"{name} is {value!r}, of a wrong kind: give {converted!r}")


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


def with_values(base: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`base` with these fields, by dotted name (`data.batch_size`). Raises UserError: unknown names, values of a wrong
    kind."""
    merged, known = to_dict(base), flags()
    for name, value in values.items():
        if name not in known:
            raise UserError(f"there is no flag '{name}'{nearest(name, known)}")
        *sections, leaf = name.split(".")
        section = merged
        for part in sections:
            section = section[part]
        section[leaf] = value
    try:
        return _ADAPTER.validate_python(merged)
    except pydantic.ValidationError as error:
        raise UserError(_first_problem(error)) from error


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
    meant = ""
    if first["type"] == "literal_error":
        meant = nearest(str(first["input"]), re.findall(r"'([^']*)'", str(first.get("ctx", {}).get("expected"))))
    return f"{place}: {first['msg']} (found {first['input']!r}){meant}"


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
