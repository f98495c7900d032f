"""Speed and memory of the scripts: gradient steps per second by network and variant, environment steps per second, and
agent steps per second of whole runs.

    python benchmark/throughput.py --out runs/figures/throughput            (--help for smaller parts)
    python benchmark/throughput.py --scripts drm --parts updates            (one script, its gradient steps alone)

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
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from plotting import load_runs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adaptive_rr as rr
import crl_deep as crl
import drm
import drqv2_plasticity as drq
import redo_dqn_atari as redo

VARIANTS = {
    "eager": {},
    "bfloat16": dict(precision="bfloat16"),
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
    device = torch.device(options.device)
    args = crl.Args(critic_depth=depth, actor_depth=min(depth, 512), device=options.device, **VARIANTS[variant])
    crl.set_precision(args.precision, device)
    agent = crl.Agent(29, 2, 8, args).to(device)
    optimizers = crl.adam_optimizers(agent, args, device)
    learn = partial(crl.update, agent, optimizers, args)
    if args.cudagraphs:
        learn = crl.capture(learn, optimizers)
    if args.compile:
        crl.compile_modules(*[module for module in agent.modules() if isinstance(module, crl.ResidualBlock)])
    replay = crl.Replay(1000, 512, 29, 2, 8, device)
    replay.state.normal_()
    replay.action.uniform_(-1, 1)
    replay.size = 1000
    steps = max(3, options.work // depth)
    indices = replay.sample(steps, args.batch_size, 1000, args.gamma)

    def work():
        for index in zip(*indices):
            learn(replay.gather(*index))

    return update_row(f"crl_deep, depth {depth}", variant, timed(work, options.repeats, options.device), steps,
                      options.device)  # fmt: skip


def update_row(what, variant, seconds, steps, device) -> dict:
    """One line of the table: `steps` gradient steps took `seconds`, once per repeat."""
    seconds = np.array(seconds) / steps
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else peak_resident_gb()
    return dict(what=what, variant=variant, unit="gradient steps/s", rate=1 / np.median(seconds),
                slowest=1 / seconds.max(), fastest=1 / seconds.min(), ms=1e3 * np.median(seconds),
                peak_GB=peak)  # fmt: skip


NETWORKS = {"Nature, SAME": {}, "Nature, VALID": dict(padding="valid"), "ResNet": dict(network="resnet")}


def measure_dqn_update(network, variant, options) -> dict:
    """redo_dqn_atari.update at the paper's batch of 32, sampling included."""
    device = torch.device(options.device)
    args = redo.Args(device=options.device, **NETWORKS[network], **VARIANTS[variant])
    redo.set_precision(args.precision, device)
    agent = redo.DQNAgent(6, args).to(device, memory_format=torch.channels_last)
    optimizer = redo.make_optimizer(agent, args, device)
    learn = partial(redo.update, agent, optimizer, args)
    if args.cudagraphs:
        learn = redo.capture(learn, [optimizer])
    if args.compile:
        redo.compile_modules(agent.q_network, agent.target_network)
    replay, generator = redo.FrameReplay(5000, device), torch.Generator().manual_seed(0)
    replay.add_first(np.zeros((84, 84), np.uint8))
    rng = np.random.default_rng(0)
    for _ in range(4000):
        replay.add(int(rng.integers(6)), 1.0, False, rng.integers(256, size=(84, 84), dtype=np.uint8))
    steps = max(10, options.work // 4)

    def work():
        for _ in range(steps):
            learn(redo.sample_batch(replay, args, generator, device))

    what = f"redo_dqn_atari, {network}"
    return update_row(what, variant, timed(work, options.repeats, options.device), steps, options.device)


def measure_pixel_update(script, batch_size, variant, options) -> dict:
    """drqv2_plasticity.update (adaptive_rr.py has the same) or drm.update on a walker's dimensions, sampling and
    augmentation included."""
    device, module = torch.device(options.device), {"drm": drm, "drqv2_plasticity": drq}[script]
    args = module.Args(**VARIANTS[variant])
    module.set_precision(args.precision, device)
    if module is drm:
        agent, make_optimizers = drm.DrMAgent(6, args), drm.make_drm_optimizers
        step = torch.full((), 3000, dtype=torch.float64, device=device)
    else:
        agent, make_optimizers = drq.DrQv2Agent(6, args), drq.make_optimizers
        step = torch.full((), 0.5, device=device)
    agent.to(device, memory_format=torch.channels_last)
    if args.compile:
        module.compile_modules(*agent.children())
    optimizers = make_optimizers(agent, args, device)
    step = partial(module.update, agent, optimizers, args)
    if args.cudagraphs:
        step = module.capture(step, optimizers)
    replay, generator = drq.PixelReplay(2000, 6, device), torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    replay.add_first(np.zeros((3, 84, 84), np.uint8))
    for _ in range(1000):
        replay.add(np.zeros(6, np.float32), 1.0, False, rng.integers(256, size=(3, 84, 84), dtype=np.uint8))
    steps = max(3, options.work // 100)

    def next_batch():
        obs, *others, next_obs = replay.sample(batch_size, generator)
        return [drq.random_shift(obs, 4), *others, drq.random_shift(next_obs, 4), step]

    def work():
        for _ in range(steps):
            step(next_batch())

    what = f"{script}, batch {batch_size}"
    return update_row(what, variant, timed(work, options.repeats, options.device), steps, options.device)


def measure_pixels(env_id, options) -> dict:
    """Random actions in one dm_control task in its own process, rendering included."""
    envs = drq.Environments(drq.Args(env_id=env_id), 1, run=None)
    envs.reset([1])
    rng, steps = np.random.default_rng(0), 200
    actions = rng.uniform(-1, 1, (steps, *envs.envs.action_space.shape)).astype(np.float32)

    def work():
        for action in actions:
            envs.step_async(action)
            *_, truncated, _ = envs.step_wait()
            if truncated[0]:
                envs.reset([1])

    row = steps_row(env_id, "1 process", timed(work, options.repeats, "cpu"), steps, 1)
    envs.close()
    return row


# Whole runs, mostly of learning, with the paper's networks, batches and replay ratio (crl_deep: the laptop's point
# mass): module, steps per unit of --work, steps besides, flags
NEVER = "1000000000"
PIXEL_RUN = f"""--env-id dm_control/quadruped-run-v0 --learning-starts 300 --exploration-steps 300 --batch-size 256
    --buffer-size 5000 --eval-every {NEVER} --eval-episodes 1 --checkpoint-replay never"""
RUNS = {
    "crl_deep": (crl, 8, 100_000, f"--env-id point_u_maze --eval-every {NEVER} --eval-episodes 8"),
    "redo_dqn_atari": (redo, 5, 1000, f"--learning-starts 1000 --buffer-size 5000 --max-episode-steps 200 --eval-every "
                       f"{NEVER} --eval-steps 1 --eval-envs 1 --dormant-every {NEVER} --checkpoint-replay never"),
    "drqv2_plasticity": (drq, 25, 300, f"{PIXEL_RUN} --plasticity-every {NEVER}"),
    "adaptive_rr": (rr, 25, 300, f"{PIXEL_RUN} --rr-high 0.5"),  # they log once per episode, 500 steps
    "drm": (drm, 25, 300, PIXEL_RUN),
}  # fmt: skip


def measure_run(script, variant, options) -> dict:
    """A whole run of a script, environment and learner side by side: its own charts/SPS, warm-up and compilation
    excluded."""
    module, scale, start, flags = RUNS[script]
    flags += f" --total-timesteps {start + scale * max(60, options.work)} --device {options.device}"
    for name, value in VARIANTS[variant].items():
        flags += f" --{name}" if value is True else f" --{name} {value}"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        module.train(module.parse_args(flags.split()))
        rates = load_runs("*")[0].series("charts/SPS")[1]
        os.chdir("/")
    return update_row(f"{script}, whole run", variant, 1 / rates, 1, options.device) | dict(unit="agent steps/s")


def measure_game(env_id, num_envs, options) -> dict:
    """Random actions in Atari games, resets included."""
    games = redo.make_envs(redo.Args(env_id=env_id), num_envs)
    games.reset(seed=1)
    rng = np.random.default_rng(0)
    steps = max(100, 4000 // num_envs)

    def work():
        for _ in range(steps):
            *_, terminated, truncated, _ = games.step(rng.integers(games.single_action_space.n, size=num_envs))
            done = terminated | truncated
            if done.any():
                games.reset(seed=rng.integers(2**31, size=done.sum()), options={"reset_mask": done})

    return steps_row(env_id, f"{num_envs} games", timed(work, options.repeats, "cpu"), steps, num_envs)


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

    variant = f"{num_envs} envs, {torch.get_num_threads()} threads"
    return steps_row(env_id, variant, timed(work, options.repeats, "cpu"), steps, num_envs)


def steps_row(what, variant, seconds, steps, num_envs) -> dict:
    """One line of the table: `steps` steps of all environments took `seconds`, once per repeat."""
    seconds = np.array(seconds) / (steps * num_envs)
    return dict(what=what, variant=variant, unit="env steps/s",
                rate=1 / np.median(seconds), slowest=1 / seconds.max(), fastest=1 / seconds.min(),
                ms=1e3 * np.median(seconds) * num_envs, peak_GB=peak_resident_gb())  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    scripts = list(RUNS)
    parser.add_argument("--scripts", nargs="*", choices=scripts, default=scripts)
    parts = ["updates", "environments", "runs"]
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--depths", type=int, nargs="*", default=[4, 16, 64, 256])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, help="default: all (CUDA graphs: on a GPU only)")
    env_ids = ["point_u_maze", "ant", "ant_u4_maze", "ant_hardest_maze", "humanoid", "humanoid_u_maze"]
    parser.add_argument("--environments", nargs="*", default=env_ids)
    parser.add_argument("--games", nargs="*", default=["ALE/DemonAttack-v5", "ALE/Breakout-v5"])
    parser.add_argument("--tasks", nargs="*", default=["dm_control/walker-run-v0", "dm_control/quadruped-run-v0"])
    parser.add_argument("--num-envs", type=int, nargs="*", default=[512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--work",
        type=int,
        default=400,
        help="a repeat does this / depth (crl_deep), / 4 (redo) or / 100 (drqv2, drm) gradient steps, at least 3; a "
        "whole run this many steps or more",
    )
    parser.add_argument("--out", help="write <out>.csv")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    variants = options.variants or [v for v in VARIANTS if cuda or "captured" not in v]
    scripts, jobs = options.scripts, {"updates": [], "environments": [], "runs": []}
    if "crl_deep" in scripts:
        jobs["updates"] += [(measure_update, depth, variant) for depth in options.depths for variant in variants]
        jobs["environments"] += [(measure_environment, e, n) for e in options.environments for n in options.num_envs]
    if "redo_dqn_atari" in scripts:
        jobs["updates"] += [(measure_dqn_update, network, variant) for network in NETWORKS for variant in variants]
        jobs["environments"] += [(measure_game, env_id, n) for env_id in options.games for n in (1, 8)]
    for script in [
        script for script in ("drqv2_plasticity", "drm") if script in scripts
    ]:  # adaptive_rr's is the first's
        jobs["updates"] += [
            (measure_pixel_update, script, size, variant) for size in (256, 512) for variant in variants
        ]
    if {"drqv2_plasticity", "adaptive_rr", "drm"} & set(scripts):
        jobs["environments"] += [(measure_pixels, env_id) for env_id in options.tasks]
    jobs["runs"] += [(measure_run, script, variant) for script in scripts for variant in variants]
    jobs = [job for part in options.parts for job in jobs[part]]
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
