"""Facts about a method that do not depend on a run: its paper and its cost. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FORWARD = 1 / 3  # passes of a forward alone, as a backward costs twice as much


@dataclass(frozen=True)
class Paper:
    """The paper that describes a method.

    Attributes:
        authors: Authors in the paper's order, as "Given Family", or "Family, Given" if the family name has several
            words.
        title: Title as printed.
        booktitle: Full name of the proceedings.
        venue: Short name of the proceedings, such as "NeurIPS".
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
        """Short citation, such as "Zhang et al., NeurIPS 2022"; two authors are both named."""
        names = self.families
        who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
        return f"{who}, {self.venue} {self.year}"

    def __str__(self) -> str:
        """The reference on one line, for docstrings."""
        return f"{', '.join(self.families)}: {self.title}. {self.venue} {self.year}, arXiv {self.arxiv}."

    @property
    def url(self) -> str:
        """The arXiv page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def key(self) -> str:
        """BibTeX key, such as "zhang2022neurips"."""
        return f"{self.families[0]}{self.year}{self.venue}".replace(" ", "").lower()

    def bibtex(self) -> str:
        """BibTeX entry."""
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
    """Cost of a method in addition to plain fine-tuning.

    Attributes:
        passes: Passes of one step, as a multiple of those of a plain step.
        held: Bytes between steps for each float32 weight that the method acts on, by stage of the run; "" for a single
            stage.
        during: Further bytes for each such weight during a step.
    """

    passes: float = 1.0
    held: Mapping[str, int] = field(default_factory=lambda: {"": 0})
    during: int = 0

    @property
    def memory(self) -> str:
        """The bytes in words, such as "8 (stage I), 9 (stage II), +4 during a step"."""
        held = ", ".join(f"{size} ({stage})" if stage else str(size) for stage, size in self.held.items())
        return f"{held}, +{self.during} during a step" if self.during else held
