"""Times one gradient step of drm.py beside the official DrM's, and compares their numbers.

    git clone https://github.com/XuGW-Kevin/DrM
    python benchmark/drm/peer.py DrM --out runs/figures/drm_peer

All get the same weights, batch and random numbers, each in a process of its own, and take turns: dormant ratio, critic
loss, actor loss and V's loss are printed. Beside them DrQ-v2's update, as adaptive_rr.py has it: what DrM's parts cost.
Official: agent.update on a batch of NumPy arrays, augmentation and metrics included; ours: random_shift and update on a
batch of tensors. Drawing the batch from the replay is in neither.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import adaptive_rr as rr
import drm


def load_module(name: str, path: Path):
    """A module by its path: another peer.py, and the official module, which is called drm, too."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peer = load_module("drqv2_plasticity_peer", Path(__file__).resolve().parents[1] / "drqv2_plasticity" / "peer.py")

STEP, ACTION_DIM = 3000, 4


def load_official(folder: str, device: str):
    """The official agent for Hopper Hop from a clone of its repository."""
    sys.path.insert(0, folder)
    official = load_module("official_drm", Path(folder) / "agents" / "drm.py")
    return official.DrMAgent(
        (9, 84, 84), (ACTION_DIM,), device, lr=1e-4, feature_dim=50, hidden_dim=1024, critic_target_tau=0.01,
        dormant_threshold=0.025, target_dormant_ratio=0.2, dormant_temp=10, target_lambda=0.6, lambda_temp=50,
        dormant_perturb_interval=100_000, min_perturb_factor=0.2, max_perturb_factor=1.0, perturb_rate=2,
        num_expl_steps=2000, stddev_type="awake", stddev_schedule="linear(1.0,0.1,500000)", stddev_clip=0.3,
        expectile=0.9, use_tb=True)  # fmt: skip


def make_ours(official, device, **options) -> tuple:
    """Our agent with the official one's weights -> agent, optimizers, arguments."""
    args = drm.Args(max_perturb_factor=1.0, **options)
    agent = drm.DrMAgent(ACTION_DIM, args)
    pairs = dict(encoder=official.encoder, actor=official.actor, critic=official.critic,
                 critic_target=official.critic_target, value=official.value_predictor)  # fmt: skip
    for name, theirs in pairs.items():
        weights = {k.replace("Q", "q").replace("V", "v"): v for k, v in theirs.state_dict().items()}
        getattr(agent, name).load_state_dict(weights)
    agent.to(device, memory_format=torch.channels_last)
    return agent, drm.make_drm_optimizers(agent, args, device), args


def build(name: str, options):
    device = torch.device(options.device)
    official = load_official(options.official, options.device)
    arrays, (obs, action, reward, discount, next_obs) = peer.random_batch(
        options.batch_size, ACTION_DIM, options.device
    )
    if name == "official":

        def step():
            metrics = official.update(iter([arrays]), STEP)
            return [metrics[k] for k in ("actor_dormant_ratio", "critic_loss", "actor_loss", "predictor_loss")]

        return step

    if "DrQ-v2" in name:
        script, args = rr, rr.Args(**VARIANTS[name])
        torch.manual_seed(0)
        agent = rr.DrQv2Agent(ACTION_DIM, args).to(device, memory_format=torch.channels_last)
        optimizers = rr.make_optimizers(agent, args, device)
        number, losses = torch.ones((), device=device), ("losses/critic", "losses/actor")
    else:
        script, (agent, optimizers, args) = drm, make_ours(official, device, **VARIANTS[name])
        number = torch.full((), STEP, dtype=torch.float64, device=device)
        losses = ("drm/dormant_ratio", "losses/critic", "losses/actor", "losses/value")
    script.set_precision(args.precision, device)
    learn = partial(script.update, agent, optimizers, args)
    if args.cudagraphs:
        learn = script.capture(learn, optimizers)

    def step():
        images = script.random_shift(obs, 4), script.random_shift(next_obs, 4)
        metrics = learn([images[0], action, reward[:, 0], discount[:, 0], images[1], number])
        return [metrics[k] for k in losses]

    return step


VARIANTS = peer.VARIANTS | {
    "DrQ-v2, float32": dict(precision="float32"),
    "DrQ-v2, bfloat16": dict(precision="bfloat16"),
}

if __name__ == "__main__":
    peer.compare(build, VARIANTS, peer.parse(__doc__, "XuGW-Kevin/DrM"))
