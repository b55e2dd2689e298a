"""Meta-Semi: learn from texts without labels, but only from those that pull the weights where the labelled rows do.

With g the gradient of the labelled rows of a step, T a running mean of the weights, and p_i the answer of the model
at T to text i, dropout off:

    T      <- T + max(1 - decay, 1 / (t + 1)) * (W - T)     after step t
    l_i(W) = cross entropy of softmax(f_i(W)) against p_i
    s_i    = l_i(W) - l_i(W - e g)          e = reach / ||g||, the same dropout twice
    v_i    = 1 if s_i > 0, else 0           for small e: the inner product of g and the gradient of l_i is positive
    G      = g + strength * mean of v_i * gradient of l_i(W)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..core import Method, Run, Weight, Within, overrides
from ..core.facts import Cost, Paper
from ..core.step import Inputs, full, logits_of
from ..errors import UsageError
from ..heads.features import evaluating
from ..hypergradient import TINY, check_masters, length
from .bases.bilevel import Outer, OuterRows
from .bases.rows import labels_of

logger = logging.getLogger("steadytune")


@dataclass
class MetaSemi(Method):
    """Add a pseudo-label loss on unlabelled texts; leave out texts whose gradient opposes that of the labelled rows.

    Args:
        unlabelled: Function that returns batches without labels each time it is called; each process gives its own.
            `steadytune.fit` gives the texts of its option ``unlabelled``.
        strength: Weight of the texts' loss. The mean is over all texts of the batch, those that are left out too.
        decay: Share of the old mean that stays in a step, less in the first steps, which have equal shares, so that the
            mean does not stay at a random head. With 0 the answers are the model's own, from which it learns
            nothing but to do without dropout.
        reach: Length of the trial step, the norm of all moves together. Far above 0.01 the curvature decides, and
            hardly a text counts.

    A batch of texts is read in each step: once for the answers, twice for the choice, and once for the gradient.
    `kept` is the share of texts that counted so far. The method does not take part in the gradient of methods that
    repeat a step (`SAM`), which come first in the list.

    Departures:
        Written from the rule of the paper; no code of the authors was read. The labelled rows train the model too; in
        the paper they choose among the texts, and enter through mixtures of rows. The answers come from averaged
        weights; the authors average the answers to each text over the training. The length of the trial step is ours.

    Raises:
        ValueError: In setup without texts, with weights below float32, or before a method that replaces the gradient;
            in attach for sharded weights.
        UsageError: At the first step, for other labels than one class a row.
    """

    unlabelled: Outer | None = None
    strength: Annotated[float, Within("[0, inf)")] = 1.0
    decay: Annotated[float, Within("[0, 1]")] = 0.99
    reach: Annotated[float, Within("(0, inf)")] = 0.01

    null: ClassVar = {"strength": 0.0}
    reads_unlabelled: ClassVar = True
    hard_labels = True
    full_precision = True
    acts_on_unread = "never"
    conflicts: ClassVar[tuple[str, ...]] = ("sharded weights (FSDP2)", "half precision", "labels of tokens")
    cost: ClassVar = Cost(passes=3.0, held={"": 4})
    paper: ClassVar = Paper(
        authors=("Yulin Wang", "Jiayi Guo", "Shiji Song", "Gao Huang"),
        title="Meta-Semi: A Meta-Learning Approach for Semi-Supervised Learning",
        booktitle="CAAI Artificial Intelligence Research",
        venue="CAAI AIR",
        year=2022,
        arxiv="2007.02394",
    )

    def setup(self, run: Run) -> None:
        if self.unlabelled is None:
            raise ValueError(
                "MetaSemi learns from texts without labels: pass unlabelled=lambda: loader, a function that gives "
                "batches without labels, or in fit name them with unlabelled (--unlabelled FILE)"
            )
        later = run.methods[1 + next(i for i, m in enumerate(run.methods) if m is self) :]
        for method in (m for m in later if overrides(m, "after_backward") and not isinstance(m, MetaSemi)):
            name = type(method).__name__
            raise ValueError(
                f"{name} replaces the gradient, and with it what MetaSemi adds: put {name} before MetaSemi in the list"
            )
        check_masters([w.data for w in run.weights()])
        self.rows = OuterRows(self.unlabelled, run.seed)
        self.mean: dict[str, Tensor] = {}  # T, by weight name
        self.counts = run.weights()[0].data.new_zeros(2)  # texts that counted, and all that were read

    def attach(self, run: Run) -> None:
        if run.sharded:
            raise ValueError("MetaSemi needs whole weights, but these are sharded (FSDP2): use DistributedDataParallel")

        if self.strength:
            self.mean = {w.name: w.data.clone() for w in run.weights(self)}

    def after_backward(self, run: Run, weights: Sequence[Weight]) -> None:
        if not self.strength or not weights:
            return
        self.check(labels_of(run.batch[0], self))
        for w in weights:
            if w.name not in self.mean:  # unfrozen since the start
                self.mean[w.name] = run.raw(w.name).clone()
        texts = self.draw(run)
        with evaluating(run.model), torch.no_grad(), run.moved((w, self.mean[w.name] - w.data) for w in weights):
            answers = self.logits(run, texts, run.model).softmax(-1)
        before = self.losses(run, texts, answers)
        with run.moved(self.trial(weights)):
            chosen = (before > self.losses(run, texts, answers)).to(before.dtype)
        counts = torch.stack([chosen.sum(), torch.ones_like(chosen).sum()])
        run.all_reduce([counts])  # the mean over processes
        self.counts += run.world * counts

        def loss(inputs: Inputs) -> Tensor:
            return self.strength * (chosen * cross_entropy(self.logits(run, inputs), answers)).mean()

        gradients = run.gradient(texts, loss, dropout_seed=self.dropout_seed(run))
        both = [(w.grad, gradients[w.name]) for w in weights if w.grad is not None and w.name in gradients]
        torch._foreach_add_(*map(list, zip(*both, strict=True)))

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        held = [w for w in weights if w.name in self.mean]
        if not held:
            return
        rate = max(1 - self.decay, 1 / (run.index + 2))
        torch._foreach_lerp_([self.mean[w.name] for w in held], [w.data for w in held], rate)

    def check(self, labels: Tensor) -> None:
        """Refuse labels that are not class numbers."""
        if labels.dim() != 1 or labels.is_floating_point():
            raise UsageError(
                f"MetaSemi compares answers with one class a row, got labels {tuple(labels.shape)} of {labels.dtype}: "
                "leave it out"
            )

    def draw(self, run: Run) -> Inputs:
        """The next texts, on the model's device."""
        device = next(run.model.parameters()).device
        with run.forked_rng():
            texts = self.rows.next()
        inputs = {k: v.to(device) for k, v in texts.items() if isinstance(v, Tensor) and k != "labels"}
        unknown = torch.full((len(next(iter(inputs.values()))),), -1, device=device)  # domain or subgroup of the texts
        columns = {name for method in run.methods for name in method.input_columns}
        return {**dict.fromkeys(columns, unknown), **inputs}

    def trial(self, weights: Sequence[Weight]) -> list[tuple[Weight, Tensor]]:
        """The trial step along the gradient."""
        gradients = [w.grad for w in weights if w.grad is not None]
        moves = torch._foreach_mul(gradients, -self.reach / length(gradients).clamp(min=TINY))
        return list(zip(weights, moves, strict=True))

    @torch.no_grad()
    def losses(self, run: Run, texts: Inputs, answers: Tensor) -> Tensor:
        """Loss of each text (rows,) at the live weights, under the dropout draw of this step."""
        with run.forked_rng():
            torch.manual_seed(self.dropout_seed(run))
            return cross_entropy(self.logits(run, texts, run.model), answers)

    def logits(self, run: Run, texts: Inputs, model: Any = None) -> Tensor:
        """Outputs for texts; the task's own loss, which goes unused, gets a label for each."""
        first = next(iter(texts.values()))
        inputs = {**texts, "labels": torch.zeros(len(first), dtype=torch.long, device=first.device)}
        return full(logits_of(run.task(inputs, model)[1], inputs, self))

    def dropout_seed(self, run: Run) -> int:
        return run.draw_seed("texts", rank=True)

    def finish(self, run: Run) -> None:
        logger.info("MetaSemi: %.0f %% of the texts that it read counted", 100 * self.kept())

    def kept(self) -> float:
        """Share of the texts that counted so far; NaN before the first step."""
        chosen, read = self.counts.tolist()
        return chosen / read if read else float("nan")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.at, "counts": self.counts, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.seek(*state["rows"])
        self.counts, self.mean = state["counts"], state["mean"]


def cross_entropy(logits: Tensor, answers: Tensor) -> Tensor:
    """Cross entropy of each row (rows,) against probabilities (rows, classes)."""
    return -(answers * logits.log_softmax(-1)).sum(-1)
