"""studies/crl_depth_offline.py: maze, data and critic by hand and against crl_deep.py; whole runs; bad input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from helpers import scalars

import crl_deep as crl
import crl_depth_offline as study

TINY = (
    "--num-paths 16 --path-length 40 --gradient-steps 30 --batch-size 16 --width 8 --eval-every 20 --eval-episodes 32 "
    "--eval-steps 10"
).split()


def run(*flags):
    return study.train(tyro.cli(study.Args, args=[*TINY, *map(str, flags)]))


def summary(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


# --- the maze ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("maze", study.MAZES)
def test_mazes_are_those_of_crl_deep(maze):
    assert study.MAZES[maze] == " ".join(crl.maze_rows("point", maze)).replace("R", "0").replace("G", "0")


def test_shortest_paths():
    point = study.PointMaze("big_maze", 1)
    distance, towards, cells = point.distance, point.towards, point.cells
    assert (distance == distance.T).all() and (distance.diagonal() == 0).all() and (distance >= 0).all()
    start, goal = (int(np.flatnonzero((cells == cell).all(1))[0]) for cell in ((1, 1), (1, 5)))
    assert distance[start, goal] == 8  # down two, right four with a step down on the way, up three: walled off above
    apart = np.argwhere(distance > 0)
    following = towards[tuple(apart.T)]
    assert (np.abs(cells[following] - cells[apart[:, 0]]).sum(1) == 1).all()
    assert (distance[following, apart[:, 1]] == distance[tuple(apart.T)] - 1).all()


def test_the_point_mass():
    """5 N on 1.327 kg for 0.15 s; walls hold a ball of radius 0.25 m back, without friction along them."""
    point = study.PointMaze("hardest_maze", 2)
    point.reset(np.zeros(2, int), np.random.default_rng(0))
    point.physics[:, 1:] = [*study.CELL * point.cells[0], 0, 0]
    point.step(np.array([[0.0, 1.0], [-1.0, 0.0]]))
    assert point.state[0] == pytest.approx([2, 2 + 0.5 * 5 / 1.327 * 0.15 * 0.16, 0, 5 / 1.327 * 0.15], rel=1e-3)
    for _ in range(60):
        point.step(np.array([[0.0, 0.0], [-1.0, 0.2]]))
    assert point.state[1, 0] == pytest.approx(1 + 0.25, abs=0.03) and abs(point.state[1, 2]) < 0.05
    assert point.cell()[1] != 0 and point.cells[point.cell()[1]][0] == 1  # it slid along the wall


def test_paths_stay_in_the_maze_and_repeat_by_seed():
    states, actions = study.collect_paths("hardest_maze", 64, 100, 0.4, [1, 0])
    again, other = (study.collect_paths("hardest_maze", 64, 100, 0.4, [seed, 0])[0] for seed in (1, 2))
    assert torch.equal(states, again) and not torch.equal(states, other)
    assert states.shape == (100, 64, 4) and actions.abs().max() <= 1 and actions.std() > 0.5
    point = study.PointMaze("hardest_maze", 6400)
    point.physics[:, 1:] = states.reshape(-1, 4)
    cells = point.cell()
    assert cells.min() >= 0 and len(np.unique(cells)) > 0.9 * len(point.cells)
    moved = []
    for share in (0.0, 1.0):
        states, _ = study.collect_paths("hardest_maze", 64, 100, share, [1, 0])
        moved.append(states[..., :2].diff(dim=0).norm(dim=-1).sum(0).mean())
    assert moved[0] > 1.3 * moved[1]  # the controller gets about, random actions do not


def test_goals_are_later_places_of_the_same_path():
    states = torch.zeros(200, 30, 4)
    states[..., 0], states[..., 1] = torch.arange(200.0)[:, None], torch.arange(30.0)
    rng = torch.Generator().manual_seed(0)
    pairs, goals = study.sample_batch(states, torch.full((200, 30, 2), 0.5), 20_000, 0.9, rng)
    assert pairs.shape == (20_000, 6) and (pairs[:, 4:] == 0.5).all() and (goals[:, 1] == pairs[:, 1]).all()
    ahead = goals[:, 0] - pairs[:, 0]
    assert ahead.min() == 1 and goals[:, 0].max() == 199 and pairs[:, 0].max() == 198
    early = ahead[pairs[:, 0] < 100]
    assert early.mean() == pytest.approx(10, rel=0.05) and (early == 1).float().mean() == pytest.approx(0.1, abs=0.01)


def test_what_is_held_out_comes_from_other_paths(monkeypatch):
    seen, evaluate = [], study.evaluate
    monkeypatch.setattr(study, "evaluate", lambda phi, psi, held_out, args: seen.append(held_out) or evaluate(
        phi, psi, held_out, args))  # fmt: skip
    run()
    learned, others = (
        study.collect_paths("hardest_maze", num, 40, study.Args.random_share, [1, which])[0].reshape(-1, 4)
        for num, which in ((16, 0), (128, 1))
    )
    states = torch.cat([pairs[:, :4] for pairs, _ in seen[0]]).unique(dim=0)
    assert [len(pairs) for pairs, _ in seen[0]] == [512] * 8
    assert all((others == state).all(1).any() for state in states[::50])
    assert not any((learned == state).all(1).any() for state in states)


# --- the critic -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("depth", [4, 16])
def test_the_network_is_that_of_crl_deep(depth):
    torch.manual_seed(0)
    ours, theirs = study.ContrastiveEncoder(6, 5, 12, depth), crl.ResidualMLP(6, 5, 12, depth)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        bound = a.shape[-1] ** -0.5
        assert a.dim() < 2 or (0.7 * bound < a.abs().max() <= bound and b.abs().max() <= bound)
        b.data.copy_(a.data.add_(0.1 * torch.randn_like(a)))
    x = torch.randn(7, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_loss_is_that_of_crl_deep():
    torch.manual_seed(0)
    phi, psi = torch.randn(2, 32, 8)
    psi[:16] = phi[:16] + 1e-3 * psi[:16]  # some pairs are near, as after training
    gradients = []
    for which in (study, crl):
        a, b = phi.clone().requires_grad_(), psi.clone().requires_grad_()
        if which is study:
            nce, logsumexp, accuracy = study.info_nce(a, b)
            loss = nce + 0.1 * logsumexp.square().mean()
        else:
            loss, metrics = crl.contrastive_loss(a, b, 0.1)
        gradients.append(torch.autograd.grad(loss, (a, b)))
    assert float(nce.detach()) == pytest.approx(float(metrics["losses/nce"]), rel=1e-5)
    assert accuracy == metrics["contrastive/categorical_accuracy"] and 0.5 <= accuracy < 1
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


# --- evaluation -------------------------------------------------------------------------------------------------------
def test_the_greedy_policy_follows_the_critic():
    """One that goes for the goal in a straight line reaches near goals; one that is the same everywhere, hardly any."""
    args = study.Args(maze="big_maze", eval_episodes=64, eval_steps=60)
    held_out = [(torch.randn(8, 6), torch.randn(8, 2))]
    straight = study.evaluate(lambda p: p[..., :2] + p[..., 2:4] + 0.3 * p[..., 4:], lambda g: g, held_out, args)
    flat = study.evaluate(lambda p: 0 * p[..., :2], lambda g: 0 * g, held_out, args)
    assert straight["eval/success"] > 0.25 > flat["eval/success"] and straight["eval/time_at_goal"] > 5
    assert straight["eval/success_far"] < straight["eval/success"]
    fewer = study.Args(maze="big_maze", eval_episodes=32, eval_steps=12)
    short = study.evaluate(lambda p: p[..., :2] + p[..., 2:4] + 0.3 * p[..., 4:], lambda g: g, held_out, fewer)
    assert short["eval/success"] < straight["eval/success"] and short["eval/success"] * 32 % 1 == 0
    assert straight == study.evaluate(
        lambda p: p[..., :2] + p[..., 2:4] + 0.3 * p[..., 4:], lambda g: g, held_out, args
    )


def test_the_map_of_the_critic():
    saved = study.critic_map(lambda p: p[..., :2], lambda g: g, "big_maze", points_per_cell=2)
    assert saved["values"].shape == (2, len(saved["x"]), len(saved["y"])) and saved["walls"].shape == (8, 8)
    for values, goal in zip(saved["values"], saved["goals"]):
        i, j = np.unravel_index(values.argmax(), values.shape)
        assert (saved["x"][i], saved["y"][j]) == tuple(goal) and values.max() == 0


def test_the_map_is_at_rest_and_at_the_best_action():
    def phi(pairs):
        return pairs[..., :2] + 0.1 * pairs[..., 4:] + pairs[..., 2:4]

    saved = study.critic_map(phi, lambda goal: goal, "big_maze", points_per_cell=2)
    for values, goal in zip(saved["values"], saved["goals"]):
        assert values[0, 0] == pytest.approx(-math.hypot(*(goal - 0.1)))


def test_the_data_are_those_of_the_results():
    """Numbers printed by commit 668cbe9."""
    states, actions = study.collect_paths("hardest_maze", 4, 60, 0.4, [1, 0])
    assert float(states.double().sum()) == pytest.approx(3926.02173, rel=1e-4)
    assert float(actions.double().sum()) == pytest.approx(-23.318900, rel=1e-3)
    assert float(actions.double().square().sum()) == pytest.approx(178.091500, rel=1e-4)
    assert study.GOAL_RADIUS == crl.GOAL_RADIUS


def test_the_loss_of_a_run(monkeypatch):
    seen, losses, info_nce, backward = [], [], study.info_nce, torch.Tensor.backward
    monkeypatch.setattr(study, "info_nce", lambda phi, psi: seen.append(info_nce(phi, psi)) or seen[-1])
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.item()) or backward(loss))
    run("--logsumexp-coef", 0.5)
    nce, logsumexp, _ = seen[0]
    assert losses[0] == pytest.approx(float((nce + 0.5 * logsumexp.square().mean()).detach()), rel=1e-6)


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_run_and_its_repetition():
    first, second, other = run(), run(), run("--seed", 2)
    clock = "charts/cpu_seconds"
    assert {**summary(first), clock: 0} == {**summary(second), clock: 0} != {**summary(other), clock: 0}
    logged = scalars(first)
    encoders = [study.ContrastiveEncoder(inputs, 64, 8, 4) for inputs in (6, 2)]
    weights = sum(weight.numel() for encoder in encoders for weight in encoder.parameters())
    assert set(logged["eval/nce"]) == {20, 30} and summary(first)["parameters"] == weights
    files = {path.name for path in first.iterdir() if not path.name.startswith("events")}
    assert files == {"args.json", "critic_map.npz", "summary.json", "crl_depth_offline.py"}


def test_it_learns():
    """From log(512), the loss of a critic that knows nothing."""
    run_dir = run("--num-paths", 128, "--path-length", 100, "--gradient-steps", 300, "--batch-size", 128, "--width", 32)
    assert summary(run_dir)["eval/nce"] < math.log(512) - 0.3 and summary(run_dir)["eval/accuracy"] > 4 / 512


@pytest.mark.parametrize("flags", [
    ["--maze", "big_maze"], ["--data-seed", 2], ["--num-paths", 17], ["--path-length", 41], ["--random-share", 0.9],
    ["--depth", 8], ["--width", 9], ["--gradient-steps", 31], ["--batch-size", 17], ["--learning-rate", 0.01],
    ["--gamma", 0.9], ["--logsumexp-coef", 1], ["--repr-dim", 8],
], ids=lambda flags: " ".join(map(str, flags)))  # fmt: skip
def test_every_flag_changes_the_run(flags, outcomes):
    for given in ([], flags):
        if str(given) not in outcomes:
            outcome = {k: v for k, v in summary(run(*given)).items() if k != "charts/cpu_seconds"}
            assert outcome not in outcomes.values()
            outcomes[str(given)] = outcome


def test_the_learning_rate_falls_at_the_end(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    run("--learning-rate", 0.1)
    assert rates[:19] == [0.1] * 19 and rates[-1] == pytest.approx(0.1 / 30 / 0.4) and len(rates) == 30


def test_a_loss_that_is_not_finite_ends_the_run(capsys, monkeypatch):
    info_nce = study.info_nce
    monkeypatch.setattr(study, "info_nce", lambda phi, psi: (math.nan * info_nce(phi, psi)[0], *info_nce(phi, psi)[1:]))
    with pytest.raises(SystemExit) as stopped:
        run()
    printed = capsys.readouterr().err
    assert stopped.value.code == 1 and "the loss is not finite" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("flags, message", [
    (["--depth", 6], "--depth 6: must be a multiple of 4"), (["--depth", 0], "--depth 0: must lie between 4"),
    (["--gamma", 1], "--gamma 1.0: must lie between"), (["--random-share", "nan"], "-share nan: must lie between"),
    (["--seed", -1], "--seed -1: must lie between"), (["--width", 10**6], "--width 1000000: the run needs about"),
    (["--exp-name", "x" * 300], ": cannot create the folder"), (["--exp-name", "a/b"], "a/b: is no name for a folder"),
    (["--eval-episodes", 1], "--eval-episodes 1: must lie between 32"), (["--repr-dim", 10**9], "must lie between 1"),
], ids=lambda value: " ".join(map(str, value))[:20] if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1
    assert not list(Path(".").glob("runs/*"))
