"""What holds for every script through its command line: interruptions, full disks, resume, tracking, no such device."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
import unittest.mock
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import moviepy
import numpy as np
import pytest
import test_drq_eps_atari
import test_redo_sac
import torch
import torch.utils.tensorboard
from helpers import TINY, assert_same, checkpoint, killed_run, ring_of, run, scalars, stopped_run, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import adaptive_rr as rr
import crl_deep as crl
import drm
import drm_adroit as adroit
import drm_metaworld as metaworld
import drq_eps_atari as drq_eps
import drqv2_frozen_encoder as frozen
import drqv2_plasticity as drq
import redo_dqn_atari as redo
import redo_sac as sac

every_script = pytest.mark.parametrize("script, flags", TINY.items(), ids=lambda value: getattr(value, "SCRIPT", ""))
ENDLESS = {
    crl: ["--total-timesteps", "10000000", "--buffer-size", "4000"], redo: ["--total-timesteps", "10000000"],
    drq: ["--total-timesteps", "10000000", "--buffer-size", "4000"],
    rr: ["--total-timesteps", "10000000", "--buffer-size", "4000"],
    drm: ["--total-timesteps", "10000000", "--buffer-size", "4000"],
}  # fmt: skip
# Of what is the same text in all of them: two that differ in all else
two_scripts = pytest.mark.parametrize("script, flags", [(crl, TINY[crl]), (drm, TINY[drm])], ids=["crl_deep", "drm"])
any_script = pytest.mark.parametrize("script", TINY, ids=lambda script: script.SCRIPT)
PIXEL_SCRIPTS = (drq, rr, drm)
pixel_scripts = pytest.mark.parametrize("script", PIXEL_SCRIPTS, ids=lambda script: script.SCRIPT)
RESUMED_STEPS = 80  # a whole number of training steps of every script


def start(script, *flags):
    command = [sys.executable, script.__file__, *TINY[script], *ENDLESS[script], *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@any_script
def test_signals_save_and_exit(script):
    number = signal.SIGINT if script is redo else signal.SIGTERM  # the same lines handle both, in all scripts
    process = start(script, "--checkpoint-every", "40")
    wait_for(lambda: list(Path("runs").glob("*/checkpoint.pt")), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in errors and "saving; once more" in errors
    (run_dir,) = Path("runs").iterdir()
    saved = checkpoint(run_dir)
    assert saved["global_step"] > 0
    resumed = run(script, "--resume", run_dir, "--total-timesteps", saved["global_step"] + RESUMED_STEPS)
    assert checkpoint(resumed)["global_step"] == saved["global_step"] + RESUMED_STEPS


@any_script
def test_killed_at_any_moment_leaves_a_whole_checkpoint(script):
    """Once; -m slow kills twenty times."""
    process = start(script, "--checkpoint-every", "40")
    wait_for(lambda: list(Path("runs").glob("*/checkpoint.pt")), process)
    time.sleep(np.random.default_rng().uniform(0, 0.5))
    process.kill()
    process.communicate()
    (run_dir,) = Path("runs").iterdir()
    before = checkpoint(run_dir)
    steps = before["global_step"] + 2 * RESUMED_STEPS
    run(script, "--resume", run_dir, "--total-timesteps", steps)
    after = checkpoint(run_dir)
    assert after["global_step"] == steps and after["gradient_steps"] > before["gradient_steps"]


@every_script
def test_a_full_disk_keeps_the_old_checkpoint(script, flags, capsys, monkeypatch):
    save, steps = torch.save, []

    def full(content, file):
        if len(steps) == 2:
            Path(getattr(file, "name", file)).write_bytes(b"half a che")
            raise OSError(28, "No space left on device")
        steps.append(content["global_step"])
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        run(script, *flags, "--checkpoint-every", 40)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stopped.value.code == 1 and len(lines) == 1 and "No space left on device" in lines[0]
    (run_dir,) = Path("runs").iterdir()
    assert checkpoint(run_dir)["global_step"] == steps[1] and not list(run_dir.glob("*.tmp"))


@every_script
@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no CUDA device")
@pytest.mark.parametrize("flag", ["--device", "--buffer-device"])
def test_missing_cuda(script, flags, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(script, flag, "cuda")
    assert stopped.value.code == 2 and f"{flag} cuda: torch sees no such device" in capsys.readouterr().err


@pytest.mark.parametrize("script", [s for s in TINY if s is not crl], ids=lambda script: script.SCRIPT)
def test_a_refill_that_is_interrupted_goes_on(script, monkeypatch):
    """Resumed without a replay, a run collects learning_starts steps before it learns, even if stopped meanwhile."""
    steps, update = [], script.update
    part = stopped_run(script, 130, *TINY[script], "--total-timesteps", 400, "--checkpoint-replay", "never")
    stopped_run(script, 8, "--resume", part, "--checkpoint-replay", "unfinished")
    ring = getattr(script, ring_of(script))
    add, count = ring.add, []
    with monkeypatch.context() as patch:
        patch.setattr(ring, "add", lambda self, *values: (count.append(0), add(self, *values)))
        patch.setattr(script, "update", lambda *values: steps.append(len(count)) or update(*values))
        run(script, "--resume", part)
    starts = script.parse_args(["--resume", str(part)]).learning_starts
    assert 0 <= steps[0] - (starts - 8) <= 8


@pytest.mark.parametrize("script", [s for s in TINY if s is not crl], ids=lambda script: script.SCRIPT)
def test_a_refill_that_is_killed_learns_from_the_same_step_on(script):
    flags = [*TINY[script], "--learning-starts", 80]
    whole, part = (run(script, *flags, "--exp-name", name) for name in ("whole", "part"))
    for run_dir in (whole, part):  # finished runs keep no replay
        assert "replay" not in checkpoint(run_dir)
    steps = checkpoint(part)["global_step"] + 200
    more = ["--total-timesteps", steps, "--checkpoint-every", 20]
    run(script, "--resume", whole, *more)
    killed_run(script, 65, "--resume", part, *more)
    run(script, "--resume", part, *more)
    assert checkpoint(whole)["gradient_steps"] == checkpoint(part)["gradient_steps"]
    assert_same(checkpoint(whole)["agent"], checkpoint(part)["agent"])


@two_scripts
def test_a_signal_when_nobody_reads_stderr_any_more(script, flags):
    """As Ctrl-C does with "python ... 2>&1 | tee log": tee dies of it, too."""
    process = start(script, "--checkpoint-every", "40")
    wait_for(lambda: list(Path("runs").glob("*/checkpoint.pt")), process)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    (run_dir,) = Path("runs").iterdir()
    assert checkpoint(run_dir)["global_step"] > 0 and not list(run_dir.glob("*.tmp"))


@pytest.mark.slow
@any_script
def test_twenty_kills_leave_the_same_bits(script):
    steps, seconds, rng = 4000, 0.0, np.random.default_rng(1)
    while seconds < 90:  # the kills below take 60 in the mean
        shutil.rmtree("whole", ignore_errors=True)
        flags, began = [*TINY[script], "--total-timesteps", str(steps), "--checkpoint-every", "40"], time.time()
        shutil.move(run(script, *flags), "whole")
        seconds = time.time() - began
        steps = 40 * round(steps / 40 * max(1.2, 100 / seconds))
    command = [sys.executable, script.__file__, *flags]
    for _ in range(20):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        known = len(list(Path("runs").glob("*/events*")))
        wait_for(lambda known=known: len(list(Path("runs").glob("*/events*"))) > known, process)
        time.sleep(rng.uniform(0, 6))  # the processes of the environments take some seconds to start
        process.kill()
        process.communicate()
        (part,) = Path("runs").iterdir()
        assert not (part / "summary.json").exists(), "it should have run longer"
        if (part / "checkpoint.pt").exists():
            command = [sys.executable, script.__file__, "--resume", str(part)]
        else:
            shutil.rmtree(part)
    subprocess.run(command, check=True, capture_output=True)
    (part,) = Path("runs").iterdir()
    assert_same(checkpoint(Path("whole")), checkpoint(part))
    assert scalars("whole") == scalars(part)


@two_scripts
def test_resume_of_what_is_no_run_of_this_script(script, flags, capsys):
    part, other = run(script, *flags), run(script, *flags, "--seed", 2) / "checkpoint.pt"
    steps = checkpoint(part)["global_step"]
    description = json.loads((part / "args.json").read_text())
    checkpoint_file, args_file = part / "checkpoint.pt", part / "args.json"
    whole = checkpoint_file.read_bytes()
    texts = ["is not the folder of a run that this script can continue"] * 3
    texts += ["has no checkpoint.pt that fits"] * 2
    texts.append(f"--total-timesteps {steps - 40}: the run has already taken more steps")
    for (content, saved, more), message in zip((
        (json.dumps(description | {"script": "other"}), whole, []),
        ("{", whole, []),
        (json.dumps(description | {"args": {"old_flag": 1}}), whole, []),
        (json.dumps(description), whole[:1000], []),
        (json.dumps(description), other.read_bytes(), []),
        (json.dumps(description), whole, ["--total-timesteps", steps - 40]),
    ), texts):  # fmt: skip
        args_file.write_text(content)
        checkpoint_file.write_bytes(saved)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(script, "--resume", part, *more)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1


@every_script
def test_a_run_folder_that_cannot_be_made(script, flags, capsys):
    for name in ("x" * 300, "fine"):  # too long; then runs/ is a file
        with pytest.raises(SystemExit) as stopped:
            run(script, *flags, "--exp-name", name)
        printed = capsys.readouterr().err
        assert stopped.value.code == 1 and "cannot read or write" in printed and printed.count("\n") == 1
        shutil.rmtree("runs", ignore_errors=True)
        Path("runs").touch()


@every_script
def test_a_run_that_goes_on_has_no_summary_until_its_last_checkpoint_is_written(script, flags, monkeypatch):
    part = run(script, *flags)
    steps = checkpoint(part)["global_step"] + RESUMED_STEPS

    def full(*values):
        raise OSError(28, "No space left on device")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(torch, "save", full)
        run(script, "--resume", part, "--total-timesteps", steps)
    for number, handler in handlers.items():  # those of the run would keep its folder locked
        signal.signal(number, handler)
    assert not (part / "summary.json").exists()
    run(script, "--resume", part, "--total-timesteps", steps)
    assert json.loads((part / "summary.json").read_text())["global_step"] == checkpoint(part)["global_step"] == steps


@every_script
def test_resume_of_a_finished_run_only_finishes_it(script, flags):
    """As after a kill between the last checkpoint and the summary."""
    part = run(script, *flags)
    before, summary = checkpoint(part), json.loads((part / "summary.json").read_text())
    (part / "summary.json").unlink()
    run(script, "--resume", part)
    assert_same(before, checkpoint(part))
    again = json.loads((part / "summary.json").read_text())
    assert {k: v for k, v in again.items() if k != "walltime"} == {k: v for k, v in summary.items() if k != "walltime"}


@every_script
def test_a_finished_run_may_keep_its_replay_and_go_on_without_a_refill(script, flags, capsys):
    part = run(script, *flags, "--checkpoint-replay", "always")
    saved = checkpoint(part)
    assert "replay" in saved
    run(script, "--resume", part, "--total-timesteps", saved["global_step"] + RESUMED_STEPS)
    assert checkpoint(part)["gradient_steps"] > saved["gradient_steps"] and "refill" not in capsys.readouterr().err


@every_script
def test_same_seed_same_bits_other_seed_other_bits(script, flags):
    first, second, other = run(script, *flags), run(script, *flags), run(script, *flags, "--seed", 2)
    assert_same(checkpoint(first), checkpoint(second))
    assert scalars(first) == scalars(second) != scalars(other)


@two_scripts
def test_track_starts_a_weights_and_biases_run(script, flags, monkeypatch):
    wandb = unittest.mock.MagicMock(__spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_dir = run(script, *flags, "--track")
    (call,) = wandb.init.call_args_list
    assert (
        call.kwargs["name"] == run_dir.name and call.kwargs["sync_tensorboard"] and call.kwargs["config"]["seed"] == 1
    )
    run(script, *flags)
    assert wandb.init.call_count == 1


@any_script
def test_weights_and_biases_that_does_not_start_is_one_line(script, monkeypatch, capsys):
    wandb = unittest.mock.MagicMock(__spec__=True)
    wandb.init.side_effect = Exception("api_key not configured (no-tty)")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(SystemExit) as stopped:
        run(script, *TINY[script], "--track")
    assert stopped.value.code == 2
    assert "--track True: wandb does not start: api_key not configured (no-tty)\n" in capsys.readouterr().err


@any_script
def test_a_film_of_every_evaluation(script):
    """And TensorBoard says where they lie, and what the flags were."""
    run_dir = run(script, *TINY[script], "--capture-video")
    events = EventAccumulator(str(run_dir))
    events.Reload()
    where = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("eval/film/text_summary")]
    evaluations = scalars(run_dir)["eval/episodic_return"]
    assert where == [str(run_dir / "films" / f"{step}.mp4") for step in evaluations]
    assert all(b"ftyp" in Path(path).read_bytes()[:16] for path in where)
    (table,) = events.Tensors("hyperparameters/text_summary")
    assert b"|capture_video|True|" in table.tensor_proto.string_val[0]


@two_scripts
def test_a_film_that_fails_costs_a_line(script, flags, monkeypatch, capsys):
    """As Ctrl-C does, which ends ffmpeg, too."""

    def broken(*values, **options):
        raise OSError(32, "Broken pipe")

    monkeypatch.setattr(moviepy.ImageSequenceClip, "write_videofile", broken)
    run_dir = run(script, *flags, "--capture-video")
    printed = capsys.readouterr().err
    for step in scalars(run_dir)["eval/episodic_return"]:
        assert f"no film of step {step}: [Errno 32] Broken pipe" in printed
    assert (run_dir / "summary.json").exists()


# --- random numbers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, streams", [(redo, 5), (drq, 4), (rr, 2), (drm, 4), (sac, 5), (drq_eps, 5)],
                         ids=lambda value: getattr(value, "SCRIPT", ""))  # fmt: skip
def test_all_streams_of_random_numbers_begin_differently(script, streams, monkeypatch):
    """torch's CPU generators keep 32 bits of a seed: 1 and 1 + 2**32 are the same stream."""
    seeds, derived_seed = [1], script.derived_seed  # 1: of torch's own stream
    with monkeypatch.context() as patch:
        patch.setattr(script, "derived_seed", lambda *numbers: seeds.append(derived_seed(*numbers)) or seeds[-1])
        run(script, *(TINY | {sac: test_redo_sac.TINY, drq_eps: test_drq_eps_atari.TINY})[script])
    assert len(seeds) >= streams + 6  # episodes
    draws = [tuple(torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()) for seed in seeds]
    assert len(set(draws)) == len(draws)


# --- networks that have diverged --------------------------------------------------------------------------------------
@every_script
def test_a_run_that_diverges_saves_and_ends_with_one_line(script, flags, capsys):
    words = [*flags, "--learning-rate", 1e12, "--checkpoint-every", 1]
    for _ in range(2):  # also when it is resumed
        with pytest.raises(SystemExit) as stopped:
            run(script, *words)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert stopped.value.code == 1 and "is not finite" in line and line.endswith("saved as diverged.pt")
        (run_dir,) = Path("runs").iterdir()
        assert 0 < checkpoint(run_dir)["global_step"] and not (run_dir / "summary.json").exists()
        assert all(weight.isfinite().all() for weight in checkpoint(run_dir)["agent"].values() if weight.numel() > 1)
        diverged = torch.load(run_dir / "diverged.pt")
        assert "replay" not in diverged and not all(x.isfinite().all() for x in diverged["agent"].values())
        (run_dir / "diverged.pt").unlink()
        words = ["--resume", run_dir]


def test_the_first_number_that_is_not_finite_is_named():
    run = SimpleNamespace(checkpoint="checkpoint.pt", stopped=130, keep_replay=True)
    run.stop = partial(redo.Run.stop, run)
    redo.Run.check_finite(run, {"fine": 1.0}, 1)
    assert run.stopped == 130
    redo.Run.check_finite(run, {"fine": 1.0, "first": np.inf, "second": np.nan}, 21000)
    redo.Run.check_finite(run, {"third": np.nan}, 3000)  # as after the episode
    assert (run.stopped, run.reason) == (1, "error: first is not finite, at step 21000 or later")
    assert (run.checkpoint, run.keep_replay) == ("diverged.pt", False)


@pytest.mark.parametrize("script", [drq, redo], ids=lambda script: script.SCRIPT)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_network_that_is_not_finite_has_no_dormant_ratio(script, bad):
    activation = torch.ones(4, 3)
    activation[1, 2] = bad
    score = script.dormant_score(activation)
    assert score.isnan().all() and script.dormant_share(score, 0.1).isnan() and not (score <= 0.1).any()
    assert script.dormant_share(torch.tensor([0.0, 0.1, 1.0, 2.9]), 0.1) == 0.5


@pytest.mark.parametrize("script", [drq, rr], ids=lambda script: script.SCRIPT)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_network_that_is_not_finite_has_no_active_units(script, bad):
    whole, broken = torch.tensor([[1.0, 0.0, 2.0, 0.0]]), torch.tensor([[1.0, 0.0, bad, 0.0]])
    assert script.fau([whole, whole]) == 0.5
    assert script.fau([whole, broken]).isnan() and script.fau([broken.bfloat16()]).isnan()


def test_no_detector_acts_on_what_is_not_a_number():
    detector = rr.PlateauDetector(check_episodes=2)
    detector.first_batch(0.5)
    for episode in range(1, 9):
        difference = detector.end_episode(float("nan"))
        assert (difference is None) == bool(episode % 2)
    assert not detector.switched


# --- environments that die --------------------------------------------------------------------------------------------
def kill_environments(script, monkeypatch, moments, name="act"):
    """Kills the processes of the training environment (of the evaluation's, with another name) at these calls."""
    function, calls, living = getattr(script, name), [], []

    class Known(script.Environments):
        def __init__(self, *values):
            super().__init__(*values)
            living.append(self)

    def deadly(*values, **options):
        calls.append(0)
        if len(calls) in moments:
            for process in living[name != "act"].envs.processes:
                process.kill()
                process.join()
        return function(*values, **options)

    monkeypatch.setattr(script, "Environments", Known)
    monkeypatch.setattr(script, name, deadly)


@pixel_scripts
def test_a_dead_environment_cuts_the_episode(script, monkeypatch, capsys):
    kill_environments(script, monkeypatch, [33, 75])
    run_dir = run(script, *TINY[script], "--total-timesteps", 100, "--checkpoint-every", 80)
    assert capsys.readouterr().err.count("an environment's process died (") == 2
    logged = scalars(run_dir)
    assert checkpoint(run_dir)["global_step"] == 100 and (run_dir / "summary.json").exists()
    assert set(logged["charts/episodic_return"]) == {20, 53, 73, 95}  # cut at 33 and at 75
    assert set(logged["charts/episodic_length"].values()) == {20}


@pixel_scripts
def test_a_dead_environment_does_not_change_an_evaluation(script, monkeypatch):
    whole = run(script, *TINY[script])
    kill_environments(script, monkeypatch, [2], "evaluate")
    assert scalars(run(script, *TINY[script])) == scalars(whole)


@pixel_scripts
def test_the_fourth_death_of_an_environment_saves_and_ends(script, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        kill_environments(script, patch, [25, 41, 42, 43])
        run(script, *TINY[script])
    assert stopped.value.code == 1 and "for the fourth time" in capsys.readouterr().err
    (run_dir,) = Path("runs").iterdir()
    assert checkpoint(run_dir)["global_step"] == 43
    run(script, "--resume", run_dir)
    assert set(scalars(run_dir)["charts/episodic_return"]) == {20, 63, 83, 103}


def test_environments_that_do_not_start_end_the_run_with_their_error(monkeypatch, capsys):
    def fail(*values, **options):
        raise RuntimeError("no renderer")

    monkeypatch.setattr(gymnasium.vector, "AsyncVectorEnv", fail)
    with pytest.raises(SystemExit) as stopped:
        run(rr, *TINY[rr])
    printed = capsys.readouterr().err
    assert stopped.value.code == 1 and printed.count("process died (RuntimeError: no renderer)") == 4
    assert "died for the fourth time; saved" in printed and "Traceback" not in printed


# --- files ------------------------------------------------------------------------------------------------------------
@every_script
def test_one_process_per_run(script, flags, capsys):
    part = run(script, *flags)
    before = (part / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    with open(part / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stopped:
            run(script, "--resume", part, "--total-timesteps", 100_000)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "another process is working on this run" in printed and printed.count("\n") == 1
    assert (part / "checkpoint.pt").read_bytes() == before


@every_script
def test_a_run_locks_its_folder(script, flags):
    process = start(script)
    wait_for(lambda: list(Path("runs").glob("*/events*")), process)
    with open(next(Path("runs").glob("*/lock")), "w") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.kill()
    process.communicate()


@every_script
def test_a_finished_run_keeps_no_replay_and_a_resumed_one_holds_it_once(script, flags, monkeypatch):
    replays, save_file, load = [], script.save_file, torch.load

    def saving(path, content):
        save_file(path, content)
        if path.name == "checkpoint.pt":
            replays.append(content.get("replay"))
            if len(replays) == 1:
                shutil.copy(path, "first.pt")

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_file", saving)
        part = run(script, *flags, "--checkpoint-every", 80)
    assert len(replays) > 1 and None not in replays[:-1] and replays[-1] is None
    shutil.copy("first.pt", part / "checkpoint.pt")

    def mapped(*values, **options):
        assert options["mmap"]
        return load(*values, **options)

    monkeypatch.setattr(torch, "load", mapped)
    held, update = [], "update"
    function = getattr(script, update)

    def looking(*values):
        held.append("checkpoint.pt" in Path("/proc/self/maps").read_text())
        return function(*values)

    monkeypatch.setattr(script, update, looking)
    run(script, "--resume", part)
    assert held and not any(held)  # Adam would hold the file through the tensors that it was given


@every_script
def test_a_full_disk_ends_the_log_with_one_line(script, flags, capsys, monkeypatch):
    def fail(*values):
        raise OSError(28, "No space left on device")

    for name in ("add_scalar", "flush"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(torch.utils.tensorboard.SummaryWriter, name, fail)
            run(script, *flags, "--checkpoint-every", 80)
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert stopped.value.code == 1 and len(lines) == 1 and "No space left on device" in lines[0]


@pytest.mark.parametrize("script, gone", [(rr, False), (drm, True)])
def test_a_program_that_ends_through_an_error_waits_for_no_environment(script, gone):
    """pygame's would ignore SIGTERM, and Python sends just that to its children and waits."""
    flags = [*TINY[script], "--env-id", "Pendulum-v1", "--total-timesteps", "1000000", "--checkpoint-every", "100"]
    process = subprocess.Popen([sys.executable, script.__file__, *flags], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(Path("runs").glob("*/checkpoint.pt")), process)
    (run_dir,) = Path("runs").iterdir()
    if gone:
        shutil.rmtree(run_dir)
        process.send_signal(signal.SIGTERM)
    else:
        (run_dir / "checkpoint.tmp").mkdir()  # the next one cannot be written
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "cannot read or write" in printed and "AsyncVectorEnv" not in printed


@pytest.mark.parametrize("script", [*PIXEL_SCRIPTS, frozen, metaworld, adroit], ids=lambda script: script.SCRIPT)
def test_success_rate_length_and_return_of_an_evaluation(script):
    """Three environments: the first has its success in the middle and terminates; the second's success comes after its
    end; the third has none. Of four episodes, the last two of the second round are too many."""
    ends, successes = [3, 2, 4], {(0, 2), (1, 3)}  # (environment, step)

    asked = []

    class Playing:
        num_envs, time = 3, 0

        def reset(self, seeds):
            asked.extend(seeds)
            self.time, self.info = 0, dict(success=np.zeros(3), joints=np.zeros((3, 24), np.float32))
            return np.zeros((3, 3, 24, 24), np.uint8), self.info

        def step_async(self, action):
            self.time += 1

        def step_wait(self):
            success = np.array([float((i, self.time) in successes) for i in range(3)])
            over = np.array([self.time >= end for end in ends])
            reward, first = np.array([1.0, 10.0, 100.0]), np.arange(3) == 0
            frame = np.full((3, 3, 24, 24), self.time, np.uint8)
            info = dict(success=success, joints=np.full((3, 24), self.time, np.float32))
            return frame, reward, over & first, over & ~first | (self.time > 5), info

    run, agent, seen = unittest.mock.Mock(stopped=None), unittest.mock.Mock(), []

    def mean_action(obs):  # Adroit's comes with the joints, of the same time
        assert torch.is_tensor(obs) or (obs[1] == obs[0][:, 0, 0, :1]).all()
        seen.append((obs if torch.is_tensor(obs) else obs[0])[0, ::3, 0, 0].tolist())
        return torch.zeros(3, 2)

    agent.mean_action = mean_action
    args = unittest.mock.Mock(eval_episodes=4, seed=1, capture_video=False)
    metrics = script.evaluate(agent, Playing(), args, 7, "cpu", run)
    assert asked == [script.derived_seed(1, 1, 7, i) for i in range(6)]
    assert metrics["eval/success_rate"] == 2 / 4  # the first environment's, twice
    assert metrics["eval/episodic_length"] == (3 + 2 + 4 + 3) / 4
    assert metrics["eval/episodic_return"] == (3 + 20 + 400 + 3) / 4
    stacks = [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]  # the newest behind
    assert seen == 2 * ([frames[-1:] for frames in stacks] if script is adroit else stacks)


@pytest.mark.parametrize("script", [*PIXEL_SCRIPTS, frozen], ids=lambda script: script.SCRIPT)
def test_a_task_of_dm_control_without_an_end_gets_one(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "EPISODE_LIMIT", 3)
    env = script.make_env("dm_control/lqr-lqr_2_1-v0", 24)
    env.reset(seed=0)
    assert [env.step(env.action_space.sample())[3] for _ in range(3)] == [False, False, True]
    env.close()
    script.check_env(unittest.mock.Mock(env_id="dm_control/lqr-lqr_2_1-v0", image_size=24, n_step=3))
    assert "has no time limit: its episodes end after 3 steps" in capsys.readouterr().out


@pixel_scripts
def test_help_shows_the_numbers_of_the_task(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--env-id", "dm_control/humanoid-walk-v0", "--help"])
    assert "(default: 100)" in capsys.readouterr().out.partition("--feature-dim")[2][:200]


@every_script
def test_files_that_parse_but_do_not_fit(script, flags, capsys):
    part = run(script, *flags)
    description, whole = json.loads((part / "args.json").read_text()), checkpoint(part)

    def refused():
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(script, "--resume", part)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and printed.count("\n") == 1, printed
        return printed

    wrong = [dict(args=[]), dict(args=None), dict(args="x"), dict(script=[])]
    wrong += [dict(args=description["args"] | {name: value}) for name, value in (
        ("seed", "abc"), ("seed", None), ("seed", 1.5), ("gamma", "0.99"), ("env_id", None), ("eval_every", "5"),
        ("device", "foo"), ("compile", 1))]  # fmt: skip
    for change in wrong:
        (part / "args.json").write_text(json.dumps(description | change))
        assert "error: --" in refused()
    (part / "args.json").write_text("[" * 10**5)
    assert "is not the folder of a run" in refused()
    (part / "args.json").unlink()
    (part / "args.json").mkdir()
    assert "is not the folder of a run" in refused()
    (part / "args.json").rmdir()
    (part / "args.json").write_text(json.dumps(description))
    first = next(iter(whole["agent"]))
    for change in (dict(global_step=-5), dict(agent={}), dict(gradient_steps=None),
                   dict(agent=whole["agent"] | {first: torch.zeros(1, 2, 3)}), dict(rng=None), dict(batch_rng=None),
                   dict(format=1)):  # fmt: skip
        if not change.keys() & whole.keys():  # of the other shape
            continue
        if change == dict(gradient_steps=None):
            content = {k: v for k, v in whole.items() if k != "gradient_steps"}
        else:
            content = whole | change
        torch.save(content, part / "checkpoint.pt")
        refused()


HUGE = int("9" * 320)
SIZES = {
    crl: ["--repr-dim", "--gradient-steps", "--num-envs", "--width", "--batch-size", "--eval-episodes"],
    redo: ["--eval-envs", "--batch-size", "--rank-batch-size"],
    drq: ["--hidden-dim", "--feature-dim", "--batch-size"], rr: ["--hidden-dim", "--feature-dim", "--batch-size"],
    drm: ["--hidden-dim", "--feature-dim", "--batch-size"],
}  # fmt: skip
BAD_NUMBERS = [(script, flag, value) for script, names in SIZES.items() for flag in names for value in (10**10, HUGE)]
BAD_NUMBERS += [(script, "--learning-rate", value) for script in TINY for value in ("inf", "nan")]
BAD_NUMBERS += [(script, "--learning-starts", HUGE) for script in TINY]
BAD_NUMBERS += [(crl, flag, "inf") for flag in ("--logsumexp-coef", "--entropy-coef")]
BAD_NUMBERS += [(redo, flag, "inf") for flag in ("--adam-eps", "--weight-decay", "--redo-tau")]
BAD_NUMBERS += [(redo, "--replay-ratio", 1e30), (redo, "--width", 63), (redo, "--eval-envs", 20_000)]
BAD_NUMBERS += [(drm, "--hidden-dim", 100_000), (drq, "--redo-tau", "inf")]


@pytest.mark.parametrize(
    "script, flag, value", BAD_NUMBERS, ids=lambda value: str(getattr(value, "SCRIPT", value))[:20]
)
def test_numbers_that_cannot_work_are_refused_at_once(script, flag, value, capsys, monkeypatch):
    monkeypatch.setattr(script, "memory", lambda device: 16e9)
    began = time.time()
    with pytest.raises(SystemExit) as stopped:
        run(script, *TINY[script], flag, value)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1 and "Traceback" not in printed
    assert not Path("runs").exists() and time.time() - began < 60


@every_script
def test_a_name_too_long_for_a_folder_is_no_run(script, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(script, "--resume", "x" * 300)
    assert stopped.value.code == 2 and "is not the folder of a run" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_the_memory_of_a_freed_tensor_is_used_again():
    code = """
import resource, torch, adaptive_rr
adaptive_rr.set_precision("float32", torch.device("cpu"))
for turn in range(6):  # at first the hole that a tensor left can be a few bytes too small for the next one
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**18)  # 64 MB: 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    folder = Path(rr.__file__).parent
    faults = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert int(faults.stdout) < 1000


@pytest.mark.parametrize("limit, capped", [("1000000000\n", True), ("max\n", False)])
def test_the_limit_of_a_container_is_respected(monkeypatch, capsys, limit, capped):
    read = Path.read_text
    group = "/sys/fs/cgroup/memory.max"
    monkeypatch.setattr(Path, "read_text", lambda self: limit if str(self) == group else read(self))
    assert (rr.memory("cpu") == 10**9) == capped
    if capped:
        with pytest.raises(SystemExit):
            run(rr, "--env-id", "dm_control/cartpole-balance-v0", "--buffer-device", "cpu")
        assert "cpu has 1.0 GB" in capsys.readouterr().err


@pixel_scripts
def test_triton_is_there_before_a_renderer(script, tmp_path):
    """CUDA builds of torch import it late; after Mesa's LLVM that is a segmentation fault (seen with Python 3.13)."""
    (tmp_path / "triton.py").touch()
    code = f"""
import sys
sys.path[:0] = [{str(Path(script.__file__).parent)!r}, {str(tmp_path)!r}]
import {script.SCRIPT} as script
script.make_env = lambda *_: sys.exit(0 if "triton" in sys.modules else 1)
script.check_args(script.Args(device="cpu", buffer_device="cpu", buffer_size=1000))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
