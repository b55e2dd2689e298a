"""Merge model directories into one: `steadytune merge`, with the functions of `merge`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.problem import Problem
from ..data.tables import Table, examples, resolve
from ..errors import UsageError, suggest
from ..files.atomic import write_json, write_whole, writing
from ..pages.words import listed
from .folder import MEMBERS, RECORD

if TYPE_CHECKING:
    from ..methods.bases.fisher import Information

logger = logging.getLogger("steadytune")

FISHER_LABELS = ("expected", "sampled", "true")
WAYS = ("uniform", "greedy", "fisher", "interpolate", "paint", "add")
FROM_BASE, ON_ROWS = ("interpolate", "paint", "add"), ("greedy", "fisher", "paint")


def merge_folders(
    models: Sequence[Path],
    output: Path,
    *,
    how: str = "uniform",
    base: Path | None = None,
    alpha: float = 0.5,
    validation: Sequence[str | Path] = (),
    text: Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    metric: str | None = None,
    fisher_labels: str | None = None,
) -> str:
    """Merge Hugging Face model directories into a new one, atomically.

    Config and tokenizer are those of the first model, and so is the head if the base has none. If a fit made the first
    model, `steadytune predict` can read the new folder: it has a record, a model card and `metrics.json`.

    Args:
        models: Directories of fine-tuned models of one architecture.
        output: Directory to make; new or empty.
        how: ``"uniform"``: their mean; ``"greedy"``: the mean of those that do not lower the score; ``"fisher"``: the
            mean in which each weight counts by its Fisher information; ``"interpolate"``: ``(1 - alpha) * base + alpha
            * model``, for one model; ``"paint"``: the same with the alpha of 0, 0.1, ... 1 that scores best; ``"add"``:
            ``base + alpha * sum of (model - base)``.
        base: Directory of the pre-trained model, for the last three.
        alpha: Share of the fine-tuned model, or factor of the task vectors.
        validation: Tables of labelled text as `fit` takes them; the merged model is scored on them, and ``"greedy"``
            and ``"paint"`` choose by the mean score. The rows that choose cannot tell how good the choice is: keep
            others for the test.
        text: Text columns of the tables; by default those of the fit that made the first model, otherwise they are
            found.
        label: Label column of the tables, or one column per class; found in the same way.
        label_separator: What stands between several labels in one cell; likewise.
        metric: The score; by default the first of the model's kind.
        fisher_labels: Labels of the Fisher information: ``"expected"``, the sum over all classes, at one backward pass
            a row and class; ``"sampled"`` from the predictions, or the ``"true"`` ones, at one a row. By default
            ``"expected"`` for one class a row, and ``"true"``, which alone is possible, for numbers and several labels.

    Returns:
        The choice in a sentence, or how sure the Fisher information is; empty if there was neither.

    Raises:
        UsageError: The models cannot be merged in this way; nothing is written.
    """
    from .. import merge

    _check(models, output, how, base, validation, fisher_labels)
    loaded = [_load(path) for path in models]
    _check_labels(models, [model for model, _ in loaded])
    states = [model.state_dict() for model, _ in loaded]
    model, said = loaded[0][0], ""
    judge = _Judge(model, models[0], validation, text, label, label_separator, metric) if validation else None
    try:
        if base is None:
            _check_heads(models)
        start = {} if base is None else _body(base, model)
        if base is not None and (lacking := [name for name in states[0] if name not in start]):
            logger.warning("%s has no %s: the merged model takes these from %s", base, listed(lacking), models[0])
        if how == "uniform":
            merged = merge.uniform(states)
        elif how == "interpolate":
            merged = merge.interpolate(start, states[0], alpha)
        elif how == "add":
            vectors = [merge.task_vector(start, state) for state in states]
            merged = {**states[0], **merge.add_vectors(start, vectors, alpha)}
        else:
            states[0] = {name: tensor.clone() for name, tensor in states[0].items()}  # the model itself is written to
            assert judge is not None
            if how == "fisher":
                found = [judge.information(each, fisher_labels) for each, _ in loaded]
                merged = merge.fisher(states, [information.values for information in found])
                said = "; ".join(f"{path}: {information}" for path, information in zip(models, found, strict=True))
            elif how == "greedy":
                merged, chosen = merge.greedy(states, judge.goodness)
                said = f"{len(chosen)} of {len(models)} models: {', '.join(str(models[i]) for i in chosen)}"
            else:
                merged, alpha = merge.paint(start, states[0], judge.goodness)
                said = f"alpha {alpha:g}"
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    model.load_state_dict(merged)
    thresholds = {str(path): known for path in models if (known := _record(path).get("threshold")) is not None}
    if thresholds:
        logger.warning(
            "the threshold of %s is left out, because it was chosen for that model: the merged model decides at 0.5",
            listed(f"{path} ({value:g})" for path, value in thresholds.items()),
        )
    sets = judge.sets(how in ON_ROWS) if judge is not None else {}
    if judge is not None:
        values = [
            scores_of_set[judge.metric] for scores_of_set in sets.values() if scores_of_set[judge.metric] is not None
        ]
        mean = f"{sum(values) / len(values):.4f}" if values else "undefined"
        said = f"{said} ({judge.metric} {mean} on the validation rows)".strip()
    about = {"how": how, "models": [str(path) for path in models], "base": base and str(base), "alpha": alpha}
    _write(model, models[0], output, {**about, "chosen": said}, judge.metric if judge is not None else metric, sets)
    return said


def _check(
    models: Sequence[Path],
    output: Path,
    how: str,
    base: Path | None,
    validation: Sequence[Any],
    fisher_labels: str | None,
) -> None:
    if how not in WAYS:
        raise UsageError(f"unknown way to merge {how!r}.{suggest(how, WAYS)}")
    if fisher_labels is not None and fisher_labels not in FISHER_LABELS:
        raise UsageError(
            f"fisher_labels must be one of {', '.join(FISHER_LABELS)}, got {fisher_labels!r}."
            f"{suggest(fisher_labels, FISHER_LABELS)}"
        )
    if how in ("uniform", "greedy", "fisher") and len(models) < 2:
        raise UsageError(f"a {how} soup needs at least two models, got {len(models)}.")
    if how in ("interpolate", "paint") and len(models) != 1:
        raise UsageError(f"interpolation is between --base and one model, got {len(models)} models.")
    if how not in FROM_BASE and base is not None:
        raise UsageError(f"a {how} soup has no base: leave --base out, or choose --how interpolate, paint or add.")
    if how in FROM_BASE and base is None:
        raise UsageError(f"--how {how} needs the pre-trained model: --base DIR.")
    if how in ON_ROWS and not validation:
        what = "weighs by the Fisher information of" if how == "fisher" else "chooses by a score on"
        raise UsageError(f"--how {how} {what} labelled rows: give them with --validation FILE.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"output {output} exists and is not empty: choose another --output DIR.")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"output {output}: no such directory {output.parent}. Make it first.")
    for path in (*models, *([base] if base else [])):
        if (path / MEMBERS).is_dir():
            raise UsageError(f"{path} is an ensemble: merge the models in {path / MEMBERS} instead.")
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} is no Hugging Face model directory: it holds no config.json.")


class _Judge:
    """Scores a text classifier on tables.

    Args:
        model: Whose weights are scored; state dicts are loaded into it.
        folder: Folder of that model.
        validation: The tables.
        text, label, label_separator: Their columns; by default those of the fit behind the folder, else found.
        metric: By default the first of the model's kind.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        validation: Sequence[str | Path],
        text: Sequence[str] | None,
        label: str | Sequence[str] | None,
        label_separator: str | None,
        metric: str | None,
    ) -> None:
        from .fitted_model import FittedModel, constant_of
        from .outputs import device
        from .pretrained import Pretrained

        if not type(model).__name__.endswith("ForSequenceClassification"):
            raise UsageError(f"{folder} is a {type(model).__name__}: only text classifiers can be scored on rows.")
        self.model, self.problem, record = model, Problem.of_config(model.config), _record(folder)
        self.metric, columns = self.problem.metric(metric).name, record.get("columns", {})
        text = text or columns.get("text")
        if not label:
            label, label_separator = columns.get("label"), label_separator or columns.get("label_separator")
        self.tables = [
            resolve(
                Table.of(
                    rows, None if text is None else tuple(text), label, "validation", label_separator=label_separator
                )
            )
            for rows in validation
        ]
        length = record.get("recipe", {}).get("max_length")
        pretrained = Pretrained.open(str(folder.absolute()), self.problem, max_length=length)
        model.config.pad_token_id = pretrained.config.pad_token_id
        found_text, found_label = self.tables[0].columns
        self.fitted = FittedModel(
            [model.to(device()).eval()], pretrained.tokenizer, self.problem,
            text=found_text, label=found_label, label_separator=label_separator, max_length=pretrained.max_length,
            prompt=record.get("recipe", {}).get("prompt", ""), constant=constant_of(record),
        )  # fmt: skip

    def goodness(self, state: dict[str, Any]) -> float:
        """Mean score of a state dict over the tables, with the sign with which larger is better."""
        self.model.load_state_dict(state)
        values = [self.fitted.evaluate(table)[self.metric] for table in self.tables]
        return sum(self.problem.metric(self.metric).goodness(value) for value in values) / len(values)

    def information(self, model: Any, labels: Any = None) -> Information:
        """Fisher information of a model's weights on the rows of all tables, one by one, without dropout."""
        from ..core import Run
        from ..methods.bases.fisher import Fisher

        labels = labels or ("expected" if self.problem.classes else "true")
        if labels != "true" and not self.problem.classes:
            raise UsageError(
                f"--fisher-labels {labels} is for one class a row, this is {self.problem.kind}: leave it out."
            )
        way, names = Fisher("example", labels), {name for name, _ in model.named_parameters()}
        found = way.estimate(Run(model.to(self.model.device).eval(), []), self.rows(), names, way)
        return dataclasses.replace(found, values={name: value.cpu() for name, value in found.values.items()})

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of all tables, each as a batch of one."""
        import torch

        from .encoding import tokenise

        for table in self.tables:
            rows = examples(table)
            ids = self.problem.ids(self.problem.encode(rows, table).tolist())
            tokens = tokenise(rows, self.fitted.tokenizer, self.fitted.max_length, self.fitted.prompt)
            for token, label in zip(tokens, ids, strict=True):
                row = {**token, "labels": label}
                yield {name: torch.tensor([value], device=self.model.device) for name, value in row.items()}

    def sets(self, selected: bool) -> dict[str, dict[str, Any]]:
        """All scores of the model as it is, by table, which may have selected it."""
        names = ["validation", *(f"validation-{i}" for i in range(2, len(self.tables) + 1))]
        return {
            name: {**self.fitted.evaluate(table), "selected": selected}
            for name, table in zip(names, self.tables, strict=True)
        }


def _record(folder: Path) -> dict[str, Any]:
    """Record of the fit that made a model directory; empty without one."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _load(path: Path, kind: Any = None) -> tuple[Any, set[str]]:
    """Load a model; return it with the names of weights that its directory lacks."""
    import transformers

    from .pretrained import quiet

    try:
        if kind is None:
            names = transformers.AutoConfig.from_pretrained(path).architectures or [""]
            kind = getattr(transformers, names[0], None)
            if kind is None:
                raise UsageError(f"{path}: config.json names no architecture of transformers ({names[0]!r}).")
        with quiet():
            model, loading = kind.from_pretrained(path, dtype="auto", output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return model, set(loading["missing_keys"])


def _body(base: Path, model: Any) -> dict[str, Any]:
    """The weights of the pre-trained model under the fine-tuned one's names, without what it lacks."""
    start, missing = _load(base, type(model))
    return {name: tensor for name, tensor in start.state_dict().items() if name not in missing}


def _check_labels(paths: Sequence[Path], models: Sequence[Any]) -> None:
    for path, model in zip(paths, models, strict=True):
        if model.config.id2label != models[0].config.id2label:
            raise UsageError(f"{paths[0]} and {path} have other labels, or in another order: they cannot be merged.")


def _check_heads(paths: Sequence[Path]) -> None:
    """Raise if the records of fits show heads with different initial values, whose mean has no meaning.

    Heads that started as a probe are alike with any seeds.
    """
    seeds = {
        path: f"seed {record['recipe']['seeds']['init']}" if record.get("drawn", True) else "a probe"
        for path in paths
        if (record := _record(path))
    }
    if len(set(seeds.values())) > 1:
        said = ", ".join(f"{path} with {seed}" for path, seed in seeds.items())
        raise UsageError(
            f"the heads were drawn with different seeds ({said}): train again with one --init-seed or --head logistic."
        )


def _write(
    model: Any, source: Path, output: Path, about: dict[str, Any], metric: str | None, sets: dict[str, dict[str, Any]]
) -> None:
    """Write model, tokenizer and record, atomically.

    Args:
        model: The merged model.
        source: Folder of the first model, whose tokenizer and record are used.
        output: Final folder.
        about: Facts about the merge.
        metric: Metric to show first.
        sets: Scores of the model.
    """
    from transformers import AutoTokenizer

    from .card import model_card
    from .pretrained import quiet

    def fill(part: Path) -> None:
        with quiet():
            model.save_pretrained(part)
            if (source / "tokenizer_config.json").is_file():
                AutoTokenizer.from_pretrained(source).save_pretrained(part)
        write_json(part / "metrics.json", {"metric": metric, "sets": sets})
        if not (record := _record(source)):
            return
        alone: dict[str, Any] = {
            "runs": [],
            "chosen": None,
            "members": [],
            "warnings": [],
            "threshold": None,
            "merge": about,
        }
        recipe = {**record["recipe"], "runs": 1, "evaluations": int(about["how"] in ON_ROWS)}
        card = model_card({**record, **alone, "recipe": recipe}, sets, metric or record["recipe"]["metric"])
        (part / "README.md").write_text(card, encoding="utf-8")
        files = sorted(path.name for path in part.iterdir())
        write_json(part / RECORD, {**record, **alone, "recipe": recipe, "status": "finished", "files": files})

    with writing(output, resumes=False):
        write_whole(output.absolute(), fill)
