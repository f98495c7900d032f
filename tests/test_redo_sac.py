"""SAC with ReDo: the update by hand, the replay, what happens to the networks and when, whole runs, mistakes."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
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
    wait_for,
)

import redo_sac as study

TINY = (
    "--env-id InvertedPendulum-v5 --width 0.05 --batch-size 8 --learning-starts 40 --total-timesteps 140 "
    "--eval-every 70 --eval-episodes 2 --dormant-every 40 --dormant-batch-size 16 --redo-period-gradient-steps 25 "
    "--reset-period-gradient-steps 30 --exp-name tiny"
).split()


def run(*flags):
    return study.train(study.parse_args([str(flag) for flag in flags]))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_agent(**changes):
    """-> agent of 3 observations and 2 actions, its optimizers, arguments, a batch of 16."""
    args = study.Args(device="cpu", width=0.05, **changes)
    agent = study.SACAgent(3, 2, args)
    torch.manual_seed(0)
    batch = torch.randn(16, 3), torch.rand(16, 2) * 2 - 1, torch.randn(16, 1), (torch.rand(16, 1) < 0.3).float()
    batch = *batch, torch.randn(16, 3)
    return agent, study.make_sac_optimizers(agent, args, torch.device("cpu")), args, batch


# --- formulas ---------------------------------------------------------------------------------------------------------
def test_the_update_by_hand():
    """Losses, and one step of Adam from zero moments: each weight moves by the learning rate against its gradient."""
    agent, optimizers, args, batch = small_agent()
    agent.log_alpha.data.fill_(-1.2)
    alpha = math.exp(-1.2)
    for weight in [*agent.target1.parameters(), *agent.target2.parameters()]:  # no longer the critics'
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator(3))
    old = copy.deepcopy(agent).double()  # log(1 - tanh(u)^2) as it stands has too few digits in float32
    torch.manual_seed(5)
    metrics = study.update(agent, optimizers, args, batch)
    obs, action, reward, terminated, next_obs = (x.double() for x in batch)
    torch.manual_seed(5)

    def sample(obs):
        mean, log_std = old.actor(obs)[0].chunk(2, -1)
        u = mean + log_std.exp() * torch.randn(16, 2).double()
        log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)
        return torch.cat([obs, torch.tanh(u)], -1), log_prob.sum(-1, keepdim=True)

    x, log_prob = sample(next_obs)
    value = torch.minimum(old.target1(x)[0], old.target2(x)[0]) - alpha * log_prob
    target = (0.1 * reward + 0.99 * (1 - terminated) * value).detach()
    x = torch.cat([obs, action], -1)
    critic_loss = 0.5 * ((old.critic1(x)[0] - target) ** 2 + (old.critic2(x)[0] - target) ** 2).mean()
    assert metrics["losses/critic"].item() == pytest.approx(critic_loss.item(), rel=1e-4)
    assert metrics["losses/targets"].item() == pytest.approx(target.mean().item(), rel=1e-4, abs=1e-5)

    # The policy's loss is taken with the critics after their step
    new = copy.deepcopy(agent).double()
    x, log_prob = sample(obs)
    actor_loss = (alpha * log_prob - torch.minimum(new.critic1(x)[0], new.critic2(x)[0])).mean()
    assert metrics["losses/actor"].item() == pytest.approx(actor_loss.item(), rel=1e-4)
    assert metrics["losses/entropy"].item() == pytest.approx(-log_prob.mean().item(), rel=1e-4)

    entropy = -log_prob.mean().item()
    assert agent.log_alpha.grad.item() == pytest.approx(entropy + 1, rel=1e-4)  # the wanted entropy of 2 actions is -1
    assert agent.log_alpha.item() == pytest.approx(-1.2 - math.copysign(3e-4, entropy + 1), abs=1e-6)
    gradients = torch.autograd.grad(actor_loss, list(old.actor.parameters()))
    for before, after, gradient in zip(old.actor.parameters(), agent.actor.parameters(), gradients):
        clear = gradient.abs() > 1e-4
        torch.testing.assert_close((after - before)[clear], -3e-4 * gradient.sign()[clear], atol=2e-6, rtol=0)
    gradients = torch.autograd.grad(critic_loss, list(old.critic1.parameters()))
    for before, after, gradient in zip(old.critic1.parameters(), agent.critic1.parameters(), gradients):
        clear = gradient.abs() > 1e-4
        assert clear.any()
        torch.testing.assert_close((after - before)[clear], -3e-4 * gradient.sign()[clear], atol=2e-6, rtol=0)
    for before, after, critic in zip(old.target2.parameters(), agent.target2.parameters(), agent.critic2.parameters()):
        torch.testing.assert_close(after.double(), 0.995 * before + 0.005 * critic, atol=1e-6, rtol=1e-5)


def test_targets_begin_as_copies_of_different_critics():
    agent, *_ = small_agent()
    for critic, target in ((agent.critic1, agent.target1), (agent.critic2, agent.target2)):
        assert_same(dict(critic.state_dict()), dict(target.state_dict()))
    assert not torch.equal(agent.critic1.head.weight, agent.critic2.head.weight)
    bound = math.sqrt(6 / (5 + 13))
    assert 0.9 * bound < agent.critic1.hidden1.weight.abs().max() < bound and not agent.critic1.hidden1.bias.any()


def test_a_batch_is_a_row_and_the_ring_forgets_the_oldest():
    replay = study.TransitionReplay(5, 3, 2, "cpu")
    for i in range(7):
        replay.add(np.full(3, i), np.full(2, 10 + i), 20 + i, i % 2 == 0, np.full(3, 30 + i))
        assert len(replay) == min(i + 1, 5)
    obs, action, reward, terminated, next_obs = replay.sample(200, generator())
    assert set(obs[:, 0].tolist()) == {2, 3, 4, 5, 6}
    assert torch.equal(action, obs[:, :2] + 10) and torch.equal(next_obs, obs + 30)
    assert torch.equal(reward, obs[:, :1] + 20) and torch.equal(terminated, (obs[:, :1] % 2 == 0).float())


def test_weight_decay_is_for_weights_alone():
    agent, optimizers, args, batch = small_agent(weight_decay=1e6)
    other, plain, no_decay, _ = small_agent()
    for a, o, settings in ((agent, optimizers, args), (other, plain, no_decay)):
        torch.manual_seed(1)
        study.update(a, o, settings, batch)
    assert not torch.equal(agent.critic1.hidden1.weight, other.critic1.hidden1.weight)
    assert torch.equal(agent.critic1.hidden1.bias, other.critic1.hidden1.bias)
    old, *_ = small_agent()
    change = agent.critic1.hidden1.weight - old.critic1.hidden1.weight
    assert torch.equal(change.sign(), -old.critic1.hidden1.weight.sign())
    assert change.abs().max() < 3.1e-4  # through Adam, whose first step is the learning rate
    change = agent.actor.hidden2.weight - old.actor.hidden2.weight
    assert torch.equal(change.sign(), -old.actor.hidden2.weight.sign())


def test_acting_by_hand():
    agent, _, _, (obs, *_) = small_agent()
    with torch.no_grad():
        mean, log_std = agent.actor(obs)[0].chunk(2, -1)
    device = torch.device("cpu")
    assert study.act(agent, obs.numpy(), None, device) == pytest.approx(torch.tanh(mean).numpy(), abs=1e-6)
    noise = torch.randn(16, 2, generator=generator(3))
    expected = torch.tanh(mean + log_std.exp() * noise).numpy()
    assert study.act(agent, obs.numpy(), generator(3), device) == pytest.approx(expected, abs=1e-6)
    agent.actor.head.bias.data[2:] = torch.tensor([9.0, -99.0])
    _, log_std = agent.policy(obs)
    assert log_std[:, 0].tolist() == [2] * 16 and log_std[:, 1].tolist() == [-20] * 16


# --- what is done to the networks -------------------------------------------------------------------------------------
def prepared(method, **changes):
    """An agent after 5 updates, in which neurons 0 and 1 of every layer are silent, and a replay."""
    agent, optimizers, args, batch = small_agent(method=method, redo_period_gradient_steps=10, **changes)
    for _ in range(5):
        study.update(agent, optimizers, args, batch)
    with torch.no_grad():
        for network in (agent.actor, agent.critic1, agent.critic2):
            for layer in (network.hidden1, network.hidden2):
                layer.bias[:2] = -1e6
    replay = study.TransitionReplay(16, 3, 2, "cpu")
    for row in zip(*(x.numpy() for x in batch)):
        replay.add(row[0], row[1], row[2][0], row[3][0], row[4])
    return agent, optimizers, args, replay, batch


def intervene(agent, optimizers, args, replay, gradient_steps):
    device = torch.device("cpu")
    return study.intervene_sac(agent, optimizers, replay, gradient_steps, args, generator(), device)


def test_redo_recycles_policy_and_critics_and_changes_no_output():
    agent, optimizers, args, replay, batch = prepared("redo")
    before = [*agent.critics(*batch[:2]), agent.actor(batch[0])[0]]
    targets = copy.deepcopy(agent.target1.state_dict())
    assert intervene(agent, optimizers, args, replay, 9) == {}
    metrics = intervene(agent, optimizers, args, replay, 10)
    assert metrics["events/redo_q_change"] == 0 and all(
        metrics[f"redo_recycled/{m}"] >= 4 for m in ("actor", "critic1")
    )
    for a, b in zip(before, [*agent.critics(*batch[:2]), agent.actor(batch[0])[0]]):
        torch.testing.assert_close(a, b)
    for network, optimizer in ((agent.actor, optimizers[0]), (agent.critic2, optimizers[1])):
        assert not network.hidden1.bias[:2].any() and not network.hidden2.weight[:, :2].any()
        assert network.hidden1.weight[:2].all() and not network.head.weight[:, :2].any()
        assert not optimizer.state[network.hidden1.weight]["exp_avg"][:2].any()
    assert_same(dict(targets), dict(agent.target1.state_dict()))


def test_pruned_neurons_stay_silent_in_targets_too():
    agent, optimizers, args, replay, batch = prepared("prune", weight_decay=0.1)
    metrics = intervene(agent, optimizers, args, replay, 20)
    assert metrics["pruned/actor"] >= 4 and metrics["events/redo_q_change"] == 0
    for _ in range(5):
        study.update(agent, optimizers, args, batch)
    x = torch.cat(batch[:2], -1)
    for network, inputs in ((agent.actor, batch[0]), (agent.critic1, x), (agent.target2, x)):
        for h in network(inputs)[1].values():
            assert not h[:, :2].any() and h.any()


def test_each_target_is_pruned_as_its_own_critic():
    agent, optimizers, args, replay, _ = prepared("prune")
    with torch.no_grad():
        for network, dead, alive in ((agent.critic1, 5, 7), (agent.critic2, 7, 5)):
            network.hidden1.bias[dead], network.hidden1.bias[alive] = -1e6, 10
    intervene(agent, optimizers, args, replay, 20)
    for target, dead, alive in ((agent.target1, 5, 7), (agent.target2, 7, 5)):
        assert not target.hidden1.weight[dead].any() and target.hidden1.weight[alive].any()


def test_a_reset_renews_everything_and_the_targets_follow():
    agent, optimizers, args, replay, batch = prepared("reset", reset_period_gradient_steps=7)
    old = copy.deepcopy(agent)
    assert intervene(agent, optimizers, args, replay, 8) == {}
    assert intervene(agent, optimizers, args, replay, 14) == {"events/reset": 1}
    for name in ("actor", "critic1", "critic2"):
        for layer in ("hidden1", "hidden2", "head"):
            new, before = (getattr(getattr(a, name), layer) for a in (agent, old))
            assert (new.weight != before.weight).all() and not new.bias.any()
    for a, b in zip([*agent.target1.parameters()], [*agent.critic1.parameters()]):
        torch.testing.assert_close(a, b)
    remembered = [p for o in optimizers for p, state in o.state.items() if state["exp_avg"].any()]
    assert len(remembered) == 1 and remembered[0] is agent.log_alpha  # the temperature is not reset


def test_dormant_ratios_by_network():
    agent, _, _, _, (obs, action, *_) = prepared("redo")
    metrics = study.measure_networks(agent, obs, action)
    h = agent.critic1(torch.cat([obs, action], -1))[1]
    silent = torch.cat([(layer <= 0).all(0) for layer in h.values()]).float().mean()
    assert metrics["dormant_ratio_tau0/critic1"] == pytest.approx(silent.item()) and silent >= 2 / 13
    both = metrics["dormant_ratio_tau0/critic1"] + metrics["dormant_ratio_tau0/critic2"]
    assert metrics["dormant_ratio_tau0/critics"] == pytest.approx(both / 2) and "dormant_ratio_tau0/actor" in metrics


# --- whole runs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, events", [
    ([], {"redo_q_change": 4}), (["--method", "reset"], {"reset": 3}), (["--replay-ratio", 2], {"redo_q_change": 8}),
    (["--method", "prune"], {"redo_q_change": 4}), (["--method", "sac"], {}),
], ids=str)  # fmt: skip
def test_how_often_what_happens(flags, events):
    run_dir = run(*TINY, *flags)
    logged, summary = scalars(run_dir), json.loads((run_dir / "summary.json").read_text())
    assert summary["gradient_steps"] == 100 * (2 if "--replay-ratio" in flags else 1) and summary["global_step"] == 140
    counts = {}
    for name in ("redo_q_change", "reset"):
        events_file = logged.get(f"events/{name}", {})
        counts |= {name: len(events_file)} if events_file else {}
    assert counts == events
    assert 70 <= min(logged["eval/episodic_return"]) and 140 in logged["eval/episodic_return"]
    lengths = logged["charts/episodic_length"]
    assert logged["charts/episodic_return"] == {step: length - 1 for step, length in lengths.items()}  # a fall earns 0
    ends = sorted(logged["charts/episodic_return"])
    measured = [min(end for end in [*ends, 140] if end >= due) for due in (40, 80, 120)]
    assert sorted(logged["dormant_ratio_tau0/critics"]) == measured


REDO = ["--redo-tau", 0.5]  # recycles in every run


@pytest.mark.parametrize("flags", [
    ["--gamma", 0.5], ["--learning-rate", 0.01], ["--tau", 0.5], ["--reward-scale", 1], ["--width", 0.1],
    ["--batch-size", 16], ["--learning-starts", 60], ["--buffer-size", 50], ["--weight-decay", 1], ["--seed", 2],
    ["--redo-tau", 0.9], ["--redo-batch-size", 4], ["--precision", "bfloat16"], ["--replay-ratio", 2],
    ["--redo-period-gradient-steps", 40], ["--method", "prune"],
], ids=str)  # fmt: skip
def test_every_flag_changes_what_is_learned(flags, outcomes):
    assert_new_outcome(study, [*TINY, *REDO], flags, outcomes)


def test_same_seed_same_bits_and_looking_changes_nothing():
    first = run(*TINY)
    assert_same(checkpoint(first)["agent"], checkpoint(run(*TINY))["agent"])
    other = run(*TINY, "--dormant-every", 1000, "--eval-every", 1000, "--eval-episodes", 1)
    assert_same(checkpoint(first)["agent"], checkpoint(other)["agent"])


@pytest.mark.parametrize("dies", [45, 97, 130])
def test_killed_and_resumed_is_bit_identical(dies):
    """Checkpoints between episodes, from step 15 on; then killed once more within the resumed run."""
    flags = [*TINY, "--checkpoint-every", 15, "--redo-tau", 0.3]
    whole, replay = run_and_replay(study, *flags)
    part = killed_run(study, dies, *flags)
    assert 0 < checkpoint(part)["global_step"] <= dies
    killed_run(study, 8, "--resume", part)
    _, resumed = run_and_replay(study, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert_same(replay, resumed)
    assert scalars(whole) == scalars(part)


def test_kill_9_leaves_a_whole_checkpoint():
    command = [sys.executable, study.__file__, *TINY, "--total-timesteps", "10000000", "--buffer-size", "4000"]
    command += ["--checkpoint-every", "40"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(Path("runs").glob("*/checkpoint.pt")), process)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (run_dir,) = Path("runs").iterdir()
    saved = checkpoint(run_dir)["global_step"]
    run("--resume", run_dir, "--total-timesteps", saved + 50)
    assert checkpoint(run_dir)["global_step"] == saved + 50


def test_a_signal_cuts_the_episode_saves_and_goes_on():
    part = stopped_run(study, 60, *TINY)
    assert checkpoint(part)["global_step"] == 60 and not (part / "summary.json").exists()
    run("--resume", part)
    assert checkpoint(part)["gradient_steps"] == 100 and (part / "summary.json").exists()


def test_a_new_agent_learns_from_a_failed_ones_replay():
    old, replay = run_and_replay(study, *TINY, "--checkpoint-replay", "always")
    acted, act = [], study.act
    at = TINY.index("--learning-starts")
    flags = TINY[:at] + TINY[at + 2 :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "act", lambda *values: acted.append(values[2]) or act(*values))
        new, both = run_and_replay(study, *flags, "--replay-from", old, "--seed", 2)
    assert both["num_added"] == 280 and torch.equal(both["rows"][:140], replay["rows"])
    assert checkpoint(new)["gradient_steps"] == 140  # from the first step on
    assert sum(rng is not None for rng in acted) == 140  # no random actions
    # Its checkpoint has no replay: more steps are learned from only after a refill
    run("--resume", new, "--total-timesteps", 10_000 + 150, "--eval-every", 10**6)
    assert checkpoint(new)["gradient_steps"] == 140 + 10


@pytest.mark.parametrize("flags", [["--buffer-size", 50, "--replay-ratio", 2], ["--method", "reset"]], ids=str)
def test_other_runs_resume_bit_for_bit_too(flags):
    """A ring that has wrapped; resets."""
    flags = [*TINY, "--checkpoint-every", 15, *flags]
    whole, replay = run_and_replay(study, *flags)
    part = killed_run(study, 120, *flags)
    _, resumed = run_and_replay(study, "--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert_same(replay, resumed)


def test_a_film(tmp_path):
    run_dir = run(*TINY, "--capture-video")
    assert len(list((run_dir / "films").glob("*.mp4"))) == 2


@pytest.mark.slow
def test_a_run_learns():
    """The pole stands for 75 to 130 steps after 8000 (seeds 1 to 3, CleanRL alike); with random actions for 6."""
    flags = ["--env-id", "InvertedPendulum-v5", "--width", 0.25, "--learning-starts", 1000, "--total-timesteps", 8000]
    logged = scalars(run(*flags, "--method", "sac", "--eval-every", 8000, "--eval-episodes", 3, "--reward-scale", 1))
    assert list(logged["eval/episodic_return"].values())[-1] > 40


def test_a_run_that_diverges_ends_with_one_line(capsys):
    assert_it_ends_when_it_diverges(study, TINY, capsys)


def test_a_truncation_is_no_termination(monkeypatch):
    """Actions that the policy does not draw come first."""
    make_env, acted, act = study.make_env, [], study.act
    monkeypatch.setattr(study, "make_env", lambda env_id, **options: gymnasium.wrappers.TimeLimit(
        make_env(env_id, **options), 2))  # fmt: skip
    monkeypatch.setattr(study, "act", lambda agent, obs, generator, device: acted.append(generator) or act(
        agent, obs, generator, device))  # fmt: skip
    run_dir = run(*TINY, "--checkpoint-replay", "always")
    replay = checkpoint(run_dir)["replay"]
    _, _, reward, terminated, _ = replay["rows"].split(replay["sizes"], 1)
    assert (reward == 1).all() and not terminated.any() and sum(g is not None for g in acted) == 100


# --- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, message", [
    ("--env-id Aunt-v5", "--env-id Aunt-v5: cannot be played"),
    ("--env-id CartPole-v1", "--env-id CartPole-v1: cannot be played (ValueError: it needs flat observations"),
    ("--method sac --redo-tau 0.1", "--redo-tau 0.1: does nothing without --method redo or prune"),
    ("--replay-ratio 0", "--replay-ratio 0: must lie between 1"),
    ("--total-timesteps 40", "--total-timesteps 40: must be more than --learning-starts 40"),
    ("--replay-from nowhere --learning-starts 10000", "--replay-from nowhere: has no replay that fits"),
    ("--replay-from nowhere", "--learning-starts 40: does nothing with --replay-from"),
    ("--replay-from nowhere --checkpoint-replay never", "--checkpoint-replay never: does not go with --replay-from"),
    ("--redo-period-gradient-steps 101", "--redo-period-gradient-steps 101: is longer than the run, which has 100"),
    ("--replay-ratio 9 --redo-period-gradient-steps 8", "--redo-period-gradient-steps 8: is shorter than a burst"),
    ("--method reset --reset-period-gradient-steps 101", "--reset-period-gradient-steps 101: is longer than the run"),
    ("--width 60 --buffer-size 1000000000000 --total-timesteps 1000000000000", "the run needs about"),
    ("--resume nowhere", "--resume nowhere: is not the folder of a run"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*(TINY if "--resume" not in flags else []), *flags.split())
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert os.listdir() == []


def test_values_are_not_rounded_to_bfloat16():
    """At a value of 100 its steps are of 0.5."""
    agent = study.SACAgent(3, 2, study.Args())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = torch.cat([*agent.critics(torch.rand(9, 3), torch.rand(9, 2)), *agent.policy(torch.rand(9, 3))], 1)
    assert values.dtype == torch.float32 and (values.bfloat16().float() != values).float().mean() > 0.9


def test_a_replay_of_another_environment_is_refused(capsys):
    """Of the same sizes, too."""
    old = run(*TINY, "--env-id", "HalfCheetah-v5", "--checkpoint-replay", "always")
    for env_id in ("Hopper-v5", "Walker2d-v5"):
        with pytest.raises(SystemExit):
            run("--env-id", env_id, "--total-timesteps", 140, "--redo-period-gradient-steps", 9, "--replay-from", old)
        assert "it is empty, or one of HalfCheetah-v5" in capsys.readouterr().err
    (old / "summary.json").unlink()
    with pytest.raises(SystemExit):
        run("--env-id", "HalfCheetah-v5", "--total-timesteps", 140, "--method", "sac", "--replay-from", old)
    assert "it is not finished" in capsys.readouterr().err


def test_a_copy_in_an_empty_folder_runs():
    shutil.copy(study.__file__, "mine.py")
    done = subprocess.run([sys.executable, "mine.py", *TINY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_golden_run():
    """Printed by this script at commit 7b78b79."""
    golden = {
        "losses/critic": {41: 0.213360, 44: 0.342945, 57: 0.413550},
        "losses/actor": {41: -0.235305, 57: -0.391965},
    }
    assert_golden(scalars(run(*TINY)), golden)


def test_the_replay_is_what_the_environment_did():
    _, replay = run_and_replay(study, *TINY)
    env, episode, falls = study.make_env("InvertedPendulum-v5"), 0, 0
    obs, _ = env.reset(seed=study.derived_seed(1, 0, 0))
    columns = replay["rows"].split(replay["sizes"], 1)
    assert columns[1][:40].min() < -0.5 and columns[1][:40].max() > 0.5  # random actions
    for stored, action, reward, terminated, stored_next in zip(*(column.numpy() for column in columns)):
        assert np.array_equal(stored, obs.astype(np.float32))
        obs, true_reward, over, truncated, _ = env.step(action)
        assert (reward, terminated) == (true_reward, over) and np.array_equal(stored_next, obs.astype(np.float32))
        if over or truncated:
            episode, falls = episode + 1, falls + over
            obs, _ = env.reset(seed=study.derived_seed(1, 0, episode))
    assert falls > 2


class ShortEnv:
    """An episode of `length` steps, with a reward of 2 and the time as observation."""

    def __init__(self, length, truncate):
        self.length, self.truncate, self.seeds, self.actions = length, truncate, [], []

    def reset(self, seed):
        self.t = 0
        self.seeds.append(seed)
        return np.zeros(3), {}

    def step(self, action):
        self.t += 1
        self.actions.append(action)
        over = self.t == self.length
        return np.full(3, float(self.t)), 2.0, over and not self.truncate, over and self.truncate, {}


def test_an_evaluation_by_hand():
    agent, _, args, _ = small_agent()
    envs, cpu = [ShortEnv(2, False), ShortEnv(5, True)], torch.device("cpu")
    watched = SimpleNamespace(stopped=None, bar=SimpleNamespace(set_description=lambda text: None))
    for number in (0, 1):
        metrics = study.evaluate(agent, envs, args, number, cpu, watched)
        assert metrics == {"eval/episodic_return": 7.0, "eval/episodic_length": 3.5}
    assert [len(env.actions) for env in envs] == [4, 10]  # none after its end
    seeds = {*envs[0].seeds, *envs[1].seeds}
    assert len(seeds) == 4 and seeds == {study.derived_seed(args.seed, 1, n, i) for n in (0, 1) for i in (0, 1)}
    seen = np.arange(5)[:, None] * np.ones(3)
    assert np.array(envs[1].actions[:5]) == pytest.approx(study.act(agent, seen, None, cpu), abs=1e-6)


def test_defaults_are_the_papers():
    args = study.parse_args([])
    assert (args.learning_starts, args.buffer_size, args.batch_size, args.redo_batch_size) == (10_000, 10**6, 256, 256)
    assert (args.redo_tau, args.redo_period_gradient_steps, args.reset_period_gradient_steps) == (0, 200_000, 200_000)
    assert (args.eval_episodes, args.eval_every, args.total_timesteps) == (30, 10_000, 10**6)
    assert study.parse_args(["--method", "prune"]).redo_period_gradient_steps == 1000
