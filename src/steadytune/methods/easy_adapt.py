"""EasyAdapt: one head for all domains, and a correction of it for each domain.

features (h, h, 0, ...) for rows of domain 1, (h, 0, h, ...) for rows of domain 2, ...: one linear layer on them is

logits = (W + W_d) h + b + b_d        in training, for rows of domain d
logits = W h + b                      in evaluation, for rows of any domain
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core import Run, Within
from ..core.facts import Cost, Paper
from .bases.beside_head import Beside, BesideHead


class Domains(Beside):
    """Forward hook that adds the correction of each row's domain to a layer's outputs in training mode.

    Attributes:
        domain: Domain of each row of the current batch, shape (rows,), -1 for an unknown one.
    """

    def __init__(self, layer: nn.Linear, domains: int, source: str | Callable[[Mapping[str, Any]], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(domains, layer.out_features, layer.in_features))
        self.bias = None if layer.bias is None else nn.Parameter(torch.zeros(domains, layer.out_features))
        self.source, self.drop = source, 0.0
        self.domain: Tensor | None = None
        self.checked = False
        self.taking: RemovableHandle | None = None  # of the hook `take`

    def take(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the domains out of the inputs before each forward, because the model has no argument for them."""
        if callable(self.source):
            self.domain = self.source(inputs)
        else:
            self.domain = inputs.get(self.source)
            inputs = {key: value for key, value in inputs.items() if key != self.source}
        if model.training and self.domain is None:
            raise RuntimeError(
                f"EasyAdapt finds no column {self.source!r} in the batch ({', '.join(inputs)}): put the number of each "
                "row's domain there (-1 where it is not known), or name the column that holds it with domain="
            )
        if self.domain is not None and not self.checked:
            self.check(self.domain)
        return args, inputs

    def check(self, domain: Tensor) -> None:
        """Raise unless the numbers of the first batch are domains. Later batches rely on torch's indexing."""
        known = len(self.weight)
        if domain.dim() != 1 or domain.is_floating_point() or not bool(((domain >= -1) & (domain < known)).all()):
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
        domains: Number of domains in the training rows.
        domain: Column of the batch with the domain of each row: a number from 0 on, or -1 if it is unknown. The model
            does not receive it. Or a function of the inputs that returns these numbers.
        drop: Share of the rows that train without the correction of their domain, so that the head alone is good for
            new domains.

    The head learns what the domains have in common, and more so with a stronger weight decay, which keeps the
    corrections near zero. `specialised` returns the head of one domain. `Trainer` keeps the column; `fit` has no such
    column.

    Departures:
        The augmented features are not built; head and corrections are the blocks of their weight matrix. A share of the
        rows is treated as rows of an unknown domain.

    Raises:
        ValueError: In setup, for a model without a trainable classification head, or already inside
            DistributedDataParallel.
        RuntimeError: At the first step, for weights in pieces (FSDP2), or a batch without the column.
    """

    domains: Annotated[int, Within("[2, inf)")] = 2
    domain: str | Callable[[Mapping[str, Any]], Tensor] = "domain"
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
        earlier = getattr(run.model, self.place, None)
        if isinstance(earlier, Domains) and earlier.taking is not None:
            earlier.taking.remove()
        super().setup(run)
        self.beside.taking = run.model.register_forward_pre_hook(self.beside.take, with_kwargs=True)

    def build(self, head: nn.Linear) -> Domains:
        domains_beside = Domains(head, self.domains, self.domain)
        domains_beside.drop = self.drop
        return domains_beside

    def hook(self, head: nn.Module) -> Any:
        return head.register_forward_hook(self.beside)

    @torch.no_grad()
    def specialised(self, domain: int) -> dict[str, Tensor]:
        """Weight and bias of one domain's head, for ``head.load_state_dict`` in a copy of the model.

        Args:
            domain: Number of the domain.
        """
        sums = {name: p + getattr(self.beside, name)[domain] for name, p in self.head.named_parameters(recurse=False)}
        return {name: p.detach() for name, p in sums.items()}
