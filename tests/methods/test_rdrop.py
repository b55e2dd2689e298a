"""R-Drop: the published losses, which are ours up to a factor and another alpha."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steadytune import RDrop, Run

ATOL = 1e-10


class Given(nn.Module):
    """Answers with recorded logits of the two copies."""

    def __init__(self, first, second):
        super().__init__()
        self.logits = nn.Parameter(torch.cat([first, second]))
        self.dropout = nn.Dropout(0.1)  # R-Drop refuses models without

    def forward(self, labels):
        if self.logits.size(1) == 1:
            return {"loss": nn.functional.mse_loss(self.logits.squeeze(1), labels), "logits": self.logits}
        return {"loss": nn.functional.cross_entropy(self.logits, labels), "logits": self.logits}


def replay(golden, case, alpha):
    """Loss and gradients by the logits of both copies."""
    model = Given(golden[f"{case}/logits1"], golden[f"{case}/logits2"])
    run = Run(model, [RDrop(alpha)]).attach(torch.optim.SGD(model.parameters(), 0.1))
    loss = run.loss({"labels": golden[f"{case}/labels"]})
    loss.backward()
    return loss.detach(), *model.logits.grad.chunk(2)


def check(golden, case, name, found, factor):
    keys = [f"{case}/{name.format(part)}" for part in ("loss", "grad1", "grad2")]
    for key, value in zip(keys, found, strict=True):
        assert torch.allclose(factor * value, golden[key], atol=ATOL, rtol=0), key


@pytest.mark.parametrize("case", [0, 1])
def test_the_loss_of_the_paper(golden, case):
    golden = golden("rdrop")
    alpha = golden.meta["cases"][case]["alpha"]
    check(golden, f"case{case}", "paper_{}", replay(golden, f"case{case}", alpha), 1)


@pytest.mark.parametrize("case", [0, 1])
def test_the_losses_of_the_authors_are_ours_at_another_alpha(golden, case):
    """They sum the divergence over the batch: their alpha is the batch size times ours."""
    golden = golden("rdrop")
    meta, case = golden.meta["cases"][case], f"case{case}"
    size = meta["batch"]
    check(golden, case, "fairseq_{}_ref64", replay(golden, case, meta["alpha"] / 2), 2 * size)
    check(golden, case, "hf_bert_{}_ref", replay(golden, case, size / 4), 2)


def test_regression(golden):
    golden = golden("rdrop")
    check(golden, "case2", "hf_bert_{}_ref", replay(golden, "case2", 0.5), 2)
