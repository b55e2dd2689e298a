"""Causal head: let low-level features take the shortcuts in training, and leave them out afterwards.

With c the input of the last layer, c0 the same of the pre-trained model, p the mean of a low block's states minus its
mean over the training so far (a constant), and W, b the head:

    f(c, p) = W c + b + V p
    L = ( CE(f(c_i, p_i)) + CE(mean over k of softmax f(c_i, p_k(i))) ) / 2 + mu * mean ||G c - c0||^2 / width
    evaluation: W c + b, the mean of f(c, p) over the training rows' p

k(i), k = 1 ... permutations, are other rows of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import Run, Scope, Step, Weight, Within
from ..core.facts import Cost, Paper
from ..core.step import full
from ..errors import UsageError
from .bases.at_block import AtBlock
from .bases.beside_head import Beside, BesideHead
from .bases.head_input import HeadInput
from .bases.rows import REPLACED, labels_of

RATE = 0.01  # smallest share of the newest step in the mean of the low-level features


class LowLevel(Beside):
    """V of the low-level features and G of the alignment; both change nothing at first.

    Args:
        low: Width of the low-level features.
        high: Width of the last layer's input.
        outputs: Outputs of the head.
    """

    def __init__(self, low: int, high: int, outputs: int) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.zeros(outputs, low))
        self.align = nn.Parameter(torch.eye(high))


@dataclass
class CausalHead(AtBlock, BesideHead[LowLevel]):
    """Train a second head on low-level features beside the head; evaluate and save the head alone.

    Args:
        mu: Weight of the alignment of the last layer's input with that of the pre-trained model. 0 saves its forward
            and its copy of the weights.
        permutations: Number of other rows whose low-level features each row meets.
        block: Block whose output is low-level, counted from 0 at the input; by default the first.

    What the words of a text say by themselves can be learnt from the low-level features, which the blocks do not learn
    to change. As both heads only add up, the mean over the training rows is a constant, kept at zero, and the evaluated
    and saved model is a plain one. It needs rows with one class each. Partners are rows of one micro-batch, so that
    accumulation and the number of processes change who meets whom. The loss replaces the task's: class weights do not
    act. Under DistributedDataParallel, methods that take a gradient of the task alone (ROSE, Bi-Drop) need
    ``find_unused_parameters=True``.

    Departures:
        Written from the paper without the authors' code. Low-level features are the mean of one block's states, not
        pooled patches; the head on them adds to the logits, so that it can be left out; theirs is a joint network that
        needs features of training rows at test time. The pre-trained model's input of the last layer is computed in
        each step, under the dropout draw of the step, so that only the change of the weights is measured.

    Raises:
        ValueError: In setup, for a model without a trainable classification head, already inside
            DistributedDataParallel, whose blocks cannot be told, an encoder-decoder, XLNet or PEFT's prompt tuning.
        UsageError: At the first step, for other labels than one class a row, for a head that reads each token
            (decoders) or each of several texts a row (multiple choice), or under ``torch.compile``.
        RuntimeError: At the first step, for weights in pieces (FSDP2).
    """

    mu: Annotated[float, Within("[0, inf)")] = 0.1
    permutations: Annotated[int, Within("[1, inf)")] = 4
    block: Annotated[int, Within("[0, inf)")] | None = None

    place: ClassVar = "low_level"
    hard_labels = True
    loss_taken = 1.0
    exclusive: ClassVar = "causal head"
    conflicts: ClassVar[tuple[str, ...]] = (
        *AtBlock.conflicts,
        "labels that are not one class a row",
        "decoders",
        "torch.compile",
        "sharded weights (FSDP2)",
        REPLACED,
    )
    acts_on_unread = "always"  # the copy of the pre-trained model is whole
    cost: ClassVar = Cost(passes=4 / 3, held={"": 4})
    paper: ClassVar = Paper(
        authors=("Jialin Yu", "Yuxiang Zhou", "Yulan He", "Nevin L. Zhang", "Ricardo Silva"),
        title="Fine-Tuning Pre-trained Language Models for Robust Causal Representation Learning",
        booktitle="arXiv preprint",
        venue="arXiv",
        year=2024,
        arxiv="2410.14375",
    )

    @property
    def scope(self) -> Scope:
        """The weights of the pre-trained model, of which a copy is kept."""
        return lambda w: not w.head and not w.name.startswith(f"{self.place}.")

    def default(self, count: int) -> int:
        return 0

    def setup(self, run: Run) -> None:
        AtBlock.setup(self, run)
        self.pretrained = [w.name for w in run.weights() if self.mu and not run.is_new(w)]
        for name in self.pretrained:
            run.reference(name)
        self.low_width = int(run.model.config.hidden_size)  # type: ignore[union-attr,arg-type]
        BesideHead.setup(self, run)
        self.high = HeadInput(self.head)
        self.mean = next(run.model.parameters()).new_zeros(self.beside.low.size(1)).detach()
        self.steps = 0  # optimizer steps that the mean has seen
        self.seen: dict[int, Tensor] = {}  # mean low-level features of the micro-batches of the step under way

    def build(self, head: nn.Linear) -> LowLevel:
        return LowLevel(self.low_width, head.in_features, head.out_features)

    def before_batch(self, step: Step) -> None:
        self.high.listen()

    def penalty(self, step: Step) -> Tensor:
        high, labels, logits = self.high.pop(), labels_of(step.inputs, self), full(step.logits(step.outputs, self))
        self.check(high, labels, logits, step.copies)
        low = self.low_features(step)
        self.seen[step.number] = low.mean(0)
        centred = low - (self.mean if self.steps else low.mean(0))
        shift = full(nn.functional.linear(centred, full(self.beside.low)))
        own = nn.functional.cross_entropy(logits + shift, labels)
        orders = [self.order(step, k, len(labels)) for k in range(self.permutations)]
        each = torch.stack([(logits + shift[order]).log_softmax(-1) for order in orders])
        others = nn.functional.nll_loss(each.logsumexp(0) - math.log(len(orders)), labels)
        loss = (own + others) / 2 - step.as_penalty(step.loss)
        if not self.mu:
            return loss
        assert high is not None
        now, before = (full(features[: len(labels)]) for features in (high, self.before(step)))
        return loss + self.mu * (nn.functional.linear(now, full(self.beside.align)) - before).square().mean()

    def check(self, high: Tensor | None, labels: Tensor, logits: Tensor, copies: int) -> None:
        """Raise unless there is one class and one vector for each row."""
        vectors = high is not None and high.dim() == 2 and len(high) == copies * len(labels)
        if not vectors or labels.dim() != 1 or labels.is_floating_point() or logits.dim() != 2:
            held = "nothing (is it compiled?)" if high is None else f"features {tuple(high.shape)}"
            raise UsageError(
                "CausalHead needs one class a row and one vector a row that the last layer reads; got labels "
                f"{tuple(labels.shape)} of {labels.dtype} and {held}: leave CausalHead out"
            )

    def low_features(self, step: Step) -> Tensor:
        """Mean states of the low block, (rows, width), constants."""
        states = full(self.hidden(step, step.outputs)[0].detach())
        return step.unpadded(states).sum(1) / step.lengths().clamp(min=1).unsqueeze(-1).to(states.dtype)

    def order(self, step: Step, k: int, rows: int) -> Tensor:
        """The rows whose low-level features each row meets, the k-th time: a permutation."""
        generator = step.run.rng(self, f"order {k}", per_rank=True)
        return torch.randperm(rows, generator=generator, device=generator.device)

    def before(self, step: Step) -> Tensor:
        """What the last layer reads in the pre-trained model, under the dropout draw of the step."""
        weights = {name: step.run.reference(name) for name in self.pretrained}
        self.high.listen()
        with torch.no_grad():
            step.forward(dropout="same", weights=weights)
        kept = self.high.pop()
        assert kept is not None
        return kept

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        seen = run.kept(self.seen)
        if not seen:
            return
        newest = torch.stack(seen).mean(0)
        run.all_reduce([newest])
        self.mean.lerp_(newest.to(self.mean.dtype), max(RATE, 1 / (self.steps + 1)))
        self.steps, self.seen = self.steps + 1, {}

    def release(self, run: Run) -> None:
        self.high.stop()
        super().release(run)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.mean, self.steps = state["mean"], state["steps"]
