"""Check whether steadytune works on this machine: versions, devices, and the private interfaces that it uses.

The Trainer overrides and reads private parts of `transformers.Trainer`, and the core uses hooks of torch's optimizers.
A new version may change them. The check tries each of them in a tiny training, and names those that fail with the
consequence, before a run is spoilt. No torch at import time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .trainer import Trainer

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets")
EXTRAS = {"peft": "peft", "datasets": "hub"}  # optional packages, and the extra that installs each

# Methods of transformers.Trainer that ours overrides, and the consequence if they are no longer called.
CALLED = {
    "call_model_init": "with model_init, methods would act on a model that is not trained",
    "create_accelerator_and_postprocess": "accumulated gradients would be divided twice",
    "_set_signature_columns_if_needed": "EasyAdapt would not find its column",
    "create_optimizer": "methods would never see a step",
    "create_scheduler": "DPS would not know the number of steps",
    "get_batch_samples": "accumulated gradients would be scaled wrongly",
    "training_step": "methods would not see the loss of a trainer that computes its own",
    "compute_loss": "penalties (R-Drop) would not be added",
    "log": "the log would have a wrong gradient norm",
    "save_model": "checkpoints would lose the methods' state",
    "_load_optimizer_and_scheduler": "a resumed run would start its methods from scratch",
    "_load_best_model": "the best checkpoint would lack what methods train beside the model or its adapters",
}
# Attributes of a stock trainer that ours reads, and the consequence without them.
READ = {
    "current_gradient_accumulation_steps": "penalties would be scaled wrongly under accumulation",
    "accelerator.gradient_accumulation_steps": "accumulated gradients would be divided twice",
    "callback_handler.callbacks": "a step skipped in fp16 would leave a mixture of weights live",
    "compute_loss_func": "custom losses would be scaled wrongly",
    "is_deepspeed_enabled": "DeepSpeed, which hides weights from methods, would not be refused",
    "is_fsdp_enabled": "FSDP1, which hides weights from methods, would not be refused",
    "_prepare_inputs": "the check of how a loss counts tokens would fail",
}


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name of the package, device, hook or attribute.
        ok: Whether it works as expected.
        found: What was found.
        consequence: What fails if the check fails.
    """

    name: str
    ok: bool
    found: str = ""
    consequence: str = ""

    def __str__(self) -> str:
        tail = f": {self.found}" if self.found else ""
        return f"  {'ok    ' if self.ok else 'FAILED'}  {self.name}{tail}" + (
            f" -> {self.consequence}" if self.consequence and not self.ok else ""
        )


@dataclass(frozen=True)
class Report:
    """Result of `examine`: checks by heading."""

    sections: dict[str, list[Check]]

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for checks in self.sections.values() for check in checks if not check.ok]

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        if not self.failed:
            return "steadytune works here."
        names = ", ".join(check.name for check in self.failed)
        count = sum(map(len, self.sections.values()))
        return (
            f"{len(self.failed)} of {count} checks failed ({names}): do not trust runs of this installation. Install "
            "versions in the ranges above; if they are, report these lines."
        )

    def __str__(self) -> str:
        lines = [f"steadytune {__version__}"]
        for title, checks in self.sections.items():
            lines += [title, *map(str, checks)]
        return "\n".join([*lines, self.verdict])

    def json(self) -> str:
        """The report as JSON: `ok`, `verdict`, and the checks by heading."""
        sections = {title: [dataclasses.asdict(check) for check in checks] for title, checks in self.sections.items()}
        return json.dumps({"ok": not self.failed, "verdict": self.verdict, "sections": sections}, indent=2)


def examine() -> Report:
    """Run all checks. They take a few seconds and need no network."""
    parts: dict[str, Callable[[], list[Check]]] = {
        "Versions": versions,
        "Machine": machine,
        "Hooks of torch's optimizers": hooks,
        "transformers.Trainer, in a training of two steps": training,
    }
    return Report({title: _tried(title, part) for title, part in parts.items()})


def _tried(title: str, part: Callable[[], list[Check]]) -> list[Check]:
    try:
        return part()
    except Exception as error:  # any error of another version is a finding
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return [Check(title, False, message[:300], "none of these checks could run")]


# ---- versions and machine ---------------------------------------------------------------------------------------


def versions() -> list[Check]:
    """Python and packages, compared with the versions that steadytune requires."""
    return [_python(), *map(_package, PACKAGES)]


def _python() -> Check:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    needed = SpecifierSet((metadata.metadata("steadytune")["Requires-Python"] or "") if _installed() else "")
    return Check("python", needed.contains(version, prereleases=True), f"{version} (needs {needed or 'any'})")


def _package(name: str) -> Check:
    needed = _needed(name)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        extra = EXTRAS.get(name)
        wanted = f"steadytune[{extra}]" if extra else name
        return Check(name, extra is not None, f"not installed; pip install '{wanted}'", "steadytune cannot train")
    fits = needed.contains(version, prereleases=True)
    return Check(name, fits, f"{version} (needs {needed or 'any'})", f"pip install -U {name}")


def _needed(name: str) -> Any:
    """Versions of a package that steadytune requires; any if steadytune has no package metadata."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    declared = (metadata.requires("steadytune") or []) if _installed() else []
    parsed = (Requirement(line) for line in declared)
    return next((needed.specifier for needed in parsed if needed.name == name), SpecifierSet())


def _installed() -> bool:
    """Whether steadytune has package metadata; a bare source tree has none."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version("steadytune"))
    return False


def machine() -> list[Check]:
    """Device, threads, bf16 and the fused optimizer."""
    import torch

    device = _device()
    layer = torch.nn.Linear(4, 4, device=device)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    several = torch.cuda.device_count()
    advice = f"; {several} devices: torchrun, or CUDA_VISIBLE_DEVICES=0" if several > 1 else ""
    return [
        Check("device", True, f"{device} ({name}){advice}"),
        Check("threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        _bf16(layer, device),
        _fused(layer),
    ]


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _bf16(layer: Any, device: str) -> Check:
    import torch

    with torch.autocast(device, torch.bfloat16):
        works = layer(torch.ones(1, 4, device=device)).dtype == torch.bfloat16
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Check("bf16", True, "emulated and therefore slow: leave it off")
    speed = f"; CPU capability {torch.backends.cpu.get_cpu_capability()}" if device == "cpu" else ""
    return Check("bf16", works, f"autocast runs{speed}", "train without bf16")


def _fused(layer: Any) -> Check:
    import torch

    layer(torch.ones(1, 4, device=layer.weight.device)).sum().backward()
    before = layer.weight.detach().clone()
    torch.optim.AdamW(layer.parameters(), 0.1, fused=True).step()
    moved = not torch.equal(before, layer.weight)
    return Check("fused AdamW", moved, "steps", "the default optimizer of fit does not train")


# ---- torch ------------------------------------------------------------------------------------------------------


def hooks() -> list[Check]:
    """Whether the four optimizer hooks that the core uses are called."""
    import torch

    fired: list[str] = []
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    start = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], 0.1)
    optimizer.register_step_pre_hook(lambda *a: fired.append("pre") if torch.equal(weight, start) else None)
    optimizer.register_step_post_hook(lambda *a: None if torch.equal(weight, start) else fired.append("post"))
    optimizer.register_state_dict_post_hook(lambda *a: fired.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda *a: fired.append("load"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    expected = {
        "pre": ("register_step_pre_hook", "methods would never see a gradient"),
        "post": ("register_step_post_hook", "methods would never see an updated weight"),
        "save": ("register_state_dict_post_hook", "checkpoints would lose the methods' state"),
        "load": ("register_load_state_dict_pre_hook", "a resumed run would start its methods from scratch"),
    }
    return [Check(name, key in fired, "", consequence) for key, (name, consequence) in expected.items()]


# ---- the Trainer ------------------------------------------------------------------------------------------------


def training() -> list[Check]:
    """Train two steps of DPSDense with a checkpoint, repeat the second from it, and train one with accumulation.

    One step more ends with the best checkpoint.
    """
    calls: set[str] = set()
    with tempfile.TemporaryDirectory() as folder, _silence():
        first = _trainer(Path(folder, "first"), calls)
        first.train()
        again = _trainer(Path(folder, "again"), calls)
        again.train(resume_from_checkpoint=str(Path(folder, "first", "checkpoint-1")))
        best = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
        _trainer(Path(folder, "best"), calls, **best).train()
        results = [
            _half_moved(first, Path(folder, "first", "checkpoint-1", "model.safetensors")),
            _resumed(first, again),
            _accumulated(Path(folder)),
            _drawn_anew(Path(folder, "first", "checkpoint-1")),
        ]
    called = [Check(name, name in calls, "", consequence) for name, consequence in CALLED.items()]
    return [*called, *(_readable(first, name, consequence) for name, consequence in READ.items()), *results]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence bars, tables and warnings of the trainings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _trainer(folder: Path, calls: set[str], **more: Any) -> Trainer:
    """Trainer of DPSDense with one step in each stage and half of the entries frozen; it notes the methods called."""
    from .methods import DPSDense
    from .trainer import Trainer

    def noting(name: str) -> Callable[..., Any]:
        stock = getattr(Trainer, name)

        @functools.wraps(stock)
        def noted(*args: Any, **kwargs: Any) -> Any:
            calls.add(name)
            return stock(*args, **kwargs)

        return noted

    noted = type("Noted", (Trainer,), {name: noting(name) for name in CALLED if hasattr(Trainer, name)})
    methods = [DPSDense(keep=0.5, update_ratio=0.5, frozen=True)]
    args, rows = _arguments(folder, **more), _rows()
    return noted(model_init=_bert, args=args, train_dataset=rows, eval_dataset=rows, methods=methods)


def _bert() -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 3
    return BertForSequenceClassification(config)


def _rows() -> Any:
    return [{"input_ids": [i, i + 1, (7 * i) % 32], "labels": i % 3} for i in range(8)]


def _arguments(folder: Path, **more: Any) -> Any:
    import torch
    from transformers import TrainingArguments

    given = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1, "logging_steps": 1, **more}
    return TrainingArguments(
        str(folder),
        learning_rate=0.01,
        lr_scheduler_type="constant",
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=torch.cuda.device_count() > 1,  # DataParallel over several devices is refused
        **given,
    )


def _half_moved(trainer: Trainer, checkpoint: Path) -> Check:
    """Check that exactly the selected half of each linear weight moves in stage II."""
    from safetensors.torch import load_file

    assert trainer.run is not None
    before = load_file(checkpoint)
    pairs = [(w.data.cpu(), before[w.name]) for w in trainer.run.weights(scope="linear")]
    share = sum(int((now != then).sum()) for now, then in pairs) / sum(now.numel() for now, _ in pairs)
    summary = f"{trainer.run.index} steps, {share:.0%} of the linear weights moved in the second"
    fits = trainer.run.index == 2 and abs(share - 0.5) < 0.02
    return Check("DPSDense(keep=0.5)", fits, summary, "methods do not act on the weights that are trained")


def _resumed(first: Trainer, again: Trainer) -> Check:
    apart = _apart(first, again)
    summary = f"with and without interruption differ by {apart:.1g}"
    return Check("resume", apart < 1e-6, summary, "a resumed run differs from an uninterrupted one")


def _accumulated(folder: Path) -> Check:
    """Check that one step of 4 rows equals one step of 2 x 2 rows."""
    from .trainer import Trainer

    trainers = []
    for size, forwards in ((4, 1), (2, 2)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": forwards}
        args = _arguments(folder / f"split{size}", max_steps=1, optim="sgd", max_grad_norm=0.0, **split)
        trainers.append(Trainer(model=_bert(), args=args, train_dataset=_rows()))
        trainers[-1].train()
    apart = _apart(*trainers)
    flag = "heeded" if hasattr(trainers[0], "loss_is_scaled_for_ga") else "unknown here"
    summary = f"1 x 4 and 2 x 2 rows differ by {apart:.1g}; loss_is_scaled_for_ga is {flag}"
    return Check("accumulation", apart < 1e-6, summary, "accumulated gradients are scaled wrongly")


def _drawn_anew(checkpoint: Path) -> Check:
    """Check that ReInit clears the flag which makes transformers skip loaded weights."""
    from transformers import BertForSequenceClassification

    from .core import Run
    from .methods import ReInit

    summary = ""
    try:
        Run(BertForSequenceClassification.from_pretrained(checkpoint), [ReInit()])
    except (ValueError, AttributeError) as error:
        summary = str(error)
    return Check("_init_weights", not summary, summary, "ReInit could not reset layers")


def _apart(one: Trainer, other: Trainer) -> float:
    """Largest difference between the weights of two trainers."""
    assert one.model is not None
    assert other.model is not None
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def _readable(trainer: Trainer, name: str, consequence: str) -> Check:
    try:
        attrgetter(name)(trainer)
    except AttributeError:
        return Check(name, False, "gone", consequence)
    return Check(name, True, "", consequence)
