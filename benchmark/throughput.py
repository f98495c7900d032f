"""Speed and memory of the scripts: gradient steps per second by depth and variant, env steps per second by environment.

    python benchmark/throughput.py --out runs/figures/throughput            (CPU: 3 minutes; --help for smaller parts)

Every row runs in its own process: fixed work, warm-up and compilation excluded, device synchronised, the median of
several repeats. Peak memory is the process's (CPU) or the allocator's (GPU). Prints one table and writes it as CSV.
"""

import argparse
import csv
import multiprocessing
import os
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_deep as crl

VARIANTS = {
    "eager": {},
    "bfloat16": dict(amp=True),
    "compiled": dict(compile=True),
    "captured": dict(cudagraphs=True),
    "compiled + captured": dict(compile=True, cudagraphs=True),
}


def timed(work, repeats: int, device: str) -> list:
    """Seconds of each of `repeats` calls of work(), after one call that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def peak_resident_gb() -> float:
    """The largest resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure_update(depth, variant, options) -> dict:
    """crl_deep.update at the paper's width and batch, on the ant's dimensions; the actor at most 512 deep."""
    device = options.device
    args = crl.resolve_args(crl.Args(env_id="ant_big_maze", critic_depth=depth, actor_depth=min(depth, 512),
                                     device=device, **VARIANTS[variant]))  # fmt: skip
    agent = crl.Agent(29, 2, 8, args).to(device)
    if args.compile:
        for block in [m for m in agent.modules() if isinstance(m, crl.ResidualBlock)]:
            block.compile(dynamic=False)
    optimizers = crl.make_optimizers(agent, args, torch.device(device))
    replay = crl.Replay(1000, 512, 29, 8, 2, torch.device(device))
    replay.state.normal_()
    replay.action.uniform_(-1, 1)
    replay.size = 1000
    steps = max(3, options.work // depth)
    indices = replay.sample(steps, args.batch_size, 1000, args.gamma)
    step = crl.update
    if args.cudagraphs:
        captured = crl.capture_update(crl.update, agent, optimizers, replay.gather(*(x[0] for x in indices)), args)

    def work():
        for index in zip(*indices):
            batch = replay.gather(*index)
            captured(batch) if args.cudagraphs else step(agent, optimizers, batch, args)

    seconds = np.array(timed(work, options.repeats, device)) / steps
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else peak_resident_gb()
    return dict(what=f"update, depth {depth}", variant=variant, unit="gradient steps/s", rate=1 / np.median(seconds),
                slowest=1 / seconds.max(), fastest=1 / seconds.min(), ms=1e3 * np.median(seconds),
                peak_GB=peak)  # fmt: skip


def measure_environment(env_id, num_envs, options) -> dict:
    """Random actions in `num_envs` environments, resets included."""
    envs = crl.MujocoEnvs(env_id, num_envs, 1000, (1, 0))
    envs.reset(np.ones(num_envs, bool))
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (8, num_envs, envs.robot.action_dim)).astype(np.float32)
    steps = max(4, 20_000 // num_envs)

    def work():
        for i in range(steps):
            envs.reset(envs.step(actions[i % 8]))

    seconds = np.array(timed(work, options.repeats, "cpu")) / (steps * num_envs)
    return dict(what=env_id, variant=f"{num_envs} envs, {os.cpu_count()} threads", unit="env steps/s",
                rate=1 / np.median(seconds), slowest=1 / seconds.max(), fastest=1 / seconds.min(),
                ms=1e3 * np.median(seconds) * num_envs, peak_GB=peak_resident_gb())  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--depths", type=int, nargs="*", default=[4, 16, 64, 256])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, help="default: all (CUDA graphs: on a GPU only)")
    env_ids = ["point_u_maze", "ant", "ant_u4_maze", "ant_hardest_maze", "humanoid", "humanoid_u_maze"]
    parser.add_argument("--environments", nargs="*", default=env_ids)
    parser.add_argument("--num-envs", type=int, nargs="*", default=[512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=int, default=400, help="a repeat does this / depth gradient steps, at least 3")
    parser.add_argument("--out", help="write <out>.csv")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    variants = options.variants or [v for v in VARIANTS if cuda or "captured" not in v]
    jobs = [(measure_update, depth, variant) for depth in options.depths for variant in variants]
    jobs += [(measure_environment, env_id, n) for env_id in options.environments for n in options.num_envs]
    hardware = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(f"{hardware}, {os.cpu_count()} cores, torch {torch.__version__}\n", flush=True)
    rows = []
    header = ["what", "variant", "unit", "rate", "slowest", "fastest", "ms", "peak_GB"]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|", flush=True)
    for function, *arguments in jobs:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(function, *arguments, options).result()
        row = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        rows.append(row)
        print("| " + " | ".join(str(row[key]) for key in header) + " |", flush=True)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{options.out}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, header, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
