"""ZeRO through DeepSpeed: each worker keeps a share of the optimizer, of the gradients, and of the weights.

Rajbhandari et al. (2020): stage 1 shards the optimizer's state, stage 2 the gradients too, stage 3 the weights too.
DeepSpeed is imported here alone, when the first engine is built. Its private names that this file uses are listed in
docs/engines.md; tests/distributed/test_engines.py runs them all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from tldist import dist
from tldist.config import OptimConfig
from tldist.engine.base import HeldBytes, Numerics, Stepped, stored_bytes
from tldist.objectives.base import Objective, StepOutput, Targets
from tldist.optim import OptimizerState, build_optimizer, parameter_groups, set_learning_rates
from tldist.plans import Phase

_WHOLE = -1
"""Stands among the modules that use a parameter while `whole` holds it, so that no forward pass releases it."""


class _Pass(nn.Module):
    """The objective's forward under our autocast: DeepSpeed switches off one that it finds around its own."""

    def __init__(self, objective: Objective, numerics: Numerics) -> None:
        super().__init__()
        self.objective = objective
        self.numerics = numerics

    def forward(self, features: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        with self.numerics.autocast():
            output: StepOutput = self.objective(features, targets)
        return output.loss, output.logits


class ZeroEngine:
    """One phase's objective in DeepSpeed, with the optimizer that the other engines use.

    Weights that train stay fp32, and so does what is communicated, as under DDP.
    """

    def __init__(
        self,
        objective: Objective,
        phase: Phase,
        config: OptimConfig,
        numerics: Numerics,
        state: OptimizerState | None = None,
        *,
        stage: int = 1,
        offload: bool = False,
    ) -> None:
        self.objective, self.config, self.numerics, self.stage = objective, config, numerics, stage
        self.deepspeed = import_deepspeed(numerics.device)
        self.made_group = join_group(numerics.device)
        self.untouched = _Untouched(objective)
        self.parameters = dict(objective.parameters_by_stage())
        groups = regroup(parameter_groups(self.parameters.items(), phase, config), state or {})
        self.names = [name for group in groups for name in group["names"]]
        self.optimizer = build_optimizer(groups, config)
        self.clips = stage < 3 and not offload
        self.engine: Any = self.deepspeed.initialize(
            args=SimpleNamespace(device_rank=numerics.device.index or 0),
            model=_Pass(objective, numerics),
            optimizer=self.optimizer,
            config=settings(stage, 0.0 if self.clips else config.clip_norm, not self.clips, offload),
        )[0]
        self.zero = self.engine.optimizer
        if stage == 3:
            for module in objective.modules():
                for parameter in getattr(module, "reads", ()):
                    self.deepspeed.zero.register_external_parameter(module, parameter)
        if not offload:
            self._step_in_place()
        self._load(state or {})

    # What a step does

    def forward_backward(
        self, features: Tensor, targets: Targets, share: float = 1.0, reduce: bool = True
    ) -> StepOutput:
        """features: what the prefix returned; the loss is the mean over the pass's images."""
        self.engine.set_gradient_accumulation_boundary(reduce)
        if self._scale_is_deepspeeds:
            self.zero.override_loss_scale(self._scale().item())
        loss, logits = self.engine(features, targets)
        scaled = loss if share == 1.0 else loss * share
        scaled = scaled if self._scale_is_deepspeeds else self.numerics.scaler.scale(scaled)
        self.engine.backward(scaled, scale_wrt_gas=False)
        return StepOutput(loss.detach(), logits.detach())

    @property
    def _scale_is_deepspeeds(self) -> bool:
        return self.numerics.scaler.is_enabled() and not self.clips

    def _scale(self) -> Tensor:
        return self.numerics.scaler.scale(torch.ones((), device=self.numerics.device))

    def step(self, factor: float) -> Stepped:
        """Stages 1 and 2 clip, and leave a step out, in the fused optimizer, as SingleEngine does: no host sync.

        Stage 3 and offloading leave both to DeepSpeed, which asks the device whether the norm is finite. The norm is
        that of all shares, so all workers decide alike.
        """
        set_learning_rates(self.optimizer, self.config.base_lr, factor)
        if self.clips:
            stepped = self._prepare()
            self.engine.step()
        else:
            self.engine.step()
            stepped = Stepped(self._scalar(float(self.zero.overflow)), self._scalar(self.zero._global_grad_norm))
        if self.numerics.scaler.is_enabled():
            _tell(self.numerics.scaler, stepped.skipped)
        return stepped

    def _scalar(self, value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=self.numerics.device)

    def _prepare(self) -> Stepped:
        """Tell the fused optimizer what to divide the gradients by, and whether to leave the step out."""
        shares = list(_tensors(self.zero.averaged_gradients))
        norm = dist.all_sum(nn.utils.get_total_norm(shares).square()).sqrt()
        skipped = 1.0 - torch.isfinite(norm).float()
        divisor = self._scale()
        unscaled = norm / divisor
        if self.config.clip_norm:
            divisor = divisor * ((unscaled + 1e-6) / self.config.clip_norm).clamp(min=1.0)
        self.optimizer.grad_scale, self.optimizer.found_inf = divisor, skipped  # type: ignore[attr-defined]
        return Stepped(skipped, unscaled)

    # The optimizer's state

    @property
    def _keys(self) -> tuple[str, ...]:
        """Of the tensors that the optimizer keeps for each weight."""
        if self.config.name == "adamw":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.config.momentum else ()

    def _partitions(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """This worker's flat shares of the fp32 weights, as the optimizer steps them, and the group of each."""
        groups = self.optimizer.param_groups
        if self.stage < 3:
            return list(zip(self.zero.single_partition_of_fp32_groups, groups, strict=True))
        flats = self.zero.fp32_partitioned_groups_flat
        return [(flat, groups[self.zero.sub_group_to_group_id[i]]) for i, flat in enumerate(flats)]

    def _step_in_place(self) -> None:
        """Weights are fp32 already: what is stepped need not be the copy that DeepSpeed makes for low precision."""
        if self.stage < 3:
            shares = [parts[dist.rank()] for parts in self.zero.parallel_partitioned_bit16_groups]
        else:
            shares = self.zero.fp16_partitioned_groups_flat
        for (flat, _), share in zip(self._partitions(), shares, strict=True):
            flat.data = share.data

    def _load(self, state: OptimizerState) -> None:
        """DeepSpeed makes the state at the first step and links only the first group's: make and link all of it."""
        for flat, group in self._partitions():
            made = {key: torch.zeros_like(flat, requires_grad=False) for key in self._keys}
            if self.config.name == "adamw":
                made["step"] = torch.tensor(group["step_at_start"], device=flat.device)
            self.optimizer.state[flat] = made
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
        for name in self.names:
            for key in self._keys if name in state else ():
                self._set(self.parameters[name], key, state[name][key])

    def _set(self, parameter: Any, key: str, value: Tensor) -> None:
        """One parameter's part of the state; each worker takes its share. Stage 3's own call knows no padding."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(parameter.device)
        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        size = parameter.ds_tensor.numel()
        padded = value.new_zeros(size * dist.world_size())
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(parameter, padded[dist.rank() * size :][:size], key)

    def optimizer_state(self) -> OptimizerState:
        """Copies, gathered one parameter after the other."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: OptimizerState = {}
        for flat, group in self._partitions():
            step = self.optimizer.state[flat].get("step")
            for name in group["names"]:
                found[name] = {} if step is None else {"step": step.clone()}
                for key in self._keys:
                    tensor = safe_get_full_optimizer_state(self.parameters[name], key)
                    assert tensor is not None, f"DeepSpeed has no {key} of '{name}'"
                    found[name][key] = tensor
        return found

    # The weights

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Stage 3 gathers the weights and keeps them until the end of the block."""
        if self.stage < 3:
            yield
            return
        held = list(self.parameters.values())
        with self.deepspeed.zero.GatheredParameters(held):
            for parameter in held:
                parameter.ds_active_sub_modules.add(_WHOLE)  # type: ignore[attr-defined]
            try:
                yield
            finally:
                for parameter in held:
                    parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]

    def held_bytes(self) -> HeldBytes:
        """Between the last backward pass and the step."""
        zero, parameters = self.zero, list(self.parameters.values())
        flats = [flat for flat, _ in self._partitions()]
        gradients = [p.grad for p in parameters] + list(_tensors(zero.averaged_gradients))
        if self.stage < 3:
            weights = [*parameters, *zero.bit16_groups_flat, *flats]
            gradients += [bucket for each in zero.ipg_buckets.values() for bucket in each.buffer]
        else:
            weights = [*parameters, *(p.ds_tensor for p in parameters), *flats]  # type: ignore[attr-defined]
            gradients.append(zero.grad_partitions_flat_buffer)
        return HeldBytes(
            stored_bytes(weights), stored_bytes(gradients), stored_bytes(_tensors(list(self.optimizer.state.values())))
        )

    def close(self) -> None:
        """Give the module its whole, ordinary parameters back."""
        from deepspeed.runtime.zero import parameter_offload

        with self.whole():
            values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.engine.destroy()
        self.engine.optimizer = None  # collected later, it would destroy once more: what the next engine has linked
        parameter_offload.FWD_MODULE_STACK.clear()
        self.untouched.restore(values)
        del self.engine, self.zero, self.optimizer
        if self.made_group:
            dist.close()


def regroup(groups: list[dict[str, Any]], state: OptimizerState) -> list[dict[str, Any]]:
    """The same parameters in few groups of one rate, decay and count of steps, of up to BUCKET weights.

    A group becomes one flat tensor, with one collective to gather it and one counter for Adam's bias correction.
    """
    open_, made = {}, []
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            step = float(state.get(name, {}).get("step", 0.0))
            own = {"multiple": group["multiple"], "weight_decay": group["weight_decay"], "step_at_start": step}
            key = tuple(own.values())
            if key not in open_ or sum(p.numel() for p in open_[key]["params"]) + parameter.numel() > BUCKET:
                open_[key] = {"params": [], "names": [], **own}
                made.append(open_[key])
            open_[key]["params"].append(parameter)
            open_[key]["names"].append(name)
    return made


BUCKET = 2**23
"""Weights of a group, which one collective gathers. Gathering 25 million at once took gloo twice as long."""
REDUCE_BUCKET = 2**22
"""Gradients that are reduced together, and wait for it in a buffer."""


def settings(stage: int, clip_norm: float, compute_norm: bool, offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    sharding: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": REDUCE_BUCKET,
        # DeepSpeed scatters by an all-reduce of copies of the shares; without, it reduces the bucket in place.
        "reduce_scatter": stage == 3,
        "compute_grad_norm": compute_norm,
    }
    if stage == 3:
        # The defaults keep what comes back within 1e9 weights and fetch 5e7 ahead: all of most vision models. Fetching
        # 1e6 ahead still held all of a ResNet-50 when its backward pass began; without, 66,000 weights lie about.
        sharding |= {
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 10_000,
        }
    if offload:
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,  # counts samples for DeepSpeed's log, which is off
        "gradient_clipping": clip_norm,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": sharding,
    }


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, silent, and without the operator that it compiles at first use on CPUs (a minute, for one machine)."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    __compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu":
        from deepspeed.runtime.zero import stage_1_and_2

        stage_1_and_2.all_gather_dp_groups = _gather_by_broadcasts
    return deepspeed


def _gather_by_broadcasts(
    groups_flat: list[Tensor],
    partitioned_param_groups: list[list[Tensor]],
    dp_process_group: list[Any],
    **_: Any,
) -> None:
    """Stand-in for DeepSpeed's all-gather of the stepped weights: gloo broadcasts twice as fast as it gathers.

    Two ranks of one Zen 5 core each: 36 ms for 100 MB, against 75 ms.
    """
    shares = [
        (rank, share, group)
        for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True)
        for rank, share in enumerate(parts)
    ]
    works = [td.broadcast(share, group=group, group_src=rank, async_op=True) for rank, share, group in shares]
    for work in works:
        assert work is not None
        work.wait()


_joined: list[Any] = []


def join_group(device: torch.device) -> bool:
    """Let DeepSpeed work in the process group that exists, and forget an earlier one; a lone worker makes its own.

    Returns whether this call made the group.
    """
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    made = dist.join_alone(device)
    world = td.group.WORLD
    if _joined != [world]:
        groups._release_process_group_references()
        comm.cdb = None
        _joined[:] = [world]
    return made


class _Untouched:
    """The module as DeepSpeed found it: its parameters' memory formats, and no attributes of DeepSpeed's."""

    def __init__(self, objective: Objective) -> None:
        self.parameters = dict(objective.parameters_by_stage())
        self.strides = {name: p.stride() for name, p in self.parameters.items()}
        self.own = {owner: set(vars(owner)) for owner in (*objective.modules(), *self.parameters.values())}
        for p in self.parameters.values():
            # What flat shares can be made of; contiguous() would keep the strides of a 1x1 kernel.
            p.data = torch.empty(p.shape, dtype=p.dtype, device=p.device).copy_(p.data)

    def restore(self, values: dict[str, Tensor]) -> None:
        """Take DeepSpeed's attributes away, and give each parameter its value in storage of its own."""
        for owner, own in self.own.items():
            if isinstance(owner, nn.Module):
                owner._parameters = dict(owner._parameters)
            for name in set(vars(owner)) - own:
                delattr(owner, name)
        for name, parameter in self.parameters.items():
            value = values[name]
            parameter.data = torch.empty_strided(value.shape, self.strides[name], device=value.device).copy_(value)
            parameter.grad = None


def _tell(scaler: torch.amp.GradScaler, skipped: Tensor) -> None:
    """Let torch's scaler learn from one number what it would find in all gradients."""
    probe = nn.Parameter(torch.zeros_like(skipped))
    probe.grad = torch.where(skipped > 0, torch.inf, 0.0)
    scaler.unscale_(torch.optim.SGD([probe], lr=0.0))
    scaler.update()


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)
