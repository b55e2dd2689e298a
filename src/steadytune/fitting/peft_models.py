"""Models with adapters of PEFT or of our own: made, merged, written and read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..core.anatomy import anatomy
from ..errors import UsageError, one_line
from ..methods.adapters import FILE as ADAPTERS
from ..methods.adapters import adapter_size, load_adapters, save_adapters
from .pretrained import quiet

logger = logging.getLogger("steadytune")


LORA_ABOVE = 1_000_000_000  # parameters from which on adapters are trained unless told otherwise
PEFT_CONFIG = "adapter_config.json"  # what makes a folder one of PEFT's


def adapted(model: PreTrainedModel, lora: bool | None, kind: str | None = None) -> nn.Module:
    """The model with adapters and a trainable head, if wanted or too large to train whole; needs the extra ``peft``.

    Args:
        model: changed in place.
        lora: the same as the kind ``"lora"``; None: for models of more than a billion weights.
        kind: ``"lora"``, of rank 16, alpha 32 and dropout 0.05 on all linear layers (Hu et al., ICLR 2022, arXiv
            2106.09685; on all layers as Dettmers et al., NeurIPS 2023, arXiv 2305.14314); ``"ia3"``, factors of keys,
            values and feed-forward (Liu et al., NeurIPS 2022, arXiv 2205.05638); ``"prefix"``, 20 keys and values of
            each layer (Li and Liang, ACL 2021, arXiv 2101.00190); ``"prompt"``, 20 vectors before the text (Lester et
            al., EMNLP 2021, arXiv 2104.08691). None: no adapters, unless `lora` says so.

    Raises:
        UsageError: peft is not installed, or has no such adapters for this model.
    """
    size = sum(p.numel() for p in model.parameters())
    if kind is None and (lora is False or (lora is None and size < LORA_ABOVE)):
        return model
    kind = kind or "lora"
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
    heads = sorted({name.split(".")[0] for name, part in anatomy(model).items() if part.head})
    try:  # PEFT knows two names of heads and would freeze, and never save, the others
        config = configs[kind](task_type=peft.TaskType.SEQ_CLS, modules_to_save=heads, **settings[kind])
        found: Any = peft.get_peft_model(model, config)
    except (ValueError, KeyError, AttributeError) as error:
        raise _unfit(model, kind, error) from error
    trained = sum(p.numel() for p in found.parameters() if p.requires_grad)
    logger.info("PEFT's %s: %d weights are trained instead of %d", kind, trained, size)
    return found


def _unfit(model: nn.Module, kind: str, error: Exception) -> UsageError:
    config: Any = model.config
    return UsageError(
        f"peft={kind!r} does not work with a {config.model_type} model: {one_line(error)[:300]} Use lora, or leave it "
        "out."
    )


def check_adapted(model: Any, kind: str, features: Sequence[dict[str, Any]], tokenizer: Any) -> None:
    """Try a model with adapters on its longest row, and its shortest alone and padded.

    Args:
        model: as it will be trained.
        kind: of its adapters.
        features: tokenised rows.
        tokenizer: theirs.

    Raises:
        UsageError: the model fails (a prompt that exceeds its positions, no past keys for a prefix), or its outputs
            change with padding: decoders find their last token by the token numbers, which a prompt hides from them.
    """
    rows = sorted(({k: v for k, v in f.items() if k != "labels"} for f in features), key=lambda f: len(f["input_ids"]))
    shortest, longest = (len(rows[i]["input_ids"]) for i in (0, -1))
    training = model.training
    model.eval()

    def outputs(row: dict[str, Any], length: int) -> torch.Tensor:
        batch = tokenizer.pad([row], padding="max_length", max_length=length, return_tensors="pt")
        with torch.inference_mode():
            return model(**batch.to(model.device)).logits

    try:
        outputs(rows[-1], longest)
        alone, beside = outputs(rows[0], shortest), outputs(rows[0], min(shortest + 3, longest))
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise _unfit(model, kind, error) from error
    finally:
        model.train(training)
    if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-4):
        raise _unfit(model, kind, ValueError("its outputs change with the padding beside a row."))


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain model: adapters taken into the weights, where they can be (LoRA, IA3)."""
    unload: Any = getattr(model, "merge_and_unload", None)
    return unload() if unload else model  # type: ignore[return-value]


def write_model(model: Any, folder: str | Path) -> None:
    """A plain model directory; of a model whose adapters cannot be merged, what was trained alone."""
    if adapter_size(model) is None:
        model.save_pretrained(folder)  # PEFT's writes its adapters
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_adapters(folder, model)


def read_model(folder: str | Path, base: Callable[[], PreTrainedModel]) -> nn.Module:
    """What `write_model` wrote, in float32; ``base`` loads the pre-trained model, for adapters."""
    with quiet():
        if Path(folder, ADAPTERS).is_file():
            return load_adapters(folder, base())
        if Path(folder, PEFT_CONFIG).is_file():
            from peft import PeftModel

            return PeftModel.from_pretrained(base(), folder)
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
