"""studies/drm_adroit.py: the environment in a process of its own, fused networks, the replay's joints, whole runs."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import gymnasium
import helpers
import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import DRM, assert_same, checkpoint, killed_run, scalars
from test_drm import make_batch

import adaptive_rr
import drm
import drm_adroit as adroit

LOOK = """
import json
import numpy as np
import drm_adroit as adroit

looks, kept = {}, []  # a renderer that is freed would spoil the next one's pictures
for name in ("pen", "door", "hammer"):
    env = adroit.make_env(name, 32)
    kept.append(env)
    first, info = env.reset(seed=3)
    again, other = env.reset(seed=3)[0], env.reset(seed=4)[0]
    look = looks[name] = dict(
        same=bool((first == again).all()), other=bool((first != other).any()), shape=list(first.shape),
        joints=info["joints"].tolist(), dtype=str(info["joints"].dtype), success=info["success"],
        action=env.action_space.shape[0])
    hand = env.unwrapped
    names = [hand.model.joint(i).name.rpartition("/")[2] for i in range(hand.model.nq)]  # each has one coordinate
    camera = hand.model.camera("vil_camera")
    look |= dict(hinges=names[adroit.TASKS[name].joints], camera=[camera.pos.tolist(), camera.quat.tolist()])
    env.reset(seed=3)
    upright = np.ascontiguousarray(hand.mujoco_renderer.render("rgb_array")[::-1].transpose(2, 0, 1))
    look["upright"] = bool((upright == first).all()) and bool((upright[:, ::-1] != first).any())
    look["opaque"] = name != "pen" or [float(hand.model.geom(part).rgba[3]) for part in ("pen", "target")] == [1, 1]
    env = env.env.env  # without pictures from here on
    env.reset(seed=5)
    hand, official, ours = env.unwrapped, [], []
    for _ in range(10):
        action = env.action_space.sample()
        rewards = []
        step = type(hand).step

        def watched(a, step=step):
            result = step(hand, a)
            data = hand.data
            if name == "pen":
                place = data.xpos[hand.obj_body_id].ravel()
                wanted = data.site_xpos[hand.eps_ball_site_id].ravel()
                along = (data.site_xpos[hand.obj_t_site_id] - data.site_xpos[hand.obj_b_site_id]) / hand.pen_length
                aim = (data.site_xpos[hand.tar_t_site_id] - data.site_xpos[hand.tar_b_site_id]) / hand.tar_length
                d, c = np.linalg.norm(place - wanted), along @ aim
                r = -d + c + 10 * (d < 0.075 and c > 0.9) + 50 * (d < 0.075 and c > 0.95) - 5 * (place[2] < 0.075)
                rewards.append(r / 50)
            elif name == "door":
                palm, handle = data.site_xpos[hand.grasp_site_id], data.site_xpos[hand.handle_site_id]
                h = float(data.qpos[hand.door_hinge_addrs])
                r = -0.1 * np.linalg.norm(palm - handle) - 0.1 * (h - 1.57) ** 2 - 1e-5 * np.sum(data.qvel**2)
                rewards.append((r + 2 * (h > 0.2) + 8 * (h > 1.0) + 10 * (h > 1.35)) / 20)
            else:
                palm, hammer = data.site_xpos[hand.S_grasp_site_id], data.xpos[hand.obj_body_id]
                head, nail = data.site_xpos[hand.tool_site_id], data.site_xpos[hand.target_obj_site_id]
                d = np.linalg.norm(nail - data.site_xpos[hand.goal_site_id])
                r = -0.1 * np.linalg.norm(palm - hammer) - np.linalg.norm(head - nail) - 10 * d
                r += -1e-2 * np.linalg.norm(data.qvel) + 2 * (hammer[2] > 0.04 and head[2] > 0.04)
                rewards.append((r + 25 * (d < 0.02) + 75 * (d < 0.01)) / 100)
            return result

        hand.step = watched
        ours.append(float(env.step(action)[1]))
        official.append(float(sum(rewards)))
    del hand.step
    look["rewards"] = [ours, official]
    env.reset(seed=5)
    length, ended = 0, [False, False]
    while not any(ended):
        *_, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
        length, ended = length + 1, [bool(terminated), bool(truncated)]
    look["length"], look["ended"] = length, ended

# A pen that falls ends the episode; a goal that is true for long enough is a success
env = adroit.make_env("pen", 16).env.env
env.reset(seed=5)
env.unwrapped.data.qpos[-6] += 0.2  # the pen's slides are turned by a quarter: this one goes down
looks["dropped"] = [bool(x) for x in env.step(np.zeros(24, np.float32))[2:4]]
env = adroit.make_env("door", 16).env.env
for hinge in (1.5, 1.38):  # the package's goal is 1.35, the official one 1.4
    env.reset(seed=5)
    hand, looks[f"held {hinge}"] = env.unwrapped, []
    for _ in range(16):
        hand.data.qpos[hand.door_hinge_addrs] = hinge
        hand.data.qvel[:] = 0
        looks[f"held {hinge}"].append(float(env.step(np.zeros(28, np.float32))[4]["success"]))
for name, nail in (("hammer", 0.05), ("hammer", 0.09), ("pen", 0)):
    env = adroit.make_env(name, 16).env.env
    env.reset(seed=5)
    hand, held = env.unwrapped, []
    looks[f"held {name} {nail}"], place = held, hand.data.qpos.copy()
    if name == "pen":  # turned as its goal, but far away from it: more than 20 steps of the simulator
        goal = hand.model.body("target").id
        hand.model.body_quat[goal], hand.model.body_pos[goal] = hand.data.xquat[hand.obj_body_id], [-0.5, 0, 0.8]
    else:
        place[hand.model.joint("nail_dir").qposadr[0]] = nail
    for _ in range(14):
        hand.data.qpos[:], hand.data.qvel[:] = place, 0
        held.append(float(env.step(np.zeros(env.action_space.shape, np.float32))[4]["success"]))
print(json.dumps(looks))
"""


def test_the_environment_is_the_official_one():
    """Seen in a process of its own: dm_control renders in this one."""
    pytest.importorskip("gymnasium_robotics")
    root = Path(adroit.__file__).parent.parent
    environment = os.environ | dict(PYTHONPATH=f"{root / 'studies'}:{root}")
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    looks = json.loads(done.stdout.splitlines()[-1])
    for name, actions, length in (("pen", 24, None), ("door", 28, 100), ("hammer", 26, 100)):
        look = looks[name]
        assert look["same"] and look["other"] and look["shape"] == [3, 32, 32] and look["action"] == actions
        assert len(look["joints"]) == 24 and look["dtype"] == "float32" and look["success"] == 0
        assert np.allclose(*look["rewards"], atol=1e-9), name
        if length:
            assert look["length"] == length and look["ended"] == [False, True]
    pen = looks["pen"]
    assert pen["ended"] == [True, False] and pen["length"] < 50 or pen["ended"] == [False, True] and pen["length"] == 50
    assert looks["dropped"] == [True, False]
    assert looks["held 1.5"] == [0.0] * 12 + [1.0] * 4  # more than 25 steps of the simulator, two a step
    assert looks["held 1.38"] == [0.0] * 16 and looks["held hammer 0.05"] == [0.0] * 14
    assert looks["held hammer 0.09"] == [0.0] * 12 + [1.0] * 2 and looks["held pen 0"] == [0.0] * 10 + [1.0] * 4
    for name, place in (("pen", [0, -0.8, 0.8]), ("door", [0, 0, 1.5]), ("hammer", [0, 0, 1.1])):
        hinges, camera = looks[name]["hinges"], looks[name]["camera"]
        assert len(hinges) == 24 and hinges[0] == "WRJ1" and hinges[-1] == "THJ0" and camera[0] == place
        assert (camera[1] == pytest.approx([np.cos(1.57), 0, 0, np.sin(1.57)])) == (name != "pen")
        assert looks[name]["upright"] and looks[name]["opaque"]


def test_a_run_on_a_real_task():
    pytest.importorskip("gymnasium_robotics")
    flags = (
        "--image-size 24 --hidden-dim 16 --feature-dim 8 --batch-size 8 --learning-starts 10 --exploration-steps 10 "
    )
    flags += "--total-timesteps 40 --eval-every 40 --eval-episodes 1"
    done = subprocess.run([sys.executable, adroit.__file__, *flags.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run_dir,) = Path("runs").iterdir()
    logged = scalars(run_dir)
    assert {"eval/success_rate", "drm/dormant_ratio", "losses/value"} <= logged.keys()
    assert checkpoint(run_dir)["gradient_steps"] == 15 and "replay" not in checkpoint(run_dir)


# --- the networks -----------------------------------------------------------------------------------------------------
def tiny_agent(*flags):
    args = adroit.parse_args([*TINY, *map(str, flags)])
    torch.manual_seed(0)
    return adroit.HandAgent(2, args), args


def test_units_of_the_paper():
    agent = adroit.HandAgent(24, adroit.parse_args([]))
    features, _ = agent.encoder((torch.zeros(1, 3, 84, 84, dtype=torch.uint8), torch.zeros(1, 24)))
    outputs = adroit.hand_outputs(agent.actor, features)
    assert [x.shape[1] for x in outputs] == [50, 1024, 50, 1024, 50, 1024, 1024, 24] and features.shape[
        1
    ] == 39_200 + 24


def test_fused_trunk_by_hand():
    agent, _ = tiny_agent()
    frames, joints = torch.randint(256, (5, 3, 24, 24), dtype=torch.uint8), torch.randn(5, 24)
    features, _ = agent.encoder((frames, joints))
    assert torch.equal(features[:, -24:], joints)
    for network in (agent.actor, agent.critic, agent.critic_target, agent.value):
        trunk = network.trunk
        image = torch.tanh(trunk.image_trunk[1](trunk.image_trunk[0](features[:, :-24])))
        felt = trunk.joint_mlp[2](torch.relu(trunk.joint_mlp[0](joints)))
        expected = trunk.fusion[2](torch.relu(trunk.fusion[0](image + felt)))
        assert torch.allclose(trunk(features), expected, atol=1e-6)
        if network is agent.actor:
            outputs = adroit.hand_outputs(network, features)
            hidden, fused = torch.relu(trunk.joint_mlp[0](joints)), torch.relu(trunk.fusion[0](image + felt))
            linear = trunk.image_trunk[0](features[:, :-24])
            for output, by_hand in zip(outputs[:5], (linear, hidden, felt, fused, expected), strict=True):
                torch.testing.assert_close(output, by_hand)
            assert all(output.min() >= 0 for output in outputs[5:7]) and outputs[7].min() < 0
    assert_same(dict(agent.critic.state_dict()), dict(agent.critic_target.state_dict()))
    mean, _ = agent.actor(features)
    assert torch.equal(torch.tanh(adroit.hand_outputs(agent.actor, features)[-1]), mean)
    linear = [m for m in agent.actor.trunk.modules() if isinstance(m, torch.nn.Linear)]
    assert all(torch.equal(m.bias, torch.zeros_like(m.bias)) for m in linear) and len(linear) == 5


def test_every_weight_that_learns_gets_a_gradient_and_perturbation_reaches_all_linear_layers():
    agent, args = tiny_agent()
    optimizers = adroit.make_drm_optimizers(agent, args, torch.device("cpu"))
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    frames, joints = torch.randint(256, (2, 6, 3, 24, 24), dtype=torch.uint8), torch.randn(2, 6, 24)
    batch = [frames[0], joints[0], torch.rand(6, 2), torch.rand(6), torch.full((6,), 0.9), frames[1], joints[1],
             torch.tensor(100.0)]  # fmt: skip
    adroit.update(agent, optimizers, args, batch)
    after = {name: value.clone() for name, value in agent.state_dict().items()}
    assert {name for name in before if torch.equal(before[name], after[name])} <= {"awaken_step"}
    agent.dormant_ratio.fill_(0.3)
    adroit.perturb_agent(agent, optimizers, args, torch.Generator().manual_seed(0))
    linear = {f"{name}.{part}" for name, m in agent.named_modules() if isinstance(m, torch.nn.Linear)
              for part in ("weight", "bias")}  # fmt: skip
    assert len(linear) == 4 * 2 * 5 + 2 * (3 + 6 + 6 + 3)  # trunks, and heads: actor, two of each critic, value
    for name, value in agent.state_dict().items():
        if name in linear and name.endswith("bias"):
            assert torch.allclose(value, 0.4 * after[name])  # alpha = 1 - 2 * 0.3
        elif name != "dormant_ratio":
            assert torch.equal(value, after[name]) == (name not in linear), name


def test_joints_stay_with_their_frames():
    """The ring has been wrapped around; a frame and its joint angles carry the same number."""
    replay = adroit.JointReplay(30, 2, torch.device("cpu"), 3, 0.99, (3, 2, 2))
    number = 0
    for episode in range(6):
        for step in range(9 + episode):
            frame, joints = np.full((3, 2, 2), number, np.uint8), np.full(24, number, np.float32)
            if step:
                replay.add(np.zeros(2, np.float32), 1.0, False, frame, joints)
            else:
                replay.add_first(frame, joints)
            number += 1
    (frames, joints), _, _, _, (next_frames, next_joints) = replay.sample(200, torch.Generator().manual_seed(0))
    assert frames.shape == (200, 3, 2, 2) and joints.shape == (200, 24)
    assert torch.equal(frames[:, 0, 0, 0].float(), joints[:, 0]) and torch.equal(
        next_joints - joints, torch.full((200, 24), 3.0)
    )
    assert torch.equal(next_frames[:, 0, 0, 0].float(), next_joints[:, 0])
    newest = replay.newest()
    assert float(newest[1][0, 0]) == number - 1
    other = adroit.JointReplay(30, 2, torch.device("cpu"), 3, 0.99, (3, 2, 2))
    other.load_state_dict(replay.state_dict())
    assert torch.equal(other.joints, replay.joints) and replay.state_dict()["joints"].shape == (30, 24)


# --- runs on a small environment --------------------------------------------------------------------------------------
class FeelingDot(gymnasium.Wrapper):
    """The dot's place as the first two joint angles; success once it has been near the middle."""

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        return obs, info | self.extras(0.0)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, info | self.extras(float(reward > 1.7))

    def extras(self, success):
        joints = np.zeros(24, np.float32)
        joints[:2] = self.unwrapped.place
        joints[2] = self.unwrapped.time / 2
        return dict(joints=joints, success=success)


DOT = "pixel_env:Dot-v0"


def feeling_dot(env_id, image_size):
    return FeelingDot(adaptive_rr.make_env(DOT, image_size))


class SerialHands(helpers.SerialEnvironments):
    def __init__(self, args, num_envs, run):
        make = [lambda: feeling_dot(args.env_id, args.image_size)] * num_envs
        self.envs, self.num_envs = gymnasium.vector.SyncVectorEnv(make), num_envs


TINY = DRM[2:]


@pytest.fixture
def dots(monkeypatch):
    monkeypatch.setattr(adroit, "find_spec", lambda name: True)
    monkeypatch.setattr(adroit, "make_env", feeling_dot)
    monkeypatch.setattr(adroit, "Environments", SerialHands)


def test_killed_and_resumed_is_bit_identical(dots):
    flags = [*TINY, "--checkpoint-every", 20]
    whole, part = helpers.run(adroit, *flags), killed_run(adroit, 70, *flags)
    helpers.run(adroit, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert scalars(whole) == scalars(part) and "eval/success_rate" in scalars(whole)


@pytest.mark.parametrize("flag", [["--precision", "bfloat16"], ["--compile"]], ids=str)
def test_speed_flags_change_digits_but_not_results(flag, dots, quick_compiler):
    plain, fast = (scalars(helpers.run(adroit, *TINY, *more)) for more in ([], flag))
    first = min(plain["losses/critic"])
    for tag in ("losses/critic", "losses/value", "drm/dormant_ratio"):
        assert fast[tag][first] == pytest.approx(plain[tag][first], rel=0.05, abs=0.05)


def test_the_joints_matter(dots, monkeypatch):
    """The same run without what the hand feels learns something else."""
    felt = checkpoint(helpers.run(adroit, *TINY))["agent"]
    monkeypatch.setattr(
        FeelingDot, "extras", lambda self, success: dict(joints=np.zeros(24, np.float32), success=success)
    )
    numb = checkpoint(helpers.run(adroit, *TINY))["agent"]
    assert not torch.equal(felt["actor.trunk.joint_mlp.0.weight"], numb["actor.trunk.joint_mlp.0.weight"])


def test_joints_are_stored_with_their_frame(dots):
    _, replay = helpers.run_and_replay(adroit, *TINY)
    assert torch.equal(replay["joints"][:, 2], replay["record"][:, 0])  # the time in the episode


class Feeling(nn.Module):
    """drm.py's encoder; what adroit gets as joint angles, drm reads from the first pixels."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, obs):
        frames, felt = obs if isinstance(obs, tuple) else (obs, obs[:, 0, 0] / 255)
        features, active = self.encoder(frames)
        return torch.cat([features[:, 24:], felt], 1), active


@pytest.mark.parametrize(
    "changes", [{}, dict(lambda_type="constant"), dict(target_lambda=0.0), dict(dormant_tau=0.4)], ids=str
)
def test_the_update_is_that_of_drm(changes, monkeypatch):
    monkeypatch.setattr(adroit, "hand_outputs", drm.actor_outputs)
    sides = []
    for _ in range(2):
        args = drm.Args(**dict(image_size=24, hidden_dim=16, feature_dim=8, learning_rate=1e-3) | changes)
        torch.manual_seed(0)
        agent = drm.DrMAgent(2, args)
        agent.encoder = Feeling(agent.encoder)
        sides.append((agent, drm.make_drm_optimizers(agent, args, torch.device("cpu")), args))
    for i in range(5):
        obs, *rest, next_obs, step = make_batch(1998 + 2 * i, seed=i, size=16)
        torch.manual_seed(i)
        felt, next_felt = obs[:, 0, 0] / 255, next_obs[:, 0, 0] / 255
        ours = adroit.update(*sides[0], [obs, felt, *rest, next_obs, next_felt, step])
        torch.manual_seed(i)
        theirs = drm.update(*sides[1], [obs, *rest, next_obs, step])
        assert all(torch.equal(ours[tag], theirs[tag]) for tag in theirs)
    assert_same(dict(sides[0][0].state_dict()), dict(sides[1][0].state_dict()))


@pytest.mark.parametrize("env_id", ["pixel_env:Dot-v0", "pixel_env:EndingDot-v0"])
def test_a_run_is_drms_where_nothing_is_felt(env_id, dots, monkeypatch):
    class Blind(drm.Encoder):
        def forward(self, obs):
            return super().forward(obs if torch.is_tensor(obs) else obs[0])

    monkeypatch.setattr(sys.modules[__name__], "DOT", env_id)
    monkeypatch.setattr(drm, "Encoder", partial(Blind, channels=3))
    monkeypatch.setattr(drm, "PixelReplay", partial(drm.PixelReplay, stack=1))
    monkeypatch.setattr(drm, "Environments", helpers.SerialEnvironments)
    monkeypatch.setattr(adroit, "HandAgent", drm.DrMAgent)
    monkeypatch.setattr(adroit, "hand_outputs", drm.actor_outputs)
    for script in (drm, adroit):
        monkeypatch.setattr(script, "evaluate", lambda *_: {"eval/episodic_return": 0.0})
    ours, theirs = helpers.run(adroit, *TINY), helpers.run(drm, *DRM, "--expectile", 0.7, "--env-id", env_id)
    assert_same(checkpoint(theirs)["agent"], checkpoint(ours)["agent"])
    assert scalars(ours) == scalars(theirs)


def test_settings():
    args = adroit.parse_args([])
    assert (args.total_timesteps, args.expectile, args.max_perturb_factor, args.n_step) == (3_050_000, 0.7, 0.9, 3)


@pytest.mark.parametrize("flags, message", [
    ([], "--env-id pen: needs Gymnasium-Robotics: bash install.sh adroit"),
    (["--n-step", "51"], "--n-step 51: must be at most 50, an episode of --env-id pen"),
])  # fmt: skip
def test_bad_input(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(adroit, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        helpers.run(adroit, *TINY, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1 and message in printed
