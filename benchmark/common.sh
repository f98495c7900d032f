# Sourced by every sweep: SCALE=smoke|small|paper [WORKERS=n] [EXTRA="flags"] bash benchmark/<script>/<sweep>.sh [--dry-run]
#   SCALE  smoke: a CPU, minutes, checks the plumbing only; small: one GPU, about an hour a run; paper: the paper's own size
#   WORKERS  runs side by side (default 1)      EXTRA  flags for every new run, for instance --cudagraphs
#   OUT      folder of the figure and its CSV (default runs/figures)
# A run that is finished is skipped, one that was cut off is resumed; each has a log under runs/logs/. At the end stands
# how many runs there were and which failed; the exit code is 1 when any did. --dry-run prints the commands.
# On a cluster: benchmark/slurm.sh. What the sweeps of one script share is in its folder's runs.sh.
set -euo pipefail
name=$(basename "$(dirname "$(realpath "$0")")")_$(basename "$0" .sh) # <script>_<sweep>
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCALE=${SCALE:-smoke} WORKERS=${WORKERS:-1} EXTRA=${EXTRA:-} OUT=${OUT:-runs/figures} DRY_RUN=""
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"
case "${1:-}" in
  "") ;;
  --dry-run) DRY_RUN=1 ;;
  *) echo "$name: error: unknown argument $1 (only --dry-run is known)" >&2; exit 2 ;;
esac
case "$SCALE" in
  smoke | small | paper) ;;
  *) echo "$name: error: SCALE=$SCALE is none of smoke, small, paper" >&2; exit 2 ;;
esac
[ -n "$DRY_RUN" ] || python -c "import importlib.util as u, sys; sys.exit(not (u.find_spec('torch') and u.find_spec('tyro')))" 2>/dev/null ||
  { echo "$name: error: $(command -v python || echo python) has no torch and tyro; bash install.sh installs them" >&2; exit 1; }
runs=0 skipped=0 failures=$(mktemp)
trap 'rm -f "$failures"' EXIT

run() { # run SCRIPT ENV_ID EXP_NAME SEED [flags ...]; ENV_ID is - for a study that has none
  local script=$1 env=$2 exp=$3 seed=$4 dir
  local folder="${env//\//-}__${exp}__${seed}"
  [ "$env" != - ] || folder="$(basename "$script" .py)__${exp}__${seed}"
  local log="runs/logs/$folder.log"
  shift 4
  runs=$((runs + 1))
  local command=(python "$script" --env-id "$env" --exp-name "$exp" --seed "$seed" "$@" $EXTRA)
  if [ "$env" = - ]; then
    command=(python "$script" --exp-name "$exp" --seed "$seed" "$@" $EXTRA)
  fi
  for dir in runs/"$folder"__*/; do
    if [ -e "${dir}summary.json" ]; then
      skipped=$((skipped + 1))
      echo "finished: $dir"
      return
    elif [ -e "${dir}checkpoint.pt" ]; then
      command=(python "$script" --resume "$dir")
    fi
  done
  echo "${command[*]}"
  [ -z "$DRY_RUN" ] || return 0
  mkdir -p runs/logs
  while [ "$(jobs -rp | wc -l)" -ge "$WORKERS" ]; do wait -n || true; done
  { "${command[@]}" >>"$log" 2>&1 || { echo "FAILED: see $log" | tee -a "$failures" >&2; }; } &
}

sweep() { # sweep SCRIPT NAME "ENV_IDS" "SEEDS" [flags ...] < variants, one a line: EXP_NAME_SUFFIX flags ...
  local script=$1 exp=$2 envs=$3 seeds=$4 env seed suffix variant
  shift 4
  while read -r suffix variant; do
    for env in $envs; do
      for seed in $seeds; do run "$script" "$env" "$exp-$SCALE-$suffix" "$seed" "$@" $variant; done
    done
  done
}

draw() { # draw SCRIPT [arguments ...]: waits for the runs, then makes the figure and its CSV, $OUT/<name>_<scale>
  wait
  echo python "$@" --out "$OUT/${name}_$SCALE"
  [ -z "$DRY_RUN" ] || return 0
  python "$@" --out "$OUT/${name}_$SCALE" || echo "FAILED: the figure" >>"$failures"
  local failed
  failed=$(grep -c "see runs" "$failures" || true)
  echo "$name: of $runs runs $skipped were finished before, $((runs - skipped - failed)) are now, $failed failed"
  [ ! -s "$failures" ] || { cat "$failures" >&2; exit 1; }
}
