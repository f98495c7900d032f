"""studies/drqv2_frozen_encoder.py: torchvision's ResNet-18 by its names, what is frozen, DrQ-v2's update behind it."""

import math

import helpers
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import ADAPTIVE, assert_new_outcome, assert_same, checkpoint, killed_run, run_and_replay, scalars

import adaptive_rr
import drqv2_frozen_encoder as frozen

TINY = [*ADAPTIVE, "--encoder-weights", "random", "--projection-dim", "8"]


def run(*flags):
    return helpers.run(frozen, *flags)


def tiny_agent(*flags):
    args = frozen.parse_args([*TINY, *map(str, flags)])
    torch.manual_seed(0)
    agent = frozen.FrozenEncoderAgent(2, None, args)
    return agent, frozen.make_optimizers(agent, args, torch.device("cpu")), args


def tiny_batch(size=6):
    obs = torch.randint(256, (2, size, 9, 24, 24), dtype=torch.uint8)
    return [obs[0], torch.rand(size, 2) * 2 - 1, torch.rand(size), torch.full((size,), 0.9), obs[1], torch.tensor(0.3)]


# --- the network ------------------------------------------------------------------------------------------------------
def test_names_and_sizes_are_those_of_torchvision():
    shapes = {name: tuple(value.shape) for name, value in frozen.HalfResNet().state_dict().items()}
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    expected = {"conv1.weight", *(f"bn1.{name}" for name in norm)}
    for layer, block in ((1, 0), (1, 1), (2, 0), (2, 1)):
        for i in (1, 2):
            expected |= {f"layer{layer}.{block}.conv{i}.weight", *(f"layer{layer}.{block}.bn{i}.{n}" for n in norm)}
    expected |= {"layer2.0.downsample.0.weight", *(f"layer2.0.downsample.1.{name}" for name in norm)}
    assert set(shapes) == expected
    assert shapes["conv1.weight"] == (64, 3, 7, 7) and shapes["layer2.0.conv1.weight"] == (128, 64, 3, 3)
    # conv1 and bn1; layer1; layer2 of torchvision's summary
    assert sum(p.numel() for p in frozen.HalfResNet().parameters()) == 9408 + 128 + 147_968 + 525_568


def test_resnet_by_its_formulas():
    torch.manual_seed(0)
    network = frozen.HalfResNet().eval()
    state = network.state_dict()
    for name, value in state.items():  # statistics that matter
        if "running" in name or ".bias" in name or "bn" in name and "weight" in name:
            value.uniform_(0.5, 1.5) if value.is_floating_point() else None

    def norm(x, name):
        mean, var, scale, shift = (state[f"{name}.{part}"][:, None, None]
                                   for part in ("running_mean", "running_var", "weight", "bias"))  # fmt: skip
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def block(x, name, stride):
        inner = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
        outer = norm(F.conv2d(inner, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if stride > 1:
            x = norm(F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
        return (outer + x).relu()

    images = torch.rand(2, 3, 30, 30) - 0.5
    x = norm(F.conv2d(images, state["conv1.weight"], stride=2, padding=3), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for name, stride in (("layer1.0", 1), ("layer1.1", 1), ("layer2.0", 2), ("layer2.1", 1)):
        x = block(x, name, stride)
    assert x.shape == (2, 128, 4, 4) and torch.allclose(network(images), x, rtol=1e-4, atol=1e-5)


def test_the_encoder_sees_frames_one_by_one_and_their_differences():
    encoder = tiny_agent()[0].encoder
    obs = torch.randint(256, (4, 9, 24, 24), dtype=torch.uint8)
    first, second, third = (encoder.resnet(obs[:, 3 * i : 3 * i + 3] / 255 - 0.5) for i in range(3))
    maps = torch.cat([second, third, second - first, third - second], 1)
    expected = F.layer_norm(maps.flatten(1) @ encoder.project.weight.T + encoder.project.bias, (8,))
    assert torch.allclose(encoder(obs), expected, atol=1e-5)


@pytest.mark.parametrize("size", [15, 16, 24, 84])
def test_sizes_of_frames(size):
    encoder = frozen.PretrainedEncoder(None, size, 4)
    assert encoder.project.in_features == 512 * math.ceil(size / 8) ** 2  # 61,952 at 84 x 84
    assert encoder(torch.zeros(1, 9, size, size, dtype=torch.uint8)).shape == (1, 4)


# --- what is frozen ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_norm", ["stored", "batch"])
def test_what_an_update_changes(batch_norm, precision):
    agent, optimizers, args = tiny_agent("--batch-norm", batch_norm, "--precision", precision)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    frozen.update(agent, optimizers, args, tiny_batch())
    changed = {name for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name in before if name.startswith("encoder.resnet") and "running" in name}
    statistics |= {name for name in before if name.endswith("num_batches_tracked")}
    assert {name for name in changed if name.startswith("encoder.resnet")} == (
        statistics if batch_norm == "batch" else set()
    )
    assert {"encoder.project.weight", "encoder.norm.weight", "actor.trunk.0.weight", "critic.q1.0.weight",
            "critic_target.q1.0.weight"} <= changed  # fmt: skip
    assert not agent.encoder.resnet.training  # it acts and is evaluated with the stored statistics


def test_statistics_of_the_batch():
    agent, _, _ = tiny_agent()
    batch = tiny_batch()
    stored = agent.encoder(batch[0])
    agent.encoder.resnet.train()
    assert not torch.allclose(stored, agent.encoder(batch[0]), atol=1e-3)


class Features(nn.Module):
    """DrQ-v2's encoder in the place of the frozen one."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.resnet = encoder, nn.Identity()

    def forward(self, obs):
        return self.encoder(obs)[0]


def test_the_update_is_that_of_drqv2():
    """On the same features, adaptive_rr.py's update gives the same bits."""

    args = adaptive_rr.parse_args(ADAPTIVE)
    torch.manual_seed(0)
    theirs = adaptive_rr.DrQv2Agent(2, args)
    ours, _, our_args = tiny_agent("--projection-dim", theirs.encoder.feature_size)
    ours.encoder = Features(adaptive_rr.Encoder(image_size=24))
    ours.encoder.encoder.load_state_dict(theirs.encoder.state_dict())
    for part in ("actor", "critic", "critic_target"):
        getattr(ours, part).load_state_dict(getattr(theirs, part).state_dict())
    losses = []
    for script, agent, settings in ((adaptive_rr, theirs, args), (frozen, ours, our_args)):
        optimizers = script.make_optimizers(agent, settings, torch.device("cpu"))
        torch.manual_seed(1)
        batches = [tiny_batch() for _ in range(3)]
        losses.append([script.update(agent, optimizers, settings, batch) for batch in batches])
    for a, b in zip(*losses, strict=True):
        assert all(torch.equal(a[tag], b[tag]) for tag in b)
    assert_same(dict(theirs.critic.state_dict()), dict(ours.critic.state_dict()))
    assert_same(dict(theirs.encoder.state_dict()), dict(ours.encoder.encoder.state_dict()))


# --- the weights' file ------------------------------------------------------------------------------------------------
def weights_file(path, **more):
    torch.manual_seed(7)
    weights = {name: value for name, value in frozen.HalfResNet().state_dict().items() if "tracked" not in name}
    torch.save(
        {
            **{name: nn.Parameter(value) for name, value in weights.items()},
            "layer3.0.conv1.weight": torch.zeros(1),
            "fc.weight": torch.zeros(1000, 512),
            **more,
        },
        path,
    )
    return weights


def test_weights_from_a_file():
    """torchvision's has layers that are not needed, and no counters num_batches_tracked."""
    weights = weights_file("resnet18.pth")
    run_dir = run(*TINY, "--encoder-weights", "resnet18.pth")
    learned = checkpoint(run_dir)["agent"]
    for name, value in weights.items():
        assert torch.equal(learned[f"encoder.resnet.{name}"], value)
    # A resumed run has its weights in the checkpoint: the file may be gone
    frozen.Path("resnet18.pth").unlink()
    run("--resume", run_dir, "--total-timesteps", 140)


@pytest.mark.parametrize("case", ["missing", "not one", "too few", "another shape"])
def test_bad_weights(case, capsys):
    if case == "not one":
        frozen.Path("resnet18.pth").write_text("hello")
    elif case == "too few":
        torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "resnet18.pth")
    elif case == "another shape":
        weights_file("resnet18.pth", **{"conv1.weight": torch.zeros(64, 3, 3, 3)})
    with pytest.raises(SystemExit) as stopped:
        run(*TINY, "--encoder-weights", "resnet18.pth")
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1 and not frozen.Path("runs").exists()
    assert "--encoder-weights resnet18.pth" in printed and "resnet18-f37072fd.pth" in printed


def test_no_download(capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(SystemExit) as stopped:
        run(*TINY, "--encoder-weights", "imagenet")
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1
    assert "no route to host" in printed and "resnet18-f37072fd.pth and give its path" in printed


# --- runs -------------------------------------------------------------------------------------------------------------
def test_augmentation():
    args = frozen.parse_args([*TINY, "--no-augmentation"])

    class Replay:
        def sample(self, batch_size, generator):
            return tiny_batch()[:5]

    def batch(augmentation):
        args.augmentation = augmentation
        torch.manual_seed(2)
        return frozen.sample_batch(Replay(), 0.5, args, None, torch.device("cpu"))

    plain, shifted = batch(False), batch(True)
    torch.manual_seed(2)
    raw = tiny_batch()
    assert torch.equal(plain[0], raw[0]) and torch.equal(plain[4], raw[4])
    assert not torch.equal(shifted[0], raw[0]) and not torch.equal(shifted[4], raw[4])
    assert torch.equal(shifted[1], raw[1]) and float(shifted[5]) == 0.5


@pytest.mark.parametrize("batch_norm", ["stored", "batch"])
def test_kill_and_resume_is_bit_identical(batch_norm):
    flags = [*TINY, "--checkpoint-every", 20, "--batch-norm", batch_norm]
    whole, part = run(*flags), killed_run(frozen, 70, *flags)
    run("--resume", part)
    assert_same(checkpoint(whole), checkpoint(part))
    assert scalars(whole) == scalars(part)
    assert checkpoint(whole)["gradient_steps"] == 45  # every second of the 90 steps after the first 30
    assert {"fau/actor", "fau/critic"} <= scalars(whole).keys() and "fau/encoder" not in scalars(whole)


@pytest.mark.parametrize("more", [["--no-augmentation"], ["--batch-norm", "batch"], ["--projection-dim", "4"]], ids=str)
def test_flags_change_what_is_learned(more, outcomes):
    assert_new_outcome(frozen, TINY, more, outcomes)


@pytest.mark.parametrize("flags, message", [
    (["--projection-dim", 10**8], "--projection-dim 100000000: the run needs about"),
    (["--feature-dim", 10**8], "--feature-dim 100000000: the run needs about"),
    (["--no-augmentation", "--shift-pad", 2], "--shift-pad 2: does nothing with --no-augmentation"),
])  # fmt: skip
def test_bad_input(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*TINY, *flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("env_id", ["pixel_env:Dot-v0", "pixel_env:EndingDot-v0"])
def test_a_run_on_drqv2s_encoder_is_adaptive_rrs(env_id, monkeypatch):
    class Plain(adaptive_rr.DrQv2Agent):
        def __init__(self, action_dim, weights, args):
            super().__init__(action_dim, args)
            self.encoder = Features(self.encoder)

        def mean_action(self, obs):
            return self.actor(self.encoder(obs))[0]

    monkeypatch.setattr(frozen, "FrozenEncoderAgent", Plain)
    for script in (frozen, adaptive_rr):
        monkeypatch.setattr(script, "Environments", helpers.SerialEnvironments)
    ours, replay = run_and_replay(frozen, *TINY, "--env-id", env_id)
    theirs, other = run_and_replay(adaptive_rr, *ADAPTIVE, "--rr-high", 0.5, "--env-id", env_id)
    assert_same(replay, other)
    a, b = scalars(ours), scalars(theirs)
    assert len(a.keys() & b.keys()) > 10 and all(a[tag] == b[tag] for tag in a.keys() & b.keys())
