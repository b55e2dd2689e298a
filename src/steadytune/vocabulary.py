"""Train only the rows of the token embeddings that the training texts read, and put the other rows back afterwards.

A row w that no batch reads has the gradient zero at every step. Adam's moments stay zero, so that only decay moves it:

    AdamW    w <- (1 - lr * decay) * w
    SGD      b <- momentum * b + (1 - dampening) * decay * w,   w <- w - lr * b

Under SGD b is a multiple of w. One factor for each step therefore moves all unread rows, and zeros change no norm of a
gradient: the training gives the same model with these rows as without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from .core import Method, Weight, shards
from .core.anatomy import anatomy
from .errors import UsageError

KEY = "compact_vocabulary"  # entry of an optimizer's state dict
SPECIAL = ("pad", "bos", "eos", "cls", "sep", "mask", "decoder_start")  # tokens that a config may name
CHUNK = 1 << 16  # number of entries that are multiplied by all factors in turn, while they are in the cache


class CompactVocabulary:
    """A model whose table of token embeddings has only some of its rows; made by `compact_vocabulary`.

    Token ids stay as they are: the embedding looks up the place of each. In evaluation mode the model reads every
    token. ``model.state_dict()`` gives the whole table, and ``load_state_dict`` takes one, so that files of models are
    not affected. The optimizer's state is that of the rows that train.

    Attributes:
        rows: Tokens whose rows are trained, ascending, of shape (trained,).
        size: Number of rows of the whole table.
    """

    def __init__(self, embedding: Any, rows: Tensor) -> None:
        self.rows, self.size, device = rows, embedding.num_embeddings, embedding.weight.device
        self._embedding = embedding  # Any: its class changes
        self._class, self._padding = type(embedding), embedding.padding_idx
        self._whole = embedding.weight  # of the model as it was; its unread rows are those before `_factors`
        self._whole.data = self._whole.detach().cpu()
        self._factors: list[float] = []  # of the steps since the unread rows were written
        self._buffer: float | None = None  # SGD's momentum buffer of an unread row, as a multiple of the row
        self._handles: list[Any] = []  # of the hooks on the optimizer
        places = torch.full((self.size,), len(rows))
        places[rows] = torch.arange(len(rows))
        embedding.register_buffer("places", places.to(device), persistent=False)
        embedding.weight = nn.Parameter(self._whole.detach()[rows].to(device))
        embedding.padding_idx = None if self._padding is None else int(places[self._padding])
        embedding.__class__ = type(f"Compact{self._class.__name__}", (_Compact, self._class), {})
        embedding.vocabulary = self

    @property
    def trained(self) -> nn.Parameter:
        """The rows that train, of shape (trained, width)."""
        weight: nn.Parameter = self._embedding.weight
        return weight

    @property
    def left_out(self) -> int:
        """Number of weights that are left out."""
        return (self.size - len(self.rows)) * self.trained.shape[1]

    def attach(self, optimizer: Optimizer) -> CompactVocabulary:
        """Follow the decay of an optimizer: AdamW, Adam without decay, or SGD.

        `steadytune.Trainer` calls this itself. For the Trainer of transformers, give it what
        ``trainer.create_optimizer()`` returns. Call it before the optimizer's state is loaded.

        Raises:
            UsageError: It is another optimizer, it does not hold the rows that train, or they are sharded.
        """
        if shards.shard_group([self.trained]) is not None:
            raise UsageError(
                "compact_vocabulary needs whole weights, and these are sharded (FSDP2): leave it out, or use "
                "DistributedDataParallel."
            )
        factor_of(optimizer, self._group(optimizer), None)
        self._detach()
        self._handles = [
            optimizer.register_step_post_hook(self._step),
            optimizer.register_state_dict_post_hook(self._add_state),
            optimizer.register_load_state_dict_pre_hook(self._take_state),
        ]
        return self

    def check(self, model: nn.Module, methods: Iterable[Method], weight_decay: float) -> None:
        """Check that no method makes the result depend on the rows that are left out.

        Raises:
            UsageError: One does.
        """
        method = noticing(model, methods, weight_decay)
        if method is not None:
            raise UsageError(
                f"{type(method).__name__} acts on rows of the embeddings that no text reads, and the model has a "
                "compact vocabulary without them: leave compact_vocabulary out, or restrict the method to other "
                "weights with its scope or with only()."
            )

    def restore(self) -> None:
        """Put all rows back. The embedding is the module it was, and the optimizer has nothing more to train in it."""
        embedding = self._embedding
        self._detach()
        self._whole.data = self.whole().to(self.trained.device)
        embedding.__class__, embedding.padding_idx, embedding.weight = self._class, self._padding, self._whole
        del embedding.places, embedding.vocabulary

    @property
    def attached(self) -> bool:
        """Whether it follows an optimizer."""
        return bool(self._handles)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": []}  # optimizers lose their hooks in a copy

    # ------------------------------------------------------------------ the whole table

    def whole(self) -> Tensor:
        """The whole table as it is now, on the CPU. It is no copy: later steps change it."""
        table = self._whole.detach()
        for chunk in table.view(-1).split(CHUNK) if self._factors else ():
            for factor in self._factors:
                chunk.mul_(factor)
        self._factors = []
        table[self.rows] = self.trained.detach().cpu()
        return table

    def take(self, whole: Tensor) -> Tensor:
        """Replace all rows by those of a table; returns the ones that train."""
        table = self._whole.detach()
        if whole.shape != table.shape:  # torch will name the two shapes
            return whole
        table.copy_(whole)
        self._factors = []
        return table[self.rows]

    def unread(self, rows: Tensor) -> Tensor:
        """Rows that are left out, as they are now."""
        values = self._whole.detach()[rows.cpu()]
        for factor in self._factors:
            values.mul_(factor)
        return values.to(self.trained)

    # ------------------------------------------------------------------ the optimizer

    def _group(self, optimizer: Optimizer) -> dict[str, Any]:
        trained = self.trained
        for group in optimizer.param_groups:
            if any(p is trained for p in group["params"]):
                return group
        raise UsageError(
            "the optimizer does not hold the rows of the compact vocabulary: make it of model.parameters() after "
            "compact_vocabulary(model, tokens)."
        )

    def _step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """The optimizer's step post-hook; like the optimizer, it leaves a weight without a gradient as it is."""
        found_inf = getattr(optimizer, "found_inf", None)
        if self.trained.grad is None or (found_inf is not None and bool(found_inf)):
            return
        factor, self._buffer = factor_of(optimizer, self._group(optimizer), self._buffer)
        if type(optimizer) is SGD:
            self._factors = [math.prod(self._factors) * factor]
        elif torch.tensor(factor, dtype=self._whole.dtype) != 1:  # one by one, with the rounding of AdamW's own steps
            self._factors.append(factor)

    def _add_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state[KEY] = {"rows": self.rows, "buffer": self._buffer}
        return state

    def _take_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        own = state.get(KEY)
        if own is None:
            raise UsageError(
                "the optimizer's state is that of a training of the whole vocabulary, and this model has a compact "
                "one: resume without compact_vocabulary."
            )
        if not torch.equal(own["rows"].cpu(), self.rows):
            raise UsageError(
                f"the optimizer's state is that of another compact vocabulary, with {len(own['rows'])} rows, and this "
                f"one has {len(self.rows)}: resume with the tokens that the training began with."
            )
        self._buffer = own["buffer"]
        return {key: value for key, value in state.items() if key != KEY}


class _Compact(nn.Embedding):
    """What the class of a compact embedding has beside its own: the lookup, and whole tables in state dicts."""

    vocabulary: CompactVocabulary
    places: Tensor  # of each token, its row in the weight; the number of rows for tokens that are left out

    def forward(self, input: Tensor) -> Tensor:
        places = self.places[input]
        training = self.training and torch.is_grad_enabled()
        if training and not self.vocabulary.attached:
            raise UsageError(
                "the compact vocabulary does not know the optimizer, whose weight decay moves the rows that are left "
                "out: call attach(optimizer) on what compact_vocabulary returned, or use steadytune.Trainer."
            )
        if training and not input.is_cpu:  # to look would wait for the device, which refuses such a row itself
            return super().forward(places)
        unread = places == len(self.weight)
        if not bool(unread.any()):
            return super().forward(places)
        if training:
            raise UsageError(
                f"the training reads token {int(input[unread][0])}, which the compact vocabulary does not hold: give "
                "compact_vocabulary the tokens of all texts to train on, or leave it out."
            )
        rows, places[unread] = torch.unique(input[unread], return_inverse=True)
        places[unread] += len(self.weight)
        parameters: Any = self._parameters
        own = parameters["weight"]
        parameters["weight"] = torch.cat([own, self.vocabulary.unread(rows)])
        try:
            return super().forward(places)
        finally:
            parameters["weight"] = own

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.vocabulary.whole()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            state_dict[name] = self.vocabulary.take(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *args)


def compact_vocabulary(model: nn.Module, tokens: Iterable[int] | Tensor) -> CompactVocabulary:
    """Leave the rows of a model's token embeddings out that no text reads, until `CompactVocabulary.restore`.

    The training then needs neither gradient nor optimizer state for them: with 250,002 tokens, of which 500 short texts
    read a few thousand, that is two thirds of XLM-R-base. The result is that of a training of the whole table: bit for
    bit where the gradient is not clipped, and else up to the rounding of its norm. Call it before the optimizer is
    made; outside `steadytune.Trainer`, call ``attach(optimizer)`` of the result too.

    Args:
        model: A model with ``get_input_embeddings``; it is changed in place.
        tokens: Numbers of all tokens in the texts to train on. The padding token and other special tokens of the
            model's config are added.

    Returns:
        The compact vocabulary, with `CompactVocabulary.restore` to put all rows back.

    Raises:
        UsageError: The model has no table of its own for input tokens, or it is frozen.

    Example:
        >>> vocabulary = compact_vocabulary(model, {t for row in rows for t in row["input_ids"]})  # doctest: +SKIP
        >>> trainer = Trainer(model, args, train_dataset=rows); trainer.train()                    # doctest: +SKIP
        >>> vocabulary.restore()                                                                   # doctest: +SKIP
    """
    why = obstacle(model)
    if why is not None:
        raise UsageError(f"the vocabulary of this model cannot be compact: {why}.")
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    config = getattr(model, "config", None)
    special = [getattr(config, f"{token}_token_id", None) for token in SPECIAL]
    listed = [*tokens.flatten().tolist()] if isinstance(tokens, Tensor) else [*map(int, tokens)]
    listed += [token for token in [*special, embedding.padding_idx] if isinstance(token, int)]
    rows = torch.unique(torch.tensor(listed, dtype=torch.long))
    return CompactVocabulary(embedding, rows[(rows >= 0) & (rows < embedding.num_embeddings)])


def whole_table(embedding: nn.Module) -> Tensor:
    """All rows of an embedding, also of a compact one or of one in pieces."""
    if isinstance(embedding, _Compact):
        return embedding.vocabulary.whole()
    return shards.whole(embedding.get_parameter("weight").detach())


def vocabulary_of(model: nn.Module | None) -> CompactVocabulary | None:
    """The compact vocabulary of a model, if it has one."""
    found = [m.vocabulary for m in (() if model is None else model.modules()) if isinstance(m, _Compact)]
    return found[0] if found else None


def expect_whole(optimizer: Optimizer) -> None:
    """Make the optimizer of a model without compact vocabulary refuse the state of one with it."""

    def refuse(optimizer: Optimizer, state: dict[str, Any]) -> None:
        if KEY in state:
            raise UsageError(
                f"the optimizer's state is that of a compact vocabulary of {len(state[KEY]['rows'])} rows, and this "
                "model has the whole one: call compact_vocabulary with the tokens that the training began with."
            )

    optimizer.register_load_state_dict_pre_hook(refuse)


def obstacle(model: Any) -> str | None:
    """Why the vocabulary of a model cannot be compact, in words; None if it can."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        return "it has no single table of token embeddings"
    if isinstance(embedding, _Compact):
        return "it is compact already"
    if not embedding.weight.requires_grad:
        return "its token embeddings are frozen"
    if embedding.sparse or embedding.max_norm is not None:
        return "its token embeddings have sparse gradients or a largest norm"
    if sum(p is embedding.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        return "its token embeddings are read in several places, as by a head that is tied to them"
    return None


def noticing(model: Any, methods: Iterable[Method], weight_decay: float) -> Method | None:
    """The first method that acts on unread rows of the token embeddings, or depends on them; None if there is none."""
    table = model.get_input_embeddings().weight
    name = next(name for name, p in model.named_parameters() if p is table)
    part, group = anatomy(model)[name], {"weight_decay": weight_decay}
    weight = Weight(name, table, None, group, part.kind, part.block, part.head, part.input_dim)
    return next((method for method in methods if not method.ignores_unread(weight)), None)


def factor_of(optimizer: Optimizer, group: dict[str, Any], buffer: float | None) -> tuple[float, float | None]:
    """Factor by which a step multiplies a weight without gradient, and the momentum buffer as a multiple of the weight.

    Args:
        optimizer: The optimizer.
        group: The weight's parameter group.
        buffer: The momentum buffer before the step, as a multiple of the weight; None before the first step.

    Raises:
        UsageError: The step of this optimizer is no multiple of the weight.
    """
    lr, decay = float(group["lr"]), group["weight_decay"]
    kind = type(optimizer)
    if kind is AdamW or (kind is Adam and (not decay or group.get("decoupled_weight_decay"))):
        return 1 - lr * decay, None
    if kind is not SGD:
        raise UsageError(
            f"compact_vocabulary follows the decay of AdamW, of SGD and of Adam without weight decay; this optimizer "
            f"is {kind.__name__} with a weight decay of {decay}: leave compact_vocabulary out."
        )
    step, momentum = decay, group["momentum"]
    if momentum:
        buffer = step if buffer is None else momentum * buffer + (1 - group["dampening"]) * step
        step = step + momentum * buffer if group["nesterov"] else buffer
    factor = 1 - lr * step
    return factor, buffer / factor if momentum and buffer is not None else None
