"""Self-training: a model labels texts, and a new model learns from the labels that it is most certain of.

Wang, Sun, Chen, Zhu, Li, Gao: Uncertainty-aware Parameter-Efficient Self-training for Semi-supervised Language
Understanding (UPET). Findings of EMNLP 2023, arXiv 2310.13022. The disagreement of passes is BALD (Houlsby, Huszar,
Ghahramani, Lengyel, arXiv 1112.5745).

With p_t the probabilities (classes) that pass t gives to a text, and H the entropy:

    p = mean of p_t        disagreement = H(p) - mean of H(p_t)  in [0, log K]
    certainty = (1 - disagreement / log K) * max p

Round 0 is plain fine-tuning. Round r labels all texts by p, keeps a share of them (0.2, 0.5, 0.8) and trains a new
model from the pre-trained weights on labelled and kept texts. Of each predicted class the most certain texts are kept,
in the proportions of the classes among the labelled rows. A kept text is learned as p, not as its largest class. All
kept texts together count as much as the labelled rows, or less if they are fewer.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import pandas as pd

from ...core import Within, check_fields
from ...core.facts import FORWARD
from ...data.balance import WEIGHT
from ...data.problem import Problem
from ...data.splits import folds, units
from ...errors import UsageError
from ...heads.influence import weights_of_texts
from ...heads.start import even_parts
from ...methods import HeadInit
from ...pages.words import counted
from ..loss import SOFT
from ..outputs import frozen_features, logits
from ..row_weights import RowWeights
from ..training import Job, Setup, restarted
from .base import Procedure

if TYPE_CHECKING:
    from ..fit_trainer import FitTrainer, Trained
    from ..plan import Plan

logger = logging.getLogger("steadytune")

SHARES = (0.2, 0.5, 0.8)  # of the texts, that are kept in the first rounds; the last is that of all further ones
COLUMNS = ("text", "text_pair", "label", SOFT, "subgroup", WEIGHT)  # of the rows that a round learns from


@dataclass(frozen=True)
class SelfTraining(Procedure):
    """Label texts by the mean of several passes, and train a new model on those that it is most certain of.

    Wang, Sun, Chen, Zhu, Li, Gao: Uncertainty-aware Parameter-Efficient Self-training for Semi-supervised Language
    Understanding (UPET). Findings of EMNLP 2023, arXiv 2310.13022.

    Round 0 is plain fine-tuning. Each further round labels all texts, keeps a share of them, and trains a new model
    from the pre-trained weights on labelled and kept texts. `steadytune.fitting.procedures.self_training` has the
    equations.

    Args:
        rounds: Number of rounds; with ``folds`` the largest number. 0 is plain fine-tuning.
        teachers: Number of models with different seeds that label the texts of a round.
        draws: Number of passes of each of them with dropout; 0 for one pass without dropout.
        weight: Factor of the weight of all kept texts together; 0 is plain fine-tuning.
        influence: Whether kept texts weigh less if learning them would raise the loss of labelled rows, by the last
            layer of probes on frozen features (`heads.influence`, after Ren, Yeh and Schwing, arXiv 2007.01293).
        balanced: Whether to keep equally many texts of each class, instead of the shares of the labelled rows.
        folds: Number of folds that choose the number of rounds, 0 rounds included: each labelled row is scored by
            models that have not seen it. 0 takes ``rounds`` as it is.
        most_shift: Largest factor by which the share of a predicted class may leave that of the labelled rows. Beyond
            it the rounds end, because labels that collapse into one class teach nothing else.

    Departures:
        The authors keep equally many texts of each class, label by majority, draw texts by (1 - disagreement), train
        adapters, go on training one model, and choose the round on the set that they report. Their contrastive and
        robust losses are not in their code, nor here. Where there are more kept texts than labelled rows, labelled rows
        are repeated instead of weighing the texts less.
    """

    reads_unlabelled: ClassVar[bool] = True

    rounds: Annotated[int, Within("[0, inf)")] = 2
    teachers: Annotated[int, Within("[1, inf)")] = 1
    draws: Annotated[int, Within("[0, inf)")] = 10
    weight: Annotated[float, Within("[0, 1]")] = 1.0
    influence: bool = False
    balanced: bool = False
    folds: Annotated[int, Within("[0, inf)")] = 0
    most_shift: Annotated[float, Within("[1, inf]")] = 2.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.opinions < 2:
            raise ValueError(
                f"certainty needs two opinions on each text or more, {self.teachers} teacher(s) and {self.draws} "
                "draw(s) give one: set draws=10, or teachers=3"
            )
        if self.folds == 1:
            raise ValueError("folds must be 0 (take rounds as it is) or 2 and more, got 1")

    @property
    def opinions(self) -> int:
        """Number of passes over each text in a round."""
        return self.teachers * max(self.draws, 1)

    @property
    def last(self) -> int:
        """The largest number of rounds."""
        return self.rounds if self.weight else 0

    @property
    def soft_labels(self) -> bool:
        return self.last > 0

    # ---- before training

    def check(self, plan: Plan) -> None:
        super().check(plan)
        if not plan.data.problem.classes:
            raise UsageError(
                f"self-training labels texts with one class each, this is {plan.data.problem.kind}: leave it out, or "
                "let the texts train the body first (--pretrain tapt)."
            )
        if self.folds:
            rows = plan.data.train
            folds(rows, plan.data.problem, self.folds, plan.options.seeds["subset"])  # raises, if there are too few

    def cost(self, plan: Plan) -> float:
        """Passes as a multiple of those of plain fine-tuning, at most, with the passes over the texts."""
        assert plan.data.unlabelled is not None
        rows, texts = len(plan.data.train), len(plan.data.unlabelled.rows)
        options, steps = plan.options, 0.0
        for number in range(self.last + 1):
            models = self.teachers if number < self.last else 1
            steps += models * options.total_steps(rows + round(share_of(number) * texts))
        per_step = options.batch_size * options.accumulation
        steps += self.last * self.opinions * texts * FORWARD / per_step
        times = 1 + self.folds if self.last else 1
        return times * steps / options.total_steps(rows)

    def words(self, plan: Plan) -> str:
        assert plan.data.unlabelled is not None
        chosen = f", of which {self.folds} folds choose a number" if self.folds else ""
        return (
            f"self-training: {counted(self.last, 'round')}{chosen}, with {self.opinions} passes over "
            f"{len(plan.data.unlabelled.rows)} texts before each: at most {self.cost(plan):.1f} times the passes of "
            f"plain fine-tuning, which has {plan.steps} steps"
        )

    # ---- the trainings

    def first(self, setup: Setup, job: Job) -> Setup:
        """Setup of plain fine-tuning.

        Raises:
            UsageError: The passes shall differ by dropout, and the model has none.
        """
        if self.draws and self.last and not any(setup.pretrained.dropout.values()):
            raise UsageError(
                "self-training compares passes that differ by their dropout, and the model has none: give a dropout "
                "(--dropout 0.1), or several teachers without draws (--procedure self-training:teachers=3,draws=0)."
            )
        if self.influence and self.last and not any(isinstance(method, RowWeights) for method in setup.methods):
            setup = dataclasses.replace(setup, methods=[*setup.methods, RowWeights()])  # of 1 in round 0
        return dataclasses.replace(setup, keep=setup.keep or self.last > 0)

    def job_of(self, job: Job, i: int) -> Job:
        """Job of plain fine-tuning with seeds number ``i``."""
        return self.job(job, 0, i)

    def job(self, job: Job, number: int, i: int) -> Job:
        """Job of a round, with other seeds for each teacher but the first."""
        name = f"{job.name}-round-{number}" + (f"-teacher-{i}" if i else "")
        return dataclasses.replace(job, name=name if self.last else job.name, seeds=restarted(job.seeds, i))

    def __call__(self, setup: Setup, job: Job, made: list[FitTrainer] | None = None) -> Trained:
        setup = self.first(setup, job)
        if not (self.folds and self.last):
            return self.after(setup, job, self.last, made)
        if made:
            made.clear()  # its model would stay in memory while the folds are trained
        chosen, spent, seconds = self.chosen(setup, job)
        trained = self.after(setup, job, chosen)
        passes = trained.passes + spent / trained.steps
        return dataclasses.replace(trained, passes=passes, seconds=trained.seconds + seconds)

    def after(self, setup: Setup, job: Job, rounds: int, made: list[FitTrainer] | None = None) -> Trained:
        """The model after a number of rounds, or after fewer if the labels collapse."""
        (trained,) = deque(self.models(setup, job, rounds, made), maxlen=1)
        return trained

    def chosen(self, setup: Setup, job: Job) -> tuple[int, float, float]:
        """The number of rounds with the best score on rows that the models have not seen; passes and seconds spent."""
        problem, spent, seconds, given = setup.problem, 0.0, 0.0, dict[int, list[np.ndarray]]()
        parts = folds(job.rows, problem, self.folds, job.seeds["subset"])
        for f, (inside, outside) in enumerate(parts):
            fold = dataclasses.replace(job, name=f"{job.name}-fold-{f}", rows=job.rows.iloc[inside], select=None)
            features = setup.pretrained.tokenise(job.rows.iloc[outside])
            models = self.models(setup, fold, self.last)
            answers, cost = np.empty(0), (0.0, 0.0)
            for number in range(self.last + 1):
                if (trained := next(models, None)) is not None:  # else the rounds have ended, and the last model stays
                    outputs = logits(trained.model, setup.pretrained.tokenizer, features, setup.options.bf16)
                    answers, cost = problem.activate(outputs), (trained.passes * trained.steps, trained.seconds)
                given.setdefault(number, []).append(answers)
            spent, seconds = spent + cost[0], seconds + cost[1]
        metric = problem.metric(setup.metric)
        gold = problem.array(job.rows["label"].iloc[np.concatenate([outside for _, outside in parts])])
        values = []
        for number in range(self.last + 1):
            scores = np.concatenate(given[number])
            shown = scores if metric.needs_probabilities else problem.decide(scores)
            value = metric.compute(gold, shown, problem.names)
            values.append(metric.worst if value is None else value)
        best = max(range(self.last + 1), key=lambda number: (metric.goodness(values[number]), -number))
        figures = ", ".join(f"{value:.4f}" for value in values)
        logger.info("self-training: %s after 0 to %d rounds: %s; %d are taken", metric.name, self.last, figures, best)
        return best, spent, seconds

    def models(self, setup: Setup, job: Job, last: int, made: list[FitTrainer] | None = None) -> Iterator[Trained]:
        """Yield the model of each round, round 0 first, with the passes and seconds that have led to it.

        They are those of trainings and of the readings of texts. Finished trainings are read from disk. The rounds end
        early if the labels collapse.
        """
        texts, kept = texts_of(setup), None
        passes, seconds = 0.0, 0.0
        for number in range(last + 1):
            here, learned = (setup, job) if kept is None else self.student(setup, job, kept)
            first, opinions, asking = None, list[np.ndarray](), 0.0
            for i in range(self.teachers if number < last else 1):
                trained = here.train(self.job(learned, number, i), made.pop() if made else None)
                passes, seconds = passes + trained.passes * trained.steps, seconds + trained.seconds
                first = trained if first is None else first
                if number < last:
                    began = time.perf_counter()
                    opinions += self.ask(setup, trained, [job.seeds["method"], number, i])
                    asking += time.perf_counter() - began
            assert first is not None
            model = dataclasses.replace(first, passes=passes / first.steps, seconds=seconds)
            if number == last:
                yield model
                return
            at_once = setup.options.batch_size * setup.options.accumulation
            passes, seconds = passes + len(opinions) * len(texts) * FORWARD / at_once, seconds + asking
            found = self.keep(np.stack(opinions), texts, job.rows["label"], setup.problem, number + 1)
            if isinstance(found, str):
                note = f"self-training ended after {number} of {last} rounds, because {found}"
                yield dataclasses.replace(model, notes=[*model.notes, note])
                return
            yield model
            kept = found

    def student(self, setup: Setup, job: Job, kept: pd.DataFrame) -> tuple[Setup, Job]:
        """Setup and job of a round from 1 on.

        Its steps are those of plain fine-tuning on as many rows. A head that begins as a probe begins as that of plain
        fine-tuning, which has read the labelled rows alone.
        """
        methods = [method for method in setup.methods if not isinstance(method, HeadInit)]
        start = job.start
        if len(methods) < len(setup.methods):
            trainer = setup.trainer(job, job.seeds, setup.folder / job.name)
            assert trainer.model is not None
            start = {name: t.detach().to("cpu", copy=True) for name, t in trainer.model.state_dict().items()}
        if self.influence:
            kept = kept.assign(**{WEIGHT: helpfulness(setup, job, kept)})
        rows = learned_rows(job.rows, kept, setup.problem, self.weight, job.seeds["subset"])
        steps = setup.options.total_steps(len(job.rows) + len(kept))
        return dataclasses.replace(setup, methods=methods, steps=steps), dataclasses.replace(
            job, rows=rows, start=start
        )

    def ask(self, setup: Setup, trained: Trained, seed: Sequence[int]) -> list[np.ndarray]:
        """Probabilities (texts, classes) that each pass of a teacher gives."""
        features = setup.pretrained.tokenise(texts_of(setup))
        seeds: list[int | None] = [None]
        if self.draws:
            seeds = [*map(int, np.random.SeedSequence(list(seed)).generate_state(self.draws))]
        tokenizer, bf16 = setup.pretrained.tokenizer, setup.options.bf16
        return [
            setup.problem.activate(logits(trained.model, tokenizer, features, bf16, dropout_seed=draw))
            for draw in seeds
        ]

    def keep(
        self, opinions: np.ndarray, texts: pd.DataFrame, labels: pd.Series, problem: Problem, number: int
    ) -> pd.DataFrame | str:
        """The texts that a round learns from, with their labels, or why there are none.

        Args:
            opinions: Probabilities (passes, texts, classes).
            texts: All texts.
            labels: Labels of the labelled rows.
            problem: The problem.
            number: Number of the round, from 1 on.
        """
        mean, prior = opinions.mean(axis=0), problem.membership(labels).mean(axis=0)
        predicted = mean.argmax(axis=1)
        shares = np.bincount(predicted, minlength=len(prior)) / len(predicted)
        for name, share, expected in zip(problem.names, shares, prior, strict=True):
            if not expected / self.most_shift <= share <= expected * self.most_shift:
                return (
                    f"{share:.0%} of the texts were labelled {name!r}, and {expected:.0%} of the labelled rows are: "
                    f"the labels may have collapsed; if that share is right, set most_shift above {self.most_shift:g}"
                )
        wanted = np.full(len(prior), 1 / len(prior)) if self.balanced else prior
        chosen = most_certain(predicted, certainty(opinions), wanted, share_of(number))
        if not len(chosen):
            return f"{len(texts)} texts are too few to keep any"
        logger.info("self-training: round %d learns from %d of %d texts", number, len(chosen), len(texts))
        return texts.iloc[chosen].assign(label=problem.read(predicted[chosen]), **{SOFT: mean[chosen].tolist()})


def texts_of(setup: Setup) -> pd.DataFrame:
    """The texts without labels."""
    assert setup.unlabelled is not None  # `plan` has asked for them
    return setup.unlabelled


def share_of(number: int) -> float:
    """Share of the texts that a round keeps; 0 for round 0."""
    return SHARES[min(number, len(SHARES)) - 1] if number else 0.0


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy of probabilities (..., classes) -> (...), in nats."""
    from scipy.special import entr

    return np.asarray(entr(p).sum(axis=-1))


def disagreement(opinions: np.ndarray) -> np.ndarray:
    """BALD of probabilities (passes, texts, classes) -> (texts,), in [0, log of the number of classes]."""
    return np.maximum(entropy(opinions.mean(axis=0)) - entropy(opinions).mean(axis=0), 0.0)


def certainty(opinions: np.ndarray) -> np.ndarray:
    """Certainty of probabilities (passes, texts, classes) -> (texts,), in [0, 1]."""
    return (1 - disagreement(opinions) / np.log(opinions.shape[-1])) * opinions.mean(axis=0).max(axis=-1)


def most_certain(predicted: np.ndarray, sure: np.ndarray, wanted: np.ndarray, share: float) -> np.ndarray:
    """Positions of the texts to keep, in ascending order.

    A class for which too few texts were predicted gets these, and the others get no more for it.

    Args:
        predicted: Class numbers (texts,).
        sure: Certainty (texts,).
        wanted: Shares of the classes among the kept texts (classes,).
        share: Share of the texts to keep.
    """
    kept = []
    for number, part in enumerate(wanted):
        own = np.flatnonzero(predicted == number)
        count = round(share * len(predicted) * part)
        kept.append(own[np.argsort(-sure[own], kind="stable")][:count])
    return np.sort(np.concatenate(kept))


def learned_rows(
    labelled: pd.DataFrame, kept: pd.DataFrame, problem: Problem, weight: float, seed: int
) -> pd.DataFrame:
    """Rows of a round: the kept texts, and each labelled row so often that all of them weigh what they shall.

    With n labelled rows and m kept texts, labelled rows count max(n, m) / weight times in all, so that the kept texts
    weigh ``weight * min(1, n / m)`` each. Repeated rows give steadier steps than rows of large weight.

    Args:
        labelled: Labelled rows.
        kept: Texts with their labels, and probabilities in the column `SOFT`.
        problem: The problem.
        weight: Factor of the weight of the kept texts, in (0, 1].
        seed: Seed that draws the rows that are repeated once more than others.
    """
    total = round(max(len(labelled), len(kept)) / weight)
    times = np.full(len(labelled), total // len(labelled))
    times[np.random.default_rng(seed).permutation(len(labelled))[: total % len(labelled)]] += 1
    certain = problem.membership(labelled["label"]).astype(float).tolist()
    repeated = labelled.assign(**{SOFT: certain}).iloc[np.repeat(np.arange(len(labelled)), times)]
    rows = pd.concat([repeated, kept], ignore_index=True)
    if WEIGHT in rows:
        rows[WEIGHT] = rows[WEIGHT].fillna(1.0)
    return rows[[column for column in COLUMNS if column in rows]]


def helpfulness(setup: Setup, job: Job, kept: pd.DataFrame) -> np.ndarray:
    """Weights in [0, 1] of kept texts, by what they do to the loss of labelled rows on frozen features."""
    from ..probing import probe_of

    problem, pretrained = setup.problem, setup.pretrained
    model, _ = pretrained.read(job.seeds["init"])

    def read(rows: pd.DataFrame) -> np.ndarray:
        return frozen_features(model, pretrained.tokenizer, pretrained.tokenise(rows), pretrained.pooling)

    phi, soft = read(job.rows), np.array(kept[SOFT].tolist())
    numbers = np.array(problem.ids(job.rows["label"].tolist()))
    weights = weights_of_texts(
        phi, problem.membership(job.rows["label"]).astype(float), read(kept), soft,
        lambda inside: probe_of(phi[inside], job.rows.iloc[inside], problem),
        even_parts(numbers, job.seeds["subset"], units=units(job.rows).tolist()), problem.loss,
    )  # fmt: skip
    logger.info("self-training: %d of %d kept texts weigh less, as they do harm", (weights < 1).sum(), len(weights))
    return weights
