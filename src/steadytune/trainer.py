"""The Hugging Face Trainer with methods. It overrides few parts; everything else is stock."""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .core import WEIGHT_VERBS, Method, Run, bare, overrides, shards
from .files import state
from .methods import METHODS, ClipNorm
from .methods.adapters import adapter_size, save_adapters
from .methods.levi import has_levi, hide_config
from .spelling import as_methods
from .vocabulary import expect_whole, vocabulary_of

logger = logging.getLogger(__name__)
SIDE_FILE = "steadytune.safetensors"
EDITING = ("before_forward", "after_backward", "pull_back", "before_step")  # verbs that change the clipped gradient


class Trainer(transformers.Trainer):
    """`transformers.Trainer` that trains with a list of methods.

    Args:
        *args: Arguments of `transformers.Trainer`.
        methods: Methods in list order, each an instance or its name with options, such as ``"dps_dense:keep=0.5"``.
            They are deep-copied; ``trainer.run[DPSDense]`` is the copy.
        clip: ``"list"`` moves ``args.max_grad_norm`` to the end of the list as `ClipNorm` while training, if a method
            edits gradients or forward weights (mask, then clip; `Run.describe` shows it); ``"trainer"`` keeps
            Hugging Face's order (clip, then mask).
        method_seed: Seed of the methods' own draws; by default ``args.seed``.
        **kwargs: Arguments of `transformers.Trainer`.

    Checkpoints gain one file, ``steadytune.safetensors``; their model files are plain and hold the evaluated weights
    (with `Adapters` and `LEVI` no plain model exists: ``adapters.safetensors`` is for `load_adapters`, ``levi.json``
    for `load_levi`, and there is no ``config.json``).
    The loss is scaled right under gradient accumulation for every model, also where the stock Trainer multiplies
    gradients by the number of accumulation steps or of devices (a model that takes ``num_items_in_batch`` and ignores
    it): the first batch that can tell decides, and the checkpoints remember.

    A loss of your own, such as one with class weights, is given as ``compute_loss_func=(outputs, labels,
    num_items_in_batch) -> loss``, or by a subclass that overrides ``compute_loss`` and heeds ``return_outputs``.
    Methods act on it as on the model's own loss: it is called inside `Run.loss`, also for the copies of a batch and for
    the outputs of further passes. A subclass that overrides ``training_step`` calls ``self.run.enter()`` before it
    calls the model.

    Optimizer steps whose gradient norm is not finite are skipped, counted in ``trainer.run.finite.skipped`` and logged
    as ``skipped_steps``; several in a row are an error.

    Attributes:
        run: The `Run` of the model that is trained.

    Raises:
        ValueError: Methods cannot act on weights in this set-up (DataParallel, DeepSpeed, FSDP1).
    """

    def __init__(
        self,
        *args: Any,
        methods: str | Method | Sequence[str | Method] = (),
        clip: Literal["list", "trainer"] = "list",
        method_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if clip not in ("list", "trainer"):
            raise ValueError(f"clip must be 'list' or 'trainer', got {clip!r}")
        self.methods, self.clip, self.method_seed = as_methods(methods, METHODS), clip, method_seed
        self.run: Run | None = None
        self._taken_norm: float | None = None  # args.max_grad_norm while ClipNorm does its work
        self._own_clip: ClipNorm | None = None
        self._counts: bool | None = None  # whether the loss uses num_items_in_batch; None until a batch has told
        self._in_run = False  # whether `Run.loss` is computing the task's loss now
        self._began = self._ended = 0.0  # of the training, as if all its legs had been one
        super().__init__(*args, **kwargs)
        if self.run is None:
            assert self.model is not None  # the stock Trainer refused
            self._bind(self.model)
        self.callback_handler.callbacks.insert(0, _Leave(self))  # before users' callbacks look at the weights

    # ------------------------------------------------------------------ binding

    def _bind(self, model: nn.Module) -> None:
        """Make the Run of the model to train."""
        self._check_setup()
        if (vocabulary := vocabulary_of(model)) is not None:
            given = getattr(self, "optimizer", None)  # a user's own; not set yet while model_init is called
            groups = [{"weight_decay": self.args.weight_decay}] if given is None else given.param_groups
            vocabulary.check(model, self.methods, max(group.get("weight_decay", 0.0) for group in groups))
        self.run = Run(model, self.methods, seed=self._method_seed(), data=self._first_look)
        self._own_clip = self._counts = None
        if self.methods and any(
            p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()
        ):
            logger.warning(
                "The model's weights are in half precision: small updates round to nothing. Load it with "
                "dtype=torch.float32 and set bf16=True in the arguments instead."
            )

    def _first_look(self) -> Iterator[list[dict[str, Any]]]:
        """One pass over the training rows, a list of micro-batches per optimizer step, for `Run.data`."""
        loader = self.get_train_dataloader()
        try:
            batches: Any = map(self._prepare_inputs, loader)
            while group := list(islice(batches, self.args.gradient_accumulation_steps)):
                yield group
        finally:
            if hasattr(loader, "end"):  # accelerate's: else it would count as the one that training reads from
                loader.end()

    def _check_setup(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} devices in one process mean torch.nn.DataParallel, which is not supported: use "
                "torchrun, or one device with CUDA_VISIBLE_DEVICES=0"
            )
        known = [m for m in self.methods if isinstance(m, Method)]  # Run refuses anything else
        exact = [type(m).__name__ for m in known if m.full_precision]
        if exact and (self.args.bf16 or self.args.fp16):
            raise ValueError(
                f"{exact[0]} subtracts gradients or losses, of which half precision leaves little but the rounding: "
                "train in float32, or without it (WeightMixup: order='first'; ImplicitTune: terms=1)"
            )
        if not any(overrides(m, verb) for m in known for verb in WEIGHT_VERBS):
            return
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed flattens weights before the methods can see them: use DDP or FSDP2")
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
            raise ValueError("FSDP1 flattens weights before the methods can see them: set fsdp_version to 2")

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that methods read. The stock Trainer drops columns that are not arguments of the model."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for m in self.methods for name in m.input_columns if name not in columns]

    def _method_seed(self) -> int:
        return self.args.seed if self.method_seed is None else self.method_seed

    def create_accelerator_and_postprocess(self) -> None:
        """Leave the division by the accumulation steps to the Trainer: transformers 5.3 lets accelerate divide too.

        The Run gets the norm that clipping computes at each step, because after clipping an infinite norm looks like
        zero gradients.
        """
        super().create_accelerator_and_postprocess()
        self.accelerator.gradient_accumulation_steps = 1
        clip = self.accelerator.clip_grad_norm_

        def noted(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            if self.run is not None and isinstance(norm, Tensor):
                self.run.grad_norm = shards.whole(norm.detach())
            return norm

        self.accelerator.clip_grad_norm_ = noted

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Bind the methods to each model that ``model_init`` makes.

        The first one is made inside the stock constructor, before it has the rows that methods may read: `__init__`
        binds that one.
        """
        model = super().call_model_init(trial)
        if hasattr(self, "train_dataset"):
            self._bind(model)
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Attach to the optimizer, also to one that the user made; restart if the Trainer trains once more."""
        optimizer = super().create_optimizer(*args, **kwargs)
        assert self.run is not None
        self.run.seed = self._method_seed()  # a hyperparameter search fills args only now
        self._take_clip()
        if self.run.optimizer is bare(optimizer):
            self.run.restart()
        else:
            self.run.attach(optimizer, save_in_optimizer=False)
            self._attach_vocabulary(bare(optimizer))
        return optimizer

    def _attach_vocabulary(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a compact vocabulary follow the optimizer; a checkpoint of the other kind is then refused."""
        vocabulary = vocabulary_of(self.model)
        if vocabulary is None:
            expect_whole(optimizer)
        else:
            vocabulary.attach(optimizer)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Pass the number of steps to the methods."""
        assert self.run is not None
        self.run.total_steps = num_training_steps
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    # ------------------------------------------------------------------ clipping

    def _take_clip(self) -> None:
        """Move ``max_grad_norm`` to the end of the list."""
        assert self.run is not None
        given = [m for m in self.run.methods if isinstance(m, ClipNorm) and m is not self._own_clip]
        edits = any(overrides(m, v) for m in self.run.methods for v in EDITING)
        looking = [type(m).__name__ for m in self.run.methods if overrides(m, "after_backward")]
        if looking and self.clip == "trainer" and self.args.max_grad_norm:
            raise ValueError(
                f"{looking[0]} replaces the gradient after the Trainer has clipped it, so that clip='trainer' would "
                f"clip nothing: leave clip='list', or set max_grad_norm=0 (it is {self.args.max_grad_norm})"
            )
        if self.clip == "trainer" or not edits or self._taken_norm is not None:
            return
        norm = self._taken_norm = self.args.max_grad_norm or 0.0
        self.args.max_grad_norm = 0.0
        if self._own_clip is not None:
            self._own_clip.max_norm = norm or float("inf")
        elif norm and not given:
            self._own_clip = self.run.append(ClipNorm(norm))

    def _give_clip_back(self) -> None:
        if self._taken_norm is not None:
            self.args.max_grad_norm, self._taken_norm = self._taken_norm, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the norm that was clipped (the stock one is taken before the chain rule and the masks), and passes."""
        methods = self.run.methods if self.run is not None and self._taken_norm is not None else []
        norms = [m.norm for m in methods if isinstance(m, ClipNorm) and m.where is None and m.norm is not None]
        if "grad_norm" in logs and norms:
            logs["grad_norm"] = float(norms[-1])
        if "loss" in logs and self.run is not None and self.run.passes.plain > 1:
            logs["forwards"], logs["backwards"] = self.run.passes.forwards, self.run.passes.backwards
        if self.run is not None and self.run.finite.skipped:
            logs["skipped_steps"] = self.run.finite.skipped
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer.train`; after an interruption the evaluated weights are live."""
        self._began, self._ended = time.perf_counter(), 0.0
        try:
            result = super().train(*args, **kwargs)
            assert self.run is not None
            self.run.finish()
            return result
        finally:
            self._ended = time.perf_counter()
            if self.run is not None:
                self.run.leave()
                self.run.release()
            self._give_clip_back()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including those before the checkpoints it resumed from."""
        return (self._ended or time.perf_counter()) - self._began

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor | int | None]:
        """Pass on the token count only to losses that use it; no batches once the training is over."""
        if self._over():
            self.control.should_training_stop = True
            return [], None
        batches, items = super().get_batch_samples(*args, **kwargs)
        if items is None or not batches or self._declares_scale():
            return batches, items
        if self._counts is None:
            self._decide(next((told for b in batches if (told := self._uses_count(b, items)) is not None), None))
        return batches, None if self._counts is False else items

    def _declares_scale(self) -> bool:
        """Whether a subclass declares that its loss is, or is not, scaled for gradient accumulation."""
        return getattr(type(self), "loss_is_scaled_for_ga", None) is not None

    def _decide(self, counts: bool | None) -> None:
        """Set whether the loss uses the token count; None while unknown."""
        self._counts = counts
        if not self._declares_scale():
            self.loss_is_scaled_for_ga = False if counts is False else None  # heeded from transformers 5.19 on

    def _over(self) -> bool:
        """Whether the last step was taken. On resume from its checkpoint, the stock Trainer would take one more."""
        return 0 < self.state.max_steps <= self.state.global_step

    def _uses_count(self, batch: dict[str, Any], items: Any) -> bool | None:
        """Whether the loss of a batch halves if the count doubles; None if this batch does not show it."""
        assert self.run is not None
        model: Any = self.model
        inputs: Any = self._prepare_inputs(batch)
        one = torch.ones_like(items) if isinstance(items, Tensor) else 1  # the step's own count may be 0
        task, self._in_run = self.compute_loss, True
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad(), self.run.forked_rng():
                once, twice = (float(task(model, dict(inputs), num_items_in_batch=n)) for n in (one, 2 * one))
        finally:
            self._in_run = False
            for module, training in modes:
                module.training = training
        return halves(once, twice)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss inside `Run.loss`, also if a subclass overrides ``compute_loss``."""
        own = self.compute_loss
        if getattr(own, "__func__", None) is Trainer.compute_loss:
            return super().training_step(*args, **kwargs)
        before = self.__dict__.get("compute_loss")
        self.compute_loss = functools.partial(self._with_methods, own)  # type: ignore[method-assign]
        try:
            return super().training_step(*args, **kwargs)
        finally:
            del self.compute_loss
            if before is not None:
                self.compute_loss = before  # type: ignore[method-assign]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss with all penalties in training mode, the stock loss otherwise."""
        if not model.training or self.run is None or self._in_run:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self._with_methods(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)

    def _with_methods(
        self,
        task: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of ``task``, a ``compute_loss``, with all penalties."""
        assert self.run is not None
        outputs = []
        devices: Any = self.args.world_size if self.args.average_tokens_across_devices else 1

        def compute(model: Any, inputs: Any, copies: int) -> tuple[Tensor, Any]:
            items = None if num_items_in_batch is None else num_items_in_batch * copies
            self._in_run = True
            try:  # tasks pop labels: a copy
                task_loss = task(model, dict(inputs), return_outputs=True, num_items_in_batch=items)
            finally:
                self._in_run = False
            loss, out = task_loss if isinstance(task_loss, tuple) else (task_loss, None)
            if return_outputs:  # the Run keeps this function for the length of a step
                outputs.append(out)
            if items is not None and isinstance(out, MutableMapping) and out.get("loss") is loss:
                out["loss"] = loss / devices  # stock multiplied it in place: `Step.task_loss` would do so again
            return loss, out

        micro = self.current_gradient_accumulation_steps
        items, scale = None, 1.0
        if num_items_in_batch is not None:  # the loss is divided over the whole step already
            items = num_items_in_batch / devices if devices > 1 else num_items_in_batch
            scale = 1 / micro
        loss = self.run.loss(inputs, compute=compute, model=model, items=items, penalty_scale=scale)
        if self.compute_loss_func is not None and num_items_in_batch is None and not _heeds_flag():
            loss = loss / micro
        return (loss, outputs[0]) if return_outputs else loss

    # ------------------------------------------------------------------ checkpoints

    def _side_file(self, folder: str) -> Path:
        assert self.run is not None
        rank = f"-{self.run.rank}-of-{self.run.world}" if self.run.sharded else ""
        return Path(folder, SIDE_FILE.replace(".", f"{rank}.", 1))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and in checkpoints the methods' state.

        A model is saved plain, unless it has `Adapters` or `LEVI`.
        """
        now = self.args.max_grad_norm
        self.args.max_grad_norm = now if self._taken_norm is None else self._taken_norm  # args are saved as given
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.args.max_grad_norm = now
        assert self.model is not None
        folder = Path(output_dir or self.args.output_dir or "")
        if self.args.should_save and has_levi(self.model):
            hide_config(folder, self.model)
        elif self.args.should_save and adapter_size(self.model) is not None:
            save_adapters(folder, self.model)
            (folder / "config.json").unlink(missing_ok=True)  # read as a model, it would be one without its adapters
        run = self.run
        if output_dir is None or not os.path.basename(output_dir).startswith(PREFIX_CHECKPOINT_DIR):
            self._warn_of_adapters_alone(folder)
            return
        if _internal_call and run is not None and (self.args.should_save or run.sharded):
            own = {"global_step": self.state.global_step, "counts": self._counts, "seconds": self.seconds}
            state.save({**run.state_dict(), **own}, self._side_file(output_dir))

    def _warn_of_adapters_alone(self, folder: Path) -> None:
        """Say what a folder of PEFT's adapters lacks, which is all that the stock Trainer saves of such a model."""
        methods = [] if self.run is None or not hasattr(self.model, "peft_config") else self.run.methods
        beside = [type(m).__name__ for m in methods if m.beside_adapters]
        if beside and self.args.should_save:
            write = "steadytune.save_levi(folder, model)" if has_levi(self.model) else "model.save_pretrained(folder)"
            logger.warning(
                f"{folder} holds adapters alone, without what {beside[0]} trained beside them: to save the whole "
                f"model, call model = trainer.model.merge_and_unload(), then {write}"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.run is not None:
            self._load_state(self.run, checkpoint)  # first: other methods may have split the optimizer's groups
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        adapted = hasattr(self.model, "peft_config")

        def beside(method: Method) -> bool:
            return method.adds_weights or (method.beside_adapters and adapted)

        if self.run is not None and any(map(beside, self.run.methods)):
            assert self.state.best_model_checkpoint is not None
            self.run.load_methods(state.load(self._side_file(self.state.best_model_checkpoint))["methods"], beside)

    def _load_state(self, run: Run, checkpoint: str) -> None:
        path = self._side_file(checkpoint)
        if not path.exists():
            if not run.methods:
                return
            raise ValueError(
                f"{checkpoint} holds no {path.name}: it was not saved by this Trainer, or the file was lost. The "
                "methods would start anew in the middle of a run: resume from another checkpoint, or start anew"
            )
        tree = state.load(path)
        if tree["global_step"] != self.state.global_step:
            raise ValueError(
                f"{path} belongs to step {tree['global_step']}, the checkpoint's trainer_state.json to "
                f"{self.state.global_step}: files of two checkpoints were mixed"
            )
        run.load_state_dict(tree)
        self._decide(tree.get("counts"))  # not in files written before it travelled
        self._began -= tree.get("seconds", 0.0)


def halves(once: float, twice: float) -> bool | None:
    """Whether a loss is divided by a count, from its values at a count and at twice the count.

    None if they do not show it: the loss is zero (no label in the batch), not finite, or divided in part.
    """
    if once == 0 or not (math.isfinite(once) and math.isfinite(twice)):
        return None
    change = abs(twice / once - 1)
    return True if change > 0.25 else False if change < 0.05 else None


class _Leave(transformers.TrainerCallback):
    """Restore the evaluated weights after a step that GradScaler skipped, which calls no hook."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.run is not None:
            self.trainer.run.check_untouched()  # an optimizer that calls no hooks: not skipped, but not counted
            self.trainer.run.leave()


def _heeds_flag() -> bool:
    """Whether this transformers uses ``loss_is_scaled_for_ga`` for dividing by the accumulation steps (5.19)."""
    return hasattr(transformers.Trainer, "loss_is_scaled_for_ga")
