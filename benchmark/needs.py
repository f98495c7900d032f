"""Says what the runs of a sweep need: reads the commands that `<sweep>.sh --dry-run` prints, and writes one line.

bash benchmark/drm/fig6_hard.sh --dry-run | python benchmark/needs.py drm_fig6_hard
"""

import importlib
import shlex
import sys
from pathlib import Path

import tyro

sys.path += [str(Path(__file__).resolve().parent.parent / folder) for folder in (".", "studies")]


def bytes_needed(script: str, flags: list) -> dict:
    """Roughly the bytes that a run takes, by the flag that decides them; those of buffer_size are the replay's. Nothing
    is known of a study without checkpoints."""
    module = importlib.import_module(Path(script).stem)
    if not hasattr(module, "check_devices"):
        tyro.cli(module.Args, args=flags)
        return {}
    found = {}

    def look(args, needed):
        found.update(needed)
        raise StopIteration

    module.check_devices = look
    try:
        module.check_args(module.parse_args(flags))
    except StopIteration:
        pass
    return found


def main(name: str) -> None:
    commands = [line.split(maxsplit=2) for line in sys.stdin if line.startswith("python ")]
    commands = [(script, shlex.split(flags)) for _, script, flags in commands if not script.startswith("benchmark/")]
    new = [(script, flags) for script, flags in commands if "--resume" not in flags]
    distinct = {(script, *flags[: flags.index("--seed")], *flags[flags.index("--seed") + 2 :]) for script, flags in new}
    needs = [bytes_needed(script, list(flags)) for script, *flags in distinct]
    memory = max((sum(need.values()) for need in needs), default=0) / 1e9
    disk = max((need.get("buffer_size", 0) for need in needs), default=0) / 1e9
    line = f"{name}: {len(commands)} runs to do, {len(commands) - len(new)} of them resumed"
    if memory:
        line += f"; each takes up to {memory:.1f} GB of memory, and {disk:.1f} GB on disk (twice that while it saves)"
    print(line)


if __name__ == "__main__":
    main(sys.argv[1])
