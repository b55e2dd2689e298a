"""What a study is: a YAML file, checked, and the runs that it asks for. No torch here.

    models x tasks x train sizes x recipes x seeds, one run each

A run is known by its specification, a plain dictionary of all that decides its result; the hash of the specification is
the run's name. Options that are not in use (None) are left out of it, so that an option that a later version adds
does not rename old runs.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ..config import ALIASES, Document, Seed, Share, Text, Truth, Whole, checked, options, read, value
from ..errors import UsageError, suggest
from ..fitting.options import SEEDS, Options
from ..fitting.spelling import make_methods, make_procedure, method_record, procedure_record
from ..tasks import TASKS, find, layout, seen_by
from .own_tables import HELD_OUT, OwnTables
from .places import expanded, fingerprint_files, fingerprint_model
from .short_forms import spelled, spread

FORMAT = 1
FILE_SEEDS = {"seed", *(f"{name}_seed" for name in SEEDS)}
OPTIONS = {name: hint for name, hint in options(Options).items() if name not in {*FILE_SEEDS, "train_size"}}
PARTS: dict[str, Any] = {"methods": tuple[Text, ...], "procedure": Text | None}  # of a recipe, beside options
DATA_ROOT = "give the folder of the benchmark data with --data-root DIR"


@dataclass(frozen=True)
class Model:
    """A pre-trained model of a study.

    Attributes:
        name: Name of the model in tables.
        path: Directory or hub name; ``$NAME`` in it is taken from the environment when runs are made.
        seen: Benchmark sets that the model was trained on before, beyond those known of models of this name.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    name: Text
    path: Text
    seen: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        name: Name of the study; its results go to ``runs/<name>`` unless told otherwise.
        models: Pre-trained models to start from.
        tasks: Names of benchmark tasks (`steadytune.tasks`) and of `tables`.
        recipes: Name -> ``methods``, ``procedure`` and options of `Options`, which win over `options`.
        train_sizes: Number of rows drawn per run, None for all.
        options: Options of every recipe.
        seeds: Seeds of the runs of every recipe, one run for each.
        factorial: Seeds that vary on their own: every value of `seeds` with every other, while the rest stay at the
            first value. By default all five seeds vary together.
        out_of_domain: Whether the out-of-domain sets of the benchmark tasks are test sets too.
        test_rows: Number of rows of each test set, the same rows in every run; None for all.
        label_noise: Share of the training labels that are replaced by another class.
        imbalance: Share of the rows that stay of every class but the largest; None for all.
        metric: Metric of every task, instead of each task's own.
        keep_models: Whether the trained models are written too.
        data_root: Folder of the benchmark tasks, where no other is given.
        tables: The tasks that are a user's own tables.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    name: Text
    models: tuple[Model, ...]
    tasks: tuple[Text, ...]
    recipes: Mapping[str, Mapping[str, Any]]
    train_sizes: tuple[Whole | None, ...] = (None,)
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    factorial: tuple[Text, ...] = ()
    out_of_domain: Truth = False
    test_rows: Whole | None = None
    label_noise: Share = 0.0
    imbalance: Share | None = None
    metric: Text | None = None
    keep_models: Truth = False
    data_root: Text | None = None
    tables: tuple[OwnTables, ...] = ()

    @classmethod
    def read(cls, file: str | Path, **changes: Any) -> Study:
        """A study file, or the name of a preset.

        Args:
            file: YAML; ``preset: NAME`` in it takes that preset's settings where the file has none. Paths of own tables
                are relative to the file.
            **changes: Settings that win over the file's, None for not given.

        Raises:
            UsageError: No such file or preset, not YAML, an unknown key, or a value that is not what its key takes;
                with the line of the file.
        """
        document = Document(str(file), preset(str(file)), {}) if str(file) in presets() else _settings(Path(file))
        given = {"name": Path(file).stem, **document.values}
        if "preset" in given:
            given = {**preset(str(given.pop("preset"))), **given}
        changed = {key: value for key, value in changes.items() if value is not None}
        lines = {path: line for path, line in document.lines.items() if path[0] not in changed}
        return cls.of({**given, **changed}, Document(document.file, {}, lines))

    @classmethod
    def of(cls, given: Mapping[str, Any], document: Document | None = None) -> Study:
        """A study from plain values, checked.

        Args:
            given: What a study file may hold.
            document: The file that it stands in.

        Raises:
            UsageError: As `read`.
        """
        document = document or Document("the study", {}, {})
        for key in given:
            if key not in KEYS:
                raise UsageError(f"{document.where([key])}: unknown key {key!r}.{suggest(str(key), KEYS)}")
        for key in ("models", "tasks", "recipes"):
            if not given.get(key) and not (key == "recipes" and given.get("methods")):
                raise UsageError(f"{document.where()}: {key} is missing: name at least one.")
        plain = spread(given, document)

        def where(path: tuple[Any, ...]) -> str:
            names = spelled(plain, path)
            return ": ".join(filter(None, [document.where(names), ".".join(names)]))

        study = checked(cls, plain, where)
        study = dataclasses.replace(study, tables=tuple(table.at(Path(document.file).parent) for table in study.tables))
        study._check(document)
        return study

    def text(self, folder: str | Path = ".") -> str:
        """The study as YAML that `read` takes from a file in ``folder``."""
        import yaml

        plain = json.loads(json.dumps(dataclasses.asdict(self)))
        plain["models"] = {model.pop("name"): model for model in plain["models"]}
        del plain["tables"]
        if self.tables:
            tables = [dataclasses.asdict(table.seen_from(Path(folder))) for table in self.tables]
            named = {table.pop("name"): {key: v for key, v in table.items() if v} for table in tables}
            plain["tasks"] = {name: named.get(name) for name in self.tasks}
        return str(yaml.safe_dump(json.loads(json.dumps(plain)), sort_keys=False, allow_unicode=True))

    def _check(self, document: Document) -> None:
        """What the types of the fields do not say."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"{document.where(['seeds'])}: seeds must be different numbers, got {[*self.seeds]}.")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            where = document.where(["models"])
            raise UsageError(f"{where}: models must have different names, got {', '.join(names)}: write NAME: PATH.")
        for name in self.factorial:
            if name not in SEEDS:
                where = document.where(["factorial"])
                raise UsageError(f"{where}: factorial: unknown seed {name!r}.{suggest(name, SEEDS)}")
        for task in (find(name) for name in self.tasks if name not in self._own):
            problem = task.problem
            if self.metric is not None and self.metric not in problem.metrics:
                known = ", ".join(problem.metrics)
                raise UsageError(
                    f"{document.where(['metric'])}: task {task.name} is a {problem.kind}, its metrics are {known}."
                )
            if not problem.classes:
                self._check_corruption(task.name, document)
        for table in self.tables:
            where = document.where(["tasks", table.name])
            if table.name in TASKS:
                raise UsageError(f"{where}: {table.name} is a benchmark task: call your own table otherwise.")
            if table.crossed and HELD_OUT in table.tests:
                raise UsageError(f"{where}: {HELD_OUT!r} is what the rows of a fold are called: rename that test file.")
        for key, given in self.options.items():
            with document.at("options", key):
                option("options", key, given)
        for name, recipe in self.recipes.items():
            for key in recipe:
                with document.at("recipes", name, key):
                    _check_entry(f"recipe {name!r}", key, recipe[key])
            with document.at("recipes", name):
                self.recipe(name)
                self.parts(name)

    def _check_corruption(self, task: str, document: Document | None = None) -> None:
        """Raise, on behalf of a task without exclusive classes, if labels are to be changed."""
        if self.label_noise or self.imbalance is not None:
            where = "" if document is None else f"{document.where()}: "
            raise UsageError(f"{where}label_noise and imbalance need classes, task {task} has none.")

    @property
    def _own(self) -> dict[str, OwnTables]:
        return {table.name: table for table in self.tables}

    def parts(self, name: str) -> list[dict[str, Any]]:
        """Records of what a recipe has beyond plain training: its methods and, last, its procedure."""
        given = self.recipes[name]
        records = [method_record(m) for m in make_methods(given.get("methods", ()))]
        procedure = make_procedure(given.get("procedure"))
        return records if procedure is None else [*records, procedure_record(procedure)]

    def recipe(self, name: str) -> Options:
        """The options of a recipe, without seeds."""
        where = f"recipe {name!r}"
        recipe = {key: v for key, v in self.recipes[name].items() if key not in PARTS}
        given = {**chosen_options("options", self.options), **chosen_options(where, recipe)}
        own = {key: v for key, v in given.items() if v is not None}
        held_out = 0.1 if own.get("evaluations") else 0.0  # rows are held out for what selects, and only for that
        return Options.of({"validation_share": held_out, **own})

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
            data_root: Folder of the benchmark tasks, instead of the study's own.

        Raises:
            UsageError: A model or a data file is not there, or an own table is not right.
        """
        place = data_root or self.data_root
        if place is None and any(name not in self._own for name in self.tasks):
            raise UsageError("give the folder of the benchmark tasks with --data-root DIR, or data_root in the study.")
        root = Path(expanded(place or "."))
        paths = {model: expanded(model.path) for model in self.models}
        models = {model: fingerprint_model(path) for model, path in paths.items()}
        tasks = [
            self._own_task(self._own[name]) if name in self._own else self._task(name, root) for name in self.tasks
        ]
        trials = []
        for seeds, (model, weights), task, size, name in itertools.product(
            list(self.draws()), models.items(), tasks, self.train_sizes, self.recipes
        ):
            recipe = self.recipe(name)
            spec = {
                "model": {"name": model.name, "fingerprint": weights},
                "task": task.spec,
                "recipe": name,
                "methods": self.parts(name),
                "options": in_use(recipe, task.numbers),
                "train_size": size,
                "corruption": self.corruption(recipe),
                "tests": {"out_of_domain": self.out_of_domain, "rows": self.test_rows},
                "metric": task.metric,
                "seeds": seeds,
            }
            seen = (
                ()
                if task.own
                else seen_by((model.name, paths[model]), find(task.spec["name"]), self.out_of_domain, model.seen)
            )
            trials.append(
                Trial(
                    spec,
                    paths[model],
                    str(root),
                    tuple(self.recipes[name].get("methods", ())),
                    self.recipes[name].get("procedure"),
                    seen,
                    self.keep_models,
                    task.own,
                )
            )
        return trials

    def _task(self, name: str, root: Path) -> _Task:
        task = find(name)
        files = [root / file.path for file in layout(task, self.out_of_domain)]
        hash = fingerprint_files(files, DATA_ROOT)
        return _Task({"name": name, "fingerprint": hash}, self.metric or task.metric, not task.labels)

    def _own_task(self, own: OwnTables) -> _Task:
        """Read and check the tables; columns and kind that were found are part of the runs' specification."""
        data, files = own.examine(), own.files()
        if not data.problem.classes:
            self._check_corruption(own.name)
        table = data.table
        assert table is not None
        spec = {
            "name": own.name,
            "fingerprint": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16],
            "files": files,
            "kind": data.problem.kind,
            "text": list(table.text or ()),
            **table.form.record(),
            "group": own.group,
            **({"folds": own.folds} if own.crossed else {}),
        }
        return _Task(spec, data.problem.metric(self.metric or own.metric).name, not data.problem.names, own)


# What a study file may hold: own tables stand under tasks, and `methods` makes a recipe for each of them.
KEYS = [*(f.name for f in dataclasses.fields(Study) if f.name != "tables"), "methods", "preset"]


@dataclass(frozen=True)
class _Task:
    """A task as its runs need it.

    Attributes:
        spec: Its part of a run's specification.
        metric: Metric of its runs.
        numbers: Whether its labels are numbers.
        own: The files, for a user's own tables.
    """

    spec: dict[str, Any]
    metric: str
    numbers: bool
    own: OwnTables | None = None


def _check_entry(where: str, key: str, given: Any) -> None:
    """Raise unless an entry of a recipe is of the type of its key."""
    if key in PARTS:
        checked(PARTS[key], given, lambda path: f"{where}: {key}")
    else:
        option(where, key, given)


def option(where: str, key: str, given: Any) -> Any:
    """The value of an option of `Options`.

    Raises:
        UsageError: There is no such option, or the value is not of its type; ``where`` starts the sentence.
    """
    name = ALIASES.get(key, key)
    if name not in OPTIONS:
        raise UsageError(f"{where}: unknown option {key!r}.{suggest(key, sorted(OPTIONS))}")
    return None if given is None else value(f"{where}: {key}", name, OPTIONS[name], given)


def chosen_options(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of options by the names of the fields of `Options`.

    Raises:
        UsageError: As `option`, and for an option that is given under two names.
    """
    chosen: dict[str, Any] = {}
    for key, v in given.items():
        name = ALIASES.get(key, key)
        if name in chosen:
            raise UsageError(f"{where}: {key} and {name} are two names of one option: give one of them.")
        chosen[name] = option(where, key, v)
    return chosen


def in_use(recipe: Options, numbers: bool) -> dict[str, Any]:
    """Options that affect a task; `standardize` counts only for numbers and when it is on, so old ids stay valid."""
    used = {key: v for key in sorted(OPTIONS) if (v := getattr(recipe, key)) is not None}
    if not numbers or not recipe.standardize:
        used.pop("standardize", None)
    return used


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of a study: its specification, and where this machine finds what it needs.

    Attributes:
        spec: Everything that decides the result.
        model: Directory or hub name of the model.
        data_root: Folder of the benchmark tasks.
        methods: Methods as the study writes them.
        procedure: Procedure as the study writes it.
        seen: Benchmark sets that the model knew before.
        keep_model: Whether the trained model is written beside the record.
        own: Files of a task that is a user's own tables.
    """

    spec: dict[str, Any]
    model: str
    data_root: str
    methods: tuple[str, ...]
    procedure: str | None = None
    seen: tuple[str, ...] = ()
    keep_model: bool = False
    own: OwnTables | None = None

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
            UsageError: An unknown key, or no ``=``.
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


# ---- files ------------------------------------------------------------------------------------------------------


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
        UsageError: There is none of that name.
    """
    import yaml

    known = presets()
    if name not in known:
        raise UsageError(f"unknown preset {name!r}.{suggest(name, known)}")
    return {"name": name, **yaml.safe_load(known[name])}


def _settings(file: Path) -> Document:
    if not file.is_file():
        raise UsageError(f"{file}: no such study file; presets are {', '.join(presets())}.")
    return read(file)
