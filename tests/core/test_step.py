"""What a penalty reads from a batch and its outputs: logits of every form, distances between them, noise that fits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import steadytune
from architectures import tiny
from helpers import batches, bert
from steadytune import FGM, LNSR, PGD, R3F, SMART, NEFTune, RDrop, Run, Step
from steadytune.core.step import distances, logits_of
from steadytune.errors import UsageError
from steadytune.functional import symmetric_kl

NOISY = {"smart": SMART(0.1, 0.1, noise=0.1), "fgm": FGM(), "pgd": PGD(), "r3f": R3F(scale=0.1), "lnsr": LNSR()}


def run_of(model, *methods):
    return Run(model, methods, total_steps=4).attach(torch.optim.SGD(model.parameters(), 0.1))


def penalty(model, method, inputs):
    """What a method adds to the loss of a batch under one dropout draw; it is sent back."""
    losses = []
    for methods in ([], [method]):
        torch.manual_seed(1)
        losses.append(run_of(model, *methods).loss(inputs))
    losses[1].backward()
    return float((losses[1] - losses[0]).detach())


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- which tensor holds the predictions

START, END = doubles([0.0, 1.0, 2.0], [1.0, 0.0, 0.0]), doubles([3.0, 1.0, 2.0], [2.0, 0.0, 0.0])
SPANS = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, 2])}
LOSS = torch.tensor(0.5)


@pytest.mark.parametrize(
    ("outputs", "inputs", "expected"),
    [
        ({"loss": LOSS, "logits": START, "more": END}, {}, START),
        ((LOSS, START, END), {}, START),
        ((START,), {}, START),  # without labels there is no loss
        ((LOSS, torch.tensor([1, 2]), START), {}, START),
        ({"loss": LOSS, "start_logits": START, "end_logits": END}, SPANS, torch.stack((START, END), 1)),
        ((LOSS, START, END), SPANS, torch.stack((START, END), 1)),
    ],
)
def test_logits_are_found(outputs, inputs, expected):
    assert torch.equal(logits_of(outputs, inputs, RDrop()), expected)


@pytest.mark.parametrize("outputs", [{"loss": LOSS, "scores": START}, {"loss": LOSS, "logits": None}, (LOSS,)])
def test_outputs_without_logits_are_refused_by_the_name_of_the_method(outputs):
    with pytest.raises(UsageError, match=r"RDrop looks at logits, and the model's outputs hold none \((loss|a tuple)"):
        logits_of(outputs, {}, RDrop())


@pytest.mark.parametrize("name", ["TMix", "SupCon", "CausalHead", "LEVI", "MetaWeightNet", "MetaSemi", "GroupWeights"])
def test_a_batch_without_labels_is_refused_by_the_name_of_the_method_that_needs_them(name):
    extra = {"MetaWeightNet": {"outer": lambda: batches(1)}, "MetaSemi": {"unlabelled": lambda: batches(1)}}
    data = [{**batch, "subgroup": torch.tensor([0, 0, 1, 1])} for batch in batches(16)]
    model = bert()
    run = Run(model, [getattr(steadytune, name)(**extra.get(name, {}))], total_steps=4, data=lambda: data)
    run.attach(torch.optim.SGD(model.parameters(), 0.1))

    def compute(model, inputs, copies):
        outputs = model(**inputs)
        return outputs["logits"].square().mean(), outputs

    def step():
        run.loss({k: v for k, v in data[0].items() if k not in {"labels", "subgroup"}}, compute=compute).backward()
        run.optimizer.step()

    with pytest.raises(UsageError, match=f"{name} needs a label for each row, and this batch holds no 'labels'"):
        step()


class Given(nn.Module):
    """Answers with logits of two copies, as question answering does, in a mapping or a tuple."""

    def __init__(self, mapping: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ends = nn.Parameter(torch.randn(2, 4, 5).double())  # start and end, two copies of two rows, five positions
        self.dropout, self.mapping = nn.Dropout(0.1), mapping

    def forward(self, start_positions: Tensor, end_positions: Tensor) -> Any:
        loss = 0 * self.ends.sum()
        names = ("loss", "start_logits", "end_logits")
        return dict(zip(names, (loss, *self.ends), strict=True)) if self.mapping else (loss, *self.ends)


@pytest.mark.parametrize("mapping", [True, False])
def test_rdrop_compares_where_answers_start_and_where_they_end(mapping):
    model = Given(mapping)
    loss = run_of(model, RDrop(alpha=1.0)).loss(SPANS)
    start, end = model.ends.detach()
    expected = (symmetric_kl(start[:2], start[2:]).mean() + symmetric_kl(end[:2], end[2:]).mean()) / 2
    assert expected > 0.1
    assert torch.allclose(loss.detach(), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", NOISY)
def test_question_answering_trains(name):
    model = tiny("Bert", "QuestionAnswering").train()
    inputs = {k: v for k, v in short(2).items() if k != "labels"}
    assert penalty(model, NOISY[name], {**inputs, **SPANS}) > 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------- what is compared


class Kind(nn.Module):
    def __init__(self, problem_type: str | None) -> None:
        super().__init__()
        self.config = transformers.BertConfig(problem_type=problem_type)


def test_each_of_several_labels_is_compared_on_its_own():
    """Naive: a softmax over labels is blind to a shift of all logits, which changes every probability."""
    first, second = doubles([0.0, math.log(3.0)]), doubles([math.log(3.0), math.log(3.0)])
    values, mask = distances(Kind("multi_label_classification"), {}, first, second, symmetric_kl)
    gap = (0.75 - 0.5) * math.log(3.0) / 2  # KL both ways between (1/2, 1/2) and (3/4, 1/4), halved
    assert mask is None
    assert torch.allclose(values, doubles([gap, 0.0]), atol=1e-15, rtol=0)
    shifted, _ = distances(Kind("multi_label_classification"), {}, first, first + 1, symmetric_kl)
    assert shifted.min() > 0.05


def test_float_labels_tell_several_labels_where_the_config_does_not():
    """Naive: with a loss of one's own the config says nothing, and labels are compared as exclusive classes."""
    first, labels = doubles([0.0, 1.0], [2.0, 0.0]), torch.ones(2, 2, dtype=torch.float64)
    known, _ = distances(Kind("multi_label_classification"), {}, first, first + 1, symmetric_kl)
    found, _ = distances(Kind(None), {"labels": labels}, first, first + 1, symmetric_kl)
    assert torch.equal(found, known)
    alone, _ = distances(Kind(None), {"labels": torch.tensor([0, 1])}, first, first + 1, symmetric_kl)
    assert alone.tolist() == [0.0, 0.0]


def test_several_numbers_are_compared_by_their_squared_difference():
    first, second = doubles([0.0, 1.0, 5.0]), doubles([2.0, 2.0, 5.0])
    values, _ = distances(Kind("regression"), {"labels": first}, first, second, symmetric_kl)
    assert torch.equal(values, doubles((4 + 1 + 0) / 3))


# ---------------------------------------------------------------- noise that fits


def short(size: int) -> dict[str, Tensor]:
    """Rows for models with a vocabulary of 30; the last one is padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 30, (size, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.arange(size) % 2}


def longformer() -> Any:
    """Pads rows on the right to a multiple of its window of four tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.LongformerConfig(
        vocab_size=30, max_position_embeddings=32, attention_window=4, pad_token_id=0, sep_token_id=2, **sizes
    )
    return transformers.LongformerForSequenceClassification(config).double().train()


@pytest.mark.parametrize("name", NOISY)
def test_noise_fits_a_model_that_pads_its_inputs(name):
    """Naive: noise for seven tokens cannot be added to the eight of two windows."""
    assert penalty(longformer(), NOISY[name], short(3)) > 0


def test_lnsr_of_a_padding_model_measures_its_tokens_alone(monkeypatch):
    """The penalty by hand: noise on seven of eight positions, movement of the real ones of the blocks above."""
    model, inputs = longformer(), short(3)
    noise = torch.randn(3, 7, 8, dtype=torch.float64)
    monkeypatch.setattr(LNSR, "draw", lambda self, step, hidden: noise)
    torch.manual_seed(3)
    loss = run_of(model, LNSR(block=0)).loss(inputs)
    real = inputs["attention_mask"].double()
    added = nn.functional.pad(noise * real.unsqueeze(-1), (0, 0, 0, 1))
    runs = []
    for scale in (0, 1):
        handle = model.longformer.encoder.layer[0].register_forward_hook(
            lambda m, a, output, scale=scale: (output[0] + scale * added, *output[1:])
        )
        torch.manual_seed(3)
        runs.append(model(**inputs, output_hidden_states=True))
        handle.remove()
    moved = sum((b - a)[:, :7].square().mean(-1) for a, b in zip(*(r.hidden_states[2:] for r in runs), strict=True))
    expected = ((moved * real).sum(1) / real.sum(1)).mean()
    assert expected > 0
    assert torch.allclose(loss, runs[0].loss + expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NOISY)
def test_each_choice_of_several_has_noise_of_its_own(name, monkeypatch):
    """Two texts a row are four rows to the embedding; padding of each stays where it is."""
    seen = []
    forward = Step.forward
    monkeypatch.setattr(Step, "forward", lambda step, **options: seen.append(options) or forward(step, **options))
    inputs = short(4)
    both = {k: inputs[k].view(2, 2, 7) for k in ("input_ids", "attention_mask")}
    model = tiny("Bert", "MultipleChoice").train()
    run_of(model, NOISY[name]).loss({**both, "labels": torch.tensor([0, 1])}).backward()
    (noise,) = seen[0]["add"].values()
    real = inputs["attention_mask"].bool()
    assert noise.shape[:2] == (4, 7)
    assert not noise[~real].any()
    assert noise[real].abs().amax(-1).min() > 0


class Transposed(nn.Module):
    """Its embedding answers with the length first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        class Table(nn.Embedding):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input).transpose(0, 1)

        self.table, self.last = Table(30, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        logits = self.last(self.table(input_ids).mean(0))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_outputs_of_another_layout_are_refused():
    with pytest.raises(UsageError, match=r"here \(3, 7, 8\), and those of Table are of shape \(7, 3, 8\)"):
        run_of(Transposed(), R3F()).loss(short(3))


def test_noise_without_token_numbers_is_refused():
    model = bert()
    embedded = model.get_input_embeddings()(batches(1)[0]["input_ids"]).detach()
    with pytest.raises(UsageError, match=r"needs input_ids, which this batch lacks \(it holds inputs_embeds, labels\)"):
        run_of(model, R3F()).loss({"inputs_embeds": embedded, "labels": torch.tensor([0, 1, 2, 0])})


@pytest.mark.parametrize("masked", [True, False])
def test_neftune_fits_padding_models_and_several_choices(masked):
    inputs = short(4) if masked else {k: v for k, v in short(4).items() if k != "attention_mask"}
    for model, given in (
        (longformer(), inputs),
        (
            tiny("Bert", "MultipleChoice").train(),
            {k: v.view(2, 2, -1) if v.dim() > 1 else v[:2] for k, v in inputs.items()},
        ),
    ):
        assert penalty(model, NEFTune(alpha=20.0), given) != 0


# ---------------------------------------------------------------- LNSR's hidden states, R-Drop's copies


def test_lnsr_refuses_hidden_states_it_cannot_read():
    """XLNet with as many rows as tokens would be read the wrong way round and train."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tiny("Bert", "")

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            return self.body(input_ids, attention_mask)

    with pytest.raises(UsageError, match=r"LNSR compares hidden states, and Own.forward\(\) does not take"):
        run_of(Own(), LNSR())
    with pytest.raises(UsageError, match="XLNet's have the batch second"):
        run_of(tiny("XLNet"), LNSR())
    with pytest.raises(UsageError, match=r"FunnelForSequenceClassification gives shapes \(3, 7, 8\).*\(3, 4, 8\)"):
        run_of(tiny("Funnel").train(), LNSR()).loss(short(3))
    model = bert()
    model.config.return_dict = False
    with pytest.raises(UsageError, match="BertForSequenceClassification gives none of that name"):
        run_of(model, LNSR()).loss(batches(1)[0])


def test_lnsr_disturbs_a_block_that_answers_with_a_list():
    sizes = {"n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 20, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.OpenAIGPTForSequenceClassification(transformers.OpenAIGPTConfig(vocab_size=30, **sizes))
    assert penalty(model, LNSR(), short(3)) > 0


def test_copies_of_one_row_without_a_padding_token_are_refused_and_said_why():
    """transformers says that it cannot take more than one row, to somebody who gave one."""
    model = tiny("GPT2", pad_token_id=None).train()
    one = {k: v[:1] for k, v in short(3).items()}
    run_of(model).loss(one)
    with pytest.raises(UsageError, match=r"a batch of one row passes as several copies, and GPT2ForSequenceClass"):
        run_of(model, RDrop()).loss(one)
    model.config.pad_token_id = 0
    assert run_of(model, RDrop()).loss(one).isfinite()
    with pytest.raises(ValueError, match="batch sizes > 1 if no padding token"):  # two rows: transformers is right
        run_of(tiny("GPT2", pad_token_id=None).train(), RDrop()).loss({k: v[:2] for k, v in short(3).items()})
