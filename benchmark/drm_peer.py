"""Times one gradient step of drm.py beside the official DrM's, and compares their numbers.

    git clone https://github.com/XuGW-Kevin/DrM
    python benchmark/drm_peer.py DrM --out runs/figures/drm_peer

Both get the same weights, batch and random numbers, in turn, in the same process: dormant ratio, critic loss, actor
loss and V's loss are printed. Beside them DrQ-v2's update, as adaptive_rr.py has it: what DrM's parts cost.
Official: agent.update on a batch of NumPy arrays, augmentation and metrics included; ours: random_shift and update on a
batch of tensors. Drawing the batch from the replay is in neither.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import drqv2_plasticity_peer as peer
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adaptive_rr as rr
import drm

STEP, ACTION_DIM = 3000, 4


def load_official(folder: str, device: str):
    """The official agent for Hopper Hop from a clone of its repository (its module is called drm, too)."""
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location("official_drm", Path(folder) / "agents" / "drm.py")
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    return official.DrMAgent(
        (9, 84, 84), (ACTION_DIM,), device, lr=1e-4, feature_dim=50, hidden_dim=1024, critic_target_tau=0.01,
        dormant_threshold=0.025, target_dormant_ratio=0.2, dormant_temp=10, target_lambda=0.6, lambda_temp=50,
        dormant_perturb_interval=100_000, min_perturb_factor=0.2, max_perturb_factor=1.0, perturb_rate=2,
        num_expl_steps=2000, stddev_type="awake", stddev_schedule="linear(1.0,0.1,500000)", stddev_clip=0.3,
        expectile=0.9, use_tb=True)  # fmt: skip


def make_ours(official, device: str, **options) -> tuple:
    """Our agent with the official one's weights -> agent, optimizers, arguments."""
    args = drm.Args(max_perturb_factor=1.0, **options)
    agent = drm.DrMAgent(ACTION_DIM, args)
    pairs = dict(encoder=official.encoder, actor=official.actor, critic=official.critic,
                 critic_target=official.critic_target, value=official.value_predictor)  # fmt: skip
    for name, theirs in pairs.items():
        weights = {k.replace("Q", "q").replace("V", "v"): v for k, v in theirs.state_dict().items()}
        getattr(agent, name).load_state_dict(weights)
    agent.to(device, memory_format=torch.channels_last)
    return agent, drm.make_drm_optimizers(agent, args, torch.device(device)), args


def main() -> None:
    options = peer.parse(__doc__, "XuGW-Kevin/DrM")
    device, size = options.device, options.batch_size
    torch.manual_seed(0)
    official = load_official(options.official, device)
    arrays, (obs, action, reward, discount, next_obs) = peer.random_batch(size, ACTION_DIM, device)
    others = [action, reward[:, 0], discount[:, 0]]

    def official_step():
        metrics = official.update(iter([arrays]), STEP)
        return [metrics[k] for k in ("actor_dormant_ratio", "critic_loss", "actor_loss", "predictor_loss")]

    def augmented():
        return [drm.random_shift(obs, 4), *others, drm.random_shift(next_obs, 4)]

    def our_step(step):
        metrics = step([*augmented(), torch.full((), STEP, dtype=torch.float64, device=device)])
        return [metrics[k] for k in ("drm/dormant_ratio", "losses/critic", "losses/actor", "losses/value")]

    def prepared(**flags):
        agent, optimizers, args = make_ours(official, device, **flags)
        step = partial(drm.update, agent, optimizers, args)
        return partial(our_step, drm.capture(step, optimizers) if args.cudagraphs else step)

    def plain(**flags):
        """The update of adaptive_rr.py."""
        args = rr.Args(**flags)
        torch.manual_seed(0)
        agent = rr.DrQv2Agent(ACTION_DIM, args).to(device, memory_format=torch.channels_last)
        optimizers = rr.make_optimizers(agent, args, torch.device(device))

        def step():
            metrics = rr.update(agent, optimizers, args, [*augmented(), torch.ones((), device=device)])
            return metrics["losses/critic"], metrics["losses/actor"]

        return step

    variants = {
        "official": official_step, "ours, float32": prepared(), "DrQ-v2, float32": plain(),
        "ours, bfloat16": prepared(precision="bfloat16"), "DrQ-v2, bfloat16": plain(precision="bfloat16"),
    }  # fmt: skip
    if options.no_bfloat16:
        variants = {name: step for name, step in variants.items() if "bfloat16" not in name}
    if device == "cuda":
        variants["ours, float32, captured"] = prepared(cudagraphs=True)
        variants["ours, bfloat16, captured"] = prepared(cudagraphs=True, precision="bfloat16")
    peer.compare(variants, size, options)


if __name__ == "__main__":
    main()
