"""Meta-learning over several other tables: a start from which few steps on any of them are enough.

An episode takes one table, fits a head to some of its rows, trains a few steps from the start theta to phi, and moves
theta. With g the gradient at phi of the loss on other rows, and H the Hessian of the loss on the rows trained on:

    reptile   theta <- theta + rate * (phi - theta)
    fomaml    theta <- theta - Adam(g)
    imaml     theta <- theta - Adam((I + H / strength)^-1 g)        phi is trained with strength/2 |phi - theta|^2 added

Only the body is learnt over the tables: every episode fits its head anew, as a probe on the features of theta.
All three are written from the papers; no code of the authors was read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core import Within, check_fields
from ...core.anatomy import anatomy
from ...core.facts import FORWARD
from ...data.problem import Regression
from ...errors import UsageError
from ...files import state
from ...heads.features import output_layer, text_vectors
from ...heads.start import even_parts, fit_probe
from ...hypergradient import difference, moved, proximal
from ..callbacks import Interrupt
from ..options import Options
from ..outputs import device, frozen_features
from ..progress import progress_bar
from ..spelling import meta_record

if TYPE_CHECKING:
    from ..pretrained import Pretrained
    from .intermediate import Intermediate

LEAST_TABLES = 5
LEAST_ROWS = 4  # of a table: two to train on, two to judge by
EPISODES, PER_TABLE = 100, 10  # default number of episodes: this many, or so many for each table if that is more
STATE = "meta.safetensors"

Loss = Callable[[], Tensor]


class Episode(ABC):
    """One table's part of an episode.

    Attributes:
        body: Weights that are learnt over the tables; training moves them in place.
        head: Weights of the table alone.
        batches: Losses of the batches to train on, with dropout.
    """

    body: list[Tensor]
    head: list[Tensor]
    batches: Sequence[Loss]

    @abstractmethod
    def trained_on(self) -> Tensor:
        """Loss on all rows that are trained on, without dropout."""

    @abstractmethod
    def judged_by(self) -> Tensor:
        """Loss on other rows, without dropout."""


@dataclass(frozen=True)
class MetaLearner(ABC):
    """What the three algorithms share.

    Args:
        inner_steps: Number of steps of an episode.
        inner_lr: Learning rate of these steps, which are Adam's; by default that of the fit.
    """

    inner_steps: Annotated[int, Within("[1, inf)")] = 5
    inner_lr: Annotated[float, Within("(0, inf)")] | None = None

    subtracts: ClassVar[bool] = False  # whether it subtracts gradients, which half precision would round away

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def pull(self) -> float:
        """Strength of the pull toward the start in the steps of an episode."""
        return 0.0

    @property
    def passes(self) -> float:
        """Batches that pass forward and backward in an episode; its head is fitted to one forward of each."""
        return self.inner_steps * (1 + FORWARD)

    @abstractmethod
    def move(self, start: Sequence[Tensor], episode: Episode, optimizer: Optimizer, left: float) -> None:
        """Move the body from where an episode has ended to the new start.

        Args:
            start: Weights of the body before the episode.
            episode: The episode; its body is trained.
            optimizer: Optimizer of the start.
            left: Share of the episodes that are left, which scales the rate.
        """


@dataclass(frozen=True)
class Reptile(MetaLearner):
    """Move the start a share of the way to where each table's steps lead.

    Nichol, Achiam, Schulman: On First-Order Meta-Learning Algorithms. 2018, arXiv 1803.02999.

    Args:
        rate: Share of the way, which falls linearly to 0.
    """

    rate: Annotated[float, Within("(0, 1]")] = 0.5

    def move(self, start: Sequence[Tensor], episode: Episode, optimizer: Optimizer, left: float) -> None:
        for weight, before in zip(episode.body, start, strict=True):
            weight.copy_(before.lerp(weight, self.rate * left))


@dataclass(frozen=True)
class FOMAML(MetaLearner):
    """MAML in first order: the gradient after a table's steps is taken as that of the start.

    Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks. ICML 2017, arXiv
    1703.03400.

    Args:
        outer_lr: Learning rate of the start, which falls linearly to 0; by default that of the fit.
    """

    outer_lr: Annotated[float, Within("(0, inf)")] | None = None

    @property
    def passes(self) -> float:
        return super().passes + 1

    def move(self, start: Sequence[Tensor], episode: Episode, optimizer: Optimizer, left: float) -> None:
        gradient = self.gradient(episode)
        torch._foreach_copy_(episode.body, list(start))
        for weight, own in zip(episode.body, gradient, strict=True):
            weight.grad = own
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * left
        optimizer.step()

    def gradient(self, episode: Episode) -> list[Tensor]:
        """Gradient of the start."""
        return gradient_of(episode.judged_by, episode.body)


@dataclass(frozen=True)
class IMAML(FOMAML):
    """Implicit MAML: the gradient of the start through steps that are held near it.

    Rajeswaran, Finn, Kakade, Levine: Meta-Learning with Implicit Gradients. NeurIPS 2019, arXiv 1909.04630.

    The formula holds where the steps have reached the minimum; few steps are an approximation, as in the paper.

    Args:
        strength: Strength of the pull toward the start, as ``alpha`` of `L2SP` that is not decoupled; with a very
            large one the gradient is that of `FOMAML`.
        iterations: Number of iterations of conjugate gradients, each with two passes over the rows trained on.
    """

    strength: Annotated[float, Within("(0, inf)")] = 1.0
    iterations: Annotated[int, Within("[1, inf)")] = 5

    subtracts: ClassVar[bool] = True

    @property
    def pull(self) -> float:
        return self.strength

    @property
    def passes(self) -> float:
        return super().passes + 2 * self.iterations * self.inner_steps

    def gradient(self, episode: Episode) -> list[Tensor]:
        def product(direction: Sequence[Tensor]) -> list[Tensor]:
            def at(by: Tensor) -> list[Tensor]:
                with moved([weight.detach() for weight in episode.body], direction, by):
                    return gradient_of(episode.trained_on, episode.body)

            return difference(at, direction)

        judged = super().gradient(episode)
        return proximal(product, judged, strength=self.strength, iterations=self.iterations)


LEARNERS: dict[str, type[MetaLearner]] = {"reptile": Reptile, "fomaml": FOMAML, "imaml": IMAML}


def gradient_of(loss: Loss, weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of a loss in some weights; zeros for weights that it does not depend on."""
    with torch.enable_grad():
        return list(torch.autograd.grad(loss(), list(weights), materialize_grads=True))


def adapt(episode: Episode, optimizer: Optimizer, pull: float = 0.0) -> list[Tensor]:
    """Train on the batches of an episode, and return the weights of the body before.

    Args:
        episode: The episode; body and head are moved.
        optimizer: Optimizer of body and head.
        pull: Strength of the pull of the body toward where it was.
    """
    start = [weight.detach().clone() for weight in episode.body]
    for loss in episode.batches:
        gradients = gradient_of(loss, [*episode.body, *episode.head])
        if pull:
            own = gradients[: len(start)]
            torch._foreach_add_(own, torch._foreach_sub([w.detach() for w in episode.body], start), alpha=pull)
        for weight, gradient in zip([*episode.body, *episode.head], gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    return start


@torch.no_grad()
def after_episode(learner: MetaLearner, episode: Episode, inner: Optimizer, outer: Optimizer, left: float) -> None:
    """Train on an episode, and leave the new start in its body.

    Args:
        learner: The algorithm.
        episode: The episode.
        inner: Optimizer of its body and head.
        outer: Optimizer of the start.
        left: Share of the episodes that are left.
    """
    start = adapt(episode, inner, learner.pull)
    learner.move(start, episode, outer, left)
    for weight in episode.body:
        weight.grad = None


# ---- on texts -------------------------------------------------------------------------------------------------------


class TextEpisode(Episode):
    """Some rows of a table, half of them to train on, and a head fitted to these.

    Args:
        model: The model, whose head is not used.
        body: Its weights that are learnt over the tables.
        pretrained: Its tokenizer, and what vectors of texts are.
        table: The table.
        steps: Number of batches to train on; rows are repeated where they are too few.
        options: Options of the fit.
        rng: Draws the rows.
    """

    def __init__(
        self, model: Any, body: list[Tensor], pretrained: Pretrained, table: Intermediate, steps: int, options: Options,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.model, self.body, self.pretrained, self.bf16 = model, body, pretrained, options.bf16
        rows, self.problem = table.plan.data.train, table.plan.data.problem
        if isinstance(self.problem, Regression):
            self.problem = self.problem.standardised(rows["label"].tolist(), centred=True)
        order = rng.permutation(len(rows))
        half = len(order) // 2
        size = min(options.batch_size, half)
        drawn = np.resize(order[:half], (steps, size))
        self.support = [self._batch(rows.iloc[part]) for part in drawn]
        self.query = self._batch(rows.iloc[order[half : half + size]])
        self.head = self._head(rows.iloc[np.unique(drawn)])
        self.batches = [partial(self._loss, *batch, dropout=True) for batch in self.support]

    def trained_on(self) -> Tensor:
        losses = [self._loss(*batch, dropout=False) for batch in self.support]
        return torch.stack(losses).mean()

    def judged_by(self) -> Tensor:
        return self._loss(*self.query, dropout=False)

    def _batch(self, rows: pd.DataFrame) -> tuple[Mapping[str, Tensor], Tensor]:
        """Inputs and labels on the device of the model."""
        inputs: Any = self.pretrained.tokenizer.pad(self.pretrained.tokenise(rows), return_tensors="pt")
        labels = torch.tensor(self.problem.ids(rows["label"].tolist()), device=self.model.device)
        return inputs.to(self.model.device), labels

    def _head(self, rows: pd.DataFrame) -> list[Tensor]:
        """Weight and bias of a probe on the features of the rows."""
        tokens = self.pretrained.tokenise(rows)
        phi = frozen_features(self.model, self.pretrained.tokenizer, tokens, self.pretrained.pooling)
        labels = np.array(self.problem.ids(rows["label"].tolist()))
        outputs = len(self.problem.names) or 1
        probe = fit_probe(phi, labels, outputs, how="ridge", bias=True, parts=even_parts(labels, seed=0))
        values = [torch.from_numpy(part).float().to(self.model.device) for part in (probe.weight, probe.bias)]
        return [value.requires_grad_() for value in values]

    def _loss(self, inputs: Mapping[str, Tensor], labels: Tensor, *, dropout: bool) -> Tensor:
        self.model.train(dropout)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            vectors = text_vectors(self.model, inputs, self.pretrained.pooling)
        outputs = nn.functional.linear(vectors.float(), *self.head)
        loss: Tensor = getattr(nn.functional, self.problem.loss)(
            outputs.squeeze(-1) if self.problem.ordered else outputs, labels
        )
        return loss


def learnt(model: Any, pooling: str) -> dict[str, Tensor]:
    """Weights that are learnt over the tables: the body, and up to the last layer if vectors are what that reads."""
    parts, last = anatomy(model), {id(p) for p in output_layer(model).parameters()}
    return {
        name: p for name, p in model.named_parameters()
        if not parts[name].head or (pooling == "model" and id(p) not in last)
    }  # fmt: skip


def packed(optimizer: Optimizer) -> dict[str, Any]:
    """State of an optimizer's weights, for `files.state`."""
    return {str(number): dict(held) for number, held in optimizer.state_dict()["state"].items()}


def restore(optimizer: Optimizer, held: Mapping[str, Any]) -> None:
    """Load what `packed` gave."""
    own = optimizer.state_dict()
    optimizer.load_state_dict({**own, "state": {int(number): values for number, values in held.items()}})


@dataclass(frozen=True, eq=False)
class MetaStage:
    """Meta-learning over auxiliary tables, before the fit.

    Attributes:
        learner: The algorithm.
        tables: The tables, checked.
        episodes: Number of episodes; each table has as many as any other, up to one.
        options: Options of the fit that hold for it.
        save_steps: Number of episodes between checkpoints; 0 for none.
        progress: Whether to show a bar.
    """

    learner: MetaLearner
    tables: tuple[Intermediate, ...]
    episodes: int
    options: Options
    save_steps: int
    progress: bool

    name: ClassVar[str] = "meta"
    reads_unlabelled: ClassVar[bool] = False

    @classmethod
    def of(
        cls, learner: MetaLearner, tables: tuple[Intermediate, ...], episodes: int | None, *, options: Options,
        save_steps: int, progress: bool,
    ) -> MetaStage:  # fmt: skip
        """Check the tables; ``episodes`` is 100 by default, or 10 for each table if that is more.

        Raises:
            UsageError: There are fewer than five tables, or one has too few rows; or bfloat16 with `IMAML`.
        """
        name = meta_record(learner)["name"]
        if len(tables) < LEAST_TABLES:
            raise UsageError(
                f"{name} learns what {LEAST_TABLES} or more tables share, got {len(tables)}: leave meta out, and the "
                "fit trains on one table after another (STILTs)."
            )
        for table in tables:
            if len(table.plan.data.train) < LEAST_ROWS:
                raise UsageError(
                    f"{table.plan.data.origins['train']}: {name} needs {LEAST_ROWS} rows or more of each table, half "
                    f"of them to train on, got {len(table.plan.data.train)}: leave this table out."
                )
        if learner.subtracts and options.bf16:
            raise UsageError(f"{name} subtracts gradients, of which bfloat16 leaves rounding: leave bf16 out.")
        return cls(learner, tables, episodes or max(EPISODES, PER_TABLE * len(tables)), options, save_steps, progress)

    def settled(self, pretrained: Pretrained) -> MetaStage:
        """The same stage: any checkpoint can be trained so."""
        return self

    def with_compact(self, compact: bool) -> MetaStage:
        """The same stage, which trains the whole vocabulary."""
        return self

    def tokens(self, pretrained: Pretrained) -> float:
        """As of `plan.Stage`."""
        row = sum(pretrained.mean_length(table.plan.data.train) for table in self.tables) / len(self.tables)
        return self.episodes * self.learner.passes * self.options.batch_size * row

    @property
    def title(self) -> str:
        """What the stage does, for messages."""
        steps = self.learner.inner_steps
        name = meta_record(self.learner)["name"]
        return f"{self.episodes} episodes of {steps} steps over {len(self.tables)} tables ({name})"

    def record(self) -> dict[str, Any]:
        """What decides the moved weights, as JSON."""
        tables = [table.record() for table in self.tables]
        return {**meta_record(self.learner), "tables": tables, "steps": self.episodes}

    def body(self, pretrained: Pretrained, name: str, checkpoints: Path) -> Mapping[str, Tensor]:
        """Weights of the body after all episodes; finished ones are read from disk.

        Args:
            pretrained: The model of the fit, after earlier stages.
            name: Name of the stage.
            checkpoints: Folder of the checkpoints of the fit.

        Raises:
            Interrupted: After a checkpoint.
        """
        file = checkpoints / name / STATE
        held: dict[str, Any] = state.load(file) if file.is_file() else {"episode": 0}
        if held["episode"] == self.episodes:
            done: Mapping[str, Tensor] = held["body"]
            return done
        model: Any = pretrained.load(self.options.seeds["init"])
        model.to(device())
        body = learnt(model, pretrained.pooling)
        outer = torch.optim.Adam(body.values(), lr=getattr(self.learner, "outer_lr", None) or self.options.lr)
        outer.param_groups[0]["initial_lr"] = outer.param_groups[0]["lr"]
        if held["episode"]:
            model.load_state_dict(held["body"], strict=False)
            restore(outer, held["optimizer"])
        interrupt, numbers = Interrupt(), range(held["episode"], self.episodes)
        with interrupt.heard():
            for episode in progress_bar(numbers, desc=name, unit="episode") if self.progress else numbers:
                self._episode(episode, model, [*body.values()], pretrained, outer)
                last = episode + 1 == self.episodes or interrupt.received is not None
                if last or (self.save_steps and (episode + 1) % self.save_steps == 0):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    weights = {key: weight.detach().cpu() for key, weight in body.items()}
                    state.save({"episode": episode + 1, "body": weights, "optimizer": packed(outer)}, file)
                if interrupt.received is not None:
                    break
        return {key: weight.detach().cpu() for key, weight in body.items()}

    def _episode(self, number: int, model: Any, body: list[Tensor], pretrained: Pretrained, outer: Optimizer) -> None:
        """One episode; its draws depend on the seeds and its number alone."""
        seeds, count = self.options.seeds, len(self.tables)
        cycle = np.random.default_rng([seeds["data"], number // count]).permutation(count)
        table = self.tables[cycle[number % count]]
        torch.manual_seed(int(np.random.SeedSequence([seeds["dropout"], number]).generate_state(1)[0]))
        rng = np.random.default_rng([seeds["data"], number // count, number % count])
        episode = TextEpisode(model, body, pretrained, table, self.learner.inner_steps, self.options, rng)
        inner = torch.optim.Adam([*body, *episode.head], lr=self.learner.inner_lr or self.options.lr)
        after_episode(self.learner, episode, inner, outer, 1 - number / self.episodes)
