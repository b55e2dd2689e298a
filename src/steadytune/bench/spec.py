"""What a study is: a YAML file, checked, and the runs it asks for. No torch here.

    models x tasks x train sizes x recipes x seeds, one run each

A run is known by its specification, a plain dictionary of all that decides its result; the hash of that is its name.
Options that are not in use (None) are not in it, so that an option of a later version leaves old runs what they were.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ..config import options, read, value
from ..data.metrics import METRICS
from ..errors import UsageError, suggest
from ..fitting.options import SEEDS, Options
from ..fitting.spelling import make_methods, make_procedure, method_record, procedure_record
from ..tasks import Task, find, seen_by

FORMAT = 1
FILE_SEEDS = {"seed", *(f"{name}_seed" for name in SEEDS)}
OPTIONS = {name: hint for name, hint in options(Options).items() if name not in {*FILE_SEEDS, "train_size"}}
PARTS = ("methods", "procedure")  # of a recipe, beside options
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Model:
    """A pre-trained model of a study.

    Attributes:
        name: what tables call it.
        path: directory or hub name; ``$NAME`` in it is taken from the environment when runs are made.
        seen: benchmark sets it was trained on before, beyond those known of models of this name.
    """

    name: str
    path: str
    seen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        name: of the study; its results go to ``runs/<name>`` unless told otherwise.
        models: to start from.
        tasks: names of `steadytune.tasks`.
        train_sizes: rows drawn per run, None for all.
        recipes: name -> ``methods``, ``procedure`` and options of `Options`, on top of `options`.
        options: of all recipes.
        seeds: one run each per recipe, the same for every recipe.
        factorial: seeds that vary on their own, every value of `seeds` with every other, while the rest stay at the
            first; by default all five vary together.
        out_of_domain: also test on the task's out-of-domain sets.
        test_rows: at most so many rows of each test set, the same in every run; None for all.
        label_noise: share of the training labels replaced by another class.
        imbalance: share of the rows of every class but the largest that stay; None for all.
        metric: instead of each task's own.
        keep_models: write the trained models too.
        data_root: folder of the tasks' files, where no other is given.
    """

    name: str
    models: tuple[Model, ...]
    tasks: tuple[str, ...]
    recipes: Mapping[str, Mapping[str, Any]]
    train_sizes: tuple[int | None, ...] = (None,)
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    factorial: tuple[str, ...] = ()
    out_of_domain: bool = False
    test_rows: int | None = None
    label_noise: float = 0.0
    imbalance: float | None = None
    metric: str | None = None
    keep_models: bool = False
    data_root: str | None = None

    @classmethod
    def read(cls, file: str | Path, **changes: Any) -> Study:
        """A study file, or the name of a preset.

        Args:
            file: YAML; ``preset: NAME`` in it takes that preset's settings where the file has none.
            **changes: settings that win over the file's, None for not given.

        Raises:
            UsageError: no such file or preset, not YAML, an unknown key, a value that cannot be.
        """
        given = preset(str(file)) if str(file) in presets() else _settings(Path(file))
        if "preset" in given:
            given = {**preset(str(given.pop("preset"))), "name": Path(file).stem, **given}
        changes = {key: value for key, value in changes.items() if value is not None}
        return cls.of({"name": Path(file).stem, **given, **changes}, str(file))

    @classmethod
    def of(cls, given: Mapping[str, Any], source: str = "the study") -> Study:
        """A study from plain values, checked.

        Raises:
            UsageError: as `read`.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise UsageError(f"{source}: unknown key {key!r}.{suggest(key, known)}")
        for key in ("models", "tasks", "recipes"):
            if not given.get(key):
                raise UsageError(f"{source}: {key} is missing: name at least one.")
        values = {key: _PARSERS[key](f"{source}: {key}", value) for key, value in given.items()}
        study = cls(**values)
        study._check(source)
        return study

    def text(self) -> str:
        """The study as YAML that `read` takes."""
        import yaml

        plain = json.loads(json.dumps(dataclasses.asdict(self)))
        plain["models"] = {model.pop("name"): model for model in plain["models"]}
        return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def _check(self, source: str) -> None:
        for task in map(find, self.tasks):
            kind = "classification" if task.labels else "regression"
            if self.metric is not None and self.metric not in METRICS[kind]:
                raise UsageError(f"{source}: task {task.name} is a {kind}, its metrics are {', '.join(METRICS[kind])}.")
            if kind == "regression" and (self.label_noise or self.imbalance is not None):
                raise UsageError(f"{source}: label_noise and imbalance need classes, task {task.name} has none.")
        for name in self.recipes:
            self.recipe(name)
            self.parts(name)

    def parts(self, name: str) -> list[dict[str, Any]]:
        """What a recipe has beyond plain training, as records: its methods, and last its procedure."""
        given = self.recipes[name]
        found = [method_record(m) for m in make_methods(given.get("methods", ()))]
        procedure = make_procedure(given.get("procedure"))
        return found if procedure is None else [*found, procedure_record(procedure)]

    def recipe(self, name: str) -> Options:
        """The options of a recipe, without seeds."""
        given = {key: v for key, v in {**self.options, **self.recipes[name]}.items() if key not in PARTS}
        for key in given:
            if key not in OPTIONS:
                raise UsageError(f"recipe {name!r}: unknown option {key!r}.{suggest(key, sorted(OPTIONS))}")
        found = {
            key: value(f"recipe {name!r}: {key}", key, OPTIONS[key], v) for key, v in given.items() if v is not None
        }
        held_out = 0.1 if found.get("evaluations") else 0.0  # rows are held out for what selects, and only for that
        return Options.of({"validation_share": held_out, **found})

    def corruption(self, recipe: Options) -> dict[str, Any]:
        """What is done to the training rows, as it stands in the specification of a run.

        Steps were once counted before the classes were thinned. Where that makes a difference, ``steps`` tells the runs
        of now from those of then.
        """
        counted = self.imbalance is not None and recipe.steps is None
        return {
            "label_noise": self.label_noise,
            "imbalance": self.imbalance,
            **({"steps": "of the rows that are left"} if counted else {}),
        }

    def draws(self) -> Iterator[dict[str, int]]:
        """The seeds of each run of a recipe."""
        if not self.factorial:
            yield from (dict.fromkeys(SEEDS, seed) for seed in self.seeds)
            return
        for values in itertools.product(self.seeds, repeat=len(self.factorial)):
            yield {**dict.fromkeys(SEEDS, self.seeds[0]), **dict(zip(self.factorial, values, strict=True))}

    def runs(self, data_root: str | Path | None = None) -> list[Trial]:
        """Every run, seeds outermost: whatever is interrupted has whole rounds of all recipes.

        Args:
            data_root: instead of the study's own.

        Raises:
            UsageError: a model or a data file is not there.
        """
        place = data_root or self.data_root
        if place is None:
            raise UsageError("give the folder of the benchmark tasks with --data-root DIR, or data_root in the study.")
        root = Path(expanded(place))
        paths = {model: expanded(model.path) for model in self.models}
        models = {model: fingerprint_model(path) for model, path in paths.items()}
        tasks = {name: fingerprint_files(_files(find(name), root, self.out_of_domain)) for name in self.tasks}
        found = []
        for seeds, (model, weights), (task, data), size, name in itertools.product(
            list(self.draws()), models.items(), tasks.items(), self.train_sizes, self.recipes
        ):
            recipe = self.recipe(name)
            spec = {
                "model": {"name": model.name, "fingerprint": weights},
                "task": {"name": task, "fingerprint": data},
                "recipe": name,
                "methods": self.parts(name),
                "options": in_use(recipe, find(task)),
                "train_size": size,
                "corruption": self.corruption(recipe),
                "tests": {"out_of_domain": self.out_of_domain, "rows": self.test_rows},
                "metric": self.metric or find(task).metric,
                "seeds": seeds,
            }
            found.append(
                Trial(
                    spec,
                    paths[model],
                    str(root),
                    tuple(self.recipes[name].get("methods", ())),
                    self.recipes[name].get("procedure"),
                    seen_by((model.name, paths[model]), find(task), self.out_of_domain, model.seen),
                    self.keep_models,
                )
            )
        return found


def in_use(recipe: Options, task: Task) -> dict[str, Any]:
    """The options of a recipe that decide something of this task; learning raw numbers is none, as it always was."""
    found = {key: v for key in sorted(OPTIONS) if (v := getattr(recipe, key)) is not None}
    if task.labels or not recipe.standardize:
        found.pop("standardize", None)
    return found


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of a study: its specification, and where this machine finds what it needs.

    Attributes:
        spec: all that decides the result.
        model: directory or hub name.
        data_root: folder of the tasks' files.
        methods: as the study writes them.
        procedure: likewise.
        seen: benchmark sets the model knew before.
        keep_model: write the trained model beside the record.
    """

    spec: dict[str, Any]
    model: str
    data_root: str
    methods: tuple[str, ...]
    procedure: str | None = None
    seen: tuple[str, ...] = ()
    keep_model: bool = False

    @property
    def id(self) -> str:
        """16 hexadecimal digits, a hash of the specification."""
        text = json.dumps({"format": FORMAT, **self.spec}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """For people: task, rows, recipe, model and the seeds that differ."""
        spec = self.spec
        size = "" if spec["train_size"] is None else f" {spec['train_size']}"
        return f"{spec['task']['name']}{size} {spec['recipe']} {spec['model']['name']} {seed_text(spec['seeds'])}"

    def matches(self, filters: Sequence[str]) -> bool:
        """Whether every filter ``key=value|value`` holds; values are shell patterns.

        Raises:
            UsageError: an unknown key, or no ``=``.
        """
        spec = self.spec
        known = {
            "model": spec["model"]["name"],
            "task": spec["task"]["name"],
            "recipe": spec["recipe"],
            "size": "all" if spec["train_size"] is None else str(spec["train_size"]),
            "seed": seed_text(spec["seeds"]).removeprefix("seed "),
        }
        for text in filters:
            key, equals, patterns = text.partition("=")
            if not equals or key not in known:
                raise UsageError(f"filter {text!r} must be one of {', '.join(known)}, then =, then a pattern.")
            if not any(fnmatch.fnmatchcase(known[key], pattern) for pattern in patterns.split("|")):
                return False
        return True


def seed_text(seeds: Mapping[str, int]) -> str:
    """`seed 3`, or each seed by name where they differ."""
    if len(set(seeds.values())) == 1:
        return f"seed {next(iter(seeds.values()))}"
    return "seed " + ",".join(f"{name}:{value}" for name, value in seeds.items())


# ---- presets and files ------------------------------------------------------------------------------------------


def presets() -> dict[str, str]:
    """Name -> text of the study files that come with steadytune."""
    folder = resources.files(__package__) / "presets"
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset.

    Raises:
        UsageError: there is none of that name.
    """
    import yaml

    known = presets()
    if name not in known:
        raise UsageError(f"unknown preset {name!r}.{suggest(name, known)}")
    return {"name": name, **yaml.safe_load(known[name])}


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"{file}: no such study file; presets are {', '.join(presets())}.")
    return dict(read(file)[0])


def expanded(path: str | Path) -> str:
    """A path with every ``$NAME`` taken from the environment.

    Raises:
        UsageError: one is not set.
    """
    found = os.path.expandvars(path)
    if unset := re.search(r"\$\{?(\w+)", found):
        raise UsageError(
            f"the environment variable {unset[1]} in {str(path)!r} is not set: {unset[1]}=DIR steadytune ..."
        )
    return str(found)


def fingerprint_model(path: str) -> str:
    """Hash of a model's config and weights, or the commit of a hub model; 16 hexadecimal digits.

    Raises:
        UsageError: neither a model directory nor a model of the hub.
    """
    folder = Path(path)
    if folder.is_dir():
        weights = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
        if not weights or not (folder / "config.json").is_file():
            raise UsageError(f"model {path!r} has no config.json or no weights: give a Hugging Face model directory.")
        return fingerprint_files([folder / "config.json", *weights])
    if path.startswith((".", "/", "~")):
        raise UsageError(f"model {path!r}: no such directory.")
    return _hub_commit(path)[:16]


def _hub_commit(name: str) -> str:
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(name)._commit_hash or name)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name!r}: no such directory, and the hub does not give it: {error}") from error


def fingerprint_files(files: Sequence[Path]) -> str:
    """Hash of the contents, 16 hexadecimal digits.

    Raises:
        UsageError: a file is not there.
    """
    total = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: no such file: give the folder of the benchmark data with --data-root DIR.")
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def _files(task: Task, root: Path, beyond: bool) -> list[Path]:
    names = [f"{task.name}/{task.train}", *task.tests, *(task.beyond if beyond else ())]
    return [root / f"{name.partition(':')[0]}.parquet" for name in names]


# ---- values -----------------------------------------------------------------------------------------------------


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _whole(what: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{what} must be a whole number from {least} on, got {value!r}.")
    return value


def _wholes(what: str, value: Any) -> tuple[int | None, ...]:
    return tuple(None if v is None else _whole(what, v, 1) for v in _listed(value))


def _seeds(what: str, value: Any) -> tuple[int, ...]:
    """A number of seeds, or the seeds themselves."""
    found = [_whole(what, v, 0) for v in value] if isinstance(value, (list, tuple)) else range(_whole(what, value, 1))
    if not found or len(set(found)) < len(found):
        raise UsageError(f"{what} must be different numbers, got {value!r}.")
    return tuple(found)


def _share(what: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise UsageError(f"{what} must be a share from 0 to 1, got {value!r}.")
    return float(value)


def _truth(what: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{what} must be true or false, got {value!r}.")
    return value


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{what} must be text, got {value!r}.")
    return value


def _texts(what: str, value: Any) -> tuple[str, ...]:
    return tuple(_text(what, v) for v in _listed(value))


def _mapping(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{what} must be names with values, as in `lr: 1.0e-4`, got {value!r}.")
    return dict(value)


def _models(what: str, value: Any) -> tuple[Model, ...]:
    """A path, a list of paths, or name -> path (or ``path`` and ``seen``)."""
    if not isinstance(value, Mapping):
        return tuple(Model(Path(path).name, path) for path in _texts(what, value))
    found = []
    for name, entry in value.items():
        about = _mapping(f"{what}.{name}", entry) if isinstance(entry, Mapping) else {"path": entry}
        for key in about.keys() - {"path", "seen"}:
            raise UsageError(f"{what}.{name}: unknown key {key!r}.{suggest(key, ['path', 'seen'])}")
        path = _text(f"{what}.{name}: path", about.get("path"))
        found.append(Model(str(name), path, _texts(f"{what}.{name}: seen", about.get("seen", []))))
    return tuple(found)


def _recipes(what: str, value: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for name, entry in _mapping(what, value).items():
        about = _mapping(f"{what}.{name}", entry or {})
        found[name] = {**about, "methods": _texts(f"{what}.{name}: methods", about.get("methods", []))}
        if "procedure" in about:
            _text(f"{what}.{name}: procedure", about["procedure"])
    return found


def _factors(what: str, value: Any) -> tuple[str, ...]:
    for name in _texts(what, value):
        if name not in SEEDS:
            raise UsageError(f"{what}: unknown seed {name!r}.{suggest(name, SEEDS)}")
    return _texts(what, value)


def _or_none(parse: Any) -> Any:
    return lambda what, value: None if value is None else parse(what, value)


_PARSERS = {
    "name": _text,
    "models": _models,
    "tasks": _texts,
    "train_sizes": _wholes,
    "recipes": _recipes,
    "options": _mapping,
    "seeds": _seeds,
    "factorial": _factors,
    "out_of_domain": _truth,
    "test_rows": _or_none(lambda what, value: _whole(what, value, 1)),
    "label_noise": _share,
    "imbalance": _or_none(_share),
    "metric": _or_none(_text),
    "keep_models": _truth,
    "data_root": _or_none(_text),
}
