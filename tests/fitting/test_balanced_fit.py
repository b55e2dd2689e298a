"""Attributes that predict a label, as a fit names them and as its weights of rows balance them."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from fit_helpers import save_tiny_bert, toy
from steadytune import fit
from steadytune.bench.spec import in_use
from steadytune.data.balance import WEIGHT
from steadytune.data.problem import Classification
from steadytune.errors import UsageError
from steadytune.fitting.loss import loss_of, losses_and_total
from steadytune.fitting.options import Options
from steadytune.fitting.plan import make_plan, make_setup, open_model, runs
from steadytune.fitting.row_weights import RowWeights

QUICK = {"steps": 4, "batch_size": 8, "save_steps": 0, "progress": False, "probe": False, "validation_share": 0.2}
COLUMNS = {"text": "text", "label": "label"}


def table(rows=120):
    """A word that stands in most rows of one class, and in few of the other."""
    frame = toy(rows)
    more = [(label == "up") == (i % 20 > 0) for i, label in enumerate(frame["label"])]
    return frame.assign(text=np.where(more, frame["text"] + " warm", frame["text"] + " cold"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def test_what_predicts_a_label_is_named_before_training_and_on_the_page(bert, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "steadytune"):
        fit(table(), model=bert, output=tmp_path / "out", balance="warm", **COLUMNS, **QUICK)
    said = [record.getMessage() for record in caplog.records]
    (named,) = [line for line in said if line.startswith("'warm' predicts label 'up' in ")]
    (weighed,) = [line for line in said if line.startswith("balanced by warm: 96 rows count as ")]
    record = json.loads((tmp_path / "out" / "steadytune.json").read_text())
    assert record["recipe"]["balance"] == ["warm"]
    assert record["balanced"]["effective"] < record["balanced"]["rows"] == 96
    assert f"count as {record['balanced']['effective']:.0f} " in weighed
    (about,) = [part for part in record["predictors"] if part["attribute"] == "'warm'"]
    assert f"in {about['share']:.0%} of {about['rows']} rows" in named
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "What predicts a label by itself" in page
    assert "The rows were weighed to balance warm: 96 rows count as" in page


@pytest.mark.parametrize("focal", [0.0, 2.0])
def test_the_loss_is_that_of_the_weighted_rows(bert, tmp_path, focal):
    plan = make_plan(table(), model=bert, balance=["warm"], dropout=0.0, focal=focal, **COLUMNS, **QUICK)
    setup = make_setup(plan, open_model(plan), tmp_path)
    features = setup.features(plan.data.train)
    weights = plan.data.train["weight"].to_numpy()
    assert [feature["weight"] for feature in features] == weights.tolist()
    assert setup.features(plan.data.tests["validation"])[0]["weight"] == 1.0
    (job,) = runs(plan)
    trainer = setup.trainer(job, job.seeds, tmp_path)
    batch = trainer._prepare_inputs(trainer.data_collator(features[:8]))
    model = trainer.model.train()
    plain = {name: value for name, value in batch.items() if name != "weight"}
    each = torch.nn.functional.cross_entropy(model(**plain).logits, batch["labels"], reduction="none")
    wanted = (torch.tensor(weights[:8], dtype=each.dtype) * (1 - (-each).exp()) ** focal * each).mean()
    trainer.current_gradient_accumulation_steps = 1  # as in a step
    assert torch.allclose(trainer.compute_loss(model, dict(batch)), wanted, atol=1e-6)


def test_names_of_nothing_are_refused_before_training():
    with pytest.raises(UsageError, match="balance: no attribute 'refund' that some rows have"):
        make_plan(table(), model="m", balance=["refund"], **COLUMNS)
    with pytest.raises(UsageError, match="balance is for classes"):
        make_plan(table(), model="m", balance=["warm"], text="text", label="score")


def test_runs_of_studies_without_it_keep_their_ids():
    assert "balance" not in in_use(Options(), numbers=False)
    assert in_use(Options(balance=["warm"]), numbers=False)["balance"] == ("warm",)


def test_training_on_another_table_first_balances_and_selects_nothing():
    """Naive: the options of the fit, for a table that has neither its words nor its subgroups."""
    frame = table().assign(source=["web", "mail"] * 60)
    plan = make_plan(
        frame, model="m", balance=["warm"], subgroup="source", evaluations=2, worst_subgroup=True,
        aux=toy(40, start=500), **COLUMNS,
    )  # fmt: skip
    assert plan.options.balance == ("warm",)
    assert "weight" not in plan.stages[0].plan.data.train


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"focal": 2.0}, (0.2**2 * -np.log(0.8) * 0.5 + 0.8**2 * -np.log(0.2) * 1.5) / 2),
        ({"class_weights": "balanced"}, (2 / 3 * -np.log(0.8) * 0.5 + 2 * -np.log(0.2) * 1.5) / (2 / 3 + 2)),
        ({"label_smoothing": 0.1}, ((-0.95 * np.log(0.8) - 0.05 * np.log(0.2)) * 0.5
                                    + (-0.05 * np.log(0.8) - 0.95 * np.log(0.2)) * 1.5) / 2),
    ],
)  # fmt: skip
def test_weights_of_rows_multiply_the_loss_that_is_trained_on(options, expected):
    """Naive: they multiply the plain loss beside it, and the sum unlearns rows of a small focal loss."""
    rows, problem = pd.DataFrame({"label": ["a"] * 6 + ["b"] * 2}), Classification(("a", "b"))
    logits, labels = torch.tensor([[np.log(4), 0.0]] * 2), torch.tensor([0, 1])
    method = RowWeights(losses_and_total(Options(**options), rows, problem))
    output = SimpleNamespace(logits=logits)
    step = SimpleNamespace(inputs={"labels": labels, WEIGHT: torch.tensor([0.5, 1.5])}, outputs=output,
                           logits=lambda outputs, method: outputs.logits)  # fmt: skip
    task = loss_of(Options(**options), rows, problem)(output, labels)
    assert float(task + method.penalty(step)) == pytest.approx(expected)


def test_a_method_that_weighs_the_plain_loss_is_refused_beside_another_one():
    with pytest.raises(UsageError, match="group_weights weighs the plain loss of rows, which focal changes"):
        make_plan(table(), model="m", methods=["group_weights"], subgroup="length", focal=2.0, **COLUMNS, **QUICK)
