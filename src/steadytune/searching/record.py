"""A search as JSON, the entry `search` of `steadytune.json`. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cells import Cells
from .estimates import Estimate
from .race import Outcome, Race, Standing
from .recipe import Recipe
from .words import shown, verdict_words


def search_record(race: Race, outcome: Outcome, cells: Cells, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was found.

    Args:
        race: The race, finished.
        outcome: Its result.
        cells: Its trainings.
        asked: The arguments of the search.
    """
    task = cells.task
    record: dict[str, Any] = {
        "format": 1,
        "asked": dict(asked),
        "metric": task.metric.name,
        "rows": len(task.data.train),
        "folds": task.k,
        "trained_on": task.inside,
        "ship": {
            **recipe_record(outcome.ship, task.models),
            "belief": None if outcome.belief is None else {"mean": outcome.belief.mean, "sd": outcome.belief.sd},
        },
        "runs": task.runs(outcome.ship),
        "chosen": {path: str(arm) for path, arm in outcome.chosen.items()},
        "claim": {
            "verdict": outcome.verdict,
            "gain": _estimate(outcome.gain),
            "probability": outcome.gain.positive,
            "fresh": outcome.fresh,
            "level": _estimate(outcome.level),
            "detectable": outcome.detectable,
        },
        "arms": [_arm(arm, race, cells) for arm in dict.fromkeys([race.plain, *race.frozen, *race.tried])],
        "standings": [_standing(standing) for standing in outcome.standings],
        "untried": [str(arm) for arm in outcome.untried],
        "dropped": {str(arm): reason for arm, reason in outcome.dropped.items()},
        "seconds": cells.spent,
        "trainings": cells.trainings,
    }
    return {**record, "verdict": verdict_words(record), "quoted": verdict_words(record, believed=False)}


def recipe_record(recipe: Recipe, models: Mapping[str, str]) -> dict[str, Any]:
    """A recipe as JSON."""
    return {
        "name": recipe.name,
        "model": models[recipe.model],
        "arms": list(recipe.arms),
        "options": dict(recipe.options),
        "lengthened": recipe.lengthened,
        "methods": list(recipe.methods),
        "procedure": recipe.procedure,
        "before": [list(each) for each in recipe.before],
        "soup": recipe.soup,
    }


def recorded_recipe(record: Mapping[str, Any]) -> Recipe:
    """The recipe of a record; its model is a path."""
    return Recipe(
        record["model"], tuple(record["arms"]), tuple(sorted(record["options"].items())), record["lengthened"],
        tuple(record["methods"]), record["procedure"], tuple((what, how) for what, how in record.get("before", ())),
        record.get("soup", 1),
    )  # fmt: skip


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "error": estimate.error, "interval": list(estimate.interval)}


def _arm(arm: Recipe, race: Race, cells: Cells) -> dict[str, Any]:
    """An arm against plain, on all rows and all repeats that both have; its own gain chose it, so it is too good."""
    repeats = [r for r in range(cells.task.repeats) if cells.has(arm, r) and cells.has(race.plain, r)]
    return {
        "name": arm.name,
        "model": arm.model,
        "blocks": len(repeats) * cells.task.k,
        "score": None if not repeats else shown(cells.task.metric.name, float(cells.values(arm, repeats).mean())),
        "gain": _estimate(race.over_plain(arm, repeats)) if repeats else None,
        "seconds": cells.seconds(arm) / cells.task.k,
    }


def _standing(standing: Standing) -> dict[str, Any]:
    return {
        "stage": standing.stage,
        "path": standing.path,
        "repeats": standing.repeats,
        "arm": str(standing.arm),
        "gain": _estimate(standing.gain),
        "belief": {"mean": standing.belief.mean, "sd": standing.belief.sd},
        "fate": standing.fate,
    }
