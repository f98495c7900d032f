#!/usr/bin/env bash
# A sweep as a Slurm array job, one task per run:
#   SCALE=paper bash benchmark/slurm.sh benchmark/drm/fig6_hard.sh [--dry-run] [options of sbatch, as --gres=gpu:1 --time=1-0]
# Five minutes before its time is up a run saves and stops. When the array has ended, call the same line again: it submits
# what is not finished, and resumes what was cut off. When all are done, the sweep itself (SCALE=paper bash benchmark/drm/fig6_hard.sh) draws.
set -euo pipefail
sweep=${1:-}
[ -f "$sweep" ] || sweep=$(dirname "${BASH_SOURCE[0]}")/../$sweep # from the top of the repository
[ -f "$sweep" ] || { echo "slurm.sh: error: ${1:-nothing} is not a sweep" >&2; exit 2; }
sweep=$(realpath "$sweep")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shift
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"
name=$(basename "$(dirname "$sweep")")_$(basename "$sweep" .sh)_${SCALE:-smoke}
list=runs/slurm/$name-$(date +%s)-$$.txt # its own for each array: tasks read their line when they start
mkdir -p runs/slurm runs/logs
commands=$(bash "$sweep" --dry-run)
grep -E "^python (studies/)?[a-z0-9_]+\.py " <<<"$commands" >"$list" ||
  { echo "slurm.sh: all runs of $name are finished"; exit 0; }
submit=(sbatch) options=()
for option in "$@"; do
  if [ "$option" = --dry-run ]; then submit=(echo sbatch); else options+=("$option"); fi
done
runs=$(wc -l <"$list")
for ((done = 0; done < runs; done += 1000)); do # by default Slurm takes no more in an array
  "${submit[@]}" --array="1-$((runs - done < 1000 ? runs - done : 1000))" --job-name="$name" \
    --output="runs/logs/$name-%A-%a.log" --signal=B:TERM@300 "${options[@]}" \
    --wrap "eval exec \"\$(sed -n \$((SLURM_ARRAY_TASK_ID + $done))p $list)\""
done
