"""A linear probe for each fit, which scores the frozen encoder before fine-tuning.

The probe reads the inputs of the last linear layer at step 0, and costs one pass over the rows. It is fitted on the
training rows alone. If the fine-tuned model scores no better, fine-tuning has gained nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..data.prepare import CROSS_VALIDATION
from ..data.problem import Problem
from ..data.splits import folds, units
from ..heads.features import output_layer
from ..heads.probe import Probe
from ..heads.start import Labelled, cross_fitted, token_key
from .outputs import frozen_features

if TYPE_CHECKING:
    from .plan import Plan
    from .pretrained import Pretrained

logger = logging.getLogger("steadytune")


@dataclass(frozen=True, eq=False)
class FrozenProbe:
    """Answers and scores of a linear probe.

    Attributes:
        scores: Activated outputs (rows, outputs) of each scored set, including ``cross-validation``.
        crossed: Every metric on the training rows, each row predicted by a probe that was not fitted on it. The penalty
            was chosen on the same rows, so these scores are slightly too good.
    """

    scores: dict[str, np.ndarray]
    crossed: dict[str, float | None]

    def metrics(
        self, name: str, problem: Problem, labels: pd.Series, coarser: Mapping[str, str] | None = None
    ) -> dict[str, float | None]:
        """Every metric of the probe on a set.

        Args:
            name: Name of the set.
            problem: The problem.
            labels: Gold labels (rows,) in the order of the set.
            coarser: Class name to the coarser name it is scored under.
        """
        coarse = problem.coarser(coarser or {})
        scores = problem.coarser_scores(self.scores[name], coarser or {})
        return coarse.score(problem.array(labels), coarse.decide(scores), scores)


def frozen_probe(plan: Plan, pretrained: Pretrained, model: Any) -> FrozenProbe | None:
    """Fit a probe on the training rows, and predict every set with it.

    The model does not change, and no random number is drawn.

    Args:
        plan: Plan of the fit.
        pretrained: The pre-trained model, opened.
        model: The model to train, before the first step.

    Returns:
        The probe's answers; None, and a line in the log, for a model whose logits are not those of a last linear layer.
    """
    problem, rows = plan.data.problem, plan.data.train

    def read(tokens: list[dict[str, Any]]) -> np.ndarray:
        return frozen_features(model, pretrained.tokenizer, tokens)

    tokens = pretrained.tokenise(rows)
    try:
        phi = read(tokens)
    except ValueError as error:
        logger.info("no linear probe beside the scores: %s", error)
        return None
    labels = np.array(problem.ids(rows["label"].tolist()))
    keys = [token_key(row["input_ids"]) for row in tokens]
    together: Sequence[Hashable] = units(rows).tolist() if "group" in rows else keys  # keys also join texts cut alike

    def fitted(inside: Sequence[int] | np.ndarray) -> Probe:
        some = Labelled(phi[inside], labels[inside], [keys[i] for i in inside], [together[i] for i in inside])
        return some.probe(len(problem.names) or 1, how="logistic", bias=output_layer(model).bias is not None)

    probe = fitted(range(len(rows)))
    outputs = {name: probe.outputs(read(pretrained.tokenise(frame))) for name, frame in plan.data.tests.items()}
    if plan.refit:
        parts = folds(rows, problem, plan.folds, plan.options.seeds["subset"])
        outputs[CROSS_VALIDATION] = cross_fitted(phi, fitted, parts)
    crossed = problem.activate(probe.out_of_fold)
    return FrozenProbe(
        {name: problem.activate(values) for name, values in outputs.items()},
        problem.score(problem.array(rows["label"]), problem.decide(crossed), crossed),
    )
