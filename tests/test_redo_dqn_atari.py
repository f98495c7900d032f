"""redo_dqn_atari.py: every formula against values worked out by hand, the replay against a brute-force oracle."""

import copy
from functools import partial
from types import SimpleNamespace

import ale_py
import gymnasium
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

import redo_dqn_atari as redo

NETWORKS = [dict(padding="same"), dict(padding="valid"), dict(network="resnet")]
CPU = torch.device("cpu")
RUN = SimpleNamespace(stopped=None, bar=SimpleNamespace(set_description=str))


def small_args(**changes):
    changes = {"width": 0.125, "device": "cpu", **changes}
    return redo.Args(**redo.Args(**changes).task_defaults() | changes)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_obs(n=8, seed=0):
    return torch.randint(0, 256, (n, 4, 84, 84), dtype=torch.uint8, generator=seeded(seed))


def random_batch(n=8, seed=0):
    g = seeded(seed)
    action, reward = torch.randint(0, 6, (n,), generator=g), torch.randn(n, generator=g)
    return random_obs(n, seed), action, reward, torch.full((n,), 0.99), random_obs(n, seed + 1)


def trained_agent(updates=3, **changes):
    """An agent whose optimizer has a state."""
    args = small_args(**changes)
    agent = redo.DQNAgent(6, args)
    optimizer = redo.make_optimizer(agent, args, CPU)
    for i in range(updates):
        redo.update(agent, optimizer, args, random_batch(seed=i))
    return agent, optimizer, args


def kill_neurons(q_network, count=2):
    """Makes the first neurons of every layer that can be recycled silent."""
    for name in q_network.reader:
        q_network.layers[name].bias.data[:count] = -1e6


def recycle(q_network, optimizer, obs, tau):
    activations = q_network(obs)[1]
    readers = q_network.recyclable()
    return redo.recycle(readers, [activations[name] for name in q_network.reader], optimizer, tau, seeded())


# --- dormancy ---------------------------------------------------------------------------------------------------------
def test_dormant_score_by_hand():
    activation = torch.tensor([[0.0, 0.1, -1.0, 3.0], [0.0, -0.1, 1.0, 1.0]])  # mean |h|: 0, 0.1, 1, 2
    score = redo.dormant_score(activation)
    torch.testing.assert_close(score, torch.tensor([0.0, 0.12903, 1.29032, 2.58065]), atol=1e-5, rtol=0)
    assert score.sum().item() == pytest.approx(4)  # H, not 1 as the paper's text says
    assert [redo.dormant_share(score, tau).item() for tau in (0.1, 0.13, 3)] == [0.25, 0.5, 1]


def test_dormant_score_of_feature_maps():
    maps = torch.zeros(2, 3, 4, 5)
    maps[0, 1, 2, 3], maps[1, 2] = 6.0, -1.5  # means over batch and positions: 0, 6/40, 1.5/2
    score = redo.dormant_score(maps)
    torch.testing.assert_close(score, torch.tensor([0.0, 0.15, 0.75]) / 0.3)


def test_a_silent_layer_is_all_dormant_and_tau_0_is_exact():
    assert (redo.dormant_score(torch.zeros(4, 3)) == 0).all()
    assert (redo.dormant_score(torch.zeros(4, 3, 2, 2)) == 0).all()
    assert (redo.dormant_score(torch.tensor([[5e-9, 1.0]])) > 0).all()
    score = redo.dormant_score(torch.tensor([[1.0, 1.0, 4.0]]))
    assert redo.dormant_share(score, 0.5).item() == pytest.approx(2 / 3)  # <=, not <


def test_overlap():
    a, b = torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([0, 1, 0, 1, 0]).bool()
    assert redo.overlap(a, b).item() == 0.5 and redo.overlap(a, a).item() == 1
    assert redo.overlap(a, torch.zeros(5).bool()).isnan()


def test_feature_rank():
    features = torch.diag(torch.tensor([50.0, 48.5, 1.0, 0.5]))  # shares 0.5, 0.985, 0.995, 1
    assert redo.feature_rank(features).item() == 3
    assert redo.feature_rank(features, delta=0.02).item() == 2
    assert redo.feature_rank(torch.ones(9, 4)).item() == 1


def test_measure_plasticity_counts_and_compares():
    agent, _, args = trained_agent(dormant_batch_size=4, rank_batch_size=16)
    obs, history = random_obs(16), redo.DormantHistory()
    metrics = redo.measure_plasticity(agent.q_network, obs, history, args)
    activations = agent.q_network(obs)[1]
    masks = {name: redo.dormant_score(h[:4]) == 0 for name, h in activations.items()}
    assert {name: len(mask) for name, mask in masks.items()} == dict(conv1=4, conv2=8, conv3=8, dense=64)
    masks["all"] = torch.cat(list(masks.values()))
    for name, mask in masks.items():
        assert metrics[f"dormant_ratio_tau0/{name}"] == mask.float().mean()
    assert metrics["dormant_ratio_tau0/all"] > 0
    for tau in (0.025, 0.1):
        share = (redo.dormant_score(activations["dense"][:4]) <= tau).float().mean()
        assert metrics[f"dormant_ratio_tau{tau}/dense"] == share
    assert metrics["feature_rank/dense"] == redo.feature_rank(activations["dense"])  # of all 16 states
    assert metrics["feature_rank/dense"] > redo.feature_rank(activations["dense"][:4])
    assert not any(f"overlap_{kind}/all" in metrics for kind in ("previous", "anchor", "union"))
    other = torch.cat([redo.dormant_score(h[4:8]) == 0 for h in activations.values()])
    assert metrics["overlap_noise_floor/all"] == redo.overlap(masks["all"], other)

    with torch.no_grad():  # now every other neuron of the dense layer dies, and one comes to life
        first = masks["dense"]
        agent.q_network.layers["dense"].bias[::2] = -1e6
        revived = int(torch.nonzero(first[1::2])[0]) * 2 + 1
        agent.q_network.layers["dense"].bias[revived] = 1e6
    metrics = redo.measure_plasticity(agent.q_network, obs, history, args)
    second = redo.dormant_score(agent.q_network(obs[:4])[1]["dense"]) == 0
    for kind in ("previous", "anchor", "union"):
        assert metrics[f"overlap_{kind}/dense"] == redo.overlap(second, first) < 1
    assert torch.equal(history.union["dense"], first | second) and torch.equal(history.anchor["dense"], first)
    restored = redo.DormantHistory()
    restored.load_state_dict(history.state_dict())
    metrics = redo.measure_plasticity(agent.q_network, obs, restored, args)
    assert metrics["overlap_previous/dense"] == metrics["overlap_union/dense"] == 1
    assert metrics["overlap_anchor/dense"] == redo.overlap(second, first)


# --- networks ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, parameters, neurons", [
    (dict(padding="same"), 4_046_502, 672), (dict(padding="valid"), 1_687_206, 672),
    (dict(network="resnet"), 4_357_542, 1152),
])  # fmt: skip
def test_sizes_are_the_papers(options, parameters, neurons):
    agent = redo.DQNAgent(6, small_args(width=1.0, **options))
    assert sum(p.numel() for p in agent.q_network.parameters()) == parameters
    q_values, activations = agent.q_network(random_obs(2))
    assert q_values.shape == (2, 6) and sum(h.shape[1] for h in activations.values()) == neurons


def test_width_and_activation():
    wide = redo.DQNAgent(6, small_args(width=1.3)).q_network
    assert [len(wide.layers[k].bias) for k in ("conv1", "conv2", "dense")] == [42, 84, 666]
    assert redo.DQNAgent(6, small_args()).q_network(random_obs())[1]["dense"].min() == 0
    leaky = redo.DQNAgent(6, small_args(activation="leaky_relu")).q_network
    assert leaky(random_obs())[1]["dense"].min() < 0


@pytest.mark.parametrize("padding, pads", [("same", ((2, 2), (1, 2), (1, 1))), ("valid", ((0, 0),) * 3)])
def test_the_nature_network_written_out(padding, pads):
    args = small_args(padding=padding, init="torch")  # biases are not 0
    q_network, obs = redo.DQNAgent(6, args).q_network, random_obs()
    layers, x = q_network.layers, obs / 255
    q_values, activations = q_network(obs)
    for name, stride, (before, after) in zip(("conv1", "conv2", "conv3"), (4, 2, 1), pads):
        x = F.pad(x, (before, after, before, after))
        x = F.conv2d(x, layers[name].weight, layers[name].bias, stride).relu()
        torch.testing.assert_close(activations[name], x)
    dense = F.linear(x.flatten(1), layers["dense"].weight, layers["dense"].bias).relu()
    torch.testing.assert_close(activations["dense"], dense)
    torch.testing.assert_close(q_values, F.linear(dense, layers["head"].weight, layers["head"].bias))


def test_the_resnet_written_out():
    q_network, obs = redo.DQNAgent(6, small_args(network="resnet")).q_network, random_obs()
    with torch.no_grad():
        for layer in q_network.layers.values():  # else hardly a number would notice a missing one
            layer.bias.normal_(0, 0.1, generator=seeded())

    def conv(name, x):
        return F.conv2d(x, q_network.layers[name].weight, q_network.layers[name].bias, padding=1)

    q_values, activations = q_network(obs)
    x = obs / 255
    for stack, pad in ((1, (0, 1)), (2, (0, 1)), (3, (1, 1))):  # TensorFlow's SAME for 84, 42, 21 pixels
        x = F.max_pool2d(F.pad(conv(f"stack{stack}", x), 2 * pad, value=-torch.inf), 3, 2)
        for block in (1, 2):
            name = f"stack{stack}_block{block}"
            torch.testing.assert_close(activations[f"{name}_input"], x.relu())
            inner = conv(f"{name}_conv1", x.relu()).relu()
            torch.testing.assert_close(activations[f"{name}_conv1"], inner)
            x = x + conv(f"{name}_conv2", inner)
    assert x.shape[2:] == (11, 11)
    dense = F.linear(x.relu().flatten(1), q_network.layers["dense"].weight, q_network.layers["dense"].bias).relu()
    torch.testing.assert_close(
        q_values, F.linear(dense, q_network.layers["head"].weight, q_network.layers["head"].bias)
    )


@pytest.mark.parametrize("kernel, stride, size, expected", [
    (8, 4, 84, (2, 2)), (4, 2, 21, (1, 2)), (3, 1, 11, (1, 1)), (3, 2, 84, (0, 1)), (3, 2, 21, (1, 1)),
])  # fmt: skip
def test_same_padding(kernel, stride, size, expected):
    assert redo.same_padding(size, kernel, stride) == expected


def test_initial_distributions():
    layer = nn.Conv2d(64, 256, 3)
    fan_in, fan_out = 64 * 9, 256 * 9
    for kind, bound, std in (
        (redo.INITS["xavier"], (6 / (fan_in + fan_out)) ** 0.5, (2 / (fan_in + fan_out)) ** 0.5),
        (redo.INITS["torch"], fan_in**-0.5, (3 * fan_in) ** -0.5), (None, fan_in**-0.5, (3 * fan_in) ** -0.5),
        (redo.lecun_normal_, 2 * fan_in**-0.5 / 0.8796, fan_in**-0.5),
    ):  # fmt: skip
        if kind is not None:
            layer.init = kind
        elif hasattr(layer, "init"):
            del layer.init
        weight = redo.initial_weight(layer, seeded())
        assert weight.shape == layer.weight.shape and torch.equal(weight, redo.initial_weight(layer, seeded()))
        assert weight.std().item() == pytest.approx(std, rel=0.01)
        assert 0.98 * bound < weight.abs().max().item() <= bound * 1.0001
    resnet = redo.DQNAgent(6, small_args(network="resnet", width=1.0)).q_network
    inner, first = (resnet.layers[name].weight.std().item() for name in ("stack2_block1_conv1", "stack2"))
    assert inner == pytest.approx((64 * 9) ** -0.5, rel=0.02)
    assert first == pytest.approx((2 / (32 * 9 + 64 * 9)) ** 0.5, rel=0.02)
    assert not any(layer.bias.any() for layer in resnet.layers.values())
    valid = redo.DQNAgent(6, small_args(init="torch")).q_network
    assert 0 < valid.layers["dense"].bias.abs().max() <= valid.layers["dense"].in_features ** -0.5
    assert redo.DQNAgent(6, small_args(seed=2)).q_network.layers["head"].weight.ne(
        redo.DQNAgent(6, small_args(seed=3)).q_network.layers["head"].weight).all()  # fmt: skip


def test_a_fresh_network_has_silent_neurons():
    """On random images, about a tenth (4 to 16% by seed); the paper's curves start at 13 to 18%, on a game's."""
    obs = random_obs(64)
    for padding in ("same", "valid"):
        ratios = []
        for seed in range(1, 5):
            q_network = redo.DQNAgent(6, small_args(width=1.0, padding=padding, seed=seed)).q_network
            with torch.no_grad():
                scores = [redo.dormant_score(h) for h in q_network(obs)[1].values()]
            ratios.append((torch.cat(scores) == 0).float().mean())
        assert 0.06 < np.mean(ratios) < 0.2


# --- recycling --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_at_tau_0_the_output_does_not_change(options):
    agent, optimizer, args = trained_agent(redo_tau=0.0, **options)
    kill_neurons(agent.q_network)
    obs = random_obs(16, seed=5)
    before, activations = agent.q_network(obs)
    replay = SimpleNamespace(sample=lambda batch_size, generator: (obs,))
    metrics = redo.recycle_or_reset(agent.q_network, optimizer, replay, 1000, args, seeded(), CPU)
    assert torch.equal(agent.q_network(obs)[0], before) and metrics["events/redo_q_change"] == 0
    counts = {k.rpartition("/")[2]: int(v) for k, v in metrics.items() if "recycled" in k}
    assert counts.pop("all") == sum(counts.values()) and counts.keys() == agent.q_network.reader.keys()
    for name, count in counts.items():  # some are alive again
        dead, activation = redo.dormant_score(activations[name]) == 0, agent.q_network(obs)[1][name]
        assert count == dead.sum() >= 2
        assert (redo.dormant_score(activation)[dead] > 0).any(), name


def test_intervene_measures_the_change_and_acts_every_period():
    agent, optimizer, args = trained_agent(redo_tau=0.5, redo_batch_size=16)
    obs, asked = random_obs(16), []
    replay = SimpleNamespace(sample=lambda batch_size, generator: asked.append(batch_size) or (obs,))
    before = agent.q_network(obs)[0]
    assert not any(
        redo.recycle_or_reset(agent.q_network, optimizer, replay, n, args, seeded(), CPU) for n in (1, 999, 1001)
    )
    assert torch.equal(agent.q_network(obs)[0], before) and not asked
    metrics = redo.recycle_or_reset(agent.q_network, optimizer, replay, 2000, args, seeded(), CPU)
    change = (agent.q_network(obs)[0] - before).abs().max()
    assert metrics["events/redo_q_change"] == change > 0 and asked == [16]


def foreign_network():
    """An encoder with feature maps of 2 x 3 positions, which two trunks read; one of these has no biases."""
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, (1, 2)), nn.ReLU(), nn.Flatten())
    actor = nn.Sequential(nn.Linear(4 * 2 * 3, 5), nn.ReLU(), nn.Linear(5, 2))
    critic = nn.Sequential(nn.Linear(4 * 2 * 3, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))
    for layer in (encoder[0], encoder[2], actor[0], actor[2], critic[2]):
        nn.init.normal_(layer.bias)
    return nn.ModuleDict(dict(encoder=encoder, actor=actor, critic=critic))


def forward(net, x):
    """-> the outputs, and the activations of the layers that can be recycled."""
    first = net["encoder"][:2](x)
    maps = net["encoder"][2:4](first)
    hidden = [net[trunk][:2](maps.flatten(1)) for trunk in ("actor", "critic")]
    return [net[trunk][2](h) for trunk, h in zip(("actor", "critic"), hidden)], [first, maps, *hidden]


def recycled_foreign(kind=torch.optim.Adam, tau=0.0, **options):
    """-> the network, itself before, masks, states of the optimizer now and before, input."""
    net = foreign_network()
    optimizer = kind(net.parameters(), lr=1e-3, **options)
    x = torch.rand(6, 1, 3, 5)
    with torch.no_grad():
        net["encoder"][0].bias[1] = net["encoder"][2].bias[2] = net["actor"][0].bias[3] = -1e6
        net["critic"][0].weight[4] = -1  # on activations that are not negative
    for _ in range(3):
        optimizer.zero_grad()
        sum(q.square().sum() for q in forward(net, x)[0]).backward()
        optimizer.step()
    for state in optimizer.state.values():  # nothing is 0 by chance
        for value in state.values():
            value.add_(1) if value.dim() else None
    before, state_before = copy.deepcopy(net), copy.deepcopy([optimizer.state[p] for p in net.parameters()])
    encoder, actor, critic = net["encoder"], net["actor"], net["critic"]
    layers = [(encoder[0], [encoder[2]]), (encoder[2], [actor[0], critic[0]]), (actor[0], [actor[2]]),
              (critic[0], [critic[2]])]  # fmt: skip
    masks = redo.recycle(layers, forward(net, x)[1], optimizer, tau, seeded())
    return net, before, masks, [optimizer.state[p] for p in net.parameters()], state_before, x


def touched(masks):
    """Per parameter of the foreign network: the elements with incoming weights or biases of recycled neurons, and the
    elements with outgoing weights."""
    first, maps, actor, critic = masks
    assert first[1] and maps[2] and actor[3] and critic[4] and not any(mask.all() for mask in masks)
    positions = torch.zeros(4, 2, 3, dtype=torch.bool)
    positions[maps] = True
    columns, none = positions.flatten(), torch.tensor(False)
    return {
        "encoder.0.weight": (first.view(3, 1, 1, 1).expand(3, 1, 2, 2), none), "encoder.0.bias": (first, none),
        "encoder.2.weight": (maps.view(4, 1, 1, 1).expand(4, 3, 1, 2), first.view(1, 3, 1, 1)),
        "encoder.2.bias": (maps, none), "actor.0.weight": (actor[:, None].expand(5, 24), columns),
        "actor.0.bias": (actor, none), "actor.2.weight": (none.expand(2, 5), actor), "actor.2.bias": (none, none),
        "critic.0.weight": (critic[:, None].expand(6, 24), columns),
        "critic.2.weight": (none.expand(3, 6), critic), "critic.2.bias": (none, none),
    }  # fmt: skip


def test_recycling_a_foreign_network_at_tau_0_keeps_its_output():
    net, before, masks, _, _, x = recycled_foreign()
    for new, old in zip(forward(net, x)[0], forward(before, x)[0], strict=True):
        assert torch.equal(new, old)
    revived = []
    for mask, activation, old in zip(masks, forward(net, x)[1], forward(before, x)[1], strict=True):
        assert torch.equal(mask, old.abs().sum([0, *range(2, old.dim())]) == 0)  # the dead ones, all of them
        revived.append(activation.transpose(0, 1)[mask].any())
    assert sum(revived) >= 2


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_only_masked_weights_change_and_as_they_should(tau):
    net, before, masks, _, _, _ = recycled_foreign(tau=tau)
    old, new = dict(before.named_parameters()), dict(net.named_parameters())
    assert old.keys() == touched(masks).keys()
    for name, (incoming, outgoing) in touched(masks).items():
        kept = ~(incoming | outgoing).expand_as(new[name])
        assert torch.equal(new[name][kept], old[name][kept]), name
        drawn, zeroed = (incoming & ~outgoing).expand_as(kept), outgoing.expand_as(kept)
        assert not new[name][zeroed].any(), name  # also between two recycled neurons
        if name.endswith("weight"):
            bound = new[name][0].numel() ** -0.5  # PyTorch's
            assert (new[name][drawn] != old[name][drawn]).all() and (new[name][drawn].abs() <= bound).all(), name
            assert new[name][drawn].all(), name
        else:
            assert not new[name][drawn].any(), name
    assert sum(int(mask.sum()) for mask in masks) > 4 * (tau > 0)


def test_a_recycled_neuron_is_drawn_from_its_layers_distribution():
    agent, optimizer, _ = trained_agent(updates=1, network="resnet", width=1.0)
    kill_neurons(agent.q_network, 16)
    recycle(agent.q_network, optimizer, random_obs(4), 0.0)
    inner, dense = (agent.q_network.layers[name].weight[:16] for name in ("stack2_block1_conv1", "dense"))
    assert inner[:, 16:].std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.05)
    assert inner.abs().max() > 1.8 * (64 * 9) ** -0.5  # lecun: normal, not uniform
    bound = (6 / (7744 + 512)) ** 0.5
    assert 0.99 * bound < dense.abs().max() <= bound


def test_a_feature_maps_columns_are_the_right_ones():
    net, before, masks, _, _, x = recycled_foreign()
    channel = int(masks[1].nonzero()[0, 0])
    with torch.no_grad():
        maps = forward(net, x)[1][1]
        changed = maps.clone()
        changed[:, channel] += 10
        for trunk in ("actor", "critic"):
            new, old = net[trunk][0], before[trunk][0]
            assert torch.equal(new(maps.flatten(1)), new(changed.flatten(1)))
            assert not torch.equal(old(maps.flatten(1)), old(changed.flatten(1)))


@pytest.mark.parametrize("kind, options, averages", [
    (torch.optim.Adam, {}, {"exp_avg", "exp_avg_sq"}), (torch.optim.SGD, dict(momentum=0.9), {"momentum_buffer"}),
    (torch.optim.SGD, {}, set()),
], ids=["adam", "momentum", "sgd"])  # fmt: skip
def test_what_the_optimizer_forgets(kind, options, averages):
    """As in the official code: the averages of weights, but not those of biases, nor the step count."""
    net, _, masks, states, states_before, _ = recycled_foreign(kind, **options)
    for (name, (incoming, outgoing)), state, old in zip(touched(masks).items(), states, states_before, strict=True):
        assert state.keys() - {"step"} == averages
        assert state.get("step") == old.get("step") and ("step" not in old or old["step"] == 3)
        for key in averages:
            forgotten = (incoming | outgoing).expand_as(state[key]) & name.endswith("weight")
            assert not state[key][forgotten].any(), (name, key)
            assert torch.equal(state[key][~forgotten], old[key][~forgotten]) and old[key].all(), (name, key)


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_everything_is_edited_in_place_and_the_target_is_left_alone(options):
    agent, optimizer, args = trained_agent(**options)
    pointers = [p.data_ptr() for p in agent.parameters()]
    pointers += [v.data_ptr() for state in optimizer.state.values() for v in state.values()]
    target = copy.deepcopy(agent.target_network.state_dict())
    assert sum(mask.sum() for mask in recycle(agent.q_network, optimizer, random_obs(), 0.5)) > 0
    redo.reset_layers([agent.q_network.layers[name] for name in ("dense", "head")], [optimizer], seeded())
    redo.update(agent, optimizer, args, random_batch())
    assert all(torch.equal(a, b) for a, b in zip(target.values(), agent.target_network.state_dict().values()))
    again = [p.data_ptr() for p in agent.parameters()]
    assert pointers == again + [v.data_ptr() for state in optimizer.state.values() for v in state.values()]
    agent.update_target()
    for a, b in zip(agent.q_network.parameters(), agent.target_network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_reset_layers():
    agent, optimizer, args = trained_agent(method="reset", reset_period_gradient_steps=3)
    old = copy.deepcopy(agent.q_network.layers)
    assert redo.recycle_or_reset(agent.q_network, optimizer, None, 3, args, seeded(7), CPU) == {"events/reset": 1}
    for name, layer in agent.q_network.layers.items():
        if name in ("dense", "head"):
            assert (layer.weight != old[name].weight).all() and not layer.bias.any() and old[name].bias.any()
            for parameter in layer.parameters():
                state = optimizer.state[parameter]
                assert not state["exp_avg"].any() and not state["exp_avg_sq"].any() and state["step"] == 3
        else:
            assert torch.equal(layer.weight, old[name].weight)
            assert optimizer.state[layer.weight]["exp_avg_sq"].any()


def test_kept_step_count_makes_first_updates_too_large():
    """As in the official code; by (1 - b1^k) / sqrt(1 - b2^k) of a proper Adam, up to 6.6 times."""
    weight = nn.Parameter(torch.zeros(1))
    adam = torch.optim.Adam([weight], lr=1.0, eps=0.0)
    changes = []
    for i in range(10_100):  # long enough that both averages are exact
        if i == 10_000:
            redo.forget(adam, weight, torch.ones(1, dtype=torch.bool))
        before = weight.item()
        weight.grad = torch.ones(1)
        adam.step()
        changes.append(before - weight.item())
    official = changes[10_000:]
    assert [official[k - 1] for k in (1, 12, 100)] == pytest.approx([3.16, 6.57, 3.24], abs=0.02)
    assert max(official) == pytest.approx(6.57, abs=0.02)


# --- DQN --------------------------------------------------------------------------------------------------------------
def fixed_q(values):
    """A network that answers with the given q-values, whatever it sees."""
    table = nn.Parameter(torch.tensor(values))
    network = nn.Module()
    network.table, network.forward = table, lambda obs: (table * 1.0, {})
    return network


@pytest.mark.parametrize("loss, expected", [("huber", (0.5 * 0.3**2 + 2.3 - 0.5) / 2), ("mse", (0.3**2 + 2.3**2) / 2)])
def test_td_loss_by_hand(loss, expected):
    """q = 1.0 and 0.4; targets 0.5 + 0.9 max(0.2, 0.889) = 1.3, and -1.9."""
    agent = nn.Module()
    agent.q_network = fixed_q([[1.0, 0.5], [0.1, 0.4]])
    agent.target_network = fixed_q([[0.2, 0.8 / 0.9], [5.0, 7.0]])
    args = SimpleNamespace(loss=loss, precision="float32")
    optimizer = torch.optim.SGD(agent.q_network.parameters(), lr=0.1)
    obs, action = torch.zeros(2, 1), torch.tensor([0, 1])
    batch = (obs, action, torch.tensor([0.5, -1.9]), torch.tensor([0.9, 0.0]), obs)
    metrics = redo.update(agent, optimizer, args, batch)
    assert metrics["losses/td"].item() == pytest.approx(expected, rel=1e-5)
    assert metrics["losses/q_values"].item() == pytest.approx(0.7)
    assert metrics["losses/targets"].item() == pytest.approx((1.3 - 1.9) / 2, rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())
    assert agent.target_network.table.grad is None
    # The gradient of the mean: -0.3 and 1 (mse: -0.6 and 4.6), halved
    up, down = (0.15, -0.5) if loss == "huber" else (0.3, -2.3)
    learned = torch.tensor([[1.0 + 0.1 * up, 0.5], [0.1, 0.4 + 0.1 * down]])
    torch.testing.assert_close(agent.q_network.table.data, learned)


def test_epsilon_schedule():
    args = small_args()
    steps = (0, 20_000, 145_000, 270_000, 10_000_000)
    assert [redo.epsilon_at(t, args) for t in steps] == pytest.approx([1, 1, 0.505, 0.01, 0.01])
    cleanrl = small_args(protocol="cleanrl", total_timesteps=200_000)  # a tenth of the run, from its beginning
    assert [redo.epsilon_at(t, cleanrl) for t in (0, 10_000, 20_000, 199_999)] == pytest.approx([1, 0.505, 0.01, 0.01])
    later = small_args(learning_starts=1000)  # the decay begins after the warm-up
    assert redo.epsilon_at(1000, later) == 1 > redo.epsilon_at(1001, later)


def test_defaults_are_the_papers():
    args = redo.parse_args([])
    paper = dict(learning_rate=6.25e-5, adam_eps=1.5e-4, loss="huber", gamma=0.99, n_step=1, batch_size=32,
                 buffer_size=1_000_000, learning_starts=20_000, target_network_frequency=8000, eval_every=250_000,
                 eval_steps=125_000, eval_epsilon=0.001, sticky_actions=0.25, max_episode_steps=27_000, init="xavier",
                 terminal_on_life_loss=False, noop_max=0, fire_reset=False, padding="same", redo_tau=0.025,
                 redo_period_gradient_steps=1000, redo_batch_size=64, reset_period_gradient_steps=100_000,
                 exploration_steps=250_000, end_e=0.01, weight_decay=0.0, method="redo")  # fmt: skip
    assert {name: getattr(args, name) for name in paper} == paper
    assert redo.parse_args(["--replay-ratio", "1"]).redo_tau == 0.1
    assert redo.parse_args(["--replay-ratio", "1", "--redo-tau", "0"]).redo_tau == 0


def test_defaults_of_cleanrl():
    flags = ["--protocol", "cleanrl", "--total-timesteps", "200000"]
    theirs = dict(learning_rate=1e-4, adam_eps=1e-8, loss="mse", learning_starts=80_000, target_network_frequency=1000,
                  exploration_steps=20_000, sticky_actions=0, terminal_on_life_loss=True, noop_max=30, fire_reset=True,
                  padding="valid", init="torch", redo_tau=0.025, batch_size=32)  # fmt: skip
    args = redo.parse_args(flags)
    assert {name: getattr(args, name) for name in theirs} == theirs
    args = redo.parse_args([*flags, "--exploration-steps", "7", "--no-fire-reset", "--loss", "huber"])
    assert (args.exploration_steps, args.fire_reset, args.loss, args.noop_max) == (7, False, "huber", 30)


def test_weight_decay_is_added_to_the_gradient():
    agent, _, args = trained_agent(updates=0, weight_decay=0.1)
    optimizer = redo.make_optimizer(agent, args, CPU)
    head = agent.q_network.layers["head"].weight
    before = head.detach().clone()
    for parameter in agent.q_network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[head]["exp_avg"], 0.1 * 0.1 * before)


def test_bfloat16_is_close_and_its_gradients_flow():
    losses, grads = {}, {}
    for precision in ("float32", "bfloat16"):
        args = small_args(precision=precision, width=0.5)
        agent = redo.DQNAgent(6, args)
        optimizer = redo.make_optimizer(agent, args, CPU)
        losses[precision] = redo.update(agent, optimizer, args, random_batch(32))["losses/td"]
        grads[precision] = torch.cat([p.grad.flatten() for p in agent.q_network.parameters()])
        assert all(p.grad is not None and p.grad.any() for p in agent.q_network.parameters())
    assert losses["bfloat16"] != losses["float32"]
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.02, atol=0)
    assert torch.cosine_similarity(grads["bfloat16"], grads["float32"], dim=0) > 0.99


def test_bfloat16_sees_the_weights_of_the_last_step():
    args = small_args(precision="bfloat16")
    agent = redo.DQNAgent(6, args)
    optimizer = torch.optim.SGD(agent.q_network.parameters(), lr=0.5)
    losses = [redo.update(agent, optimizer, args, random_batch())["losses/td"].item() for _ in range(3)]
    assert len(set(losses)) == 3


def test_act():
    q_network, generator = fixed_q([[0.0, 3.0, 1.0]] * 4), seeded()
    obs = np.zeros((4, 4, 84, 84), np.uint8)
    assert redo.act(q_network, obs, 0.0, 3, generator, CPU).tolist() == [1, 1, 1, 1]
    actions = np.concatenate([redo.act(q_network, obs, 0.3, 3, generator, CPU) for _ in range(2000)])
    np.testing.assert_allclose(np.bincount(actions) / len(actions), [0.1, 0.8, 0.1], atol=0.01)
    one, other = seeded(), seeded()  # the stream goes on alike, whatever is chosen
    redo.act(q_network, obs, 0.0, 3, one, CPU), redo.act(q_network, obs, 1.0, 3, other, CPU)
    assert torch.equal(one.get_state(), other.get_state())


# --- replay -----------------------------------------------------------------------------------------------------------
def play(replay, episodes, rng):
    """Fills the replay with random episodes -> all of them, frame by frame: (frames, actions, rewards, terminated)."""
    history, number = [], 0
    for length, ends in episodes:
        frames = [np.full((2, 3), (number + i) % 256, np.uint8) for i in range(length + 1)]
        number += length + 1
        actions, rewards = (
            rng.integers(6, size=length).tolist(),
            rng.standard_normal(length).astype(np.float32).tolist(),
        )
        terminated = [ends and i == length - 1 for i in range(length)]
        replay.add_first(frames[0])
        for i in range(length):
            replay.add(actions[i], rewards[i], terminated[i], frames[i + 1])
        history.append((frames, actions, rewards, terminated))
    return history


def expected_transitions(history, capacity, n_step, gamma, open_end):
    """Brute force: everything that can still be sampled, as tuples, oldest first."""
    total = sum(len(frames) for frames, *_ in history)
    oldest = max(0, total - capacity)
    result, position = [], 0
    for k, (frames, actions, rewards, terminated) in enumerate(history):

        def stack(t, frames=frames):
            return [frames[i][0, 0] if i >= 0 else 0 for i in range(t - 3, t + 1)]

        for t in range(len(actions)):
            complete = t + n_step <= len(actions) or not (open_end and k == len(history) - 1)
            in_ring = position + t >= (oldest + 3 if oldest else 0)
            if in_ring and complete:
                total_reward, discount, now = 0.0, 1.0, t
                for _ in range(n_step):
                    if now == len(actions):
                        break
                    total_reward += discount * rewards[now]
                    discount *= gamma * (not terminated[now])
                    now += 1
                    if discount == 0:
                        break
                result.append((stack(t), actions[t], total_reward, discount, stack(now)))
        position += len(frames)
    return result


@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize("capacity", [40, 1000], ids=["wrapped", "growing"])
@pytest.mark.parametrize("seed", range(4))
def test_replay_against_brute_force(n_step, capacity, seed):
    rng = np.random.default_rng(seed)
    replay = redo.FrameReplay(capacity, CPU, n_step, 0.9, frame_shape=(2, 3))
    episodes = [(int(rng.integers(1, 12)), bool(rng.integers(2))) for _ in range(20)]
    episodes[-1] = ((n_step + 2, 0, 1, 8)[seed], False)  # still running, or has just begun
    history = play(replay, episodes, rng)
    expected = expected_transitions(history, capacity, n_step, 0.9, open_end=True)
    assert len(replay) == len(expected)
    count = 60 * len(expected)
    obs, action, reward, discount, next_obs = replay.sample(count, torch.Generator().manual_seed(seed))
    drawn = {}
    for i in range(count):
        key = (*obs[i, :, 0, 0].tolist(), action[i].item(), round(reward[i].item(), 3), round(discount[i].item(), 4),
               *next_obs[i, :, 0, 0].tolist())  # fmt: skip
        drawn[key] = drawn.get(key, 0) + 1
    wanted = {}
    for stack, a, r, d, next_stack in expected:
        if d:  # after a termination nothing is bootstrapped, so what comes next does not matter
            key = (*map(int, stack), a, round(float(r), 3), round(d, 4), *map(int, next_stack))
            wanted[key] = wanted.get(key, 0) + 1
    found = {key: n for key, n in drawn.items() if key[6] > 0}
    assert {(*k[:5],) for k in found} == {(*k[:5],) for k in wanted}
    for key in found:  # rounding may differ in the last digit
        close = [k for k in wanted if np.allclose(k, key, atol=2e-3)]
        assert close, key
        assert 20 * wanted[close[0]] < found[key] < 130 * wanted[close[0]]  # uniform
    terminal = {(*map(int, s), a): r for s, a, r, d, _ in expected if not d}
    for key in drawn:
        if key[6] == 0:
            assert key[5] == pytest.approx(terminal[key[:5]], abs=2e-3)
    assert sum(1 for key in drawn if key[6] == 0) == len(terminal)


def test_replay_counts_gamma_and_bootstraps_a_truncation():
    replay = redo.FrameReplay(100, CPU, n_step=3, gamma=0.5, frame_shape=(1, 1))
    frame = [np.full((1, 1), i, np.uint8) for i in range(10)]
    replay.add_first(frame[1])
    for i, reward in enumerate((1, 2, 4)):  # truncated after three steps
        replay.add(0, reward, False, frame[i + 2])
    replay.add_first(frame[9])
    batch = replay.sample(300, torch.Generator())
    seen = {(o[-1].item(), r.item(), d.item(), *x.flatten().tolist()) for o, _, r, d, x in zip(*batch, strict=True)}
    assert seen == {
        (1, 1 + 0.5 * 2 + 0.25 * 4, 0.125, 1, 2, 3, 4), (2, 2 + 0.5 * 4, 0.25, 1, 2, 3, 4), (3, 4, 0.5, 1, 2, 3, 4)
    }  # fmt: skip


def test_a_lost_life_ends_the_return_but_not_the_stack():
    replay = redo.FrameReplay(100, CPU, n_step=2, gamma=0.5, frame_shape=(1, 1))
    replay.add_first(np.full((1, 1), 1, np.uint8))
    for i, (reward, terminated) in enumerate(((1, False), (2, True), (4, False), (8, False))):
        replay.add(0, reward, terminated, np.full((1, 1), i + 2, np.uint8))
    batch = replay.sample(200, torch.Generator())
    seen = {(*o.flatten().tolist(), r.item(), d.item()) for o, _, r, d, _ in zip(*batch, strict=True)}
    assert seen == {(0, 0, 0, 1, 2, 0), (0, 0, 1, 2, 2, 0), (0, 1, 2, 3, 8, 0.25)}


def test_replay_state_is_small_whole_and_fits_a_larger_ring(tmp_path):
    rng = np.random.default_rng(0)
    small, large = (redo.FrameReplay(n, CPU, 3, 0.9, frame_shape=(2, 3)) for n in (5_000, 100_000))
    play(small, [(4, True), (9, False)], rng)
    redo.save_file(tmp_path / "replay.pt", small.state_dict())
    assert (tmp_path / "replay.pt").stat().st_size < 10_000
    large.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    for a, b in zip(small.sample(50, torch.Generator()), large.sample(50, torch.Generator()), strict=True):
        assert torch.equal(a, b)
    frame = np.ones((2, 3), np.uint8)
    small.add(1, 1.0, False, frame), large.add(1, 1.0, False, frame)
    assert len(small) == len(large) == 4 + 10 - 2 and small.oldest_start == large.oldest_start == 0


def test_a_wrapped_ring_fits_one_of_its_size_alone(tmp_path):
    rng = np.random.default_rng(0)
    old, new, larger = (redo.FrameReplay(n, CPU, 2, 0.9, frame_shape=(2, 3)) for n in (40, 40, 41))
    play(old, [(11, True), (9, False), (16, True), (13, False)], rng)
    redo.save_file(tmp_path / "replay.pt", old.state_dict())
    state = torch.load(tmp_path / "replay.pt", weights_only=True)
    with pytest.raises(ValueError, match="wrapped"):
        larger.load_state_dict(state)
    new.load_state_dict(state)
    for replay in (old, new):
        play(replay, [(5, False)], np.random.default_rng(1))
    assert len(old) == len(new) and old.oldest_start == new.oldest_start > 0
    for a, b in zip(old.sample(50, torch.Generator()), new.sample(50, torch.Generator()), strict=True):
        assert torch.equal(a, b)


# --- games ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("game", ["DemonAttack", "Breakout"])
def test_observations_are_those_of_gymnasiums_preprocessing(game):
    """Pixel by pixel: the maximum of two grey frames, resized, four of them stacked on zeros."""
    args = small_args(env_id=f"ALE/{game}-v5", sticky_actions=0.0)
    envs = redo.make_envs(args, 1)
    plain = gymnasium.make(args.env_id, frameskip=1, repeat_action_probability=0.0)
    plain = FrameStackObservation(AtariPreprocessing(plain, noop_max=0), 4, padding_type="zero")
    obs, _ = redo.reset_envs(envs, args, seeded())
    expected, _ = plain.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(200):
        np.testing.assert_array_equal(obs[0], expected)
        action = int(rng.integers(envs.single_action_space.n))
        obs, reward, terminated, truncated, _ = envs.step(np.array([action]))
        expected, plain_reward, *ended, _ = plain.step(action)
        assert (reward[0], bool(terminated[0]), bool(truncated[0])) == (plain_reward, *ended)
        if any(ended):
            break


def test_an_episode_depends_on_its_seed_alone():
    args = small_args(protocol="cleanrl", sticky_actions=0.25)

    def episode(envs, seed, steps=60):
        obs, _ = redo.reset_envs(envs, args, seeded(seed))
        return [obs] + [envs.step(np.array([i % 6]))[0] for i in range(steps)]

    envs, fresh = redo.make_envs(args, 1), redo.make_envs(args, 1)
    first, again, other = episode(envs, 3), episode(envs, 3, 20), episode(envs, 4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=False))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(other, episode(fresh, 4), strict=True))


def test_time_limit_truncates():
    args = small_args(max_episode_steps=30)
    envs = redo.make_envs(args, 1)
    redo.reset_envs(envs, args, seeded())
    flags = [tuple(bool(x[0]) for x in envs.step(np.array([0]))[2:4]) for _ in range(30)]
    assert flags == [(False, False)] * 29 + [(False, True)]


@pytest.mark.parametrize("game, button", [("Breakout", 1), ("MsPacman", 0)])
def test_how_episodes_begin_and_what_follows_a_lost_life(game, button):
    """CleanRL plays 1 to noop_max no-ops; FIRE, where the game has it, comes on top."""
    options, generator = dict(env_id=f"ALE/{game}-v5", protocol="cleanrl"), seeded()
    for noop_max, expected in ((0, {0}), (2, {1, 2})):
        args = small_args(**options, noop_max=noop_max)
        envs = redo.make_envs(args, 2)
        frames = [redo.reset_envs(envs, args, generator)[1]["episode_frame_number"] for _ in range(noop_max + 1)]
        assert set(np.ravel(frames) - button) == expected
    before = redo.reset_envs(envs, args, generator)[1]["episode_frame_number"]
    after = [redo.reset_envs(envs, args, generator, np.arange(2) < 1)[1]["episode_frame_number"] for _ in range(2)]
    assert (np.array(after)[:, 1:] == before[1:]).all()  # these games were left alone
    assert redo.fire_action(envs) == button


class FakeGames:
    """`num_envs` games: the episodes of game i last i + 2 steps (or `longer`), `reward` each; a life is lost in the
    second."""

    def __init__(self, num_envs, actions=3, fire=True, truncate=False, longer=0, reward=10.0):
        self.reward = reward
        self.num_envs, self.truncate, self.single_action_space = num_envs, truncate, gymnasium.spaces.Discrete(actions)
        self.length = np.arange(num_envs) + 2 + longer
        buttons = [ale_py.Action.NOOP, ale_py.Action.FIRE, ale_py.Action.UP]
        self.ale = SimpleNamespace(get_action_set=lambda: buttons if fire else buttons[::2])
        self.t, self.actions, self.seeds = np.zeros(num_envs, int), [], []

    def observe(self):
        obs = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        obs[:, -1] = (self.t[:, None, None] + np.outer(np.arange(84), 11 * np.arange(84))) % 256
        return obs, {"lives": np.where(self.t >= 2, 1, 2), "episode_frame_number": 4 * self.t + 2}

    def reset(self, seed, options):
        self.t[options["reset_mask"]] = 0
        self.seeds += seed.tolist()
        return self.observe()

    def send(self, action):
        self.actions.append(action.tolist())

    def recv(self):
        self.t += 1
        over = self.t >= self.length
        obs, info = self.observe()
        ended = (~over, over) if self.truncate else (over, ~over)
        return obs, np.full(self.num_envs, self.reward), over & ended[0], over & ended[1], info

    def step(self, action):
        self.send(action)
        return self.recv()


def evaluate(q_network, envs, args, number=7):
    return redo.evaluate(q_network, envs, args, number, CPU, RUN)


def test_evaluation_finishes_every_episode_it_began():
    args = small_args(eval_steps=20, eval_epsilon=0.0, protocol="cleanrl")
    envs, q_network = FakeGames(2), fixed_q([[0.0, 0.0, 1.0]] * 2)
    metrics = evaluate(q_network, envs, args)
    # 10 steps each: five episodes of 2 steps, and four of 3 steps, the last one finished at step 12
    assert metrics == {"eval/episodic_return": pytest.approx((5 * 20 + 4 * 30) / 9), "eval/episodes": 9,
                       "eval/episodic_length": pytest.approx((5 * 2 + 4 * 3) / 9)}  # fmt: skip
    assert envs.actions[:4] == [[2, 2], [2, 2], [2, 1], [2, 2]]  # the second game presses FIRE after its lost life
    envs = FakeGames(2, fire=False)  # without FIRE: a no-op
    evaluate(q_network, envs, args)
    assert envs.actions[:4] == [[2, 2], [2, 2], [2, 0], [2, 2]]
    again, other = FakeGames(2), FakeGames(2)
    evaluate(q_network, again, args), evaluate(q_network, other, args, number=8)
    assert again.seeds == envs.seeds != other.seeds and len(set(again.seeds)) == len(again.seeds)


def test_evaluation_leaves_torchs_random_numbers_alone(monkeypatch):
    args = small_args(eval_steps=40, max_episode_steps=30)
    agent = redo.DQNAgent(6, args)
    before, epsilons, act = torch.get_rng_state(), set(), redo.act
    monkeypatch.setattr(redo, "act", lambda *given: epsilons.add(given[2]) or act(*given))
    metrics = evaluate(agent.q_network, redo.make_envs(args, 2), args)
    assert torch.equal(before, torch.get_rng_state()) and epsilons == {args.eval_epsilon} == {0.001}
    assert metrics["eval/episodes"] == 2 and metrics["eval/episodic_length"] == 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cudagraphs_equal_eager_across_a_recycle():
    """Three updates as they are, the fourth captured, then recycling and a copy to the target."""
    device, results = torch.device("cuda"), {}
    for captured in (False, True):
        args = small_args(cudagraphs=captured, device="cuda")
        agent = redo.DQNAgent(6, args).to(device)
        optimizer = redo.make_optimizer(agent, args, device)
        learn = partial(redo.update, agent, optimizer, args)
        learn = redo.capture(learn, [optimizer]) if captured else learn
        losses = []
        for i in range(8):
            losses.append(learn([x.to(device) for x in random_batch(seed=i)])["losses/td"].item())
            if i == 4:
                assert sum(mask.sum() for mask in recycle(agent.q_network, optimizer, random_obs().to(device), 0.1))
                agent.update_target()
        results[captured] = [torch.tensor(losses), *(p.detach().clone() for p in agent.parameters())]
    for a, b in zip(results[False], results[True], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_nothing_is_recycled_where_any_layer_is_not_finite():
    """Not even in the layers below: that could hide the NaN."""
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        network[0].bias[0] = -100  # silent
        network[2].weight[:, 0] = torch.nan
    before = copy.deepcopy(network.state_dict())
    x = torch.rand(8, 3)
    layers = [(network[0], [network[2]]), (network[2], [network[4]])]
    optimizer, generator = torch.optim.Adam(network.parameters()), torch.Generator().manual_seed(0)
    masks = redo.recycle(layers, [network[:2](x), network[:4](x)], optimizer, 0.1, generator)
    assert not torch.cat(masks).any()
    for name, value in network.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
