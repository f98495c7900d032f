# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
# ]
# ///
"""Targets that change make neurons dormant: Fig. 3 of The Dormant Neuron Phenomenon in Deep Reinforcement Learning
(Sokar, Agarwal, Castro, Evci; ICML 2023, arXiv 2302.12902).

Is it the changing targets of deep RL that silence neurons? Supervised learning can tell, since there the images stay
while the targets change: 10,000 labelled images are learned for 100 epochs, and every 20 the labels are shuffled.
Score of neuron i of a layer with H neurons, on a batch D of images (Eq. 1):                          -> `dormant_score`
    s_i = E_D |h_i(x)| / ( 1/H sum_k E_D |h_k(x)| )      h: after the activation function; a feature map is one neuron
A neuron is tau-dormant if s_i <= tau (Definition 3.1). The figure shows the share of dormant neurons in all hidden
layers at tau = 0, the mean of 3 seeds: with fixed labels it falls from 9% to 0.7%; each time the labels are shuffled it
jumps, to 29, 41, 39 and 44%, falls a little after that, and ends at 32%.                                     -> `train`
ReDo (Algorithm 1), every 40 gradient steps (it is not in this figure):                                     -> `recycle`
    of every tau-dormant neuron: re-draw the incoming weights from the initial distribution, zero the outgoing ones

    SCALE=paper bash benchmark/redo_dqn_atari/supervised_fig3.sh    the figure, with ReDo: see README.md beside it
    python studies/redo_supervised.py                               labels permuted among the images
    python studies/redo_supervised.py --targets relabelled --redo   labels permuted among the classes, with ReDo

What is the paper's: CIFAR-10, 10,000 images, 100 epochs, a change every 20, 3 convolutions and 1 dense layer, SGD,
cross-entropy. There is no public code for this figure; what we could not recover is our choice:
 1. How labels are shuffled: among the images, so that from then on they are noise that can only be learned by heart, or
    among the classes (--targets relabelled), so that they can be learned as well as before.
 2. The network: 3 x 3 convolutions with 32, 64 and 64 channels and a dense layer of 128 units, at learning rate 0.01,
    momentum 0.9 and batches of 256. Each convolution halves height and width, by its stride or by pooling afterwards
    (--downsampling). What initial weights, the images' scale and the batch size change: see that README.md.
 3. The images: the first 10,000 training images of CIFAR-10, or of any other set of 10 classes (--data). Without --data
    it is Fashion-MNIST, if Debian's package dataset-fashion-mnist is installed, or else 10 blurred patterns.
 4. Scores are taken over the same 1000 images in every epoch, before the first and after each one.
 5. ReDo's period is one epoch; it acts after the scores are measured, so they show what an epoch of learning has left.
    Its tau and batch are those of the paper's Atari experiments. The optimizer forgets the momentum of the weights
    that ReDo changes, but, as in the official code, not that of the biases.
 6. Regression (--task regression) is ours altogether: we know of no definition in the paper. Every class has 10 random
    numbers as its target, and the loss is the mean squared error. It shows whether the loss matters.
"""

import gzip
import io
import json
import math
import os
import pickle
import shutil
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

Count = Annotated[int, (1, 10**9)]  # (lowest, highest) value; check_args refuses any other
NonNegative = Annotated[float, (0, 1e9)]


@dataclass
class Args:
    """Supervised learning with targets that change, and ReDo."""

    exp_name: str = "redo_supervised"  # name of this experiment, part of the run folder's name
    seed: Annotated[int, (0, 2**32 - 1)] = 1  # seeds weights, batches, permutations, scored images and ReDo
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute; auto: the GPU, if there is one

    # data
    data: str = "auto"  # cifar-10-python.tar.gz, a folder of *-ubyte.gz, synthetic; auto: Fashion-MNIST, else synthetic
    num_images: Annotated[int, (1, 60_000)] = 10_000  # the first images of the training set
    task: Literal["classification", "regression"] = "classification"  # regression (ours): on 10 random numbers a class
    targets: Literal["fixed", "shuffled", "relabelled"] = "shuffled"  # labels permuted among images, or among classes
    shuffle_every_epochs: Count = 20  # epochs between these changes

    # learning
    epochs: Count = 100  # passes over the images
    batch_size: Count = 256  # images per gradient step
    learning_rate: NonNegative = 0.01  # SGD's
    momentum: Annotated[float, (0, 1)] = 0.9  # SGD's
    downsampling: Literal["stride", "pool"] = "stride"  # of the convolutions: by a stride of 2, or 2 x 2 max-pooling
    init: Literal["xavier", "lecun", "torch"] = "torch"  # of the weights: Glorot uniform, LeCun normal, PyTorch's own
    normalise: bool = False  # pixels with mean 0 and variance 1 in each channel; without: between 0 and 1

    # dormant neurons
    dormant_batch_size: Count = 1000  # images that the logged scores are taken over
    redo: bool = False  # recycle dormant neurons
    redo_tau: NonNegative = 0.1  # recycle neurons with a score of at most this
    redo_period_gradient_steps: Count = 40  # gradient steps between recyclings; 40 are an epoch
    redo_batch_size: Count = 64  # images that the scores are taken over for recycling


SCRIPT = "redo_supervised"
CLASSES, TAUS = 10, (0, 0.025, 0.1)
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


# === Data =============================================================================================================
class ArrayUnpickler(pickle.Unpickler):
    """Unpickles plain Python and NumPy arrays, as CIFAR-10's files contain them, and nothing else: no code runs."""

    allowed = {"_reconstruct": np.zeros(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}

    def find_class(self, module, name):
        if module.split(".")[0] != "numpy" or name not in self.allowed:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return self.allowed[name]


def read_cifar(path: Path, num_images: int) -> tuple:
    """CIFAR-10's archive for Python -> its first images (num_images, 3, 32, 32) uint8 and labels (num_images,)."""
    images, labels = [], []
    with tarfile.open(path, "r:gz") as archive:
        for i in range(1, 6):
            if len(labels) < num_images:
                content = archive.extractfile(f"cifar-10-batches-py/data_batch_{i}").read()
                batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
                images.append(np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32))
                labels.extend(batch[b"labels"])
    return np.concatenate(images)[:num_images], np.array(labels)[:num_images]


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in MNIST's format: 0, 0, 8 (bytes), the number of axes, their lengths, the content."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is no file of bytes in MNIST's format")
    start = 4 + 4 * content[3]
    return np.frombuffer(content, np.uint8, offset=start).reshape(np.frombuffer(content[4:start], ">i4"))


def synthetic_images(num_images: int) -> tuple:
    """10 blurred patterns, each image one of them, moved by up to 4 pixels and noisy -> (num_images, 1, 28, 28) uint8
    and labels (num_images,). The same images for every seed."""
    rng = torch.Generator().manual_seed(derived_seed(0, 3))
    patterns = F.interpolate(torch.rand(CLASSES, 1, 6, 6, generator=rng), (36, 36), mode="bicubic")
    labels = torch.randint(CLASSES, (num_images,), generator=rng)
    images = torch.randn(num_images, 1, 28, 28, generator=rng) * 0.2
    for image, label, (x, y) in zip(images, labels, torch.randint(9, (num_images, 2), generator=rng)):
        image += patterns[label, :, x : x + 28, y : y + 28]
    return (images.clamp(0, 1) * 255).byte().numpy(), labels.numpy()


def load_data(data: str, num_images: int) -> tuple:
    """--data -> the set's name, its first images (num_images, channels, height, width) uint8, labels (num_images,)."""
    path = Path(data)
    if data == "auto":
        path = FASHION_MNIST if FASHION_MNIST.exists() else Path("synthetic")
    if str(path) == "synthetic":
        name, (images, labels) = "synthetic", synthetic_images(num_images)
    elif path.is_dir():
        images, labels = (read_idx(path / f"train-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
        name, images, labels = path.resolve().name, images[:num_images, None], labels[:num_images]
    else:
        name, (images, labels) = "CIFAR-10", read_cifar(path, num_images)
    pictures = images.ndim == 4 and images.dtype == np.uint8 and min(images.shape[2:]) >= 8
    if not pictures or labels.shape != images.shape[:1] or not 0 <= labels.min() <= labels.max() < CLASSES:
        raise ValueError("it does not contain pictures of bytes, 8 x 8 or larger, each with a label from 0 to 9")
    return name, torch.tensor(images), torch.tensor(labels, dtype=torch.int64)


def derived_seed(*numbers: int) -> int:
    """A seed derived from numbers: the run's seed, what it is for (0 training, 1 evaluation, 2 a stream of random
    numbers), and which one of these. Below 2**32, because torch's CPU generators ignore all higher bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# === Network ==========================================================================================================
def initial_weight(layer: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """A new weight for a layer, on the CPU. The layer's attribute `init` draws it, a function like those of nn.init; a
    layer without one gets PyTorch's default, uniform within 1 / sqrt(fan_in)."""
    draw = getattr(layer, "init", partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
    return draw(torch.empty(layer.weight.shape), generator=generator)


def lecun_normal_(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal, of variance 1 / fan_in, cut off at 2 standard deviations."""
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566  # of the normal distribution before it is cut off
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


INITS = dict(xavier=nn.init.xavier_uniform_, torch=partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
INITS["lecun"] = lecun_normal_


class ConvNet(nn.Module):
    """Convolutions of 32, 64 and 64 channels, a dense layer of 128 units, a head. Biases start at 0.

    forward(images (batch, channels, height, width)) -> outputs (batch, 10), {layer: activation after its ReLU}.
    """

    def __init__(self, image_shape, downsampling, init, generator):
        super().__init__()
        self.pool = downsampling == "pool"
        self.layers = nn.ModuleDict()
        channels, height, width = image_shape
        for i, out in enumerate((32, 64, 64), start=1):
            self.layers[f"conv{i}"] = nn.Conv2d(channels, out, 3, stride=1 if self.pool else 2, padding=1)
            channels = out
            odd = 0 if self.pool else 1  # pooling drops the last row of an odd number of rows
            height, width = (height + odd) // 2, (width + odd) // 2
        self.layers["dense"] = nn.Linear(channels * height * width, 128)
        self.layers["head"] = nn.Linear(128, CLASSES)
        for layer in self.layers.values():
            layer.init = INITS[init]
            layer.weight.data.copy_(initial_weight(layer, generator))
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        activations = {}
        for name in ("conv1", "conv2", "conv3"):
            x = activations[name] = F.relu(self.layers[name](x))
            if self.pool:
                x = F.max_pool2d(x, 2)
        activations["dense"] = F.relu(self.layers["dense"](x.flatten(1)))
        return self.layers["head"](activations["dense"]), activations

    def recyclable(self) -> list:
        """[(layer, [the layers that read it])], in the order of the activations, as `recycle` wants them."""
        layers = list(self.layers.values())
        return [(layer, [reader]) for layer, reader in zip(layers[:-1], layers[1:])]


# === Dormant neurons (Section 3) ======================================================================================
def dormant_score(activation: torch.Tensor) -> torch.Tensor:
    """Sokar et al. 2023, Eq. 1: each neuron's mean |activation| over batch and positions, divided by the layer's mean.

    activation (batch, neurons) or (batch, channels, height, width), after the non-linearity -> (neurons,), of mean 1;
    all 0 when the whole layer is silent, all NaN when an activation is not finite. Flatten tokens into the batch.
    """
    mean = activation.abs().float().mean([0, *range(2, activation.dim())])
    average = mean.mean()
    return torch.where(average.isfinite(), mean / average.clamp_min(torch.finfo(torch.float32).tiny), math.nan)


def dormant_share(score: torch.Tensor, tau: float) -> torch.Tensor:
    """The share of neurons with a score of at most tau, 0-d; NaN when a score is."""
    return torch.where(score.isfinite().all(), (score <= tau).float().mean(), math.nan)


@torch.no_grad()
def dormant_ratios(network, x) -> dict:
    """The shares of tau-dormant neurons (Definition 3.1) on inputs x, by layer and over all of them -> metrics."""
    _, activations = network(x)
    scores = {name: dormant_score(h) for name, h in activations.items()}
    scores["all"] = torch.cat(list(scores.values()))
    metrics = {}
    for name, score in scores.items():
        for tau in TAUS:
            metrics[f"dormant_ratio_tau{tau:g}/{name}"] = dormant_share(score, tau)
    return metrics


# === ReDo (Section 4) =================================================================================================
def forget(optimizer, parameter, mask) -> None:
    """Zeroes what an optimizer remembers of a parameter's elements, in place; mask (broadcastable to it) bool."""
    for value in optimizer.state.get(parameter, {}).values():
        if value.shape == parameter.shape:
            value.masked_fill_(mask, 0)


@torch.no_grad()
def recycle(layers, activations, optimizer, tau, generator) -> list:
    """ReDo (Sokar et al. 2023, Algorithm 1) for any network, in place -> per layer what was recycled, (neurons,) bool.

    layers: [(linear layer or convolution, [the layers that read it])]. activations: one for each of these, after its
    non-linearity, on the same batch, (batch, neurons) or (batch, channels, height, width). All incoming weights are
    drawn before outgoing ones become 0, so a weight between two recycled neurons ends as 0. The optimizer (Adam, SGD)
    forgets its averages of these weights; as in the official code, not those of the biases, which become 0.
    A reader's inputs must be exactly the layer's neurons (maps flattened channel by channel): no concatenation, groups
    or norm in between. generator: a CPU generator; for weights that are not PyTorch's default see `initial_weight`.
    """
    scores = [dormant_score(activation) for activation in activations]
    finite = torch.cat(scores).isfinite().all()  # else nothing is recycled
    masks = [(score <= tau) & finite for score in scores]
    for (layer, _), mask in zip(layers, masks):
        fresh = initial_weight(layer, generator).to(layer.weight)
        rows = mask.view(-1, *[1] * (fresh.dim() - 1))
        layer.weight.copy_(torch.where(rows, fresh, layer.weight))
        forget(optimizer, layer.weight, rows)
        if layer.bias is not None:
            layer.bias.masked_fill_(mask, 0)
    for (_, readers), mask in zip(layers, masks):
        for reader in readers:
            positions = reader.weight.shape[1] // len(mask)  # a dense layer reads height x width columns of a map
            columns = mask.repeat_interleave(positions).view(1, -1, *[1] * (reader.weight.dim() - 2))
            reader.weight.masked_fill_(columns, 0)
            forget(optimizer, reader.weight, columns)
    return masks


# === Learning =========================================================================================================
def update(network, optimizer, images, targets, task) -> tuple:
    """One gradient step -> its loss, and how many predictions were right; for regression, of which targets have mean 0
    and variance 1, the explained share of the variance times the batch size."""
    outputs = network(images)[0]
    if task == "classification":
        loss = F.cross_entropy(outputs, targets)
        right = (outputs.argmax(1) == targets).sum()
    else:
        loss = F.mse_loss(outputs, targets)
        right = (1 - loss.detach()) * len(images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), right


def train(args: Args) -> Path:
    """Trains, logs to a new folder under runs/, and returns that folder."""
    name, images, labels, device = check_args(args)
    torch.set_flush_denormal(True)  # on a CPU numbers too small for float32's normal range are slow
    # A stream of random numbers for each purpose, so that for instance ReDo does not change the batches
    purposes = ("weights", "batch", "shuffle", "measure", "redo", "targets")
    rng = {purpose: torch.Generator().manual_seed(derived_seed(args.seed, 2, i)) for i, purpose in enumerate(purposes)}

    images = images.float() / 255
    if args.normalise:
        std, mean = torch.std_mean(images, (0, 2, 3), keepdim=True)
        images = (images - mean) / std.clamp_min(1e-6)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    codes = torch.arange(CLASSES)  # the target of each class
    if args.task == "regression":
        codes = torch.randn(CLASSES, CLASSES, generator=rng["targets"])
        codes = (codes - codes.mean()) / codes.std(correction=0)
    targets = codes[labels].to(device)
    network = ConvNet(images.shape[1:], args.downsampling, args.init, rng["weights"])
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), args.learning_rate, args.momentum)
    measured = images[torch.randperm(args.num_images, generator=rng["measure"])[: args.dormant_batch_size]]

    run_dir, writer = start_run(args, name)
    start_time, gradient_steps = time.time(), 0
    log(writer, 0, dormant_ratios(network, measured))
    for epoch in range(args.epochs):
        if args.targets != "fixed" and epoch and epoch % args.shuffle_every_epochs == 0:
            if args.targets == "shuffled":
                labels = labels[torch.randperm(args.num_images, generator=rng["shuffle"])]
            else:
                labels = torch.randperm(CLASSES, generator=rng["shuffle"])[labels]
            targets = codes[labels].to(device)

        # Recycle, learn
        loss_sum, right_sum, recycled = 0.0, 0.0, 0
        for index in torch.randperm(args.num_images, generator=rng["batch"]).split(args.batch_size):
            if args.redo and gradient_steps and gradient_steps % args.redo_period_gradient_steps == 0:
                probe = torch.randperm(args.num_images, generator=rng["redo"])[: args.redo_batch_size]
                _, activations = network(images[probe])
                masks = recycle(network.recyclable(), activations.values(), optimizer, args.redo_tau, rng["redo"])
                recycled += sum(int(mask.sum()) for mask in masks)
            loss, right = update(network, optimizer, images[index], targets[index], args.task)
            loss_sum, right_sum = loss_sum + loss * len(index), right_sum + right
            gradient_steps += 1

        # Measure, log
        metrics = dormant_ratios(network, measured) | {
            "losses/train": loss_sum / args.num_images, "charts/gradient_steps": gradient_steps,
            "charts/walltime": time.time() - start_time,
            "charts/accuracy" if args.task == "classification" else "charts/explained": right_sum / args.num_images,
        }  # fmt: skip
        if args.redo:
            metrics["redo_recycled/all"] = recycled
        log(writer, epoch + 1, metrics)
        if not math.isfinite(metrics["losses/train"]):
            writer.close()
            print(f"{SCRIPT}.py: the loss is no longer finite in epoch {epoch + 1}; log: {run_dir}", file=sys.stderr)
            raise SystemExit(1)

    writer.close()
    finish_run(run_dir, dict(data=name, epochs=args.epochs) | metrics)
    return run_dir


# === Housekeeping: arguments, files ===================================================================================
def refuse(flag: str, value: object, limit: str) -> None:
    """Ends the program because of a user's mistake: one line on stderr, exit code 2."""
    line = f"{SCRIPT}.py: error: --{flag.replace('_', '-')} {value}: {limit}"
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args) -> tuple:
    """Refuses what cannot work, before anything is written -> the data's name, images and labels, and the device."""
    for name, hint in get_type_hints(Args, include_extras=True).items():
        for low, high in getattr(hint, "__metadata__", ()):
            if not low <= getattr(args, name) <= high:
                refuse(name, getattr(args, name), f"must lie between {low} and {high}")
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = args.device if args.device != "auto" else "cuda" if here["cuda"] else "cpu"
    steps = args.epochs * math.ceil(args.num_images / args.batch_size)
    few, default = f"must be at most --num-images {args.num_images}", asdict(Args())
    late, rare = f"must be less than --epochs {args.epochs}", f"the run has only {steps}"
    for name, fine, limit in (
        ("batch_size", args.batch_size <= args.num_images, few),
        ("dormant_batch_size", args.dormant_batch_size <= args.num_images, few),
        ("redo_batch_size", args.redo_batch_size <= args.num_images or not args.redo, few),
        ("shuffle_every_epochs", args.targets != "fixed", "has no effect with --targets fixed"),
        ("shuffle_every_epochs", args.targets == "fixed" or args.shuffle_every_epochs < args.epochs, late),
        *((name, args.redo, "has no effect without --redo") for name in default if name.startswith("redo_")),
        ("redo_period_gradient_steps", not args.redo or args.redo_period_gradient_steps < steps, rare),
        ("exp_name", args.exp_name.isprintable() and not set(args.exp_name) & set("/*?["), "is no name for a folder"),
        ("device", here[device], "torch sees no such device here"),
    ):
        if not fine and (limit in (few, late, rare) or getattr(args, name) != default[name]):
            refuse(name, getattr(args, name), limit)
    try:
        name, images, labels = load_data(args.data, args.num_images)
    except Exception as error:
        refuse("data", args.data, "cannot be read: " + (" ".join(str(error).split()) or type(error).__name__))
    if len(images) < args.num_images:
        refuse("num_images", args.num_images, f"{name} has only {len(images)} images")
    return name, images, labels, torch.device(device)


def start_run(args: Args, data: str) -> tuple:
    """Creates the run's folder, with this script and args.json -> the folder, its TensorBoard writer."""
    from torch.utils.tensorboard import SummaryWriter

    run_dir = Path("runs") / f"{SCRIPT}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        refuse("exp_name", args.exp_name, f"cannot create the folder {run_dir} ({error.strerror})")
    shutil.copy(__file__, run_dir)
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
    description = dict(script=SCRIPT, action_repeat=1, data=data, args=asdict(args), versions=versions)
    (run_dir / "args.json").write_text(json.dumps(description, indent=2))
    return run_dir, SummaryWriter(str(run_dir))


def log(writer, epoch: int, metrics: dict) -> None:
    for tag, value in metrics.items():
        writer.add_scalar(tag, float(value), epoch)


def finish_run(run_dir: Path, summary: dict) -> None:
    """Writes summary.json, whole or not at all: with it the run counts as finished."""
    summary = {k: v if isinstance(v, str) else float(v) for k, v in summary.items()}
    (run_dir / "summary.tmp").write_text(json.dumps(summary, indent=2))
    os.replace(run_dir / "summary.tmp", run_dir / "summary.json")
    print(f"{run_dir}: {summary['dormant_ratio_tau0/all']:.1%} of the neurons are dormant (tau 0)")


if __name__ == "__main__":
    import tyro

    train(tyro.cli(Args))
