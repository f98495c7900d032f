"""drqv2_plasticity.py: every formula against hand-computed values or an independent oracle."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import drqv2_plasticity as drq

ACTIONS = 6


def args(**options):
    """Arguments of a small agent."""
    small = dict(image_size=24, feature_dim=8, hidden_dim=16, batch_size=16, n_step=3, learning_rate=1e-3)
    return drq.Args(**(small | dict(stddev_steps=100, total_timesteps=1000) | options))


def make_agent(seed=0, **options):
    torch.manual_seed(seed)
    arguments = args(**options)
    agent = drq.DrQv2Agent(ACTIONS, arguments)
    drq.prepare(agent, arguments)
    optimizers = drq.make_optimizers(agent.eval(), arguments, torch.device("cpu"))
    drq.penalise(optimizers, arguments)
    return agent, optimizers, arguments


def make_batch(size=16, image_size=24, seed=0, std=0.5):
    g = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randint(0, 256, (2, size, 9, image_size, image_size), dtype=torch.uint8, generator=g)
    action = torch.rand(size, ACTIONS, generator=g) * 2 - 1
    reward, discount = torch.rand(size, generator=g), torch.full((size,), 0.97)
    return [obs, action, reward, discount, next_obs, torch.tensor(std)]


def updated(updates=3, **options):
    """An agent after some updates."""
    agent, optimizers, arguments = make_agent(**options)
    for i in range(updates):
        drq.update(agent, optimizers, arguments, make_batch(seed=i))
    return agent, optimizers, arguments


def state(module):
    return copy.deepcopy(module.state_dict())


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def awaken(agent):
    """Makes every hidden neuron active on every input."""
    for layers in (agent.encoder.convnet, agent.actor.policy, agent.critic.q1, agent.critic.q2):
        for layer, following in zip(layers, layers[1:]):
            if isinstance(following, nn.ReLU):
                layer.weight.mul_(1e-3)
                layer.bias.fill_(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- random shift -----------------------------------------------------------------------------------------------------
def test_random_shift_golden_values():
    x = (torch.arange(2 * 84 * 84) % 251).view(2, 1, 84, 84).float()
    torch.manual_seed(0)
    y = drq.random_shift(x, 4)
    assert y.sum() == 1728149
    assert y[0, 0, 0, :3].tolist() == [4, 5, 6] and y[1, 0, 83, 81:].tolist() == [51, 52, 53]
    assert torch.equal(y, drq.random_shift(x, 4, torch.tensor([[8, 0], [2, 6]])))


def test_random_shift_is_a_crop_of_the_padded_image():
    obs = make_batch(image_size=30)[0]
    shift = torch.randint(9, (16, 2), generator=generator())
    shifted = drq.random_shift(obs, 4, shift)
    padded = F.pad(obs.float(), (4,) * 4, mode="replicate")
    for i, (x, y) in enumerate(shift.tolist()):
        assert torch.equal(shifted[i].float(), padded[i, :, y : y + 30, x : x + 30])
    assert shifted.dtype == torch.uint8
    assert torch.equal(drq.random_shift(obs, 4, torch.full((16, 2), 4)), obs)


def test_random_shift_agrees_with_bilinear_sampling():
    """As DrQ-v2 does it: a grid of pixel centres in [-1, 1], moved by whole pixels."""
    obs, (n, size, pad) = make_batch(image_size=84)[0].float(), (16, 84, 4)
    shift = torch.randint(2 * pad + 1, (n, 2), generator=generator())
    padded_size = size + 2 * pad
    centres = (torch.arange(size) * 2 + 1) / padded_size - 1
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1) + shift.view(n, 1, 1, 2) * 2 / padded_size
    sampled = F.grid_sample(F.pad(obs, (pad,) * 4, mode="replicate"), grid, padding_mode="zeros", align_corners=False)
    assert (sampled - drq.random_shift(obs, pad, shift)).abs().max() < 5e-3


def test_random_shifts_are_uniform_and_each_image_has_its_own():
    image = torch.arange(100 * 100).view(1, 1, 100, 100).expand(20_000, 1, 100, 100)[:, :, 45:55, 45:55]
    torch.manual_seed(0)
    places, counts = drq.random_shift(image, 1)[:, 0, 5, 5].unique(return_counts=True)
    assert len(places) == 9 and counts.min() > 2000


# --- networks ---------------------------------------------------------------------------------------------------------
def count(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_papers():
    agent = drq.DrQv2Agent(ACTIONS, drq.Args(feature_dim=50))
    sizes = [count(m) for m in (agent.encoder, agent.actor, agent.critic, agent.critic.q1, agent.actor.trunk)]
    assert sizes == [30_368, 3_068_124, 4_178_136, 1_108_993, 1_960_150]
    features, active = agent.encoder(torch.zeros(2, 9, 84, 84, dtype=torch.uint8))
    assert features.shape == (2, 39_200)
    assert [a[0].numel() for a in active] == [53_792, 48_672, 43_808, 39_200]
    mean, actor_active = agent.actor(features)
    q1, q2, critic_active = agent.critic(features, mean)
    assert mean.shape == (2, ACTIONS) and q1.shape == q2.shape == (2,)
    assert [a.shape for a in actor_active] == [(2, 1024)] * 2 and [a.shape for a in critic_active] == [(2, 1024)] * 4
    names = [f"convnet.{i}.{k}" for i in (0, 2, 4, 6) for k in ("weight", "bias")]
    assert list(agent.encoder.state_dict()) == names  # those of DrQ-v2


def test_networks_are_those_of_the_paper():
    agent, _, _ = make_agent()
    obs, action, *_ = make_batch()
    x, positives, elements = obs.float() / 255 - 0.5, 0, 0
    for layer, stride in zip(agent.encoder.convnet[::2], (2, 1, 1, 1)):
        x = F.conv2d(x, layer.weight, layer.bias, stride).relu()
        positives, elements = positives + int((x > 0).sum()), elements + x.numel()
    features, active = agent.encoder(obs)
    torch.testing.assert_close(features, x.flatten(1))
    torch.testing.assert_close(drq.fau(active), torch.tensor(positives / elements))

    def run(trunk, head, more=()):
        h = F.layer_norm(F.linear(features, trunk[0].weight, trunk[0].bias), (8,)).tanh()
        h = torch.cat([h, *more], 1)
        for layer in (head[0], head[2]):
            h = F.linear(h, layer.weight, layer.bias).relu()
        return F.linear(h, head[4].weight, head[4].bias)

    torch.testing.assert_close(agent.actor(features)[0], run(agent.actor.trunk, agent.actor.policy).tanh())
    for q, head in zip(agent.critic(features, action), (agent.critic.q1, agent.critic.q2)):
        torch.testing.assert_close(q, run(agent.critic.trunk, head, [action])[:, 0])


def test_initial_weights_are_orthogonal():
    agent, _, _ = make_agent()
    for layer in agent.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            weight = layer.weight.flatten(1)
            weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
            gain = 2.0 if isinstance(layer, nn.Conv2d) else 1.0
            torch.testing.assert_close(weight @ weight.T, gain * torch.eye(len(weight)), atol=1e-5, rtol=0)
            assert not layer.bias.any()
    assert same(agent.critic.state_dict(), agent.critic_target.state_dict())
    assert not torch.equal(agent.critic.q1[0].weight, agent.critic.q2[0].weight)
    torch.manual_seed(1)
    agent = drq.DrQv2Agent(ACTIONS, drq.Args(feature_dim=50))
    obs, action, *_ = make_batch(image_size=84)
    features, active = agent.encoder(obs)
    for module in (active, agent.actor(features)[1], agent.critic(features, action)[2]):
        assert 0.45 < drq.fau(module) < 0.55


def test_fau_is_a_share_of_elements_not_of_units():
    half_the_time = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert drq.fau([half_the_time]) == 0.25  # while half of the units are not dormant
    assert drq.fau([half_the_time, torch.ones(2, 1, 3, 2)]) == 13 / 16  # every element counts the same
    assert drq.fau([torch.tensor([[-1.0, 2.0]])]) == 0.5


# --- the update -------------------------------------------------------------------------------------------------------
def test_truncated_normal():
    mean = torch.tensor([[0.0, 0.9, -1.0]], requires_grad=True).expand(10_000, 3)
    torch.manual_seed(0)
    action = drq.truncated_normal(mean, torch.tensor(1.0), 0.3)
    assert action.max() <= 1 - 1e-6 and action.min() >= -1 + 1e-6
    assert (action[:, 0].abs() <= 0.3).all() and (
        action[:, 0].abs() == 0.3
    ).float().mean() > 0.7  # the noise is clipped
    assert action[:, 1].max() > 0.999 and 0.59 < action[:, 1].min() < 0.61
    gradient = torch.autograd.grad(action.sum(), mean)[0]
    assert torch.equal(gradient, torch.ones_like(gradient))  # also where the action was clamped
    narrow = drq.truncated_normal(mean, torch.tensor(0.1), 0.3)[:, 0]
    assert abs(narrow.std() - 0.1) < 0.005


@pytest.mark.parametrize("discount", [0.97, 0.0], ids=["bootstraps", "terminated"])
def test_update_against_a_naive_one(discount):
    """Section 1 of DrQ-v2 written down again, with plain Adam and no gradient saved."""
    agent, optimizers, arguments = make_agent()
    other = copy.deepcopy(agent)
    encoder, actor, critic = (torch.optim.Adam(m.parameters(), lr=1e-3) for m in (
        other.encoder, other.actor, other.critic))  # fmt: skip
    for step in range(3):
        obs, action, reward, _, next_obs, std = batch = make_batch(seed=step)
        batch[3] = torch.full((16,), discount)
        torch.manual_seed(step)
        metrics = drq.update(agent, optimizers, arguments, batch)

        def noisy(mean, std=std):
            return (mean + (torch.randn(mean.shape) * std).clamp(-0.3, 0.3)).clamp(-1 + 1e-6, 1 - 1e-6)

        torch.manual_seed(step)
        with torch.no_grad():
            next_features = other.encoder(next_obs)[0]
            next_action = noisy(other.actor(next_features)[0])
            target = reward + discount * torch.stack(other.critic_target(next_features, next_action)[:2]).min(0).values
        features = other.encoder(obs)[0]
        q1, q2, _ = other.critic(features, action)
        critic_loss = ((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean()
        shares = []
        for x, layers in ((obs / 255 - 0.5, other.encoder.convnet[::2]),
                          (other.actor.trunk(features.detach()), other.actor.policy[:4:2])):  # fmt: skip
            activations = []
            for layer in layers:
                activations.append(x := layer(x).relu())
            shares.append(sum(int((a > 0).sum()) for a in activations) / sum(a.numel() for a in activations))
        assert [float(metrics[f"fau/{name}"]) for name in ("encoder", "actor")] == pytest.approx(shares, abs=2e-3)
        encoder.zero_grad(), critic.zero_grad()
        critic_loss.backward()
        critic.step(), encoder.step()
        gradients = [p.grad.clone() for p in (*other.critic.parameters(), *other.encoder.parameters())]
        actor_q = other.critic(features.detach(), noisy(other.actor(features.detach())[0]))[:2]
        actor_loss = -torch.stack(actor_q).min(0).values.mean()
        actor.zero_grad()
        actor_loss.backward()
        actor.step()
        for p, q in zip(other.critic_target.parameters(), other.critic.parameters()):
            p.data = 0.99 * p.data + 0.01 * q.data
        torch.testing.assert_close(metrics["losses/critic"], critic_loss.detach())
        torch.testing.assert_close(metrics["losses/actor"], actor_loss.detach())
        for p, gradient in zip((*agent.critic.parameters(), *agent.encoder.parameters()), gradients):
            torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)  # the actor's loss added nothing
            assert p.requires_grad
        assert metrics["losses/targets"] == pytest.approx(float(target.mean()), rel=1e-5)
    for (name, p), q in zip(agent.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4, msg=name)


def defaults_of(task):
    return drq.Args(**drq.Args(env_id=f"dm_control/{task}-v0").task_defaults())


def test_schedules_and_tables():
    medium = drq.Args(stddev_steps=500_000)
    at = [drq.stddev_at(step, medium) for step in (0, 50_000, 250_000, 500_000, 750_000)]
    assert at == pytest.approx([1, 0.91, 0.55, 0.1, 0.1])
    walker = defaults_of("walker-run")
    assert (walker.n_step, walker.batch_size, walker.stddev_steps, walker.total_timesteps) == (
        1,
        512,
        500_000,
        1_500_500,
    )
    assert (defaults_of("walker-walk").stddev_steps, defaults_of("walker-walk").batch_size) == (100_000, 512)
    assert (defaults_of("quadruped-run").buffer_size, defaults_of("cheetah-run").buffer_size) == (100_000, 1_000_000)
    humanoid = defaults_of("humanoid-run")
    assert (humanoid.learning_rate, humanoid.feature_dim, humanoid.stddev_steps) == (8e-5, 100, 2_000_000)
    frames = [2 * defaults_of(task).total_timesteps for task in ("cartpole-balance", "walker-run", "humanoid-walk")]
    assert frames == [1_001_000, 3_001_000, 30_100_000]


def test_tasks_and_defaults_are_the_same_in_all_pixel_scripts():
    import adaptive_rr as rr
    import drm
    import drqv2_frozen_encoder as frozen

    assert rr.TASKS == frozen.TASKS == drq.TASKS
    assert rr.TASKS["quadruped-run"] == dict(buffer_size=100_000)
    names = (
        "learning_starts", "exploration_steps", "eval_every", "eval_episodes", "batch_size", "feature_dim",
        "hidden_dim", "n_step", "gamma", "tau", "learning_rate", "stddev_start", "stddev_end", "stddev_clip",
        "shift_pad", "buffer_size",
    )  # fmt: skip
    official = (2000, 2000, 5000, 10, 256, 50, 1024, 3, 0.99, 0.01, 1e-4, 1.0, 0.1, 0.3, 4, 10**6)
    for script in (drq, rr, frozen, drm):
        assert tuple(getattr(script.Args, name) for name in names) == official, script.SCRIPT
    assert (rr.Args.rr_low, rr.Args.rr_high, rr.Args.rr_check_episodes, rr.Args.rr_threshold) == (0.5, 2, 50, 0.001)
    assert (drq.Args.replay_ratio, frozen.REPLAY_RATIO, drq.Args.redo_tau, drq.Args.redo_batch_size) == (
        0.5, 0.5, 0.025, 64)  # fmt: skip
    assert (drq.Args.shrink, drq.Args.perturb, drq.Args.plasticity_batch_size) == (0.2, 1.0, 256)


def test_a_reset_resets_group_norms():
    norm = nn.GroupNorm(1, 4)
    norm.weight.data.fill_(2)
    drq.reset_layers([norm], [], generator())
    assert (norm.weight == 1).all()


def test_acting():
    agent, _, _ = make_agent()
    obs = make_batch()[0][:1]
    mean = agent.mean_action(obs).detach().numpy()
    assert np.allclose(drq.act(agent, obs, 0.0, False, generator()), mean)
    draws = np.concatenate([drq.act(agent, obs, 0.7, False, generator(i)) for i in range(500)])
    assert np.abs(draws).max() <= 1 - 1e-6 and np.abs(draws - mean).max() > 0.9  # not clipped at 0.3
    uniform = np.concatenate([drq.act(agent, obs, 0.0, True, generator(i)) for i in range(500)])
    assert np.abs(uniform).max() <= 1 and np.abs(uniform.mean()) < 0.05 and abs(uniform.std() - 3**-0.5) < 0.02
    assert draws.dtype == uniform.dtype == np.float32


def test_bfloat16_is_close_and_sees_the_last_weights():
    agent, optimizers, arguments = make_agent()
    other, other_optimizers, other_arguments = make_agent(precision="bfloat16")
    for step in range(3):
        results = []
        for a, o, arg in ((agent, optimizers, arguments), (other, other_optimizers, other_arguments)):
            torch.manual_seed(step)
            results.append(drq.update(a, o, arg, make_batch(seed=step)))
        for tag in results[0]:
            assert results[1][tag] == pytest.approx(float(results[0][tag]), rel=0.05, abs=0.03), tag
    assert all(p.dtype == torch.float32 for p in other.parameters())
    moved = state(agent.encoder)
    assert not same(moved, state(make_agent()[0].encoder)) and not same(moved, state(other.encoder))


# --- what is measured -------------------------------------------------------------------------------------------------
def test_measure_plasticity():
    agent, *_ = updated()
    awaken(agent)
    with torch.no_grad():
        agent.critic.q1[0].weight[:4], agent.critic.q1[0].bias[:4] = 0, -1  # 4 of 64 hidden neurons are silent
    obs, action, *_ = make_batch()
    metrics = drq.measure_modules(agent, obs, action)
    assert metrics["dormant_ratio_tau0/critic"] == pytest.approx(4 / 64)
    assert metrics["dormant_ratio_tau0/actor"] == metrics["dormant_ratio_tau0.025/encoder"] == 0
    norm = math.sqrt(sum(float((p**2).sum()) for p in agent.actor.state_dict().values()))
    assert metrics["weight_norm/actor"] == pytest.approx(norm, rel=1e-5)
    with torch.no_grad():
        hidden = agent.actor(agent.encoder(obs)[0])[1][-1]
        features = agent.encoder(obs)[0]
        last = agent.critic(features, action)[2][1]
    ranks = [int(drq.feature_rank(x)) for x in (features, hidden, last)]
    assert [metrics[f"feature_rank/{name}"] for name in ("encoder", "actor", "critic")] == ranks
    share = torch.linalg.svdvals(hidden).cumsum(0)
    rank = next(k for k in range(1, 17) if share[k - 1] >= 0.99 * share[-1])
    assert metrics["feature_rank/actor"] == rank
    assert len(metrics) == 3 * (len(drq.TAUS) + 2)


def test_weight_norm_after_an_injection_is_that_of_what_learns():
    agent, optimizers, arguments = updated(injection="critic", injection_step=100)
    intervened(agent, optimizers, arguments, 100)
    obs, action, *_ = make_batch()
    norm = drq.measure_modules(agent, obs, action)["weight_norm/critic"]
    parts = [part.state_dict().values() for part in (agent.critic.trunk, agent.critic.q1.head, agent.critic.q2.head)]
    assert norm == pytest.approx(math.sqrt(sum(float((p**2).sum()) for part in parts for p in part)))


# --- interventions ----------------------------------------------------------------------------------------------------
def test_crelu():
    foreign = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    layers = drq.CReLULayers(foreign)
    with torch.no_grad():
        layers[0].weight.copy_(torch.eye(2))
        layers[0].bias.zero_()
        layers[2].weight.copy_(torch.tensor([[1.0, 10, 100, 1000]]))
    output, (active,) = layers(torch.tensor([[1.0, -2.0]]))
    assert output.item() == 1 + 2000 and active.tolist() == [[1, 0]]  # the negated half is not counted
    agent, optimizers, arguments = make_agent(crelu=True)
    first, _, second, _, last = agent.critic.q1
    assert [m.weight.shape for m in (first, second, last)] == [(16, 14), (16, 32), (1, 32)]
    assert drq.update(agent, optimizers, arguments, make_batch())["fau/critic"] != 0.5
    heads = [head for critic in (agent.critic, agent.critic_target) for head in (critic.q1, critic.q2)]
    assert all(type(head) is drq.CReLULayers for head in heads) and type(agent.actor.policy) is drq.Layers


def test_layer_norm():
    agent, _, _ = make_agent(layer_norm=True)
    kinds = [type(layer).__name__ for layer in agent.encoder.convnet]
    assert kinds == ["Conv2d", "GroupNorm", "ReLU"] * 4
    for layers in (agent.actor.policy, agent.critic.q1, agent.critic_target.q2):
        assert [type(m).__name__ for m in layers] == ["Linear", "GroupNorm", "ReLU"] * 2 + ["Linear"]
    x = torch.randn(5, 8)
    hidden = agent.actor.policy[0](x)
    normal = F.layer_norm(hidden, (16,))
    torch.testing.assert_close(agent.actor.policy(x)[1][0], normal.relu())
    maps = agent.encoder.convnet[1](agent.encoder.convnet[0](torch.randn(3, 9, 24, 24)))
    torch.testing.assert_close(maps.mean((1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.std((1, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)
    foreign = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    drq.layer_norm(foreign)
    assert [type(m).__name__ for m in foreign] == ["Conv2d", "GroupNorm", "ReLU", "Flatten", "Linear"]
    assert foreign(torch.randn(3, 1, 4, 4)).shape == (3, 2)


@pytest.mark.parametrize("where, names", [("trunk", ["actor.trunk", "critic.trunk"]),
                                          ("head", ["actor.policy", "critic.q1", "critic.q2"])])  # fmt: skip
def test_spectral_norm(where, names):
    """In evaluation mode, as between updates, a forward pass does not move its estimate."""
    agent, optimizers, arguments = make_agent(spectral_norm=where, learning_rate=0.1, tau=0.5)
    normalised = [name for name, module in agent.named_modules() if torch.nn.utils.parametrize.is_parametrized(module)]
    assert sorted(n for n in normalised if "target" not in n) == [f"{name}.0" for name in names]
    for i in range(20):
        drq.update(agent, optimizers, arguments, make_batch(seed=i))
    for name in names:
        layer = agent.get_submodule(name)[0]
        with torch.no_grad():
            assert torch.linalg.svdvals(layer.parametrizations.weight.original)[0] > 1.2
            assert torch.linalg.svdvals(layer.weight)[0] == pytest.approx(1, abs=0.1)
            target = agent.get_submodule(name.replace("critic", "critic_target"))[0]
            assert torch.linalg.svdvals(target.weight)[0] == pytest.approx(1, abs=0.1)
    before = state(agent)
    drq.measure_modules(agent, *make_batch()[:2])
    assert same(before, state(agent))


def test_l2_init_adds_its_gradient():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    drq.l2_init(optimizer, 0.25)
    initial = state(layer)
    layer.weight.grad, layer.bias.grad = torch.zeros(2, 3), torch.zeros(2)
    optimizer.step()
    assert same(state(layer), initial)  # no pull at the initial weights
    with torch.no_grad():
        layer.weight += 2
    optimizer.step()  # gradient 2 * 0.25 * 2
    torch.testing.assert_close(layer.weight.detach(), initial["weight"] + 1)
    torch.testing.assert_close(layer.bias.detach(), initial["bias"])


def test_penalties_act_on_their_networks():
    """Weight decay on all three; L2-Init on encoder and critic: 2 * 0.1 * (weights - those of step 0) more."""
    agent, optimizers, _ = make_agent(l2_init=0.1, weight_decay=0.2)
    assert [optimizer.param_groups[0]["weight_decay"] for optimizer in optimizers] == [0.2] * 3
    for module, optimizer, pull in zip((agent.encoder, agent.actor, agent.critic), optimizers, (0.2, 0, 0.2)):
        for weight in module.parameters():
            weight.data.add_(1)
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        for weight in module.parameters():
            torch.testing.assert_close(weight.grad, torch.full_like(weight, pull))


def adam_memory(optimizer, parameters):
    return sum(float(v.abs().sum()) for p in parameters for v in optimizer.state[p].values())


def intervened(agent, optimizers, arguments, step, replay=None):
    return drq.intervene(agent, optimizers, replay, arguments, step, step // 2, 1, generator(), torch.device("cpu"))


def test_reset():
    """The trunks and heads, and what Adam knows of them; the encoder is kept."""
    agent, optimizers, arguments = updated(reset_every=100)
    before, addresses = state(agent), [p.data_ptr() for p in agent.parameters()]
    assert intervened(agent, optimizers, arguments, 0) == intervened(agent, optimizers, arguments, 150) == {}
    assert same(before, state(agent))
    assert intervened(agent, optimizers, arguments, 200) == {"events/reset": 1}
    for name, value in agent.state_dict().items():
        if name.startswith("encoder"):
            assert torch.equal(before[name], value), name
        elif name.startswith("critic_target"):
            assert torch.equal(value, agent.state_dict()[name.replace("critic_target", "critic")]), name
        elif value.dim() > 1:
            assert not torch.equal(before[name], value), name
    memory = [adam_memory(o, m.parameters()) for o, m in zip(optimizers, (agent.encoder, agent.actor, agent.critic))]
    assert memory[0] > 0 and memory[1:] == [0, 0]
    weight, norm = agent.actor.policy[2].weight, agent.critic.trunk[1]
    torch.testing.assert_close(weight @ weight.T, torch.eye(16), atol=1e-5, rtol=0)
    assert (norm.weight == 1).all() and not norm.bias.any() and not agent.actor.policy[0].bias.any()
    assert addresses == [p.data_ptr() for p in agent.parameters()]


def foreign_network():
    """With a state of Adam."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    )
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    network(torch.randn(3, 1, 4, 4)).sum().backward()
    optimizer.step()
    return network, optimizer


@pytest.mark.parametrize("step_counts", [False, True])
def test_reset_layers_of_a_foreign_network(step_counts):
    network, optimizer = foreign_network()
    before = state(network)
    network[0].init = lambda weight, generator: nn.init.ones_(weight)
    drq.reset_layers([network[0], *network[3:5]], [optimizer], generator(), step_counts)
    assert (network[0].weight == 1).all() and not network[0].bias.any()
    assert network[3].weight.abs().max() <= 16**-0.5 and not torch.equal(network[3].weight, before["3.weight"])
    assert (network[4].weight == 1).all() and not network[4].bias.any()
    assert torch.equal(network[5].weight, before["5.weight"])
    for layer in (network[0], network[3], network[4]):
        for parameter in layer.parameters():
            memory = optimizer.state[parameter]
            assert memory["step"] == (0 if step_counts else 1)
            assert not memory["exp_avg"].any() and not memory["exp_avg_sq"].any()
    assert optimizer.state[network[5].weight]["step"] == 1 and optimizer.state[network[5].weight]["exp_avg"].any()


def test_shrink_and_perturb():
    agent, *_ = updated()
    for module in (agent.critic, foreign_network()[0]):
        before, fresh = state(module), copy.deepcopy(module)
        drq.reset_layers(fresh.modules(), [], generator(3))
        drq.shrink_and_perturb(module, 0.8, 0.2, generator(3))
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, 0.8 * before[name] + 0.2 * fresh.state_dict()[name])
        assert not same(before, state(fresh))


def test_shrink_and_perturb_is_for_the_critic():
    agent, optimizers, arguments = updated(shrink_perturb_every=100, shrink=0.3, perturb=0.6)
    before, fresh = state(agent), copy.deepcopy(agent.critic)
    drq.reset_layers(fresh.modules(), [], generator())
    assert intervened(agent, optimizers, arguments, 100) == {"events/perturb_factor": 0.3}
    for name, value in agent.state_dict().items():
        part, _, key = name.partition(".")
        new = 0.3 * before[name] + 0.6 * fresh.state_dict()[key] if part == "critic" else before[name]
        torch.testing.assert_close(value, new, rtol=0, atol=1e-6 if part == "critic" else 0)


class OneBatch:
    """A replay that always gives the same batch."""

    def sample(self, batch_size, generator):
        return make_batch(batch_size)[:5]


def test_recycling_silent_neurons_leaves_the_outputs_alone():
    agent, optimizers, arguments = updated(redo_tau=0.0, redo_period_gradient_steps=50, redo_batch_size=16)
    awaken(agent)
    with torch.no_grad():
        for layer in (agent.critic.q1[2], agent.critic.q2[0]):
            layer.bias[3] = -1e6  # neuron 3 never speaks
    obs, action, *_ = make_batch()
    features, _ = agent.encoder(obs)
    before, outputs = state(agent), agent.critic(features, action)[:2]
    assert intervened(agent, optimizers, arguments, 98, OneBatch()) == {}  # after 49 gradient steps
    events = intervened(agent, optimizers, arguments, 100, OneBatch())
    assert {tag: int(value) for tag, value in events.items()} == {"redo_recycled/critic": 2}
    for a, b in zip(outputs, agent.critic(features, action)[:2]):
        torch.testing.assert_close(a, b)
    changed = {"critic.q1.2.weight", "critic.q1.2.bias", "critic.q1.4.weight", "critic.q2.0.weight", "critic.q2.0.bias",
               "critic.q2.2.weight"}  # fmt: skip
    after = state(agent)
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed
    memory = optimizers[2].state[agent.critic.q2[0].weight]["exp_avg"]
    assert (
        not memory[3].any()
        and memory.any()
        and not optimizers[2].state[agent.critic.q2[2].weight]["exp_avg"][:, 3].any()
    )


@pytest.mark.parametrize("ratio, expected", [(0.5, [18, 38]), (4, [2, 4, 7, 9, 12, 14, 17, 19])])
def test_the_period_of_redo_is_in_gradient_steps(ratio, expected):
    """Every 10 of them, after the step in which they are full."""
    agent, optimizers, arguments = updated(redo_period_gradient_steps=10, redo_batch_size=16)
    recycled, gradient_steps = [], 0
    for step in range(20 if ratio > 1 else 40):
        updates = drq.updates_due(step, ratio)
        gradient_steps += updates
        counts = step, gradient_steps, updates
        if drq.intervene(agent, optimizers, OneBatch(), arguments, *counts, generator(), torch.device("cpu")):
            recycled.append(step)
    assert recycled == expected


@pytest.mark.parametrize("module", ["actor", "critic"])
def test_injection(module):
    agent, optimizers, arguments = make_agent(injection=module, injection_step=100)
    plain, *_ = make_agent()
    obs, action, *_ = make_batch()

    def outputs(agent):
        features, _ = agent.encoder(obs)
        return [
            agent.actor(features)[0],
            *agent.critic(features, action)[:2],
            *agent.critic_target(features, action)[:2],
        ]

    for a, b in zip(outputs(plain), outputs(agent)):
        assert torch.equal(a, b)  # the branches that do not learn give 0
    for i in range(3):
        drq.update(agent, optimizers, arguments, make_batch(seed=i))
    before, trained, names = outputs(agent), state(agent), list(agent.state_dict())
    addresses = [p.data_ptr() for p in agent.parameters()]
    assert intervened(agent, optimizers, arguments, 100) == {"events/injection": 1}
    for a, b in zip(before, outputs(agent)):
        assert torch.equal(a, b)
    assert names == list(agent.state_dict()) and addresses == [p.data_ptr() for p in agent.parameters()]
    heads = {"actor": [(agent.actor.policy, "actor.policy", 1)],
             "critic": [(agent.critic.q1, "critic.q1", 2), (agent.critic.q2, "critic.q2", 2)]}[module]  # fmt: skip
    for head, name, optimizer in heads:
        old = {key.removeprefix(f"{name}.head."): value for key, value in trained.items() if f"{name}.head." in key}
        assert same(old, {k: v for k, v in head.frozen.state_dict().items()})
        assert same(head.initial.state_dict(), head.head.state_dict())
        assert not torch.equal(head.head[0].weight, head.frozen[0].weight)
        assert adam_memory(optimizers[optimizer], head.head.parameters()) == 0
        if module == "critic":
            target = agent.get_submodule(name.replace("critic", "critic_target"))
            assert same(target.head.state_dict(), head.head.state_dict())
            assert torch.equal(
                target.frozen[0].weight, trained[f"{name.replace('critic', 'critic_target')}.head.0.weight"]
            )
    frozen = [state(part) for head, *_ in heads for part in (head.frozen, head.initial)]
    now = state(agent)
    for i in range(5):
        drq.update(agent, optimizers, arguments, make_batch(seed=i))
    assert all(
        same(a, b) for a, b in zip(frozen, [state(p) for head, *_ in heads for p in (head.frozen, head.initial)])
    )
    learning = [f"{name}.head.0.weight" for _, name, _ in heads]
    for name in [*learning, "critic.trunk.0.weight", "encoder.convnet.0.weight", "actor.trunk.0.weight"]:
        assert not torch.equal(now[name], agent.state_dict()[name]), name
    with pytest.raises(ValueError, match="has been injected"):
        intervened(agent, optimizers, arguments, 100)


def test_injection_into_a_foreign_network():
    network = drq.InjectableHead(drq.Layers(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    optimizer, x = torch.optim.Adam(p for p in network.parameters() if p.requires_grad), torch.randn(5, 3)
    before, _ = network(x)
    before.sum().backward()
    optimizer.step()
    before, _ = network(x)
    drq.inject([network], [optimizer], generator())
    after, (hidden,) = network(x)
    assert torch.equal(before, after) and torch.equal(hidden, network.head(x)[1][0]) and hidden.any()
    assert sum(p.requires_grad for p in network.parameters()) == 4


# --- replay -----------------------------------------------------------------------------------------------------------
class Diary:
    """Everything that happened, kept whole: an oracle for the replay."""

    def __init__(self):
        self.episodes, self.number = [], 0

    def add(self, first, frame, action=None, reward=0.0, terminated=False):
        if first:
            self.episodes.append([])
        self.episodes[-1].append((self.number, frame, action, reward, terminated))
        self.number += 1

    def transitions(self, capacity, n_step, gamma):
        """number of the first frame -> obs, action, reward, discount, next_obs."""
        result = {}
        for episode in self.episodes:

            def stack(i, episode=episode):
                return np.concatenate([episode[max(i - k, 0)][1] for k in (2, 1, 0)])

            for i in range(len(episode) - n_step):
                needed = episode[i][0] - 2
                if needed < self.number - capacity and self.number > capacity:
                    continue
                window = episode[i + 1 : i + 1 + n_step]
                reward = sum(gamma**k * step[3] for k, step in enumerate(window))
                discount = 0.0 if any(step[4] for step in window) else gamma**n_step
                result[episode[i][0]] = (stack(i), window[0][2], reward, discount, stack(i + n_step))
        return result


@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize("capacity", [40, 1000], ids=["wrapped", "growing"])
@pytest.mark.parametrize("seed", range(4))
def test_replay_against_brute_force(n_step, capacity, seed):
    rng, diary = np.random.default_rng(seed), Diary()
    replay = drq.PixelReplay(capacity, 2, "cpu", n_step, 0.9, (3, 2, 2))
    for _ in range(20):
        frame = rng.integers(0, 256, (3, 2, 2), dtype=np.uint8)
        replay.add_first(frame)
        diary.add(True, frame)
        for t in range(length := int(rng.integers(1, 15))):
            frame, action = rng.integers(0, 256, (3, 2, 2), dtype=np.uint8), rng.normal(size=2).astype(np.float32)
            end = length % 3 == 0 and t == length - 1
            replay.add(action, 0.5 * t - 1, end, frame)
            diary.add(False, frame, action, 0.5 * t - 1, end)
            if t % 4 == 0 or t == length - 1:
                expected = diary.transitions(capacity, n_step, 0.9)
                assert len(replay) == len(expected)
    obs, action, reward, discount, next_obs = replay.sample(1500, generator(seed))
    seen = {}
    for i in range(1500):
        matches = [n for n, (o, a, *_) in expected.items()
                   if np.array_equal(o, obs[i]) and np.array_equal(a, action[i])]  # fmt: skip
        (number,) = matches
        seen[number] = seen.get(number, 0) + 1
        _, _, r, d, o = expected[number]
        assert reward[i] == pytest.approx(r, rel=1e-5) and discount[i] == pytest.approx(d)
        assert np.array_equal(o, next_obs[i])
    mean = 1500 / len(expected)
    assert len(seen) > 0.95 * len(expected) and max(seen.values()) < mean + 6 * math.sqrt(mean)  # uniform
    last = diary.episodes[-1]
    stack = np.concatenate([last[max(len(last) - 1 - k, 0)][1] for k in (2, 1, 0)])
    assert np.array_equal(replay.newest()[0], stack)


def test_replay_powers_of_gamma_and_termination():
    replay = drq.PixelReplay(100, 1, "cpu", 3, 0.99, (3, 1, 1))
    for terminated in (False, True):
        replay.add_first(np.zeros((3, 1, 1), np.uint8))
        for t in range(3):
            replay.add(np.float32([t]), 10.0**t, terminated and t == 2, np.full((3, 1, 1), t + 1, np.uint8))
    obs, action, reward, discount, next_obs = replay.sample(50, generator())
    assert (action == 0).all() and (obs == 0).all() and next_obs[0, :, 0, 0].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert torch.allclose(reward, torch.tensor(1 + 0.99 * 10 + 0.99**2 * 100))
    assert sorted(discount.unique().tolist()) == pytest.approx([0, 0.970299])  # a discount of 0 stays 0


@pytest.mark.parametrize(
    "old, new, fits", [(40, 40, True), (90, 200, True), (200, 90, True), (40, 70, False), (70, 40, False)]
)
def test_replay_moves_to_a_ring_of_another_size_unless_it_went_round(old, new, fits):
    rng, replays = (
        np.random.default_rng(0),
        [drq.PixelReplay(size, 1, "cpu", 3, 0.9, (3, 1, 1)) for size in (old, new, new)],
    )

    def play(replays, episodes):
        for _ in range(episodes):
            frames = rng.integers(0, 256, (9, 3, 1, 1), dtype=np.uint8)
            for replay in replays:
                replay.add_first(frames[0])
                for t in range(1, 9):
                    replay.add(np.float32([t]), float(t), False, frames[t])

    play(replays[::2], 7)
    if not fits:
        with pytest.raises(ValueError, match="wrapped around a ring of another size"):
            replays[1].load_state_dict(replays[0].state_dict())
        return
    replays[1].load_state_dict(replays[0].state_dict())
    play(replays[1:], 2)
    moved, always = (replay.sample(500, generator(1)) for replay in replays[1:])
    assert all(torch.equal(a, b) for a, b in zip(moved, always))  # as if it had always had this size


def test_replay_memory_and_state(tmp_path):
    replay = drq.PixelReplay(1000, 6, "cpu")
    size = sum(ring.numel() * ring.element_size() for ring in (replay.frames, replay.record, replay.start))
    assert size < 21_300 * 1000  # of a stack: 63,504
    rng = np.random.default_rng(0)
    for _ in range(3):
        replay.add_first(rng.integers(0, 256, (3, 84, 84), dtype=np.uint8))
        for _ in range(10):
            replay.add(
                rng.normal(size=6).astype(np.float32), 1.0, False, rng.integers(0, 256, (3, 84, 84), dtype=np.uint8)
            )
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    assert (tmp_path / "replay.pt").stat().st_size < 1.1 * 33 * 3 * 84 * 84
    larger = drq.PixelReplay(2000, 6, "cpu")
    larger.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    for a, b in zip(replay.sample(64, generator()), larger.sample(64, generator())):
        assert torch.equal(a, b)


# --- speed ------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("options", [
    dict(reset_every=40), dict(injection="critic", injection_step=40),
    dict(redo_period_gradient_steps=10, redo_tau=0.5, redo_batch_size=16),
], ids=str)  # fmt: skip
def test_cudagraphs_equal_eager_across_interventions(options):
    results, device = {}, torch.device("cuda")
    for captured in (False, True):
        agent, _, arguments = make_agent(cudagraphs=captured, **options)
        agent.to(device)
        optimizers = drq.make_optimizers(agent, arguments, device)
        learn, draws = partial(drq.update, agent, optimizers, arguments), generator()
        if captured:
            learn = drq.capture(learn, optimizers)
        torch.cuda.manual_seed(0)
        for i in range(30):
            metrics = learn([x.cuda() for x in make_batch(seed=i)])
            drq.intervene(agent, optimizers, OneBatch(), arguments, 2 * i, i, 1, draws, device)
        results[captured] = state(agent) | metrics
    for name in results[False]:
        torch.testing.assert_close(results[True][name], results[False][name], atol=1e-3, rtol=1e-2, msg=name)
