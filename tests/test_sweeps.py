"""benchmark/common.sh and slurm.sh: stops, locks, arguments, paths; with a stand-in for the training script."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import wait_for

ROOT = Path(__file__).resolve().parent.parent
# It takes the flags of a sweep, works until runs/go exists, and saves when it is stopped
SCRIPT = """
import fcntl, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (run / "checkpoint.pt").touch() or sys.exit(143))
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = f"{flags.get('--env-id')}__{flags.get('--exp-name')}__1__7".replace("/", "-")
run = pathlib.Path(flags.get("--resume") or f"runs/{name}")
run.mkdir(parents=True, exist_ok=True)
(run / "arguments").write_text("|".join(sys.argv[1:]))
lock = open(run / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
(run / "pid").write_text(str(os.getpid()))
while not pathlib.Path("runs/go").exists():
    time.sleep(0.05)
(run / "summary.json").touch()
"""
PLOT = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.parent.mkdir(parents=True, exist_ok=True)
out.with_suffix(".png").touch()
"""
SWEEP, RUNS = "benchmark/drm/cpu.sh", 3


@pytest.fixture
def folder(tmp_path):
    """benchmark/ and stand-ins, in a folder whose name has a space."""
    folder = tmp_path / "a folder"
    shutil.copytree(ROOT / "benchmark", folder / "benchmark", ignore=shutil.ignore_patterns("results"))
    (folder / "drm.py").write_text(SCRIPT)
    (folder / "benchmark" / "drm" / "plot.py").write_text(PLOT)
    (folder / "benchmark" / "needs.py").write_text("")
    (folder / "runs").mkdir()
    return folder


def environment(**changes) -> dict:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "SCALE": "smoke", "WORKERS": "2"} | changes


def sweep(folder, *arguments, path=SWEEP, cwd=None, **changes):
    command = ["bash", path, *arguments]
    return subprocess.run(
        command, cwd=cwd or folder, env=environment(**changes), capture_output=True, text=True, timeout=60
    )


def begin(folder, **changes):
    """A sweep whose first two runs work."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen(["bash", SWEEP], cwd=folder, env=environment(**changes), **options)
    wait_for(lambda: len(list(folder.glob("runs/*/pid"))) == 2, process)
    return process


def pids(folder) -> list:
    return [int(path.read_text()) for path in folder.glob("runs/*/pid")]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def summary(done) -> str:
    return done.stdout.splitlines()[-1]


# --- stops ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number, group", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_sweep_that_is_stopped_stops_its_runs_and_waits_for_their_checkpoints(folder, number, group):
    """group: as Ctrl-C in a terminal, which reaches everything in the foreground."""
    process = begin(folder)
    (os.killpg if group else os.kill)(process.pid, number)
    printed, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert not any(map(alive, pids(folder))) and len(list(folder.glob("runs/*/checkpoint.pt"))) == 2
    assert errors.count("drm_cpu: stopping; the runs save, the same command resumes them") == 1
    assert "FAILED" not in errors and "FAILED" not in printed
    (folder / "runs" / "go").touch()
    again = sweep(folder)
    assert again.stdout.count("--resume") == 2 and again.returncode == 0
    assert summary(again) == f"drm_cpu: of {RUNS} runs 0 were finished before, {RUNS} are now, 0 failed"


def test_a_run_that_another_sweep_works_on_is_left_to_it(folder):
    process = begin(folder)
    (folder / "runs" / "go").touch()
    process.communicate(timeout=30)
    (cut_off, _, _) = sorted(folder.glob("runs/*/summary.json"))
    cut_off.unlink()
    with open(cut_off.parent / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = sweep(folder)
    assert done.returncode == 1 and f"HELD: another process works on runs/{cut_off.parent.name}/" in done.stderr
    assert summary(done) == f"drm_cpu: of {RUNS} runs {RUNS - 1} were finished before, 0 are now, 0 failed"
    assert not cut_off.exists() and sweep(folder).returncode == 0 and cut_off.exists()


def test_runs_that_fail_are_counted(folder):
    (folder / "drm.py").write_text("raise SystemExit(3)")
    done = sweep(folder)
    assert done.returncode == 1 and done.stderr.count("FAILED: see runs/logs/") == 2 * RUNS
    assert summary(done) == f"drm_cpu: of {RUNS} runs 0 were finished before, 0 are now, {RUNS} failed"


def test_a_run_that_was_stopped_alone_is_not_finished(folder):
    process = begin(folder)
    os.kill(pids(folder)[0], signal.SIGTERM)
    wait_for(lambda: len(pids(folder)) == RUNS, process)
    (folder / "runs" / "go").touch()
    printed, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and errors.count("STOPPED: see runs/logs/") == 1
    assert printed.splitlines()[-1] == f"drm_cpu: of {RUNS} runs 0 were finished before, {RUNS - 1} are now, 0 failed"


def test_a_figure_that_fails_is_said(folder):
    (folder / "runs" / "go").touch()
    (folder / "benchmark" / "drm" / "plot.py").write_text("raise SystemExit(3)")
    done = sweep(folder)
    assert done.returncode == 1 and "FAILED: the figure" in done.stderr


# --- arguments and paths ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", ["0", "-1", "abc", "1.5", "2 3"])
def test_workers_are_a_number(folder, workers):
    done = sweep(folder, WORKERS=workers)
    assert done.returncode == 2 and done.stderr == f"drm_cpu: error: WORKERS={workers} is not a number of runs\n"
    assert not list(folder.glob("runs/*"))


def test_no_more_runs_than_workers_at_a_time(folder):
    process = begin(folder)
    time.sleep(1)
    assert len(pids(folder)) == 2
    (folder / "runs" / "go").touch()
    process.communicate(timeout=30)
    assert process.returncode == 0 and len(pids(folder)) == RUNS


@pytest.mark.parametrize("scale", ["tiny", "SMOKE"])
def test_scales(folder, scale):
    done = sweep(folder, SCALE=scale)
    assert done.returncode == 2 and f"SCALE={scale} is none of smoke, small, paper" in done.stderr


@pytest.mark.parametrize("arguments", [["--foo"], ["--dry-run", "--foo"], ["small"]])
def test_unknown_arguments(folder, arguments):
    done = sweep(folder, *arguments)
    assert done.returncode == 2 and f"unknown argument {arguments[-1]} (only --dry-run is known)" in done.stderr


def test_a_dry_run_does_nothing(folder):
    done = sweep(folder, "--dry-run")
    assert done.returncode == 0 and not list(folder.glob("runs/*"))
    assert done.stdout.count("python drm.py --env-id ") == RUNS


@pytest.mark.parametrize("place", ["../elsewhere", "benchmark", "benchmark/drm"])
def test_a_sweep_can_be_called_from_anywhere(folder, place):
    """And OUT is where the caller stands."""
    (folder / "runs" / "go").touch()
    (folder / place).mkdir(exist_ok=True)
    path = os.path.relpath(folder / SWEEP, (folder / place).resolve())
    done = sweep(folder, path=path, cwd=folder / place, OUT="my pictures")
    assert done.returncode == 0, done.stderr
    assert (folder / place / "my pictures" / "drm_cpu_smoke.png").exists() and list(folder.glob("runs/*/summary.json"))


def test_a_sweep_can_be_called_by_a_symlink(folder, tmp_path):
    (folder / "runs" / "go").touch()
    (tmp_path / "link.sh").symlink_to(folder / SWEEP)
    done = sweep(folder, path=str(tmp_path / "link.sh"), cwd=tmp_path)
    assert done.returncode == 0 and (folder / "runs/figures/drm_cpu_smoke.png").exists(), done.stderr


def test_extra_flags_may_have_spaces(folder):
    (folder / "runs" / "go").touch()
    done = sweep(folder, EXTRA="--note 'a b' --seed 2")
    assert done.returncode == 0, done.stderr
    assert all("|--note|a b|--seed|2" in path.read_text() for path in folder.glob("runs/*/arguments"))


# --- Slurm ------------------------------------------------------------------------------------------------------------
def slurm(folder, *arguments, cwd=None, **changes):
    """With an sbatch that runs the first task of the array."""
    stub = folder / "stubs" / "sbatch"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > asked\nSLURM_ARRAY_TASK_ID=1 bash -c "${@: -1}"\n')
    stub.chmod(0o755)
    path = f"{stub.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return sweep(folder, *arguments, path=str(folder / "benchmark" / "slurm.sh"), cwd=cwd, PATH=path, **changes)


def test_slurm_gives_a_run_five_minutes_to_save(folder):
    (folder / "runs" / "go").touch()
    done = slurm(folder, SWEEP, "--time=1", EXTRA="--note 'a b'")
    assert done.returncode == 0, done.stderr
    assert {"--array=1-3", "--time=1", "--signal=B:TERM@300"} <= set((folder / "asked").read_text().splitlines())
    (arguments,) = folder.glob("runs/*/arguments")
    assert "|--note|a b" in arguments.read_text()


def test_slurm_takes_a_path_from_where_the_caller_stands(folder):
    done = slurm(folder, "cpu.sh", "--dry-run", cwd=folder / "benchmark" / "drm")
    assert done.returncode == 0 and done.stdout.startswith("sbatch --array=1-3 --job-name=drm_cpu_smoke ")


def test_slurm_gets_arrays_of_at_most_a_thousand_runs(folder):
    done = slurm(folder, "benchmark/redo_dqn_atari/drq_fig10d.sh", "--dry-run", SCALE="paper")
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["--array=1-1000", "--array=1-1000", "--array=1-80"]
    assert [line.split("ID + ")[1].split(")")[0] for line in lines] == ["0", "1000", "2000"]


@pytest.mark.parametrize("arguments", [[], ["no-such-sweep.sh"]])
def test_slurm_wants_a_sweep(folder, arguments):
    done = slurm(folder, *arguments)
    assert done.returncode == 2 and "is not a sweep" in done.stderr


def test_what_a_tier_needs_is_said_first(folder):
    """Of the real scripts: an Atari run's replay is 7.1 GB."""
    command = [sys.executable, ROOT / "benchmark" / "needs.py", "redo_dqn_atari_fig9_redo"]
    commands = sweep(folder, "--dry-run", path="benchmark/redo_dqn_atari/fig9_redo.sh", SCALE="paper").stdout
    printed = subprocess.run(command, input=commands, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("redo_dqn_atari_fig9_redo: 10 runs to do, 0 of them resumed; each takes up to ")
    assert printed.endswith("and 7.1 GB on disk (twice that while it saves)\n")
    (folder / "runs" / "go").touch()
    (folder / "benchmark" / "needs.py").write_text("print('the needs')")
    assert sweep(folder).stderr.startswith("the needs\n")


def test_of_several_folders_of_one_run_the_finished_one_is_used(folder):
    path = folder / "benchmark" / "drm" / "which.sh"
    path.write_text('source "$(dirname "$(realpath "$0")")/../common.sh"\nrun_folder ALE/Pong-v5 a-b 1\n')
    for name, done in (("1", False), ("2", True), ("3", False)):
        run = folder / "runs" / f"ALE-Pong-v5__a-b__1__{name}"
        expected = {"1": "*", "2": "1", "3": "2"}[name]
        assert sweep(folder, "--dry-run", path=str(path)).stdout == f"runs/ALE-Pong-v5__a-b__1__{expected}/\n"
        run.mkdir()
        if done:
            (run / "summary.json").touch()
    assert sweep(folder, "--dry-run", path=str(path)).stdout == "runs/ALE-Pong-v5__a-b__1__2/\n"
    (run / "summary.json").touch()  # the newest, as load_runs has it
    assert sweep(folder, "--dry-run", path=str(path)).stdout == "runs/ALE-Pong-v5__a-b__1__3/\n"
