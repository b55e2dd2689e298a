"""The model card: what the model does, how to use it, how good it is, and what it was trained on. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..data.problem import Problem
from ..data.scores import worst_first
from ..heads.sentence_folder import prompts_words
from ..pages.words import (
    NONE,
    bounds_words,
    call_words,
    counted,
    metric_words,
    number,
    score_interval,
    score_names,
    score_words,
    spread_words,
)
from .report_page import PROBE_NOTE, SUBGROUP_NOTE, file_name

TASK = "text-classification"  # as the hub calls it, for numbers too
SHOWN_CLASSES = 30  # in the table of classes
BESIDE = {"baseline": "constant answer", "probe": "frozen probe", "runs": "runs: mean ± SD"}  # columns beside a score
START = {
    "logistic": "a logistic regression on frozen features",
    "ridge": "a ridge regression on frozen features",
    "words": "the language model's output weights of the class names",
}
READ = {"mean": "the mean over tokens", "cls": "the first token, without the dense layer before the head"}


def model_card(record: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """Markdown with the hub's YAML head.

    Args:
        record: As written to steadytune.json.
        metrics: Set -> metric -> value, and beside the metrics what `FitResult.metrics` has; what is missing there is
            missing in the card.
        metric: Metric to show first.
    """
    parts = [
        f"---\n{_head(record, metrics, metric).to_yaml()}\n---\n",
        f"# {_title(record['recipe'])}\n",
        *_warnings(record),
        *_search(record),
        *_usage(record),
        *_results(record, metrics, metric),
        *_data(record),
        *_training(record),
        *_limits(record),
    ]
    return "\n".join(parts)


def _title(recipe: Mapping[str, Any]) -> str:
    return f"{_base(recipe)}, fine-tuned for {recipe['kind']}"


def _on_disk(recipe: Mapping[str, Any]) -> bool:
    """Whether the base model was read from a folder, which has no name on the hub."""
    return Path(recipe["model"]).exists()


def _base(recipe: Mapping[str, Any]) -> str:
    """The base model: its name on the hub, or its folder without the folders above it."""
    return Path(recipe["model"]).name if _on_disk(recipe) else recipe["model"]


def _head(record: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], metric: str) -> ModelCardData:
    """What the hub reads. Scores on rows that selected the model flatter, so the hub is not given them."""
    recipe = record["recipe"]
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=file_name(record["data"].get(name, {})) or name,
            dataset_name=name,
            metric_type=key,
            metric_name=metric_words(key, recipe["labels"]),
            metric_value=scores[key],
        )
        for name, scores in metrics.items()
        if not scores.get("selected")
        for key in score_names([scores], metric)
        if scores.get(key) is not None
    ]
    return ModelCardData(
        base_model=None if _on_disk(recipe) else recipe["model"],
        library_name=_library(recipe),
        pipeline_tag=TASK,
        tags=["steadytune", *(m["name"] for m in recipe["methods"])],
        metrics=[metric],
        model_name=_title(recipe) if results else None,
        eval_results=results or None,
    )


def _library(recipe: Mapping[str, Any]) -> str:
    """What loads the folder."""
    if _is_ensemble(recipe) or {"adapters", "levi"} & _methods(recipe):
        return "steadytune"
    return "peft" if recipe.get("peft") in ("prefix", "prompt") else "transformers"


def _methods(recipe: Mapping[str, Any]) -> set[str]:
    """Names of the methods."""
    return {method["name"] for method in recipe["methods"]}


def _is_ensemble(recipe: Mapping[str, Any]) -> bool:
    """Whether several models answer together."""
    return recipe["runs"] > 1 and recipe["combine"] == "ensemble" and not recipe.get("distil")


def _warnings(record: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the model as far as its scores tell, before anything else."""
    yield from (f"> **Warning:** {_cell(text)}.\n" for text in record.get("warnings", ()))


def _search(record: Mapping[str, Any]) -> Iterator[str]:
    """How the recipe was chosen: the estimate on rows that did not choose it, and no other."""
    if "search" in record:
        arms = sum(arm["blocks"] > 0 for arm in record["search"]["arms"])
        yield f"## Choice of the recipe\n\n{record['search']['quoted']} {arms} recipes were compared.\n"


# ---- how to use it ----------------------------------------------------------------------------------------------


def _usage(record: Mapping[str, Any]) -> Iterator[str]:
    yield "## Usage\n"
    yield "For a table with the same text columns, on the command line, in the folder of the model:\n"
    yield "```bash\nsteadytune predict . table.csv\n```\n"
    yield "In Python:\n"
    yield "\n".join(["```python", *_snippet(record), "```\n"])


def _snippet(record: Mapping[str, Any]) -> Iterator[str]:
    """Python that runs in the folder of the model: with transformers alone where they can load it."""
    recipe, columns = record["recipe"], record["columns"]["text"]
    prompts = [recipe.get("prompt", ""), *[""] * (len(columns) - 1)]
    texts = ", ".join(
        f"[{json.dumps(f'{prompt}A text to put in column {column}.', ensure_ascii=False)}]"
        for prompt, column in zip(prompts, columns, strict=True)
    )
    if _library(recipe) != "transformers":
        pair = ", ".join(f'"A text to put in column {column}."' for column in columns)
        yield "from steadytune.fitting.fitted_model import FittedModel\n"
        yield 'model = FittedModel.load(".")  # this folder'
        yield f"print(model.predict([{f'({pair})' if len(columns) > 1 else pair}]))"
        return
    yield "import torch"
    yield "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
    yield 'name = "."  # this folder, or the name of the model on the hub'
    yield "tokenizer = AutoTokenizer.from_pretrained(name)"
    yield "model = AutoModelForSequenceClassification.from_pretrained(name)"
    yield (
        f"batch = tokenizer({texts}, padding=True, truncation=True, max_length={recipe['max_length']}, "
        'return_tensors="pt")'
    )
    yield "with torch.inference_mode():"
    yield "    outputs = model(**batch).logits"
    yield from _decision(Problem.of(recipe["kind"], recipe["labels"]), record.get("threshold"))


def _decision(problem: Problem, threshold: float | None) -> Iterator[str]:
    """The last lines of the snippet: labels of outputs, as `Problem.decide` has them."""
    if problem.ordered:
        yield "print(outputs.squeeze(-1).tolist())"
    elif problem.several:
        yield f"above = outputs.sigmoid() > {0.5 if threshold is None else threshold}"
        yield "print([[model.config.id2label[i] for i, given in enumerate(row) if given] for row in above.tolist()])"
    else:
        chosen = "outputs.argmax(-1)" if threshold is None else f"(outputs.softmax(-1)[:, 1] > {threshold}).long()"
        yield f"print([model.config.id2label[i] for i in {chosen}.tolist()])"


# ---- what it was made of ----------------------------------------------------------------------------------------


def _data(record: Mapping[str, Any]) -> Iterator[str]:
    yield "## Data\n"
    yield "| set | rows | file | rows by class | rows also in training |\n|---|---|---|---|---|"
    for name, about in record["data"].items():
        counts = ", ".join(f"{label} {count}" for label, count in (about.get("labels") or {}).items())
        cells = [name, about["rows"], file_name(about), counts or NONE, about.get("also_in_train", "")]
        yield f"| {' | '.join(map(_cell, cells))} |"
    columns = record["columns"]
    labels = _cell(", ".join(record["recipe"]["labels"])) or "a number"
    written = [columns["label"]] if isinstance(columns["label"], str) else columns["label"]
    yield f"\nText: {', '.join(columns['text'])}. Label: {', '.join(written)} ({labels}).\n"


def _cell(value: Any) -> str:
    """A value as text that ends no cell and no row of a table, and is no HTML."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _training(record: Mapping[str, Any]) -> Iterator[str]:
    recipe = record["recipe"]
    methods = "; ".join(map(call_words, recipe["methods"]))
    yield "## Training\n"
    yield f"- base model: {_base(recipe)}"
    yield f"- methods: {methods or 'none (plain fine-tuning)'}"
    if (read := recipe.get("pooling")) in READ:
        yield f"- the head reads {READ[read]}"
    if (begin := recipe.get("head")) in START:
        yield f"- the head began as {START[begin]}"
    if "trained_rows" in (table := record.get("vocabulary", {})):
        yield (
            f"- {table['trained_rows']:,} of {table['rows']:,} word embeddings were trained; no training text reads "
            "the others, which weight decay alone has changed"
        )
    if recipe.get("peft"):
        yield f"- adapters of PEFT: {recipe['peft']}"
    if "levi" in _methods(recipe):
        yield "- this is two networks, the base model and a small one trained beside it; only steadytune loads both"
    elif (library := _library(recipe)) != "transformers" and not _is_ensemble(recipe):
        yield f"- this folder holds what was added to the base model, no model of its own: {library} joins them"
    for stage in recipe.get("stages", ()):
        if "tables" in stage:
            yield f"- learned first over {len(stage['tables'])} other tables ({call_words(stage)})"
            continue
        if "kind" not in stage:
            texts = counted(stage["data"]["rows"], "text")
            yield f"- trained first on {texts} without their labels ({call_words(stage)})"
            continue
        rows = counted(stage["data"]["rows"], "row")
        yield f"- trained first on {rows} of {file_name(stage['data'])} ({stage['kind']}, {stage['steps']} steps)"
    if "procedure" in recipe:
        yield f"- procedure: {call_words(recipe['procedure'])}"
    yield (
        f"- {recipe['optimizer']}; learning rate {recipe['lr']}, {recipe['batch_size'] * recipe['accumulation']} "
        f"rows a step, {recipe['steps']} steps planned, weight decay {recipe['weight_decay']}"
    )
    yield from _prompt(record)
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


def _prompt(record: Mapping[str, Any]) -> Iterator[str]:
    """What stands before the texts, or what might."""
    prompt, known = record["recipe"].get("prompt"), record.get("prompts")
    if prompt:
        shown = _cell(json.dumps(prompt, ensure_ascii=False))
        yield f"- prompt: {shown} before each row's first text; `steadytune predict` puts it there, other code has to"
    elif known:
        shown = _cell(prompts_words(known))
        yield f"- the base model was trained with a prompt before each text ({shown}); here is none"


# ---- how good it is ---------------------------------------------------------------------------------------------


def _results(record: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], metric: str) -> Iterator[str]:
    """In words the first metric of each set, in tables all of them."""
    yield "## Results\n"
    if not metrics:
        yield "How good the model is is not known: no rows were held out, and no test set was given.\n"
        return
    labels = record["recipe"]["labels"]
    for name, scores in metrics.items():
        about = record["data"].get(name, {})
        yield f"- {' '.join(_in_words(name, scores, file_name(about), metric_words(metric, labels), metric))}"
        yield from (f"- {_cell(name)}: {_cell(note)}" for note in scores.get("notes", ()))
    if all(scores.get("selected") for scores in metrics.values()):
        yield "- No other rows were scored: a test set would tell more."
    yield ""
    beside = {part: title for part, title in BESIDE.items() if any(part in scores for scores in metrics.values())}
    columns = ["set", "rows", "metric", "score", "95 % interval", *beside.values()]
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for name, scores in metrics.items():
        mark = " (selected on)" if scores.get("selected") else ""
        for key in score_names([scores], metric):
            shown = metric_words(key, labels)
            cells = [name + mark, scores["rows"], shown, spread_words(scores, key), bounds_words(scores, key)]
            cells += [spread_words(scores.get(part) or {}, key) for part in beside]
            yield f"| {' | '.join(map(_cell, cells))} |"
    yield "\nThe interval is for other rows of the same kind. A constant answer reads no text."
    yield f"{PROBE_NOTE}\n" if "probe" in beside else ""
    yield from _subgroups(metrics, metric, metric_words(metric, labels))
    yield from _classes(metrics)


def _subgroups(metrics: Mapping[str, Mapping[str, Any]], metric: str, words: str) -> Iterator[str]:
    """The subgroups of each set, the worst first."""
    if not any(scores.get("subgroups") for scores in metrics.values()):
        return
    yield "Subgroups, the worst first:\n"
    yield f"| set | subgroup | rows | {_cell(words)} | 95 % interval |\n|---|---|---|---|---|"
    for name, scores in metrics.items():
        for part, own in worst_first(scores, metric):
            cells = [name, part, own["rows"], spread_words(own, metric), bounds_words(own, metric)]
            yield f"| {' | '.join(map(_cell, cells))} |"
    yield f"\n{SUBGROUP_NOTE}\n"


def _in_words(name: str, scores: Mapping[str, Any], file: str, words: str, metric: str) -> Iterator[str]:
    """As in "test (later.csv, 300 rows): accuracy 0.8000 (95 % interval 0.7 to 0.9) against 0.5 of a constant"."""
    rows = ", ".join(filter(None, [_cell(file), counted(scores["rows"], "row")]))
    yield f"{_cell(name)} ({rows}): {_cell(words)} {score_words(scores, metric)}"
    if score_interval(scores, metric):
        yield f"(95 % interval {bounds_words(scores, metric)})"
    known = {"baseline": "a constant answer", "probe": "a linear probe on frozen features"}
    others = {words: (scores.get(part) or {}).get(metric) for part, words in known.items()}
    if said := [f"{number(value, 4)} of {words}" for words, value in others.items() if value is not None]:
        yield f"against {' and '.join(said)}"
    if scores.get("selected"):
        yield "– these rows selected the model, so new rows may score lower"


def _classes(metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The classes one by one, of the set that says most: the first that did not select the model."""
    known = sorted((n for n in metrics if metrics[n].get("per_class")), key=lambda n: bool(metrics[n].get("selected")))
    if not known or len(metrics[known[0]]["per_class"]) > SHOWN_CLASSES:
        return
    yield f"Classes of {known[0]}:\n"
    yield "| class | rows | precision | recall | F1 |\n|---|---|---|---|---|"
    for label, about in metrics[known[0]]["per_class"].items():
        shares = [number(about[key], 3) for key in ("precision", "recall", "f1")]
        yield f"| {' | '.join(map(_cell, [label, about['support'], *shares]))} |"
    yield ""


def _limits(record: Mapping[str, Any]) -> Iterator[str]:
    rows, runs = record["data"]["train"]["rows"], record["recipe"]["runs"]
    yield "## Limits\n"
    yield f"- Trained on {rows} rows: expect other scores on texts of another kind, length or time."
    if runs == 1:
        yield "- One run: another seed gives another score. The spread is not known."
    yield "- Whatever the base model and the labels got wrong, this model learned too.\n"
