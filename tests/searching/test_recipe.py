"""Arms, recipes, stages and budgets as they are written."""

from __future__ import annotations

import pytest

from steadytune.errors import UsageError
from steadytune.fitting.options import Options
from steadytune.searching.budget import Budget
from steadytune.searching.recipe import PORTFOLIO, Recipe, changed, frozen, probes, stage_of, stages
from steadytune.searching.record import recipe_record, recorded_recipe

BASE = Options(lr=3e-5, validation_share=0.0)
PLAIN = Recipe("bert")


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("30m", 1800, "seconds"), ("1.5h", 5400, "seconds"), ("90s", 90, "seconds"), ("100runs", 100, "runs")],
)
def test_budgets(text, amount, unit):
    assert Budget.of(text) == Budget(amount, unit)


@pytest.mark.parametrize("text", ["30", "m", "-3m", "1.5runs", "30 minutes", ""])
def test_what_is_no_budget_is_named(text):
    with pytest.raises(UsageError, match="30m, 2h or 100runs, got"):
        Budget.of(text)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(UsageError, match="above 0"):
        Budget.of("0m")


def test_arms_change_one_thing_and_add_up():
    recipe = PLAIN
    for arm in ("head=logistic,pooling=mean", "lr*3", "lr/2", "steps*2", "dps_mix:update_ratio=0.1", "mixup-blo"):
        recipe = changed(recipe, arm, BASE)
    assert dict(recipe.options) == {"head": "logistic", "pooling": "mean", "lr": 4.5e-05}
    assert (recipe.methods, recipe.procedure) == (("dps_mix:update_ratio=0.1",), "mixup-blo")
    assert str(changed(changed(PLAIN, "lr*3", BASE), "rdrop", BASE)) == "lr*3 + rdrop"
    assert str(PLAIN) == "plain"


def test_twice_the_steps_are_twice_those_of_the_rows():
    recipe = changed(PLAIN, "steps*2", BASE)
    assert recipe.settings(BASE, 1000)["steps"] == 2 * BASE.total_steps(1000)
    assert recipe.settings(BASE, 300)["steps"] == 2 * BASE.total_steps(300)
    assert PLAIN.settings(BASE, 300) == {}
    by_epochs = Options(epochs=3)
    assert recipe.settings(by_epochs, 160) == {"steps": 60, "epochs": None}


def test_the_portfolio_is_made_of_arms():
    for stage, arms in PORTFOLIO.items():
        assert [stage_of(arm) for arm in arms] == [stage] * len(arms)


def test_a_procedure_is_no_arm_of_the_portfolio_where_it_refuses_the_options():
    """Naive: an arm that fails in its first training."""

    def tried(**options):
        base = Options(lr=3e-5, validation_share=0.0, **options)
        return [arm.name for arm in stages(None, base, ["bert"], {"bert": "model"})[-1].arms(PLAIN)]

    assert "contrastive" in tried()
    assert "contrastive" not in tried(class_weights="balanced")
    assert "mixup-blo" in tried(class_weights="balanced")


def test_an_arm_that_changes_nothing_is_left_out():
    """Naive: the same recipe under two names would be trained twice, and win half of the time."""
    head, *_ = stages(["head=logistic", "pooling=mean"], BASE, ["bert"], {"bert": "mean"})
    assert [arm.name for arm in head.arms(PLAIN)] == ["head=logistic"]
    head, *_ = stages(["head=logistic", "pooling=mean"], BASE, ["bert"], {"bert": "model"})
    assert [arm.name for arm in head.arms(PLAIN)] == ["head=logistic", "pooling=mean"]


def test_other_models_are_a_stage_before_the_others():
    first, *others = stages(["rdrop"], BASE, ["bert", "roberta"], {"bert": "model", "roberta": "model"})
    (other,) = first.arms(PLAIN)
    assert (other.model, other.name, [stage.name for stage in others]) == ("roberta", "roberta", ["method"])
    assert others[0].arms(other)[0].name == "roberta + rdrop"


def test_other_texts_and_tables_come_before_the_fit(tmp_path):
    (tmp_path / "other.csv").write_text("text,label\ngood,up\n")
    recipe = changed(changed(PLAIN, f"aux={tmp_path / 'other.csv'}", BASE), "pretrain=simcse:steps=3", BASE)
    assert recipe.trainings == {"aux": [str(tmp_path / "other.csv")], "pretrain": "simcse:steps=3"}
    assert recipe.reads_texts
    assert stage_of("pretrain=tapt") == "start"
    assert recorded_recipe(recipe_record(recipe, {"bert": "bert"})) == recipe
    plain = recipe_record(PLAIN, {"bert": "bert"})
    assert recorded_recipe({k: v for k, v in plain.items() if k != "before"}) == PLAIN, "as older searches wrote it"


def test_texts_without_labels_bring_arms_more_and_arms_that_need_them_say_so():
    def names(texts, arms=None):
        return [arm for stage in stages(arms, BASE, ["bert"], {"bert": "model"}, texts) for arm in stage.arms(PLAIN)]

    more = {arm.name for arm in names(True)} - {arm.name for arm in names(False)}
    assert more == {"pretrain=tapt", "self-training"}
    for arm in ("self-training", "meta_semi"):
        assert [arm_.name for arm_ in names(True, [arm])] == [arm]
        with pytest.raises(UsageError, match="learns from texts without labels: name them with unlabelled"):
            names(False, [arm])


def test_probes_of_two_models_have_two_names():
    assert [str(recipe) for recipe in probes(["bert", "roberta"])] == ["probe", "roberta + probe"]
    assert probes(["bert"]) == [frozen("bert")]


def test_the_probe_trains_nothing():
    """Naive: options that act in training steps, such as class weights, are refused with steps 0."""
    given = {"class_weights": "balanced", "label_smoothing": 0.1, "epochs": 3}
    assert Options.of({**given, **dict(frozen("bert").options)}) == Options.of({"head": "logistic", "steps": 0})


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("rdorp", "unknown method 'rdorp'. Did you mean 'rdrop'"),
        ("head=logistik", "head must be one of"),
        ("haed=logistic", "unknown option 'haed'. Did you mean 'head'"),
        ("lr=fast", "arm 'lr=fast': lr must be a number"),
        ("mixup-blo:folds=0", "folds"),
        ("lr=1e-3,evaluations=3", "arm 'lr=1e-3,evaluations=3': evaluations is no option of a search: a search keeps"),
        ("num_seeds=3", "several trainings are an arm, as in --arm soup=3"),
        ("init_seed=3", "init_seed is no option of a search"),
        ("dps_mix:keep=2", "keep"),
        ("pretrain=tatp", "tapt"),
        ("lr/0", "arm 'lr/0': a factor must be above 0, got 0"),
        ("steps*0.0", "arm 'steps*0.0': a factor must be above 0, got 0.0"),
        ("soup=1", "averages the weights of 1 training(s): give 2 or more"),
        ("aux=nowhere.csv", "no file 'nowhere.csv'"),
    ],
)
def test_what_is_no_arm_is_named(arm, message):
    with pytest.raises(UsageError) as error:
        stages([arm], BASE, ["bert"], {"bert": "model"})
    assert message in str(error.value)


def test_an_arm_given_twice_is_one_arm():
    (stage,) = stages(["rdrop", "rdrop"], BASE, ["bert"], {"bert": "model"})
    assert [str(arm) for arm in stage.arms(PLAIN)] == ["rdrop"]


def test_arms_that_adapters_refuse_are_left_out_of_the_portfolio():
    """Naive: pooling=mean changes the blocks that adapters hold on to, and every search with --peft lora is refused."""
    base = Options.of({"validation_share": 0.0, "peft": "lora"})
    tried = [str(arm) for stage in stages(None, base, ["bert"], {"bert": "model"}) for arm in stage.arms(PLAIN)]
    assert "head=logistic" in tried
    assert "head=logistic,pooling=mean" not in tried


def test_an_arm_that_what_was_chosen_refuses_is_left_out(caplog):
    """Naive: the search ends in its second stage, and --resume ends alike."""
    arms = stages(["head=logistic,pooling=mean", "lr*3", "peft=lora"], BASE, ["bert"], {"bert": "model"})
    head, schedule = arms[0], arms[1]
    assert "peft=lora" in [str(arm) for arm in schedule.arms(PLAIN)]
    (chosen,) = head.arms(PLAIN)
    assert not any("peft=lora" in str(arm) for arm in schedule.arms(chosen))
    assert "arm peft=lora is not tried on top of head=logistic,pooling=mean" in caplog.text
