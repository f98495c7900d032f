"""redo_dqn_atari.py through its command line: a real game, counts and schedules, resume, the methods, bad input."""

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
from helpers import ATARI, ATARI_DQN, assert_same, checkpoint, run_and_replay, scalars, stopped_run
from test_redo_dqn_atari import FakeGames

import redo_dqn_atari as redo

BREAKOUT = ["--env-id", "ALE/Breakout-v5", "--protocol", "cleanrl", *ATARI]


def run(*flags):
    return helpers.run(redo, *flags)


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_run_through_the_command_line(tmp_path):
    """As a user: the script alone, copied into an empty folder."""
    shutil.copy(redo.__file__, tmp_path / "copied.py")
    flags = [*ATARI, "--exp-name", "first", "--save-model"]
    done = subprocess.run([sys.executable, "copied.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean return" in done.stdout
    (run_dir,) = Path("runs").iterdir()
    assert run_dir.name.startswith("ALE-DemonAttack-v5__first__1__")
    description = json.loads((run_dir / "args.json").read_text())
    assert description["action_repeat"] == 4 and description["args"]["redo_tau"] == 0.1
    assert {"torch", "ale_py", "gymnasium", "numpy", "python"} <= set(description["versions"])
    files = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
    assert files == {"args.json", "checkpoint.pt", "lock", "summary.json", "model.pt"}
    logged = scalars(run_dir)
    assert sorted(logged["eval/episodic_return"]) == [120, 240]
    # bursts of 4 at steps 64, 68, ..., 236
    assert logged["charts/gradient_steps"][240] == 4 * 44 and logged["charts/gradient_steps"][60] == 0
    assert logged["charts/frames"][240] == 960 and logged["charts/epsilon"][60] == 1
    assert sorted(logged["plasticity/dormant_ratio_tau0.025/conv2"]) == [60, 120, 180, 240]
    assert list(logged["charts/episodic_length"].values()) == [50] * 4
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["global_step"], summary["gradient_steps"]) == (240, 176)
    q_network = {k.removeprefix("q_network."): v for k, v in checkpoint(run_dir)["agent"].items() if "q_network" in k}
    assert_same(q_network, dict(torch.load(run_dir / "model.pt", weights_only=True)))


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of what train() does, with the number of gradient steps before each."""
    seen = {"updates": [], "recycle": [], "reset_layers": [], "reset_adam_step": [], "update_target": []}
    for name in ("td_update", "recycle", "reset_layers", "reset_adam_step"):
        original = getattr(redo, name)

        def counted(*args, original=original, name=name):
            seen[name.replace("td_update", "updates")].append(len(seen["updates"]))
            return original(*args)

        monkeypatch.setattr(redo, name, counted)
    original_target = redo.DQNAgent.update_target

    def update_target(agent):
        seen["update_target"].append(len(seen["updates"]))
        original_target(agent)

    monkeypatch.setattr(redo.DQNAgent, "update_target", update_target)
    return seen


@pytest.mark.parametrize("ratio", [0.25, 0.5, 2])
def test_counts_and_schedules(ratio, calls):
    """After the warm-up: 4 x ratio updates at every multiple of 4; a target copy every 40 steps, whatever the ratio."""
    logged = scalars(run(*ATARI, "--replay-ratio", ratio, "--method", "redo"))
    burst = round(4 * ratio)
    updates = burst * 44  # steps 64, 68, ..., 236
    assert len(calls["updates"]) == updates
    assert calls["update_target"] == [burst * (t - 60) // 4 for t in range(80, 240, 40)]
    assert calls["recycle"] == list(range(30, updates + 1, 30))  # gradient steps, not at 0
    assert not calls["reset_layers"] and not calls["reset_adam_step"]
    assert sum(logged["plasticity/redo_recycled/all"].values()) > 0


def test_methods(calls):
    run(*ATARI_DQN, "--method", "dqn")
    assert len(calls["updates"]) == 176 and not any(calls[k] for k in ("recycle", "reset_layers", "reset_adam_step"))
    calls["updates"].clear()
    logged = scalars(run(*ATARI_DQN, "--method", "reset", "--reset-layers", "head"))
    assert calls["reset_layers"] == [50, 100, 150] and not calls["recycle"]
    assert len(logged["plasticity/reset"]) == 3
    calls["updates"].clear()
    run(*ATARI_DQN, "--method", "adam-step-reset")
    assert calls["reset_adam_step"] == list(range(30, 176, 30)) and not calls["recycle"]
    calls["updates"].clear(), calls["reset_adam_step"].clear()
    run(*ATARI, "--redo-adam", "moments+tensor-step", "--redo-tau", 0)
    assert calls["reset_adam_step"] == calls["recycle"] == list(range(30, 176, 30))


@pytest.mark.parametrize("flags, function, expected", [
    (["--redo-batch-size", 8], "recycle", [30, 60]), (["--method", "adam-step-reset"], "reset_adam_step", [30, 60]),
    (["--method", "reset"], "reset_layers", [50]),
])  # fmt: skip
@pytest.mark.parametrize("end", [90, 100])
def test_recycling_and_resets_end(flags, function, expected, end, calls):
    """The end itself is excluded: 90 = 3 x 30, 100 = 2 x 50."""
    run(*ATARI_DQN, *flags, "--redo-end-gradient-steps", end)
    assert calls[function] == expected + [90] * (end > 90 and 30 in expected) and len(calls["updates"]) == 176


def test_looking_and_an_idle_recycler_do_not_change_what_is_learned():
    plain = checkpoint(run(*ATARI_DQN, "--method", "dqn"))
    looked = checkpoint(run(*ATARI_DQN, "--method", "dqn", "--dormant-every", 7, "--eval-every", 33))
    idle = checkpoint(run(*ATARI, "--method", "redo", "--redo-period-gradient-steps", 1000))
    for other in (looked, idle):
        for part in ("agent", "optimizer", "replay", "action_rng"):
            assert_same(plain[part], other[part], part)


# --- determinism and resume -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [
    [*ATARI, "--n-step", 3, "--double"], [*ATARI, "--redo-adam", "per-element", "--amp"],
    [*ATARI_DQN, "--method", "reset", "--network", "resnet", "--padding", "same"],
    [*BREAKOUT, "--max-episode-steps", 1000],
], ids=["n-step", "per-element", "reset", "lives"])  # fmt: skip
def test_resume_is_bit_identical(flags):
    """k steps, stop in the middle of an episode, --resume, N - k steps: the same as N steps at once."""
    whole, replay = run_and_replay(redo, *flags)
    part = stopped_run(redo, 130, *flags)
    assert len(checkpoint(part)["episode_actions"]) > 0 and checkpoint(part)["global_step"] == 130
    _, resumed = run_and_replay(redo, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert_same(replay, resumed)
    assert scalars(whole) == scalars(part)


@pytest.mark.parametrize("fire", [True, False])
def test_resume_knows_the_return_so_far_and_a_life_just_lost(fire, monkeypatch):
    """Stopped after two of an episode's four steps, the second of which took a life."""
    monkeypatch.setattr(redo, "make_games", lambda args, n: FakeGames(n, longer=2, fire=fire))
    flags = [*ATARI, "--protocol", "cleanrl"]
    whole = run(*flags)
    part, replay = run_and_replay(redo, "--resume", stopped_run(redo, 130, *flags))
    assert_same(checkpoint(whole), checkpoint(part))
    record = replay["record"]
    # In every episode's third step FIRE, action 1, or where there is none a no-op, action 0
    assert (record[2::5, 0] == int(fire)).all() and len(record[2::5]) > 40
    assert set(scalars(part)["charts/episodic_return"].values()) == {40.0}


def test_resume_without_the_replay_refills_before_it_learns(capsys):
    part = run(*ATARI, "--no-checkpoint-replay")
    assert checkpoint(part)["replay"] is None
    logged = scalars(run("--resume", part, "--total-timesteps", 400))
    assert "the checkpoint holds no replay" in capsys.readouterr().out
    # 60 steps of refilling, then bursts of 4 at 304, ..., 396
    assert [logged["charts/gradient_steps"][t] for t in (240, 300, 320, 400)] == [176, 176, 192, 272]


def test_resume_takes_flags_from_the_run_and_refuses_others(capsys):
    part = run(*ATARI, "--seed", 3, "--width", 0.2, "--dormant-tau", "0", "0.5")
    args = redo.parse_args(["--resume", str(part), "--total-timesteps", "800", "--eval-steps", "5"])
    assert (args.seed, args.width, args.dormant_tau, args.eval_steps) == (3, 0.2, (0.0, 0.5), 5)
    for flags, message in (
        (["--seed", "1"], "--seed 1: a resumed run keeps its own value, 3"),
        (["--redo-tau", "0.5"], "--redo-tau 0.5: a resumed run keeps its own value, 0.1"),
        (["--env-id", "ALE/Pong-v5"], "--env-id ALE/Pong-v5: a resumed run keeps its own value, ALE/DemonAttack-v5"),
    ):
        with pytest.raises(SystemExit) as stopped:
            redo.parse_args(["--resume", str(part), *flags])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_resume_notices_another_emulator(capsys):
    part = stopped_run(redo, 130, *ATARI)
    saved = checkpoint(part)
    saved["obs"][0, -1, 40, 40] += 1
    torch.save(saved, part / "checkpoint.pt")
    with pytest.raises(SystemExit) as stopped:
        run("--resume", part)
    assert stopped.value.code == 2 and "plays the episode that was interrupted differently" in capsys.readouterr().err


def test_overlapped_and_serial_execution_give_the_same_numbers(monkeypatch):
    overlapped = run(*ATARI)
    make_games = redo.make_games

    class SerialGames:
        """Plays the whole step in send()."""

        def __init__(self, games):
            self.games, self.result = games, None

        def __getattr__(self, name):
            return getattr(self.games, name)

        def send(self, action):
            self.result = self.games.step(action)

        def recv(self):
            return self.result

    monkeypatch.setattr(redo, "make_games", lambda *args: SerialGames(make_games(*args)))
    assert_same(checkpoint(overlapped), checkpoint(run(*ATARI)))


# --- what goes into the replay ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("protocol, lives", [("dopamine", False), ("cleanrl", True)])
def test_the_replay_holds_what_happened(truncate, protocol, lives, monkeypatch):
    """Episodes of 2 steps (the reward of 10 is clipped to 1); the life is lost in their last step."""
    monkeypatch.setattr(redo, "make_games", lambda args, n: FakeGames(n, truncate=truncate))
    part, replay = run_and_replay(redo, *ATARI_DQN, "--protocol", protocol, "--total-timesteps", 120, "--method", "dqn")
    record = replay["record"][:-1]  # without the newest frame, where nothing has been done yet
    kind = torch.arange(len(record)) % 3  # two steps and an episode's last frame
    assert torch.equal(record[:, 3], kind.float()) and torch.equal(replay["frames"][:-1, 0, 0], kind.byte())
    assert torch.equal(record[:, 0] < 0, kind == 2)
    assert set(record[kind == 0, 1].tolist()) == {1.0}
    terminated = record[kind == 1, 2]
    assert set(terminated.tolist()) == {1.0 if not truncate or lives else 0.0}
    assert not record[kind == 0, 2].any()
    logged = scalars(part)
    assert set(logged["charts/episodic_return"].values()) == {20.0}  # unclipped


def test_rewards_can_stay_unclipped(monkeypatch):
    monkeypatch.setattr(redo, "make_games", lambda args, n: FakeGames(n))
    _, replay = run_and_replay(redo, *ATARI, "--no-clip-reward", "--total-timesteps", 120)
    assert set(replay["record"][:, 1].tolist()) == {0.0, 10.0}


def test_fire_is_pressed_after_a_lost_life():
    """Breakout's ball has to be launched; without it the default protocol leaves that to the agent."""
    record = run_and_replay(redo, *BREAKOUT, "--max-episode-steps", 1000, "--seed", 4)[1]["record"]
    lost = (record[:-1, 2] == 1) & (record[1:, 0] >= 0) & (record[1:, 3] > 0)  # and the game went on
    assert lost.sum() >= 2 and (record[1:, 0][lost] == 1).all()


# --- flags ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag", [
    "--padding same", "--network resnet --padding same", "--width 0.2", "--activation leaky_relu", "--layer-norm",
    "--init torch", "--loss mse", "--n-step 3", "--gamma 0.9", "--learning-rate 1e-3", "--adam-eps 1e-8",
    "--weight-decay 0.1", "--target-network-frequency 20", "--start-e 0.5", "--end-e 0.5", "--exploration-steps 50",
    "--exploration-starts 0", "--sticky-actions 0", "--noop-max 30", "--batch-size 16", "--redo-tau 0.5",
    "--redo-batch-size 32", "--redo-adam none", "--redo-compat-flatten", "--method dqn --redo-batch-size 64",
    "--protocol cleanrl",
])  # fmt: skip
def test_every_switch_changes_the_run(flag, monkeypatch):
    if not any(word in flag for word in ("sticky", "noop", "protocol")):
        monkeypatch.setattr(redo, "make_games", lambda args, n: FakeGames(n))
    logged = [scalars(run(*ATARI, *flags)) for flags in ([], flag.split())]
    a, b = (values["losses/td"] for values in logged)
    assert a.keys() == b.keys() and a != b
    assert np.isfinite(list(b.values())).all()


@pytest.mark.parametrize("flag, tolerance", [("--amp", 0.1), ("--compile", 0.01)])
def test_speed_flags_change_bits_but_not_results(flag, tolerance):
    flags = [*ATARI_DQN, "--method", "dqn"]
    plain, fast = (checkpoint(run(*flags, *more))["agent"]["q_network.layers.head.weight"] for more in ([], [flag]))
    if flag == "--compile":  # may well give the same bits
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    else:
        assert not torch.equal(plain, fast)
    torch.testing.assert_close(plain, fast, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("flags, message", [
    ("--env-id ALE/DaemonAttack-v5", "ALE/<Game>-v5); did you mean ALE/DemonAttack-v5?"),
    ("--env-id Pong", "--env-id Pong: is no game of the Arcade Learning Environment (ALE/<Game>-v5)"),
    ("--replay-ratio 0.3", "--replay-ratio 0.3: must be a positive multiple of 0.25"),
    ("--replay-ratio 0", "--replay-ratio 0.0: must be a positive multiple of 0.25"),
    ("--replay-ratio nan", "--replay-ratio nan: must be a finite number"),
    ("--redo-tau -0.1", "--redo-tau -0.1: must not be negative"),
    ("--dormant-tau 0 -1", "--dormant-tau (0.0, -1.0): must hold thresholds that are not negative"),
    ("--redo-period-gradient-steps 0", "--redo-period-gradient-steps 0: must be greater than 0"),
    ("--reset-layers fc", "--reset-layers ('fc',): must be layers of this network: conv1, conv2, conv3, dense, head"),
    ("--buffer-size 100000000 --total-timesteps 100000000", "--buffer-size 100000000: the run needs about 710"),
    ("--learning-starts 30000 --buffer-size 25000", "--learning-starts 30000: must be at least --n-step 1, and"),
    ("--batch-size 30000", "--batch-size 30000: must be at most --learning-starts 20000"),
    ("--redo-batch-size 20001", "--redo-batch-size 20001: must be at most --learning-starts 20000"),
    ("--rank-batch-size 10000000", "--rank-batch-size 10000000: the run needs about"),
    ("--width 63", "--width 63.0: the run needs about"),
    ("--max-episode-steps 1000000000", "--max-episode-steps 1000000000: must be at most 27000"),
    ("--noop-max 100000000", "--noop-max 100000000: must be at most 27000"),
    ("--total-timesteps 20000", "--total-timesteps 20000: must be more than --learning-starts 20000"),
    ("--learning-starts 2 --n-step 3 --batch-size 1 --redo-batch-size 1", "must be at least --n-step 3"),
    ("--buffer-size 6 --learning-starts 5 --batch-size 1 --redo-batch-size 1", "--buffer-size 6: is too small"),
    ("--network resnet --padding valid", "--padding valid: the ResNet's convolutions are always padded"),
    ("--rank-batch-size 500", "--rank-batch-size 500: must be at least twice --dormant-batch-size 256"),
    ("--width 0", "--width 0.0: must be greater than 0"),
    ("--width 1000", "--width 1000.0: must be less than 64"),
    ("--learning-rate nan", "--learning-rate nan: must be a finite number"),
    ("--sticky-actions 1.5", "--sticky-actions 1.5: must lie between 0 and 1"),
    ("--eval-envs 0", "--eval-envs 0: must be greater than 0"),
    ("--seed -1", "--seed -1: must lie between 0 and 2**32 - 1"),
        ("--seed 4294967296", "--seed 4294967296: must lie between"),
    ("--exp-name a/b", "--exp-name a/b: must not contain /"),
    ("--cudagraphs --device cpu", "--cudagraphs True: needs --device cuda, not cpu"),
    ("--device mps", "--device mps: torch sees no such device here"),
    ("--redo-end-gradient-steps 0", "--redo-end-gradient-steps 0: must be greater than 0"),
    ("--method dqn --redo-end-gradient-steps 9", "--redo-end-gradient-steps 9: --method dqn recycles and resets"),
    ("--method dqn --redo-tau 0.1", "--redo-tau 0.1: does nothing without --method redo"),
    ("--method reset --redo-adam per-element", "--redo-adam per-element: does nothing without --method redo"),
    ("--method dqn --redo-batch-size 8", "--redo-batch-size 8: does nothing without --method redo"),
    ("--method adam-step-reset --redo-compat-flatten", "--redo-compat-flatten True: does nothing without"),
    ("--reset-layers head", "--reset-layers ('head',): does nothing without --method reset"),
    ("--network resnet --redo-compat-flatten", "--redo-compat-flatten True: of the ResNet no layer that"),
    ("--track", "--track : needs Weights & Biases"),
    ("--resume nowhere", "--resume nowhere: is not a run folder"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stopped:
        run(*flags.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert os.listdir() == []


def test_a_network_that_does_not_fit_is_refused_before_it_is_built():
    code = (
        "import resource, time, redo_dqn_atari as redo\n"
        "redo.memory = lambda device: 16e9\n"
        "args = redo.parse_args(['--width', '63', '--device', 'cpu'])\n"
        "began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    redo.train(args)\n"
        "finally:\n    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    print(after - before, time.process_time() - began)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--width 63.0: the run needs about" in done.stderr
    kilobytes, seconds = map(float, done.stdout.split())
    assert kilobytes < 100_000 and seconds < 2


def test_memory_counts_the_networks_activations(monkeypatch, capsys):
    """A look at 2048 states takes 5.4 GB in the ResNet (measured), 0.6 GB in the Nature network."""
    monkeypatch.setattr(redo, "memory", lambda device: 5e9)
    flags = dict(device="cpu", buffer_size=30_000)
    redo.resolve_args(redo.Args(**flags))
    with pytest.raises(SystemExit):
        redo.resolve_args(redo.Args(**flags, network="resnet"))
    assert "--rank-batch-size 2048: the run needs about" in capsys.readouterr().err
