"""A study: its YAML file, checked, and the runs that follow from it. No torch here.

        models x tasks x train sizes x recipes x seeds, one run for each combination

The specification of a run is a plain dictionary of everything that decides its result; its hash is the run's id. It
leaves out options that are not in use (None), so that the ids of old runs stay valid when a version adds an option.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ..config import ALIASES, Document, Seed, Share, Text, Truth, Whole, checked, options, read, value
from ..data.splits import usual_folds
from ..data.unlabelled import BLANK, REST
from ..errors import UsageError, suggest
from ..fitting.options import SEEDS, STOCK, Options
from ..fitting.spelling import (
    make_methods,
    make_procedure,
    meta_record,
    method_record,
    pretraining_record,
    procedure_record,
)
from ..heads.sentence_folder import sentence_folder
from ..pages.words import listed
from ..tasks import TASKS, find, layout, seen_by
from .own_tables import HELD_OUT, OwnTables
from .places import expanded, fingerprint_files, fingerprint_model, placed, seen_from
from .short_forms import spelled, spread

FORMAT = 1
FILE_SEEDS = {"seed", *(f"{name}_seed" for name in SEEDS)}
OPTIONS = {
    name: hint for name, hint in options(Options).items() if name not in {*FILE_SEEDS, "train_size", "tune_kernels"}
}
PARTS: dict[str, Any] = {  # entries of a recipe beside options
    "methods": tuple[Text, ...],
    "procedure": Text | None,
    "aux": tuple[Text, ...],
    "aux_steps": Whole | None,
    "meta": Text | None,
    "unlabelled": tuple[Text, ...],
    "unlabelled_size": Whole | None,
    "pretrain": Text | None,
    "soup": Whole | None,
}
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
    """A study, as its file describes it.

    Attributes:
        name: Name of the study; its results go to ``runs/<name>`` unless told otherwise.
        models: Pre-trained models to start from.
        tasks: Names of benchmark tasks (`steadytune.tasks`) and of `tables`.
        recipes: Recipes by name: ``methods``, ``procedure``, ``aux``, ``aux_steps``, ``meta``, ``unlabelled``,
            ``unlabelled_size``, ``pretrain``, ``soup`` (number of trainings whose weights are averaged), and
            options of `Options`, which override `options`.
        train_sizes: Numbers of training rows to draw; None for all.
        options: Options of every recipe.
        seeds: Seeds of the runs of every recipe, one run for each.
        factorial: Names of seeds to cross: runs have all combinations of their values, and the first value of the other
            seeds. By default all five seeds vary together.
        out_of_domain: Whether to test on the out-of-domain sets of the benchmark tasks too.
        test_rows: Number of rows of each test set, the same rows in every run; None for all.
        label_noise: Share of the training labels that are replaced by another class.
        imbalance: Share of the rows to keep of each class but the largest; None for all.
        metric: Metric of every task, instead of each task's own.
        keep_models: Whether to write the trained models too.
        data_root: Folder of the benchmark tasks, unless the command gives another.
        tables: Tasks from a user's own tables.
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
        """Read a study file or a preset.

        Args:
            file: YAML file, or name of a preset. ``preset: NAME`` in a file gives the settings that the file lacks.
                Paths of own tables, and of `aux` and `unlabelled` of recipes, are relative to the file.
            **changes: Settings that override the file's; None keeps the file's.

        Raises:
            UsageError: There is no such file or preset, it is not YAML, a key is unknown, or a value is not what its
                key takes. The message names the line.
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
        """Make a study from plain values, and check it.

        Args:
            given: Settings as in a study file.
            document: The study file, named in errors.

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
        folder = Path(document.file).parent
        recipes = {name: _moved(recipe, lambda file: placed(file, folder)) for name, recipe in study.recipes.items()}
        study = dataclasses.replace(study, recipes=recipes, tables=tuple(table.at(folder) for table in study.tables))
        study._check(document)
        return study

    def text(self, folder: str | Path = ".") -> str:
        """The study as YAML that `read` takes from a file in ``folder``."""
        import yaml

        plain = json.loads(json.dumps(dataclasses.asdict(self)))
        place = Path(folder)
        plain["recipes"] = {
            name: _moved(recipe, lambda file: seen_from(file, place)) for name, recipe in plain["recipes"].items()
        }
        plain["models"] = {model.pop("name"): model for model in plain["models"]}
        del plain["tables"]
        if self.tables:
            tables = [dataclasses.asdict(table.seen_from(Path(folder))) for table in self.tables]
            named = {table.pop("name"): {key: v for key, v in table.items() if v} for table in tables}
            plain["tasks"] = {name: named.get(name) for name in self.tasks}
        return str(yaml.safe_dump(json.loads(json.dumps(plain)), sort_keys=False, allow_unicode=True))

    def _check(self, document: Document) -> None:
        """Check what the types of the fields do not express."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"{document.where(['seeds'])}: seeds must be different numbers, got {[*self.seeds]}.")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            where = document.where(["models"])
            raise UsageError(f"{where}: models must have different names, got {', '.join(names)}: write NAME: PATH.")
        for key in ("tasks", "train_sizes", "factorial"):
            given = getattr(self, key)
            if len(set(given)) < len(given):
                raise UsageError(f"{document.where([key])}: {key} must be different, got {listed(map(str, given))}.")
        if not self.train_sizes:
            where = document.where(["train_sizes"])
            raise UsageError(f"{where}: train_sizes is empty: leave it out to train on all rows.")
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
                raise UsageError(f"{where}: {table.name} is a benchmark task: give your own table another name.")
            if table.crossed and HELD_OUT in table.tests:
                raise UsageError(f"{where}: {HELD_OUT!r} is the name of the held-out fold: rename that test file.")
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
        """Raise for a task without exclusive classes if the study changes labels."""
        if self.label_noise or self.imbalance is not None:
            where = "" if document is None else f"{document.where()}: "
            raise UsageError(f"{where}label_noise and imbalance need classes, task {task} has none.")

    @property
    def _own(self) -> dict[str, OwnTables]:
        return {table.name: table for table in self.tables}

    def parts(self, name: str) -> list[dict[str, Any]]:
        """Records of the methods of a recipe, of its procedure, of its other tables and texts, and of pre-training."""
        given = self.recipes[name]
        records = [method_record(m) for m in make_methods(given.get("methods", ()))]
        if (procedure := make_procedure(given.get("procedure"))) is not None:
            records.append(procedure_record(procedure))
        if aux := self.aux(name):
            files = fingerprint_files([Path(file) for file in aux], f"check aux of recipe {name!r}")
            records.append({"name": "aux", "options": {"files": files, "steps": given.get("aux_steps")}})
        if (meta := given.get("meta")) is not None:
            records.append(meta_record(meta))
        if texts := self.unlabelled(name):
            known = [text for text in texts if text in (BLANK, REST)]
            own = [Path(text) for text in texts if text not in known]
            hash = {"files": fingerprint_files(own, f"check unlabelled of recipe {name!r}")} if own else {}
            rows = {"rows": known, **hash, "size": given.get("unlabelled_size")}
            records.append({"name": "unlabelled", "options": rows})
        if (pretrain := given.get("pretrain")) is not None:
            records.append(pretraining_record(pretrain))
        if (soup := given.get("soup") or 1) > 1:
            records.append({"name": "soup", "options": {"runs": soup}})
        return records

    def aux(self, name: str) -> tuple[str, ...]:
        """Files of the auxiliary tables of a recipe."""
        return tuple(expanded(file) for file in self.recipes[name].get("aux", ()))

    def _embeds(self, name: str) -> bool:
        """Whether the procedure of a recipe makes vectors of texts."""
        procedure = make_procedure(self.recipes[name].get("procedure"))
        return procedure is not None and procedure.embeds

    def unlabelled(self, name: str) -> tuple[str, ...]:
        """Sources of the texts without labels of a recipe."""
        return tuple(expanded(source) for source in self.recipes[name].get("unlabelled", ()))

    def recipe(self, name: str) -> Options:
        """The options of a recipe, without seeds."""
        where = f"recipe {name!r}"
        recipe = {key: v for key, v in self.recipes[name].items() if key not in PARTS}
        given = {**chosen_options("options", self.options), **chosen_options(where, recipe)}
        own = {key: v for key, v in given.items() if v is not None}
        held_out = 0.1 if own.get("evaluations") else 0.0  # rows are held out for selection alone
        return Options.of({"validation_share": held_out, **own})

    def corruption(self, recipe: Options) -> dict[str, Any]:
        """Corruption of the training rows, as in the specification of a run.

        Earlier versions counted the steps of an epoch before classes were thinned out. Where the number of steps
        differs, ``steps`` makes the id of a run differ from those of earlier versions.
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
        """All runs, ordered by seed first, so that an interrupted study has whole rounds of all recipes.

        Args:
            data_root: Folder of the benchmark tasks, instead of the study's own.

        Raises:
            UsageError: A model or a data file is missing, or an own table is not right.
        """
        place = data_root or self.data_root
        if place is None and any(name not in self._own for name in self.tasks):
            raise UsageError("give the folder of the benchmark tasks with --data-root DIR, or data_root in the study.")
        root = Path(expanded(place or "."))
        paths = {model: expanded(model.path) for model in self.models}
        models = {model: fingerprint_model(path) for model, path in paths.items()}
        blank = any(BLANK in self.unlabelled(name) for name in self.recipes)
        own = {name: dataclasses.replace(table, blank=table.blank or blank) for name, table in self._own.items()}
        tasks = [self._own_task(own[name]) if name in own else self._task(name, root) for name in self.tasks]
        folders = {model: sentence_folder(path) for model, path in paths.items()}
        averaged = {model: folder is not None and folder.pooling == "mean" for model, folder in folders.items()}
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
                "options": in_use(recipe, task.numbers, averaged[model] or self._embeds(name)),
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
                    self.aux(name),
                    self.recipes[name].get("aux_steps"),
                    self.unlabelled(name),
                    self.recipes[name].get("unlabelled_size"),
                    self.recipes[name].get("pretrain"),
                    self.recipes[name].get("meta"),
                    self.recipes[name].get("soup") or 1,
                )
            )
        return trials

    def _task(self, name: str, root: Path) -> _Task:
        task = find(name)
        files = [root / file.path for file in layout(task, self.out_of_domain)]
        hash = fingerprint_files(files, DATA_ROOT)
        return _Task({"name": name, "fingerprint": hash}, self.metric or task.metric, not task.labels)

    def _own_task(self, own: OwnTables) -> _Task:
        """Read and check the tables; the specification of their runs names the columns and the kind found."""
        data, files = own.examine([size for size in self.train_sizes if size is not None]), own.files()
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
            **({"subgroup": list(own.subgroup)} if own.subgroup else {}),
            **({"folds": own.folds or usual_folds(data.train)} if own.crossed else {}),
        }
        return _Task(spec, data.problem.metric(self.metric or own.metric).name, not data.problem.names, own)


# Keys of a study file. Own tables are under `tasks`; `methods` stands for one recipe per method.
KEYS = [*(f.name for f in dataclasses.fields(Study) if f.name != "tables"), "methods", "preset"]


@dataclass(frozen=True)
class _Task:
    """A task as its runs need it.

    Attributes:
        spec: Its part of a run's specification.
        metric: Metric of its runs.
        numbers: Whether its labels are numbers.
        own: Files of a user's own tables; None for a benchmark task.
    """

    spec: dict[str, Any]
    metric: str
    numbers: bool
    own: OwnTables | None = None


def _moved(recipe: Mapping[str, Any], move: Callable[[str], str]) -> dict[str, Any]:
    """A recipe with other paths of its files. What is no path stays: words, and entries that the check refuses."""

    def moved(key: str, given: Any) -> Any:
        words = (BLANK, REST, "") if key == "unlabelled" else ("",)
        if key not in ("aux", "unlabelled") or not isinstance(given, list | tuple):
            return given
        return [move(file) if isinstance(file, str) and file not in words else file for file in given]

    return {key: moved(key, given) for key, given in recipe.items()}


def _check_entry(where: str, key: str, given: Any) -> None:
    """Raise unless an entry of a recipe has the type of its key."""
    if key in PARTS:
        checked(PARTS[key], given, lambda path: f"{where}: {key}")
    else:
        option(where, key, given)


def option(where: str, key: str, given: Any) -> Any:
    """Check an option of `Options`, and return its value.

    Raises:
        UsageError: There is no such option, or the value does not have its type; the message begins with ``where``.
    """
    name = ALIASES.get(key, key)
    if name not in OPTIONS:
        raise UsageError(f"{where}: unknown option {key!r}.{suggest(key, sorted(OPTIONS))}")
    return None if given is None else value(f"{where}: {key}", name, OPTIONS[name], given)


def chosen_options(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of options by the names of the fields of `Options`.

    Raises:
        UsageError: As `option`, or an option is given under two names.
    """
    chosen: dict[str, Any] = {}
    for key, v in given.items():
        name = ALIASES.get(key, key)
        if name in chosen:
            raise UsageError(f"{where}: {key} and {name} are two names of one option: give one of them.")
        chosen[name] = option(where, key, v)
    return chosen


def in_use(recipe: Options, numbers: bool, averaged: bool = False) -> dict[str, Any]:
    """Options that affect a run.

    Those that came after the first studies count only where they change something, so that old ids stay valid:
    `standardize` for numbers and when it is on, those of `STOCK` when they differ from it.

    Args:
        recipe: All options.
        numbers: Whether the task predicts numbers.
        averaged: Whether `pooling` may be auto: the model is a sentence encoder that pools by the mean, or a procedure
            makes vectors of texts.
    """
    used = {key: v for key in sorted(OPTIONS) if (v := getattr(recipe, key)) is not None}
    if not numbers or not recipe.standardize:
        used.pop("standardize", None)
    if used["pooling"] == "auto" and not averaged:
        used["pooling"] = STOCK["pooling"]
    return {key: v for key, v in used.items() if STOCK.get(key) != v}


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of a study: its specification, and the places of its model and data on this machine.

    Attributes:
        spec: Everything that decides the result.
        model: Directory or hub name of the model.
        data_root: Folder of the benchmark tasks.
        methods: Methods as the study file spells them.
        procedure: Procedure as the study file spells it.
        seen: Benchmark sets that the model was trained on before.
        keep_model: Whether to write the trained model beside the record.
        own: Files of a user's own tables; None for a benchmark task.
        aux: Files of the auxiliary tables.
        aux_steps: Number of steps on each of them.
        unlabelled: Sources of texts without labels.
        unlabelled_size: Number of these texts to draw.
        pretrain: Training on texts alone, as the study file spells it.
        meta: Meta-learning over the auxiliary tables, as the study file spells it.
        soup: Number of trainings whose weights are averaged.
    """

    spec: dict[str, Any]
    model: str
    data_root: str
    methods: tuple[str, ...]
    procedure: str | None = None
    seen: tuple[str, ...] = ()
    keep_model: bool = False
    own: OwnTables | None = None
    aux: tuple[str, ...] = ()
    aux_steps: int | None = None
    unlabelled: tuple[str, ...] = ()
    unlabelled_size: int | None = None
    pretrain: str | None = None
    meta: str | None = None
    soup: int = 1

    @property
    def id(self) -> str:
        """Hash of the specification, 16 hexadecimal digits."""
        text = json.dumps({"format": FORMAT, **self.spec}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def files(self) -> list[str]:
        """Files of the user's own tables, of the auxiliary tables, and of texts without labels."""
        own = () if self.own is None else (self.own.train, *self.own.tests.values(), *self.own.apart)
        return [*map(expanded, own), *self.aux, *(text for text in self.unlabelled if text not in (BLANK, REST))]

    def moved(self, places: Mapping[str, str]) -> Trial:
        """The same run, with its `files` in other places."""
        own = None if self.own is None else self.own.moved(lambda file: places[expanded(file)])
        texts = tuple(places.get(text, text) for text in self.unlabelled)
        return dataclasses.replace(self, own=own, aux=tuple(places[file] for file in self.aux), unlabelled=texts)

    @property
    def title(self) -> str:
        """Task, rows, recipe, model and seeds, as a text for people."""
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
    """`seed 3`, or each seed by name if they differ."""
    if len(set(seeds.values())) == 1:
        return f"seed {next(iter(seeds.values()))}"
    return "seed " + ",".join(f"{name}:{value}" for name, value in seeds.items())


# ---- files ------------------------------------------------------------------------------------------------------


def presets() -> dict[str, str]:
    """Texts of the study files that come with steadytune, by name."""
    folder = resources.files(__package__) / "presets"
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset.

    Raises:
        UsageError: There is no preset of that name.
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
