"""Times one gradient step of drqv2_plasticity.py beside the official DrQ-v2's, and compares their numbers.

    git clone https://github.com/facebookresearch/drqv2
    python benchmark/drqv2_plasticity/peer.py drqv2 --out runs/figures/drqv2_peer

All get the same weights, batch and random numbers, each in a process of its own (ours keeps the memory that it frees),
and take turns. Official: agent.update on a batch of NumPy arrays, augmentation and metrics included; ours: random_shift
and update on a batch of tensors. Drawing the batch from the replay is in neither.
"""

import argparse
import csv
import multiprocessing
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import drqv2_plasticity as drq

STDDEV, ACTION_DIM = 0.5, 6


def load_official(folder: str, action_dim: int, device: str):
    """The official agent from a clone of its repository; Hydra, which only its main program needs, is left out."""
    for name in ("hydra", "omegaconf"):
        sys.modules.setdefault(name, types.SimpleNamespace(OmegaConf=None))
    sys.path.insert(0, folder)
    import drqv2

    return drqv2.DrQV2Agent((9, 84, 84), (action_dim,), device, 1e-4, 50, 1024, 0.01, 2000, 1, str(STDDEV), 0.3, True)


def make_ours(official, action_dim, device, **options) -> tuple:
    """Our agent with the official one's weights -> agent, optimizers, arguments."""
    args = drq.Args(learning_rate=1e-4, feature_dim=50, **options)
    agent = drq.DrQv2Agent(action_dim, args)
    for ours, theirs in (
        (agent.encoder, official.encoder), (agent.actor, official.actor), (agent.critic, official.critic),
        (agent.critic_target, official.critic_target),
    ):  # fmt: skip
        ours.load_state_dict({k.replace("Q", "q"): v for k, v in theirs.state_dict().items()})
    agent.to(device, memory_format=torch.channels_last)
    return agent, drq.make_optimizers(agent, args, torch.device(device)), args


# A variant's name -> the flags of our script; official: none
VARIANTS = {
    "official": None,
    "ours, float32": dict(precision="float32"),
    "ours, tf32, GPU": dict(precision="tf32"),
    "ours, bfloat16": dict(precision="bfloat16"),
    "ours, float32, GPU, captured": dict(precision="float32", cudagraphs=True),
    "ours, bfloat16, GPU, captured": dict(precision="bfloat16", cudagraphs=True),
}


def serve(build, name: str, options, connection) -> None:
    """The process of one variant: takes a step whenever it is sent a seed -> seconds, what is compared (numbers)."""
    torch.manual_seed(0)
    step = build(name, options)
    for seed in iter(connection.recv, None):
        torch.manual_seed(seed)
        start = time.perf_counter()
        losses = [float(x) for x in step()]
        connection.send((time.perf_counter() - start, losses))


def compare(build, variants, options) -> None:
    """Times the step of each variant, build(name, options), in turn; prints, and writes options.out.csv."""
    left_out = ["GPU"] * (options.device == "cpu") + ["bfloat16"] * options.no_bfloat16
    processes = multiprocessing.get_context("spawn")
    connections = {}
    for name in variants:
        if not any(word in name for word in left_out):
            connections[name], other_end = processes.Pipe()
            processes.Process(target=serve, args=(build, name, options, other_end), daemon=True).start()
            other_end.close()
    seconds = {name: [] for name in connections}
    for repeat in range(options.repeats + 1):
        losses = {}
        for name, connection in connections.items():
            connection.send(repeat)
            duration, losses[name] = connection.recv()
            if repeat:  # the first one warms up
                seconds[name].append(duration)
        print(f"step {repeat}:", {k: [f"{x:.5f}" for x in v] for k, v in losses.items()}, flush=True)
    for connection in connections.values():
        connection.send(None)
    rows = []
    for name, times in seconds.items():
        ratios = np.array(seconds["official"]) / times
        rows.append({"variant": name, "seconds": np.median(times), "fastest": min(times), "slowest": max(times),
                     "ratio": np.median(ratios),
                     "lowest ratio": min(ratios), "highest ratio": max(ratios)})  # fmt: skip
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}, batch {options.batch_size}, {options.repeats} repeats; medians")
    for row in rows:
        print(f"{row['variant']:26s} {row['seconds']:.4f} s   {row['ratio']:.2f} times the official speed "
              f"({row['lowest ratio']:.2f} to {row['highest ratio']:.2f})")  # fmt: skip
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{options.out}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.4g}" if not isinstance(v, str) else v for k, v in row.items()} for row in rows)


def parse(description: str, what: str):
    """The command line of a comparison with a clone of the official repository."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("official", help=f"a clone of {what}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-bfloat16", action="store_true", help="for CPUs without instructions for it")
    parser.add_argument("--out", help="write <out>.csv")
    return parser.parse_args()


def random_batch(size: int, action_dim: int, device: str) -> tuple:
    """A batch as the official loader gives it, NumPy arrays, and the same as tensors: obs, action, reward, discount,
    next_obs; reward and discount (batch, 1)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, size, 9, 84, 84), dtype=np.uint8)
    action = rng.uniform(-1, 1, (size, action_dim)).astype(np.float32)
    reward, discount = rng.uniform(size=(size, 1)).astype(np.float32), np.full((size, 1), 0.970299, np.float32)
    arrays = [images[0], action, reward, discount, images[1]]
    return arrays, [torch.from_numpy(x).to(device) for x in arrays]


def build(name: str, options):
    device = torch.device(options.device)
    official = load_official(options.official, ACTION_DIM, options.device)
    arrays, (obs, action, reward, discount, next_obs) = random_batch(options.batch_size, ACTION_DIM, options.device)
    if name == "official":

        def step():
            metrics = official.update(iter([arrays]), 0)
            return metrics["critic_loss"], metrics["actor_loss"]

        return step

    agent, optimizers, args = make_ours(official, ACTION_DIM, device, **VARIANTS[name])
    drq.set_precision(args.precision, device)
    learn = partial(drq.update, agent, optimizers, args)
    if args.cudagraphs:
        learn = drq.capture(learn, optimizers)

    def step():
        batch = [drq.random_shift(obs, 4), action, reward[:, 0], discount[:, 0], drq.random_shift(next_obs, 4)]
        metrics = learn([*batch, torch.full((), STDDEV, device=device)])
        return metrics["losses/critic"], metrics["losses/actor"]

    return step


if __name__ == "__main__":
    compare(build, VARIANTS, parse(__doc__, "facebookresearch/drqv2"))
