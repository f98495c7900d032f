"""drqv2_plasticity.py through its command line: counts, schedules, interventions, resume, a real task, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import helpers
import numpy as np
import pixel_env
import pytest
import torch
from helpers import PIXELS, assert_same, checkpoint, run_and_replay, scalars, stopped_run

import drqv2_plasticity as drq


def run(*flags):
    return helpers.run(drq, *flags)


class SerialEnvs(gymnasium.vector.SyncVectorEnv):
    """The same environments in this process: a step happens only when its result is asked for."""

    def step_async(self, action):
        self.action = action.copy()

    def step_wait(self):
        return self.step(self.action)

    def step(self, action):
        self._autoreset_envs[:] = False  # an environment whose episode is over may be stepped on
        return super().step(action)


def make_serial_envs(args, num_envs):
    envs = [lambda: drq.make_env(args.env_id, args.image_size)] * num_envs
    return SerialEnvs(envs, autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED)


@pytest.fixture
def serial(monkeypatch):
    monkeypatch.setattr(drq, "make_envs", make_serial_envs)


@pytest.fixture
def calls(serial, monkeypatch):
    """name -> [global_step of each call], for the functions that the loop calls."""
    record, now = {}, {"step": 0}
    add = drq.PixelReplay.add

    def counted(name, function):
        def call(*args, **kwargs):
            record.setdefault(name, []).append(now["step"])
            return function(*args, **kwargs)

        return call

    def counting_add(self, *args):
        first = sys._getframe(1).f_code.co_name == "add_first"
        add(self, *args)
        now["step"] += not first

    monkeypatch.setattr(drq.PixelReplay, "add", counting_add)
    for name in ("drqv2_update", "random_shift", "reset_agent", "shrink_and_perturb", "recycle_units",
                 "inject_plasticity", "look_at_plasticity", "play_evaluation", "act"):  # fmt: skip
        monkeypatch.setattr(drq, name, counted(name, getattr(drq, name)))
    return record


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_run_through_the_command_line(tmp_path):
    """As a user: the script alone, copied into an empty folder."""
    shutil.copy(drq.__file__, tmp_path / "copied.py")
    flags = [*PIXELS, "--exp-name", "first", "--save-model"]
    done = subprocess.run([sys.executable, "copied.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean return" in done.stdout and "Traceback" not in done.stderr
    (run_dir,) = Path("runs").iterdir()
    assert run_dir.name.startswith("pixel_env:Dot-v0__first__1__")
    description = json.loads((run_dir / "args.json").read_text())
    assert description["action_repeat"] == 2 and description["args"]["n_step"] == 3
    assert {"torch", "gymnasium", "numpy", "python"} <= set(description["versions"])
    files = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
    assert files == {"args.json", "checkpoint.pt", "lock", "summary.json", "model.pt"}
    logged = scalars(run_dir)
    assert set(logged["eval/episodic_return"]) == {0, 60, 120} and set(logged["charts/episodic_return"]) == set(
        range(20, 121, 20))  # fmt: skip
    assert set(logged["charts/episodic_length"].values()) == {20}
    for name in ("encoder", "actor", "critic"):
        assert set(logged[f"plasticity/fau/{name}"]) == {40, 60, 80, 100, 120}
        for tag in ("dormant_ratio_tau0", "dormant_ratio_tau0.025", "feature_rank", "weight_norm", "grad_norm"):
            assert set(logged[f"plasticity/{tag}/{name}"]) == {40, 80, 120}, tag
        assert all(0 <= value <= 1 for value in logged[f"plasticity/fau/{name}"].values())
    assert logged["charts/frames"][120] == 240 and logged["charts/gradient_steps"][120] == 45
    assert json.loads((run_dir / "summary.json").read_text())["gradient_steps"] == 45
    model = torch.load(run_dir / "model.pt", weights_only=True)
    assert model.keys() == checkpoint(run_dir)["agent"].keys()


def test_a_real_task():
    flags = ["--hidden-dim", 32, "--batch-size", 4, "--learning-starts", 20, "--exploration-steps", 20,
             "--total-timesteps", 26, "--eval-every", 1000, "--eval-episodes", 1, "--plasticity-batch-size", 4,
             "--buffer-size", 1000, "--log-every", 2]  # fmt: skip
    run_dir, replay = run_and_replay(drq, "--env-id", "dm_control/cartpole-balance-v0", *flags)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval/episodic_length"] == 500 and summary["gradient_steps"] == 3
    assert 0 < summary["eval/episodic_return"] < 1000
    frames = replay["frames"]
    assert frames.shape == (27, 3, 84, 84) and frames.float().std() > 20
    assert len(torch.unique(frames.flatten(1), dim=0)) > 20


def test_cameras():
    pictures = {}
    for task, camera in (("walker-run", 0), ("quadruped-run", 2)):
        env = drq.make_env(f"dm_control/{task}-v0", 84)
        pictures[task] = env.reset(seed=3)[0]
        expected = env.unwrapped._env.physics.render(84, 84, camera_id=camera).transpose(2, 0, 1)
        other = env.unwrapped._env.physics.render(84, 84, camera_id=2 - camera if camera else 1).transpose(2, 0, 1)
        assert np.abs(pictures[task].astype(int) - expected).max() <= 1
        assert np.abs(pictures[task].astype(int) - other).mean() > 1
        env.close()


def test_actions_are_repeated_and_scaled_and_an_episode_can_be_played_again():
    env, plain = drq.make_env("pixel_env:Dot-v0", 24), pixel_env.DotEnv(24, 24)
    frame, _ = env.reset(seed=5)
    plain.reset(seed=5)
    assert np.array_equal(frame, plain.render().transpose(2, 0, 1))
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32)
    for t, action in enumerate(actions):
        frame, reward, terminated, truncated, _ = env.step(action)
        rewards = [plain.step(action * np.float32([1, 2]))[1] for _ in range(2)]
        assert np.array_equal(frame, plain.render().transpose(2, 0, 1)) and reward == pytest.approx(sum(rewards))
        assert (terminated, truncated) == (False, t == 19)
        if t == 12:
            middle = frame
    again, *rest = env.step(actions[0])  # nothing moves after the end
    assert np.array_equal(again, frame) and rest[0] == 0 and rest[2]
    assert np.array_equal(env.reset(seed=5, options={"actions": actions[:13]})[0], middle)


def test_a_termination_stops_the_repeat_and_the_bootstrap(serial):
    env = drq.make_env("pixel_env:EndingDot-v0", 24)
    env.reset(seed=0)
    env.unwrapped.place = np.zeros(2)
    _, reward, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
    assert terminated and not truncated and reward < 1 and env.unwrapped.time == 1
    record = run_and_replay(drq, *PIXELS, "--env-id", "pixel_env:EndingDot-v0")[1]["record"]
    assert 0 < record[:, 2].sum() < 60 and set(record[:, 2].tolist()) == {0.0, 1.0}
    age, terminated = record[:, 0], record[:, 2]
    assert all(age[i + 1] == 0 for i in range(len(age) - 1) if terminated[i] == 1)


# --- counts and schedules ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio, updates", [(0.5, 45), (1, 90), (2, 180), (4, 360), (1 / 3, 30)])
def test_update_cadence(ratio, updates, calls):
    run(*PIXELS, "--replay-ratio", ratio)
    steps = calls["drqv2_update"]
    assert len(steps) == updates and min(steps) == 30
    assert all(steps.count(t) == max(1, ratio) for t in range(30, 120, max(1, round(1 / ratio))))
    assert len(calls["random_shift"]) == 2 * updates  # obs and next_obs; never when acting or evaluating
    assert len(calls["act"]) == 120 and calls["play_evaluation"] == [0, 60, 120]
    assert calls["look_at_plasticity"] == [40, 80, 120]


@pytest.mark.parametrize("flags, steps", [
    (["--no-augmentation"], []),
    (["--no-augmentation", "--augmentation-switch-step", 80], range(80, 120, 2)),
    (["--augmentation-switch-step", 80], range(30, 80, 2)),
])  # fmt: skip
def test_augmentation_window(flags, steps, calls):
    logged = scalars(run(*PIXELS, *flags))["charts/augmentation"]
    assert sorted(calls.get("random_shift", [])) == sorted([*steps, *steps])
    assert {t: v for t, v in logged.items() if t > 40} == {t: float(t - 1 in range(120) and (
        t - 1 in steps or t - 2 in steps)) for t in logged if t > 40}  # fmt: skip


@pytest.mark.parametrize("flags, name, steps", [
    (["--reset-times", 2], "reset_agent", [40, 80]),
    (["--reset-times", 3], "reset_agent", [30, 60, 90]),
    (["--reset-every", 50], "reset_agent", [50, 100]),
    (["--shrink-perturb-every", 50], "shrink_and_perturb", [50, 100]),
    (["--redo-period-gradient-steps", 20, "--redo-batch-size", 8], "recycle_units", [68, 108]),  # 68 = 30 + 2 * 19
    (["--injection", "actor", "critic", "--injection-step", 60], "inject_plasticity", [60, 60]),
])  # fmt: skip
def test_interventions_happen_when_they_should(flags, name, steps, calls):
    run_dir = run(*PIXELS, *flags)
    assert calls[name] == steps
    tag = {"reset_agent": "reset", "shrink_and_perturb": "perturb_factor", "recycle_units": "redo_recycled/critic",
           "inject_plasticity": "injection"}[name]  # fmt: skip
    assert set(scalars(run_dir)[f"plasticity/{tag}"]) == {step + 1 for step in steps}
    assert not {"reset_agent", "shrink_and_perturb", "recycle_units", "inject_plasticity"} - {name} & set(calls)


def test_heavy_priming(calls):
    run_dir = run(*PIXELS, "--priming-gradient-steps", 50, "--priming-augmentation", "off")
    assert calls["drqv2_update"] == [30] * 51 + list(range(32, 120, 2))
    assert len(calls["random_shift"]) == 2 * 45
    assert scalars(run_dir)["charts/gradient_steps"][120] == 95
    calls.clear()
    run(*PIXELS, "--priming-gradient-steps", 50, "--no-augmentation")
    assert "random_shift" not in calls
    run(*PIXELS, "--priming-gradient-steps", 50, "--no-augmentation", "--priming-augmentation", "on")
    assert len(calls["random_shift"]) == 2 * 50


def test_noise_follows_its_schedule_in_acting_and_learning(serial, monkeypatch):
    acted, learned = [], []
    act, update = drq.act, drq.drqv2_update
    monkeypatch.setattr(drq, "act", lambda *a: acted.append((a[2], a[3])) or act(*a))
    monkeypatch.setattr(drq, "drqv2_update", lambda *a: learned.append(float(a[2][-1])) or update(*a))
    run(*PIXELS)
    stddev = [max(1 - 0.009 * t, 0.1) for t in range(120)]
    assert [s for s, _ in acted] == pytest.approx(stddev) and [u for _, u in acted] == [True] * 30 + [False] * 90
    assert learned == pytest.approx(stddev[30::2])


def test_looking_evaluating_and_an_idle_recycler_do_not_change_what_is_learned(serial):
    plain = checkpoint(run(*PIXELS))
    spectral = [
        checkpoint(run(*PIXELS, "--spectral-norm", "trunk", "--eval-every", every))["agent"] for every in (13, 60)
    ]
    assert_same(*spectral)
    for flags in (["--plasticity-every", 7], ["--eval-every", 13], ["--eval-episodes", 1], ["--log-every", 9]):
        assert_same(plain["agent"], checkpoint(run(*PIXELS, *flags))["agent"])


def test_overlapped_and_serial_execution_give_the_same_numbers(monkeypatch):
    overlapped = run(*PIXELS)
    monkeypatch.setattr(drq, "make_envs", make_serial_envs)
    serial = run(*PIXELS)
    assert_same(checkpoint(overlapped), checkpoint(serial))
    assert scalars(overlapped) == scalars(serial)


def test_evaluation_plays_whole_episodes_and_draws_nothing(serial):
    arguments = drq.parse_args([*PIXELS, "--eval-episodes", "3"])
    arguments.n_step, arguments.learning_rate = 3, 1e-4
    agent, envs = drq.DrQv2Agent(2, arguments), make_serial_envs(arguments, 2)
    before = torch.get_rng_state()
    first = drq.play_evaluation(agent, envs, arguments, 7, "cpu")
    assert first == drq.play_evaluation(agent, envs, arguments, 7, "cpu")
    assert first != drq.play_evaluation(agent, envs, arguments, 8, "cpu")
    assert first["eval/episodes"] == 3 and first["eval/episodic_length"] == 20
    assert torch.equal(before, torch.get_rng_state())
    returns = []  # the same episodes one by one, with stacks built by hand
    for i in range(3):
        env = drq.make_env("pixel_env:Dot-v0", 24)
        frames, total, done = [env.reset(seed=drq.episode_seed(1, 1, 7, i))[0]] * 3, 0.0, False
        while not done:
            obs = torch.from_numpy(np.concatenate(frames[-3:])[None])
            with torch.no_grad():
                action = agent.actor(agent.encoder(obs)[0])[0][0].numpy()
            frame, reward, terminated, truncated, _ = env.step(action)
            frames, total, done = [*frames, frame], total + reward, terminated or truncated
        returns.append(total)
    assert first["eval/episodic_return"] == pytest.approx(np.mean(returns), rel=1e-4)


# --- resume -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [
    [], ["--reset-times", 3, "--reset-scope", "all"], ["--injection", "critic", "actor", "--injection-step", 60],
    ["--injection", "critic", "--injection-step", 75, "--injection-init", "initial"], ["--crelu", "half"],
    ["--redo-period-gradient-steps", 10, "--redo-batch-size", 8, "--redo-tau", 0.8, "--replay-ratio", 2],
    ["--spectral-norm", "trunk"], ["--spectral-norm", "head"],
    ["--l2-init", 0.1, "--layer-norm", "--weight-decay", 0.01], ["--shrink-perturb-every", 30, "--buffer-size", 50],
    ["--augmentation-switch-step", 80], ["--env-id", "pixel_env:EndingDot-v0", "--amp"],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("stop", [60, 73])
def test_resume_is_bit_identical(flags, stop, serial):
    """Stopped at an episode's end and in the middle of one."""
    assert_resume_is_bit_identical(drq, stop, *PIXELS, *flags)


def assert_resume_is_bit_identical(script, stop, *flags):
    whole, replay = run_and_replay(script, *flags)
    part = stopped_run(script, stop, *flags)
    assert checkpoint(part)["global_step"] == stop
    _, resumed = run_and_replay(script, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert_same(replay, resumed)
    assert scalars(whole) == scalars(part)


def test_stopping_while_priming(serial, monkeypatch):
    flags = [*PIXELS, "--priming-gradient-steps", 30, "--reset-every", 30]
    whole, update, count = run(*flags), drq.drqv2_update, []

    def stopping(*arguments):
        count.append(0)
        if len(count) == 12:
            os.kill(os.getpid(), 2)
        return update(*arguments)

    monkeypatch.setattr(drq, "drqv2_update", stopping)
    with pytest.raises(SystemExit) as stopped:
        run(*flags, "--exp-name", "part")
    monkeypatch.setattr(drq, "drqv2_update", update)
    (part,) = Path("runs").glob("*__part__*")
    assert stopped.value.code == 130 and checkpoint(part)["primed"] == 12 and checkpoint(part)["global_step"] == 30
    run("--resume", part)
    a, b = checkpoint(whole), checkpoint(part)
    assert_same({k: v for k, v in a.items() if k != "args"}, {k: v for k, v in b.items() if k != "args"})


def test_resume_with_more_steps_does_not_move_the_resets(calls):
    part = run(*PIXELS, "--reset-times", 2)
    run("--resume", part, "--total-timesteps", 200)
    assert calls["reset_agent"][:2] == [40, 80] and len(calls["reset_agent"]) == 4


def test_resume_without_the_replay_refills_before_it_learns(calls, capsys):
    part = run(*PIXELS, "--no-checkpoint-replay")
    assert checkpoint(part)["replay"] is None
    calls.clear()
    run("--resume", part, "--total-timesteps", 200)
    assert "collecting 30 steps" in capsys.readouterr().out
    assert len(calls["drqv2_update"]) == 25  # 150, 152, ... 198


def test_resume_takes_flags_from_the_run_and_refuses_others(capsys, serial):
    part = run(*PIXELS)
    with pytest.raises(SystemExit) as stopped:
        run("--resume", part, "--gamma", 0.5)
    assert stopped.value.code == 2 and "--gamma 0.5: a resumed run keeps its own value" in capsys.readouterr().err
    run("--resume", part, "--total-timesteps", 140, "--eval-every", 70)
    assert checkpoint(part)["global_step"] == 140


def test_resume_notices_another_environment(capsys, serial, monkeypatch):
    part = stopped_run(drq, 113, *PIXELS)
    monkeypatch.setattr(pixel_env.DotEnv, "render", lambda self: np.full((24, 24, 3), 255, np.uint8))
    with pytest.raises(SystemExit) as stopped:
        run("--resume", part)
    assert stopped.value.code == 2 and "plays the episode that was interrupted differently" in capsys.readouterr().err


# --- flags ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [
    ["--gamma", 0.5], ["--tau", 0.5], ["--n-step", 1], ["--learning-rate", 0.01], ["--stddev-clip", 0.01],
    ["--stddev-start", 0.5], ["--stddev-end", 0.9], ["--shift-pad", 1], ["--exploration-steps", 60],
    ["--weight-decay", 1],
    ["--l2-init", 1], ["--layer-norm"], ["--spectral-norm", "trunk"],
    ["--spectral-norm", "head"], ["--crelu", "half"], ["--crelu", "full"],
    ["--reset-every", 50, "--reset-scope", "mlp"], ["--reset-every", 50, "--no-reset-optimizer"],
    ["--reset-every", 50, "--reset-modules", "actor"], ["--shrink-perturb-every", 50],
    ["--shrink-perturb-every", 50, "--shrink", 0.5], ["--shrink-perturb-every", 50, "--perturb", 0.5],
    ["--redo-period-gradient-steps", 10, "--redo-batch-size", 8, "--redo-tau", 0.8],
    ["--redo-period-gradient-steps", 10, "--redo-batch-size", 8, "--redo-tau", 0.8, "--redo-modules", "actor",
     "encoder"],
    ["--redo-period-gradient-steps", 10, "--redo-tau", 0.8, "--redo-batch-size", 4],
    ["--injection", "critic", "--injection-step", 60],
    ["--injection", "critic", "--injection-step", 60, "--injection-init", "initial"], ["--priming-gradient-steps", 9],
    ["--priming-gradient-steps", 9, "--priming-augmentation", "off"], ["--preset", "paper-table", "--batch-size", 9],
], ids=lambda flags: " ".join(str(flag) for flag in flags))  # fmt: skip
def test_every_switch_changes_the_run(flags, serial, outcomes):
    helpers.assert_new_outcome(drq, PIXELS, flags, outcomes)


def test_defaults_come_from_the_table(monkeypatch):
    monkeypatch.setattr(drq, "memory", lambda device: 1e12)
    walker = drq.resolve_args(drq.Args())
    assert (walker.n_step, walker.batch_size, walker.stddev_steps, walker.total_timesteps) == (
        1,
        512,
        500_000,
        1_500_500,
    )
    paper = drq.resolve_args(drq.Args(preset="paper-table"))
    values = [paper.n_step, paper.batch_size, paper.stddev_steps, paper.total_timesteps]
    assert values == [3, 256, 500_000, 1_500_500]
    easy = drq.resolve_args(drq.Args(env_id="dm_control/cartpole-balance-v0", batch_size=32))
    assert (easy.batch_size, easy.stddev_steps) == (32, 100_000)
    assert drq.resolve_args(drq.Args(env_id="dm_control/quadruped-run-v0", reset_times=4)).reset_every == 300_100
    assert drq.resolve_args(drq.Args(env_id="dm_control/quadruped-run-v0", reset_times=6)).reset_every == 214_358


@pytest.mark.parametrize("flag, tolerance", [("--amp", 0.1), ("--compile", 0.01)])
def test_speed_flags_change_bits_but_not_results(flag, tolerance, serial):
    flags = [*PIXELS, "--total-timesteps", 40, "--injection", "critic", "--injection-step", 36]
    plain, fast = run(*flags), run(*flags, flag)
    for name, value in checkpoint(plain)["agent"].items():
        torch.testing.assert_close(checkpoint(fast)["agent"][name], value, atol=2e-3, rtol=tolerance)


def test_a_run_learns(serial):
    """The dot finds the middle of the picture."""
    flags = [*PIXELS, "--total-timesteps", 1500, "--hidden-dim", 64, "--feature-dim", 16, "--batch-size", 32,
             "--learning-starts", 100, "--learning-rate", 1e-3, "--stddev-steps", 1000, "--eval-every", 10_000,
             "--eval-episodes", 10, "--gamma", 0.9, "--replay-ratio", 1, "--seed", 2]  # fmt: skip
    logged = scalars(run(*flags))["eval/episodic_return"]
    assert logged[1500] > logged[0] + 5, logged


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, message", [
    (["--env-id", "dm_control/walker-rum-v0"], "walker-rum-v0: did you mean dm_control/walker-run-v0?"),
    (["--env-id", "nowhere:Dot-v0"], "--env-id nowhere:Dot-v0: "),
    (["--env-id", "CartPole-v1"], "--env-id CartPole-v1: cannot be played through its pixels"),
    (["--env-id", "pixel_env:SmallDot-v0", "--total-timesteps", "None"], "total-timesteps"),
    (["--batch-size", 31], "--batch-size 31: must be at most --learning-starts 30"),
    (["--plasticity-batch-size", 31], "--plasticity-batch-size 31: must be at most --learning-starts 30"),
    (["--learning-starts", 120], "--total-timesteps 120: must be more than --learning-starts 120"),
    (["--augmentation-switch-step", 120], "--augmentation-switch-step 120: must lie between 1 and"),
    (["--injection", "critic"], "--injection-step 500000: must lie between 1 and --total-timesteps 120 - 1"),
    (["--injection", "critic", "critic", "--injection-step", 60], "must name each module once"),
    (["--reset-every", 120], "--reset-every 120: must lie between"),
    (["--reset-times", 2, "--reset-every", 30], "--reset-times 2: does not go with --reset-every: both say when"),
    (["--injection", "critic", "--injection-step", 60, "--reset-times", 2], "every 40: does not go with --injection"),
    (["--reset-times", -1], "--reset-times -1: must not be negative"),
    (["--reset-times", 11, "--total-timesteps", 121], "--reset-times 11: are too many for --total-timesteps 121"),
    (["--injection", "critic", "--injection-step", 60, "--l2-init", 1], "-init 1.0: does not go with --injection"),
    (["--reset-scope", "all"], "--reset-scope all: does nothing without --reset-every"),
    (["--injection-step", 60], "--injection-step 60: does nothing without --injection"),
    (["--redo-tau", 0.1], "--redo-tau 0.1: does nothing without --redo-period-gradient-steps"),
    (["--shrink", 0.5], "--shrink 0.5: does nothing without --shrink-perturb-every"),
    (["--priming-augmentation", "on"], "--priming-augmentation on: does nothing without --priming-gradient-steps"),
    (["--redo-period-gradient-steps", 9], "--redo-batch-size 64: is more than --learning-starts 30"),
    (["--replay-ratio", "inf"], "--replay-ratio inf: must be a finite number"),
    (["--learning-rate", "nan"], "--learning-rate nan: must be a finite number"),
    (["--n-step", 29, "--buffer-size", 32], "--buffer-size 32: must be at least --n-step 29 + 4"),
    (["--n-step", 25], "--n-step 25: no episode of the first 30 steps was that long"),
    (["--layer-norm", "--redo-batch-size", 8, "--redo-period-gradient-steps", 9], "does not go with --layer-norm"),
    (["--crelu", "half", "--redo-batch-size", 8, "--redo-period-gradient-steps", 9], "does not go with --crelu"),
    (["--spectral-norm", "head", "--shrink-perturb-every", 9], "every 9: does not go with --spectral-norm"),
    (["--replay-ratio", 0.4], "--replay-ratio 0.4: must be k or 1/k"),
    (["--replay-ratio", 0], "--replay-ratio 0.0: must be k or 1/k"),
    (["--image-size", 14], "--image-size 14: must be at least 15"),
    (["--shift-pad", 24], "--shift-pad 24: must be less than --image-size 24"),
    (["--shift-pad", -1], "--shift-pad -1: must not be negative"),
    (["--buffer-size", 29], "--learning-starts 30: must be at most --buffer-size 29"),
    (["--total-timesteps", 10**8, "--buffer-size", 10**8], "--buffer-size 100000000: the run needs about 1"),
    (["--gamma", 1.5], "--gamma 1.5: must lie between 0 and 1"),
    (["--seed", -1], "--seed -1: must lie between"),
    (["--dormant-tau", -1], "--dormant-tau (-1.0,): must hold thresholds"),
    (["--crelu", "half", "--hidden-dim", 15], "--hidden-dim 15: must be even"),
    (["--exp-name", "a/b"], "--exp-name a/b: must not contain /"),
    (["--cudagraphs"], "--cudagraphs True: needs --device cuda"),
    (["--track"], "--track : needs Weights & Biases"),
    (["--resume", "nothing"], "--resume nothing: is not a run folder"),
], ids=lambda value: " ".join(str(v) for v in value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stopped:
        run(*PIXELS, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed
    if "no episode" not in message:  # which shows only when it runs
        assert printed.count("\n") == 1 and not Path("runs").exists()


def test_actions_must_be_bounded_numbers():
    with pytest.raises(TypeError, match="its actions are not numbers within bounds: Discrete"):
        drq.PixelEnv(gymnasium.make("CartPole-v1", render_mode="rgb_array"), 84)


def test_unknown_tasks_need_their_numbers(capsys):
    for flags, name in ((["--env-id", "pixel_env:Dot-v0"], "total-timesteps"),
                        (["--env-id", "pixel_env:Dot-v0", "--total-timesteps", "9000"], "stddev-steps")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            run(*flags)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and f"--{name} None: the table of tasks has no pixel_env:Dot-v0" in printed


def test_missing_renderer_names_the_packages(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shimmy", None)
    with pytest.raises(SystemExit) as stopped:
        run("--env-id", "dm_control/cartpole-balance-v0")
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "libegl1 libgl1-mesa-dri" in printed and printed.count("\n") == 1
    assert not Path("runs").exists()


def test_wrong_picture_size(capsys, monkeypatch):
    monkeypatch.setattr(pixel_env.DotEnv, "render", lambda self: np.zeros((24, 30, 3), np.uint8))
    with pytest.raises(SystemExit) as stopped:
        run(*PIXELS)
    assert stopped.value.code == 2 and "renders (3, 24, 30), not (3, 24, 24)" in capsys.readouterr().err


def test_a_signal_to_the_whole_group_saves(tmp_path):
    """As `timeout` and schedulers send it: the environments' processes must outlive the learner's last step."""
    command = [sys.executable, drq.__file__, *PIXELS, "--total-timesteps", "1000000", "--buffer-size", "4000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    helpers.wait_for(lambda: list(Path("runs").glob("*/events*")), process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in errors
    assert list(Path("runs").glob("*/checkpoint.pt"))
