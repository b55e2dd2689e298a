import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fit_helpers import data_root
from steadytune import cli, tasks
from steadytune.data.prepare import prepare
from steadytune.data.problem import Classification, MultiLabel, Regression
from steadytune.errors import UsageError
from steadytune.tasks import COLUMNS, TASKS, find, load, merge_rule


def test_every_listed_file_has_columns_and_a_merge_rule():
    for task in TASKS.values():
        assert task.metric in task.problem.metrics
        for file in (*task.tests, *task.beyond):
            assert file in COLUMNS or file.partition("/")[0] in COLUMNS
            if not file.endswith(":relatedness_score"):
                labels = (COLUMNS.get(file) or COLUMNS[file.partition("/")[0]])[1]
                merge = merge_rule(task.labels, labels)
                assert {merge.get(name, name) for name in labels} <= {merge.get(n, n) for n in task.labels}, file


def test_the_files_of_a_task_are_told_with_their_columns():
    files = tasks.layout(find("stsb"))
    assert [(f.path, f.text, f.label, f.labels) for f in files] == [
        ("stsb/train.parquet", ("sentence1", "sentence2"), "label", ()),
        ("stsb/validation.parquet", ("sentence1", "sentence2"), "label", ()),
        ("sick/test.parquet", ("premise", "hypothesis"), "relatedness_score", ()),
    ]
    assert (
        tasks.layout(find("imdb_counterfactual"), beyond=False)[0].path == "imdb_counterfactual/train_original.parquet"
    )
    shown = CliRunner().invoke(cli.app, ["tasks", "qnli"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0
    for part in ("qnli/train.parquet", "question", "0 = entailment", "1 = not_entailment", "out of domain"):
        assert part in shown.stdout
    wrong = CliRunner().invoke(cli.app, ["tasks", "qnlj"])
    assert (wrong.exit_code, "Did you mean 'qnli'" in wrong.stderr) == (2, True)


def test_merge_rules_by_hand():
    assert merge_rule(tasks.NLI3, tasks.NLI2)["contradiction"] == "not_entailment"
    assert merge_rule(tasks.NLI3, tasks.MONOTONE) == {"contradiction": "neutral"}
    assert merge_rule(tasks.NLI2, ("not_entailment", "entailment")) == {}
    assert merge_rule(tasks.PARAPHRASE, tasks.DUPLICATE)["duplicate"] == "equivalent"
    assert merge_rule(tasks.DUPLICATE, tasks.PARAPHRASE)["equivalent"] == "duplicate"


def test_unknown_task_names_the_nearest():
    with pytest.raises(UsageError, match=r"unknown task 'sst-2'. Did you mean 'sst2'\? Known: cola"):
        find("sst-2")


def test_missing_data_root_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no folder 'rte'.*--data-root"):
        load("rte", tmp_path)


@pytest.fixture
def small_root(tmp_path):
    def put(file, **columns):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        pd.DataFrame(columns).to_parquet(tmp_path / f"{file}.parquet")

    put("wnli/train", sentence1=["a", "b"], sentence2=["c", "d"], label=[1, 0])
    put("wnli/validation", sentence1=["e", "f"], sentence2=["g", "h"], label=[0, 1])
    put("rte/validation", sentence1=["e", "f"], sentence2=["g", "h"], label=[0, 1])
    return tmp_path


def test_labels_meet_by_name_not_by_number(small_root):
    """wnli counts 1 for entailment, rte 0."""
    train, tests = load("wnli", small_root, beyond=True)
    data = prepare(train, tests, validation_share=0)
    assert data.problem.names == ("not_entailment", "entailment")
    assert data.train["label"].tolist() == ["entailment", "not_entailment"]
    assert data.tests["rte/validation"]["label"].tolist() == ["entailment", "not_entailment"]
    assert data.tests["wnli/validation"]["label"].tolist() == ["not_entailment", "entailment"]


def test_missing_out_of_domain_file_is_an_error_only_when_asked_for(small_root):
    (small_root / "rte" / "validation.parquet").unlink()
    assert list(load("wnli", small_root)[1]) == ["wnli/validation"]
    with pytest.raises(UsageError, match="no such file"):
        load("wnli", small_root, beyond=True)


@pytest.mark.parametrize("name", TASKS)
def test_real_data_reads_through_the_table(name):
    """Every row of every listed file of the task passes the guards and its labels meet the training labels."""
    train, tests = load(name, data_root(), beyond=True)
    data = prepare(train, tests, train_size=100, validation_share=0.1)
    task = TASKS[name]
    assert len(data.tests) == 1 + len(task.tests) + len(task.beyond)
    assert data.problem.names == task.labels
    if task.labels:
        assert set(data.train["label"]) == set(task.labels)
        for test, rows in data.tests.items():
            assert rows["label"].nunique() >= 2, test


def test_real_counts_keep_the_label_order():
    """The first label of rte is entailment (146 of 277 validation rows), 47 + 7164 rows of Breaking NLI are not."""
    _, tests = load("rte", data_root())
    data = prepare(load("rte", data_root())[0], tests)
    assert data.tests["rte/validation"]["label"].value_counts()["entailment"] == 146
    train, tests = load("rte", data_root(), beyond=True)
    assert prepare(train, tests).tests["sick/test"]["label"].value_counts()["entailment"] == 1414


# ---- metrics ----------------------------------------------------------------------------------------------------


def words(text):
    return np.array(text.split(), dtype=object)


def test_two_classes_by_hand():
    scores = Classification(("no", "yes")).score(words("yes yes no no"), words("yes no no no"))
    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx(2 / 3)  # of 'yes': precision 1, recall 1/2
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert scores["matthews"] == pytest.approx(2 / np.sqrt(1 * 2 * 2 * 3))


def test_three_classes_have_no_binary_f1():
    scores = Classification(("a", "b", "c")).score(words("a b c"), words("a b b"))
    assert "f1" not in scores
    assert scores["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_merged_names_decide_which_class_is_second():
    problem = Classification(tasks.NLI3)
    two = problem.coarser(merge_rule(tasks.NLI3, tasks.NLI2))
    assert two.names == tasks.NLI2
    gold, predicted = words("entailment not_entailment"), words("entailment entailment")
    assert two.score(gold, predicted)["f1"] == 0.0


def test_f1_of_a_class_nobody_has_is_zero_and_silent():
    assert Classification(("no", "yes")).score(words("no no"), words("no no"))["f1"] == 0.0


def test_correlations_by_hand():
    gold = np.array([1.0, 2.0, 3.0, 4.0])
    scores = Regression().score(gold, np.array([1.0, 4.0, 9.0, 16.0]))
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(25 / np.sqrt(5 * 129))
    assert Regression().score(gold, gold + 2)["rmse"] == pytest.approx(2.0)


def test_undefined_correlation_is_none_not_nan():
    scores = Regression().score(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert scores["pearson"] is None
    assert scores["spearman"] is None
    assert Regression().score(np.array([1.0]), np.array([3.0]))["pearson"] is None


def sets(*rows):
    out = np.empty(len(rows), dtype=object)
    out[:] = [tuple(row) for row in rows]
    return out


@pytest.mark.parametrize(
    ("gold", "predicted", "micro", "macro", "accuracy"),
    [
        (sets("ab", "a", ""), sets("ab", "a", ""), 1.0, 2 / 3, 1.0),  # nobody has c, and nobody said it
        # a: 1 hit, 1 missed; b: 1 hit, 1 too many; c: 1 too many
        (sets("ab", "a", ""), sets("ab", "b", "c"), 4 / 7, (2 / 3 + 2 / 3 + 0) / 3, 1 / 3),
        (sets("", ""), sets("", ""), 0.0, 0.0, 1.0),
        (sets("ab", "bc"), sets("ba", "cb"), 1.0, 1.0, 1.0),  # the order within a row does not count
    ],
    ids=["right", "half right", "nothing to find", "order"],
)
def test_multilabel_by_hand(gold, predicted, micro, macro, accuracy):
    scores = MultiLabel(("a", "b", "c")).score(gold, predicted)
    assert scores == pytest.approx({"f1_micro": micro, "f1_macro": macro, "accuracy": accuracy})


def test_multilabel_scores_agree_with_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score

    rng = np.random.default_rng(0)
    gold, predicted = (rng.random((50, 4)) < 0.4 for _ in range(2))
    names = tuple("abcd")
    rows = [
        sets(*([n for n, has in zip(names, row, strict=True) if has] for row in table)) for table in (gold, predicted)
    ]
    expected = {f"f1_{how}": f1_score(gold, predicted, average=how) for how in ("micro", "macro")}
    expected["accuracy"] = accuracy_score(gold, predicted)
    assert MultiLabel(names).score(*rows) == pytest.approx(expected)


def test_multilabel_reports_micro_f1_first():
    assert MultiLabel(("a", "b")).metric(None).name == "f1_micro"


@pytest.mark.parametrize(
    "file", ["sst2/train", "imdb/test", "yelp/test", "amazon/test", "imdb_counterfactual/test_original"]
)
def test_what_is_called_negative_is_negative(file):
    """The IMDB file numbers its labels the other way round: a sentiment model seems right on a quarter of its rows."""
    rows = prepare(tasks.read_set(data_root(), file), {}, validation_share=0.0).train
    bad = rows["text"].str.contains(r"\b(?:worst|awful|waste of|terrible|horrible)\b", case=False)
    assert (rows["label"][bad] == "negative").mean() > 0.7
    good = rows["text"].str.contains(r"\b(?:wonderful|excellent|superb|masterpiece)\b", case=False)
    assert (rows["label"][good] == "positive").mean() > 0.6
