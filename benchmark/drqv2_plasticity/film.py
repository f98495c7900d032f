"""Films one evaluation episode of a run of drqv2_plasticity.py, adaptive_rr.py or drm.py, larger than the agent sees
it, with no display needed.

python benchmark/drqv2_plasticity/film.py runs/<run>            -> runs/<run>/episode.mp4
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from moviepy import ImageSequenceClip

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plotting import run_to_film


def film(run_dir: Path, size: int = 336, max_steps: int = 1000) -> Path:
    """The run's checkpoint -> an episode of the mean action, size x size pixels. Two environments with one seed play
    it, one for the agent and one for the camera."""
    description = json.loads((run_dir / "args.json").read_text())
    script = importlib.import_module(description["script"])
    args = script.Args(**description["args"])
    env, camera = script.make_env(args.env_id, args.image_size), script.make_env(args.env_id, size)
    checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    agent = getattr(script, "DrMAgent", script.DrQv2Agent)(env.action_space.shape[0], args)
    if description["script"] == "drqv2_plasticity":
        script.prepare(agent, args)
    agent.load_state_dict(checkpoint["agent"])
    seed = script.derived_seed(args.seed, 2, 0)
    (frame, _), (picture, _) = env.reset(seed=seed), camera.reset(seed=seed)
    stack, pictures, over = [frame] * 3, [], False
    while not over and len(pictures) < max_steps:
        pictures.append(picture.transpose(1, 2, 0))
        with torch.no_grad():
            obs = torch.from_numpy(np.concatenate(stack[-3:])[None])
            action = agent.mean_action(obs)[0].numpy()
        picture = camera.step(action)[0]
        frame, _, terminated, truncated, _ = env.step(action)
        stack, over = [*stack[-2:], frame], terminated or truncated
    ImageSequenceClip(pictures, fps=25).write_videofile(str(run_dir / "episode.mp4"), logger=None)
    return run_dir / "episode.mp4"


if __name__ == "__main__":
    print(film(run_to_film("drqv2_plasticity", "adaptive_rr", "drm")))
