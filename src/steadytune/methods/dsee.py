"""DSEE: adapters of low rank and a few free entries, on a model that is pruned on the way.

With W a pre-trained matrix, B A PEFT's LoRA, S zero but for a few entries, and M = [|W + B A + S| among the largest]:

    first part of the training      W x + (B A + S) x          on query and value
    rest                            M * W x + (B A + S) x      M for every matrix of the blocks
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils import prune

from ..core import Run, Scope, Weight, Within
from ..core.anatomy import anatomy
from ..core.facts import Cost, Paper
from ..core.step import Inputs
from ..errors import UsageError
from .bases.groups import undecayed
from .bases.static_mask import Batch, StaticMask, Tensors

logger = logging.getLogger("steadytune")

# Ends of the paths of query and value matrices.
QUERIES_AND_VALUES = (
    *("query", "value", "query_proj", "value_proj"),  # BERT, RoBERTa, ELECTRA, ALBERT; DeBERTa
    *("q_lin", "v_lin", "attn.q", "attn.v"),  # DistilBERT, XLM; MPNet
    *("q_proj", "v_proj", "SelfAttention.q", "SelfAttention.v"),  # BART, Llama, Qwen, Gemma; T5
)
ROUNDS = 10  # of the split into a matrix of low rank and a sparse one
Support = Literal["decomposition", "magnitude", "gradient", "random"]


@dataclass
class DSEE(StaticMask):
    """Train LoRA and a few free entries of query and value matrices; prune the model's matrices on the way.

    Args:
        entries: Number of free entries in each matrix.
        support: Which entries are free: ``"decomposition"`` takes what is left of the matrix beside its best
            approximation of LoRA's rank, ``"magnitude"`` the largest weights, ``"gradient"`` those with the largest
            gradient on the first batches, ``"random"`` any.
        share: Share of the weights of each matrix of the blocks that is set to zero; 0 prunes nothing.
        start: Share of the training before the pruning; what follows adapts to it. It comes before the last step at the
            latest.
        batches: Number of batches whose mean gradient chooses entries.

    It needs a model with PEFT's LoRA; in `fit`, the procedure ``"dsee"`` brings it. Adapters of other matrices than
    query and value stay at zero. The merged model is a plain one. Its zeros are exact in all matrices but query and
    value, to which B A is added; `steadytune.inference_cost` counts them. They save no time in a stock model. LoRA of
    rank 16 has 16 (n + m) weights in a matrix of n by m, beside which 16 entries are few (``benchmarks/dsee.py``
    measures what they change). What is left of the method is LoRA on a model pruned by magnitude: use it to see what
    such pruning costs, not for a better score.

    Departures:
        One training with one schedule; the authors train for 5 epochs, prune, and train for 10 more with a schedule of
        its own, hence ``start``. Their decomposition is greedy and ends at a rank of two thirds of the width, which
        leaves rounding errors to choose the entries; here it is GoDec (Zhou and Tao, ICML 2011) of LoRA's rank.
        Pruning is by matrix. Structured pruning of heads is left out.

    Raises:
        ValueError: In setup, for a model without LoRA on query and value matrices (with attention in one matrix, such
            as GPT-2 and ModernBERT), or without `data` for ``"gradient"``; in attach, for sharded weights (FSDP2).
        UsageError: In attach, with an average of the matrices that are pruned (EMA, SWA, LAWA).
    """

    entries: Annotated[int, Within("[0, inf)")] = 16
    support: Support = "decomposition"
    share: Annotated[float, Within("[0, 1)")] = 0.2
    start: Annotated[float, Within("[0, 1]")] = 1 / 3
    batches: Annotated[int, Within("[1, inf)")] = 8

    frozen: ClassVar[bool] = True  # type: ignore[misc]
    structure: ClassVar = True
    needs_steps = True
    beside_adapters: ClassVar = True
    conflicts: ClassVar[tuple[str, ...]] = ("models without LoRA", "sharded weights (FSDP2)")
    cost: ClassVar = Cost(held={"": 2})
    paper: ClassVar = Paper(
        authors=("Xuxi Chen", "Tianlong Chen", "Weizhu Chen", "Ahmed Hassan Awadallah", "Zhangyang Wang", "Yu Cheng"),
        title="DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models",
        booktitle="Proceedings of the Annual Meeting of the Association for Computational Linguistics",
        venue="ACL",
        year=2023,
        arxiv="2111.00160",
    )

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """The pre-trained query and value matrices."""
        return lambda w: w.name in self.sparse

    def setup(self, run: Run) -> None:
        model: Any = run.model
        layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
        chosen = {name: m for name, m in layers.items() if name.endswith(QUERIES_AND_VALUES)}
        if not chosen:
            raise ValueError(
                f"DSEE needs LoRA on query and value matrices, and this {type(model).__name__} has none: give a model "
                "with PEFT's LoRA (--peft lora), or leave DSEE out"
            )
        for name, layer in layers.items():
            if name not in chosen:
                for part in ("lora_A", "lora_B"):
                    layer.get_submodule(part).requires_grad_(False)
        self.layers = chosen
        self.held = dict(model.named_parameters())  # not their values now: the model may be moved
        self.sparse = {f"{name}.base_layer.weight" for name in chosen if self.entries}
        for name in self.sparse:
            model.get_parameter(name).requires_grad_(True)
        self.removed: dict[str, tuple[Tensor, Tensor]] = {}  # by name: what is kept, and the values of the rest
        if self.sparse and self.support == "gradient":
            super().setup(run)
        else:
            self.masks, self.indices, self.resting = {}, {}, {}

    def attach(self, run: Run) -> None:
        assert run.optimizer is not None
        if run.sharded:
            raise ValueError("DSEE needs whole weights, but these are sharded (FSDP2): use DistributedDataParallel")
        for other in (m for m in run.methods if self.share and m.exclusive == "average"):
            if any(w.name in self.sparse for w in run.weights(other, getattr(other, "scope", "all"))):
                name = type(other).__name__
                raise UsageError(
                    f"DSEE(share={self.share}) sets weights to zero, and {name} evaluates other values of these "
                    f"weights, in which they are not: leave {name} out, or set share=0 to prune nothing"
                )
        still = {id(w.parameter): 0.0 for w in run.weights(self, self.scope)}
        groups = run.optimizer.param_groups
        groups[:] = [part for group in groups for part in undecayed(group, still)]

    # ------------------------------------------------------------------ free entries

    def choose(self, run: Run, weights: Sequence[Weight], batches: Iterable[Batch]) -> Tensors:
        scores = {w.name: self.score(run, w) for w in weights if w.name in self.sparse}
        if self.support == "gradient":
            first: list[Inputs] = []
            for batch in islice(batches, self.batches):
                first += [batch] if isinstance(batch, Mapping) else batch
            gradient = run.gradient(first, dropout_seed=run.draw_seed("dsee", rank=True))
            scores = {name: gradient[name].abs() for name in scores}
        return {name: largest(score, self.entries) for name, score in scores.items()}

    def score(self, run: Run, weight: Weight) -> Tensor:
        """What the entries of a matrix are chosen by, other than gradients."""
        data = weight.data.detach()
        if self.support == "random":
            return torch.empty_like(data).uniform_(generator=run.rng(self, weight.name))
        if self.support == "decomposition":
            layer = self.layers[weight.name.removesuffix(".base_layer.weight")]
            return residual(data, max(layer.r.values()), self.entries).abs()
        return data.abs()

    # ------------------------------------------------------------------ pruning

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        steps = run.steps(self)
        if self.share and not self.removed and run.index >= min(round(self.start * steps), steps - 1):
            self.prune(run)  # before frozen entries are copied
        super().pull_back(run, weights)

    @torch.no_grad()
    def prune(self, run: Run) -> None:
        """Set the smallest weights of each matrix of the blocks to zero; adapters and free entries stay."""
        way = prune.L1Unstructured(self.share)
        for name, matrix, delta in self.matrices(run):
            mask = way.compute_mask(matrix + delta, torch.ones_like(matrix)).bool()
            if name in self.masks:
                mask |= self.masks[name]
            self.removed[name] = (mask, matrix[~mask].clone())
            matrix.mul_(mask)

    def matrices(self, run: Run) -> Iterator[tuple[str, Tensor, Tensor | float]]:
        """Name, raw values and what LoRA adds, of each pre-trained matrix of the blocks."""
        for name, part in anatomy(run.model).items():
            if part.kind == "linear" and part.block is not None and not part.head and ".lora_" not in name:
                layer: Any = self.layers.get(name.removesuffix(".base_layer.weight"))
                delta = 0.0 if layer is None else sum(layer.get_delta_weight(a) for a in layer.active_adapters)
                yield name, run.raw(name), delta

    def finish(self, run: Run) -> None:
        if self.removed:
            gone = sum(int((~mask).sum()) for mask, _ in self.removed.values())
            every = sum(mask.numel() for mask, _ in self.removed.values())
            logger.info("DSEE: %d of the %d weights of the blocks' matrices were pruned", gone, every)

    # ------------------------------------------------------------------ state; checkpoints of PEFT hold adapters only

    def state_dict(self) -> dict[str, Any]:
        values = {name: self.held[name].detach()[mask] for name, mask in self.masks.items()}
        return {"masks": self.masks, "values": values, "kept": {name: mask for name, (mask, _) in self.removed.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, (mask, values) in self.removed.items():
            self.held[name][~mask] = values
        super().load_state_dict({"masks": state["masks"]})
        for name, mask in self.masks.items():
            self.held[name][mask] = state["values"][name]
        self.removed = {}
        for name, mask in state["kept"].items():
            matrix = self.held[name]
            self.removed[name] = (mask, matrix[~mask].clone())
            matrix.mul_(mask)


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask of exactly ``count`` of the largest entries, or of all if there are fewer."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(min(count, scores.numel())).indices] = True
    return mask.view_as(scores)


def residual(matrix: Tensor, rank: int, entries: int) -> Tensor:
    """What a sum of a matrix of low rank and one with few entries leaves to the latter (GoDec).

    Source: Zhou and Tao, GoDec: Randomized Low-rank and Sparse Matrix Decomposition, ICML 2011.

    Args:
        matrix: Shape (m, n).
        rank: Rank of the first summand.
        entries: Number of entries of the second.
    """
    sparse, left = torch.zeros_like(matrix), matrix
    for _ in range(ROUNDS):
        u, s, v = torch.linalg.svd(matrix - sparse, full_matrices=False)
        left = matrix - (u[:, :rank] * s[:rank]) @ v[:rank]
        sparse = left * largest(left.abs(), entries)
    return left
