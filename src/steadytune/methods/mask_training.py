"""Mask training (SMP): leave every pre-trained weight as it is, and learn which of them to keep.

With S a score for each weight and v the share that is kept at progress t = min(1, steps / (total * (1 - settled))):

    W_fwd = W * M            M = [S among the largest v]
    dL/dS = dL/dW_fwd * W    as if M were S (straight through)
    v = keep + (1 - keep) * (1 - t)^3
    S <- AdamW(S, dL/dS + strength * (1 - (1 - t)^3) * d/dS of the mean sigmoid(S))       on the mean over all matrices

With a teacher, whose logits are z_t, the loss of a row is

    (1 - taught) * task + taught * T^2 * KL( softmax(z_t / T) || softmax(z / T) )
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from ..core import Method, Run, Scope, Step, Weight, Within, select
from ..core.facts import Cost, Paper
from ..core.step import full
from ..errors import UsageError, one_line
from ..hypergradient import AdamW
from .bases.rows import REPLACED
from .bases.static_mask import Tensors, top_masks

logger = logging.getLogger("steadytune")

START = 1e-3  # standard deviation of the first scores
FLAT, STEEP = 4.0, 1.0  # divisors of the scores where matrices compete for their shares: above 0.7 kept, and below
MANY = 0.7


@dataclass
class MaskTraining(Method):
    """Freeze the model, learn a score for each weight of the blocks' matrices, and keep those with the largest scores.

    Args:
        keep: Share of the matrices' weights that is kept at the end.
        threshold: Where the share holds. ``"local"`` for each kind of matrix over all blocks, whose shares go by the
            mean sigmoid of their scores; ``"tensor"`` for each matrix; ``"global"`` for all matrices together.
        lr: Learning rate of the scores, constant.
        strength: Weight of the mean sigmoid of the scores, at the end of the pruning.
        settled: Share of the training, at its end, with the final number of kept weights.
        every: Number of steps between two choices of the kept weights.
        teacher: Folder of a classifier with the same classes, such as a plain fine-tuned model, whose answers are
            learned too (Hinton et al., arXiv 1503.02531); it costs one more forward a step. None: no teacher.
        temperature: Divisor T of the logits of both where the teacher is learned from.
        taught: Share of the teacher in the loss.
        train_head: Whether the head trains, with the optimizer's own learning rate. Without it nothing trains but the
            scores, so that the head must come from a probe (`HeadInit`).
        scope: Which matrices have scores; of a scope, those that are linear weights of the blocks.

    What is evaluated and saved is W * M, a plain model with exact zeros; `sparsity` counts them, and `save_delta`
    writes which weights are gone. The zeros save neither time nor memory in a stock model. Which weights to keep is all
    that the body learns, so that it cannot move far from the pre-trained one: use the method to see what selection
    alone brings, or as a strong restriction on few rows with ``keep`` of 0.8 to 0.95. Scores are float32 whatever the
    model is.

    Departures:
        The head is that of the task; the authors use the masked-language-model head with words for the classes, for
        which `HeadInit` has ``how="words"`` where a stock head can hold it. The teacher is an option, theirs is part of
        every run. First scores are drawn, N(0, 1e-3^2); theirs are all 0, so that their first mask keeps weights by
        position. The kept weights are chosen anew every ``every`` steps, theirs in each forward. With ``"local"``, a
        share above 1 goes to the other blocks, so that the total is exact.

    Raises:
        ValueError: In setup, for a model without trainable matrices in its blocks, or a teacher that cannot be read or
            has other classes; in attach, for sharded weights (FSDP2), or a later method that froze the matrices.
        UsageError: At the first step with a teacher, for other labels than one class a row.
    """

    keep: Annotated[float, Within("(0, 1]")] = 0.9
    threshold: Literal["local", "tensor", "global"] = "local"
    lr: Annotated[float, Within("(0, inf)")] = 2e-2
    strength: Annotated[float, Within("[0, inf)")] = 400.0
    settled: Annotated[float, Within("[0, 1)")] = 0.2
    every: Annotated[int, Within("[1, inf)")] = 10
    train_head: bool = True
    scope: Scope = "encoder"
    teacher: str | None = None
    temperature: Annotated[float, Within("(0, inf)")] = 2.0
    taught: Annotated[float, Within("[0, 1]")] = 0.5

    structure: ClassVar = True
    needs_steps = True
    exclusive: ClassVar = "average"
    conflicts: ClassVar[tuple[str, ...]] = ("PEFT adapters", "sharded weights (FSDP2)", REPLACED)
    cost: ClassVar = Cost(held={"": 17}, during=4)
    paper: ClassVar = Paper(
        authors=("Ting Jiang", "Deqing Wang", "Fuzhen Zhuang", "Ruobing Xie", "Feng Xia"),
        title="Pruning Pre-trained Language Models Without Fine-Tuning",
        booktitle="Proceedings of the Annual Meeting of the Association for Computational Linguistics",
        venue="ACL",
        year=2023,
        arxiv="2210.06210",
    )

    @property
    def loss_taken(self) -> float:
        return 0.0 if self.teacher is None else self.taught

    def setup(self, run: Run) -> None:
        self.scores: Tensors = {}
        self.masks: Tensors = {}
        self.slopes: Tensors = {}  # dL/dS of the step under way
        self.moments: tuple[int, list[Tensor], list[Tensor]] = (0, [], [])
        self.names = {w.name for w in run.weights(self, self.matrices) if not run.is_new(w)}
        if not self.names:
            raise ValueError(
                f"MaskTraining finds no pre-trained trainable matrix of a block in scope {self.scope!r}: they are "
                "frozen, quantised or adapters. Choose another scope, or leave out what freezes them"
            )
        run.train_only(self, lambda name, part: name in self.names or (part.head and self.train_head))
        with run.forked_rng():
            self.taught_by = None if self.teacher is None else read_teacher(self.teacher, run.model)

    def matrices(self, weight: Weight) -> bool:
        """Whether a weight may have scores."""
        inside = weight.kind == "linear" and weight.block is not None and not weight.head
        return inside and bool(select([weight], self.scope))

    def attach(self, run: Run) -> None:
        if run.sharded:
            raise ValueError(
                "MaskTraining needs whole weights, but these are sharded (FSDP2): use DistributedDataParallel"
            )
        here = [w for w in run.weights(self) if w.name in self.names]
        if len(here) < len(self.names):
            lost = min(self.names - {w.name for w in here})
            raise ValueError(
                f"MaskTraining learns from the gradient of {lost!r}, which a later method froze or the optimizer does "
                "not hold: leave that method out, or build the optimizer from model.parameters()"
            )
        for w in here:
            blank = torch.empty(w.data.shape, dtype=torch.float32, device=w.data.device)
            self.scores[w.name] = START * blank.normal_(generator=run.rng(self, w.name))
            self.masks[w.name] = torch.ones_like(blank, dtype=torch.bool)
        self.moments = AdamW(self.lr).start(list(self.scores.values()))

    # ------------------------------------------------------------------ the step

    def penalty(self, step: Step) -> Tensor | None:
        """What the teacher's share changes in the loss."""
        if self.taught_by is None:
            return None
        labels, logits = step.inputs["labels"], full(step.logits(step.outputs, self))
        if logits.dim() != 2 or logits.size(-1) < 2 or labels.shape == logits.shape:
            raise UsageError(
                "MaskTraining learns from a teacher of one class a row, and these labels are of shape "
                f"{tuple(labels.shape)}: leave teacher out"
            )
        inputs = {name: value for name, value in step.inputs.items() if name != "labels"}
        with torch.no_grad():
            answers = full(self.taught_by(**inputs).logits)
        own, known = ((z / self.temperature).log_softmax(-1) for z in (logits, answers))
        far = nn.functional.kl_div(own, known, reduction="none", log_target=True).sum(-1)
        return self.taught * (self.temperature**2 * step.mean(far) - step.as_penalty(step.loss))

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        for w in self.masked(weights):
            run.show(w, w.data * self.masks[w.name], own=True)

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        frozen = torch.zeros((), dtype=torch.bool)
        for w in self.masked(weights):
            assert w.grad is not None
            self.slopes[w.name] = (w.grad * run.raw(w.name)).float()
            w.grad.zero_()
            run.freeze(w, frozen, state=False)  # whatever other methods and decay do to it

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        progress = self.progress(run)
        strength = self.strength * (1 - (1 - progress) ** 3) / len(self.scores)
        slopes = []
        for name, score in self.scores.items():
            chance = score.sigmoid()
            pull = chance * (1 - chance) * (strength / score.numel())
            slopes.append(pull + self.slopes[name] if name in self.slopes else pull)
        self.slopes = {}
        moved, self.moments = AdamW(self.lr)(list(self.scores.values()), slopes, self.moments)
        torch._foreach_copy_(list(self.scores.values()), moved)
        last = run.index + 1 >= run.steps(self)
        if last or (run.index + 1) % self.every == 0:
            self.masks = self.choose(run, self.keep + (1 - self.keep) * (1 - progress) ** 3)

    def evaluated(self, run: Run, weights: Sequence[Weight]) -> dict[str, Tensor]:
        return {w.name: w.data * self.masks[w.name] for w in self.masked(weights)}

    # ------------------------------------------------------------------ masks

    def masked(self, weights: Sequence[Weight]) -> list[Weight]:
        """Weights with a mask."""
        return [w for w in weights if w.name in self.masks]

    def progress(self, run: Run) -> float:
        """Share of the pruning that is done after this step."""
        return min(1.0, (run.index + 1) / max(1.0, run.steps(self) * (1 - self.settled)))

    def choose(self, run: Run, share: float) -> Tensors:
        """Masks of the largest scores; ``share`` of all weights is kept."""
        if self.threshold != "local":
            return top_masks(run, self.scores, share, self.threshold)
        groups = defaultdict(list)
        for name in self.scores:
            groups[re.sub(r"\.\d+\.", ".", name)].append(name)  # of one kind, in all blocks
        shares: dict[str, float] = {}
        for names in groups.values():
            divisor = FLAT if share >= MANY else STEEP
            weights = torch.stack([(self.scores[name] / divisor).sigmoid().mean() for name in names])
            shares.update(zip(names, allotted(weights, share).tolist(), strict=True))
        return {name: score >= run.kth(score, shares[name]) for name, score in self.scores.items()}

    def finish(self, run: Run) -> None:
        logger.info("MaskTraining: %.1f %% of the weights of the blocks' matrices are zero", 100 * self.sparsity())

    def sparsity(self) -> float:
        """Share of the matrices' weights that are zero in what is evaluated and saved."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return 1 - kept / sum(mask.numel() for mask in self.masks.values())

    def state_dict(self) -> dict[str, Any]:
        count, first, second = self.moments
        return {"scores": self.scores, "masks": self.masks, "count": count, "first": first, "second": second}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.masks, self.slopes = state["scores"], state["masks"], {}
        self.moments = (state["count"], state["first"], state["second"])


def read_teacher(folder: str, student: Any) -> nn.Module:
    """Read a classifier with the classes and the vocabulary of another model, in evaluation mode.

    Raises:
        ValueError: It cannot be read, or has others.
    """
    try:
        teacher: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MaskTraining cannot read its teacher {folder!r} ({one_line(error)[:200]}): give a classifier's folder"
        ) from error
    config, own = teacher.config, student.config
    if (config.id2label, config.vocab_size) != (own.id2label, own.vocab_size):
        raise ValueError(
            f"the teacher {folder!r} has the classes {', '.join(config.id2label.values())} and {config.vocab_size} "
            f"tokens, this model {', '.join(own.id2label.values())} and {own.vocab_size}: fine-tune the teacher from "
            "the same model on the same labels"
        )
    return teacher.eval().to(next(student.parameters()).device)


def allotted(weights: Tensor, share: float) -> Tensor:
    """Shares in proportion to ``weights``, at most 1 each, whose mean is ``share``.

    Args:
        weights: Shape (n,), above 0.
        share: In (0, 1].
    """
    shares = torch.zeros_like(weights)
    full = torch.zeros_like(weights, dtype=torch.bool)
    for _ in range(len(weights)):
        left = share * len(weights) - full.sum()
        shares = torch.where(full, 1.0, weights * left / weights[~full].sum())
        if not bool((shares[~full] > 1).any()):
            break
        full |= shares >= 1
    return shares.clamp(max=1)
