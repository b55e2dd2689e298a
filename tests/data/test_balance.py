"""Attributes that predict a label: what is named with which counts, and what is not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from steadytune.data.balance import balanced, effective, entropy_weights, predictors
from steadytune.data.prepare import prepare
from steadytune.data.problem import Classification, MultiLabel, Regression
from steadytune.data.tables import Table
from steadytune.errors import UsageError

TWO = Classification(("0", "1"))
FILLERS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa"]


def rows(n=240, seed=0, **columns):
    """Texts of six random words, labels at random."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(FILLERS, 6)) for _ in range(n)]
    return pd.DataFrame({"text": texts, "label": rng.choice(["0", "1"], n), **columns})


def with_word(frame, word, share, count):
    """The first ``count`` rows hold the word, and this share of them the label 1."""
    frame = frame.copy()
    frame.loc[: count - 1, "text"] = frame["text"].str.rpartition(" ")[0] + f" {word}"
    frame.loc[: count - 1, "label"] = ["1" if i < round(share * count) else "0" for i in range(count)]
    return frame


def test_a_word_is_named_with_its_counts():
    found = predictors(with_word(rows(), "Refund!", 0.97, 100), TWO)
    assert str(found[0]).startswith("'refund' predicts label '1' in 97% of 100 rows (")
    assert found[0].label == "1"


@pytest.mark.parametrize(("share", "count"), [(0.8, 100), (1.0, 12)], ids=["not often enough", "too few rows"])
def test_a_word_of_a_class_is_not_named(share, count):
    assert not [p for p in predictors(with_word(rows(), "refund", share, count), TWO) if p.attribute == "'refund'"]


def test_labels_at_random_have_no_predictor():
    """Naive: without the correction for the many words that are tried."""
    for seed in range(20):
        assert predictors(rows(seed=seed), TWO) == []


def test_length_negation_overlap_and_subgroups_are_named():
    frame = rows()
    up = frame["label"] == "1"
    longer = frame.assign(text=frame["text"] + np.where(up, " alpha beta gamma", ""))
    assert "length above" in predictors(longer, TWO)[0].attribute
    denied = frame.assign(text=np.where(up, "it isn't " + frame["text"], "it is " + frame["text"]))
    assert "negation" in {p.attribute for p in predictors(denied, TWO)}
    pairs = frame.assign(text_pair=np.where(up, frame["text"], "mu nu xi"))
    named = {p.attribute.partition(" above")[0] for p in predictors(pairs, TWO)}
    assert "overlap of the texts" in named
    columns = pd.DataFrame({"source": np.where(up, "web", "mail"), "year": [float(i % 3) for i in range(len(frame))]})
    assert {(p.attribute, p.label) for p in predictors(frame, TWO, columns)} == {
        ("source 'web'", "1"), ("source 'mail'", "0")
    }  # fmt: skip


def test_columns_of_subgroups_are_looked_at_one_by_one_and_a_label_is_no_attribute():
    """Naive: of the label crossed with the source, each subgroup predicts the label in 100 % of its rows."""
    frame = rows().assign(source=np.repeat(["web", "mail"], 120))
    table = Table.of(frame, ("text",), "label", "train", subgroup=["source", "label"])
    columns = prepare(table, {}, validation_share=0.0).columns
    assert list(columns) == ["source"]
    assert predictors(frame, TWO, columns) == []
    with pytest.raises(UsageError, match="no attribute 'subgroup' that some rows have"):
        balanced(frame, TWO, ["subgroup"], columns[[]])


def test_numbers_of_which_most_are_the_largest_are_cut_below_it():
    """No number is above the median then, so that there was no attribute."""
    few, most = pd.DataFrame({"text": "a b c", "text_pair": "q r a", "label": ["0"] * 25}), ["a b c d", "a b"]
    frame = pd.concat([few, pd.DataFrame([[*most, "1"]] * 35, columns=few.columns)], ignore_index=True)
    named = {p.attribute: p.rows for p in predictors(frame, TWO) if p.label == "1"}
    assert named["length of text above 3 words"] == named["overlap of the texts above 33% of the second"] == 35
    for name in ("length", "overlap"):
        assert len(balanced(frame, TWO, [name])) == 60


def test_every_class_of_several_labels_is_looked_at_and_numbers_are_not():
    frame = with_word(rows(), "refund", 1.0, 100)
    several = frame.assign(label=[("a", "b") if label == "1" else ("a",) for label in frame["label"]])
    found = predictors(several, MultiLabel(("a", "b")))
    assert [(p.attribute, p.label) for p in found] == [("'refund'", "b")]
    assert predictors(frame.assign(label=1.5), Regression()) == []


# ---- weights ----------------------------------------------------------------------------------------------------


def table(*cells):
    """Rows with an attribute and a class, by the counts of (neither, class alone, attribute alone, both)."""
    attribute = np.repeat([False, False, True, True], cells)
    positive = np.repeat([False, True, False, True], cells)
    return attribute[:, None], np.stack([~positive, positive], axis=1)


def test_four_cells_become_equal():
    """40, 10, 10, 40 rows: weights 0.625 and 2.5, and 64 effective rows."""
    weights = entropy_weights(*table(40, 10, 10, 40))
    assert np.allclose(weights, np.repeat([0.625, 2.5, 2.5, 0.625], [40, 10, 10, 40]), atol=1e-3)
    assert effective(weights) == pytest.approx(64, abs=0.1)


def test_what_is_balanced_already_keeps_weight_1():
    assert np.allclose(entropy_weights(*table(30, 30, 20, 20)), 1, atol=1e-4)


def test_shares_of_attributes_and_classes_stay_as_they_are():
    attributes, member = table(50, 20, 10, 40)
    weights = entropy_weights(attributes, member)
    for part in (attributes, member):
        assert np.allclose((weights[:, None] * part).mean(axis=0), part.mean(axis=0), atol=1e-3)
    both = float((weights * attributes[:, 0] * member[:, 1]).mean())
    assert both == pytest.approx(attributes.mean() * member[:, 1].mean(), abs=1e-3)


def test_two_attributes_become_independent_of_each_other_too():
    rng = np.random.default_rng(0)
    first = rng.random(400) < 0.5
    second = np.where(rng.random(400) < 0.8, first, ~first)
    positive = np.where(rng.random(400) < 0.7, first, ~first)
    attributes = np.stack([first, second], axis=1)
    weights = entropy_weights(attributes, np.stack([~positive, positive], axis=1))
    for one, other in ((first, second), (first, positive), (second, positive)):
        w = weights / weights.sum()
        assert float(w @ (one & other)) == pytest.approx(float(w @ one) * float(w @ other), abs=2e-3)


@pytest.mark.parametrize("shares", [(0.7, 0.3), (0.6, 0.3, 0.1)])
def test_values_of_a_column_exclude_each_other_and_keep_their_shares(shares):
    """Naive: they are made independent of each other, which cannot be, and the smaller one is weighed down."""
    which = np.repeat(np.arange(len(shares)), [round(200 * share) for share in shares])
    values = pd.DataFrame({"source": which.astype(str)})
    frame = rows(200).assign(label=np.tile(["0", "1"], 100))
    assert np.allclose(balanced(frame, TWO, ["subgroup"], values), 1, atol=1e-4), "they say nothing of the class"
    rng = np.random.default_rng(1)
    frame["label"] = np.where(rng.random(200) < np.array([0.3, 0.6, 0.8])[which], "1", "0")
    weights, up = balanced(frame, TWO, ["source"], values), (frame["label"] == "1").to_numpy()
    for k, share in enumerate(shares):
        assert weights[which == k].sum() / 200 == pytest.approx(share, abs=1e-3)
        assert np.average(up[which == k], weights=weights[which == k]) == pytest.approx(up.mean(), abs=2e-3)


def test_a_measure_goes_before_a_word_of_its_name():
    """Naive: --balance length balances the word "length" too, unasked."""
    longer = rows()
    longer["text"] += [" alpha" * (i % 2) for i in range(len(longer))]
    frame = with_word(longer, "length", 0.97, 100)
    plain = balanced(longer.assign(label=frame["label"]), TWO, ["length"])
    assert np.allclose(balanced(frame, TWO, ["length"]), plain)


def test_an_empty_cell_has_no_solution_and_weights_stay_bounded():
    """Naive: weights of a cell without rows are sought for ever, and a few rows get them all."""
    weights = entropy_weights(*table(60, 0, 2, 38))
    assert np.isfinite(weights).all()
    assert 0 < weights.max() <= 10
    assert weights.mean() == pytest.approx(1)


def test_attributes_are_named_by_the_user():
    frame = with_word(rows(), "refund", 0.97, 100)
    weights = balanced(frame, TWO, ["Refund"])
    has, up = frame["text"].str.contains("refund").to_numpy(), (frame["label"] == "1").to_numpy()
    inside, outside = (np.average(up[part], weights=weights[part]) for part in (has, ~has))
    assert abs(inside - outside) < abs(up[has].mean() - up[~has].mean()) / 2
    with pytest.raises(UsageError, match="no attribute 'overlap' that some rows have"):
        balanced(frame, TWO, ["overlap"])
    with pytest.raises(UsageError, match="balance is for classes, this is regression"):
        balanced(frame.assign(label=1.0), Regression(), ["length"])
