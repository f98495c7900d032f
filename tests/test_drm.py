"""drm.py: its formulas against hand-computed tables, its update against a plain one, whole runs, bad input."""

import copy
import json
import math
import shutil
import subprocess
import sys
import unittest.mock
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import (
    ADAPTIVE,
    DRM,
    SerialEnvironments,
    assert_golden,
    assert_same,
    checkpoint,
    killed_run,
    run_and_replay,
    scalars,
    stopped_run,
)

import adaptive_rr as rr
import drm

DRQV2 = ["--stddev-type", "drqv2", "--perturb-every", 0, "--target-lambda", 0]
NETWORKS = ("encoder", "actor", "critic", "critic_target", "value")
AWAKE = ["--target-dormant-ratio", 0.6]  # from the first gradient step after the exploration on
GOLDEN = {
    "losses/critic": {40: 16.71325, 120: 16.50578, 200: 18.26055},
    "losses/actor": {40: 0.2697971, 120: -0.06103772, 200: -0.0394667},
    "losses/value": {40: 0.007154451, 120: 0.008757106, 200: 0.0001683573},
    "drm/stddev": {40: 0.842876, 120: 0.367089, 200: 0.3427692},
    "drm/lambda": {40: 0.589669, 120: 0.5411001, 200: 0.5499794},
    "events/perturb_factor": {51: 0.4761904, 101: 0.2857143, 151: 0.2},
    "charts/episodic_return": {40: 14.64206, 120: 21.74835, 200: 30.93394},
}


def run(*flags):
    return helpers.run(drm, *flags)


@pytest.fixture
def serial(monkeypatch):
    for script in (drm, rr):
        monkeypatch.setattr(script, "Environments", SerialEnvironments)


def tensor(value):
    return torch.tensor(float(value))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def settings(**changes):
    """The defaults, with small networks and pictures, as far as `changes` does not say otherwise."""
    return drm.Args(**dict(image_size=24, hidden_dim=16, feature_dim=8) | changes)


def make_agent(**changes):
    """agent, optimizers, arguments"""
    args = settings(**changes)
    torch.manual_seed(0)
    agent = drm.DrMAgent(2, args).to(memory_format=torch.channels_last)
    return agent, drm.make_drm_optimizers(agent, args, torch.device("cpu")), args


def make_batch(step=3000, seed=0, size=8):
    """obs, action, reward, discount, next_obs, step"""
    draws = seeded(seed)
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


def ratio_of(actor, features, tau, strict=True):
    return drm.dormant_ratio(drm.actor_outputs(actor, features), tau, strict)


@pytest.mark.parametrize("tau", [0.025, 0.1, 0.5])
@pytest.mark.parametrize("sizes, units", [((40, 4, 50, 1024), 2102), ((40, 38, 100, 1024), 2186), ((9, 2, 5, 16), 39)])
def test_dormant_ratio_counts_all_linear_layers(sizes, units, tau):
    torch.manual_seed(0)
    actor = drm.Actor(*sizes)
    features = torch.randn(1, sizes[0]) + 0.3 * torch.randn(64, sizes[0])  # alike, as pictures are
    for strict in (True, False):
        expected, counted = ratio_by_hooks(actor, features, tau, strict)
        ratio = ratio_of(actor, features, tau, strict)
        assert counted == units and float(ratio) == pytest.approx(expected, abs=1e-6)
    outputs = drm.actor_outputs(actor, features)
    assert [output.shape[1] for output in outputs] == [sizes[2], sizes[3], sizes[3], sizes[1]]
    by_layer = sum(float(drm.dormant_ratio([output], tau, False)) * output.shape[1] for output in outputs)
    assert by_layer == pytest.approx(expected * units, abs=1e-2) and float(ratio) > 0.05


def test_dormant_ratio_of_a_foreign_network():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6))
    with torch.no_grad():
        network[0].bias[:] = torch.tensor([9.0, -9.0, 9.0, -9.0])  # two of four are silent
        network[2].weight[:] = 0
        network[2].bias[:] = torch.tensor([1.0, -1.0, 1.0, 1e-3, -1.0, 1.0])  # one of six is nearly so
    hidden = network[:2](torch.rand(5, 3))
    assert drm.dormant_ratio([hidden], 0.025) == 0.5
    assert drm.dormant_ratio([hidden, network[2](hidden)], 0.025) == pytest.approx(3 / 10)


def test_dormant_ratio_rises_by_each_unit_that_dies():
    torch.manual_seed(0)
    actor, features = drm.Actor(40, 4), torch.randn(64, 40)
    with torch.no_grad():
        actor.policy[2].bias[:] = 1  # none of them is dormant
        before = ratio_of(actor, features, 0.001)
        actor.policy[2].bias[:100] = -1e3
        after = ratio_of(actor, features, 0.001)
    assert float(after - before) == pytest.approx(100 / 2102)


def test_a_silent_layer_is_not_dormant_when_strict():
    silent = torch.zeros(8, 5)
    assert drm.dormant_ratio([silent], 0.001) == 0 and drm.dormant_ratio([silent], 0.001, strict=False) == 1


def test_a_unit_at_the_threshold_is_not_dormant_when_strict():
    output = torch.tensor([[0.25, -1.75, 1, 1]])  # of mean 1
    assert drm.dormant_ratio([output], 0.25) == 0 and drm.dormant_ratio([output], 0.25, strict=False) == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_no_dormant_ratio(bad):
    actor = drm.Actor(800, 2, 8, 16)
    with torch.no_grad():
        actor.policy[0].weight[3, 3] = bad
    assert ratio_of(actor, torch.randn(4, 800), 0.025).isnan()


# --- what it steers ---------------------------------------------------------------------------------------------------
def noise(beta, step, awaken_step, **changes):
    """The exploration noise of an agent with this dormant ratio and step of awakening."""
    agent = SimpleNamespace(dormant_ratio=tensor(beta), awaken_step=tensor(awaken_step))
    return drm.noise_std(agent, torch.tensor(step, dtype=torch.float64), settings(**changes))


@pytest.mark.parametrize("beta, std", [
    (0, 0.119203), (0.05, 0.182426), (0.1, 0.268941), (0.2, 0.5), (0.3, 0.731059), (0.5, 0.952574), (1, 0.999665),
])  # fmt: skip
def test_noise_by_the_dormant_ratio(beta, std):
    assert float(drm.exploration_std(tensor(beta), 0.2, 0.1, tensor(0))) == pytest.approx(std, abs=1e-6)
    assert float(drm.exploration_std(tensor(beta), 0.2, 0.1, tensor(0.6))) == pytest.approx(max(std, 0.6), abs=1e-6)
    assert float(noise(beta, 5000, math.inf)) == pytest.approx(std, abs=1e-6)
    assert float(noise(beta, 5000, 4000, stddev_start=0, stddev_end=0)) == pytest.approx(std, abs=1e-6)


@pytest.mark.parametrize("step, std", [(0, 1), (1000, 0.9982), (250_000, 0.55), (500_000, 0.1), (10**7, 0.1)])
def test_noise_by_the_schedule(step, std):
    got = noise(0.9, step, math.inf, stddev_type="drqv2")
    assert float(got) == pytest.approx(std, abs=1e-6)
    assert torch.equal(got, torch.full((), rr.stddev_at(step, settings())))  # to the bit


@pytest.mark.parametrize("step, awaken_step, beta, std", [
    (3000, math.inf, 0.21, 0.524979), (3000, 3000, 0.19, 1), (252_000, 2000, 0, 0.55), (602_000, 2000, 0, 0.119203),
    (252_000, 2000, 0.5, 0.952574), (52_000, 2000, 1, 0.999665),
])  # fmt: skip
def test_noise_before_and_after_awakening(step, awaken_step, beta, std):
    assert float(noise(beta, step, awaken_step)) == pytest.approx(std, abs=1e-6)


def test_awakening_is_for_ever(monkeypatch):
    agent, optimizers, args = make_agent()
    steps = []
    for step, beta in ((1998, 0.1), (2000, 0.1), (2002, 0.3), (2004, 0.2), (2005, math.nan), (2006, 0.19), (2008, 0.5),
                       (2010, 0.1)):  # fmt: skip
        monkeypatch.setattr(drm, "dormant_ratio", lambda *_, beta=beta: tensor(beta))
        drm.update(agent, optimizers, args, make_batch(step))
        steps.append(float(agent.awaken_step))
    assert steps == [math.inf] * 5 + [2006] * 3  # not in the first 2000 steps, not at 0.2 itself, not at no number


def test_a_late_awakening_is_exact(monkeypatch):
    agent, optimizers, args = make_agent()
    monkeypatch.setattr(drm, "dormant_ratio", lambda *_: tensor(0.1))
    metrics = drm.update(agent, optimizers, args, make_batch(15_000_001))
    assert int(agent.awaken_step) == 15_000_001 and metrics["drm/stddev"] == 1


@pytest.mark.parametrize("beta, share", [
    (0, 0.59997), (0.1, 0.595984), (0.15, 0.554485), (0.18, 0.438635), (0.2, 0.3), (0.22, 0.161365), (0.25, 0.045515),
    (0.3, 0.004016),
])  # fmt: skip
def test_lambda(beta, share):
    assert float(drm.exploitation_lambda(tensor(beta), 0.2, 0.02, 0.6)) == pytest.approx(share, abs=1e-5)
    assert float(drm.exploitation_lambda(tensor(beta), 0.2, 0.02, 0.3)) == pytest.approx(share / 2, abs=1e-5)


@pytest.mark.parametrize("beta, highest, factor", [
    (0, 0.6, 0.6), (0.1, 0.6, 0.6), (0.05, 0.9, 0.9), (0.02, 1.0, 0.96), (0.25, 0.6, 0.5), (0.25, 0.9, 0.5),
    (0.25, 1, 0.5), (0.4, 0.9, 0.2), (0.9, 1, 0.2), (1, 0.6, 0.2),
])  # fmt: skip
def test_perturb_factor(beta, highest, factor):
    assert float(drm.perturb_factor(tensor(beta), 2, 0.2, highest)) == pytest.approx(factor, abs=1e-6)
    assert float(drm.perturb_factor(tensor(beta), 2, 0.7, 0.7)) == pytest.approx(0.7)


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
    assert 70 < value.item() < 80


# --- perturbation -----------------------------------------------------------------------------------------------------
def test_perturbation_of_a_foreign_network():
    layers = [nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 50), nn.LayerNorm(50), nn.Linear(50, 40, bias=False)]
    network = nn.Sequential(*layers)
    before = copy.deepcopy(network)
    drm.perturb(network, 0.25, seeded())
    for i in (2, 4):
        fresh = ((network[i].weight - 0.25 * before[i].weight) / 0.75).detach()
        bound = 1 / math.sqrt(before[i].in_features)  # PyTorch's own distribution: uniform
        assert fresh.abs().max() <= bound + 1e-6 and fresh.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert torch.equal(network[2].bias, 0.25 * before[2].bias)
    for i in (0, 3):
        assert_same(network[i].state_dict(), before[i].state_dict())
    network[2].init = lambda weight, generator: weight.fill_(2)
    drm.perturb(network, 0.0, seeded(), (nn.Linear, nn.LayerNorm))
    assert (network[2].weight == 2).all() and (network[3].weight == 1).all() and not network[2].bias.any()


def trained(**changes):
    """agent, optimizers and arguments after two gradient steps; biases, and layer norms' weights, are not what they
    are initialized as."""
    agent, optimizers, args = make_agent(**changes)
    for i in range(2):
        drm.update(agent, optimizers, args, make_batch(seed=i))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(1)
    return agent, optimizers, args


def perturbed(factor=0.6, seed=0, **changes):
    """agent, optimizers, arguments, and the weights before a perturbation that keeps this share of them."""
    agent, optimizers, args = trained(min_perturb_factor=factor, max_perturb_factor=factor, **changes)
    before = state(agent)
    assert drm.perturb_agent(agent, optimizers, args, seeded(seed)) == pytest.approx(factor)
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
    agent, optimizers, args = trained(min_perturb_factor=1, max_perturb_factor=1)
    values = dict(agent.named_parameters())
    addresses = {name: value.data_ptr() for name, value in agent.state_dict().items()}
    moments = [value for optimizer in optimizers for s in optimizer.state.values() for value in s.values()]
    assert all(value.abs().sum() > 0 for o in optimizers for s in o.state.values() for value in (s["step"],))
    places = [value.data_ptr() for value in moments]
    drm.perturb_agent(agent, optimizers, args, seeded())
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


def test_a_ratio_that_is_no_number_perturbs_nothing():
    agent, optimizers, args = make_agent()
    before = [x.clone() for x in agent.parameters()]
    agent.dormant_ratio.fill_(math.nan)
    assert drm.perturb_agent(agent, optimizers, args, torch.Generator()).isnan()
    assert all(map(torch.equal, before, agent.parameters()))


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
    share = 0.6 / (1 + math.exp((beta - 0.2) / 0.02)) if args.lambda_type == "dormant" else 0.6

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
    error = agent.value(agent.encoder(obs)[0].detach()) - q
    learn(((error <= 0) * args.expectile * error**2 + (error > 0) * (1 - args.expectile) * error**2).mean(), "value")

    next_action = sampled(next_obs).detach()
    target_q = torch.minimum(*agent.critic_target(agent.encoder(next_obs)[0], next_action)[:2])
    target = reward + discount * (share * agent.value(agent.encoder(next_obs)[0]) + (1 - share) * target_q)
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
@pytest.mark.parametrize("lambda_type", ["dormant", "constant"])
def test_update_equals_a_plain_one(dormant_tau, awaken_step, lambda_type):
    """Over five steps with a perturbation between them; awake from the first step on, or never."""
    agent, optimizers, args = make_agent(learning_rate=1e-3, dormant_tau=dormant_tau, lambda_type=lambda_type)
    other = copy.deepcopy(agent)
    adams = {name: torch.optim.Adam(getattr(other, name).parameters(), lr=1e-3) for name in NETWORKS if name[-1] != "t"}
    for i in range(5):
        batch = make_batch(3000 + 2 * i, seed=i)
        torch.manual_seed(i)
        metrics = drm.update(agent, optimizers, args, batch)
        torch.manual_seed(i)
        plain_update(other, adams, batch, args)
        assert float(metrics["drm/dormant_ratio"]) == pytest.approx(float(other.dormant_ratio), abs=1e-6)
        if i == 2:
            for networks, learned in ((agent, optimizers), (other, list(adams.values()))):
                drm.perturb_agent(networks, learned, args, seeded(7))
        for name, value in other.state_dict().items():
            torch.testing.assert_close(agent.state_dict()[name], value, atol=3e-5, rtol=1e-3, msg=f"{name} {i}")
    assert float(agent.awaken_step) == awaken_step


def test_awake_in_the_update():
    agent, optimizers, args = make_agent(target_dormant_ratio=1.0)
    for step, awaken_step in ((2000, math.inf), (2002, 2002), (2004, 2002)):
        metrics = drm.update(agent, optimizers, args, make_batch(step))
        assert float(agent.awaken_step) == awaken_step
        assert torch.equal(agent.dormant_ratio, metrics["drm/dormant_ratio"])
        expected = noise(agent.dormant_ratio, step, awaken_step, target_dormant_ratio=1.0)
        assert torch.equal(metrics["drm/stddev"], expected)  # with this batch's ratio, at this step


def test_nothing_waits_for_the_device_in_an_update(monkeypatch):
    agent, optimizers, args = make_agent()
    drm.update(agent, optimizers, args, make_batch())  # Adam's state exists
    addresses = {name: value.data_ptr() for name, value in agent.state_dict().items()}
    for name in ("__float__", "__bool__", "__int__", "item", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, None)
    metrics = drm.update(agent, optimizers, args, make_batch())
    drm.perturb_agent(agent, optimizers, args, torch.Generator())
    monkeypatch.undo()
    assert addresses == {name: value.data_ptr() for name, value in agent.state_dict().items()}
    assert not any(value.requires_grad or value.dim() for value in metrics.values())


@pytest.mark.parametrize("n_step", [1, 3])
def test_drqv2_is_a_special_case_bit_for_bit(n_step):
    agent, optimizers, args = make_agent(stddev_type="drqv2", perturb_every=0, target_lambda=0, n_step=n_step)
    torch.manual_seed(0)
    plain = rr.DrQv2Agent(2, args).to(memory_format=torch.channels_last)
    plain_optimizers = rr.make_optimizers(plain, args, torch.device("cpu"))
    for i in range(5):
        *batch, step = make_batch(2000 + 7777 * i, seed=i)
        torch.manual_seed(i)
        ours = drm.update(agent, optimizers, args, [*batch, step])
        torch.manual_seed(i)
        theirs = rr.update(plain, plain_optimizers, args, [*batch, torch.full((), rr.stddev_at(int(step), args))])
        shared = ours.keys() & theirs.keys()
        assert len(shared) == 5 and all(torch.equal(ours[tag], theirs[tag]) for tag in shared)
    for name, value in plain.state_dict().items():
        assert torch.equal(agent.state_dict()[name], value), name


@pytest.mark.parametrize("n_step, env_id", [(1, "pixel_env:Dot64-v0"), (3, "pixel_env:EndingDot-v0")])
def test_drqv2_is_a_special_case_in_whole_runs(n_step, env_id, serial):
    flags = [*ADAPTIVE, "--n-step", n_step, "--env-id", env_id]
    ours, replay = run_and_replay(drm, *flags, "--target-dormant-ratio", 0.35, *DRQV2)
    theirs, other_replay = run_and_replay(rr, *flags, "--rr-high", 0.5)
    mine, other = checkpoint(ours), checkpoint(theirs)
    assert all(torch.equal(mine["agent"][name], value) for name, value in other["agent"].items())
    for part in ("optimizer0", "optimizer1", "optimizer2", "act_rng", "batch_rng", "torch_rng"):
        assert_same(mine[part], other[part])
    assert_same(replay, other_replay)
    ours, theirs = scalars(ours), scalars(theirs)
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 10 and all(ours[tag] == theirs[tag] for tag in shared)
    assert set(ours["drm/lambda"].values()) == {0} and "events/perturb_factor" not in ours


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_a_run_through_the_command_line(tmp_path):
    """As a user: the script alone, copied into an empty folder."""
    shutil.copy(drm.__file__, tmp_path / "copied.py")
    command = [sys.executable, "copied.py", *DRM, "--target-dormant-ratio", 0.99, "--save-model"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (run_dir,) = Path("runs").iterdir()
    files = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
    assert files == {"args.json", "checkpoint.pt", "copied.py", "lock", "model.pt", "summary.json"}
    logged = scalars(run_dir)
    assert set(logged["events/perturb_factor"]) == {51, 101}
    assert all(0.2 <= factor <= 0.9 for factor in logged["events/perturb_factor"].values())
    assert logged["drm/awakened"] == {20: 0, 40: 1, 60: 1, 80: 1, 100: 1, 120: 1}
    for tag in ("drm/dormant_ratio", "drm/stddev", "drm/lambda", "losses/value"):
        assert set(logged[tag]) == {40, 60, 80, 100, 120}
    assert logged["charts/replay_ratio"] == {20: 0, 40: 0.25, 60: 0.5, 80: 0.5, 100: 0.5, 120: 0.5}
    assert set(logged["eval/episodic_return"]) == {0, 60, 120}
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["awaken_step"] == 32 and summary["gradient_steps"] == 45


def test_an_agent_that_never_awakens_has_no_step_of_it(serial):
    summary = json.loads((run(*DRM, "--target-dormant-ratio", 0) / "summary.json").read_text())
    assert summary["awaken_step"] is None


def test_a_run_on_a_real_task(monkeypatch, serial):
    flags = ("--image-size 36 --hidden-dim 32 --batch-size 16 --learning-starts 60 --exploration-steps 60 "
             "--total-timesteps 70 --perturb-every 62")  # fmt: skip
    monkeypatch.setattr(drm, "evaluate", lambda *_: {"eval/episodic_return": 0.0})
    logged = scalars(run("--env-id", "dm_control/hopper-hop-v0", *flags.split()))
    assert 0 < logged["drm/dormant_ratio"][70] < 1 and set(logged["events/perturb_factor"]) == {63}


def test_a_golden_run(serial):
    """Losses of 200 steps, stored on 2026-11-24 from a run that was bit-identical to the script's first version."""
    flags = ["--env-id", "pixel_env:Dot64-v0", "--total-timesteps", 200, "--target-dormant-ratio", 0.36]
    assert_golden(scalars(run(*DRM, *flags)), GOLDEN)


def test_perturbations_happen_where_they_should(serial, monkeypatch):
    """Only once it learns; with the dormant ratio of the last gradient step, which is 1 before the first."""
    factors, betas, update, perturb_agent = [], [1.0], drm.update, drm.perturb_agent

    def watched_update(*arguments):
        metrics = update(*arguments)
        betas.append(float(metrics["drm/dormant_ratio"]))
        return metrics

    def watched_perturb(*arguments):
        factors.append((len(betas) - 1, float(perturb_agent(*arguments)), betas[-1]))
        acted.append(acting.call_count)
        return tensor(factors[-1][1])

    acted, acting = [], unittest.mock.Mock(side_effect=drm.act)
    monkeypatch.setattr(drm, "update", watched_update)
    monkeypatch.setattr(drm, "perturb_agent", watched_perturb)
    monkeypatch.setattr(drm, "act", acting)
    logged = scalars(run(*ADAPTIVE, "--perturb-every", 15, "--perturb-rate", 1))["events/perturb_factor"]
    assert acted == list(range(31, 120, 15))  # an action is chosen before the perturbation at its step
    assert [updates for updates, _, _ in factors] == [0, 8, 15, 23, 30, 38] and list(logged) == list(range(31, 120, 15))
    assert factors[0][1] == pytest.approx(0.2)
    assert all(factor == pytest.approx(min(0.9, max(0.2, 1 - beta)), abs=1e-6) for _, factor, beta in factors)


def test_no_perturbation_in_the_checkpoints_of_an_evaluation(serial):
    """What is evaluated and saved at a step is not yet perturbed."""
    flags = [*DRM, "--perturb-every", 60, "--checkpoint-every", 60]
    plain = [*ADAPTIVE, "--perturb-every", 0, "--checkpoint-every", 60]
    parts = [killed_run(drm, 61, *flags), killed_run(drm, 61, *plain)]
    assert [checkpoint(part)["global_step"] for part in parts] == [60, 60]
    assert_same(checkpoint(parts[0])["agent"], checkpoint(parts[1])["agent"])


@pytest.mark.parametrize("flags", [
    [], [*AWAKE, "--perturb-every", 20, "--perturb-target", "same"], ["--target-lambda", 0, "--perturb-scope", "all"],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dies", [51, 61, 95])
def test_killed_and_resumed_is_bit_identical(flags, dies, serial):
    helpers.assert_killed_and_resumed_is_the_same(drm, dies, *DRM, *flags)


@pytest.mark.parametrize("name, call, step", helpers.SIGNALS)
def test_a_signal_cuts_the_episode_saves_and_the_run_goes_on(name, call, step, serial, capsys):
    logged = helpers.signalled_run(drm, name, call, step, capsys, *DRM)
    assert set(logged["events/perturb_factor"]) == {51, 101}


@pytest.mark.parametrize("stop", [50, 51])
def test_a_signal_at_a_perturbation_neither_repeats_nor_skips_it(stop, serial, monkeypatch):
    """It is due at step 50: a run that stops before it makes it when it goes on."""
    steps, perturb_agent = [], drm.perturb_agent

    def watched(*arguments):
        steps.append(sys._getframe(1).f_locals["global_step"])
        return perturb_agent(*arguments)

    monkeypatch.setattr(drm, "perturb_agent", watched)
    part = stopped_run(drm, stop, *DRM)
    assert checkpoint(part)["global_step"] == stop and steps == [50] * (stop > 50)
    run("--resume", part)
    assert steps == [50, 100]


def test_the_checkpoint_carries_the_ratio_and_the_awakening(serial, monkeypatch):
    part = stopped_run(drm, 45, *DRM, "--target-dormant-ratio", 0.99)
    saved = checkpoint(part)["agent"]
    assert 0 < float(saved["dormant_ratio"]) < 1 and float(saved["awaken_step"]) == 32
    stddevs, act = [], drm.act
    monkeypatch.setattr(drm, "act", lambda *a: stddevs.append(a[2]) or act(*a))
    run("--resume", part)
    expected = noise(saved["dormant_ratio"], 45, 32, target_dormant_ratio=0.99, stddev_steps=100)
    assert stddevs[0] == pytest.approx(float(expected))


def test_resume_without_the_replay_refills_and_perturbs_when_it_is_time(serial, capsys):
    part = run(*DRM, "--checkpoint-replay", "never", "--perturb-every", 70)
    run("--resume", part, "--total-timesteps", 220)
    assert "it is refilled before learning goes on" in capsys.readouterr().err
    logged = scalars(part)
    assert set(logged["events/perturb_factor"]) == {71, 141, 211}
    assert logged["charts/gradient_steps"][200] == 45 + 25  # 150, 152, ... 198


def test_ablations_can_be_resumed(serial):
    for flags in (DRQV2, ["--min-perturb-factor", 0.7, "--max-perturb-factor", 0.7], ["--lambda-type", "constant"]):
        part = run(*DRM, *flags)
        run("--resume", part, "--total-timesteps", 140)
        assert checkpoint(part)["global_step"] == 140


@pytest.mark.parametrize("ratio, updates", [(0.5, 45), (0.25, 22), (2, 180)])
def test_gradient_steps_by_replay_ratio(ratio, updates, serial):
    logged = scalars(run(*DRM, "--replay-ratio", ratio))
    assert logged["charts/gradient_steps"][120] == updates and logged["charts/replay_ratio"][120] == ratio


@pytest.mark.parametrize("flags", [
    [], ["--gamma", 0.5], ["--tau", 0.5], ["--n-step", 1], ["--learning-rate", 0.01], ["--stddev-clip", 0.01],
    ["--batch-size", 16], ["--precision", "bfloat16"], [*AWAKE, "--stddev-start", 2], [*AWAKE, "--stddev-end", 2],
    [*AWAKE, "--stddev-steps", 10], [*AWAKE, "--stddev-start", 0, "--stddev-end", 0], ["--shift-pad", 1],
    ["--exploration-steps", 60], ["--replay-ratio", 2], ["--dormant-tau", 0.3], ["--target-dormant-ratio", 0.1],
    ["--dormant-tau", 0], ["--no-dormant-strict", "--dormant-tau", 0], ["--stddev-type", "drqv2"],
    ["--dormant-temperature", 0.5], ["--perturb-every", 60], ["--perturb-every", 0], ["--perturb-rate", 1],
    ["--min-perturb-factor", 0.8], ["--max-perturb-factor", 0.3],
    ["--min-perturb-factor", 0.7, "--max-perturb-factor", 0.7], ["--perturb-target", "same"],
    ["--perturb-scope", "actor"], ["--perturb-scope", "all"], ["--target-lambda", 0], ["--target-lambda", 0.3],
    ["--lambda-type", "constant"], ["--lambda-temperature", 0.5], ["--expectile", 0.7],
    ["--seed", 2],
], ids=lambda flags: " ".join(str(flag) for flag in flags))  # fmt: skip
def test_every_switch_changes_the_run(flags, serial, outcomes):
    helpers.assert_new_outcome(drm, DRM, flags, outcomes)


def test_bfloat16_and_compile_change_digits_but_not_results(serial, quick_compiler):
    """One gradient step on the same batch."""
    results = []
    for flags in ([], ["--precision", "bfloat16"], ["--compile"]):
        run_dir = run(*ADAPTIVE, "--total-timesteps", 40, "--learning-starts", 39, "--replay-ratio", 1, *flags)
        results.append({tag: list(values.values())[0] for tag, values in scalars(run_dir).items() if "losses" in tag})
    assert results[0] == pytest.approx(results[1], rel=0.05, abs=0.01) and results[0] != results[1]
    assert results[0] == pytest.approx(results[2], rel=1e-3, abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


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


def test_the_table_of_tasks():
    import shimmy  # noqa: F401
    from gymnasium import registry

    assert set(TABLE) == set(drm.TASKS) and all(f"dm_control/{task}-v0" in registry for task in TABLE)
    names = ("learning_rate", "feature_dim", "batch_size", "buffer_size", "max_perturb_factor")
    for task, (frames, decay, *others) in TABLE.items():
        args = drm.parse_args(["--env-id", f"dm_control/{task}-v0"])
        assert args.total_timesteps * 2 == round(frames * 1e6) and args.stddev_steps == decay * 1000, task
        assert [getattr(args, name) for name in names] == others, task
        assert (args.n_step, args.gamma, args.target_lambda, args.expectile) == (3, 0.99, 0.6, 0.9), task
    args = drm.Args()
    constants = (args.n_step, args.gamma, args.tau, args.expectile, args.target_lambda, args.dormant_tau)
    assert constants == (3, 0.99, 0.01, 0.9, 0.6, 0.025)
    assert (args.dormant_temperature, args.lambda_temperature, args.target_dormant_ratio) == (0.1, 0.02, 0.2)
    factors = (args.perturb_every, args.perturb_rate, args.min_perturb_factor, args.max_perturb_factor)
    assert factors == (100_000, 2, 0.2, 0.9)
    assert (args.stddev_start, args.stddev_end, args.stddev_clip, args.replay_ratio) == (1, 0.1, 0.3, 0.5)
    assert (args.learning_starts, args.exploration_steps, args.eval_every, args.eval_episodes) == (2000, 2000, 5000, 10)


@pytest.mark.slow
def test_a_run_learns(serial):
    """The dot finds the middle of the picture."""
    flags = [*DRM, "--total-timesteps", 1500, "--hidden-dim", 64, "--feature-dim", 16, "--batch-size", 32,
             "--learning-starts", 100, "--learning-rate", 1e-3, "--stddev-steps", 1000, "--eval-every", 10_000,
             "--eval-episodes", 10, "--target-dormant-ratio", 0.6, "--replay-ratio", 1, "--perturb-every", 300,
             "--min-perturb-factor", 0.98, "--max-perturb-factor", 0.98, "--gamma", 0.9]  # fmt: skip
    logged = scalars(run(*flags))["eval/episodic_return"]
    assert logged[1500] > logged[0] + 5, logged


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, message", [
    (["--min-perturb-factor", 0.95], "--min-perturb-factor 0.95: must be at most --max-perturb-factor 0.9"),
    (["--max-perturb-factor", 1.1], "--max-perturb-factor 1.1: must lie between 0 and 1"),
    (["--dormant-tau", -0.1], "--dormant-tau -0.1: must lie between 0 and 1"),
    (["--target-dormant-ratio", 2], "--target-dormant-ratio 2.0: must lie between 0 and 1"),
    (["--expectile", 1], "--expectile 1.0: must lie between 1e-06 and 0.999999"),
    (["--expectile", 0], "--expectile 0.0: must lie between 1e-06 and"),
    (["--target-lambda", 1.5], "--target-lambda 1.5: must lie between 0 and 1"),
    (["--dormant-temperature", 0], "--dormant-temperature 0.0: must lie between 1e-06 and"),
    (["--lambda-temperature", "nan"], "--lambda-temperature nan: must lie between 1e-06 and"),
    (["--perturb-every", -1], "--perturb-every -1: must lie between 0 and"),
    (["--perturb-every", 120], "--perturb-every 120: does nothing with --total-timesteps up to 120, the first"),
    (["--perturb-every", 70, "--learning-starts", 80], "every 70: does nothing with --total-timesteps up to 140"),
    (["--perturb-every", 100_000, "--perturb-rate", 1], "rate 1.0: does nothing with --total-timesteps up to 100000"),
    (["--replay-ratio", 0], "--replay-ratio 0.0: must lie between 1e-06 and"),
    (["--perturb-scope", "actor", "--perturb-target", "same"], "same: does nothing with --perturb-scope actor"),
    (["--perturb-every", 0, "--perturb-rate", 1], "--perturb-rate 1.0: does nothing with --perturb-every 0"),
    (["--perturb-every", 0, "--max-perturb-factor", 0.8], "-factor 0.8: does nothing with --perturb-every 0"),
    (["--min-perturb-factor", 0.5, "--max-perturb-factor", 0.5, "--perturb-rate", 1],
     "--perturb-rate 1.0: does nothing with --min-perturb-factor equal to --max-perturb-factor"),
    (["--target-lambda", 0, "--expectile", 0.7], "--expectile 0.7: does nothing with --target-lambda 0"),
    (["--target-lambda", 0, "--lambda-type", "constant"], "constant: does nothing with --target-lambda 0"),
    (["--lambda-type", "constant", "--lambda-temperature", 0.1], "0.1: does nothing with --lambda-type constant"),
    (["--stddev-type", "drqv2", "--dormant-temperature", 0.2], "0.2: does nothing with --stddev-type drqv2"),
    (["--learning-starts", 120], "--total-timesteps 120: must be more than --learning-starts 120"),
    (["--n-step", 29, "--buffer-size", 32], "--buffer-size 32: must be at least --n-step 29 + 4"),
    (["--cudagraphs", "--device", "cpu"], "--cudagraphs True: needs --device cuda, not cpu"),
    (["--env-id", "dm_control/hopper-hip-v0"], "Did you mean: `hopper-hop`?"),
], ids=lambda value: " ".join(str(v) for v in value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*DRM, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1
    assert not Path("runs").exists()


def test_a_tasks_own_default_is_not_refused():
    """Hopper Hop's largest factor is 1.0, that of Args() 0.9: with no perturbation, neither was asked for."""
    for largest in (0.9, 1.0):
        drm.check_idle(drm.Args(perturb_every=0, max_perturb_factor=largest))
    with pytest.raises(SystemExit):
        drm.check_idle(drm.Args(perturb_every=0, max_perturb_factor=0.8))


# --- on a GPU ---------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cudagraphs_equal_eager_across_a_perturbation():
    results = {}
    for captured in (False, True):
        agent, _, args = make_agent(cudagraphs=captured)
        agent.to("cuda")
        optimizers = drm.make_drm_optimizers(agent, args, torch.device("cuda"))
        learn, draws = partial(drm.update, agent, optimizers, args), seeded()
        if captured:
            learn = drm.capture(learn, optimizers)
        torch.cuda.manual_seed(0)
        for i in range(30):
            metrics = learn([x.cuda() for x in make_batch(3000 + 2 * i, seed=i)])
            if i in (10, 20):
                drm.perturb_agent(agent, optimizers, args, draws)
        results[captured] = state(agent) | metrics
    for name in results[False]:
        torch.testing.assert_close(results[True][name], results[False][name], atol=1e-3, rtol=1e-2, msg=name)
