"""The plan of a fit: arguments and data, checked before training."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pandas as pd

from ..data.balance import WEIGHT, Predictor, balanced, effective, predictors
from ..data.guards import inspect, raise_errors
from ..data.prepare import Data, prepare
from ..data.problem import Problem, Regression
from ..data.scores import best_threshold, subgroups_of, worst_value
from ..data.splits import folds
from ..data.tables import Kind, Table
from ..errors import UsageError, suggest
from .options import Options, python_value
from .spelling import make_methods, make_procedure, method_record, procedure_record

if TYPE_CHECKING:
    from torch import Tensor

    from ..core import Method
    from .fitted_model import FittedModel
    from .pretrained import Pretrained
    from .procedures.base import Procedure
    from .stages.meta import MetaLearner
    from .stages.pretraining import Pretraining
    from .training import Job, Setup

logger = logging.getLogger("steadytune")


Combine = Literal["best", "soup", "ensemble"]
COMBINE = ("best", "soup", "ensemble")
TRAINS_NOTHING = "steps 0 trains nothing: leave methods, procedure and refit out, or give more steps."
REFIT_EVALUATIONS = 10  # number of evaluations of a fold, which are the candidates for the number of steps


class Stage(Protocol):
    """A training before the fit, which moves the body of the pre-trained model."""

    @property
    def name(self) -> str:
        """Kind of the stage, which names its folder among the checkpoints."""

    @property
    def title(self) -> str:
        """What the stage does, for messages."""

    @property
    def reads_unlabelled(self) -> bool:
        """Whether it reads the texts without labels."""

    def tokens(self, pretrained: Pretrained) -> float:
        """About how many tokens pass forward and backward in all its steps together, without padding."""

    def settled(self, pretrained: Pretrained) -> Stage:
        """The stage as it will be done with this checkpoint.

        Raises:
            UsageError: It cannot be done.
        """

    def with_compact(self, compact: bool) -> Stage:
        """The stage with or without a compact vocabulary."""

    def record(self) -> dict[str, Any]:
        """What decides the moved weights, as JSON."""

    def body(self, pretrained: Pretrained, name: str, checkpoints: Path) -> Mapping[str, Tensor]:
        """Weights of the body after the training; a finished one is read from the checkpoints.

        Raises:
            Interrupted: After a checkpoint.
        """


@dataclass(frozen=True, eq=False)
class Plan:
    """Checked and resolved arguments of `fit`."""

    model: str
    methods: list[Method]
    options: Options
    data: Data
    steps: int
    metric: str
    num_seeds: int
    combine: Combine
    refit: bool
    folds: int
    save_steps: int
    progress: bool
    procedure: Procedure | None = None
    distil: bool = False
    probe: bool = True
    stages: tuple[Stage, ...] = ()

    @property
    def selects(self) -> bool:
        """Whether anything is selected by scores on the rows of `select`."""
        several = self.num_seeds > 1 and self.combine == "best"
        options = self.options
        return bool(options.evaluations or options.calibrate or several or options.threshold == "tune")

    @functools.cached_property
    def predictors(self) -> list[Predictor]:
        """Attributes of the training rows that predict a class by themselves."""
        return predictors(self.data.train, self.data.problem, self.data.columns)

    @property
    def select(self) -> pd.DataFrame | None:
        """Rows for selecting runs and steps; they are not trained on and are not a test set."""
        return self.data.tests.get("validation")


def make_plan(
    train: Any,
    *,
    model: str | Path,
    text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    group: str | None = None,
    subgroup: str | Sequence[str] | None = None,
    methods: str | Method | Sequence[str | Method] | None = (),
    procedure: str | Procedure | None = None,
    aux: Any = None,
    aux_steps: int | None = None,
    meta: str | MetaLearner | None = None,
    unlabelled: Any = None,
    unlabelled_size: int | None = None,
    pretrain: str | Pretraining | None = None,
    tests: Mapping[str, Any] | None = None,
    validation: Any = None,
    validation_column: str | None = None,
    kind: Kind = "auto",
    metric: str | None = None,
    num_seeds: int = 1,
    combine: Combine = "soup",
    distil: bool = False,
    refit: bool = False,
    folds: int = 5,
    probe: bool = True,
    save_steps: int = 200,
    progress: bool = True,
    blank: bool = False,
    apart: Sequence[Any] = (),
    changed: Callable[[pd.DataFrame, Problem], pd.DataFrame] | None = None,
    **options: Any,
) -> Plan:
    """Check options and data; arguments as of `fit`, but for three.

    With ``blank``, training rows whose label is empty are left out. Nothing is learnt from the texts of ``apart``
    (files or frames), as from those of the tests. ``changed`` changes the checked training rows before anything is made
    of them.

    Raises:
        UsageError: What was asked for cannot be done.
    """
    if not isinstance(model, (str, Path)):
        raise UsageError(
            f"model must be a directory or a name on the hub, got a {type(model).__name__}: save it with "
            "save_pretrained (its tokenizer too) and give the directory, or train it with steadytune.Trainer."
        )
    if tests is not None and not isinstance(tests, Mapping):
        raise UsageError(
            f"tests must be a dictionary of name and table, got {type(tests).__name__}: as in tests={{'test': table}}."
        )
    several = make_procedure(procedure)
    checked = Options.of(options) if several is None else several.options(Options.of(options))
    if refit and checked.steps == 0:  # before refit asks for evaluations, of which there are none without steps
        raise UsageError(TRAINS_NOTHING)
    if refit and not checked.evaluations:
        checked = dataclasses.replace(checked, evaluations=REFIT_EVALUATIONS)
    num_seeds = python_value("num_seeds", num_seeds, int)
    folds = python_value("folds", folds, int)
    save_steps = python_value("save_steps", save_steps, int)
    if label_separator is not None:
        label_separator = python_value("label_separator", label_separator, str)
    _check(num_seeds, combine, refit, folds, save_steps, checked)
    chosen = make_methods(methods)
    _check_start(chosen, checked)
    drawing = [type(m).__name__ for m in chosen if m.draws_weights]
    if combine == "soup" and num_seeds > 1 and drawing:
        raise UsageError(
            f"a soup is the mean of models that began alike, and {drawing[0]} draws other weights in every run: "
            "choose combine best or ensemble."
        )
    columns = None if text is None else tuple(text) if isinstance(text, (list, tuple)) else (text,)
    table = Table.of(train, columns, label, "train", kind, group, label_separator, subgroup)
    if table is train:
        own = {
            "text": text,
            "label": label,
            "label_separator": label_separator,
            "kind": None if kind == "auto" else kind,
        }
        table = _with_parts(table, own, group, subgroup)
    _check_columns(chosen, table)
    data = prepare(
        table,
        {str(name): Table.of(t, columns, label, str(name)) for name, t in (tests or {}).items()},
        None if validation is None else Table.of(validation, columns, label, "validation"),
        train_size=checked.train_size,
        validation_share=0.0 if refit else checked.validation_share,
        validation_column=validation_column,
        seed=checked.seeds["subset"],
        unlabelled=unlabelled,
        unlabelled_size=None if unlabelled_size is None else python_value("unlabelled_size", unlabelled_size, int),
        blank=blank,
        apart=apart,
    )
    for finding in raise_errors(inspect(data, standardize=checked.standardize)):
        logger.warning("%s", finding.message)
    if changed is not None:
        data = dataclasses.replace(data, train=changed(data.train, data.problem))
    data = _balanced(data, checked.balance)
    if checked.threshold is not None:
        decided = data.problem.at(0.5 if isinstance(checked.threshold, str) else checked.threshold)
        data = dataclasses.replace(data, problem=decided)
    plan = Plan(
        str(model), chosen, checked, data, checked.total_steps(len(data.train)),
        data.problem.metric(metric).name, num_seeds, combine, refit, folds, save_steps, progress,
        several, python_value("distil", distil, bool), python_value("probe", probe, bool),
    )  # fmt: skip
    plan = dataclasses.replace(plan, stages=_stages(aux, aux_steps, meta, pretrain, plan))
    _check_selection(plan)
    _check_unlabelled(plan)
    _check_hard_labels(plan)
    return plan


def _stages(
    aux: Any, steps: int | None, meta: str | MetaLearner | None, pretrain: str | Pretraining | None, plan: Plan
) -> tuple[Stage, ...]:
    """The trainings that come first: on texts alone, then on other tables."""
    aux = None if isinstance(aux, (list, tuple, Mapping)) and not aux else aux
    if aux is None and (steps is not None or meta is not None):
        given = f"aux_steps {steps}" if steps is not None else f"meta {meta}"
        raise UsageError(f"{given} is for auxiliary tables, and there is none: give aux, or leave it out.")
    if aux is None and pretrain is None:
        return ()
    from .stages import further, stages_of

    what, options, data = "aux" if pretrain is None else "pretrain", plan.options, plan.data
    named = {method_record(method)["name"] for method in plan.methods}
    kept = named & {"adapters"} or {options.peft} & {"prefix", "prompt"}
    if kept:
        raise UsageError(
            f"the output of {kept.pop()} holds adapters for the model as it was published, and {what} changes that "
            "model: leave one of them out."
        )
    if options.head == "words" or any(getattr(method, "how", None) == "words" for method in plan.methods):
        raise UsageError(
            f"head words takes the output weights of the language model as it was published, and {what} moves the body "
            "that they read: leave one of them out, or give head logistic."
        )
    if plan.refit and pretrain is not None:
        raise UsageError(
            "refit scores each row by a training that has not read it, and pretrain reads the texts of all rows: "
            "leave one of them out."
        )
    texts = () if pretrain is None else (
        further(pretrain, options=options, fit=data, save_steps=plan.save_steps, progress=plan.progress),
    )  # fmt: skip
    tables = () if aux is None else stages_of(
        aux, steps, meta, model=plan.model, options=options, fit=data, save_steps=plan.save_steps,
        progress=plan.progress,
    )  # fmt: skip
    return (*texts, *tables)


def _check_unlabelled(plan: Plan) -> None:
    """Texts without labels need something that reads them, and the other way round."""
    readers = [method_record(method)["name"] for method in plan.methods if method.reads_unlabelled]
    if plan.procedure is not None and plan.procedure.reads_unlabelled:
        readers.append(procedure_record(plan.procedure)["name"])
    if plan.data.unlabelled is None and readers:
        raise UsageError(
            f"{readers[0]} learns from texts without labels: name them with unlabelled (--unlabelled FILE, or blank "
            "for the rows of the training table whose label is empty)."
        )
    if plan.data.unlabelled is not None and not (readers or any(stage.reads_unlabelled for stage in plan.stages)):
        raise UsageError(
            "nothing here reads the texts without labels: give pretrain (--pretrain tapt), a procedure or a method "
            "that learns from them (--procedure self-training, --method meta_semi), or leave unlabelled out."
        )


def _check_hard_labels(plan: Plan) -> None:
    """Methods that need one class a row go with nothing that trains on other labels, which a later training may do."""
    needing = [type(m).__name__ for m in plan.methods if m.hard_labels and not _changes_nothing(m)]
    if not needing:
        return
    if not plan.data.problem.classes:
        raise UsageError(
            f"{needing[0]} needs one class a row, this is {plan.data.problem.kind}: leave {needing[0]} out."
        )
    trained = {"distil": plan.distil}
    if plan.procedure is not None:
        trained[procedure_record(plan.procedure)["name"]] = plan.procedure.soft_labels
    for name in (name for name, soft in trained.items() if soft):
        raise UsageError(
            f"{needing[0]} needs one class a row, and {name} trains on the probabilities that a model gives to the "
            "classes: leave one of them out."
        )


def _changes_nothing(method: Method) -> bool:
    """Whether a method has the setting at which it is plain fine-tuning."""
    return method.null is not None and all(getattr(method, name) == value for name, value in method.null.items())


def _balanced(data: Data, names: Sequence[str] | None) -> Data:
    """The data with weights of the training rows, if attributes are to be balanced."""
    if not names:
        return data
    weights = balanced(data.train, data.problem, names, data.columns)
    logger.info(
        "balanced by %s: %d rows count as %.0f (effective number), with weights from %.2f to %.2f",
        ", ".join(names), len(weights), effective(weights), weights.min(), weights.max(),
    )  # fmt: skip
    return dataclasses.replace(data, train=data.train.assign(**{WEIGHT: weights}))


def _check(num_seeds: int, combine: str, refit: bool, folds: int, save_steps: int, options: Options) -> None:
    if save_steps < 0:
        raise UsageError(f"save_steps must be 0 (no checkpoints) or more, got {save_steps}.")
    if num_seeds < 1:
        raise UsageError(f"num_seeds must be 1 or more, got {num_seeds}.")
    if combine not in COMBINE:
        raise UsageError(f"unknown combine {combine!r}.{suggest(combine, COMBINE)}")
    if refit and folds < 2:
        raise UsageError(f"folds must be 2 or more, got {folds}.")
    if refit and (options.calibrate or options.patience is not None):
        what = "calibrate" if options.calibrate else "patience"
        raise UsageError(f"refit trains on all rows, {what} needs validation rows: leave one of them out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("fit runs in one process: start it without torchrun, or use steadytune.Trainer.")


def _check_columns(methods: Sequence[Method], table: Table) -> None:
    """Batches of `fit` hold tokens, labels, and under any name that a method reads the number of the subgroup."""
    for method in methods:
        if method.input_columns and not table.subgroup:
            raise UsageError(
                f"{type(method).__name__} reads the subgroup of each row: name the column that tells it with subgroup "
                f"(--subgroup COLUMN), or leave {type(method).__name__} out."
            )


def _check_start(methods: Sequence[Method], options: Options) -> None:
    """The options `head` and `pooling` stand for methods, which may be given instead."""
    given = {method_record(method)["name"] for method in methods}
    for name, option, value in (("head_init", "head", options.head), ("pooling", "pooling", options.pooling)):
        if name in given and value not in ("random", "auto", "model"):
            raise UsageError(f"{option}={value!r} stands for the method {name}, which is given too: leave one out.")


def _with_parts(table: Table, given: Mapping[str, Any], group: str | None, subgroup: Any) -> Table:
    """A Table of the caller's with the group and subgroups of the fit.

    Args:
        table: It.
        given: Options of the fit that a Table has already, None where they are not given.
        group: As of `fit`.
        subgroup: As of `fit`.

    Raises:
        UsageError: One of them is given.
    """
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{table.origin}: this Table says itself what its {name} is, got {name} {value!r} too: "
                             "leave it out.")  # fmt: skip
    found = Table.of(table.frame, table.text, table.label, "train", group=group, subgroup=subgroup)
    return dataclasses.replace(table, group=found.group or table.group, subgroup=found.subgroup or table.subgroup)


def _check_selection(plan: Plan) -> None:
    """What selects needs rows to select on."""
    from ..methods import GroupWeights

    if plan.options.worst_subgroup:
        parted = plan.refit or (plan.select is not None and "subgroup" in plan.select)
        if not (parted and "subgroup" in plan.data.train):
            raise UsageError(
                "worst_subgroup selects by the subgroup with the worst score: name its column with subgroup "
                "(--subgroup COLUMN), which the validation rows must have too."
            )
        if not plan.selects:
            raise UsageError("worst_subgroup selects nothing here: give evaluations, several runs with combine='best', "
                             "or threshold='tune', or leave it out.")  # fmt: skip
    if plan.distil and (plan.combine != "ensemble" or plan.num_seeds < 2):
        raise UsageError("distil makes one model of an ensemble: give combine='ensemble' and num_seeds of 2 or more.")
    if not plan.steps and (plan.methods or plan.procedure or plan.refit):
        raise UsageError(TRAINS_NOTHING)
    if plan.refit and plan.procedure is not None:
        raise UsageError("refit cuts the rows for one kind of training, a procedure is several: leave one of them out.")
    if plan.refit and plan.select is not None:
        raise UsageError("refit chooses the number of steps by cross-validation: leave the validation rows out.")
    if plan.select is None:
        asked = {
            "evaluations": bool(plan.options.evaluations) and not plan.refit,
            "calibrate": plan.options.calibrate,
            "threshold='tune'": plan.options.threshold == "tune",
            "combine='best'": plan.num_seeds > 1 and plan.combine == "best",
        }
        for name in (name for name, wanted in asked.items() if wanted):
            raise UsageError(f"{name} needs validation rows: give a validation table or share, or leave it out.")
    if plan.options.threshold == "tune" and plan.data.problem.metric(plan.metric).needs_probabilities:
        raise UsageError(f"{plan.metric} is the same at every threshold: choose another metric to tune it by, as f1.")
    if plan.options.calibrate and not plan.data.problem.classes:
        raise UsageError(f"calibrate is for classification, this is {plan.data.problem.kind}: leave it out.")
    if not plan.data.problem.weighted:
        asked = {name: getattr(plan.options, name) for name in ("class_weights", "label_smoothing", "focal")}
        for name in (name for name, value in asked.items() if value not in ("none", 0)):
            raise UsageError(f"{name} is for classification, this is regression: leave it out.")
    for name in (name for name in ("class_weights", "focal") if getattr(plan.options, name) not in ("none", 0)):
        if any(isinstance(method, GroupWeights) for method in plan.methods):
            raise UsageError(
                f"group_weights weighs the plain loss of rows, which {name} changes, so that rows could be unlearned: "
                "leave one of them out."
            )
    if plan.procedure is not None:
        plan.procedure.check(plan)


def settled(plan: Plan, pretrained: Pretrained) -> Plan:
    """The plan with stages as this checkpoint can do them.

    Raises:
        UsageError: A stage cannot be done.
    """
    return dataclasses.replace(plan, stages=tuple(stage.settled(pretrained) for stage in plan.stages))


def open_model(plan: Plan) -> Pretrained:
    """Read the config and tokenizer of the model, and choose the inputs of its head, without reading weights."""
    from .pretrained import Pretrained
    from .start import chosen_pooling

    options = plan.options
    pretrained = Pretrained.open(
        plan.model, plan.data.problem, dropout=options.dropout, max_length=options.max_length, prompt=options.prompt
    )
    for note in pretrained.notes(options.max_length, options.prompt):
        logger.info("%s", note)
    embeds = plan.procedure is not None and plan.procedure.embeds
    pooling = chosen_pooling(pretrained, options, plan.methods, plan.data.train, embeds)
    return dataclasses.replace(pretrained, pooling=pooling)


def passes_of_stages(plan: Plan, pretrained: Pretrained) -> float:
    """About how many passes over a batch of the fit cost as much as its stages, at most: by their tokens."""
    options, rows = plan.options, plan.data.train
    batch = min(options.batch_size, len(rows)) * options.accumulation * pretrained.mean_length(rows)
    return sum(stage.tokens(pretrained) for stage in plan.stages) / batch


def make_setup(plan: Plan, pretrained: Pretrained, checkpoints: Path) -> Setup:
    """Setup that all trainings share."""
    from .row_weights import RowWeights
    from .start import with_start
    from .training import Setup

    problem = plan.data.problem
    if isinstance(problem, Regression) and plan.options.standardize:
        problem = problem.standardised(plan.data.train["label"].tolist(), centred=pretrained.bias)
    weighing = [RowWeights()] if plan.options.balance else []
    methods = [*with_start(plan.methods, plan.options, pretrained.pooling), *weighing]
    subgroups = sorted(set(plan.data.train["subgroup"])) if "subgroup" in plan.data.train else []
    return Setup(
        pretrained, methods, plan.options, problem, plan.steps, plan.metric, checkpoints, plan.save_steps,
        plan.progress, keep=plan.num_seeds > 1 or plan.refit, moments=plan.refit, subgroups=subgroups,
        unlabelled=None if plan.data.unlabelled is None else plan.data.unlabelled.rows,
    )  # fmt: skip


def runs(plan: Plan, stop_at: int | None = None) -> list[Job]:
    """Jobs whose models are combined: the same head, but different row orders, dropout and draws."""
    from .training import SAME, Job

    def seeds(i: int) -> dict[str, int]:
        return {name: value if name in SAME else (value + i) % 2**32 for name, value in plan.options.seeds.items()}

    names = [f"run-{i}" if plan.num_seeds > 1 else "training" for i in range(plan.num_seeds)]
    averaged = plan.num_seeds > 1 and plan.combine == "soup"
    return [
        Job(name, plan.data.train, plan.select, seeds(i), stop_at, averaged=averaged) for i, name in enumerate(names)
    ]


def fold_jobs(plan: Plan) -> list[Job]:
    """One training per fold, scored on the rows it left out."""
    from .training import Job

    rows = plan.data.train
    parts = folds(rows, plan.data.problem, plan.folds, plan.options.seeds["subset"])
    return [
        Job(f"fold-{i}", rows.iloc[inside], rows.iloc[outside], plan.options.seeds)
        for i, (inside, outside) in enumerate(parts)
    ]


def fitted_model(plan: Plan, pretrained: Pretrained, models: Sequence[Any]) -> FittedModel:
    """Trained models as one that reads tables like the training table."""
    from .fitted_model import FittedModel

    table = plan.data.table
    assert table is not None
    return FittedModel(
        models,
        pretrained.tokenizer,
        plan.data.problem,
        text=table.text or (),
        label=table.label or "",  # found, if they were not given
        label_separator=table.label_separator,
        max_length=pretrained.max_length,
        prompt=pretrained.prompt,
        bf16=plan.options.bf16,
        constant=plan.data.problem.constant(plan.data.train["label"]),
        subgroup=table.subgroup,
        group=table.group,
    )


def answers(model: FittedModel, pretrained: Pretrained, data: Data, progress: bool = False) -> dict[str, np.ndarray]:
    """Scores (rows, outputs) of a model for each set, as `FittedModel.scores` gives them, from one pass over its rows.

    Args:
        model: Model that predicts.
        pretrained: The pre-trained model, which tokenises.
        data: Data with the sets.
        progress: Whether to show bars.
    """
    return {name: model.scores_of_tokens(pretrained.tokenise(rows), progress) for name, rows in data.tests.items()}


def tune_threshold(model: FittedModel, plan: Plan, answered: Mapping[str, np.ndarray]) -> None:
    """Set the threshold that is best on the validation rows, if the options ask for it.

    Args:
        model: Model whose threshold is set.
        plan: Plan of the fit.
        answered: Scores of the model by set, as of `answers`.
    """
    if plan.options.threshold != "tune":
        return
    assert plan.select is not None
    problem = plan.data.problem
    threshold = best_threshold(
        problem, problem.array(plan.select["label"]), answered["validation"], problem.metric(plan.metric),
        subgroups_of(plan.select) if plan.options.worst_subgroup else None,
    )  # fmt: skip
    model.problem = problem.at(threshold)
    logger.info("threshold %.4f is the best on %d validation rows", threshold, len(plan.select))


def evaluate(
    model: FittedModel, data: Data, answered: Mapping[str, np.ndarray]
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Predictions of all sets in one frame, and the metrics of each set.

    Args:
        model: Model that has answered.
        data: Data with the sets.
        answered: Scores of the model by set, as of `answers`.
    """
    tables, scores = [], {}
    for name, rows in data.tests.items():
        predicted, scores[name] = model.judge(rows, answered[name], data.coarser.get(name))
        about = pd.DataFrame({"set": name, "row": rows.index, "label": rows["label"].to_numpy()})
        for column in ("group", "subgroup"):
            if column in rows:
                about[column] = rows[column].to_numpy()
        tables.append(pd.concat([about, predicted], axis=1))
    return (pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()), scores


def selection_score(plan: Plan, model: FittedModel, answered: Mapping[str, np.ndarray]) -> float | None:
    """The score by which a run is selected.

    Args:
        plan: Plan of the fit.
        model: Model of the run.
        answered: Scores of the model by set, as of `answers`.
    """
    rows, chances = plan.select, answered["validation"]
    assert rows is not None
    metric = plan.data.problem.metric(plan.metric)
    given = chances if metric.needs_probabilities else model.problem.decide(chances)
    parts = subgroups_of(rows) if plan.options.worst_subgroup else None
    return worst_value(metric, model.problem.array(rows["label"]), given, model.problem.names, parts)
