"""Make, merge, write and read models with adapters of PEFT or of this package."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..core.anatomy import anatomy
from ..errors import UsageError, one_line
from ..heads.pooling import pooling_block_names
from ..methods.adapters import FILE as ADAPTERS
from ..methods.adapters import adapter_size, load_adapters, save_adapters
from ..methods.levi import FILE as LEVI
from ..methods.levi import has_levi, load_levi, save_levi
from .pretrained import quiet

logger = logging.getLogger("steadytune")


LORA_ABOVE = 1_000_000_000  # number of parameters above which adapters are the default
PEFT_CONFIG = "adapter_config.json"  # file by which a folder of PEFT is known


def adapted(model: PreTrainedModel, lora: bool | None, kind: str | None = None) -> nn.Module:
    """Add adapters to a model, if wanted or if it is too large to train whole; needs the extra ``peft``.

    Args:
        model: The model, which is changed in place.
        lora: True is the kind ``"lora"``; None is ``"lora"`` for models with more than a billion weights.
        kind: ``"lora"``, of rank 16, alpha 32 and dropout 0.05 on all linear layers (Hu et al., ICLR 2022, arXiv
            2106.09685; on all layers as Dettmers et al., NeurIPS 2023, arXiv 2305.14314); ``"ia3"``, factors of keys,
            values and feed-forward (Liu et al., NeurIPS 2022, arXiv 2205.05638); ``"prefix"``, 20 keys and values of
            each layer (Li and Liang, ACL 2021, arXiv 2101.00190); ``"prompt"``, 20 vectors before the text (Lester et
            al., EMNLP 2021, arXiv 2104.08691). None: no adapters, unless `lora` says so.

    Raises:
        UsageError: peft is not installed, or has no such adapters for this model.
    """
    kind = adapter_kind(model, lora, kind)
    if kind is None:
        return model
    size = sum(p.numel() for p in model.parameters())
    try:
        import peft
    except ImportError as error:
        raise UsageError(
            f"a model of {size / 1e9:.1f} billion weights is trained with PEFT's {kind}: pip install "
            "'steadytune[peft]', or train all weights with lora=False (--no-lora)."
        ) from error
    settings: dict[str, dict[str, Any]] = {
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"},
        "ia3": {},
        "prefix": {"num_virtual_tokens": 20},
        "prompt": {"num_virtual_tokens": 20},
    }
    configs = {
        "lora": peft.LoraConfig,
        "ia3": peft.IA3Config,
        "prefix": peft.PrefixTuningConfig,
        "prompt": peft.PromptTuningConfig,
    }
    pooled = pooling_block_names(model)  # adapted as the blocks below it, among which it stands
    parts = anatomy(model).items()
    heads = {name.split(".")[0] for name, part in parts if part.head and name not in pooled}
    drawn = {name.rpartition(".")[0] for name, part in parts if part.drawn and not part.head}
    try:  # PEFT knows two names of heads and would freeze, and never save, the others
        whole = sorted(heads | drawn)
        config = configs[kind](task_type=peft.TaskType.SEQ_CLS, modules_to_save=whole, **settings[kind])
        wrapped: Any = peft.get_peft_model(model, config)
    except (ValueError, KeyError, AttributeError) as error:
        raise unfit(model, kind, one_line(error)[:300]) from error
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    logger.info("PEFT's %s: %d weights are trained instead of %d", kind, trained, size)
    return wrapped


def adapter_kind(model: nn.Module, lora: bool | None, kind: str | None) -> str | None:
    """The kind of adapters that `adapted` adds to a model, or None."""
    large = sum(p.numel() for p in model.parameters()) >= LORA_ABOVE
    return "lora" if kind is None and (lora or (lora is None and large)) else kind


def unfit(model: Any, kind: str | None, why: str) -> UsageError:
    """Error of a model that fails with adapters of this kind, or, without a kind, on its longest row."""
    if kind is None:
        return UsageError(f"a {model.config.model_type} model fails on the longest row ({why}): lower max_length.")
    return UsageError(
        f"peft={kind!r} does not work with a {model.config.model_type} model: {why} Use lora, or leave it out."
    )


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain model, with adapters merged into the weights if possible (LoRA, IA3)."""
    unload: Any = getattr(model, "merge_and_unload", None)
    return unload() if unload else model  # type: ignore[return-value]


def write_model(model: Any, folder: str | Path) -> None:
    """Write a plain model directory; if adapters cannot be merged, only the trained weights; or two networks."""
    if has_levi(model):
        save_levi(folder, model)
    elif adapter_size(model) is None:
        model.save_pretrained(folder)  # PEFT's writes its adapters
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_adapters(folder, model)


def read_model(folder: str | Path, base: Callable[[], PreTrainedModel]) -> nn.Module:
    """Read a folder of `write_model` in float32; ``base`` loads the pre-trained model for adapters."""
    with quiet():
        if Path(folder, LEVI).is_file():
            return load_levi(folder)
        if Path(folder, ADAPTERS).is_file():
            return load_adapters(folder, base())
        if Path(folder, PEFT_CONFIG).is_file():
            from peft import PeftModel

            return PeftModel.from_pretrained(base(), folder)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise UsageError(f"{folder} does not hold all weights of its model (missing: {missing}).")
    return model
