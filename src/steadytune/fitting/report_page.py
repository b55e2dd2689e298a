"""The page of a fit, report.html: scores and their intervals, mistakes, training, data and cost.

The page is made from the files of the output folder alone, so `steadytune report` can make it again. It is
self-contained, without scripts or network. Equal folders give equal pages, byte for byte. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.metrics import members, smaller_is_better
from ..data.scores import worst_first
from ..errors import UsageError
from ..files.atomic import write_whole, writing
from ..pages.document import Block, Cell, Figures, Grid, Section, Text, Warning, html
from ..pages.words import (
    NONE,
    call_words,
    counted,
    interval,
    listed,
    metric_words,
    number,
    score_interval,
    score_names,
)
from . import report_figures as figures
from .folder import read_record

PAGE, METRICS, PREDICTIONS, HISTORY, MISTAKES = (
    "report.html", "metrics.json", "predictions.parquet", "history.parquet", "mistakes.parquet",
)  # fmt: skip
INSPECTED = "inspected.parquet"  # list of `steadytune inspect`, if it was made
SHOWN_INSPECTED = 20  # rows of each kind
SHOWN_PREDICTORS = 20
SHOWN_MISTAKES = 10  # largest number of mistakes of each set
SHOWN_CLASSES = 15  # in a confusion matrix; of more classes only the most frequent confusions are listed
SHOWN_CONFUSIONS = 20
TEXT = 400  # largest number of characters of a text on the page
BINS = 10  # number of equally wide bins of a calibration curve
DIGITS = 4
SCORE_NOTE = (
    "Bold: the metric to look at first. The interval is for other rows of the same kind. A constant answer reads "
    "no text: it is the most frequent class, or the mean, of the training rows."
)
SUBGROUP_NOTE = "The worst of several subgroups looks worse than it is, and more so with few rows: read its interval."
PREDICTOR_NOTE = (
    "Attributes whose rows carry a label far more often than the other rows do. Where such an attribute is no part of "
    "the task, the model may be wrong on rows in which the two part."
)
INSPECTED_NOTE = (
    "The first rows of each kind; the list that steadytune inspect writes has them all. Suggestion "
    "and loss are those of a linear probe that did not see the row. Influence is how much a step on the row lowers the "
    "loss of other rows, in units of its spread. Check the labels, and change only those that are wrong."
)
PROBE_NOTE = "The frozen probe is a linear model on the features of the encoder before fine-tuning."


class Fitted:
    """Contents of the output folder of a finished fit.

    Args:
        folder: The output of `fit`.
        record: Its record, where it is not in the folder yet.

    Raises:
        UsageError: The folder holds no finished fit, or a file of it cannot be read.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any] | None = None) -> None:
        self.name = folder.resolve().name
        self.record: Mapping[str, Any] = read_record(folder) if record is None else record
        try:
            metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
            self.predictions, self.history, self.mistakes, self.inspected = (
                pd.read_parquet(folder / name) if (folder / name).is_file() else pd.DataFrame()
                for name in (PREDICTIONS, HISTORY, MISTAKES, INSPECTED)
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder}: the results of the fit cannot be read: {error}") from error
        self.recipe: Mapping[str, Any] = self.record["recipe"]
        self.metric: str = metrics["metric"]
        self.steps, self.seconds = metrics["steps"], metrics["seconds"]
        self.sets: Mapping[str, Mapping[str, Any]] = metrics["sets"]
        self.labels: list[str] = self.recipe["labels"]

    @property
    def one_class(self) -> bool:
        """Whether each row has exactly one class: there are class names, and no label is a list of them."""
        return bool(self.labels) and (self.predictions.empty or isinstance(self.predictions["label"].iloc[0], str))

    @property
    def selected(self) -> bool:
        """Whether the validation rows were used for selection, so that scores on them are too good."""
        return selected(self.recipe)

    @property
    def headline(self) -> str | None:
        """The set whose score describes the model: the first test set, otherwise the validation rows."""
        return next((name for name in self.sets if name != "validation"), next(iter(self.sets), None))

    def rows(self, name: str) -> pd.DataFrame:
        """The predictions for one set."""
        return self.predictions[self.predictions["set"] == name] if len(self.predictions) else self.predictions

    def words(self, metric: str) -> str:
        """The metric, with the class it is about."""
        return metric_words(metric, self.labels)


def selected(recipe: Mapping[str, Any]) -> bool:
    """Whether a fit with this recipe used its validation rows for selection."""
    best_of_several = recipe["runs"] > 1 and recipe["combine"] == "best"
    tuned = recipe.get("threshold") == "tune"
    return bool(recipe["evaluations"] or recipe["calibrate"] or best_of_several or tuned)


def write_page(folder: str | Path, record: Mapping[str, Any] | None = None, output: str | Path | None = None) -> Path:
    """Write the page of a fit.

    Args:
        folder: The output of `fit`.
        record: Its record, where it is not in the folder yet.
        output: Folder for the page; by default the output of the fit.

    Returns:
        The HTML file.

    Raises:
        UsageError: The folder holds no finished fit, a file of it cannot be read, or the page cannot be written.
    """
    fitted = Fitted(Path(folder), record)
    text = html(f"Fit report: {fitted.name}", list(_sections(fitted)), verdict(fitted))
    target = Path(folder if output is None else output)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        write_whole(target / PAGE, lambda part: part.write_text(text, encoding="utf-8", errors="replace"))
    return target / PAGE


def mistakes(predictions: pd.DataFrame, sets: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The most confident mistakes of each set; for numbers, the largest errors.

    Args:
        predictions: As `fit` writes them: columns set, row, label, prediction, and for classes their probabilities.
        sets: Name -> rows with text (and text_pair), in the order of the predictions.

    Returns:
        At most ten rows a set, the worst first: set, row, text (and text_pair), label, prediction, size. Size is the
        probability of the prediction, with several labels that of the worst decision, with numbers the distance.
    """
    worst = [_worst(predictions[predictions["set"] == name], rows, name) for name, rows in sets.items()]
    return pd.concat(worst, ignore_index=True) if worst else pd.DataFrame()


def _worst(mistaken: pd.DataFrame, rows: pd.DataFrame, name: str) -> pd.DataFrame:
    label, prediction = mistaken["label"], mistaken["prediction"]
    if not len(_chances(mistaken).columns):
        size = (label - prediction).abs().to_numpy(dtype=float)
        wrong = size > 0
    else:
        wrong = np.array([one != other for one, other in zip(label, prediction, strict=True)])
        size = _sureness(mistaken)
    order = np.argsort(-size, kind="stable")
    places = order[wrong[order]][:SHOWN_MISTAKES]
    texts = rows[[column for column in ("text", "text_pair") if column in rows]].iloc[places].reset_index(drop=True)
    about = {
        "set": name,
        "row": mistaken["row"].to_numpy()[places],
        **{column: texts[column] for column in texts},
        "label": [_label(value) for value in label.iloc[places]],
        "prediction": [_label(value) for value in prediction.iloc[places]],
        "size": size[places],
    }
    return pd.DataFrame(about)


def _chances(rows: pd.DataFrame) -> pd.DataFrame:
    """The probabilities of predictions, a column of each class under its name."""
    return rows.filter(regex="^probability_").rename(columns=lambda name: name.removeprefix("probability_"))


def _two(rows: pd.DataFrame, chances: pd.DataFrame) -> bool:
    """Whether there are two classes under their own names, one of which a threshold may give."""
    return len(chances.columns) == 2 and {*rows["label"], *rows["prediction"]} <= {*chances.columns}


def _sureness(rows: pd.DataFrame) -> np.ndarray:
    """How sure the model was (rows,): the probability of the prediction, with several labels of the worst decision.

    A threshold may give a class that is less probable than not.
    """
    chances = _chances(rows)
    label, prediction, probability = rows["label"], rows["prediction"], chances.to_numpy()
    if isinstance(label.iloc[0], tuple):
        has, given = (members(list(sets), list(chances.columns)) for sets in (label, prediction))
        return np.where(has == given, 0.0, np.where(given, probability, 1 - probability)).max(axis=1)
    if not _two(rows, chances):  # the likeliest class is given, perhaps under a coarser name
        return probability.max(axis=1)
    return probability[np.arange(len(rows)), chances.columns.get_indexer(pd.Index(prediction))]


def _label(value: Any) -> str:
    """A class, several classes, or a number, as words."""
    if isinstance(value, str):
        return value
    if isinstance(value, float | int | np.number):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) or "no label"


# ---- the verdict ------------------------------------------------------------------------------------------------


def verdict(fitted: Fitted) -> str:
    """Result of the fit, in one or two sentences."""
    name = fitted.headline
    value = None if name is None else fitted.sets[name].get(fitted.metric)
    if name is None:
        return "How good the model is is not known: no rows were held out and there is no test set."
    if value is None:
        return f"How good the model is is not known: {fitted.words(fitted.metric)} is undefined on {name}."
    scores = fitted.sets[name]
    bounds = score_interval(scores, fitted.metric)
    sure = f" (95 % interval {interval(*bounds, DIGITS)})" if bounds else ""
    flattered = " Those rows also chose the model, so new rows may score lower." if _flatters(fitted, name) else ""
    metric = fitted.words(fitted.metric)
    return (
        f"{metric[0].upper()}{metric[1:]} is {number(value, DIGITS)}{sure} on the {scores['rows']:,} rows of {name}"
        f"{_against_baseline(fitted, name, value, bounds)}.{_against_probe(fitted, name, value)}{flattered}"
    )


def _flatters(fitted: Fitted, name: str) -> bool:
    return bool(fitted.sets[name].get("selected", name == "validation" and fitted.selected))


def _against_baseline(fitted: Fitted, name: str, value: float, bounds: tuple[float, float] | None) -> str:
    """A phrase such as ", clearly above the 0.5092 of always answering the most frequent class"."""
    baseline = baseline_score(fitted, name, fitted.metric)
    if baseline is None:
        return ""
    smaller = smaller_is_better(fitted.metric)
    ahead = value < baseline if smaller else value > baseline
    edge = None if bounds is None else bounds[1] if smaller else bounds[0]
    clear = edge is not None and (edge < baseline if smaller else edge > baseline)
    trivial = f"the {number(baseline, DIGITS)} of always giving the same answer"
    if not ahead:
        return f", no better than {trivial}"
    return f", {'clearly ' if clear else ''}better than {trivial}" + ("" if clear or bounds is None else ", not surely")


def _against_probe(fitted: Fitted, name: str, value: float) -> str:
    """As in " A linear probe on the frozen encoder has 0.7374 there."; empty without a probe."""
    probed = (fitted.sets[name].get("probe") or {}).get(fitted.metric)
    if probed is None:
        return ""
    ahead = value < probed if smaller_is_better(fitted.metric) else value > probed
    told = "" if ahead else ", so fine-tuning the encoder has gained nothing"
    return f" A linear probe on the frozen encoder has {number(probed, DIGITS)} there{told}."


def baseline_score(fitted: Fitted, name: str, metric: str) -> float | None:
    """The score of always giving the most frequent answer: as recorded, or for accuracy from the numbers of classes."""
    recorded = fitted.sets[name].get("baseline")
    if isinstance(recorded, Mapping):
        return recorded.get(metric)
    rows = fitted.rows(name)
    training = fitted.record["data"].get("train", {}).get("labels", {})
    if metric != "accuracy" or not fitted.one_class or rows.empty or not training:
        return None
    return float((rows["label"] == max(training, key=training.get)).mean())


# ---- the sections -----------------------------------------------------------------------------------------------


def _sections(fitted: Fitted) -> Iterator[Section]:
    parts = {
        "Scores": _scores,
        "Where it errs": _errors,
        "Labels to check": _inspected,
        "Training": _training,
        "Data": _data,
        "Cost and recipe": _cost,
    }
    for title, blocks in parts.items():
        contents = list(blocks(fitted))
        if contents:
            yield Section(title, contents)


def _scores(fitted: Fitted) -> Iterator[Block]:
    if not fitted.sets:
        yield Warning(
            "No validation rows were held out and there is no test set, so this page has no scores. Give a test set "
            "with --test, or hold out rows with --validation-share."
        )
        return
    yield from _warnings(fitted)
    extra = {"probe": "frozen probe", "runs": f"{fitted.recipe['runs']} runs: mean ± SD"}
    shown = [part for part in extra if any(part in scores for scores in fitted.sets.values())]
    columns = ["metric", "score", "95 % interval", "constant answer", *(extra[part] for part in shown)]
    groups = [
        (_set(fitted, name), [_score(fitted, name, metric, shown) for metric in score_names([scores], fitted.metric)])
        for name, scores in fitted.sets.items()
    ]
    yield Grid("Scores of each set", columns, groups, f"{SCORE_NOTE} {PROBE_NOTE}" if "probe" in shown else SCORE_NOTE)
    yield from _subgroups(fitted)


def _subgroups(fitted: Fitted) -> Iterator[Block]:
    """The subgroups of each set, the worst first."""
    groups = [
        (_set(fitted, name), [_subgroup(part, own, fitted.metric) for part, own in worst_first(scores, fitted.metric)])
        for name, scores in fitted.sets.items()
        if scores.get("subgroups")
    ]
    if groups:
        head = ["subgroup", "rows", fitted.words(fitted.metric), "95 % interval"]
        yield Grid("Scores of each subgroup, the worst first", head, groups, SUBGROUP_NOTE)


def _subgroup(name: str, scores: Mapping[str, Any], metric: str) -> list[str]:
    bounds = score_interval(scores, metric)
    shown = interval(*bounds, DIGITS) if bounds else NONE
    return [name, f"{scores['rows']:,}", number(scores.get(metric), DIGITS), shown]


def _set(fitted: Fitted, name: str) -> str:
    """As in "validation, 100 rows (chose the model)"."""
    return f"{name}, {counted(fitted.sets[name]['rows'], 'row')}" + " (chose the model)" * _flatters(fitted, name)


def _score(fitted: Fitted, name: str, metric: str, shown: Sequence[str]) -> list[str | Cell]:
    """A score, its interval, the score of a constant answer, and of ``shown`` the probe and the spread over runs."""
    scores = fitted.sets[name]
    bounds, value = score_interval(scores, metric), scores.get(metric)
    runs = (scores.get("runs") or {}).get(metric)
    beside = {
        "probe": number((scores.get("probe") or {}).get(metric), DIGITS),
        "runs": f"{number(runs['mean'], DIGITS)} ± {number(runs['sd'], DIGITS)}" if runs else NONE,
    }
    return [
        fitted.words(metric),
        Cell(number(value, DIGITS), ("undefined",) * (value is None), strong=metric == fitted.metric),
        interval(*bounds, DIGITS) if bounds else NONE,
        number(baseline_score(fitted, name, metric), DIGITS),
        *(beside[part] for part in shown),
    ]


def _warnings(fitted: Fitted) -> Iterator[Warning]:
    yield from (Warning(f"{text}.") for text in fitted.record.get("warnings", ()))
    if all(_flatters(fitted, name) for name in fitted.sets):
        yield Warning("All scores are of rows that also chose the model. Give a test set to know more.")


# ---- where it errs


def _errors(fitted: Fitted) -> Iterator[Block]:
    for name in sorted(fitted.sets, key=lambda name: name != fitted.headline):
        rows = fitted.rows(name)
        if rows.empty:
            continue
        if not fitted.labels:
            yield Figures(f"{name}: predictions against labels", [figures.numbers(rows, "")])
        elif fitted.one_class:
            yield from _classes(rows, name)
        yield from _mistakes(fitted, name)


def _classes(rows: pd.DataFrame, name: str) -> Iterator[Block]:
    """Scores of each class, and confusions between classes."""
    classes = sorted({*rows["label"], *rows["prediction"]})
    counts = pd.crosstab(rows["label"], rows["prediction"]).reindex(index=classes, columns=classes, fill_value=0)
    matrix = counts.to_numpy()
    yield Grid(
        f"{name}: scores of each class",
        ["class", "rows", "predicted", "precision", "recall", "F1"],
        [("", [_class_row(matrix, i, label) for i, label in enumerate(classes)])],
        "Precision: share of the rows predicted as the class that are of it. Recall: share of its rows that are found. "
        "F1: their harmonic mean.",
    )
    few = len(classes) <= SHOWN_CLASSES
    drawn = [figures.confusion(matrix, classes, "Rows by label and prediction")] if few else []
    curve, error = _calibration(rows)
    yield Figures(f"{name}: what is taken for what, and how far probabilities can be trusted", [*drawn, curve])
    yield Text(
        f"The calibration error is {number(error, 3)}: the mean distance of the dots from the dashed line, over "
        f"the rows, in {BINS} bins of equal width. Larger dots hold more rows; a dot below the "
        "line says that the model is surer than it is right."
    )
    if few:
        return
    wrong = matrix - np.diag(matrix.diagonal())
    most = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN_CONFUSIONS]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(most, wrong.shape), strict=True) if wrong[i, j]]
    lines = [[classes[i], classes[j], f"{wrong[i, j]:,}"] for i, j in pairs]
    yield Grid(f"{name}: most frequent confusions", ["label", "prediction", "rows"], [("", lines)], words=(0, 1))


def _class_row(matrix: np.ndarray, i: int, label: str) -> list[str]:
    hits, rows, predicted = matrix[i, i], matrix[i].sum(), matrix[:, i].sum()
    shares = (
        hits / predicted if predicted else float("nan"),
        hits / rows if rows else float("nan"),
        2 * hits / (rows + predicted),
    )
    return [label, f"{rows:,}", f"{predicted:,}", *(number(share, 3) for share in shares)]


def _calibration(rows: pd.DataFrame) -> tuple[str, float]:
    """Calibration curve of the class that is most probable, and its distance from the diagonal."""
    chances = _chances(rows)
    probability = chances.max(axis=1)
    # of two classes a threshold may give the other one
    right = rows["label"] == (chances.idxmax(axis=1) if _two(rows, chances) else rows["prediction"])
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    table = pd.DataFrame({"probability": probability, "right": right, "rows": 1.0}).groupby(bins)
    by_bin = table.agg({"probability": "mean", "right": "mean", "rows": "sum"})
    error = float(((by_bin["probability"] - by_bin["right"]).abs() * by_bin["rows"]).sum() / len(rows))
    return figures.calibration(by_bin, "Calibration"), error


def _mistakes(fitted: Fitted, name: str) -> Iterator[Block]:
    worst = fitted.mistakes[fitted.mistakes["set"] == name] if len(fitted.mistakes) else fitted.mistakes
    if worst.empty:
        return
    numbers = not fitted.labels
    lines = [
        [f"{row['row']}", row["label"], row["prediction"], number(row["size"], 3), _text(row)]
        for _, row in worst.iterrows()
    ]
    yield Grid(
        f"{name}: {'the largest errors' if numbers else 'the most confident mistakes'}",
        ["row", "label", "prediction", "distance" if numbers else "probability", "text"],
        [("", lines)],
        "Rows are counted from 0. Wrong labels in the data are often found here.",
        words=(1, 2, 4),
    )


def _inspected(fitted: Fitted) -> Iterator[Block]:
    """Rows that may carry a wrong label, and rows that do harm."""
    frame = fitted.inspected
    if frame.empty:
        return
    suspects = frame[frame["suspect"]] if "suspect" in frame else frame
    harmful = frame[frame["influence"] < 0].sort_values("influence", kind="stable")
    head = ["row", "label", "suggestion", "loss", "influence", "text"]
    kinds = {
        f"{counted(len(suspects), 'row')} that may carry a wrong label": suspects,
        f"{counted(len(harmful), 'row')} that do harm to the others": harmful,
    }
    for title, rows in kinds.items():
        lines = [
            [f"{row['row']}", _label(row["label"]), _label(row["suggestion"]), number(row["loss"], 3),
             number(row["influence"], 2), _text(row)]
            for _, row in rows.head(SHOWN_INSPECTED).iterrows()
        ]  # fmt: skip
        if lines:
            yield Grid(title, head, [("", lines)], INSPECTED_NOTE, words=(1, 2, 5))


def _text(row: pd.Series) -> str:
    texts = [str(row[column]) for column in ("text", "text_pair") if column in row]
    return " ¶ ".join(text if len(text) <= TEXT else text[: TEXT - 1] + "…" for text in texts)


# ---- training, data, cost


def _training(fitted: Fitted) -> Iterator[Block]:
    history, score = fitted.history, f"eval_{fitted.metric}"
    if history.empty:
        history = pd.DataFrame(
            [(i, step, score, value) for i, run in enumerate(fitted.record["runs"])
             for step, value in run.get("curve", ())],
            columns=["run", "step", "name", "value"],
        )  # fmt: skip
    titles = {"loss": "Training loss", score: "Score on the validation rows"}
    panels = [
        figures.curves(points, title, fitted.words(name.removeprefix("eval_")))
        for name, title in titles.items()
        if len(points := history[history["name"] == name])
    ]
    if panels:
        yield Figures("Curves of training" + (", one line a run" if fitted.recipe["runs"] > 1 else ""), panels)
    if len(fitted.history) and not fitted.recipe["evaluations"]:
        yield Text("The validation rows were not scored while the model was trained: --evaluations 10 would do that.")


def _data(fitted: Fitted) -> Iterator[Block]:
    cut = fitted.record.get("cut", {})
    rows = []
    for name, about in fitted.record["data"].items():
        labels = "; ".join(f"{label} {count:,}" for label, count in (about.get("labels") or {}).items())
        also = "" if "also_in_train" not in about else f"{about['also_in_train']:,}"
        cut_rows = f"{cut[name]:,}" if name in cut else NONE
        rows.append([name, file_name(about), f"{about['rows']:,}", also, cut_rows, labels or "numbers"])
    yield Grid(
        "Where the rows come from",
        ["set", "file", "rows", "also in training", "cut", "labels"],
        [("", rows)],
        f"Cut: rows with more than {fitted.recipe['max_length']} tokens, of which the model reads only the beginning. "
        "Also in training: rows whose text is a training text too.",
        words=(0, 1, 5),
    )
    if named := fitted.record.get("predictors"):
        lines = [
            [
                part["attribute"],
                part["label"],
                number(part["share"], 3),
                f"{part['rows']:,}",
                number(part["otherwise"], 3),
            ]
            for part in named[:SHOWN_PREDICTORS]
        ]
        head = ["attribute", "label", "share of its rows", "its rows", "share of the others"]
        yield Grid("What predicts a label by itself", head, [("", lines)], PREDICTOR_NOTE, words=(0, 1))
    if weights := fitted.record.get("balanced"):
        yield Text(
            f"The rows were weighed to balance {listed(fitted.recipe['balance'])}: {weights['rows']:,} rows count as "
            f"{weights['effective']:,.0f}, with weights from {weights['least']:.2f} to {weights['most']:.2f}."
        )


def file_name(about: Mapping[str, Any]) -> str:
    """Name of the file that the rows of a recorded set were read from, without its folders."""
    return Path(str(about.get("source", ""))).name


def _cost(fitted: Fitted) -> Iterator[Block]:
    recipe, runs = fitted.recipe, fitted.record["runs"]
    passes = sorted({f"{run['passes']:.2f}" for run in runs if run.get("passes") is not None})
    memory, before = fitted.record.get("peak_memory"), fitted.record.get("passes_before")
    facts = {
        "seconds of training": f"{fitted.seconds:,.0f}",
        "optimizer steps behind the model": f"{fitted.steps:,}",
        "passes a step": listed(passes) + " of plain fine-tuning's" if passes else "",
        "trainings before": f"as many passes as {before:,.0f} plain steps, at most" if before else "",
        "peak memory": f"{memory / 1e9:.2f} GB" if memory else "",
        "device": str(fitted.record.get("device", "")),
        "base model": Path(recipe["model"]).name,
        "methods": "; ".join(map(call_words, recipe["methods"])) or "none (plain fine-tuning)",
        "procedure": call_words(recipe["procedure"]) if "procedure" in recipe else "",
        "learning rate": f"{recipe['lr']:g}",
        "rows a step": f"{recipe['batch_size'] * recipe['accumulation']}",
        "runs": counted(recipe["runs"], "run") + (f", combined: {recipe['combine']}" if recipe["runs"] > 1 else ""),
        "made with": ", ".join(f"{name} {version}" for name, version in fitted.record["versions"].items()),
    }
    rows = [[name, value] for name, value in facts.items() if value]
    yield Grid("What it took, and how it was made", ["entry", "value"], [("", rows)], words=(0, 1))
