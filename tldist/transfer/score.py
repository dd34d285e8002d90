"""Which pre-trained network to start from, without training any: LogME and a linear probe on its features.

Each network's features of the target's images are computed once, by the frozen prefix that feature extraction would
train a head on, and kept in the feature cache (`--cache.dir` for later calls).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tldist import dist
from tldist.config import CacheConfig, EngineConfig, LaunchConfig, RunConfig, StrategyConfig, UserError
from tldist.models.prefix import Prefix
from tldist.tracking.events import EventLog
from tldist.train import worker
from tldist.train.inputs.inputs import CachedInputs, open_inputs
from tldist.train.phase import freeze
from tldist.train.run import Run


@dataclass(frozen=True)
class Score:
    """How well a network's features fit the target, as it comes."""

    model: str
    weights: str
    dimensions: int
    logme: float
    """Log evidence per image and class; higher is better. Comparable between models on the same images alone."""
    probe_top1: float
    """Of a logistic regression fitted to the training images' features, on the validation images."""
    seconds: float


def logme(features_ND: np.ndarray, labels_N: np.ndarray) -> float:
    """LogME: the log evidence of a Bayesian linear model of the labels (You et al., 2021, algorithm 1), per image.

    For each class, y = F w + noise with w ~ N(0, 1/alpha) and noise ~ N(0, 1/beta); alpha and beta are those that
    maximise the evidence, found by its fixed-point iteration (eq. 3) in the features' singular basis. The mean over
    classes.
    """
    f = np.asarray(features_ND, dtype=np.float64)
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    classes = np.unique(labels_N)
    return float(np.mean([_evidence(u, s * s, f.shape[1], (labels_N == k).astype(np.float64)) for k in classes]))


_TINY = 1e-12


def _evidence(u_NR: np.ndarray, sigma_R: np.ndarray, dimensions: int, y_N: np.ndarray, most: int = 500) -> float:
    """max over alpha, beta of log p(y | F) / n; sigma: squared singular values of F.

    Features that fit every label (no fewer dimensions than images) may let beta grow without end; the evidence does
    not, and the iteration ends where another step would no longer change it.
    """
    n, z2_R = len(y_N), (u_NR.T @ y_N) ** 2
    outside = max(float(y_N @ y_N - z2_R.sum()), 0.0)  # of y, what no direction of F reaches
    alpha = beta = 1.0
    for _ in range(most):
        ratio = max(alpha / beta, _TINY * float(sigma_R.max()))
        m2, residual = _fit(sigma_R, z2_R, outside, ratio)
        gamma = float((sigma_R / (sigma_R + ratio)).sum())
        rest = n - len(sigma_R) + float((ratio / (sigma_R + ratio)).sum())  # n - gamma, which would cancel
        before, alpha, beta = ratio, gamma / max(m2, _TINY), rest / max(residual, _TINY)
        if abs(alpha / beta / before - 1) < 1e-8:
            break
    m2, residual = _fit(sigma_R, z2_R, outside, alpha / beta)
    log_det = float(np.log(alpha + beta * sigma_R).sum()) + (dimensions - len(sigma_R)) * np.log(alpha)
    value = n * np.log(beta) + dimensions * np.log(alpha) - n * np.log(2 * np.pi)
    return float(0.5 * (value - beta * residual - alpha * m2 - log_det) / n)


def _fit(sigma_R: np.ndarray, z2_R: np.ndarray, outside: float, ratio: float) -> tuple[float, float]:
    """|m|^2 and |F m - y|^2 of the posterior's mean m; ratio: alpha / beta."""
    spread2_R = (sigma_R + ratio) ** 2
    return float((sigma_R * z2_R / spread2_R).sum()), float((z2_R * ratio**2 / spread2_R).sum()) + outside


def probe(train_ND: np.ndarray, train_labels_N: np.ndarray, val_ND: np.ndarray, val_labels_N: np.ndarray) -> float:
    """Top-1 of scikit-learn's logistic regression on features of mean 0 and deviation 1."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(classifier.fit(train_ND, train_labels_N).score(val_ND, val_labels_N))


def candidate(settings: RunConfig, text: str, run_dir: Path) -> RunConfig:
    """The run that would give a head the features of NAME or NAME:WEIGHTS (a file, or a name of torchvision's)."""
    name, _, weights = text.partition(":")
    return replace(
        settings,
        run_dir=str(run_dir),
        model=replace(settings.model, name=name, weights=weights or "default"),  # type: ignore[arg-type]
        strategy=StrategyConfig(name="feature_extraction"),
        data=replace(settings.data, augment="none", mixup=0.0, cutmix=0.0),
        optim=replace(settings.optim, l2_sp=0.0, ewc=0.0, ewc_from=()),
        train=replace(settings.train, compile="off", ema=0.0),
        cache=CacheConfig(features="exact", dir=settings.cache.dir, gib=settings.cache.gib),
        engine=EngineConfig(),
        launch=LaunchConfig(),
    )


def score(settings: RunConfig) -> Score:
    """Of one `candidate`, whose run directory exists. Raises UserError."""
    started = time.perf_counter()
    (train_ND, train_N), (val_ND, val_N) = features(settings)
    fit = logme(train_ND, train_N)
    top1 = probe(train_ND, train_N, val_ND, val_N)
    seconds = round(time.perf_counter() - started, 1)
    return Score(settings.model.name, settings.model.weights, train_ND.shape[1], fit, top1, seconds)


def features(settings: RunConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """(features_ND in fp32, labels_N) of the training and the validation images. Raises UserError."""
    device = dist.local_device()
    with worker.process_settings(device):
        torch.set_num_threads(dist.cores())
        return _features(worker.build(settings, device, EventLog(None)))


def _features(run: Run) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        phase = run.plan.phases[0]
        freeze(run.model, phase)
        frozen, _ = run.model.cut(run.plan.cut(0))
        inputs = open_inputs(run, frozen, Prefix(frozen, run.numbers.dtype))
        if not isinstance(inputs, CachedInputs):
            raise UserError(
                "there is no room for the features: raise --cache.gib, name another --cache.dir, or take fewer images "
                "with --data.train-images-per-class"
            )
        found = [_of(inputs, name) for name in ("train", "val")]
        inputs.close()
        return found
    finally:
        run.train_loader.close()
        run.eval_loader.close()
        run.saver.close()


def _of(inputs: CachedInputs, split: str) -> tuple[np.ndarray, np.ndarray]:
    images = inputs.splits[split].layout.images
    ids = np.setdiff1d(np.arange(images), list(inputs.missing[split]))
    kept = inputs.splits[split]
    rows = torch.from_numpy(ids).to(kept.device if kept.resident else "cpu")
    features = kept.rows(0, rows).flatten(1).float().cpu().numpy()
    return features, inputs.labels[split].cpu().numpy()[ids]
