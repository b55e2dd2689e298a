"""The options of a fit, checked: everything but model, methods and data that decides the trained weights."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from ..config import ALIASES, options
from ..errors import UsageError, suggest

# The strong baseline for small data is 20 epochs (Mosbach et al. 2021; Zhang et al. 2021). The smallest number of steps
# keeps training from ending half way; the largest is for tables that need no repetition.
EPOCHS, MIN_STEPS, MAX_STEPS = 20, 400, 2000

PEFT = ("lora", "ia3", "prefix", "prompt")
# Options that came later, and what a record without them means. Records leave them out at these values.
STOCK = {
    "head": "random",
    "pooling": "model",
    "compact": True,
    "tune_kernels": False,
    "label_smoothing": 0.0,
    "focal": 0.0,
    "worst_subgroup": False,
    "balance": None,
}
SEEDS = ("init", "subset", "data", "dropout", "method")  # the head, the rows, their order, dropout, masks and noise


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything but model, methods and data that decides the trained weights.

    The optimizer is bias-corrected AdamW (fused) with linear warm-up and linear decay, on float32 weights. Numbers of
    NumPy and other libraries become Python's.

    Attributes:
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay, on weight matrices only.
        warmup: Share of the steps with a rising rate, in [0, 1).
        max_grad_norm: Largest norm of the gradient; 0 disables clipping.
        batch_size: Number of rows per forward.
        accumulation: Number of forwards per optimizer step.
        steps: Optimizer steps; by default 20 epochs, at least 400 and at most 2,000 steps. 0 leaves the encoder as it
            is and keeps the head that `head` gives it.
        epochs: Number of epochs, instead of steps.
        max_length: Largest number of tokens per row; longer rows are cut. By default 128, or fewer if the model has
            fewer positions or its sentence-transformers folder says so.
        prompt: Text before the first text of each row, in training and in `predict`, such as ``"query: "``;
            ``"name:query"`` takes the prompt of that name from a sentence-transformers folder.
        dropout: Probability of every dropout of the model; by default those of its config.
        bf16: Whether to use bfloat16 autocast; the weights stay float32.
        tune_kernels: Whether to time a few passes with each kind of attention, and with bfloat16 on processors that
            multiply in it, and to train with the fastest; on the CPU. The choice depends on the machine and changes the
            result by rounding; ``steadytune.json`` holds it. Not for studies, whose runs are compared.
        lora: Whether to train low-rank adapters instead of all weights, and merge them at the end; by default for
            models with more than a billion weights. Needs the extra ``peft``.
        peft: Kind of adapters to train: ``"lora"`` or ``"ia3"`` (merged at the end), ``"prefix"`` or ``"prompt"`` (not
            merged: the output contains only them, in PEFT's format, and `predict` adds them to the base model).
        head: Initial output layer: ``"random"``, or a linear probe on the frozen features of the training rows,
            ``"logistic"`` or ``"ridge"`` (for numbers ridge in both cases), or ``"words"``, the language model's output
            weights of the class names (decoders and ModernBERT); see `methods.HeadInit`, which takes other words.
        pooling: Input of the head: ``"model"`` does not change it, ``"mean"`` is the mean over tokens, ``"cls"`` the
            first token without the dense layer before the head; see `methods.Pooling`. ``"auto"`` is the mean for
            single texts and a sentence encoder that was trained with it and whose dense layer was never trained.
        compact: Whether to train without the rows of the word embeddings that no training text reads, where the result
            is the same; see `steadytune.compact_vocabulary`. ``steadytune.json`` says what was left out, or why
            nothing was. A resumed run goes on as it began.
        class_weights: ``"balanced"`` weights classes by inverse frequency.
        label_smoothing: Share of each label's probability that is spread evenly over all classes, in [0, 1); 0.1 is
            usual. The model becomes less sure of its answers, right and wrong ones; for classes (see `loss`).
        focal: Exponent of the focal loss, which gives a row that is already right less weight: its loss is multiplied
            by ``(1 - p) ** focal``, with p the probability of its label. 0 is the usual loss, 2 the authors' value; for
            classes.
        balance: Attributes of the rows that must not predict a class: ``length``, ``negation``, ``overlap`` (of a
            pair), ``subgroup``, or a word. Weights of the rows in the loss make them independent of the classes; see
            `data.balance`.
        standardize: Whether to train on standardised numbers. The output layer takes over mean and standard deviation
            at the end, after the last checkpoint; for regression.
        evaluations: Number of evaluations on the validation rows during training; the best weights are kept. 0 keeps
            the last weights, without selection.
        patience: Number of evaluations without a new best after which training stops.
        calibrate: Whether to fit a temperature on the validation rows and divide the output layer by it.
        threshold: Probability above which a class is predicted (of two classes, the second); 0.5 by default. ``"tune"``
            takes the best threshold on the validation rows by the selection metric. For two classes and for several
            labels a row.
        worst_subgroup: Whether selection takes the metric's value on the subgroup with the worst one, instead of its
            value on all validation rows. Needs ``subgroup``.
        restarts: Largest number of restarts with other seeds, for a run whose training loss (with penalties) is still
            above 90 % of that of guessing after 20 % of its steps, which is for classification, or whose model gives
            every row the same answer. The head of a soup's runs begins with the same seed again.
        train_size: Number of training rows to draw, stratified; the others are not used.
        validation_share: Share of the training rows to hold out if there is no validation table.
        seed: Seed that replaces each of the following if it is not set.
        init_seed: Seed of new weights (the head).
        subset_seed: Seed of subset and validation split; by default the data seed.
        data_seed: Seed of the row order.
        dropout_seed: Seed of dropout.
        method_seed: Seed of the methods' draws (masks, noise).
    """

    lr: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    batch_size: int = 16
    accumulation: int = 1
    steps: int | None = None
    epochs: float | None = None
    max_length: int | None = None
    prompt: str | None = None
    dropout: float | None = None
    bf16: bool = False
    tune_kernels: bool = False
    lora: bool | None = None
    peft: Literal["lora", "ia3", "prefix", "prompt"] | None = None
    head: Literal["random", "logistic", "ridge", "words"] = "random"
    pooling: Literal["auto", "model", "mean", "cls"] = "auto"
    compact: bool = True
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: float = 0.0
    focal: float = 0.0
    balance: tuple[str, ...] | None = None
    standardize: bool = True
    evaluations: int = 0
    patience: int | None = None
    calibrate: bool = False
    threshold: float | Literal["tune"] | None = None
    worst_subgroup: bool = False
    restarts: int = 0
    train_size: int | None = None
    validation_share: float = 0.1
    seed: int = 0
    init_seed: int | None = None
    subset_seed: int | None = None
    data_seed: int | None = None
    dropout_seed: int | None = None
    method_seed: int | None = None

    def __post_init__(self) -> None:
        names = (self.balance,) if isinstance(self.balance, str) else tuple(map(str, self.balance or ()))
        object.__setattr__(self, "balance", names or None)
        for name, hint in options(type(self)).items():
            value = getattr(self, name)
            if value is not None or getattr(type(self), name) is not None:
                object.__setattr__(self, name, python_value(name, value, hint))  # the way into a frozen dataclass
        if self.threshold not in (None, "tune"):
            object.__setattr__(self, "threshold", _threshold(self.threshold))
        for name, (rule, holds) in _RULES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UsageError(f"{name} must be {rule}, got {value}.")
        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                given = getattr(self, name)
                raise UsageError(f"{name} must be one of {', '.join(values)}, got {given!r}.{suggest(given, values)}")
        if self.pooling in ("mean", "cls") and (self.peft or self.lora):
            raise UsageError(
                f"pooling {self.pooling} changes the blocks that adapters hold on to: give pooling='model', or leave "
                "the adapters out."
            )
        if self.peft not in (None, *PEFT):
            raise UsageError(
                f"peft must be one of {', '.join(PEFT)}, got {self.peft!r}.{suggest(str(self.peft), PEFT)}"
            )
        if self.peft is not None and self.lora is not None:
            raise UsageError(f"give lora ({self.lora}) or peft ({self.peft}), not both.")
        if self.patience is not None and not self.evaluations:
            raise UsageError(f"patience ({self.patience}) counts evaluations: set evaluations, for example to 10.")
        if self.steps == 0 and (self.head == "random" or self.evaluations):
            raise UsageError(
                "steps 0 trains nothing but the head, and evaluates nothing before the end: give the head 'logistic' "
                "and no evaluations, or more steps."
            )
        if self.steps == 0 and self.in_steps:
            raise UsageError(
                f"{self.in_steps[0]} acts in training steps, and with steps 0 there are none: leave it out, or give "
                "more steps."
            )
        if self.steps is not None and self.epochs is not None:
            raise UsageError(f"give steps ({self.steps}) or epochs ({self.epochs}), not both.")

    @property
    def in_steps(self) -> list[str]:
        """Names of the given options that change nothing but the loss of training steps."""
        given = {
            "balance": bool(self.balance), "class_weights": self.class_weights != "none",
            "label_smoothing": bool(self.label_smoothing), "focal": bool(self.focal),
        }  # fmt: skip
        return [name for name, is_given in given.items() if is_given]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """Options from keyword arguments, also under the names that transformers has for them (`ALIASES`).

        Raises:
            UsageError: An unknown name (the message has the nearest one), or an option under both of its names.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        named: dict[str, Any] = {}
        for given, value in options.items():
            name = ALIASES.get(given, given)
            if name not in known:
                raise UsageError(f"unknown option {given!r}.{suggest(given, known)}")
            if name in named:
                raise UsageError(f"{' and '.join(n for n in options if n == name or ALIASES.get(n) == name)} are two "
                                 "names of one option: give one of them.")  # fmt: skip
            named[name] = value
        return cls(**named)

    @property
    def seeds(self) -> dict[str, int]:
        """The five seeds in force."""
        own = {name: getattr(self, f"{name}_seed") for name in SEEDS}
        if own["subset"] is None:
            own["subset"] = own["data"]
        return {name: self.seed if value is None else value for name, value in own.items()}

    def total_steps(self, rows: int) -> int:
        """Optimizer steps for a training set of this size."""
        per_epoch = math.ceil(math.ceil(rows / self.batch_size) / self.accumulation)
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, math.ceil(self.epochs * per_epoch))
        return min(max(EPOCHS * per_epoch, MIN_STEPS), MAX_STEPS)


def python_value(name: str, value: Any, hint: Any) -> Any:
    """An option as a plain Python value of the type ``hint``; NumPy's numbers, for example, become Python's.

    Raises:
        UsageError: The value is of another type.
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # NumPy scalars, tensors of one number
        value = value.item()
    if hint is bool:
        return _of_type(name, value, isinstance(value, bool), bool, "True or False")
    number = isinstance(value, Real) and not isinstance(value, bool)
    if hint is int:
        whole = number and (isinstance(value, Integral) or float(value).is_integer())
        return _of_type(name, value, whole, int, "a whole number")
    if hint is float:
        if number and math.isinf(value):
            raise UsageError(f"{name} must be a finite number, got {value}.")
        return _of_type(name, value, number, int if isinstance(value, Integral) else float, "a number")
    if hint is str:
        return _of_type(name, value, isinstance(value, str), str, "text")
    if typing.get_origin(hint) is Literal:
        return _of_type(name, value, isinstance(value, str), str, f"one of {', '.join(typing.get_args(hint))}")
    return value


def _of_type(name: str, value: Any, right: bool, kind: Callable[[Any], Any], what: str) -> Any:
    if not right:
        raise UsageError(f"{name} must be {what}, got {value!r}.")
    return kind(value)


def _threshold(value: Any) -> float:
    """A probability, which the command line gives as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < 1:
        raise UsageError(f"threshold must be a number above 0 and below 1, or tune, got {value!r}.")
    return number


_CHOICES = {
    "class_weights": ("none", "balanced"),
    "head": ("random", "logistic", "ridge", "words"),
    "pooling": ("auto", "model", "mean", "cls"),
}
_POSITIVE = ("above 0", lambda value: value > 0)
_NOT_NEGATIVE = ("0 or more", lambda value: value >= 0)
_SHARE = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_SEED = ("between 0 and 2**32 - 1", lambda value: 0 <= value < 2**32)  # numpy's range
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("lr", "batch_size", "accumulation", "epochs", "max_length", "patience", "train_size"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "steps", "evaluations", "restarts", "focal"), _NOT_NEGATIVE),
    **dict.fromkeys(("warmup", "dropout", "validation_share", "label_smoothing"), _SHARE),
    **dict.fromkeys(("seed", *(f"{name}_seed" for name in SEEDS)), _SEED),
}
