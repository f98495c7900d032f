"""crl_deep.py through its command line: real environments, resume, determinism, signals, full disks and bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import POINT, assert_same, checkpoint, run_and_replay, scalars, stopped_run

import crl_deep as crl

SCRIPT = Path(crl.__file__)
ANT = ["--env-id", "ant_u_maze", *POINT]
HUMANOID = ["--env-id", "humanoid", *POINT]


def run(*flags):
    return helpers.run(crl, *flags)


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_run_through_the_command_line(tmp_path):
    """As a user: the script alone, copied into an empty folder."""
    shutil.copy(SCRIPT, tmp_path / "copied.py")
    flags = [*POINT, *"--env-id point_u_maze --exp-name first --save-model --save-value-map --save-embeddings".split()]
    done = subprocess.run([sys.executable, "copied.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of the goals" in done.stdout
    (run_dir,) = Path("runs").iterdir()
    assert run_dir.name.startswith("point_u_maze__first__1__")
    description = json.loads((run_dir / "args.json").read_text())
    assert description["args"]["actor_depth"] == 4 and description["args"]["eval_env_id"] == "point_u_maze_eval"
    assert description["versions"]["torch"] == torch.__version__
    files = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
    assert files == {
        "args.json", "checkpoint.pt", "lock", "summary.json", "model.pt", "value_map.npz", "embeddings.npz",
    }  # fmt: skip
    logged = scalars(run_dir)
    # 600 steps are 15 unrolls of 40; the first 2 fill the replay, evaluations come every 2 unrolls and at both ends
    assert sorted(logged["eval/time_at_goal"]) == [0, 80, 160, 240, 320, 400, 480, 560, 600]
    assert list(logged["charts/gradient_steps"].values()) == [0, 0, *range(3, 40, 3)]
    assert list(logged["losses/critic"]) == list(range(120, 601, 40))
    assert list(logged["charts/episodic_return"]) == list(range(80, 601, 80))  # an episode lasts 2 unrolls
    assert set(logged["charts/episodic_length"].values()) == {20} and set(logged["charts/fallen"].values()) == {0}
    for tag in ("eval/success_any", "eval/final_distance", "losses/actor", "losses/alpha", "contrastive/logits_pos"):
        assert all(np.isfinite(list(logged[tag].values()))), tag
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["global_step"], summary["gradient_steps"]) == (600, 39)
    assert summary["eval/time_at_goal_last5"] == pytest.approx(logged["eval/time_at_goal_last5"][600])
    maps = np.load(run_dir / "value_map.npz")
    assert maps["paths"].shape == (20, 3, 2) and maps["walls"].sum() == 18 and np.isfinite(maps["values"]).all()
    weights = torch.load(run_dir / "model.pt", weights_only=True)
    assert_same(dict(weights), dict(checkpoint(run_dir)["agent"]))


@pytest.mark.parametrize("env_id", ["ant", "ant_u_maze_gen_1f2f3f", "humanoid", "humanoid_u_maze", "point_room"])
def test_every_family_trains(env_id):
    run_dir = run("--env-id", env_id, *POINT, "--depth", 8, "--log-residual-norms")
    logged = scalars(run_dir)
    assert all(np.isfinite(list(values.values())).all() for values in logged.values())
    assert {"residual/actor/block_000", "residual/goal_encoder/block_001"} <= set(logged)


def test_the_share_of_falls_is_logged(monkeypatch):
    robot = crl.ROBOTS["ant"]
    monkeypatch.setitem(crl.ROBOTS, "ant", robot._replace(healthy_height=(0.2, 0.7)))
    logged = scalars(run("--env-id", "ant", *POINT))
    lengths, fallen = (list(logged[f"charts/{tag}"].values()) for tag in ("episodic_length", "fallen"))
    assert 0 in fallen and any(0 < share < 1 for share in fallen)  # some episodes reach their 20 steps
    assert all((length < 20) == (share > 0) for length, share in zip(lengths, fallen, strict=True))


def test_last_five_evaluations(monkeypatch):
    monkeypatch.setattr(crl, "GOAL_RADIUS", 3.0)  # so large that untrained policies are sometimes inside
    logged = scalars(run(*POINT, "--env-id", "point_room", "--eval-every", 40))
    values, means = list(logged["eval/time_at_goal"].values()), list(logged["eval/time_at_goal_last5"].values())
    assert len(set(values)) > 5
    for i, mean in enumerate(means):
        assert mean == pytest.approx(np.mean(values[max(0, i - 4) : i + 1]), rel=1e-5)


# --- determinism and resume -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [POINT, ANT], ids=["point", "ant"])
def test_same_seed_same_bits_other_seed_other_bits(flags):
    first, second, other = run(*flags), run(*flags, "--num-threads", 1), run(*flags, "--seed", 2)
    assert_same(checkpoint(first), checkpoint(second))
    assert scalars(first) == scalars(second)
    assert not torch.equal(checkpoint(first)["envs"]["physics"], checkpoint(other)["envs"]["physics"])


@pytest.mark.parametrize("flags", [POINT, ANT, HUMANOID], ids=["point", "ant", "humanoid"])
@pytest.mark.parametrize("buffer_size", [400, 10_000], ids=["wrapped", "growing"])
def test_resume_is_bit_identical(flags, buffer_size):
    """k steps, stop, --resume, N - k steps: same networks, Adam, replay, environments and logs as N steps at once."""
    flags = [*flags, "--buffer-size", buffer_size, "--log-residual-norms"]
    flags = [*flags, "--total-timesteps", 1000]
    whole, replay = run_and_replay(crl, *flags)
    part = stopped_run(crl, 130, *flags)
    assert checkpoint(part)["global_step"] == 520
    _, resumed = run_and_replay(crl, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert_same(replay, resumed)
    assert scalars(whole) == scalars(part)


def test_resume_without_the_replay_refills_before_it_learns(capsys):
    part = run(*POINT, "--no-checkpoint-replay")
    assert checkpoint(part)["replay"] is None
    resumed = run("--resume", part, "--total-timesteps", 840)
    assert "the checkpoint holds no replay" in capsys.readouterr().out
    logged = scalars(resumed)
    assert [logged["charts/gradient_steps"][s] for s in range(600, 841, 40)] == [39, 39, 39, 42, 45, 48, 51]


def test_resume_takes_flags_from_the_run_and_refuses_others(capsys):
    part = run(*POINT, "--seed", 3, "--depth", 8)
    args = crl.parse_args(["--resume", str(part), "--total-timesteps", "800", "--eval-episodes", "5"])
    assert (args.seed, args.depth, args.total_timesteps, args.eval_episodes) == (3, 8, 800, 5)
    for flags, message in (
        (["--seed", "1"], "--seed 1: a resumed run keeps its own value, 3"),
        (["--depth", "4"], "--depth 4: a resumed run keeps its own value, 8"),
        (["--batch-size", "16"], "--batch-size 16: a resumed run keeps its own value, 8"),
    ):
        with pytest.raises(SystemExit) as stopped:
            crl.parse_args(["--resume", str(part), *flags])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_resume_of_a_finished_run_only_finishes_it(capsys):
    """As after a kill between the last checkpoint and the summary."""
    part = run(*POINT, "--save-value-map")
    before, summary = checkpoint(part), json.loads((part / "summary.json").read_text())
    for name in ("summary.json", "value_map.npz"):
        (part / name).unlink()
    run("--resume", part)
    assert "has already taken 600 steps" in capsys.readouterr().out
    assert_same(before, checkpoint(part))
    again = json.loads((part / "summary.json").read_text())
    assert {k: v for k, v in again.items() if k != "walltime"} == {k: v for k, v in summary.items() if k != "walltime"}
    assert (part / "value_map.npz").exists()


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id ant_u9_maze", "--env-id ant_u9_maze: unknown environment; known: point, point_room"),
        ("--eval-env-id nothing", "--eval-env-id nothing: unknown environment"),
        ("--eval-env-id ant_u_maze", "--eval-env-id ant_u_maze: must be the same robot as --env-id point_room"),
        ("--depth 6", "--depth 6: must be a multiple of 4"),
        ("--critic-depth 10", "--critic-depth 10: must be a multiple of 4"),
        ("--depth 0", "--depth 0: must be greater than 0"),
        ("--width -1", "--width -1: must be greater than 0"),
        ("--batch-size 0", "--batch-size 0: must be greater than 0"),
        ("--num-envs -3", "--num-envs -3: must be greater than 0"),
        ("--total-timesteps -5", "--total-timesteps -5: must be greater than 0"),
        ("--eval-episodes 0", "--eval-episodes 0: must be greater than 0"),
        ("--learning-rate 0", "--learning-rate 0.0: must be greater than 0"),
        ("--gamma 1.0", "--gamma 1.0: must lie between 0 and 1"),
        ("--seed -1", "--seed -1: must lie between 0 and 2**32 - 1"),
        ("--seed 4294967296", "--seed 4294967296: must lie between"),
        ("--num-threads -2", "--num-threads -2: must not be negative"),
        ("--buffer-size 5000", "--buffer-size 5000: must hold an episode of every environment, 9600 steps"),
        ("--learning-starts 100", "--learning-starts 100: must lie between an episode of every environment, 9600"),
        ("--learning-starts 600000", "--learning-starts 600000: must lie between"),
        ("--env-id point_u_maze --buffer-size 19250 --learning-starts 19250", "and the 19200 that the replay holds"),
        ("--total-timesteps 10000", "--total-timesteps 10000: must leave room to learn"),
        ("--buffer-size 1000000000000 --total-timesteps 1000000000000", "cpu has"),
        ("--depth 40000 --width 20000", "--depth 40000: the run needs about"),
        ("--device mps", "--device mps: torch sees no such device here"),
        ("--device cpu --cudagraphs", "--cudagraphs True: needs --device cuda, not cpu"),
        ("--track", "--track : needs Weights & Biases"),
        ("--learning-rate nan", "--learning-rate nan: must be a finite number"),
        ("--batch-size 1000000", "--batch-size 1000000: the run needs about"),
        ("--eval-episodes 100000000", "--eval-episodes 100000000: the run needs about"),
        ("--exp-name ../../x", "--exp-name ../../x: must not contain /"),
        ("--resume nowhere", "--resume nowhere: is not a run folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stopped:
        run(*flags.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert os.listdir() == []


def test_a_checkpoint_holds_only_the_filled_part_of_the_ring(tmp_path):
    replay = crl.Replay(100_000, 4, 29, 8, 2, torch.device("cpu"))
    for t in range(10):
        replay.add(torch.full((4, 29), float(t)), torch.zeros(4, 8), torch.zeros(4))
    crl.save_file(tmp_path / "replay.pt", replay.state_dict())
    assert (tmp_path / "replay.pt").stat().st_size < 20_000
    smaller = crl.Replay(10, 4, 29, 8, 2, torch.device("cpu"))
    smaller.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    assert torch.equal(smaller.state[:, 0, 0], torch.arange(10.0))


@pytest.mark.parametrize("flag, tolerance", [("--amp", 0.2), ("--compile", 0.01)])
def test_speed_flags_change_bits_but_not_results(flag, tolerance):
    plain, fast = (checkpoint(run(*POINT, *flags))["agent"] for flags in ([], [flag]))
    weights = "actor.trunk.head.weight"
    assert not torch.equal(plain[weights], fast[weights])
    torch.testing.assert_close(plain[weights], fast[weights], atol=tolerance, rtol=tolerance)


def test_torch_settings_reach_the_run():
    run(*POINT, "--torch-deterministic", "--tf32")
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.matmul.fp32_precision == "tf32"
    run(*POINT)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    "flag",
    ["--no-residual", "--norm none", "--norm hypersphere", "--activation relu", "--contrastive backward",
     "--contrastive symmetric", "--gamma 0.9", "--logsumexp-coef 1", "--entropy-coef 2", "--repr-dim 8",
     "--actor-depth 8", "--critic-depth 8", "--actor-width 8", "--critic-width 8", "--fixed-resets"],
)  # fmt: skip
def test_every_switch_changes_the_run(flag):
    plain, switched = run(*POINT), run(*POINT, *flag.split())
    a, b = scalars(plain)["losses/critic"], scalars(switched)["losses/critic"]
    assert a.keys() == b.keys() and a != b
    assert np.isfinite(list(b.values())).all()
