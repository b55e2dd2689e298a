"""Meta-learning: closed forms of quadratic tables, what it is of other methods, the stage, resume, errors."""

from __future__ import annotations

import pytest
import torch

from bench_helpers import make_root, records, small
from fit_helpers import same, save_tiny_bert, toy, weights
from helpers import batches, bert, copied
from steadytune import L2SP, Run
from steadytune.bench.study import run_study
from steadytune.errors import UsageError
from steadytune.fitting.folder import read_record
from steadytune.fitting.main import fit
from steadytune.fitting.stages import meta
from steadytune.fitting.stages.meta import FOMAML, IMAML, Episode, Reptile, adapt, after_episode
from steadytune.hypergradient import proximal

WIDTH = 6


class Quadratic(Episode):
    """L_train = 1/2 (w - a)' A (w - a), L_test = 1/2 (w - c)' C (w - c)."""

    def __init__(self, seed, start, steps=1):
        generator = torch.Generator().manual_seed(seed)

        def draw(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        roots = [draw(WIDTH, WIDTH) for _ in range(2)]
        self.A, self.C = (root @ root.T / WIDTH + 0.1 * torch.eye(WIDTH, dtype=torch.float64) for root in roots)
        self.a, self.c = draw(WIDTH), draw(WIDTH)
        self.body, self.head = [start.clone().requires_grad_()], []
        self.batches = [self.trained_on] * steps

    def trained_on(self):
        away = self.body[0] - self.a
        return away @ self.A @ away / 2

    def judged_by(self):
        away = self.body[0] - self.c
        return away @ self.C @ away / 2


START = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)


def sgd(parameters, lr):
    optimizer = torch.optim.SGD(parameters, lr)
    optimizer.param_groups[0]["initial_lr"] = lr
    return optimizer


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_implicit_gradient_of_quadratic_tables_equals_the_closed_form(strength):
    """phi = (A + s I)^-1 (A a + s theta), and dL_test/dtheta = s (A + s I)^-1 C (phi - c)."""
    for seed in range(3):
        episode = Quadratic(seed, START, steps=600)
        with torch.no_grad():
            adapt(episode, sgd(episode.body, 0.2), strength)
            found = IMAML(strength=strength, iterations=WIDTH).gradient(episode)
        near = episode.A + strength * torch.eye(WIDTH, dtype=torch.float64)
        phi = torch.linalg.solve(near, episode.A @ episode.a + strength * START)
        wanted = strength * torch.linalg.solve(near, episode.C @ (phi - episode.c))
        assert torch.allclose(episode.body[0], phi, atol=1e-8)
        assert torch.allclose(found[0], wanted, atol=1e-6)


def test_an_infinite_pull_gives_the_gradient_of_first_order():
    episode = Quadratic(0, START)
    with torch.no_grad():
        first = FOMAML().gradient(episode)
        far = IMAML(strength=1e9).gradient(episode)
        near = IMAML(strength=0.5).gradient(episode)
    assert torch.equal(proximal(lambda p: p, first, strength=float("inf"), iterations=5)[0], first[0])
    assert torch.allclose(far[0], first[0], atol=1e-6)
    assert not torch.allclose(near[0], first[0], atol=1e-2)


def test_the_steps_of_one_table_are_fine_tuning_with_l2sp():
    """Naive: decay toward zero, or toward the pre-trained weights instead of the start."""
    data = batches(4)
    run = Run(bert(dropout=0.0, dtype=torch.float64), [L2SP(0.7, decoupled=False, replace_decay=False)], total_steps=4)
    run.attach(optimizer := torch.optim.SGD(run.model.parameters(), 0.1))
    for batch in data:
        run.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    model = bert(dropout=0.0, dtype=torch.float64)
    own = dict(model.named_parameters())

    pulled = run[L2SP].pulled

    class One(Episode):
        def __init__(self):
            self.body = [p for name, p in own.items() if name in pulled]
            self.head = [p for name, p in own.items() if name not in pulled]
            self.batches = [lambda batch=batch: model(**batch).loss for batch in data]

        trained_on = judged_by = None

    with torch.no_grad():
        adapt(One(), torch.optim.SGD(own.values(), 0.1), 0.7)
    expected, found = copied(run.model), copied(model)
    assert all(torch.allclose(expected[name], found[name], atol=1e-12) for name in expected)
    assert not torch.allclose(found["bert.encoder.layer.0.output.dense.weight"],
                              bert(dtype=torch.float64).bert.encoder.layer[0].output.dense.weight)  # fmt: skip


def test_reptile_goes_a_share_of_the_way_and_with_one_step_and_rate_1_it_is_plain_training():
    for rate, left in ((0.5, 1.0), (0.5, 0.5), (1.0, 1.0)):
        episode = Quadratic(1, START)
        after_episode(Reptile(rate=rate), episode, sgd(episode.body, 0.1), sgd(episode.body, 0.0), left)
        step = -0.1 * episode.A @ (START - episode.a)
        assert torch.allclose(episode.body[0], START + rate * left * step, atol=1e-12)


def test_first_order_moves_the_start_by_the_gradient_after_the_steps():
    """Naive: the step is taken from where the episode ended."""
    episode = Quadratic(2, START)
    after_episode(FOMAML(), episode, sgd(episode.body, 0.1), sgd(episode.body, 0.3), 0.5)
    phi = START - 0.1 * episode.A @ (START - episode.a)
    assert torch.allclose(episode.body[0], START - 0.15 * episode.C @ (phi - episode.c), atol=1e-12)
    assert episode.body[0].grad is None


def test_implicit_episodes_reach_the_start_that_is_best_for_all_tables():
    """sum over tables of s (A + s I)^-1 C (phi(theta) - c) = 0 is linear in theta."""
    strength, body = 1.0, [START.clone().requires_grad_()]
    tables = [Quadratic(seed, START, steps=60) for seed in range(5)]
    outer = sgd(body, 0.1)
    left = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    for table in tables:
        back = torch.linalg.inv(table.A + strength * torch.eye(WIDTH, dtype=torch.float64))
        weight = strength * back @ table.C
        left[0].add_(weight @ back * strength)
        left[1].add_(weight @ (table.c - back @ table.A @ table.a))
        table.body = body
    best = torch.linalg.solve(*left)
    for number in range(1000):
        after_episode(IMAML(strength=strength, iterations=WIDTH), tables[number % 5], sgd(body, 0.3), outer, 0.3)
    assert (body[0] - best).norm() < 0.1 * (START - best).norm()


# ---- the stage --------------------------------------------------------------------------------------------------

QUICK = {"steps": 4, "aux_steps": 6, "batch_size": 4, "lr": 1e-2, "progress": False, "validation_share": 0.25}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def tables(count=5):
    """Tables of two classes, three classes, numbers, and pairs of labels."""
    made = [toy(24, start=200 + 100 * i)[["text", "label"]] for i in range(count)]
    made[1] = made[1].assign(label=[["low", "mid", "high"][i % 3] for i in range(24)])
    made[2] = toy(24, start=400)[["text", "score"]]
    return made


def run(output, model, learner="reptile:inner_steps=2", **options):
    return fit(
        toy(40), text="text", label="label", model=model, output=output,
        **{**QUICK, "aux": tables(), "meta": learner, **options},
    )  # fmt: skip


@pytest.mark.parametrize("learner", ["reptile:inner_steps=2", "fomaml:inner_steps=2", "imaml:inner_steps=2"])
@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_only_the_body_is_learnt_and_the_fit_starts_from_it(tiny, tmp_path, monkeypatch, learner, pooling):
    seen = []
    body = meta.MetaStage.body

    def spy(self, pretrained, name, checkpoints):
        found = body(self, pretrained, name, checkpoints)
        seen.append((pretrained.load(0).state_dict(), found))
        return found

    monkeypatch.setattr(meta.MetaStage, "body", spy)
    result = run(tmp_path / "o", tiny, learner, pooling=pooling, steps=0, head="logistic")
    ((before, found),) = seen
    final = weights(result.output)
    assert not [name for name in found if name.startswith("classifier")]
    dense = "bert.pooler.dense.weight"  # it is learnt where the head reads through it
    assert torch.equal(before[dense], found[dense]) == (pooling == "mean")
    name = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(before[name], found[name])
    assert torch.equal(final[name], found[name])
    (stage,) = read_record(result.output)["recipe"]["stages"]
    assert (stage["name"], stage["steps"], len(stage["tables"])) == (learner.partition(":")[0], 6, 5)
    assert [table["kind"] for table in stage["tables"]][:3] == ["classification", "classification", "regression"]
    assert "learned first over 5 other tables" in (result.output / "README.md").read_text()


def test_each_table_has_as_many_episodes_as_any_other(tiny, tmp_path, monkeypatch):
    asked = []
    init = meta.TextEpisode.__init__

    def spy(self, model, body, pretrained, table, *rest):
        asked.append(table.plan.data.origins["train"])
        init(self, model, body, pretrained, table, *rest)

    monkeypatch.setattr(meta.TextEpisode, "__init__", spy)
    run(tmp_path / "o", tiny, aux_steps=10)
    assert len(set(asked[:5])) == len(set(asked[5:])) == 5


def test_rows_that_judge_are_not_trained_on(tiny, tmp_path, monkeypatch):
    """Naive: the gradient of the start is that of rows that the steps have fitted."""
    init = meta.TextEpisode.__init__

    def spy(self, *given):
        init(self, *given)
        trained = {tuple(row) for inputs, _ in self.support for row in inputs["input_ids"].tolist()}
        assert not trained & {tuple(row) for row in self.query[0]["input_ids"].tolist()}
        drawn.append(tuple(sorted(trained)))

    drawn = []
    monkeypatch.setattr(meta.TextEpisode, "__init__", spy)
    run(tmp_path / "o", tiny, aux_steps=10)
    assert len(set(drawn)) == 10


@pytest.mark.parametrize("learner", ["reptile:inner_steps=2", "imaml:inner_steps=2"])
@pytest.mark.parametrize("where", [3, 5])
def test_interrupted_and_resumed_equals_uninterrupted(tiny, tmp_path, monkeypatch, learner, where):
    run(tmp_path / "whole", tiny, learner, save_steps=2)
    episode = meta.MetaStage._episode

    def cut(self, number, *rest):
        if number == where:
            raise KeyboardInterrupt
        episode(self, number, *rest)

    monkeypatch.setattr(meta.MetaStage, "_episode", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", tiny, learner, save_steps=2)
    begun = []
    monkeypatch.setattr(
        meta.MetaStage, "_episode", lambda self, number, *rest: begun.append(number) or episode(self, number, *rest)
    )
    run(tmp_path / "cut", tiny, learner, save_steps=2, resume=True)
    assert begun[0] == where - 1  # from the last checkpoint
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aux": tables()[:4]}, r"reptile learns what 5 or more tables share, got 4: .*\(STILTs\)"),
        ({"aux": [*tables(), toy(3, start=900)[["text", "label"]]]}, "needs 4 rows or more of each table"),
        ({"meta": "maml"}, "unknown meta 'maml'.*reptile|unknown meta 'maml'"),
        ({"meta": "imaml:strength=0"}, "strength must be"),
        ({"meta": "imaml", "bf16": True}, "imaml subtracts gradients"),
        ({"aux": None, "aux_steps": None}, "meta .* is for auxiliary tables"),
    ],
)
def test_bad_input_is_refused_before_training(tiny, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(meta.MetaStage, "body", lambda *args: pytest.fail("trained"))
    with pytest.raises(UsageError, match=words):
        run(tmp_path / "o", tiny, **options)


def test_a_study_has_it_in_a_recipe(tmp_path, monkeypatch):
    root = make_root(tmp_path / "data")
    files = []
    for i, table in enumerate(tables()):
        table.to_csv(tmp_path / f"{i}.csv", index=False)
        files.append(str(tmp_path / f"{i}.csv"))
    recipes = {"stilts": {"aux": files, "aux_steps": 3}, "meta": {"aux": files, "aux_steps": 3, "meta": "fomaml"}}
    study = small(root, recipes=recipes, seeds=1)
    run_study(study, tmp_path / "out", data_root=root, workers=0, progress=False)
    done = {record["spec"]["recipe"]: record for record in records(tmp_path / "out").values()}
    assert {record["status"] for record in done.values()} == {"done"}, [r["error"] for r in done.values()]
    assert [part["name"] for part in done["meta"]["spec"]["methods"]] == ["aux", "fomaml"]
    assert [part["name"] for part in done["stilts"]["spec"]["methods"]] == ["aux"]
