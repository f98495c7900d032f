"""crl_deep.py through its command line: real environments, resume, determinism, signals, full disks and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import POINT, assert_golden, assert_same, checkpoint, run_and_replay, scalars, stopped_run

import crl_deep as crl

SCRIPT = Path(crl.__file__)
ANT = ["--env-id", "ant_u_maze", *POINT]
HUMANOID = ["--env-id", "humanoid", *POINT]
GOLDEN = {
    "losses/critic": {120: 4.829084, 360: 3.149372, 600: 2.387816},
    "losses/actor": {120: 11.63084, 360: 3.727359, 600: 2.130058},
    "losses/alpha_value": {120: 1.000566, 360: 1.000373, 600: 0.9945613},
    "contrastive/logits_pos": {120: -7.318677, 360: -5.337744, 600: -3.821913},
    "eval/final_distance": {600: 12.21385},
}


def run(*flags):
    return helpers.run(crl, *flags)


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_run_through_the_command_line(tmp_path):
    """As a user: the script alone, copied into an empty folder."""
    shutil.copy(SCRIPT, tmp_path / "copied.py")
    flags = [*POINT, *"--env-id point_u_maze --exp-name first --save-model".split()]
    done = subprocess.run([sys.executable, "copied.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean return" in done.stdout
    (run_dir,) = Path("runs").iterdir()
    assert run_dir.name.startswith("point_u_maze__first__1__")
    description = json.loads((run_dir / "args.json").read_text())
    assert description["args"]["actor_depth"] == 4 and description["args"]["eval_env_id"] == "point_u_maze_eval"
    assert description["versions"]["torch"] == torch.__version__
    files = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
    assert files == {"args.json", "checkpoint.pt", "lock", "summary.json", "model.pt", "copied.py"}
    logged = scalars(run_dir)
    # 600 steps are 15 unrolls of 40; the first 2 fill the replay, evaluations come every 2 unrolls and at both ends
    assert sorted(logged["eval/time_at_goal"]) == [0, 80, 160, 240, 320, 400, 480, 560, 600]
    assert logged["eval/time_at_goal"] == logged["eval/episodic_return"]
    assert list(logged["charts/gradient_steps"].values()) == [0, 0, *range(3, 40, 3)]
    assert list(logged["losses/critic"]) == list(range(120, 601, 40))
    assert list(logged["charts/episodic_return"]) == list(range(80, 601, 80))  # an episode lasts 2 unrolls
    assert set(logged["charts/episodic_length"].values()) == {20} and set(logged["charts/fallen"].values()) == {0}
    for tag in ("eval/success_any", "eval/final_distance", "losses/actor", "losses/alpha", "contrastive/logits_pos"):
        assert all(np.isfinite(list(logged[tag].values()))), tag
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["global_step"], summary["gradient_steps"]) == (600, 39)
    assert summary["eval/time_at_goal_last5"] == pytest.approx(logged["eval/time_at_goal_last5"][600])
    weights = torch.load(run_dir / "model.pt", weights_only=True)
    assert_same(dict(weights), dict(checkpoint(run_dir)["agent"]))


@pytest.mark.parametrize("env_id", ["ant", "ant_u_maze_gen_1f2f3f", "humanoid", "humanoid_u_maze", "point_room"])
def test_every_family_trains(env_id):
    logged = scalars(run("--env-id", env_id, *POINT, "--depth", 8))
    assert all(np.isfinite(list(values.values())).all() for values in logged.values())


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


def test_evaluations_and_checkpoints_between_training_steps():
    """Every 40 steps there is one: evaluations are due every 100 steps, at 0, 120, 200, 320, ..."""
    logged = scalars(run(*POINT, "--eval-every", 100))
    assert sorted(logged["eval/time_at_goal"]) == [0, 120, 200, 320, 400, 520, 600]


def test_a_golden_run():
    """Losses stored on 2026-11-24 from a run that was bit-identical to the script's first version."""
    assert_golden(scalars(run("--env-id", "ant_u4_maze", *POINT, "--depth", 8)), GOLDEN)


# --- determinism and resume -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [POINT, ANT], ids=["point", "ant"])
def test_same_seed_same_bits_other_seed_other_bits(flags):
    first, second, other = run(*flags), run(*flags), run(*flags, "--seed", 2)
    assert_same(checkpoint(first), checkpoint(second))
    assert scalars(first) == scalars(second)
    assert not torch.equal(checkpoint(first)["envs"]["physics"], checkpoint(other)["envs"]["physics"])


@pytest.mark.parametrize("flags", [POINT, ANT, HUMANOID], ids=["point", "ant", "humanoid"])
@pytest.mark.parametrize("buffer_size", [400, 10_000], ids=["wrapped", "growing"])
def test_stopped_and_resumed_is_bit_identical(flags, buffer_size):
    """A signal ends the run after its training step: same networks, Adam, replay, environments and logs as at once."""
    flags = [*flags, "--buffer-size", buffer_size, "--total-timesteps", 1000]
    whole, replay = run_and_replay(crl, *flags)
    part = stopped_run(crl, 125, *flags)
    assert checkpoint(part)["global_step"] == 520
    _, resumed = run_and_replay(crl, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert_same(replay, resumed)
    assert scalars(whole) == scalars(part)


@pytest.mark.parametrize("flags", [POINT, [*ANT, "--depth", "8", "--norm", "hypersphere"]], ids=["point", "ant"])
@pytest.mark.parametrize("dies", [61, 95])
def test_killed_and_resumed_is_bit_identical(flags, dies, monkeypatch):
    """Checkpoints at steps 40, 80, ...; then killed once more within the resumed run."""
    monkeypatch.setattr(crl, "GOAL_RADIUS", 3.0)  # so large that the last five evaluations differ
    options = dict(every=30, saved=(dies - 1) // 10 * 40, again=(25, 80))
    part = helpers.assert_killed_and_resumed_is_the_same(crl, dies, *flags, **options)
    assert flags[0] != POINT[0] or len(set(scalars(part)["eval/time_at_goal_last5"].values())) > 3


@pytest.mark.parametrize("name, call, step", [
    ("reset", 20, 80), ("step", 66, 120), ("update", 7, 200), ("evaluate", 3, 160),
], ids=str)  # fmt: skip
def test_a_signal_ends_the_run_after_its_training_step(name, call, step, monkeypatch, capsys):
    """In a reset, in a step, in learning, and in an evaluation, which is then played again."""
    where = crl if name in ("update", "evaluate") else crl.MujocoEnvs
    function, count = getattr(where, name), []

    def stopping(*values, **options):
        count.append(0)
        if len(count) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*values, **options)

    whole = run(*POINT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(where, name, stopping)
        run(*POINT)
    printed = capsys.readouterr().err
    assert stopped.value.code == 143 and "SIGTERM; saved as checkpoint.pt; to continue: --resume runs/" in printed
    (part,) = set(Path("runs").iterdir()) - {whole}
    assert checkpoint(part)["global_step"] == step
    run("--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert scalars(whole) == scalars(part)


def test_all_resets_draw_from_streams_of_their_own(monkeypatch):
    """Training's and evaluations', by environment and episode; everything else comes from torch's own stream."""
    seeds, make = [], np.random.default_rng
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: seeds.append(tuple(map(int, seed))) or make(seed))
        run(*POINT)
    assert {seed[:2] for seed in seeds} == {(1, 0), (1, 1)} and len(seeds) > 4 * 7 + 3 * 9
    draws = [tuple(make(list(seed)).random(3)) for seed in seeds]
    assert len(set(draws)) == len(draws)


def test_resume_without_the_replay_refills_before_it_learns(capsys):
    part = run(*POINT, "--checkpoint-replay", "never")
    assert "replay" not in checkpoint(part)
    resumed = run("--resume", part, "--total-timesteps", 840)
    assert "it is refilled before learning goes on" in capsys.readouterr().err
    logged = scalars(resumed)
    assert [logged["charts/gradient_steps"][s] for s in range(600, 841, 40)] == [39, 39, 39, 42, 45, 48, 51]


def test_a_refill_that_is_interrupted_goes_on():
    part = stopped_run(crl, 95, *POINT, "--checkpoint-replay", "never")
    stopped_run(crl, 5, "--resume", part, "--checkpoint-replay", "unfinished")
    logged = scalars(run("--resume", part))
    assert logged["charts/replay_size"][440] == 40 and logged["charts/replay_size"][480] == 80
    assert [logged["charts/gradient_steps"][s] for s in range(400, 601, 40)] == [24, 24, 24, 27, 30, 33]


def test_a_longer_run_counts_only_the_evaluations_that_were_due():
    part = run(*POINT)  # evaluates at 560, and because it ends there at 600
    run("--resume", part, "--total-timesteps", 800)
    assert sorted(scalars(part)["eval/time_at_goal"]) == [*range(0, 561, 80), 600, 640, 720, 800]
    assert list(checkpoint(part)["history"]) == list(range(0, 801, 80))


def test_resume_takes_flags_from_the_run_and_refuses_others(capsys):
    part = run(*POINT, "--seed", 3, "--depth", 8)
    args = crl.parse_args(["--resume", str(part), "--total-timesteps", "800", "--eval-every", "50"])
    assert (args.seed, args.depth, args.actor_depth, args.total_timesteps, args.eval_every) == (3, 8, 8, 800, 50)
    for flags, message in (
        (["--seed", "1"], "--seed 1: a resumed run keeps its own value, 3"),
        (["--depth", "4"], "--depth 4: a resumed run keeps its own value, 8"),
        (["--batch-size", "16"], "--batch-size 16: a resumed run keeps its own value, 8"),
    ):
        with pytest.raises(SystemExit) as stopped:
            crl.parse_args(["--resume", str(part), *flags])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id ant_u9_maze", "--env-id ant_u9_maze: unknown environment; known: point, point_room"),
        ("--eval-env-id nothing", "--eval-env-id nothing: unknown environment"),
        ("--eval-env-id ant_u_maze", "--eval-env-id ant_u_maze: must be the same robot as --env-id point_room"),
        ("--depth 6", "--depth 6: must be a multiple of 4"),
        ("--critic-depth 10", "--critic-depth 10: must be a multiple of 4"),
        ("--depth 0", "--depth 0: must lie between 1 and"),
        ("--width -1", "--width -1: must lie between 1 and"),
        ("--batch-size 0", "--batch-size 0: must lie between 1 and"),
        ("--num-envs -3", "--num-envs -3: must lie between 1 and"),
        ("--total-timesteps -5", "--total-timesteps -5: must lie between 1 and"),
        ("--eval-episodes 0", "--eval-episodes 0: must lie between 1 and"),
        ("--learning-rate -1", "--learning-rate -1.0: must lie between 0 and"),
        ("--episode-length 1", "--episode-length 1: must lie between 2 and"),
        ("--gamma 1.0", "--gamma 1.0: must lie between 1e-06 and 0.999999"),
        ("--seed -1", "--seed -1: must lie between 0 and 4294967295"),
        ("--seed 4294967296", "--seed 4294967296: must lie between"),
        ("--buffer-size 5000", "--buffer-size 5000: must hold an episode of every environment, 9600 steps"),
        ("--learning-starts 100", "--learning-starts 100: must lie between an episode of every environment, 9600"),
        ("--learning-starts 600000", "--learning-starts 600000: must lie between"),
        ("--env-id point_u_maze --buffer-size 19250 --learning-starts 19250", "and the 19200 that the replay holds"),
        ("--total-timesteps 10000", "--total-timesteps 10000: must leave room to learn"),
        ("--buffer-size 1000000000000 --total-timesteps 1000000000000", "cpu has"),
        ("--depth 40000 --width 20000", "--depth 40000: the run needs about"),
        ("--depth 8 --actor-depth 4 --critic-depth 4", "--depth 8: does nothing beside --actor-depth 4 and"),
        ("--device mps", "--device mps: torch sees no such device here"),
        ("--device cpu --cudagraphs", "--cudagraphs True: needs --device cuda, not cpu"),
        ("--track", "--track True: needs Weights & Biases"),
        ("--learning-rate nan", "--learning-rate nan: must lie between 0 and"),
        ("--batch-size 1000000", "--batch-size 1000000: the run needs about"),
        ("--eval-episodes 1000000000", "--eval-episodes 1000000000: the run needs about"),
        ("--resume nowhere", "--resume nowhere: is not the folder of a run that this script can continue"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(crl, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run(*flags.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert os.listdir() == []


def test_a_checkpoint_holds_only_the_filled_part_of_the_ring(tmp_path):
    replay = crl.Replay(100_000, 4, 29, 2, 8, torch.device("cpu"))
    for t in range(10):
        replay.add(torch.full((4, 29), float(t)), torch.zeros(4, 8), torch.zeros(4))
    crl.save_file(tmp_path / "replay.pt", replay.state_dict())
    assert (tmp_path / "replay.pt").stat().st_size < 20_000
    smaller = crl.Replay(10, 4, 29, 2, 8, torch.device("cpu"))
    smaller.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    assert torch.equal(smaller.state[:, 0, 0], torch.arange(10.0))


@pytest.mark.parametrize("flag, tolerance", [("--precision bfloat16", 0.2), ("--compile", 0.01)])
def test_speed_flags_change_bits_but_not_results(flag, tolerance):
    plain, fast = (checkpoint(run(*POINT, *flags))["agent"] for flags in ([], flag.split()))
    weights = "actor.trunk.head.weight"
    assert not torch.equal(plain[weights], fast[weights])
    torch.testing.assert_close(plain[weights], fast[weights], atol=tolerance, rtol=tolerance)


def test_torch_settings_reach_the_run():
    run(*POINT, "--torch-deterministic")
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.matmul.fp32_precision == "tf32"
    run(*POINT, "--precision", "float32")
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    "flag",
    ["--no-residual", "--norm none", "--norm hypersphere", "--activation relu", "--contrastive backward",
     "--contrastive symmetric", "--gamma 0.9", "--logsumexp-coef 1", "--entropy-coef 2", "--repr-dim 8",
     "--actor-depth 8", "--critic-depth 8", "--width 8", "--fixed-resets", "--precision bfloat16", "--batch-size 16",
     "--learning-rate 0.1", "--num-envs 2", "--episode-length 10", "--unroll-length 5", "--gradient-steps 2",
     "--buffer-size 80", "--learning-starts 160", "--env-id point_u_maze"],
)  # fmt: skip
def test_every_switch_changes_the_run(flag, outcomes):
    helpers.assert_new_outcome(crl, POINT, flag.split(), outcomes)


def test_evaluation_is_what_its_flags_say():
    logged = [scalars(run(*POINT, *flags)) for flags in ([], ["--eval-env-id", "point_u_maze"], ["--eval-episodes", 5])]
    distances = [tuple(of_run["eval/final_distance"].values()) for of_run in logged]
    assert len(set(distances)) == 3 and all(of_run["losses/actor"] == logged[0]["losses/actor"] for of_run in logged)


def test_without_a_renderer_a_film_is_refused(monkeypatch, capsys):
    def fail(envs):
        raise RuntimeError("no EGL")

    monkeypatch.setattr(crl, "render", fail)
    with pytest.raises(SystemExit) as stopped:
        run(*POINT, "--capture-video")
    printed = capsys.readouterr().err
    assert "--capture-video True: MuJoCo cannot render here (RuntimeError: no EGL)" in printed
    assert stopped.value.code == 2 and printed.count("\n") == 1 and not Path("runs").exists()


def test_a_picture_shows_the_goal_from_above():
    envs = crl.MujocoEnvs("ant_u_maze", 2, 10, (1, 0))
    envs.reset(np.ones(2, bool))
    before = envs.state_dict()
    picture = crl.render(envs).astype(int)
    envs.goal[0] = envs.state[0, :2] + [0, 3.0]  # into the picture
    near = crl.render(envs).astype(int)
    red = [(p[..., 0] > 120) & (p[..., 1] < 60) for p in (picture, near)]
    assert picture.shape == (240, 320, 3) and picture.std() > 10 and red[1].sum() > max(20, red[0].sum())
    assert torch.equal(before["physics"], envs.state_dict()["physics"])


def test_hypersphere_weights_have_norm_1_from_the_start(monkeypatch):
    norms, update = [], crl.update

    def watched(agent, *rest):
        weights = [m.weight for m in agent.modules() if isinstance(m, crl.Dense)]
        norms.append(torch.cat([w.detach().norm(dim=1) for w in weights]))
        return update(agent, *rest)

    monkeypatch.setattr(crl, "update", watched)
    run(*POINT, "--norm", "hypersphere")
    torch.testing.assert_close(norms[0], torch.ones_like(norms[0]))
