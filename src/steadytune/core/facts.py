"""What is known about a method before it runs: where it comes from and what it costs. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paper:
    """The paper a method is written from.

    Attributes:
        authors: "Given Family", or "Family, Given" where the family name has several words; in the paper's order.
        title: As printed.
        booktitle: The proceedings, written out.
        venue: Their short name, as in "NeurIPS".
        year: Year of the proceedings.
        arxiv: The arXiv identifier, as in "2211.01642".
    """

    authors: tuple[str, ...]
    title: str
    booktitle: str
    venue: str
    year: int
    arxiv: str

    @property
    def families(self) -> tuple[str, ...]:
        """Family names in the paper's order."""
        return tuple(a.partition(",")[0] if "," in a else a.split()[-1] for a in self.authors)

    @property
    def short(self) -> str:
        """As in "Zhang et al., NeurIPS 2022"; two authors are both named."""
        names = self.families
        who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
        return f"{who}, {self.venue} {self.year}"

    def __str__(self) -> str:
        """The reference on one line, as docstrings show it."""
        return f"{', '.join(self.families)}: {self.title}. {self.venue} {self.year}, arXiv {self.arxiv}."

    @property
    def url(self) -> str:
        """The arXiv page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def key(self) -> str:
        """The BibTeX key, as in "zhang2022neurips"."""
        return f"{self.families[0]}{self.year}{self.venue}".replace(" ", "").lower()

    def bibtex(self) -> str:
        """The entry for a reference list."""
        fields = {
            "title": f"{{{self.title}}}",
            "author": " and ".join(self.authors),
            "booktitle": self.booktitle,
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@inproceedings{{{self.key},\n{lines}\n}}"


@dataclass(frozen=True)
class Cost:
    """What a method costs beside plain fine-tuning.

    Attributes:
        passes: Forward and backward passes of one step, in those of a plain step.
        held: Bytes per float32 weight acted on that stay between steps, by stage of the run; one stage is "".
        during: More bytes per weight acted on while a step is under way.
    """

    passes: float = 1.0
    held: Mapping[str, int] = field(default_factory=lambda: {"": 0})
    during: int = 0

    @property
    def memory(self) -> str:
        """The bytes in words, as in "8 (stage I), 9 (stage II), +4 during a step"."""
        held = ", ".join(f"{size} ({stage})" if stage else str(size) for stage, size in self.held.items())
        return f"{held}, +{self.during} during a step" if self.during else held
