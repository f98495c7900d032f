#!/usr/bin/env bash
# Fig. 9: the dormant ratio of DrM and DrQ-v2 (the runs of Fig. 6). A perturbation every 200,000 frames shows as a jump.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

drm_tiers "humanoid-run manipulator-bring_ball dog-walk" acrobot-swingup_sparse
sweep drm.py drm "$envs" "$seeds" $flags < <(drm_arms)
draw benchmark/drm/plot.py curves --runs "drm-$SCALE-*" --envs $envs --arms drm drqv2 \
  --tags drm/dormant_ratio drm/stddev drm/lambda return
