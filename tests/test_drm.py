"""drm.py: its formulas against hand-computed tables, its update against a plain one, whole runs, bad input."""

import copy
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import ADAPTIVE, DRM, PIXELS, assert_same, checkpoint, scalars, stopped_run
from test_drqv2_plasticity_runs import assert_resume_is_bit_identical, make_serial_envs

import adaptive_rr as rr
import drm
import drqv2_plasticity as drq

DRQV2 = ["--stddev-type", "drqv2", "--perturb-every", "0", "--target-lambda", "0"]
NETWORKS = ("encoder", "actor", "critic", "critic_target", "value")


def run(*flags):
    return helpers.run(drm, *flags)


@pytest.fixture
def serial(monkeypatch):
    for script in (drm, drq):
        monkeypatch.setattr(script, "make_envs", make_serial_envs)
    monkeypatch.setattr(rr, "Environments", helpers.SerialEnvironments)


def tensor(value):
    return torch.tensor(float(value))


def settings(**changes):
    """The paper's arguments, with small networks and pictures, as far as `changes` does not say otherwise."""
    values = drm.MEDIUM | dict(image_size=24, hidden_dim=16, feature_dim=8, max_perturb_factor=0.9)
    return drm.Args(**values | changes)


def make_agent(**changes):
    """agent, optimizers, arguments"""
    args = settings(**changes)
    torch.manual_seed(0)
    agent = drm.DrMAgent(2, args).to(memory_format=torch.channels_last)
    return agent, drm.drm_optimizers(agent, args, torch.device("cpu")), args


def make_batch(step=3000, seed=0, size=8):
    """obs, action, reward, discount, next_obs, step"""
    draws = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randint(256, (2, size, 9, 24, 24), generator=draws, dtype=torch.uint8)
    action, reward = torch.rand(size, 2, generator=draws) * 2 - 1, torch.rand(size, generator=draws)
    discount = torch.full((size,), 0.97)
    discount[0] = 0
    return [obs, action, reward, discount, next_obs, torch.tensor(step, dtype=torch.float64)]


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- the dormant ratio ------------------------------------------------------------------------------------------------
def ratio_by_hooks(actor, features, threshold, strict):
    """A plain count: every linear layer's output, the hidden ones' after max(0, x)."""
    outputs, hooks = [], []
    for module in actor.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(lambda module, x, y: outputs.append(y.detach().numpy())))
    actor(features)
    for hook in hooks:
        hook.remove()
    dormant = units = 0
    for i, output in enumerate(outputs):
        output = np.maximum(output, 0) if i in (1, 2) else output
        size = np.abs(output).mean(0)
        for value in size:
            dormant += value < threshold * size.mean() if strict else value <= threshold * size.mean()
        units += len(size)
    return dormant / units, units


@pytest.mark.parametrize("threshold", [0.025, 0.1, 0.5])
@pytest.mark.parametrize("sizes, units", [((40, 4, 50, 1024), 2102), ((40, 38, 100, 1024), 2186), ((9, 2, 5, 16), 39)])
def test_dormant_ratio_counts_all_linear_layers(sizes, units, threshold):
    actor = drm.Actor(*sizes)
    features = torch.randn(1, sizes[0]) + 0.3 * torch.randn(64, sizes[0])  # alike, as pictures are
    for strict in (True, False):
        expected, counted = ratio_by_hooks(actor, features, threshold, strict)
        ratio, by_layer = drm.dormant_ratio(actor, features, threshold, strict)
        assert counted == units and float(ratio) == pytest.approx(expected, abs=1e-6)
        layers = dict(trunk=sizes[2], hidden1=sizes[3], hidden2=sizes[3], head=sizes[1])
        assert sum(float(by_layer[k]) * n for k, n in layers.items()) == pytest.approx(expected * units, abs=1e-2)
    assert float(ratio) > 0.05


def test_dormant_ratio_rises_by_each_unit_that_dies():
    torch.manual_seed(0)
    actor, features = drm.Actor(40, 4), torch.randn(64, 40)
    with torch.no_grad():
        actor.policy[2].bias[:] = 1  # none of them is dormant
        before, _ = drm.dormant_ratio(actor, features, 0.001)
        actor.policy[2].bias[:100] = -1e3
        after, by_layer = drm.dormant_ratio(actor, features, 0.001)
    assert float(after - before) == pytest.approx(100 / 2102) and float(by_layer["hidden2"]) * 1024 == 100


def test_a_silent_layer_is_not_dormant_when_strict():
    actor, features = drm.Actor(40, 4), torch.randn(64, 40)
    with torch.no_grad():
        actor.policy[2].bias[:] = -1e3
    assert float(drm.dormant_ratio(actor, features, 0.001)[1]["hidden2"]) == 0
    assert float(drm.dormant_ratio(actor, features, 0.001, strict=False)[1]["hidden2"]) == 1


def test_a_unit_at_the_threshold_is_not_dormant_when_strict():
    actor = drm.Actor(1, 4, feature_dim=2, hidden_dim=2)
    with torch.no_grad():
        actor.policy[4].weight.zero_()
        actor.policy[4].bias.copy_(torch.tensor([0.25, 1.75, 1, 1]))  # of mean 1
    for strict, share in ((True, 0), (False, 0.25)):
        assert float(drm.dormant_ratio(actor, torch.ones(1, 1), 0.25, strict)[1]["head"]) == share


# --- what it steers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("beta, std", [
    (0, 0.119203), (0.05, 0.182426), (0.1, 0.268941), (0.2, 0.5), (0.3, 0.731059), (0.5, 0.952574), (1, 0.999665),
])  # fmt: skip
def test_noise_by_the_dormant_ratio(beta, std):
    for kind in ("dormant", "awake"):
        got = drm.exploration_std(tensor(beta), tensor(5000), tensor(math.inf), settings(stddev_type=kind))
        assert float(got) == pytest.approx(std, abs=1e-6)


@pytest.mark.parametrize("step, std", [(0, 1), (1000, 0.9982), (250_000, 0.55), (500_000, 0.1), (10**7, 0.1)])
def test_noise_by_the_schedule(step, std):
    args, now, never = settings(stddev_type="drqv2"), torch.tensor(step, dtype=torch.float64), tensor(math.inf)
    got = drm.exploration_std(tensor(0.9), now, never, args)
    assert float(got) == pytest.approx(std, abs=1e-6)
    assert torch.equal(got, torch.full((), rr.stddev_at(step, args)))  # to the bit
    both = drm.exploration_std(tensor(0.1), now, never, settings(stddev_type="max"))
    assert float(both) == pytest.approx(max(std, 0.268941), abs=1e-6)


@pytest.mark.parametrize("step, awaken_step, beta, std", [
    (3000, math.inf, 0.21, 0.524979), (3000, 3000, 0.19, 1), (252_000, 2000, 0, 0.55), (602_000, 2000, 0, 0.119203),
    (252_000, 2000, 0.5, 0.952574), (52_000, 2000, 1, 0.999665),
])  # fmt: skip
def test_noise_before_and_after_awakening(step, awaken_step, beta, std):
    got = drm.exploration_std(tensor(beta), tensor(step), tensor(awaken_step), settings())
    assert float(got) == pytest.approx(std, abs=1e-6)


def test_awakening_is_for_ever():
    awaken_step, steps = tensor(math.inf), []
    for step, beta in ((1998, 0.1), (2000, 0.1), (2002, 0.3), (2004, 0.2), (2006, 0.19), (2008, 0.5), (2010, 0.1)):
        awaken_step = drm.awakening(awaken_step, tensor(beta), tensor(step), settings())
        steps.append(float(awaken_step))
    assert steps == [math.inf] * 4 + [2006] * 3  # not in the first 2000 steps, not at 0.2 itself


@pytest.mark.parametrize("beta, share", [
    (0, 0.59997), (0.1, 0.595984), (0.15, 0.554485), (0.18, 0.438635), (0.2, 0.3), (0.22, 0.161365), (0.25, 0.045515),
    (0.3, 0.004016),
])  # fmt: skip
def test_lambda(beta, share):
    assert float(drm.exploitation_lambda(tensor(beta), settings())) == pytest.approx(share, abs=1e-5)
    assert float(drm.exploitation_lambda(tensor(beta), settings(lambda_type="constant"))) == pytest.approx(0.6)
    double = drm.exploitation_lambda(tensor(beta), settings(target_lambda=0.3))
    assert float(double) == pytest.approx(share / 2, abs=1e-5)


@pytest.mark.parametrize("beta, largest, factor", [
    (0, 0.6, 0.6), (0.1, 0.6, 0.6), (0.05, 0.9, 0.9), (0.02, 1.0, 0.96), (0.25, 0.6, 0.5), (0.25, 0.9, 0.5),
    (0.25, 1, 0.5), (0.4, 0.9, 0.2), (0.9, 1, 0.2), (1, 0.6, 0.2),
])  # fmt: skip
def test_perturb_factor(beta, largest, factor):
    args = settings(max_perturb_factor=largest)
    assert float(drm.perturb_factor(tensor(beta), args)) == pytest.approx(factor, abs=1e-6)
    args = settings(max_perturb_factor=largest, perturb_fixed_factor=0.7)
    assert float(drm.perturb_factor(tensor(beta), args)) == pytest.approx(0.7)


def test_expectile_loss():
    value, q = torch.tensor([1.0, 2, 3], requires_grad=True), torch.tensor([2.0, 2, 1], requires_grad=True)
    assert drm.expectile_loss(value, q, 0.9).item() == pytest.approx(0.433333, abs=1e-6)
    loss = drm.expectile_loss(value, q, 0.7)
    assert loss.item() == pytest.approx(0.633333, abs=1e-6)
    loss.backward()
    assert q.grad is None and value.grad.tolist() == pytest.approx([-2 * 0.7 / 3, 0, 4 * 0.3 / 3])


def test_the_expectile_lies_above_the_mean():
    value, q = torch.zeros((), requires_grad=True), torch.arange(101.0)
    optimizer = torch.optim.Adam([value], lr=0.5)
    for _ in range(3000):
        optimizer.zero_grad()
        drm.expectile_loss(value.expand(101), q, 0.9).backward()
        optimizer.step()
    below, above = q[q < value], q[q > value]  # 0.1 sum (v - q) = 0.9 sum (q - v)
    assert 0.1 * (value - below).sum().item() == pytest.approx(0.9 * (above - value).sum().item(), rel=0.05)
    assert 70 < float(value) < 80


def test_target_by_hand():
    reward, discount, value, q = torch.tensor([1.0, 2]), torch.tensor([0.5, 0]), torch.tensor([10.0, 9]), torch.ones(2)
    for beta, expected in ((0, 1 + 0.5 * (0.59997 * 10 + 0.40003)), (0.2, 1 + 0.5 * (3 + 0.7)), (1, 1.5)):
        share = drm.exploitation_lambda(tensor(beta), settings())
        assert drm.mixed_target(reward, discount, value, q, share).tolist() == pytest.approx([expected, 2], abs=1e-4)


# --- perturbation -----------------------------------------------------------------------------------------------------
def perturbed(factor=0.6, seed=0, **changes):
    """agent, optimizers, arguments, and the weights before, after two gradient steps and a perturbation."""
    agent, optimizers, args = make_agent(**changes)
    for i in range(2):
        drm.drm_update(agent, optimizers, make_batch(seed=i), args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(1)  # biases, and layer norms' weights, that are not what they are drawn as
    before = state(agent)
    generator = torch.Generator().manual_seed(seed)
    drm.perturb_networks(agent, optimizers, tensor(factor), args, generator)
    return agent, optimizers, args, before


def drawn(agent, before, factor=0.6):
    """What was drawn, by weight, from the weights before and after."""
    return {n: (v - factor * before[n]) / (1 - factor) for n, v in agent.state_dict().items() if n.endswith("weight")}


def test_perturbation_moves_linear_layers_only():
    agent, optimizers, args, before = perturbed()
    fresh, after = drawn(agent, before), agent.state_dict()
    linear = {name for name, module in agent.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 4 + 7 + 7 + 4 and not any(name.startswith("encoder") for name in linear)
    for name, value in after.items():
        module, _, kind = name.rpartition(".")
        if module not in linear:
            assert torch.equal(value, before[name]), name  # convolutions, layer norms, beta, the step of awakening
        elif kind == "bias":
            torch.testing.assert_close(value, 0.6 * before[name])
        else:
            rows = fresh[name] if len(fresh[name]) <= len(fresh[name].T) else fresh[name].T
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-4, rtol=0)
    assert not torch.allclose(fresh["critic.q1.0.weight"], fresh["critic_target.q1.0.weight"], atol=0.01)
    assert not torch.allclose(fresh["critic.q1.2.weight"], fresh["critic.q2.2.weight"], atol=0.01)
    again = drawn(*perturbed(seed=1)[::3])
    assert not torch.allclose(fresh["actor.policy.2.weight"], again["actor.policy.2.weight"], atol=0.01)


def test_perturbation_makes_adam_forget_in_place():
    agent, optimizers, args = make_agent()
    for i in range(2):
        drm.drm_update(agent, optimizers, make_batch(seed=i), args)
    values = {**state(agent), **dict(agent.named_parameters())}
    addresses = {name: value.data_ptr() for name, value in agent.state_dict().items()}
    moments = [value for optimizer in optimizers for s in optimizer.state.values() for value in s.values()]
    assert all(value.abs().sum() > 0 for o in optimizers for s in o.state.values() for value in (s["step"],))
    places = [value.data_ptr() for value in moments]
    drm.perturb_networks(agent, optimizers, tensor(1), args, torch.Generator())
    assert len(moments) == 3 * sum(1 for p in agent.parameters() if p.requires_grad)
    assert all(value.abs().sum() == 0 for value in moments)  # of the encoder too, and also when the factor is 1
    now = [value for optimizer in optimizers for s in optimizer.state.values() for value in s.values()]
    assert places == [value.data_ptr() for value in now]
    assert addresses == {name: value.data_ptr() for name, value in agent.state_dict().items()}
    assert all(parameter is values[name] for name, parameter in agent.named_parameters())


def test_perturbation_with_factor_one_keeps_the_weights():
    agent, _, _, before = perturbed(1.0)
    for name, value in agent.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_perturbation_with_the_same_draw_for_the_target():
    agent, _, _, before = perturbed(perturb_target="same")
    fresh = drawn(agent, before)
    pairs = [name for name in fresh if name.startswith("critic.") and before[name].dim() == 2]
    assert len(pairs) == 7
    for name in pairs:
        torch.testing.assert_close(fresh[name], fresh[name.replace("critic", "critic_target")], atol=1e-5, rtol=0)
    assert not torch.allclose(fresh["value.v.0.weight"][:, :8], fresh["critic.q1.0.weight"][:, :8], atol=0.01)


def test_perturbation_of_the_actor_alone():
    agent, optimizers, _, before = perturbed(perturb_scope="actor")
    changed = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"actor"}
    forgot = [all(value.abs().sum() == 0 for s in o.state.values() for value in s.values()) for o in optimizers]
    assert forgot == [False, True, False, False]
    assert torch.equal(agent.state_dict()["actor.trunk.1.weight"], before["actor.trunk.1.weight"])


def test_perturbation_of_all_parameters():
    agent, _, _, before = perturbed(perturb_scope="all")
    after = agent.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name, _ in agent.named_parameters())
    torch.testing.assert_close(after["actor.trunk.1.weight"], 0.6 * before["actor.trunk.1.weight"] + 0.4)
    torch.testing.assert_close(after["actor.trunk.1.bias"], 0.6 * before["actor.trunk.1.bias"])
    kernel = drawn(agent, before)["encoder.convnet.2.weight"].flatten(1)
    torch.testing.assert_close(kernel @ kernel.T, 2 * torch.eye(32), atol=1e-4, rtol=0)


# --- the update -------------------------------------------------------------------------------------------------------
def plain_update(agent, adams, batch, args):
    """The official order (encode, beta, awaken, V, critic and encoder, actor, target), with nothing shared and nothing
    saved: every quantity is computed where it is needed, gradients that are not wanted are thrown away."""
    obs, action, reward, discount, next_obs, step = batch
    beta, _ = ratio_by_hooks(agent.actor, agent.encoder(obs)[0], args.dormant_tau, args.dormant_strict)
    if beta < args.target_dormant_ratio and step > args.exploration_steps and math.isinf(agent.awaken_step):
        agent.awaken_step.fill_(float(step))
    agent.dormant_ratio.fill_(beta)
    std = 1 / (1 + math.exp(-(beta - 0.2) / 0.1))
    if math.isfinite(agent.awaken_step):
        std = max(std, rr.stddev_at(int(step) - int(agent.awaken_step), args))
    share = 0.6 / (1 + math.exp((beta - 0.2) / 0.02))

    def sampled(obs):
        mean = agent.actor(agent.encoder(obs)[0].detach())[0]
        noisy = mean + (torch.randn(mean.shape) * std).clamp(-0.3, 0.3)
        return noisy + (noisy.clamp(-1 + 1e-6, 1 - 1e-6) - noisy).detach()

    def learn(loss, *names):
        gradients = {}
        for name in names:
            weights = list(getattr(agent, name).parameters())
            gradients[name] = torch.autograd.grad(loss, weights, retain_graph=True)
        for name in names:
            for weight, gradient in zip(getattr(agent, name).parameters(), gradients[name]):
                weight.grad = gradient
            adams[name].step()

    q = torch.minimum(*agent.critic(agent.encoder(obs)[0], action)[:2])
    error = agent.value(agent.encoder(obs)[0].detach())[0] - q
    learn(((error <= 0) * args.expectile * error**2 + (error > 0) * (1 - args.expectile) * error**2).mean(), "value")

    next_action = sampled(next_obs).detach()
    target_q = torch.minimum(*agent.critic_target(agent.encoder(next_obs)[0], next_action)[:2])
    target = reward + discount * (share * agent.value(agent.encoder(next_obs)[0])[0] + (1 - share) * target_q)
    stale = agent.encoder(obs)[0].detach()
    q1, q2, _ = agent.critic(agent.encoder(obs)[0], action)
    learn(((q1 - target.detach()) ** 2).mean() + ((q2 - target.detach()) ** 2).mean(), "critic", "encoder")

    mean = agent.actor(stale)[0]
    noisy = mean + (torch.randn(mean.shape) * std).clamp(-0.3, 0.3)
    policy_action = noisy + (noisy.clamp(-1 + 1e-6, 1 - 1e-6) - noisy).detach()
    learn(-torch.minimum(*agent.critic(stale, policy_action)[:2]).mean(), "actor")
    with torch.no_grad():
        for old, new in zip(agent.critic_target.parameters(), agent.critic.parameters()):
            old.copy_((1 - args.tau) * old + args.tau * new)


@pytest.mark.parametrize("dormant_tau, awaken_step", [(0.025, 3000), (0.4, math.inf)])
def test_update_equals_a_plain_one(dormant_tau, awaken_step):
    """Over five steps with a perturbation between them; awake from the first step on, or never."""
    agent, optimizers, args = make_agent(learning_rate=1e-3, dormant_tau=dormant_tau)
    other = copy.deepcopy(agent)
    adams = {name: torch.optim.Adam(getattr(other, name).parameters(), lr=1e-3) for name in NETWORKS if name[-1] != "t"}
    for i in range(5):
        batch = make_batch(3000 + 2 * i, seed=i)
        torch.manual_seed(i)
        metrics = drm.drm_update(agent, optimizers, batch, args)
        torch.manual_seed(i)
        plain_update(other, adams, batch, args)
        assert float(metrics["drm/dormant_ratio"]) == pytest.approx(float(other.dormant_ratio), abs=1e-6)
        if i == 2:
            for networks, learned in ((agent, optimizers), (other, list(adams.values()))):
                drm.perturb_networks(networks, learned, tensor(0.5), args, torch.Generator().manual_seed(7))
        for name, value in other.state_dict().items():
            torch.testing.assert_close(agent.state_dict()[name], value, atol=3e-5, rtol=1e-3, msg=f"{name} {i}")
    assert float(agent.awaken_step) == awaken_step


def test_awake_in_the_update():
    agent, optimizers, args = make_agent(target_dormant_ratio=1.0)
    for step, awaken_step in ((2000, math.inf), (2002, 2002), (2004, 2002)):
        metrics = drm.drm_update(agent, optimizers, make_batch(step), args)
        assert float(agent.awaken_step) == awaken_step
        assert torch.equal(agent.dormant_ratio, metrics["drm/dormant_ratio"])
        expected = drm.exploration_std(agent.dormant_ratio, tensor(step), tensor(awaken_step), args)
        assert torch.equal(metrics["drm/stddev"], expected)  # with this batch's ratio, at this step


def test_nothing_waits_for_the_device_in_an_update(monkeypatch):
    agent, optimizers, args = make_agent()
    drm.drm_update(agent, optimizers, make_batch(), args)  # Adam's state exists
    addresses = {name: value.data_ptr() for name, value in agent.state_dict().items()}
    for name in ("__float__", "__bool__", "__int__", "item", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, None)
    metrics = drm.drm_update(agent, optimizers, make_batch(), args)
    drm.perturb_networks(agent, optimizers, drm.perturb_factor(agent.dormant_ratio, args), args, torch.Generator())
    monkeypatch.undo()
    assert addresses == {name: value.data_ptr() for name, value in agent.state_dict().items()}
    assert not any(value.requires_grad for value in metrics.values())
    tags = {"drm/dormant_ratio", "drm/dormant_ratio/trunk", "drm/dormant_ratio/hidden1", "drm/dormant_ratio/hidden2",
            "drm/dormant_ratio/head", "drm/stddev", "drm/lambda", "losses/value", "plasticity/fau/critic"}  # fmt: skip
    assert tags <= set(metrics)


@pytest.mark.parametrize("n_step", [1, 3])
def test_drqv2_is_a_special_case_bit_for_bit(n_step):
    agent, optimizers, args = make_agent(stddev_type="drqv2", perturb_every=0, target_lambda=0, n_step=n_step)
    torch.manual_seed(0)
    plain_args = SimpleNamespace(**vars(args), precision="tf32")
    plain = rr.DrQv2Agent(2, args).to(memory_format=torch.channels_last)
    plain_optimizers = rr.make_optimizers(plain, args, torch.device("cpu"))
    for i in range(5):
        *batch, step = make_batch(2000 + 7777 * i, seed=i)
        torch.manual_seed(i)
        ours = drm.drm_update(agent, optimizers, [*batch, step], args)
        torch.manual_seed(i)
        stddev = torch.full((), rr.stddev_at(int(step), args))
        theirs = rr.update(plain, plain_optimizers, plain_args, [*batch, stddev])
        for tag, value in theirs.items():
            assert torch.equal(ours[tag], value), tag
    for name, value in plain.state_dict().items():
        assert torch.equal(agent.state_dict()[name], value), name


@pytest.mark.parametrize("n_step", [1, 3])
def test_drqv2_is_a_special_case_in_whole_runs(n_step, serial):
    common = ["--n-step", n_step, "--env-id", "pixel_env:Dot64-v0"]
    flags = [*common, "--target-dormant-ratio", 0.35]
    ours, replay = helpers.run_and_replay(drm, *PIXELS, *flags, *DRQV2)
    theirs, other_replay = helpers.run_and_replay(rr, *ADAPTIVE, *common, "--rr-high", 0.5)
    mine, other = checkpoint(ours), checkpoint(theirs)
    assert all(torch.equal(mine["agent"][name], value) for name, value in other["agent"].items())
    assert_same(mine["optimizers"][:3], [other[f"optimizer{i}"]["state"] for i in range(3)])
    assert mine["optimizers"][3] == {}  # V learns nothing
    for part in ("act", "batch"):
        assert torch.equal(mine["rng"][part], other[f"{part}_rng"])
    assert torch.equal(mine["torch_rng"], other["torch_rng"])
    assert torch.equal(replay["frames"][: len(other_replay["frames"])], other_replay["frames"])
    ours, theirs = scalars(ours), scalars(theirs)
    shared = [tag for tag in theirs if tag in ours and tag != "charts/replay_ratio"]  # there an episode's average
    assert len(shared) > 10 and all(ours[tag] == theirs[tag] for tag in shared)
    assert "drm/dormant_ratio" in ours and "losses/value" not in ours and "drm/lambda" not in ours


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_run_through_the_command_line(tmp_path):
    """As a user: the script alone, copied into an empty folder."""
    shutil.copy(drm.__file__, tmp_path / "copied.py")
    flags = [*DRM, "--target-dormant-ratio", 0.99, "--capture-video", "--save-model"]
    command = [sys.executable, "copied.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (run_dir,) = Path("runs").iterdir()
    logged = scalars(run_dir)
    assert set(logged["plasticity/perturb_factor"]) == {51, 101}
    assert all(0.2 <= factor <= 0.9 for factor in logged["plasticity/perturb_factor"].values())
    assert logged["drm/awakened"] == {20: 0, 40: 1, 60: 1, 80: 1, 100: 1, 120: 1}
    for tag in ("drm/dormant_ratio", "drm/dormant_ratio/hidden2", "drm/stddev", "drm/lambda", "losses/value"):
        assert set(logged[tag]) == {40, 60, 80, 100, 120}
    for tag in ("plasticity/dormant_ratio_tau0.025/actor", "plasticity/feature_rank/critic"):
        assert set(logged[tag]) == {40, 80, 120}
    assert json.loads((run_dir / "summary.json").read_text())["awaken_step"] == 32
    assert {path.name for path in (run_dir / "films").iterdir()} == {"0.mp4", "60.mp4", "120.mp4"}
    from moviepy import VideoFileClip

    with VideoFileClip(str(run_dir / "films" / "60.mp4")) as film:
        assert film.size == [24, 24] and film.n_frames == 21 and film.get_frame(0).std() > 10


def test_a_film_ends_with_its_episode():
    """Of two episodes, of which the first one ends at once."""
    envs = drm.Film(make_serial_envs(settings(env_id="pixel_env:EndingDot-v0"), 2))
    envs.reset(seed=[6, 1])
    for _ in range(5):
        *_, terminated, truncated, _ = envs.step(np.zeros((2, 2), np.float32))
    assert terminated[0] and not (terminated[1] or truncated[1])
    assert len(envs.frames) == 2 and envs.frames[0].shape == (24, 24, 3)
    envs.reset(seed=[0, 1])
    assert len(envs.frames) == 1


def test_a_run_on_a_real_task(monkeypatch, serial):
    flags = ("--image-size 36 --hidden-dim 32 --batch-size 16 --learning-starts 60 --exploration-steps 60 "
             "--log-every 10 --total-timesteps 70 --plasticity-batch-size 16 --plasticity-every 70")  # fmt: skip
    monkeypatch.setattr(drm, "play_evaluation", lambda *_: {"eval/episodic_return": 0.0, "eval/episodes": 0})
    run_dir = run("--env-id", "dm_control/hopper-hop-v0", *flags.split())
    assert 0 < scalars(run_dir)["drm/dormant_ratio"][70] < 1


def test_perturbations_happen_where_they_should(serial, monkeypatch):
    """Only once it learns; with the dormant ratio of the last gradient step, which is 1 before the first."""
    factors, betas, update, perturb = [], [1.0], drm.drm_update, drm.perturb_networks

    def watched_update(*arguments):
        metrics = update(*arguments)
        betas.append(float(metrics["drm/dormant_ratio"]))
        return metrics

    def watched_perturb(agent, optimizers, factor, *others):
        factors.append((len(betas) - 1, float(factor), betas[-1]))
        perturb(agent, optimizers, factor, *others)

    monkeypatch.setattr(drm, "drm_update", watched_update)
    monkeypatch.setattr(drm, "perturb_networks", watched_perturb)
    run(*PIXELS, "--max-perturb-factor", 0.9, "--perturb-every", 15, "--perturb-rate", 1)
    assert [updates for updates, _, _ in factors] == [0, 8, 15, 23, 30, 38]  # at steps 30, 45, ... 105
    assert factors[0][1] == pytest.approx(0.2)
    assert all(factor == pytest.approx(min(0.9, max(0.2, 1 - beta)), abs=1e-6) for _, factor, beta in factors)


def test_the_noise_of_an_agent_that_is_awake_by_type(serial):
    flags = [*DRM, "--target-dormant-ratio", 0.6, "--stddev-start", 2.0]  # awake from the first update on
    awake = checkpoint(run(*flags))["agent"]
    flags = [flag for flag in DRM if flag not in ("--stddev-steps", "100")] + ["--target-dormant-ratio", 0.6]
    dormant = checkpoint(run(*flags, "--stddev-type", "dormant"))["agent"]
    assert float(awake["awaken_step"]) == float(dormant["awaken_step"]) == 32
    assert not torch.equal(awake["actor.trunk.0.weight"], dormant["actor.trunk.0.weight"])


@pytest.mark.parametrize("flags", [
    [], ["--stddev-type", "max", "--perturb-target", "same"], ["--target-dormant-ratio", 0.36],
    ["--target-lambda", 0, "--perturb-scope", "all"],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("stop", [49, 50, 73])
def test_resume_across_a_perturbation_is_bit_identical(flags, stop, serial):
    assert_resume_is_bit_identical(drm, stop, *DRM, *flags)


def test_the_checkpoint_carries_the_ratio_and_the_awakening(serial, monkeypatch):
    part = stopped_run(drm, 45, *DRM, "--target-dormant-ratio", 0.99)
    saved = checkpoint(part)["agent"]
    assert 0 < float(saved["dormant_ratio"]) < 1 and float(saved["awaken_step"]) == 32
    stddevs, act = [], drm.act
    monkeypatch.setattr(drm, "act", lambda *a: stddevs.append(a[2]) or act(*a))
    run("--resume", part)
    args = drm.parse_args(["--resume", str(part)])
    assert stddevs[0] == pytest.approx(float(drm.exploration_std(saved["dormant_ratio"], tensor(45), tensor(32), args)))


def test_resume_without_the_replay_refills_and_perturbs_when_it_is_time(serial, capsys):
    part = run(*DRM, "--no-checkpoint-replay", "--perturb-every", 70)
    run("--resume", part, "--total-timesteps", 220)
    assert "collecting 30 steps" in capsys.readouterr().out
    assert set(scalars(part)["plasticity/perturb_factor"]) == {71, 141, 211}
    assert scalars(part)["charts/gradient_steps"][200] == 45 + 25  # 150, 152, ... 198


def test_ablations_can_be_resumed(serial):
    """Flags that do nothing are refused, but not those that the table, or nothing, has filled in."""
    for flags in (DRQV2, ["--perturb-fixed-factor", "0.7", "--perturb-every", "50"], ["--stddev-type", "dormant"]):
        base = [f for f in PIXELS if f not in ("--stddev-steps", "100")] if "dormant" in flags else PIXELS
        base = [*base, "--max-perturb-factor", "0.9"] if "dormant" in flags else base
        part = run(*base, *flags)
        run("--resume", part, "--total-timesteps", 140)
        assert checkpoint(part)["global_step"] == 140


@pytest.mark.parametrize("flags", [
    [], ["--gamma", 0.5], ["--tau", 0.5], ["--n-step", 1], ["--learning-rate", 0.01], ["--stddev-clip", 0.01],
    ["--stddev-start", 0.5, "--stddev-type", "max", "--target-dormant-ratio", 0.3], ["--stddev-end", 0.9,
    "--stddev-type", "max"], ["--shift-pad", 1], ["--exploration-steps", 60], ["--replay-ratio", 2],
    ["--replay-ratio", 0.25], ["--dormant-tau", 0.3], ["--no-dormant-strict", "--dormant-tau", 0],
    ["--target-dormant-ratio", 0.1], ["--stddev-type", "max"],
    ["--stddev-type", "drqv2"], ["--dormant-temperature", 0.5], ["--perturb-every", 60], ["--perturb-rate", 1],
    ["--perturb-every", 0, "--max-perturb-factor", "None"], ["--min-perturb-factor", 0.8],
    ["--max-perturb-factor", 0.3],
    ["--perturb-fixed-factor", 0.7, "--max-perturb-factor", "None"], ["--perturb-target", "same"],
    ["--perturb-scope", "actor"], ["--perturb-scope", "all"], ["--target-lambda", 0], ["--target-lambda", 0.3],
    ["--lambda-type", "constant"], ["--lambda-temperature", 0.5], ["--expectile", 0.7], ["--seed", 2],
], ids=lambda flags: " ".join(str(flag) for flag in flags))  # fmt: skip
def test_every_switch_changes_the_run(flags, serial, outcomes):
    helpers.assert_new_outcome(drm, DRM, flags, outcomes)


def test_the_value_network_has_random_numbers_of_its_own():
    agent, other = (drm.DrMAgent(2, settings(seed=seed)) for seed in (1, 2))
    assert not torch.equal(agent.value.v[0].weight, other.value.v[0].weight)
    torch.manual_seed(3)
    again = drm.DrMAgent(2, settings(seed=1))
    after = torch.rand(1)
    torch.manual_seed(3)
    rr.DrQv2Agent(2, settings())
    assert torch.equal(again.value.v[0].weight, agent.value.v[0].weight) and torch.equal(torch.rand(1), after)


TABLE = {  # frames in millions, length of the decay in 1000 steps, learning rate, feature_dim, batch, buffer, factor
    **dict.fromkeys(("acrobot-swingup", "cartpole-swingup_sparse", "cheetah-run", "hopper-hop", "reacher-easy",
                     "reacher-hard"), (3.1, 500, 1e-4, 50, 256, 10**6, 1.0)),
    "quadruped-run": (3.1, 500, 1e-4, 50, 256, 10**5, 1.0), "quadruped-walk": (3.1, 500, 1e-4, 50, 256, 10**5, 1.0),
    "walker-run": (3.1, 500, 1e-4, 50, 512, 10**6, 1.0),
    "acrobot-swingup_sparse": (30.1, 2000, 1e-4, 50, 256, 10**6, 0.9),
    "dog-stand": (30.1, 2000, 8e-5, 100, 256, 10**6, 0.6), "dog-walk": (30.1, 2000, 8e-5, 100, 256, 10**6, 0.6),
    "dog-run": (30.1, 2000, 8e-5, 100, 256, 10**6, 0.6), "dog-trot": (30.1, 2000, 8e-5, 100, 256, 10**6, 0.9),
    "humanoid-run": (30.1, 2000, 8e-5, 100, 256, 10**6, 0.6),
    "humanoid-stand": (30.1, 2000, 8e-5, 100, 256, 10**6, 0.9),
    "humanoid-walk": (30.1, 2000, 8e-5, 100, 256, 10**6, 0.9),
    "manipulator-bring_ball": (30.1, 2000, 8e-5, 50, 256, 10**6, 0.9),
}  # fmt: skip


def test_the_table_of_tasks(monkeypatch):
    import shimmy  # noqa: F401
    from gymnasium import registry

    monkeypatch.setattr(drm, "memory", lambda device: 1e12)
    assert set(TABLE) == set(drm.TASKS) and all(f"dm_control/{task}-v0" in registry for task in TABLE)
    names = ("learning_rate", "feature_dim", "batch_size", "buffer_size", "max_perturb_factor")
    for task, (frames, decay, *others) in TABLE.items():
        row = drm.TASKS[task]
        assert row["total_timesteps"] * 2 == round(frames * 1e6) and row["stddev_steps"] == decay * 1000, task
        assert [row[name] for name in names] == others, task
    args = drm.resolve_args(drm.Args())
    constants = (args.n_step, args.gamma, args.tau, args.expectile, args.target_lambda, args.dormant_tau)
    assert constants == (3, 0.99, 0.01, 0.9, 0.6, 0.025)
    assert (args.perturb_every, args.perturb_rate, args.min_perturb_factor) == (100_000, 2, 0.2)
    assert (args.stddev_start, args.stddev_end, args.stddev_clip, args.replay_ratio) == (1, 0.1, 0.3, 0.5)
    assert (args.learning_starts, args.exploration_steps, args.eval_every, args.eval_episodes) == (2000, 2000, 5000, 10)


@pytest.mark.parametrize("flag, tolerance", [("--amp", 0.1), ("--compile", 0.01)])
def test_speed_flags_change_bits_but_not_results(flag, tolerance, serial):
    flags = [*DRM, "--total-timesteps", 40, "--perturb-every", 36]
    plain, fast = run(*flags), run(*flags, flag)
    for name, value in checkpoint(plain)["agent"].items():
        torch.testing.assert_close(checkpoint(fast)["agent"][name], value, atol=2e-2, rtol=tolerance)


def test_a_run_learns(serial):
    """The dot finds the middle of the picture."""
    flags = [*DRM, "--total-timesteps", 1500, "--hidden-dim", 64, "--feature-dim", 16, "--batch-size", 32,
             "--learning-starts", 100, "--learning-rate", 1e-3, "--stddev-steps", 1000, "--eval-every", 10_000,
             "--eval-episodes", 10, "--target-dormant-ratio", 0.6, "--replay-ratio", 1, "--perturb-every", 300,
             "--perturb-fixed-factor", 0.98, "--max-perturb-factor", "None", "--gamma", 0.9]  # fmt: skip
    logged = scalars(run(*flags))["eval/episodic_return"]
    assert logged[1500] > logged[0] + 5, logged


# --- bad input --------------------------------------------------------------------------------------------------------
UNKNOWN = [flag for flag in ADAPTIVE if flag not in ("--stddev-steps", "100", "--total-timesteps", "120")]


@pytest.mark.parametrize("base, flags, message", [
    (UNKNOWN, [], "Dot-v0: is not in the table of tasks; give --total-timesteps, --stddev-steps, --max-perturb-factor"),
    (UNKNOWN, ["--total-timesteps", 9, *DRQV2], "Dot-v0: is not in the table of tasks; give --stddev-steps\n"),
    (DRM, ["--min-perturb-factor", 0.95], "--min-perturb-factor 0.95: must be at most --max-perturb-factor 0.9"),
    (DRM, ["--max-perturb-factor", 1.1], "--max-perturb-factor 1.1: must lie between 0 and 1"),
    (DRM, ["--perturb-fixed-factor", -0.1, "--max-perturb-factor", "None"], "--perturb-fixed-factor -0.1: must lie"),
    (DRM, ["--dormant-tau", -0.1], "--dormant-tau -0.1: must lie between 0 and 1"),
    (DRM, ["--dormant-tau", 1.5], "--dormant-tau 1.5: must lie between 0 and 1"),
    (DRM, ["--target-dormant-ratio", 2], "--target-dormant-ratio 2.0: must lie between 0 and 1"),
    (DRM, ["--expectile", 1], "--expectile 1.0: must be greater than 0 and less than 1"),
    (DRM, ["--expectile", 0], "--expectile 0.0: must be greater than 0 and less than 1"),
    (DRM, ["--target-lambda", 1.5], "--target-lambda 1.5: must lie between 0 and 1"),
    (DRM, ["--dormant-temperature", 0], "--dormant-temperature 0.0: must be greater than 0"),
    (DRM, ["--lambda-temperature", "nan"], "--lambda-temperature nan: must be a finite number"),
    (DRM, ["--perturb-every", -1], "--perturb-every -1: must not be negative"),
    (DRM, ["--perturb-every", 120], "--perturb-every 120: must be less than --total-timesteps 120"),
    (DRM, ["--replay-ratio", 0.7], "--replay-ratio 0.7: must be k or 1/k"),
    (DRM, ["--replay-ratio", 0], "--replay-ratio 0.0: must be k or 1/k"),
    (DRM, ["--perturb-scope", "actor", "--perturb-target", "same"], "same: does nothing with --perturb-scope actor"),
    (PIXELS, ["--perturb-every", 0, "--perturb-rate", 1], "--perturb-rate 1.0: does nothing with --perturb-every 0"),
    (DRM, ["--perturb-every", 0], "--max-perturb-factor 0.9: does nothing with --perturb-every 0"),
    (DRM, ["--perturb-fixed-factor", 0.5], "--max-perturb-factor 0.9: does nothing with --perturb-fixed-factor"),
    (DRM, ["--target-lambda", 0, "--expectile", 0.7], "--expectile 0.7: does nothing with --target-lambda 0"),
    (DRM, ["--lambda-type", "constant", "--lambda-temperature", 0.1], "does nothing with --lambda-type constant"),
    (DRM, ["--stddev-type", "drqv2", "--dormant-temperature", 0.2], "does nothing with --stddev-type drqv2"),
    (DRM, ["--stddev-type", "dormant"], "--stddev-steps 100: does nothing with --stddev-type dormant"),
    (DRM, ["--capture-video", "--image-size", 25], "--image-size 25: must be even with --capture-video"),
    (DRM, ["--batch-size", 31], "--batch-size 31: must be at most --learning-starts 30"),
    (DRM, ["--plasticity-batch-size", 31], "--plasticity-batch-size 31: must be at most --learning-starts 30"),
    (DRM, ["--learning-starts", 120], "--total-timesteps 120: must be more than --learning-starts 120"),
    (DRM, ["--n-step", 29, "--buffer-size", 32], "--buffer-size 32: must be at least --n-step 29 + 4"),
    (DRM, ["--n-step", 25], "--n-step 25: no episode of the first 30 steps was that long"),
    (DRM, ["--exp-name", "a/b"], "--exp-name a/b: must not contain /"),
    (DRM, ["--cudagraphs", "--device", "cpu"], "--cudagraphs True: needs --device cuda, not cpu"),
    (["--env-id", "dm_control/hopper-hip-v0", "--total-timesteps", "5000", "--stddev-steps", "9",
      "--max-perturb-factor", "1"], [], "--env-id dm_control/hopper-hip-v0: did you mean dm_control/hopper-hop-v0?"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(base, flags, message, capsys, serial):
    with pytest.raises(SystemExit) as stopped:
        run(*base, *flags)
    printed = capsys.readouterr().err.splitlines(keepends=True)[-1:]
    assert stopped.value.code == 2 and message in "".join(printed)
    assert not list(Path("runs").glob("*/checkpoint.pt"))


# --- on a GPU ---------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cudagraphs_equal_eager_across_a_perturbation():
    results = {}
    for captured in (False, True):
        agent, _, args = make_agent(cudagraphs=captured)
        agent.to("cuda")
        optimizers = drm.drm_optimizers(agent, args, torch.device("cuda"))
        step, draws = partial(drm.drm_update, agent, optimizers), torch.Generator().manual_seed(0)
        torch.cuda.manual_seed(0)
        for i in range(30):
            batch = [x.cuda() for x in make_batch(3000 + 2 * i, seed=i)]
            if captured and i == 0:
                replay = drm.capture_update(drm.drm_update, agent, optimizers, batch, args)
                step = lambda batch, args, replay=replay: replay(batch)  # noqa: E731
            metrics = step(batch, args)
            if i in (10, 20):
                factor = drm.perturb_factor(agent.dormant_ratio, args)
                drm.perturb_networks(agent, optimizers, factor, args, draws)
        results[captured] = state(agent) | metrics
    for name in results[False]:
        torch.testing.assert_close(results[True][name], results[False][name], atol=1e-3, rtol=1e-2, msg=name)
