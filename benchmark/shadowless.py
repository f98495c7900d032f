"""dm_control without shadows and reflections, which are most of the work where the CPU draws: a picture of Walker Walk
takes 3 ms on one core instead of 15. The task is the same, its pictures are not: results stand for themselves.

    PYTHONPATH=benchmark python drm.py --env-id shadowless:walker-walk-v0
"""

import os
import sys

import gymnasium

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
import shimmy  # noqa: F401  registers dm_control's tasks, and opens the renderer


def make(task, width, height, render_mode):
    """A task of dm_control, seen by the camera that the scripts use."""
    flags = dict(shadow=False, reflection=False)
    camera = 2 if task.startswith("quadruped") else 0
    view = dict(width=width, height=height, camera_id=camera, render_flag_overrides=flags)
    return gymnasium.make(f"dm_control/{task}-v0", render_mode=render_mode, render_kwargs=view).unwrapped


for name in [name for name in gymnasium.registry if name.startswith("dm_control/")]:
    task = name.removeprefix("dm_control/")
    entry = dict(entry_point="shadowless:make", kwargs=dict(task=task.removesuffix("-v0")))
    gymnasium.register(task, max_episode_steps=1000, **entry)
