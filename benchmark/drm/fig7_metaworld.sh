#!/usr/bin/env bash
# Fig. 7: DrM and DrQ-v2 on MetaWorld (bash install.sh metaworld), by the settings of the official repository at the paper's
# time, and DrM by those of its last state (head). Which eight tasks the paper draws is not known to us; the repository has six,
# of which soccer is rewarded for success alone. Expect (paper, curves of the success rate only): DrM above DrQ-v2.
# SCALE=smoke and small: Coffee Push alone.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

tasks="coffee-push" seeds=1 flags="--total-timesteps 200000 --eval-every 10000 --eval-episodes 5"
case $SCALE in
  smoke) flags="$DRQ_SMOKE --total-timesteps 400 --eval-every 400 --perturb-every 200 --episode-length 50" ;;
  paper) seeds="1 2 3 4" tasks="assembly coffee-push disassemble stick-pull sweep-into" flags="" ;;
esac
arms() {
  drm_arms
  echo "drm-head --settings head"
}
sweep studies/drm_metaworld.py metaworld "$tasks" "$seeds" $flags < <(arms)
if [ "$SCALE" = paper ]; then # as in the official README
  sweep studies/drm_metaworld.py metaworld soccer "$seeds" --sparse < <(arms)
  tasks="$tasks soccer"
fi
draw benchmark/drm/plot.py curves --runs "metaworld-$SCALE-*" --envs $tasks --arms drm drqv2 drm-head --tags eval/success_rate drm/dormant_ratio
