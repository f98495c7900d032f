#!/usr/bin/env bash
# Appendix: the nine medium tasks, 3 million frames each. DrQ-v2 is run with DrM's batch and n-step on Walker Run (512, 3).
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

drm_tiers "acrobot-swingup cartpole-swingup_sparse cheetah-run hopper-hop quadruped-run quadruped-walk reacher-easy
  reacher-hard walker-run"
sweep drm.py drm "$envs" "$seeds" $flags < <(drm_arms)
draw benchmark/drm/plot.py curves --runs "drm-$SCALE-*" --envs $envs --arms drm drqv2 --tags return
