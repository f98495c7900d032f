"""Revisiting Plasticity in Visual Reinforcement Learning: Data, Modules and Training Stages (Ma et al., ICLR 2024,
arXiv 2310.07418): data augmentation makes visual RL work because it preserves plasticity, above all the critic's, and
above all early in training. A study by flags, on DrQ-v2 (Yarats et al. 2022) and pixels of the DeepMind Control Suite.

Fraction of active units of a module M with N units (Eq. 1), averaged over a training batch:                    -> `fau`
    FAU_M = 1/N sum_{n in M} 1[a_n(x) > 0]      a: after the ReLU; all positions of a feature map count
The agent is DrQ-v2. A random shift by up to 4 pixels of o and o' is the data augmentation, f the encoder:
    y   = sum_{i<n} gamma^i r_{t+i} + gamma^n min_k Q_target_k( f(o_{t+n}), a' )     a' ~ pi(f(o_{t+n})), noise clipped
    critic and encoder:  sum_k ( Q_k(f(o_t), a_t) - y )^2                                           -> `drqv2_update`
    actor:               - min_k Q_k( f(o_t), a )   a ~ pi(f(o_t)); f gets no gradient
What the study changes is applied from outside, in `train` and by the functions under "Interventions":
    augmentation on, off, or switched at a step; resets; L2-Init, weight decay, layer norm, spectral norm, CReLU,
    shrink-and-perturb, ReDo; plasticity injection; replay ratio; heavy priming

    SCALE=small bash benchmark/drqv2_plasticity_cpu.sh    Cartpole Balance with and without augmentation on two CPU
                                                          cores, an hour: return 973 and 589 (one seed)
    python drqv2_plasticity.py                            Walker Run, DrQ-v2, 3M frames: for a GPU, not run yet
    SCALE=paper bash benchmark/drqv2_plasticity_fig3_fau.sh    Fig. 3 (paper, Walker Run at 3M frames: FAU of the critic
                                                          .418 with augmentation, .204 without); others: see README.md

Where this differs from the official code (facebookresearch/drqv2; Guozheng-Ma/Adaptive-Replay-Ratio), and why:
 1. Frames are stored once, in one ring on the GPU: 21 GB for 1M steps instead of 63.5 GB.
 2. A batch is drawn from all of the replay, also from the current episode; officially each batch comes from the
    finished episodes of one of 4 loaders, which see new ones late, and timing makes runs irreproducible.
 3. A termination cuts the bootstrap; officially a discount of 0 becomes 1 (no task of the paper terminates).
 4. The random shift copies whole pixels. Officially bilinear interpolation gives the same up to 3e-3 of 255.
 5. The actor's loss builds no gradient of the critic; officially it is computed and thrown away.
 6. Resets, interventions, injection into the actor, switching the augmentation, and priming are not in the official
    code; what the paper leaves open is our choice, and said where the flag is.
 7. Metrics are averaged over the updates between two logs and read once; officially each update waits for the GPU.
 8. Evaluations play other episodes than the training, side by side; officially both begin with the same seed.
Plasticity injection draws a new head, as in its paper (Nikishin et al. 2023); the authors' code takes the head's own
initial weights (--injection-init initial).
A checkpoint may come at any step: on resume the interrupted episode is played again from its seed and actions.
Not in this file: the frozen ImageNet encoder (Fig. 4), pruning, Atari-100k; films (benchmark/drqv2_plasticity_film.py
makes one of any run).
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
    """DrQ-v2 and what the paper does to it. A step is an agent step, 2 frames, unless it says gradient step; None: from
    the table of tasks."""

    exp_name: str = "drqv2_plasticity"  # name of this experiment, part of the run folder's name
    seed: int = 1  # seeds python, numpy, torch and every episode
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks live; auto: a GPU where there is one
    torch_deterministic: bool = False  # deterministic GPU kernels (two CPU runs are bit-identical without it)
    track: bool = False  # log to Weights & Biases too (install wandb yourself)
    wandb_project_name: str = "clayrl"  # the Weights & Biases project
    wandb_entity: str | None = None  # the Weights & Biases user or team
    save_model: bool = False  # at the end, save the weights alone as model.pt
    checkpoint_every: int = 250_000  # steps between checkpoints; always one at the end
    checkpoint_replay: bool = True  # keep the replay in the checkpoint; else a resumed run refills it before it learns
    resume: str | None = None  # a run folder to continue; its args.json gives all flags but the few that may change

    # environment
    env_id: str = "dm_control/walker-run-v0"  # dm_control/<domain>-<task>-v0, or any environment with pixels
    image_size: int = 84  # height and width of the rendered frames in pixels

    # DrQ-v2
    preset: Literal["official", "paper-table"] = "official"  # what None means: the figures' values or the table's
    total_timesteps: int | None = None  # steps of the whole run
    replay_ratio: float = 0.5  # gradient steps per step: k or 1/k
    learning_starts: int = 2000  # steps before the first gradient step
    exploration_steps: int = 2000  # first steps, with uniform random actions
    buffer_size: int | None = None  # frames in the replay, 21 kB each
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the replay lives; auto: the GPU where it fits
    batch_size: int | None = None  # transitions per gradient step
    n_step: int | None = None  # rewards per target before it bootstraps
    gamma: float = 0.99  # discount per step
    tau: float = 0.01  # share of the online critic that moves into the target critic at each gradient step
    learning_rate: float | None = None  # Adam's, of encoder, actor and critic
    feature_dim: int | None = None  # units of the trunks
    hidden_dim: int = 1024  # units of each hidden layer of the heads
    stddev_start: float = 1.0  # standard deviation of the exploration noise, at first
    stddev_end: float = 0.1  # and after its linear decay
    stddev_steps: int | None = None  # length in steps of the decay
    stddev_clip: float = 0.3  # bound of the noise in the updates (not when acting)

    # data augmentation and priming
    augmentation: bool = True  # random shifts of the training batches
    augmentation_switch_step: int | None = None  # from this step on the opposite
    shift_pad: int = 4  # largest random shift in pixels
    priming_gradient_steps: int = 0  # heavy priming: gradient steps at once when learning starts (paper: 100000)
    priming_augmentation: Literal["same", "on", "off"] = "same"  # random shifts while priming; same: as at first

    # interventions
    reset_times: int = 0  # so many resets, equally far apart (the paper's 10: 9, its tenth falls on the end of the run)
    reset_every: int = 0  # or: steps between resets; 0: none
    reset_scope: Literal["mlp", "fc", "all"] = "fc"  # drawn anew: the heads; and the trunks (ours); and the encoder
    reset_modules: tuple[Literal["actor", "critic"], ...] = ("actor", "critic")  # whose heads and trunks
    reset_optimizer: bool = True  # also make Adam forget them
    weight_decay: float = 0.0  # times the weights, added to gradients before Adam (paper: 1e-5; all networks: ours)
    l2_init: float = 0.0  # times the squared distance of critic and encoder from their initial weights (paper: 1e-2)
    layer_norm: bool = False  # before each ReLU of convolutions and heads (ours: over all channels and positions)
    spectral_norm: Literal["none", "trunk", "head"] = "none"  # of the first linear layer of trunks or of heads
    crelu: Literal["none", "half", "full"] = "none"  # the critic's heads get [ReLU(x), ReLU(-x)] of half or all units
    shrink_perturb_every: int = 0  # steps between critic weights := shrink * weights + perturb * new ones; 0: never
    shrink: float = 0.2  # "multiplying the critic network weights by a small scalar" (paper; which one: ours)
    perturb: float = 1.0  # "a perturbation equivalent to the weights of a randomly initialized network" (paper)
    redo_period_gradient_steps: int = 0  # gradient steps between recyclings (none while priming); 0: never
    redo_tau: float = 0.025  # recycle neurons with a score of at most this
    redo_batch_size: int = 64  # transitions that the scores are taken over
    redo_modules: tuple[Literal["encoder", "actor", "critic"], ...] = ("critic",)  # where neurons are recycled (ours)
    injection: tuple[Literal["actor", "critic"], ...] = ()  # plasticity injection into these heads
    injection_step: int = 500_000  # at this step
    injection_init: Literal["fresh", "initial"] = "fresh"  # the new head: drawn anew, or the head's own first weights

    # what to look at
    eval_every: int = 5000  # steps between evaluations, also before the first and after the last
    eval_episodes: int = 10  # episodes of an evaluation, with the mean action
    plasticity_every: int = 5000  # steps between looks at dormant ratios, overlaps, feature ranks and norms
    plasticity_batch_size: int = 256  # transitions for them
    dormant_tau: tuple[float, ...] = (0.025, 0.0, 0.1)  # thresholds that are logged; overlaps use the first
    log_every: int = 500  # steps between logs of losses, fractions of active units and speed

    # speed
    amp: bool = False  # convolutions and trunks of the update in bfloat16; heads, losses, Adam, acting in float32
    compile: bool = False  # compile the networks
    cudagraphs: bool = False  # capture the whole update in one CUDA graph and replay it per batch


# The tasks of DrQ-v2 with the values that made the figures; PAPER_TABLE is the same for all
EASY = dict(total_timesteps=500_500, stddev_steps=100_000, buffer_size=1_000_000, batch_size=256, n_step=3,
            learning_rate=1e-4, feature_dim=50)  # fmt: skip
MEDIUM = EASY | dict(total_timesteps=1_500_500, stddev_steps=500_000)
HARD = EASY | dict(total_timesteps=15_050_000, stddev_steps=2_000_000, learning_rate=8e-5, feature_dim=100)
WALKER = dict(n_step=1, batch_size=512)
PAPER_TABLE = dict(stddev_steps=500_000, buffer_size=1_000_000, batch_size=256, n_step=3)
TASKS = {
    **dict.fromkeys(("cartpole-balance", "cartpole-balance_sparse", "cartpole-swingup", "ball_in_cup-catch",
                     "finger-spin", "hopper-stand", "pendulum-swingup"), EASY),
    **dict.fromkeys(("acrobot-swingup", "cartpole-swingup_sparse", "cheetah-run", "finger-turn_easy",
                     "finger-turn_hard", "hopper-hop", "quadruped-walk", "reacher-easy", "reacher-hard"), MEDIUM),
    **dict.fromkeys(("humanoid-stand", "humanoid-walk", "humanoid-run"), HARD),
    "walker-stand": EASY | WALKER, "walker-walk": EASY | WALKER, "walker-run": MEDIUM | WALKER,
    "quadruped-run": MEDIUM | dict(buffer_size=100_000),
}  # fmt: skip
# Pairs of flags that do not go together
CONFLICTS = (
    ("redo_period_gradient_steps", "layer_norm", "recycling one neuron would change the others"),
    ("redo_period_gradient_steps", "crelu", "a neuron has two outputs"),
    ("redo_period_gradient_steps", "injection", "a head of three networks has no neurons of its own to recycle"),
    ("redo_period_gradient_steps", "spectral_norm", "the normalised layer cannot be edited"),
    ("reset_every", "injection", "the reset would end what was injected"),
    ("reset_every", "spectral_norm", "the normalised layer cannot be drawn anew"),
    ("shrink_perturb_every", "injection", "the frozen heads would change"),
    ("shrink_perturb_every", "spectral_norm", "the normalised layer would undo it"),
    ("l2_init", "injection", "the new head would be drawn to the first weights of the old one"),
)
# Flags that do nothing without another one
NEEDS = dict(
    reset_scope="reset_every", reset_modules="reset_every", reset_optimizer="reset_every", injection_step="injection",
    injection_init="injection", redo_tau="redo_period_gradient_steps", redo_modules="redo_period_gradient_steps",
    shrink="shrink_perturb_every", perturb="shrink_perturb_every", priming_augmentation="priming_gradient_steps",
)  # fmt: skip
SCRIPT, ACTION_REPEAT = "drqv2_plasticity", 2
ACTION_LIMIT = 1 - 1e-6  # actions are clamped to this
HEADS = {"actor": ["policy"], "critic": ["q1", "q2"]}  # the parts of a module that are multi-layer perceptrons
# What may be given anew with --resume: it does not change what is learned.
RESUMABLE = ("resume total_timesteps device buffer_device eval_every eval_episodes checkpoint_every checkpoint_replay "
             "track wandb_project_name wandb_entity save_model log_every compile cudagraphs torch_deterministic "
             "plasticity_every plasticity_batch_size dormant_tau").split()  # fmt: skip


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


# === Plasticity =======================================================================================================
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


# === Interventions ====================================================================================================
class CReLULayers(Layers):
    """Layers with [ReLU(x), ReLU(-x)] in place of each ReLU(x). The activations are those of ReLU(x) alone: of both,
    half is active always."""

    def forward(self, x):
        active = []
        for layer in self:
            if isinstance(layer, nn.ReLU):
                active.append(layer(x))
                x = torch.cat([active[-1], layer(-x)], 1)
            else:
                x = layer(x)
        return x, active


def apply_crelu(critic, half: bool) -> None:
    """Concatenated ReLU (Abbas et al. 2023) in the heads. With half of the units the layers' inputs keep their size: a
    Q head has 1.11M weights, 0.56M with half of the units, 2.16M with all of them (the paper does not say which)."""
    for name in ("q1", "q2"):
        first, relu, second, _, last = getattr(critic, name)
        units = first.out_features // (2 if half else 1)
        layers = CReLULayers(nn.Linear(first.in_features, units), relu, nn.Linear(2 * units, units), relu,
                             nn.Linear(2 * units, last.out_features))  # fmt: skip
        setattr(critic, name, layers.apply(draw_layer))


def apply_layer_norm(layers: Layers) -> None:
    """A layer norm before each ReLU, in place; of a convolution over all channels and positions."""
    for i in reversed([i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]):
        layers.insert(i, nn.GroupNorm(1, len(layers[i - 1].bias)))


def apply_spectral_norm(agent, where: str) -> None:
    """Divides the "initial linear layer" of actor and critic by its spectral norm. The paper does not say which one it
    is: that of the trunks, where the layer norm behind it hides the scale of the weights, so that only the effective
    learning rate changes (outputs move by 1e-5 when a norm of 3 becomes 1), or that of the heads."""
    for name, heads in HEADS.items():
        for part in ["trunk"] if where == "trunk" else heads:
            nn.utils.parametrizations.spectral_norm(agent.get_submodule(f"{name}.{part}")[0])


def apply_l2_init(optimizer, coefficient: float) -> None:
    """L2-Init (Kumar et al. 2023): coefficient * sum (w - w_0)^2 joins the loss, as its gradient before each step."""
    weights = optimizer.param_groups[0]["params"]
    initial = [w.detach().clone() for w in weights]

    def add_gradient(*_):
        gradients = [w.grad for w in weights]
        torch._foreach_add_(gradients, [w.detach() for w in weights], alpha=2 * coefficient)
        torch._foreach_add_(gradients, initial, alpha=-2 * coefficient)

    optimizer.register_step_pre_hook(add_gradient)


def forget(optimizer, parameter, mask) -> None:
    """Zeroes what Adam remembers of a parameter's elements, in place; mask (broadcastable to the parameter) bool."""
    for value in optimizer.state.get(parameter, {}).values():
        if value.shape == parameter.shape:
            value.masked_fill_(mask, 0)


def optimizer_of(parameter, optimizers):
    return next(o for o in optimizers if any(parameter is p for p in o.param_groups[0]["params"]))


def forget_all(module, optimizers) -> None:
    """Adam starts anew for all of a module's weights, in place."""
    for parameter in module.parameters():
        for value in optimizer_of(parameter, optimizers).state.get(parameter, {}).values():
            value.zero_()


def reset_agent(agent, optimizers, args, generator) -> None:
    """Resets (Nikishin et al. 2022): draws parts of the agent anew, in place; the target gets the new ones, too.

    Scope mlp: the three linear layers of each head, "the last layers" of their text; fc: also the trunks, as in their
    code; all: also the encoder. The replay is kept.
    """
    drawn = ["encoder"] * (args.reset_scope == "all")
    for name in args.reset_modules:
        for part in HEADS[name] + ["trunk"] * (args.reset_scope != "mlp"):
            drawn.append(f"{name}.{part}")
    for name in drawn:
        module = agent.get_submodule(name)
        for layer in module.modules():
            draw_layer(layer, generator)
        if args.reset_optimizer:
            forget_all(module, optimizers)
        if name.startswith("critic"):
            agent.get_submodule(name.replace("critic", "critic_target")).load_state_dict(module.state_dict())


@torch.no_grad()
def shrink_and_perturb(module, shrink: float, perturb: float, generator) -> None:
    """Ash and Adams 2020: weights := shrink * weights + perturb * freshly drawn ones, in place."""
    fresh = copy.deepcopy(module)
    for layer in fresh.modules():
        draw_layer(layer, generator)
    for parameter, new in zip(module.parameters(), fresh.parameters()):
        parameter.mul_(shrink).add_(new, alpha=perturb)


@torch.no_grad()
def recycle_units(agent, optimizers, batch, args, generator) -> dict:
    """ReDo (Sokar et al. 2023) on a batch, in place -> metrics: neurons with a score of at most redo_tau get newly
    drawn incoming weights, a bias of 0, outgoing weights of 0, and Adam forgets all these. The target critic is left
    alone, but for what it reads of recycled feature maps."""
    active = activations(agent, batch)[1]
    counts = {}
    for name in args.redo_modules:
        stacks = (
            [agent.encoder.convnet] if name == "encoder" else [getattr(getattr(agent, name), h) for h in HEADS[name]]
        )
        scores = iter(dormant_score(a) for a in active[name])
        for layers in stacks:
            weighted = [layer for layer in layers if not isinstance(layer, nn.ReLU)]
            readers = [[layer] for layer in weighted[1:]]
            if name == "encoder":  # also the target critic reads the features
                readers.append([module.trunk[0] for module in (agent.actor, agent.critic, agent.critic_target)])
            masks = [next(scores) <= args.redo_tau for _ in readers]
            for layer, mask in zip(weighted, masks):
                fresh = copy.deepcopy(layer)
                draw_layer(fresh, generator)
                for parameter, new in zip(layer.parameters(), fresh.parameters()):
                    rows = mask.view(-1, *[1] * (parameter.dim() - 1))
                    parameter.copy_(torch.where(rows, new, parameter))
                    forget(optimizer_of(parameter, optimizers), parameter, rows)
            for layer, mask in [(layer, mask) for group, mask in zip(readers, masks) for layer in group]:
                columns = mask.repeat_interleave(layer.weight.shape[1] // len(mask))  # a feature map's positions
                columns = columns.view(1, -1, *[1] * (layer.weight.dim() - 2))
                layer.weight.masked_fill_(columns, 0)
                if layer.weight.requires_grad:
                    forget(optimizer_of(layer.weight, optimizers), layer.weight, columns)
            tag = f"plasticity/redo_recycled/{name}"
            counts[tag] = counts.get(tag, 0) + sum(mask.sum() for mask in masks)
    return counts


class InjectedHead(nn.Module):
    """Plasticity injection (Nikishin et al. 2023; Section 4): frozen(x) + learning(x) - initial(x).

    `learning` is the head that the optimizer knows, with new weights; `frozen` has its old ones, `initial` the new
    ones, and neither learns. At first the output is what it was; the number of weights that learn is unchanged. The
    activations are those of `learning`.
    """

    def __init__(self, head: Layers, new: dict):
        super().__init__()
        if isinstance(head, InjectedHead):
            raise ValueError("plasticity was already injected into this head")
        self.frozen, self.learning = copy.deepcopy(head).requires_grad_(False), head
        head.load_state_dict(new)
        self.initial = copy.deepcopy(head).requires_grad_(False)

    def forward(self, x):
        output, active = self.learning(x)
        return self.frozen(x)[0] + (output - self.initial(x)[0]), active


def inject_plasticity(agent, optimizers, name: str, initial: dict | None, generator) -> None:
    """Injects into the actor's head or the critic's two, and into those of the target critic; Adam forgets the heads.

    initial: the agent's first state_dict, for the variant of the authors' code; None: heads drawn anew.
    """
    for part in HEADS[name]:
        owner = getattr(agent, name)
        new = copy.deepcopy(getattr(owner, part))
        for layer in new.modules():
            draw_layer(layer, generator)
        if initial is not None:
            prefix = f"{name}.{part}."
            new.load_state_dict({k.removeprefix(prefix): v for k, v in initial.items() if k.startswith(prefix)})
        for module in [owner] + [agent.critic_target] * (name == "critic"):
            setattr(module, part, InjectedHead(getattr(module, part), new.state_dict()))
        forget_all(getattr(owner, part).learning, optimizers)


def intervene_at_start(agent, args) -> None:
    """Changes that the networks carry from the beginning; the target critic is the critic's copy again."""
    if args.crelu != "none":
        apply_crelu(agent.critic, half=args.crelu == "half")
    if args.layer_norm:
        for layers in (agent.encoder.convnet, agent.actor.policy, agent.critic.q1, agent.critic.q2):
            apply_layer_norm(layers)
    if args.spectral_norm != "none":
        apply_spectral_norm(agent, args.spectral_norm)
    agent.critic_target = copy.deepcopy(agent.critic).requires_grad_(False)


# === DrQ-v2 ===========================================================================================================
def drqv2_optimizers(agent, args, device) -> list:
    """Adam for encoder, actor and critic."""
    options = dict(lr=args.learning_rate, fused=device.type != "mps", capturable=args.cudagraphs)
    return [torch.optim.Adam(m.parameters(), **options) for m in (agent.encoder, agent.actor, agent.critic)]


def truncated_normal(mean, std, clip: float) -> torch.Tensor:
    """mean + noise of standard deviation std (0-d), clipped to +-clip; the sum clamped to the action limits, with a
    gradient of 1."""
    action = mean + (torch.randn_like(mean) * std).clamp(-clip, clip)
    return action - action.detach() + action.detach().clamp(-ACTION_LIMIT, ACTION_LIMIT)


def drqv2_update(agent, optimizers, batch, args) -> dict:
    """One gradient step of critic and encoder, then of the actor, then of the target, on a batch: obs, action, reward,
    discount, next_obs from the replay, augmented, and the noise's standard deviation std (0-d) -> metrics, detached, on
    the device."""
    (obs, action, reward, discount, next_obs, std), (encoder_optimizer, actor_optimizer, critic_optimizer) = (
        batch, optimizers)  # fmt: skip
    autocast = partial(torch.autocast, obs.device.type, torch.bfloat16, args.amp)
    with torch.no_grad(), autocast():  # a region of its own: weights that it casts carry no gradient
        next_features, _ = agent.encoder(next_obs)
        next_action = truncated_normal(agent.actor(next_features)[0], std, args.stddev_clip)
        target_q1, target_q2, _ = agent.critic_target(next_features, next_action)
        target = reward + discount * torch.minimum(target_q1, target_q2)
    with autocast():
        features, encoder_active = agent.encoder(obs)
        q1, q2, critic_active = agent.critic(features, action)
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
    features = features.detach()
    with autocast():
        mean, actor_active = agent.actor(features)
        actor_q1, actor_q2, _ = agent.critic(features, truncated_normal(mean, std, args.stddev_clip))
    actor_loss = -torch.minimum(actor_q1, actor_q2).mean()
    actor_optimizer.zero_grad()
    actor_loss.backward()
    actor_optimizer.step()
    for weight in critic_weights:
        weight.requires_grad_(True)
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
    return {
        "losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(), "losses/reward": reward.mean(),
        "losses/q_values": q1.detach().mean(), "losses/targets": target.mean(),
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


def stddev_at(step: int, args) -> float:
    """Standard deviation of the exploration noise: linear from stddev_start to stddev_end in stddev_steps steps."""
    progress = min(step / args.stddev_steps, 1.0)
    return args.stddev_start + progress * (args.stddev_end - args.stddev_start)


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
    defaults = TASKS.get(args.env_id.removeprefix("dm_control/").removesuffix("-v0"), {})
    if not defaults:
        defaults = EASY | dict(total_timesteps=None, stddev_steps=None)
    if args.preset == "paper-table":
        defaults = defaults | PAPER_TABLE
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"

    if args.reset_times and args.reset_every:
        refuse("reset_times", args.reset_times, "does not go with --reset-every: both say when to reset")
    if args.reset_times > 0 and args.total_timesteps is not None:
        period = -(-args.total_timesteps // (args.reset_times + 1))
        if period * args.reset_times >= args.total_timesteps:
            refuse("reset_times", args.reset_times, f"are too many for --total-timesteps {args.total_timesteps}")
        args.reset_every, args.reset_times = period, 0
    value, default = vars(args), asdict(Args())
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    for name in ("total_timesteps", "stddev_steps"):
        if value[name] is None:
            refuse(name, None, f"the table of tasks has no {args.env_id}; give a number")
    ratio = args.replay_ratio
    wrong = {  # limit -> the arguments that break it
        "must be greater than 0": [n for n in (
            "total_timesteps", "batch_size", "n_step", "learning_rate", "feature_dim", "hidden_dim", "stddev_steps",
            "buffer_size", "eval_every", "eval_episodes", "plasticity_every", "plasticity_batch_size", "log_every",
            "checkpoint_every", "learning_starts", "redo_batch_size") if not value[n] > 0],
        "must not be negative": [n for n in (
            "exploration_steps", "stddev_start", "stddev_end", "stddev_clip", "shift_pad", "priming_gradient_steps",
            "reset_times", "reset_every", "weight_decay", "l2_init", "shrink_perturb_every", "shrink", "perturb",
            "redo_period_gradient_steps", "redo_tau") if not value[n] >= 0],
        "must lie between 0 and 2**32 - 1": ["seed"] * (not 0 <= args.seed < 2**32),
        "must lie between 0 and 1": [n for n in ("gamma", "tau") if not 0 <= value[n] <= 1],
        "must be at least 15: the convolutions leave nothing of less": ["image_size"] * (args.image_size < 15),
        f"must be less than --image-size {args.image_size}": ["shift_pad"] * (args.shift_pad >= args.image_size),
        "must be k or 1/k with a whole k": ["replay_ratio"] * (
            not 1e-6 < ratio < 1e6 or abs(max(ratio, 1 / ratio) - round(max(ratio, 1 / ratio))) > 1e-6),
        f"must be at most --learning-starts {args.learning_starts}": [n for n in (
            "batch_size", "plasticity_batch_size", "n_step") if value[n] > args.learning_starts],
        f"must be at most --buffer-size {args.buffer_size}":
            ["learning_starts"] * (args.learning_starts > args.buffer_size),
        f"must be at least --n-step {args.n_step} + 4": ["buffer_size"] * (args.buffer_size < args.n_step + 4),
        f"must be more than --learning-starts {args.learning_starts}":
            ["total_timesteps"] * (args.total_timesteps <= args.learning_starts),
        f"must lie between 1 and --total-timesteps {args.total_timesteps} - 1": [n for n, given in (
            ("augmentation_switch_step", args.augmentation_switch_step is not None),
            ("injection_step", bool(args.injection)), ("reset_every", args.reset_every > 0),
            ("shrink_perturb_every", args.shrink_perturb_every > 0),
            ) if given and not 0 < value[n] < args.total_timesteps],
        "must name each module once: a head that is already injected cannot be injected again":
            ["injection"] * (len(set(args.injection)) < len(args.injection)),
        f"is more than --learning-starts {args.learning_starts}": ["redo_batch_size"] * bool(
            args.redo_period_gradient_steps and args.redo_batch_size > args.learning_starts),
        "must name a module": [n for n in ("reset_modules", "redo_modules") if not value[n]],
        "must hold thresholds that are not negative":
            ["dormant_tau"] * (not args.dormant_tau or not all(tau >= 0 for tau in args.dormant_tau)),
        "must be even with half of the units": ["hidden_dim"] * (args.crelu == "half" and args.hidden_dim % 2),
        "must not contain /": ["exp_name"] * ("/" in args.exp_name),
        "torch sees no such device here": [n for n in ("device", "buffer_device") if missing.get(value[n])],
        f"needs --device cuda, not {args.device}": ["cudagraphs"] * (args.cudagraphs and args.device != "cuda"),
    }  # fmt: skip
    for limit, names in wrong.items():
        for name in names:
            refuse(name, value[name], limit)
    for name, other, reason in CONFLICTS:
        if value[name] != default[name] and value[other] != default[other]:
            refuse(name, value[name], f"does not go with --{other.replace('_', '-')}: {reason}")
    for name, other in NEEDS.items():
        if value[name] != default[name] and value[other] == default[other]:
            refuse(name, value[name], f"does nothing without --{other.replace('_', '-')}")
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
    if stop:
        raise SystemExit(stop[0])
    action_dim = math.prod(envs.envs.single_action_space.shape)
    agent = DrQv2Agent(action_dim, args)
    intervene_at_start(agent, args)
    initial = copy.deepcopy(agent.state_dict()) if args.injection_init == "initial" else None
    agent.to(device, memory_format=torch.channels_last).eval()  # only updates move the spectral norm's estimate
    optimizers = drqv2_optimizers(agent, args, device)
    for optimizer in optimizers:
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay
    for optimizer in (optimizers[0], optimizers[2]) if args.l2_init else ():  # those of the critic's loss
        apply_l2_init(optimizer, args.l2_init)
    replay = PixelReplay(replay_capacity(args), action_dim, args.buffer_device, args.n_step, args.gamma,
                         (3, args.image_size, args.image_size))  # fmt: skip
    # Streams of random numbers of their own, so that looking at the network or resetting does not change the batches
    rng = {name: torch.Generator() for name in ("batch", "act", "intervention", "look")}
    for i, generator in enumerate(rng.values()):
        generator.manual_seed(episode_seed(args.seed, 2, i))

    start = dict(global_step=0, gradient_steps=0, primed=0, episode=0, episode_actions=[], episode_return=0.0)
    start |= dict(
        evaluated=-1, injected=False, history={}, learning_from=args.learning_starts, replay=None, sums={}, count=0
    )
    start |= dict(walltime=0.0)
    if args.resume:
        run_dir = Path(args.resume)
        lock = lock_folder(run_dir, args)
        with restoring(run_dir, lock):
            loaded = load_checkpoint(run_dir, args)
            start = {name: loaded.pop(name) for name in start} | loaded
            for name in args.injection if start["injected"] else ():
                inject_plasticity(agent, optimizers, name, None, rng["intervention"])
            agent.load_state_dict(start["agent"])
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
    global_step, gradient_steps, primed, episode = (
        start[k] for k in ("global_step", "gradient_steps", "primed", "episode"))  # fmt: skip
    evaluated, injected, learning_from, walltime = (
        start[k] for k in ("evaluated", "injected", "learning_from", "walltime"))  # fmt: skip
    history, sums = ({k: v.to(device) for k, v in start[name].items()} for name in ("history", "sums"))
    count = start["count"]
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
    if args.compile:  # once per batch size and kind of gradient
        torch._dynamo.config.recompile_limit = 64
        for module in (agent.encoder, agent.actor, agent.critic, agent.critic_target):
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
        return result

    @not_training
    def look():
        batch = [x.to(device) for x in replay.sample(args.plasticity_batch_size, rng["look"])]
        looked = look_at_plasticity(agent, batch, history, args.dormant_tau)
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
            global_step=global_step, gradient_steps=gradient_steps, primed=primed, injected=injected,
            evaluated=-1 if stop else evaluated,
            learning_from=learning_from, walltime=walltime + time.time() - start_time))  # fmt: skip

    def update(augmentation):
        nonlocal captured, gradient_steps, sums, count
        stddev = torch.full((), stddev_at(global_step, args), device=device)
        obs, *others, next_obs = (x.to(device) for x in replay.sample(args.batch_size, rng["batch"]))
        if augmentation:
            obs, next_obs = random_shift(obs, args.shift_pad), random_shift(next_obs, args.shift_pad)
        batch = [obs, *others, next_obs, stddev]
        agent.train()
        if args.cudagraphs:
            captured = captured or capture_update(drqv2_update, agent, optimizers, batch, args)
            metrics = captured(batch)
        else:
            metrics = drqv2_update(agent, optimizers, batch, args)
        agent.eval()
        sums = {tag: value + sums.get(tag, 0) for tag, value in metrics.items()}
        gradient_steps, count = gradient_steps + 1, count + 1

    @not_training
    def prime():
        nonlocal primed
        while primed < args.priming_gradient_steps and not stop:
            update(args.priming_augmentation == "on" or args.priming_augmentation == "same" and args.augmentation)
            primed += 1

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
        if global_step >= learning_from and primed < args.priming_gradient_steps:
            prime()
        if stop:
            break  # resumed, the run goes on here, and evaluates again if the signal came then

        # Intervene
        events = {}
        if args.reset_every and global_step and global_step % args.reset_every == 0:
            reset_agent(agent, optimizers, args, rng["intervention"])
            events["plasticity/reset"] = 1
        if args.shrink_perturb_every and global_step and global_step % args.shrink_perturb_every == 0:
            shrink_and_perturb(agent.critic, args.shrink, args.perturb, rng["intervention"])
            events["plasticity/perturb_factor"] = args.shrink
        if args.injection and global_step == args.injection_step:
            for name in args.injection:
                inject_plasticity(agent, optimizers, name, initial, rng["intervention"])
            injected, captured = True, None
            events["plasticity/injection"] = 1
        switched = args.augmentation_switch_step is not None and global_step >= args.augmentation_switch_step
        augmentation = args.augmentation != switched

        # Act: the environment plays this step in its own process ...
        uniform = global_step < args.exploration_steps
        action = act(agent, replay.newest().to(device), stddev_at(global_step, args), uniform, rng["act"])
        if not np.isfinite(action).all():
            give_up(f"the actor's output is not finite since step {global_step}")
            break
        envs.step_async(action)

        # Learn: ... while the networks learn from the steps before it
        learning = global_step >= learning_from
        if learning and global_step % max(1, round(1 / args.replay_ratio)) == 0:
            for _ in range(max(1, round(args.replay_ratio))):
                update(augmentation)
                if args.redo_period_gradient_steps and gradient_steps % args.redo_period_gradient_steps == 0:
                    batch = [x.to(device) for x in replay.sample(args.redo_batch_size, rng["intervention"])]
                    for tag, recycled in recycle_units(agent, optimizers, batch, args, rng["intervention"]).items():
                        events[tag] = events.get(tag, 0) + recycled

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
            averages = {tag: float(total / count) for tag, total in sums.items()}
            if not_finite(averages) and not stop:
                give_up(f"{not_finite(averages)[0]} is not finite, after step {timer_step}")
            log(averages | {
                "charts/stddev": stddev_at(global_step, args), "charts/gradient_steps": gradient_steps,
                "charts/frames": global_step * ACTION_REPEAT, "charts/walltime": walltime + time.time() - start_time,
                "charts/replay_ratio": args.replay_ratio if learning else 0,
                "charts/augmentation": augmentation})  # fmt: skip
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
    save_file(run_dir / "summary.json", summary | result)
    print(f"{run_dir}: mean return {result['eval/episodic_return']:.1f} over {result['eval/episodes']:g} episodes")
    lock.close()
    return run_dir


if __name__ == "__main__":
    train(parse_args(sys.argv[1:]))
