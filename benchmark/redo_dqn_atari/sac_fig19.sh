#!/usr/bin/env bash
# Fig. 19: SAC does not miss the neurons that are pruned as soon as they are dormant (tau 0).
# Expect, at paper scale: the same returns with and without, on Ant and HalfCheetah.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

sac_tiers "Ant-v5 HalfCheetah-v5"
[ "$SCALE" != small ] || flags="--total-timesteps 200000 --eval-episodes 5"
sweep studies/redo_sac.py redo_sac19 "$envs" "$seeds" $flags < <(
  echo "sac --method sac"
  echo "prune --method prune"
)
draw benchmark/redo_dqn_atari/plot.py sac_fig19 --runs "redo_sac19-$SCALE-*"
