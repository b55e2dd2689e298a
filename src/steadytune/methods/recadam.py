"""RecAdam: pull weights to their pre-trained values, strongly at first and less and less as training goes on.

lambda(t) = 1 / (1 + exp(-k (t - t0)))                     t = 1, 2, ... optimizer steps
W <- W + lambda * update                                   of the optimizer, without decay
W <- W - lr * (1 - lambda) * gamma * (W - W0)              the gradient of gamma / 2 * ||W - W0||^2
W <- W - lr * weight_decay * W
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from ..core import Method, Run, Scope, Weight, Within, select
from ..core.facts import Cost, Paper
from ..functional import anneal
from .bases.groups import peak_rate, take_decay


@dataclass
class RecAdam(Method):
    """Weigh the task's update against a pull to the pre-trained weights; the task's weight grows to 1 over training.

    Args:
        gamma: Strength of the pull. ``lr * gamma`` must stay below 1, because a larger step would overshoot the
            pre-trained weight.
        t0: Moment at which the task and the pull weigh the same; ``unit`` says what it counts.
        k: Steepness of the change at ``t0``, per unit. The task's weight goes from 0.1 to 0.9 within 4.4 / k units.
        unit: What ``t0`` and ``k`` count: the whole ``"training"``, or ``"steps"`` as in the authors' code. With their
            values (t0 from 100 to 1000, k from 0.05 to 1), a short training never ends the pull.
        schedule: Weight of the task: ``"sigmoid"`` as above, ``"linear"``: min(1, t / t0), or ``"constant"``: 1, so
            that the pull never acts.
        scope: Weights that are pulled. Those without a pre-trained value train as usual.
        replace_decay: Whether the optimizer's weight decay is applied after the pull, to all weights, as above. False
            leaves it to the optimizer.

    Works with any optimizer, which need not be Adam. A weight that was frozen when the training began has no anchor: if
    it is unfrozen on the way, it decays as all others and is not pulled.

    Departures:
        ``t0`` and ``k`` are shares of the training by default. A learning rate at which the pull diverges is an error;
        the authors' own default, 1e-3 with gamma = 5000, is one. There is no ``anneal_w``, with which the authors' code
        multiplies both the task's update and the pull, and which is 1 by default there: a parameter group for these
        weights with the learning rate ``anneal_w * lr`` and the weight decay ``weight_decay / anneal_w`` gives the
        same steps.

    Raises:
        ValueError: In attach, for ``lr * gamma >= 1``.
    """

    gamma: Annotated[float, Within("[0, inf)")] = 5000.0
    t0: Annotated[float, Within("[0, inf)")] = 0.2
    k: Annotated[float, Within("[0, inf)")] = 40.0
    unit: Literal["training", "steps"] = "training"
    schedule: Literal["sigmoid", "linear", "constant"] = "sigmoid"
    scope: Scope = "all"
    replace_decay: bool = True

    null: ClassVar = {"schedule": "constant", "replace_decay": False}
    exclusive: ClassVar = "anchor"
    conflicts: ClassVar[tuple[str, ...]] = ("adapters, which have no pre-trained value",)
    cost: ClassVar = Cost(held={"": 4})
    paper: ClassVar = Paper(
        authors=("Sanyuan Chen", "Yutai Hou", "Yiming Cui", "Wanxiang Che", "Ting Liu", "Xiangzhan Yu"),
        title="Recall and Learn: Fine-tuning Deep Pretrained Language Models with Less Forgetting",
        booktitle="Proceedings of the 2020 Conference on Empirical Methods in Natural Language Processing",
        venue="EMNLP",
        year=2020,
        arxiv="2004.12651",
    )

    @property
    def needs_steps(self) -> bool:
        return self.unit == "training" and self.schedule != "constant"

    def ignores_unread(self, table: Weight) -> bool:
        return not table.group["weight_decay"] or not (self.replace_decay or self.acts_on(table))

    def setup(self, run: Run) -> None:
        self.pulled = {w.name for w in run.require(self, self.scope, reference=True)}
        self.decay: dict[str, float] = {}  # what the optimizer would have decayed
        self.before: list[torch.Tensor] = []  # pulled weights before the step under way

    def attach(self, run: Run) -> None:
        weights = run.weights()
        lr = max((peak_rate(w.group) for w in weights if w.name in self.pulled), default=0.0)
        if lr * self.gamma >= 1 and self.schedule != "constant":
            raise ValueError(
                f"RecAdam needs lr * gamma below 1, got {lr:g} * {self.gamma:g} = {lr * self.gamma:g}: the pull would "
                f"overshoot the pre-trained weights. Choose gamma below {1 / lr:g}, or a smaller learning rate"
            )
        if self.replace_decay:
            self.decay = take_decay(run)

    def task_share(self, run: Run) -> float:
        """Lambda of the step under way."""
        if self.schedule == "constant":
            return 1.0
        unit = run.steps(self) if self.unit == "training" else 1
        return anneal(run.index + 1, self.t0 * unit, self.k / unit, self.schedule)

    def pulled_of(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights that are pulled in this step."""
        return [w for w in select(weights, self.scope) if w.name in self.pulled and w.grad is not None]

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        share = self.task_share(run)
        self.before = [w.data.clone() for w in self.pulled_of(weights)] if share < 1 else []

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        share = self.task_share(run)
        for w, before in zip(self.pulled_of(weights) if self.before else [], self.before, strict=True):
            w.data.lerp_(before, 1 - share)
            w.data.lerp_(run.reference(w.name), w.group["lr"] * (1 - share) * self.gamma)
        self.before = []
        for w in weights if self.where is None else run.weights():  # taken over from the optimizer: also beyond `only`
            if self.decay.get(w.name) and w.grad is not None:
                w.data.mul_(1 - w.group["lr"] * self.decay[w.name])
