"""Anatomy of a model: kind and transformer block of each parameter, and whether it belongs to a new head.

All facts come from the modules, not from a table of architectures. Parameters are matched by identity, so that wrappers
(DDP's `module.`, torch.compile's `_orig_mod.`, PEFT's `base_model.model.`) change names only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Kind = Literal["linear", "embedding", "norm", "bias", "other"]
DRAWN = "drawn_anew"  # attribute of a module whose weights the checkpoint lacks
POOLING = "pooling_block"  # config entry: the last block was added for pooling, see `steadytune.heads.pooling`


@dataclass(frozen=True, slots=True)
class Part:
    """Facts about one parameter.

    Attributes:
        kind: `"linear"`: a matrix of `nn.Linear` (LoRA's pair and its base too), of GPT-2's `Conv1D`, or of
            `nn.MultiheadAttention`. `"embedding"`: a table of `nn.Embedding` (token, position, type, relative
            position). A language-model head tied to the token table is that table, hence `"embedding"`: the linear
            weights do not contain it. `"norm"`: all that a normalisation layer owns, its bias too. `"bias"`: any other
            `bias`. `"other"`: the rest (recurrent and convolution kernels, stacked experts, XLNet's attention).
        block: Index of the transformer block, counted from the input; None outside the blocks and in heads. Decoder
            blocks continue after the encoder's (BART-base: 0-5 and 6-11). Layers that share weights count once
            (ALBERT: 0).
        head: Whether pre-trained checkpoints do not contain it; see the rule in `anatomy`.
        input_dim: The axis of a linear weight that runs over input features: 0 for `Conv1D`, which computes `x @ W`.
        drawn: Whether it belongs to a module marked as `DRAWN`: the checkpoint lacks it, and it is as new as a head.
    """

    kind: Kind
    block: int | None
    head: bool
    input_dim: int = 1
    drawn: bool = False


def anatomy(model: nn.Module) -> dict[str, Part]:
    """Kind, block and head of each parameter, with the names and in the order of `model.named_parameters()`.

    A tensor with several names occurs once, under its first name.

    A parameter is a head if it lies outside the base model of a transformers model (`base_model_prefix`), or, where a
    transformers model is a part of somebody's own module, outside that part. So BERT's pooler is no head, DeBERTa's is.
    Pre-training heads are no heads: all of a model with output embeddings (masked, causal, seq2seq LM) or named
    `ForPreTraining` or `ForNextSentencePrediction`, and ModernBERT's `head`, unless the module is marked as `DRAWN`:
    checkpoints of the language model hold it, those of the body alone do not. LoRA matrices belong to the layer they
    adapt. A model that contains no transformers model has no head. A block that was added for pooling is a head and no
    block: no checkpoint of the kind holds it.
    """
    kinds: dict[int, Kind] = {}
    transposed: set[int] = set()
    drawn: set[int] = set()
    for module in model.modules():
        if getattr(module, DRAWN, False):
            drawn.update(id(p) for p in module.parameters())
        for leaf, p in module.named_parameters(recurse=False):
            kind = _kind(module, leaf, p.dim())
            if kind == "linear" and "Conv1D" in _classes(module):
                transposed.add(id(p))
            if kind == "embedding" or id(p) not in kinds:  # a tied table is an embedding in any order of its names
                kinds[id(p)] = kind
    body = _body(model) - {id(p) for module in _pooling_blocks(model) for p in module.parameters()}
    owners: dict[int, int] = {}
    for index, modules in enumerate(blocks(model)):
        for p in (p for module in modules for p in module.parameters()):
            owners.setdefault(id(p), index)
    return {
        name: Part(kinds[id(p)], owners.get(id(p)), id(p) not in body, 0 if id(p) in transposed else 1, id(p) in drawn)
        for name, p in model.named_parameters()
    }


def blocks(model: nn.Module) -> list[list[nn.Module]]:
    """Modules of each transformer block, from the input on: one, or several if a model splits its blocks (XLM)."""
    body, added = _body(model), _pooling_blocks(model)
    all_blocks = [block for root in _roots(model) or [model] for block in _blocks(root, body)]
    return [block for block in all_blocks if block[0] not in added]


def depths(model: nn.Module) -> dict[str, int]:
    """Depth of each parameter in the model, with the names of `anatomy`.

    It is the index of the block. It is -1 for embeddings, for modules named after them (BART registers its
    `layernorm_embedding` after its blocks), and for everything before the blocks. It is the number of blocks for heads
    and for everything after the blocks (pooler, last norm). A module between blocks (the end of an encoder before a
    decoder) has the depth of the block before it.
    """
    parts, count = anatomy(model), len(blocks(model))
    last = max((i for i, part in enumerate(parts.values()) if part.block is not None), default=-1)
    by_name, here = {}, -1
    for i, (name, part) in enumerate(parts.items()):
        if part.head or part.block is not None:
            by_name[name] = count if part.block is None else part.block
        elif part.kind == "embedding" or any("emb" in word for word in name.split(".")[-2:]):
            by_name[name] = -1
        else:
            by_name[name] = count if i > last else here
        here = here if part.block is None else part.block
    return by_name


def input_embedding(model: nn.Module) -> nn.Module:
    """Find the module whose output is the token embedding: the encoder's, if encoder and decoder have their own.

    It is `get_input_embeddings()` if the model has that, otherwise the `nn.Embedding` with most rows. Its output has
    the shape (batch, length, width), or (length, batch, width) in XLNet.

    Raises:
        ValueError: There is no token embedding, or more than one and nothing says which.
    """
    name = type(model).__name__
    owners = _roots(model) or [m for m in [model] if hasattr(m, "get_input_embeddings")]
    if len(owners) > 1:
        owner_names = ", ".join(type(owner).__name__ for owner in owners)
        raise ValueError(f"{name} contains {len(owners)} transformers models ({owner_names}): pass one of them")
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if owners:
        try:
            chosen: nn.Module = owners[0].get_input_embeddings()
        except NotImplementedError as error:  # CANINE hashes characters into several tables
            raise ValueError(f"{name} has no token embedding: get_input_embeddings() is not implemented") from error
        inner = set(chosen.modules())
        # BART and T5 return `shared`, which has the table but is never called; its first twin is the encoder's
        twins = [m for m in tables if m.weight is getattr(chosen, "weight", None) and m not in inner]
        return twins[0] if twins else chosen
    rows = max((m.num_embeddings for m in tables), default=0)
    largest = [m for m in tables if m.num_embeddings == rows]
    if len(largest) != 1:
        owner_names = f"{len(largest)} embeddings of {rows} rows" if largest else "no nn.Embedding"
        raise ValueError(f"{name} has {owner_names}: define get_input_embeddings() to return the module of the tokens")
    return largest[0]


def _classes(module: nn.Module) -> list[str]:
    """Names of a module's class and its bases, so that subclasses count."""
    return [cls.__name__ for cls in type(module).__mro__]


def _kind(owner: nn.Module, leaf: str, dim: int) -> Kind:
    """Kind of the parameter `owner.leaf`."""
    classes = _classes(owner)
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if any(name.endswith(("Norm", "NormGated")) for name in classes):
        return "norm"
    if leaf in ("bias", "in_proj_bias"):
        return "bias"
    linear = isinstance(owner, nn.Linear) or "Conv1D" in classes
    if dim == 2 and (linear or isinstance(owner, nn.MultiheadAttention)):
        return "linear"
    return "other"


def _roots(module: nn.Module) -> list[Any]:
    """The outermost transformers models, found by a class attribute, because wrappers pass instance attributes on."""
    if hasattr(type(module), "base_model_prefix"):
        return [module]
    return [root for child in module.children() for root in _roots(child)]


def _body(model: nn.Module) -> set[int]:
    """Identities of the parameters in pre-trained checkpoints; all parameters without a transformers model."""
    roots = _roots(model)
    body_weights = (p for root in roots for p in _pretrained(root)) if roots else model.parameters()
    return {id(p) for p in body_weights}


def _pretrained(root: Any) -> Iterator[nn.Parameter]:
    """The parameters of a transformers model that its pre-trained checkpoints hold."""
    name, library = type(root).__name__, type(root).__module__.startswith("transformers.")
    base = getattr(root, root.base_model_prefix, None)
    inner = [model for child in root.children() for model in _roots(child)]
    if root.get_output_embeddings() is not None or name.endswith(("ForPreTraining", "ForNextSentencePrediction")):
        yield from root.parameters()
    elif isinstance(base, nn.Module):
        yield from base.parameters()
        for child in root.children():
            if type(child).__name__.endswith("PredictionHead") and not getattr(child, DRAWN, False):
                yield from child.parameters()
    elif inner and (
        "For" in name or not library
    ):  # T5ForQuestionAnswering; a PreTrainedModel of the user around a base
        for model in inner:
            yield from _pretrained(model)
    else:
        yield from root.parameters()


def _blocks(root: nn.Module, body: set[int]) -> list[list[nn.Module]]:
    """Modules of each block, from the input on: the entries of the body's outermost lists of layers."""
    stacks = [stack for stack in _stacks(root) if all(id(p) in body for p in stack.parameters())]
    sizes = [sum(p.numel() for p in stack.parameters()) / len(stack) for stack in stacks]
    stacks = [stack for stack, size in zip(stacks, sizes, strict=True) if size >= max(sizes) / 8]
    parents = {id(child): module for module in root.modules() for child in module.children()}
    blocks: list[list[nn.Module]] = []
    done: set[nn.Module] = set()
    for stack in stacks:
        parent = parents.get(id(stack))
        beside = [stack]
        # XLM and FlauBERT cut their blocks into lists side by side: attentions, norms, ffns. In somebody's own module
        # two such lists may as well be an encoder and a decoder: they are left in sequence.
        if hasattr(type(root), "base_model_prefix") and parent is not None and not isinstance(parent, nn.ModuleList):
            beside = [m for m in parent.children() if isinstance(m, nn.ModuleList) and len(m) == len(stack)]
        if stack not in done:
            blocks += [list(layers) for layers in zip(*beside, strict=True)]
        done.update(beside)
    return blocks


def _pooling_blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks that were added for pooling, as marked in configs."""
    body = _body(model)
    pooled = [root for root in _roots(model) if getattr(root.config, POOLING, None) is not None]
    return [_blocks(root, body)[-1][0] for root in pooled]


def _stacks(module: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of layers. A list of single matrices (several heads, convolutions) does not count."""
    if isinstance(module, nn.ModuleList) and not any(isinstance(entry, nn.ModuleList) for entry in module):
        matrices = sum(p.dim() > 1 for p in module.parameters())
        return [module] if matrices >= 2 * len({*module}) > 0 else []
    return [stack for child in module.children() for stack in _stacks(child)]
