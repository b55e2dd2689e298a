"""Recipes of a search, and how they are written: the arms that change a recipe. No torch here.

An arm is a method or a procedure with its options (``dps_mix:update_ratio=0.1``), options of `fit`
(``head=logistic,pooling=mean``), a factor of an option (``lr*3``, ``lr/3``, ``steps*2``), or a training before the fit:
``pretrain=tapt`` on texts alone, ``aux=FILE`` on another labelled table. ``soup=3`` averages the weights of three
trainings.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.spec import option
from ..errors import UsageError, suggest
from ..fitting.options import Options
from ..fitting.spelling import make_methods, make_pretraining, make_procedure
from ..spelling import convert
from .race import Stage

logger = logging.getLogger("steadytune")

# Arms by stage, the most promising first. A stage's arms change what earlier stages have chosen.
PORTFOLIO: dict[str, tuple[str, ...]] = {
    "start": (),
    "head": ("head=logistic", "head=logistic,pooling=mean"),
    "schedule": ("lr*3", "lr/3", "steps*2"),
    "method": ("llrd", "rdrop", "dps_dense", "dps_mix", "mixout", "smart", "contrastive", "mixup-blo", "soup=3"),
}
WITH_TEXTS = ("pretrain=tapt", "self-training")  # arms more, where there are texts without labels
BEFORE = ("pretrain", "aux")  # what an arm puts before the fit
PROBE = "probe"  # the frozen encoder with a fitted head
NOT_HERE = {  # options of `fit` that hold rows out or choose, which the search does itself
    "evaluations": "a search keeps the last weights",
    "patience": "a search keeps the last weights",
    "calibrate": "there are no validation rows",
    "threshold": "scores are compared at 0.5",
    "validation_share": "all rows are trained on in the end",
    "train_size": "all rows are searched",
    "seed": "seed is an argument of its own",
    "methods": "methods are arms, as in --arm rdrop",
    "procedure": "procedures are arms, as in --arm mixup-blo",
    "aux": "other tables are arms, as in --arm aux=FILE",
    "pretrain": "trainings on texts are arms, as in --arm pretrain=tapt",
    "meta": "its recipes begin with the model, or with one other table, as in --arm aux=FILE",
    "tune_kernels": "cells of several machines and days must be computed alike",
    "num_seeds": "several trainings are an arm, as in --arm soup=3",
    "refit": "the number of steps is an arm, as in --arm steps*2",
}
SOUP = re.compile(r"soup\s*=\s*(\d+)")
FACTOR = re.compile(r"(lr|steps)\s*([*/])\s*(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Recipe:
    """A model and how to fine-tune it.

    Attributes:
        model: Name of the model.
        arms: Arms that made the recipe out of plain fine-tuning.
        options: Options of `fit` that differ from the search's own.
        lengthened: Factor of the number of steps.
        methods: Methods as they are spelled.
        procedure: Procedure as it is spelled.
        before: Trainings before the fit: ``pretrain`` and how, ``aux`` and a file.
        soup: Number of trainings whose weights are averaged.
    """

    model: str
    arms: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    lengthened: float = 1.0
    methods: tuple[str, ...] = ()
    procedure: str | None = None
    before: tuple[tuple[str, str], ...] = ()
    soup: int = 1

    @property
    def name(self) -> str:
        """The arms; `plain` without one."""
        return " + ".join(self.arms) or "plain"

    def __str__(self) -> str:
        return self.name

    @property
    def reads_texts(self) -> bool:
        """Whether it learns from texts without labels."""
        procedure = make_procedure(self.procedure)
        methods = any(method.reads_unlabelled for method in make_methods(list(self.methods)))
        return methods or "pretrain" in dict(self.before) or (procedure is not None and procedure.reads_unlabelled)

    @property
    def frozen(self) -> bool:
        """Whether it takes no step: a fitted head on the frozen encoder."""
        return dict(self.options).get("steps") == 0

    @property
    def trainings(self) -> dict[str, Any]:
        """What of it are no options, as arguments of `fit`; empty for plain fine-tuning."""
        tables = [file for what, file in self.before if what == "aux"]
        given = {
            "methods": list(self.methods), "procedure": self.procedure, "aux": tables,
            "pretrain": dict(self.before).get("pretrain"),
        }  # fmt: skip
        return {name: value for name, value in given.items() if value}

    def settings(self, base: Options, rows: int) -> dict[str, Any]:
        """Options that differ from the search's own, for a number of training rows.

        Raises:
            UsageError: No step would be left.
        """
        chosen = dict(self.options)
        if self.lengthened != 1:
            now = dataclasses.replace(base, **chosen)
            plain = now.total_steps(rows)
            steps = round(self.lengthened * plain)
            if steps < 1 <= plain:
                raise UsageError(
                    f"`{self.name}` leaves none of the {plain} steps on {rows} rows: take a factor of {1 / plain:.2g} "
                    "or more."
                )
            chosen |= {"steps": steps, "epochs": None}
        return chosen


def frozen(model: str, named: bool = False) -> Recipe:
    """A fitted head on the frozen encoder, with the name of the model or without."""
    arms = (model, PROBE) if named else (PROBE,)
    in_steps = (("balance", None), ("class_weights", "none"), ("label_smoothing", 0.0), ("focal", 0.0))
    return Recipe(model, arms, (("head", "logistic"), ("steps", 0), ("epochs", None), *in_steps))


def probes(models: Iterable[str]) -> list[Recipe]:
    """The frozen recipes of a search: as of plain, the name of the first model is left out."""
    return [frozen(model, named=place > 0) for place, model in enumerate(models)]


def changed(recipe: Recipe, arm: str, base: Options) -> Recipe:
    """A recipe with an arm on top.

    Args:
        recipe: The recipe to change.
        arm: The arm as it is spelled.
        base: Options of the search, of which factors are taken.

    Raises:
        UsageError: The arm is none.
    """
    arm = arm.strip()
    named = dataclasses.replace(recipe, arms=(*recipe.arms, arm))
    if factor := FACTOR.fullmatch(arm):
        times = _times(arm, factor)
        if factor[1] == "steps":
            return dataclasses.replace(named, lengthened=recipe.lengthened * times)
        lr = float(f"{times * float(dict(recipe.options).get('lr', base.lr)):.3g}")
        return dataclasses.replace(named, options=_with(recipe.options, {"lr": lr}))
    if soup := SOUP.fullmatch(arm):
        return dataclasses.replace(named, soup=_trainings(arm, soup))
    if (before := _before(arm)) is not None:
        return dataclasses.replace(named, before=(*recipe.before, before))
    if "=" in arm.partition(":")[0]:
        return dataclasses.replace(named, options=_with(recipe.options, _options(arm)))
    if _is_procedure(arm):
        return dataclasses.replace(named, procedure=arm)
    return dataclasses.replace(named, methods=(*recipe.methods, arm))


def stage_of(arm: str) -> str:
    """The stage that an arm belongs to.

    Raises:
        UsageError: It is no arm.
    """
    if factor := FACTOR.fullmatch(arm.strip()):
        _times(arm, factor)
        return "schedule"
    if soup := SOUP.fullmatch(arm.strip()):
        _trainings(arm, soup)
        return "method"
    if _before(arm) is not None:
        return "start"
    if "=" in arm.partition(":")[0]:
        return "head" if {*_options(arm)} <= {"head", "pooling"} else "schedule"
    if _is_procedure(arm):
        make_procedure(arm)
    else:
        make_methods([arm])
    return "method"


def stages(
    arms: Sequence[str] | None, base: Options, models: Sequence[str], pooling: Mapping[str, str], texts: bool = False
) -> list[Stage]:
    """The stages of a search: other models, then trainings before the fit, heads, schedule and methods.

    Args:
        arms: Arms to try; the portfolio by default.
        base: Options of the search.
        models: Names of the models; the first is that of plain fine-tuning.
        pooling: What the head of each model reads in plain fine-tuning.
        texts: Whether there are texts without labels.

    Raises:
        UsageError: An arm is none, or needs texts that are not there.
    """
    tried: dict[str, list[str]] = {name: [] for name in PORTFOLIO}
    for arm in dict.fromkeys(_portfolio(base, texts) if arms is None else arms):
        tried[stage_of(arm)].append(arm)
        if not texts and _before(arm) is None and changed(Recipe(""), arm, base).reads_texts:
            raise UsageError(f"arm {arm!r} learns from texts without labels: name them with unlabelled "
                             "(--unlabelled FILE), or leave the arm out.")  # fmt: skip

    def made(recipe: Recipe, arm: str) -> Recipe | None:
        """None for an arm that changes nothing, or that cannot be combined with what was chosen before."""
        try:
            after = changed(recipe, arm, base)
            return None if _same(after, recipe, base, pooling[recipe.model]) else after
        except UsageError as error:
            if not recipe.arms:
                raise
            logger.warning("arm %s is not tried on top of %s: %s", arm, recipe, error)
            return None

    def on_top(arms: Sequence[str]) -> Any:
        return lambda recipe: [after for arm in arms if (after := made(recipe, arm)) is not None]

    others = [Recipe(model, (model,)) for model in models[1:]]
    encoders = [Stage("model", lambda recipe: others)] if others else []
    return [*encoders, *(Stage(name, on_top(given)) for name, given in tried.items() if given)]


def _portfolio(base: Options, texts: bool) -> list[str]:
    """The arms of the portfolio, without those that cannot be combined with the options of the search."""
    every = [*(arm for given in PORTFOLIO.values() for arm in given), *(WITH_TEXTS if texts else ())]

    def refused(arm: str) -> bool:
        procedure = make_procedure(arm) if _is_procedure(arm) else None
        try:
            dataclasses.replace(base, **dict(changed(Recipe(""), arm, base).options))
        except UsageError:
            return True
        return procedure is not None and procedure.refuses(base) is not None

    return [arm for arm in every if not refused(arm)]


def _same(after: Recipe, before: Recipe, base: Options, pooling: str) -> bool:
    """Whether two recipes of one model train alike."""

    def decisive(recipe: Recipe) -> tuple[Any, ...]:
        options = dataclasses.replace(base, **dict(recipe.options))
        reads = pooling if options.pooling == "auto" else options.pooling
        rest = dataclasses.replace(options, pooling="auto")
        return rest, reads, recipe.lengthened, recipe.methods, recipe.procedure, recipe.before, recipe.soup

    return decisive(after) == decisive(before)


def _with(options: tuple[tuple[str, Any], ...], more: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted({**dict(options), **more}.items()))


def refuse_own(name: str, where: str = "") -> None:
    """Refuse an option that the search sets itself.

    Raises:
        UsageError: It is one.
    """
    if name in NOT_HERE or name.endswith("_seed"):
        why = NOT_HERE.get(name, NOT_HERE["seed"])
        raise UsageError(f"{where}{name} is no option of a search: {why}. Leave it out.")


def _options(arm: str) -> dict[str, Any]:
    """Options of an arm such as ``head=logistic,pooling=mean``."""
    import typing

    hints = typing.get_type_hints(Options)
    chosen = {}
    for item in arm.split(","):
        key, _, text = (part.strip() for part in item.partition("="))
        refuse_own(key, f"arm {arm!r}: ")
        if key not in hints:
            raise UsageError(f"arm {arm!r}: unknown option {key!r}.{suggest(key, hints)}")
        try:
            chosen[key] = convert(text, hints[key])
        except ValueError:
            chosen[key] = text  # the check of the option names what it must be
        option(f"arm {arm!r}", key, chosen[key])
    Options.of({key: value for key, value in chosen.items() if value is not None})
    return chosen


def _times(arm: str, factor: re.Match[str]) -> float:
    """What an arm multiplies an option by.

    Raises:
        UsageError: Nothing would be left of the option.
    """
    if not (number := float(factor[3])):
        raise UsageError(f"arm {arm!r}: a factor must be above 0, got {factor[3]}.")
    return number if factor[2] == "*" else 1 / number


def _trainings(arm: str, soup: re.Match[str]) -> int:
    """Number of trainings of a soup.

    Raises:
        UsageError: It averages nothing.
    """
    if int(soup[1]) < 2:
        raise UsageError(f"arm {arm!r} averages the weights of {soup[1]} training(s): give 2 or more.")
    return int(soup[1])


def _before(arm: str) -> tuple[str, str] | None:
    """What an arm puts before the fit, and how; None for another arm.

    Raises:
        UsageError: There is no such training, or no such file.
    """
    what, _, how = (part.strip() for part in arm.partition("="))
    if what not in BEFORE:
        return None
    if what == "pretrain":
        make_pretraining(how)
        return what, how
    file = Path(how)
    if not file.is_file():
        raise UsageError(f"arm {arm!r}: there is no file {how!r}: give another labelled table as aux=FILE.")
    return what, str(file.absolute())


def _is_procedure(arm: str) -> bool:
    from ..fitting.procedures import PROCEDURES

    return arm.partition(":")[0].strip() in PROCEDURES
