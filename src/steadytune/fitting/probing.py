"""Encoders ranked for a table by linear probes on their frozen features, in seconds to minutes.

Nothing is fine-tuned. Each model reads every row once, and a penalised linear model learns the labels from what it
says. The score on the training rows is cross-fitted: the rows of a fold are judged by a probe that saw them neither for
its weights nor for its penalty. All models are judged on the same folds, and their differences row by row.

The intervals are for other rows of the same kind. They do not tell how the models would rank after fine-tuning.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..data import splits
from ..data.chunks import write_csv
from ..data.guards import truncated
from ..data.intervals import LEVEL, Interval
from ..data.metrics import Metric
from ..data.prepare import Data
from ..data.problem import Problem
from ..data.scores import full_scores, groups_of
from ..data.tables import Kind
from ..errors import UsageError
from ..files.atomic import write_json, write_whole, writing
from ..heads.features import last_linear
from ..heads.pooling import untrained_dense
from ..heads.probe import Parts, Probe
from ..heads.sentence_folder import sentence_folder
from ..heads.start import FOLDS, cross_fitted, even_parts, fit_probe
from ..pages.words import interval, listed, number
from .encoding import check_vocabulary, token_counts
from .outputs import device, frozen_features
from .plan import make_plan
from .predict_file import check_output
from .pretrained import NAMED, Pretrained
from .randomness import as_found

logger = logging.getLogger("steadytune")

Pooled = Literal["auto", "model", "mean", "cls"]
POOLINGS = ("auto", "model", "mean", "cls")
FILES = (".csv", ".json")  # endings of a table that is saved

TRAIN = "train"  # the set whose rows are judged by probes that did not see them
CONSTANT = "constant answer"
DRAWS = 999  # of the rows, for the interval of a difference


@dataclass(frozen=True, eq=False)
class Probed:
    """Encoders ranked for a table.

    Attributes:
        frame: A row per model, the best first, and last what one answer for all rows scores. Columns: ``name``,
            ``model``, ``pooling``, ``prompt``, ``max_length``, the ``score`` on the training rows with its 95 %
            interval (``low``, ``high``), the ``difference`` to the best with its interval (``difference_low``,
            ``difference_high``), ``score_NAME``, ``low_NAME`` and ``high_NAME`` of every test set, ``seconds`` to read
            all rows once, ``width`` of the encoder's features and ``parameters`` of the encoder.
        scores: Name of the model -> set -> everything that `data.scores.full_scores` says.
        metric: Metric of the scores.
        rows: Number of training rows.
        verdict: What the differences show, in one sentence; empty for a single model.
    """

    frame: pd.DataFrame
    scores: dict[str, dict[str, dict[str, Any]]]
    metric: str
    rows: int
    verdict: str

    @property
    def best(self) -> str:
        """The model with the best score on the training rows, as it was given."""
        return str(self.frame["model"].iloc[0])

    @property
    def tests(self) -> list[str]:
        """Names of the test sets."""
        return [name for name in next(iter(self.scores.values())) if name != TRAIN]

    def save(self, path: str | Path) -> None:
        """Write the table to a .csv file, or table and verdict to a .json file.

        Raises:
            UsageError: Another ending, or the file cannot be written.
        """
        path = Path(path)
        check_output(path, [], overwrite=True, endings=FILES)
        with writing(path, resumes=False):
            if path.suffix.lower() == ".csv":
                return write_whole(path, lambda part: write_csv(self.frame, part))
            rows = [{key: _plain(value) for key, value in row.items()} for row in self.frame.to_dict("records")]
            write_json(path, {"metric": self.metric, "rows": self.rows, "verdict": self.verdict, "models": rows})


def _plain(value: Any) -> Any:
    """A cell as JSON has it."""
    value = value.item() if hasattr(value, "item") else value
    return None if pd.isna(value) else value


@as_found()
def probe(
    train: Any,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    group: str | None = None,
    tests: Mapping[str, Any] | None = None,
    kind: Kind = "auto",
    metric: str | None = None,
    pooling: Pooled = "auto",
    prompt: str | None = None,
    max_length: int | None = None,
    train_size: int | None = None,
    folds: int = FOLDS,
    seed: int = 0,
) -> Probed:
    """Rank pre-trained models for a table by linear probes on their frozen features.

    Args:
        train: A table, as of `fit`.
        models: Hugging Face model directories or hub names; a mapping gives them names of its own.
        text: One text column, or two for sentence pairs; found by name or content if not given.
        label: The label column, found likewise; or, for several labels a row, one column of 0 and 1 for each class.
        label_separator: What stands between several labels in one cell.
        group: A column whose equal values keep rows in one fold, as do equal texts. Intervals are as wide as groups
            differ.
        tests: Name -> table; judged by probes of all training rows.
        kind: classification, multilabel or regression; decided from the labels by default.
        metric: Metric that ranks; by default the first of the kind.
        pooling: What is read of a model: ``"mean"`` over tokens, ``"cls"``, the first token, or what its head reads,
            ``"model"``. ``"auto"`` takes what a sentence-transformers folder says, and ``"model"`` for others. Of a
            pair, a head reads both texts together; with the others each is read alone, as sentence encoders are made
            to, and the two are `compared`.
        prompt: Text before each row's first text, or before both where they are read alone. ``"name:query"`` takes the
            prompt of that name from each model's folder, and none where it has no such prompt.
        max_length: Tokens per row, as of `fit`.
        train_size: Draw this many rows, stratified.
        folds: Folds of the cross-fitting.
        seed: Seed of folds and of the draw.

    Raises:
        UsageError: What was asked for cannot be done: an unreadable table or model, one class, too few rows of a class.

    Example:
        >>> probe("train.csv", ["all-MiniLM-L6-v2", "bert-base-uncased"]).frame  # doctest: +SKIP
    """
    named = _named(models)
    if pooling not in POOLINGS:
        raise UsageError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}.")
    plan = make_plan(  # reads and checks the tables; its model is never opened
        train, model="", text=text, label=label, label_separator=label_separator, group=group, tests=tests, kind=kind,
        metric=metric, validation_share=0.0, train_size=train_size, seed=seed, folds=folds,
    )  # fmt: skip
    parts = splits.folds(plan.data.train, plan.data.problem, plan.folds, plan.options.seeds["subset"])
    opened = _opened(named, plan.data.problem, prompt, max_length)
    judged = {name: _judged(name, model, pooling, plan.data, parts) for name, model in opened.items()}
    return _ranked(judged, plan.data, plan.metric)


def _named(models: Any) -> dict[str, str]:
    """Models by name: that of the folder, or all of what was given where two folders have the same.

    Raises:
        UsageError: No model, or one twice.
    """
    if isinstance(models, Mapping):
        named = {str(name): str(model) for name, model in models.items()}
    else:
        given = [str(model) for model in ([models] if isinstance(models, (str, Path)) else models)]
        twice = next((model for model in given if given.count(model) > 1), None)
        if twice is not None:
            raise UsageError(f"model {twice!r} is given twice: give each once.")
        short = [Path(model).name for model in given]
        named = dict(zip(short if len({*short}) == len(given) else given, given, strict=True))
    if not named:
        raise UsageError("give at least one model to probe.")
    return named


def _opened(
    named: Mapping[str, str], problem: Problem, prompt: str | None, max_length: int | None
) -> dict[str, Pretrained]:
    """Config, tokenizer and folder of every model, before the weights of any are read.

    Raises:
        UsageError: A model cannot be opened, or none has a prompt of this name.
    """
    prompts = dict.fromkeys(named, prompt)
    if prompt is not None and prompt.startswith(NAMED):
        key = prompt.removeprefix(NAMED)
        lacking = [name for name, model in named.items() if key not in getattr(sentence_folder(model), "prompts", {})]
        if len(lacking) < len(named):
            prompts |= dict.fromkeys(lacking, "")
    opened = {}
    for name, model in named.items():
        opened[name] = Pretrained.open(model, problem, max_length=max_length, prompt=prompts[name])
        for note in opened[name].notes(max_length, prompts[name]):
            logger.warning("%s: %s", name, note)
    return opened


# ---- one model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """What a frozen model says of every row.

    Attributes:
        pooling: What is read of the model.
        features: Features (rows, width) by set.
        seconds: Seconds to read all rows.
        width: Number of features of one text.
        parameters: Number of weights of the encoder.
    """

    pooling: str
    features: dict[str, np.ndarray]
    seconds: float
    width: int
    parameters: int


def read_rows(name: str, pretrained: Pretrained, pooling: Pooled, sets: Mapping[str, pd.DataFrame]) -> Reading:
    """Read all rows with a model.

    Args:
        name: What messages call the model.
        pretrained: The model, opened.
        pooling: As of `probe`.
        sets: Rows by set.

    Raises:
        UsageError: The model has no features of this kind, or they are no numbers.
    """
    model: Any
    model, new = pretrained.read(seed=0)
    model.to(device())
    untrained = None if last_linear(model) is None else untrained_dense(model, new)
    how = _pooling(name, pooling, pretrained, untrained)
    tokens = {part: _tokens(f"{name}: the {part} rows", rows, pretrained, model, how) for part, rows in sets.items()}
    started = time.perf_counter()
    try:
        read = {
            part: [frozen_features(model, pretrained.tokenizer, one, how) for one in texts]
            for part, texts in tokens.items()
        }
    except ValueError as error:
        raise UsageError(f"model {name!r}: {error}. Choose another pooling.") from error
    seconds = time.perf_counter() - started
    phi = {part: compared(features) for part, features in read.items()}
    if not all(np.isfinite(features).all() for features in phi.values()):
        raise UsageError(f"model {name!r}: its features are not numbers, its weights are damaged: fetch it again.")
    width = next(iter(read.values()))[0].shape[1]
    return Reading(how, phi, seconds, width, sum(p.numel() for p in model.base_model.parameters()))


@dataclass(frozen=True, eq=False)
class _Judged:
    """A model, what it says of every row, and what probes on that answer to every set."""

    pretrained: Pretrained
    reading: Reading
    answers: dict[str, np.ndarray]


def _judged(name: str, pretrained: Pretrained, pooling: Pooled, data: Data, parts: Parts) -> _Judged:
    """Read all rows with a model and judge them by probes.

    Raises:
        UsageError: As of `read_rows`.
    """
    reading = read_rows(name, pretrained, pooling, {TRAIN: data.train, **data.tests})
    started, phi = time.perf_counter(), reading.features

    def fit(inside: np.ndarray) -> Probe:
        return probe_of(phi[TRAIN][inside], data.train.iloc[inside], data.problem)

    whole = fit(np.arange(len(data.train)))
    outputs = {part: whole.outputs(features) for part, features in phi.items()}
    outputs[TRAIN] = cross_fitted(phi[TRAIN], fit, parts)
    logger.info("%s: all rows read in %.1f s, probes fitted in %.1f s", name, reading.seconds,
                time.perf_counter() - started)  # fmt: skip
    return _Judged(pretrained, reading, {part: data.problem.activate(values) for part, values in outputs.items()})


def probe_of(phi: np.ndarray, rows: pd.DataFrame, problem: Problem) -> Probe:
    """A probe of these rows, whose penalty is chosen on them alone."""
    labels = np.array(problem.ids(rows["label"].tolist()))
    units = splits.units(rows).tolist()
    try:
        parts: Parts = splits.folds(rows, problem, FOLDS, seed=0)
    except UsageError:  # a class of one row, or fewer rows than folds
        parts = even_parts(labels, seed=0, units=units)
    return fit_probe(phi, labels, len(problem.names) or 1, how="logistic", bias=True, parts=parts, units=units)


def _pooling(
    name: str, wanted: Pooled, pretrained: Pretrained, untrained: str | None
) -> Literal["model", "mean", "cls"]:
    """What is read of a model, and a warning where that is not what it was trained for."""
    sentence = pretrained.sentence
    if wanted != "auto":
        return wanted
    if sentence is not None and sentence.pooling in ("mean", "cls"):
        return "mean" if sentence.pooling == "mean" else "cls"
    if sentence is not None and sentence.pooling is not None:
        logger.warning("%s pools its tokens by %s: what its head reads is probed instead", name, sentence.pooling)
    elif untrained is not None:
        logger.warning("%s: its head reads %s, which was never trained: try --pooling mean", name, untrained)
    return "model"


def _tokens(what: str, rows: pd.DataFrame, pretrained: Pretrained, model: Any, how: str) -> list[list[dict[str, Any]]]:
    """Tokens of the texts that are read in one go: pairs together by a head, and each text alone where it is pooled.

    The model must have all of them; rows that are cut are counted in the log.
    """
    texts = [rows]
    if "text_pair" in rows and how != "model":
        texts = [rows[["text"]], rows[["text_pair"]].set_axis(["text"], axis=1)]
    encoded = []
    for some in texts:
        encoded.append(pretrained.tokenise(some))
        check_vocabulary(encoded[-1], model, what, rows.index)
        counts = token_counts(some, encoded[-1], pretrained.tokenizer, pretrained.max_length, pretrained.prompt)
        cut = truncated(counts, pretrained.max_length, what, list(rows.index))
        if cut is not None:
            logger.warning("%s", cut.message)
    return encoded


def compared(features: Sequence[np.ndarray]) -> np.ndarray:
    """Features (rows, width) of one text a row; of two, what a linear model needs to compare them (rows, 2 width).

    Of two they are the absolute differences and the products of the vectors at length 1 (after Conneau et al., EMNLP
    2017, arXiv 1705.02364, who also keep the vectors themselves); the sum of the products is the cosine.
    """
    if len(features) == 1:
        return features[0]
    u, v = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12) for one in features)
    return np.concatenate([np.abs(u - v), u * v], axis=1)


# ---- all of them ------------------------------------------------------------------------------------------------


def _ranked(judged: Mapping[str, _Judged], data: Data, chosen: str) -> Probed:
    """Scores of every set, and the models in the order of that on the training rows."""
    metric, sets = data.problem.metric(chosen), {TRAIN: data.train, **data.tests}
    scores = {
        name: {part: _scores(one.answers[part], rows, part, data) for part, rows in sets.items()}
        for name, one in judged.items()
    }
    best, *others = sorted(judged, key=lambda name: -metric.goodness(scores[name][TRAIN][chosen]))
    gold = data.problem.array(data.train["label"])
    given = {
        name: one.answers[TRAIN] if metric.needs_probabilities else data.problem.decide(one.answers[TRAIN])
        for name, one in judged.items()
    }
    units = groups_of(data.train)
    apart = {
        name: difference_interval(metric, gold, given[name], given[best], data.problem.names, units) for name in others
    }
    rows = [
        {"name": name, **_row(judged[name], scores[name], chosen, scores[best], apart.get(name))}
        for name in (best, *others)
    ]
    frame = pd.DataFrame([*rows, _constant_row(scores[best], chosen)])
    words, whole = ("model", "pooling", "prompt"), ("max_length", "width", "parameters")
    frame = frame.astype(dict.fromkeys(whole, "Int64")).fillna(dict.fromkeys(words, ""))
    return Probed(frame, scores, chosen, len(gold), _verdict(frame, metric, len(gold)))


def _scores(answers: np.ndarray, rows: pd.DataFrame, name: str, data: Data) -> dict[str, Any]:
    """Everything that is said of one set, under the classes that it is scored by."""
    coarser = data.coarser.get(name, {})
    problem, scores = data.problem.coarser(coarser), data.problem.coarser_scores(answers, coarser)
    constant = data.problem.coarser_scores(data.problem.constant(data.train["label"]), coarser)
    gold, groups = problem.array(rows["label"]), groups_of(rows)
    return full_scores(problem, gold, problem.decide(scores), scores, constant, groups=groups)


def difference_interval(
    metric: Metric,
    gold: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    names: Sequence[str],
    groups: np.ndarray | None = None,
) -> Interval:
    """95 % interval of how much more one model scores than another on the same rows; None where it is undefined.

    It is SciPy's percentile bootstrap over rows, which keeps both answers to a row together, or over groups of rows.

    Args:
        metric: Metric of the scores.
        gold: Labels (rows,).
        first: What the metric reads of one model, one entry per row.
        second: The same of the other.
        names: Class names.
        groups: Group of each row (rows,), for rows that are not independent.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    numbers = np.arange(len(gold)) if groups is None else np.unique(groups, return_inverse=True)[1]
    members = np.split(np.argsort(numbers, kind="stable"), np.bincount(numbers).cumsum()[:-1])
    if len(members) < 2:
        return None

    def difference(units: np.ndarray) -> float:
        rows = units if groups is None else np.concatenate([members[unit] for unit in units])
        a, b = (metric.compute(gold[rows], given[rows], names) for given in (first, second))
        return math.nan if a is None or b is None else a - b

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # a correlation that some draw has not: None below
        resampled = bootstrap(
            (np.arange(len(members)),), difference, n_resamples=DRAWS, vectorized=False, confidence_level=LEVEL,
            method="percentile", rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    return (
        None
        if math.isnan(resampled.low) or math.isnan(resampled.high)
        else (float(resampled.low), float(resampled.high))
    )


def _row(
    one: _Judged,
    scores: Mapping[str, Mapping[str, Any]],
    metric: str,
    best: Mapping[str, Mapping[str, Any]],
    apart: Interval,
) -> dict[str, Any]:
    """A row of the table, without the name."""
    low, high = apart or (math.nan, math.nan)
    tests = [_columns(scores[name], metric, f"_{name}") for name in scores if name != TRAIN]
    return {
        "model": one.pretrained.name,
        "pooling": one.reading.pooling,
        "prompt": one.pretrained.prompt,
        "max_length": one.pretrained.max_length,
        **_columns(scores[TRAIN], metric),
        "difference": math.nan if scores is best else _value(scores[TRAIN][metric]) - _value(best[TRAIN][metric]),
        "difference_low": low,
        "difference_high": high,
        **{name: value for columns in tests for name, value in columns.items()},
        "seconds": round(one.reading.seconds, 2),
        "width": one.reading.width,
        "parameters": one.reading.parameters,
    }


def _columns(scores: Mapping[str, Any], metric: str, of: str = "") -> dict[str, float]:
    """A score and its interval, under names that end in what they are of."""
    low, high = scores["intervals"].get(metric) or (math.nan, math.nan)
    return {f"score{of}": _value(scores[metric]), f"low{of}": low, f"high{of}": high}


def _constant_row(scores: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """The last row: one answer for all rows."""
    columns = {name: "score" if name == TRAIN else f"score_{name}" for name in scores}
    return {
        "name": CONSTANT,
        **{columns[name]: _value(scores_of_set["baseline"][metric]) for name, scores_of_set in scores.items()},
    }


def _value(score: float | None) -> float:
    return math.nan if score is None else score


def _verdict(frame: pd.DataFrame, metric: Metric, rows: int) -> str:
    """What the differences to the best show."""
    best, others = frame.iloc[0], frame.iloc[1:-1]
    trivial = np.nan_to_num(frame["score"].iloc[-1])  # one answer has no correlation: knowing nothing is 0
    end = best["low"] if metric.larger_is_better else best["high"]
    if metric.goodness(end) <= metric.goodness(trivial):
        return (
            f"{best['name']} is not clearly above one answer for all rows ({number(trivial, 4)}): on {rows} rows this "
            "ranking says little."
        )
    if others.empty:
        return ""
    near = others[~((others["difference_low"] > 0) | (others["difference_high"] < 0))]
    nearest = others.iloc[0] if near.empty else near.iloc[0]
    bounds = interval(nearest["difference_low"], nearest["difference_high"], 3, signed=True)
    about = (
        f"the {metric.name} of {nearest['name']} minus that of {best['name']} is "
        f"{number(nearest['difference'], 3, signed=True)}, with the 95 % interval {bounds}"
    )
    if near.empty:
        return f"{best['name']} is ahead of the others on these {rows} rows: {about}."
    return f"{listed(near['name'])} cannot be told from {best['name']} by {rows} rows: {about}."
