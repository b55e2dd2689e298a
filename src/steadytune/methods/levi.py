"""LEVI: a frozen pre-trained model and a small network trained from scratch, combined layer by layer.

With u_i the mean over the tokens after block i of the pre-trained model, v that of a small Transformer on the same
tokens, and W, b the last layer of the head:

    h_i = MLP_i([u_i; v])          i = a third, two thirds and all of the way up
    logits = W mean_i h_i + b      which is the mean over i of W h_i + b
    L = loss(logits) + mean over i of loss(W h_i + b)
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core import Method, Run, Step, Within
from ..core.anatomy import POOLING, blocks
from ..core.checks import check_layout, check_lengths
from ..core.facts import Cost, Paper
from ..core.step import problem_type
from ..errors import UsageError
from ..files.atomic import write_json
from ..heads.features import output_layer
from .bases.rows import labels_of, row_losses

logger = logging.getLogger("steadytune")

FILE = "levi.json"  # stands in place of config.json, which it contains
FORMAT = 1
NAME = "levi"  # the module in the model
LEAST = 16  # smallest width of the small Transformer


@dataclass
class LEVI(Method):
    """Freeze the model; train a small Transformer beside it, and a layer that reads both at each of several depths.

    Args:
        layers: Number of blocks whose states are read, evenly spaced and ending with the last.
        depth: Number of blocks of the small Transformer.
        narrowing: The model's width divided by the small Transformer's.
        dropout: Probability of dropout in the small Transformer and the layers that read both.

    The result is two networks, of which neither is of use alone. Its folder has a file ``levi.json`` in place of
    ``config.json``, so that nobody loads it as another model by mistake; `steadytune.load_levi`, `FittedModel.load` and
    ``steadytune predict`` read it. With LoRA or IA3 (``peft="lora"``) the adapters of the pre-trained model train too,
    and are merged at the end. Only the last layer of the model's head is used; what is before it in the head and the
    pooler is not read. The table of word embeddings of the small Transformer makes most of the trained weights, and is
    trained on the words of your rows alone: with few rows the small network learns them by heart. Use the method to see
    whether the pre-trained features themselves mislead out of domain, not for a better score in domain. It needs a
    larger learning rate than full fine-tuning, 1e-3 or so.

    Departures:
        Written from the paper, no code of the authors is known. All layers share the last linear map of the head; as
        each MLP ends in a linear map of its own, this allows the same functions. Weights of the losses are not known:
        here the mean of the layers' losses counts as much as the loss of the mean. The layers' losses are cross
        entropy, squared error or, for several labels, the mean binary cross entropy; class weights and label smoothing
        act on the loss of the mean alone.

    Raises:
        ValueError: In setup, for a model whose blocks cannot be told, an encoder-decoder, XLNet, a model without a last
            linear layer, adapters that cannot be merged, or a model that has LEVI already; in attach, for sharded
            weights (FSDP2).
        UsageError: At the first step, for inputs without ``input_ids``, or states that have not one entry per token.
    """

    layers: Annotated[int, Within("[1, inf)")] = 3
    depth: Annotated[int, Within("[1, inf)")] = 2
    narrowing: Annotated[int, Within("[1, inf)")] = 4
    dropout: Annotated[float, Within("[0, 1)")] = 0.1

    structure: ClassVar = True
    draws_weights: ClassVar = True
    beside_adapters: ClassVar = True
    exclusive: ClassVar = "choice of what is trained"
    conflicts: ClassVar[tuple[str, ...]] = (
        "encoder-decoders",
        "`--peft prefix` and `prompt`",
        "`--pooling`",
        "`re_init`",
        "a soup of runs",
        "`mixout`, `dps_mix`",
        "sharded weights (FSDP2)",
    )
    cost: ClassVar = Cost()
    paper: ClassVar = Paper(
        authors=(
            "Yuji Roh",
            "Qingyun Liu",
            "Huan Gui",
            "Zhe Yuan",
            "Yujin Tang",
            "Steven Euijong Whang",
            "Liang Liu",
            "Shuchao Bi",
            "Lichan Hong",
            "Ed H. Chi",
            "Zhe Zhao",
        ),
        title="LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different Views",
        booktitle="International Conference on Machine Learning",
        venue="ICML",
        year=2024,
        arxiv="2402.04644",
    )

    def setup(self, run: Run) -> None:
        model: Any = run.model
        self.adapted = inner(model) is not model
        check_layout(model, "LEVI")
        check_lengths(model, "LEVI")
        if getattr(inner(model).config, POOLING, None) is not None:
            raise ValueError(
                "LEVI averages the tokens itself and does not read the block that Pooling adds: leave Pooling out"
            )
        if self.adapted and not hasattr(model, "merge_and_unload"):
            raise ValueError("LEVI needs adapters that can be merged in the end: use LoRA or IA3, or none")
        if not self.adapted:
            head = {id(p) for p in output_layer(model).parameters()}
            used = {name for name, p in model.named_parameters() if id(p) in head}
            run.train_only(self, lambda name, part: name in used)
        with run.forked_rng():
            torch.manual_seed(run.rng(self, "weights").initial_seed())
            self.views = insert(inner(model), Shape.of(inner(model), self))
        own = {id(p) for p in self.views.parameters()}
        run.mark_new(name for name, p in model.named_parameters() if id(p) in own)
        logger.info("LEVI: %s", self.views.said)

    def attach(self, run: Run) -> None:
        if run.sharded:
            raise ValueError("LEVI needs whole weights, but these are sharded (FSDP2): use DistributedDataParallel")

    def before_batch(self, step: Step) -> None:
        self.views.listening = True

    def penalty(self, step: Step) -> Tensor:
        logits, labels = self.views.pop(), labels_of(step.inputs, self)
        problem = problem_type(step.run.model)
        labels = labels.repeat(len(logits[0]) // len(labels), *[1] * (labels.dim() - 1))  # of each copy of the batch
        return torch.stack([step.mean(row_losses(each, labels, problem)) for each in logits]).mean()

    def state_dict(self) -> dict[str, Any]:
        if not self.adapted:  # else checkpoints hold the adapters and nothing else of the model
            return {}
        return {"views": {name: p.detach() for name, p in self.views.named_parameters()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, p in self.views.named_parameters() if self.adapted else ():
            p.copy_(state["views"][name])


@dataclass(frozen=True)
class Shape:
    """What the network beside a model is made of.

    Attributes:
        layers: Numbers of the blocks that are read.
        width: Width of the model.
        size: Width of the small Transformer.
        depth: Number of its blocks.
        vocabulary: Number of tokens.
        dropout: Probability of dropout.
    """

    layers: tuple[int, ...]
    width: int
    size: int
    depth: int
    vocabulary: int
    dropout: float

    @classmethod
    def of(cls, model: Any, method: LEVI) -> Shape:
        """The shape beside a transformers model.

        Raises:
            ValueError: The model has no blocks that are modules, or is an encoder-decoder.
        """
        name, stack = type(model).__name__, blocks(model)
        if not stack or len(stack[0]) > 1 or getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"LEVI reads the outputs of one stack of blocks, which {name} does not have: leave it out")
        count = len(stack)
        chosen = sorted({math.ceil(count * i / method.layers) - 1 for i in range(1, method.layers + 1)} - {-1})
        width = int(model.config.hidden_size)
        size = max(LEAST, width // method.narrowing // 4 * 4)  # four attention heads
        vocabulary = int(model.get_input_embeddings().num_embeddings)
        return cls(tuple(chosen), width, size, method.depth, vocabulary, method.dropout)


class Views(nn.Module):
    """A small Transformer, and the layers that read it together with the states of a model.

    Hooks on the model bring the states, and hand the mean of what the layers make of them to the head's last layer.

    Args:
        shape: What it is made of.
        head: The head's last layer.

    Attributes:
        listening: Whether the next forward keeps the logits of each layer, for `pop`.
    """

    def __init__(self, shape: Shape, head: nn.Linear) -> None:
        super().__init__()
        self.shape, self.listening = shape, False
        self._inputs: dict[str, Any] = {}  # of the forward under way
        self._states: list[Tensor] = []
        self._logits: list[Tensor] = []
        size, drop = shape.size, nn.Dropout(shape.dropout)
        self.embedding = nn.Embedding(shape.vocabulary, size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norm = nn.LayerNorm(size)
        block = nn.TransformerEncoderLayer(
            size, 4, 4 * size, shape.dropout, nn.functional.gelu, batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(block, shape.depth, nn.LayerNorm(size), enable_nested_tensor=False)
        self.readers = nn.ModuleList(
            nn.Sequential(nn.Linear(shape.width + size, size), nn.GELU(), drop, nn.Linear(size, head.in_features))
            for _ in shape.layers
        )
        self.to(head.weight)

    @property
    def said(self) -> str:
        """Its size in words."""
        words = self.embedding.weight.numel()
        weights = sum(p.numel() for p in self.parameters())
        read = ", ".join(str(i + 1) for i in self.shape.layers)
        return (
            f"{weights:,} weights beside the model are trained and needed in use, {words:,} of them word embeddings; "
            f"they read its blocks {read}"
        )

    def forward(self, ids: Tensor, real: Tensor) -> Tensor:
        """Mean states of the small Transformer, (rows, size).

        Args:
            ids: Token numbers (rows, length).
            real: False at padding, of the same shape.
        """
        embedded = self.embedding(ids)
        states = self.norm(embedded + positions(ids.size(1), self.shape.size).to(embedded))
        return mean_over(self.transformer(states, src_key_padding_mask=~real), real)

    # ------------------------------------------------------------------ hooks

    def begin(self, body: Any, args: tuple, inputs: Mapping[str, Any]) -> None:
        """Before the body: take its inputs."""
        self._inputs = inspect.signature(body.forward).bind_partial(*args, **inputs).arguments
        self._inputs |= self._inputs.pop("kwargs", {})
        self._states = []

    def keep(self, block: nn.Module, args: tuple, output: Any) -> None:
        """After a block: take its states."""
        self._states.append(output if isinstance(output, Tensor) else output[0])

    def hand_on(self, layer: nn.Linear, args: tuple[Tensor]) -> tuple[Tensor]:
        """Before the head's last layer: give it the mean of what the layers read, in place of its own input."""
        ids, states = self._inputs.get("input_ids"), self._states[-len(self.readers) :]
        if ids is None or any(state.shape != (*ids.shape, self.shape.width) for state in states):
            held = ", ".join(str(tuple(state.shape)) for state in states)
            tokens = "no input_ids" if ids is None else f"input_ids of shape {tuple(ids.shape)}"
            raise UsageError(
                f"LEVI needs input_ids and a state for each of them, got {tokens} and states of {held or 'none'}: "
                "leave LEVI out"
            )
        mask = self._inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self._inputs, self._states = {}, []
        small = self(ids, real)
        each = [
            read(torch.cat([mean_over(state, real), small.to(state.dtype)], dim=-1))
            for read, state in zip(self.readers, states, strict=True)
        ]
        if self.listening:
            self._logits = [nn.functional.linear(one, layer.weight, layer.bias) for one in each]
            self.listening = False
        mean = torch.stack(each).mean(0).to(args[0].dtype)
        return (mean if args[0].dim() == 2 else mean.unsqueeze(1).expand(-1, args[0].size(1), -1),)  # decoders: tokens

    def pop(self) -> list[Tensor]:
        """Logits (rows, outputs) of each layer in the forward that was listened to."""
        logits, self._logits = self._logits, []
        return logits


def inner(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def mean_over(states: Tensor, real: Tensor) -> Tensor:
    """Mean over the tokens that are no padding: (rows, length, width) -> (rows, width)."""
    weights = real.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def positions(length: int, size: int) -> Tensor:
    """Sines and cosines of the positions, (length, size), with the spread of the word embeddings.

    Source: Vaswani et al., Attention is all you need, NeurIPS 2017, arXiv 1706.03762.
    """
    angles = torch.arange(length).unsqueeze(1) * torch.exp(torch.arange(0, size, 2) * (-math.log(1e4) / size))
    return 0.02 * math.sqrt(2) * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def insert(model: Any, shape: Shape) -> Views:
    """Give a transformers model the network beside it. The names of the model's own weights stay.

    Raises:
        ValueError: The model has one.
    """
    if has_levi(model):
        raise ValueError(f"this {type(model).__name__} has LEVI already: give the model without it")
    head, stack = output_layer(model), blocks(model)
    views = Views(shape, head)
    own = dict(model._modules)
    model._modules.clear()
    model.add_module(NAME, views)  # first, so that the last linear layer of the model stays its last
    model._modules.update(own)
    model.base_model.register_forward_pre_hook(views.begin, with_kwargs=True)
    for number in shape.layers:
        stack[number][0].register_forward_hook(views.keep)
    head.register_forward_pre_hook(views.hand_on)
    return views


def has_levi(model: Any) -> bool:
    """Whether a model, plain or with adapters, has a network of `LEVI` beside it."""
    return isinstance(getattr(inner(model), NAME, None), Views)


def save_levi(path: str | os.PathLike, model: Any) -> Path:
    """Write a model with `LEVI`: its weights in safetensors, and ``levi.json`` with its config.

    Args:
        path: Directory.
        model: Model with LEVI; adapters must be merged.

    Returns:
        Path of ``levi.json``.

    Raises:
        ValueError: The model does not have LEVI, or has adapters.
    """
    if inner(model) is not model or not has_levi(model):
        raise ValueError(f"this {type(model).__name__} is no model with LEVI and merged adapters: save it as any model")
    model.save_pretrained(path)
    return hide_config(path, model)


def hide_config(folder: str | os.PathLike, model: Any) -> Path:
    """Put the config of a written model with LEVI into ``levi.json``, so that nobody loads half of it."""
    file = Path(folder, FILE)
    plain = Path(folder, "config.json")
    about = "A model of steadytune's LEVI: two networks, which steadytune.load_levi reads."
    shape = asdict(getattr(inner(model), NAME).shape)
    write_json(file, {"about": about, "format": FORMAT, "levi": shape, "config": inner(model).config.to_dict()})
    plain.unlink(missing_ok=True)
    return file


def load_levi(path: str | os.PathLike) -> nn.Module:
    """Read a model with `LEVI`, in float32; outputs are those of the training, bit for bit.

    Args:
        path: Directory that `save_levi`, `fit` or the Trainer wrote.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: There is no such model, its format is newer, or weights are missing.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = Path(path)
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {FILE}: it is no folder of a model with LEVI")
    about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if about.get("format") != FORMAT:
        raise ValueError(f"{file} has format {about.get('format')!r}, this version reads format {FORMAT}")
    config = AutoConfig.for_model(**about["config"])
    with torch.random.fork_rng():
        model: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        insert(model, Shape(**{**about["levi"], "layers": tuple(about["levi"]["layers"])}))
    weights: dict[str, Tensor] = {}
    for part in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(part))
    found = model.load_state_dict(weights, strict=False)
    lost = {*found.missing_keys} - {*(getattr(model, "_tied_weights_keys", None) or ())}
    if lost or found.unexpected_keys:
        odd = sorted(lost or found.unexpected_keys)[0]
        raise ValueError(f"{folder} does not hold the weights that {FILE} describes: {odd!r} differs")
    return model.eval()
