"""DSEE: what is free, what is pruned, what is merged; sixteen entries cannot matter."""

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fit_helpers import same, save_tiny_bert, toy, weights
from helpers import arguments, batches, bert, collate, copied, rows
from steadytune import EMA, LAWA, LEVI, SWA, Run, Trainer, dry_run, fit, inference_cost, load_levi, save_levi
from steadytune.errors import UsageError
from steadytune.fitting import main as fitting_main
from steadytune.methods.dsee import DSEE, largest, residual

# PEFT reads an attribute that transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QUICK = {"steps": 6, "max_length": 16, "progress": False, "lr": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def with_lora(model=None):
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear")
    torch.manual_seed(0)
    return peft.get_peft_model(bert(dropout=0.0) if model is None else model, config)


def run_of(steps=6, model=None, **options):
    model = with_lora(model)
    run = Run(model, [DSEE(**options)], total_steps=steps, data=lambda: batches(4))
    return run.attach(torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1))


def trained(run, steps=6):
    for batch in batches(steps):
        run.loss(batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run


@pytest.mark.parametrize("support", ["decomposition", "magnitude", "gradient", "random"])
def test_so_many_entries_of_queries_and_values_move_and_no_other_of_the_base(support):
    run = run_of(support=support, entries=5, share=0.0)
    before = copied(run.model)
    after = copied(trained(run).model)
    for name in (n for n in before if ".lora_" not in n and "classifier" not in n):
        moved = int((after[name] != before[name]).sum())
        assert moved == 5 * name.endswith((".query.base_layer.weight", ".value.base_layer.weight"))
    others = [n for n in before if ".lora_B" in n and ".query" not in n and ".value" not in n]
    assert all(not after[name].any() for name in others)
    scores = {n: before[n].abs() for n in run[DSEE].masks}
    if support == "magnitude":
        for name, mask in run[DSEE].masks.items():
            assert scores[name][mask].min() >= scores[name][~mask].max()


def test_pruning_takes_the_smallest_of_w_and_adapters_and_lets_the_rest_adapt():
    """Naive: frozen entries are put back after the step that pruned them."""
    run = run_of(steps=6, entries=2, share=0.3, start=0.5)
    before = copied(run.model)
    trained(run, 3)
    assert not run[DSEE].removed
    run.loss(batches(1)[0]).backward()
    sums = {name: (matrix + delta).abs() for name, matrix, delta in run[DSEE].matrices(run)}
    run.optimizer.step()
    run.optimizer.zero_grad()
    trained(run, 2)
    run.finish()
    after = copied(run.model)
    assert len(sums) == 12  # six matrices in each of two blocks
    for name, total in sums.items():
        gone = after[name] == 0
        kept = run[DSEE].masks.get(name, torch.zeros_like(gone))
        assert 0.3 * gone.numel() - 3 <= int(gone.sum()) <= 0.3 * gone.numel() + 1
        assert total[gone].max() <= total[~gone & ~kept].min()
        assert torch.equal(after[name][~gone & ~kept], before[name][~gone & ~kept])
    plain = run.model.merge_and_unload()
    cost = inference_cost(plain, 8)
    assert cost.flops > cost.sparse_flops
    dense = [p for n, p in plain.named_parameters() if n.endswith(("query.weight", "value.weight"))]
    zeros = sum(int((after[name] == 0).sum()) for name in sums if "query" not in name and "value" not in name)
    assert cost.zeros == zeros + sum(int((p == 0).sum()) for p in dense)


def test_the_decomposition_finds_entries_that_were_added_to_a_matrix_of_low_rank():
    torch.manual_seed(0)
    low = torch.randn(20, 3) @ torch.randn(3, 16)
    where = largest(torch.rand(20, 16), 6)
    found = largest(residual(low + 5 * where, 3, 6).abs(), 6)
    assert torch.equal(found, where)


def test_a_few_entries_beside_low_rank_change_what_is_learnt_by_less_than_the_rank_does():
    """The fact of 2111.00160's own setting on a tiny model: the change of the outputs by S is a fraction of LoRA's."""

    def logits(**options):
        run = trained(run_of(steps=8, share=0.0, **options), 8)
        run.model.eval()
        with torch.no_grad():
            return run.model(**batches(1)[0]).logits

    start = with_lora().eval()
    with torch.no_grad():
        first = start(**batches(1)[0]).logits
    without, beside = logits(entries=0), logits(entries=4, support="random")
    assert (beside - without).norm() < 0.25 * (without - first).norm()


@pytest.mark.parametrize(("steps", "start"), [(6, 1.0), (4, 0.9), (1, 1 / 3)])
def test_it_prunes_however_late_it_begins(steps, start):
    """Naive: a start that rounds to the number of steps is never reached, and nothing is pruned, without a word."""
    run = trained(run_of(steps, share=0.5, start=start, support="magnitude"), steps)
    assert run[DSEE].removed
    assert all(int((~mask).sum()) > 0 for mask, _ in run[DSEE].removed.values())


@pytest.mark.parametrize("options", [{"support": "magnitude"}, {"support": "random"}, {"entries": 0}, {}], ids=str)
def test_it_looks_at_rows_for_gradients_alone(options):
    """Naive: a run without data is refused for every support, and fails in its first step without free entries."""
    model = with_lora()
    run = Run(model, [DSEE(**options)], total_steps=2).attach(torch.optim.SGD(model.parameters(), 0.1))
    trained(run, 2)
    assert sum(int(mask.sum()) for mask in run[DSEE].masks.values()) == 4 * options.get("entries", 16)
    with pytest.raises(ValueError, match="DSEE looks at training batches first"):
        Run(with_lora(), [DSEE(support="gradient")], total_steps=2)


def test_a_dry_run_measures_one_training(tmp_path, folder):
    found = [dry_run(toy(48), model=folder, output=tmp_path / "o", procedure=name, **QUICK) for name in ("dsee", None)]
    assert found[0].steps == found[1].steps
    assert found[0].trainings == 1


def test_what_cannot_be_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="DSEE needs LoRA on query and value matrices"):
        Run(bert(), [DSEE()], total_steps=2, data=lambda: batches(1))
    elsewhere = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["intermediate.dense"])
    with pytest.raises(ValueError, match="DSEE needs LoRA on query and value matrices"):
        Run(peft.get_peft_model(bert(), elsewhere), [DSEE()], total_steps=2, data=lambda: batches(1))
    given = {"procedure": "dsee", "peft": "ia3", "output": tmp_path / "o"}
    with pytest.raises(UsageError, match="dsee trains PEFT's lora, and peft is 'ia3'"):
        fit(toy(48), model=folder, **given)
    with pytest.raises(UsageError, match="share must be a number in"):
        fit(toy(48), model=folder, **{**given, "procedure": "dsee:share=1"})
    soup = {**given, "peft": None, "num_seeds": 2, "combine": "ensemble", "distil": True}
    with pytest.raises(UsageError, match="distil trains its model without pruning"):  # naive: no zeros, and no word
        fit(toy(48), model=folder, **soup)


def test_shards_are_refused(monkeypatch):
    run = Run(with_lora(), [DSEE()], total_steps=2, data=lambda: batches(1))
    monkeypatch.setattr(Run, "sharded", True)
    with pytest.raises(ValueError, match=r"DSEE needs whole weights, but these are sharded \(FSDP2\)"):
        run.attach(torch.optim.AdamW(run.model.parameters(), 1e-2))


def test_its_state_is_that_of_a_model_that_was_moved_since():
    model = with_lora()
    run = Run(model, [DSEE(entries=4, start=0.5)], total_steps=6, data=lambda: batches(2))
    model.to(torch.float64)
    trained(run.attach(torch.optim.AdamW(model.parameters(), 1e-2)))
    state = run[DSEE].state_dict()
    assert state["values"]
    for name, mask in state["masks"].items():
        assert torch.equal(state["values"][name], model.get_parameter(name).detach()[mask])


@pytest.mark.parametrize("average", [EMA(0.5), SWA(), LAWA(every=1)], ids=lambda method: type(method).__name__)
def test_averages_in_which_nothing_would_be_pruned_are_refused(average):
    def attached(**options):
        model = with_lora()
        run = Run(model, [DSEE(**options), average], total_steps=6, data=lambda: batches(2))
        return run.attach(torch.optim.AdamW(model.parameters(), 1e-2))

    with pytest.raises(UsageError, match=rf"DSEE\(share=0.2\) .* leave {type(average).__name__} out, or set share=0"):
        attached()
    trained(attached(share=0.0), 1)


def test_a_fit_leaves_a_plain_folder_with_zeros_and_resumes_bit_for_bit(tmp_path, folder, monkeypatch):
    """Naive: PEFT's checkpoints hold the adapters, and free entries and zeros are lost."""
    given = {"model": folder, "procedure": "dsee:share=0.5,entries=3", "save_steps": 4, **QUICK}
    fit(toy(48), output=tmp_path / "a", **given)
    real = fitting_main.Output.save_model

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting_main.Output, "save_model", crash)
    with pytest.raises(KeyboardInterrupt):
        fit(toy(48), output=tmp_path / "b", **given)
    monkeypatch.setattr(fitting_main.Output, "save_model", real)
    fit(toy(48), output=tmp_path / "b", resume=True, **given)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert inference_cost(plain, 8).sparsity > 0.25


@pytest.mark.parametrize(
    "recipe", [{"procedure": "dsee:share=0.5,start=0.4"}, {"methods": ["levi"], "peft": "lora"}], ids=["dsee", "levi"]
)
def test_the_best_checkpoint_brings_what_adapters_do_not_hold(tmp_path, folder, recipe):
    """Naive: the adapters of the best step are joined with the rest of the last step. In memory both are kept."""
    given = {"model": folder, "evaluations": 3, **QUICK, "lr": 0.1, **recipe}
    disk = fit(toy(48), output=tmp_path / "disk", save_steps=2, **given)
    memory = fit(toy(48), output=tmp_path / "memory", save_steps=0, **given)
    assert disk.runs[0]["steps"] == memory.runs[0]["steps"] < 6
    assert np.array_equal(disk.predict_proba(["good film"]), memory.predict_proba(["good film"]))


@pytest.mark.parametrize("method", [DSEE(), LEVI()], ids=["dsee", "levi"])
def test_saved_adapters_alone_are_said(tmp_path, caplog, method):
    """Naive: the folder looks whole; read beside the pre-trained model, it lacks what was trained beside adapters."""
    trainer = Trainer(
        with_lora(), arguments(tmp_path, max_steps=2), train_dataset=rows(8), data_collator=collate, methods=[method]
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert "holds adapters alone, without what" in caplog.text
    model = trainer.model.merge_and_unload()
    if isinstance(method, LEVI):
        save_levi(tmp_path / "whole", model)
        read = load_levi(tmp_path / "whole")
    else:
        model.save_pretrained(tmp_path / "whole")
        read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    (batch,) = batches(1)
    with torch.no_grad():
        assert torch.equal(read.eval()(**batch).logits, model.eval()(**batch).logits)
