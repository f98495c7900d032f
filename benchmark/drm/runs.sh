# Sourced by the sweeps of this folder, after ../common.sh. The figures share their runs, drm-<scale>-<arm>.
source benchmark/drqv2_plasticity/runs.sh

# Without its three mechanisms DrM is DrQ-v2
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
