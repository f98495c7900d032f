#!/usr/bin/env bash
# Fig. 10: each mechanism taken out, and all three; then what the reviewers asked for: noise that never follows the decay, a
# fixed perturb factor, a constant lambda. The paper ablates on Adroit; here it is Hopper Hop.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

drm_tiers hopper-hop
sweep drm.py drm "$envs" "$seeds" $flags < <(
  echo "drm"
  echo "no-perturbation --perturb-every 0"
  echo "no-awakening --stddev-type drqv2"
  echo "no-exploitation --target-lambda 0"
  echo "drqv2 $DRM_OFF"
  echo "noise-by-ratio-alone --stddev-start 0 --stddev-end 0"
  echo "fixed-factor --min-perturb-factor 0.9 --max-perturb-factor 0.9"
  echo "constant-lambda --lambda-type constant"
)
draw benchmark/drm/plot.py curves --runs "drm-$SCALE-*" --envs $envs \
  --arms drm no-perturbation no-awakening no-exploitation drqv2 noise-by-ratio-alone fixed-factor constant-lambda \
  --tags return drm/dormant_ratio
