#!/usr/bin/env bash
# DrM where exploration decides, on a CPU: MountainCarContinuous-v0 of Gymnasium from pixels, rewarded at the goal alone,
# every push costs. 15,000 steps (30,000 frames), pictures of 36 x 36 shifted by up to 2 pixels, heads of 256 units, batches
# of 64, a perturbation every 2000 steps instead of 100,000. SCALE=small: 8 runs of 7 to 13 minutes. paper: twice as many seeds.
# Expected, and written down before the runs: DrQ-v2 learns to stand still (the last evaluation above -10, no goal in the
# last 5000 steps of at least 3 of 4 seeds); DrM's dormant ratio stays above 0.2, so that its noise stays near 1 and it goes
# on reaching the goal (in at least a fifth of the episodes of the last 5000 steps); neither solves the task in evaluations.
# (So came seed 101: 5 of the last 9 episodes against 0 of 10. With replay ratio 2, 6000 steps told no difference.)
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

drm_tiers hopper-hop
envs=MountainCarContinuous-v0
if [ "$SCALE" != smoke ]; then
  seeds="1 2 3 4"
  flags="--total-timesteps 15000 --image-size 36 --shift-pad 2 --hidden-dim 256 --batch-size 64 --learning-rate 3e-4
    --precision bfloat16 --stddev-steps 10000 --perturb-every 2000 --eval-every 2500 --eval-episodes 4"
fi
[ "$SCALE" != paper ] || seeds="1 2 3 4 5 6 7 8"
sweep drm.py drm_mountain "$envs" "$seeds" $flags < <(drm_arms)
draw benchmark/drm/plot.py curves --runs "drm_mountain-$SCALE-*" --envs $envs --arms drm drqv2 \
  --tags drm/dormant_ratio drm/stddev charts/episodic_return return
