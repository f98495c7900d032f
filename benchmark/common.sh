# Sourced by every sweep: SCALE=smoke|small|paper [WORKERS=n] [EXTRA="flags"] bash benchmark/<script>/<sweep>.sh [--dry-run]
#   SCALE  smoke: a CPU, minutes, checks the plumbing only; small: one GPU, about an hour a run; paper: the paper's own size
#   WORKERS  runs side by side (default 1)      EXTRA  flags for every new run, for instance --cudagraphs
#   OUT      folder of the figure and its CSV (default runs/figures)
# First it says what the runs need. A run that is finished is skipped, so is one that another process works on; one that
# was cut off is resumed; each has a log under runs/logs/. Ctrl-C and SIGTERM stop the runs, which save first. At the end
# stands how many runs there were and which failed; the exit code is 1 when any did. --dry-run prints the commands.
# On a cluster: benchmark/slurm.sh. What the sweeps of one script share is in its folder's runs.sh.
set -euo pipefail
sweep_file=$(realpath "$0")
name=${sweep_name:-$(basename "$(dirname "$sweep_file")")_$(basename "$sweep_file" .sh)} # <script>_<sweep>, or as the sweep says
[[ ${OUT:-/} = /* ]] || OUT=$PWD/$OUT
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCALE=${SCALE:-smoke} WORKERS=${WORKERS:-1} EXTRA=${EXTRA:-} OUT=${OUT:-runs/figures} DRY_RUN=""
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"
for argument in "$@"; do
  [ "$argument" = --dry-run ] || { echo "$name: error: unknown argument $argument (only --dry-run is known)" >&2; exit 2; }
  DRY_RUN=1
done
[[ $WORKERS =~ ^[1-9][0-9]*$ ]] || { echo "$name: error: WORKERS=$WORKERS is not a number of runs" >&2; exit 2; }
eval "extra=($EXTRA)" # as the shell reads it: with quotes
case "$SCALE" in
  smoke | small | paper) ;;
  *) echo "$name: error: SCALE=$SCALE is none of smoke, small, paper" >&2; exit 2 ;;
esac
[ -n "$DRY_RUN" ] || python -c "import importlib.util as u, sys; sys.exit(not (u.find_spec('torch') and u.find_spec('tyro')))" 2>/dev/null ||
  { echo "$name: error: $(command -v python || echo python) has no torch and tyro; bash install.sh installs them" >&2; exit 1; }
runs=0 skipped=0 failures=$(mktemp)
trap 'rm -f "$failures"' EXIT
[ -n "$DRY_RUN" ] || bash "$sweep_file" --dry-run | python benchmark/needs.py "$name" >&2 || true

stop() { # stop EXIT_CODE: all runs save and end
  trap "" INT TERM
  echo "$name: stopping; the runs save, the same command resumes them" >&2
  local workers
  workers=$(jobs -p)
  [ -z "$workers" ] || kill -TERM $workers 2>/dev/null || true
  wait
  exit "$1"
}
trap "stop 130" INT
trap "stop 143" TERM

work() { # work LOG COMMAND ...: runs it and passes SIGTERM on to it; a stopped run has not failed
  local log=$1 child code=0
  shift
  "$@" >>"$log" 2>&1 &
  child=$!
  trap 'kill -TERM $child 2>/dev/null || true' TERM
  trap "" INT # Ctrl-C reaches the sweep, which sends SIGTERM
  wait $child || code=$?
  while kill -0 $child 2>/dev/null; do code=0 && wait $child || code=$?; done # after a signal
  case $code in
    0) ;;
    130 | 143) echo "STOPPED: see $log; the same command resumes it" >>"$failures" ;;
    *) echo "FAILED: see $log" | tee -a "$failures" >&2 ;;
  esac
}

held() { # held FOLDER: another process works on this run
  [ -e "$1lock" ] && ! python -c 'import fcntl, sys; fcntl.flock(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)' "$1lock" 2>/dev/null
}

run() { # run SCRIPT ENV_ID EXP_NAME SEED [flags ...]; ENV_ID is - for a study that has none
  local script=$1 env=$2 exp=$3 seed=$4 dir
  local folder="${env//\//-}__${exp}__${seed}"
  [ "$env" != - ] || folder="$(basename "$script" .py)__${exp}__${seed}"
  local log="runs/logs/$folder.log"
  shift 4
  runs=$((runs + 1))
  local environment=(--env-id "$env")
  [ "$env" != - ] || environment=()
  local command=(python "$script" "${environment[@]}" --exp-name "$exp" --seed "$seed" "$@" "${extra[@]}")
  for dir in runs/"$folder"__*/; do
    if [ -e "${dir}summary.json" ]; then
      skipped=$((skipped + 1))
      echo "finished: $dir"
      return
    elif [ -z "$DRY_RUN" ] && held "$dir"; then
      echo "HELD: another process works on $dir" | tee -a "$failures" >&2
      return
    elif [ -e "${dir}checkpoint.pt" ]; then
      command=(python "$script" --resume "$dir")
    fi
  done
  local line
  line=$(printf "%q " "${command[@]}")
  echo "${line% }"
  [ -z "$DRY_RUN" ] || return 0
  mkdir -p runs/logs
  while [ "$(jobs -rp | wc -l)" -ge "$WORKERS" ]; do wait -n || true; done
  work "$log" "${command[@]}" &
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

run_folder() { # run_folder ENV_ID EXP_NAME SEED: its newest finished folder, else its newest, else a pattern
  local dir found=runs/"${1//\//-}__${2}__${3}__*/"
  for dir in $found; do
    if [ -e "${dir}summary.json" ] || { [ -d "$dir" ] && [ ! -e "${found}summary.json" ]; }; then found=$dir; fi
  done
  echo "$found"
}

draw() { # draw SCRIPT [arguments ...]: waits for the runs, then makes the figure and its CSV, $OUT/<name>_<scale>
  wait
  echo python "$@" --out "$OUT/${name}_$SCALE"
  [ -z "$DRY_RUN" ] || return 0
  python "$@" --out "$OUT/${name}_$SCALE" || echo "FAILED: the figure" >>"$failures"
  local failed unfinished
  failed=$(grep -c "^FAILED: see runs" "$failures" || true)
  unfinished=$(grep -c "^HELD\|^STOPPED\|^FAILED: see runs" "$failures" || true)
  echo "$name: of $runs runs $skipped were finished before, $((runs - skipped - unfinished)) are now, $failed failed"
  [ ! -s "$failures" ] || { cat "$failures" >&2; exit 1; }
}
