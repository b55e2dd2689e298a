"""Tiny models, batches and Trainer arguments that several test files share."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steadytune import Run, Step
from steadytune.methods.layer_drop import Skip
from steadytune.methods.vibert import GaussianBottleneck

VOCABULARY, LENGTH = 64, 12  # LENGTH: of the longest row
USUAL_KILLS = 6
KILLS = int(
    os.environ.get("STEADYTUNE_KILLS", USUAL_KILLS)
)  # of each test that kills processes; every one costs seconds


def bert(*, labels: int = 3, dropout: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A classifier of two layers, the same weights for the same seed."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(config).to(dtype).train()


def llama(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A causal language model of two layers with tied embeddings; its loss is a sum over tokens / their count."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def rows(n: int, *, equal: bool = False, tokens: bool = False, labels: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Distinct random examples; ``tokens``: labels are the ids, with a prompt of random length left out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    examples = []
    for i in range(n):
        length = LENGTH if equal else int(draw(4, LENGTH + 1, 1))
        ids = draw(3, VOCABULARY, length).tolist()
        prompt = int(draw(0, length - 2, 1))
        target: Any = [-100] * prompt + ids[prompt:] if tokens else i % labels
        examples.append({"input_ids": ids, "attention_mask": [1] * length, "labels": target})
    return examples


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad on the right to the longest of the batch."""
    width = max(len(e["input_ids"]) for e in examples)

    def padded(key: str, filler: int) -> Tensor:
        return torch.tensor([e[key] + [filler] * (width - len(e[key])) for e in examples])

    tokens = isinstance(examples[0]["labels"], list)
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": padded("attention_mask", 0),
        "labels": padded("labels", -100) if tokens else torch.tensor([e["labels"] for e in examples]),
    }


def batches(n: int, size: int = 4, **options: Any) -> list[dict[str, Tensor]]:
    """``n`` padded batches of random examples."""
    examples = rows(n * size, **options)
    return [collate(examples[i * size : (i + 1) * size]) for i in range(n)]


@functools.cache
def freeze_imports() -> None:
    """The Trainer collects garbage in each `train()`: what imports made need not be looked at every time."""
    gc.collect()
    gc.freeze()


def arguments(folder: Any, **changes: Any) -> transformers.TrainingArguments:
    """Trainer arguments for the CPU that write nothing unless told."""
    freeze_imports()
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**{**values, **changes})


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are saved, as they are now; what methods put beside the model belongs to their state.

    In a step too, when ``model.state_dict()`` is an error: the parts of the model are asked for theirs.
    """
    own = {name for name, _ in model.named_parameters(recurse=False)}
    saved = own | {f"{part}.{name}" for part, child in model.named_children() for name in child.state_dict()}
    return {name: p.detach().clone() for name, p in model.named_parameters() if name in saved}


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors of a tree of dicts and lists, by path."""
    if isinstance(value, Tensor):
        return {path: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {k: t for key, v in items for k, t in tensors(v, f"{path}/{key}").items()}


def assert_same(a: Any, b: Any, *, atol: float | None = None) -> None:
    """Two trees hold the same tensors: bit for bit, types included, or to ``atol``."""
    a, b = tensors(a), tensors(b)
    assert a
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, (name, a[name].dtype, b[name].dtype)
        if atol is None or not a[name].is_floating_point():
            assert torch.equal(a[name], b[name]), name
        else:
            assert (a[name] - b[name]).abs().max() <= atol, (name, float((a[name] - b[name]).abs().max()))


def train(run: Run, data: Iterable[Mapping[str, Any]]) -> Run:
    """One optimizer step per batch."""
    for batch in data:
        run.loss(batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run


def differs(a: Any, b: Any) -> bool:
    """Whether some tensor differs of those that two trees share; one may have more (adapters)."""
    a, b = tensors(a), tensors(b)
    shared = a.keys() & b.keys()
    assert shared in (a.keys(), b.keys())
    return any(not torch.equal(a[name], b[name]) for name in shared)


def is_extra_pass() -> bool:
    """Whether a forward has a seed of its own: tests seed with small numbers, steadytune with 63-bit hashes."""
    return torch.initial_seed() >= 2**32


@functools.cache
def hashed_mask(example: str, place: int, p: float, width: int) -> Tensor:
    digest = hashlib.blake2b(f"{example} {place}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(LENGTH, width, generator=generator) >= p


class HashedDropout(nn.Module):
    """Dropout whose mask depends on the example's tokens, its copy in the batch and the place, and on nothing else.

    So a batch of 16 and four of 4, padded alike or not, drop the same activations. A pass with a seed of its own, as
    `Run.gradient` makes, drops others.
    """

    def __init__(self, p: float, place: int, examples: list[str]) -> None:
        super().__init__()
        self.p, self.place, self.examples = p, place, examples

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = [hashed_mask(example, self.place, self.p, x.size(-1)) for example in self.examples]
        masks = [mask[: x.size(1)] if x.dim() == 3 else mask[0] for mask in kept]
        return x * torch.stack(masks).to(x.dtype) / (1 - self.p)


def hash_dropout(model: Any, p: float = 0.2) -> Any:
    """Put `HashedDropout` in place of every ``nn.Dropout``; where there is none, after the token embedding."""
    examples: list[str] = []

    def remember(module: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        seen: Counter[str] = Counter()
        examples.clear()
        draw = " again" if is_extra_pass() else ""
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            content = str(ids[mask.bool()].tolist())
            seen[content] += 1
            examples.append(f"{content} copy {seen[content]}{draw}")

    model.register_forward_pre_hook(remember, with_kwargs=True)
    place = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout) and type(module).__name__.endswith("Attention"):
                child.p = 0.0  # only its number is used, inside the attention kernel
            elif isinstance(child, nn.Dropout):
                setattr(module, name, HashedDropout(p, place := place + 1, examples))
    if not place:
        model.hashed = HashedDropout(p, 0, examples)
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: model.hashed(output))
    return model


@functools.cache
def hashed_noise_of(example: str, width: int, dtype: torch.dtype) -> Tensor:
    digest = hashlib.blake2b(example.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(LENGTH, width, generator=generator, dtype=dtype)


@contextlib.contextmanager
def hash_noise() -> Iterator[None]:
    """Noise that depends on the example's tokens and on nothing else, as `hash_dropout` does for dropout."""

    def draw(step: Step, method: Any, width: int, kind: str = "normal", *, copy: int = 0) -> Tensor:
        blank, real = step.zeros(width), step.inputs["attention_mask"].bool()
        again = f" copy {copy}" if copy else ""
        contents = [str(ids[mask].tolist()) + again for ids, mask in zip(step.inputs["input_ids"], real, strict=True)]
        return step.unpadded(torch.stack([hashed_noise_of(c, width, blank.dtype)[: blank.size(1)] for c in contents]))

    def around(bottleneck: GaussianBottleneck, mean: Tensor) -> Tensor:
        return torch.cos(10 * mean.detach())

    def skipping(hook: Skip, hidden: Tensor) -> Tensor:
        return torch.sin(1e4 * hidden.detach()[:, 0].sum(-1)).abs()

    before = Step.draw, GaussianBottleneck.draw, Skip.draw
    Step.draw, GaussianBottleneck.draw, Skip.draw = draw, around, skipping  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Step.draw, GaussianBottleneck.draw, Skip.draw = before  # type: ignore[method-assign]


def interrupt(model: nn.Module, after: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[], None]:
    """Raise in the middle of the ``after``-th training forward from now (1-based); returns what takes it back.

    Passes of `Run.gradient` are not counted.
    """
    calls = 0

    def hook(module: nn.Module, args: tuple) -> None:
        nonlocal calls
        counts = model.training and not is_extra_pass()
        calls += counts
        if calls == after and counts:
            raise error

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return last.register_forward_pre_hook(hook).remove


class Net(nn.Module):
    """Two linear layers in float64 that answer as Hugging Face models do: ``loss`` first, then ``logits``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 5, dtype=torch.float64)
        self.last = nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(torch.tanh(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def points(n: int, size: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """``n`` batches for `Net`."""
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(size, 6, dtype=torch.float64, generator=g),
            "labels": torch.randint(3, (size,), generator=g),
        }
        for _ in range(n)
    ]


def floating(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]


class OnlyFloat32(TorchDispatchMode):
    """Raise at an operation that widens to float64 where it is, as an Apple GPU does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        wide = any(t.dtype == torch.float64 for t in floating(result))
        if wide and all(t.dtype != torch.float64 for t in floating([args, kwargs])):
            moved_first = {frame.name for frame in traceback.extract_stack()} & {"in_float64"}
            assert moved_first, f"{func} makes float64, which not all devices have"
        return result
