"""Open a pre-trained model with its tokenizer and a head for the problem."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as hub_logging

from ..core.anatomy import DRAWN, anatomy
from ..data.problem import Problem, Regression
from ..errors import UsageError, one_line
from ..heads.features import last_linear
from ..heads.sentence_folder import SentenceFolder, prompts_words, sentence_folder
from .encoding import tokenise
from .scale import output_layer, rescale

logger = logging.getLogger("steadytune")

MAX_LENGTH = 128
NAMED = "name:"  # prefix of the name of a prompt in the folder of a sentence encoder
SAMPLED = 256  # number of rows whose mean length stands for that of all
SHOWN = 4  # largest number of names in a message


@contextlib.contextmanager
def quiet(warnings: bool = False) -> Iterator[None]:
    """Silence bars and tables of transformers inside the block; our own messages say what matters in them."""
    level, bars = hub_logging.get_verbosity(), hub_logging.is_progress_bar_enabled()
    hub_logging.disable_progress_bar()
    if not warnings:
        hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if bars:
            hub_logging.enable_progress_bar()


class _Spare(NamedTuple):
    """A model that was read and not changed, and torch's random state after that."""

    seed: int
    model: PreTrainedModel
    new: frozenset[str]
    random_state: torch.Tensor


@dataclass(frozen=True, eq=False)
class Pretrained:
    """An opened pre-trained model; each `load` returns the same model with a new random head.

    Attributes:
        name: Directory or hub name.
        config: Configuration with a head for the problem, and with the dropout of the options.
        tokenizer: Tokenizer with a padding token, in agreement with the config (see `agree`).
        max_length: Largest number of tokens per row.
        dropout: Dropout probabilities in use.
        classes: Class names of the head in the checkpoint, in its order.
        prompt: Text before the first text of each row.
        sentence: What a sentence-transformers folder says; None where the model is no such folder.
        pooling: What the head reads, see `start.chosen_pooling`.
        body: Weights that replace those of the checkpoint, see `stages`.
    """

    name: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    dropout: dict[str, float]
    classes: tuple[str, ...] = ()
    prompt: str = ""
    sentence: SentenceFolder | None = None
    pooling: Literal["model", "mean", "cls"] = "model"
    body: Mapping[str, torch.Tensor] | None = None
    _said: set[str] = field(default_factory=set)
    _new: set[str] = field(default_factory=set)
    _tokens: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)  # of each text (or pair), tokenised
    _spare: list[_Spare] = field(default_factory=list)  # the model of `peek`, until it is read

    @classmethod
    def open(
        cls,
        name: str,
        problem: Problem,
        *,
        dropout: float | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
    ) -> Pretrained:
        """Read config and tokenizer, and what a sentence-transformers folder says beside them.

        Raises:
            UsageError: There is no such model, or it cannot do what the options ask for.
        """
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise UsageError(f"model {name!r}: no such directory.")
        if Path(name).is_dir() and not Path(name, "config.json").is_file():
            raise UsageError(f"model {name!r} is a directory without config.json: give a Hugging Face model directory.")
        with quiet(), _loading(name):
            before = AutoConfig.from_pretrained(name)
            config = AutoConfig.from_pretrained(name, **problem.head_options)
            # only logits are read, and by name; a folder may ask for tuples, or for outputs that its attention lacks
            config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
            tokenizer = AutoTokenizer.from_pretrained(name)
            in_force = set_dropout(config, dropout)
            skeleton = _skeleton(config)
        agree(config, tokenizer, skeleton, name)
        sentence = sentence_folder(name)
        length = token_limit(max_length, config, tokenizer, skeleton, sentence)
        classes = tuple(str(before.id2label.get(i, f"LABEL_{i}")) for i in range(before.num_labels))
        return cls(name, config, tokenizer, length, in_force, classes, chosen_prompt(prompt, sentence, name), sentence)

    def moved(self, body: Mapping[str, torch.Tensor] | None) -> Pretrained:
        """The same model with other weights in its body."""
        return dataclasses.replace(self, body=body, _spare=[])

    def tokenise(self, rows: pd.DataFrame) -> list[dict[str, Any]]:
        """One feature dictionary per row, with the prompt, cut to the length; each text is tokenised once."""
        columns = ["text", "text_pair"] if "text_pair" in rows else ["text"]
        keys = list(rows[columns].itertuples(index=False, name=None))
        unknown = list(dict.fromkeys(key for key in keys if key not in self._tokens))
        if unknown:
            fresh = tokenise(pd.DataFrame(unknown, columns=columns), self.tokenizer, self.max_length, self.prompt)
            self._tokens.update(zip(unknown, fresh, strict=True))
        return [self._tokens[key] for key in keys]

    def mean_length(self, rows: pd.DataFrame) -> float:
        """Mean number of tokens of a row, from at most `SAMPLED` of them."""
        some = rows.iloc[:: max(1, len(rows) // SAMPLED)].head(SAMPLED)
        return float(np.mean([len(row["input_ids"]) for row in self.tokenise(some)]))

    def notes(self, max_length: int | None, prompt: str | None) -> Iterator[str]:
        """What a sentence-transformers folder decides here, and what it says that was not asked for.

        Args:
            max_length: As it was asked for.
            prompt: As it was asked for.
        """
        if self.sentence is None:
            return
        trained, prompts = self.sentence.max_length, self.sentence.prompts
        if max_length is None and trained == self.max_length < MAX_LENGTH:
            yield f"max_length {trained}, as the sentence encoder was trained: --max-length changes it"
        if prompt is None and prompts:
            yield (
                f"this sentence encoder was trained with a prompt before each text ({prompts_words(prompts)}), none is "
                f"put there: try one with --prompt {NAMED}{next(iter(prompts))}"
            )
        if self.sentence.lower_case and self.tokenizer.tokenize("A") != self.tokenizer.tokenize("a"):
            yield "this sentence encoder was trained on lower-case texts, and its tokenizer keeps capitals: lower them"

    @functools.cached_property
    def bias(self) -> bool:
        """Whether the output layer has one."""
        return output_layer(_skeleton(self.config), "bias").bias is not None

    @property
    def new(self) -> frozenset[str]:
        """Names of the weights that `load` has drawn."""
        return frozenset(self._new)

    def load(self, seed: int, problem: Problem | None = None) -> PreTrainedModel:
        """Load the model in float32, with new weights drawn with ``seed``, and the head of a checkpoint rescaled.

        Weights are float32 at any precision of the checkpoint, because at a rate of 2e-5 bfloat16 rounds most updates
        of AdamW to nothing. The head of a checkpoint is kept if its classes have the same names, with its rows in the
        order of the new classes. Otherwise it is drawn at random. Either is logged.

        Raises:
            UsageError: The checkpoint lacks weights of the body, which would be random.
        """
        model, new = self.read(seed)
        self._new.update(new)
        if new:
            self._say(f"new weights, drawn with seed {seed}: {', '.join(sorted(new))}")
        layer = last_linear(model)
        if layer is not None and not any(model.get_parameter(name) is layer.weight for name in new):
            self._take_over(model, layer, seed)
            if isinstance(problem, Regression) and problem.scaled:
                rescale(model, 1 / problem.spread, -problem.mean / problem.spread, "standardize")
        return model

    def read(self, seed: int) -> tuple[PreTrainedModel, frozenset[str]]:
        """The model as it is on disk, and the names of its weights that were drawn with ``seed``.

        Torch's random state afterwards depends on ``seed`` alone, also if the model was read by `peek`.

        Raises:
            UsageError: As `load`.
        """
        spare = self._spare.pop() if self._spare else None
        if spare is not None and spare.seed == seed:
            set_seed(seed)
            torch.set_rng_state(spare.random_state)
            return spare.model, spare.new
        with quiet(), _loading(self.name):
            set_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.name,
                config=copy.deepcopy(self.config),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        mismatched = {key for key, *_ in info["mismatched_keys"]}
        self._check_body(model, info["missing_keys"], mismatched, info["unexpected_keys"])
        for name in set(dict(model.named_parameters())).intersection(info["missing_keys"]):
            setattr(model.get_submodule(_drawn_part(model, name)), DRAWN, True)
        if self.body is not None:
            model.load_state_dict(self.body, strict=False)  # without the head
        return model, frozenset({*info["missing_keys"], *mismatched})

    def peek(self, seed: int) -> tuple[PreTrainedModel, frozenset[str]]:
        """As `read`; the next `read` with this seed gives the same model, which must not be changed until then."""
        model, new = self.read(seed)
        self._spare.append(_Spare(seed, model, new, torch.get_rng_state()))
        return model, new

    def _check_body(
        self, model: PreTrainedModel, missing: Collection[str], mismatched: Collection[str], unused: Collection[str]
    ) -> None:
        """Raise unless only a head is new or of another size.

        What the checkpoint lacks altogether may be new too if it is a pooler, or lies outside of the base model, as
        ModernBERT's `head` does: a sentence encoder is saved without it.

        Raises:
            UsageError: Another weight is new, or a weight is not finite.
        """
        heads = {name for name, part in anatomy(model).items() if part.head}
        broken = [name for name, p in model.named_parameters() if not all_finite(p)]
        if broken:
            raise UsageError(
                f"model {self.name!r}: {len(broken)} of its weights hold values that are not finite "
                f"({_some(broken)}): its training diverged, or the file is damaged. Give another checkpoint."
            )
        prefix, body = f"{model.base_model_prefix}.", dict(model.base_model.named_children())
        parts = {key: key.removeprefix(prefix).split(".")[0] for key in unused}
        left = sorted(key for key, part in parts.items() if part in body and part != "pooler")
        if left:
            self._say(f"{len(left)} weights of the checkpoint have no place in the model and are not used "
                      f"({_some(left)}): config.json may be of a smaller model")  # fmt: skip

        parameters = dict(model.named_parameters())
        base = {id(p) for p in model.base_model.parameters()}

        def may_be_new(name: str) -> bool:
            if name in heads or name not in parameters:
                return True
            above = ".pooler." in f".{name}" or id(parameters[name]) not in base
            return above and not any(key.endswith(_tail(name)) for key in unused)

        output = {name for name in heads if model.get_parameter(name).shape[:1] == (model.config.num_labels,)}
        lost = sorted({n for n in missing if not may_be_new(n)} | {n for n in mismatched if n not in output})
        if not lost:
            return
        count = len(parameters)
        said = f"model {self.name!r}: {len(lost)} of its {count} weights would be drawn at random, as the checkpoint "
        if all(name in mismatched for name in lost):
            said += f"holds them in other sizes than config.json says ({_some(lost)})"
            raise UsageError(f"{said}: give the config.json that belongs to the weights.")
        said += f"does not hold them ({_some(lost)})"
        if unused:
            said += f" but holds weights of other names ({_some(sorted(unused))})"
        raise UsageError(f"{said}: save the model without its wrapper, under the names of transformers.")

    def _take_over(self, model: PreTrainedModel, layer: nn.Linear, seed: int) -> None:
        """Give the head of a checkpoint the new classes: its rows in their order, or drawn anew for other classes."""
        config: Any = model.config
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        if Problem.of_config(config).ordered:
            return self._say("the head of the checkpoint is kept: it goes on predicting a number")
        order = matching(self.classes, names)
        if order is None:
            _draw_anew(model, layer, seed)
            return self._say(
                f"the head of the checkpoint is for other classes ({_some(self.classes)}): its output layer is drawn "
                f"anew for {_some(names)}",
                logging.WARNING,
            )
        with torch.no_grad():
            layer.weight.copy_(layer.weight[order].clone())
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[order].clone())
        moved = "" if order == sorted(order) else ", its rows put in their order"
        self._say(f"the head of the checkpoint is kept for the classes {_some(names)}{moved}")

    def _say(self, message: str, level: int = logging.INFO) -> None:
        """Log a message once, even if the model is loaded several times."""
        if message not in self._said:
            self._said.add(message)
            logger.log(level, "%s", message)


def all_finite(weight: torch.Tensor) -> bool:
    """Whether all entries are finite. Their sum mostly tells, without the copies that `torch.isfinite` makes."""
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())


def _skeleton(config: Any) -> PreTrainedModel:
    """The model of a config without its weights."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(copy.deepcopy(config))


def matching(old: Sequence[str], new: Sequence[str]) -> list[int] | None:
    """For each new class the old class of the same name, ignoring case and outer spaces; None if names differ.

    >>> matching(["NEGATIVE", "POSITIVE"], ["positive", "negative"])
    [1, 0]
    """
    folded = [[name.strip().casefold() for name in names] for names in (old, new)]
    if len(set(folded[0])) != len(old) or sorted(folded[0]) != sorted(folded[1]):
        return list(range(len(new))) if list(old) == list(new) else None
    return [folded[0].index(name) for name in folded[1]]


def _draw_anew(model: PreTrainedModel, layer: nn.Linear, seed: int) -> None:
    """Initialise one layer as the model initialises its new layers, with a seed."""
    torch.manual_seed(seed)
    held: Any
    for held in (layer, *layer.parameters()):
        held._is_hf_initialized = False  # else transformers leaves alone what was loaded
    model._init_weights(layer)


def _drawn_part(model: PreTrainedModel, name: str) -> str:
    """The part of the model that a new weight belongs to: the pooler, or a layer outside of the base model."""
    inside = name.startswith(f"{model.base_model_prefix}.")
    return name[: name.index("pooler") + len("pooler")] if inside else name.split(".")[0]


def _tail(name: str) -> str:
    """The name of a weight from its pooler on, or the whole name outside of one."""
    return name[max(name.find("pooler."), 0) :]


def _some(names: Iterable[str]) -> str:
    """The first names of a list, and how many there are."""
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (f", ... {len(listed)} in all" if len(listed) > SHOWN else "")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Replace errors of the library about an unreadable model by one sentence.

    Raises:
        UsageError: Instead.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # damaged files raise what their parsers raise
        raise UsageError(
            f"model {name!r} cannot be loaded as a text classifier: {one_line(error)[:500]} "
            "Check the name, the files and the connection."
        ) from error


def set_dropout(config: Any, probability: float | None) -> dict[str, float]:
    """Set every dropout probability of a config and return them; None only reads."""
    names = [
        name
        for name, value in config.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, (int, float))
        and not isinstance(value, bool)
    ]  # fmt: skip
    if probability is not None:
        if not names:
            raise UsageError(f"dropout {probability}: the config of this {config.model_type} model has no dropout.")
        for name in names:
            setattr(config, name, float(probability))
    return {name: float(getattr(config, name)) for name in names}


def agree(config: Any, tokenizer: PreTrainedTokenizerBase, model: nn.Module, name: str) -> None:
    """Make config and tokenizer agree on the padding token and on special tokens inside texts.

    Decoders take their answer from the last token that is not padding, and models like RoBERTa count positions without
    padding. Both know padding by the number in their config, which must be that of the tokenizer. Encoder-decoders take
    their answer from the last end token, and refuse rows with different numbers of them. Therefore the string of a
    special token inside a text is read as text.

    Args:
        config: Configuration of the model; its padding number is set.
        tokenizer: Tokenizer; its padding token is set.
        model: Model with embeddings of the right sizes; its weights are not read.
        name: Name of the model in messages.

    Raises:
        UsageError: There is no padding token, or none that both know.
    """
    wanted, rows = getattr(config, "pad_token_id", None), _vocabulary(model)
    if wanted is not None and not 0 <= wanted < rows:
        wanted = None
    if wanted is not None and (tokenizer.pad_token_id is None or _padded_positions(model) is not None):
        token = tokenizer.convert_ids_to_tokens(wanted)
        if token is not None and token != tokenizer.unk_token and token in tokenizer.all_special_tokens:
            tokenizer.pad_token = token
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UsageError(f"model {name!r}: its tokenizer has neither a padding nor an end token: set pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("no padding token: padding with the end token %r", tokenizer.eos_token)
    padding = tokenizer.pad_token_id
    if not 0 <= padding < rows:
        raise UsageError(
            f"model {name!r}: its tokenizer pads with token {padding}, its embeddings have {rows} rows: resize them "
            "with resize_token_embeddings, or give the tokenizer of the model."
        )
    if padding != wanted and wanted is not None and _padded_positions(model) is not None:
        raise UsageError(
            f"model {name!r}: its config pads with token {wanted}, its tokenizer with {padding}, and the model counts "
            "positions from that number on: give the tokenizer of the model."
        )
    config.pad_token_id = padding
    tokenizer.split_special_tokens = bool(getattr(config, "is_encoder_decoder", False))


def _vocabulary(model: Any) -> int:
    """Rows of the table of token embeddings."""
    return int(model.get_input_embeddings().num_embeddings)


def _padded_positions(model: nn.Module) -> nn.Embedding | None:
    """The table of positions of a model that counts them from its padding number on (RoBERTa, MPNet, Longformer)."""
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    return next((table for table in tables if table.padding_idx is not None), None)


def chosen_prompt(wanted: str | None, sentence: SentenceFolder | None, name: str) -> str:
    """What stands before the first text of every row: what was asked for, else nothing.

    Raises:
        UsageError: A name that the folder has no prompt for.
    """
    if wanted is None or not wanted.startswith(NAMED):
        return wanted or ""
    key = wanted.removeprefix(NAMED)
    known: Mapping[str, str] = {} if sentence is None else sentence.prompts
    if key not in known:
        held = f"its folder has {prompts_words(known) or 'none'}"
        raise UsageError(f"model {name!r} has no prompt {key!r}: {held}. Write out the text itself as the prompt.")
    return known[key]


def token_limit(
    wanted: int | None,
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module | None = None,
    sentence: SentenceFolder | None = None,
) -> int:
    """Tokens per row: what was asked for, else 128 or fewer if a sentence encoder was trained with fewer.

    There are never more than the model has positions for.
    """
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or math.inf)
    table = None if model is None else _padded_positions(model)
    if table is not None and table.padding_idx is not None:  # the first position is the one after the padding number
        limit = min(limit, table.num_embeddings - table.padding_idx - 1)
    if wanted is not None and wanted > limit:
        raise UsageError(f"max_length must be at most {int(limit)}, the model's limit, got {wanted}.")
    special = tokenizer.num_special_tokens_to_add()
    if wanted is not None and wanted <= special:
        raise UsageError(
            f"max_length must be above {special}, as so many tokens of a row mark its beginning and end, got {wanted}: "
            "no word would be read."
        )
    trained = MAX_LENGTH if sentence is None else sentence.max_length or MAX_LENGTH
    return int(min(wanted or min(MAX_LENGTH, trained), limit))
