"""studies/drm_metaworld.py: the environment in a process of its own, drm.py's algorithm bit for bit, both settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn as nn
from helpers import DRM, SerialEnvironments, assert_same, checkpoint, killed_run, scalars

import adaptive_rr
import drm
import drm_metaworld as mw

LOOK = """
import json, sys
import numpy as np
import metaworld, mujoco
from metaworld.policies import ENV_POLICY_MAP
import drm_metaworld as mw

looks = {}
original = metaworld.sawyer_xyz_env.SawyerMocapBase.reset_mocap_welds
try:
    metaworld.ALL_V3_ENVIRONMENTS["coffee-push-v3"](render_mode="rgb_array")
    looks["upstream"] = "works"
except ValueError as error:
    looks["upstream"] = str(error)

env = mw.make_env("coffee-push", 48, 6, False)
assert metaworld.sawyer_xyz_env.SawyerMocapBase.reset_mocap_welds is not original
first, info = env.reset(seed=3)
again, other, next_one = env.reset(seed=3)[0], env.reset(seed=4)[0], env.reset()[0]
looks["same seed"] = bool((first == again).all())
looks["others differ"] = [bool((first != other).any()), bool((other != next_one).any())]
looks["info"] = info["success"]
looks["shape"], looks["actions"] = list(first.shape), list(env.action_space.shape)
action = env.action_space.sample()
looks["ends"] = [env.step(action)[2:4] for _ in range(6)]

env.reset(seed=3)
frame, reward, *_ = env.step(action)
plain = env.unwrapped
plain.seed(3)
plain.reset()
looks["reward"] = [reward, sum(float(plain.step(action)[1]) for _ in range(2))]

moved = metaworld.ALL_V3_ENVIRONMENTS["coffee-push-v3"](
    render_mode="rgb_array", camera_name="corner2", width=48, height=48)
moved.model.cam_pos[mujoco.mj_name2id(moved.model, mujoco.mjtObj.mjOBJ_CAMERA, "corner2")] = [0.75, 0.075, 0.7]
moved._freeze_rand_vec, moved.seeded_rand_vec, moved._set_task_called = False, True, True
moved.seed(3)
moved.reset()
mujoco.mj_forward(moved.model, moved.data)  # the goal stands where it belongs
looks["camera"] = bool((moved.render()[::-1].transpose(2, 0, 1) == first).all())

env = mw.make_env("coffee-push", 16, 200, True)
env.reset(seed=1)
env.unwrapped._partially_observable = False  # the expert wants to see its goal
policy, looks["expert"] = ENV_POLICY_MAP["coffee-push-v3"](), []
while len(looks["expert"]) < 100 and [1.0, 1.0] not in looks["expert"]:
    action = np.clip(policy.get_action(env.unwrapped._get_obs()), -1, 1).astype(np.float32)
    _, reward, _, _, info = env.step(action)
    looks["expert"].append([float(reward), float(info["success"])])

env.reset(seed=2)
plain, successes = env.unwrapped, iter([1.0, 0.0])
step = plain.step
plain.step = lambda action: (*step(action)[:4], dict(success=next(successes)))
looks["first half"] = float(env.step(action)[1])
print(json.dumps(looks))
"""


def test_the_environment_is_the_official_one():
    """Seen in a process of its own: dm_control renders in this one."""
    pytest.importorskip("metaworld")
    root = Path(mw.__file__).parent.parent
    environment = os.environ | dict(PYTHONPATH=f"{root / 'studies'}:{root}")
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    looks = json.loads(done.stdout.splitlines()[-1])
    assert "could not broadcast" in looks["upstream"], "MetaWorld has repaired it: reset_mocap_welds can go"
    assert looks["shape"] == [3, 48, 48] and looks["actions"] == [4] and looks["info"] == 0
    assert looks["same seed"] and all(looks["others differ"])
    assert looks["ends"] == [[False, False]] * 5 + [[False, True]]
    ours, two_steps = looks["reward"]
    assert ours == pytest.approx(two_steps)
    assert looks["camera"], "the official camera is corner2, moved, and upright"
    assert looks["expert"][0] == [0, 0] and looks["expert"][-1] == [1, 1]  # the sparse reward
    assert looks["first half"] == 1  # a success in the first of an action's two steps counts


def test_a_run_on_a_real_task():
    pytest.importorskip("metaworld")
    flags = (
        "--image-size 24 --hidden-dim 16 --feature-dim 8 --batch-size 8 --learning-starts 10 --exploration-steps 10 "
    )
    flags += "--total-timesteps 36 --eval-every 36 --eval-episodes 1 --episode-length 12 --settings head"
    done = subprocess.run([sys.executable, mw.__file__, *flags.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run_dir,) = Path("runs").iterdir()
    logged = scalars(run_dir)
    assert {"eval/success_rate", "drm/dormant_ratio", "losses/value"} <= logged.keys()
    assert logged["eval/episodic_length"][36] == 12 and checkpoint(run_dir)["gradient_steps"] == 13


# --- the algorithm, on a small environment ----------------------------------------------------------------------------
@pytest.fixture
def dots(monkeypatch):
    """The environment of tests/pixel_env.py stands for MetaWorld."""
    pytest.importorskip("metaworld")  # which names its tasks
    make = lambda env_id, image_size, *_: adaptive_rr.make_env("pixel_env:Dot-v0", image_size)  # noqa: E731
    dot = lambda args, *rest: SerialEnvironments(adaptive_rr.parse_args(DOT), *rest)  # noqa: E731
    monkeypatch.setattr(mw, "find_spec", lambda name: True)
    monkeypatch.setattr(mw, "make_env", make)
    monkeypatch.setattr(mw, "TaskEnvironments", dot)
    monkeypatch.setattr(drm, "Environments", SerialEnvironments)


DOT = ["--env-id", "pixel_env:Dot-v0", "--image-size", "24"]
TINY = DRM[2:]


def test_release_is_drm_bit_for_bit(dots):
    ours = helpers.run(mw, *TINY, "--env-id", "assembly")
    theirs = helpers.run(drm, *DRM, "--max-perturb-factor", 0.9)
    assert_same(checkpoint(theirs)["agent"], checkpoint(ours)["agent"])
    assert scalars(ours) == scalars(theirs)


@pytest.mark.parametrize("settings", ["release", "head"])
def test_killed_and_resumed_is_bit_identical(settings, dots):
    flags = [*TINY, "--settings", settings, "--checkpoint-every", 20]
    whole, part = helpers.run(mw, *flags), killed_run(mw, 70, *flags)
    helpers.run(mw, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert scalars(whole) == scalars(part)


def test_settings():
    release, head = mw.parse_args([]), mw.parse_args(["--settings", "head"])
    assert (release.max_perturb_factor, release.episode_length, release.n_step, release.gamma) == (0.6, 200, 3, 0.99)
    assert (head.max_perturb_factor, head.episode_length, head.n_step, head.gamma) == (0.95, 250, 10, 0.97)
    assert (head.lambda_type, head.target_lambda, head.critic_dropout) == ("constant", 0.5, 0.01)
    assert (head.total_timesteps, head.expectile, release.total_timesteps) == (1_050_000, 0.9, 1_000_000)
    for task in ("assembly", "disassemble", "stick-pull", "sweep-into"):
        assert mw.parse_args(["--env-id", task]).max_perturb_factor == 0.9
    soccer = mw.parse_args(["--env-id", "soccer"])
    assert (soccer.total_timesteps, soccer.max_perturb_factor) == (1_550_000, 0.6)


def test_regularise_a_foreign_network():
    layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    mw.regularise(layers, 0.5)
    kinds = [type(layer) for layer in layers]
    hidden = [nn.Linear, nn.Dropout, nn.LayerNorm, nn.ReLU]
    assert kinds == [*hidden, *hidden, nn.Linear] and layers[2].normalized_shape == (8,)
    x = torch.rand(4, 3)
    assert not torch.equal(layers(x), layers(x))
    layers.eval()
    by_hand = nn.functional.layer_norm(layers[0](x), (8,)).relu()
    by_hand = nn.functional.layer_norm(layers[4](by_hand), (8,)).relu()
    assert torch.allclose(layers(x), layers[8](by_hand), atol=1e-6)


def test_dropout_acts_in_both_critics_and_the_target_learns_nothing():
    args = mw.parse_args([*TINY, "--settings", "head"])
    agent = mw.MetaWorldAgent(4, args)
    features, action = torch.rand(5, agent.encoder.feature_size), torch.rand(5, 4)
    for critic in (agent.critic, agent.critic_target):
        values = [torch.stack(critic(features, action)[:2]) for _ in range(20)]
        assert any(not torch.equal(values[0], value) for value in values[1:])
    for head in (agent.critic.q1, agent.critic.q2, agent.critic_target.q1, agent.critic_target.q2):
        assert [module.p for module in head if isinstance(module, nn.Dropout)] == [0.01] * 2
    assert not any(weight.requires_grad for weight in agent.critic_target.parameters())
    plain = mw.MetaWorldAgent(4, mw.parse_args(TINY))
    assert not any(isinstance(module, nn.Dropout) for module in plain.modules())


@pytest.mark.parametrize("flags, found, message", [
    ([], None, "--env-id coffee-push: needs pip install --no-deps metaworld==3.1.1: bash install.sh metaworld"),
    (["--settings", "head", "--episode-length", 9, "--n-step", 10], True, "--episode-length 9: must be at least"),
    (["--episode-length", 251], True, "--episode-length 251: must lie between 2 and 250"),
])  # fmt: skip
def test_bad_input(flags, found, message, capsys, monkeypatch):
    monkeypatch.setattr(mw, "find_spec", lambda name: found)
    with pytest.raises(SystemExit) as stopped:
        helpers.run(mw, *TINY, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1


def test_an_unknown_task(capsys):
    pytest.importorskip("metaworld")
    done = subprocess.run([sys.executable, mw.__file__, "--env-id", "juggling"], capture_output=True, text=True)
    assert done.returncode == 2 and "--env-id juggling: is no task of MetaWorld" in done.stderr
    assert done.stderr.count("\n") == 1
