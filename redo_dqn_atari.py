# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "ale-py==0.12.1",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "moviepy==2.2.1",
# ]
# ///
"""The Dormant Neuron Phenomenon in Deep Reinforcement Learning (Sokar, Agarwal, Castro, Evci; ICML 2023, arXiv
2302.12902): in deep RL more and more neurons become inactive, and the more so, the more gradient steps are taken per
step of the environment. Recycling the dormant neurons (ReDo) keeps the network able to learn.

Score of neuron i of a layer with H neurons, on a batch D of states (Eq. 1):                          -> `dormant_score`
    s_i = E_D |h_i(x)| / ( 1/H sum_k E_D |h_k(x)| )      h: after the activation function; the scores' mean is 1
A neuron is tau-dormant if s_i <= tau (Definition 3.1). One feature map of a convolution is one neuron.
ReDo (Algorithm 1), every 1000 gradient steps:                                                              -> `recycle`
    for every tau-dormant neuron: re-draw its incoming weights from the initial distribution, zero its outgoing weights
The recycled neuron starts anew, and at tau = 0 the network's outputs on D do not change.
The agent is DQN: act epsilon-greedily; every 4 steps do 4 x replay ratio gradient steps on       -> `train`, `update`
    Huber( q(o_t, a_t),  r_{t+1} + gamma max_a' q_target(o_{t+1}, a') )

    SCALE=small bash benchmark/redo_dqn_atari/cpu.sh    DQN and ReDo for 100,000 steps on two CPU cores, 2 hours:
                                                        ReDo leaves hardly a neuron dormant; returns show no difference
    python redo_dqn_atari.py                            ReDo at replay ratio 0.25, 10M steps: for a GPU, not run yet
    SCALE=paper bash benchmark/redo_dqn_atari/fig1_headline.sh    Fig. 1 (paper: interquartile mean of 17 games, replay
                                                        ratio 1, 10M frames: DQN 0.30, ReDo 0.625); others: README.md

Differences from the official code (google/dopamine, labs/redo), and the reasons for them:
 1. In the dense layer, the weights that read a recycled feature map are zeroed. Officially, the mask is laid out
    channel by channel but the features position by position, so almost only other weights are.
 2. In the ResNet, the second block's first convolution is read by its own second one, not by the next stack's.
 3. A layer is re-drawn from the distribution that it was initialised from, the ResNet's inner convolutions included.
 4. Recycling and resets are timed by gradient steps that were taken, measurements by steps; officially, one counter of
    gradient steps that also runs during the warm-up times all, and every second evaluation falls on a reset. Here, at
    replay ratio 1, evaluations come 30,000 and 80,000 gradient steps after a reset in turn: its curve zigzags.
 5. The published configuration recycles nothing; the defaults here are the paper's: every 1000 gradient steps, a batch
    of 64, tau 0.1 (0.025 at replay ratio 0.25).
 6. The emulator plays a step while the network learns: the action is chosen before the burst of updates, not after,
    and the burst sees the data up to the previous step.
 7. Frames are stored once; the ring holds 1M frames, and no transition starts at the last frame of an episode.
 8. An evaluation plays several games at once, each for its share of the 125,000 steps.
 9. Recycling and resets go on to the end; officially, there are none from gradient step 2,500,000 on
    (--redo-end-gradient-steps 2500000 does the same here). This concerns only runs with more gradient steps.
10. Where an episode is truncated, its last n - 1 transitions are kept and bootstrap after fewer than n steps;
    officially, they are dropped.
11. Episodes end after 108,000 frames, as in the paper; in today's Dopamine after 100,000.
Kept as in the official code: both Adam moments of recycled weights are zeroed while the step count goes on, so their
first updates are too large, up to 6.6 times (studies/redo_variants.py has cleaner ways); biases of recycled neurons
become 0, with their moments kept; the target network is not recycled; resets re-draw dense layer and head alike.
With --protocol cleanrl (CleanRL's dqn_atari.py), FIRE is pressed for one frame when an episode begins (there 2 x 4
frames), and for one stored step after a lost life; in games without FIRE that step is a no-op (there neither is
stored); frame stacks begin with zeros and are not cut at a lost life.
Your own intervention: `recycle_or_reset`. Your own environment: `make_envs`, `reset_envs`, the network's input, and in
`train` the clipped reward and the lives. What is saved: `parts` and counters in `train`, between episodes; Ctrl-C cuts
the episode like a truncation, and a resumed run begins the next.
"""

import copy
import ctypes
import fcntl
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

Count = Annotated[int, (1, 10**12)]  # lowest and highest value; check_values refuses any other
Share = Annotated[float, (0, 1)]
NonNegative = Annotated[float, (0, 1e12)]


@dataclass
class RunArgs:
    """Options that do not affect learning: a resumed run may change them."""

    resume: str | None = None  # folder of the run to continue; flags that are not given come from its args.json
    total_timesteps: Count = 1_000_000  # steps of the whole run
    eval_every: Count = 10_000  # steps between evaluations, at the next end of an episode; one more at the end
    checkpoint_every: Count = 250_000  # steps between checkpoints, at the next end of an episode; one more at the end
    checkpoint_replay: Literal["never", "unfinished", "always"] = "unfinished"  # when checkpoints contain the replay
    save_model: bool = False  # at the end, save the weights alone as model.pt
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks live; auto: the GPU, if there is one
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the replay lives; auto: on the GPU, if it fits
    compile: bool = False  # compile the networks
    cudagraphs: bool = False  # capture the whole update in one CUDA graph, and replay it for each batch
    torch_deterministic: bool = False  # deterministic GPU kernels (CPU runs are bit-identical without this)
    capture_video: bool = False  # film an episode of every evaluation: films/<step>.mp4 in the run's folder
    track: bool = False  # log to Weights & Biases, too: pip install wandb, and set WANDB_PROJECT and WANDB_ENTITY


@dataclass
class Args(RunArgs):
    """DQN and ReDo. A step is an agent step, 4 frames. --protocol cleanrl has other defaults: see `task_defaults`."""

    exp_name: str = "redo_dqn_atari"  # name of this experiment, part of the run folder's name
    seed: Annotated[int, (0, 2**32 - 1)] = 1  # seeds python, numpy, torch and every episode
    env_id: str = "ALE/DemonAttack-v5"  # any game of the Arcade Learning Environment: ALE/<Game>-v5
    precision: Literal["float32", "tf32", "bfloat16"] = "tf32"  # of products; tf32 (GPUs), bfloat16 (updates): faster
    total_timesteps: Count = 10_000_000  # steps of the whole run
    eval_every: Count = 250_000  # steps between evaluations, at the next end of an episode; one more at the end

    # Environment
    protocol: Literal["dopamine", "cleanrl"] = "dopamine"  # whose defaults; dopamine acts randomly until it learns
    sticky_actions: Share = 0.25  # probability, each frame, that the emulator repeats the previous action
    terminal_on_life_loss: bool = False  # a lost life ends the episode for the learner (the game goes on)
    noop_max: Annotated[int, (0, 27_000)] = 0  # an episode starts with 1 to this many no-op frames; 0: with none
    fire_reset: bool = False  # press FIRE when an episode begins and after a lost life (games without it: no-op)
    max_episode_steps: Annotated[int, (1, 27_000)] = 27_000  # time limit in steps; counts as truncation

    # DQN
    replay_ratio: Annotated[float, (0.25, 1000)] = 0.25  # gradient steps per step: bursts of 4 x this every 4 steps
    learning_starts: Count = 20_000  # steps before the first gradient step
    buffer_size: Count = 1_000_000  # images in the replay, 7 kB each: one per step, and one more per episode
    batch_size: Count = 32  # transitions per gradient step
    n_step: Count = 1  # rewards per target before it bootstraps
    gamma: Share = 0.99  # discount per step
    learning_rate: NonNegative = 6.25e-5  # Adam's
    adam_eps: Annotated[float, (1e-12, 1)] = 1.5e-4  # Adam's epsilon
    weight_decay: NonNegative = 0.0  # times the weights, added to the gradient before Adam (the paper's best: 1e-5)
    loss: Literal["huber", "mse"] = "huber"  # of the temporal-difference error
    target_network_frequency: Count = 8000  # steps between copies to the target network
    exploration_steps: Count = 250_000  # length in steps of the linear decay of the exploration, from 1 to end_e
    end_e: Share = 0.01  # probability of a random action after the decay

    # Network
    network: Literal["nature", "resnet"] = "nature"  # 3 convolutions and 512 units, or the IMPALA-like ResNet
    width: Annotated[float, (0.01, 64)] = 1.0  # multiplies the channels and hidden units
    padding: Literal["same", "valid"] = "same"  # of the Nature network's convolutions: 7744 or 3136 features
    activation: Literal["relu", "leaky_relu"] = "relu"  # leaky_relu: slope 0.01
    init: Literal["xavier", "torch"] = "xavier"  # uniform weights and zero biases, or PyTorch's default

    # Dormant neurons
    method: Literal["redo", "dqn", "reset"] = "redo"  # what is done to the network while it learns
    redo_tau: NonNegative = 0.025  # recycle neurons with a score of at most this; 0.1 unless --replay-ratio is 0.25
    redo_period_gradient_steps: Count = 1000  # gradient steps between recyclings
    redo_batch_size: Count = 64  # states that the scores are taken over for recycling
    redo_end_gradient_steps: Annotated[int | None, (1, 10**12)] = None  # from here on nothing is recycled or reset
    reset_period_gradient_steps: Count = 100_000  # gradient steps between resets of the last two layers

    # Evaluation and logging
    eval_steps: Count = 125_000  # steps of an evaluation; every game that was begun is finished
    eval_envs: Annotated[int, (1, 1024)] = 8  # games side by side in an evaluation
    eval_epsilon: Share = 0.001  # probability of a random action in evaluations
    dormant_every: Count = 20_000  # steps between measurements of dormant neurons
    dormant_batch_size: Count = 256  # states that the logged scores are taken over
    rank_batch_size: Count = 2048  # states for the feature rank, at least twice --dormant-batch-size
    log_every: Count = 1000  # steps between logs of losses

    def task_defaults(self) -> dict:
        defaults = dict(redo_tau=0.025 if self.replay_ratio == 0.25 else 0.1)
        if self.protocol == "cleanrl":
            defaults |= CLEANRL | dict(exploration_steps=max(1, round(0.1 * self.total_timesteps)))
        return defaults


# Where CleanRL's dqn_atari.py differs from the paper (Tables 1 and 2; dopamine's dqn.gin)
CLEANRL = dict(
    sticky_actions=0.0, terminal_on_life_loss=True, noop_max=30, fire_reset=True, learning_starts=80_000,
    learning_rate=1e-4, adam_eps=1e-8, loss="mse", target_network_frequency=1000, padding="valid", init="torch",
)  # fmt: skip
SCRIPT, ACTION_REPEAT = "redo_dqn_atari", 4
UPDATE_PERIOD = 4  # steps between bursts of gradient steps
INITS = dict(xavier=nn.init.xavier_uniform_, torch=partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
TAUS = (0.0, 0.025, 0.1)  # thresholds of the logged shares of dormant neurons; overlaps use the first


# === Environment ======================================================================================================
def derived_seed(*numbers: int) -> int:
    """A seed derived from numbers: the run's seed, what it is for (0 training, 1 evaluation, 2 a stream of random
    numbers), and which one of these. Below 2**32, because torch's CPU generators ignore all higher bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def random_stream(seed: int, number: int) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that drawing for one does not change another."""
    return torch.Generator().manual_seed(derived_seed(seed, 2, number))


def make_envs(args, num_envs: int, **options):
    """`num_envs` games side by side -> ale_py's vector environment, which plays them in threads of its own.

    Observations (num_envs, 4, 84, 84) uint8: grey frames, each the maximum of the last 2 of 4, the newest last, zeros
    before an episode's first. send(action) starts a step, recv() waits for it; an episode that ended must be reset.
    """
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    return gymnasium.make_vec(
        args.env_id, num_envs, repeat_action_probability=args.sticky_actions,
        noop_max=args.noop_max + 2 if args.noop_max else 0,  # a wider draw, see `reset_envs`
        use_fire_reset=args.fire_reset, max_num_frames_per_episode=ACTION_REPEAT * args.max_episode_steps,
        reward_clipping=False, episodic_life=False, num_threads=min(num_envs, os.cpu_count()), **options,
    )  # fmt: skip


def reset_envs(envs, args, generator, which=None) -> tuple:
    """Begins new episodes in the games `which` (num_envs,) bool, or in all, seeded by the generator -> obs, info.

    CleanRL plays 1 to noop_max no-op frames, all equally likely. ale_py draws from 0, and FIRE takes one frame's place,
    so it draws from a wider range here, and a game whose number is not one of these begins anew.
    """
    which = np.ones(envs.num_envs, bool) if which is None else which
    fired = args.fire_reset and fire_action(envs) > 0  # for one frame
    while which.any():
        seeds = torch.randint(2**31, (which.sum(),), generator=generator).numpy()
        obs, info = envs.reset(seed=seeds, options={"reset_mask": which})
        noops = info["episode_frame_number"] - int(fired)
        which = which & (args.noop_max > 0) & ((noops < 1) | (noops > args.noop_max))
    return obs, info


def fire_action(envs) -> int:
    """The number of the action FIRE; in a game without it 0, a no-op."""
    names = [action.name for action in envs.ale.get_action_set()]
    return names.index("FIRE") if "FIRE" in names else 0


# === Replay buffer ====================================================================================================
class FrameReplay:
    """A ring of single frames (capacity, height, width) uint8; stacks and n-step returns are built when sampling.

    Each frame has a record (4,): the action taken from it (-1: none, it is an episode's last frame or the newest one),
    the reward and the termination that followed, and its age: how many frames of its episode came before it. `start`
    lists the frames from which an action was taken, and sampling is uniform over them. Frames and starts are numbered
    from 0 in the order of their arrival; number i is in slot i % capacity.
    """

    def __init__(self, capacity, device, n_step=1, gamma=0.99, frame_shape=(84, 84), stack=4):
        self.capacity = capacity
        self.n_step = n_step
        self.gamma = gamma
        self.stack = stack
        self.frames = torch.empty((capacity + 1, *frame_shape), dtype=torch.uint8, device=device)
        self.frames[capacity] = 0  # what stands before an episode's first frame
        self.record = torch.empty((capacity, 4), device=device)
        self.start = torch.zeros(capacity, dtype=torch.int64)  # on the CPU, where indices are drawn
        self.num_frames = self.num_starts = self.oldest_start = self.age = 0

    def add_first(self, frame: np.ndarray) -> None:
        """An episode's first frame (height, width)."""
        self.age = 0
        self._append(frame)

    def add(self, action: int, reward: float, terminated: bool, frame: np.ndarray) -> None:
        """The action taken at the newest frame, and what followed: reward, termination, and the next frame."""
        newest = self.num_frames - 1
        self.record[newest % self.capacity] = torch.tensor([action, reward, terminated, self.age])
        self.start[self.num_starts % self.capacity] = newest
        self.num_starts += 1
        self.age += 1
        self._append(frame)

    def _append(self, frame: np.ndarray) -> None:
        slot = self.num_frames % self.capacity
        self.frames[slot] = torch.from_numpy(frame)
        self.record[slot] = torch.tensor([-1.0, 0.0, 0.0, self.age])
        self.num_frames += 1
        oldest = self.num_frames - self.capacity  # the oldest frame of a full ring; a start needs its whole stack
        while oldest > 0 and oldest + self.stack - 1 > self.start[self.oldest_start % self.capacity]:
            self.oldest_start += 1

    def __len__(self) -> int:
        """The number of transitions that can be sampled: their n steps have been taken, or their episode is over."""
        return self.num_starts - min(self.n_step - 1, self.age) - self.oldest_start

    def stacked(self, index: torch.Tensor) -> torch.Tensor:
        """Frame numbers (batch,) -> observations (batch, stack, height, width) uint8, zeros before an episode."""
        back = torch.arange(self.stack - 1, -1, -1, device=index.device)
        inside = back <= self.record[index % self.capacity, 3, None]
        slot = torch.where(inside, (index[:, None] - back) % self.capacity, self.capacity)
        # Copies whole frames; indexing by a tensor and masking afterwards take many times as long on a CPU
        return self.frames.index_select(0, slot.flatten()).view(*slot.shape, *self.frames.shape[1:])

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple:
        """A uniform batch, drawn with a CPU generator -> obs (batch, stack, height, width) uint8, action (batch,), the
        discounted reward of n steps (batch,), discount (batch,), and next_obs.

        discount is gamma^n; 0 where the episode terminated, gamma^k where it was truncated after k < n steps.
        """
        end = self.oldest_start + len(self)
        chosen = torch.randint(self.oldest_start, end, (batch_size,), generator=generator)
        first = index = self.start[chosen % self.capacity].to(self.frames.device)
        reward = torch.zeros(batch_size, device=index.device)
        discount = torch.ones(batch_size, device=index.device)
        for _ in range(self.n_step):
            action, step_reward, terminated, _ = self.record[index % self.capacity].unbind(1)
            inside = action >= 0
            reward = reward + discount * step_reward  # 0 in an episode's last frame
            discount = torch.where(inside, discount * self.gamma * (1 - terminated), discount)
            index = index + inside
        action = self.record[first % self.capacity, 0].long()
        return self.stacked(first), action, reward, discount, self.stacked(index)

    def state_dict(self) -> dict:
        """The counters, and the filled part of each ring: via NumPy, because torch.save writes whole storages."""
        state = dict(vars(self))
        for name in ("frames", "record", "start"):
            state[name] = torch.from_numpy(state[name][: self.num_frames].cpu().numpy())
        return state

    def load_state_dict(self, state: dict) -> None:
        if state["capacity"] != self.capacity and state["num_frames"] > min(state["capacity"], self.capacity):
            raise ValueError("its replay has wrapped around a ring of another size")
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                getattr(self, name)[: len(value)] = value
            elif name != "capacity":
                setattr(self, name, value)


# === Networks =========================================================================================================
def initial_weight(layer: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """A new weight for a layer, on the CPU. The layer's attribute `init` draws it, a function like those of nn.init; a
    layer without one gets PyTorch's default, uniform within 1 / sqrt(fan_in)."""
    draw = getattr(layer, "init", partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
    return draw(torch.empty(layer.weight.shape), generator=generator)


def lecun_normal_(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal, of variance 1 / fan_in, cut off at 2 standard deviations."""
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566  # of the normal distribution before it is cut off
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def same_padding(size: int, kernel: int, stride: int) -> tuple:
    """Zeros before and after one axis so that a convolution gives ceil(size / stride) outputs (TensorFlow's SAME)."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class QNetwork(nn.Module):
    """Base of the Q-networks: layers by name, and which one reads which (for recycling).

    forward(obs (batch, 4, 84, 84) uint8) -> q-values (batch, actions), {layer: activation after its non-linearity}.
    `reader[a] = b`: neurons of layer a are read by layer b alone; these are recycled. All activations are scored.
    """

    def __init__(self, args):
        super().__init__()
        self.width = args.width
        self.init = args.init
        self.activate = F.relu if args.activation == "relu" else F.leaky_relu  # slope 0.01
        self.layers = nn.ModuleDict()
        self.reader = {}

    def add(self, name: str, layer: nn.Module, init=None) -> None:
        layer.init = init or INITS[self.init]
        self.layers[name] = layer

    def neurons(self, count: int) -> int:
        return math.ceil(count * self.width)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        for layer in self.layers.values():
            layer.weight.copy_(initial_weight(layer, generator))
            layer.bias.zero_()
            if layer.init is INITS["torch"]:
                layer.bias.uniform_(-1, 1, generator=generator).div_(math.sqrt(layer.weight[0].numel()))

    def hidden(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """One layer and its activation."""
        return self.activate(self.layers[name](x))

    def q_values(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 has too few digits for values
            return self.layers["head"](features.float())

    def recyclable(self) -> list:
        """[(layer, [the layers that read it])], as `recycle` wants them."""
        return [(self.layers[name], [self.layers[reader]]) for name, reader in self.reader.items()]


class NatureCNN(QNetwork):
    """Mnih et al. 2015: convolutions 32 8x8/4, 64 4x4/2, 64 3x3/1, dense 512 (Table 2), times the width."""

    def __init__(self, num_actions, args):
        super().__init__(args)
        channels, size = 4, 84
        self.pads = {}
        for name, out, kernel, stride in (("conv1", 32, 8, 4), ("conv2", 64, 4, 2), ("conv3", 64, 3, 1)):
            before, after = same_padding(size, kernel, stride) if args.padding == "same" else (0, 0)
            self.pads[name] = (before, after) * 2 if before != after else None  # uneven: padded by hand
            padding = before if before == after else 0
            self.add(name, nn.Conv2d(channels, self.neurons(out), kernel, stride, padding))
            channels = self.neurons(out)
            size = (size + before + after - kernel) // stride + 1
        self.add("dense", nn.Linear(channels * size * size, self.neurons(512)))
        self.add("head", nn.Linear(self.neurons(512), num_actions))
        self.reader = {"conv1": "conv2", "conv2": "conv3", "conv3": "dense", "dense": "head"}

    def forward(self, obs):
        x = obs.float() / 255
        activations = {}
        for name, pad in self.pads.items():
            x = activations[name] = self.hidden(name, x if pad is None else F.pad(x, pad))
        activations["dense"] = self.hidden("dense", x.flatten(1))
        return self.q_values(activations["dense"]), activations


class ResNet(QNetwork):
    """The paper's IMPALA-like network: 3 stacks of 32, 64, 64 channels, each a convolution, a pool and two residual
    blocks; dense 512. The residual stream has many readers; only the blocks' inner neurons and the dense layer's are
    recycled."""

    def __init__(self, num_actions, args):
        super().__init__(args)
        channels, size = 4, 84
        for stack, out in enumerate((32, 64, 64), start=1):
            self.add(f"stack{stack}", nn.Conv2d(channels, self.neurons(out), 3, padding=1))
            channels = self.neurons(out)
            size = -(-size // 2)
            for block in (1, 2):
                inner, outer = (f"stack{stack}_block{block}_conv{i}" for i in (1, 2))
                self.add(inner, nn.Conv2d(channels, channels, 3, padding=1), lecun_normal_)
                self.add(outer, nn.Conv2d(channels, channels, 3, padding=1), lecun_normal_)
                self.reader[inner] = outer
        self.add("dense", nn.Linear(channels * size * size, self.neurons(512)))
        self.add("head", nn.Linear(self.neurons(512), num_actions))
        self.reader["dense"] = "head"

    def forward(self, obs):
        x = obs.float() / 255
        activations = {}
        for stack in (1, 2, 3):
            x = self.layers[f"stack{stack}"](x)
            x = F.max_pool2d(F.pad(x, same_padding(x.shape[-1], 3, 2) * 2, value=-math.inf), 3, 2)
            for block in (1, 2):
                name = f"stack{stack}_block{block}"
                inner = activations[f"{name}_input"] = self.activate(x)
                inner = activations[f"{name}_conv1"] = self.hidden(f"{name}_conv1", inner)
                x = x + self.layers[f"{name}_conv2"](inner)
        activations["dense"] = self.hidden("dense", self.activate(x).flatten(1))
        return self.q_values(activations["dense"]), activations


class DQNAgent(nn.Module):
    """The Q-network that learns, and its target: a copy of it that is renewed from time to time."""

    def __init__(self, num_actions, args):
        super().__init__()
        self.q_network = {"nature": NatureCNN, "resnet": ResNet}[args.network](num_actions, args)
        self.q_network.initialise(random_stream(args.seed, 3))
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)

    @torch.no_grad()
    def update_target(self) -> None:
        torch._foreach_copy_(list(self.target_network.parameters()), list(self.q_network.parameters()))


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


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The overlap coefficient of two masks (neurons,): |A and B| / min(|A|, |B|); NaN when one is empty (Sokar et al.
    2023, Fig. 5)."""
    return (a & b).sum() / torch.minimum(a.sum(), b.sum())


def feature_rank(features: torch.Tensor, delta: float = 0.01) -> torch.Tensor:
    """How many of the largest singular values of (batch, neurons) hold a share 1 - delta of the sum of all (Kumar et
    al. 2021; Sokar et al. 2023, Table 7): at most the batch size. NaN where a feature is not finite."""
    if not features.isfinite().all():
        return torch.tensor(math.nan)
    share = torch.linalg.svdvals(features.float()).cumsum(0)
    return (share < (1 - delta) * share[-1]).sum() + 1


class DormantHistory:
    """The dormant neurons of the previous measurement, of the first (anchor), and of any so far (union), as
    {layer: mask (neurons,) bool}. The paper's Fig. 5 does not say which of them it uses."""

    def __init__(self):
        self.previous = self.anchor = self.union = None

    def overlaps(self, masks: dict) -> dict:
        """New masks -> their overlaps with the earlier ones (Fig. 5). From now on they are earlier ones."""
        metrics = {}
        for kind, earlier in vars(self).items():
            for name in earlier or {}:
                metrics[f"overlap_{kind}/{name}"] = overlap(masks[name], earlier[name].to(masks[name]))
        self.previous = masks
        self.anchor = self.anchor or masks
        self.union = {name: mask | (self.union or masks)[name].to(mask) for name, mask in masks.items()}
        return metrics

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


@torch.no_grad()
def measure_plasticity(q_network, obs, history: DormantHistory, args) -> dict:
    """What is logged about the network, on states obs (rank_batch_size, 4, 84, 84) -> metrics.

    Dormant ratios and overlaps are taken over the first dormant_batch_size states; the noise floor of the overlap is
    that between them and as many others. The rank is taken over all states.
    """
    _, activations = q_network(obs)
    n = args.dormant_batch_size
    scores = {name: dormant_score(h[:n]) for name, h in activations.items()}
    others = {name: dormant_score(h[n : 2 * n]) for name, h in activations.items()}
    scores["all"] = torch.cat(list(scores.values()))
    others["all"] = torch.cat(list(others.values()))
    masks = {name: score <= TAUS[0] for name, score in scores.items()}

    metrics = history.overlaps(masks)
    for name, score in scores.items():
        metrics[f"overlap_noise_floor/{name}"] = overlap(masks[name], others[name] <= TAUS[0])
        for tau in TAUS:
            metrics[f"dormant_ratio_tau{tau:g}/{name}"] = dormant_share(score, tau)
    metrics["feature_rank/dense"] = feature_rank(activations["dense"])
    return metrics


# === ReDo (Section 4), and resets =====================================================================================
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


@torch.no_grad()
def reset_layers(layers, optimizers: list, generator, step_counts: bool = False) -> None:
    """Resets layers (Nikishin et al. 2022), in place: linear layers and Conv2d get new weights and biases 0, LayerNorm
    and GroupNorm scales 1 and biases 0; other layers keep theirs. The optimizers forget their averages of all of these
    layers; with step_counts, they also count their steps from 0 again. layers: for example `module.modules()`."""
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.weight.copy_(initial_weight(layer, generator))
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            layer.reset_parameters()
        for parameter in layer.parameters(recurse=False):
            for optimizer in optimizers:
                for value in optimizer.state.get(parameter, {}).values():
                    if value.dim() or step_counts:
                        value.zero_()


@torch.no_grad()
def recycle_or_reset(q_network, optimizer, replay, gradient_steps: int, args, generator, device) -> dict:
    """What --method does to the network after this many gradient steps: usually nothing -> metrics."""
    ended = args.redo_end_gradient_steps is not None and gradient_steps >= args.redo_end_gradient_steps
    if args.method == "reset" and not ended and gradient_steps % args.reset_period_gradient_steps == 0:
        reset_layers([q_network.layers["dense"], q_network.layers["head"]], [optimizer], generator)
        return {"events/reset": 1}
    if args.method == "redo" and not ended and gradient_steps % args.redo_period_gradient_steps == 0:
        obs = replay.sample(args.redo_batch_size, generator)[0].to(device)
        q_before, activations = q_network(obs)
        activations = [activations[name] for name in q_network.reader]
        masks = recycle(q_network.recyclable(), activations, optimizer, args.redo_tau, generator)
        counts = {f"redo_recycled/{name}": mask.sum() for name, mask in zip(q_network.reader, masks)}
        q_change = (q_network(obs)[0] - q_before).abs().max()
        return counts | {"redo_recycled/all": sum(counts.values()), "events/redo_q_change": q_change}
    return {}


# === DQN ==============================================================================================================
def make_optimizer(agent, args, device):
    """Adam; the weight decay is added to the gradient (coupled)."""
    options = dict(lr=args.learning_rate, eps=args.adam_eps, weight_decay=args.weight_decay)
    options |= dict(fused=device.type != "mps", capturable=args.cudagraphs)
    return torch.optim.Adam(agent.q_network.parameters(), **options)


def update(agent, optimizer, args, batch: tuple) -> dict:
    """One gradient step on a batch from `FrameReplay.sample` -> metrics, detached, on the device."""
    obs, action, reward, discount, next_obs = batch
    bfloat16 = args.precision == "bfloat16"
    autocast = partial(torch.autocast, device_type=obs.device.type, dtype=torch.bfloat16, enabled=bfloat16)
    with torch.no_grad(), autocast():  # a region of its own: weights cast here are cached without gradients
        next_q, _ = agent.target_network(next_obs)
        target = reward + discount * next_q.max(1).values
    with autocast():
        q_values, _ = agent.q_network(obs)
    q = q_values.gather(1, action[:, None])[:, 0]
    loss = F.smooth_l1_loss(q, target) if args.loss == "huber" else F.mse_loss(q, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"losses/td": loss.detach(), "losses/q_values": q.detach().mean(), "losses/targets": target.mean()}


def sample_batch(replay, args, generator, device) -> tuple:
    """What `update` learns from."""
    return tuple(x.to(device) for x in replay.sample(args.batch_size, generator))


def epsilon_at(step: int, args) -> float:
    """The probability of a random action: 1, then linear to end_e. In Dopamine it decays once learning has begun."""
    begin = args.learning_starts if args.protocol == "dopamine" else 0
    progress = min(max((step - begin) / args.exploration_steps, 0.0), 1.0)
    return 1 + progress * (args.end_e - 1)


def act(q_network, obs, epsilon: float, num_actions: int, generator, device) -> np.ndarray:
    """Epsilon-greedy actions (num_envs,) for observations (num_envs, 4, 84, 84). Drawn with a CPU generator."""
    action = torch.randint(num_actions, (len(obs),), generator=generator).numpy()
    greedy = (torch.rand(len(obs), generator=generator) >= epsilon).numpy()
    if greedy.any():
        with torch.no_grad():
            q_values, _ = q_network(torch.from_numpy(obs).to(device))
        action[greedy] = q_values.argmax(1).cpu().numpy()[greedy]
    return action


def evaluate(q_network, envs, args, number: int, device, run) -> dict | None:
    """Plays whole episodes at eval_epsilon, for at least eval_steps steps -> metrics, or None if the run is to stop.

    Each of the games played side by side begins new episodes until it has had its share of the steps. `number` seeds
    emulators and random actions; torch's own random numbers are not used.
    """
    n = envs.num_envs
    rng = torch.Generator().manual_seed(derived_seed(args.seed, 1, number))
    obs, info = reset_envs(envs, args, rng)
    episode_return, episode_length, steps = np.zeros(n), np.zeros(n, int), np.zeros(n, int)
    running, lost_life = np.ones(n, bool), np.zeros(n, bool)
    run.bar.set_description("evaluating")
    finished, film = [], []  # [(return, length)]; frames of the first game
    while running.any():
        action = act(q_network, obs, args.eval_epsilon, int(envs.single_action_space.n), rng, device)
        if args.fire_reset:
            action[lost_life] = fire_action(envs)
        lives = info["lives"]
        obs, reward, terminated, truncated, info = envs.step(action)
        if run.stopped:
            return None
        if args.capture_video and steps[0] == episode_length[0]:  # the first game's first episode
            film.append(np.repeat(obs[0, -1, :, :, None], 3, 2))
        episode_return += reward
        episode_length += 1
        steps += 1
        lost_life = info["lives"] < lives
        done = terminated | truncated
        if done.any():
            finished += [(episode_return[i], episode_length[i]) for i in np.flatnonzero(done & running)]
            running &= ~done | (steps < args.eval_steps / n)
            episode_return[done], episode_length[done], lost_life[done] = 0, 0, False
            obs, info = reset_envs(envs, args, rng, done)
            run.bar.set_description(f"evaluating: {len(finished)} games over")
    run.bar.set_description("training")
    if args.capture_video:
        run.film(number, film)
    returns, lengths = np.array(finished, float).T
    return {
        "eval/episodic_return": returns.mean(), "eval/episodic_length": lengths.mean(), "eval/episodes": len(returns),
    }  # fmt: skip


# === The algorithm ====================================================================================================
def train(args: Args) -> Path:
    """Trains, logs to a new folder under runs/ or to args.resume, and returns that folder."""
    device, buffer_device = check_args(args)
    seed_everything(args.seed, args.torch_deterministic)
    set_precision(args.precision, device)
    envs, eval_envs = make_envs(args, 1), make_envs(args, args.eval_envs)
    num_actions = int(envs.single_action_space.n)
    agent = DQNAgent(num_actions, args).to(device, memory_format=torch.channels_last)
    q_network, optimizer = agent.q_network, make_optimizer(agent, args, device)
    replay = FrameReplay(replay_frames(args), buffer_device, args.n_step, args.gamma)
    history = DormantHistory()
    batch_rng, redo_rng, measure_rng, act_rng = (random_stream(args.seed, i) for i in (0, 1, 2, 4))
    learn = partial(update, agent, optimizer, args)
    if args.cudagraphs:
        learn = capture(learn, [optimizer])
    if args.compile:
        compile_modules(agent.q_network, agent.target_network)

    parts = dict(agent=agent, optimizer=optimizer, replay=replay, history=history)
    parts |= dict(batch_rng=batch_rng, redo_rng=redo_rng, measure_rng=measure_rng, act_rng=act_rng)
    run = Run(args, device, parts, global_step=0, gradient_steps=0, episode=0, next_eval=args.eval_every)  # logs, saves
    global_step, gradient_steps, episode, next_eval = run.counters.values()  # not 0 in a resumed run
    next_eval = min(next_eval, global_step - global_step % args.eval_every + args.eval_every)  # --eval-every may be new
    learning_from = args.learning_starts + max(0, global_step - replay.num_starts)  # later, if resumed without replay
    first_update = gradient_steps

    while not run.stopped:
        # Between episodes: evaluate, then save, so that a resumed run does not evaluate again
        finished = global_step == args.total_timesteps
        if finished or global_step >= next_eval:
            results = evaluate(q_network, eval_envs, args, global_step, device, run)
            if results is None:  # the run is to stop
                break
            run.log(global_step, results)
            next_eval = global_step - global_step % args.eval_every + args.eval_every
        if finished:
            run.finish(q_network, results | dict(global_step=global_step, gradient_steps=gradient_steps))
            break
        if run.checkpoint_due(global_step):
            run.save(global_step=global_step, gradient_steps=gradient_steps, episode=episode, next_eval=next_eval)

        game_rng = torch.Generator().manual_seed(derived_seed(args.seed, 0, episode))
        obs, info = reset_envs(envs, args, game_rng)
        if run.stopped:  # a signal, while it saved or began the game
            continue
        replay.add_first(obs[0, -1])
        start_step, start_update, start_time = global_step, gradient_steps, time.time()
        episode_return, done, lost_life, metrics = 0.0, False, False, {}
        while not (done or run.stopped or global_step == args.total_timesteps):
            # Act: the emulator plays this step in its own thread ...
            epsilon = epsilon_at(global_step, args)
            action = int(act(q_network, obs, epsilon, num_actions, act_rng, device)[0])
            if lost_life and args.fire_reset:
                action = fire_action(envs)
            envs.send(np.array([action]))

            # Learn: ... while the network learns from the steps before it
            events = {}
            learning = global_step > learning_from  # not >=, as in Dopamine
            if learning and global_step % UPDATE_PERIOD == 0:
                for _ in range(round(args.replay_ratio * UPDATE_PERIOD)):
                    metrics = learn(sample_batch(replay, args, batch_rng, device))
                    gradient_steps += 1
                    events |= recycle_or_reset(q_network, optimizer, replay, gradient_steps, args, redo_rng, device)
            if learning and global_step % args.target_network_frequency == 0:
                agent.update_target()

            # Observe
            lives = info["lives"][0]
            obs, reward, terminated, truncated, info = envs.recv()
            lost_life = bool(info["lives"][0] < lives)
            over = bool(terminated[0]) or (args.terminal_on_life_loss and lost_life)
            replay.add(action, np.clip(reward[0], -1, 1), over, obs[0, -1])
            global_step += 1
            episode_return += float(reward[0])
            done = bool(terminated[0] or truncated[0])
            run.bar.update()

            # Log: a game may last 27,000 steps
            run.log(global_step, events)
            if global_step % args.log_every == 0:
                run.check_finite(metrics, global_step - args.log_every)
                run.log(global_step, metrics | {
                    "charts/epsilon": epsilon, "charts/gradient_steps": gradient_steps,
                    "charts/replay_ratio": args.replay_ratio if learning else 0,
                    "charts/frames": global_step * ACTION_REPEAT, "charts/walltime": run.walltime(),
                })  # fmt: skip
            if global_step >= learning_from and global_step % args.dormant_every == 0:
                states = replay.sample(args.rank_batch_size, measure_rng)[0].to(device)
                measured = measure_plasticity(q_network, states, history, args)
                run.log(global_step, {tag: v for tag, v in measured.items() if "overlap" not in tag or v.isfinite()})

        # After the episode
        episode += 1
        run.check_finite(metrics, start_step)
        charts = {}
        if start_update > first_update:  # without the first episode that learns, which warms up and compiles
            charts["charts/SPS"] = (global_step - start_step) / (time.time() - start_time)
        if done:
            charts |= {"charts/episodic_return": episode_return, "charts/episodic_length": global_step - start_step}
            run.bar.set_postfix(episodic_return=f"{episode_return:g}", refresh=False)
        run.log(global_step, charts)

    run.save(global_step=global_step, gradient_steps=gradient_steps, episode=episode, next_eval=next_eval)
    run.close()
    return run.dir


# === Housekeeping of this script: what cannot work ====================================================================
def check_args(args: Args) -> tuple:
    """Refuses what cannot work, before anything is allocated or written -> the devices of network and replay."""
    check_values(args)
    with torch.device("meta"):  # shapes only, nothing is allocated
        network = {"nature": NatureCNN, "resnet": ResNet}[args.network](18, args)
    activations = {"nature": 8e5, "resnet": 3e6}[args.network] * max(1, args.width)  # bytes per state
    needed = {  # rough bytes; 5: weights, the target's, gradients, Adam's moments
        "buffer_size": replay_frames(args) * (84 * 84 + 24),
        "width": 3e8 + 5 * 4 * sum(p.numel() for p in network.parameters()),
        "rank_batch_size": activations * args.rank_batch_size,
        "batch_size": activations * args.batch_size,
        "redo_batch_size": activations * args.redo_batch_size,
    }
    devices = check_devices(args, needed)
    defaults = Args(**args.task_defaults())
    for name in ("redo_tau", "redo_batch_size"):  # the two periods may be given to every method of a sweep
        if args.method != "redo" and getattr(args, name) != getattr(defaults, name):
            refuse(name, getattr(args, name), "does nothing without --method redo")
    period = dict(redo=args.redo_period_gradient_steps, reset=args.reset_period_gradient_steps).get(args.method, 0)
    for name, fine, limit in (
        ("env_id", args.env_id.startswith("ALE/"), "is no game of the Arcade Learning Environment (ALE/<Game>-v5)"),
        ("replay_ratio", args.replay_ratio * UPDATE_PERIOD % 1 == 0, f"must be a multiple of {1 / UPDATE_PERIOD}"),
        ("rank_batch_size", args.rank_batch_size >= 2 * args.dormant_batch_size, "must be twice --dormant-batch-size"),
        ("padding", args.padding == "same" or args.network == "nature", "is for --network nature"),
        ("total_timesteps", args.total_timesteps > args.learning_starts + 4, "must be more than --learning-starts + 4"),
        ("buffer_size", args.buffer_size >= 2 * (args.n_step + 4), f"is too small for --n-step {args.n_step}"),
        ("learning_starts", args.n_step <= args.learning_starts <= args.buffer_size, "must lie between --n-step and "
         "--buffer-size"),
        ("redo_end_gradient_steps", (args.redo_end_gradient_steps or math.inf) > period, "is before the first period "
         "has ended"),
        (f"{args.method}_period_gradient_steps", period >= args.replay_ratio * UPDATE_PERIOD or args.method == "dqn",
         "is shorter than a burst of gradient steps"),
        ("redo_end_gradient_steps", args.method != "dqn" or args.redo_end_gradient_steps is None,
         "does nothing with --method dqn"),
    ):  # fmt: skip
        if not fine:
            refuse(name, getattr(args, name), limit)
    try:
        make_envs(args, 1)
    except Exception as error:
        refuse("env_id", args.env_id, f"cannot be played ({type(error).__name__}: {error})")
    return devices


def replay_frames(args) -> int:
    """Frames in the ring. Twice the steps are enough: an episode's last frame takes a place, too."""
    return min(args.buffer_size, 2 * args.total_timesteps)


# === Housekeeping, the same text in every script: arguments, precision, CUDA graphs, files, signals ===================
def refuse(flag: str, value: object, limit: str) -> None:
    """Ends the program because of a user's mistake: one line on stderr, exit code 2."""
    line = f"{SCRIPT}.py: error: --{flag.replace('_', '-')} {value}: {limit}"
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(2)


def parse_args(command_line: list) -> Args:
    """The command line -> arguments. What is not given comes from the task's defaults, or from the resumed run."""
    import tyro

    args = tyro.cli(Args, args=[word for word in command_line if word not in ("-h", "--help")])  # that is for below
    if args.resume is None:
        return tyro.cli(Args, args=command_line, default=Args(**args.task_defaults()))
    try:
        description = json.loads((Path(args.resume) / "args.json").read_text())
        if description["script"] != SCRIPT:
            raise ValueError(f"it is one of {description['script']}.py")
        default = Args(**description["args"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refuse("resume", args.resume, f"is not the folder of a run that this script can continue ({error})")
    check_values(default)
    args = tyro.cli(Args, args=command_line, default=default)
    for name, value in fixed_args(default).items():
        if getattr(args, name) != value:
            refuse(name, getattr(args, name), f"a resumed run keeps its own value, {value}")
    return args


def fixed_args(args: Args) -> dict:
    """The arguments that a resumed run keeps."""
    return {name: value for name, value in asdict(args).items() if not hasattr(RunArgs, name)}


def check_values(args: Args) -> None:
    """Refuses values of a wrong type, which args.json can contain, and values outside the bounds of their type."""
    kinds = get_type_hints(Args)
    for name, hint in get_type_hints(Args, include_extras=True).items():
        value, kind = getattr(args, name), kinds[name]
        choices = get_args(kind) if get_origin(kind) is Literal else None
        if not (value in choices if choices else isinstance(value, int | float if kind is float else kind)):
            refuse(name, value, f"must be {getattr(kind, '__name__', kind)}")
        for low, high in getattr(hint, "__metadata__", ()):
            if value is not None and not low <= value <= high:  # true for NaN, too
                refuse(name, value, f"must lie between {low} and {high}")


def check_devices(args: Args, needed: dict) -> tuple:
    """Refuses what this computer does not have -> the devices of the networks and of the replay. needed: roughly how
    many bytes the run takes, by the flag that decides it; those of buffer_size are the replay's."""
    found = dict(auto=True, cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    for name in ("device", "buffer_device"):
        if not found[getattr(args, name)]:
            refuse(name, getattr(args, name), "torch sees no such device here")
    gpu = found["cuda"] and args.device in ("auto", "cuda")
    device = ("cuda" if gpu else "cpu") if args.device == "auto" else args.device
    fits = gpu and sum(needed.values()) < 0.9 * memory("cuda")
    buffer_device = ("cuda" if fits else "cpu") if args.buffer_device == "auto" else args.buffer_device
    for place in (device, buffer_device):
        here = {k: v for k, v in needed.items() if place == (buffer_device if k == "buffer_size" else device)}
        if sum(here.values()) > memory(place):
            name = max(here, key=here.get)
            sizes = f"about {sum(here.values()) / 1e9:.1f} GB, {place} has {memory(place) / 1e9:.1f} GB"
            refuse(name, getattr(args, name), f"the run needs {sizes}")
    if args.cudagraphs and device != "cuda":
        refuse("cudagraphs", True, f"needs --device cuda, not {device}")
    if args.track and not find_spec("wandb"):
        refuse("track", True, "needs Weights & Biases: pip install wandb")
    return torch.device(device), torch.device(buffer_device)


def memory(device: str) -> int:
    """Bytes: what is free on the GPU, or all of the computer's memory, or what its container may take of it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such file, or no limit ("max")
        return min(everything, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return everything


def seed_everything(seed: int, deterministic: bool) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def set_precision(precision: str, device: torch.device) -> None:
    """float32: exact. tf32: faster convolutions and matrix products on a GPU. bfloat16: the update runs under autocast.

    On a CPU, products in float32 go through oneDNN instead of MKL (on AMD twice as fast) if its "bf16" mode proves to
    be as exact as float32, which it is on CPUs without bfloat16 matrix units.
    """
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")  # first: it resets oneDNN's
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    if device.type == "cpu":
        torch.set_flush_denormal(True)
        keep_freed_memory()
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
        if ((x @ x).double() - x.double() @ x.double()).abs().max() > 1e-3:
            torch.backends.mkldnn.matmul.fp32_precision = "none"


def keep_freed_memory() -> None:
    """glibc gives freed tensors above 32 MB back to the system, and each page of the next one is zeroed anew: a quarter
    of an update on 256 images of 84 x 84. Here it keeps what is freed, up to 1 GB a tensor."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # not every C library has it
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def compile_modules(*modules: nn.Module) -> None:
    torch._dynamo.config.recompile_limit = 64  # one compilation per batch size and kind of gradient
    for module in modules:
        module.compile(dynamic=False)


def capture(update, optimizers: list):
    """update(batch) -> metrics, as a function that replays it as a CUDA graph. The metrics are overwritten each time.

    The first 3 updates run as they are, on a stream of their own: Adam creates its state, libraries choose kernels. The
    4th is captured. A graph keeps addresses: from then on, weights and Adam's state may only be changed in place.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    warm_up, static, metrics = iter(range(3)), [], {}

    def captured(batch):
        if next(warm_up, None) is not None:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                eager = update(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return eager
        if not static:
            static.extend(x.clone() for x in batch)
            for optimizer in optimizers:
                optimizer.zero_grad()  # the gradients are then allocated in the graph's own memory
            with torch.cuda.graph(graph):
                metrics.update(update(static))
        for buffer, value in zip(static, batch):
            buffer.copy_(value)
        graph.replay()
        return dict(metrics)

    return captured


class Run:
    """Everything around learning: folder, log, checkpoints, signals, progress bar. It calls nothing of the algorithm.

    A checkpoint contains counters (whole numbers) and parts: modules, optimizers, random generators, and anything else
    with state_dict and load_state_dict. With --resume, the constructor restores both.
    """

    FORMAT = 5  # of checkpoint.pt

    def __init__(self, args: Args, device: torch.device, parts: dict, **counters):
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.args = args
        self.parts = parts | dict(torch_rng=torch.default_generator)
        if "cuda" in (device.type, args.buffer_device):
            self.parts["cuda_rng"] = torch.cuda.default_generators[torch.cuda.current_device()]
        self.counters = counters
        self.checkpoint, self.keep_replay = "checkpoint.pt", args.checkpoint_replay != "never"
        self.stopped = None  # exit code, when the run is to stop
        self.finished = False
        self.start_time = time.time()
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}".replace("/", "-")
        self.dir = Path(args.resume or f"runs/{name}")
        with self.disk():
            self.dir.mkdir(parents=True, exist_ok=args.resume is not None)
            self.lock = open(self.dir / "lock", "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refuse("resume", self.dir, "another process is working on this run")
            if args.resume is not None:
                self.load()
            self.describe()
            # What a killed run logged after its last checkpoint is dropped
            purge_step = self.counters["global_step"] + 1 if args.resume is not None else None
            self.writer = SummaryWriter(str(self.dir), purge_step=purge_step)
            rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
            self.writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *rows]))
        self.saved_step = self.counters["global_step"]
        options = dict(unit="step", unit_scale=True, smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 30)
        self.bar = tqdm(total=args.total_timesteps, initial=self.saved_step, **options)
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        self.handlers = {n: signal.signal(n, self.request_stop) for n in numbers}

    def say(self, line: str) -> None:
        """One line on stderr, above the progress bar."""
        from tqdm import tqdm

        tqdm.write(f"{SCRIPT}.py: {' '.join(line.split())}", file=sys.stderr)

    @contextmanager
    def disk(self):
        """Around what reads or writes the folder: a full disk or a vanished folder ends the program with one line."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save raises the one as the other
            self.say(f"error: cannot read or write {self.dir}: {str(error)[:200]}")
            raise SystemExit(1) from None

    def describe(self) -> None:
        """Stores the script, its arguments and the versions of all packages in the folder."""
        if self.args.resume is None:
            shutil.copy(__file__, self.dir)
        versions = {package.name: package.version for package in metadata.distributions()}
        versions |= dict(python=sys.version.split()[0])
        description = dict(script=SCRIPT, action_repeat=ACTION_REPEAT, args=asdict(self.args), versions=versions)
        save_file(self.dir / "args.json", description)
        if self.args.track:
            import wandb

            try:
                wandb.init(name=self.dir.name, config=asdict(self.args), sync_tensorboard=True)
            except Exception as error:
                refuse("track", True, f"wandb does not start: {' '.join(str(error).split())[:200]}")

    def stop(self, reason: str, exit_code: int) -> None:
        """From now on `train` saves and ends as soon as it can, with this line and exit code."""
        if self.stopped is None:
            self.reason = reason
            self.stopped = exit_code

    def request_stop(self, number, frame):
        self.stop(f"stopped by {signal.Signals(number).name}", 128 + number)
        signal.signal(number, signal.SIG_DFL)
        try:
            os.write(2, b"\nsaving; once more to stop at once\n")
        except OSError:  # its reader is gone, as after Ctrl-C in "2>&1 | tee": print nothing from now on
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def check_finite(self, metrics: dict, since: int) -> None:
        """Stops the run at the first metric that is not a finite number. since: the first step that they cover."""
        bad = [tag for tag, value in metrics.items() if not math.isfinite(value)]
        if bad and self.checkpoint != "diverged.pt":
            self.checkpoint, self.keep_replay = "diverged.pt", False  # the last good one stays
            self.stopped = None  # also if a signal came before
            self.stop(f"error: {bad[0]} is not finite, at step {since} or later", exit_code=1)

    def walltime(self) -> float:
        """Seconds, those before a resume included."""
        return time.time() - self.start_time

    def log(self, global_step: int, metrics: dict) -> None:
        values = {tag: float(value) for tag, value in metrics.items()}
        with self.disk():
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, global_step)

    def film(self, global_step: int, frames: list) -> None:
        """Writes frames (height, width, 3) uint8 to films/<step>.mp4; TensorBoard shows where."""
        from moviepy import ImageSequenceClip

        path = self.dir / "films" / f"{global_step}.mp4"
        height, width = np.array(frames[0].shape[:2]) // 2 * 2  # the format wants even numbers
        try:
            path.parent.mkdir(exist_ok=True)
            ImageSequenceClip([f[:height, :width] for f in frames], fps=25).write_videofile(str(path), logger=None)
            self.writer.add_text("eval/film", str(path), global_step)
        except OSError as error:  # Ctrl-C, for instance, ends ffmpeg, too
            self.say(f"no film of step {global_step}: {str(error)[:200]}")

    def checkpoint_due(self, global_step: int) -> bool:
        return global_step // self.args.checkpoint_every > self.saved_step // self.args.checkpoint_every

    def save(self, **counters) -> None:
        content = counters | dict(format=self.FORMAT, args=fixed_args(self.args), walltime=self.walltime())
        for name, part in self.parts.items():
            if name != "replay" or self.keep_replay:
                content[name] = part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
        with self.disk():
            self.writer.flush()
            save_file(self.dir / self.checkpoint, content)
            if self.finished:
                save_file(self.dir / "summary.json", self.summary)
        self.saved_step = counters["global_step"]

    def load(self) -> None:
        """Maps the file into memory, so that the replay is never there twice. All else is copied, because Adam keeps
        the very tensors that it is given."""
        try:
            content = torch.load(self.dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
            self.counters = {name: content[name] for name in self.counters}
            same = content["format"] == self.FORMAT and content["args"] == fixed_args(self.args)
            if not same or min(self.counters.values()) < 0:
                raise ValueError("it is one of another run or version")
            self.start_time -= content["walltime"]
            for name in self.parts.keys() - ({"replay", "cuda_rng"} - content.keys()):
                part = self.parts[name]
                state = content[name] if name == "replay" else copy.deepcopy(content[name])
                if isinstance(part, torch.optim.Optimizer):  # options like fused and capturable are this run's
                    state["param_groups"] = part.state_dict()["param_groups"]
                part.set_state(state) if isinstance(part, torch.Generator) else part.load_state_dict(state)
        except Exception as error:
            refuse("resume", self.dir, f"has no checkpoint.pt that fits ({type(error).__name__}: {str(error)[:200]})")
        if self.counters["global_step"] > self.args.total_timesteps:
            refuse("total_timesteps", self.args.total_timesteps, "the run has already taken more steps")
        (self.dir / "summary.json").unlink(missing_ok=True)  # until it has finished again
        if "replay" not in content and self.counters["global_step"] < self.args.total_timesteps:
            self.say("the checkpoint contains no replay: it is refilled before learning goes on (--learning-starts)")

    def finish(self, module: nn.Module, results: dict) -> None:
        """The results of a run that took all its steps; `save` writes them. module: what --save-model saves."""
        with self.disk():
            if self.args.save_model:
                save_file(self.dir / "model.pt", module.state_dict())
        self.summary = results | dict(walltime=self.walltime())
        self.finished, self.keep_replay = True, self.args.checkpoint_replay == "always"
        print(f"{self.dir}: mean return {results['eval/episodic_return']:.1f}")

    def close(self) -> None:
        """Ends the log, and if the run was stopped, the program."""
        with self.disk():
            self.writer.close()
        self.bar.close()
        self.lock.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.stopped is not None and not self.finished:
            way = f"; to continue: --resume {self.dir}" if self.checkpoint == "checkpoint.pt" else ""
            self.say(f"{self.reason}; saved as {self.checkpoint}{way}")
            raise SystemExit(self.stopped)


def save_file(path: Path, content) -> None:
    """Writes a .json or .pt file whole or not at all: a temporary file replaces the old one when it is complete."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(content, temporary) if path.suffix == ".pt" else temporary.write_text(json.dumps(content, indent=2))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before the run has begun ends it without a traceback
    train(parse_args(sys.argv[1:]))
