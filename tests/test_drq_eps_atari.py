"""DrQ(eps): the update by hand, two streams and ReDo, augmentation, the switch of the replay ratio, whole runs."""

import copy
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    assert_golden,
    assert_it_ends_when_it_diverges,
    assert_new_outcome,
    assert_same,
    checkpoint,
    killed_run,
    run_and_replay,
    scalars,
    stopped_run,
)
from test_redo_dqn_atari import FakeGames

import drq_eps_atari as study

TINY = (
    "--width 0.125 --padding valid --batch-size 8 --learning-starts 40 --total-timesteps 120 --exploration-steps 60 "
    "--max-episode-steps 40 --eval-every 60 --eval-episodes 3 --eval-envs 2 --dormant-every 40 --dormant-batch-size 8 "
    "--log-every 20 --redo-period-gradient-steps 25 --n-step 3 --exp-name tiny"
).split()
DRQ = [flag for flag in TINY if flag not in ("--redo-period-gradient-steps", "25")]
ADAPTIVE = [*DRQ, "--method", "adaptive", "--rr-check-every", "30", "--rr-threshold", "0.5"]


def run(*flags):
    return study.train(study.parse_args([str(flag) for flag in flags]))


def small_agent(**changes):
    """-> agent, optimizer, arguments, a batch of 16."""
    args = study.Args(device="cpu", width=0.125, padding="valid", **changes)
    agent = study.DuelingAgent(6, args)
    torch.manual_seed(0)
    obs = torch.randint(0, 256, (2, 16, 4, 84, 84), dtype=torch.uint8)
    discount = torch.full((16,), 0.9) * (torch.rand(16) < 0.8)
    batch = obs[0], torch.randint(0, 6, (16,)), torch.randn(16), discount, obs[1]
    return agent, torch.optim.Adam(agent.q_network.parameters(), 1e-3), args, batch


# --- formulas ---------------------------------------------------------------------------------------------------------
def test_two_streams_by_hand():
    agent, _, _, (obs, *_) = small_agent()
    q, activations = agent.q_network(obs)
    layers = agent.q_network.layers
    h = activations["dense"]
    advantage = h @ layers["advantage"].weight.T + layers["advantage"].bias
    value = h @ layers["value"].weight.T + layers["value"].bias
    torch.testing.assert_close(q, value + advantage - advantage.mean(1, keepdim=True))
    assert sorted(activations) == ["conv1", "conv2", "conv3", "dense"] and "head" not in layers
    assert layers["advantage"].weight.shape == (6, 64) and layers["value"].weight.shape == (1, 64)


def test_the_update_by_hand():
    """The action is the learning network's choice, its value the target network's; no augmentation: a shift of 0."""
    agent, optimizer, args, batch = small_agent(shift_pad=0, intensity=0.0)
    with torch.no_grad():  # a target network that disagrees
        for p in agent.target_network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    obs, action, reward, discount, next_obs = batch
    best = agent.q_network(next_obs)[0].argmax(1)
    values = agent.target_network(next_obs)[0]
    assert not torch.equal(best, values.argmax(1))
    target = reward + discount * values[range(16), best]
    difference = agent.q_network(obs)[0][range(16), action] - target
    expected = torch.where(difference.abs() < 1, difference**2 / 2, difference.abs() - 0.5).mean()
    share = study.fau(list(agent.q_network(obs)[1].values()))
    metrics = study.update(agent, optimizer, args, batch)
    assert metrics["losses/td"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["losses/targets"].item() == pytest.approx(target.mean().item(), rel=1e-5, abs=1e-6)
    assert metrics["fau/q_network"].item() == pytest.approx(share.item())


def test_images_are_shifted_and_brightened_each_by_its_own():
    _, _, args, _ = small_agent()
    torch.manual_seed(0)
    obs = torch.full((400, 4, 84, 84), 100, dtype=torch.uint8)
    factor = study.augment(obs, args) / 100
    assert torch.equal(factor, factor[:, :1, :1, :1].expand_as(factor))
    factor = factor[:, 0, 0, 0]
    assert factor.min().item() == pytest.approx(0.9, abs=0.005) and factor.max() <= 1.1 + 1e-6  # two deviations
    assert factor.std().item() == pytest.approx(0.0479, abs=0.004)  # 0.05, cut off
    obs = torch.zeros(200, 4, 84, 84, dtype=torch.uint8)
    obs[:, :, 40, 40] = 255
    places = [divmod(int(i), 84) for i in study.augment(obs, args)[:, 0].flatten(1).argmax(1)]
    assert {x for place in places for x in place} == set(range(36, 45))


def test_both_images_of_a_batch_are_augmented_once(monkeypatch):
    agent, optimizer, args, batch = small_agent()
    shifted, shift = [], study.random_shift
    monkeypatch.setattr(study, "random_shift", lambda obs, pad: shifted.append(obs) or shift(obs, pad))
    study.update(agent, optimizer, args, batch)
    assert len(shifted) == 2 and torch.equal(shifted[0], batch[0]) and torch.equal(shifted[1], batch[4])


def test_exploration_by_hand():
    args = study.Args()
    assert [study.random_share_at(step, args) for step in (0, 1600, 4100, 6600, 10**6)] == pytest.approx(
        [1, 1, 0.505, 0.01, 0.01]
    )


def test_episodes_begin_with_other_numbers_of_no_ops():
    """Without them a game without sticky actions is one and the same game."""
    for noop_max, same in ((0, True), (30, False)):
        envs = study.make_envs(study.Args(noop_max=noop_max), 3)
        obs, _ = study.begin_episodes(envs, torch.Generator().manual_seed(0))
        assert bool((obs == obs[:1]).all()) == same


def test_recycling_zeroes_both_streams_and_keeps_the_output():
    agent, optimizer, args, batch = small_agent(redo_tau=0.0, redo_period_gradient_steps=10)
    study.update(agent, optimizer, args, batch)
    for name in ("conv3", "dense"):
        agent.q_network.layers[name].bias.data[:2] = -1e6
    before, target = agent.q_network(batch[0])[0], copy.deepcopy(agent.target_network.state_dict())

    class Stub:
        def sample(self, count, generator):
            return batch

    call = [agent.q_network, optimizer, Stub()], [args, torch.Generator(), torch.device("cpu")]
    assert study.recycle_dormant(*call[0], 9, *call[1]) == {}
    metrics = study.recycle_dormant(*call[0], 10, *call[1])
    torch.testing.assert_close(agent.q_network(batch[0])[0], before, rtol=0, atol=1e-6)
    layers = agent.q_network.layers
    for stream in ("advantage", "value"):
        assert not layers[stream].weight[:, :2].any() and layers[stream].weight.any()
    assert layers["dense"].weight[:2].any() and not layers["dense"].bias[:2].any()
    assert metrics["events/redo_q_change"] < 1e-6 and metrics["redo_recycled/dense"] >= 2
    assert_same(dict(target), dict(agent.target_network.state_dict()))
    args.redo_end_gradient_steps = 20
    assert study.recycle_dormant(*call[0], 20, *call[1]) == {}


def test_a_mean_survives_a_checkpoint():
    mean = study.Mean()
    assert mean.take() is None
    mean.add(torch.tensor(0.1))
    again = study.Mean()
    again.load_state_dict(mean.state_dict())
    for m in (mean, again):
        m.add(torch.tensor(0.7))
    assert mean.take() == again.take() == pytest.approx(0.4) and mean.take() is None


# --- whole runs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio, updates", [(0.5, 39), (1, 79)])
def test_gradient_steps_targets_and_recycling(ratio, updates, monkeypatch):
    """Learning begins after step 40: at steps 41 to 119; the target is updated at each of them."""
    calls, copy_target = [], study.DuelingAgent.update_target
    monkeypatch.setattr(study.DuelingAgent, "update_target", lambda self: (calls.append(0), copy_target(self)))
    run_dir = run(*TINY, "--replay-ratio", ratio)
    summary, logged = json.loads((run_dir / "summary.json").read_text()), scalars(run_dir)
    assert summary["gradient_steps"] == updates and len(calls) == 79
    assert len(logged["redo_recycled/all"]) == updates // 25
    assert set(logged["dormant_ratio_tau0/all"]) == {40, 80, 120}


def test_a_lost_life_ends_the_episode_for_the_learner_and_rewards_are_clipped():
    _, replay = run_and_replay(study, *DRQ, "--method", "drq", "--total-timesteps", 400, "--max-episode-steps", 400)
    _, other = run_and_replay(study, *DRQ, "--method", "drq", "--total-timesteps", 400, "--max-episode-steps", 400,
                              "--no-terminal-on-life-loss")  # fmt: skip
    assert replay["record"][:, 2].sum() > other["record"][:, 2].sum()
    assert set(replay["record"][:, 1].unique().tolist()) == {0, 1}


def test_the_replay_ratio_rises_when_the_fau_has_settled(monkeypatch):
    shares, update = [], study.update
    monkeypatch.setattr(study, "update", lambda *values: shares.append(update(*values)) or shares[-1])
    run_dir = run(*ADAPTIVE, "--rr-low", 0.5, "--rr-high", 4)
    logged = scalars(run_dir)
    assert set(logged["adaptive_rr/fau"]) == {60, 90, 120}  # learning begins after 40
    ratios = logged["charts/replay_ratio"]
    assert (ratios[60], ratios[80], ratios[100]) == (0.5, 0.5, 4)  # the first interval has nothing to compare with
    steps = json.loads((run_dir / "summary.json").read_text())["gradient_steps"]
    assert steps == len(shares) and abs(steps - (25 + 4 * 30)) <= 4
    last = [float(metrics["fau/q_network"]) for metrics in shares[-4 * 30 :]]
    assert logged["adaptive_rr/fau"][120] == pytest.approx(np.mean(last), abs=1e-3)
    logged = scalars(run(*ADAPTIVE, "--rr-threshold", 0))
    assert set(logged["charts/replay_ratio"].values()) == {0, 0.5}


@pytest.mark.parametrize("flags", [
    ["--shift-pad", 1], ["--intensity", 0], ["--exploration-steps", 5], ["--end-e", 0.5], ["--learning-starts", 50],
    ["--noop-max", 0], ["--precision", "bfloat16"], ["--redo-end-gradient-steps", 20], ["--redo-tau", 0.9],
    ["--redo-batch-size", 4], ["--learning-rate", 0.01], ["--adam-eps", 1e-8], ["--gamma", 0.5], ["--n-step", 1],
    ["--batch-size", 16], ["--buffer-size", 50], ["--padding", "same"], ["--width", 0.25], ["--seed", 2],
    ["--max-episode-steps", 20], ["--env-id", "ALE/Pong-v5"],
], ids=str)  # fmt: skip
def test_every_flag_changes_what_is_learned(flags, outcomes):
    short = [*TINY, "--total-timesteps", 90, "--redo-period-gradient-steps", 15, "--redo-tau", 0.5]
    assert_new_outcome(study, [*short, "--eval-every", 1000, "--eval-episodes", 1, "--eval-envs", 1], flags, outcomes)


@pytest.mark.parametrize("flags, dies", [(TINY, 55), (ADAPTIVE, 93)], ids=["redo", "adaptive"])
def test_killed_and_resumed_is_bit_identical(flags, dies):
    """The adaptive run is cut inside an interval of the FAU, at step 80."""
    flags = [*flags, "--checkpoint-every", 15]
    whole, replay = run_and_replay(study, *flags)
    part = killed_run(study, dies, *flags)
    assert dies == 55 or checkpoint(part)["interval_fau"]["count"] > 0
    killed_run(study, 5, "--resume", part)
    _, resumed = run_and_replay(study, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert_same(replay, resumed)
    assert scalars(whole) == scalars(part)


def test_a_signal_saves_and_goes_on():
    part = stopped_run(study, 70, *TINY)
    assert checkpoint(part)["global_step"] == 70
    run("--resume", part)
    assert checkpoint(part)["global_step"] == 120 and (part / "summary.json").exists()


def test_an_evaluation_plays_as_many_games_as_asked(monkeypatch):
    """Game i ends after i + 1 steps and gives 1 a step; 5 episodes of 3 games: returns 1, 1, 2, 2, 3."""

    class Games:
        num_envs, single_action_space = 3, SimpleNamespace(n=6)

        def reset(self, seed, options):
            self.steps = np.where(options["reset_mask"], 0, getattr(self, "steps", np.zeros(3, int)))
            return np.zeros((3, 4, 84, 84), np.uint8), {}

        def step(self, action):
            self.steps += 1
            over = self.steps == np.arange(3) + 1
            return np.zeros((3, 4, 84, 84), np.uint8), np.ones(3), over, np.zeros(3, bool), {}

    agent, _, args, _ = small_agent(eval_episodes=5)
    epsilons, act = set(), study.act
    monkeypatch.setattr(study, "act", lambda *values: epsilons.add(values[2]) or act(*values))
    bar = SimpleNamespace(set_description=lambda text: None)
    results = study.evaluate(
        agent.q_network, Games(), args, 0, torch.device("cpu"), SimpleNamespace(stopped=None, bar=bar)
    )
    assert results == {"eval/episodic_return": 1.8, "eval/episodic_length": 1.8} and epsilons == {0.001}


def test_a_run_that_diverges_ends_with_one_line(capsys):
    assert_it_ends_when_it_diverges(study, TINY, capsys)


# --- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, message", [
    ("--env-id Pong", "--env-id Pong: is no game of the Arcade Learning Environment"),
    ("--env-id ALE/Pomg-v5", "--env-id ALE/Pomg-v5: cannot be played"),
    ("--method drq --redo-tau 0.2", "--redo-tau 0.2: does nothing without --method redo"),
    ("--rr-high 3", "--rr-high 3.0: does nothing without --method adaptive"),
    ("--method adaptive --replay-ratio 2", "--replay-ratio 2.0: does nothing with --method adaptive"),
    ("--learning-starts 5", "--learning-starts 5: must lie between --n-step and --buffer-size"),
    ("--total-timesteps 1601", "--total-timesteps 1601: leaves no gradient step after --learning-starts"),
    ("--replay-ratio 0.01 --total-timesteps 1690", "--total-timesteps 1690: leaves no gradient step"),
    ("--replay-ratio 8 --redo-period-gradient-steps 7", "--redo-period-gradient-steps 7: is shorter than a burst"),
    ("--redo-end-gradient-steps 1000", "--redo-end-gradient-steps 1000: is before the first period has ended"),
    ("--method adaptive --rr-low 3", "--rr-high 2.0: must be more than --rr-low"),
    ("--method adaptive --rr-check-every 300000", "--rr-check-every 300000: leaves no two intervals to compare"),
    ("--total-timesteps 1000", "--total-timesteps 1000: leaves no gradient step after --learning-starts"),
    ("--buffer-size 20", "--buffer-size 20: is too small for --n-step 10"),
    ("--resume nowhere", "--resume nowhere: is not the folder of a run"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*flags.split())
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert os.listdir() == []


def test_a_copy_in_an_empty_folder_runs():
    shutil.copy(study.__file__, "mine.py")
    done = subprocess.run([sys.executable, "mine.py", *TINY], capture_output=True, text=True)
    assert done.returncode == 0 and list(Path("runs").glob("*/summary.json")), done.stderr


def test_a_golden_run(monkeypatch):
    """Printed by this script at commit 7b78b79."""
    monkeypatch.setattr(study, "make_envs", lambda args, num_envs, **options: FakeGames(num_envs, longer=6))
    logged = scalars(run(*TINY))
    golden = {
        "losses/td": {60: 1.969936, 80: 1.738590, 120: 1.236527},
        "losses/q_values": {60: 0.0714220, 120: 2.400408},
    }
    assert_golden(logged, golden)
    assert sorted(logged["redo_recycled/all"]) == [66, 91, 116]


@pytest.mark.parametrize("truncate, lives", [(False, True), (True, True), (True, False)])
def test_the_replay_holds_what_happened(truncate, lives, monkeypatch):
    """Episodes of 2 steps; the reward of -10 is clipped; the life is lost in the last step."""
    games = partial(FakeGames, truncate=truncate, reward=-10.0)
    monkeypatch.setattr(study, "make_envs", lambda args, num_envs, **options: games(num_envs))
    flags = [] if lives else ["--no-terminal-on-life-loss"]
    part, replay = run_and_replay(study, *DRQ, "--method", "drq", *flags)
    record = replay["record"][:-1]
    kind = torch.arange(len(record)) % 3  # two steps and the last frame
    assert torch.equal(record[:, 3], kind.float()) and torch.equal(replay["frames"][:-1, 0, 0], kind.byte())
    assert torch.equal(record[:, 0] < 0, kind == 2) and set(record[kind < 2, 1].tolist()) == {-1.0}
    assert set(record[kind == 1, 2].tolist()) == {1.0 if not truncate or lives else 0.0}
    assert not record[kind != 1, 2].any()
    assert scalars(part)["charts/episodic_return"] == dict.fromkeys(range(2, 121, 2), -20)


def test_the_game_has_no_sticky_actions_and_whole_rewards():
    plays = []
    for seed in (0, 1):
        envs, rng, rewards = study.make_envs(study.Args(noop_max=0), 1), np.random.default_rng(0), []
        frames = [study.begin_episodes(envs, torch.Generator().manual_seed(seed))[0].copy()]
        for _ in range(150):
            obs, reward, *_ = envs.step(rng.integers(9, size=1))
            frames.append(obs.copy())
            rewards.append(float(reward[0]))
        plays.append((np.stack(frames), rewards))
    assert np.array_equal(plays[0][0], plays[1][0]) and plays[0][1] == plays[1][1] and set(rewards) == {0, 50}
    envs = study.make_envs(study.Args(env_id="ALE/Breakout-v5", noop_max=0), 1)
    assert study.begin_episodes(envs, torch.Generator().manual_seed(0))[1]["episode_frame_number"] == 0


def test_defaults_are_the_papers():
    args = study.Args()
    assert (args.n_step, args.batch_size, args.learning_rate, args.adam_eps, args.end_e) == (10, 32, 1e-4, 1.5e-4, 0.01)
    assert (args.redo_tau, args.redo_period_gradient_steps, args.eval_episodes, args.noop_max) == (0.1, 1000, 100, 30)
    assert (args.rr_low, args.rr_high, args.rr_check_every, args.rr_threshold) == (0.5, 2, 2000, 0.001)
