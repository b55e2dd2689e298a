"""Adapters: train small bottlenecks inside the blocks, and freeze the pre-trained matrices.

    h <- h + up(gelu(down(h)))          behind attention and behind feed-forward, in every block

A bottleneck is not linear, so it cannot be merged into a plain model as LoRA can. A separate file stores the trained
weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import Method, Run, Within
from ..core.anatomy import Part, anatomy, blocks
from ..core.facts import Paper
from ..files import state
from ..files.delta import fingerprint

FILE = "adapters.safetensors"
FORMAT = 1
# The last matrix of attention and of feed-forward, by the end of its path in the block.
OUTPUTS = (
    *("output.dense", "attention.dense", "ffn_output"),  # BERT, RoBERTa, ELECTRA, DeBERTa; ALBERT
    *("out_lin", "lin2", ".Wo"),  # DistilBERT, XLM; ModernBERT
    *("attn.o", "Attention.o", "DenseReluDense.wo"),  # MPNet, T5
    *("out_proj", "fc2", "c_proj", "o_proj", "down_proj"),  # BART; GPT-2; Llama, Qwen, Gemma
)


@dataclass
class Adapters(Method):
    """Insert two bottlenecks into each block; train them, the normalisation layers and the head, and freeze the rest.

    Args:
        size: Number of features of a bottleneck; the authors try 8 to 256.

    Before training, the bottlenecks are the identity. They are not linear, so they cannot be merged into a plain model.
    `steadytune.save_adapters` stores the trained weights, and `steadytune.load_adapters` inserts them into the
    pre-trained model. `fit`, `predict` and `steadytune.Trainer` do both. Their folders have no ``config.json``, so that
    nobody loads them as a model without adapters. The authors' learning rates are 3e-5 to 3e-3. For activation
    checkpointing see `TopLayers`.

    Departures:
        ``up`` starts at zero, so that the first outputs are exactly those of the pre-trained model; the authors draw
        both matrices from a narrow normal distribution. Bottlenecks are before the dropout of the residual branch, not
        after it.

    Raises:
        ValueError: In setup, if the model is a PEFT model, has adapters, or has blocks of unknown structure (XLNet).
    """

    size: Annotated[int, Within("[1, inf)")] = 64

    structure: ClassVar = True
    draws_weights: ClassVar = True
    exclusive: ClassVar = "choice of what is trained"
    conflicts: ClassVar[tuple[str, ...]] = ("PEFT adapters", "`re_init`", "a soup of runs", "`mixout`, `dps_mix`")
    paper: ClassVar = Paper(
        authors=(
            "Neil Houlsby",
            "Andrei Giurgiu",
            "Stanislaw Jastrzebski",
            "Bruna Morrone",
            "Quentin de Laroussilhe",
            "Andrea Gesmundo",
            "Mona Attariyan",
            "Sylvain Gelly",
        ),
        title="Parameter-Efficient Transfer Learning for NLP",
        booktitle="International Conference on Machine Learning",
        venue="ICML",
        year=2019,
        arxiv="1902.00751",
    )

    def setup(self, run: Run) -> None:
        run.train_only(self, is_trained)
        with run.forked_rng():
            torch.manual_seed(run.rng(self, "weights").initial_seed())
            run.mark_new(insert(run.model, self.size))


class AdapterBottleneck(nn.Module):
    """``h + up(gelu(down(h)))``; the identity before training.

    Args:
        width: Number of features of h.
        size: Size of the bottleneck.
        like: Tensor whose device and dtype the weights get.
    """

    def __init__(self, width: int, size: int, like: Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(size, width, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(nn.functional.gelu(self.down(hidden)))


def insert(model: nn.Module, size: int) -> list[str]:
    """Insert a bottleneck after each attention and each feed-forward; return the names of the new weights.

    The names of the model's own weights stay. A bottleneck is the submodule ``adapter`` of the matrix whose output it
    takes.

    Raises:
        ValueError: The model has adapters, or a block without a known attention and feed-forward output.
    """
    name, all_blocks = type(model).__name__, blocks(model)
    layers = [outputs(block) for block in all_blocks]
    if not all_blocks or min(map(len, layers)) < 2:
        raise ValueError(
            f"adapters follow attention and feed-forward of each block, which are not known for {name}, or are "
            "quantised: use LoRA, or BitFit"
        )
    for layer in (layer for block in layers for layer in block):
        if hasattr(layer, "adapter"):
            raise ValueError(f"this {name} has adapters already: give the model without them")
        layer.adapter = AdapterBottleneck(width(layer), size, layer.weight)
        layer.register_forward_hook(_through)
    return [n for n, _ in model.named_parameters() if is_adapter(n)]


def outputs(block: Sequence[nn.Module]) -> list[Any]:
    """Matrices of a block that write to the residual stream; `nn.MultiheadAttention` does not call its own."""
    uncalled = nn.modules.linear.NonDynamicallyQuantizableLinear
    matrices = [
        layer
        for module in block
        for path, layer in module.named_modules()
        if path.endswith(OUTPUTS)
        and not isinstance(layer, uncalled)
        and getattr(layer, "weight", torch.tensor(0)).is_floating_point()  # no norm without weights, nothing quantised
    ]
    return list(dict.fromkeys(matrices))


def width(layer: Any) -> int:
    """Features of the output of an `nn.Linear` or a `Conv1D`."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.nf


def _through(layer: Any, args: Any, output: Tensor) -> Tensor:
    return layer.adapter(output)


def is_adapter(name: str) -> bool:
    """Whether a weight of this name belongs to a bottleneck."""
    return ".adapter.down." in name or ".adapter.up." in name


def is_trained(name: str, part: Part) -> bool:
    """Whether `Adapters` trains a weight: it is one of an adapter, a normalisation layer, the head, or was drawn."""
    return part.head or part.drawn or part.kind == "norm" or is_adapter(name)


def adapter_size(model: nn.Module) -> int | None:
    """Size of a model's bottlenecks; None for a model without adapters."""
    return next((m.down.out_features for m in model.modules() if isinstance(m, AdapterBottleneck)), None)


def save_adapters(path: str | os.PathLike, model: nn.Module) -> Path:
    """Write the weights that `steadytune.Adapters` trains (bottlenecks, normalisation layers, head), atomically.

    Args:
        path: File, or directory in which the file is called `adapters.safetensors`.
        model: Model with adapters.

    Returns:
        Path of the file.

    Raises:
        ValueError: The model has no adapters.
    """
    file, size = _file(path), adapter_size(model)
    if size is None:
        raise ValueError(f"this {type(model).__name__} has no adapters: save it as any model")
    trained = {name for name, part in anatomy(model).items() if is_trained(name, part)}
    weights = model.state_dict()
    tree = {
        "format": FORMAT,
        "size": size,
        "base": fingerprint({n: t for n, t in weights.items() if n not in trained}),
        "trained": {n: t.detach().cpu().clone() for n, t in weights.items() if n in trained},
    }
    state.save(tree, file)
    return file


def load_adapters(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Insert adapters into the model that they were trained in; outputs are those of the training, bit for bit.

    Args:
        path: File that `save_adapters` wrote, or its directory.
        model: Pre-trained model with a head of the same shape; it is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: The base model or the shape of the head differs, the format is newer, or the file is damaged.
    """
    file = _file(path)
    tree = state.load(file)
    if tree.get("format") != FORMAT:
        raise ValueError(f"{file} has format {tree.get('format')!r}, this version reads adapters of format {FORMAT}")
    trained, weights = tree["trained"], model.state_dict()
    for name, tensor in trained.items():
        if not is_adapter(name) and (name not in weights or weights[name].shape != tensor.shape):
            has = tuple(weights[name].shape) if name in weights else "no such weight"
            raise ValueError(
                f"{file} holds {name!r} of shape {tuple(tensor.shape)}, the model has {has}: load the base model with "
                "the head that was trained (num_labels)"
            )
    hashed = fingerprint({n: t for n, t in weights.items() if n not in trained})
    if hashed != tree["base"]:
        raise ValueError(
            f"{file} belongs to a base with hash {tree['base']}, the model given has {hashed}: load the pre-trained "
            "model that the adapters were trained in, in the same dtype"
        )
    insert(model, tree["size"])
    with torch.no_grad():
        for name, tensor in trained.items():
            model.get_parameter(name).copy_(tensor)
    return model


def _file(path: str | os.PathLike) -> Path:
    return Path(path, FILE) if os.path.isdir(path) else Path(path)
