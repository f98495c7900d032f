"""adaptive_rr.py: the detector against an independent state machine, counts around the switch, resume, bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import ADAPTIVE, assert_same, checkpoint, scalars, stopped_run
from test_drqv2_plasticity_runs import assert_resume_is_bit_identical, make_serial_envs

import adaptive_rr as rr

SWITCHES = []  # of the official state machine, by series
EAGER = ["--rr-check-episodes", 2, "--rr-threshold", 1]  # fires at the first check: after episode 2, at step 40


def run(*flags):
    return helpers.run(rr, *flags)


@pytest.fixture
def serial(monkeypatch):
    monkeypatch.setattr(rr, "make_envs", make_serial_envs)


# --- the detector -----------------------------------------------------------------------------------------------------
class OfficialStateMachine:
    """The official code's counters, per update and per episode, written down from their description: window of 1."""

    def __init__(self, interval, threshold):
        self.interval, self.threshold = interval, threshold
        self.sum = self.count = self.episode = 0
        self.last_average, self.high = None, False

    def update(self, fau):
        if self.last_average is None:
            self.last_average = fau
        self.sum, self.count = self.sum + fau, self.count + 1

    def episode_ends(self):
        """Whether it switches now."""
        self.episode += 1
        if self.episode % self.interval == self.interval - 1:
            self.sum = self.count = 0
        if self.episode % self.interval == 0 and self.last_average is not None:
            average, switch = self.sum / self.count, False
            if abs(average - self.last_average) <= self.threshold and not self.high:
                self.high = switch = True
            self.last_average, self.sum, self.count = average, 0, 0
            return switch
        return False


@pytest.mark.parametrize("interval", [2, 3, 7])
@pytest.mark.parametrize("seed", range(10))
def test_detector_switches_when_the_official_state_machine_does(interval, seed):
    rng = np.random.default_rng(seed)
    official, detector = OfficialStateMachine(interval, 0.004), rr.PlateauDetector(interval, 1, 0.004)
    level, switches, before = 0.5, [], False
    for episode in range(1, 120):
        level += rng.normal(0, 0.004)
        faus = level + rng.normal(0, 0.002, 8) if episode > 1 else []  # the first episode only collects
        for fau in faus:
            official.update(fau)
            if detector.reference is None:
                detector.first_batch(fau)
        expected = official.episode_ends()
        if len(faus):
            check = detector.end_episode(episode, float(np.mean(faus)))
            assert (check is not None) == (episode % interval == 0)
            if check:
                assert check[0] == pytest.approx(official.last_average)
        assert expected == (detector.switched and not before)
        before = detector.switched
        switches += [episode] * expected
    assert len(switches) <= 1
    SWITCHES.append(switches)


def test_some_of_them_switched():
    assert len(SWITCHES) == 30 and 5 < sum(map(len, SWITCHES))


def switch(series, **options):
    """The episode at whose end the detector switches, or None; series[0] is also the first batch's FAU."""
    detector = rr.PlateauDetector(**options)
    detector.first_batch(series[0])
    for episode, fau in enumerate(series, start=1):
        detector.end_episode(episode, fau)
        if detector.switched:
            return episode
    return None


def test_detector_by_hand():
    assert switch([0.4] * 200) == 50  # a constant FAU fires at the first check
    assert switch([0.0, *(0.4 + 0.002 * (episode // 50) for episode in range(2, 201))]) is None  # 0.002 per check never
    assert switch([0.5, 0.25, 0.5, 0.5], check_episodes=2, threshold=0.25) == 2  # equality counts
    assert switch([0.5, 0.25, 0.5, 0.5], check_episodes=2, threshold=0.24) is None
    only_last = [0.1, 0.4, 0.9, 0.4, 0.1, 0.7]  # the episodes between do not count
    assert switch(only_last, check_episodes=2, threshold=0.01) == 4
    assert switch(only_last, check_episodes=3, threshold=0.21) == 6  # 0.9 - 0.7
    assert switch([0.1, 0.3, 0.5], check_episodes=3, window_episodes=2, threshold=0.3001) == 3  # 0.4 - 0.1
    assert switch([0.1, 0.3, 0.5], check_episodes=3, window_episodes=3, threshold=0.2001) == 3  # the whole interval
    assert switch([0.1, 0.3, 0.5], check_episodes=3, window_episodes=1, threshold=0.3001) is None


def test_detector_knows_a_plateau_and_not_a_recovery():
    decline = [0.5, 0.3] + [0.2 - 0.0004 * i for i in range(10)]
    assert switch(decline, check_episodes=2) == 6  # in the middle of a slow decline
    assert switch(decline, check_episodes=2, required_rise=0.01) is None
    assert switch([0.5, 0.35, 0.2, 0.35], check_episodes=2, threshold=0.001) == 4  # on both sides of a valley
    minimum = [0.5, 0.3, 0.3, 0.3, 0.3, 0.3, 0.4, 0.4, 0.4, 0.4]
    assert switch(minimum, check_episodes=2) == 4 and switch(minimum, check_episodes=2, required_rise=0.05) == 10


def test_detector_may_be_told_to_wait():
    detector = rr.PlateauDetector(2)
    detector.first_batch(0.4)
    for episode in range(1, 9):
        detector.end_episode(episode, 0.4, may_switch=episode > 5)
        assert detector.switched == (episode >= 6)


def test_detector_state():
    rng = np.random.default_rng(0)
    detector, other = rr.PlateauDetector(5, 3), rr.PlateauDetector(5, 3)
    detector.first_batch(0.5)
    for episode in range(1, 30):
        fau = float(rng.uniform())
        if episode == 13:
            other.load_state_dict(json.loads(json.dumps(detector.state_dict())))
        check = detector.end_episode(episode, fau)
        if episode >= 13:
            assert check == other.end_episode(episode, fau)


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_run_through_the_command_line(tmp_path):
    """As a user: the script alone, copied into an empty folder."""
    shutil.copy(rr.__file__, tmp_path / "copied.py")
    command = [sys.executable, "copied.py", *ADAPTIVE, *EAGER, "--save-model"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "step 40: FAU has settled at 0." in done.stdout
    (run_dir,) = Path("runs").iterdir()
    logged = scalars(run_dir)
    assert set(logged["adaptive_rr/fau_episode"]) == set(range(40, 121, 20))
    assert set(logged["adaptive_rr/fau_checkpoint"]) == set(logged["adaptive_rr/fau_delta"]) == {40, 80, 120}
    assert logged["adaptive_rr/switched"] == {20: 0, 40: 0, 60: 1, 80: 1, 100: 1, 120: 1}
    assert logged["charts/replay_ratio"] == {20: 0, 40: 0.5, 60: 2, 80: 2, 100: 2, 120: 2}
    (first,) = logged["adaptive_rr/fau_first"].values()
    assert abs(logged["adaptive_rr/fau_checkpoint"][40] - first) == pytest.approx(
        logged["adaptive_rr/fau_delta"][40], abs=1e-6
    )
    assert (run_dir / "model.pt").exists()
    assert json.loads((run_dir / "summary.json").read_text())["switch_step"] == 40


def counted(monkeypatch):
    """[FAU of each update's batch], and the update counts at every acting."""
    faus, updates, act, update = [], [], rr.act, rr.drqv2_update

    def counting_act(*arguments):
        updates.append(len(faus))
        return act(*arguments)

    def counting_update(*arguments):
        metrics = update(*arguments)
        faus.append(float(metrics["plasticity/fau/critic"]))
        return metrics

    monkeypatch.setattr(rr, "act", counting_act)
    monkeypatch.setattr(rr, "drqv2_update", counting_update)
    return faus, updates


@pytest.mark.parametrize("flags, switch", [
    (EAGER, 40), (["--rr-mode", "fixed-switch", "--rr-switch-step", 70], 70),
    (["--rr-mode", "fixed-switch", "--rr-switch-step", 10], 10), (["--rr-mode", "static", *EAGER], None),
    ([*EAGER, "--rr-min-step", 41], 80), ([*EAGER, "--rr-required-rise", 1], None),
    (["--rr-check-episodes", 2, "--rr-threshold", 0], None),
], ids=str)  # fmt: skip
def test_updates_before_and_after_the_switch(flags, switch, serial, monkeypatch):
    faus, updates = counted(monkeypatch)
    run_dir = run(*ADAPTIVE, *flags)
    per_step = np.diff([*updates, len(faus)])
    for step in range(120):
        low = int(step >= 30 and step % 2 == 0)
        assert per_step[step] == (low if switch is None or step < switch else 2 * (step >= 30)), step
    logged = scalars(run_dir)
    assert checkpoint(run_dir)["switch_step"] == switch
    updates.append(len(faus))
    averages = {end: np.mean(faus[updates[end - 20] : updates[end]]) for end in range(40, 121, 20)}
    assert logged["adaptive_rr/fau_episode"] == pytest.approx(averages, rel=1e-5)  # each of its own episode alone
    if "--rr-check-episodes" in flags:
        checks = {40: faus[0], 80: averages[40], 120: averages[80]}
        differences = {end: abs(averages[end] - reference) for end, reference in checks.items()}
        assert logged["adaptive_rr/fau_delta"] == pytest.approx(differences, abs=1e-6)


def test_ratios_by_flag(serial, monkeypatch):
    faus, _ = counted(monkeypatch)
    run(*ADAPTIVE, "--rr-mode", "static", "--rr-low", 3)
    assert len(faus) == 3 * 90
    faus.clear()
    run(*ADAPTIVE, "--rr-mode", "fixed-switch", "--rr-switch-step", 100, "--rr-low", 1, "--rr-high", 4)
    assert len(faus) == 70 + 4 * 20


@pytest.mark.parametrize("flags", [
    [*EAGER, "--rr-min-step", 75], ["--rr-mode", "fixed-switch", "--rr-switch-step", 70], ["--rr-mode", "static"],
    [*EAGER, "--reset-every", 45, "--redo-period-gradient-steps", 20, "--redo-batch-size", 8, "--redo-tau", 0.5],
    ["--rr-check-episodes", 4, "--rr-window-episodes", 3, "--rr-threshold", 1],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("stop", [60, 73, 85])
def test_resume_across_the_switch_is_bit_identical(flags, stop, serial):
    assert_resume_is_bit_identical(rr, stop, *ADAPTIVE, *flags)


def test_static_is_drqv2_of_the_study(serial, monkeypatch):
    """The same numbers as drqv2_plasticity.py, bit for bit."""
    import drqv2_plasticity as drq

    monkeypatch.setattr(drq, "make_envs", make_serial_envs)
    ours = checkpoint(run(*ADAPTIVE, "--rr-mode", "static"))
    theirs = checkpoint(helpers.run(drq, *helpers.PIXELS))
    assert_same(ours["agent"], theirs["agent"])
    assert_same(ours["optimizers"], theirs["optimizers"])


@pytest.mark.parametrize("flags", [
    [], ["--reset-every", 50], ["--reset-every", 50, "--reset-scope", "all"],
    ["--reset-every", 50, "--reset-modules", "actor"], ["--reset-every", 50, "--no-reset-optimizer"],
    ["--redo-period-gradient-steps", 10, "--redo-batch-size", 8, "--redo-tau", 0.8],
    ["--redo-period-gradient-steps", 10, "--redo-batch-size", 4, "--redo-tau", 0.8],
    ["--redo-period-gradient-steps", 10, "--redo-batch-size", 8, "--redo-tau", 0.8, "--redo-modules", "actor"],
    ["--tau", 0.5], ["--stddev-clip", 0.01], ["--shift-pad", 1], ["--learning-rate", 0.01], ["--gamma", 0.5],
], ids=str)  # fmt: skip
def test_every_switch_changes_the_run(flags, serial, outcomes):
    helpers.assert_new_outcome(rr, ADAPTIVE, flags, outcomes)


def test_learning_that_begins_after_a_check_was_due(serial, monkeypatch):
    """Episode 2, at step 40, has no gradient step: no check follows it. Episode 4 compares with the first batch."""
    faus, updates = counted(monkeypatch)
    run_dir = run(*ADAPTIVE, *EAGER, "--learning-starts", 50)
    logged = scalars(run_dir)
    assert set(logged["adaptive_rr/fau_checkpoint"]) == {80, 120} and checkpoint(run_dir)["switch_step"] == 80
    delta = abs(np.mean(faus[updates[60] : updates[80]]) - faus[0])
    assert logged["adaptive_rr/fau_delta"][80] == pytest.approx(delta, abs=1e-6)


def test_resume_without_the_replay_begins_the_episode_again(serial):
    part = stopped_run(rr, 53, *ADAPTIVE, "--no-checkpoint-replay", "--rr-check-episodes", 2)
    run("--resume", part, "--total-timesteps", 160)
    logged = scalars(part)
    assert set(logged["charts/episodic_return"]) == {20, 40, *range(73, 160, 20)}  # 53 + 20, ...
    assert set(logged["adaptive_rr/fau_episode"]) == {40, 93, 113, 133, 153}  # it learns again from step 83 on


def test_nothing_waits_for_the_device_at_every_update(serial, monkeypatch):
    reads, read = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: reads.append(0) or read(tensor))
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    run(*ADAPTIVE, "--rr-mode", "static", "--rr-low", 2, "--log-every", 1000)
    assert len(reads) == 1 + 5  # the first batch, and once per episode with gradient steps, in 180 updates


@pytest.mark.parametrize("flags, message", [
    (["--rr-check-episodes", 1], "--rr-check-episodes 1: must be at least 2"),
    (["--rr-window-episodes", 51], "--rr-window-episodes 51: must be at most --rr-check-episodes 50"),
    (["--rr-mode", "static", "--rr-high", 4], "--rr-high 4.0: is for runs that switch"),
    (["--rr-mode", "static", "--rr-min-step", 4], "--rr-min-step 4: is for --rr-mode adaptive only"),
    (["--rr-low", 2], "--rr-low 2.0: must be less than --rr-high 2.0"),
    (["--rr-high", 0.4], "--rr-high 0.4: must be k or 1/k"),
    (["--rr-switch-step", 60], "--rr-switch-step 60: must be given with --rr-mode fixed-switch, and only then"),
    (["--rr-mode", "fixed-switch"], "--rr-switch-step None: must be given with --rr-mode fixed-switch, and only then"),
    (["--rr-mode", "fixed-switch", "--rr-switch-step", 120], "--rr-switch-step 120: must lie between 1 and"),
    (["--rr-threshold", -1], "--rr-threshold -1.0: must not be negative"),
    (["--rr-threshold", "nan"], "--rr-threshold nan: must be a finite number"),
    (["--redo-tau", 0.5], "--redo-tau 0.5: does nothing without --redo-period-gradient-steps"),
    (["--batch-size", 31], "--batch-size 31: must be at most --learning-starts 30"),
    (["--env-id", "dm_control/walker-rum-v0"], "did you mean dm_control/walker-run-v0?"),
], ids=lambda value: " ".join(str(v) for v in value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*ADAPTIVE, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_update_is_captured_once(monkeypatch):
    captures, capture = [], rr.capture_update
    monkeypatch.setattr(rr, "capture_update", lambda *a: captures.append(0) or capture(*a))
    run(*ADAPTIVE, *EAGER, "--cudagraphs", "--device", "cuda")
    assert len(captures) == 1
