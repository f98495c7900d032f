"""What holds for every script through its command line: interruptions, full disks, resume, tracking, no such device."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, assert_same, checkpoint, run, scalars, wait_for

import adaptive_rr as rr
import crl_deep as crl
import drm
import drqv2_plasticity as drq
import redo_dqn_atari as redo

every_script = pytest.mark.parametrize("script, flags", TINY.items(), ids=lambda value: getattr(value, "SCRIPT", ""))
ENDLESS = {
    crl: ["--total-timesteps", "10000000", "--buffer-size", "4000"], redo: ["--total-timesteps", "10000000"],
    drq: ["--total-timesteps", "10000000", "--buffer-size", "4000"],
    rr: ["--total-timesteps", "10000000", "--buffer-size", "4000"],
    drm: ["--total-timesteps", "10000000", "--buffer-size", "4000"],
}  # fmt: skip
RESUMED_STEPS = 80  # a whole number of training steps of every script


def start(script, *flags):
    command = [sys.executable, script.__file__, *TINY[script], *ENDLESS[script], *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@every_script
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signals_save_and_exit(script, flags, number):
    process = start(script, "--checkpoint-every", "100000000")
    wait_for(lambda: list(Path("runs").glob("*/events*")), process)
    time.sleep(1.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "Traceback" not in errors
    (run_dir,) = Path("runs").iterdir()
    saved = checkpoint(run_dir)
    assert saved["global_step"] > 0
    resumed = run(script, "--resume", run_dir, "--total-timesteps", saved["global_step"] + RESUMED_STEPS)
    assert checkpoint(resumed)["global_step"] == saved["global_step"] + RESUMED_STEPS


@every_script
def test_killed_at_any_moment_leaves_a_whole_checkpoint(script, flags):
    rng = np.random.default_rng(0)
    for attempt in range(3):
        shutil.rmtree("runs", ignore_errors=True)
        process = start(script, "--checkpoint-every", "40")
        wait_for(lambda: list(Path("runs").glob("*/checkpoint.pt")), process)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        (run_dir,) = Path("runs").iterdir()
        saved = checkpoint(run_dir)
        if attempt == 0:
            run(script, "--resume", run_dir, "--total-timesteps", saved["global_step"] + RESUMED_STEPS)


@every_script
def test_a_full_disk_keeps_the_old_file(script, flags, capsys, monkeypatch):
    Path("checkpoint.pt").write_text("old")

    def save(content, file):
        file.write(b"half a che")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as stopped:
        script.save_file(Path("checkpoint.pt"), {})
    assert stopped.value.code == 1 and "No space left" in capsys.readouterr().err
    assert Path("checkpoint.pt").read_text() == "old" and os.listdir() == ["checkpoint.pt"]


@every_script
@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no CUDA device")
@pytest.mark.parametrize("flag", ["--device", "--buffer-device"])
def test_missing_cuda(script, flags, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(script, flag, "cuda")
    assert stopped.value.code == 2 and f"{flag} cuda: torch sees no such device" in capsys.readouterr().err


@every_script
def test_resume_of_what_is_no_run_of_this_script(script, flags, capsys):
    part, other = run(script, *flags), run(script, *flags, "--seed", 2) / "checkpoint.pt"
    steps = checkpoint(part)["global_step"]
    description = json.loads((part / "args.json").read_text())
    checkpoint_file, args_file = part / "checkpoint.pt", part / "args.json"
    whole = checkpoint_file.read_bytes()
    for content, saved, more, message in (
        (json.dumps(description | {"script": "other"}), whole, [], "is a run of another script (other)"),
        ("{", whole, [], "has an args.json that this version cannot read"),
        (json.dumps(description | {"args": {"old_flag": 1}}), whole, [], "has an args.json that this version cannot"),
        (json.dumps(description), whole[:1000], [], "has a checkpoint.pt that cannot be read"),
        (json.dumps(description), other.read_bytes(), [], "has a checkpoint.pt of another run"),
        (json.dumps(description), whole, ["--total-timesteps", steps - 40], f"has already taken {steps} steps"),
    ):
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
        assert stopped.value.code == 2 and "cannot create the folder" in printed and printed.count("\n") == 1
        shutil.rmtree("runs", ignore_errors=True)
        Path("runs").touch()


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
def test_same_seed_same_bits_other_seed_other_bits(script, flags):
    first, second, other = run(script, *flags), run(script, *flags), run(script, *flags, "--seed", 2)
    assert_same(checkpoint(first), checkpoint(second))
    assert scalars(first) == scalars(second) != scalars(other)


@every_script
def test_track_starts_a_weights_and_biases_run(script, flags, monkeypatch):
    wandb = unittest.mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_dir = run(script, *flags, "--track", "--wandb-project-name", "mine", "--wandb-entity", "us")
    (call,) = wandb.init.call_args_list
    assert (call.kwargs["project"], call.kwargs["entity"], call.kwargs["name"]) == ("mine", "us", run_dir.name)
    assert call.kwargs["sync_tensorboard"] and call.kwargs["config"]["seed"] == 1
    run(script, *flags)
    assert wandb.init.call_count == 1
