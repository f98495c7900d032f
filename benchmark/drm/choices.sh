#!/usr/bin/env bash
# Ours: what paper and code leave open: the paper's "all parameters", one draw for critic and target, the actor alone; a
# unit at the threshold counted or not.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

drm_tiers hopper-hop
sweep drm.py drm "$envs" "$seeds" $flags < <(
  echo "drm"
  echo "perturb-all --perturb-scope all"
  echo "perturb-actor --perturb-scope actor"
  echo "same-draw-for-target --perturb-target same"
  echo "not-strict --no-dormant-strict"
)
draw benchmark/drm/plot.py curves --runs "drm-$SCALE-*" --envs $envs \
  --arms drm perturb-all perturb-actor same-draw-for-target not-strict --tags return drm/dormant_ratio
