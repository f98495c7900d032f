#!/usr/bin/env bash
# Fig. 7: DrM and DrQ-v2 on MetaWorld (bash install.sh metaworld), by the settings of the official repository's first version;
# EXTRA="--settings head" for its last one. Which eight tasks the paper draws is not known to us; the repository has six.
# Expect (paper, curves of the success rate only): DrM succeeds nearly always within 1M steps, DrQ-v2 seldom.
# SCALE=smoke and small: Coffee Push alone.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

tasks="coffee-push" seeds=1 flags="--total-timesteps 200000 --eval-every 10000 --eval-episodes 5"
case $SCALE in
  smoke) flags="$DRQ_SMOKE --total-timesteps 400 --eval-every 400 --perturb-every 200 --episode-length 50" ;;
  paper) seeds="1 2 3 4" tasks="assembly coffee-push disassemble stick-pull sweep-into" flags="" ;;
esac
sweep studies/drm_metaworld.py metaworld "$tasks" "$seeds" $flags < <(drm_arms)
if [ "$SCALE" = paper ]; then # rewarded for success alone, as in the official README
  sweep studies/drm_metaworld.py metaworld soccer "$seeds" --sparse < <(drm_arms)
  tasks="$tasks soccer"
fi
draw benchmark/drm/plot.py curves --runs "metaworld-$SCALE-*" --envs $tasks --arms drm drqv2 --tags eval/success_rate drm/dormant_ratio
