"""DrM: Mastering Visual Reinforcement Learning through Dormant Ratio Minimization (Xu et al., ICLR 2024, arXiv
2310.19668): how many of the actor's neurons are dormant says whether the agent is still learning to move; let that
number steer exploration, perturbation and exploitation.

The dormant ratio beta: of all units of the actor's linear layers, the share with                   -> `dormant_ratio`
    mean |h_i|  <  tau * (mean of that over the layer's units)     means over the training batch; tau = 0.025
It is measured at every gradient step, and three things follow from it, beta_hat = 0.2:
    noise    sigma = 1 / (1 + exp(-(beta - beta_hat) / 0.1))   until, at step t0, beta < beta_hat for the first time;
             then ("awake") max(sigma, linear(t - t0)), DrQ-v2's decay from 1 to 0.1              -> `exploration_std`
    perturb  w <- alpha w + (1 - alpha) w'   every 100,000 steps; w' newly drawn                 -> `perturb_networks`
             alpha = clip(1 - 2 beta, 0.2, alpha_max)                                              -> `perturb_factor`
    exploit  y = sum_{i<n} gamma^i r_{t+i} + gamma^n ( lambda V(s') + (1 - lambda) min_k Q_target_k(s', a') )
             lambda = 0.6 / (1 + exp((beta - beta_hat) / 0.02))                               -> `exploitation_lambda`
             V(s): the 0.9-expectile of min_k Q_k(s, a) over the replay's actions                  -> `expectile_loss`
All the rest is DrQ-v2 (Yarats et al. 2022): s is the encoder's features of randomly shifted pictures, a' ~ pi(s') with
clipped noise sigma; the critic's loss trains critic and encoder, and the actor maximises min_k Q_k(s, pi(s)).
`--stddev-type drqv2 --perturb-every 0 --target-lambda 0` is DrQ-v2, bit for bit (on a CPU, as adaptive_rr.py's update).

    SCALE=small bash benchmark/drm_cpu.sh                   the ratio and two perturbations on a CPU: 3 runs of 22 min
    python drm.py --env-id dm_control/hopper-hop-v0         the official code's setting: for a GPU, not run yet
    SCALE=paper bash benchmark/drm_fig6_hard.sh             the hard tasks; others: see README.md

What is new here stands under "The dormant ratio and what it steers", in `drm_update`, and in `train` under "Perturb".
What the ratio measures is easy to get wrong. The two hidden layers count after their ReLU, the trunk before its layer
norm, the head before its tanh, as in the official code, where that follows from a ReLU in place. Before the ReLU hardly
any unit would be dormant. A layer that is silent altogether counts as not dormant at all (0 < 0 is false); Sokar et
al.'s definition, logged as plasticity/dormant_ratio_tau*, counts it whole. A newly drawn actor has a ratio of 0.2 to
0.5 on such tasks, more where the pictures are alike: a perturbation pulls the ratio there, which may be up or down.
Where the paper (as others report it) and the official code differ, this file follows the code; a flag has the other:
 a. "All parameters" are perturbed; in the code those of linear layers (--perturb-scope all). The encoder has none, and
    yet its Adam state starts anew with all others.
 b. A unit at the threshold is dormant; in the code it is not (--no-dormant-strict).
 c. In the code the target critic gets a draw of its own, so that each perturbation drives it and the critic apart
    (--perturb-target same).
 d. By default alpha_max is 0.9; in the code it is 0.6 to 1 by task (TASKS).
Where this differs from the official code (XuGW-Kevin/DrM), and why:
 1. Frames are stored once, in one ring on the GPU: 21 GB for 1M steps instead of 64 GB; a batch is drawn from all of
    it, also from the current episode, where officially 4 loaders each have a part and see new episodes late.
 2. No update waits for the GPU: beta, sigma, lambda and t0 are tensors there; officially each update reads beta.
 3. The perturbation and what Adam forgets are written in place, so that a captured graph survives it.
 4. The critic's values of a batch are computed once, for V's loss and its own; the actor's loss builds no gradient of
    the critic.
 5. --stddev-type max works (officially it fails with a TypeError here).
 6. A perturbation comes at its step, even where no gradient step is due; officially only with one.
 7. A termination cuts the bootstrap; officially, on dm_control, a discount of 0 becomes 1 (no task below terminates).
 8. The random shift copies whole pixels. Officially bilinear interpolation gives the same up to 3e-3 of 255.
A checkpoint may come at any step: on resume the interrupted episode is played again from its seed and actions.
Not in this file: MetaWorld and Adroit (other networks), A-LIX, TACO.
"""

import copy
import difflib
import fcntl
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """DrM on DrQ-v2. A step is an agent step, 2 frames, unless it says gradient step; None: from the table of
    tasks."""

    exp_name: str = "drm"  # name of this experiment, part of the run folder's name
    seed: int = 1  # seeds python, numpy, torch and every episode
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks live; auto: a GPU where there is one
    torch_deterministic: bool = False  # deterministic GPU kernels (two CPU runs are bit-identical without it)
    track: bool = False  # log to Weights & Biases too (install wandb yourself)
    wandb_project_name: str = "clayrl"  # the Weights & Biases project
    wandb_entity: str | None = None  # the Weights & Biases user or team
    capture_video: bool = False  # film an episode of every evaluation: films/<step>.mp4 in the run's folder
    save_model: bool = False  # at the end, save the weights alone as model.pt
    checkpoint_every: int = 250_000  # steps between checkpoints; always one at the end
    checkpoint_replay: bool = True  # keep the replay in the checkpoint; else a resumed run refills it before it learns
    resume: str | None = None  # a run folder to continue; its args.json gives all flags but the few that may change

    # environment
    env_id: str = "dm_control/hopper-hop-v0"  # dm_control/<domain>-<task>-v0, or any environment with pixels
    image_size: int = 84  # height and width of the rendered frames in pixels

    # DrQ-v2
    total_timesteps: int | None = None  # steps of the whole run
    learning_starts: int = 2000  # steps before the first gradient step
    exploration_steps: int = 2000  # first steps, with uniform random actions; awakening comes after them
    buffer_size: int | None = None  # frames in the replay, 21 kB each (None and no row: 1000000)
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the replay lives; auto: the GPU where it fits
    replay_ratio: float = 0.5  # gradient steps per step, k or 1/k
    batch_size: int | None = None  # transitions per gradient step (None and no row: 256)
    n_step: int = 3  # rewards per target before it bootstraps
    gamma: float = 0.99  # discount per step
    tau: float = 0.01  # share of the online critic that moves into the target critic at each gradient step
    learning_rate: float | None = None  # Adam's, of all networks (None and no row: 1e-4)
    feature_dim: int | None = None  # units of the trunks (None and no row: 50)
    hidden_dim: int = 1024  # units of each hidden layer of the heads
    stddev_start: float = 1.0  # standard deviation of the exploration noise, at first
    stddev_end: float = 0.1  # and after its linear decay (the dormant ratio alone gives 0.119 or more by default)
    stddev_steps: int | None = None  # length in steps of the decay
    stddev_clip: float = 0.3  # bound of the noise in the updates (not when acting)
    shift_pad: int = 4  # largest random shift in pixels

    # the dormant ratio
    dormant_tau: float = 0.025  # dormant: less than this times the layer's mean
    dormant_strict: bool = True  # exactly as much is not dormant (a silent layer has no dormant unit then)
    target_dormant_ratio: float = 0.2  # below it the agent is awake, and exploits

    # exploration
    stddev_type: Literal["awake", "dormant", "max", "drqv2"] = "awake"  # see `exploration_std`; drqv2: the decay alone
    dormant_temperature: float = 0.1  # T: how gently the noise follows the dormant ratio

    # perturbation
    perturb_every: int = 100_000  # steps between perturbations; 0: never
    perturb_rate: float = 2.0  # k: the factor of the old weights is 1 - k * dormant ratio
    min_perturb_factor: float = 0.2  # but at least this
    max_perturb_factor: float | None = None  # and at most this
    perturb_fixed_factor: float | None = None  # this factor always, whatever the dormant ratio
    perturb_target: Literal["independent", "same"] = "independent"  # the target critic's draw: its own, or the critic's
    perturb_scope: Literal["linear", "actor", "all"] = "linear"  # linear layers; the actor's only; all parameters

    # exploitation
    target_lambda: float = 0.6  # largest share of the value network V in the target; 0: no V
    lambda_type: Literal["dormant", "constant"] = "dormant"  # that share grows as the ratio falls, or is constant
    lambda_temperature: float = 0.02  # T': how gently that share follows the dormant ratio
    expectile: float = 0.9  # V learns this expectile of the Q-values of the replay's actions

    # what to look at
    eval_every: int = 5000  # steps between evaluations, also before the first and after the last
    eval_episodes: int = 10  # episodes of an evaluation, with the mean action
    plasticity_every: int = 5000  # steps between looks at dormant ratios, overlaps, feature ranks and norms
    plasticity_batch_size: int = 256  # transitions for them
    log_every: int = 500  # steps between logs of losses, the dormant ratio, fractions of active units and speed

    # speed
    amp: bool = False  # convolutions and trunks of the update in bfloat16; heads, losses, Adam, acting in float32
    compile: bool = False  # compile the networks
    cudagraphs: bool = False  # capture the whole update in one CUDA graph and replay it per batch


# The official code's values by task
MEDIUM = dict(total_timesteps=1_550_000, stddev_steps=500_000, buffer_size=1_000_000, batch_size=256,
              learning_rate=1e-4, feature_dim=50, max_perturb_factor=1.0)  # fmt: skip
HARD = MEDIUM | dict(total_timesteps=15_050_000, stddev_steps=2_000_000, max_perturb_factor=0.9)
LARGE = HARD | dict(learning_rate=8e-5, feature_dim=100)
TASKS = {
    **dict.fromkeys(("acrobot-swingup", "cartpole-swingup_sparse", "cheetah-run", "hopper-hop", "reacher-easy",
                     "reacher-hard"), MEDIUM),
    **dict.fromkeys(("quadruped-run", "quadruped-walk"), MEDIUM | dict(buffer_size=100_000)),
    "walker-run": MEDIUM | dict(batch_size=512),
    "acrobot-swingup_sparse": HARD, "manipulator-bring_ball": HARD | dict(learning_rate=8e-5),
    **dict.fromkeys(("dog-stand", "dog-walk", "dog-run", "humanoid-run"), LARGE | dict(max_perturb_factor=0.6)),
    **dict.fromkeys(("dog-trot", "humanoid-stand", "humanoid-walk"), LARGE),
}  # fmt: skip
# Flags that do nothing beside a certain value of another one
IDLE = (
    ("perturb_every", 0, ("perturb_rate", "min_perturb_factor", "max_perturb_factor", "perturb_fixed_factor",
                          "perturb_target", "perturb_scope")),
    ("perturb_scope", "actor", ("perturb_target",)),
    ("target_lambda", 0, ("lambda_type", "lambda_temperature", "expectile")),
    ("lambda_type", "constant", ("lambda_temperature",)),
    ("stddev_type", "drqv2", ("dormant_temperature",)),
    ("stddev_type", "dormant", ("stddev_start", "stddev_end", "stddev_steps")),
)  # fmt: skip
SCRIPT, ACTION_REPEAT = "drm", 2
ACTION_LIMIT = 1 - 1e-6  # actions are clamped to this
# What may be given anew with --resume: it does not change what is learned.
RESUMABLE = ("resume total_timesteps device buffer_device eval_every eval_episodes checkpoint_every checkpoint_replay "
             "track wandb_project_name wandb_entity capture_video save_model log_every compile cudagraphs "
             "torch_deterministic plasticity_every plasticity_batch_size").split()  # fmt: skip


# === Environment ======================================================================================================
class PixelEnv(gymnasium.Wrapper):
    """A Gymnasium environment with continuous actions, seen through its pixels.

    Actions lie in [-1, 1] and are repeated ACTION_REPEAT times, the rewards added. The observation is the one frame
    after that, (3, height, width) uint8: stacks are built by who needs them.
    """

    def __init__(self, env, image_size: int):
        super().__init__(env)
        if not (isinstance(env.action_space, gymnasium.spaces.Box) and env.action_space.is_bounded()):
            raise TypeError(f"its actions are not numbers within bounds: {env.action_space}")
        self.low, self.high = env.action_space.low, env.action_space.high
        self.action_space = gymnasium.spaces.Box(-1, 1, env.action_space.shape, np.float32)
        self.observation_space = gymnasium.spaces.Box(0, 255, (3, image_size, image_size), np.uint8)

    def play(self, action) -> tuple:
        """One agent step without its picture -> reward, terminated, truncated."""
        total, action = 0.0, self.low + (self.high - self.low) * (action.astype(self.low.dtype) + 1) / 2
        for _ in range(ACTION_REPEAT):
            if not self.over:
                _, reward, terminated, truncated, _ = self.env.step(action)
                total, self.over = total + float(reward), terminated or truncated
                self.end = terminated, truncated
        return total, *self.end

    def frame(self) -> np.ndarray:
        return np.ascontiguousarray(self.env.render().transpose(2, 0, 1))

    def reset(self, *, seed=None, options=None):
        """Begins an episode; options {"actions": (k, action) float32} plays its first k steps again, unseen."""
        self.env.reset(seed=seed)
        self.over, self.end = False, (False, False)
        for action in (options or {}).get("actions", ()):
            self.play(action)
        return self.frame(), {}

    def step(self, action):
        """One agent step; when the episode is over nothing moves any more."""
        result = self.play(action)
        return self.frame(), *result, {}


def make_env(env_id: str, image_size: int) -> PixelEnv:
    """An environment that renders image_size x image_size pixels; camera 2 sees quadrupeds, camera 0 all others."""
    if multiprocessing.parent_process() is not None:
        os.setpgrp()  # signals to the learner's group are for the learner, which ends its environments
    options = dict(width=image_size, height=image_size)
    if env_id.startswith("dm_control/"):
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")
        import shimmy  # noqa: F401  registers the tasks, and opens the renderer

        options = dict(render_kwargs=options | dict(camera_id=2 if "/quadruped" in env_id else 0))
    return PixelEnv(gymnasium.make(env_id, render_mode="rgb_array", disable_env_checker=True, **options), image_size)


def make_envs(args, num_envs: int) -> AsyncVectorEnv:
    """`num_envs` environments, each in a process of its own: step_async(action) starts a step, step_wait() ends it.

    The processes descend from a server that has neither touched the GPU nor opened a renderer."""
    return AsyncVectorEnv([partial(make_env, args.env_id, args.image_size)] * num_envs, context="forkserver",
                          autoreset_mode=AutoresetMode.DISABLED)  # fmt: skip


class Environments:
    """`num_envs` environments, each in a process of its own, that survive the death of one.

    step and step_wait then return None; the next reset starts new processes. That happens three times; after the fourth
    death `stop`, a list, gets the program's exit code, and reset returns None too.
    """

    def __init__(self, args, num_envs: int, stop: list):
        self.args, self.num_envs, self.stop = args, num_envs, stop
        self.envs, self.deaths = None, 0
        self.start()

    def start(self) -> None:
        while self.envs is None and self.deaths <= 3:
            try:
                self.envs = make_envs(self.args, self.num_envs)
            except (EOFError, OSError) as error:
                self.bury(error)

    def bury(self, error: Exception) -> None:
        self.close()
        self.deaths += 1
        times = "started anew" if self.deaths <= 3 else "for the fourth time: saving"
        print(f"{SCRIPT}.py: an environment's process died ({type(error).__name__}), {times}", file=sys.stderr)
        if self.deaths > 3:
            self.stop.append(1)

    def call(self, method: str, *values, **options):
        try:
            return None if self.envs is None else getattr(self.envs, method)(*values, **options)
        except (EOFError, OSError) as error:
            self.bury(error)

    def reset(self, **options) -> tuple | None:
        result = None
        while result is None and self.deaths <= 3:
            self.start()
            result = self.call("reset", **options)
        return result

    def step(self, action: np.ndarray) -> tuple | None:
        return self.call("step", action)

    def step_async(self, action: np.ndarray) -> None:
        self.call("step_async", action)

    def step_wait(self) -> tuple | None:
        return self.call("step_wait")

    def close(self) -> None:
        for process in getattr(self.envs, "processes", ()):  # their own way to close waits for the dead
            process.kill()
            process.join()
        if self.envs is not None:
            self.envs.closed = True
        self.envs = None


def episode_seed(*numbers: int) -> int:
    """A seed that the numbers determine: the run's seed, what it is for (0 training, 1 evaluation, 2 a stream of random
    numbers), and which one of these. Below 2**32: torch's generators on a CPU ignore all higher bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Film:
    """Environments that remember the latest episode of the first one: frames, a list of (height, width, 3) uint8."""

    def __init__(self, envs):
        self.envs, self.num_envs, self.close = envs, envs.num_envs, envs.close

    def reset(self, **options) -> tuple | None:
        played = self.envs.reset(**options)
        if played is not None:
            self.frames, self.over = [played[0][0].transpose(1, 2, 0).copy()], False
        return played

    def step(self, action) -> tuple | None:
        played = self.envs.step(action)
        if played is not None and not self.over:
            frame, _, terminated, truncated, _ = played
            self.frames.append(frame[0].transpose(1, 2, 0).copy())
            self.over = bool(terminated[0] or truncated[0])
        return played


# === Replay buffer ====================================================================================================
class PixelReplay:
    """A ring of single frames (capacity, 3, height, width) uint8; stacks and n-step returns are built when sampling.

    Each frame's record: its age (the number of frames of its episode before it), the reward and the termination that
    came with it, and the action that led to it. `start` holds the numbers of the frames from which n steps have been
    taken inside the episode, so that sampling is uniform over them (as in DrQ-v2, an episode's last n - 1 frames start
    nothing). Frames and starts are numbered from 0 for ever; number n lies in slot n % capacity.
    """

    def __init__(self, capacity, action_dim, device, n_step=3, gamma=0.99, frame_shape=(3, 84, 84), stack=3):
        self.capacity, self.n_step, self.gamma, self.stack = capacity, n_step, gamma, stack
        self.frames = torch.empty((capacity, *frame_shape), dtype=torch.uint8, device=device)
        self.record = torch.empty((capacity, 3 + action_dim), device=device)
        self.start = torch.empty(capacity, dtype=torch.int64)  # on the CPU, where indices are drawn
        self.num_frames = self.num_starts = self.oldest_start = self.age = 0

    def add_first(self, frame: np.ndarray) -> None:
        """An episode's first frame (3, height, width)."""
        self.age = -1
        self.add(np.zeros(self.record.shape[1] - 3, np.float32), 0.0, False, frame)

    def add(self, action: np.ndarray, reward: float, terminated: bool, frame: np.ndarray) -> None:
        """What was done in the newest frame, and what came of it: reward, termination, the next frame."""
        number, self.age = self.num_frames, self.age + 1
        self.frames[number % self.capacity] = torch.from_numpy(frame)
        record = np.concatenate([[self.age, reward, terminated], action]).astype(np.float32)
        self.record[number % self.capacity] = torch.from_numpy(record)
        self.num_frames += 1
        if self.age >= self.n_step:
            self.start[self.num_starts % self.capacity] = number - self.n_step
            self.num_starts += 1
        reachable = self.num_frames - self.capacity  # the ring's oldest frame; its own stack may be incomplete
        while len(self) and 0 < reachable > self.start[self.oldest_start % self.capacity] - self.stack + 1:
            self.oldest_start += 1

    def __len__(self) -> int:
        """The number of transitions that can be sampled."""
        return self.num_starts - self.oldest_start

    def stacked(self, index: torch.Tensor) -> torch.Tensor:
        """Frame numbers (batch,) -> observations (batch, stack * 3, height, width) uint8, the newest frame last; before
        an episode's beginning its first frame is repeated."""
        back = torch.arange(self.stack - 1, -1, -1, device=index.device)
        back = torch.minimum(back, self.record[index % self.capacity, 0, None].long())
        return self.frames[(index[:, None] - back) % self.capacity].flatten(1, 2)

    def newest(self) -> torch.Tensor:
        """The observation now: (1, stack * 3, height, width) uint8."""
        return self.stacked(torch.tensor([self.num_frames - 1], device=self.frames.device))

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple:
        """Uniform, drawn from a generator on the CPU -> obs (batch, stack * 3, height, width) uint8, action (batch,
        action), reward (batch,) of n steps, discounted, discount (batch,), next_obs n steps later.

        discount is gamma^n, or 0 where the episode terminated on the way.
        """
        draw = torch.randint(self.oldest_start, self.num_starts, (batch_size,), generator=generator)
        first = self.start[draw % self.capacity].to(self.frames.device)
        steps = torch.arange(1, self.n_step + 1, device=first.device)
        record = self.record[(first[:, None] + steps) % self.capacity]  # (batch, n_step, 3 + action)
        alive = torch.cumprod(1 - record[:, :, 2], 1)
        reward = (record[:, :, 1] * self.gamma ** (steps - 1)).sum(1)
        discount = self.gamma**self.n_step * alive[:, -1]
        return self.stacked(first), record[:, 0, 3:], reward, discount, self.stacked(first + self.n_step)

    def state_dict(self) -> dict:
        state = {k: getattr(self, k) for k in ("num_frames", "num_starts", "oldest_start", "age")}
        for name, filled in dict(frames=self.num_frames, record=self.num_frames, start=self.num_starts).items():
            # Through NumPy: the filled part without a copy, where a mere view of the tensor would save all of it
            state[name] = torch.from_numpy(getattr(self, name)[:filled].cpu().numpy())
        return state

    def load_state_dict(self, state: dict) -> None:
        """Also from a ring of another capacity."""
        for name in ("num_frames", "num_starts", "oldest_start", "age"):
            setattr(self, name, state[name])
        self.oldest_start = max(self.oldest_start, self.num_starts - self.capacity)
        for name, last in dict(frames=self.num_frames, record=self.num_frames, start=self.num_starts).items():
            ring, saved = getattr(self, name), state[name]
            if len(saved) in (last, self.capacity) and len(saved) <= self.capacity:
                ring[: len(saved)] = saved
            else:
                numbers = torch.arange(max(0, last - min(len(saved), self.capacity)), last)
                ring[(numbers % self.capacity).to(ring.device)] = saved[numbers % len(saved)].to(ring.device)


def random_shift(obs: torch.Tensor, pad: int, shift: torch.Tensor | None = None) -> torch.Tensor:
    """DrQ-v2's augmentation: pads each image by repeating its border and crops it to its size at a random place.

    obs (batch, channels, height, width) of any type; shift (batch, 2), whole numbers (x, y) in [0, 2 * pad], drawn when
    not given -> the same shape and type. shift = pad moves nothing.
    """
    batch, _, height, width = obs.shape
    if shift is None:
        shift = torch.randint(2 * pad + 1, (batch, 2), device=obs.device)
    rows = (torch.arange(height, device=obs.device) + shift[:, 1:] - pad).clamp(0, height - 1)
    columns = (torch.arange(width, device=obs.device) + shift[:, :1] - pad).clamp(0, width - 1)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1)
    return obs.flatten(2).gather(2, pixels.expand(-1, obs.shape[1], -1)).view_as(obs)


# === Networks =========================================================================================================
class Layers(nn.Sequential):
    """Layers one after the other: forward(x) -> output, [what comes out of each ReLU]."""

    def forward(self, x):
        active = []
        for layer in self:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                active.append(x)
        return x, active


class Encoder(nn.Module):
    """obs (batch, channels, height, width) uint8 -> features (batch, feature_size), the 4 convolutions' activations."""

    def __init__(self, channels=9, image_size=84):
        super().__init__()
        self.convnet, size = Layers(), (image_size - 3) // 2 + 1 - 3 * 2
        for stride in (2, 1, 1, 1):
            self.convnet.extend([nn.Conv2d(channels, 32, 3, stride), nn.ReLU(inplace=True)])
            channels = 32
        self.feature_size = 32 * size * size
        self.apply(draw_layer)

    def forward(self, obs):
        x = obs.to(torch.float32, memory_format=torch.channels_last).div(255).sub_(0.5)
        features, active = self.convnet(x)
        return features.flatten(1), active


def trunk(feature_size: int, feature_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(feature_size, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


def head(inputs: int, hidden_dim: int, outputs: int) -> Layers:
    return Layers(nn.Linear(inputs, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
                  nn.Linear(hidden_dim, outputs))  # fmt: skip


class Actor(nn.Module):
    """features (batch, feature_size) -> mean action (batch, action), activations of the 2 hidden layers."""

    def __init__(self, feature_size, action_dim, feature_dim=50, hidden_dim=1024):
        super().__init__()
        self.trunk, self.policy = trunk(feature_size, feature_dim), head(feature_dim, hidden_dim, action_dim)
        self.apply(draw_layer)

    def forward(self, features):
        x = self.trunk(features).float()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has too few digits for actions and values
            mean, active = self.policy(x)
        return mean.tanh(), active


class Critic(nn.Module):
    """features (batch, feature_size), action (batch, action) -> two values (batch,), activations of the 2 hidden layers
    of the first and then of the second."""

    def __init__(self, feature_size, action_dim, feature_dim=50, hidden_dim=1024):
        super().__init__()
        self.trunk = trunk(feature_size, feature_dim)
        self.q1, self.q2 = (head(feature_dim + action_dim, hidden_dim, 1) for _ in range(2))
        self.apply(draw_layer)

    def forward(self, features, action):
        x = self.trunk(features).float()
        with torch.autocast(x.device.type, enabled=False):
            x = torch.cat([x, action], 1)
            (q1, active1), (q2, active2) = self.q1(x), self.q2(x)
        return q1.squeeze(1), q2.squeeze(1), active1 + active2


class Value(nn.Module):
    """features (batch, feature_size) -> V (batch,), activations of the 2 hidden layers."""

    def __init__(self, feature_size, feature_dim=50, hidden_dim=1024, generator=None):
        super().__init__()
        self.trunk, self.v = trunk(feature_size, feature_dim), head(feature_dim, hidden_dim, 1)
        self.apply(partial(draw_layer, generator=generator))

    def forward(self, features):
        x = self.trunk(features).float()
        with torch.autocast(x.device.type, enabled=False):
            value, active = self.v(x)
        return value.squeeze(1), active


@torch.no_grad()
def draw_layer(layer: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws one layer's weights from their initial distribution, in place: orthogonal, in convolutions times
    sqrt(2); biases 0; a normalisation's scale 1."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        gain = math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1
        layer.weight.copy_(nn.init.orthogonal_(torch.empty(layer.weight.shape), gain, generator=generator))
        layer.bias.zero_()
    elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        layer.reset_parameters()


class DrQv2Agent(nn.Module):
    """Encoder, actor, critic, and the target critic, which reads the features of the online encoder."""

    def __init__(self, action_dim, args):
        super().__init__()
        self.encoder = Encoder(image_size=args.image_size)
        sizes = self.encoder.feature_size, action_dim, args.feature_dim, args.hidden_dim
        self.actor, self.critic = Actor(*sizes), Critic(*sizes)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

    def mean_action(self, obs):
        return self.actor(self.encoder(obs)[0])[0]


class DrMAgent(DrQv2Agent):
    """DrQ-v2's networks, the value network, and what steers: the last batch's dormant ratio and the step of awakening
    (infinity before), both 0-d on the device."""

    def __init__(self, action_dim, args):
        super().__init__(action_dim, args)
        generator = torch.Generator().manual_seed(episode_seed(args.seed, 2, 4))
        with torch.random.fork_rng(devices=[]):  # V leaves the random numbers of DrQ-v2 as they are
            self.value = Value(self.encoder.feature_size, args.feature_dim, args.hidden_dim, generator)
        self.register_buffer("dormant_ratio", torch.ones(()))
        self.register_buffer("awaken_step", torch.full((), math.inf))


# === The dormant ratio and what it steers =============================================================================
@torch.no_grad()
def dormant_ratio(actor, features, threshold: float, strict: bool = True) -> tuple:
    """The actor's dormant ratio beta on a batch (Section 3; what is measured, as in the official code).

    All linear layers count: the trunk's before its layer norm, the two hidden ones after their ReLU, the last one
    before its tanh. A unit is dormant when its mean |output| is less than threshold times its layer's mean (strict), or
    at most that. features (batch, feature_size) -> share of dormant units, 0-d, and {layer: share of its own units};
    NaN when an output is not finite.
    """
    linear = actor.trunk[0](features)
    x = actor.trunk[1:](linear).float()
    with torch.autocast(x.device.type, enabled=False):
        mean, hidden = actor.policy(x)
    dormant = {}
    for name, output in dict(trunk=linear, hidden1=hidden[0], hidden2=hidden[1], head=mean).items():
        size = output.abs().mean(0, dtype=torch.float32)
        limit = threshold * size.mean()
        units = (size < limit if strict else size <= limit).float()
        dormant[name] = torch.where(size.isfinite().all(), units, math.nan)
    return torch.cat(list(dormant.values())).mean(), {name: units.mean() for name, units in dormant.items()}


def awakening(awaken_step, beta, step, args) -> torch.Tensor:
    """The step at which beta was first below its target: infinity before that, the same for ever after. All 0-d."""
    awake = (beta < args.target_dormant_ratio) & (step > args.exploration_steps)
    return torch.where(awake, torch.minimum(awaken_step, step), awaken_step)


def exploration_std(beta, step, awaken_step, args) -> torch.Tensor:
    """Standard deviation of the exploration noise at a step, all 0-d; args.stddev_type:

    awake: the sigmoid of beta until awakening, then it or DrQ-v2's linear decay, counted from awakening, whichever is
    larger; dormant: the sigmoid alone; max: it or the decay, counted from step 0; drqv2: the decay alone.
    """
    sigmoid = torch.sigmoid((beta - args.target_dormant_ratio) / args.dormant_temperature)
    if args.stddev_type == "dormant":
        return sigmoid
    elapsed = step - awaken_step if args.stddev_type == "awake" else step
    progress = (elapsed / args.stddev_steps).clamp(0, 1)
    linear = (args.stddev_start + progress * (args.stddev_end - args.stddev_start)).float()
    if args.stddev_type == "drqv2":
        return linear
    larger = torch.maximum(sigmoid, linear)
    return larger if args.stddev_type == "max" else torch.where(torch.isinf(awaken_step), sigmoid, larger)


def perturb_factor(beta, args) -> torch.Tensor:
    """alpha, the share of the old weights that a perturbation keeps, 0-d: clip(1 - rate * beta, min, max)."""
    if args.perturb_fixed_factor is not None:
        return torch.full_like(beta, args.perturb_fixed_factor)
    return (1 - args.perturb_rate * beta).clamp(args.min_perturb_factor, args.max_perturb_factor)


def exploitation_lambda(beta, args) -> torch.Tensor:
    """lambda, the share of V in the target, 0-d: target_lambda / (1 + exp((beta - target_dormant_ratio) / T'))."""
    if args.lambda_type == "constant":
        return torch.full_like(beta, args.target_lambda)
    return args.target_lambda * torch.sigmoid((args.target_dormant_ratio - beta) / args.lambda_temperature)


def expectile_loss(value, q, expectile: float) -> torch.Tensor:
    """value, q (batch,) -> mean of w (value - q)^2, with w = expectile where value <= q, else 1 - expectile, so that
    value learns an upper expectile of q. q is not learned from."""
    error = value - q.detach()
    return (torch.where(error > 0, 1 - expectile, expectile) * error**2).mean()


def mixed_target(reward, discount, value, q, share) -> torch.Tensor:
    """reward + discount (share V(s') + (1 - share) Q(s', a')): all (batch,), share 0-d."""
    return reward + discount * (share * value + (1 - share) * q)


def optimizer_of(parameter, optimizers):
    return next(o for o in optimizers if any(parameter is p for p in o.param_groups[0]["params"]))


def forget_all(module, optimizers) -> None:
    """Adam starts anew for all of a module's weights, in place."""
    for parameter in module.parameters():
        for value in optimizer_of(parameter, optimizers).state.get(parameter, {}).values():
            value.zero_()


@torch.no_grad()
def perturb_networks(agent, optimizers, factor, args, generator) -> None:
    """weights := factor * weights + (1 - factor) * newly drawn ones, in place; factor 0-d. Adam starts anew.

    Scope linear: the linear layers of all networks; Adam starts anew for the encoder too, which has none; actor: the
    linear layers of the actor; all: all parameters, as the paper says.
    """
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm) if args.perturb_scope == "all" else nn.Linear
    names = ["actor"] if args.perturb_scope == "actor" else ["actor", "critic", "critic_target", "encoder", "value"]
    for name in names:
        if name == "critic":
            before_critic = generator.get_state()
        elif name == "critic_target" and args.perturb_target == "same":
            generator.set_state(before_critic)
        network = getattr(agent, name)
        for layer in network.modules():
            if isinstance(layer, kinds):
                fresh = copy.deepcopy(layer)
                draw_layer(fresh, generator)
                for weight, new in zip(layer.parameters(), fresh.parameters()):
                    weight.copy_(factor * weight + (1 - factor) * new)
        if name != "critic_target":
            forget_all(network, optimizers)


# === Diagnostics ======================================================================================================
def fau(activations: list) -> torch.Tensor:
    """Fraction of active units (Eq. 1): the share of positive elements in a list of tensors (batch, ...), all after a
    ReLU. Every element counts the same: an average over batch and positions, not one minus the dormant ratio. NaN when
    an element is not finite."""
    active = sum(torch.count_nonzero(a > 0) for a in activations) / sum(a.numel() for a in activations)
    finite = torch.stack([a.sum().float() for a in activations]).isfinite().all()
    return torch.where(finite, active, math.nan)


def dormant_score(activation: torch.Tensor) -> torch.Tensor:
    """Sokar et al. 2023, Eq. 1: each neuron's mean |activation| over batch and positions, divided by the layer's mean.

    activation (batch, neurons) or (batch, channels, height, width), after the non-linearity -> (neurons,), of mean 1;
    all 0 when the whole layer is silent, all NaN when an activation is not finite.
    """
    mean = activation.abs().float().mean([0, *range(2, activation.dim())])
    average = mean.mean()
    return torch.where(average.isfinite(), mean / average.clamp_min(torch.finfo(torch.float32).tiny), math.nan)


def dormant_share(score: torch.Tensor, tau: float) -> torch.Tensor:
    """The share of neurons with a score of at most tau, 0-d; NaN when a score is."""
    return torch.where(score.isfinite().all(), (score <= tau).float().mean(), math.nan)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The overlap coefficient of two masks (neurons,): |A and B| / min(|A|, |B|); NaN when one is empty (Sokar et al.
    2023, Fig. 5)."""
    return (a & b).sum() / torch.minimum(a.sum(), b.sum())


def feature_rank(features: torch.Tensor, delta: float = 0.01) -> torch.Tensor:
    """How many singular values of (batch, neurons) hold a share 1 - delta of their sum (Kumar et al. 2021;
    Sokar et al. 2023, Table 7); NaN where a feature is not finite."""
    if not features.isfinite().all():
        return torch.tensor(math.nan)
    share = torch.linalg.svdvals(features.float()).cumsum(0)
    return (share < (1 - delta) * share[-1]).sum() + 1


def activations(agent, batch) -> tuple:
    """features (batch, feature_size) and, by module, the activations after every ReLU, for a batch from the replay."""
    obs, action, *_ = batch
    features, encoder_active = agent.encoder(obs)
    return features, dict(encoder=encoder_active, actor=agent.actor(features)[1],
                          critic=agent.critic(features, action)[2])  # fmt: skip


@torch.no_grad()
def look_at_plasticity(agent, batch, history: dict, taus: tuple) -> dict:
    """What is logged about encoder, actor and critic on a batch -> metrics.

    Dormant ratios (Sokar et al. 2023) count all hidden neurons of a module, a feature map as one. The overlap is that
    of the dormant neurons (by the first tau) with those of the previous look, which `history` holds. The feature rank
    is that of the last hidden activations, of the first Q head for the critic. Norms are over all weights of a module
    that learn, and over the last update's gradients, those of L2-Init included.
    """
    features, by_module = activations(agent, batch)
    last = dict(encoder=features, actor=by_module["actor"][-1], critic=by_module["critic"][1])
    metrics = {}
    for name, active in by_module.items():
        score = torch.cat([dormant_score(a) for a in active])
        for tau in taus:
            metrics[f"plasticity/dormant_ratio_tau{tau:g}/{name}"] = dormant_share(score, tau)
        mask = score <= taus[0]
        if name in history:
            metrics[f"plasticity/overlap/{name}"] = overlap(mask, history[name])
        history[name] = mask
        metrics[f"plasticity/feature_rank/{name}"] = feature_rank(last[name])
        weights = [p for p in getattr(agent, name).parameters() if p.requires_grad]
        metrics[f"plasticity/weight_norm/{name}"] = torch.stack(torch._foreach_norm(weights)).norm()
        gradients = [p.grad for p in weights if p.grad is not None]
        if gradients:
            metrics[f"plasticity/grad_norm/{name}"] = torch.stack(torch._foreach_norm(gradients)).norm()
    return metrics


# === Update ===========================================================================================================
def drm_optimizers(agent, args, device) -> list:
    """Adam for encoder, actor, critic and value network."""
    options = dict(lr=args.learning_rate, fused=device.type != "mps", capturable=args.cudagraphs)
    networks = agent.encoder, agent.actor, agent.critic, agent.value
    return [torch.optim.Adam(network.parameters(), **options) for network in networks]


def truncated_normal(mean, std, clip: float) -> torch.Tensor:
    """mean + noise of standard deviation std (0-d), clipped to +-clip; the sum clamped to the action limits, with a
    gradient of 1."""
    action = mean + (torch.randn_like(mean) * std).clamp(-clip, clip)
    return action - action.detach() + action.detach().clamp(-ACTION_LIMIT, ACTION_LIMIT)


def drm_update(agent, optimizers, batch, args) -> dict:
    """One gradient step of the value network, then of critic and encoder, of the actor and of the target, on a batch:
    obs, action, reward, discount, next_obs from the replay, augmented, and the step (0-d) -> metrics, detached, on the
    device. The agent's dormant ratio and step of awakening are updated first."""
    obs, action, reward, discount, next_obs, step = batch
    encoder_optimizer, actor_optimizer, critic_optimizer, value_optimizer = optimizers
    autocast = partial(torch.autocast, obs.device.type, torch.bfloat16, args.amp)
    with autocast():
        features, encoder_active = agent.encoder(obs)
        q1, q2, critic_active = agent.critic(features, action)
    metrics, detached = {}, features.detach()

    # What steers: beta of this batch, the awakening, the noise
    with torch.no_grad(), autocast():  # a region of its own: weights that it casts carry no gradient
        beta, layers = dormant_ratio(agent.actor, detached, args.dormant_tau, args.dormant_strict)
        next_features, _ = agent.encoder(next_obs)
    agent.dormant_ratio.copy_(beta)
    agent.awaken_step.copy_(awakening(agent.awaken_step, beta, step, args))
    std = exploration_std(beta, step, agent.awaken_step, args)

    # The value network learns from the critic as it is
    if args.target_lambda:
        with autocast():
            value, value_active = agent.value(detached)
        value_loss = expectile_loss(value, torch.minimum(q1, q2), args.expectile)
        value_optimizer.zero_grad()
        value_loss.backward()
        value_optimizer.step()

    # Critic and encoder learn from the target critic and the value network just updated
    with torch.no_grad(), autocast():
        next_action = truncated_normal(agent.actor(next_features)[0], std, args.stddev_clip)
        target_q1, target_q2, _ = agent.critic_target(next_features, next_action)
        target_q = torch.minimum(target_q1, target_q2)
        if args.target_lambda:
            share = exploitation_lambda(beta, args)
            target = mixed_target(reward, discount, agent.value(next_features)[0], target_q, share)
            metrics = {
                "drm/lambda": share, "losses/value": value_loss.detach(), "losses/v_values": value.detach().mean(),
                "plasticity/fau/value": fau(value_active),
            }  # fmt: skip
        else:
            target = reward + discount * target_q
    critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
    encoder_optimizer.zero_grad()
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()
    encoder_optimizer.step()

    # The actor learns from the critic just updated; neither critic nor encoder learns from the actor
    critic_weights = critic_optimizer.param_groups[0]["params"]
    for weight in critic_weights:
        weight.requires_grad_(False)
    with autocast():
        mean, actor_active = agent.actor(detached)
        actor_q1, actor_q2, _ = agent.critic(detached, truncated_normal(mean, std, args.stddev_clip))
    actor_loss = -torch.minimum(actor_q1, actor_q2).mean()
    actor_optimizer.zero_grad()
    actor_loss.backward()
    actor_optimizer.step()
    for weight in critic_weights:
        weight.requires_grad_(True)
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
    return metrics | {
        "drm/dormant_ratio": beta, **{f"drm/dormant_ratio/{name}": ratio for name, ratio in layers.items()},
        "drm/stddev": std, "losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(),
        "losses/reward": reward.mean(), "losses/q_values": q1.detach().mean(), "losses/targets": target.mean(),
        "plasticity/fau/encoder": fau(encoder_active), "plasticity/fau/actor": fau(actor_active),
        "plasticity/fau/critic": fau(critic_active),
    }  # fmt: skip


def capture_update(step, agent, optimizers, batch, args):
    """Captures step(agent, optimizers, batch, args) in a CUDA graph -> a function of a batch that replays it and
    overwrites the same metrics.

    Capture needs a few real updates first (Adam creates its state, libraries choose kernels). What they did to weights,
    Adam and random numbers is undone in place, because a graph keeps addresses.
    """
    static = [x.clone() for x in batch]
    weights, rng = copy.deepcopy(agent.state_dict()), torch.cuda.get_rng_state()
    moments = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in optimizers]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(agent, optimizers, static, args)
    torch.cuda.current_stream().wait_stream(stream)
    agent.load_state_dict(weights)
    for optimizer, saved in zip(optimizers, moments):
        for i, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                value.copy_(saved[i][name]) if i in saved else value.zero_()
        optimizer.zero_grad()  # the gradients are then allocated in the graph's own memory
    torch.cuda.set_rng_state(rng)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = step(agent, optimizers, static, args)

    def replay(batch):
        for buffer, value in zip(static, batch):
            buffer.copy_(value)
        graph.replay()
        return metrics

    return replay


def act(agent, obs, stddev: float, uniform: bool, generator) -> np.ndarray:
    """One training action (1, action) for obs (1, channels, height, width): the mean plus noise that is not clipped, or
    uniform. Drawn from a generator on the CPU."""
    with torch.no_grad():
        mean = agent.mean_action(obs).cpu()
    noisy = mean + stddev * torch.randn(mean.shape, generator=generator)
    random_action = torch.rand(mean.shape, generator=generator) * 2 - 1
    return (random_action if uniform else noisy.clamp(-ACTION_LIMIT, ACTION_LIMIT)).numpy()


def play_evaluation(agent, envs, args, draw: int, device, stop=()) -> dict:
    """eval_episodes whole episodes with the mean action, several side by side -> metrics. Draws no random number from
    torch. `draw` numbers the evaluation and so seeds its episodes. No metrics when the run is to stop (the
    list `stop` is not empty) or an action is not finite."""
    returns, lengths, n = [], [], envs.num_envs
    while len(returns) < args.eval_episodes:
        played = envs.reset(seed=[episode_seed(args.seed, 1, draw, len(returns) + i) for i in range(n)])
        if played is None:
            return {}
        frame, _ = played
        obs = torch.from_numpy(frame).to(device).repeat(1, 3, 1, 1)
        episode_return, episode_length, running = np.zeros(n), np.zeros(n, int), np.ones(n, bool)
        while running.any():
            with torch.no_grad():
                action = agent.mean_action(obs).cpu().numpy()
            if stop or not np.isfinite(action).all():
                return {}
            played = envs.step(action)
            if played is None:  # a process died: these episodes are played again
                break
            frame, reward, terminated, truncated, _ = played
            obs = torch.cat([obs[:, 3:], torch.from_numpy(frame).to(device)], 1)
            episode_return, episode_length = episode_return + reward * running, episode_length + running
            running &= ~(terminated | truncated)
        if running.any():
            continue
        returns, lengths = returns + episode_return.tolist(), lengths + episode_length.tolist()
    k = args.eval_episodes
    return {
        "eval/episodic_return": float(np.mean(returns[:k])), "eval/episodic_length": float(np.mean(lengths[:k])),
        "eval/episodes": k,
    }  # fmt: skip


# === Arguments and files ==============================================================================================
def refuse(flag: str, value: object, limit: str) -> None:
    """Ends the program for a user's mistake: one line on stderr, exit code 2."""
    print(f"{SCRIPT}.py: error: --{flag.replace('_', '-')} {value}: {limit}", file=sys.stderr)
    raise SystemExit(2)


def memory(device: str) -> int:
    """Bytes: what is free on the GPU, or all of the computer's memory."""
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.cuda.mem_get_info()[0] if device == "cuda" else everything


def resolve_args(args: Args) -> Args:
    """Fills in what depends on the task, and refuses what cannot work before anything is allocated or written."""
    args = copy.copy(args)
    check_numbers(args)
    default = asdict(Args())
    given = {name for name, value in asdict(args).items() if value != default[name]}
    idle = [(name, f"does nothing with --{other.replace('_', '-')} {value}") for other, value, names in IDLE
            if getattr(args, other) == value for name in names]  # fmt: skip
    defaults = TASKS.get(args.env_id.removeprefix("dm_control/").removesuffix("-v0"))
    if args.perturb_fixed_factor is not None:
        idle += [(name, "does nothing with --perturb-fixed-factor") for name in (
            "perturb_rate", "min_perturb_factor", "max_perturb_factor")]  # fmt: skip
    if defaults is None:
        needed = ("total_timesteps", "stddev_steps", "max_perturb_factor")
        missing = [n for n in needed if getattr(args, n) is None and n not in dict(idle)]
        if missing:
            flags = ", ".join("--" + n.replace("_", "-") for n in missing)
            refuse("env_id", args.env_id, f"is not in the table of tasks; give {flags}")
        defaults = MEDIUM
    for name, value in defaults.items():
        if getattr(args, name) is None and name not in dict(idle):
            setattr(args, name, value)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"

    value = vars(args)
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    ratio = max(args.replay_ratio, 1 / args.replay_ratio) if 1e-6 < args.replay_ratio < 1e6 else 0.5
    wrong = {  # limit -> the arguments that break it
        "must be greater than 0": [n for n in (
            "total_timesteps", "batch_size", "n_step", "learning_rate", "feature_dim", "hidden_dim", "buffer_size",
            "eval_every", "eval_episodes", "log_every", "plasticity_every", "plasticity_batch_size",
            "checkpoint_every", "learning_starts", "dormant_temperature", "lambda_temperature",
            "stddev_steps") if value[n] is not None and not value[n] > 0],
        "must not be negative": [n for n in (
            "exploration_steps", "stddev_start", "stddev_end", "stddev_clip", "shift_pad", "perturb_every",
            "perturb_rate") if not value[n] >= 0],
        "must lie between 0 and 2**32 - 1": ["seed"] * (not 0 <= args.seed < 2**32),
        "must lie between 0 and 1": [n for n in (
            "gamma", "tau", "dormant_tau", "target_dormant_ratio", "min_perturb_factor", "max_perturb_factor",
            "perturb_fixed_factor", "target_lambda") if value[n] is not None and not 0 <= value[n] <= 1],
        "must be greater than 0 and less than 1": ["expectile"] * (not 0 < args.expectile < 1),
        f"must be at most --max-perturb-factor {args.max_perturb_factor}": ["min_perturb_factor"] * (
            args.max_perturb_factor is not None and args.min_perturb_factor > args.max_perturb_factor),
        "must be at least 15: the convolutions leave nothing of less": ["image_size"] * (args.image_size < 15),
        "must be even with --capture-video": ["image_size"] * (args.capture_video and args.image_size % 2),
        f"must be less than --image-size {args.image_size}": ["shift_pad"] * (args.shift_pad >= args.image_size),
        "must be k or 1/k with a whole k": ["replay_ratio"] * (abs(ratio - round(ratio)) > 1e-6 or ratio < 1),
        f"must be at most --learning-starts {args.learning_starts}": [n for n in (
            "batch_size", "n_step", "plasticity_batch_size") if value[n] > args.learning_starts],
        f"must be at most --buffer-size {args.buffer_size}":
            ["learning_starts"] * (args.learning_starts > args.buffer_size),
        f"must be at least --n-step {args.n_step} + 4": ["buffer_size"] * (args.buffer_size < args.n_step + 4),
        f"must be more than --learning-starts {args.learning_starts}":
            ["total_timesteps"] * (args.total_timesteps <= args.learning_starts),
        f"must be less than --total-timesteps {args.total_timesteps}":
            ["perturb_every"] * bool(
                "perturb_every" in given and args.perturb_every >= args.total_timesteps and not args.resume),
        "must not contain /": ["exp_name"] * ("/" in args.exp_name),
        "torch sees no such device here": [n for n in ("device", "buffer_device") if missing.get(value[n])],
        f"needs --device cuda, not {args.device}": ["cudagraphs"] * (args.cudagraphs and args.device != "cuda"),
    }  # fmt: skip
    for limit, names in wrong.items():
        for name in names:
            refuse(name, value[name], limit)
    for name, reason in idle:
        if name in given:
            refuse(name, value[name], reason)
    try:
        env = make_env(args.env_id, args.image_size)
        frame, actions = env.reset(seed=0)[0], env.unwrapped.action_space
        env.close()
    except gymnasium.error.UnregisteredEnv as error:
        close = difflib.get_close_matches(args.env_id, gymnasium.registry, n=1)
        refuse("env_id", args.env_id, f"did you mean {close[0]}?" if close else " ".join(str(error).split()))
    except Exception as error:
        packages = ("; without a screen MuJoCo needs MUJOCO_GL=egl and, on Debian or Ubuntu, the packages libegl1 "
                    "libgl1-mesa-dri libglx-mesa0 libopengl0") * args.env_id.startswith("dm_control/")  # fmt: skip
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        refuse("env_id", args.env_id, f"cannot be played through its pixels ({reason}){packages}")
    if frame.shape != (3, args.image_size, args.image_size):
        refuse("env_id", args.env_id, f"renders {frame.shape}, not (3, {args.image_size}, {args.image_size})")

    frame_bytes = 3 * args.image_size**2 + 4 * (3 + math.prod(actions.shape))
    replay_bytes = replay_capacity(args) * frame_bytes
    feature_size = 32 * ((args.image_size - 3) // 2 - 5) ** 2
    needed = {  # rough bytes but for the replay, by flag; a weight has a gradient and two moments
        "batch_size": 5e8 + 500 * max(args.batch_size, args.plasticity_batch_size) * args.image_size**2,
        "hidden_dim": 16 * 5 * args.hidden_dim**2,
        "feature_dim": 16 * 4 * args.feature_dim * (feature_size + args.hidden_dim),
    }
    if args.buffer_device == "auto":
        fits = args.device == "cuda" and replay_bytes + sum(needed.values()) < 0.9 * memory("cuda")
        args.buffer_device = "cuda" if fits else "cpu"
    for device in {args.device, args.buffer_device}:
        here = needed if device == args.device else {}
        here = here | dict(buffer_size=replay_bytes) if device == args.buffer_device else here
        gigabytes, limit = sum(here.values()) / 1e9, memory(device) / 1e9
        if gigabytes > limit:
            name = max(here, key=here.get)
            refuse(name, value[name], f"the run needs about {gigabytes:.1f} GB, {device} has {limit:.1f} GB")
    try:
        if args.track:
            import wandb  # noqa: F401
    except ImportError:
        refuse("track", "", "needs Weights & Biases: pip install wandb")
    return args


def replay_capacity(args) -> int:
    """Frames in the ring: each episode has one more than steps, which is little."""
    return min(args.buffer_size, args.total_timesteps + args.total_timesteps // 10 + 1000)


def has_type(value, kind) -> bool:
    """Whether a flag of this type can have this value."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(has_type(part, get_args(kind)[0]) for part in value)
    if get_origin(kind) in (Union, UnionType):
        return any(has_type(value, part) for part in get_args(kind))
    return type(value) in ((int, float) if kind is float else (kind,))


def check_numbers(args: Args) -> None:
    """Refuses numbers that no flag can mean."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                refuse(name, value, "must be a finite number")
            if isinstance(number, int) and abs(number) > 10**12:
                refuse(name, value, "must be at most 10**12")


def parse_args(command_line: list) -> Args:
    """The command line -> arguments; with --resume, those not given come from the run's args.json."""
    args = tyro.cli(Args, args=command_line)
    if args.resume is None:
        return args
    path = Path(args.resume) / "args.json"
    try:
        complete = path.is_file() and path.with_name("checkpoint.pt").is_file()
    except OSError:  # the name is too long for a file
        complete = False
    if not complete:
        refuse("resume", args.resume, "is not a run folder with args.json and checkpoint.pt")
    try:
        description = json.loads(path.read_text())
        if description["script"] != SCRIPT:
            refuse("resume", args.resume, f"is a run of another script ({description['script']})")
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in description["args"].items()}
        saved = Args(**saved)
        for name, kind in get_type_hints(Args).items():
            if not has_type(getattr(saved, name), kind):
                raise TypeError(f"{name} is {getattr(saved, name)!r}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        refuse("resume", args.resume, f"has an args.json that this version cannot read ({error})")
    args = tyro.cli(Args, args=command_line, default=saved)
    for name in [field.name for field in fields(Args) if field.name not in RESUMABLE]:
        if getattr(args, name) != getattr(saved, name):
            refuse(name, getattr(args, name), f"a resumed run keeps its own value, {getattr(saved, name)}")
    return args


def lock_folder(run_dir: Path, args: Args):
    """Creates a new run's folder, and locks it for this process alone -> the open lock file."""
    try:
        run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
        lock = open(run_dir / "lock", "w")
    except OSError as error:
        flag = "exp_name" if args.resume is None else "resume"
        refuse(flag, getattr(args, flag), f"cannot create the folder {run_dir} ({error.strerror})")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        refuse("resume", str(run_dir), "another process is working on this run")
    return lock


@contextmanager
def restoring(run_dir: Path, lock):
    """Around what reads a checkpoint: one that does not fit ends the program with one line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        lock.close()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        refuse("resume", str(run_dir), f"has a checkpoint.pt that does not fit ({reason})")
    except SystemExit:
        lock.close()
        raise


@contextmanager
def writing(run_dir: Path):
    """Around what writes to the run's folder: a full disk or a vanished folder ends the program with one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
        reason = " ".join(str(error).split())[:200]
        print(f"{SCRIPT}.py: error: cannot write to {run_dir}: {reason}", file=sys.stderr)
        raise SystemExit(1) from None


def save_file(path: Path, content) -> None:
    """Writes a .json, .npz or .pt file whole or not at all: a temporary file takes the old one's place when done."""
    temporary = path.with_suffix(".tmp")
    with writing(path.parent):
        try:
            with open(temporary, "wb") as file:
                if path.suffix == ".json":
                    file.write(json.dumps(content, indent=2).encode())
                elif path.suffix == ".npz":
                    np.savez_compressed(file, **content)
                else:
                    torch.save(content, file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def fixed_args(args: Args) -> dict:
    """The arguments that a resumed run keeps."""
    return {name: value for name, value in asdict(args).items() if name not in RESUMABLE}


def load_checkpoint(run_dir: Path, args: Args) -> dict:
    """A run's checkpoint.pt: tensors and plain Python only. The replay is mapped into memory, so that it is not there
    twice; all else is copied, because optimizers keep the tensors that they are given."""
    try:
        saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        saved = {name: value if name == "replay" else copy.deepcopy(value) for name, value in saved.items()}
        same = saved["args"] == fixed_args(args)
    except Exception as error:
        refuse("resume", str(run_dir), f"has a checkpoint.pt that cannot be read ({type(error).__name__})")
    if not same:
        refuse("resume", str(run_dir), "has a checkpoint.pt of another run")
    if not 0 <= saved["global_step"] <= args.total_timesteps:
        refuse("total_timesteps", args.total_timesteps, f"the run has already taken {saved['global_step']} steps")
    return saved


def start_logging(args: Args, run_dir: Path, first_step: int | None) -> SummaryWriter:
    """Writes args.json. What a killed part of the run had logged from first_step on is dropped."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        git = ""
    modules = [module for module in globals().values() if hasattr(module, "__version__")]
    versions = {module.__name__: str(module.__version__) for module in modules}
    versions |= {"python": platform.python_version(), "git": git}
    description = dict(script=SCRIPT, action_repeat=ACTION_REPEAT, args=asdict(args), versions=versions)
    save_file(run_dir / "args.json", description)
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, config=asdict(args),
                   sync_tensorboard=True)  # fmt: skip
    return SummaryWriter(str(run_dir), purge_step=first_step)


def not_finite(metrics: dict) -> list:
    """The names of the losses that are no finite numbers: the networks have diverged."""
    return [tag for tag, value in metrics.items() if tag.startswith("losses/") and not math.isfinite(value)]


def fast_cpu() -> None:
    """On a CPU: numbers too small for float32's normal range become 0, and float32 matrix products go through oneDNN
    instead of MKL where a self-test finds them as exact (CPUs without bfloat16 matrix units): on AMD twice as fast.

    torch.set_float32_matmul_precision must come before: it undoes this."""
    torch.set_flush_denormal(True)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    if ((x @ x).double() - x.double() @ x.double()).abs().max() > 1e-3:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


# === The algorithm ====================================================================================================
def train(args: Args) -> Path:
    """Trains, logs to a new folder under runs/ (or to args.resume), and returns that folder."""
    args = resolve_args(args)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(args.device)
    if device.type == "cpu":
        fast_cpu()

    stop = []  # the exit code, when the run is to stop
    envs = Environments(args, 1, stop)
    eval_envs = Environments(args, min(args.eval_episodes, os.cpu_count()), stop)
    eval_envs = Film(eval_envs) if args.capture_video else eval_envs
    if stop:
        raise SystemExit(stop[0])
    action_dim = math.prod(envs.envs.single_action_space.shape)
    agent = DrMAgent(action_dim, args).to(device, memory_format=torch.channels_last)
    optimizers = drm_optimizers(agent, args, device)
    replay = PixelReplay(replay_capacity(args), action_dim, args.buffer_device, args.n_step, args.gamma,
                         (3, args.image_size, args.image_size))  # fmt: skip
    # Streams of random numbers of their own, so that looking at the network or perturbing does not change the batches
    rng = {name: torch.Generator() for name in ("batch", "act", "intervention", "look")}
    for i, generator in enumerate(rng.values()):
        generator.manual_seed(episode_seed(args.seed, 2, i))

    start = dict(global_step=0, gradient_steps=0, episode=0, episode_actions=[], episode_return=0.0, evaluated=-1)
    start |= dict(learning_from=args.learning_starts, replay=None, history={}, sums={}, count=0, walltime=0.0)
    if args.resume:
        run_dir = Path(args.resume)
        lock = lock_folder(run_dir, args)
        with restoring(run_dir, lock):
            loaded = load_checkpoint(run_dir, args)
            start = {name: loaded.pop(name) for name in start} | loaded
            agent.load_state_dict(start["agent"])  # with the dormant ratio and the step of awakening
            for optimizer, saved in zip(optimizers, start["optimizers"]):
                optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
                for p, state in optimizer.state.items():  # another device may want another memory layout
                    state.update({k: torch.empty_like(p).copy_(v) for k, v in state.items() if v.shape == p.shape})
            torch.set_rng_state(start["torch_rng"])
            if device.type == "cuda" and start["cuda_rng"] is not None:
                torch.cuda.set_rng_state(start["cuda_rng"])
            for name, generator in rng.items():
                generator.set_state(start["rng"][name])
    else:
        name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
        run_dir = Path("runs") / name
        lock = lock_folder(run_dir, args)
    global_step, gradient_steps, episode, evaluated, learning_from, count, walltime = (start[k] for k in (
        "global_step", "gradient_steps", "episode", "evaluated", "learning_from", "count", "walltime"))  # fmt: skip
    history, sums = ({k: v.to(device) for k, v in start[name].items()} for name in ("history", "sums"))
    episode_actions, episode_return = start["episode_actions"], start["episode_return"]

    if args.resume and start["replay"] is None and global_step < args.total_timesteps:
        print(f"the checkpoint holds no replay: collecting {args.learning_starts} steps before learning goes on")
        learning_from, episode_actions, episode_return = global_step + args.learning_starts, [], 0.0
    # The simulator's state is not in the checkpoint: the same seed and the same actions lead to it again
    options = {"actions": np.array(episode_actions, np.float32)}
    played = envs.reset(seed=[episode_seed(args.seed, 0, episode)], options=options)
    if played is None:
        raise SystemExit(stop[0])
    frame = played[0][0]
    begun = False
    if start["replay"] is not None:
        with restoring(run_dir, lock):
            replay.load_state_dict(start["replay"])
        last = replay.newest()[0, -3:].cpu().numpy()
        begun = np.abs(frame.astype(int) - last).mean() <= 1  # renderers may differ by rounding
        if episode_actions and not begun:
            lock.close()
            refuse("resume", args.resume, "the environment plays the episode that was interrupted differently here")
    if not begun:
        replay.add_first(frame)
    del start

    writer = start_logging(args, run_dir, first_step=global_step + 1 if args.resume else None)
    start_time, captured = time.time(), None
    first_step = timer_step = global_step
    timer, paused = time.time(), 0.0  # for the speed since the last log
    clock = torch.float32 if device.type == "mps" else torch.float64  # as Python's numbers; MPS has none
    if args.compile:  # once per batch size and kind of gradient
        torch._dynamo.config.recompile_limit = 64
        for module in (agent.encoder, agent.actor, agent.critic, agent.critic_target, agent.value):
            module.compile(dynamic=False)

    def request_stop(number, frame):
        stop.append(128 + number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nsaving; once more to stop at once\n")

    def give_up(reason):
        print(f"{SCRIPT}.py: error: {reason}: saving", file=sys.stderr)
        stop.append(1)

    def log(values):
        values = {tag: float(value) for tag, value in values.items()}
        with writing(run_dir):
            for tag, value in values.items():
                writer.add_scalar(tag, value, global_step)

    def not_training(function):  # its time does not count for the speed
        def timed():
            nonlocal paused
            began = time.time()
            result = function()
            paused += time.time() - began
            return result

        return timed

    @not_training
    def run_evaluation():
        result = play_evaluation(agent, eval_envs, args, global_step, device, stop)
        log(result)
        if args.capture_video and not stop:
            from moviepy import ImageSequenceClip

            (run_dir / "films").mkdir(exist_ok=True)
            film = ImageSequenceClip(eval_envs.frames, fps=25)
            film.write_videofile(str(run_dir / "films" / f"{global_step}.mp4"), logger=None)
        return result

    @not_training
    def look():
        batch = [x.to(device) for x in replay.sample(args.plasticity_batch_size, rng["look"])]
        looked = look_at_plasticity(agent, batch, history, (args.dormant_tau,))
        log({tag: value for tag, value in looked.items() if math.isfinite(value)})  # no overlap with an empty set

    @not_training
    def save_checkpoint():
        with writing(run_dir):
            writer.flush()
        unfinished = global_step < args.total_timesteps  # nobody continues from a finished run's replay
        save_file(run_dir / "checkpoint.pt", dict(
            args=fixed_args(args), agent=agent.state_dict(), optimizers=[o.state_dict()["state"] for o in optimizers],
            history=history, sums=sums, count=count,
            rng={name: generator.get_state() for name, generator in rng.items()}, torch_rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state() if device.type == "cuda" else None,
            replay=replay.state_dict() if args.checkpoint_replay and unfinished else None, episode=episode,
            episode_actions=[np.asarray(action).tolist() for action in episode_actions], episode_return=episode_return,
            global_step=global_step, gradient_steps=gradient_steps, evaluated=-1 if stop else evaluated,
            learning_from=learning_from, walltime=walltime + time.time() - start_time))  # fmt: skip

    def now():
        return torch.full((), global_step, dtype=clock, device=device)

    def update():
        nonlocal captured, gradient_steps, sums, count
        obs, *others, next_obs = (x.to(device) for x in replay.sample(args.batch_size, rng["batch"]))
        batch = [random_shift(obs, args.shift_pad), *others, random_shift(next_obs, args.shift_pad), now()]
        if args.cudagraphs:
            captured = captured or capture_update(drm_update, agent, optimizers, batch, args)
            metrics = captured(batch)
        else:
            metrics = drm_update(agent, optimizers, batch, args)
        sums = {tag: value + sums.get(tag, 0) for tag, value in metrics.items()}
        gradient_steps, count = gradient_steps + 1, count + 1

    handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True, smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    while True:
        if global_step == args.total_timesteps or (global_step % args.eval_every == 0 and global_step != evaluated):
            result, evaluated = run_evaluation(), global_step
            if not result and not stop:
                give_up(f"the actor's output is not finite at step {global_step}")
        if global_step == args.total_timesteps:
            break
        if global_step >= learning_from and not len(replay):
            refuse("n_step", args.n_step, f"no episode of the first {global_step} steps was that long")
        if stop:
            break  # resumed, the run goes on here, and evaluates again if the signal came then

        # Act: the environment plays this step in its own process ...
        stddev = float(exploration_std(agent.dormant_ratio, now(), agent.awaken_step, args))
        uniform = global_step < args.exploration_steps
        action = act(agent, replay.newest().to(device), stddev, uniform, rng["act"])
        if not np.isfinite(action).all():
            give_up(f"the actor's output is not finite since step {global_step}")
            break
        envs.step_async(action)

        # Perturb, by the dormant ratio of the last gradient step
        events, learning = {}, global_step >= learning_from
        due = args.perturb_every and global_step % args.perturb_every == 0
        if due and global_step >= args.learning_starts:
            factor = perturb_factor(agent.dormant_ratio, args)
            perturb_networks(agent, optimizers, factor, args, rng["intervention"])
            events["plasticity/perturb_factor"] = factor

        # Learn: ... while the networks learn from the steps before it
        if learning and global_step % max(1, round(1 / args.replay_ratio)) == 0:
            for _ in range(max(1, round(args.replay_ratio))):
                update()

        # Observe
        played = envs.step_wait()
        global_step += 1
        bar.update()
        if played is None:  # the environment's process died: the episode is cut here, without this step
            over = True
        else:
            frame, reward, terminated, truncated, _ = played
            replay.add(action[0], reward[0], terminated[0], frame[0])
            episode_actions.append(action[0])
            episode_return += float(reward[0])
            over = terminated[0] or truncated[0]
        if over and played is not None:
            events |= {"charts/episodic_return": episode_return, "charts/episodic_length": len(episode_actions)}
            bar.set_postfix(episodic_return=f"{episode_return:g}", refresh=False)
        if over:
            episode, episode_actions, episode_return = episode + 1, [], 0.0
            played = envs.reset(seed=[episode_seed(args.seed, 0, episode)])
            if played is not None:
                replay.add_first(played[0][0])

        # Log, look, save
        log(events)
        if global_step % args.log_every == 0:
            awaken_step = float(agent.awaken_step)
            averages = {tag: float(total / count) for tag, total in sums.items()}
            if not_finite(averages) and not stop:
                give_up(f"{not_finite(averages)[0]} is not finite, after step {timer_step}")
            log(averages | {
                "charts/gradient_steps": gradient_steps, "charts/frames": global_step * ACTION_REPEAT,
                "charts/walltime": walltime + time.time() - start_time,
                "charts/replay_ratio": args.replay_ratio if learning else 0,
                "drm/awakened": math.isfinite(awaken_step)})  # fmt: skip
            if timer_step > max(learning_from, first_step):  # the first steps of learning warm up and compile
                log({"charts/SPS": (global_step - timer_step) / (time.time() - timer - paused)})
            sums, count, timer_step, timer, paused = {}, 0, global_step, time.time(), 0.0
        if global_step % args.plasticity_every == 0 and learning:
            look()
        if global_step % args.checkpoint_every == 0 and global_step < args.total_timesteps:
            save_checkpoint()

    save_checkpoint()
    with writing(run_dir):
        writer.close()
    bar.close()
    envs.close()
    eval_envs.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        lock.close()
        raise SystemExit(stop[0])
    if args.save_model:
        save_file(run_dir / "model.pt", agent.state_dict())

    summary = dict(global_step=global_step, gradient_steps=gradient_steps, walltime=walltime + time.time() - start_time)
    awaken_step = float(agent.awaken_step)
    summary["awaken_step"] = awaken_step if math.isfinite(awaken_step) else None
    save_file(run_dir / "summary.json", summary | result)
    print(f"{run_dir}: mean return {result['eval/episodic_return']:.1f} over {result['eval/episodes']:g} episodes")
    lock.close()
    return run_dir


if __name__ == "__main__":
    train(parse_args(sys.argv[1:]))
