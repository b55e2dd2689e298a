"""Two gloo processes equal one, with DistributedDataParallel, FSDP2 (`fully_shard`) and the Trainer.

Two pairs of processes run the scenarios of distributed_worker.py, one pair of them under torchrun; each test asserts
one fact of what they left. The same functions, called here, give what one process on the whole batch does.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import distributed_worker as worker
from helpers import assert_same, differs

WORKER = Path(worker.__file__)
PATIENCE = 1500  # seconds for a pair of processes: more than 420 where others use most of the cores


class Pair:
    """What both ranks left in a folder."""

    def __init__(self, folder: Path, log: str) -> None:
        self.folder, self.log = folder, log

    def __getitem__(self, name: str) -> tuple[dict, dict]:
        found = []
        for rank in (0, 1):
            path = self.folder / f"{name}-{rank}.pt"
            if not path.exists():
                pytest.fail(f"rank {rank} never reached {name}; the end of the log:\n{self.log[-4000:]}")
            result = torch.load(path, weights_only=True)
            if "error" in result:
                pytest.fail(f"{name} failed on rank {rank}:\n{result['error']}")
            found.append(result["value"])
        return found[0], found[1]


def launch(commands: list[list[str]], folder: Path) -> Pair:
    """Run commands side by side to their end."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "STEADYTUNE_OUT": str(folder),
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    log = folder / "log.txt"
    with log.open("w") as file:
        running = [subprocess.Popen(c, env=environment, stdout=file, stderr=subprocess.STDOUT) for c in commands]
        end = time.monotonic() + PATIENCE
        while any(p.poll() is None for p in running) and time.monotonic() < end:
            if any(p.poll() for p in running):  # one failed: the other would wait for it
                end = min(end, time.monotonic() + 5)
            time.sleep(0.1)
        for p in running:
            if p.poll() is None:
                p.terminate()
            p.wait()
    return Pair(folder, log.read_text())


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    folder = tmp_path_factory.mktemp("core")
    return launch([[sys.executable, str(WORKER), "core", str(folder), rank] for rank in "01"], folder)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return launch([[*torchrun, str(WORKER), "trainer", str(folder)]], folder)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """What one process on the whole batch does in a scenario."""
    monkeypatch.setenv("STEADYTUNE_OUT", str(tmp_path))
    return run_alone


@functools.cache
def run_alone(name: str) -> dict:
    scenarios = {**worker.GROUPS["core"], **worker.GROUPS["trainer"]}
    with torch.random.fork_rng():
        return scenarios[name]()


# ---------------------------------------------------------------------- comparing


def joined(first, second, like):
    """One tree of two ranks' pieces: cut along the first axis, or the same on both, as ``like`` tells."""
    if isinstance(like, dict):
        assert first.keys() == second.keys() == like.keys()
        return {k: joined(first[k], second[k], v) for k, v in like.items()}
    if isinstance(like, list):
        return [joined(*values) for values in zip(first, second, like, strict=True)]
    if isinstance(like, Tensor) and (first.shape != like.shape or second.shape != like.shape):
        return torch.cat([first, second])
    assert first.equal(second) if isinstance(like, Tensor) else first == second
    return first


def masks_of(state: dict) -> list[Tensor]:
    return [mask for method in state["methods"] for mask in method.get("masks", {}).values()]


# ---------------------------------------------------------------------- DDP


@pytest.mark.parametrize("name", [f"ddp_{n}" for n in worker.DDP_RECIPES] + ["ddp_sgd"])
def test_ddp_ranks_hold_the_same_bits(core, name):
    first, second = core[name]
    assert_same(first, second)


@pytest.mark.parametrize("name", [f"ddp_{n}" for n in worker.DDP_RECIPES if n not in worker.PARTNERS] + ["ddp_sgd"])
def test_ddp_equals_one_process_on_the_whole_batch(core, alone, name):
    assert_same(core[name][0], alone(name), atol=1e-12)


@pytest.mark.parametrize("name", ["ddp_mix_ema", "ddp_dense"])
def test_masks_were_made_and_select(core, name):
    """The comparisons above are not of empty states."""
    squares, masks, again = core[name][0]["states"]
    assert not masks_of(squares)
    for state in (masks, again):
        selecting = [0 < mask.sum() < mask.numel() for mask in masks_of(state)]
        assert sum(selecting) > 10  # DPS Mix's columns may leave one with more zeros than it drops
    assert any(not torch.equal(a, b) for a, b in zip(masks_of(masks), masks_of(again), strict=True))


@pytest.mark.parametrize("name", ["Mixout", "Noisy"])
def test_draws_are_shared_by_ranks_whose_random_states_and_batches_differ(core, name):
    first, second = (rank[name] for rank in core["draws"])
    assert_same(first, second)


@pytest.mark.parametrize("name", ["GlobalDraw", "SharedDraw"])
def test_naive_draws_let_ranks_drift_apart(core, name):
    """T2: draws of the global generator; one generator that also serves draws of the batch's shape."""
    first, second = (rank[name] for rank in core["draws"])
    assert differs(first, second)


WAYS = list(worker.DDP_OPTIONS)


def with_extra_gradient(core: Pair, options: str) -> tuple[dict, dict]:
    if options == "static":
        first, second = core["static_graph"]
        return first["gradient"], second["gradient"]
    return core[f"gradient_{options}"]


@pytest.mark.parametrize("options", WAYS)
def test_an_extra_gradient_leaves_the_steps_own_alone(core, options):
    for rank in with_extra_gradient(core, options):
        assert len(rank["seen"]) == 2
        for seen in rank["seen"]:
            assert_same(seen["after"], seen["before"])
            assert_same(seen["grad"], seen["before"])


@pytest.mark.parametrize("options", WAYS)
def test_an_extra_gradient_equals_that_of_one_process(core, alone, options):
    first, second = with_extra_gradient(core, options)
    assert_same(first, second)
    assert_same(first, alone("gradient_plain"), atol=1e-12)
    for seen in first["seen"]:  # of another batch than the step's own
        assert differs(seen["extra"], seen["before"])


def test_parking_references_only_is_overwritten(core):
    """T19: with ``gradient_as_bucket_view`` the gradients parked naively become those of the other batch."""
    for rank in core["gradient_naive"]:
        seen = rank["seen"][0]
        assert differs(seen["after"], seen["before"])


def test_static_graph_inside_no_sync_is_refused_before_torch_fails(core):
    for rank in core["static_graph"]:
        assert rank["ours"].startswith("forward: DistributedDataParallel(static_graph=True) cannot accumulate")
        assert rank["torch"].startswith("backward: ")
        assert "INTERNAL ASSERT" in rank["torch"]


@pytest.mark.parametrize("how", ["one micro-batch", "synced"])
def test_static_graph_outside_no_sync_equals_one_process(core, alone, how):
    first, second = core["static_graph"]
    assert_same(first[how], second[how])
    assert_same(first[how], alone("ddp_dense"), atol=1e-12)


@pytest.mark.parametrize("kind", ["reentrant", "other"])
def test_activation_checkpointing_changes_nothing(core, kind):
    """R-Drop's two dropout draws and DPS Mix's columns are drawn once, however often the forward is recomputed."""
    first, second = core[f"checkpointing_{kind}"]
    assert_same(first, second)
    assert_same(first, core["checkpointing_none"][0], atol=1e-12)


PENALTIES = ("smart", "r3f", "lnsr", "adversarial")


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_with_unused_parameters_equal_one_process(core, alone, name):
    first, second = core[f"unused_{name}"]
    assert_same(first, second)
    assert_same(first, alone(f"unused_{name}"), atol=1e-12)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_under_activation_checkpointing(core, alone, name):
    """Torch cannot send two forwards under reentrant checkpointing through one backward of DDP: an error before it."""
    first, second = core[f"checkpointed_{name}_other"]
    assert_same(first, second)
    assert_same(first, core[f"checkpointed_{name}_none"][0], atol=1e-12)
    for rank in core[f"checkpointed_{name}_reentrant"]:
        assert 'gradient_checkpointing_kwargs={"use_reentrant": False}' in rank["error"]
    assert_same(alone(f"checkpointed_{name}_reentrant"), alone(f"checkpointed_{name}_none"), atol=1e-12)


# ---------------------------------------------------------------------- FSDP2


def test_penalties_that_cannot_act_on_shards_say_so(core):
    for rank in core["refusals"]:
        ascent, teacher, attack = rank.values()
        assert "through sharded weights (FSDP2): use DistributedDataParallel, or R3F" in ascent
        assert "needs whole weights" in teacher
        assert attack == ascent


def test_methods_that_need_whole_weights_refuse_shards_by_name(core):
    for rank in core["whole_only"]:
        assert set(rank) == {"MaskTraining", "CausalHead", "VIBERT", "LEVI", "FreeLB"}
        assert all("sharded" in said and "use DistributedDataParallel" in said for said in rank.values())
        assert all(said.startswith(name) for name, said in rank.items() if name != "FreeLB")


def test_methods_of_rows_work_on_shards(core):
    first, second = core["sharded_partners"]
    assert_same(first["weights"], second["weights"])
    before = {name: p.detach() for name, p in worker.bert().named_parameters()}
    assert differs(first["weights"], before)


def check_sharded(pair, whole: dict) -> None:
    first, second = pair
    assert_same(first["weights"], second["weights"])
    assert_same(first["weights"], whole["weights"], atol=1e-12)
    for key in ("raw", "states"):
        assert_same(joined(first[key], second[key], whole[key]), whole[key], atol=1e-12)


@pytest.mark.parametrize("name", list(worker.SHARDED_RECIPES))
def test_shards_equal_one_process(core, alone, name):
    check_sharded(core[f"sharded_{name}"], alone(f"sharded_{name}"))


@pytest.mark.parametrize("name", ["mixout_l2sp_ema", "conv1d"])
def test_a_run_may_be_made_after_sharding(core, alone, name):
    check_sharded(core[f"sharded_first_{name}"], alone(f"sharded_{name}"))


@pytest.mark.parametrize("i", range(len(worker.LOOKS)), ids=[f"{n}-{when}" for n, when in worker.LOOKS])
def test_an_evaluation_leaves_the_shards_trajectory_as_it_is(core, alone, i):
    """T18: after an evaluation the root's parameters stay gathered, and writes to the pieces are not seen."""
    name, _ = worker.LOOKS[i]
    for rank in core[f"sharded_look_{i}"]:
        assert [set(kinds) for kinds in rank["seen"]] == [{"Parameter", "DTensor"}]
    check_sharded(core[f"sharded_look_{i}"], alone(f"sharded_{name}"))


def test_pieces_are_uneven_and_empty(core):
    first, second = core["statistics"]
    assert (len(first["empty"]), len(second["empty"])) == (0, 1)
    assert [state["methods"][0]["masks"] for state in core["sharded_one_output"][1]["states"][1:]]
    assert any(mask.numel() == 0 for mask in masks_of(core["sharded_one_output"][1]["states"][1]))


def test_thresholds_and_norms_over_pieces(core):
    model = worker.bert()
    full = {n: p.detach() for n, p in model.named_parameters()}

    def largest(values: Tensor, keep: float) -> Tensor:
        ordered = values.flatten().sort(descending=True).values
        return ordered[math.ceil(len(ordered) * keep) - 1]

    everything = torch.cat([t.flatten() for t in full.values()])
    for rank in core["statistics"]:
        for (name, keep), found in rank["kth"].items():
            assert torch.equal(found, largest(full[name], keep)), (name, keep)
        assert_same(rank["global"], [largest(everything, keep) for keep in (0.1, 0.5, 1.0)])
        assert_same(rank["norms"], {n: t.norm() for n, t in full.items()}, atol=1e-12)


def test_frozen_entries_of_a_piece_keep_their_bits(core):
    for rank in core["frozen_entries"]:
        assert {key for _, key in rank["before"]} == {"weight", "exp_avg", "exp_avg_sq"}
        assert sum(t.numel() for t in rank["before"].values()) > 100
        assert_same(rank["before"], rank["after"])


def test_an_extra_gradient_on_shards_equals_that_of_one_process(core, alone):
    first, second = core["sharded_gradient"]
    for rank in (first, second):
        for seen in rank["seen"]:
            assert_same(seen["after"], seen["before"])
            assert_same(seen["grad"], seen["before"])
    whole = alone("sharded_gradient")
    check_sharded((first, second), whole)
    assert_same(joined(first["seen"], second["seen"], whole["seen"]), whole["seen"], atol=1e-12)


def test_the_state_of_shards_after_an_evaluation(core):
    for rank in core["state_after_evaluation"]:
        assert all(set(kinds) == {"Parameter", "DTensor"} for kinds in rank["seen"])
        assert_same(rank["after"], rank["before"])
        assert_same(rank["raw_after"], rank["raw"])
        assert rank["before"]["heads"].keys() == {"classifier.weight"}


@pytest.mark.parametrize("way", ["optimizer", "torch"])
def test_shards_resume_in_the_middle_of_a_stage(core, way):
    """Through the optimizer's own state dict, or `torch.distributed.checkpoint` with `Run.load_state_dict` (T7)."""
    for rank in core[f"sharded_resume_{way}"]:
        assert rank["index"] == 3
        assert masks_of(rank["resumed"]["states"][-1])
        resumed = {**rank["resumed"], "states": rank["resumed"]["states"][-1]}
        assert_same(resumed, {**rank["uninterrupted"], "states": rank["uninterrupted"]["states"][-1]})


def test_torch_drops_our_key_and_the_next_step_says_so(core):
    """T7: `get_optimizer_state_dict` keeps ``state`` and ``param_groups`` only."""
    for rank in core["sharded_resume_torch"]:
        assert rank["keys"] == ["param_groups", "state"]
        assert "the optimizer's state was loaded without steadytune's" in rank["error"]
    assert "steadytune" in core["sharded_resume_optimizer"][0]["keys"]


def test_torchs_fake_step_counts_nothing(core):
    """T17: a fresh optimizer's state is made by a step with learning rate 0, which fires our hooks."""
    for rank in core["sharded_resume_torch"]:
        assert rank["fake_steps"] == [0]
        assert rank["index_after"] == 0
        assert rank["fake"] == {"index": 0, "raw": 0, "key": False}


# ---------------------------------------------------------------------- Trainer


TRAINED = [f"trainer_{n}" for n in worker.TRAINER_RECIPES] + ["trainer_sgd"]


@pytest.mark.parametrize("name", TRAINED)
def test_trainer_ranks_hold_the_same_bits(trainer, name):
    first, second = trainer[name]
    assert first["world"] == 2
    assert_same(first["weights"], second["weights"])


@pytest.mark.parametrize("name", TRAINED)
def test_trainer_equals_one_process_with_the_same_global_batch(trainer, alone, name):
    """Token losses too, where ranks and micro-batches hold unequal numbers of tokens."""
    whole = alone(name)
    assert whole["world"] == 1
    assert_same(trainer[name][0]["weights"], whole["weights"], atol=1e-10)
    assert trainer[name][0]["norms"] == pytest.approx(whole["norms"], rel=1e-9)


def test_trainer_resumes_in_the_middle_of_a_stage(trainer):
    first, second = trainer["trainer_resume"]
    assert_same(first, second)
    assert first["index"] == worker.STEPS
    assert "steadytune.safetensors" in first["files"]
    assert_same(first["resumed"], first["uninterrupted"])
    assert_same(first["raw"][1], first["raw"][0])


def test_the_number_of_ranks_does_not_multiply_the_gradient(trainer, alone):
    """T23, T5: the stock Trainer's gradient of a BERT classifier grows with ranks and with micro-batches."""
    norms, whole = trainer["first_norms"][0], alone("first_norms")
    for model in ("bert", "llama"):
        assert norms[model, "ours"] == pytest.approx(whole[model, "ours"], rel=1e-12)
        assert whole[model, "ours"] == pytest.approx(whole[model, "stock"], rel=1e-12)
    assert norms["llama", "stock"] == pytest.approx(whole["llama", "stock"], rel=1e-12)
    assert norms["bert", "stock"] == pytest.approx(4 * whole["bert", "stock"], rel=1e-12)
