#!/usr/bin/env bash
# Ours: the dormant ratio and two perturbations on a CPU, keeping at most 0.9 or 0.6 of the weights: Cartpole Balance,
# pictures of 48 x 48, heads of 256 units, batches of 64, a perturbation every 6000 steps instead of 100,000, 16,000
# steps. SCALE=small: three runs of 20 to 22 minutes, two at a time, on two cores with OMP_NUM_THREADS=1. paper: 3 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

drm_tiers hopper-hop
if [ "$SCALE" != smoke ]; then
  envs=dm_control/cartpole-balance-v0 seeds=1
  flags="--total-timesteps 16000 --image-size 48 --hidden-dim 256 --batch-size 64 --precision bfloat16
    --stddev-steps 10000 --perturb-every 6000 --eval-every 2000 --eval-episodes 4 --capture-video"
fi
[ "$SCALE" != paper ] || seeds="1 2 3"
sweep drm.py drm_cpu "$envs" "$seeds" $flags < <(
  echo "drm --max-perturb-factor 0.9"
  echo "drm-0.6 --max-perturb-factor 0.6"
  echo "drqv2 $DRM_OFF"
)
draw benchmark/drm/plot.py curves --runs "drm_cpu-$SCALE-*" --envs $envs --arms drm drm-0.6 drqv2 \
  --tags drm/dormant_ratio drm/stddev drm/lambda return
