"""adaptive_rr.py: the detector against an independent state machine, counts around the switch, resume, bad input."""

import copy
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import (
    ADAPTIVE,
    SerialEnvironments,
    assert_golden,
    assert_same,
    checkpoint,
    scalars,
)

import adaptive_rr as rr

EAGER = ["--rr-check-episodes", 2, "--rr-threshold", 1]  # fires at the first check: after episode 2, at step 40
STATIC = ["--rr-high", 0.5]
GOLDEN = {
    "losses/critic": {40: 15.58677, 120: 15.99493, 200: 17.3656},
    "losses/actor": {40: 0.2712838, 120: -0.1501851, 200: -0.3925545},
    "losses/q_values": {40: 0.101447, 120: 0.493703, 200: 0.8964438},
    "fau/critic": {40: 0.5382813, 120: 0.5328125, 200: 0.4941894},
    "charts/episodic_return": {40: 14.48688, 120: 28.1841, 200: 17.25385},
}


def run(*flags):
    return helpers.run(rr, *flags)


@pytest.fixture
def serial(monkeypatch):
    monkeypatch.setattr(rr, "Environments", SerialEnvironments)


# --- the fraction of active units and its detector --------------------------------------------------------------------
def test_fau_of_a_foreign_network():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU())
    with torch.no_grad():
        network[0].bias[:] = torch.tensor([9.0, -9.0, 9.0, -9.0])  # two of four are active
        network[2].weight[:], network[2].bias[:] = 0, torch.tensor([1.0, 0.0])  # one of two, 0 is not active
    x = torch.rand(5, 3)
    hidden = network[:2](x)
    assert rr.fau([hidden]) == 0.5 and rr.fau([hidden, network(x)]) == pytest.approx((10 + 5) / (20 + 10))


class OfficialStateMachine:
    """The official code's counters, per update and per episode, written down from their description."""

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


def test_detector_switches_when_the_official_state_machine_does():
    switched = 0
    for interval, seed in itertools.product([2, 3, 7], range(10)):
        rng = np.random.default_rng(seed)
        official, detector = OfficialStateMachine(interval, 0.004), rr.PlateauDetector(interval, 0.004)
        level, before = 0.5, False
        for episode in range(1, 120):
            level += rng.normal(0, 0.004)
            faus = level + rng.normal(0, 0.002, 8) if episode > 1 else []  # the first episode only collects
            for i, fau in enumerate(faus):
                official.update(fau)
                if episode == 2 and i == 0:
                    detector.first_batch(fau)
            expected = official.episode_ends()
            difference = detector.end_episode(float(np.mean(faus)) if len(faus) else None)
            assert (difference is not None) == (episode % interval == 0)
            if difference is not None:
                assert detector.reference == pytest.approx(official.last_average)
            assert expected == (detector.switched and not before)
            before = detector.switched
        switched += before
    assert switched > 5


def switch(series, **options):
    """The episode at whose end the detector switches, or None; series[0] is also the first batch's FAU."""
    detector = rr.PlateauDetector(**options)
    detector.first_batch(series[0])
    for episode, fau in enumerate(series, start=1):
        detector.end_episode(fau)
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


def test_detector_knows_a_plateau_and_not_a_recovery():
    decline = [0.5, 0.3] + [0.2 - 0.0004 * i for i in range(10)]
    assert switch(decline, check_episodes=2) == 6  # in the middle of a slow decline
    assert switch([0.5, 0.35, 0.2, 0.35], check_episodes=2, threshold=0.001) == 4  # on both sides of a valley


def test_episodes_without_a_gradient_step_count_but_are_not_checked():
    detector = rr.PlateauDetector(2, 0.1)
    assert detector.end_episode(None) is None and detector.end_episode(None) is None
    detector.first_batch(0.5)
    assert detector.end_episode(0.9) is None and detector.end_episode(0.9) == pytest.approx(0.4)
    assert detector.end_episode(0.9) is None and detector.end_episode(0.85) == pytest.approx(0.05) and detector.switched


def test_detector_state():
    rng = np.random.default_rng(0)
    detector, other = rr.PlateauDetector(5), rr.PlateauDetector(5)
    detector.first_batch(0.5)
    for episode in range(1, 30):
        fau = float(rng.uniform())
        if episode == 13:
            other.load_state_dict(json.loads(json.dumps(detector.state_dict())))
        difference = detector.end_episode(fau)
        if episode >= 13:
            assert difference == other.end_episode(fau)


@pytest.mark.parametrize("ratio", [0.25, 1 / 3, 0.5, 0.7, 1, 1.5, 2, 3])
def test_gradient_steps_come_evenly(ratio):
    due = [rr.updates_due(step, ratio) for step in range(1000)]
    assert set(due) <= {math.floor(ratio), math.ceil(ratio)} and abs(sum(due) - 1000 * ratio) <= 1
    assert due[0] == math.ceil(ratio)


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_run_through_the_command_line(tmp_path):
    """As a user: the script alone, copied into an empty folder."""
    shutil.copy(rr.__file__, tmp_path / "copied.py")
    command = [sys.executable, "copied.py", *ADAPTIVE, *EAGER, "--save-model"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "the critic's FAU has settled at 0." in done.stderr and "mean return" in done.stdout
    (run_dir,) = Path("runs").iterdir()
    files = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
    assert files == {"args.json", "checkpoint.pt", "copied.py", "lock", "model.pt", "summary.json"}
    logged = scalars(run_dir)
    ends = range(20, 121, 20)
    assert set(logged["fau/critic"]) == set(ends) - {20}
    assert set(logged["adaptive_rr/difference"]) == {40, 80, 120}
    assert logged["adaptive_rr/switched"] == {20: 0, 40: 0, 60: 1, 80: 1, 100: 1, 120: 1}
    assert logged["charts/replay_ratio"] == {20: 0, 40: 0.25, 60: 2, 80: 2, 100: 2, 120: 2}  # learns from step 30 on
    assert logged["charts/episodic_length"] == dict.fromkeys(ends, 20)
    assert set(logged["eval/episodic_return"]) == {0, 60, 120}
    assert json.loads((run_dir / "summary.json").read_text())["gradient_steps"] == 5 + 2 * 80


def counted(monkeypatch):
    """[FAU of each update's batch], and the update counts at every acting."""
    faus, updates, act, update = [], [], rr.act, rr.update

    def counting_act(*arguments):
        updates.append(len(faus))
        return act(*arguments)

    def counting_update(*arguments):
        metrics = update(*arguments)
        faus.append(float(metrics["fau/critic"]))
        return metrics

    monkeypatch.setattr(rr, "act", counting_act)
    monkeypatch.setattr(rr, "update", counting_update)
    return faus, updates


@pytest.mark.parametrize("flags, switch", [
    (EAGER, 40), (["--rr-switch-step", 70], 70), (["--rr-switch-step", 10], 10), (STATIC, None),
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
    updates.append(len(faus))
    averages = {end: np.mean(faus[updates[end - 20] : updates[end]]) for end in range(40, 121, 20)}
    assert logged["fau/critic"] == pytest.approx(averages, rel=1e-5)  # each of its own episode alone
    if "--rr-check-episodes" in flags:
        differences = {40: averages[40] - faus[0], 80: averages[80] - averages[40], 120: averages[120] - averages[80]}
        differences = {end: abs(difference) for end, difference in differences.items()}
        assert logged["adaptive_rr/difference"] == pytest.approx(differences, abs=1e-6)
        assert logged["adaptive_rr/reference"][40] == pytest.approx(faus[0])


def test_ratios_by_flag(serial, monkeypatch):
    faus, _ = counted(monkeypatch)
    run(*ADAPTIVE, "--rr-low", 3, "--rr-high", 3)
    assert len(faus) == 3 * 90
    faus.clear()
    run(*ADAPTIVE, "--rr-switch-step", 100, "--rr-low", 1, "--rr-high", 4)
    assert len(faus) == 70 + 4 * 20


def test_learning_that_begins_after_a_check_was_due(serial, monkeypatch):
    """Episode 2, at step 40, has no gradient step: no check follows it. Episode 4 compares with the first batch."""
    faus, updates = counted(monkeypatch)
    logged = scalars(run(*ADAPTIVE, *EAGER, "--learning-starts", 50))
    assert set(logged["adaptive_rr/difference"]) == {80, 120}
    assert logged["adaptive_rr/switched"] == {20: 0, 40: 0, 60: 0, 80: 0, 100: 1, 120: 1}
    difference = abs(np.mean(faus[updates[60] : updates[80]]) - faus[0])
    assert logged["adaptive_rr/difference"][80] == pytest.approx(difference, abs=1e-6)


def test_nothing_waits_for_the_device_at_every_update(serial, monkeypatch):
    reads, read = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: reads.append(0) or read(tensor))
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    run(*ADAPTIVE, "--rr-low", 2)
    assert len(reads) == 1 + 8 * 5  # the first batch, and 8 metrics per episode with gradient steps, in 180 updates


def test_a_golden_run(serial):
    """Losses of 200 steps, stored on 2026-11-24 from a run that was bit-identical to the script's first version."""
    flags = ["--env-id", "pixel_env:Dot64-v0", "--total-timesteps", 200]
    assert_golden(scalars(run(*ADAPTIVE, *EAGER, *flags)), GOLDEN)


@pytest.mark.parametrize("env_id", ["pixel_env:Dot64-v0", "pixel_env:EndingDot-v0"])
def test_static_is_drqv2_of_the_study(env_id, serial, monkeypatch):
    """The same numbers as drqv2_plasticity.py, bit for bit."""
    import drqv2_plasticity as drq

    monkeypatch.setattr(drq, "Environments", SerialEnvironments)
    runs = run(*ADAPTIVE, *STATIC, "--env-id", env_id), helpers.run(drq, *helpers.PIXELS, "--env-id", env_id)
    ours, theirs = map(scalars, runs)
    shared = ours.keys() & theirs.keys()
    assert {"fau/encoder", "eval/episodic_length", "charts/episodic_return"} <= shared
    assert all(ours[tag] == theirs[tag] for tag in shared)
    ours, theirs = map(checkpoint, runs)
    assert_same(ours["agent"], theirs["agent"])
    for part in ("optimizer0", "optimizer1", "optimizer2"):
        assert_same(ours[part]["state"], theirs[part]["state"])


@pytest.mark.parametrize("flags", [
    EAGER, ["--tau", 0.5], ["--stddev-clip", 0.01], ["--shift-pad", 1], ["--learning-rate", 0.01],
    ["--gamma", 0.5], ["--n-step", 1], ["--precision", "bfloat16"], ["--batch-size", 16], ["--stddev-end", 0.5],
], ids=str)  # fmt: skip
def test_every_switch_changes_the_run(flags, serial, outcomes):
    helpers.assert_new_outcome(rr, ADAPTIVE, flags, outcomes)


def test_bfloat16_and_compile_change_digits_but_not_results(serial, quick_compiler):
    """One gradient step on the same batch."""
    results = []
    for flags in ([], ["--precision", "bfloat16"], ["--compile"]):
        run_dir = run(*ADAPTIVE, "--total-timesteps", 40, "--learning-starts", 39, "--rr-low", 2, *flags)
        results.append({tag: list(values.values())[0] for tag, values in scalars(run_dir).items() if "losses" in tag})
    assert results[0] == pytest.approx(results[1], rel=0.05, abs=0.01) and results[0] != results[1]
    assert results[0] == pytest.approx(results[2], rel=1e-3, abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# --- resume -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [EAGER, ["--rr-switch-step", 70], [*STATIC, "--n-step", 1]], ids=str)
@pytest.mark.parametrize("dies", [61, 73, 95])
def test_killed_and_resumed_is_bit_identical(flags, dies, serial):
    helpers.assert_killed_and_resumed_is_the_same(rr, dies, *ADAPTIVE, *flags)


@pytest.mark.parametrize("name, call, step", helpers.SIGNALS)
def test_a_signal_cuts_the_episode_saves_and_the_run_goes_on(name, call, step, serial, capsys):
    helpers.signalled_run(rr, name, call, step, capsys, *ADAPTIVE)


def test_a_static_run_never_switches(serial, capsys):
    """Though its FAU has settled: what the detector would do is logged, and no more."""
    logged = scalars(run(*ADAPTIVE, *EAGER, *STATIC))
    assert set(logged["adaptive_rr/switched"].values()) == {0} and set(logged["adaptive_rr/difference"]) >= {40}
    assert "the replay ratio is now" not in capsys.readouterr().err


def test_resume_without_the_replay_refills_it(serial, capsys):
    part = helpers.stopped_run(rr, 53, *ADAPTIVE, "--checkpoint-replay", "never", "--rr-check-episodes", 2)
    assert "replay" not in checkpoint(part) and checkpoint(part)["detector"]["episodes"] == 2  # the cut one is none
    run("--resume", part, "--total-timesteps", 160)
    assert "it is refilled before learning goes on" in capsys.readouterr().err
    logged = scalars(part)
    assert set(logged["charts/episodic_return"]) == {20, 40, *range(73, 160, 20)}  # 53 + 20, ...
    assert set(logged["fau/critic"]) == {40, 53, 93, 113, 133, 153, 160}  # it learns again from step 83 on


def test_a_longer_run_goes_on_where_the_shorter_one_ended(serial):
    part = run(*ADAPTIVE)
    run("--resume", part, "--total-timesteps", 200)
    assert checkpoint(part)["global_step"] == 200 and set(scalars(part)["eval/episodic_return"]) == {
        0,
        60,
        120,
        200,
        180,
    }


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, message", [
    (["--rr-check-episodes", 1], "--rr-check-episodes 1: must lie between 2 and"),
    (["--rr-low", 0], "--rr-low 0.0: must lie between 1e-06 and"),
    (["--rr-switch-step", 0], "--rr-switch-step 0: must lie between 1 and"),
    (["--rr-switch-step", 120], "--rr-switch-step 120: must be less than --total-timesteps 120"),
    (["--rr-switch-step", 60, *STATIC], "--rr-switch-step 60: does nothing with --rr-high equal to --rr-low"),
    (["--env-id", "pixel_env:LimitedDot-v0", "--n-step", 11], "--n-step 11: must be at most 10, the steps of an"),
    (["--env-id", "pixel_env:MatrixDot-v0"], "its actions are no vectors, but of shape (2, 3)"),
    (["--rr-switch-step", 60, "--rr-threshold", 0.1], "--rr-threshold 0.1: does nothing with --rr-switch-step"),
    (["--rr-threshold", -1], "--rr-threshold -1.0: must lie between 0 and"),
    (["--rr-threshold", "nan"], "--rr-threshold nan: must lie between 0 and"),
    (["--gamma", 1.1], "--gamma 1.1: must lie between 0 and 1"), (["--seed", 2**32], "--seed 4294967296: must lie"),
    (["--image-size", 14], "--image-size 14: must lie between 15"),
    (["--buffer-size", 6], "--buffer-size 6: must be at least --n-step 3 + 4"),
    (["--hidden-dim", 10**9], "--hidden-dim 1000000000: the run needs about 8000000"),
    (["--cudagraphs", "--device", "cpu"], "--cudagraphs True: needs --device cuda, not cpu"),
    (["--env-id", "dm_control/walker-rum-v0"], "Did you mean: `walker-run`?"),
    (["--env-id", "CartPole-v1"], "--env-id CartPole-v1: cannot be played through its pixels"),
    (["--resume", "nowhere"], "--resume nowhere: is not the folder of a run that this script can continue"),
], ids=lambda value: " ".join(str(v) for v in value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*ADAPTIVE, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1
    assert not Path("runs").exists()


# --- environments -----------------------------------------------------------------------------------------------------
def test_frames_of_another_size_are_averaged_over_areas():
    frame = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    small = rr.to_pixels(frame, 2)
    assert small.shape == (3, 2, 2) and small.dtype == np.uint8
    assert small[1, 0, 1] == round(float(frame[:2, 3:, 1].mean()))
    same = rr.to_pixels(frame[:, :4], 4)
    assert np.array_equal(same, frame[:, :4].transpose(2, 0, 1))


def test_an_environment_without_a_time_limit_gets_one(serial, monkeypatch, capsys):
    monkeypatch.setattr(rr, "EPISODE_LIMIT", 15)
    logged = scalars(run(*ADAPTIVE, "--env-id", "pixel_env:EndlessDot-v0"))
    assert set(logged["charts/episodic_length"].values()) == {15}
    assert capsys.readouterr().out.count("its episodes end after 15 steps at the latest") == 1
    logged = scalars(run(*ADAPTIVE, "--env-id", "pixel_env:LimitedDot-v0"))
    assert set(logged["charts/episodic_length"].values()) == {10} and "time limit" not in capsys.readouterr().out


def test_actions_are_scaled_and_repeated():
    env = rr.make_env("pixel_env:Dot-v0", 24)
    env.reset(seed=0)
    seen, step = [], env.unwrapped.step
    env.unwrapped.step = lambda action: seen.append(action) or step(action)
    _, reward, *_ = env.step(np.array([0.5, -1.0], np.float32))
    assert len(seen) == rr.ACTION_REPEAT and np.allclose(seen, [[0.5, -2.0]] * 2) and 1 < reward <= 2


# --- CUDA graphs, as far as they can be tested without a GPU ----------------------------------------------------------
def test_capture_learns_what_the_update_does(monkeypatch):
    """A stand-in for CUDA: a graph is the update's call, and its replay is the same call on the same tensors."""

    class Graph:
        def replay(self):
            self.out.update({k: v for k, v in self.function().items()})

    class Capturing:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            self.before = [copy.deepcopy(m.state_dict()) for m in modules]

        def __exit__(self, *_):  # capturing computes nothing
            for module, state in zip(modules, self.before):
                module.load_state_dict(state)
            self.graph.function, self.graph.out = lambda: update(static_batch[0]), metrics_of[0]

    monkeypatch.setattr(torch.cuda, "Stream", lambda: type("S", (), {"wait_stream": lambda self, other: None})())
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: __import__("contextlib").nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    static_batch, metrics_of, learned = [None], [{}], []
    for captured in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer, modules = torch.optim.SGD(model.parameters(), lr=0.1), [model]

        def update(batch):
            static_batch[0] = batch
            (x,) = batch
            loss = model(x).square().mean()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            return {"loss": loss.detach()}

        learn = rr.capture(update, [optimizer]) if captured else update
        for i in range(7):
            learn([torch.full((2, 3), float(i))])
        learned.append(model.weight.detach().clone())
    assert torch.equal(*learned)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_captured_equals_eager():
    flags = [*ADAPTIVE, *EAGER, "--device", "cuda"]
    eager, captured = (checkpoint(run(*flags, *more))["agent"] for more in ([], ["--cudagraphs"]))
    for name in eager:
        torch.testing.assert_close(eager[name], captured[name], atol=1e-4, rtol=1e-3)
