"""A linear probe beside every fit: what the frozen encoder is worth, before it is fine-tuned.

The probe reads what enters the last linear layer of the model at step 0 and costs one pass over the rows. It sees the
training rows alone. A fine-tuned model that scores no better has gained nothing over it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..data.problem import Problem
from ..data.splits import folds
from ..heads.features import output_layer
from ..heads.probe import Probe
from ..heads.start import Labelled, cross_fitted, token_key
from .outputs import frozen_features
from .plan import CROSS_VALIDATION

if TYPE_CHECKING:
    from .plan import Plan
    from .pretrained import Pretrained

logger = logging.getLogger("steadytune")


@dataclass(frozen=True, eq=False)
class FrozenProbe:
    """What a linear probe answers.

    Attributes:
        scores: Set -> activated outputs (rows, outputs), for every set that is scored, ``cross-validation`` included.
        crossed: Every metric on the training rows, each judged by a probe that did not see it. The penalty was chosen
            on the same rows, so that these are slightly too good.
    """

    scores: dict[str, np.ndarray]
    crossed: dict[str, float | None]

    def metrics(
        self, name: str, problem: Problem, labels: pd.Series, coarser: Mapping[str, str] | None = None
    ) -> dict[str, float | None]:
        """Every metric of the probe on a set.

        Args:
            name: Of the set.
            problem: What is predicted.
            labels: Gold labels (rows,) in the order of the set.
            coarser: Class name to the coarser name it is scored under.
        """
        coarse = problem.coarser(coarser or {})
        scores = problem.coarser_scores(self.scores[name], coarser or {})
        return coarse.score(problem.array(labels), coarse.decide(scores), scores)


def frozen_probe(plan: Plan, pretrained: Pretrained, model: Any) -> FrozenProbe | None:
    """Fit a probe on the training rows and let it judge every set.

    The model is left as it was, and no random number is drawn.

    Args:
        plan: Of the fit.
        pretrained: Its model, opened.
        model: As it is trained, before the first step.

    Returns:
        The probe's answers; None, and a line in the log, for a model whose logits are not those of a last linear layer.
    """
    problem, rows = plan.data.problem, plan.data.train

    def read(frame: pd.DataFrame) -> np.ndarray:
        tokens = pretrained.tokenise(frame)
        return frozen_features(model, pretrained.tokenizer, tokens)

    tokens = pretrained.tokenise(rows)
    try:
        phi = frozen_features(model, pretrained.tokenizer, tokens)
    except ValueError as error:
        logger.info("no linear probe beside the scores: %s", error)
        return None
    labels = np.array(problem.ids(rows["label"].tolist()))
    keys = [token_key(row["input_ids"]) for row in tokens]

    def fitted(inside: Sequence[int] | np.ndarray) -> Probe:
        some = Labelled(phi[inside], labels[inside], [keys[i] for i in inside])
        return some.probe(len(problem.names) or 1, how="logistic", bias=output_layer(model).bias is not None)

    probe = fitted(range(len(rows)))
    outputs = {name: probe.outputs(read(frame)) for name, frame in plan.data.tests.items()}
    if plan.refit:
        parts = folds(rows, problem, plan.folds, plan.options.seeds["subset"])
        outputs[CROSS_VALIDATION] = cross_fitted(phi, fitted, parts)
    crossed = problem.activate(probe.out_of_fold)
    return FrozenProbe(
        {name: problem.activate(values) for name, values in outputs.items()},
        problem.score(problem.array(rows["label"]), problem.decide(crossed), crossed),
    )
