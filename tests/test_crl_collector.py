"""studies/crl_collector.py: one agent acts, three learn from the same batches; whole runs."""

from unittest import mock

import helpers
import pytest
import torch
from helpers import POINT, assert_same, checkpoint, killed_run, scalars

import crl_collector as collector
import crl_deep

TINY = [*POINT, "--env-id", "point_room", "--collector-depth", "8", "--deep", "8"]


def run(*flags):
    return helpers.run(collector, *flags)


def test_one_acts_and_three_learn_from_the_same_batches():
    acted, learned, act, update = [], [], collector.act, collector.update
    with mock.patch.multiple(
        collector,
        act=lambda agent, *rest, **more: acted.append((agent, more)) or act(agent, *rest, **more),
        update=lambda agent, *rest: learned.append((agent, rest[-1], rest[0])) or update(agent, *rest),
    ):
        run_dir = run(*TINY)
    training = {id(agent) for agent, more in acted if more.get("noise", True)}
    evaluated = {id(agent) for agent, more in acted if not more.get("noise", True)}
    assert len(training) == 1 and len(evaluated) == 3 and training < evaluated
    assert len(learned) == 3 * checkpoint(run_dir)["gradient_steps"]
    for first, second, third in zip(*(learned[i::3] for i in range(3))):
        assert id(first[0]) in training and first[1] is second[1] is third[1]
    for agent, _, optimizers in learned[:3]:
        own = {id(weight) for weight in agent.parameters()}
        assert {id(weight) for o in optimizers for weight in o.param_groups[0]["params"]} == own
    depths = [len(agent.actor.trunk.blocks) for agent, _, _ in learned[:3]]
    assert depths == [2, 2, 1]


def test_alone_the_collector_learns_as_in_crl_deep():
    """The same draws where the learners draw none: with updates of the collector alone, its weights are crl_deep's."""
    flags = [*POINT, "--env-id", "point_room"]
    args, theirs = collector.parse_args([*flags, "--collector-depth", "4"]), crl_deep.parse_args(flags)
    torch.manual_seed(0)
    ours = collector.ContrastiveAgent(4, 2, 2, 4, args)
    torch.manual_seed(0)
    other = crl_deep.Agent(4, 2, 2, theirs)
    results = []
    for script, agent, settings in ((collector, ours, args), (crl_deep, other, theirs)):
        optimizers = script.adam_optimizers(agent, settings, torch.device("cpu"))
        torch.manual_seed(1)
        batches = [[torch.randn(8, 4), torch.rand(8, 2) * 2 - 1, torch.randn(8, 2)] for _ in range(3)]
        results.append([script.update(agent, optimizers, settings, batch) for batch in batches])
    for a, b in zip(*results, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[tag], b[tag]) for tag in a)
    assert_same(dict(ours.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("env_id", ["point_room", "ant_u_maze"])
def test_the_collectors_run_is_crl_deeps(env_id, monkeypatch):
    """Where building and teaching the two learners draws nothing. The ant may fall."""
    for script in (collector, crl_deep):
        low = script.ROBOTS["ant"]._replace(healthy_height=(0.2, 0.7))
        monkeypatch.setitem(script.ROBOTS, "ant", low)
    make, update, made = collector.ContrastiveAgent, collector.update, []

    def quiet(draws, function, *values):
        state = torch.get_rng_state()
        result = function(*values)
        if not draws:
            torch.set_rng_state(state)
        return result

    def build(*values):
        made.append(quiet(not made, make, *values))
        return made[-1]

    monkeypatch.setattr(collector, "ContrastiveAgent", build)
    monkeypatch.setattr(collector, "update", lambda agent, *rest: quiet(agent is made[0], update, agent, *rest))
    flags = [*POINT, "--env-id", env_id]
    ours, theirs = run(*flags, "--collector-depth", 8, "--deep", 8), helpers.run(crl_deep, *flags, "--depth", 8)
    a, b = checkpoint(ours), checkpoint(theirs)
    for name, other in (("collector", "agent"), ("envs", "envs"), ("torch_rng", "torch_rng")):
        assert_same(a[name], b[other])
    logged = scalars(ours)
    for tag, values in scalars(theirs).items():
        if tag.split("/")[0] in ("losses", "eval", "contrastive") and not tag.endswith("last5"):
            assert logged[f"{tag}/collector"] == values, tag


def test_killed_and_resumed_is_bit_identical():
    flags = [*TINY, "--checkpoint-every", 40]
    whole, part = run(*flags), killed_run(collector, 95, *flags)
    run("--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    logged = scalars(whole)
    assert logged == scalars(part) and checkpoint(whole)["gradient_steps"] == 39  # 13 training steps learn, 3 each
    for name in ("collector", "deep", "shallow"):
        assert {f"eval/time_at_goal/{name}", f"losses/critic/{name}"} <= logged.keys()


def test_deep_is_the_deep_learners_depth():
    first, second = run(*TINY), run(*TINY, "--deep", 12)
    blocks = [{name for name in checkpoint(part)["deep"] if ".blocks.2" in name} for part in (first, second)]
    assert not blocks[0] and blocks[1]


@pytest.mark.parametrize("flags, message", [
    (["--collector-depth", "6"], "--collector-depth 6: must be a multiple of 4"),
    (["--collector-depth", "400000000"], "--collector-depth 400000000: the run needs about"),
    (["--env-id", "point_castle"], "--env-id point_castle: unknown environment"),
])  # fmt: skip
def test_bad_input(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*TINY, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1


def test_defaults_of_the_paper_and_of_the_point_mass():
    args = collector.parse_args(["--env-id", "ant_big_maze"])
    assert (args.collector_depth, args.deep, args.shallow, args.num_envs) == (32, 32, 4, 512)
    args = collector.parse_args([])
    assert (args.env_id, args.collector_depth, args.deep, args.width) == ("point_room", 16, 16, 64)
