"""studies/crl_baselines.py: which transitions are drawn, their goals and rewards, the losses by hand, whole runs."""

import copy
import dataclasses

import helpers
import numpy as np
import pytest
import torch
from helpers import POINT, assert_new_outcome, assert_same, checkpoint, killed_run, scalars

import crl_baselines as base
import crl_collector
import crl_deep

METHODS = ["gcbc", "gcsl", "sac", "sac-her"]
TINY = [*POINT, "--env-id", "point_room"]


def run(*flags):
    return helpers.run(base, *flags)


def filled_replay(capacity=40, steps=57, num_envs=3, seed=0):
    """Episodes of 12 steps at most, some of them ended by a fall; state, goal and achieved say when and where."""
    rng = np.random.default_rng(seed)
    replay = base.GoalReplay(capacity, num_envs, 4, 2, 2, torch.device("cpu"))
    episode, left = np.zeros(num_envs, int), rng.integers(2, 13, num_envs)
    limit = left == 12
    for t in range(steps):
        left -= 1
        ends = left == 0
        fallen = ends & ~limit
        state = np.stack([np.full(num_envs, t), np.arange(num_envs), episode, left], 1)
        achieved = np.stack([np.full(num_envs, t + 1), np.arange(num_envs)], 1)
        replay.add(state, state[:, :2] / 100, np.stack([episode, -episode], 1) + 1000, episode, achieved, fallen)
        episode = episode + ends
        left = np.where(ends, np.where(rng.random(num_envs) < 0.4, 12, rng.integers(2, 12, num_envs)), left)
        limit = np.where(ends, left == 12, limit)
    return replay


def args_of(method, *flags):
    return base.parse_args([*TINY, "--method", method, *map(str, flags)])


# --- which transitions, and their goals -------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_anchors_have_a_next_state_and_know_their_episodes_end(seed):
    torch.manual_seed(seed)
    replay, window = filled_replay(seed=seed), 12
    seen = set()
    for _ in range(20):
        time_index, env, last_time, ended = (x.flatten() for x in replay.sample(3, 10, window))  # all of one window
        state, last = replay.state[time_index, env], replay.state[last_time, env]
        next_state = replay.state[(time_index + 1) % replay.capacity, env]
        assert torch.equal(state[:, 1:3], last[:, 1:3])  # of one environment and episode
        left, steps = state[:, 3], last[:, 0] - state[:, 0]
        assert (steps >= 0).all() and (steps < window).all()
        assert (last[ended][:, 3] == 0).all()
        fallen = replay.fallen[time_index, env]
        assert ((left > 0) | fallen).all()
        inside = left > 0
        assert torch.equal(next_state[inside][:, 0], state[inside][:, 0] + 1)
        assert torch.equal(next_state[inside][:, 2], state[inside][:, 2])
        seen |= {(bool(e), bool(f), bool(n > 0)) for e, f, n in zip(ended, fallen, steps)}
        drawn = list(zip(time_index.tolist(), env.tolist()))
        assert max(map(drawn.count, drawn)) == 1
    assert {(True, False, True), (True, True, False), (False, False, True)} <= seen


def test_an_end_that_is_in_sight_is_known():
    """A window of the whole ring, which has been wrapped around: the last step of an anchor's episode is the one that
    has the same number and no steps left, or the newest step."""
    torch.manual_seed(0)
    replay = filled_replay()
    time_index, env, last_time, ended = (x.flatten() for x in replay.sample(2, 40, 40))
    newest = (replay.pointer - 1) % replay.capacity
    for t, e, last, end in zip(time_index, env, last_time, ended):
        same = (replay.episode[:, e] == replay.episode[t, e]).nonzero()[:, 0]
        (ends,) = [x for x in same if replay.state[x, e, 3] == 0] or [None]
        assert end == (ends is not None and ends != newest) and last == (newest if ends is None else ends)
    assert ended.any() and not ended.all()


def test_her_goals_by_hand():
    torch.manual_seed(0)
    replay, args = filled_replay(), args_of("sac-her", "--gamma", 0.9)
    anchors = tuple(x.flatten() for x in replay.sample(5, 6, 12))
    time_index, env, last_time, ended = anchors
    state, action, goal, reward, discount, next_state = base.her_goals(replay, anchors, args)
    episode = state[:, 2]
    commanded = torch.stack([episode, -episode], 1) + 1000
    place_of_end = torch.stack([replay.state[last_time, env, 0] + 1, env.float()], 1)
    limit = ended & ~replay.fallen[last_time, env]  # a fall is no place to aim at
    assert torch.equal(goal[limit], place_of_end[limit]) and torch.equal(goal[~limit], commanded[~limit])
    assert limit.any() and (ended & ~limit).any() and reward.sum() == 0  # a step is a metre here, goals are further
    assert torch.equal(discount, torch.where(replay.fallen[time_index, env], 0.0, 0.9))
    assert torch.equal(action, state[:, :2] / 100)
    plain = base.her_goals(replay, anchors, args_of("sac"))
    assert torch.equal(plain[2], commanded) and plain[3].sum() == 0
    (one,) = limit.nonzero()[:1, 0]
    for distance in (0.4, 0.6):  # m
        where = replay.achieved[time_index[one], env[one]] + torch.tensor([distance, 0])
        replay.achieved[last_time[one], env[one]] = where
        reward = base.her_goals(replay, tuple(x[one : one + 1] for x in anchors), args)[3]
        assert float(reward) == (distance < 0.5)


@pytest.mark.parametrize("method", ["gcbc", "gcsl"])
def test_future_goals_by_their_distribution(method):
    replay = filled_replay(capacity=400, steps=400)
    args = args_of(method, *(["--gamma", 0.8] if method == "gcbc" else []))
    torch.manual_seed(0)
    time_index, env, last_time, ended = (x.flatten() for x in replay.sample(3, 10, 12))
    four = ((last_time - time_index) % 400 == 4).nonzero()[:1, 0]  # an anchor with four steps in sight
    time_index, env, last_time, ended = time_index[four], env[four], last_time[four], ended[four]
    many = tuple(x.expand(20_000) for x in (time_index, env, last_time, ended))
    _, _, goal = base.future_goals(replay, many, args)
    share = torch.bincount((goal[:, 0] - replay.state[time_index, env, 0]).long(), minlength=5) / 20_000
    weights = torch.tensor([0, 1, 0.8, 0.8**2, 0.8**3] if method == "gcbc" else [0, 1, 1, 1, 1.0])
    assert torch.allclose(share, weights / weights.sum(), atol=0.015)


# --- the losses -------------------------------------------------------------------------------------------------------
def agent_and_batch(method, size=7):
    torch.manual_seed(0)
    args = args_of(method)
    agent = base.GoalAgent(4, 2, 2, args)
    state, action, goal = torch.randn(size, 4), torch.rand(size, 2) * 1.8 - 0.9, torch.randn(size, 2)
    if method.startswith("sac"):
        more = [torch.rand(size).round(), torch.full((size,), 0.9), torch.randn(size, 4)]
    else:
        more = []
    return agent, base.goal_optimizers(agent, args, torch.device("cpu")), args, [state, action, goal, *more]


def test_log_probability_of_a_stored_action():
    """That of the action's own draw, and torch.distributions'."""
    mean, log_std = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64) / 2
    torch.manual_seed(0)
    action, log_prob = base.sample_action(mean, log_std)
    inside = (action.abs() < 0.999).all(1)
    assert torch.allclose(base.log_prob_of(action, mean, log_std)[inside], log_prob[inside], atol=1e-6)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    assert torch.allclose(base.log_prob_of(action, mean, log_std)[inside],
                          squashed.log_prob(action).sum(1)[inside], atol=1e-6)  # fmt: skip
    at_the_bound = base.log_prob_of(torch.ones(1, 3), mean[:1].float(), log_std[:1].float())
    assert at_the_bound.isfinite().all()


def test_imitation_is_maximum_likelihood():
    agent, optimizers, args, batch = agent_and_batch("gcbc")
    expected = -base.log_prob_of(batch[1], *agent.actor(batch[0], batch[2])).mean()
    first = base.update(agent, optimizers, args, batch)["losses/actor"]
    assert torch.equal(first, expected.detach())
    for _ in range(1500):
        last = base.update(agent, optimizers, args, batch)
    assert last["losses/actor"] < -5
    mean, _ = agent.actor(batch[0], batch[2])
    assert (torch.tanh(mean) - batch[1]).abs().mean() < 0.2


def test_soft_actor_critic_by_hand():
    agent, optimizers, args, batch = agent_and_batch("sac")
    state, action, goal, reward, discount, next_state = batch
    with torch.no_grad():
        agent.log_alpha.fill_(-1.0)
        for weight in agent.targets.parameters():  # no longer the critics'
            weight.add_(0.1 * torch.randn_like(weight))
        torch.manual_seed(3)
        next_action, next_log_prob = base.sample_action(*agent.actor(next_state, goal))
        both = torch.cat([target(torch.cat([next_state, next_action, goal], 1)) for target in agent.targets], 1)
        y = reward + 0.9 * (both.min(1).values - np.exp(-1) * next_log_prob)
        q1, q2 = (critic(torch.cat([state, action, goal], 1))[:, 0] for critic in agent.critics)
        critic_loss = 0.5 * ((q1 - y) ** 2).mean() + 0.5 * ((q2 - y) ** 2).mean()
    before, old_actor = [p.clone() for p in agent.targets.parameters()], copy.deepcopy(agent.actor)
    torch.manual_seed(3)
    metrics = base.update(agent, optimizers, args, batch)
    assert metrics["losses/critic"] == pytest.approx(float(critic_loss), rel=1e-5)
    assert metrics["losses/alpha_value"] == pytest.approx(float(np.exp(-1)))
    assert metrics["losses/entropy"] < 0.5 * 2 and agent.log_alpha > -1  # entropy below its target: alpha rises
    with torch.no_grad():  # the policy's loss is taken with the critics after their step
        torch.manual_seed(3)
        base.sample_action(*old_actor(next_state, goal))
        new_action, log_prob = base.sample_action(*old_actor(state, goal))
        q1, q2 = (critic(torch.cat([state, new_action, goal], 1))[:, 0] for critic in agent.critics)
        actor_loss = (np.exp(-1) * log_prob - torch.minimum(q1, q2)).mean()
    assert metrics["losses/actor"] == pytest.approx(float(actor_loss), rel=1e-5)
    assert metrics["losses/entropy"] == pytest.approx(float(-log_prob.mean()), rel=1e-5)
    expected = np.exp(-1) * float(-log_prob.mean() + args.entropy_coef * 2)
    assert float(agent.log_alpha.grad) == pytest.approx(expected, rel=1e-5)
    for old, target, critic in zip(before, agent.targets.parameters(), agent.critics.parameters(), strict=True):
        assert torch.allclose(target, old + 0.005 * (critic - old), atol=1e-7)
    assert all(p.requires_grad for p in agent.critics.parameters())


def test_sac_finds_the_rewarded_action():
    """A bandit: the reward is 1 where the action is near (0.5, -0.5); nothing follows."""
    agent, optimizers, args, _ = agent_and_batch("sac")
    torch.manual_seed(1)
    for _ in range(600):
        action = torch.rand(64, 2) * 2 - 1
        reward = 4 * (1 - (action - torch.tensor([0.5, -0.5])).norm(dim=1))
        batch = [torch.zeros(64, 4), action, torch.zeros(64, 2), reward, torch.zeros(64), torch.zeros(64, 4)]
        base.update(agent, optimizers, args, batch)
    mean, _ = agent.actor(torch.zeros(1, 4), torch.zeros(1, 2))
    assert torch.allclose(torch.tanh(mean), torch.tensor([[0.5, -0.5]]), atol=0.25)


# --- what it shares with crl_deep.py ----------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [base, crl_collector], ids=lambda script: script.SCRIPT)
def test_constants_and_defaults_are_crl_deeps(script):
    names = "MAZES GOALS POINT_XML ROBOTS ENV_IDS LONG GOAL_RADIUS EASY_GOAL_RADIUS LOG_STD_MIN LOG_STD_MAX"
    for name in names.split():
        assert getattr(script, name) == getattr(crl_deep, name), name
    extra = dict(collector_depth=16, deep=16) if script is crl_collector else {}
    for name, task in crl_deep.TASKS.items():
        assert script.TASKS[name] == task | (extra if name.startswith("point") else {})
    for field in dataclasses.fields(crl_deep.Args):
        if hasattr(script.Args, field.name) and field.name != "exp_name":
            assert getattr(script.Args, field.name) == field.default, field.name


def test_learning_rates():
    """1e-3 for the point mass; else 3e-4, of SAC 1e-4."""
    for env_id, imitation, sac in (("point_room", 1e-3, 1e-3), ("ant", 3e-4, 1e-4), ("humanoid_u_maze", 3e-4, 1e-4)):
        rates = [base.parse_args(["--env-id", env_id, "--method", method]).learning_rate for method in METHODS]
        assert rates == [imitation] * 2 + [sac] * 2


@pytest.mark.parametrize("script", [base, crl_collector], ids=lambda script: script.SCRIPT)
def test_all_resets_draw_from_streams_of_their_own(script, monkeypatch):
    """The three agents of crl_collector.py are evaluated on the same starts and goals."""
    seeds, make = [], np.random.default_rng
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: seeds.append(tuple(map(int, seed))) or make(seed))
        helpers.run(script, *TINY, *(["--deep", 8] if script is crl_collector else []))
    assert {seed[:2] for seed in seeds} == {(1, 0), (1, 1)}
    draws = [tuple(make(list(seed)).random(3)) for seed in set(seeds)]
    assert len(set(draws)) == len(draws) > 4 * 7 + 9


# --- runs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method, dies", [*((method, 95) for method in METHODS), ("gcbc", 140)])
def test_killed_and_resumed_is_bit_identical(method, dies):
    """The later one after the ring has wrapped around."""
    flags = [*TINY, "--method", method, "--checkpoint-every", 40]
    whole, part = run(*flags), killed_run(base, dies, *flags)
    run("--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    logged = scalars(whole)
    assert logged == scalars(part) and checkpoint(whole)["gradient_steps"] == 39  # 13 training steps learn, 3 each
    assert {"losses/actor", "eval/time_at_goal"} <= logged.keys()


GOLDEN = {
    "gcbc": {"losses/actor": {120: 0.562254, 200: -0.599313, 360: -0.160524}},
    "gcsl": {"losses/actor": {120: 0.564030, 200: -0.598617, 360: -0.160892}},
    "sac": {"losses/actor": {120: -0.266099, 360: -1.921678}, "losses/critic": {120: 0.171072, 360: 0.393903}},
    "sac-her": {"losses/actor": {120: -0.893658, 360: -2.556861}, "losses/critic": {120: 0.299057, 360: 0.514965}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_golden_run(method):
    """Printed by this script at commit 7b78b79."""
    helpers.assert_golden(scalars(run(*TINY, "--method", method)), GOLDEN[method])


@pytest.mark.parametrize("method", METHODS[1:])
def test_methods_differ(method, outcomes):
    assert_new_outcome(base, TINY, ["--method", method], outcomes)


@pytest.mark.parametrize("method", ["gcbc", "sac-her"])
@pytest.mark.parametrize("flag", [["--precision", "bfloat16"], ["--compile"]], ids=str)
def test_speed_flags_change_bits_but_not_results(flag, method, quick_compiler):
    flags = [*TINY, "--method", method, "--total-timesteps", 200]
    plain, fast = scalars(run(*flags)), scalars(run(*flags, *flag))
    first = min(plain["losses/actor"])
    assert fast["losses/actor"][first] == pytest.approx(plain["losses/actor"][first], rel=0.05, abs=0.05)
    assert fast["losses/actor"] != plain["losses/actor"] if "bfloat16" in flag else torch._dynamo.utils.counters


def test_a_longer_run_has_a_longer_ring():
    """What was stored is there, in order; a file without one of the rings is refused."""
    replay, longer = filled_replay(steps=30), base.GoalReplay(60, 3, 4, 2, 2, torch.device("cpu"))
    state = replay.state_dict()
    longer.load_state_dict(state)
    assert longer.size == longer.pointer == 30
    rings = [name for name, value in state.items() if isinstance(value, torch.Tensor)]
    assert {"state", "action", "goal", "achieved", "episode", "fallen"} <= set(rings)
    assert all(torch.equal(getattr(longer, name)[:30], getattr(replay, name)[:30]) for name in rings)
    del state["fallen"]
    with pytest.raises(KeyError):
        longer.load_state_dict(state)


@pytest.mark.parametrize(
    "more", [["--depth", "8"], ["--gamma", "0.9"], ["--tau", "0.5"], ["--entropy-coef", "1"]], ids=str
)
def test_flags_change_what_is_learned(more, outcomes):
    assert_new_outcome(base, [*TINY, "--method", "sac-her"], more, outcomes)


@pytest.mark.parametrize("flags, message", [
    (["--depth", "6"], "--depth 6: must be a multiple of 4"),
    (["--tau", "0.1"], "--tau 0.1: does nothing with --method gcbc"),
    (["--method", "gcsl", "--gamma", "0.9"], "--gamma 0.9: does nothing with --method gcsl"),
    (["--episode-length", "2"], "--episode-length 2: must lie between 3 and"),
])  # fmt: skip
def test_bad_input(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*TINY, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1


def test_a_fall_is_stored():
    _, replay = helpers.run_and_replay(
        base, *POINT, "--env-id", "humanoid", "--method", "sac", "--episode-length", "80", "--learning-starts", "320"
    )
    episode, state, achieved = replay["episode"], replay["state"], replay["achieved"]
    ends = episode[1:] != episode[:-1]
    assert replay["fallen"].any() and (replay["fallen"][:-1] <= ends).all()
    # Where a step ended is where the next one begins, unless the episode is over; the goal stays until then
    assert torch.equal(achieved[:-1][~ends], state[1:, :, :3][~ends])
    last, start = ((achieved[:-1] - x[:, :, :3])[ends].norm(dim=1) for x in (state[:-1], state[1:]))
    assert last.max() < 0.1 and start.mean() > 0.2
    goal = replay["goal"]
    assert torch.equal(goal[1:][~ends], goal[:-1][~ends]) and not torch.equal(goal[1:][ends], goal[:-1][ends])
