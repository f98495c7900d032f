"""redo_dqn_atari.py: every formula against values worked out by hand, the replay against a brute-force oracle."""

import copy
from types import SimpleNamespace

import ale_py  # noqa: F401  registers the games
import gymnasium
import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

import redo_dqn_atari as redo

NETWORKS = [dict(padding="same"), dict(padding="valid"), dict(network="resnet")]
CPU = torch.device("cpu")


def small_args(**changes):
    return redo.resolve_args(redo.Args(**{"width": 0.125, "device": "cpu", **changes}))


def random_obs(n=8, seed=0):
    return torch.randint(0, 256, (n, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_batch(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    action, reward = torch.randint(0, 6, (n,), generator=g), torch.randn(n, generator=g)
    return random_obs(n, seed), action, reward, torch.full((n,), 0.99), random_obs(n, seed + 1)


def trained_agent(updates=3, **changes):
    """An agent whose optimizer has a state."""
    args = small_args(**changes)
    agent = redo.DQNAgent(6, args)
    optimizer = redo.make_optimizer(agent, args, CPU)
    for i in range(updates):
        redo.td_update(agent, [optimizer], random_batch(seed=i), args)
    return agent, optimizer, args


def kill_neurons(q_network, count=2):
    """Makes the first neurons of every layer that can be recycled silent."""
    for name in q_network.reader:
        q_network.layers[name].bias.data[:count] = -1e6


# --- dormancy ---------------------------------------------------------------------------------------------------------
def test_dormant_score_by_hand():
    activation = torch.tensor([[0.0, 0.1, -1.0, 3.0], [0.0, -0.1, 1.0, 1.0]])  # mean |h|: 0, 0.1, 1, 2
    score = redo.dormant_score(activation)
    torch.testing.assert_close(score, torch.tensor([0.0, 0.12903, 1.29032, 2.58065]), atol=1e-5, rtol=0)
    assert score.sum().item() == pytest.approx(4)  # H, not 1 as the paper's text says
    assert redo.dormant_mask(activation, 0.1).tolist() == [True, False, False, False]
    assert redo.dormant_mask(activation, 0.13).tolist() == [True, True, False, False]


def test_dormant_score_of_feature_maps():
    maps = torch.zeros(2, 3, 4, 5)
    maps[0, 1, 2, 3], maps[1, 2] = 6.0, -1.5  # means over batch and positions: 0, 6/40, 1.5/2
    score = redo.dormant_score(maps)
    torch.testing.assert_close(score, torch.tensor([0.0, 0.15, 0.75]) / 0.3)


def test_a_silent_layer_is_all_dormant_and_tau_0_is_exact():
    assert redo.dormant_mask(torch.zeros(4, 3), 0.0).all()
    assert not redo.dormant_score(torch.zeros(4, 3, 2, 2)).isnan().any()
    barely = torch.tensor([[5e-9, 1.0]])
    assert redo.dormant_mask(barely, 0.0).tolist() == [False, False]
    assert redo.dormant_mask(torch.tensor([[1.0, 1.0, 4.0]]), 0.5).tolist() == [True, True, False]  # <=, not <


def test_overlap():
    a, b = torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([0, 1, 0, 1, 0]).bool()
    assert redo.overlap(a, b).item() == 0.5 and redo.overlap(a, a).item() == 1
    assert redo.overlap(a, torch.zeros(5).bool()).isnan()


def test_feature_rank():
    features = torch.diag(torch.tensor([50.0, 48.5, 1.0, 0.5]))  # shares 0.5, 0.985, 0.995, 1
    assert redo.feature_rank(features).item() == 3
    assert redo.feature_rank(features, delta=0.02).item() == 2
    assert redo.feature_rank(torch.ones(9, 4)).item() == 1


def test_inspect_counts_and_compares():
    agent, _, args = trained_agent(dormant_batch_size=4, rank_batch_size=16)
    obs, history = random_obs(16), {}
    metrics, scores = redo.inspect(agent.q_network, obs, history, args)
    masks = {k: redo.dormant_mask(h[:4], 0) for k, h in agent.q_network(obs)[1].items()}
    for name, mask in masks.items():
        assert metrics[f"plasticity/dormant_ratio_tau0/{name}"] == mask.float().mean()
    pooled = torch.cat(list(masks.values()))
    assert metrics["plasticity/dormant_ratio_tau0/all"] == pooled.float().mean() > 0
    assert metrics["plasticity/dormant_ratio_tau0.1/all"] >= metrics["plasticity/dormant_ratio_tau0.025/all"]
    assert metrics["plasticity/weight_norm/head"] == agent.q_network.layers["head"].weight.norm()
    assert {name: len(score) for name, score in scores.items()} == dict(conv1=4, conv2=8, conv3=8, dense=64, all=84)
    assert not any(f"plasticity/overlap_{kind}/all" in metrics for kind in ("previous", "anchor", "union"))
    other = torch.cat([redo.dormant_mask(h[4:8], 0) for h in agent.q_network(obs)[1].values()])
    assert metrics["plasticity/overlap_noise_floor/all"] == redo.overlap(pooled, other)

    with torch.no_grad():  # now every other neuron of the dense layer dies, and one comes to life
        first = masks["dense"]
        agent.q_network.layers["dense"].bias[::2] = -1e6
        revived = int(torch.nonzero(first[1::2])[0]) * 2 + 1
        agent.q_network.layers["dense"].bias[revived] = 1e6
    metrics, _ = redo.inspect(agent.q_network, obs, history, args)
    second = redo.dormant_mask(agent.q_network(obs[:4])[1]["dense"], 0)
    for kind in ("previous", "anchor", "union"):
        assert metrics[f"plasticity/overlap_{kind}/dense"] == redo.overlap(second, first) < 1
    assert torch.equal(history["union"]["dense"], first | second) and torch.equal(history["anchor"]["dense"], first)
    metrics, _ = redo.inspect(agent.q_network, obs, history, args)
    assert metrics["plasticity/overlap_previous/dense"] == metrics["plasticity/overlap_union/dense"] == 1


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


def test_width_activation_and_layer_norm():
    wide = redo.DQNAgent(6, small_args(width=1.3)).q_network
    assert [len(wide.layers[k].bias) for k in ("conv1", "conv2", "dense")] == [42, 84, 666]
    leaky = redo.DQNAgent(6, small_args(activation="leaky_relu")).q_network
    assert leaky(random_obs())[1]["dense"].min() < 0
    for network in ("nature", "resnet"):
        normed = redo.DQNAgent(6, small_args(network=network, layer_norm=True)).q_network
        h = normed.norms["dense"](torch.randn(5, 64) * 7 + 3)
        torch.testing.assert_close(h.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
        assert set(normed.norms) == set(normed.reader)


@pytest.mark.parametrize("kernel, stride, size, expected", [
    (8, 4, 84, (2, 2)), (4, 2, 21, (1, 2)), (3, 1, 11, (1, 1)), (3, 2, 84, (0, 1)), (3, 2, 21, (1, 1)),
])  # fmt: skip
def test_same_padding(kernel, stride, size, expected):
    assert redo.same_padding(size, kernel, stride) == expected


def test_initial_distributions():
    g, weight = torch.Generator().manual_seed(0), torch.empty(256, 64, 3, 3)
    fan_in, fan_out = 64 * 9, 256 * 9
    for kind, bound, std in (
        ("xavier", (6 / (fan_in + fan_out)) ** 0.5, (2 / (fan_in + fan_out)) ** 0.5),
        ("torch", fan_in**-0.5, (3 * fan_in) ** -0.5), ("lecun", 2 * fan_in**-0.5 / 0.8796, fan_in**-0.5),
    ):  # fmt: skip
        redo.draw_weights(weight, kind, g)
        assert weight.std().item() == pytest.approx(std, rel=0.01)
        assert 0.98 * bound < weight.abs().max().item() <= bound * 1.0001
    resnet = redo.DQNAgent(6, small_args(network="resnet", width=1.0)).q_network
    inner = resnet.layers["stack2_block1_conv1"].weight
    assert inner.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.02)
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
            masks = [redo.dormant_mask(h, 0.0) for h in q_network(obs)[1].values()]
            ratios.append(torch.cat(masks).float().mean())
        assert 0.06 < np.mean(ratios) < 0.2


# --- recycling --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", NETWORKS, ids=str)
@pytest.mark.parametrize("adam", ["none", "moments", "moments+tensor-step", "per-element"])
def test_at_tau_0_the_output_does_not_change(options, adam):
    agent, optimizer, args = trained_agent(redo_tau=0.0, redo_adam=adam, **options)
    kill_neurons(agent.q_network)
    obs = random_obs(16, seed=5)
    before, activations = agent.q_network(obs)
    metrics = redo.recycle(agent.q_network, optimizer, obs, args, torch.Generator())
    assert torch.equal(agent.q_network(obs)[0], before) and metrics["plasticity/redo_q_change"] == 0
    counts = {k.rpartition("/")[2]: int(v) for k, v in metrics.items() if "recycled" in k}
    assert min(counts.values()) >= 2 and counts.pop("all") == sum(counts.values())
    for name in agent.q_network.reader:  # some are alive again
        dead, activation = redo.dormant_mask(activations[name], 0.0), agent.q_network(obs)[1][name]
        assert (redo.dormant_score(activation)[dead] > 0).any(), name


def test_the_official_mask_hits_other_weights():
    agent, optimizer, args = trained_agent(redo_tau=0.0, redo_compat_flatten=True)
    kill_neurons(agent.q_network)
    metrics = redo.recycle(agent.q_network, optimizer, random_obs(), args, torch.Generator())
    assert metrics["plasticity/redo_q_change"] > 0


class Toy(nn.Module):
    """A convolution with 2 x 3 positions, then two dense layers: height and width differ."""

    parameters_of = redo.QNetwork.parameters_of

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict(dict(conv=nn.Conv2d(1, 4, 2), dense=nn.Linear(4 * 2 * 3, 5), head=nn.Linear(5, 2)))
        self.reader, self.norms = {"conv": "dense", "dense": "head"}, {}
        self.inits = dict.fromkeys(self.layers, "xavier")

    def forward(self, x):
        conv = self.layers["conv"](x).relu()
        dense = self.layers["dense"](conv.flatten(1)).relu()
        return self.layers["head"](dense), dict(conv=conv, dense=dense)


def recycled_toy(adam="moments", **changes):
    torch.manual_seed(3)
    toy = Toy()
    for layer in toy.layers.values():
        nn.init.normal_(layer.bias)
    kind = redo.PerElementAdam if adam == "per-element" else torch.optim.Adam
    optimizer = kind(toy.parameters(), lr=1e-3)
    x = torch.rand(6, 1, 3, 4)
    with torch.no_grad():
        toy.layers["conv"].bias[1] = toy.layers["dense"].bias[2] = -1e6
    for _ in range(3):
        optimizer.zero_grad()
        toy(x)[0].square().sum().backward()
        optimizer.step()
    for state in optimizer.state.values():  # nothing is 0 by chance
        for value in state.values():
            value.add_(1) if value.dim() else None
    masks = {k: redo.dormant_mask(h, 0.0) for k, h in toy(x)[1].items()}
    before, adam_before = copy.deepcopy(toy), copy.deepcopy([optimizer.state[p] for p in toy.parameters()])
    args = SimpleNamespace(redo_tau=0.0, redo_adam=adam, redo_compat_flatten=False, **changes)
    redo.recycle(toy, optimizer, x, args, torch.Generator().manual_seed(0))
    return toy, before, masks, optimizer, adam_before


def touched(toy, masks):
    """Per parameter of `Toy`: the elements that recycling may change."""
    conv, dense = masks["conv"], masks["dense"]
    assert conv[1] and dense[2] and not conv.all() and not dense.all()
    columns = torch.zeros(4, 2, 3, dtype=torch.bool)
    columns[conv] = True
    return {
        "layers.conv.weight": conv.view(4, 1, 1, 1).expand(4, 1, 2, 2), "layers.conv.bias": conv,
        "layers.dense.weight": dense[:, None] | columns.flatten(), "layers.dense.bias": dense,
        "layers.head.weight": dense.expand(2, 5), "layers.head.bias": torch.zeros(2, dtype=torch.bool),
    }  # fmt: skip


def test_only_masked_weights_change_and_as_they_should():
    toy, before, masks, _, _ = recycled_toy()
    old, new = dict(before.named_parameters()), dict(toy.named_parameters())
    for name, mask in touched(toy, masks).items():
        assert torch.equal(new[name][~mask], old[name][~mask]), name
        assert not mask.any() or (new[name][mask] != old[name][mask]).any(), name
    conv, dense = masks["conv"], masks["dense"]
    assert not new["layers.conv.bias"][conv].any() and not new["layers.dense.bias"][dense].any()
    assert not new["layers.head.weight"][:, dense].any()  # outgoing: 0
    columns = touched(toy, masks)["layers.dense.weight"][(~dense).nonzero()[0, 0]]
    assert not new["layers.dense.weight"][:, columns].any()  # also those between two recycled neurons
    incoming = new["layers.dense.weight"][dense][:, ~columns]
    assert incoming.all() and incoming.abs().max() <= (6 / (24 + 5)) ** 0.5
    kernel = new["layers.conv.weight"][conv]
    assert kernel.all() and kernel.abs().max() <= (6 / (4 + 16)) ** 0.5  # fans of the whole kernel


def test_a_feature_maps_columns_are_the_right_ones():
    toy, before, masks, _, _ = recycled_toy()
    x = torch.rand(2, 1, 3, 4)
    channel = int(masks["conv"].nonzero()[0, 0])
    with torch.no_grad():
        maps = toy(x)[1]["conv"]
        changed = maps.clone()
        changed[:, channel] += 10
        dense = toy.layers["dense"]
        assert torch.equal(dense(maps.flatten(1)), dense(changed.flatten(1)))
        assert not torch.equal(before.layers["dense"](maps.flatten(1)), before.layers["dense"](changed.flatten(1)))


@pytest.mark.parametrize("adam", ["none", "moments", "moments+tensor-step", "per-element"])
def test_what_adam_forgets(adam):
    toy, _, masks, optimizer, adam_before = recycled_toy(adam)
    for (name, mask), parameter, old in zip(touched(toy, masks).items(), toy.parameters(), adam_before, strict=True):
        new, weights = optimizer.state[parameter], name.endswith("weight")
        forgotten = mask & (adam != "none") & (weights or adam in ("moments+tensor-step", "per-element"))
        for key, value in new.items():
            if key == "step":
                kept = adam != "moments+tensor-step" or name == "layers.head.bias"
                assert value.item() == (old[key].item() if kept else 0)
            else:
                assert not value[forgotten].any(), (name, key)
                assert torch.equal(value[~forgotten], old[key][~forgotten]) and old[key].all(), (name, key)


@pytest.mark.parametrize("options", [*NETWORKS, dict(layer_norm=True)], ids=str)
@pytest.mark.parametrize("adam", ["moments", "moments+tensor-step", "per-element"])
def test_everything_is_edited_in_place_and_the_target_is_left_alone(options, adam):
    agent, optimizer, args = trained_agent(redo_tau=0.5, redo_adam=adam, **options)
    pointers = [p.data_ptr() for p in agent.parameters()]
    pointers += [v.data_ptr() for state in optimizer.state.values() for v in state.values()]
    target = copy.deepcopy(agent.target_network.state_dict())
    redo.recycle(agent.q_network, optimizer, random_obs(), args, torch.Generator())
    redo.reset_layers(agent.q_network, optimizer, ("dense", "head"), torch.Generator())
    redo.td_update(agent, [optimizer], random_batch(), args)
    assert all(torch.equal(a, b) for a, b in zip(target.values(), agent.target_network.state_dict().values()))
    again = [p.data_ptr() for p in agent.parameters()]
    assert pointers == again + [v.data_ptr() for state in optimizer.state.values() for v in state.values()]
    agent.update_target()
    for a, b in zip(agent.q_network.parameters(), agent.target_network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layer_norms_of_recycled_neurons_start_anew():
    agent, optimizer, args = trained_agent(layer_norm=True, redo_tau=0.0)
    norm = agent.q_network.norms["dense"]
    norm.weight.data[:3], norm.bias.data[:3] = 2.0, -1e6
    redo.recycle(agent.q_network, optimizer, random_obs(), args, torch.Generator())
    assert (norm.weight[:3] == 1).all() and (norm.bias[:3] == 0).all() and (norm.weight[3:] != 1).any()


def test_reset_layers():
    agent, optimizer, _ = trained_agent()
    old = copy.deepcopy(agent.q_network.layers)
    redo.reset_layers(agent.q_network, optimizer, ("dense", "head"), torch.Generator().manual_seed(7))
    for name, layer in agent.q_network.layers.items():
        if name in ("dense", "head"):
            assert (layer.weight != old[name].weight).all() and not layer.bias.any() and old[name].bias.any()
            for parameter in layer.parameters():
                state = optimizer.state[parameter]
                assert not state["exp_avg"].any() and not state["exp_avg_sq"].any() and state["step"] == 3
        else:
            assert torch.equal(layer.weight, old[name].weight)
            assert optimizer.state[layer.weight]["exp_avg_sq"].any()


# --- Adam -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_per_element_adam_is_adam_until_something_is_forgotten(weight_decay):
    torch.manual_seed(0)
    start, options = torch.randn(5, 3), dict(lr=0.01, eps=1e-4, weight_decay=weight_decay)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a, b = redo.PerElementAdam([ours], **options), torch.optim.Adam([theirs], **options)
    for _ in range(50):
        ours.grad = torch.randn(5, 3)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)

    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[2] = True
    kept = copy.deepcopy((ours, a.state_dict()))
    redo.forget(a, ours, mask)
    fresh = nn.Parameter(ours.detach().clone())
    other = nn.Parameter(kept[0].detach().clone())
    c, d = torch.optim.Adam([fresh], **options), redo.PerElementAdam([other], **options)
    d.load_state_dict(kept[1])
    for _ in range(20):
        ours.grad = torch.randn(5, 3)
        fresh.grad, other.grad = ours.grad.clone(), ours.grad.clone()
        a.step(), c.step(), d.step()
    torch.testing.assert_close(ours[2], fresh[2], atol=1e-6, rtol=1e-5)  # as a fresh Adam
    assert torch.equal(ours[~mask], other[~mask])  # as if nothing had happened


def test_kept_step_count_makes_first_updates_too_large():
    """Section 2.2 of the official code's arithmetic: (1 - b1^k) / sqrt(1 - b2^k) of a proper Adam, and the other way
    round for weights whose moments are kept while the step count is reset."""

    def changes(forget_moments, forget_step, updates):
        weight = nn.Parameter(torch.zeros(1))
        adam = torch.optim.Adam([weight], lr=1.0, eps=0.0)
        for _ in range(20_000):  # long enough that both averages are exact
            weight.grad = torch.ones(1)
            adam.step()
        if forget_moments:
            redo.forget(adam, weight, torch.ones(1, dtype=torch.bool))
        if forget_step:
            layers = {"head": SimpleNamespace(bias=None)}
            redo.reset_adam_step(SimpleNamespace(layers=layers), adam)
        result = []
        for _ in range(updates):
            before = weight.item()
            weight.grad = torch.ones(1)
            adam.step()
            result.append(before - weight.item())
        return result

    official = changes(True, False, 100)
    assert [official[k - 1] for k in (1, 12, 100)] == pytest.approx([3.16, 6.57, 3.24], abs=0.02)
    step_only = changes(False, True, 1000)
    expected = [0.316, 0.153, 0.309, 0.627, 0.795]
    assert [step_only[k - 1] for k in (1, 10, 100, 500, 1000)] == pytest.approx(expected, abs=0.002)
    assert np.mean(step_only) == pytest.approx(0.58, abs=0.01)
    assert np.mean(step_only[:250]) == pytest.approx(0.33, abs=0.01)


# --- DQN --------------------------------------------------------------------------------------------------------------
def fixed_q(values):
    """A network that answers with the given q-values, whatever it sees."""
    table = nn.Parameter(torch.tensor(values))
    network = nn.Module()
    network.table, network.forward = table, lambda obs: (table * 1.0, {})
    return network


@pytest.mark.parametrize("loss, double, expected", [
    ("huber", False, (0.5 * 0.3**2 + 2.3 - 0.5) / 2), ("mse", False, (0.3**2 + 2.3**2) / 2),
    ("huber", True, (0.5 * 0.2**2 + 2.3 - 0.5) / 2),
])  # fmt: skip
def test_td_loss_by_hand(loss, double, expected):
    """q = 1.0 and 0.4; targets 0.5 + 0.9 max(0.2, 0.889) = 1.3 (double: action 0, 0.5 + 0.9 x 1/3 = 0.8), and -1.9."""
    agent = nn.Module()
    agent.q_network = fixed_q([[1.0, 0.5], [0.1, 0.4]])
    agent.target_network = fixed_q([[1 / 3, 0.8 / 0.9], [5.0, 7.0]])
    args = SimpleNamespace(loss=loss, double=double, amp=False)
    optimizer = torch.optim.SGD(agent.q_network.parameters(), lr=0.1)
    batch = (torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([0.5, -1.9]), torch.tensor([0.9, 0.0]), None)
    metrics = redo.td_update(agent, [optimizer], batch, args)
    assert metrics["losses/td"].item() == pytest.approx(expected, rel=1e-5)
    assert metrics["losses/q_values"].item() == pytest.approx(0.7)
    assert metrics["losses/targets"].item() == pytest.approx(((0.8 if double else 1.3) - 1.9) / 2, rel=1e-5)
    assert agent.target_network.table.grad is None


def test_epsilon_schedule():
    args = small_args()
    steps = (0, 20_000, 145_000, 270_000, 10_000_000)
    assert [redo.epsilon_at(t, args) for t in steps] == pytest.approx([1, 1, 0.505, 0.01, 0.01])
    cleanrl = small_args(protocol="cleanrl")
    assert [redo.epsilon_at(t, cleanrl) for t in (0, 500_000, 1_000_000)] == pytest.approx([1, 0.505, 0.01])
    short = small_args(protocol="cleanrl", total_timesteps=200_000)  # a tenth of the run
    assert [redo.epsilon_at(t, short) for t in (10_000, 20_000, 199_999)] == pytest.approx([0.505, 0.01, 0.01])
    assert small_args(protocol="cleanrl", total_timesteps=200_000, exploration_steps=7).exploration_steps == 7
    later = small_args(learning_starts=1000)  # the decay begins after the warm-up
    assert redo.epsilon_at(1000, later) == 1 > redo.epsilon_at(1001, later)


def test_defaults_are_the_papers():
    args = redo.resolve_args(redo.Args())
    paper = dict(learning_rate=6.25e-5, adam_eps=1.5e-4, loss="huber", gamma=0.99, n_step=1, batch_size=32,
                 double=False,
                 buffer_size=1_000_000, learning_starts=20_000, target_network_frequency=8000, eval_every=250_000,
                 eval_steps=125_000, eval_epsilon=0.001, sticky_actions=0.25, max_episode_steps=27_000, init="xavier",
                 terminal_on_life_loss=False, noop_max=0, fire_reset=False, padding="same", redo_tau=0.025,
                 redo_period_gradient_steps=1000, redo_batch_size=64, reset_period_gradient_steps=100_000)  # fmt: skip
    assert {name: getattr(args, name) for name in paper} == paper
    assert redo.resolve_args(redo.Args(replay_ratio=1)).redo_tau == 0.1
    assert redo.resolve_args(redo.Args(replay_ratio=1, redo_tau=0.0)).redo_tau == 0


@pytest.mark.parametrize("double", [False, True])
def test_bfloat16_is_close_and_its_gradients_flow(double):
    losses, grads = {}, {}
    for amp in (False, True):
        args = small_args(amp=amp, double=double, width=0.5)
        agent = redo.DQNAgent(6, args)
        optimizer = redo.make_optimizer(agent, args, CPU)
        losses[amp] = redo.td_update(agent, [optimizer], random_batch(32), args)["losses/td"]
        grads[amp] = torch.cat([p.grad.flatten() for p in agent.q_network.parameters()])
        assert all(p.grad is not None and p.grad.any() for p in agent.q_network.parameters())
    assert losses[True] != losses[False]
    torch.testing.assert_close(losses[True], losses[False], rtol=0.02, atol=0)
    assert torch.cosine_similarity(grads[True], grads[False], dim=0) > 0.99


def test_bfloat16_sees_the_weights_of_the_last_step():
    args = small_args(amp=True)
    agent = redo.DQNAgent(6, args)
    optimizer = torch.optim.SGD(agent.q_network.parameters(), lr=0.5)
    losses = [redo.td_update(agent, [optimizer], random_batch(), args)["losses/td"].item() for _ in range(3)]
    assert len(set(losses)) == 3


def test_choose_action():
    q_network, rng = fixed_q([[0.0, 3.0, 1.0]] * 4), np.random.default_rng(0)
    obs = np.zeros((4, 4, 84, 84), np.uint8)
    assert redo.choose_action(q_network, obs, 0.0, rng, 3, CPU).tolist() == [1, 1, 1, 1]
    actions = np.concatenate([redo.choose_action(q_network, obs, 0.3, rng, 3, CPU) for _ in range(2000)])
    np.testing.assert_allclose(np.bincount(actions) / len(actions), [0.1, 0.8, 0.1], atol=0.01)


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
    episodes[-1] = (max(episodes[-1][0], n_step), False)  # still running
    history = play(replay, episodes, rng)
    expected = expected_transitions(history, capacity, n_step, 0.9, open_end=True)
    low, high = replay.valid()
    assert high - low == len(expected)
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
    assert small.valid() == large.valid()


# --- games ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("game", ["DemonAttack", "Breakout"])
def test_observations_are_those_of_gymnasiums_preprocessing(game):
    """Pixel by pixel: the maximum of two grey frames, resized, four of them stacked on zeros."""
    args = small_args(env_id=f"ALE/{game}-v5", sticky_actions=0.0)
    games = redo.make_games(args, 1)
    plain = gymnasium.make(args.env_id, frameskip=1, repeat_action_probability=0.0)
    plain = FrameStackObservation(AtariPreprocessing(plain, noop_max=0), 4, padding_type="zero")
    obs, _ = redo.start_episode(games, args, 0)
    expected, _ = plain.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(200):
        np.testing.assert_array_equal(obs[0], expected)
        action = int(rng.integers(games.single_action_space.n))
        obs, reward, terminated, truncated, _ = games.step(np.array([action]))
        expected, plain_reward, *ended, _ = plain.step(action)
        assert (reward[0], bool(terminated[0]), bool(truncated[0])) == (plain_reward, *ended)
        if any(ended):
            break


def test_an_episode_depends_on_its_seed_and_number_alone():
    args = small_args(protocol="cleanrl", sticky_actions=0.25)

    def episode(games, number, steps=60):
        obs, _ = redo.start_episode(games, args, number)
        return [obs] + [games.step(np.array([i % 6]))[0] for i in range(steps)]

    games, fresh = redo.make_games(args, 1), redo.make_games(args, 1)
    first, again, other = episode(games, 3), episode(games, 3, 20), episode(games, 4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=False))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(other, episode(fresh, 4), strict=True))


def test_time_limit_truncates():
    args = small_args(max_episode_steps=30)
    games = redo.make_games(args, 1)
    redo.start_episode(games, args, 0)
    flags = [tuple(bool(x[0]) for x in games.step(np.array([0]))[2:4]) for _ in range(30)]
    assert flags == [(False, False)] * 29 + [(False, True)]


@pytest.mark.parametrize("game, button", [("Breakout", 1), ("MsPacman", 0)])
def test_how_episodes_begin_and_what_follows_a_lost_life(game, button):
    """CleanRL plays 1 to noop_max no-ops; FIRE, where the game has it, comes on top."""
    options, rng = dict(env_id=f"ALE/{game}-v5", protocol="cleanrl"), np.random.default_rng(0)
    for noop_max, expected in ((0, {0}), (1, {1}), (2, {1, 2})):
        args = small_args(**options, noop_max=noop_max)
        games = redo.make_games(args, 6)
        frames = [redo.start_games(games, args, rng)[1]["episode_frame_number"] - button for _ in range(noop_max + 1)]
        assert set(np.ravel(frames)) == expected
    before = redo.start_games(games, args, rng)[1]["episode_frame_number"]
    after = [redo.start_games(games, args, rng, np.arange(6) < 3)[1]["episode_frame_number"] for _ in range(2)]
    assert (np.array(after)[:, 3:] == before[3:]).all()  # these games were left alone
    assert redo.action_after_life(games, args) == button
    assert redo.action_after_life(games, small_args(env_id=args.env_id)) is None


class FakeGames:
    """`num_envs` games: the episodes of game i last i + 2 steps (or `longer`), reward 10 each; a life is lost in the
    second."""

    def __init__(self, num_envs, actions=3, fire=True, truncate=False, longer=0):
        self.num_envs, self.truncate, self.single_action_space = num_envs, truncate, gymnasium.spaces.Discrete(actions)
        self.length = np.arange(num_envs) + 2 + longer
        buttons = [redo.ale_py.Action.NOOP, redo.ale_py.Action.FIRE, redo.ale_py.Action.UP]
        self.ale = SimpleNamespace(get_action_set=lambda: buttons if fire else buttons[::2])
        self.t, self.actions, self.seeds = np.zeros(num_envs, int), [], []

    def observe(self):
        obs = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        obs[:, -1] = (self.t[:, None, None] + np.outer(np.arange(84), 11 * np.arange(84))) % 256
        return obs, {"lives": np.where(self.t >= 2, 1, 2), "episode_frame_number": 4 * self.t + 2}

    def reset(self, seed, options=None):
        self.t[options["reset_mask"] if options else slice(None)] = 0
        self.seeds.append(seed)
        return self.observe()

    def send(self, action):
        self.actions.append(action.tolist())

    def recv(self):
        self.t += 1
        over = self.t >= self.length
        obs, info = self.observe()
        ended = (~over, over) if self.truncate else (over, ~over)
        return obs, np.full(self.num_envs, 10.0), over & ended[0], over & ended[1], info

    def step(self, action):
        self.send(action)
        return self.recv()


def test_evaluation_finishes_every_episode_it_began():
    args = small_args(eval_steps=20, eval_epsilon=0.0, protocol="cleanrl")
    games, q_network = FakeGames(2), fixed_q([[0.0, 0.0, 1.0]] * 2)
    metrics = redo.play_episodes(q_network, games, args, 7, CPU)
    # 10 steps each: five episodes of 2 steps, and four of 3 steps, the last one finished at step 12
    assert metrics == {"eval/episodic_return": pytest.approx((5 * 20 + 4 * 30) / 9), "eval/episodes": 9,
                       "eval/episodic_length": pytest.approx((5 * 2 + 4 * 3) / 9)}  # fmt: skip
    assert games.actions[:4] == [[2, 2], [2, 2], [2, 1], [2, 2]]  # the second game presses FIRE after its lost life
    games = FakeGames(2, fire=False)  # without FIRE: a no-op
    redo.play_episodes(q_network, games, args, 7, CPU)
    assert games.actions[:4] == [[2, 2], [2, 2], [2, 0], [2, 2]]
    again, other = FakeGames(2), FakeGames(2)
    redo.play_episodes(q_network, again, args, 7, CPU), redo.play_episodes(q_network, other, args, 8, CPU)
    assert [s.tolist() for s in again.seeds] == [s.tolist() for s in games.seeds] != [s.tolist() for s in other.seeds]


def test_evaluation_leaves_torchs_random_numbers_alone():
    args = small_args(eval_steps=40, max_episode_steps=30)
    agent = redo.DQNAgent(6, args)
    before = torch.get_rng_state()
    metrics = redo.play_episodes(agent.q_network, redo.make_games(args, 2), args, 0, CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert metrics["eval/episodes"] == 2 and metrics["eval/episodic_length"] == 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cudagraphs_equal_eager_across_a_recycle():
    device, results = torch.device("cuda"), {}
    for captured in (False, True):
        args = small_args(cudagraphs=captured, device="cuda")
        agent = redo.DQNAgent(6, args).to(device)
        optimizer = redo.make_optimizer(agent, args, device)
        batches = [[x.to(device) for x in random_batch(seed=i)] for i in range(6)]
        step = redo.td_update
        replay = redo.capture_update(step, agent, [optimizer], batches[0], args) if captured else None
        for i, batch in enumerate(batches):
            replay(batch) if captured else step(agent, [optimizer], batch, args)
            if i == 2:
                g = torch.Generator().manual_seed(0)
                redo.recycle(agent.q_network, optimizer, random_obs().to(device), args, g)
                agent.update_target()
        results[captured] = [p.detach().clone() for p in agent.parameters()]
    for a, b in zip(results[False], results[True], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
