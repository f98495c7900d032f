"""Films one evaluation episode of a finished crl_deep.py run, headless through EGL.

python benchmark/crl_deep_film.py runs/<run>            -> runs/<run>/episode.mp4; the goal is a red ball
"""

import json
import sys
from pathlib import Path

import mujoco
import numpy as np
import torch
from moviepy import ImageSequenceClip

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_deep as crl

WIDTH, HEIGHT = 640, 480


def film(run_dir: Path) -> Path:
    """The run's checkpoint -> its best of 16 evaluation episodes as run_dir/episode.mp4, at real speed."""
    try:
        from mujoco import egl
    except Exception:
        packages = "libegl1 libgl1-mesa-dri libglx-mesa0 libopengl0"
        print(f"error: rendering needs EGL: apt-get install {packages}", file=sys.stderr)
        raise SystemExit(2) from None
    args = crl.Args(**json.loads((run_dir / "args.json").read_text())["args"])
    envs = crl.MujocoEnvs(args.eval_env_id, 16, args.episode_length, (args.seed, 2))
    robot, model = envs.robot, envs.model
    agent = crl.Agent(robot.state_dim, robot.goal_dim, robot.action_dim, args)
    agent.load_state_dict(torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)["agent"])
    _, record = crl.evaluate(agent, envs, 0, torch.device("cpu"), keep_record=True)
    best = record["time_at_goal"].argmax()
    states = record["state"][record["alive"][:, best], best]

    context = egl.GLContext(WIDTH, HEIGHT)
    context.make_current()
    model.vis.global_.offwidth, model.vis.global_.offheight = WIDTH, HEIGHT
    renderer = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, renderer)
    data, scene, camera = mujoco.MjData(model), mujoco.MjvScene(model, maxgeom=1000), mujoco.MjvCamera()
    camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
    camera.distance, camera.elevation = 3.5 * robot.cell, -60
    rectangle, frames = mujoco.MjrRect(0, 0, WIDTH, HEIGHT), []
    ball = np.array([*record["goal"][best], 0.5])[:3]
    env_step = robot.physics_step * robot.physics_steps  # s
    every = max(1, round(0.04 / env_step))  # about 25 frames per second
    for state in states[::every]:
        data.qpos[:] = state[: model.nq]
        mujoco.mj_forward(model, data)
        mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene)
        mujoco.mjv_initGeom(scene.geoms[scene.ngeom], mujoco.mjtGeom.mjGEOM_SPHERE, np.array([0.3, 0, 0]), ball,
                            np.eye(3).flatten(), np.array([1, 0.1, 0.1, 1], np.float32))  # fmt: skip
        scene.ngeom += 1
        mujoco.mjr_render(rectangle, scene, renderer)
        frames.append(np.empty((HEIGHT, WIDTH, 3), np.uint8))
        mujoco.mjr_readPixels(frames[-1], None, rectangle, renderer)
    renderer.free()
    context.free()
    clip = ImageSequenceClip([frame[::-1] for frame in frames], fps=1 / (every * env_step))
    clip.write_videofile(str(run_dir / "episode.mp4"), logger=None)
    return run_dir / "episode.mp4"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "checkpoint.pt").exists():
        print("usage: python benchmark/crl_deep_film.py RUN_DIR (with args.json and checkpoint.pt)", file=sys.stderr)
        raise SystemExit(2)
    print(film(Path(sys.argv[1])))
