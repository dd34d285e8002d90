"""What no run can use: every rule over a RunConfig that needs neither data nor devices."""

from __future__ import annotations

import math
import re

from tldist.config import DOMAINS, RunConfig, UserError, check_types
from tldist.data.presets import augment_spec


def validate(config: RunConfig) -> None:
    """Raise UserError for values no run can use, of whatever origin the config is."""
    check_types(config)
    if not re.fullmatch(r"-?\d+(:\d+)?", str(config.launch.workers)):
        raise UserError(f"--launch.workers '{config.launch.workers}' is no number: give one, or two as in 2:8")
    augment_spec(config.data.augment)
    for bad, sentence in _rules(config):
        if bad:
            raise UserError(sentence)


def validate_device(config: RunConfig, device: str) -> None:
    """Raise UserError for what only a GPU can do, where workers run on another kind of `device` ("cpu")."""
    if device == "cuda":
        return
    train = config.train
    if train.precision == "fp16":
        raise UserError("--train.precision fp16 needs a GPU: use bf16 or fp32 here")
    if train.compile == "graphs":
        raise UserError("--train.compile graphs is about CUDA graphs, and there is no GPU: use auto")
    if config.engine.offload != "none":
        raise UserError("--engine.offload moves the optimizer from the GPU to the host, and there is no GPU: drop it")


Rule = tuple[bool, str]
"""(is it broken?, the sentence that says so)"""


def _rules(c: RunConfig) -> list[Rule]:
    """Every rule that needs no machine; the first broken one is reported."""
    relations = (_worker_rules, _pass_rules, _optim_rules, _cache_rules, _domain_rules, _strategy_rules)
    return _limits(c) + [rule for rules in relations for rule in rules(c)]


def _limits(c: RunConfig) -> list[Rule]:
    """The range of each number by itself."""
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
        "--strategy.align-weight": c.strategy.align_weight,
        "--strategy.discriminator-units": c.strategy.discriminator_units,
        "--strategy.discriminator-lr": c.strategy.discriminator_lr,
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
        "--optim.ewc": c.optim.ewc,
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
    inclusive = {"--data.cutmix-share": c.data.cutmix_share, "--data.mix-probability": c.data.mix_probability}
    rules = [(not v > 0, f"{flag} is {v}: give a value above 0") for flag, v in positive.items()]
    rules += [(not v >= 0, f"{flag} is {v}: give 0 or more") for flag, v in not_negative.items()]
    rules += [(not 0 <= v < 1, f"{flag} is {v}: give a share from 0 to below 1") for flag, v in shares.items()]
    rules += [(not 0 <= v <= 1, f"{flag} is {v}: give a share from 0 to 1") for flag, v in inclusive.items()]
    numbers = {**positive, **not_negative}.items()
    return rules + [(math.isinf(v), f"{flag} is {v}: give a finite number") for flag, v in numbers]


def _worker_rules(c: RunConfig) -> list[Rule]:
    """Workers and the engine that joins them."""
    workers, batch = c.launch.most, c.data.batch_size
    return [
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
            c.train.compile == "graphs" and c.engine.kind.startswith("zero"),
            f"--train.compile graphs needs weights that stay in their place, and --engine.kind {c.engine.kind} moves "
            "them about: use ddp, or --train.compile on",
        ),
        (
            c.launch.kind == "local" and workers > 1,
            f"--launch.kind local runs one worker, not {workers}: use ray or --launch.workers 1",
        ),
        (c.seed >= 2**63, f"--seed is {c.seed}: give a number below 2^63"),
    ]


def _pass_rules(c: RunConfig) -> list[Rule]:
    """Images that the network can take at once."""
    batch = c.data.batch_size
    share = batch // max(c.launch.most, 1)
    return [
        (
            c.model.name.startswith("vit") and c.data.image_size % 16 != 0,
            f"--data.image-size {c.data.image_size} does not divide into {c.model.name}'s 16-pixel patches: "
            "use a multiple of 16",
        ),
        (
            c.model.name.startswith("dann") and c.data.image_size < 16,
            f"--data.image-size {c.data.image_size} leaves {c.model.name} nothing to pool: use 16 or more",
        ),
        (
            c.model.head == "mlp_bn" and _smallest_pass(c) < 2,
            f"--data.batch-size {batch} gives a worker one image at a time, and the BatchNorm of --model.head mlp_bn "
            "needs two: use a larger batch, less --train.accumulate, or another head",
        ),
        (
            c.train.accumulate > share,
            f"--train.accumulate {c.train.accumulate} is more than a worker's {share} images of a "
            "step: use less, or a larger --data.batch-size",
        ),
    ]


def _optim_rules(c: RunConfig) -> list[Rule]:
    """The schedule, and what holds weights near their start."""
    return [
        (
            not 1 <= c.optim.restart_factor < math.inf,
            f"--optim.restart-factor is {c.optim.restart_factor}: give 1 or more",
        ),
        (
            c.optim.l2_sp > 0 and (c.strategy.name == "scratch" or c.model.weights == "none"),
            "--optim.l2-sp pulls towards pre-trained weights, and this run starts without any: leave it out",
        ),
        (
            c.optim.ewc > 0 and not c.optim.ewc_from,
            "--optim.ewc holds weights for earlier tasks: name their run directories in --optim.ewc-from",
        ),
        (
            bool(c.optim.ewc_from) and not c.optim.ewc,
            "--optim.ewc-from names earlier tasks, and --optim.ewc, how hard to hold their weights, is 0: give both",
        ),
        (
            c.optim.ewc > 0 and (c.strategy.name == "scratch" or c.model.weights == "none"),
            "--optim.ewc holds weights where an earlier task left them, and this run starts without any: name that "
            "run in --model.weights, and another strategy than scratch",
        ),
    ]


def _strategy_rules(c: RunConfig) -> list[Rule]:
    """Shares that a strategy splits by."""
    return [
        (
            not 0 < c.strategy.decay <= 1,
            f"--strategy.decay is {c.strategy.decay}: give a factor above 0 and at most 1",
        ),
        (
            not 0 < c.strategy.first_phase < 1,
            f"--strategy.first-phase is {c.strategy.first_phase}: give a share between 0 and 1",
        ),
    ]


def _domain_rules(c: RunConfig) -> list[Rule]:
    """Two domains in one step."""
    name, paired = c.strategy.name, len(DOMAINS.get(c.strategy.name, ())) > 1
    return [
        (
            paired and c.cache.features != "off",
            f"--cache.features keeps what a frozen prefix computes, and under {name} everything trains: leave it off",
        ),
        (
            paired and c.data.mix_at == "cut" and c.data.mixup > 0,
            f"--data.mix-at cut would mix source and target, which {name} tells apart: mix at input",
        ),
        (
            name == "mmd" and _smallest_pass(c) < 2,
            f"--data.batch-size {c.data.batch_size} gives a worker one image of each domain at a time, and the "
            "unbiased MMD needs two: use a larger batch, or less --train.accumulate",
        ),
    ]


def _smallest_pass(c: RunConfig) -> int:
    """Images of a worker's smallest pass, over all numbers of workers that the run may have."""
    most, batch = max(c.launch.most, 1), c.data.batch_size
    limit = max(-(-(batch // most) // max(c.train.accumulate, 1)), 1)
    shares = [batch // n for n in range(max(c.launch.least, 1), most + 1) if batch % n == 0]
    return min((share // -(-share // limit) for share in shares if share), default=batch)


def _cache_rules(c: RunConfig) -> list[Rule]:
    """Features can be kept only of what is the same each time."""
    kind, mixed = c.cache.features, c.data.mixup > 0 or c.data.cutmix > 0
    known = kind in ("off", "exact") or re.fullmatch(r"views:[1-9]\d{0,3}", kind) is not None
    return [
        (not known, f"--cache.features '{kind}' is not known: give off, exact or views:K (views:4, say)"),
        (
            kind == "exact" and not augment_spec(c.data.augment).deterministic,
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
