"""The model card: what was trained on what, how steadily, and what it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..pages.words import call_words, score_interval, score_names, score_words


def model_card(record: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """Markdown with the hub's YAML head.

    Args:
        record: as written to steadytune.json.
        metrics: set -> metric -> value (and ``runs``: mean and spread).
        metric: the one to show first.
    """
    recipe = record["recipe"]
    head = {
        "library_name": _library(recipe),
        "pipeline_tag": "text-classification",
        "tags": ["steadytune", *(m["name"] for m in recipe["methods"])],
        "metrics": [metric],
    }
    if not Path(recipe["model"]).exists():  # a name on the hub
        head["base_model"] = recipe["model"]
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---\n",
        f"# {Path(recipe['model']).name}, fine-tuned for {recipe['kind']}\n",
        *_data(record),
        *_training(record),
        *_results(record, metrics, metric),
        *_limits(record),
    ]
    return "\n".join(parts)


def _library(recipe: Mapping[str, Any]) -> str:
    """What loads the folder."""
    if _is_ensemble(recipe) or any(method["name"] == "adapters" for method in recipe["methods"]):
        return "steadytune"
    return "peft" if recipe.get("peft") in ("prefix", "prompt") else "transformers"


def _is_ensemble(recipe: Mapping[str, Any]) -> bool:
    """Whether several models answer together."""
    return recipe["runs"] > 1 and recipe["combine"] == "ensemble" and not recipe.get("distil")


def _data(record: Mapping[str, Any]) -> Iterator[str]:
    yield "## Data\n"
    yield "| set | rows | source | rows also in training |\n|---|---|---|---|"
    for name, about in record["data"].items():
        yield f"| {name} | {about['rows']} | {Path(about['source']).name} | {about.get('also_in_train', '')} |"
    columns = record["columns"]
    labels = ", ".join(record["recipe"]["labels"]) or "a number"
    yield f"\nText: {', '.join(columns['text'])}. Label: {columns['label']} ({labels}).\n"


def _training(record: Mapping[str, Any]) -> Iterator[str]:
    recipe = record["recipe"]
    methods = "; ".join(map(call_words, recipe["methods"]))
    yield "## Training\n"
    yield f"- base model: {recipe['model']}"
    yield f"- methods: {methods or 'none (plain fine-tuning)'}"
    if recipe.get("peft"):
        yield f"- adapters of PEFT: {recipe['peft']}"
    if (library := _library(recipe)) != "transformers" and not _is_ensemble(recipe):
        yield f"- this folder holds what was added to the base model, no model of its own: {library} joins them"
    if "procedure" in recipe:
        yield f"- procedure: {call_words(recipe['procedure'])}"
    yield (
        f"- {recipe['optimizer']}; learning rate {recipe['lr']}, {recipe['batch_size'] * recipe['accumulation']} "
        f"rows a step, {recipe['steps']} steps planned, weight decay {recipe['weight_decay']}"
    )
    yield "- dropout: " + (", ".join(f"{name} {value:g}" for name, value in recipe["dropout"].items()) or "none")
    for i, run in enumerate(record["runs"]):
        seeds = ", ".join(f"{name} {value}" for name, value in run["seeds"].items())
        yield f"- run {i}: {run['steps']} steps, {run['seconds']:.0f} s; seeds: {seeds}"
    failures = sum(run["failures"] for run in record["runs"])
    if failures:
        yield f"- runs stopped because their loss did not fall, and begun anew: {failures}"
    if recipe["runs"] > 1:
        how = {"best": "the best on the validation rows", "soup": "the mean of their weights"}
        yield f"- {recipe['runs']} runs, combined: {how.get(recipe['combine'], 'the mean of their probabilities')}"
    if recipe.get("distil"):
        yield "- this is one model, trained on the answers of that ensemble to the training rows, and scored as itself"
    elif _is_ensemble(recipe):
        yield "- the models are in `members`, none is at the top of this folder: `steadytune predict` averages them"
    if "merge" in record:
        yield f"- merged ({record['merge']['how']}) from {', '.join(record['merge']['models'])}"
    if record.get("threshold") is not None:
        yield f"- threshold: {record['threshold']:.4f}, above which `steadytune predict` gives a class; others use 0.5"
    yield f"- made with steadytune {record['versions']['steadytune']}, every option in steadytune.json\n"


def _results(record: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], metric: str) -> Iterator[str]:
    if not metrics:
        return
    recipe = record["recipe"]
    names = score_names(metrics.values(), metric)
    yield "## Results\n"
    yield "| set | rows | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2)
    for name, scores in metrics.items():
        mark = " (selected on)" if scores.get("selected") else ""
        yield f"| {name}{mark} | {scores['rows']} | " + " | ".join(score_words(scores, key) for key in names) + " |"
    yield ""
    for name, scores in metrics.items():
        yield f"- {name}: {metric} {' '.join(_surely(scores, metric))}"
        yield from (f"- {name}: {note}" for note in scores.get("notes", ()))
    yield from (f"- **warning** {text}" for text in record.get("warnings", ()))
    if any("runs" in scores for scores in metrics.values()):
        yield f"\nIn brackets: mean and standard deviation over the {recipe['runs']} runs.\n"
    yield "\nTest sets of another domain than the training rows show how far the model carries.\n"


def _surely(scores: Mapping[str, Any], metric: str) -> Iterator[str]:
    """A score with its interval, and that of a model that reads no text."""
    yield score_words(scores, metric)
    if bounds := score_interval(scores, metric):
        yield f"(95 % interval for other rows of the same kind: {bounds[0]:.4f} to {bounds[1]:.4f})"
    if (trivial := (scores.get("baseline") or {}).get(metric)) is not None:
        yield f"against {trivial:.4f} of one answer for all rows"


def _limits(record: Mapping[str, Any]) -> Iterator[str]:
    rows, runs = record["data"]["train"]["rows"], record["recipe"]["runs"]
    yield "## Limits\n"
    yield f"- Trained on {rows} rows: expect other scores on texts of another kind, length or time."
    if runs == 1:
        yield "- One run: another seed gives another score. The spread is not known."
    yield "- Whatever the base model and the labels got wrong, this model learned too.\n"
