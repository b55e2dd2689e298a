"""A training without the rows that no text reads is the training of the whole table."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from architectures import CONFIGS, OTHERS, tiny
from core.test_laws import RECIPES, Loop, adamw
from helpers import VOCABULARY, arguments, assert_same, batches, bert, collate, copied, rows
from steadytune import EMA, L2SP, SWA, ChildTuningF, DPSDense, HypergradientLR, Method, RecAdam, Trainer, only
from steadytune.errors import UsageError
from steadytune.vocabulary import compact_vocabulary, noticing, obstacle, vocabulary_of

SIZE = 150  # rows of the table; texts read the first VOCABULARY of them
TABLE = "bert.embeddings.word_embeddings.weight"
STEPS = 100
OPTIMIZERS: dict[str, Any] = {
    "AdamW fused": functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "AdamW foreach": functools.partial(torch.optim.AdamW, lr=1e-3, foreach=True),
    "AdamW single": functools.partial(torch.optim.AdamW, lr=1e-3, foreach=False, fused=False),
    "AMSGrad": functools.partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    "SGD": functools.partial(torch.optim.SGD, lr=0.05),
    "momentum": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, dampening=0.1),
    "Nesterov": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True),
}


def wide(**options: Any) -> Any:
    """A model with more rows than texts read."""
    model = bert(**options)
    table = nn.Embedding(SIZE, 16, padding_idx=0)
    with torch.no_grad():
        table.weight[:VOCABULARY] = model.get_input_embeddings().weight
    model.set_input_embeddings(table)
    model.config.vocab_size = SIZE
    return model


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To 1e-6 of each tensor's norm, and each row of the table to 1e-6 of its own."""
    assert one.keys() == other.keys()
    gaps = {name: (one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-3) for name in one}
    each = (one[TABLE] - other[TABLE]).norm(dim=1) / other[TABLE].norm(dim=1).clamp(min=1e-3)
    return max(*gaps.values(), each.max()) <= 1e-6


@functools.cache
def data() -> list[dict[str, Tensor]]:
    return batches(STEPS + 1, size=2)


class Training:
    """A loop with a schedule and clipping."""

    def __init__(self, make: Any, compact: bool, decay: float = 0.1, clip: float = 0.5, micro: int = 1) -> None:
        self.model, self.clip, self.micro = wide(), clip, micro
        self.vocabulary = compact_vocabulary(self.model, range(VOCABULARY)) if compact else None
        self.optimizer = make(self.model.parameters(), weight_decay=decay)
        if self.vocabulary is not None:
            self.vocabulary.attach(self.optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / (STEPS + 1))
        torch.manual_seed(1)

    def train(self, first: int, end: int) -> Training:
        for step in range(first, end):
            for batch in data()[step : step + self.micro]:
                (self.model(**batch).loss / self.micro).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return self

    def saved(self) -> Any:
        states = self.model.state_dict(), self.optimizer.state_dict(), self.schedule.state_dict()
        return copy.deepcopy((*states, torch.get_rng_state()))

    def load(self, saved: Any) -> Training:
        model, optimizer, schedule, drawn = saved
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(schedule)
        torch.set_rng_state(drawn)
        return self

    def weights(self) -> dict[str, Tensor]:
        if self.vocabulary is not None:
            self.vocabulary.restore()
        return copied(self.model)


# ---------------------------------------------------------------- the law


@pytest.mark.parametrize(
    ("name", "decay"), [*((name, 0.1) for name in OPTIMIZERS), ("AdamW fused", 0.0), ("momentum", 0.0)]
)
def test_the_result_is_that_of_the_whole_table(name, decay):
    """Naive: the rows that no text reads stay as they were, and decay is lost; or it is applied with one rounding."""
    make = OPTIMIZERS[name]
    whole, compact = (Training(make, compact, decay).train(0, STEPS).weights() for compact in (False, True))
    assert close(compact, whole)
    if "A" in name[:2]:  # AdamW: the factors are applied one by one, as it does
        assert torch.equal(compact[TABLE][VOCABULARY:], whole[TABLE][VOCABULARY:])
    assert bool((whole[TABLE][VOCABULARY:] == wide().state_dict()[TABLE][VOCABULARY:]).all()) == (decay == 0)


def test_without_clipping_adamw_gives_it_bit_for_bit_under_accumulation():
    make = OPTIMIZERS["AdamW fused"]
    one, other = (Training(make, compact, clip=1e9, micro=2).train(0, 20).weights() for compact in (False, True))
    assert_same(one, other)


@pytest.mark.parametrize("name", ["AdamW fused", "momentum"])
def test_resumed_is_uninterrupted(name):
    """Bit for bit, wherever it is cut and however often the model is saved (with SGD up to the rounding of a save)."""
    make = OPTIMIZERS[name]
    whole = Training(make, compact=True).train(0, 30).weights()
    cut = Training(make, compact=True).train(0, 7)
    cut.saved()
    saved = cut.train(7, 11).saved()
    found = Training(make, compact=True).load(saved).train(11, 30).weights()
    assert close(found, whole)
    if name == "AdamW fused":
        assert_same(found, whole)


def test_a_state_dict_is_that_of_the_whole_model():
    """In the middle of a training, and with the decay of the steps so far; reading it changes nothing."""
    make = OPTIMIZERS["AdamW fused"]
    whole, compact = (Training(make, compact).train(0, 9) for compact in (False, True))
    before = {name: value.clone() for name, value in compact.model.state_dict().items()}
    assert close(before, whole.model.state_dict())
    assert_same(before, compact.model.state_dict())
    plain = wide()
    plain.load_state_dict(before)
    assert plain.get_input_embeddings().weight.shape == (SIZE, 16)


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.integers(0, SIZE - 1), min_size=1, max_size=40), st.integers(0, SIZE - 1) | st.none(),
    st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
def test_any_tokens_and_any_padding(tokens, padding, seed, sgd):
    """A table of its own, read with and without a padding row that has no gradient."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.table = nn.Embedding(SIZE, 3, padding_idx=padding)
            self.last = nn.Linear(3, 2)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.table

    listed = torch.tensor([*sorted(tokens), *([] if padding is None else [padding])])
    found = []
    for compact in (False, True):
        net = Net()
        vocabulary = compact_vocabulary(net, tokens) if compact else None
        options = {"lr": 0.1, "weight_decay": 0.1}
        optimizer: Any = torch.optim.SGD(net.parameters(), **options) if sgd else torch.optim.AdamW(
            net.parameters(), **options
        )  # fmt: skip
        if vocabulary is not None:
            vocabulary.attach(optimizer)
        for _ in range(4):
            ids = listed[torch.randint(len(listed), (5, 4))]
            net.last(net.table(ids).mean(1)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if vocabulary is not None:
            assert len(vocabulary.rows) == len({*tokens, *([] if padding is None else [padding])})
            vocabulary.restore()
        found.append(net.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("architecture", [*CONFIGS, *OTHERS])
def test_models_give_the_same_outputs_and_gradients(architecture):
    """Positions counted from the padding number, the last token of a decoder: token ids stay as they are."""
    model = tiny(architecture)
    model.config.pad_token_id = 0
    ids = torch.tensor([[1, 7, 9, 11, 2], [1, 8, 2, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": torch.tensor([0, 1])}
    if architecture in ("Bart", "T5", "Funnel") and obstacle(model) is not None:
        assert "several places" in obstacle(model)
        return
    model(**inputs).loss.backward()
    whole, table = model(**inputs).logits, model.get_input_embeddings().weight.grad.clone()
    names = [*model.state_dict()]
    vocabulary = compact_vocabulary(model, ids)
    outputs = model(**inputs)
    assert torch.equal(outputs.logits, whole)
    outputs.loss.backward()
    assert torch.equal(vocabulary.trained.grad, table[vocabulary.rows])
    assert [*model.state_dict()] == names
    vocabulary.restore()
    assert torch.equal(model(**inputs).logits, whole)


# ---------------------------------------------------------------- tokens that are left out


def test_predictions_read_every_token_and_see_its_decay():
    """Naive: an IndexError, or the row before training."""
    whole, compact = (Training(OPTIMIZERS["AdamW fused"], compact).train(0, 5) for compact in (False, True))
    ids = torch.tensor([[3, VOCABULARY, SIZE - 1, VOCABULARY], [4, 5, SIZE - 1, 6]])
    outputs = [training.model.eval()(input_ids=ids).logits for training in (whole, compact)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-7)
    assert len(compact.vocabulary.trained) == VOCABULARY


def test_a_training_that_reads_them_is_refused():
    training = Training(OPTIMIZERS["SGD"], compact=True)
    with pytest.raises(UsageError, match=f"reads token {VOCABULARY}, which the compact vocabulary does not hold"):
        training.model(input_ids=torch.tensor([[3, VOCABULARY]]), labels=torch.tensor([0]))


def test_a_step_without_gradient_leaves_all_rows_alone():
    """Naive: the rows decay although the optimizer skips the table, as after a gradient that is not finite."""
    training = Training(OPTIMIZERS["AdamW fused"], compact=True)
    before = copied(training.model)[TABLE]
    training.optimizer.step()
    training.optimizer.found_inf = torch.ones(())  # how GradScaler tells a fused optimizer
    training.vocabulary.trained.grad = torch.ones_like(training.vocabulary.trained)
    training.optimizer.step()
    assert torch.equal(training.weights()[TABLE][VOCABULARY:], wide().state_dict()[TABLE][VOCABULARY:])
    assert before.shape == (VOCABULARY, 16)


def test_restore_gives_the_model_back():
    model = wide()
    weight, kind = model.get_input_embeddings().weight, type(model.get_input_embeddings())
    vocabulary = compact_vocabulary(model, [5, 7])
    assert vocabulary_of(model) is vocabulary
    assert vocabulary.rows.tolist() == [0, 5, 7]  # with the padding row
    assert vocabulary.left_out == (SIZE - 3) * 16
    vocabulary.restore()
    module = model.get_input_embeddings()
    assert (type(module), module.weight, module.padding_idx) == (kind, weight, 0)
    assert vocabulary_of(model) is None
    assert_same(model.state_dict(), wide().state_dict())
    assert not [name for name, _ in model.named_buffers() if name.endswith("places")]


def test_a_copy_is_a_model_of_its_own():
    model = wide()
    vocabulary = compact_vocabulary(model, range(VOCABULARY))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        vocabulary.trained.fill_(1.0)
    assert_same(twin.state_dict(), wide().state_dict())
    assert vocabulary_of(twin) is not vocabulary
    with pytest.raises(UsageError, match="does not know the optimizer"):
        twin(input_ids=torch.tensor([[3]]), labels=torch.tensor([0]))


# ---------------------------------------------------------------- what is refused


def test_models_that_cannot_have_one():
    tied = transformers.BertForMaskedLM(bert().config)
    with pytest.raises(UsageError, match="cannot be compact: its token embeddings are read in several places"):
        compact_vocabulary(tied, [1])
    frozen = wide()
    frozen.get_input_embeddings().requires_grad_(False)
    assert obstacle(frozen) == "its token embeddings are frozen"
    assert obstacle(nn.Linear(2, 2)) == "it has no single table of token embeddings"
    model = wide()
    compact_vocabulary(model, [1])
    assert obstacle(model) == "it is compact already"
    normed = wide()
    normed.get_input_embeddings().max_norm = 1.0
    assert "largest norm" in obstacle(normed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adagrad(p, weight_decay=0.1), "this optimizer is Adagrad with a weight decay of 0.1"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "this optimizer is Adam with"),
    ],
)
def test_optimizers_whose_step_is_not_known(make, message):
    model = wide()
    vocabulary = compact_vocabulary(model, [1])
    with pytest.raises(UsageError, match=message):
        vocabulary.attach(make(model.parameters()))


def test_an_optimizer_of_the_whole_table():
    model = wide()
    optimizer = adamw(model.parameters())
    with pytest.raises(UsageError, match="does not hold the rows of the compact vocabulary"):
        compact_vocabulary(model, [1]).attach(optimizer)


def trainer_of(folder: Any, tokens: Any = None, methods: Any = (), **changes: Any) -> Trainer:
    model = wide()
    if tokens is not None:
        compact_vocabulary(model, tokens)
    options = arguments(folder, max_steps=8, save_strategy="steps", save_steps=4, **changes)
    return Trainer(model, options, train_dataset=rows(32), data_collator=collate, methods=methods)


def test_the_trainer_attaches_and_resumes(tmp_path):
    """Its checkpoints hold whole models. A checkpoint of another vocabulary is an error and no shape mismatch."""
    found = {}
    for name, tokens in (("whole", None), ("compact", range(VOCABULARY))):
        trainer = trainer_of(tmp_path / name, tokens, [DPSDense(update_ratio=0.25)])
        trainer.train()
        file = tmp_path / name / "checkpoint-4" / "model.safetensors"
        found[name] = transformers.modeling_utils.load_state_dict(file), trainer.model.state_dict()
    for one, other in zip(*found.values(), strict=True):
        assert close(one, other)
    again = trainer_of(tmp_path / "again", range(VOCABULARY), [DPSDense(update_ratio=0.25)])
    again.train(resume_from_checkpoint=str(tmp_path / "compact" / "checkpoint-4"))
    assert_same(again.model.state_dict(), found["compact"][1])
    for name, tokens, message in (
        ("compact", None, f"that of a compact vocabulary of {VOCABULARY} rows"),
        ("compact", range(VOCABULARY - 1), f"another compact vocabulary, with {VOCABULARY} rows"),
        ("whole", range(VOCABULARY), "a training of the whole vocabulary"),
    ):
        trainer = trainer_of(tmp_path / "other", tokens, [DPSDense(update_ratio=0.25)])
        with pytest.raises(UsageError, match=message):
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-4"))


def test_the_stock_trainer_with_an_optimizer_that_is_followed(tmp_path):
    found = []
    for compact in (False, True):
        model = wide()
        vocabulary = compact_vocabulary(model, range(VOCABULARY)) if compact else None
        options = arguments(tmp_path, max_steps=4, seed=3)
        trainer = transformers.Trainer(model, options, train_dataset=rows(32), data_collator=collate)
        if vocabulary is not None:
            vocabulary.attach(trainer.create_optimizer())
        trainer.train()
        found.append(trainer.model.state_dict())
    assert close(*found)


def test_the_trainer_refuses_methods_that_act_on_unread_rows(tmp_path):
    with pytest.raises(UsageError, match="ChildTuningF acts on rows of the embeddings that no text reads"):
        trainer_of(tmp_path, [1], [ChildTuningF()])
    trainer_of(tmp_path, [1], [ChildTuningF(scope="encoder")])
    with pytest.raises(UsageError, match="EMA acts"):
        trainer_of(tmp_path, [1], [EMA()], weight_decay=0.01)
    trainer_of(tmp_path, [1], [EMA()], weight_decay=0.0)


# ---------------------------------------------------------------- methods


def in_table(weight: Any) -> bool:
    return weight.kind == "embedding"


MORE = {
    "ema_linear": [EMA(decay=0.8, scope="linear")],
    "l2sp_no_embeddings": [L2SP(alpha=0.5, scope="encoder", replace_decay=False)],
    "only_in_table": [only(DPSDense(update_ratio=0.25, scope="all"), in_table)],
}
MORE_EXACT = ("ema_linear", "l2sp_no_embeddings")
UNDECAYED = {
    "ema": [EMA(decay=0.8)],
    "swa": [SWA(start=0.25, every=2)],
    "hypergradient_lr": [HypergradientLR(beta=0.3)],
    "recadam": [RecAdam(gamma=3.0, t0=0.4, k=10.0)],
    "l2sp_encoder": [L2SP(alpha=0.5, scope="encoder")],
}
# Rows of the laws that train with a compact vocabulary: a new method that declares it is tried.
EXACT = [name for name, recipe in RECIPES.items() if noticing(bert(), recipe, 0.1) is None]
NOT_EXACT = {
    "child_tuning_f",
    "ema",
    "swa",
    "lawa",
    "hypergradient_lr",
    "recadam",
    "l2sp_coupled",
    "rose_second_authors",
}


def after(recipe: list, compact: bool, decay: float) -> dict[str, Tensor]:
    """The weights that are evaluated after some steps."""
    model = wide()
    vocabulary = compact_vocabulary(model, range(VOCABULARY)) if compact else None
    loop = Loop(recipe, model, optimizer=functools.partial(adamw, weight_decay=decay))
    if vocabulary is not None:
        vocabulary.attach(loop.optimizer)
    loop.train(batches(8))
    loop.run.finish()
    if vocabulary is not None:
        vocabulary.restore()
    return copied(model)


def test_which_recipes_are_exact():
    model = wide()
    assert not NOT_EXACT & {*EXACT}
    assert {"dps_dense", "dps_mix", "l2sp", "smart_proximal", "sam", "fgm", "recipe_of_masks"} < {*EXACT}
    assert all(noticing(model, recipe, 0.0) is None for recipe in UNDECAYED.values())
    assert all(noticing(model, recipe, 0.01) is not None for recipe in UNDECAYED.values())
    assert noticing(model, MORE["ema_linear"], 0.01) is noticing(model, MORE["l2sp_no_embeddings"], 0.01) is None
    assert noticing(model, MORE["only_in_table"], 0.01) is MORE["only_in_table"][0]


@pytest.mark.parametrize("name", [*EXACT, *MORE_EXACT])
def test_methods_that_ignore_unread_rows(name):
    recipe = RECIPES[name] if name in RECIPES else MORE[name]
    assert close(after(recipe, True, 0.1), after(recipe, False, 0.1))


@pytest.mark.parametrize("name", UNDECAYED)
def test_methods_that_ignore_unread_rows_without_decay(name):
    recipe = UNDECAYED[name]
    assert close(after(recipe, True, 0.0), after(recipe, False, 0.0))
    assert not close(after(recipe, True, 0.1), after(recipe, False, 0.1))


def test_a_method_of_ones_own_is_not_trusted():
    method = Method()
    assert noticing(wide(), [method], 0.0) is method
