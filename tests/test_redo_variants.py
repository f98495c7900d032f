"""Variants of ReDo: which neurons, how they are re-drawn, pruning; what Adam forgets; the official code's mask."""

import copy
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import assert_same, checkpoint, scalars

import redo_dqn_atari as redo
import redo_variants as study

ROOT = Path(__file__).resolve().parent.parent
MODES = ["none", "moments", "moments+tensor-step", "per-element"]
TINY = (
    "--width 0.125 --padding valid --batch-size 8 --learning-starts 60 --total-timesteps 160 --buffer-size 250 "
    "--replay-ratio 1 --exploration-steps 100 --max-episode-steps 40 --target-network-frequency 40 --eval-every 80 "
    "--eval-steps 1 --eval-envs 1 --dormant-every 80 --dormant-batch-size 8 --log-every 20 "
    "--redo-period-gradient-steps 30 --redo-batch-size 8 --exp-name tiny"
).split()
UPDATES = 96  # bursts of 4 at steps 64, 68, ..., 156


def run(*flags, script=study):
    return script.train(script.parse_args([str(flag) for flag in flags]))


def drop(flags, name):
    """The flags without this one and its value."""
    at = flags.index(name)
    return flags[:at] + flags[at + 2 :]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- recycling --------------------------------------------------------------------------------------------------------
def small_agent(adam, updates=3, **changes):
    """An agent whose optimizer has a state -> agent, optimizer, batch."""
    args = study.Args(width=0.125, device="cpu", redo_adam=adam, **changes)
    agent = study.NatureAgent(6, args)
    optimizer = study.make_optimizer(agent, args, torch.device("cpu"))
    if adam == "per-element":
        optimizer = study.PerElementAdam(agent.q_network.parameters(), lr=1e-3)
    g = generator(1)
    obs = torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8, generator=g)
    batch = (obs, torch.randint(0, 6, (16,), generator=g), torch.randn(16, generator=g), torch.full((16,), 0.99), obs)
    for _ in range(updates):
        study.update(agent, optimizer, args, batch)
    return agent, optimizer, batch


def recycle_all(agent, optimizer, obs, tau, adam, **options):
    _, activations = agent.q_network(obs)
    activations = [activations[name] for name in agent.q_network.reader]
    layers = agent.q_network.recyclable()
    masks = study.selected_neurons(layers, activations, "threshold", tau, 0.0, None)
    study.recycle_variant(layers, masks, optimizer, generator(), adam, **options)
    return masks


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("adam", MODES)
def test_at_tau_0_the_output_does_not_change(padding, adam):
    agent, optimizer, (obs, *_) = small_agent(adam, padding=padding)
    for name in agent.q_network.reader:
        agent.q_network.layers[name].bias.data[:2] = -1e6
    before, activations = agent.q_network(obs)
    masks = recycle_all(agent, optimizer, obs, 0.0, adam)
    after, again = agent.q_network(obs)
    assert torch.equal(after, before)
    for name, mask in zip(agent.q_network.reader, masks, strict=True):
        assert mask[:2].all() and not mask.all()
        assert (study.dormant_score(again[name])[mask] > 0).any(), name  # some are alive again


def test_the_official_mask_hits_other_weights():
    """Our features are numbered channel by channel. The official ones go position by position, but their mask does not.

    Of the 121 rows that it zeroes for a feature map of the Nature network, at most 2 are that map's."""
    channels, height, width = 64, 11, 11
    positions = height * width
    conv, dense = nn.Conv2d(1, channels, 1), nn.Linear(channels * positions, 2)
    maps = torch.rand(3, channels, height, width)
    maps[:, [5, 40]] = 0
    optimizer = torch.optim.SGD([*conv.parameters(), *dense.parameters()])
    layers = [(conv, [dense])]
    (mask,) = study.selected_neurons(layers, [maps], "threshold", 0.0, 0.0, None)
    study.recycle_variant(layers, [mask], optimizer, generator(), compat_flatten=True)
    assert mask.nonzero()[:, 0].tolist() == [5, 40]
    official_mask = mask.repeat_interleave(positions)
    expected = torch.zeros(channels * positions, dtype=torch.bool)
    for i, dormant in enumerate(official_mask):
        position, channel = i // channels, i % channels
        expected[channel * positions + position] = dormant
    zero = dense.weight.detach() == 0
    assert torch.equal(zero, expected.expand(2, -1)) and zero[0].sum() == 2 * positions
    for channel in (5, 40):
        assert zero[0, channel * positions : (channel + 1) * positions].sum() <= 4  # of both maps' masks

    agent, optimizer, (obs, *_) = small_agent("moments", padding="valid")
    agent.q_network.layers["conv3"].bias.data[:2] = -1e6
    before, _ = agent.q_network(obs)
    recycle_all(agent, optimizer, obs, 0.0, "moments", compat_flatten=True)
    assert not torch.equal(agent.q_network(obs)[0], before)


def foreign_network(adam):
    """A convolution of 4 x 2 x 3 features, then two dense layers, after 3 updates -> network, optimizer, inputs."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2)]
    network, x = nn.Sequential(*layers), torch.rand(6, 1, 3, 4)
    with torch.no_grad():
        network[0].bias[1] = network[3].bias[2] = -1e6
    kind = study.PerElementAdam if adam == "per-element" else torch.optim.Adam
    optimizer = kind(network.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()
    for state in optimizer.state.values():  # nothing is 0 by chance
        for value in state.values():
            value.add_(1) if value.dim() else None
    return network, optimizer, x


def layers_of(network):
    return [(network[0], [network[3]]), (network[3], [network[5]])]


def recycled(network, optimizer, x, **options):
    layers, activations = layers_of(network), [network[:2](x), network[:5](x)]
    masks = study.selected_neurons(layers, activations, "threshold", 0.0, 0.0, None)
    study.recycle_variant(layers, masks, optimizer, generator(), **options)
    return masks


@pytest.mark.parametrize("adam", MODES)
def test_what_adam_forgets(adam):
    network, optimizer, x = foreign_network(adam)
    before = copy.deepcopy([optimizer.state[p] for p in network.parameters()])
    conv, dense = recycled(network, optimizer, x, adam=adam)
    if adam == "moments+tensor-step":
        study.reset_adam_step(optimizer, kept=network[5].bias)
    assert conv[1] and dense[2] and not conv.all() and not dense.all()
    columns = torch.zeros(4, 2, 3, dtype=torch.bool)
    columns[conv] = True
    touched = {  # what recycling may change
        network[0].weight: conv.view(4, 1, 1, 1).expand(4, 1, 2, 2), network[0].bias: conv,
        network[3].weight: dense[:, None] | columns.flatten(), network[3].bias: dense,
        network[5].weight: dense.expand(2, 5), network[5].bias: torch.zeros(2, dtype=torch.bool),
    }  # fmt: skip
    for (parameter, mask), old in zip(touched.items(), before, strict=True):
        new, forgotten = optimizer.state[parameter], torch.zeros_like(mask)
        if adam != "none" and (parameter.dim() > 1 or adam in ("moments+tensor-step", "per-element")):
            forgotten = mask
        assert len(new) == (4 if adam == "per-element" else 3)
        for key, value in new.items():
            if key == "step":
                kept = adam != "moments+tensor-step" or parameter is network[5].bias
                assert value.item() == (3 if kept else 0)
            else:
                assert not value[forgotten].any(), key
                assert torch.equal(value[~forgotten], old[key][~forgotten]) and old[key].all(), key


def test_moments_is_what_redo_dqn_atari_does():
    """The same weights, the same state of Adam, the same random numbers."""
    ours, theirs = foreign_network("moments"), foreign_network("moments")
    masks = recycled(*ours)
    network, optimizer, x = theirs
    again = redo.recycle(layers_of(network), [network[:2](x), network[:5](x)], optimizer, 0.0, generator())
    for a, b in zip(masks, again, strict=True):
        assert torch.equal(a, b)
    assert_same(dict(ours[0].state_dict()), dict(theirs[0].state_dict()))
    assert_same(ours[1].state_dict(), theirs[1].state_dict())


@pytest.mark.parametrize("adam", MODES)
def test_everything_is_edited_in_place(adam):
    agent, optimizer, batch = small_agent(adam)
    pointers = [p.data_ptr() for p in agent.parameters()]
    pointers += [v.data_ptr() for state in optimizer.state.values() for v in state.values()]
    target = copy.deepcopy(agent.target_network.state_dict())
    recycle_all(agent, optimizer, batch[0], 0.5, adam)
    if adam == "moments+tensor-step":
        study.reset_adam_step(optimizer, kept=None)
    study.update(agent, optimizer, study.Args(), batch)
    again = [p.data_ptr() for p in agent.parameters()]
    assert pointers == again + [v.data_ptr() for state in optimizer.state.values() for v in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(target.values(), agent.target_network.state_dict().values()))


# --- which neurons, and how -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("selection, share, chosen", [
    ("least", 0.3, [3]), ("least", 0.5, [1, 3]), ("least", 0.01, [3]), ("least", 0.0, []), ("most", 0.5, [0, 2]),
    ("threshold", 0.5, [3]), ("cbp", 0.5, [0, 2]),
], ids=str)  # fmt: skip
def test_selection_by_hand(selection, share, chosen):
    """Four neurons with means 0.5, 0.2, 0.9, 0.1: scores 1.18, 0.47, 2.12, 0.24; round(0.3 x 4) = 1. The most active
    ones vary as much, but hardly anything reads them."""
    activation = torch.tensor([[1.0, 0.4, 1.8, 0.2], [0.0, 0.0, 0.0, 0.0]])
    layers = [(nn.Linear(1, 4), [nn.Linear(4, 1)])]
    with torch.no_grad():
        layers[0][0].weight.fill_(1)
        layers[0][1][0].weight.copy_(torch.tensor([[0.01, 1, 0.01, 1]]))
    (mask,) = study.selected_neurons(layers, [activation], selection, 0.3, share, generator())
    assert mask.nonzero()[:, 0].tolist() == chosen


@pytest.mark.parametrize("selection", ["threshold", "least", "random", "most", "cbp"])
def test_nothing_is_selected_in_a_network_that_is_not_finite(selection):
    layers = [(nn.Linear(1, 4), [nn.Linear(4, 1)])]
    activation, finite = torch.tensor([[0.5, math.nan, 0.9, 0.1]]), torch.tensor([[0.5, 0.0, 0.9, 0.1]])
    masks = study.selected_neurons(2 * layers, [activation, finite], selection, 0.3, 0.5, generator())
    assert not torch.cat(masks).any()  # nor in a layer that is finite
    assert study.selected_neurons(layers, [finite], selection, 0.3, 0.5, generator())[0].any()


def test_selection_of_equal_and_of_random_neurons():
    layers = [(nn.Linear(1, 4), [nn.Linear(4, 1)])]
    (mask,) = study.selected_neurons(layers, [torch.tensor([[0.1, 0.1, 0.9, 0.1]])], "least", 0.0, 0.25, None)
    assert mask.tolist() == [True, True, False, True]  # ties widen the choice
    activation, times = torch.tensor([[0.5, 0.2, 0.9, 0.1]]), torch.zeros(4)
    for seed in range(400):
        (mask,) = study.selected_neurons(layers, [activation], "random", 0.0, 0.5, generator(seed))
        assert mask.sum() == 2
        times += mask
    assert (times - 200).abs().max() < 50  # 5 standard deviations


def test_the_share_falls_as_a_cosine():
    shares = [study.cosine_share(0.3, step, 2_500_000) for step in (0, 1_250_000, 2_500_000, 9_000_000)]
    assert shares == pytest.approx([0.3, 0.21213, 0, 0], abs=1e-5)


@pytest.mark.parametrize("positions", [1, 3])
def test_utility_by_hand(positions):
    """Two maps, on a batch of two: of deviation 1 and 0.5; |weights| 2 x 3 x positions out / 4 in, and 1 x ... / 8."""
    conv, dense, wide = nn.Conv2d(2, 2, 1), nn.Linear(2 * positions, 3), nn.Conv2d(2, 1, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([2.0, -4.0])[:, None, None, None].expand(2, 2, 1, 1))
        dense.weight.copy_(torch.tensor([-2.0, 1.0]).repeat_interleave(positions).expand(3, -1))
        wide.weight.fill_(10)
    h = torch.tensor([[3.0, 1.0], [5.0, 2.0]])[:, :, None, None].expand(2, 2, 1, positions)
    with torch.no_grad():
        utility = study.utility(conv, [dense], h)
        both = study.utility(conv, [dense, wide], h)
    assert utility.tolist() == pytest.approx([1 * 6 * positions / 4, 0.5 * 3 * positions / 8])
    assert both.tolist() == pytest.approx([1 * (6 * positions + 10) / 4, 0.5 * (3 * positions + 10) / 8])


def test_scaled_incoming_weights_have_the_norm_of_the_others():
    network, optimizer, x = foreign_network("moments")
    old = network[3].weight.detach().clone()
    conv, dense = recycled(network, optimizer, x, incoming="scaled")
    g = generator()
    study.initial_weight(network[0], g)  # is drawn before
    fresh = study.initial_weight(network[3], g)
    expected = fresh / fresh.norm(dim=1, keepdim=True) * old[~dense].norm(dim=1).mean()
    expected.view(5, 4, 6)[:, conv] = 0  # the recycled maps' columns, afterwards
    torch.testing.assert_close(network[3].weight.detach()[dense], expected[dense])
    assert dense.any() and conv.any() and expected[dense].norm(dim=1).min() > 0


def test_random_outgoing_weights_change_the_output():
    network, optimizer, x = foreign_network("moments")
    before, old = network(x), network[5].weight.detach().clone()
    _, dense = recycled(network, optimizer, x, outgoing="random")
    new = network[5].weight.detach()
    assert (new[:, dense] != 0).all() and (new[:, dense] != old[:, dense]).all()
    assert torch.equal(new[:, ~dense], old[:, ~dense]) and not torch.equal(network(x), before)
    assert not optimizer.state[network[5].weight]["exp_avg"][:, dense].any()


@pytest.mark.parametrize("adam", ["moments", "per-element"])
def test_pruned_neurons_are_silent_for_ever(adam):
    """As with a mask after the activation; through updates with weight decay and a renewal of the target network."""
    agent, optimizer, batch = small_agent(adam)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    q_network = agent.q_network
    layers = q_network.recyclable()
    _, activations = q_network(batch[0])
    activations = [activations[name] for name in q_network.reader]
    masks = study.selected_neurons(layers, activations, "least", 0.0, 0.4, generator())

    masked = copy.deepcopy(q_network)
    hidden = masked.hidden
    alive = {name: (~mask).float() for name, mask in zip(q_network.reader, masks)}

    def hidden_and_masked(name, x):
        h = hidden(name, x)
        return h * alive[name].view(1, -1, *[1] * (h.dim() - 2))

    masked.hidden = hidden_and_masked
    for network in (q_network, agent.target_network):
        study.prune(network.recyclable(), masks, optimizer)
    with torch.no_grad():
        torch.testing.assert_close(q_network(batch[0])[0], masked(batch[0])[0])
    for i in range(5):
        study.update(agent, optimizer, study.Args(), batch)
        if i == 2:
            agent.update_target()
    for network in (q_network, agent.target_network):
        _, after = network(batch[0])
        for name, mask in zip(q_network.reader, masks, strict=True):
            assert mask.any() and not after[name][:, mask].any() and after[name][:, ~mask].any()


def test_what_pruning_does_in_a_run():
    """In both networks; the share that is left; at tau 0 no value changes."""
    agent, optimizer, (obs, *_) = small_agent("moments", method="prune")
    for layer in (agent.q_network.layers["conv2"], agent.q_network.layers["dense"]):
        layer.bias.data[:2] = -1e6

    class Stub:
        def sample(self, count, generator):
            return (obs,)

    args = study.Args(method="prune", redo_tau=0.0, redo_period_gradient_steps=10)
    metrics = study.intervene_variant(agent, optimizer, Stub(), 10, args, generator(), torch.device("cpu"))
    silent, total = 0, 0
    for network in (agent.q_network, agent.target_network):
        silent, total = 0, 0
        for name in network.reader:
            layer = network.layers[name]
            silent += int((layer.weight.flatten(1).abs().sum(1) + layer.bias.abs() == 0).sum())
            total += len(layer.bias)
        assert silent >= 4
        assert metrics["events/alive"].item() == pytest.approx(1 - silent / total)
    assert metrics["events/redo_q_change"] == 0
    agent.q_network.layers["head"].bias.data[0] = math.nan
    metrics = study.intervene_variant(agent, optimizer, Stub(), 20, args, generator(), torch.device("cpu"))
    assert metrics["events/alive"].isnan()


def test_the_share_that_a_run_recycles_falls_along_the_cosine():
    agent, optimizer, (obs, *_) = small_agent("moments")

    class Stub:
        def sample(self, count, generator):
            return (obs,)

    flags = dict(redo_selection="random", redo_rate=0.5, redo_end_gradient_steps=90, redo_period_gradient_steps=10)
    args = study.Args(**flags)
    for step, share in ((30, 0.5 * math.cos(math.pi / 6)), (60, 0.25)):
        metrics = study.intervene_variant(agent, optimizer, Stub(), step, args, generator(), torch.device("cpu"))
        sizes = {name: len(agent.q_network.layers[name].bias) for name in agent.q_network.reader}
        for name, size in sizes.items():
            assert metrics[f"redo_recycled/{name}"] == max(1, round(share * size))


def test_pruning_in_a_foreign_network_without_biases():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
    x, mask = torch.rand(6, 1, 3, 4), torch.tensor([True, False, False, True])
    pointer = network[0].weight.data_ptr()
    study.prune([(network[0], [network[3]])], [mask], torch.optim.Adam(network.parameters()))
    h = network[:2](x)
    assert not h[:, mask].any() and h[:, ~mask].any() and network[0].weight.data_ptr() == pointer


# --- Adam -------------------------------------------------------------------------------------------------------------
def test_per_element_adam_by_hand():
    """Gradients 2, then -3; the first element is forgotten in between. No epsilon: a first update is the step size."""
    weight, g = nn.Parameter(torch.zeros(2)), torch.ones(2)
    adam = study.PerElementAdam([weight], lr=0.1, eps=0.0)
    weight.grad = 2 * g
    adam.step()
    assert weight.tolist() == pytest.approx([-0.1, -0.1])
    study.forget(adam, weight, torch.tensor([True, False]))
    weight.grad = -3 * g
    adam.step()
    m, v = (0.9 * 0.1 * 2 - 0.1 * 3) / (1 - 0.9**2), (0.999 * 0.001 * 4 + 0.001 * 9) / (1 - 0.999**2)
    assert weight.tolist() == pytest.approx([-0.1 + 0.1, -0.1 - 0.1 * m / v**0.5], abs=1e-6)


@pytest.mark.parametrize("weight_decay, compiled", [(0.0, False), (0.1, False), (0.1, True)])
def test_per_element_adam_is_adam_until_something_is_forgotten(weight_decay, compiled, quick_compiler):
    torch.manual_seed(0)
    start, options = torch.randn(5, 3), dict(lr=0.01, eps=1e-4, weight_decay=weight_decay)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a, b = study.PerElementAdam([ours], **options), torch.optim.Adam([theirs], **options)
    if compiled:
        a.element_step = torch.compile(study.per_element_step, dynamic=False)
    for _ in range(50):
        ours.grad = torch.randn(5, 3)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)

    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[2] = True
    kept = copy.deepcopy((ours, a.state_dict()))
    study.forget(a, ours, mask)
    fresh = nn.Parameter(ours.detach().clone())
    other = nn.Parameter(kept[0].detach().clone())
    c, d = torch.optim.Adam([fresh], **options), study.PerElementAdam([other], **options)
    d.load_state_dict(kept[1])
    for _ in range(20):
        ours.grad = torch.randn(5, 3)
        fresh.grad, other.grad = ours.grad.clone(), ours.grad.clone()
        a.step(), c.step(), d.step()
    torch.testing.assert_close(ours[2], fresh[2], atol=1e-6, rtol=1e-5)  # as a fresh Adam
    assert torch.equal(ours[~mask], other[~mask])  # as if nothing had happened


def test_compiled_per_element_adam_compiles_once_for_each_shape(quick_compiler):
    agent, optimizer, batch = small_agent("per-element", updates=0)
    study.compile_modules()  # raises the limit of recompilations
    optimizer.element_step = torch.compile(study.per_element_step, dynamic=False)
    shapes = {p.shape for p in agent.q_network.parameters()}
    for _ in range(3):
        study.update(agent, optimizer, study.Args(), batch)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(shapes) >= 9
    assert len(copy.deepcopy(optimizer).state) == 10


def test_kept_step_count_makes_first_updates_too_large():
    """In the official code, (1 - b1^k) / sqrt(1 - b2^k) times a proper Adam's; the other way round for weights whose
    moments are kept while the step count is reset."""

    def changes(forget_moments, forget_step, updates):
        weight = nn.Parameter(torch.zeros(1))
        adam = torch.optim.Adam([weight], lr=1.0, eps=0.0)
        for _ in range(8000):  # long enough that both averages are exact
            weight.grad = torch.ones(1)
            adam.step()
        if forget_moments:
            study.forget(adam, weight, torch.ones(1, dtype=torch.bool))
        if forget_step:
            study.reset_adam_step(adam, kept=None)
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


# --- whole runs -------------------------------------------------------------------------------------------------------
def learned(run_dir):
    """What a run has learned, and the state of what it draws from; the scores are measured on other states."""
    content = checkpoint(run_dir)
    return {name: content[name] for name in ("agent", "optimizer", "batch_rng", "redo_rng", "act_rng", "torch_rng")}


@pytest.mark.parametrize("flags", [["--n-step", 3], ["--precision", "bfloat16", "--weight-decay", 0.01]], ids=str)
def test_without_its_flags_it_is_redo_dqn_atari(flags):
    ours = run(*TINY, *flags)
    theirs = run(*TINY, *flags, "--rank-batch-size", 16, script=redo)
    assert_same(learned(ours), learned(theirs))
    a, b = scalars(ours), scalars(theirs)
    same = [tag for tag in b if tag.split("/")[0] in ("losses", "charts", "eval") or "redo" in tag]
    assert len(same) > 10 and sum(b["redo_recycled/all"].values()) > 0
    assert {tag: a.get(tag) for tag in same} == {tag: b[tag] for tag in same}
    extra = {tag for tag in a if tag not in b}
    assert not extra and [tag for tag in a if "dormant_ratio" in tag] != []


def test_every_variant_is_another_one():
    arms = [["--redo-adam", mode] for mode in MODES]
    arms += [["--redo-compat-flatten"], ["--redo-outgoing", "random"], ["--redo-incoming", "scaled"]]
    arms += [["--redo-selection", selection] for selection in ("least", "random", "most", "cbp")]
    arms += [["--method", method] for method in ("prune", "dqn", "adam-step-reset")]
    short = [*TINY, "--total-timesteps", 120]
    outcomes = []
    for arm in arms:
        if "--method" in arm:
            run_dir = run(*drop(short, "--redo-batch-size"), *arm)
        elif "--redo-selection" in arm:
            run_dir = run(*short, *arm, "--redo-rate", 0.4, "--redo-end-gradient-steps", 200)
        else:
            run_dir = run(*short, *arm, "--redo-tau", 0.5)
        outcomes.append(float(sum(value.double().sum() for value in checkpoint(run_dir)["agent"].values())))
        logged = scalars(run_dir)
        assert all(np.isfinite(list(values.values())).all() for values in logged.values())
        assert ("redo_recycled/all" in logged) == ("--method" not in arm)
        assert ("events/alive" in logged) == ("prune" in arm)
    assert len(set(outcomes)) == len(arms)


@pytest.mark.parametrize("flags, recycled, resets", [
    (["--method", "adam-step-reset", "--redo-end-gradient-steps", 90], [], [30, 60]),
    (["--redo-batch-size", 8, "--redo-adam", "moments+tensor-step"], [30, 60, 90], [30, 60, 90]),
], ids=str)  # fmt: skip
def test_when_it_recycles_and_when_the_step_count_is_reset(flags, recycled, resets, monkeypatch):
    calls = {name: [] for name in ("update", "recycle_variant", "reset_adam_step")}
    for name in calls:
        original = getattr(study, name)

        def counted(*values, original=original, name=name, **options):
            calls[name].append(len(calls["update"]))
            return original(*values, **options)

        monkeypatch.setattr(study, name, counted)
    content = checkpoint(run(*drop(TINY, "--redo-batch-size"), *flags))
    assert len(calls["update"]) == UPDATES
    assert (calls["recycle_variant"], calls["reset_adam_step"]) == (recycled, resets)
    steps = [int(state["step"]) for state in content["optimizer"]["state"].values()]
    since = UPDATES - resets[-1] if resets else UPDATES
    assert steps == [since] * 9 + [UPDATES]  # all but the head's bias


def test_resume_is_bit_identical(monkeypatch):
    """A run that is killed after the checkpoint of step 120, and resumed with further ones: as if nothing had been."""
    save = study.Run.save

    def saving(self, **counters):
        save(self, **counters)
        if counters["global_step"] == 120 and not Path("part").exists():
            shutil.copytree(self.dir, "part")

    monkeypatch.setattr(study.Run, "save", saving)
    whole = run(*TINY, "--redo-adam", "per-element", "--checkpoint-every", 40)
    part = Path("part")
    assert checkpoint(part)["gradient_steps"] == 56
    assert len(checkpoint(part)["optimizer"]["state"][0]) == 4
    run("--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert scalars(whole) == scalars(part)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_cuda_graph_of_per_element_adam_equals_eager_across_a_recycle():
    results, device = {}, torch.device("cuda")
    for captured in (False, True):
        agent, _, batch = small_agent("per-element", updates=0)
        agent = agent.to(device)
        optimizer = study.PerElementAdam(agent.q_network.parameters(), lr=1e-3)
        batch = tuple(x.to(device) for x in batch)

        def learn(batch, agent=agent, optimizer=optimizer):
            return study.update(agent, optimizer, study.Args(), batch)

        learn = study.capture(learn, [optimizer]) if captured else learn
        for i in range(8):
            learn(batch)
            if i == 5:
                recycle_all(agent, optimizer, batch[0], 0.1, "per-element")
        results[captured] = [p.detach().clone() for p in agent.parameters()]
    for a, b in zip(results[False], results[True], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


# --- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, message", [
    ("--method dqn --redo-adam per-element", "--redo-adam per-element: does nothing beside the other flags"),
    ("--method adam-step-reset --redo-adam none", "--redo-adam none: does nothing beside the other flags"),
    ("--method adam-step-reset --redo-compat-flatten", "--redo-compat-flatten True: does nothing beside"),
    ("--method adam-step-reset --redo-tau 0.5", "--redo-tau 0.5: does nothing beside the other flags"),
    ("--method dqn --redo-batch-size 8", "--redo-batch-size 8: does nothing beside the other flags"),
    ("--method dqn --redo-end-gradient-steps 9", "--redo-end-gradient-steps 9: does nothing beside the other flags"),
    ("--method prune --redo-outgoing random", "--redo-outgoing random: does nothing beside the other flags"),
    ("--method prune --redo-selection least", "--redo-selection least: does nothing beside the other flags"),
    ("--method prune --activation leaky_relu", "--activation leaky_relu: lets pruned neurons learn again"),
    ("--total-timesteps 9000", "--total-timesteps 9000: must be more than --learning-starts"),
    ("--replay-ratio 2 --redo-period-gradient-steps 7", "--redo-period-gradient-steps 7: is shorter than a burst"),
    ("--redo-end-gradient-steps 500", "--redo-end-gradient-steps 500: is before the first period has ended"),
    ("--redo-selection least --redo-rate 0", "--redo-rate 0.0: must lie between 1e-06 and 1"),
    ("--redo-rate 0.2", "--redo-rate 0.2: does nothing beside the other flags"),
    ("--redo-selection most --redo-tau 0.2", "--redo-tau 0.2: does nothing beside the other flags"),
    ("--redo-selection most --redo-end-gradient-steps None", "--redo-end-gradient-steps None: is needed"),
    ("--redo-outgoing random --redo-compat-flatten", "--redo-outgoing random: does not go with --redo-compat-flatten"),
    ("--redo-period-gradient-steps 0", "--redo-period-gradient-steps 0: must lie between 1"),
    ("--redo-tau -0.1", "--redo-tau -0.1: must lie between 0"),
    ("--env-id Pong", "--env-id Pong: is no game of the Arcade Learning Environment"),
    ("--width 60 --device cpu", "--width 60.0: the run needs about"),
    ("--dormant-batch-size 10000000 --device cpu", "--dormant-batch-size 10000000: the run needs about"),
    ("--resume nowhere", "--resume nowhere: is not the folder of a run"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(study, "memory", lambda device: 16e9)
    with pytest.raises(SystemExit) as stopped:
        run(*flags.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert os.listdir() == []


def test_adam_with_a_count_per_element_needs_more_memory(monkeypatch, capsys):
    """Width 30: 2.5 billion weights; 5 or 10 copies of them in float32."""
    flags = dict(width=30, device="cpu", buffer_size=30_000, dormant_batch_size=8, redo_batch_size=8)
    monkeypatch.setattr(study, "memory", lambda device: 80e9)
    study.check_args(study.Args(**flags))
    with pytest.raises(SystemExit):
        study.check_args(study.Args(**flags, redo_adam="per-element"))
    assert "--width 30: the run needs about" in capsys.readouterr().err


def test_a_copy_in_an_empty_folder_runs():
    Path("copy").mkdir()
    shutil.copy(study.__file__, "copy/mine.py")
    flags = [*TINY, "--redo-adam", "per-element", "--total-timesteps", "80", "--save-model"]
    done = subprocess.run([sys.executable, "mine.py", *flags], cwd="copy", capture_output=True, text=True)
    assert done.returncode == 0 and "mean return" in done.stdout, done.stderr
    (run_dir,) = Path("copy/runs").iterdir()
    assert run_dir.name.startswith("ALE-DemonAttack-v5__tiny__1__")
    files = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
    assert files == {"args.json", "checkpoint.pt", "lock", "summary.json", "model.pt", "mine.py"}


def test_per_element_adam_has_the_runs_settings():
    flags = ["--redo-adam", "per-element", "--adam-eps", 1e-3, "--weight-decay", 0.01, "--learning-rate", 1e-4]
    (group,) = checkpoint(run(*TINY, *flags))["optimizer"]["param_groups"]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (1e-4, 1e-3, 0.01)


def test_defaults_of_the_figures():
    assert [study.parse_args(["--method", method]).redo_tau for method in ("redo", "prune")] == [0.025, 0.0]
    assert study.parse_args(["--replay-ratio", "1"]).redo_tau == 0.1
    assert study.parse_args(["--redo-selection", "least"]).redo_end_gradient_steps == 2_500_000
