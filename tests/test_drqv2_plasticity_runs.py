"""drqv2_plasticity.py through its command line: counts, schedules, interventions, resume, a real task, bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import (
    PIXELS,
    SerialEnvironments,
    assert_golden,
    assert_same,
    checkpoint,
    killed_run,
    run_and_replay,
    scalars,
)

import drqv2_plasticity as drq

GOLDEN = {
    "losses/critic": {80: 18.2058201, 120: 15.0720291, 200: 17.8708382},
    "losses/actor": {80: 0.1383832, 120: 0.0333107, 200: -0.0700125},
    "losses/q_values": {80: 0.3038992, 120: 0.2869961, 200: 0.3589578},
    "fau/critic": {80: 0.5033203, 120: 0.5332031, 200: 0.5275391},
    "feature_rank/critic": {80: 6, 120: 6, 200: 6},
    "charts/episodic_return": {80: 6.0130086, 120: 26.8192558, 200: 11.4512873},
}


def run(*flags):
    return helpers.run(drq, *flags)


@pytest.fixture
def serial(monkeypatch):
    monkeypatch.setattr(drq, "Environments", SerialEnvironments)


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
    for name in ("update", "random_shift", "shrink_and_perturb", "recycle", "inject", "measure_modules", "evaluate",
                 "act"):  # fmt: skip
        monkeypatch.setattr(drq, name, counted(name, getattr(drq, name)))
    return record


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_run_through_the_command_line(tmp_path):
    """As a user: the script alone, copied into an empty folder."""
    shutil.copy(drq.__file__, tmp_path / "copied.py")
    flags = [*PIXELS, "--exp-name", "first", "--save-model"]
    done = subprocess.run([sys.executable, "copied.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean return" in done.stdout and "Traceback" not in done.stderr and "evaluating 1 of 2" in done.stderr
    (run_dir,) = Path("runs").iterdir()
    assert run_dir.name.startswith("pixel_env:Dot-v0__first__1__")
    description = json.loads((run_dir / "args.json").read_text())
    assert description["action_repeat"] == 2 and description["args"]["n_step"] == 3
    files = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
    assert files == {"args.json", "checkpoint.pt", "lock", "summary.json", "model.pt", "copied.py"}
    logged = scalars(run_dir)
    assert set(logged["eval/episodic_return"]) == {0, 60, 120}
    assert set(logged["charts/episodic_return"]) == set(range(20, 121, 20))
    for name in ("encoder", "actor", "critic"):
        assert set(logged[f"fau/{name}"]) == {40, 60, 80, 100, 120}
        for tag in ("dormant_ratio_tau0", "dormant_ratio_tau0.025", "feature_rank", "weight_norm"):
            assert set(logged[f"{tag}/{name}"]) == {40, 80, 120}, tag
        assert all(0 <= value <= 1 for value in logged[f"fau/{name}"].values())
    assert logged["charts/frames"][120] == 240 and logged["charts/gradient_steps"][120] == 45
    assert json.loads((run_dir / "summary.json").read_text())["gradient_steps"] == 45
    model = torch.load(run_dir / "model.pt", weights_only=True)
    assert model.keys() == checkpoint(run_dir)["agent"].keys()


def test_a_golden_run(serial):
    """Losses after 200 steps, stored on 2026-11-24 from the first version of the script."""
    assert_golden(scalars(run(*PIXELS, "--env-id", "pixel_env:Dot64-v0", "--total-timesteps", 200)), GOLDEN)


def test_a_real_task():
    flags = ["--hidden-dim", 32, "--batch-size", 4, "--learning-starts", 20, "--exploration-steps", 20,
             "--total-timesteps", 26, "--eval-every", 1000, "--eval-episodes", 1, "--plasticity-batch-size", 4,
             "--buffer-size", 1000]  # fmt: skip
    run_dir, replay = run_and_replay(drq, "--env-id", "dm_control/cartpole-balance-v0", *flags)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval/episodic_length"] == 500 and summary["gradient_steps"] == 3
    assert 0 < summary["eval/episodic_return"] < 1000
    frames = replay["frames"]
    assert frames.shape == (27, 3, 84, 84) and frames.float().std() > 20
    assert len(torch.unique(frames.flatten(1), dim=0)) > 20


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "pixel_env:ShortHalfCheetah-v5"])
def test_a_foreign_environment(env_id):
    """In a process of its own: MuJoCo's and dm_control's renderers do not go together."""
    flags = (
        "--image-size 24 --hidden-dim 8 --feature-dim 4 --batch-size 4 --learning-starts 20 --exploration-steps 20 "
        "--total-timesteps 30 --eval-episodes 1 --plasticity-batch-size 4 --buffer-size 500"
    )
    command = [sys.executable, drq.__file__, "--env-id", env_id, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run_dir,) = Path("runs").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval/episodic_length"] == (100 if env_id == "Pendulum-v1" else 20)
    assert summary["gradient_steps"] == 5 and summary["eval/episodic_return"] < 0


@pytest.mark.parametrize("first", ["dm_control/cartpole-balance-v0", "HalfCheetah-v5"])
def test_two_renderers_in_one_process_are_refused(first):
    second = {"HalfCheetah-v5": "dm_control/cartpole-balance-v0"}.get(first, "HalfCheetah-v5")
    code = f"import drqv2_plasticity as d; d.make_env('{first}', 24); d.train(d.Args(env_id='{second}'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "dm_control and another MuJoCo renderer in one process draw wrong pictures"
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and not Path("runs").exists()


def test_cameras():
    pictures = {}
    for task, camera in (("walker-run", 0), ("quadruped-run", 2)):
        env = drq.make_env(f"dm_control/{task}-v0", 84)
        pictures[task] = env.reset(seed=3)[0]
        physics = env.unwrapped._env.physics
        expected = physics.render(84, 84, camera_id=camera).transpose(2, 0, 1)
        other = physics.render(84, 84, camera_id=2 - camera if camera else 1).transpose(2, 0, 1)
        assert np.abs(pictures[task].astype(int) - expected).max() <= 1
        assert np.abs(pictures[task].astype(int) - other).mean() > 1
        env.close()


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
    steps = calls["update"]
    assert len(steps) == updates and min(steps) == 30
    assert all(steps.count(t) == max(1, ratio) for t in range(30, 120, max(1, round(1 / ratio))))
    assert len(calls["random_shift"]) == 2 * updates  # obs and next_obs; never when acting or evaluating
    assert len(calls["act"]) == 120 and calls["evaluate"] == [0, 60, 120]
    assert calls["measure_modules"] == [40, 80, 120]


@pytest.mark.parametrize("flags, steps", [
    (["--no-augmentation"], []),
    (["--no-augmentation", "--augmentation-switch-step", 80], range(80, 120, 2)),
    (["--augmentation-switch-step", 80], range(30, 80, 2)),
])  # fmt: skip
def test_augmentation_window(flags, steps, calls):
    logged = scalars(run(*PIXELS, *flags))["charts/augmentation"]
    assert sorted(calls.get("random_shift", [])) == sorted([*steps, *steps])
    assert {t: v for t, v in logged.items() if t > 30} == {t: float(t - 2 in steps) for t in logged if t > 30}


@pytest.mark.parametrize("flags, names, tag, steps", [
    (["--reset-every", 50], [], "events/reset", [50, 100]),
    (["--shrink-perturb-every", 50], ["shrink_and_perturb"], "events/perturb_factor", [50, 100]),
    (["--redo-period-gradient-steps", 20, "--redo-batch-size", 8], ["recycle"], "redo_recycled/critic", [68, 108]),
    (["--injection", "actor", "--injection-step", 60], ["inject"], "events/injection", [60]),
    (["--injection", "critic", "--injection-step", 60], ["inject", "inject"], "events/injection", [60]),
])  # fmt: skip
def test_interventions_happen_when_they_should(flags, names, tag, steps, calls):
    """ReDo at step 68 = 30 + 2 * 19, where the 20th gradient step is taken."""
    run_dir = run(*PIXELS, *flags)
    assert {name: calls[name] for name in names} == {name: sorted(steps * names.count(name)) for name in names}
    assert set(scalars(run_dir)[tag]) == {step + 1 for step in steps}
    assert not {"shrink_and_perturb", "recycle", "inject"} - {*names} & set(calls)


def test_heavy_priming(calls):
    run_dir = run(*PIXELS, "--priming-gradient-steps", 50)
    assert calls["update"] == [30] * 51 + list(range(32, 120, 2))
    assert len(calls["random_shift"]) == 2 * 95
    assert scalars(run_dir)["charts/gradient_steps"][120] == 95
    calls.clear()
    run(*PIXELS, "--priming-gradient-steps", 50, "--no-augmentation", "--augmentation-switch-step", 31)
    assert calls["random_shift"] == [120 + t for t in range(32, 120, 2) for _ in range(2)]  # of the second run


def test_heavy_priming_on_fewer_transitions_than_a_batch(calls):
    """The slides' 100 transitions, at small scale: a batch may hold a transition more than once."""
    run(*PIXELS, "--priming-gradient-steps", 20, "--learning-starts", 5, "--exploration-steps", 5)
    assert calls["update"][:22] == [5] * 20 + [6, 8]


def test_noise_follows_its_schedule_in_acting_and_learning(serial, monkeypatch):
    acted, learned = [], []
    act, update = drq.act, drq.update
    monkeypatch.setattr(drq, "act", lambda *a: acted.append((a[2], a[3])) or act(*a))
    monkeypatch.setattr(drq, "update", lambda *a: learned.append(float(a[3][-1])) or update(*a))
    run(*PIXELS)
    stddev = [max(1 - 0.009 * t, 0.1) for t in range(120)]
    assert [s for s, _ in acted] == pytest.approx(stddev) and [u for _, u in acted] == [True] * 30 + [False] * 90
    assert learned == pytest.approx(stddev[30::2])


def test_looking_and_evaluating_do_not_change_what_is_learned_nor_interventions_what_is_drawn(serial):
    plain = checkpoint(run(*PIXELS))
    spectral = [
        checkpoint(run(*PIXELS, "--spectral-norm", "trunk", "--eval-every", every))["agent"] for every in (13, 60)
    ]
    assert_same(*spectral)
    for flags in (["--plasticity-every", 7], ["--eval-every", 13], ["--eval-episodes", 1], ["--capture-video"]):
        assert_same(plain["agent"], checkpoint(run(*PIXELS, *flags))["agent"])
    for flags in (["--reset-every", 50], [*REDO, "--redo-tau", 0.8]):  # they draw from a stream of their own
        assert_same(plain["batch_rng"], checkpoint(run(*PIXELS, *flags))["batch_rng"])


def test_overlapped_and_serial_execution_give_the_same_numbers(monkeypatch):
    overlapped = run(*PIXELS)
    monkeypatch.setattr(drq, "Environments", SerialEnvironments)
    serial = run(*PIXELS)
    assert_same(checkpoint(overlapped), checkpoint(serial))
    assert scalars(overlapped) == scalars(serial)


# --- resume -----------------------------------------------------------------------------------------------------------
REDO = ["--redo-period-gradient-steps", 10, "--redo-batch-size", 8, "--redo-tau", 0.8]


@pytest.mark.parametrize("dies, flags", [
    (61, []), (95, []), (61, ["--reset-every", 25]), (95, ["--injection", "critic", "--injection-step", 60]),
    (61, ["--injection", "actor", "--injection-step", 75]), (95, ["--crelu"]), (61, [*REDO, "--replay-ratio", 2]),
    (95, ["--spectral-norm", "trunk"]), (61, ["--spectral-norm", "head", "--priming-gradient-steps", 9]),
    (95, ["--l2-init", 0.1, "--layer-norm", "--weight-decay", 0.01]), (61, ["--augmentation-switch-step", 80]),
    (95, ["--shrink-perturb-every", 30, "--buffer-size", 50]),
    (61, ["--env-id", "pixel_env:EndingDot-v0", "--precision", "bfloat16"]),
], ids=str)  # fmt: skip
def test_killed_and_resumed_is_bit_identical(dies, flags, serial):
    """Checkpoints at the ends of episodes; killed once more within the resumed run."""
    flags = [*PIXELS, *flags, "--checkpoint-every", 15]
    whole, replay = run_and_replay(drq, *flags)
    part = killed_run(drq, dies, *flags)
    killed_run(drq, 23, "--resume", part)
    _, resumed = run_and_replay(drq, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert_same(replay, resumed)
    assert scalars(whole) == scalars(part)


def test_a_signal_while_priming_saves_at_once(serial, monkeypatch):
    flags = [*PIXELS, "--priming-gradient-steps", 30]
    update, count = drq.update, []

    def stopping(*arguments):
        count.append(0)
        if len(count) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(drq, "update", stopping)
        run(*flags)
    (part,) = Path("runs").iterdir()
    saved = checkpoint(part)
    assert stopped.value.code == 130 and (saved["gradient_steps"], saved["global_step"]) == (12, 31)
    run("--resume", part)
    assert json.loads((part / "summary.json").read_text())["gradient_steps"] == 30 + 44  # at 32, 34, ...


def test_priming_that_was_interrupted_goes_on_with_the_same_augmentation(serial, monkeypatch):
    """Also where it is to be switched right after the priming, as in Fig. 15."""
    at = int(PIXELS[PIXELS.index("--learning-starts") + 1])
    flags = [*PIXELS, "--priming-gradient-steps", 30, "--augmentation-switch-step", at + 1]
    update, augmented = drq.update, []

    def watched(agent, optimizers, args, batch, *more):
        if len(augmented) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return update(agent, optimizers, args, batch, *more)

    sample = drq.sample_batch
    monkeypatch.setattr(drq, "sample_batch", lambda *values: augmented.append(values[2]) or sample(*values))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(drq, "update", watched)
        run(*flags)
    (part,) = Path("runs").iterdir()
    run("--resume", part)
    assert augmented == [True] * 30 + [False] * 44


def test_resume_with_more_steps_does_not_move_the_resets(serial):
    part = run(*PIXELS, "--reset-every", 40)
    run("--resume", part, "--total-timesteps", 200)
    assert set(scalars(part)["events/reset"]) == {41, 81, 121, 161}


# --- flags ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [
    ["--gamma", 0.5], ["--tau", 0.5], ["--n-step", 1], ["--learning-rate", 0.01], ["--stddev-clip", 0.01],
    ["--stddev-start", 0.5], ["--stddev-end", 0.9], ["--shift-pad", 1], ["--exploration-steps", 60],
    ["--no-augmentation"], ["--augmentation-switch-step", 80], ["--weight-decay", 1], ["--l2-init", 1],
    ["--layer-norm"], ["--spectral-norm", "trunk"], ["--spectral-norm", "head"], ["--crelu"], ["--reset-every", 50],
    ["--shrink-perturb-every", 50], ["--shrink-perturb-every", 50, "--shrink", 0.5],
    ["--shrink-perturb-every", 50, "--perturb", 0.5], REDO, [*REDO[:2], "--redo-tau", 0.8, "--redo-batch-size", 4],
    ["--injection", "critic", "--injection-step", 60], ["--injection", "actor", "--injection-step", 60],
    ["--injection", "critic", "--injection-step", 63], ["--priming-gradient-steps", 9], ["--replay-ratio", 1],
    ["--precision", "bfloat16"],
], ids=lambda flags: " ".join(str(flag) for flag in flags))  # fmt: skip
def test_every_switch_changes_the_run(flags, serial, outcomes):
    helpers.assert_new_outcome(drq, PIXELS, flags, outcomes)


@pytest.mark.parametrize("flag, tolerance", [(["--precision", "bfloat16"], 0.5), (["--compile"], 0.1)], ids=str)
def test_speed_flags_do_not_change_what_is_learned(flag, tolerance, serial, quick_compiler):
    """Their difference is small beside what was learned (the distance to a run at learning rate 0) in each network."""
    flags = [*PIXELS, "--total-timesteps", 40, "--injection", "critic", "--injection-step", 36, "--learning-rate", 1e-3]
    plain, fast, new = run(*flags), run(*flags, *flag), run(*flags, "--learning-rate", 0)
    plain_weights, fast_weights, new_weights = (checkpoint(run_dir)["agent"] for run_dir in (plain, fast, new))
    for network in ("encoder", "actor", "critic"):
        names = [name for name in plain_weights if name.startswith(f"{network}.")]
        learned, apart = (
            math.sqrt(sum(float(((weights[n] - plain_weights[n]) ** 2).sum()) for n in names))
            for weights in (new_weights, fast_weights)
        )
        assert apart < tolerance * learned and (apart > 0 or "--compile" in flag), (network, apart / learned)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == ("--compile" in flag)


@pytest.mark.slow
def test_a_run_learns(serial):
    """The dot finds the middle of the picture."""
    flags = [*PIXELS, "--total-timesteps", 1500, "--hidden-dim", 64, "--feature-dim", 16, "--batch-size", 32,
             "--learning-starts", 100, "--learning-rate", 1e-3, "--stddev-steps", 1000, "--eval-every", 10_000,
             "--eval-episodes", 10, "--gamma", 0.9, "--replay-ratio", 1, "--seed", 2]  # fmt: skip
    logged = scalars(run(*flags))["eval/episodic_return"]
    assert logged[1500] > logged[0] + 5, logged


# --- bad input --------------------------------------------------------------------------------------------------------
INJECT = ["--injection", "critic", "--injection-step", 60]


@pytest.mark.parametrize("flags, message", [
    (["--env-id", "dm_control/walker-rum-v0"], "Did you mean: `walker-run`?"),
    (["--env-id", "nowhere:Dot-v0"], "--env-id nowhere:Dot-v0: "),
    (["--env-id", "CartPole-v1"], "--env-id CartPole-v1: cannot be played through its pixels"),
    (["--learning-starts", 120], "--total-timesteps 120: must be more than --learning-starts 120"),
    (["--augmentation-switch-step", 120], "--augmentation-switch-step 120: must be less than --total-timesteps 120"),
    (["--injection", "critic"], "--injection-step 500000: must be less than --total-timesteps 120"),
    (["--reset-every", 120], "--reset-every 120: must be less than"), (["--reset-every", -1], "-1: must lie between 0"),
    ([*INJECT, "--reset-every", 40], "--reset-every 40: does not go with --injection"),
    ([*INJECT, "--l2-init", 1], "--l2-init 1.0: does not go with --injection"),
    (["--injection-step", 60], "--injection-step 60: does nothing without --injection"),
    (["--redo-tau", 0.1], "--redo-tau 0.1: does nothing without --redo-period-gradient-steps"),
    (["--shrink", 0.5], "--shrink 0.5: does nothing without --shrink-perturb-every"),
    (["--layer-norm", *REDO], "--redo-period-gradient-steps 10: does not go with --layer-norm"),
    (["--crelu", *REDO], "--redo-period-gradient-steps 10: does not go with --crelu"),
    (["--priming-gradient-steps", 9, *REDO], "10: does not go with --priming-gradient-steps"),
    ([*INJECT, "--spectral-norm", "head"], "--injection critic: does not go with --spectral-norm"),
    (["--spectral-norm", "head", "--shrink-perturb-every", 9], "every 9: does not go with --spectral-norm"),
    (["--spectral-norm", "head", "--reset-every", 40], "--reset-every 40: does not go with --spectral-norm"),
    (["--l2-init", 1, "--reset-every", 40], "--reset-every 40: does not go with --l2-init"),
    ([*INJECT, "--shrink-perturb-every", 9], "--shrink-perturb-every 9: does not go with --injection"),
    ([*INJECT, *REDO], "--redo-period-gradient-steps 10: does not go with --injection"),
    (["--spectral-norm", "head", *REDO], "--redo-period-gradient-steps 10: does not go with --spectral-norm"),
    (["--replay-ratio", "inf"], "--replay-ratio inf: must lie"), (["--replay-ratio", 0], "0.0: must lie between"),
    (["--learning-rate", "nan"], "--learning-rate nan: must lie between"),
    (["--n-step", 29, "--buffer-size", 32], "--buffer-size 32: must be at least --n-step 29 + 4"),
    (["--image-size", 14], "--image-size 14: must lie between 15"), (["--shift-pad", -1], "--shift-pad -1: must lie"),
    (["--total-timesteps", 10**8, "--buffer-size", 10**8], "--buffer-size 100000000: the run needs about 1"),
    (["--gamma", 1.5], "--gamma 1.5: must lie between 0 and 1"), (["--seed", -1], "--seed -1: must lie between"),
    (["--cudagraphs", "--device", "cpu"], "--cudagraphs True: needs --device cuda"),
    (["--track"], "--track True: needs Weights & Biases"),
    (["--resume", "nothing"], "--resume nothing: is not the folder of a run"),
], ids=lambda value: " ".join(str(v) for v in value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*PIXELS, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed
    assert printed.count("\n") == 1 and not Path("runs").exists()


def test_a_signal_to_the_whole_group_saves(tmp_path):
    """As `timeout` and schedulers send it: the environments' processes must outlive the learner's last step."""
    command = [sys.executable, drq.__file__, *PIXELS, "--total-timesteps", "1000000", "--buffer-size", "4000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    helpers.wait_for(lambda: list(Path("runs").glob("*/events*")), process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in errors
    assert list(Path("runs").glob("*/checkpoint.pt"))
