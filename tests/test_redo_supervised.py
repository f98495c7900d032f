"""The study of Fig. 3 of Sokar et al.: data, scores, recycling in any network, permuted labels, whole runs."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import scalars

import redo_supervised as study
from redo_supervised import dormant_score, forget, initial_weight, recycle

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(data="synthetic", num_images=64, epochs=3, shuffle_every_epochs=1, batch_size=32, dormant_batch_size=32)
REDO = TINY | dict(redo=True, redo_batch_size=32, redo_period_gradient_steps=2)


def run(**flags):
    return study.train(study.Args(**TINY | flags))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- Scores -----------------------------------------------------------------------------------------------------------
def test_scores_and_ratios_by_hand():
    """Two images, three feature maps of 1 x 2 pixels: means 0.5, 0, 2.5, so that their mean is 1."""
    activation = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]], [[4.0, 1.0]]], [[[0.0, 1.0]], [[0.0, 0.0]], [[2.0, 3.0]]]])
    assert dormant_score(activation).tolist() == [0.5, 0, 2.5]
    assert dormant_score(torch.zeros(4, 3)).tolist() == [0, 0, 0]

    def network(images):
        return None, {"conv1": activation, "dense": torch.tensor([[0.01, 1.99]])}

    ratios = study.dormant_ratios(network, None)
    ratios = {name.removeprefix("dormant_ratio_tau"): float(value) for name, value in ratios.items()}
    assert ratios == pytest.approx({
        "0/conv1": 1 / 3, "0/dense": 0, "0/all": 1 / 5, "0.025/conv1": 1 / 3, "0.025/dense": 1 / 2, "0.025/all": 2 / 5,
        "0.1/conv1": 1 / 3, "0.1/dense": 1 / 2, "0.1/all": 2 / 5})  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_is_not_finite_has_no_dormant_ratio(value):
    activations = {"conv1": torch.tensor([[0.0, 1.0]]), "dense": torch.tensor([[0.0, value, 1.0]])}
    ratios = study.dormant_ratios(lambda images: (None, activations), None)
    assert ratios["dormant_ratio_tau0/conv1"] == 0.5
    assert ratios["dormant_ratio_tau0/dense"].isnan() and ratios["dormant_ratio_tau0/all"].isnan()


# --- ReDo in any network ----------------------------------------------------------------------------------------------
class TwoReaders(nn.Module):
    """A foreign network: a convolution, and two dense layers that read it; the heads on them are not recycled."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten())
        self.left = nn.Sequential(nn.Linear(6 * 12, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
        self.right = nn.Linear(6 * 12, 3)
        with torch.no_grad():
            self.body[0].bias[[1, 4]] = -100.0  # feature maps that are silent
            self.left[0].weight[2] = -1.0  # a unit that is

    def forward(self, x):
        return self.left(self.body(x)), self.right(self.body(x))

    def layers(self):
        return [(self.body[0], [self.left[0], self.right]), (self.left[0], [self.left[2]])]

    def activations(self, x):
        maps = self.body[:2](x)
        return [maps, self.left[:2](maps.flatten(1))]


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.01, 0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_recycling_in_a_foreign_network_with_two_readers(make):
    torch.manual_seed(0)
    network, x = TwoReaders(), torch.rand(16, 2, 3, 4)
    optimizer = make(network.parameters())
    sum(output.square().sum() for output in network(x)).backward()
    optimizer.param_groups[0]["lr"] = 0.0  # fills the optimizer's state and leaves the weights
    optimizer.step()
    for state in optimizer.state.values():
        for value in state.values():
            if value.dim():
                value.fill_(7.0)
    conv, left, head, right = network.body[0], network.left[0], network.left[2], network.right
    before, outputs = {p: p.detach().clone() for p in network.parameters()}, network(x)
    masks = recycle(network.layers(), network.activations(x), optimizer, 0.0, generator(3))
    assert [mask.nonzero()[:, 0].tolist() for mask in masks] == [[1, 4], [2]]
    for new, old in zip(network(x), outputs):
        assert torch.equal(new, old)  # at tau 0 recycled neurons had no say

    rng = generator(3)
    fresh = [initial_weight(conv, rng), initial_weight(left, rng)]
    changed = {p: torch.zeros_like(p, dtype=torch.bool) for p in network.parameters()}
    changed[conv.weight][[1, 4]] = changed[conv.bias][[1, 4]] = changed[left.weight][2] = True
    columns = [i for i in range(72) if i // 12 in (1, 4)]  # 3 x 4 positions of each map
    changed[left.weight][:, columns] = changed[right.weight][:, columns] = changed[head.weight][:, 2] = True
    expected = {p: value.clone() for p, value in before.items()}
    expected[conv.weight][[1, 4]], expected[conv.bias][[1, 4]] = fresh[0][[1, 4]], 0.0
    expected[left.weight][2] = fresh[1][2]
    for weight, zeros in ((left.weight, columns), (right.weight, columns), (head.weight, [2])):
        expected[weight][:, zeros] = 0.0
    for p in network.parameters():
        assert torch.equal(p, expected[p])
        forgotten = changed[p] & (p.dim() > 1)  # as in the official code, not of biases
        for name, value in optimizer.state[p].items():
            if value.dim():
                assert torch.equal(value, (~forgotten).float() * 7), name
    assert conv.bias[0] == before[conv.bias][0] and changed[conv.weight].sum() == 2 * 2 * 9


def test_forget_leaves_counters_and_other_weights():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.Adam([p], 0.1)
    p.sum().backward()
    optimizer.step()
    forget(optimizer, p, torch.tensor([[True], [False]]))
    state = optimizer.state[p]
    assert state["step"] == 1 and state["exp_avg"][0].tolist() == [0, 0] and (state["exp_avg"][1] != 0).all()
    forget(torch.optim.SGD([p], 0.1), p, torch.ones(2, 2, dtype=torch.bool))  # nothing to forget yet


def test_redraw_follows_the_initial_distribution():
    layer, reader = nn.Linear(300, 400).requires_grad_(False), nn.Linear(400, 1)
    for init, bound in (("torch", 300**-0.5), ("xavier", (6 / 700) ** 0.5)):
        layer.init = study.INITS[init]
        recycle([(layer, [reader])], [torch.zeros(1, 400)], torch.optim.SGD(layer.parameters()), 0, generator(1))
        assert layer.weight.abs().max() == pytest.approx(bound, rel=1e-3) and not layer.bias.any()
        assert layer.weight.std() == pytest.approx(bound / 3**0.5, rel=0.01) and not reader.weight.any()


@pytest.mark.parametrize("downsampling, features", [("stride", 64 * 4 * 3), ("pool", 64 * 3 * 2)])
def test_the_network(downsampling, features):
    network = study.ConvNet((1, 28, 20), downsampling, "xavier", generator())
    outputs, activations = network(torch.rand(5, 1, 28, 20))
    assert outputs.shape == (5, 10) and network.layers["dense"].in_features == features
    assert [h.shape[1] for h in activations.values()] == [32, 64, 64, 128] and list(activations)[-1] == "dense"
    assert [reader.in_channels for _, (reader,) in network.recyclable()[:2]] == [32, 64]
    assert all((h >= 0).all() for h in activations.values())
    x = torch.rand(8, 1, 28, 20)
    with torch.no_grad():
        network.layers["conv3"].bias[7] = network.layers["dense"].bias[5] = -100.0
        before, activations = network(x)
        masks = recycle(
            network.recyclable(), activations.values(), torch.optim.SGD(network.parameters()), 0, generator()
        )
        assert masks[2][7] and masks[3][5] and torch.equal(network(x)[0], before)
        assert not network.layers["head"].weight[:, 5].any()


# --- Targets ----------------------------------------------------------------------------------------------------------
def trained_on(monkeypatch, **flags):
    """What each epoch's images were labelled: [{image: target}] of the epochs of a run."""
    seen, original = [], study.update

    def update(network, optimizer, images, targets, task):
        seen.extend((image.numpy().tobytes(), target.tolist()) for image, target in zip(images, targets))
        return original(network, optimizer, images, targets, task)

    monkeypatch.setattr(study, "update", update)
    run(**flags)
    n = TINY["num_images"]
    return [dict(seen[i : i + n]) for i in range(0, len(seen), n)]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_labels_are_permuted_among_the_same_images_when_they_should_be(task, monkeypatch):
    epochs = trained_on(monkeypatch, task=task, epochs=5, shuffle_every_epochs=2)
    assert len(epochs) == 5 and all(len(epoch) == 64 for epoch in epochs)
    for a, b in zip(epochs, epochs[1:]):
        assert a.keys() == b.keys() and sorted(map(str, a.values())) == sorted(map(str, b.values()))
    same = [a == b for a, b in zip(epochs, epochs[1:])]
    assert same == [True, False, True, False]
    moved = sum(epochs[0][image] != epochs[2][image] for image in epochs[0])
    assert 45 <= moved <= 64  # 9 in 10 labels of a random permutation are others


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_relabelled_classes_stay_together(task, monkeypatch):
    """Two images share a label in every epoch or in none; the labels are the same ten."""
    epochs = trained_on(monkeypatch, task=task, targets="relabelled")
    renamed = []
    for old, new in zip(epochs, epochs[1:]):
        assert old.keys() == new.keys()
        pairs = {(str(old[image]), str(new[image])) for image in old}
        before, after = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
        assert len(before) == len(after) == len(pairs) <= 10
        renamed.append(sum(a != b for a, b in pairs))
    assert all(count >= 5 for count in renamed)


def test_fixed_labels_never_move(monkeypatch):
    epochs = trained_on(monkeypatch, targets="fixed", shuffle_every_epochs=study.Args.shuffle_every_epochs)
    assert epochs[0] == epochs[1] == epochs[2]


def test_loss_and_accuracy_by_hand():
    network = nn.Linear(2, 3, bias=False)
    network.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    forward, optimizer = lambda x: (network(x), {}), torch.optim.SGD(network.parameters(), 0.5)
    images, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 2])
    loss, right = study.update(forward, optimizer, images, targets, "classification")
    expected = -(2 - np.log(np.exp(2) + 2) + 0 - np.log(np.e + 2)) / 2
    assert right == 1 and loss == pytest.approx(expected)
    network.weight.data = torch.zeros(3, 2)
    numbers = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    loss, right = study.update(forward, optimizer, images, numbers, "regression")
    assert loss == pytest.approx(1) and right == pytest.approx(0)
    # gradient of the mean over 6 numbers: -2 (target) x / 6
    assert network.weight.tolist() == [[pytest.approx(0.5 * 2 * 2 / 6), 0], [pytest.approx(0.5 * 2 * 2 / 6), 0],
                                       [0, pytest.approx(0.5 * 2 * 2 / 6)]]  # fmt: skip


# --- Data -------------------------------------------------------------------------------------------------------------
def pickled(images, labels):
    """A batch of CIFAR-10 as Python 2 has pickled it, opcode by opcode: {"data": (n, 3072) uint8, "labels": [...]}."""
    n, content = len(images), images.tobytes()

    def text(string):
        return b"U" + bytes([len(string)]) + string

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array += b"(K\x01K" + bytes([n]) + b"M\x00\x0c\x86" + dtype + b"\x89T" + struct.pack("<i", len(content)) + content
    array += b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def write_cifar(path, batches):
    with tarfile.open(path, "w:gz") as archive:
        for i, content in enumerate(batches, start=1):
            info = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{i}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_idx(folder, images, labels):
    Path(folder).mkdir()
    for part, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
        Path(folder, f"train-{part}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


def test_reading_cifar():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(40, 3072), dtype=np.uint8), rng.integers(10, size=40).tolist()
    write_cifar("cifar-10-python.tar.gz", [pickled(images[:20], labels[:20]), pickled(images[20:], labels[20:])])
    name, read, numbers = study.load_data("cifar-10-python.tar.gz", 30)
    assert name == "CIFAR-10" and read.shape == (30, 3, 32, 32) and numbers.tolist() == labels[:30]
    assert read[25, 2, 1, 5] == images[25, 2 * 1024 + 32 + 5]
    run_dir = run(data="cifar-10-python.tar.gz", num_images=40)
    assert json.loads((run_dir / "summary.json").read_text())["data"] == "CIFAR-10"


def test_a_pickle_runs_nothing():
    evil = b"\x80\x02cposix\nsystem\n(U\x0ctouch hackedtR."
    for content in (evil, evil.replace(b"posix", b"numpy.os"), b"cnumpy\nload\n(U\x01xtR."):
        write_cifar("evil.tar.gz", [content])
        with pytest.raises(Exception, match="it contains"):
            study.load_data("evil.tar.gz", 1)
    assert os.listdir() == ["evil.tar.gz"]


def test_reading_idx():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(70, 9, 8), dtype=np.uint8), rng.integers(10, size=70, dtype=np.uint8)
    write_idx("fashion", images, labels)
    name, read, numbers = study.load_data("fashion", 64)
    assert name == "fashion" and torch.equal(read[:, 0], torch.tensor(images[:64])) and read.shape == (64, 1, 9, 8)
    assert numbers.tolist() == labels[:64].tolist()
    assert json.loads((run(data="fashion") / "summary.json").read_text())["data"] == "fashion"


def test_data_is_found_where_debian_puts_it(monkeypatch):
    images, labels = np.zeros((64, 8, 8), np.uint8), np.arange(64, dtype=np.uint8) % 10
    write_idx("fashion-mnist", images, labels)
    monkeypatch.setattr(study, "FASHION_MNIST", Path("nowhere"))
    assert study.load_data("auto", 64)[0] == "synthetic"
    monkeypatch.setattr(study, "FASHION_MNIST", Path("fashion-mnist"))
    assert study.load_data("auto", 64)[0] == "fashion-mnist"
    _, images, labels = study.load_data("synthetic", 500)
    assert torch.equal(images, study.load_data("synthetic", 500)[1]) and len(set(labels.tolist())) == 10
    assert images.shape == (500, 1, 28, 28) and images.float().std() > 20


# --- Runs -------------------------------------------------------------------------------------------------------------
def test_a_run_and_its_twin():
    first, second, other = run(**REDO), run(**REDO), run(**REDO, seed=2)
    logged = scalars(first)
    assert logged == scalars(second) and logged != scalars(other)
    for layer in ("conv1", "conv2", "conv3", "dense", "all"):
        for tau in (0, 0.025, 0.1):
            assert list(logged[f"dormant_ratio_tau{tau}/{layer}"]) == [0, 1, 2, 3]
    assert list(logged["charts/accuracy"]) == list(logged["losses/train"]) == [1, 2, 3]
    assert logged["charts/gradient_steps"] == {1: 2, 2: 4, 3: 6}
    description, summary = (json.loads((first / f"{name}.json").read_text()) for name in ("args", "summary"))
    assert description["script"] == "redo_supervised" and description["action_repeat"] == 1
    assert description["args"]["seed"] == 1 and description["data"] == summary["data"] == "synthetic"
    assert first.name.startswith("redo_supervised__redo_supervised__1__") and first != second
    assert summary["charts/accuracy"] == pytest.approx(logged["charts/accuracy"][3])


def test_redo_changes_neither_batches_nor_permutations(monkeypatch):
    plain, redo = trained_on(monkeypatch), trained_on(monkeypatch, **REDO)
    assert plain == redo


def test_the_measurement_at_the_end_of_an_epoch_comes_before_recycling():
    """Else a period of one epoch would always show a network that has just been recycled."""
    plain, redo = scalars(run()), scalars(run(**REDO | dict(redo_tau=0.5)))
    tag = "dormant_ratio_tau0.1/all"
    assert redo[tag][1] == plain[tag][1] > 0 and redo["redo_recycled/all"][1] == 0
    assert redo["redo_recycled/all"][2] > 20 and redo["losses/train"][2] != plain["losses/train"][2]


def test_a_shorter_last_batch_counts_by_its_images(monkeypatch):
    losses, update = [], study.update

    def watched(network, optimizer, images, *rest):
        loss, right = update(network, optimizer, images, *rest)
        losses.append(float(loss) * len(images))
        return loss, right

    monkeypatch.setattr(study, "update", watched)
    logged = scalars(run(num_images=40))["losses/train"]  # batches of 32 and 8
    assert logged == pytest.approx({1 + i: sum(losses[2 * i : 2 * i + 2]) / 40 for i in range(3)}, rel=1e-5)


CHANGES = [
    dict(targets="relabelled"),
    dict(seed=2), dict(data="idx"), dict(num_images=63), dict(task="regression"),
    dict(targets="fixed", shuffle_every_epochs=20), dict(shuffle_every_epochs=2), dict(epochs=4), dict(batch_size=16),
    dict(learning_rate=0.02), dict(momentum=0.5), dict(downsampling="pool"), dict(init="lecun"), dict(normalise=True),
    dict(dormant_batch_size=31), dict(redo=True, redo_batch_size=32, redo_period_gradient_steps=2),
    REDO | dict(redo_tau=0.5), REDO | dict(redo_period_gradient_steps=3), REDO | dict(redo_batch_size=16),
]  # fmt: skip


def test_every_flag_changes_something():
    rng = np.random.default_rng(0)
    write_idx("idx", rng.integers(256, size=(64, 28, 28), dtype=np.uint8), rng.integers(10, size=64, dtype=np.uint8))
    outcomes = [scalars(run(**change)) for change in [{}, *CHANGES]]
    for i, outcome in enumerate(outcomes):
        assert outcome not in outcomes[:i], CHANGES[i - 1]
    flags = {name for change in CHANGES for name in change}
    assert flags >= {field for field in study.Args.__dataclass_fields__} - {"exp_name", "device"}


def test_streams_of_random_numbers_differ(monkeypatch):
    seeds, original = [], study.derived_seed

    def derived_seed(*numbers):
        seeds.append(original(*numbers))
        return seeds[-1]

    monkeypatch.setattr(study, "derived_seed", derived_seed)
    run()
    run(seed=2)
    streams = set(seeds)
    assert len(streams) == len(seeds) - 1 >= 13  # the synthetic images are the same for every seed
    draws = {torch.rand(1, generator=generator(seed)).item() for seed in streams}
    assert len(draws) == len(streams) and max(streams) < 2**32


def test_the_targets_of_a_regression_have_mean_0_and_variance_1(monkeypatch):
    """So that 1 - loss is the share of their variance that is explained."""
    seen, update = [], study.update

    def watched(forward, optimizer, images, targets, task):
        seen.append(targets)
        return update(forward, optimizer, images, targets, task)

    monkeypatch.setattr(study, "update", watched)
    logged = scalars(run(task="regression"))
    codes = torch.cat(seen).unique(dim=0)
    assert codes.shape == (10, 10)
    assert codes.mean().abs() < 1e-5 and codes.var(correction=0) == pytest.approx(1, abs=1e-5)
    assert logged["charts/explained"] == pytest.approx({k: 1 - v for k, v in logged["losses/train"].items()}, abs=1e-6)


# --- Mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, message", [
    (dict(seed=-1), "--seed -1: must lie between 0 and 4294967295"),
    (dict(learning_rate=float("nan")), "--learning-rate nan: must lie between 0"),
    (dict(learning_rate=float("inf")), "--learning-rate inf: must lie between 0"),
    (dict(momentum=1.5), "--momentum 1.5: must lie between 0 and 1"),
    (dict(redo=True, redo_tau=-0.1), "--redo-tau -0.1: must lie between 0"),
    (dict(epochs=0), "--epochs 0: must lie between 1"),
    (dict(batch_size=65), "--batch-size 65: must be at most --num-images 64"),
    (dict(dormant_batch_size=65), "--dormant-batch-size 65: must be at most --num-images 64"),
    (dict(REDO, redo_batch_size=65), "--redo-batch-size 65: must be at most --num-images 64"),
    (dict(redo_tau=0.2), "--redo-tau 0.2: has no effect without --redo"),
    (dict(targets="fixed"), "--shuffle-every-epochs 1: has no effect with --targets fixed"),
    (dict(shuffle_every_epochs=3), "--shuffle-every-epochs 3: must be less than --epochs 3"),
    (dict(shuffle_every_epochs=20, epochs=20), "--shuffle-every-epochs 20: must be less than --epochs 20"),
    (dict(REDO, redo_period_gradient_steps=40), "--redo-period-gradient-steps 40: the run has only 6"),
    (dict(REDO, redo_period_gradient_steps=7), "--redo-period-gradient-steps 7: the run has only 6"),
    (dict(exp_name="a/b"), "--exp-name a/b: is no name for a folder"),
    (dict(exp_name="x" * 300), "cannot create the folder"),
    (dict(data="nowhere"), "--data nowhere: cannot be read: [Errno 2] No such file or directory"),
    (dict(data="corrupt.tar.gz"), "--data corrupt.tar.gz: cannot be read: "),
    (dict(data="cut.tar.gz"), "--data cut.tar.gz: cannot be read: "),
    (dict(data="empty.tar.gz"), "--data empty.tar.gz: cannot be read: "),
    (dict(data="folder"), "--data folder: cannot be read: "),
    (dict(data="eleven"), "--data eleven: cannot be read: it does not contain pictures of bytes"),
    (dict(data="unequal"), "--data unequal: cannot be read: it does not contain pictures of bytes"),
    (dict(data="few"), "--num-images 64: few has only 20 images"),
], ids=lambda value: " ".join(map(str, value.values()))[:30] if isinstance(value, dict) else "")  # fmt: skip
def test_mistakes_end_with_one_line(flags, message, capsys):
    Path("corrupt.tar.gz").write_bytes(b"no archive")
    write_cifar("empty.tar.gz", [])
    write_cifar("whole.tar.gz", [pickled(np.random.default_rng(0).integers(256, size=(64, 3072), dtype=np.uint8), [1])])
    Path("cut.tar.gz").write_bytes(Path("whole.tar.gz").read_bytes()[:5000])
    Path("folder").mkdir()
    write_idx("eleven", np.zeros((64, 8, 8), np.uint8), np.full(64, 10, np.uint8))
    write_idx("unequal", np.zeros((64, 8, 8), np.uint8), np.zeros(63, np.uint8))
    write_idx("few", np.zeros((20, 8, 8), np.uint8), np.zeros(20, np.uint8))
    with pytest.raises(SystemExit) as stopped:
        run(**flags)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1
    assert not list(Path().glob("runs/*"))


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(learning_rate=1e9, downsampling="pool")
    printed = capsys.readouterr().err
    assert stopped.value.code == 1 and "the loss is no longer finite in epoch" in printed and printed.count("\n") == 1
    assert not list(Path().glob("runs/*/summary.json"))


def test_the_command_line_of_a_copy_in_an_empty_folder():
    Path("copy").mkdir()
    Path("copy/mine.py").write_text((ROOT / "studies" / "redo_supervised.py").read_text())
    flags = (
        "--data synthetic --num-images 32 --epochs 1 --batch-size 16 --dormant-batch-size 16 --targets fixed".split()
    )
    command = [sys.executable, "mine.py", *flags]
    done = subprocess.run(command, cwd="copy", capture_output=True, text=True)
    assert done.returncode == 0 and "of the neurons are dormant" in done.stdout, done.stderr
    (run_dir,) = Path("copy/runs").iterdir()
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"args", "mine", "summary", "events"}
