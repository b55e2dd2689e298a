"""Result of a study, in one sentence for each domain. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from ...data.metrics import smaller_is_better
from ...pages.words import counted, listed, number
from ..stats import DRAWS, EXACT, detectable_gain
from .tables import ALPHA

_PLACES = {"in": "in domain", "out": "out of domain"}


def verdict(gains: pd.DataFrame, overall: pd.DataFrame, domains: Sequence[str], baseline: str) -> str:
    """Say which recipes beat the baseline, which did worse, and which gains would have been seen.

    A recipe beats the baseline if its gain is positive and Holm's p, as in the tables, is at most 0.05. The means over
    tasks count, and of tasks that are in no mean, their own comparisons.

    Args:
        gains: Comparisons of each task, as `tables.comparisons` gives them.
        overall: Comparisons over all tasks, as `tables.comparisons` gives them.
        domains: Domains with a score.
        baseline: The recipe that the others are compared with.

    Returns:
        One sentence for each domain, or one that says why there is nothing to compare.
    """
    if gains.empty:
        return f"Nothing is compared: no other recipe has a seed in common with {baseline}."
    return " ".join(_sentences(gains, overall, domains, baseline))


def _sentences(gains: pd.DataFrame, overall: pd.DataFrame, domains: Sequence[str], baseline: str) -> Iterator[str]:
    for domain in domains:
        place = f" {_PLACES[domain]}" if len(domains) > 1 else ""
        single = gains[gains["domain"] == domain]
        together = overall[overall["domain"] == domain] if len(overall) else overall
        compared = _compared(single, together)
        tested = compared[compared["p"].notna()]
        if tested.empty:
            yield f"Nothing can be shown{place}: no recipe has two seeds in common with {baseline}."
            continue
        needed = math.ceil(1 + math.log2(len(tested) / ALPHA))  # the smallest p of n sign flips is 2^(1 - n)
        if tested["n"].max() < needed:
            yield (
                f"Nothing can be shown{place}: with {counted(len(tested), 'comparison')}, each needs at least {needed} "
                f"pairs of seeds, and there are at most {tested['n'].max()}."
            )
            continue
        if tested["n"].max() > EXACT and len(tested) / (DRAWS + 1) > ALPHA:
            yield (
                f"Nothing can be shown{place}: with more than {EXACT} pairs of seeds p is at least 1/{DRAWS + 1}, "
                f"which {counted(len(tested), 'comparison')} raise above {ALPHA}. Compare fewer recipes or tasks."
            )
            continue
        won = tested.loc[(tested["holm"] <= ALPHA) & (tested["gain"] > 0), "recipe"]
        able = single[(single["n"] >= needed) & ~single["recipe"].isin(won)]  # with fewer pairs no gain is seen
        yield f"{_outcome(tested, baseline, place)}{_would_have_been_seen(able, len(tested))}."


def _compared(single: pd.DataFrame, together: pd.DataFrame) -> pd.DataFrame:
    """Means over tasks, and the comparisons that are in none: errors and other scores have no common mean."""
    if together.empty:
        return single
    keys = ["model", "setting", "recipe", "smaller"]
    means = set(together[keys].itertuples(index=False, name=None))
    own = single.assign(smaller=single["metric"].map(smaller_is_better))[keys]
    return pd.concat([together, single[[row not in means for row in own.itertuples(index=False, name=None)]]])


def _outcome(tested: pd.DataFrame, baseline: str, place: str) -> str:
    """As in "rdrop beat plain in 2 of 3 comparisons; smart did worse in 1"."""
    sure = tested[tested["holm"] <= ALPHA]
    better, worse = sure[sure["gain"] > 0], sure[sure["gain"] < 0]
    won = f"{_named(better, tested)} beat {baseline}{place}" if len(better) else f"No recipe beat {baseline}{place}"
    return won + (f", and {_named(worse, tested)} did worse" if len(worse) else "")


def _named(rows: pd.DataFrame, tested: pd.DataFrame) -> str:
    """Names of recipes, each with the number of its comparisons if there are several."""
    counts, of = rows["recipe"].value_counts(sort=False).to_dict(), tested["recipe"].value_counts().to_dict()
    return listed(
        str(recipe) if of[recipe] == 1 else f"{recipe} (in {count} of {of[recipe]} comparisons)"
        for recipe, count in counts.items()
    )


def _would_have_been_seen(single: pd.DataFrame, comparisons: int) -> str:
    """Gain that a comparison on one task finds in 80 % of studies; the median over several comparisons.

    It is found if its p is at most 0.05 after Holm's adjustment. That of the smallest p counts here, which no other
    comparison can lower.
    """
    known = single[single["detectable"].notna()]
    errors = known["metric"].map(smaller_is_better)
    if known.empty or errors.nunique() > 1:  # the comparisons have no common unit
        return ""
    harder = {n: detectable_gain(n, 1.0, alpha=ALPHA / comparisons) / detectable_gain(n, 1.0) for n in {*known["n"]}}
    gain = (known["detectable"] * known["n"].map(harder)).median()
    size = f"{number(gain, 3)} {known['metric'].iloc[0]}" if errors.all() else f"{number(100 * gain, 1)} points"
    if len(known) == 1:
        return f"; gains above {size} would have been seen in 80 % of such studies"
    return f"; on one task, gains above {size} (the median of {len(known)} comparisons) would have been seen"
