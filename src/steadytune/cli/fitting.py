"""`steadytune fit`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from .common import (
    ANEW,
    INPUT,
    LABELLED,
    OUTPUT,
    SEEDS,
    SELECTION,
    TRAINING,
    BatchSize,
    Config,
    Epochs,
    LabelColumns,
    LabelSeparator,
    MaxLength,
    OneName,
    Subgroups,
    TextColumns,
    app,
    errors_in_one_line,
    named_files,
    option,
    speaking,
)

SHOWN_SUBGROUPS = 10  # of each set, the worst first


@app.command(cls=OneName)
def fit(
    model: Annotated[str, option(INPUT, "Hugging Face model directory or hub name.")],
    output: Annotated[Path, option(OUTPUT, "Directory for model and results: new or empty.")],
    train: Annotated[str | None, LABELLED] = None,
    text: TextColumns = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    group: Annotated[
        str | None,
        option(
            INPUT, "Column of groups: rows of one group stay on one side of each split, and intervals count groups."
        ),
    ] = None,
    subgroup: Subgroups = None,
    kind: Annotated[str, option(INPUT, "auto, classification, multilabel or regression.")] = "auto",
    metric: Annotated[str | None, option(INPUT, "Metric used for selection and shown first.")] = None,
    test: Annotated[list[str] | None, option(INPUT, "Test file, or NAME=FILE; repeatable.")] = None,
    validation: Annotated[Path | None, option(INPUT, "Validation file.")] = None,
    validation_column: Annotated[
        str | None,
        option(
            INPUT, "Column that names the split of each row (train, validation, test), instead of a validation file."
        ),
    ] = None,
    validation_share: Annotated[
        float, option(INPUT, "Share of the training rows to hold out if there is no validation file; 0 for none.")
    ] = 0.1,
    train_size: Annotated[int | None, option(INPUT, "Draw this many training rows, stratified.")] = None,
    task: Annotated[str | None, option(INPUT, "Benchmark task, instead of a file: see [b]steadytune tasks[/].")] = None,
    data_root: Annotated[Path | None, option(INPUT, "Folder of the benchmark tasks.", envvar="STEADYTUNE_DATA")] = None,
    out_of_domain: Annotated[bool, option(INPUT, "With --task: also the out-of-domain test sets.")] = False,
    method: Annotated[
        list[str] | None,
        option(
            TRAINING,
            "Method with options: dps_dense:keep=0.7,update_ratio=0.05. Repeatable; methods run in list order. None is "
            "plain fine-tuning. See [b]steadytune methods[/].",
        ),
    ] = None,
    procedure: Annotated[
        str | None,
        option(
            TRAINING,
            "Several trainings instead of one, with options: contrastive:then=finetune (pairs of rows train the "
            "encoder first), mixup-blo:folds=1, dsee:share=0.2 (LoRA on a pruned model), "
            "self-training:rounds=2 (labels the texts of --unlabelled).",
        ),
    ] = None,
    aux: Annotated[
        list[str] | None,
        option(TRAINING, "Another labelled table to train on first, with a head of its own (STILTs). Repeatable."),
    ] = None,
    aux_steps: Annotated[
        int | None, option(TRAINING, "Optimizer steps on each of these tables. [dim]\\[default: as a fit on it][/]")
    ] = None,
    meta: Annotated[
        str | None,
        option(
            TRAINING,
            "Meta-learn a start from five or more of these tables instead: reptile, fomaml or imaml, with options.",
        ),
    ] = None,
    unlabelled: Annotated[
        list[str] | None,
        option(
            INPUT,
            "File of texts without labels, for --pretrain, a procedure or a method; blank: rows whose label is empty; "
            "rest: rows that --train-size leaves over. Repeatable.",
        ),
    ] = None,
    unlabelled_size: Annotated[int | None, option(INPUT, "Draw this many texts without labels.")] = None,
    pretrain: Annotated[
        str | None,
        option(
            TRAINING,
            "Train on the texts alone first: tapt (masked words) or simcse (two readings of a text), with options: "
            "tapt:steps=300.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        option(
            TRAINING,
            "Optimizer steps. [dim]\\[default: 20 epochs, at least 400, at most 2000][/]",
            "--steps",
            "--max-steps",
        ),
    ] = None,
    epochs: Epochs = None,
    lr: Annotated[
        float,
        option(TRAINING, "Peak learning rate; 10 % warm-up, then linear decay to 0.", "--lr", "--learning-rate"),
    ] = 2e-5,
    weight_decay: Annotated[float, option(TRAINING, "Weight decay of AdamW.")] = 0.01,
    warmup: Annotated[float, option(TRAINING, "Share of the steps that warm up.", "--warmup", "--warmup-ratio")] = 0.1,
    max_grad_norm: Annotated[float, option(TRAINING, "Largest norm of the gradient; 0 disables clipping.")] = 1.0,
    batch_size: BatchSize = 16,
    accumulation: Annotated[
        int,
        option(TRAINING, "Forward passes per optimizer step.", "--accumulation", "--gradient-accumulation-steps"),
    ] = 1,
    max_length: MaxLength = None,
    prompt: Annotated[
        str | None,
        option(
            TRAINING, "Text before each row's first text, as in 'query: '; name:query takes it from the model's folder."
        ),
    ] = None,
    dropout: Annotated[
        float | None, option(TRAINING, "One probability for all dropout. [dim]\\[default: the model's own][/]")
    ] = None,
    lora: Annotated[
        bool | None, option(TRAINING, "Train adapters, merged at the end. [dim]\\[default: above 1e9 weights][/]")
    ] = None,
    head: Annotated[
        str,
        option(
            TRAINING,
            "Initial output layer: random, a linear probe on frozen features (logistic; ridge is faster with many "
            "classes), or the language model's weights of the class names (words; decoders, ModernBERT).",
        ),
    ] = "random",
    pooling: Annotated[
        str,
        option(
            TRAINING,
            "Input of the head: model (unchanged), mean (over tokens), cls (first token, without the dense layer), or "
            "auto: mean for single texts and sentence encoders trained so.",
        ),
    ] = "auto",
    peft: Annotated[
        str | None, option(TRAINING, "Adapters to train: lora or ia3 (merged at the end), prefix or prompt (kept).")
    ] = None,
    standardize: Annotated[
        bool,
        option(TRAINING, "Learn numbers in units of their standard deviation.", "--standardize/--no-standardize"),
    ] = True,
    compact: Annotated[
        bool,
        option(
            TRAINING, "Train without the word embeddings that no training text reads, where the result is the same."
        ),
    ] = True,
    class_weights: Annotated[str, option(TRAINING, "none, or balanced: by inverse frequency.")] = "none",
    label_smoothing: Annotated[
        float, option(TRAINING, "Share of each label's probability that is spread over all classes.")
    ] = 0.0,
    focal: Annotated[
        float, option(TRAINING, "Exponent of the focal loss: rows that are already right count less; 2 is usual.")
    ] = 0.0,
    balance: Annotated[
        list[str] | None,
        option(
            TRAINING,
            "Attribute that must not predict a class: length, negation, overlap, subgroup, or a word. Repeatable.",
        ),
    ] = None,
    bf16: Annotated[bool, option(TRAINING, "bfloat16 autocast; weights stay float32.")] = False,
    tune_kernels: Annotated[
        bool,
        option(
            TRAINING,
            "Time a few passes with each kind of attention, and bfloat16 where the processor multiplies in it; train "
            "with the fastest. On the CPU only.",
            "--tune-kernels",
        ),
    ] = False,
    evaluations: Annotated[
        int,
        option(SELECTION, "Number of evaluations on the validation rows during training; the best weights are kept."),
    ] = 0,
    patience: Annotated[
        int | None, option(SELECTION, "Number of evaluations without a new best after which training stops.")
    ] = None,
    num_seeds: Annotated[int, option(SELECTION, "Number of runs with the same head; see --combine.")] = 1,
    combine: Annotated[
        str,
        option(
            SELECTION,
            "How to combine several runs: soup (the mean of their weights), best (on the validation rows) or ensemble.",
        ),
    ] = "soup",
    distil: Annotated[
        bool, option(SELECTION, "Train one model on the answers of the ensemble, and keep that.", "--distil")
    ] = False,
    refit: Annotated[
        bool, option(SELECTION, "Choose the number of steps by cross-validation, then train on all rows.", "--refit")
    ] = False,
    folds: Annotated[int, option(SELECTION, "Folds of the cross-validation.")] = 5,
    probe: Annotated[
        bool, option(SELECTION, "Show the score of a linear probe on frozen features beside the model's.")
    ] = True,
    calibrate: Annotated[
        bool, option(SELECTION, "Fit a temperature on the validation rows, kept in the model.", "--calibrate")
    ] = False,
    threshold: Annotated[
        str | None,
        option(
            SELECTION,
            "Probability above which a class is given (two classes: the second; several labels: each), or tune: the "
            "best one on the validation rows. [dim]\\[default: 0.5][/]",
        ),
    ] = None,
    worst_subgroup: Annotated[
        bool,
        option(SELECTION, "Select by the score of the worst subgroup instead of all rows.", "--worst-subgroup"),
    ] = False,
    restarts: Annotated[
        int,
        option(
            SELECTION,
            "Number of restarts with other seeds, of a run whose loss after 20 % of the steps is still above 90 % of "
            "that of guessing, or whose model gives every row the same answer.",
        ),
    ] = 0,
    seed: Annotated[int, option(SEEDS, "Seed of everything that has no seed of its own.")] = 0,
    init_seed: Annotated[int | None, option(SEEDS, "Seed of the new head.")] = None,
    subset_seed: Annotated[
        int | None, option(SEEDS, "Seed of subset and validation split. [dim]\\[default: the data seed][/]")
    ] = None,
    data_seed: Annotated[int | None, option(SEEDS, "Seed of the row order.")] = None,
    dropout_seed: Annotated[int | None, option(SEEDS, "Seed of dropout.")] = None,
    method_seed: Annotated[int | None, option(SEEDS, "Seed of the methods' masks and noise.")] = None,
    save_steps: Annotated[int, option(OUTPUT, "Steps between checkpoints; 0 for none.")] = 200,
    resume: Annotated[
        bool, option(OUTPUT, "Continue from the last checkpoint in the output directory.", "--resume")
    ] = False,
    overwrite: Annotated[bool, option(OUTPUT, "Replace the run in the output directory.", "--overwrite")] = False,
    dry_run: Annotated[
        bool, option(OUTPUT, "Estimate steps, minutes, memory and files without training.", "--dry-run")
    ] = False,
    push_to_hub: Annotated[str | None, option(OUTPUT, "Upload the finished folder to this repository.")] = None,
    quiet: Annotated[bool, option(OUTPUT, "No plan, no progress bar.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Fine-tune a model on a table of labelled text.

    Writes an ordinary Hugging Face model directory with metrics.json, predictions.parquet and steadytune.json.

    Example: steadytune fit train.csv --text review --label stars --test test.csv --model bert-base-uncased
    --method dps_dense --output out
    """
    given = dict(locals())
    with errors_in_one_line(ANEW if dry_run else "with --resume goes on from the last checkpoint"):
        from .. import fitting
        from ..errors import UsageError
        from ..fitting.options import Options

        tests: dict[str, Any] = named_files(test or [])
        source: Any = train
        if task is not None:
            source, task_metric, tests = _from_task(given, tests)
            metric = metric or task_metric
        elif out_of_domain:
            raise UsageError("--out-of-domain needs --task: name your own test files with --test NAME=FILE.")
        elif train is None:
            raise UsageError("give a training file, or a benchmark task with --task NAME --data-root DIR.")
        same = ("model", "output", "label_separator", "group", "kind", "validation", "validation_column", "num_seeds",
                "combine", "distil", "refit", "folds", "probe", "procedure", "aux_steps", "meta", "unlabelled_size",
                "pretrain", "resume", "overwrite", "save_steps", "push_to_hub")  # fmt: skip
        options = {
            **{name: given[name] for name in (*same, *(field.name for field in dataclasses.fields(Options)))},
            "text": text or None,
            "label": label or None,
            "subgroup": subgroup or None,
            "methods": method or [],
            "aux": aux or None,
            "unlabelled": unlabelled or None,
            "tests": tests,
            "metric": metric,
            "progress": not quiet,
        }
        with speaking(quiet, shows_result=True):
            if dry_run:
                return Console().print(
                    str(fitting.dry_run(source, **options)), soft_wrap=True, markup=False, highlight=False
                )
            result = fitting.fit(source, **options)
    _show(result)


def _from_task(given: dict[str, Any], tests: dict[str, Any]) -> tuple[Any, str, dict[str, Any]]:
    """Training table, metric and test tables of `--task`; flags that contradict the task are errors."""
    from .. import tasks
    from ..errors import UsageError

    other = {"train": "a training file", "text": "--text", "label": "--label", "label_separator": "--label-separator",
             "kind": "--kind", "test": "--test", "validation": "--validation"}  # fmt: skip
    for name, flag in other.items():
        if given[name] and (name, given[name]) != ("kind", "auto"):
            raise UsageError(f"--task brings its own data: leave {flag} out.")
    if given["data_root"] is None:
        raise UsageError("--task needs the folder that holds the tasks: --data-root DIR, or STEADYTUNE_DATA.")
    benchmark = tasks.find(given["task"])
    source, tests = tasks.load(benchmark.name, given["data_root"], beyond=given["out_of_domain"])
    return source, benchmark.metric, tests


def _show(result: Any) -> None:
    """The scores, one line a set and metric, the metric that counts first; what is wrong comes last."""
    from rich.markup import escape

    from ..data.scores import worst_first
    from ..errors import one_line
    from ..pages.words import bounds_words, counted, metric_words, score_names, spread_words

    console = Console()
    known = result.model.problem.metrics
    names = [
        name
        for name in score_names(result.metrics.values(), result.metric)
        if name == result.metric or (name in known and not known[name].needs_probabilities)
    ]
    classes = [one_line(name, 20) for name in result.model.problem.names]
    extra = {"baseline": "baseline", "probe": "probe", "runs": "runs: mean ± SD"}
    shown = [part for part in extra if any(part in scores for scores in result.metrics.values())]
    grid = Grid(box=box.SIMPLE, collapse_padding=True, pad_edge=False, show_edge=False)  # 80 columns hold it
    for title in ("metric", "score", "95 % interval", *(extra[part] for part in shown)):
        grid.add_column(title, no_wrap=True, overflow="fold")
    for key, scores in result.metrics.items():
        grid.add_row(f"[b]{escape(key)}{' *' * scores['selected']}[/], {counted(scores['rows'], 'row')}")
        for name in names:
            beside = [spread_words(scores.get(part) or {}, name) for part in shown]
            figures = [spread_words(scores, name), bounds_words(scores, name), *beside]
            about = f" {escape(metric_words(name, classes))}"
            grid.add_row(about, *figures, end_section=name == names[-1] and not scores.get("subgroups"))
        parts = worst_first(scores, result.metric)[:SHOWN_SUBGROUPS]
        for part, own in parts:
            about = f" {result.metric} of {escape(part)}, {counted(own['rows'], 'row')}"
            figures = [spread_words(own, result.metric), bounds_words(own, result.metric)]
            grid.add_row(about, *figures, *[""] * len(shown), end_section=part == parts[-1][0])
    if result.metrics:
        console.print(grid)
        if any(scores["selected"] for scores in result.metrics.values()):
            console.print("* These rows chose the model: expect lower scores on new rows.")
        more = ", classes one by one and the confusion matrices" if result.model.problem.names else ""
        console.print(f"More scores{more}: metrics.json.", highlight=False)
    console.print(f"{result.steps} steps, {result.seconds:.0f} s. Model: {result.output}", soft_wrap=True, markup=False)
    notes = [note for scores in result.metrics.values() for note in scores["notes"]]
    for line in dict.fromkeys([*notes, *(f"warning: {text}" for text in result.warnings)]):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
