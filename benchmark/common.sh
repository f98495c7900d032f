# Sourced by every sweep: SCALE=smoke|small|paper [WORKERS=n] [EXTRA="flags"] bash benchmark/<script>/<sweep>.sh [--dry-run]
#   SCALE  smoke: a CPU, minutes, checks the plumbing only; small: one GPU, about an hour a run; paper: the paper's own size
#   WORKERS  runs side by side (default 1)      EXTRA  flags for every new run, for instance --cudagraphs
#   OUT      folder of the figure and its CSV (default runs/figures)
# A run that is finished is skipped, one that was cut off is resumed; each has a log under runs/logs/. At the end stands
# how many runs there were and which failed; the exit code is 1 when any did. --dry-run prints the commands.
# On a cluster: benchmark/slurm.sh.
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

# Tiny runs of the point mass, for SCALE=smoke (in the room they learn a little)
SMOKE="--total-timesteps 60000 --eval-every 10000 --batch-size 128 --width 32 --eval-episodes 32"

depth_tiers() { # crl_deep.py's studies over depth, Figs. 5, 6 and 16: sets seeds, envs, depths and flags for this SCALE
  case $SCALE in
    smoke) seeds=1 envs=point_room depths="4 8" flags=$SMOKE ;;
    small) seeds=1 envs=ant_hardest_maze depths="4 16" flags="--total-timesteps 20000000 --eval-every 200000" ;;
    paper) seeds="1 2 3" envs="humanoid ant_big_maze" depths="4 8 16 32 64" flags="" ;;
  esac
}

# redo_dqn_atari.py: the paper's 17 games, the five of its appendix (which five is our guess), and tiny runs, with
# ATARI_SMOKE of studies/redo_variants.py, too
GAMES17=$(printf "ALE/%s-v5 " Asterix BeamRider Breakout DemonAttack DoubleDunk Enduro IceHockey Jamesbond MsPacman Pong \
  Qbert RoadRunner Seaquest SpaceInvaders WizardOfWor YarsRevenge Zaxxon)
GAMES5=$(printf "ALE/%s-v5 " Asterix Breakout DemonAttack Seaquest SpaceInvaders)
ATARI_SMOKE="--total-timesteps 600 --learning-starts 100 --exploration-steps 200 --max-episode-steps 100 --width 0.25
  --eval-every 200 --eval-steps 100 --eval-envs 2 --dormant-every 100 --dormant-batch-size 32 --log-every 50
  --redo-period-gradient-steps 50"
ATARI_SMOKE_ALL="$ATARI_SMOKE --rank-batch-size 64 --reset-period-gradient-steps 150"

atari_tiers() { # atari_tiers "GAMES at paper scale" STEPS at paper scale: sets seeds, envs and flags for this SCALE
  case $SCALE in
    smoke) seeds=1 envs=ALE/DemonAttack-v5 flags=$ATARI_SMOKE_ALL ;;
    small) seeds=1 envs=ALE/DemonAttack-v5 flags="--total-timesteps 1000000 --eval-every 100000 --eval-steps 50000" ;;
    paper) seeds="1 2 3 4 5" envs=$1 flags="--total-timesteps $2" ;;
  esac
}

baseline_runs() { # Figs. 1 and 13
  atari_tiers "$GAMES17" 2500000
  sweep redo_dqn_atari.py redo_fig1 "$envs" "$seeds" $flags --replay-ratio 1 < <(
    echo "dqn --method dqn"
    echo "redo --method redo"
    echo "reset --method reset"
    echo "weight-decay --method dqn --weight-decay 1e-5"
  )
}

growth_runs() { # Figs. 2 and 5
  atari_tiers "ALE/DemonAttack-v5 ALE/Asterix-v5" 25000000
  [ "$SCALE" != paper ] || flags="$flags --dormant-every 80000" # 20,000 gradient steps, as in the official code
  [ "$SCALE" != smoke ] || envs="ALE/DemonAttack-v5 ALE/Asterix-v5"
  sweep redo_dqn_atari.py redo_fig2 "$envs" "$seeds" $flags < <(echo "dqn --method dqn")
}

ratio_runs() { # ratio_runs "GAMES at paper scale": Figs. 7 and 16
  atari_tiers "$1" 10000000
  local ratio ratios="0.25 0.5 1 2"
  [ "$SCALE" = paper ] || ratios="0.25 1"
  sweep redo_dqn_atari.py redo_fig7 "$envs" "$seeds" $flags < <(
    for ratio in $ratios; do echo "rr$ratio --method dqn --replay-ratio $ratio"; done
  )
}

# drqv2_plasticity.py: all figures share their runs, drqv2-<scale>-<arm>, where the arms' flags are the same
DRQ_SMOKE="--learning-starts 100 --exploration-steps 100 --image-size 36 --hidden-dim 64 --batch-size 16 --n-step 3
  --stddev-steps 200 --eval-episodes 1 --buffer-size 1000"
DRQ_SMALL="--total-timesteps 150000 --eval-every 15000 --eval-episodes 5"

pixel_tiers() { # pixel_tiers "TASKS at paper scale": sets seeds, envs, flags, the steps of a run and about a third of them
  local tasks=$1
  case $SCALE in
    smoke)
      seeds=1 tasks=cartpole-balance steps=1200 third=600
      flags="$DRQ_SMOKE --total-timesteps 1200 --eval-every 600 --plasticity-every 500 --plasticity-batch-size 64"
      ;;
    small) seeds=1 tasks=${1%% *} flags=$DRQ_SMALL steps=150000 third=50000 ;;
    paper) seeds="1 2 3 4 5" flags="" steps=1500500 third=500000 ;; # of a task of medium difficulty
  esac
  envs=$(printf "dm_control/%s-v0 " $tasks)
}

reset_arms() { # reset_arms STEPS "NUMBERS": so many resets in a run of STEPS, equally far apart; Figs. 1, 12 and 13
  local number every
  echo "augmentation"
  echo "plain --no-augmentation"
  for number in $2; do
    every=$((($1 + number) / (number + 1)))
    echo "augmentation-reset$number --reset-every $every"
    echo "plain-reset$number --no-augmentation --reset-every $every"
  done
}

injection_arms() { # Figs. 5 and 16, after pixel_tiers
  echo "augmentation"
  echo "augmentation-inject-actor --injection actor --injection-step $third"
  echo "augmentation-inject-critic --injection critic --injection-step $third"
  echo "switch-on --no-augmentation --augmentation-switch-step $third"
  echo "switch-on-inject-actor --no-augmentation --augmentation-switch-step $third --injection actor --injection-step $third"
  echo "switch-on-inject-critic --no-augmentation --augmentation-switch-step $third --injection critic --injection-step $third"
}

replay_ratio_arms() { # Figs. 7 and 8
  echo "augmentation"
  echo "rr1 --replay-ratio 1"
  echo "rr2 --replay-ratio 2"
  echo "rr4 --replay-ratio 4"
}

ratio_tiers() { # the same for adaptive_rr.py, which must see some episodes of 500 steps
  pixel_tiers "$1"
  [ "$SCALE" != smoke ] ||
    flags="$DRQ_SMOKE --total-timesteps 2000 --eval-every 2000 --rr-check-episodes 2 --rr-threshold 0.05"
}

# drm.py: the figures share their runs, drm-<scale>-<arm>; without its three mechanisms it is DrQ-v2
DRM_OFF="--stddev-type drqv2 --perturb-every 0 --target-lambda 0"

drm_tiers() { # drm_tiers "TASKS at paper scale" [TASK at small scale]: sets seeds, envs and flags for this SCALE
  local tasks=$1
  case $SCALE in
    smoke)
      seeds=1 tasks=hopper-hop
      flags="$DRQ_SMOKE --total-timesteps 600 --eval-every 600 --perturb-every 200" # an episode has 500
      ;;
    small) seeds=1 tasks=${2:-hopper-hop} flags="--total-timesteps 200000 --eval-every 10000 --eval-episodes 5" ;;
    paper) seeds="1 2 3 4" flags="" ;;
  esac
  envs=$(printf "dm_control/%s-v0 " $tasks)
}

hard_runs() { # Figs. 1 and 6
  drm_tiers "dog-stand dog-walk dog-trot dog-run humanoid-stand humanoid-walk humanoid-run manipulator-bring_ball
    acrobot-swingup_sparse" acrobot-swingup_sparse
  sweep drm.py drm "$envs" "$seeds" $flags < <(drm_arms)
}

drm_arms() {
  echo "drm"
  echo "drqv2 $DRM_OFF"
}

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
