"""EasyAdapt: one head for all domains, and a correction of it for each domain.

features (h, h, 0, ...) for rows of domain 1, (h, 0, h, ...) for rows of domain 2, ...: one linear layer on them is

logits = (W + W_d) h + b + b_d        in training, for rows of domain d
logits = W h + b                      in evaluation, for rows of any domain
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core import Run, Weight, Within
from ..core.facts import Cost, Paper
from ..errors import UsageError
from .bases.beside_head import Beside, BesideHead
from .bases.rows import Column, numbers_of, row_counts


class Domains(Beside):
    """Forward hook that adds the correction of each row's domain to a layer's outputs in training mode.

    Attributes:
        domain: Domain of each row of the current batch, shape (rows,), -1 for an unknown one.
    """

    def __init__(self, layer: nn.Linear, domains: int, source: Column) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(domains, layer.out_features, layer.in_features))
        self.bias = None if layer.bias is None else nn.Parameter(torch.zeros(domains, layer.out_features))
        self.source, self.drop = source, 0.0
        self.domain: Tensor | None = None
        self.checked = False
        self.taking: RemovableHandle | None = None  # of the hook `take`

    def take(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Read the domains in the inputs before each forward."""
        known = callable(self.source) or self.source in inputs
        self.domain = numbers_of(inputs, self.source, "EasyAdapt") if known or model.training else None
        if self.domain is not None and not self.checked:
            self.check(self.domain)
        return args, inputs

    def check(self, domain: Tensor) -> None:
        """Raise unless the numbers of the first batch are domains. Later batches rely on torch's indexing."""
        known = len(self.weight)
        if not bool(((domain >= -1) & (domain < known)).all()):
            raise ValueError(
                f"domains must be one whole number a row from -1 (not known) to {known - 1}, got {domain.tolist()}: "
                "number them from 0, and say how many there are with domains="
            )
        self.checked = True

    def forward(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not layer.training or self.domain is None:
            return None
        known = self.domain.ge(0) & (self.draw(self.domain) >= self.drop)
        own = self.domain.clamp(min=0)
        texts = len(output) // len(own)  # of each row: several in multiple choice
        known, own = known.repeat_interleave(texts), own.repeat_interleave(texts)
        special = torch.einsum("row,r...w->r...o", self.weight[own], args[0])
        if self.bias is not None:
            special = special + self.bias[own].view(len(own), *[1] * (output.dim() - 2), -1)
        return output + special * known.view(-1, *[1] * (output.dim() - 1))

    def draw(self, domain: Tensor) -> Tensor:
        """Uniform numbers for the rows, drawn from torch's random state like dropout."""
        return torch.rand(domain.shape, device=domain.device)


@dataclass
class EasyAdapt(BesideHead[Domains]):
    """Train a head for all domains and a correction of it for each domain; evaluate and save the head for all.

    Args:
        domains: Number of domains in the training rows; None counts those that occur in them.
        domain: Column of the batch with the domain of each row: a number from 0 on, or -1 if it is unknown. The model
            does not receive it. Or a function of the inputs that returns these numbers. `fit` fills the column from
            ``subgroup`` (``--subgroup``).
        drop: Share of the rows that train without the correction of their domain, so that the head alone is good for
            new domains.

    The head learns what the domains have in common, and more so with a stronger weight decay, which keeps the
    corrections near zero. `specialised` returns the head of one domain.

    Departures:
        The augmented features are not built; head and corrections are the blocks of their weight matrix. A share of the
        rows is treated as rows of an unknown domain.

    Raises:
        ValueError: In setup, for a model without a trainable classification head, or already inside
            DistributedDataParallel; and where domains have to be counted, without data or with a single domain.
        RuntimeError: At the first step, for weights in pieces (FSDP2), or a batch without the column.
    """

    domains: Annotated[int, Within("[2, inf)")] | None = None
    domain: Column = "domain"
    drop: Annotated[float, Within("[0, 1]")] = 0.2

    place: ClassVar = "domains"
    exclusive: ClassVar = "set of domains"
    conflicts: ClassVar[tuple[str, ...]] = ("models without a classification head", "sharded weights (FSDP2)")
    cost: ClassVar = Cost()
    paper: ClassVar = Paper(
        authors=("Hal Daume",),
        title="Frustratingly Easy Domain Adaptation",
        booktitle="Proceedings of the Annual Meeting of the Association of Computational Linguistics",
        venue="ACL",
        year=2007,
        arxiv="0907.1815",
    )

    @property
    def input_columns(self) -> tuple[str, ...]:
        return () if callable(self.domain) else (self.domain,)

    def setup(self, run: Run) -> None:
        self.count = len(row_counts(run, self.domain, "EasyAdapt")) if self.domains is None else self.domains
        if self.count < 2:
            raise ValueError("EasyAdapt needs two domains, the training rows are of one: leave EasyAdapt out")
        super().setup(run)

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        super().before_forward(run, weights)
        if self.beside.taking is None:  # before the hook of the Run that takes the column out
            self.beside.taking = run.model.register_forward_pre_hook(self.beside.take, prepend=True, with_kwargs=True)

    def build(self, head: nn.Linear) -> Domains:
        domains_beside = Domains(head, self.count, self.domain)
        domains_beside.drop = self.drop
        return domains_beside

    def hook(self, head: nn.Module) -> Any:
        return head.register_forward_hook(self.beside)

    def release(self, run: Run) -> None:
        super().release(run)
        if self.beside.taking is not None:
            self.beside.taking.remove()
            self.beside.taking = self.beside.domain = None

    @torch.no_grad()
    def specialised(self, domain: int) -> dict[str, Tensor]:
        """Weight and bias of one domain's head, for ``head.load_state_dict`` in a copy of the model.

        Args:
            domain: Number of the domain.

        Raises:
            UsageError: There is no such domain.
        """
        known = len(self.beside.weight)
        if not 0 <= domain < known:
            raise UsageError(
                f"domain must be a number from 0 to {known - 1}, got {domain}: for rows of unknown domains use "
                "the head of the model itself"
            )
        sums = {name: p + getattr(self.beside, name)[domain] for name, p in self.head.named_parameters(recurse=False)}
        return {name: p.detach() for name, p in sums.items()}
