"""The Dormant Neuron Phenomenon in Deep Reinforcement Learning (Sokar, Agarwal, Castro, Evci; ICML 2023, arXiv
2302.12902): in deep RL more and more neurons fall silent, the more so the more gradient steps are taken per step of the
environment. Recycling the dormant neurons (ReDo) keeps the network able to learn.

Score of neuron i of a layer with H neurons, on a batch D of states (Eq. 1):                          -> `dormant_score`
    s_i = E_D |h_i(x)| / ( 1/H sum_k E_D |h_k(x)| )      h: after the activation function; the scores' mean is 1
A neuron is tau-dormant when s_i <= tau (Definition 3.1). One feature map of a convolution is one neuron.
ReDo (Algorithm 1), every 1000 gradient steps:                                                              -> `recycle`
    for every tau-dormant neuron: re-draw its incoming weights from the initial distribution, zero its outgoing weights
The recycled neuron starts anew, and at tau = 0 the network's output does not change at all.
The agent is DQN: act epsilon-greedily; every 4 steps do 4 x replay ratio gradient steps on    -> `train`, `td_update`
    Huber( q(o_t, a_t),  r_{t+1} + gamma max_a' q_target(o_{t+1}, a') )

    SCALE=small bash benchmark/redo_dqn_atari_cpu.sh    DQN and ReDo for 100,000 steps on two CPU cores, 90 minutes:
                                                        ReDo leaves hardly a neuron dormant; returns tell no difference
    python redo_dqn_atari.py                            ReDo at replay ratio 0.25, 10M steps: for a GPU, not run yet
    SCALE=paper bash benchmark/redo_dqn_atari_fig1_headline.sh    Fig. 1 (paper, IQM over 17 games at replay ratio 1 and
                                                        10M frames: DQN 0.30, ReDo 0.625); others: see README.md

Where this differs from the official code (google/dopamine, labs/redo), and why:
 1. A recycled feature map's outgoing weights in the dense layer are the right ones. Officially the mask is laid out
    channel by channel, but the features position by position, so nearly only other weights are zeroed
    (--redo-compat-flatten does the same here).
 2. In the ResNet, the second block's first convolution is followed by its own second one, not by the next stack's.
 3. A layer is re-drawn from the distribution that it was initialised from, also the ResNet's inner convolutions.
 4. Recycling, resets and logs count real gradient steps; officially the counter also runs during the warm-up. So no
    evaluation (every 250,000 steps) falls on a reset, as every second one does officially; but at replay ratio 1 they
    come 30,000 and 80,000 gradient steps after one by turns, so the reset baseline's curve still zigzags.
 5. The published configuration recycles nothing; defaults here are the paper's: every 1000 gradient steps, a batch of
    64, tau 0.1 (0.025 at replay ratio 0.25).
 6. The emulator plays a step while the network learns: the action is chosen before the burst of updates, not after,
    and the burst sees data up to the previous step.
 7. Frames are stored once; the ring holds 1M frames, of which each episode's last one starts no transition.
 8. Evaluation plays several games side by side, each on its share of the 125,000 steps.
 9. Recycling and resets go on to the end; officially none comes from gradient step 2,500,000 on
    (--redo-end-gradient-steps 2500000 does the same here). Only runs with more gradient steps differ.
10. Where an episode is truncated, its last n - 1 transitions are kept and bootstrap after fewer than n steps;
    officially they are dropped.
11. Episodes end after 108,000 frames, as in the paper; in today's Dopamine after 100,000.
Kept as they are: both Adam moments of recycled weights are zeroed while the step count goes on, so their first updates
are too large, up to 6.6 times (--redo-adam per-element is the clean way); biases of recycled neurons become 0, with
their moments kept; the target network is not recycled.
With --protocol cleanrl (CleanRL's dqn_atari.py), FIRE is pressed for one frame when an episode begins (there 2 x 4
frames), and for one stored step after a lost life; in games without FIRE that step is a no-op (there neither is
stored); frame stacks begin with zeros and are not cut at a lost life.
Not in this file: offline data, random targets, Monte-Carlo targets, pruning, distillation, CIFAR-10, DrQ(eps), SAC;
films (benchmark/redo_dqn_atari_film.py makes one of any run).
"""

import copy
import difflib
import fcntl
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import ale_py
import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gymnasium.register_envs(ale_py)


@dataclass
class Args:
    """DQN and ReDo. A step is an agent step, 4 frames, unless it says gradient step; None: from the table PROTOCOLS."""

    exp_name: str = "redo_dqn_atari"  # name of this experiment, part of the run folder's name
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
    env_id: str = "ALE/DemonAttack-v5"  # any game of the Arcade Learning Environment: ALE/<Game>-v5
    protocol: Literal["dopamine", "cleanrl"] = "dopamine"  # whose values fill the flags that are None
    sticky_actions: float | None = None  # probability, each frame, that the emulator repeats the previous action
    terminal_on_life_loss: bool | None = None  # a lost life ends the episode for the learner (the game goes on)
    noop_max: int | None = None  # an episode starts with 1 to this many no-op frames; 0: with none
    fire_reset: bool | None = None  # press FIRE when an episode begins and after a lost life (games without it: no-op)
    clip_reward: bool = True  # the learner sees rewards clipped to [-1, 1]; returns are logged unclipped
    max_episode_steps: int = 27_000  # time limit in steps; counts as truncation

    # DQN
    total_timesteps: int = 10_000_000  # steps of the whole run
    replay_ratio: float = 0.25  # gradient steps per step, a multiple of 0.25: bursts of 4 x this every 4 steps
    learning_starts: int | None = None  # steps before the first gradient step
    buffer_size: int = 1_000_000  # frames in the replay, 7 kB each
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the replay lives; auto: the GPU where it fits
    batch_size: int = 32  # transitions per gradient step
    n_step: int = 1  # rewards per target before it bootstraps
    gamma: float = 0.99  # discount per step
    learning_rate: float | None = None  # Adam's
    adam_eps: float | None = None  # Adam's epsilon
    weight_decay: float = 0.0  # times the weights, added to the gradient before Adam (coupled; the paper's best: 1e-5)
    loss: Literal["huber", "mse"] | None = None  # of the temporal-difference error
    double: bool = False  # double DQN: the online network chooses the action that the target network values
    target_network_frequency: int | None = None  # steps between copies to the target network
    start_e: float = 1.0  # probability of a random action, at first
    end_e: float = 0.01  # and after the decay
    exploration_starts: int | None = None  # steps before the decay begins; None: the protocol's
    exploration_steps: int | None = None  # length in steps of the linear decay; cleanrl: a tenth of the run

    # network
    network: Literal["nature", "resnet"] = "nature"  # 3 convolutions and 512 units, or the IMPALA-like ResNet
    width: float = 1.0  # multiplies the channels and hidden units
    padding: Literal["same", "valid"] | None = None  # of the Nature network's convolutions: 7744 or 3136 features
    activation: Literal["relu", "leaky_relu"] = "relu"  # leaky_relu: slope 0.01
    layer_norm: bool = False  # normalise every hidden layer before its activation
    init: Literal["xavier", "torch"] | None = None  # xavier: uniform weights and zero biases; torch: PyTorch's default

    # dormant neurons
    method: Literal["redo", "dqn", "reset", "adam-step-reset"] = "redo"  # what is done to the network while it learns
    redo_tau: float | None = None  # recycle neurons with a score of at most this; None: 0.025 at replay ratio 0.25, 0.1
    redo_period_gradient_steps: int = 1000  # gradient steps between recycling (or between resets of Adam's step count)
    redo_batch_size: int = 64  # states that the scores are taken over for recycling
    redo_adam: Literal["none", "moments", "moments+tensor-step", "per-element"] = "moments"  # what Adam forgets then
    redo_compat_flatten: bool = False  # zero the same wrong weights after the last convolution as the official code
    redo_end_gradient_steps: int | None = None  # from this gradient step on nothing is recycled or reset; None: never
    reset_period_gradient_steps: int = 100_000  # gradient steps between resets (--method reset)
    reset_layers: tuple[str, ...] = ("dense", "head")  # the layers that are reset, with both Adam moments

    # what to look at
    eval_every: int = 250_000  # steps between evaluations; always one at the end
    eval_steps: int = 125_000  # steps of an evaluation; every game that was begun is finished
    eval_envs: int = 8  # games side by side in an evaluation
    eval_epsilon: float = 0.001  # probability of a random action in evaluations
    dormant_every: int = 20_000  # steps between looks at the dormant neurons
    dormant_tau: tuple[float, ...] = (0.0, 0.025, 0.1)  # thresholds that are logged; overlaps use the first
    dormant_batch_size: int = 256  # states that the logged scores are taken over
    rank_batch_size: int = 2048  # states for the feature rank, at least twice the above
    log_every: int = 1000  # steps between logs of losses and speed

    # speed
    amp: bool = False  # the update's networks in bfloat16; acting, scores, losses and Adam stay in float32
    compile: bool = False  # compile the networks
    cudagraphs: bool = False  # capture the whole update in one CUDA graph and replay it per batch


# The paper's values (Tables 1 and 2; dopamine's dqn.gin), where exploration decays once learning has begun, and those
# of CleanRL's dqn_atari.py, where it begins at once and lasts a tenth of the run (see `resolve_args`).
PROTOCOLS = {
    "dopamine": dict(
        sticky_actions=0.25, terminal_on_life_loss=False, noop_max=0, fire_reset=False, learning_starts=20_000,
        learning_rate=6.25e-5, adam_eps=1.5e-4, loss="huber", target_network_frequency=8000, exploration_starts=None,
        exploration_steps=250_000, padding="same", init="xavier"),
    "cleanrl": dict(
        sticky_actions=0.0, terminal_on_life_loss=True, noop_max=30, fire_reset=True, learning_starts=80_000,
        learning_rate=1e-4, adam_eps=1e-8, loss="mse", target_network_frequency=1000, exploration_starts=0,
        padding="valid", init="torch"),
}  # fmt: skip
SCRIPT, ACTION_REPEAT = "redo_dqn_atari", 4
UPDATE_PERIOD = 4  # steps between bursts of gradient steps
# What may be given anew with --resume: it does not change what is learned.
RESUMABLE = ("resume total_timesteps device buffer_device eval_every eval_steps eval_envs eval_epsilon "
             "checkpoint_every checkpoint_replay track wandb_project_name wandb_entity save_model log_every compile "
             "cudagraphs torch_deterministic dormant_every dormant_tau dormant_batch_size "
             "rank_batch_size").split()  # fmt: skip


# === Environment ======================================================================================================
def make_games(args, num_envs: int, **options):
    """`num_envs` games side by side -> ale_py's vector environment, which plays them in threads of its own.

    Observations (num_envs, 4, 84, 84) uint8: grey frames, each the maximum of the last 2 of 4, the newest last, zeros
    before an episode's first. send(action) starts a step, recv() waits for it; an episode that ended must be reset.
    """
    return gymnasium.make_vec(
        args.env_id, num_envs, repeat_action_probability=args.sticky_actions,
        noop_max=args.noop_max + 2 if args.noop_max else 0,  # a wider draw, see `start_games`
        use_fire_reset=args.fire_reset, max_num_frames_per_episode=ACTION_REPEAT * args.max_episode_steps,
        reward_clipping=False, episodic_life=False, num_threads=min(num_envs, os.cpu_count()), **options)  # fmt: skip


def episode_seed(*numbers: int) -> int:
    """A seed that the numbers determine: the run's seed, what it is for (0 training, 1 evaluation, 2 a stream of random
    numbers), and which one of these. Below 2**32: torch's generators on a CPU ignore all higher bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def start_games(games, args, rng, which=None) -> tuple:
    """Begins new episodes in the games `which` (num_envs,) bool, or in all, seeded from rng -> observations, info.

    CleanRL plays 1 to noop_max no-op frames, all equally likely. ale_py draws from 0, and FIRE takes one frame's place,
    so it draws from a wider range here, and a game whose number is not one of these begins anew.
    """
    which = np.ones(games.num_envs, bool) if which is None else which
    fired = args.fire_reset and ale_py.Action.FIRE in games.ale.get_action_set()  # for one frame
    while which.any():
        seeds = rng.integers(2**31, size=which.sum())
        obs, info = games.reset(seed=seeds, options={"reset_mask": which})
        noops = info["episode_frame_number"] - int(fired)
        which = which & (args.noop_max > 0) & ((noops < 1) | (noops > args.noop_max))
    return obs, info


def start_episode(games, args, episode: int) -> tuple:
    """Starts the only game, as (args.seed, episode) determine -> observation (1, 4, 84, 84), info."""
    return start_games(games, args, np.random.default_rng(episode_seed(args.seed, 0, episode)))


def action_after_life(games, args) -> int | None:
    """What the protocol plays after a lost life: FIRE where the game has it, else a no-op; None: the agent chooses."""
    actions = list(games.ale.get_action_set())
    button = ale_py.Action.FIRE if ale_py.Action.FIRE in actions else ale_py.Action.NOOP
    return actions.index(button) if args.fire_reset else None


def choose_action(q_network, obs, epsilon, rng, num_actions: int, device) -> np.ndarray:
    """Epsilon-greedy actions (num_envs,) for observations (num_envs, 4, 84, 84)."""
    action = rng.integers(num_actions, size=len(obs))
    greedy = rng.random(len(obs)) >= epsilon
    if greedy.any():
        with torch.no_grad():
            best = q_network(torch.from_numpy(obs).to(device))[0].argmax(1).cpu().numpy()
        action[greedy] = best[greedy]
    return action


# === Replay buffer ====================================================================================================
class FrameReplay:
    """A ring of single frames (capacity, height, width) uint8; stacks and n-step returns are built when sampling.

    Each frame's record (4,): the action taken from it (-1: none, it is an episode's last frame or the newest one), the
    reward and the termination that followed, and its age, the number of frames of its episode before it. `start` is a
    ring of transitions: the number of the frame where each began, so that sampling is uniform without rejection. Frames
    and transitions are numbered from 0 for ever; number n lies in slot n % capacity.
    """

    def __init__(self, capacity, device, n_step=1, gamma=0.99, frame_shape=(84, 84), stack=4):
        self.capacity, self.n_step, self.gamma, self.stack = capacity, n_step, gamma, stack
        self.frames = torch.empty((capacity + 1, *frame_shape), dtype=torch.uint8, device=device)
        self.frames[capacity] = 0  # what stands before an episode's first frame
        self.record = torch.empty((capacity, 4), device=device)
        self.start = torch.empty(capacity, dtype=torch.int64, device=device)
        self.num_frames = self.num_transitions = self.age = 0
        # No transition starts in an episode's last frame, so frame n starts transition n - (last frames before n)
        self.last_frames = deque()  # the last frames that can still be reached
        self.gone = 0  # how many can not any more

    def _append(self, frame, age: int) -> None:
        slot, self.age = self.num_frames % self.capacity, age
        self.frames[slot] = torch.from_numpy(frame)
        self.record[slot] = torch.tensor([-1.0, 0.0, 0.0, age])
        self.num_frames += 1

    def add_first(self, frame: np.ndarray) -> None:
        """An episode's first frame (height, width)."""
        if self.num_frames:
            self.last_frames.append(self.num_frames - 1)
        self._append(frame, age=0)

    def add(self, action: int, reward: float, terminated: bool, frame: np.ndarray) -> None:
        """What was done in the newest frame, and what came of it: reward, termination, the next frame."""
        newest = self.num_frames - 1
        self.record[newest % self.capacity] = torch.tensor([action, reward, terminated, self.age])
        self.start[self.num_transitions % self.capacity] = newest
        self.num_transitions += 1
        self._append(frame, self.age + 1)

    def valid(self) -> tuple:
        """First and last + 1 of the transitions that can be sampled: their frames are in the ring, and their n steps
        have happened or their episode has ended."""
        oldest = self.num_frames - self.capacity
        oldest = oldest + self.stack - 1 if oldest > 0 else 0  # the oldest frames' own stacks are incomplete
        while self.last_frames and self.last_frames[0] < oldest:
            self.last_frames.popleft()
            self.gone += 1
        return oldest - self.gone, self.num_transitions - min(self.n_step - 1, self.age)

    def stacked(self, index: torch.Tensor) -> torch.Tensor:
        """Frame numbers (batch,) -> observations (batch, stack, height, width) uint8, zeros before an episode."""
        back = torch.arange(self.stack - 1, -1, -1, device=index.device)
        inside = back <= self.record[index % self.capacity, 3, None]
        slot = torch.where(inside, (index[:, None] - back) % self.capacity, self.capacity)
        # Copies whole frames; indexing by a tensor and masking afterwards take many times as long on a CPU
        return self.frames.index_select(0, slot.flatten()).view(*slot.shape, *self.frames.shape[1:])

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple:
        """Uniform, drawn from a generator on the CPU -> obs (batch, stack, height, width), action (batch,), reward
        (batch,) of n steps, discounted, discount (batch,), next_obs.

        discount is gamma^n, a smaller power where the episode ended earlier, 0 where it terminated.
        """
        draw = torch.randint(*self.valid(), (batch_size,), generator=generator).to(self.start.device)
        first = index = self.start[draw % self.capacity]
        reward, discount = torch.zeros(batch_size, device=index.device), torch.ones(batch_size, device=index.device)
        for _ in range(self.n_step):
            action, step_reward, terminated, _ = self.record[index % self.capacity].unbind(1)
            inside = action >= 0
            reward = reward + discount * step_reward  # 0 in an episode's last frame
            discount = torch.where(inside, discount * self.gamma * (1 - terminated), discount)
            index = index + inside
        action = self.record[first % self.capacity, 0].long()
        return self.stacked(first), action, reward, discount, self.stacked(index)

    def state_dict(self) -> dict:
        state = {k: getattr(self, k) for k in ("num_frames", "num_transitions", "age", "gone")}
        for name, filled in dict(frames=self.num_frames, record=self.num_frames, start=self.num_transitions).items():
            # Through NumPy: the filled part without a copy, where a mere view of the tensor would save all of it
            state[name] = torch.from_numpy(getattr(self, name)[:filled].cpu().numpy())
        return state | dict(last_frames=list(self.last_frames))

    def load_state_dict(self, state: dict) -> None:
        for name in ("frames", "record", "start"):
            getattr(self, name)[: len(state[name])] = state[name]
        for name in ("num_frames", "num_transitions", "age", "gone"):
            setattr(self, name, state[name])
        self.last_frames = deque(state["last_frames"])


# === Networks =========================================================================================================
def draw_weights(weight: torch.Tensor, kind: str, generator: torch.Generator) -> None:
    """Fills a layer's weights from their initial distribution, in place.

    xavier: uniform within sqrt(6 / (fan_in + fan_out)); lecun: normal, cut off at 2 standard deviations, of variance
    1 / fan_in; torch: uniform within 1 / sqrt(fan_in), PyTorch's default.
    """
    if kind == "xavier":
        nn.init.xavier_uniform_(weight, generator=generator)
    elif kind == "torch":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    else:
        std = math.sqrt(1 / weight[0].numel()) / 0.87962566  # that of the normal before it is cut off
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def same_padding(size: int, kernel: int, stride: int) -> tuple:
    """Zeros before and after one axis so that a convolution gives ceil(size / stride) outputs (TensorFlow's SAME)."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class QNetwork(nn.Module):
    """What both networks share: named layers, and which layers read which (for recycling).

    forward(obs (batch, 4, 84, 84) uint8) -> q-values (batch, actions), {layer: activation after its non-linearity}.
    `reader[a] = b`: neurons of layer a are read by layer b alone, so they can be recycled.
    """

    def __init__(self, args):
        super().__init__()
        self.width, self.init, self.layer_norm = args.width, args.init, args.layer_norm
        self.activate = F.relu if args.activation == "relu" else F.leaky_relu  # slope 0.01
        self.layers, self.norms, self.inits, self.reader = nn.ModuleDict(), nn.ModuleDict(), {}, {}

    def add(self, name, layer, init=None, norm=True) -> int:
        """Adds a layer -> its number of neurons."""
        self.layers[name], self.inits[name] = layer, init or self.init
        if norm and self.layer_norm:
            self.norms[name] = nn.GroupNorm(1, len(layer.bias))  # over all channels and positions
        return len(layer.bias)

    @torch.no_grad()
    def initialise(self, generator) -> None:
        for name, layer in self.layers.items():
            draw_weights(layer.weight, self.inits[name], generator)
            layer.bias.zero_()
            if self.inits[name] == "torch":
                layer.bias.uniform_(-1, 1, generator=generator).div_(math.sqrt(layer.weight[0].numel()))

    def parameters_of(self, name) -> list:
        """A layer's weight, its bias, and its normalisation's scale and shift."""
        return [*self.layers[name].parameters(), *(self.norms[name].parameters() if name in self.norms else ())]

    def neurons(self, count: int) -> int:
        return math.ceil(count * self.width)

    def hidden(self, name, x):
        """One layer, normalisation, activation."""
        x = self.layers[name](x)
        return self.activate(self.norms[name](x) if name in self.norms else x)


class NatureCNN(QNetwork):
    """Mnih et al. 2015: convolutions 32 8x8/4, 64 4x4/2, 64 3x3/1, dense 512 (Table 2), times the width."""

    def __init__(self, num_actions, args):
        super().__init__(args)
        channels, size, self.pads = 4, 84, {}
        for name, out, kernel, stride in (("conv1", 32, 8, 4), ("conv2", 64, 4, 2), ("conv3", 64, 3, 1)):
            before, after = same_padding(size, kernel, stride) if args.padding == "same" else (0, 0)
            self.pads[name] = (before, after) * 2 if before != after else None  # uneven: padded by hand
            padding = before if before == after else 0
            channels = self.add(name, nn.Conv2d(channels, self.neurons(out), kernel, stride, padding))
            size = (size + before + after - kernel) // stride + 1
        units = self.add("dense", nn.Linear(channels * size * size, self.neurons(512)))
        self.add("head", nn.Linear(units, num_actions), norm=False)
        self.reader = {"conv1": "conv2", "conv2": "conv3", "conv3": "dense", "dense": "head"}

    def forward(self, obs):
        x, activations = obs.float() / 255, {}
        for name, pad in self.pads.items():
            x = activations[name] = self.hidden(name, x if pad is None else F.pad(x, pad))
        activations["dense"] = self.hidden("dense", x.flatten(1))
        return self.layers["head"](activations["dense"]), activations


class ResNet(QNetwork):
    """The paper's IMPALA-like network: 3 stacks of 32, 64, 64 channels, each a convolution, a pool and two residual
    blocks; dense 512. The residual stream has many readers; only the blocks' inner neurons and the dense layer's are
    recycled."""

    def __init__(self, num_actions, args):
        super().__init__(args)
        channels, size = 4, 84
        for stack, out in enumerate((32, 64, 64), start=1):
            channels = self.add(f"stack{stack}", nn.Conv2d(channels, self.neurons(out), 3, padding=1), norm=False)
            size = -(-size // 2)
            for block in (1, 2):
                inner, outer = (f"stack{stack}_block{block}_conv{i}" for i in (1, 2))
                self.add(inner, nn.Conv2d(channels, channels, 3, padding=1), "lecun")
                self.add(outer, nn.Conv2d(channels, channels, 3, padding=1), "lecun", norm=False)
                self.reader[inner] = outer
        units = self.add("dense", nn.Linear(channels * size * size, self.neurons(512)))
        self.add("head", nn.Linear(units, num_actions), norm=False)
        self.reader["dense"] = "head"

    def forward(self, obs):
        x, activations = obs.float() / 255, {}
        for stack in (1, 2, 3):
            x = self.layers[f"stack{stack}"](x)
            x = F.max_pool2d(F.pad(x, same_padding(x.shape[-1], 3, 2) * 2, value=-math.inf), 3, 2)
            for block in (1, 2):
                name = f"stack{stack}_block{block}"
                inner = activations[f"{name}_input"] = self.activate(x)
                inner = activations[f"{name}_conv1"] = self.hidden(f"{name}_conv1", inner)
                x = x + self.layers[f"{name}_conv2"](inner)
        activations["dense"] = self.hidden("dense", self.activate(x).flatten(1))
        return self.layers["head"](activations["dense"]), activations


class DQNAgent(nn.Module):
    """The Q-network that learns, and its target: a copy from some steps ago."""

    def __init__(self, num_actions, args):
        super().__init__()
        self.q_network = {"nature": NatureCNN, "resnet": ResNet}[args.network](num_actions, args)
        self.q_network.initialise(torch.Generator().manual_seed(episode_seed(args.seed, 2, 3)))
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)

    @torch.no_grad()
    def update_target(self) -> None:
        torch._foreach_copy_(list(self.target_network.parameters()), list(self.q_network.parameters()))


# === Dormant neurons (Section 3) ======================================================================================
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


def dormant_mask(activation: torch.Tensor, tau: float) -> torch.Tensor:
    """Definition 3.1: (neurons,) bool, True where the score is at most tau. A silent layer is all dormant."""
    return dormant_score(activation) <= tau


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


@torch.no_grad()
def inspect(q_network, obs, history: dict, args) -> tuple:
    """What is logged about the network, on states obs (rank_batch_size, 4, 84, 84) -> metrics, scores by layer.

    Dormant ratios and overlaps are taken over the first dormant_batch_size states, the noise floor of the overlap
    between them and as many others, the rank over all. `history` holds the masks of the previous look, of the first one
    (anchor) and of all (union), and is updated.
    """
    activations, n = q_network(obs)[1], args.dormant_batch_size
    scores = {name: dormant_score(h[:n]) for name, h in activations.items()}
    others = {name: dormant_score(h[n : 2 * n]) for name, h in activations.items()}
    for each in (scores, others):
        each["all"] = torch.cat(list(each.values()))
    metrics = {"plasticity/feature_rank/dense": feature_rank(activations["dense"])}
    for name, score in scores.items():
        for tau in args.dormant_tau:
            metrics[f"plasticity/dormant_ratio_tau{tau:g}/{name}"] = dormant_share(score, tau)
    masks, noise = ({k: score <= args.dormant_tau[0] for k, score in each.items()} for each in (scores, others))
    for kind, reference in (history | {"noise_floor": noise}).items():
        for name, mask in masks.items():
            metrics[f"plasticity/overlap_{kind}/{name}"] = overlap(mask, reference[name])
    union = {name: mask | history.get("union", masks)[name] for name, mask in masks.items()}
    history.update(previous=masks, anchor=history.get("anchor", masks), union=union)
    for name, layer in q_network.layers.items():
        metrics[f"plasticity/weight_norm/{name}"] = layer.weight.norm()
        if layer.weight.grad is not None:  # of the last update
            metrics[f"plasticity/grad_norm/{name}"] = layer.weight.grad.norm()
    return metrics, scores


# === ReDo (Section 4), and what it is compared with ===================================================================
class PerElementAdam(torch.optim.Optimizer):
    """Adam with a bias correction per element, so that a recycled weight's moments can start anew.

    Adam divides its moments by 1 - beta^k after k steps: the total weight that the average has given to gradients so
    far. That weight is kept beside each element instead of k, and is zeroed with the moments.
    """

    def __init__(self, params, lr, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, eps=eps, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {k: torch.zeros_like(p) for k in ("exp_avg", "weight", "exp_avg_sq", "weight_sq")}
            m, m_weight, v, v_weight = (
                [self.state[p][k] for p in params] for k in ("exp_avg", "weight", "exp_avg_sq", "weight_sq")
            )
            grads, (beta1, beta2) = [p.grad for p in params], group["betas"]
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            for average, value, beta in ((m, grads, beta1), (v, torch._foreach_mul(grads, grads), beta2)):
                torch._foreach_mul_(average, beta)
                torch._foreach_add_(average, value, alpha=1 - beta)
            for weight, beta in ((m_weight, beta1), (v_weight, beta2)):
                torch._foreach_mul_(weight, beta)
                torch._foreach_add_(weight, 1 - beta)
            scale = torch._foreach_sqrt(torch._foreach_div(v, v_weight))
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_mul_(scale, m_weight)
            torch._foreach_addcdiv_(params, m, scale, value=-group["lr"])


def forget(optimizer, parameter, mask) -> None:
    """Zeroes what Adam remembers of a parameter's elements, in place; mask (broadcastable to the parameter) bool."""
    for value in optimizer.state.get(parameter, {}).values():
        if value.shape == parameter.shape:
            value.masked_fill_(mask, 0)


def reset_adam_step(q_network, optimizer) -> None:
    """Zeroes Adam's step count of every tensor but the head's bias.

    With moments kept, the next updates shrink to 0.32, 0.15, 0.31, 0.63, 0.80 of themselves after 1, 10, 100, 500, 1000
    steps: a learning-rate warm-up that a public port of ReDo has by accident. Here it is a control.
    """
    for parameter, state in optimizer.state.items():
        if parameter is not q_network.layers["head"].bias:
            state["step"].zero_()


@torch.no_grad()
def redraw(q_network, name, mask, generator) -> None:
    """Starts a layer's neurons (mask) anew, in place: incoming weights drawn from their initial distribution, biases 0,
    a normalisation's scale 1 and shift 0."""
    layer = q_network.layers[name]
    fresh = torch.empty(layer.weight.shape)
    draw_weights(fresh, q_network.inits[name], generator)
    rows = mask.view(-1, *[1] * (fresh.dim() - 1))
    layer.weight.copy_(torch.where(rows, fresh.to(mask.device), layer.weight))
    layer.bias.masked_fill_(mask, 0)
    if name in q_network.norms:
        q_network.norms[name].weight.masked_fill_(mask, 1)
        q_network.norms[name].bias.masked_fill_(mask, 0)


@torch.no_grad()
def recycle(q_network, optimizer, obs, args, generator) -> dict:
    """ReDo (Algorithm 1), in place, on states obs (batch, 4, 84, 84) -> metrics.

    All masks come from one forward pass; then all incoming weights are drawn anew, then all outgoing weights become 0,
    so a weight between two recycled neurons ends as 0. With layer_norm the output may change even at tau 0: one
    neuron's weights move the others' normalisation.
    """
    q_before, activations = q_network(obs)
    masks = {name: dormant_mask(activations[name], args.redo_tau) for name in q_network.reader}
    dimensions = {"none": math.inf, "moments": 2}.get(args.redo_adam, 1)  # moments: biases, of 1 dimension, keep theirs
    for name, mask in masks.items():
        redraw(q_network, name, mask, generator)
        for parameter in q_network.parameters_of(name):
            if parameter.dim() >= dimensions:
                forget(optimizer, parameter, mask.view(-1, *[1] * (parameter.dim() - 1)))
    for name, mask in masks.items():
        weight = q_network.layers[q_network.reader[name]].weight
        positions = weight.shape[1] // len(mask)  # a feature map feeds height x width consecutive columns of `dense`
        columns = mask.repeat_interleave(positions)
        if args.redo_compat_flatten:  # as if a position's channels, not a channel's positions, were consecutive
            columns = columns.view(positions, -1).T.flatten()
        columns = columns.view(1, -1, *[1] * (weight.dim() - 2))
        weight.masked_fill_(columns, 0)
        if args.redo_adam != "none":
            forget(optimizer, weight, columns)
    if args.redo_adam == "moments+tensor-step":
        reset_adam_step(q_network, optimizer)
    counts = {f"plasticity/redo_recycled/{name}": mask.sum() for name, mask in masks.items()}
    q_change = (q_network(obs)[0] - q_before).abs().max()
    return counts | {"plasticity/redo_recycled/all": sum(counts.values()), "plasticity/redo_q_change": q_change}


@torch.no_grad()
def reset_layers(q_network, optimizer, names, generator) -> None:
    """The reset baseline (Nikishin et al. 2022): draws whole layers anew, biases 0, Adam's moments 0, in place."""
    for name in names:
        everything = torch.ones_like(q_network.layers[name].bias, dtype=torch.bool)
        redraw(q_network, name, everything, generator)
        for parameter in q_network.parameters_of(name):
            forget(optimizer, parameter, torch.ones_like(parameter, dtype=torch.bool))


# === DQN ==============================================================================================================
def make_optimizer(agent, args, device):
    """Adam; the weight decay is added to the gradient (coupled)."""
    options = dict(lr=args.learning_rate, eps=args.adam_eps, weight_decay=args.weight_decay)
    if args.method == "redo" and args.redo_adam == "per-element":
        return PerElementAdam(agent.q_network.parameters(), **options)
    options |= dict(fused=device.type != "mps", capturable=args.cudagraphs)
    return torch.optim.Adam(agent.q_network.parameters(), **options)


def td_update(agent, optimizers, batch, args) -> dict:
    """One gradient step on a batch from `FrameReplay.sample` -> metrics, detached, on the device."""
    (obs, action, reward, discount, next_obs), (optimizer,) = batch, optimizers
    autocast = dict(device_type=obs.device.type, dtype=torch.bfloat16, enabled=args.amp)
    with torch.no_grad(), torch.autocast(**autocast):  # a region of its own: weights that it casts carry no gradient
        next_q = agent.target_network(next_obs)[0].float()
        if args.double:
            next_action = agent.q_network(next_obs)[0].argmax(1, keepdim=True)
            next_value = next_q.gather(1, next_action)[:, 0]
        else:
            next_value = next_q.max(1).values
        target = reward + discount * next_value
    with torch.autocast(**autocast):
        q_values = agent.q_network(obs)[0].float()
    q = q_values.gather(1, action[:, None])[:, 0]
    loss = F.smooth_l1_loss(q, target) if args.loss == "huber" else F.mse_loss(q, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"losses/td": loss.detach(), "losses/q_values": q.detach().mean(), "losses/targets": target.mean()}


def epsilon_at(step: int, args) -> float:
    """The probability of a random action: start_e, then linear to end_e."""
    progress = min(max((step - args.exploration_starts) / args.exploration_steps, 0.0), 1.0)
    return args.start_e + progress * (args.end_e - args.start_e)


def play_episodes(q_network, games, args, draw: int, device, stop=()) -> dict:
    """Whole episodes at eval_epsilon, at least eval_steps steps -> metrics. Draws no random number from torch.

    Each of the games played side by side begins new episodes until it has had its share of the steps. `draw` numbers
    the evaluation: it seeds emulators and random actions. A signal in the list `stop` ends it: no metrics.
    """
    rng, n, forced = np.random.default_rng((args.seed, 1, draw)), games.num_envs, action_after_life(games, args)
    obs, info = start_games(games, args, rng)
    episode_return, episode_length, steps = np.zeros(n), np.zeros(n, int), np.zeros(n, int)
    running, finished, lost_life = np.ones(n, bool), [], np.zeros(n, bool)
    while running.any():
        action = choose_action(q_network, obs, args.eval_epsilon, rng, games.single_action_space.n, device)
        if forced is not None:
            action[lost_life] = forced
        lives = info["lives"]
        obs, reward, terminated, truncated, info = games.step(action)
        episode_return, episode_length, steps = episode_return + reward, episode_length + 1, steps + 1
        done, lost_life = terminated | truncated, info["lives"] < lives
        if done.any():
            finished += [(episode_return[i], episode_length[i]) for i in np.flatnonzero(done & running)]
            running &= ~done | (steps < args.eval_steps / n)
            episode_return[done], episode_length[done], lost_life[done] = 0, 0, False
            obs, info = start_games(games, args, rng, done)
        if stop:
            return {}
    returns, lengths = np.array(finished, float).T
    return {
        "eval/episodic_return": returns.mean(), "eval/episodic_length": lengths.mean(), "eval/episodes": len(returns),
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
    """Fills in what depends on the protocol, and refuses what cannot work before anything is allocated or written."""
    args = copy.copy(args)
    check_numbers(args)
    games = [name for name in gymnasium.registry if name.startswith("ALE/")]
    if args.env_id not in games:
        close = difflib.get_close_matches(args.env_id, games, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        refuse("env_id", args.env_id, f"is no game of the Arcade Learning Environment (ALE/<Game>-v5){hint}")
    if args.network == "resnet":
        if args.padding == "valid":
            refuse("padding", "valid", "the ResNet's convolutions are always padded (same)")
        args.padding = "same"
    defaults = PROTOCOLS[args.protocol] | dict(redo_tau=0.025 if args.replay_ratio == 0.25 else 0.1)
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.exploration_steps is None:
        args.exploration_steps = max(1, round(0.1 * args.total_timesteps))
    if args.exploration_starts is None:
        args.exploration_starts = args.learning_starts
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    replay_bytes = min(args.buffer_size, 2 * args.total_timesteps) * (84 * 84 + 24)
    layers, network_bytes = [], 0
    if 0 < args.width < 64:
        with torch.device("meta"):  # shapes only, nothing is allocated
            network = {"nature": NatureCNN, "resnet": ResNet}[args.network](18, args)
        layers = list(network.layers)
        # Weights, the target's, gradients, and Adam's moments (per-element: their weights and temporary copies, too)
        copies = 9 if args.method == "redo" and args.redo_adam == "per-element" else 5
        network_bytes = 4 * copies * sum(p.numel() for p in network.parameters())
    largest_batch = max(args.batch_size, args.redo_batch_size, args.rank_batch_size)
    state_bytes = {"nature": 8e5, "resnet": 3e6}[args.network] * max(1, args.width)  # activations
    work_bytes = 3e8 + network_bytes + state_bytes * largest_batch  # 3e8: libraries
    if args.buffer_device == "auto":
        fits = args.device == "cuda" and not missing["cuda"] and replay_bytes + work_bytes < 0.9 * memory("cuda")
        args.buffer_device = "cuda" if fits else "cpu"

    value = vars(args)
    wrong = {  # limit -> the arguments that break it
        "must be greater than 0": [n for n in (
            "total_timesteps", "batch_size", "n_step", "learning_rate", "adam_eps", "target_network_frequency", "width",
            "max_episode_steps", "exploration_steps", "redo_period_gradient_steps", "redo_batch_size", "eval_every",
            "reset_period_gradient_steps", "eval_steps", "eval_envs", "dormant_every", "dormant_batch_size",
            "log_every", "checkpoint_every") if not value[n] > 0],
        "must lie between 0 and 2**32 - 1": ["seed"] * (not 0 <= args.seed < 2**32),
        f"must be at most --learning-starts {args.learning_starts}": [n for n in (
            "batch_size", "redo_batch_size" if args.method == "redo" else "batch_size")
            if value[n] > args.learning_starts],
        "must be at most 27000, 30 minutes": [n for n in ("max_episode_steps", "noop_max") if value[n] > 27_000],
        "must not be negative": [n for n in (
            "noop_max", "weight_decay", "redo_tau", "exploration_starts") if not value[n] >= 0],
        "must be less than 64": ["width"] * (args.width >= 64),
        "must be at most 1024": ["eval_envs"] * (args.eval_envs > 1024),
        "must be at most 1000": ["replay_ratio"] * (args.replay_ratio > 1000),
        "must hold thresholds that are not negative":
            ["dormant_tau"] * (not args.dormant_tau or not all(tau >= 0 for tau in args.dormant_tau)),
        "must lie between 0 and 1": [n for n in (
            "gamma", "sticky_actions", "start_e", "end_e", "eval_epsilon") if not 0 <= value[n] <= 1],
        f"must be a positive multiple of {1 / UPDATE_PERIOD}: whole gradient steps every {UPDATE_PERIOD} steps":
            ["replay_ratio"] * (args.replay_ratio <= 0 or args.replay_ratio * UPDATE_PERIOD % 1 != 0),
        f"must be layers of this network: {', '.join(layers)}":
            ["reset_layers"] * (args.width > 0 and not set(args.reset_layers) <= set(layers)),
        f"must be at least twice --dormant-batch-size {args.dormant_batch_size}":
            ["rank_batch_size"] * (args.rank_batch_size < 2 * args.dormant_batch_size),
        f"must be at least --n-step {args.n_step}, and at most --buffer-size {args.buffer_size}":
            ["learning_starts"] * (not args.n_step <= args.learning_starts <= args.buffer_size),
        f"must be more than --learning-starts {args.learning_starts}":
            ["total_timesteps"] * (args.total_timesteps <= args.learning_starts),
        "must not contain /": ["exp_name"] * ("/" in args.exp_name),
        "torch sees no such device here": [n for n in ("device", "buffer_device") if missing.get(value[n])],
        f"needs --device cuda, not {args.device}": ["cudagraphs"] * (args.cudagraphs and args.device != "cuda"),
    }  # fmt: skip
    for limit, names in wrong.items():
        for name in names:
            refuse(name, value[name], limit)
    if args.buffer_size < 2 * (args.n_step + 4):
        refuse("buffer_size", args.buffer_size, f"is too small for --n-step {args.n_step}")
    if args.redo_end_gradient_steps is not None and args.redo_end_gradient_steps <= 0:
        refuse("redo_end_gradient_steps", args.redo_end_gradient_steps, "must be greater than 0")
    # What a method does not read; the two periods may be given to all, as sweeps of several methods do
    idle = {"redo": ["redo_tau", "redo_batch_size", "redo_adam", "redo_compat_flatten"], "reset": ["reset_layers"]}
    for method, names in idle.items():
        for name in names:
            if args.method != method and value[name] != defaults.get(name, getattr(Args, name)):
                refuse(name, value[name], f"does nothing without --method {method}")
    if args.method == "dqn" and args.redo_end_gradient_steps is not None:
        refuse("redo_end_gradient_steps", args.redo_end_gradient_steps, "--method dqn recycles and resets nothing")
    if args.redo_compat_flatten and args.network == "resnet":
        refuse("redo_compat_flatten", True, "of the ResNet no layer that is recycled is flattened")
    needed = {args.device: work_bytes}
    needed[args.buffer_device] = needed.get(args.buffer_device, 0) + replay_bytes
    for device, total in needed.items():
        if total > memory(device):
            name = "width" if 2 * network_bytes > work_bytes else "rank_batch_size"
            name = "buffer_size" if device == args.buffer_device and replay_bytes > work_bytes else name
            limit = f"the run needs about {total / 1e9:.1f} GB, {device} has {memory(device) / 1e9:.1f} GB"
            refuse(name, value[name], limit)
    try:
        if args.track:
            import wandb  # noqa: F401
    except ImportError:
        refuse("track", "", "needs Weights & Biases: pip install wandb")
    return args


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

    games, eval_games = make_games(args, 1), make_games(args, args.eval_envs)
    num_actions, forced = int(games.single_action_space.n), action_after_life(games, args)
    layout = torch.channels_last if args.amp or device.type == "cpu" else torch.contiguous_format
    agent = DQNAgent(num_actions, args).to(device, memory_format=layout)
    if args.compile:  # once per batch size and kind of gradient
        torch._dynamo.config.recompile_limit = 32
        agent.q_network.compile(dynamic=False)
        agent.target_network.compile(dynamic=False)
    q_network, optimizer = agent.q_network, make_optimizer(agent, args, device)
    capacity = min(args.buffer_size, 2 * args.total_timesteps)  # an episode's last frame takes a place, too
    replay = FrameReplay(capacity, args.buffer_device, args.n_step, args.gamma)
    # Streams of random numbers of their own, so that looking at the network or recycling does not change the batches
    action_rng = np.random.default_rng(episode_seed(args.seed, 2, 4))
    rng = {name: torch.Generator() for name in ("batch", "redo", "look")}
    for i, generator in enumerate(rng.values()):
        generator.manual_seed(episode_seed(args.seed, 2, i))

    start = dict(global_step=0, gradient_steps=0, episode=0, episode_actions=[], history={}, walltime=0.0)
    start |= dict(learning_from=args.learning_starts, replay=None)
    if args.resume:
        run_dir = Path(args.resume)
        lock = lock_folder(run_dir, args)
        with restoring(run_dir, lock):
            loaded = load_checkpoint(run_dir, args)
            start = {name: loaded.pop(name) for name in start} | loaded
            agent.load_state_dict(start["agent"])
            optimizer.load_state_dict(
                {"state": start["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]}
            )
            for p, state in optimizer.state.items():  # another device may want another memory layout
                state.update({k: torch.empty_like(p).copy_(v) for k, v in state.items() if v.shape == p.shape})
            action_rng.bit_generator.state = start["action_rng"]
            for name, generator in rng.items():
                generator.set_state(start["rng"][name])
    else:
        name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
        run_dir = Path("runs") / name
        lock = lock_folder(run_dir, args)
    global_step, gradient_steps, episode = (start[k] for k in ("global_step", "gradient_steps", "episode"))
    learning_from, walltime = start["learning_from"], start["walltime"]
    history = {kind: {k: v.to(device) for k, v in masks.items()} for kind, masks in start["history"].items()}

    # The emulator's state is not in the checkpoint: the same seed and the same actions lead to it again
    obs, info = start_episode(games, args, episode)
    episode_return, episode_actions, lost_life = 0.0, start["episode_actions"], False
    for action in episode_actions:
        lives = info["lives"][0]
        obs, reward, _, _, info = games.step(np.array([action]))
        episode_return, lost_life = episode_return + float(reward[0]), info["lives"][0] < lives
    if args.resume and not np.array_equal(obs, start["obs"].numpy()):
        lock.close()
        refuse("resume", args.resume, "this version of ale-py plays the episode that was interrupted differently")
    if start["replay"] is not None:
        with restoring(run_dir, lock):
            replay.load_state_dict(start["replay"])
    else:
        replay.add_first(obs[0, -1])
        if args.resume and global_step < args.total_timesteps:
            print(f"the checkpoint holds no replay: collecting {args.learning_starts} steps before learning goes on")
            learning_from = global_step + args.learning_starts
    del start

    writer = start_logging(args, run_dir, first_step=global_step + 1 if args.resume else None)
    start_time, captured, stop, metrics = time.time(), None, [], {}
    timer_step, timer, paused = global_step, time.time(), 0.0  # for the speed since the last log

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
                if math.isfinite(value):  # the overlap with an empty set is no number
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
        result = play_episodes(q_network, eval_games, args, global_step, device, stop)
        log(result)
        return result

    @not_training
    def look():
        probe = replay.sample(args.rank_batch_size, rng["look"])[0].to(device)
        looked, scores = inspect(q_network, probe, history, args)
        log(looked)
        for name, score in scores.items():
            if score.isfinite().all():
                writer.add_histogram(f"dormant_score/{name}", score.cpu().numpy(), global_step)

    @not_training
    def save_checkpoint():
        with writing(run_dir):
            writer.flush()
        unfinished = global_step < args.total_timesteps  # nobody continues from a finished run's replay
        save_file(run_dir / "checkpoint.pt", dict(
            args=fixed_args(args), agent=agent.state_dict(), optimizer=optimizer.state_dict()["state"], history=history,
            action_rng=action_rng.bit_generator.state,
            rng={name: generator.get_state() for name, generator in rng.items()},
            replay=replay.state_dict() if args.checkpoint_replay and unfinished else None, obs=torch.from_numpy(obs),
            episode=episode, episode_actions=episode_actions, global_step=global_step, gradient_steps=gradient_steps,
            learning_from=learning_from, walltime=walltime + time.time() - start_time))  # fmt: skip

    handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True, smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    while global_step < args.total_timesteps and not stop:
        if global_step % args.eval_every == 0 and global_step:
            run_evaluation()
            if stop:
                break  # resumed, the run evaluates here again
        # Act: the emulator plays this step in its own thread ...
        epsilon = epsilon_at(global_step, args)
        action = int(choose_action(q_network, obs, epsilon, action_rng, num_actions, device)[0])
        if lost_life and forced is not None:
            action = forced
        games.send(np.array([action]))

        # Learn: ... while the network learns from the steps before it
        events = {}
        if global_step > learning_from and global_step % UPDATE_PERIOD == 0:
            for _ in range(round(args.replay_ratio * UPDATE_PERIOD)):
                batch = [x.to(device) for x in replay.sample(args.batch_size, rng["batch"])]
                if args.cudagraphs:
                    captured = captured or capture_update(td_update, agent, [optimizer], batch, args)
                    metrics = captured(batch)
                else:
                    metrics = td_update(agent, [optimizer], batch, args)
                gradient_steps += 1
                if args.redo_end_gradient_steps is not None and gradient_steps >= args.redo_end_gradient_steps:
                    continue  # plain DQN from here on
                if args.method == "reset":
                    if gradient_steps % args.reset_period_gradient_steps == 0:
                        reset_layers(q_network, optimizer, args.reset_layers, rng["redo"])
                        events["plasticity/reset"] = 1
                elif gradient_steps % args.redo_period_gradient_steps == 0:
                    if args.method == "redo":
                        probe = replay.sample(args.redo_batch_size, rng["redo"])[0].to(device)
                        events |= recycle(q_network, optimizer, probe, args, rng["redo"])
                    elif args.method == "adam-step-reset":
                        reset_adam_step(q_network, optimizer)
        if global_step > learning_from and global_step % args.target_network_frequency == 0:
            agent.update_target()

        # Observe
        lives = info["lives"][0]  # of this episode
        episode_actions.append(action)
        obs, reward, terminated, truncated, info = games.recv()
        reward, done, lost_life = float(reward[0]), bool(terminated[0] | truncated[0]), info["lives"][0] < lives
        over = terminated[0] or (args.terminal_on_life_loss and lost_life)
        replay.add(action, np.clip(reward, -1, 1) if args.clip_reward else reward, over, obs[0, -1])
        global_step, episode_return = global_step + 1, episode_return + reward
        bar.update()
        if done:
            events |= {"charts/episodic_return": episode_return, "charts/episodic_length": len(episode_actions)}
            bar.set_postfix(episodic_return=f"{episode_return:g}", refresh=False)
            episode, episode_actions, episode_return, lost_life = episode + 1, [], 0.0, False
            obs, info = start_episode(games, args, episode)
            replay.add_first(obs[0, -1])

        # Log, look, save
        log(events)
        if global_step % args.log_every == 0 or global_step == args.total_timesteps:
            for tag in not_finite(metrics)[:1]:
                give_up(f"{tag} is not finite, after step {timer_step}")
        if global_step % args.log_every == 0:
            log(metrics | {
                "charts/epsilon": epsilon, "charts/gradient_steps": gradient_steps,
                "charts/frames": global_step * ACTION_REPEAT, "charts/walltime": walltime + time.time() - start_time,
                "charts/replay_ratio": args.replay_ratio if global_step > learning_from else 0})  # fmt: skip
            if timer_step > learning_from:  # the first steps of learning warm up and compile
                log({"charts/SPS": (global_step - timer_step) / (time.time() - timer - paused)})
            timer_step, timer, paused = global_step, time.time(), 0.0
        if global_step % args.dormant_every == 0 and global_step >= learning_from:
            look()
        if global_step % args.checkpoint_every == 0 and global_step < args.total_timesteps:
            save_checkpoint()

    result = None if stop else run_evaluation()
    save_checkpoint()
    with writing(run_dir):
        writer.close()
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        lock.close()
        raise SystemExit(stop[0])
    if args.save_model:
        save_file(run_dir / "model.pt", agent.q_network.state_dict())
    summary = dict(global_step=global_step, gradient_steps=gradient_steps, walltime=walltime + time.time() - start_time)
    save_file(run_dir / "summary.json", summary | result)
    print(f"{run_dir}: mean return {result['eval/episodic_return']:.1f} over {result['eval/episodes']:g} episodes")
    lock.close()
    return run_dir


if __name__ == "__main__":
    train(parse_args(sys.argv[1:]))
