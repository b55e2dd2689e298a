"""Runs on a Ray cluster: the records of the local engine, also when a node is lost."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from typer.testing import CliRunner

from bench_helpers import comparable, make_root, predictions, records, small
from fit_helpers import same, toy, weights
from steadytune import cli, search
from steadytune.bench import cluster as module
from steadytune.bench.cluster import Ray
from steadytune.bench.spec import Study
from steadytune.bench.store import Store
from steadytune.bench.study import run_study
from steadytune.errors import UsageError

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of one processor each, all on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(2):
        made.add_node(**node)
    ray.init(made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("root"))


def test_a_lost_node_loses_nothing_and_records_are_those_of_the_local_engine(cluster, root, tmp_path):
    """Naive: an engine that takes the loss of a node for the failure of its run."""
    study = small(root, seeds=6)
    run_study(study, tmp_path / "local", data_root=root, workers=0, progress=False)
    begun = []

    class Losing(Ray):
        def map(self, tasks, begun_with):
            for outcome in super().map(tasks, lambda task: begun.append(task[1].id)):
                if len(records(tmp_path / "ray")) == 4 and len(cluster.worker_nodes) == 2:
                    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
                yield outcome

    found = run_study(study, tmp_path / "ray", data_root=root, engine=Losing(), progress=False)
    assert (found.done, found.failed) == (12, 0)
    assert len(begun) == 12, "Ray makes the lost run again"
    assert comparable(tmp_path / "ray") == comparable(tmp_path / "local")
    assert predictions(tmp_path / "ray") == predictions(tmp_path / "local")
    again = run_study(study, tmp_path / "ray", data_root=root, engine=Ray(), progress=False)
    assert again == found


def test_a_search_on_the_cluster_finds_what_a_local_one_finds(cluster, root, tmp_path):
    toy(40).drop(columns="score").to_csv(tmp_path / "rows.csv", index=False)
    given = {"model": root / "bert", "budget": "13runs", "arms": ["head=logistic"], "folds": 2, "steps": 4,
             "batch_size": 8, "progress": False}  # fmt: skip
    local, far = (
        search(tmp_path / "rows.csv", output=tmp_path / name, engine=engine, **given)
        for name, engine in (("local", None), ("ray", Ray()))
    )
    assert far.record["claim"] == local.record["claim"]
    assert comparable(tmp_path / "ray" / "search") == comparable(tmp_path / "local" / "search")
    assert predictions(tmp_path / "ray" / "search") == predictions(tmp_path / "local" / "search")
    assert same(weights(tmp_path / "ray"), weights(tmp_path / "local"))


def test_a_worker_that_dies_is_a_failed_run_and_the_others_are_done(cluster, root, tmp_path, monkeypatch):
    real = module._work

    def work(run, *others):  # sent by value, since the nodes do not know this module
        if run.spec["seeds"]["init"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(run, *others)

    monkeypatch.setattr(module, "_work", work)
    study = small(root, recipes={"plain": {}})
    found = run_study(study, tmp_path, data_root=root, engine=Ray(retries=0), progress=False)
    assert (found.done, found.failed) == (1, 1)
    errors = {record["error"] for record in records(tmp_path).values()} - {None}
    assert all(error.startswith("the worker or its node was lost: ") for error in errors)


def test_a_full_disk_ends_the_study_and_a_later_command_goes_on(cluster, root, tmp_path, monkeypatch):
    study, write = small(root, recipes={"plain": {}}, seeds=3), Store.write

    def full(self, record, found=None):
        if records(tmp_path):
            raise UsageError(f"output {self.folder} cannot be written: No space left on device")
        write(self, record, found)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", full)
        with pytest.raises(UsageError, match="No space left on device"):
            run_study(study, tmp_path, data_root=root, engine=Ray(), progress=False)
    assert len(records(tmp_path)) == 1
    assert run_study(study, tmp_path, data_root=root, engine=Ray(), progress=False).done == 3


def test_what_the_nodes_cannot_do_is_said_once(cluster, root, tmp_path, monkeypatch):
    def work(*given):
        raise ModuleNotFoundError("No module named 'steadytune'")

    with pytest.raises(UsageError, match=r"no node .* has the 1 CPUs and 1 GPUs .* nodes have: 1 CPUs and 0 GPUs"):
        run_study(small(root), tmp_path / "gpus", data_root=root, engine=Ray(gpus=1), progress=False)
    with pytest.raises(UsageError, match="keep_models needs the local engine"):
        run_study(small(root, keep_models=True), tmp_path / "kept", data_root=root, engine=Ray(), progress=False)
    monkeypatch.setattr(module, "_work", work)
    with pytest.raises(UsageError, match="Install the same version of steadytune on every node"):
        run_study(small(root), tmp_path / "old", data_root=root, engine=Ray(), progress=False)
    assert not records(tmp_path / "old")


# ---- without a cluster


def test_own_tables_travel_with_their_run(root, tmp_path, monkeypatch):
    """Naive: a run that reads the file by its path, which other nodes do not have."""
    file = tmp_path / "rows.csv"
    toy(40).drop(columns="score").to_csv(file, index=False)
    task = {"train": str(file), "text": ["text"], "label": "label", "folds": 2}
    options = {"steps": 2, "batch_size": 8}
    study = {"name": "own", "models": {"tiny": str(root / "bert")}, "tasks": {"own": task}, "recipes": {"plain": {}}}
    (run, *_) = Study.of({**study, "options": options, "seeds": 2}).runs()
    assert run.files == [str(file)]
    content = file.read_bytes()
    file.unlink()
    record, found = module._work(run, {str(file): "abc"}, {}, None, content)
    assert (record["status"], record["id"]) == ("done", run.id)
    assert len(found) == 20


# the signal may arrive inside a finaliser, which swallows it with this warning; the timer then fires again
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_that_takes_too_long_is_recorded_as_failed(root):
    run = small(root, options={"steps": 20000}).runs(root)[0]
    record, found = module._work(run, {}, {}, 0.2)
    assert (record["status"], record["error"]) == ("failed", "stopped after 0.2 seconds")
    assert found is None
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "ray", "--address", "127.0.0.1:9"], "no Ray cluster at address '127.0.0.1:9'"),
        (["--engine", "ray", "--workers", "2"], "--workers is for the local engine"),
        (["--engine", "ray", "--gpus", "1.5"], "gpus must be 0, a fraction, or a whole number, got 1.5"),
        (["--engine", "ray", "--cpus", "0"], "cpus must be 1 or more, got 0"),
        (["--engine", "rya"], "engine must be local or ray, got 'rya'. Did you mean 'ray'"),
        (["--gpus", "1"], "--gpus is for --engine ray"),
    ],
)
def test_mistakes_are_one_sentence(root, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    (tmp_path / "study.yaml").write_text(small(root).text())
    given = ["bench", str(tmp_path / "study.yaml"), "--data-root", str(root), "--output", str(tmp_path / "out"), *words]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out" / "records").is_dir() or not records(tmp_path / "out")


def test_without_ray_the_remedy_is_named(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'steadytune\[cluster\]'"):
        run_study(small(root), tmp_path, data_root=root, engine=Ray(), progress=False)
