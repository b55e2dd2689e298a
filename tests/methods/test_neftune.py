"""NEFTune: how large its noise is, where it acts, and where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import LENGTH, VOCABULARY, batches
from steadytune import Method, NEFTune, RDrop, Run

WIDTH, ALPHA = 512, 5.0


class Seeing(nn.Module):
    """A mean over all positions, padding too. It remembers what each forward adds to the token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.last = nn.Linear(WIDTH, 3, dtype=torch.float64)
        self.dropout = nn.Dropout(0.1)
        self.seen: list[Tensor] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        self.seen.append((x - self.embedding.weight[input_ids]).detach())
        logits = self.last(self.dropout(torch.tanh(x)).mean(1))
        loss = logits.sum() if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def seeing(*methods: Method) -> Run:
    model = Seeing()
    return Run(model, [*methods], total_steps=8).attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_noise_is_uniform_within_alpha_by_the_root_of_tokens_times_width():
    """Naive: the bound of the longest example for all, and noise at padding."""
    run, batch = seeing(NEFTune(alpha=ALPHA)), batches(1)[0]
    run.loss(batch)
    (noise,), real = run.model.seen, batch["attention_mask"].bool()
    lengths = real.sum(1).tolist()
    assert len(set(lengths)) > 2
    for row, length, mask in zip(noise, lengths, real, strict=True):
        bound = ALPHA / (length * WIDTH) ** 0.5
        entries = row[mask] / bound
        assert not row[~mask].any()
        assert 0.999 < entries.abs().max() <= 1 + 1e-9
        shares = torch.histc(entries, bins=4, min=-1, max=1) / entries.numel()
        assert shares == pytest.approx(torch.full((4,), 0.25, dtype=torch.float64), abs=0.04)
        assert row.norm() == pytest.approx(ALPHA / 3**0.5, rel=0.03)  # whatever the length


def test_without_a_mask_all_tokens_count():
    run, batch = seeing(NEFTune(alpha=ALPHA)), batches(1, equal=True)[0]
    mask = batch.pop("attention_mask")
    run.loss(batch, compute=lambda model, inputs, copies: (model(**inputs, attention_mask=mask)["loss"], None))
    (noise,) = run.model.seen
    assert noise.abs().max() == pytest.approx(ALPHA / (LENGTH * WIDTH) ** 0.5, rel=1e-3)


@dataclass
class Looking(Method):
    """Makes every kind of further pass."""

    def penalty(self, step: Any) -> Tensor:
        return 0.0 * step.forward()["logits"].sum() + 0.0 * step.forward(dropout="same")["logits"].sum()

    def before_step(self, run: Any, weights: Any) -> None:
        run.gradient(run.batch)


def test_only_the_tasks_own_forward_has_noise():
    run, batch = seeing(NEFTune(), Looking()), batches(1)[0]
    run.loss(batch).backward()
    run.optimizer.step()
    noisy = [bool(noise.any()) for noise in run.model.seen]
    assert noisy == [True, False, False, False]
    with torch.no_grad():
        run.model.eval()(**batch)
    assert not run.model.seen[-1].any()
    assert not run.model.embedding._forward_hooks


def test_the_description_says_when_it_acts():
    """Naive: "before the first step", as of a method without any verb of a step."""
    assert seeing(NEFTune()).describe() == "1. NEFTune(alpha=5.0): before_batch"


def test_each_copy_each_micro_batch_and_each_step_has_noise_of_its_own():
    run, batch = seeing(NEFTune(), RDrop()), batches(1)[0]
    for _ in range(2):
        for _ in range(2):
            run.loss(batch).backward()
        run.optimizer.step()
    drawn = [copy for noise in run.model.seen for copy in noise.chunk(2)]
    assert len({float(noise.sum()) for noise in drawn}) == len(drawn) == 8


def test_a_forward_that_fails_leaves_no_noise_behind():
    run, batch = seeing(NEFTune()), batches(1)[0]

    def failing(model: Any, inputs: Any, copies: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.loss(batch, compute=failing)
    run.leave()
    assert not run.model.embedding._forward_hooks


def test_a_compiled_model_has_noise_too():
    """Naive: compiled code does not look at hooks that are new, and trains without noise."""
    model, batch = Seeing(), batches(1)[0]
    compiled = torch.compile(model, backend="eager")
    compiled(**batch)
    run = Run(compiled, [NEFTune()], total_steps=8).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    run.loss(batch)
    assert model.seen[-1].any()
    torch._dynamo.reset()
