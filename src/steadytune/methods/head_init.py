"""HeadInit: start with the best head on frozen features, or with words, instead of a random one.

phi(x)  input of the last linear layer, model in evaluation mode
W, b <- argmin  C * sum_i -log softmax(W phi(x_i) + b)[y_i] + |W|^2 / 2          before the first step
W_c, b_c <- weights of the word of class c in the language model's output layer  ("words")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from ..core import Method, Run, Within
from ..core.facts import Paper
from ..heads.probe import Probe
from ..heads.start import probe_of_batches, set_head
from ..heads.words import word_head


@dataclass
class HeadInit(Method):
    """Initialise the head as a linear probe on frozen features (the first half of LP-FT).

    Args:
        how: Probe for classes. Numbers use ridge regression, several labels per row one logistic regression for each
            label. ``"words"`` fits nothing: the head is the language model's output for one word per class (a
            verbaliser), which is exact for decoders and ModernBERT and refused elsewhere.
        scale: Factor on the probe's weights. A large head slows the change of features (arXiv 2405.16747).
        words: With ``how="words"``, a word for each class in the order of the outputs, with slashes between:
            ``"terrible/great"``. None takes the names of the classes.

    The probe is fitted in setup, on one pass over the training data. A `Run` needs them as ``data``; the Trainer passes
    its own. The penalty is chosen by cross-validation. Words need no data, but the checkpoint of a language model under
    the model's ``name_or_path``. Runs on the same data start with the same head, whatever their seeds, so their soup is
    valid. The head counts as new: anchors leave it out.

    Departures:
        The authors choose the penalty by accuracy; we choose it by log-loss, because the size of the head matters in
        the training that follows. For further differences see `steadytune.heads.probe`.

    Raises:
        ValueError: If words are given and not asked for; in setup, if the logits are not those of a last linear layer,
            if there is no data, if batches have no labels, if the weights are sharded, or if the words cannot make a
            head (see `steadytune.heads.words`).
    """

    how: Literal["logistic", "ridge", "words"] = "logistic"
    scale: Annotated[float, Within("[0, inf)")] = 1.0
    words: str | None = None

    at_setup: ClassVar = "writes"
    conflicts: ClassVar[tuple[str, ...]] = ("weights that are sharded before the run is made",)
    acts_on_unread = "never"
    paper: ClassVar = Paper(
        authors=("Ananya Kumar", "Aditi Raghunathan", "Robbie Jones", "Tengyu Ma", "Percy Liang"),
        title="Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2022,
        arxiv="2202.10054",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words is not None and self.how != "words":
            raise ValueError(f"HeadInit(how={self.how!r}) reads no words: give how='words', or leave words out")

    def setup(self, run: Run) -> None:
        if run.sharded:
            raise ValueError(
                "HeadInit writes the whole head, but the weights are sharded: make the Run before sharding"
            )
        with run.forked_rng():
            torch.manual_seed(run.draw_seed("data"))  # so that a shuffling loader does not change the order of training
            probe = self.begin(run)
        set_head(run.model, probe, self.scale)
        self.strength = probe.strength

    def begin(self, run: Run) -> Probe:
        """The head of the first step."""
        if self.how == "words":
            model: Any = run.model
            return word_head(model, self.words.split("/") if self.words else list(model.config.id2label.values()))
        if run.data is None:
            raise ValueError("HeadInit fits its probe on the training data: pass Run(..., data=lambda: loader)")
        return probe_of_batches(run.model, run.data(), how=self.how)

    def state_dict(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strength = state["strength"]
