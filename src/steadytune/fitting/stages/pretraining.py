"""Further pre-training on the texts of the task, without labels, as the first stage of a fit.

`TAPT` predicts masked words. It needs the output layer of the pre-training, which sentence encoders and some other
checkpoints do not hold. A new one would be random and would distort the body as a random classifier does, so that these
checkpoints are trained by `SimCSE` instead.

The stage moves the weights of the body alone. What a masked language model does not have, such as BERT's pooler, keeps
the weights of the checkpoint. A folder that a masked language model writes would load with a random pooler.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)

from ...core import Within, check_fields
from ...data.prepare import Data, fingerprint
from ...data.tables import keys
from ...errors import UsageError
from ...files import state
from ...heads.features import pooled_features, pooled_states
from ..callbacks import Interrupt, KeepBest, Patience, Progress
from ..fit_trainer import FitTrainer, arguments
from ..folder import last_checkpoint
from ..options import MAX_STEPS, Options
from ..pretrained import quiet
from ..spelling import pretraining_record

if TYPE_CHECKING:
    from ..pretrained import Pretrained

logger = logging.getLogger("steadytune")

BODY = "body.safetensors"
METRIC = "log_loss"  # of masked words that were held out
EVALUATIONS, PATIENCE = 10, 3
PAIRS = 2  # smallest number of texts that a contrastive loss can tell apart


class Pretraining(ABC):
    """What texts without labels train a body with."""

    name: ClassVar[str]
    readings: ClassVar[int] = 1  # how often a step reads each of its texts
    steps: int | None
    epochs: float
    lr: float
    batch_size: int

    def total_steps(self, texts: int) -> int:
        """Optimizer steps on so many texts."""
        wanted = math.ceil(self.epochs * math.ceil(texts / self.batch_size))
        return self.steps if self.steps is not None else min(max(1, wanted), MAX_STEPS)

    @abstractmethod
    def settled(self, pretrained: Pretrained) -> Pretraining:
        """This training, or the one that takes its place with a checkpoint that cannot be trained so.

        Raises:
            UsageError: The model can be trained in neither way.
        """

    @abstractmethod
    def trainer(
        self, pretrained: Pretrained, texts: pd.DataFrame, options: Options, seeds: dict[str, int], folder: Path,
        save_steps: int,
    ) -> FitTrainer:  # fmt: skip
        """The Trainer, which has a model whose `base_model` is trained."""

    def options(self, options: Options) -> Options:
        """The options of a fit, with the rate and batches of this training."""
        return dataclasses.replace(Options(), lr=self.lr, batch_size=self.batch_size, warmup=0.06, bf16=options.bf16)


@dataclass(frozen=True)
class TAPT(Pretraining):
    """Predict masked words of the task's texts (task-adaptive pre-training).

    Gururangan, Marasovic, Swayamdipta, Lo, Beltagy, Downey, Smith: Don't Stop Pretraining: Adapt Language Models to
    Domains and Tasks. ACL 2020, arXiv 2004.10964.

    Of the chosen words, 80 % become the mask, 10 % a random word, and 10 % stay. Special tokens are never chosen, and
    each step draws anew. A tenth of the texts is held out: the weights with the lowest loss on them are kept, and
    training ends after three evaluations without a new lowest.

    Args:
        steps: Number of optimizer steps; by default those of ``epochs``, at most 2,000.
        epochs: Number of passes over the texts; 100 in the paper.
        lr: Peak learning rate; 1e-4 with batches of 256 in the paper.
        batch_size: Number of texts per step.
        masked: Share of the words to predict.
        held_out: Share of the texts that choose the step.

    Departures:
        At most 2,000 steps, smaller batches at a smaller rate, and AdamW's usual beta2 of 0.999 (0.98).
    """

    name: ClassVar[str] = "tapt"

    steps: Annotated[int, Within("[1, inf)")] | None = None
    epochs: Annotated[float, Within("(0, inf)")] = 100.0
    lr: Annotated[float, Within("(0, inf)")] = 5e-5
    batch_size: Annotated[int, Within("[1, inf)")] = 32
    masked: Annotated[float, Within("(0, 1)")] = 0.15
    held_out: Annotated[float, Within("(0, 1)")] = 0.1

    def __post_init__(self) -> None:
        check_fields(self)

    def settled(self, pretrained: Pretrained) -> Pretraining:
        why = _no_masked_model(pretrained)
        if why is None:
            return self
        logger.warning("tapt: %s: its body is trained by simcse instead, whose own defaults hold but for steps", why)
        return SimCSE(steps=self.steps).settled(pretrained)

    def trainer(
        self, pretrained: Pretrained, texts: pd.DataFrame, options: Options, seeds: dict[str, int], folder: Path,
        save_steps: int,
    ) -> FitTrainer:  # fmt: skip
        model, _ = _masked_model(pretrained, seeds["init"])
        inside, outside = self.cut(texts, seeds["subset"])
        steps = self.total_steps(len(inside))
        evaluations = min(EVALUATIONS, steps)
        own = dataclasses.replace(self.options(options), evaluations=evaluations)
        tokenizer = pretrained.tokenizer
        trainer = MaskedTrainer(
            model=model,
            args=_arguments(own, seeds, steps, folder, save_steps, METRIC),
            train_dataset=pretrained.tokenise(inside),
            eval_dataset=[
                _masked_row(row, tokenizer, self.masked, [seeds["method"], number])
                for number, row in enumerate(pretrained.tokenise(outside))
            ],
            data_collator=DataCollatorForTokenClassification(tokenizer),
            callbacks=[Patience(METRIC, PATIENCE), *([] if save_steps else [KeepBest(METRIC)])],
        )
        trainer.share = self.masked
        return trainer

    def cut(self, texts: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Texts to train on, and those held out: at least one of each."""
        order = np.random.default_rng(seed).permutation(len(texts))
        count = min(max(1, round(self.held_out * len(texts))), len(texts) - 1)
        return texts.iloc[np.sort(order[count:])], texts.iloc[np.sort(order[:count])]


@dataclass(frozen=True)
class SimCSE(Pretraining):
    r"""Bring two readings of a text together that differ by their dropout, and readings of other texts apart.

    Gao, Yao, Chen: SimCSE: Simple Contrastive Learning of Sentence Embeddings. EMNLP 2021, arXiv 2104.08821.

    With e and e' the normalised embeddings of the two readings, and e0 that of the checkpoint without dropout:

        loss = mean over i of  -log(exp(e_i . e'_i / t) / sum over j of exp(e_i . e'_j / t))
               + anchor * mean of |e - e0|^2 over both readings

    The embedding is the mean over tokens, or the first token if the folder of a sentence encoder says so.

    Args:
        steps: Number of optimizer steps; by default those of ``epochs``, at most 2,000.
        epochs: Number of passes over the texts.
        lr: Peak learning rate.
        batch_size: Number of texts per step, which are each other's negatives.
        temperature: Temperature t.
        anchor: Weight of the distance from the checkpoint's embeddings.

    Departures:
        The anchor is ours. The authors put a dense layer before the first token, and choose the step on labelled data;
        here no step is chosen.
    """

    name: ClassVar[str] = "simcse"
    readings: ClassVar[int] = 2

    steps: Annotated[int, Within("[1, inf)")] | None = None
    epochs: Annotated[float, Within("(0, inf)")] = 1.0
    lr: Annotated[float, Within("(0, inf)")] = 3e-5
    batch_size: Annotated[int, Within("[2, inf)")] = 64
    temperature: Annotated[float, Within("(0, inf)")] = 0.05
    anchor: Annotated[float, Within("[0, inf)")] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def settled(self, pretrained: Pretrained) -> Pretraining:
        if pretrained.config.is_encoder_decoder:
            raise UsageError(
                f"pretrain: a {pretrained.config.model_type} model is an encoder with a decoder, and pre-training "
                "further takes models of one part: leave pretrain out."
            )
        if not any(pretrained.dropout.values()):
            raise UsageError(
                "simcse compares two readings of a text that differ by their dropout, and the model has none: give a "
                "dropout (--dropout 0.1), or leave pretrain out."
            )
        return self

    def trainer(
        self, pretrained: Pretrained, texts: pd.DataFrame, options: Options, seeds: dict[str, int], folder: Path,
        save_steps: int,
    ) -> FitTrainer:  # fmt: skip
        classifier, _ = pretrained.read(seeds["init"])
        model: Any = classifier.base_model
        features = pretrained.tokenise(texts)
        steps = self.total_steps(len(texts))
        trainer = SimCSETrainer(
            model=model,
            args=_arguments(self.options(options), seeds, steps, folder, save_steps),
            train_dataset=[{**row, ROW: number} for number, row in enumerate(features)],
            data_collator=DataCollatorWithPadding(pretrained.tokenizer),
        )
        trainer.how, trainer.pooling = self, pooling_of(pretrained)
        size = trainer.args.per_device_eval_batch_size
        batches = (
            pretrained.tokenizer.pad(features[i : i + size], return_tensors="pt") for i in range(0, len(features), size)
        )
        trainer.anchors = nn.functional.normalize(pooled_features(model, batches, trainer.pooling), dim=-1).float()
        return trainer


PRETRAININGS: dict[str, type[Pretraining]] = {cls.name: cls for cls in (TAPT, SimCSE)}
ROW = "row"  # column of a batch: the number of each text


@dataclass(frozen=True, eq=False)
class TextStage:
    """Further pre-training as a stage of a fit.

    Attributes:
        how: Masked words or contrast.
        texts: Texts of training rows and of rows without labels, each once.
        options: Options of the fit.
        save_steps: Number of steps between checkpoints.
        progress: Whether to show a bar.
        unlabelled: Number of texts that no training row has.
    """

    how: Pretraining
    texts: pd.DataFrame
    options: Options
    save_steps: int
    progress: bool
    unlabelled: int

    name: ClassVar[str] = "pretrain"
    reads_unlabelled: ClassVar[bool] = True

    @classmethod
    def of(cls, how: Pretraining, *, options: Options, fit: Data, save_steps: int, progress: bool) -> TextStage:
        """The stage of a fit.

        Raises:
            UsageError: There are too few texts.
        """
        columns = [column for column in ("text", "text_pair") if column in fit.train]
        more = [] if fit.unlabelled is None else [fit.unlabelled.rows]
        every = pd.concat([fit.train, *more], ignore_index=True)[columns]
        texts = every[~pd.Series(keys(every), dtype=object).duplicated()].reset_index(drop=True)
        if len(texts) < PAIRS:
            raise UsageError("pretrain needs two different texts or more: give unlabelled texts, or leave it out.")
        return cls(how, texts, options, save_steps, progress, sum(map(len, more)))

    def settled(self, pretrained: Pretrained) -> TextStage:
        """The stage as this checkpoint can do it; see `Pretraining.settled`."""
        return dataclasses.replace(self, how=self.how.settled(pretrained))

    def with_compact(self, compact: bool) -> TextStage:
        """The same stage: it always trains the whole vocabulary."""
        return self

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.how.total_steps(len(self.texts))

    def tokens(self, pretrained: Pretrained) -> float:
        """As of `plan.Stage`."""
        at_once = min(self.how.batch_size, len(self.texts)) * self.how.readings
        return self.steps * at_once * pretrained.mean_length(self.texts)

    @property
    def title(self) -> str:
        """What the stage does, for messages."""
        return f"at most {self.steps} steps of {self.how.name} on {len(self.texts)} texts without their labels"

    def record(self) -> dict[str, Any]:
        """What decides the moved weights, as JSON."""
        return {
            **pretraining_record(self.how),
            "data": {"source": "texts", "rows": len(self.texts), "sha256": fingerprint(self.texts)},
            "unlabelled": self.unlabelled,
            "steps": self.steps,
        }

    def body(self, pretrained: Pretrained, name: str, checkpoints: Path) -> Mapping[str, Tensor]:
        """Weights of the body after the training; a finished one is read from disk.

        Args:
            pretrained: The model of the fit, after earlier stages.
            name: Name of the stage's folder.
            checkpoints: Folder of the checkpoints of the fit.

        Raises:
            Interrupted: After a checkpoint.
        """
        folder = checkpoints / name
        done = folder / BODY
        if not done.is_file():
            seeds = self.options.seeds
            trainer = self.how.trainer(pretrained, self.texts, self.options, seeds, folder, self.save_steps)
            for callback in (Interrupt(), *([Progress(name)] if self.progress else [])):
                trainer.add_callback(callback)
            trainer.remove_callback(PrinterCallback)
            trained = trainer.trained(seeds, trainer.train_here(last_checkpoint(folder)), 0, failing=False)
            folder.mkdir(parents=True, exist_ok=True)
            state.save({"body": base_weights(trained.model)}, done)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
        body: Mapping[str, Tensor] = state.load(done)["body"]
        return body


def base_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of a model's base, on the CPU, under the names that they have in a classifier."""
    prefix = model.base_model_prefix
    return {f"{prefix}.{name}": p.detach().cpu() for name, p in model.base_model.named_parameters()}


def pooling_of(pretrained: Pretrained) -> Any:
    """How token states become the embedding of a text: ``"cls"`` or ``"mean"``."""
    sentence = pretrained.sentence
    return "cls" if sentence is not None and sentence.pooling == "cls" else "mean"


def _arguments(
    options: Options, seeds: dict[str, int], steps: int, folder: Path, save_steps: int, metric: str | None = None
) -> Any:
    args = arguments(options, seeds, steps, folder, save_steps, metric)
    args.remove_unused_columns = False  # `ROW`
    return args


# ---- masked words -----------------------------------------------------------------------------------------------


def _masked_model(pretrained: Pretrained, seed: int) -> tuple[PreTrainedModel, Sequence[str]]:
    """The checkpoint as a masked language model in float32, and the names of its weights that were drawn."""
    with quiet():
        torch.manual_seed(seed)
        model, info = AutoModelForMaskedLM.from_pretrained(
            pretrained.name, config=copy.deepcopy(pretrained.config), dtype=torch.float32, output_loading_info=True
        )
    if pretrained.body is not None:
        model.load_state_dict(pretrained.body, strict=False)
    return model, sorted(info["missing_keys"])


def _no_masked_model(pretrained: Pretrained) -> str | None:
    """Why a checkpoint cannot predict masked words; None if it can."""
    if pretrained.tokenizer.mask_token is None:
        return "the tokenizer has no mask token"
    try:
        model, missing = _masked_model(pretrained, 0)
    except ValueError:  # no such class
        return f"a {pretrained.config.model_type} model predicts no masked words"
    if pretrained.config.is_encoder_decoder:
        return f"a {pretrained.config.model_type} model is an encoder with a decoder"
    prefix = f"{model.base_model_prefix}."
    if any(not name.startswith(prefix) for name in missing):
        return "the checkpoint does not hold the layer that predicts masked words"
    return None


def mask_words(
    ids: Tensor, tokenizer: PreTrainedTokenizerBase, share: float, seed: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mask words, of which 80 % become the mask, 10 % a random word, and 10 % stay.

    Args:
        ids: Token numbers (rows, tokens); they do not change.
        tokenizer: Tokenizer with a mask token; its special tokens are never chosen.
        share: Share of the other tokens that are chosen.
        seed: Numbers that decide the draw.

    Returns:
        Masked numbers, and the numbers to predict, -100 where nothing is (both (rows, tokens)).
    """
    collator: Any = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share)
    number = int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0])
    collator.generator = torch.Generator().manual_seed(number % 2**63)
    masked, labels = collator.torch_mask_tokens(ids.cpu().clone())
    return masked.to(ids.device), labels.to(ids.device)


def _masked_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, share: float, seed: Sequence[int]
) -> dict[str, Any]:
    """A row with masks that stay the same at every evaluation."""
    ids, labels = mask_words(torch.tensor([row["input_ids"]]), tokenizer, share, seed)
    return {**row, "input_ids": ids[0].tolist(), "labels": labels[0].tolist()}


class MaskedTrainer(FitTrainer):
    """Trainer on masked words. The masks of a step depend on seed and step alone, so a resumed run has the same."""

    share: float

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean cross entropy of the masked words; 0 for a batch without any."""
        given = dict(inputs)
        labels = given.pop("labels", None)
        if labels is None:
            collator: Any = self.data_collator
            seed = [self.args.seed, self.state.global_step]
            given["input_ids"], labels = mask_words(given["input_ids"], collator.tokenizer, self.share, seed)
        outputs = model(**given)
        loss = masked_loss(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing of tied weights, which a checkpoint holds once."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Name the loss as the metric that chooses the step."""
        output: Any = super().evaluation_loop(*args, **kwargs)
        output.metrics[f"eval_{METRIC}"] = output.metrics["eval_loss"]
        return output


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy over positions with a label; 0, with zero gradients, where there are none.

    Args:
        logits: (rows, tokens, words).
        labels: Numbers of words (rows, tokens), -100 for positions that do not count.
    """
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return losses / (labels != -100).sum().clamp(min=1)


# ---- contrast ---------------------------------------------------------------------------------------------------


class SimCSETrainer(FitTrainer):
    """Trainer on pairs of readings of the same text."""

    how: SimCSE
    pooling: Any
    anchors: Tensor

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of `SimCSE`."""
        given = dict(inputs)
        rows = given.pop(ROW)
        twice = {name: torch.cat([value, value]) for name, value in given.items()}
        vectors = pooled_states(model, twice, self.pooling).float()
        one, two = nn.functional.normalize(vectors, dim=-1).chunk(2)
        anchors = self.anchors[rows.cpu()].to(one.device)
        loss = info_nce(one, two, self.how.temperature)
        distance = ((one - anchors).square().sum(-1) + (two - anchors).square().sum(-1)).mean() / 2
        loss = loss + self.how.anchor * distance
        return (loss, {}) if return_outputs else loss


def info_nce(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """Cross entropy of finding the other reading of a text among those of all texts.

    Args:
        one: Normalised embeddings (rows, width).
        two: Those of the other reading.
        temperature: Divisor of the cosines.
    """
    return nn.functional.cross_entropy(one @ two.T / temperature, torch.arange(len(one), device=one.device))
