"""crl_deep.py: every formula, the environments and the replay, against hand-made values and brute force."""

import copy
import math
import re
from collections import deque
from functools import partial

import helpers
import mujoco
import numpy as np
import pytest
import torch

import crl_deep as crl
from crl_deep import Args, MujocoEnvs, Replay, contrastive_loss, future_offset

looks = helpers.benchmark("crl_deep/looks.py")


def small_args(**changes):
    defaults = dict(
        width=16, actor_depth=4, critic_depth=4, learning_rate=1e-3, batch_size=8, num_envs=4, unroll_length=5,
        gradient_steps=2,
    )  # fmt: skip
    return Args(**(defaults | changes))


def small_agent(seed=0, **changes):
    torch.manual_seed(seed)
    args = small_args(**changes)
    agent = crl.Agent(4, 2, 2, args)
    return agent, crl.adam_optimizers(agent, args, torch.device("cpu")), args


CPU = torch.device("cpu")


class NoRun:
    """Stands for the Run that `evaluate` talks to."""

    def __init__(self):
        self.stopped, self.bar = None, self

    def set_description(self, text):
        self.text = text

    def check_finite(self, metrics, since):
        self.stopped = self.stopped or (None if all(map(math.isfinite, metrics.values())) else 1)


def random_batch(batch_size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(batch_size, dim, generator=generator) * 2 - 1 for dim in (4, 2, 2))


# --- environments -----------------------------------------------------------------------------------------------------
def cell_distances(rows):
    """Breadth-first distances of all free cells from R."""
    free = {(i, j) for i, row in enumerate(rows) for j, c in enumerate(row) if c != "1"}
    start = next((i, j) for i, j in free if rows[i][j] == "R")
    distance, queue = {start: 0}, deque([start])
    while queue:
        i, j = queue.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if cell in free and cell not in distance:
                distance[cell] = distance[i, j] + 1
                queue.append(cell)
    return distance


@pytest.mark.parametrize(
    "layout, goals, nearest, furthest",
    [
        ("u_maze", 6, 1, 6), ("u_maze_eval", 3, 4, 6), ("u_maze_single_eval", 1, 6, 6), ("u2_maze", 8, 1, 8),
        ("u2_maze_eval", 4, 5, 8), ("u3_maze", 10, 1, 10), ("u3_maze_eval", 5, 6, 10),
        ("u3_maze_single_eval", 1, 10, 10), ("u6_maze", 14, 1, 14), ("u6_maze_eval", 7, 8, 14),
        ("u7_maze", 12, 1, 12), ("u7_maze_eval", 6, 7, 12),
        ("u4_maze", 10, 1, 10), ("u4_maze_eval", 4, 7, 10), ("u5_maze", 16, 1, 16), ("u5_maze_eval", 8, 9, 16),
        ("u5_maze_single_eval", 1, 16, 16), ("big_maze", 25, 1, 11),
        ("big_maze_eval", 9, 8, 11), ("hardest_maze", 45, 1, 15), ("room", 24, 1, 4),
    ],
)  # fmt: skip
def test_layouts_have_the_papers_goals(layout, goals, nearest, furthest):
    rows = crl.maze_rows("ant", layout)
    assert len({len(row) for row in rows}) == 1
    distances = cell_distances(rows)
    found = [d for (i, j), d in distances.items() if rows[i][j] == "G"]
    assert (len(found), min(found), max(found)) == (goals, nearest, furthest)
    assert all(row[0] == row[-1] == "1" for row in rows) and set(rows[0]) == set(rows[-1]) == {"1"}


def test_eval_layouts_have_the_walls_of_their_maze():
    assert "ant_u_maze_single_eval" in crl.ENV_IDS and "ant_hardest_maze_eval" not in crl.ENV_IDS
    for env_id in crl.ENV_IDS:
        robot, layout, _ = crl.parse_env_id(env_id)
        rows, base = (crl.maze_rows(robot, name) for name in (layout, re.sub("(_single)?_eval$", "", layout)))
        assert [row.replace("G", "0") for row in rows] == [row.replace("G", "0") for row in base], env_id
        assert all(cell == "G" for row, of in zip(rows, base, strict=True) for cell, c in zip(of, row, strict=True)
                   if c == "G")  # fmt: skip
    ant, humanoid = ("".join(crl.maze_rows(robot, "big_maze_eval")) for robot in ("ant", "humanoid"))
    assert humanoid.count("G") == ant.count("G") + 1


def test_env_ids():
    assert crl.parse_env_id("ant_u4_maze_eval") == ("ant", "u4_maze_eval", ())
    assert crl.parse_env_id("humanoid") == ("humanoid", "", ())
    assert crl.parse_env_id("ant_u_maze_gen_1f2f3f") == ("ant", "u_maze", (1, 2, 3))
    for bad in (
        "ant_u9_maze", "ant_u_maze_gen_", "ant_u_maze_gen_9f", "ant_u_maze_gen_0f", "ant_u_maze_gen_f",
        "ant_big_maze_gen_1f", "ant_u_maze_gen_x", "ant_", "arm_push_easy", "",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="unknown environment; known: point, point_room, point_u_maze"):
            crl.parse_env_id(bad)
    for env_id, eval_env_id in (
        ("ant_u4_maze", "ant_u4_maze_eval"), ("ant_hardest_maze", "ant_hardest_maze"), ("humanoid", "humanoid"),
        ("ant_u_maze_gen_1f2f3f", "ant_u_maze_eval"), ("humanoid_big_maze", "humanoid_big_maze_eval"),
        ("point_room", "point_room"), ("ant_u_maze_eval", "ant_u_maze_eval"),
    ):  # fmt: skip
        assert crl.parse_args(["--env-id", env_id]).eval_env_id == eval_env_id


def test_stitching_pairs_are_along_the_corridor():
    path = crl.corridor(crl.maze_rows("point", "u_maze"))
    assert path == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    envs = MujocoEnvs("point_u_maze_gen_1f3f", 200, 10, (1, 0))
    envs.reset(np.ones(200, bool))
    start = np.round(envs.state[:, :2] / 2).astype(int)
    goal = np.round(envs.goal / 2).astype(int)
    apart = [path.index(tuple(g)) - path.index(tuple(s)) for s, g in zip(start, goal, strict=True)]
    assert set(apart) == {1, 3}
    assert 60 < apart.count(1) < 140  # a distance is drawn first, then a pair of that distance


@pytest.mark.parametrize("env_id", crl.ENV_IDS)
def test_every_environment_builds_and_steps(env_id):
    envs = MujocoEnvs(env_id, 2, 3, (1, 0))
    envs.reset(np.ones(2, bool))
    robot = envs.robot
    assert envs.state.shape == (2, robot.state_dim) and envs.goal.shape == (2, robot.goal_dim)
    assert envs.model.nu == robot.action_dim
    for _ in range(3):
        done = envs.step(np.zeros((2, robot.action_dim), np.float32))
    assert done.all() and np.isfinite(envs.state).all()  # the time limit
    if env_id == "ant":
        np.testing.assert_allclose(np.linalg.norm(envs.goal, axis=1), 10, rtol=1e-6)
    if env_id == "humanoid":
        assert (envs.goal[:, 2] == 1.25).all()
        assert (np.linalg.norm(envs.goal[:, :2], axis=1) <= 5).all()
        assert envs.model.opt.timestep * robot.physics_steps == pytest.approx(0.015)


@pytest.mark.parametrize("env_id", ["point_u_maze", "ant_u4_maze", "humanoid_u_maze"])
def test_steps_equal_a_plain_mujoco_loop(env_id):
    envs = MujocoEnvs(env_id, 3, 100, (5, 0))
    envs.reset(np.ones(3, bool))
    rng = np.random.default_rng(0)
    nq, model = envs.model.nq, envs.model
    data = mujoco.MjData(model)
    for _ in range(12):
        action = rng.uniform(-1, 1, (3, envs.robot.action_dim)).astype(np.float32)
        before = envs.physics.copy()
        envs.step(action)
        for row in range(3):
            data.qpos[:], data.qvel[:] = before[row, 1 : 1 + nq], before[row, 1 + nq :]
            data.ctrl[:] = action[row] * model.actuator_ctrlrange[:, 1]
            data.qacc_warmstart[:] = 0  # a rollout starts the solver afresh
            for _ in range(envs.robot.physics_steps):
                mujoco.mj_step(model, data)
            np.testing.assert_array_equal(envs.physics[row, 1:], np.concatenate([data.qpos, data.qvel]))
            np.testing.assert_array_equal(envs.state[row, : nq + model.nv], envs.physics[row, 1:].astype(np.float32))


@pytest.mark.parametrize("after_reset", [True, False])
def test_humanoid_observation_is_mujocos(after_reset):
    """cinert, cvel and qfrc_actuator as gymnasium's Humanoid reads them, but of the state itself, without any lag."""
    envs = MujocoEnvs("humanoid", 2, 100, (1, 0))
    envs.reset(np.ones(2, bool))
    action = np.random.default_rng(0).uniform(-1, 1, (2, 17)).astype(np.float32)
    for _ in range(10):
        envs.step(action)
    if after_reset:
        envs.reset(np.ones(2, bool))
        action[:] = 0
    data = mujoco.MjData(envs.model)
    data.qpos[:], data.qvel[:] = np.split(envs.physics[1, 1:], [envs.model.nq])
    data.ctrl[:] = 0.4 * action[1]
    mujoco.mj_forward(envs.model, data)
    expected = np.concatenate(
        [data.qpos, data.qvel, data.cinert[1:].ravel(), data.cvel[1:].ravel(), data.qfrc_actuator[6:]]
    )
    np.testing.assert_allclose(envs.state[1], expected, rtol=2e-5, atol=2e-5)
    assert np.abs(expected[-17:]).max() > 1 or after_reset


def test_reset_touches_only_its_rows_and_depends_only_on_row_and_episode():
    envs = MujocoEnvs("ant_big_maze", 8, 100, (3, 0))
    envs.reset(np.ones(8, bool))
    for _ in range(4):
        envs.step(np.full((8, 8), 0.3, np.float32))
    before = copy.deepcopy(envs.state_dict())
    mask = np.arange(8) == 5
    envs.reset(mask)
    after = envs.state_dict()
    for name, value in after.items():
        assert torch.equal(value[~mask], before[name][~mask]), name
    assert not torch.equal(after["physics"][5], before["physics"][5]) and after["episode"][5] == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    other = MujocoEnvs("ant_big_maze", 8, 100, (3, 0))
    torch.set_num_threads(threads)
    assert len(other.data) == threads + 1
    for _ in range(2):
        other.reset(mask)
    assert torch.equal(other.state_dict()["physics"][5], after["physics"][5])


def test_fixed_resets_repeat_the_first_start_and_goal():
    for fixed in (True, False):
        envs = MujocoEnvs("point_big_maze", 6, 10, (1, 0), fixed_resets=fixed)
        goals = []
        for _ in range(3):
            envs.reset(np.ones(6, bool))
            goals.append((envs.goal.copy(), envs.physics.copy()))
        assert fixed == all(np.array_equal(g, goals[0][0]) and np.array_equal(p, goals[0][1]) for g, p in goals)


def test_falling_over_ends_the_episode():
    envs = MujocoEnvs("ant", 3, 100, (1, 0))
    envs.reset(np.ones(3, bool))
    envs.physics[1, 3] = 1.2  # the torso's height
    envs.physics[2, 16:] = 1e11  # velocities that make MuJoCo start the world anew, in an episode's first step
    done = envs.step(np.zeros((3, 8), np.float32))
    assert done.tolist() == envs.fallen.tolist() == [False, True, True] and np.isfinite(envs.state).all()


def test_the_time_limit_is_no_fall():
    envs = MujocoEnvs("ant", 2, 1, (1, 0))
    envs.reset(np.ones(2, bool))
    envs.physics[1, 3] = 1.2
    done = envs.step(np.zeros((2, 8), np.float32))
    assert done.tolist() == [True, True] and envs.fallen.tolist() == [False, True]


@pytest.mark.parametrize("env_id", ["ant", "humanoid"])
def test_quaternions_have_norm_one_from_the_first_observation_on(env_id):
    envs = MujocoEnvs(env_id, 16, 10, (1, 0))
    envs.reset(np.ones(16, bool))
    np.testing.assert_allclose(np.linalg.norm(envs.state[:, 3:7], axis=1), 1, atol=1e-6)
    if env_id == "ant":
        assert np.ptp(envs.state[:, 3]) > 0.001  # the reset noise turns the torso


def random_rollout(env_id, num_envs, steps):
    """Uniform random actions on the open floor -> env steps per fall, and every step's torso height and speed."""
    envs, rng = MujocoEnvs(env_id, num_envs, 10**9, (2, 0)), np.random.default_rng(2)
    envs.reset(np.ones(num_envs, bool))
    falls, height, speed = 0, [], []
    for _ in range(steps):
        action = rng.uniform(-1, 1, (num_envs, envs.robot.action_dim)).astype(np.float32)
        fallen = envs.step(action)
        falls += fallen.sum()
        height.append(envs.state[:, 2].copy())
        speed.append(np.linalg.norm(envs.state[:, envs.model.nq :][:, :2], axis=1))
        envs.reset(fallen)
    return num_envs * steps / max(falls, 1), np.concatenate(height), np.concatenate(speed)


def test_the_ant_falls_stands_and_moves_about_as_braxs():
    """Against 128,000 steps of Brax's spring ant; gymnasium's gear and step give a fall per 50 to 70 steps."""
    steps_per_fall, height, speed = random_rollout("ant", 128, 300)
    assert 1803 / 3 < steps_per_fall < 1803 * 3
    assert np.median(height) == pytest.approx(0.586, abs=0.02)
    assert np.quantile(height, 0.99) == pytest.approx(0.860, abs=0.05)
    assert 0.839 / 1.5 < np.median(speed) < 0.839 * 1.5


def test_the_humanoid_falls_sooner_than_braxs():
    """Documented, not mended: Brax's falls once in 102 steps."""
    steps_per_fall, height, _ = random_rollout("humanoid", 32, 100)
    assert 20 < steps_per_fall < 35 and np.median(height) == pytest.approx(1.24, abs=0.04)


def test_point_mass_dynamics_and_walls():
    envs = MujocoEnvs("point_room", 1, 1000, (1, 0))
    envs.reset(np.ones(1, bool))
    velocity = envs.state[0, 2:].copy()
    envs.step(np.array([[1.0, 0.0]], np.float32))
    np.testing.assert_allclose(envs.state[0, 2:] - velocity, [0.05 * 5 / 1.327, 0], rtol=1e-4, atol=1e-6)
    for _ in range(200):
        envs.step(np.array([[1.0, 0.3]], np.float32))
    wall = 6 * 2 - 1  # the inner face of the wall cell in row 6
    np.testing.assert_allclose(envs.state[0, :2], wall - 0.25, atol=0.05)  # slid along it into the corner


class ScriptedEnvs:
    """A fake with MujocoEnvs' interface: environment i is at its goal on every step and falls at step falls[i]."""

    def __init__(self, falls, episode_length=10):
        self.num_envs, self.falls, self.episode_length = len(falls), np.array(falls), episode_length
        self.state, self.goal = np.zeros((len(falls), 4), np.float32), np.zeros((len(falls), 2), np.float32)
        self.episode = np.zeros(len(falls), int)

    def reset(self, mask):
        self.steps, self.time_at_goal = np.zeros(self.num_envs, int), np.zeros(self.num_envs, int)

    def step(self, action):
        self.steps += 1
        self.time_at_goal += 1
        return (self.steps == self.falls) | (self.steps >= self.episode_length)

    def distance(self):
        return np.where(self.steps > self.falls, 99.0, 0.1)


def test_time_at_goal_freezes_at_the_first_end():
    agent, _, args = small_agent()
    metrics = crl.evaluate(agent, ScriptedEnvs([3, 99, 5]), args, 0, CPU, NoRun())
    assert metrics["eval/time_at_goal"] == metrics["eval/episodic_length"] == metrics["eval/episodic_return"] == 6
    assert metrics["eval/final_distance"] == pytest.approx(0.1)
    record = looks.play(agent, ScriptedEnvs([3, 99, 5]), 0)
    assert record["time_at_goal"].tolist() == [3, 10, 5]
    assert record["alive"].sum(0).tolist() == [3, 10, 5]


def test_what_passes_the_goal_after_its_end_has_not_come_near():
    class Late(ScriptedEnvs):
        def distance(self):
            return np.where(self.steps > self.falls, 0.1, 99.0)

    agent, _, args = small_agent()
    metrics = crl.evaluate(agent, Late([3, 99]), args, 0, CPU, NoRun())
    assert metrics["eval/success_easy"] == 0 and metrics["eval/final_distance"] == 99


def test_success_is_any_step_at_the_goal():
    """The third environment never arrives, the second comes near."""

    class Apart(ScriptedEnvs):
        def step(self, action):
            done = super().step(action)
            self.time_at_goal[1:] = 0
            return done

        def distance(self):
            return np.array([0.1, crl.EASY_GOAL_RADIUS - 0.1 * (self.steps[1] == 4), crl.EASY_GOAL_RADIUS])

    agent, _, args = small_agent()
    metrics = crl.evaluate(agent, Apart([99, 99, 99]), args, 0, CPU, NoRun())
    assert metrics["eval/success_any"] == pytest.approx(1 / 3) and metrics["eval/success_easy"] == pytest.approx(2 / 3)


def test_time_at_goal_counts_the_steps_that_end_there():
    envs = MujocoEnvs("point_room", 3, 50, (1, 0))
    envs.reset(np.ones(3, bool))
    envs.goal[:] = envs.state[:, :2] + np.array([[0.4, 0], [0.9, 0], [3, 0]])
    expected = np.zeros(3, int)
    for _ in range(12):
        envs.step(np.tile(np.float32([1, 0]), (3, 1)))
        expected += np.linalg.norm(envs.state[:, :2] - envs.goal, axis=1) < 0.5
        assert (envs.time_at_goal == expected).all()
    assert len(set(expected)) == 3
    envs.reset(np.arange(3) < 1)
    assert envs.time_at_goal.tolist() == [0, *expected[1:]]


@pytest.mark.parametrize("robot, cell", [("ant", 4.0), ("humanoid", 2.0), ("point", 2.0)])
def test_walls_are_half_a_cell_high(robot, cell):
    model = crl.make_model(robot, [(1, 2)])
    (wall,) = np.flatnonzero(model.geom_type == int(mujoco.mjtGeom.mjGEOM_BOX))
    assert model.geom_size[wall].tolist() == [cell / 2, cell / 2, cell / 4]
    assert model.geom_pos[wall].tolist() == [cell, 2 * cell, cell / 4]


def test_the_humanoids_start_and_goals():
    envs = MujocoEnvs("humanoid", 512, 10, (1, 0))
    envs.reset(np.ones(512, bool))
    distance = np.linalg.norm(envs.goal[:, :2], axis=1)
    assert distance.min() > 1 and distance.max() < 5 and distance.mean() == pytest.approx(3, abs=0.2)
    assert np.abs(envs.goal[:, :2].mean(0)).max() < 0.4  # in all directions
    assert np.array_equal(envs.physics[0, 1:], [*envs.model.qpos0, *np.zeros(envs.model.nv)])  # no noise
    assert (crl.ROBOTS["humanoid"].healthy_height, crl.ROBOTS["humanoid"].cell) == ((1.0, 2.0), 2.0)
    assert crl.ROBOTS["ant"].healthy_height == (0.2, 1.0)


@pytest.mark.parametrize("env_id, dimensions", [("point_room", 2), ("ant_u_maze", 2), ("humanoid", 3)])
def test_at_the_goal_is_within_half_a_metre_of_all_its_dimensions(env_id, dimensions):
    envs = MujocoEnvs(env_id, 1, 5, (1, 1))
    envs.reset(np.ones(1, bool))
    assert envs.goal.shape == (1, dimensions)
    for axis in range(dimensions):
        for away in (0.49, 0.51):
            envs.goal[0] = envs.state[0, :dimensions]
            envs.goal[0, axis] += away
            assert (envs.distance() < crl.GOAL_RADIUS) == (away < 0.5) and envs.distance()[0] == pytest.approx(away)


def test_evaluation_draws_nothing_and_picks_goals_by_its_number():
    agent, _, args = small_agent()
    envs = MujocoEnvs("point_u_maze", 16, 5, (1, 1))
    rng, goals = torch.get_rng_state(), []
    for number in (100, 200, 100):
        metrics = crl.evaluate(agent, envs, args, number, CPU, NoRun())
        goals.append(envs.goal.copy())
    assert np.array_equal(goals[0], goals[2]) and not np.array_equal(goals[0], goals[1])
    assert torch.equal(rng, torch.get_rng_state())
    record = looks.play(agent, envs, 100)
    assert np.array_equal(record["goal"], goals[0]) and record["time_at_goal"].mean() == metrics["eval/time_at_goal"]


def test_an_evaluation_ends_when_the_run_is_to_stop_or_an_action_is_not_finite():
    agent, _, args = small_agent()
    run = NoRun()
    run.stopped = 143
    assert crl.evaluate(agent, ScriptedEnvs([3]), args, 0, CPU, run) is None
    agent.actor.trunk.head.bias.data.fill_(float("nan"))
    assert crl.evaluate(agent, ScriptedEnvs([3]), args, 0, CPU, NoRun()) is None


def test_the_mean_of_the_last_five_evaluations():
    history = crl.History()
    means = [history.last_five(step, value, True) for step, value in enumerate([1, 2, 3, 4, 5, 6])]
    assert means == [1, 1.5, 2, 2.5, 3, 4]
    assert history.last_five(9, 16, False) == (3 + 4 + 5 + 6 + 16) / 5  # at the end of a run ...
    saved = crl.History()
    saved.load_state_dict(history.state_dict())
    assert saved.last_five(10, 7, True) == 5  # ... which is then continued
    assert saved.last_five(10, 7, True) == 5  # the same evaluation, played again


# --- replay -----------------------------------------------------------------------------------------------------------
def test_future_offset_by_hand_and_by_distribution():
    # gamma 0.5, 3 steps remain: probabilities 4/7, 2/7, 1/7
    uniform = torch.tensor([0.0, 0.57, 0.58, 0.85, 0.86, 0.999999], dtype=torch.float64)
    assert future_offset(torch.full((6,), 3), uniform, 0.5).tolist() == [1, 1, 2, 2, 3, 3]
    assert future_offset(torch.tensor([0, 1]), torch.tensor([0.3, 0.9], dtype=torch.float64), 0.99).tolist() == [0, 1]
    torch.manual_seed(0)
    n, draws = 40, 400_000
    offset = future_offset(torch.full((draws,), n), torch.rand(draws, dtype=torch.float64), 0.95)
    expected = 0.95 ** torch.arange(1, n + 1, dtype=torch.float64)
    expected /= expected.sum()
    counts = torch.bincount(offset, minlength=n + 1)
    assert counts[0] == 0 and len(counts) == n + 1
    deviation = (counts[1:] / draws - expected).abs() / (expected / draws).sqrt()
    assert deviation.max() < 4.5  # standard errors


@pytest.mark.parametrize("seed", range(4))
def test_replay_never_leaves_an_episode(seed):
    """Random episodes in a ring that wraps several times, against the full history kept in a list."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    capacity, num_envs, window = 23, 3, 7
    replay = Replay(capacity, num_envs, 3, 1, 1, torch.device("cpu"))
    episode = np.zeros(num_envs, int)
    ends = {}  # (env, episode) -> time of its last step so far
    for now in range(80):
        # A state knows when and where it was seen: (time, env, episode)
        state = torch.tensor([[now, i, episode[i]] for i in range(num_envs)], dtype=torch.float32)
        replay.add(state, state[:, :1] + 0.5, torch.from_numpy(episode))
        for i in range(num_envs):
            ends[i, episode[i]] = now
        episode = episode + (rng.random(num_envs) < 0.2)
        if replay.size >= window and now % 5 == 0:
            assert replay.size == min(now + 1, capacity)
            anchors = (window - 1) * num_envs
            time, env, goal_time = (x.flatten() for x in replay.sample(3, anchors // 3, window, 0.9))
            state, action, goal = replay.gather(time, env, goal_time)
            assert len({(int(t), int(e)) for t, e in zip(time, env, strict=True)}) == anchors  # no anchor twice
            windows = {}
            for i in range(num_envs):  # one window of consecutive steps per environment; its last step is no anchor
                steps = state[state[:, 1] == i][:, 0].sort().values
                windows[i] = int(steps[0]) + window - 1
                assert torch.equal(steps, torch.arange(steps[0], windows[i]))
            for s, a, g, g0 in zip(state, action, replay.state[goal_time, env], goal, strict=True):
                i, last = int(s[1]), ends[int(s[1]), int(s[2])]
                assert a[0] == s[0] + 0.5 and g0[0] == g[0]
                assert s[1] == g[1] and s[2] == g[2]  # same environment, same episode
                assert now - capacity < s[0] <= g[0] <= min(last, windows[i])
                assert (g[0] == s[0]) == (s[0] == last)  # only an episode's last step is its own goal


def test_replay_relabels_with_the_truncated_geometric_of_the_window():
    torch.manual_seed(0)
    replay = Replay(10, 1, 1, 1, 1, torch.device("cpu"))
    for t in range(10):
        replay.add(torch.tensor([[float(t)]]), torch.zeros(1, 1), torch.tensor([t // 5]))  # two episodes of 5 steps
    counts = np.zeros((10, 10))
    for _ in range(4000):
        time, _, goal_time = replay.sample(1, 9, 10, 0.5)
        np.add.at(counts, (time[0].numpy(), goal_time[0].numpy()), 1)
    for anchor in range(9):
        last = 4 if anchor < 5 else 9
        weights = [0.5 ** (j - anchor) if anchor < j <= last else 0 for j in range(10)]
        if anchor == last:
            weights[anchor] = 1
        expected = np.array(weights) / sum(weights)
        np.testing.assert_allclose(counts[anchor] / counts[anchor].sum(), expected, atol=0.04)


def test_batches_larger_than_one_window_take_more_windows():
    torch.manual_seed(0)
    replay = Replay(30, 2, 1, 1, 1, torch.device("cpu"))
    for t in range(30):
        replay.add(torch.full((2, 1), float(t)), torch.zeros(2, 1), torch.zeros(2))
    assert replay.sample(5, 4, 11, 0.9)[0].shape == (5, 4)  # 20 anchors: one window of 10 anchors per environment
    time, env, _ = replay.sample(5, 10, 11, 0.9)  # 50 anchors: three windows
    assert time.shape == env.shape == (5, 10)


def test_paper_counts():
    args = crl.parse_args(["--env-id", "ant_big_maze"])
    per_unroll = args.num_envs * args.unroll_length
    assert per_unroll == 31_744
    assert math.ceil(args.learning_starts / per_unroll) == 17  # unrolls of prefill
    assert args.total_timesteps // args.eval_every == 100
    anchors = (args.episode_length - 1) * args.num_envs
    assert (anchors // args.batch_size, args.gradient_steps) == (999, 800)
    assert (args.total_timesteps, args.width, args.learning_rate, args.gamma) == (100_000_000, 256, 3e-4, 0.99)
    assert args.eval_env_id == "ant_big_maze_eval" and args.eval_episodes == 128
    for env_id, millions in (
        ("ant_hardest_maze", 200), ("ant_u5_maze", 400), ("humanoid_u_maze", 400), ("humanoid_big_maze", 400),
        ("ant", 100), ("ant_u4_maze", 100),
    ):  # fmt: skip
        args = crl.parse_args(["--env-id", env_id])
        assert (args.total_timesteps, args.eval_every) == (millions * 10**6, millions * 10**4)


def test_depths_follow_depth_where_they_are_not_given():
    for flags, actor, critic in (
        ([], 4, 4), (["--depth", "8"], 8, 8), (["--depth", "8", "--actor-depth", "16"], 16, 8),
        (["--actor-depth", "4", "--critic-depth", "12"], 4, 12),
    ):  # fmt: skip
        args = crl.parse_args(["--env-id", "ant", *flags])
        assert (args.actor_depth, args.critic_depth, args.width) == (actor, critic, 256)
    assert crl.parse_args(["--env-id", "point_room"]).width == 64


# --- networks ---------------------------------------------------------------------------------------------------------
def test_depth_counts_the_dense_layers_inside_the_blocks():
    def count(network):
        return sum(isinstance(m, torch.nn.Linear) for m in network.modules())

    assert count(crl.ResidualMLP(5, 3, 8, 64)) == 66
    assert count(crl.GaussianActor(5, 2, 3, 8, 64)) == 67
    assert count(crl.ResidualMLP(5, 3, 8, 4)) == 6
    for depth in (0, 6, -4):
        with pytest.raises(ValueError, match="multiple of 4"):
            crl.ResidualMLP(5, 3, 8, depth)


def test_paper_sized_parameters():
    depth, width, layer = 64, 256, 256 * 256 + 3 * 256  # weights, bias, LayerNorm's gain and bias
    network = crl.ResidualMLP(37, 64, width, depth)
    expected = (37 * 256 + 3 * 256) + depth * layer + (256 * 64 + 64)
    assert sum(p.numel() for p in network.parameters()) == expected


def test_initialisation():
    network = crl.ResidualMLP(10, 4, 64, 8)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            bound = module.in_features**-0.5
            assert module.bias.abs().max() == 0
            assert 0.95 * bound < module.weight.abs().max() <= bound
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-6


def test_residual_mlp_is_the_papers_formula(monkeypatch):
    torch.manual_seed(0)
    network = crl.ResidualMLP(3, 2, 16, 8).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # all of it in float64

    def hidden(dense, norm, h):
        h = h @ dense.weight.T + dense.bias
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        h = h * norm.weight + norm.bias
        return h / (1 + (-h).exp())  # swish

    h = hidden(network.stem[0], network.stem[1], x)
    for block in network.blocks:
        y = h
        for k in range(4):
            y = hidden(block.layers[3 * k], block.layers[3 * k + 1], y)
        h = h + y
    torch.testing.assert_close(network(x), h @ network.head.weight.T + network.head.bias)


@pytest.mark.parametrize(
    "option", [dict(residual=False), dict(norm="none"), dict(norm="hypersphere"), dict(activation="relu")]
)
def test_network_switches(option):
    x = torch.randn(6, 3)
    torch.manual_seed(0)
    plain = crl.ResidualMLP(3, 2, 16, 4)
    torch.manual_seed(0)
    changed = crl.ResidualMLP(3, 2, 16, 4, **option)
    assert torch.equal(plain.head.weight, changed.head.weight)
    assert not torch.allclose(plain(x), changed(x))
    block, h = changed.blocks[0], torch.randn(6, 16)
    layers = block.layers(h)
    if option == dict(residual=False):
        assert torch.equal(block(h), layers)
    else:
        assert torch.equal(block(h), h + layers)
    if option == dict(activation="relu"):
        assert layers.min() == 0
    if option == dict(norm="hypersphere"):
        before_activation = changed.stem[1](changed.stem[0](x))
        torch.testing.assert_close(before_activation.norm(dim=1), torch.full((6,), 4.0))


def test_hypersphere_keeps_every_weight_row_at_norm_one():
    agent, optimizers, args = small_agent(norm="hypersphere")
    pointers = [p.data_ptr() for p in agent.parameters()]
    for _ in range(3):
        crl.update(agent, optimizers, args, random_batch())
    for module in agent.modules():
        if isinstance(module, torch.nn.Linear):
            torch.testing.assert_close(module.weight.norm(dim=1), torch.ones(module.out_features))
    assert pointers == [p.data_ptr() for p in agent.parameters()]  # in place


def test_actor_range_and_log_probability():
    agent, _, _ = small_agent()
    state, _, goal = random_batch(64)
    mean, log_std = agent.actor(100 * state, goal)
    assert (-5 <= log_std).all() and (log_std <= 2).all()
    agent.actor.log_std_head.weight.data.mul_(1e4)
    extreme = agent.actor(state, goal)[1]
    assert extreme.min() == -5 and extreme.max() == 2
    torch.manual_seed(3)
    action, log_prob = crl.sample_action(mean, log_std)
    torch.manual_seed(3)
    u = mean + log_std.exp() * torch.randn_like(mean)
    normal = torch.distributions.Normal(mean, log_std.exp())
    expected = (normal.log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)).sum(-1)
    torch.testing.assert_close(action, torch.tanh(u))
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)


def test_log_probability_is_exact_where_tanh_saturates(monkeypatch):
    """Value and gradient against float64; a formula through 1 - tanh(u)^2 loses both from |u| = 5 on."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    u = torch.linspace(-20, 20, 401)[:, None].requires_grad_()
    log_prob = crl.sample_action(u, torch.zeros_like(u))[1]
    log_prob.sum().backward()
    exact = u.detach().double()
    expected = -0.5 * math.log(2 * math.pi) + 2 * exact.cosh().log()  # 1 - tanh^2 = 1 / cosh^2
    torch.testing.assert_close(log_prob.double(), expected[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(u.grad.double(), 2 * exact.tanh(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["layer", "none", "hypersphere"])
def test_the_residual_stream_stays_in_float32_under_bfloat16(norm):
    torch.manual_seed(0)
    actor, encoder = crl.GaussianActor(3, 2, 2, 16, 64, norm=norm), crl.ResidualMLP(5, 3, 16, 64, norm=norm)
    inputs = []
    for module in [*encoder.blocks, encoder.head, *actor.trunk.blocks, actor.trunk.head, actor.log_std_head]:
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [*actor(torch.randn(4, 3), torch.randn(4, 2)), encoder(torch.randn(4, 5))]
        assert encoder.stem(torch.randn(4, 5)).dtype == torch.bfloat16  # the layers are in bfloat16
    for output in outputs:  # the heads are in float32
        assert output.dtype == torch.float32 and not torch.equal(output, output.bfloat16().float())
    assert inputs == [torch.float32] * (16 + 2 + 16 + 1)


# --- losses and the update --------------------------------------------------------------------------------------------
def reference_loss(phi, psi, coef, direction):
    """Written out pair by pair, in float64."""
    n = len(phi)
    f = [[-math.dist(phi[i].tolist(), psi[j].tolist()) for j in range(n)] for i in range(n)]
    row = [math.log(sum(math.exp(f[i][j]) for j in range(n))) for i in range(n)]
    column = [math.log(sum(math.exp(f[i][j]) for i in range(n))) for j in range(n)]
    forward = sum(row[i] - f[i][i] for i in range(n)) / n
    backward = sum(column[i] - f[i][i] for i in range(n)) / n
    nce = {"forward": forward, "backward": backward, "symmetric": forward + backward}[direction]
    return nce + coef * sum((r + 1e-6) ** 2 for r in row) / n


@pytest.mark.parametrize("direction", ["forward", "backward", "symmetric"])
def test_contrastive_loss(direction):
    torch.manual_seed(0)
    phi, psi = torch.randn(7, 5), torch.randn(7, 5)
    loss, metrics = contrastive_loss(phi, psi, 0.1, direction)
    assert loss.item() == pytest.approx(reference_loss(phi.double(), psi.double(), 0.1, direction), rel=1e-5)
    distance = (phi[:, None] - psi[None]).norm(dim=-1)
    off_diagonal = distance[~torch.eye(7, dtype=torch.bool)]
    assert metrics["contrastive/logits_pos"].item() == pytest.approx(-distance.diagonal().mean().item(), rel=1e-5)
    assert metrics["contrastive/logits_neg"].item() == pytest.approx(-off_diagonal.mean().item(), rel=1e-5)
    hits = (distance.argmin(1) == torch.arange(7)).float().mean()
    assert metrics["contrastive/categorical_accuracy"].item() == pytest.approx(hits.item())


def test_contrastive_loss_by_hand():
    phi, psi = torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0], [1.0]])  # distances 0 1 / 3 2
    row = [math.log(1 + math.exp(-1)), math.log(math.exp(-3) + math.exp(-2))]
    expected = ((row[0] - 0) + (row[1] + 2)) / 2 + 0.1 * (row[0] ** 2 + row[1] ** 2) / 2
    assert contrastive_loss(phi, psi, 0.1)[0].item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_loss_survives_equal_embeddings_and_is_exact_near_zero():
    phi = (10 + torch.randn(6, 4)).requires_grad_()
    psi = phi.detach().clone().requires_grad_()
    loss, _ = contrastive_loss(phi, psi, 0.1)
    loss.backward()
    assert torch.isfinite(phi.grad).all() and torch.isfinite(psi.grad).all()
    near = phi.detach() + 1e-4
    _, metrics = contrastive_loss(phi.detach(), near, 0.1)
    exact = -(phi.detach().double() - near.double()).norm(dim=1).mean()
    assert metrics["contrastive/logits_pos"].item() == pytest.approx(exact.item(), rel=1e-3)


def plain_loss(phi, psi, coef, direction):
    """The loss from all differences, in float64."""
    energy = -torch.cdist(phi.double(), psi.double(), compute_mode="donot_use_mm_for_euclid_dist")
    row, column, positive = energy.logsumexp(1), energy.logsumexp(0), energy.diagonal()
    nce = {"forward": row - positive, "backward": column - positive, "symmetric": row + column - 2 * positive}
    return nce[direction].mean() + coef * (row + 1e-6).square().mean()


def loss_errors(phi, psi, direction):
    """Relative errors of the loss and of its two gradients, against float64."""
    results = []
    for function in (contrastive_loss, plain_loss):
        leaves = [x.detach().clone().requires_grad_() for x in (phi, psi)]
        loss = function(*leaves, 0.1, direction)
        loss = loss[0] if isinstance(loss, tuple) else loss
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("direction", ["forward", "backward", "symmetric"])
@pytest.mark.parametrize("case", ["random", "far from the origin", "near positives", "equal positives"])
def test_float32_loss_and_gradients_are_float64s(case, direction):
    torch.manual_seed(0)
    phi, psi = 0.3 * torch.randn(2, 256, 64)
    if case == "far from the origin":
        phi, psi = phi + 30, psi + 30
    if case == "near positives":
        phi = psi + 1e-4 * phi
    if case == "equal positives":
        phi[::2] = psi[::2]
    assert max(loss_errors(phi, psi, direction)) < 1e-6


@pytest.mark.parametrize("direction", ["forward", "backward", "symmetric"])
def test_what_float32_loses_between_negatives_that_nearly_coincide(direction):
    """Every goal twice, 0.001 of its length apart: a pair's distance to its twin's goal is a difference of products."""
    torch.manual_seed(0)
    phi, psi = 0.3 * torch.randn(2, 256, 64)
    psi[1::2] = psi[::2] + 1e-3 * psi[1::2]
    phi = psi + 0.1 * phi
    loss, *gradients = loss_errors(phi, psi, direction)
    assert loss < 1e-6 and max(gradients) < 1e-4


def test_each_gradient_of_the_loss_alone():
    torch.manual_seed(0)
    phi, psi = torch.randn(2, 16, 8)
    both = torch.autograd.grad(contrastive_loss(phi.requires_grad_(), psi.requires_grad_(), 0.1)[0], [phi, psi])
    for i, leaf in enumerate((phi, psi)):
        inputs = [x if x is leaf else x.detach() for x in (phi, psi)]
        (alone,) = torch.autograd.grad(contrastive_loss(*inputs, 0.1)[0], leaf)
        assert torch.equal(alone, both[i])


@pytest.mark.parametrize("direction", ["forward", "backward", "symmetric"])
def test_the_loss_never_looks_at_a_value(direction):
    """Tensors without values: an .item() or a branch on one would fail, and so would a CUDA graph's capture."""
    phi, psi = (torch.randn(8, 4, device="meta", requires_grad=True) for _ in range(2))
    contrastive_loss(phi, psi, 0.1, direction)[0].backward()
    assert phi.grad.shape == psi.grad.shape == (8, 4)


def test_update_takes_exactly_the_three_gradients():
    """After an update every .grad is its own loss's gradient at the old weights: the actor's loss gives the encoders
    none, the critic gives the actor none, and the actor used the temperature from before."""
    agent, optimizers, args = small_agent()
    with torch.no_grad():
        agent.log_alpha.fill_(0.7)
    old, batch = copy.deepcopy(agent), random_batch()
    state, action, goal = batch
    torch.manual_seed(11)
    metrics = crl.update(agent, optimizers, args, batch)

    torch.manual_seed(11)
    new_action, log_prob = crl.sample_action(*old.actor(state, goal))
    energy = -(old.phi(state, new_action) - old.psi(goal)).norm(dim=1)
    actor_loss = (math.exp(0.7) * log_prob - energy).mean()
    critic_loss, _ = contrastive_loss(old.phi(state, action), old.psi(goal), 0.1)
    alpha_loss = old.log_alpha.exp() * (-log_prob.detach() + 0.5 * 2).mean()
    encoders = [*old.state_action_encoder.parameters(), *old.goal_encoder.parameters()]
    new_encoders = [*agent.state_action_encoder.parameters(), *agent.goal_encoder.parameters()]
    for loss, parameters, updated in (
        (actor_loss, list(old.actor.parameters()), list(agent.actor.parameters())),
        (critic_loss, encoders, new_encoders),
        (alpha_loss, [old.log_alpha], [agent.log_alpha]),
    ):
        for gradient, new in zip(torch.autograd.grad(loss, parameters, retain_graph=True), updated, strict=True):
            torch.testing.assert_close(new.grad, gradient, rtol=1e-4, atol=1e-6)
    assert metrics["losses/actor"].item() == pytest.approx(actor_loss.item(), rel=1e-5)
    assert metrics["losses/critic"].item() == pytest.approx(critic_loss.item(), rel=1e-5)
    assert metrics["losses/alpha"].item() == pytest.approx(alpha_loss.item(), rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())
    assert all(not torch.equal(a, b) for a, b in zip(agent.parameters(), old.parameters(), strict=True) if a.dim() > 1)
    assert all(p.requires_grad for p in agent.parameters())


def test_no_gradient_is_computed_to_be_thrown_away():
    """Every weight's gradient is computed once per update: phi's not for the actor's loss, psi's not twice."""
    agent, optimizers, args = small_agent()
    computed = {}
    for name, parameter in agent.named_parameters():
        parameter.register_hook(lambda gradient, name=name: computed.update({name: computed.get(name, 0) + 1}))
    crl.update(agent, optimizers, args, random_batch())
    assert computed == {name: 1 for name, _ in agent.named_parameters()}


@pytest.mark.parametrize("entropy_coef, falls", [(50.0, True), (-50.0, False)])
def test_temperature_falls_while_entropy_is_above_its_target(entropy_coef, falls):
    agent, optimizers, args = small_agent(entropy_coef=entropy_coef)
    crl.update(agent, optimizers, args, random_batch())
    assert (agent.log_alpha.item() < 0) == falls


def test_learning_separates_pairs():
    agent, optimizers, args = small_agent()
    batch = random_batch(8)
    first = crl.update(agent, optimizers, args, batch)
    for _ in range(150):
        last = crl.update(agent, optimizers, args, batch)
    assert last["losses/critic"] < 0.5 * first["losses/critic"] and last["contrastive/categorical_accuracy"] == 1


def test_bfloat16_is_close_to_float32_and_sees_fresh_weights():
    """bfloat16 networks, and no weight cast before an optimizer step is used after it."""
    metrics = {}
    for precision in ("float32", "bfloat16"):
        agent, optimizers, args = small_agent(precision=precision, actor_depth=8, critic_depth=8, learning_rate=1e-2)
        for seed in range(20):
            torch.manual_seed(seed)
            metrics[precision] = crl.update(agent, optimizers, args, random_batch(8, seed % 3))
        assert all(p.dtype == torch.float32 for p in agent.parameters())
    plain, fast = (metrics[precision]["losses/critic"].item() for precision in ("float32", "bfloat16"))
    assert plain != fast and plain == pytest.approx(fast, abs=0.5)


def test_compile_equals_eager():
    metrics = {}
    for compile in (False, True):
        agent, optimizers, args = small_agent()
        if compile:
            crl.compile_modules(*[m for m in agent.modules() if isinstance(m, crl.ResidualBlock)])
        for seed in range(3):
            torch.manual_seed(seed)
            metrics[compile] = crl.update(agent, optimizers, args, random_batch())
    for name, value in metrics[False].items():
        torch.testing.assert_close(metrics[True][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cudagraphs_equal_eager_and_draw_anew():
    device = torch.device("cuda")
    results = {}
    for captured in (False, True):
        torch.manual_seed(0)
        args = small_args(cudagraphs=captured)
        agent = crl.Agent(4, 2, 2, args).to(device)
        optimizers = crl.adam_optimizers(agent, args, device)
        learn = partial(crl.update, agent, optimizers, args)
        if captured:
            learn = crl.capture(learn, optimizers)
        batch, pointers = [x.to(device) for x in random_batch()], [p.data_ptr() for p in agent.parameters()]
        entropies = [learn(batch)["losses/entropy"].item() for _ in range(8)]
        assert len(set(entropies)) == 8  # every replay draws its own noise
        results[captured] = [p.detach().clone() for p in agent.parameters()]
        assert pointers == [p.data_ptr() for p in agent.parameters()]
    for eager, graph in zip(results[False], results[True], strict=True):
        torch.testing.assert_close(eager, graph, rtol=1e-3, atol=1e-4)


# --- what to look at --------------------------------------------------------------------------------------------------
def test_residual_norms_and_value_map_and_embeddings():
    agent, _, _ = small_agent(actor_depth=8, critic_depth=12)
    batch = random_batch()
    norms = looks.residual_norms(agent, batch)
    assert [len(norms[name]) for name in ("actor", "goal_encoder", "state_action_encoder")] == [2, 3, 3]
    state, action, goal = batch
    for name, network, inputs in (("actor", agent.actor.trunk, [state, goal]), ("goal_encoder", None, [goal]),
                                  ("state_action_encoder", None, [state, action])):  # fmt: skip
        network = network or getattr(agent, name)
        hidden = network.stem(torch.cat(inputs, 1))
        for block, norm in zip(network.blocks, norms[name], strict=True):
            after = block(hidden)
            assert norm == pytest.approx((after - hidden).norm(dim=1).mean().item(), rel=1e-4)
            hidden = after

    envs = MujocoEnvs("point_u_maze", 8, 6, (1, 1))
    record = looks.play(agent, envs, 0)
    assert record["state"].shape == (6, 8, 4) and record["action"].shape == (6, 8, 2)
    result = looks.value_map(agent, envs, record, points_per_cell=4)
    assert result["values"].shape == (len(result["goals"]), 17, 17) and result["walls"].sum() == 18
    state = torch.from_numpy(record["state"][0, :1].copy())
    state[0, :2] = torch.tensor([result["x"][3], result["y"][5]])
    goal = torch.from_numpy(result["goals"][:1])
    action = torch.tanh(agent.actor(state, goal)[0])
    value = -(agent.phi(state, action) - agent.psi(goal)).norm()
    assert result["values"][0, 3, 5] == pytest.approx(value.item(), rel=1e-4)

    record["time_at_goal"] = np.array([0, 0, 0, 5, 0, 0, 0, 0])
    saved = looks.embeddings(agent, record)
    state, action = torch.from_numpy(record["state"][:, 3]), torch.from_numpy(record["action"][:, 3])
    np.testing.assert_allclose(saved["phi"], agent.phi(state, action).detach(), rtol=1e-4, atol=1e-5)
    assert saved["phi"].shape == (6, 64) and saved["distance"].shape == (6,)


def test_a_batch_as_in_training_comes_from_the_agents_own_episodes():
    agent, _, args = small_agent(env_id="point_u_maze", episode_length=12, batch_size=16)
    state, action, goal = looks.training_batch(agent, args)
    assert state.shape == (16, 4) and action.shape == (16, 2) and goal.shape == (16, 2)
    assert len(state.unique(dim=0)) == 16 and (state[:, :2] - goal).norm(dim=1).max() < 12 * 0.05 * 5


# --- functions that people copy ---------------------------------------------------------------------------------------
def test_the_loss_and_the_network_in_a_foreign_agent():
    """Plain layers, tensors and numbers: no argument of these is this script's."""
    torch.manual_seed(0)
    left, right = torch.nn.Linear(5, 8), crl.ResidualMLP(3, 8, 16, 8)
    optimizer = torch.optim.SGD([*left.parameters(), *right.parameters()], lr=0.1)
    x, y = torch.randn(32, 5), torch.randn(32, 3)
    losses = []
    for _ in range(100):
        loss, _ = contrastive_loss(left(x), right(y), 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
