"""What the tests of whole runs share: running a script's command line, and comparing what runs left behind."""

import gc
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium
import plotting
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import adaptive_rr
import crl_deep
import drm
import drqv2_plasticity
import redo_dqn_atari


def benchmark(path):
    """A module under benchmark/ by its path there, as drm/plot.py: every folder has modules of the same names."""
    return plotting.load_module(path)


# Tiny runs: a few seconds each
POINT = (
    "--num-envs 4 --episode-length 20 --unroll-length 10 --gradient-steps 3 --batch-size 8 --width 16 "
    "--learning-starts 80 --total-timesteps 600 --buffer-size 400 --eval-episodes 3 --eval-every 80"
).split()
ATARI_DQN = (
    "--width 0.125 --padding valid --batch-size 8 --learning-starts 60 --total-timesteps 240 --buffer-size 250 "
    "--replay-ratio 1 --exploration-steps 100 --max-episode-steps 50 --target-network-frequency 40 --eval-every 120 "
    "--eval-steps 10 --eval-envs 1 --dormant-every 60 --dormant-batch-size 8 --rank-batch-size 16 --log-every 20 "
    "--redo-period-gradient-steps 30 --reset-period-gradient-steps 50"
).split()
ATARI = [*ATARI_DQN, "--redo-batch-size", "8"]
ADAPTIVE = (
    "--env-id pixel_env:Dot-v0 --image-size 24 --hidden-dim 16 --feature-dim 8 --batch-size 8 --learning-starts 30 "
    "--exploration-steps 30 --total-timesteps 120 --stddev-steps 100 --eval-every 60 --eval-episodes 2"
).split()
PIXELS = [*ADAPTIVE, "--plasticity-every", "40", "--plasticity-batch-size", "8"]
DRM = [*ADAPTIVE, "--perturb-every", "50"]
TINY = {  # script -> flags
    crl_deep: POINT, redo_dqn_atari: ATARI, drqv2_plasticity: PIXELS, adaptive_rr: ADAPTIVE, drm: DRM,
}  # fmt: skip


def run(script, *flags):
    """The script's run folder, trained in this process."""
    gc.collect()  # a run that a test broke off holds the lock of its folder until its frames are gone
    return script.train(script.parse_args([str(flag) for flag in flags]))


def ring_of(script):
    """The class of its replay."""
    names = ("JointReplay", "PixelReplay", "FrameReplay", "TransitionReplay", "GoalReplay", "Replay")
    return next(name for name in names if hasattr(script, name))


def stopped_run(script, step, *flags):
    """The folder of a run that gets a SIGTERM while it takes this step (crl_deep.py: the last one of its unroll)."""
    ring = getattr(script, ring_of(script))
    add, count = ring.add, []

    def stopping(self, *values):
        add(self, *values)
        count.append(sys._getframe(1).f_code.co_name != "add_first")
        if sum(count) == step and count[-1]:
            os.kill(os.getpid(), signal.SIGTERM)

    before = set(Path("runs").iterdir()) if Path("runs").exists() else set()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(ring, "add", stopping)
        run(script, *flags)
    assert stopped.value.code == 143
    if "--resume" in flags:
        return flags[flags.index("--resume") + 1]
    (part,) = set(Path("runs").iterdir()) - before
    return part


def run_and_replay(script, *flags):
    """A run's folder, and what its replay held at the end (a finished run's checkpoint has none)."""
    ring, kept = getattr(script, ring_of(script)), []

    class Kept(ring):
        def __init__(self, *values, **options):
            super().__init__(*values, **options)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, ring_of(script), Kept)
        run_dir = run(script, *flags)
    return run_dir, kept[-1].state_dict()


class SerialEnvironments:
    """As a pixel script's Environments, in this process: a step happens only when its result is asked for."""

    def __init__(self, args, num_envs, run):
        make = partial(adaptive_rr.make_env, args.env_id, args.image_size)
        self.envs, self.num_envs = gymnasium.vector.SyncVectorEnv([make] * num_envs), num_envs

    def reset(self, seeds):
        return self.envs.reset(seed=seeds)

    def step_async(self, action):
        self.action = action.copy()

    def step_wait(self):
        return self.envs.step(self.action)

    def close(self):
        self.envs.close()


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the script's own runs after it."""


def killed_run(script, step, *flags):
    """The folder of a run that dies in this step, counted from its start or resume."""
    ring = getattr(script, ring_of(script))
    add, count = ring.add, []

    def dying(self, *values):
        count.append(sys._getframe(1).f_code.co_name != "add_first")
        if sum(count) == step and count[-1]:
            sys._getframe(1).f_locals["run"].writer.flush()  # so that there is something to drop
            raise Killed
        add(self, *values)

    before = set(Path("runs").iterdir()) if Path("runs").exists() else set()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ring, "add", dying)
        run(script, *flags)
    for number, handler in handlers.items():  # those of the run would keep it alive, and its folder locked
        signal.signal(number, handler)
    if "--resume" in flags:
        return flags[flags.index("--resume") + 1]
    (part,) = set(Path("runs").iterdir()) - before
    return part


def assert_killed_and_resumed_is_the_same(script, dies, *flags, every=15, saved=None, again=(23, 20)):
    """Dies in this step, when the run had been saved at step `saved` (or at the end of an episode of 20 steps), and
    once more in step again[0] of the resumed run, when it had been saved again[1] steps later -> its folder."""
    flags = [*flags, "--checkpoint-every", every]
    saved = (dies - 1) // 20 * 20 if saved is None else saved
    whole, replay = run_and_replay(script, *flags)
    part = killed_run(script, dies, *flags)
    assert checkpoint(part)["global_step"] == saved
    assert killed_run(script, again[0], "--resume", part) == part
    assert checkpoint(part)["global_step"] == saved + again[1]
    _, resumed = run_and_replay(script, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert_same(replay, resumed)
    assert scalars(whole) == scalars(part)
    return part


def assert_it_ends_when_it_diverges(script, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(script, *flags, "--learning-rate", 1e12, "--checkpoint-every", 1)
    (run_dir,) = Path("runs").iterdir()
    assert stopped.value.code == 1 and "is not finite" in capsys.readouterr().err and (run_dir / "diverged.pt").exists()
    assert not (run_dir / "summary.json").exists()


def at_call(monkeypatch, where, name, number, action):
    """Calls action() before the number-th call of where.name."""
    function, count = getattr(where, name), []

    def acting(*values, **options):
        count.append(0)
        if len(count) == number:
            action()
        return function(*values, **options)

    monkeypatch.setattr(where, name, acting)


# In the third episode's reset, in acting and in a step of it, and in the reset and a step of evaluations: the function,
# which call of it, and the step at which the run is then saved
SIGNALS = [
    ("reset", 4, 40), ("act", 47, 46), ("step_wait", 62, 42), ("reset", 5, 60), ("step_wait", 82, 60), ("reset", 1, 0),
]  # fmt: skip


def signalled_run(script, name, call, step, capsys, *flags):
    """A pixel run of 120 steps that gets a SIGTERM there, cuts its episode, saves, and is resumed -> its scalars."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        where = script if name == "act" else SerialEnvironments
        at_call(patch, where, name, call, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(script, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 143 and "SIGTERM; saved as checkpoint.pt; to continue: --resume runs/" in printed
    (run_dir,) = Path("runs").iterdir()
    saved = checkpoint(run_dir)
    assert saved["global_step"] == step and saved["episode"] == math.ceil(step / 20)
    run(script, "--resume", run_dir)
    assert checkpoint(run_dir)["global_step"] == 120 and (run_dir / "summary.json").exists()
    logged = scalars(run_dir)
    assert set(logged["charts/episodic_length"]) == {*range(20, step + 1, 20), *range(step + 20, 121, 20)}
    assert set(logged["eval/episodic_return"]) == {0, 60 + step % 20, 120}
    return logged


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def assert_same(a, b, where="checkpoint"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "walltime":
                assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b), where


def assert_new_outcome(script, flags, more, outcomes):
    """Each of [] and `more` makes the script learn what no other flags in `outcomes` (flags: outcome) made it learn."""
    for given in ([], more):
        if str(given) not in outcomes:
            learned = checkpoint(run(script, *flags, *given))["agent"]
            outcome = sum(float(value.double().sum()) for value in learned.values() if value.isfinite().all())
            assert outcome not in outcomes.values()
            outcomes[str(given)] = outcome


def scalars(run_dir):
    """tag -> {global_step: value}, without the clocks."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    clocks = ("charts/SPS", "charts/gradient_steps_per_second", "charts/walltime")
    return {t: {e.step: e.value for e in events.Scalars(t)} for t in events.Tags()["scalars"] if t not in clocks}


def assert_golden(logged, golden):
    """Logged values are the stored ones {tag: {step: value}}: the first of a tag to 1e-4, the later ones to a tenth,
    because rounding, which differs between CPUs, grows (with AVX-512 by 200 steps to 0.7%, in crl_deep.py to 3%)."""
    for tag, values in golden.items():
        for i, (step, value) in enumerate(values.items()):
            tolerance = dict(rel=0.1, abs=0.02) if i else dict(rel=1e-4)
            assert logged[tag][step] == pytest.approx(value, **tolerance), (tag, step)


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline
        time.sleep(0.02)
