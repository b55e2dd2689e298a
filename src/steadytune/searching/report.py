"""The page of a search, search.html: verdict, arms, elimination, cost, rows that most recipes get wrong. No torch here.

The page is made from the output folder alone, is self-contained, and has neither scripts nor network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..files.atomic import write_whole, writing
from ..fitting.folder import SEARCH, read_record
from ..pages.document import Block, Figures, Grid, Section, Text, html
from ..pages.words import NONE, counted, number
from . import report_figures as figures
from .hard_rows import HARD_ROWS
from .words import bounds, dropped_words, gain_words, scale, shown

PAGE = "search.html"
TEXT = 400  # largest number of characters of a text on the page


def write_page(folder: str | Path) -> Path:
    """Write the page of a search into its folder.

    Args:
        folder: The output of `search`.

    Returns:
        The HTML file.

    Raises:
        UsageError: The folder holds no finished fit, or the page cannot be written.
    """
    folder = Path(folder)
    found = read_record(folder)["search"]
    rows = folder / SEARCH / HARD_ROWS
    hard = pd.read_parquet(rows) if rows.is_file() else pd.DataFrame()
    text = html(f"Search report: {folder.resolve().name}", list(_sections(found, hard)), found["verdict"])
    with writing(folder):
        write_whole(folder / PAGE, lambda part: part.write_text(text, encoding="utf-8", errors="replace"))
    return folder / PAGE


def _sections(found: Mapping[str, Any], hard: pd.DataFrame) -> Iterator[Section]:
    yield Section("Claim", _claim(found))
    yield Section("Recipes", _arms(found))
    if found["standings"]:
        yield Section("Elimination", _elimination(found))
    if found.get("curve"):
        yield Section("Would more labels help?", _curve(found["curve"]))
    if len(hard):
        yield Section("Rows that most recipes get wrong", _hard(hard, found))


def _claim(found: Mapping[str, Any]) -> list[Block]:
    claim, metric, (times, unit) = found["claim"], found["metric"], scale(found["metric"])
    level = shown(metric, claim["level"]["value"])
    smallest = NONE if claim["detectable"] is None else f"{number(times * claim['detectable'], 1)}{unit}"
    spent = f"{found['trainings']} trainings, {found['seconds'] / 60:.1f} minutes"
    low, high = bounds(metric, *claim["level"]["interval"])
    rows = [
        ["verdict", claim["verdict"]],
        ["gain over plain fine-tuning (95 % interval)", gain_words(claim["gain"], metric)],
        ["probability of a gain", number(claim["probability"], 3)],
        ["smallest gain shown in 80 of 100 tables", smallest],
        [f"expected {metric}", f"{number(level, 3)} ({number(low, 3)} to {number(high, 3)})"],
        ["repeats that judged and did not choose", str(claim["fresh"])],
        ["chosen by half A, by half B", ", ".join(found["chosen"].values())],
        ["budget, and what was spent before the last fit", f"{found['asked']['budget']}: {spent}"],
    ]
    note = (
        "The gain is that of choosing by half of the rows, judged on the other half, so it is slightly too small. "
        f"Trainings saw {found['trained_on']:,} of the {found['rows']:,} rows."
    )
    return [Grid("What may be said", ["", ""], [("", rows)], note, words=(0, 1))]


def _arms(found: Mapping[str, Any]) -> list[Block]:
    metric, (times, unit) = found["metric"], scale(found["metric"])
    done = [arm for arm in found["arms"] if arm["gain"] is not None]
    ranked = sorted(done, key=lambda arm: -arm["gain"]["value"])
    rows = [
        [arm["name"], str(arm["blocks"]), number(arm["score"], 3),
         NONE if arm["name"] == "plain" else gain_words(arm["gain"], metric), number(arm["seconds"], 1)]
        for arm in ranked
    ]  # fmt: skip
    note = (
        "A recipe adds its arms to plain fine-tuning. Gains are over plain, on all rows and in the same blocks. They "
        "have chosen, so the largest are too large; the claim above is not."
    )
    blocks: list[Block] = [
        Grid("Recipes, the largest gain first", ["recipe", "trainings", metric, "gain over plain", "seconds of one"],
             [("", rows)], note)
    ]  # fmt: skip
    blocks += [Text(f"{line[0].upper()}{line[1:]}.") for line in dropped_words(found)]
    if len(done) > 1:
        blocks.append(Figures("Cost against gain", [figures.cost(done, found["ship"]["name"], times, unit)]))
    return blocks


def _elimination(found: Mapping[str, Any]) -> list[Block]:
    times, unit = scale(found["metric"])
    last: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for standing in found["standings"]:
        last.setdefault(standing["stage"], {})[standing["arm"], standing["path"]] = standing
    panels = [figures.elimination(list(arms.values()), stage, times, unit) for stage, arms in last.items()]
    caption = (
        "Gains over the recipe before the stage, by half A (blue) and half B (orange) of the rows, with 95 % "
        "intervals. Empty circles stopped, filled ones went on, stars were chosen."
    )
    return [Figures(caption, panels), Text(f"{counted(len(last), 'stage')}; an arm stops when both halves stop it.")]


def _curve(curve: Mapping[str, Any]) -> list[Block]:
    rows = [
        [size, *(f"{number(by_size[size]['value'], 3)} ± {number(by_size[size]['error'], 3)}"
                 for by_size in curve["scores"].values())]
        for size in next(iter(curve["scores"].values()))
    ]  # fmt: skip
    note = "All sizes are judged on the same rows, by one cross-validation each; ± is the standard error."
    caption = (
        "Bars are standard errors. Lines are power laws; they go on, dashed, where these rows tell what more of them "
        "would bring."
    )
    return [
        Text(curve["verdict"]),
        Grid("Scores by number of training rows", ["rows", *curve["scores"]], [("", rows)], note),
        Figures(caption, [figures.curve(curve)]),
    ]


def _hard(hard: pd.DataFrame, found: Mapping[str, Any]) -> list[Block]:
    columns = [column for column in ("text", "text_pair") if column in hard]
    rows = [
        [str(row["row"]), *(str(row[column])[:TEXT] for column in columns), str(row["label"]), number(row["wrong"], 2)]
        for row in hard.to_dict("records")
    ]
    note = "Look at their labels first. The number is the share of wrong recipes, or the mean error of numbers."
    head = ["row", *columns, "label", "wrong"]
    return [Grid("Counted over the first repeat of each recipe", head, [("", rows)], note, words=range(len(head) - 1))]
