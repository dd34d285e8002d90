"""What a run tells of itself: its first line, its plan as plain values, the numbers of summary.json."""

from __future__ import annotations

import json
import time
from typing import Any

from tldist import dist
from tldist.data.source.index import Index
from tldist.engine import engine_kind
from tldist.models.backbones import StagedModel
from tldist.plans import Plan
from tldist.tracking.environment import environment
from tldist.tracking.wandb import WandbSink
from tldist.train.fit import speed
from tldist.train.metrics import Window, count_parameters
from tldist.train.resume import FitResult
from tldist.train.run import Run


def announce(parts: Run, sink: WandbSink | None = None) -> None:
    """Write environment.json and the run's first line."""
    if not dist.is_main():
        return
    (parts.run_dir / "environment.json").write_text(json.dumps(environment(), indent=1))
    if sink is not None and (told := parts.run_dir / "config.yaml").exists():
        sink.write({"event": "files", "name": "config", "paths": [str(told)], "aliases": []})
    settings, index, plan = parts.config, parts.index, parts.plan
    parts.log.write(
        "run",
        recipe=settings.recipe,
        strategy=settings.strategy.name,
        model=settings.model.name,
        engine=engine_kind(settings.engine, dist.world_size()),
        world_size=dist.world_size(),
        epochs=plan.epochs,
        steps_per_epoch=parts.steps_per_epoch,
        total_steps=plan.epochs * parts.steps_per_epoch,
        train_images=len(index.train.paths),
        val_images=len(index.val.paths),
        skipped_images=len(bad_at_check(index)),
        classes=list(index.classes),
        peak_flops=describe_peak(parts),
        plan=describe_plan(plan, settings.optim.base_lr, parts.model),
    )
    for skipped in () if (parts.saver.folder / "last").exists() else index.skipped:
        parts.log.write("notice", text=f"skipped {skipped.path}: {skipped.reason}")


def describe_plan(plan: Plan, base_lr: float, model: StagedModel) -> list[dict[str, Any]]:
    """The plan as plain values: per phase each stage's highest peak learning rate (0.0: frozen) and what trains."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return [
        {
            "phase": i,
            "name": phase.name,
            "epochs": phase.epochs,
            "patience": phase.patience,
            "stages": {stage: base_lr * phase.stages.get(stage, 0.0) for stage in plan.stages},
            "trainable_params": sum(size for name, size in sizes.items() if phase.multiple(name) > 0),
            "prefix": list(plan.stages[: plan.cut(i)]),
        }
        for i, phase in enumerate(plan.phases)
    ]


def summarize(parts: Run, result: FitResult, sink: WandbSink | None, started: float) -> dict[str, Any]:
    """The numbers of summary.json."""
    settings, state = parts.config, result.state
    total = sum((phase.window for phase in result.phases), Window())
    per_image = sum(phase.window.images * phase.flops_per_image for phase in result.phases) / max(total.images, 1)
    per_phase = describe_phases(parts, result)
    return {
        "recipe": settings.recipe,
        "strategy": settings.strategy.name,
        "model": settings.model.name,
        "engine": engine_kind(settings.engine, dist.world_size()),
        "world_size": dist.world_size(),
        "seed": settings.seed,
        "epochs": state.epoch,
        "phases": len(result.phases),
        "per_phase": per_phase,
        "train_images": len(parts.index.train.paths),
        "target_images": 0 if parts.index.target is None else len(parts.index.target),
        "val_images": len(parts.index.val.paths),
        "skipped_images": len(bad_at_check(parts.index) | parts.bad_images.reasons.keys()),
        "data_fingerprint": parts.index.fingerprint,
        "val_top1": state.val_top1,
        "best_val_top1": state.best_val_top1,
        "best_epoch": state.best_epoch,
        "images_per_s": round(total.images_per_s, 1),
        "data_wait_share": round(total.data_wait_share, 4),
        **speed(parts, total, per_image),
        "peak_flops": describe_peak(parts),
        "trainable_params": per_phase[-1]["trainable_params"],
        "total_params": count_parameters(dict(parts.model.named_parameters())),
        "replica_spread": result.replica_spread,
        "peak_mem_gib": max(phase["peak_mem_gib"] for phase in per_phase),
        "seconds_to_best": state.seconds_to_best,
        "restored_epoch": result.restored_epoch,
        "wall_s": round(time.time() - started, 2),
        "skipped_steps": state.skipped_steps,
        "resumed_from": result.resumed_from,
        "wandb_run_id": sink.run_id if sink is not None else None,
    }


def describe_peak(parts: Run) -> dict[str, Any]:
    """What a worker's device could do, and how that is known."""
    return {"tflops": round(parts.peak[0] / 1e12, 3), "source": parts.peak[1]}


def describe_phases(parts: Run, result: FitResult) -> list[dict[str, Any]]:
    """What each phase that ran did and cost."""
    planned = describe_plan(parts.plan, parts.config.optim.base_lr, parts.model)
    return [
        {
            "name": planned[phase.index]["name"],
            "epochs": phase.epochs,
            "trainable_params": planned[phase.index]["trainable_params"],
            "images_per_s": round(phase.window.images_per_s, 1),
            "data_wait_share": round(phase.window.data_wait_share, 4),
            "gflops_per_image": phase.flops_per_image / 1e9,
            **speed(parts, phase.window, phase.flops_per_image),
            "peak_mem_gib": round(phase.peak_mem_gib, 3),
            "compile_s": round(phase.compile_s, 2),
            "cache_fill_s": round(phase.cache_fill_s, 2),
        }
        for phase in result.phases
    ]


def bad_at_check(index: Index) -> set[str]:
    """Paths of the images that the index left out."""
    return {item.path for item in index.skipped if item.is_bad_image}
