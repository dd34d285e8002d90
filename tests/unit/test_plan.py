"""Every strategy's phases, and what becomes of them: groups, rates, carried state."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from tldist.config import STRATEGIES, ModelConfig, OptimConfig, StrategyConfig, StrategyName, UserError
from tldist.engine import numerics
from tldist.engine.single import SingleEngine
from tldist.models import backbones
from tldist.objectives.base import Targets
from tldist.objectives.supervised import Supervised
from tldist.optim import OptimizerState, parameter_groups, schedule_factor
from tldist.plans import Phase, Plan, build_plan
from tldist.train.phase import freeze

STAGES = backbones.stage_names("resnet18")


def plan(name: StrategyName, epochs: int = 12, **options: float) -> Plan:
    return build_plan(StrategyConfig(name=name, **options), STAGES, epochs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("epochs", [2, 3, 12, 30])
def test_every_plan_lasts_its_epochs_and_trains_a_tail(name: StrategyName, epochs: int) -> None:
    made = plan(name, epochs)
    assert made.epochs == epochs
    assert made.pretrained == (name != "scratch")
    for index, phase in enumerate(made.phases):
        assert phase.epochs > 0
        assert tuple(phase.stages) == STAGES[made.cut(index) :]
        assert phase.multiple("head") > 0
    assert [made.first_epoch(i) for i in range(len(made.phases))] == [
        sum(phase.epochs for phase in made.phases[:i]) for i in range(len(made.phases))
    ]


def test_gradual_unfreezes_top_down_stem_included() -> None:
    """Lecture 4.3 says top-down; its code goes the other way and forgets the stem."""
    made = plan("gradual", 12, epochs_per_stage=2)
    assert [next(iter(phase.stages)) for phase in made.phases] == list(reversed(STAGES))
    assert tuple(made.phases[0].stages) == ("head",)


def test_gradual_with_few_epochs_stops_early() -> None:
    assert [p.epochs for p in plan("gradual", 5, epochs_per_stage=2).phases] == [2, 3]


def test_discriminative_decay_is_the_lectures_formula() -> None:
    """lr_l = lr_base * decay^(L-1-l); the lecture's code also divides by L-1."""
    (phase,) = plan("discriminative", decay=0.5).phases
    assert [phase.multiple(s) for s in STAGES] == [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]


def test_partial_and_two_phase() -> None:
    (phase,) = plan("partial", backbone_lr=0.1).phases
    assert phase.multiples == (("layer4", 0.1), ("head", 1.0))
    first, second = plan("two_phase", 30, second_phase_lr=0.01).phases
    assert (first.epochs, second.epochs) == (20, 10)
    assert tuple(first.stages) == ("layer4", "head")
    assert second.multiple("head") == 0.01


@pytest.mark.parametrize(
    ("name", "options", "epochs", "says"),
    [
        ("partial", {"trainable_stages": 9}, 3, "the model has 6 stages"),
        ("two_phase", {}, 1, "needs at least 2 epochs"),
    ],
)
def test_plans_that_cannot_be(name: StrategyName, options: dict[str, float], epochs: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan(name, epochs, **options)


class TestSchedule:
    def factors(self, made: Plan, **options: object) -> list[float]:
        config = OptimConfig(**options)  # type: ignore[arg-type]
        steps = 10
        phases = [i for i, phase in enumerate(made.phases) for _ in range(phase.epochs * steps)]
        return [schedule_factor(config, made, phase, step, steps) for step, phase in enumerate(phases)]

    def test_warmup_rises_then_cosine_falls_to_its_end(self) -> None:
        values = self.factors(plan("full", 10), warmup_epochs=1.0, final_lr=0.1)
        assert all(a < b for a, b in pairwise(values[:10]))
        assert all(a > b for a, b in pairwise(values[11:]))
        assert values[0] == pytest.approx(1 / 11)
        assert values[-1] == pytest.approx(0.1, abs=0.01)

    def test_two_phase_restarts_and_gradual_does_not(self) -> None:
        two = self.factors(plan("two_phase", 9), warmup_epochs=0)
        assert two[60] == 1.0
        assert two[59] < 0.01
        gradual = self.factors(plan("gradual", 12), warmup_epochs=0)
        assert all(a > b for a, b in pairwise(gradual))

    def test_constant(self) -> None:
        assert set(self.factors(plan("full", 3), schedule="constant", warmup_epochs=0)) == {1.0}

    def test_warmup_never_takes_more_than_half_a_phase(self) -> None:
        values = self.factors(plan("gradual", 6), warmup_epochs=5)
        assert max(values[5:10]) > 0.5


class TestGroups:
    def groups(self, phase: Phase, config: OptimConfig | None = None) -> list[dict[str, object]]:
        model = backbones.build(ModelConfig(weights="none"), 3, 32, 0)
        freeze(model, phase)
        return parameter_groups(model.named_parameters(), phase, config or OptimConfig())

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_every_trainable_parameter_once_and_no_frozen_one(self, name: StrategyName) -> None:
        model = backbones.build(ModelConfig(weights="none"), 3, 32, 0)
        for phase in plan(name).phases:
            names = [n for group in self.groups(phase) for n in group["names"]]  # type: ignore[union-attr]
            assert sorted(names) == sorted(n for n, _ in model.named_parameters() if n.split(".")[0] in phase.stages)

    def test_no_decay_on_biases_and_norms(self) -> None:
        for group in self.groups(plan("full").phases[0], OptimConfig(weight_decay=0.3)):
            assert all((p.ndim > 1) == (group["weight_decay"] == 0.3) for p in group["params"])  # type: ignore[union-attr]

    def test_a_parameter_outside_the_plan_is_an_error_that_names_it(self) -> None:
        model = backbones.build(ModelConfig(weights="none"), 3, 32, 0)
        phase = plan("partial").phases[0]
        freeze(model, phase)
        next(model.stages["layer2"].parameters()).requires_grad_(True)
        with pytest.raises(ValueError, match=r"layer2\.0\.conv1\.weight"):
            parameter_groups(model.named_parameters(), phase, OptimConfig())


def engine_for(
    model: backbones.StagedModel, made: Plan, index: int, config: OptimConfig, state: OptimizerState | None = None
) -> SingleEngine:
    phase = made.phases[index]
    freeze(model, phase)
    _, network = model.cut(made.cut(index))
    network.eval()  # no batch statistics: the two histories below must differ in nothing but the rebuild
    return SingleEngine(Supervised(network, 0.0), phase, config, numerics("fp32", torch.device("cpu")), state)


def features(model: backbones.StagedModel, boundary: int, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.cut(boundary)[0].eval()(images)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_carried_state_equals_an_optimizer_that_never_stopped(optimizer: str) -> None:
    """Three steps on the head, three on layer4 and head: through two engines, and through one torch optimizer
    that gets layer4 as a new group (what a single process without engines would do)."""
    config = OptimConfig(name=optimizer, clip_norm=0.0, weight_decay=0.05)  # type: ignore[arg-type]
    made = Plan(STAGES, (Phase("head", 1, (("head", 1.0),)), Phase("two", 1, (("layer4", 0.5), ("head", 1.0)))), 2)
    # In double precision: Adam divides by tiny moments, which would blow rounding up to something to argue about.
    images, targets = torch.randn(4, 3, 32, 32).double(), Targets(torch.tensor([0, 1, 2, 0]))

    model = backbones.build(ModelConfig(weights="none"), 3, 32, 0).double()
    carried: dict[str, dict[str, torch.Tensor]] = {}
    for index in (0, 1):
        engine = engine_for(model, made, index, config, carried)
        for _ in range(3):
            engine.forward_backward(features(model, made.cut(index), images), targets)
            engine.step(1.0)
        carried |= engine.optimizer_state()
        engine.close()

    plain = backbones.build(ModelConfig(weights="none"), 3, 32, 0).double().eval()
    never_stopped: torch.optim.Optimizer | None = None
    for index in (0, 1):
        freeze(plain, made.phases[index])
        groups = parameter_groups(plain.named_parameters(), made.phases[index], config)
        if never_stopped is None:
            if optimizer == "adamw":
                never_stopped = torch.optim.AdamW(groups, lr=config.base_lr)
            else:
                never_stopped = torch.optim.SGD(groups, lr=config.base_lr, momentum=config.momentum)
        else:
            for group in groups:
                if group["stage"] == "layer4":
                    never_stopped.add_param_group({**group, "lr": config.base_lr * 0.5})
        for _ in range(3):
            never_stopped.zero_grad()
            nn.functional.cross_entropy(plain(images), targets.labels_N).backward()
            never_stopped.step()

    assert never_stopped is not None
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        if name in carried:
            for key, value in carried[name].items():
                torch.testing.assert_close(value, never_stopped.state[theirs][key].to(value), rtol=1e-7, atol=1e-12)
    steps = {n.split(".")[0]: float(s["step"]) for n, s in carried.items() if "step" in s}
    assert steps == ({"head": 6.0, "layer4": 3.0} if optimizer == "adamw" else {})


def test_a_frozen_parameter_owns_no_optimizer_state_and_no_gradient() -> None:
    made = plan("partial")
    model = backbones.build(ModelConfig(weights="none"), 3, 32, 0)
    engine = engine_for(model, made, 0, OptimConfig())
    engine.forward_backward(features(model, made.cut(0), torch.randn(2, 3, 32, 32)), Targets(torch.tensor([0, 1])))
    engine.step(1.0)
    assert {name.split(".")[0] for name in engine.optimizer_state()} == {"layer4", "head"}
    owned = {id(p) for p in engine.optimizer.state}
    for name, parameter in model.named_parameters():
        if name.split(".")[0] not in ("layer4", "head"):
            assert id(parameter) not in owned
            assert parameter.grad is None


class TestByHand:
    """Ordered rules: the first that fits wins, and every parameter must be covered."""

    PARAMETERS = backbones.parameter_names(ModelConfig())

    def by_hand(self, *phases: str, epochs: int = 10) -> Plan:
        return build_plan(StrategyConfig(name="by_hand", phases=phases), STAGES, epochs, self.PARAMETERS)

    def test_stages_that_are_no_tail(self) -> None:
        """Surgical fine-tuning (Lee et al., 2023): the first block and the head."""
        made = self.by_hand("layer1=0.1, head=1, *=frozen")
        (phase,) = made.phases
        assert phase.multiples == (("layer1", 0.1), ("head", 1.0))
        assert (made.cut(0), made.stages[made.cut(0)]) == (1, "layer1")
        assert phase.multiple("layer2.0.conv1.weight") == 0

    def test_batchnorm_alone(self) -> None:
        """Frankle et al. (2021): the layers are found by what they are; `downsample.1` is one too."""
        made = self.by_hand("norm=1, head=1, *=frozen")
        (phase,) = made.phases
        assert phase.multiple("layer2.0.downsample.1.weight") == 1
        assert phase.multiple("layer2.0.downsample.0.weight") == 0
        assert phase.stages == dict.fromkeys(STAGES, 1.0)
        norm = [name for name, is_norm in self.PARAMETERS.items() if is_norm]
        assert len(norm) == 40
        assert [name for name, _ in phase.multiples if name != "head"] == norm

    def test_the_first_match_wins(self) -> None:
        (phase,) = self.by_hand("layer4.1.*=0.5, layer4=frozen, norm=0.2, *=1").phases
        assert phase.multiple("layer4.1.conv1.weight") == 0.5
        assert phase.multiple("layer4.0.bn1.weight") == 0
        assert phase.multiple("layer3.0.bn1.weight") == 0.2
        assert phase.multiple("layer3.0.conv1.weight") == 1

    def test_lengths(self) -> None:
        rules = "*=1"
        assert [p.epochs for p in self.by_hand(f"3: {rules}", rules, rules).phases] == [3, 3, 4]
        assert [p.epochs for p in self.by_hand(f"4: {rules}", f"6: {rules}").phases] == [4, 6]

    @pytest.mark.parametrize(
        ("phases", "says"),
        [
            ((), "give --strategy.phases"),
            (("head=1",), "says nothing about 'stem.conv1.weight'"),
            (("layr4=1, *=frozen",), "no parameter is called 'layr4' (did you mean 'layer4'?)"),
            (("head=fast, *=frozen",), "'head=fast' is no rule"),
            (("head=0, *=frozen",), "'head=0' is no rule"),
            (("head, *=frozen",), "'head' is no rule"),
            (("*=frozen",), "freezes everything"),
            (("two: *=1",), "number of epochs, not 'two'"),
            (("4: *=1", "5: *=1"), "last 9 epochs, but --train.epochs is 10"),
            (("10: *=1", "*=1"), "last at least 11 epochs"),
        ],
    )
    def test_mistakes(self, phases: tuple[str, ...], says: str) -> None:
        with pytest.raises(UserError, match=re.escape(says)):
            self.by_hand(*phases)

    def test_groups_follow_the_rules(self) -> None:
        model = backbones.build(ModelConfig(weights="none"), 3, 32, 0)
        (phase,) = self.by_hand("layer4.1.*=0.5, norm=0.2, head=1, *=frozen").phases
        freeze(model, phase)
        groups = parameter_groups(model.named_parameters(), phase, OptimConfig())
        found = {name: group["multiple"] for group in groups for name in group["names"]}
        assert found == {name: phase.multiple(name) for name in self.PARAMETERS if phase.multiple(name) > 0}
        assert {found["layer4.1.bn1.weight"], found["layer1.0.bn1.weight"]} == {0.5, 0.2}


def test_lp_ft_is_the_head_and_then_everything() -> None:
    made = plan("lp_ft", 9, second_phase_lr=0.1)
    assert [tuple(phase.stages) for phase in made.phases] == [("head",), STAGES]
    assert [phase.epochs for phase in made.phases] == [6, 3]
    assert [phase.multiple("head") for phase in made.phases] == [1.0, 0.1]


def test_gradual_on_a_plateau_has_every_stage_in_reserve() -> None:
    made = build_plan(StrategyConfig(name="gradual", unfreeze="plateau", patience=3), STAGES, 5)
    assert made.epochs == 5
    assert [phase.patience for phase in made.phases] == [3, 3, 3, 3, 3, 0]
    assert [len(phase.stages) for phase in made.phases] == [1, 2, 3, 4, 5, 6]


def test_l2_sp_takes_the_place_of_decay_but_for_the_head() -> None:
    model = backbones.build(ModelConfig(weights="none"), 3, 32, 0)
    phase = plan("full").phases[0]
    freeze(model, phase)
    groups = parameter_groups(model.named_parameters(), phase, OptimConfig(l2_sp=0.1, weight_decay=0.05))
    assert {group["stage"] for group in groups if group["weight_decay"]} == {"head"}
