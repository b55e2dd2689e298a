"""One micro-batch on its way through the model: what a penalty sees, and copies of a batch in one forward."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UsageError, one_line
from ..functional import symmetric_kl
from . import shards
from .anatomy import input_embedding
from .checks import check_layout
from .randomness import RandomState

if TYPE_CHECKING:
    from .method import Method
    from .run import Run

Inputs = Mapping[str, Any]
Compute = Callable[[Any, Inputs, int], tuple[Tensor, Any]]  # (model, inputs, copies) -> (loss, outputs)
Dropout = Literal["same", "fresh"]  # the draw of the task's own forward, or another


@dataclass
class Passes:
    """How often a batch passes the model in a step.

    Attributes:
        forwards: Passes of one copy of the batch.
        backwards: Backward passes. One that ends at activations, without gradients of weights, counts half.
    """

    forwards: float = 0.0
    backwards: float = 0.0

    def add(self, forwards: float, backwards: float) -> None:
        """Count some more."""
        self.forwards += forwards
        self.backwards += backwards

    def since(self, before: Passes, batches: int) -> Passes:
        """What was added, per batch."""
        return Passes((self.forwards - before.forwards) / batches, (self.backwards - before.backwards) / batches)

    @property
    def plain(self) -> float:
        """In plain steps: a backward costs two forwards."""
        return (self.forwards + 2 * self.backwards) / 3

    def __str__(self) -> str:
        return f"{self.forwards:g} forwards, {self.backwards:g} backwards ({self.plain:.1f} plain steps)"


def default_compute(model: Any, inputs: Inputs, copies: int) -> tuple[Tensor, Any]:
    """The loss as a Hugging Face model computes it from its inputs."""
    outputs = model(**inputs)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if loss is None:
        raise ValueError("the model returned no loss: pass its labels in `inputs`, or run.loss(inputs, compute=...)")
    return loss, outputs


@dataclass(frozen=True)
class LossRule:
    """How the trainer computes the loss of a micro-batch.

    Attributes:
        compute: ``(model, inputs, copies) -> (loss, outputs)``.
        items: Token count of the whole optimizer step, when ``compute`` divides by it; None for a mean.
        penalty_scale: Factor of the penalties, for a loss already divided over the whole step.
    """

    compute: Compute = default_compute
    items: Tensor | int | None = None
    penalty_scale: float = 1.0


@dataclass(eq=False)
class MicroBatch:
    """What the loss of a micro-batch depends on beside the weights, so that it can be computed once more.

    Attributes:
        inputs: The batch, one copy.
        rule: How the trainer computes its loss.
        number: Its place in the optimizer step, counted from 1.
        random_state: Torch's random state before the task's own forward.
        autocast: The autocast context of that forward.
        sent: Gradient that the loop's backward pass sent into the loss, a 0-d tensor: the loss's share of the step,
            times the factor of a ``GradScaler``. None before that pass.
    """

    inputs: Inputs
    rule: LossRule
    number: int
    random_state: RandomState
    autocast: torch.autocast
    sent: Tensor | None = None

    def listen(self, loss: Tensor) -> None:
        """Take note of what is sent back into the loss."""
        here = weakref.ref(self)  # graphs that somebody keeps must not keep the batch, the Run and its model

        def hook(gradient: Tensor) -> None:
            micro = here()
            if micro is not None:
                micro.sent = gradient if micro.sent is None else micro.sent + gradient

        if loss.requires_grad:
            loss.register_hook(hook)


def autocast(device: torch.device) -> torch.autocast:
    """The autocast context that is on for a device now, or off."""
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


class Step:
    """One micro-batch on its way through the model.

    Attributes:
        run: The run it belongs to.
        model: The model as it is trained, in its wrapper (DDP, FSDP, compiled).
        inputs: The batch, one copy.
        outputs: Outputs of the task's own forward (of the first copy, if there are several), graph alive.
        loss: The task's loss, mean over copies, graph alive.
        index: Optimizer steps taken before this one.
        number: Place of the micro-batch in the optimizer step, counted from 1.
    """

    outputs: Any
    loss: Tensor

    def __init__(self, run: Run, micro: MicroBatch) -> None:
        self.run, self.model, self.inputs = run, run.wrapper, micro.inputs
        if any(m.hidden_states for m in run.methods):
            self.inputs = {**micro.inputs, "output_hidden_states": True}
        self.index, self.number, self.copies = run.index, micro.number, run.copies
        self._rule, self._random_state = micro.rule, micro.random_state
        self._outputs: Sequence[Any] = ()  # of each copy
        self._second: Any = None
        self._forwards = 0

    def arrive(self, loss: Tensor, outputs: Any) -> None:
        """Take what the task's own forward gave."""
        self.loss = loss
        self._outputs = split(outputs, self.copies, batch_size(self.inputs)) if self.copies > 1 else [outputs]
        self.outputs = self._outputs[0]

    def task_loss(self, outputs: Any) -> Tensor:
        """The loss as the trainer computes it (class weights, label smoothing ...), of other outputs of this batch."""
        return self._rule.compute(_Given(self.model, outputs), self.inputs, 1)[0]

    def second(self) -> Any:
        """Outputs under another dropout draw: the second copy of the batch, or one extra forward, made once."""
        if self.copies > 1:
            return self._outputs[1]
        if self._second is None:
            self._second = self.forward()
        return self._second

    def forward(
        self,
        *,
        dropout: Dropout = "fresh",
        add: Mapping[nn.Module, Tensor] | None = None,
        detach: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        **changes: Any,
    ) -> Any:
        """One more forward of this batch, under a forked random state: the task's own dropout never notices.

        Args:
            dropout: "fresh" draws anew. "same" reuses the task's dropout mask, so that the forward takes as many copies
                of the batch.
            add: Tensors that are added to the output of modules at their first call (noise on an embedding).
            detach: Whether the outputs that ``add`` names stop the gradient.
            weights: Weights by name, used instead of the model's own.
            **changes: Inputs that are replaced or added.

        Raises:
            RuntimeError: Reentrant activation checkpointing under DistributedDataParallel, where torch cannot send
                two forwards through one backward; a module of ``add`` that the forward does not call.
        """
        if torch.is_grad_enabled():
            self._check_wrapper()
        copies = self._same(dropout)
        self.run.counted.add(copies, copies if torch.is_grad_enabled() else 0)
        return self._forward(copies, dropout, add or {}, detach, weights, changes)

    def gradient(
        self, module: nn.Module, noise: Tensor, loss: Callable[[Any], Tensor], *, dropout: Dropout = "same"
    ) -> Tensor:
        """Gradient of ``loss(outputs)`` with respect to noise at a module's output; no ``.grad`` is touched.

        Entries that overflow are zero. The loss is scaled by a power of two, so that a very small one does not
        underflow on its way back through half precision.

        Raises:
            RuntimeError: Weights in pieces (FSDP2), whose backward cannot end at an activation.
        """
        self._check_whole()
        copies = self._same(dropout)
        self.run.counted.add(copies, 0)
        noise = noise.detach().requires_grad_()
        with torch.enable_grad():
            return self.slope(loss(self._forward(copies, dropout, {module: noise})), noise, dropout=dropout)

    def slope(self, value: Tensor, noise: Tensor, *, dropout: Dropout = "same", keep: bool = False) -> Tensor:
        """Gradient of a scalar with respect to noise that requires one, and that `forward` added to activations.

        Args:
            value: A scalar computed from the outputs of that forward.
            noise: The noise.
            dropout: The draw of that forward, which says how many copies of the batch go back through the model.
            keep: Whether the graph stays, for a backward pass to the weights later.

        Raises:
            RuntimeError: As for `gradient`.
        """
        self._check_whole()
        self.run.counted.add(0, self._same(dropout) / 2)
        scale = torch.ldexp(torch.ones_like(value.detach()), -torch.frexp(value.detach()).exponent)
        (slope,) = torch.autograd.grad(value * scale, noise, retain_graph=keep)
        return torch.nan_to_num(slope / scale, nan=0.0, posinf=0.0, neginf=0.0)

    def _check_whole(self) -> None:
        if self.run.sharded:
            raise RuntimeError(
                "a gradient with respect to activations cannot be taken through sharded weights (FSDP2): use "
                "DistributedDataParallel, or R3F, whose noise is random"
            )

    def _same(self, dropout: Dropout) -> int:
        """Copies of the batch that a forward needs: the same draw takes the same shape."""
        return self.copies if dropout == "same" else 1

    def _forward(
        self,
        copies: int,
        dropout: Dropout,
        add: Mapping[nn.Module, Tensor],
        detach: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        changes: Inputs | None = None,
    ) -> Any:
        run = self.run
        self._forwards += 1
        inputs = {**self.inputs, **(changes or {})}
        with contextlib.ExitStack() as stack:
            stack.enter_context(run.forked_rng())
            through = any(t.requires_grad for t in add.values())  # gradients go through what is added, see `slope`
            if through or not torch.is_grad_enabled():  # there reentrant checkpointing fails, or warns
                stack.enter_context(_not_reentrant(shards.unwrap(self.model)))
            if dropout == "same":
                self._random_state.restore()
            else:
                torch.manual_seed(run.draw_seed("forward", self._forwards, self.number, rank=True))
            for module, tensor in add.items():
                stack.enter_context(added(module, torch.cat([tensor] * copies), detach))
            outputs = self._call(repeated(inputs, copies) if copies > 1 else inputs, copies, bool(add), weights)
        return split(outputs, copies, batch_size(inputs))[0]

    def _call(self, inputs: Inputs, copies: int, hooked: bool, weights: Mapping[str, Tensor] | None) -> Any:
        # torch would compile anew for each of these hooks; DDP listens to the weights, whoever calls the model
        model: Any = shards.unwrap(self.model) if hooked or weights is not None else self.model
        if weights is not None:
            return torch.func.functional_call(model, dict(weights), kwargs=dict(inputs))
        if inputs.get("labels") is None:
            return model(**inputs)
        return self._rule.compute(model, inputs, copies)[1]  # its loss is divided by the step's count, if the task's is

    def _check_wrapper(self) -> None:
        wrapper = self.model
        if isinstance(wrapper, DistributedDataParallel) and not wrapper.static_graph and _reentrant(wrapper):
            raise RuntimeError(
                "reentrant activation checkpointing under DistributedDataParallel cannot send a second forward through "
                'one backward: set gradient_checkpointing_kwargs={"use_reentrant": False}'
            )

    # ------------------------------------------------------------------ noise

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, length) as the token embedding sees it: several texts a row (multiple choice) are rows of their own.

        Raises:
            UsageError: Inputs without ``input_ids``.
        """
        ids = self.inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise UsageError(
                f"noise on tokens needs input_ids, which this batch lacks (it holds {', '.join(self.inputs)}): give "
                "the model input_ids, or leave out methods that add noise"
            )
        batch, length = ids.flatten(0, -2).shape
        return batch, length

    def zeros(self, width: int) -> Tensor:
        """No noise for every token, (batch, length, width), at least float32."""
        p = next(self.run.model.parameters())
        return torch.zeros((*self.shape, width), device=p.device, dtype=torch.promote_types(p.dtype, torch.float32))

    def draw(
        self, method: Method, width: int, kind: Literal["normal", "uniform"] = "normal", *, copy: int = 0
    ) -> Tensor:
        """Noise for every token, zero at padding: standard normal, or uniform in [-1, 1].

        Of shape (batch, length, width), at least float32, different on each rank, for each micro-batch and for each
        ``copy`` of it, counted from 0.
        """
        label = f"noise {copy}" if copy else "noise"
        noise, generator = self.zeros(width), self.run.rng(method, label, per_rank=True)
        if kind == "normal":
            return self.unpadded(noise.normal_(generator=generator))
        return self.unpadded(noise.uniform_(-1, 1, generator=generator))

    @property
    def real(self) -> Tensor | None:
        """(batch, length), false at padding; None when the inputs do not tell."""
        mask, ids = self.inputs.get("attention_mask"), self.inputs.get("input_ids")
        if not isinstance(mask, Tensor) or mask.dim() != (2 if ids is None else ids.dim()):
            return None
        return mask.flatten(0, -2).bool()

    def unpadded(self, values: Tensor) -> Tensor:
        """(batch, length, width) values with zeros at padding."""
        return values if self.real is None else values * self.real.unsqueeze(-1)

    def lengths(self) -> Tensor:
        """Number of real tokens of each example, of shape (batch,)."""
        return self.unpadded(self.zeros(1) + 1).sum((1, 2))

    def per_example(self, values: Tensor) -> Tensor:
        """Mean over the real tokens of each example: (batch, length) -> (batch,)."""
        return values.mean(1) if self.real is None else (values * self.real).sum(1) / self.real.sum(1).clamp(min=1)

    # ------------------------------------------------------------------ what a penalty compares, and its mean

    def logits(self, outputs: Any, method: Method) -> Tensor:
        """The predictions in a model's outputs of this batch, classes last: what ``method`` compares; `logits_of`."""
        return logits_of(outputs, self.inputs, method)

    def distances(
        self, first: Tensor, second: Tensor, divergence: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """How far two sets of logits of this batch lie apart; see `distances`."""
        return distances(self.model, self.inputs, first, second, divergence)

    def disagreement(
        self, first: Tensor, second: Tensor, divergence: Callable[[Tensor, Tensor], Tensor] = symmetric_kl
    ) -> Tensor:
        """Mean of `distances` over the examples, or the labelled tokens."""
        return self.mean(*self.distances(first, second, divergence))

    def mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean of per-example (batch,) or per-token (batch, length) values, right under accumulation.

        With a ``mask`` and a loss that the trainer divides by the token count of the whole optimizer step, the
        penalty is divided by that count too, so that short micro-batches weigh less, as they do in the loss.
        """
        if mask is None:
            return values.mean()
        total = (values * mask).sum()
        if self._rule.items is None:
            return total / mask.sum().clamp(min=1)
        return total / self._rule.items / self._rule.penalty_scale

    def as_penalty(self, loss: Tensor) -> Tensor:
        """A `task_loss` without the factor that `Run.loss` gives to penalties: the trainer has divided it already."""
        return loss / self._rule.penalty_scale


def logits_of(outputs: Any, inputs: Inputs, method: object) -> Tensor:
    """The predictions in a model's outputs, classes last, which a method looks at.

    They are the entry ``"logits"``, or the first tensor of a tuple that has a class axis. Question answering has two
    sets of logits, of where an answer starts and of where it ends: (batch, 2, length).

    Args:
        outputs: What the model returned, a mapping or a tuple.
        inputs: What it was given.
        method: Who asks, for the message.

    Raises:
        UsageError: The outputs hold no logits.
    """
    if isinstance(outputs, Mapping):
        tensors = [t for t in [outputs.get("logits")] if isinstance(t, Tensor)]
        ends = [t for t in map(outputs.get, ("start_logits", "end_logits")) if isinstance(t, Tensor)]
    else:
        tensors = [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1]
        ends = tensors[:2] if "start_positions" in inputs else []
    if len(ends) == 2:
        return torch.stack(ends, 1)
    if tensors:
        return tensors[0]
    name = type(method).__name__
    held = ", ".join(map(str, outputs)) if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
    raise UsageError(
        f"{name} looks at logits, and the model's outputs hold none ({held}): return them as 'logits', or in a tuple "
        f"after the loss, or leave {name} out"
    )


def without_peft(model: Any) -> Any:
    """The transformers model inside PEFT's, which has its adapters in it or gets its prompt from outside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Given(nn.Module):
    """Stands for a model whose outputs are already there."""

    def __init__(self, model: Any, outputs: Any) -> None:
        super().__init__()
        inner: Any = without_peft(shards.unwrap(model))
        self._name, self._outputs = inner._get_name(), outputs

    def forward(self, **inputs: Any) -> Any:
        outputs = self._outputs
        if isinstance(outputs, Mapping) and outputs.get("loss") is not None:  # trainers scale it in place
            return type(outputs)(**{**outputs, "loss": outputs["loss"].clone()})
        return outputs

    def _get_name(self) -> str:
        return self._name


def eager(model: nn.Module) -> nn.Module:
    """The model without ``torch.compile``, which would compile anew for each new hook; other wrappers stay."""
    return getattr(model, "_orig_mod", model)


@contextlib.contextmanager
def added(module: nn.Module, tensor: Tensor, detach: bool = False) -> Iterator[None]:
    """Add a tensor to the output of a module's first call (an encoder-decoder may call its embedding twice)."""
    calls = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            return None
        hidden, *rest = output if isinstance(output, tuple | list) else (output,)
        noise = _as_padded(tensor, hidden, module)
        moved = ((hidden.detach() if detach else hidden) + noise).to(hidden.dtype)  # summed in the type of the tensor
        return type(output)((moved, *rest)) if isinstance(output, tuple | list) else moved

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise RuntimeError(
            f"nothing could be added to {type(module).__name__}, which this forward does not call: pass input_ids, "
            "not inputs_embeds. A model that calls its modules through their forward() takes no hooks: leave out "
            "methods that add noise"
        )


def _as_padded(noise: Tensor, hidden: Tensor, module: nn.Module) -> Tensor:
    """Noise in the shape of what it is added to: zeros on the right, where a model pads its inputs (Longformer).

    Raises:
        UsageError: The module's output has another layout than (batch, length, width).
    """
    if noise.shape == hidden.shape:
        return noise
    more = hidden.size(1) - noise.size(1) if hidden.dim() == 3 else -1
    if more < 0 or noise.shape[::2] != hidden.shape[::2]:
        raise UsageError(
            f"noise needs outputs of shape (batch, length, width), here {tuple(noise.shape)}, and those of "
            f"{type(module).__name__} are of shape {tuple(hidden.shape)}: leave out methods that add noise"
        )
    return nn.functional.pad(noise, (0, 0, 0, more))


def full(values: Tensor) -> Tensor:
    """In at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def perturbed(model: nn.Module) -> nn.Module:
    """The module at whose output noise is added: the token embedding.

    Raises:
        ValueError: No token embedding, several of them, or one whose output has the batch second (XLNet).
    """
    check_layout(model, "noise on embeddings")
    return input_embedding(model)


def width(embedding: Any) -> int:
    """Features of a token embedding."""
    return int(embedding.weight.shape[-1])


def _reentrant(model: nn.Module) -> list[tuple[Any, functools.partial]]:
    """The modules of a transformers model under reentrant activation checkpointing, and what each is called through."""
    functions = [(m, getattr(m, "_gradient_checkpointing_func", None)) for m in model.modules()]
    return [(m, f) for m, f in functions if isinstance(f, functools.partial) and f.keywords.get("use_reentrant")]


@contextlib.contextmanager
def _not_reentrant(model: nn.Module) -> Iterator[None]:
    """Reentrant activation checkpointing refuses `torch.autograd.grad`: the other kind in its place."""
    held = _reentrant(model)
    for module, function in held:
        module._gradient_checkpointing_func = functools.partial(function, use_reentrant=False)
    try:
        yield
    finally:
        for module, function in held:
            module._gradient_checkpointing_func = function


Divergence = Callable[[Tensor, Tensor], Tensor]  # of two sets of logits (..., classes) -> (...)


def squares(first: Tensor, second: Tensor, divergence: Divergence) -> Tensor:
    """Mean squared difference of numbers (batch, outputs) -> (batch,)."""
    return (first - second).square().mean(-1)


def outcomes(first: Tensor, second: Tensor, divergence: Divergence) -> Tensor:
    """Divergence of the two outcomes of each label, right or wrong: (batch, labels) -> (batch, labels)."""
    return divergence(*(torch.stack((logits, torch.zeros_like(logits)), -1) for logits in (first, second)))


NUMBERS = "regression"  # `problem_type` of a model whose outputs are numbers
PROBLEM_TYPES: dict[str | None, Callable[[Tensor, Tensor, Divergence], Tensor]] = {
    NUMBERS: squares,
    "multi_label_classification": outcomes,
}  # of a transformers config


def problem_type(model: Any) -> str | None:
    """What the config of a transformers model, in its wrappers, says about its labels; None if it says nothing."""
    return getattr(getattr(without_peft(shards.unwrap(model)), "config", None), "problem_type", None)


def distances(
    model: Any, inputs: Inputs, first: Tensor, second: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor | None]:
    """How far two sets of logits of a batch lie apart, per example, or per token with a mask of labelled ones.

    One output (regression) is compared by its squared difference, more of them by ``divergence`` along the last axis.
    Where each class is right or wrong on its own (several labels a row), it compares the two outcomes of each class:
    (batch, classes). If the config does not say so, a float label for each class does, as in transformers, whose models
    write it into their config only where they compute the loss themselves. At least float32.
    """
    first, second = full(first), full(second)
    labels, kind = inputs.get("labels"), problem_type(model)
    if kind is None and isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == first.shape:
        kind = "multi_label_classification"
    compare = squares if first.size(-1) == 1 else PROBLEM_TYPES.get(kind)
    if compare is not None:
        return compare(first, second, divergence), None
    if first.dim() == 2 or labels is None or labels.dim() < 2 or labels.is_floating_point():
        return divergence(first, second), None
    first, second, labels = aligned(model, first, second, labels)
    return divergence(first, second), labels != -100


def aligned(model: Any, first: Tensor, second: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token logits and the labels they are scored against: causal models predict the next token."""
    if shifts_labels(shards.unwrap(model)):
        return first[:, :-1], second[:, :-1], labels[:, 1:]
    return first, second, labels


def shifts_labels(model: Any) -> bool:
    """Whether a transformers model scores the logits of a token against the label of the next one."""
    model = without_peft(model)
    kind, name = getattr(model, "loss_type", None), type(model).__name__
    if kind is None:  # GPT2LMHeadModel and its like; XLNet, XLM and FlauBERT have labels where they are predicted
        return name.endswith("LMHeadModel") and not name.startswith("XLNet") and "With" not in name
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return kind == "ForCausalLM" or (kind.endswith("ForConditionalGeneration") and not decodes)


def repeated(inputs: Inputs, copies: int) -> dict[str, Any]:
    """The batch several times over along its first axis; what is no batch-first tensor is passed on."""
    size = batch_size(inputs)
    return {
        k: torch.cat([v] * copies) if isinstance(v, Tensor) and v.dim() and v.size(0) == size else v
        for k, v in inputs.items()
    }


@contextlib.contextmanager
def one_row(model: Any, inputs: Inputs) -> Iterator[None]:
    """Around a pass of several copies of a batch: say why a model without a padding token refuses copies of one row.

    Raises:
        UsageError: The model refuses.
    """
    try:
        yield
    except ValueError as error:
        padded = getattr(getattr(model, "config", None), "pad_token_id", None) is not None
        if padded or batch_size(inputs) > 1 or "pad" not in str(error):
            raise
        raise UsageError(
            f"a batch of one row passes as several copies, and {type(model).__name__} has no padding token, without "
            f"which it takes one row at a time ({one_line(error)}): set model.config.pad_token_id, or leave out "
            "methods that compare copies (RDrop, ROSEFirst, ROSEEnsemble)"
        ) from error


def batch_size(inputs: Inputs) -> int:
    """Examples of a batch: the first axis of its first tensor that has one."""
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim():
            return value.size(0)
    raise ValueError(f"inputs must hold a tensor with a batch axis, got keys {sorted(inputs)}")


def split(outputs: Any, copies: int, size: int) -> list[Any]:
    """Outputs of a repeated batch, one object of the same kind per copy; without its loss, the mean over copies."""
    if copies == 1:
        return [outputs]

    def take(value: Any, i: int) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.size(0) == copies * size:
            return value[i * size : (i + 1) * size]
        if isinstance(value, tuple | list):
            return type(value)(take(v, i) for v in value)
        return value

    if isinstance(outputs, Mapping):
        return [type(outputs)(**{k: take(v, i) for k, v in outputs.items() if k != "loss"}) for i in range(copies)]
    return [take(outputs, i) for i in range(copies)]
