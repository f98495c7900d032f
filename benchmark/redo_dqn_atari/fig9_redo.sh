#!/usr/bin/env bash
# Fig. 9: ReDo at the default replay ratio 0.25 (tau 0.025) on DemonAttack: dormant neurons and return.
# Expect, at paper scale, at 40M frames: DQN 26-30% and 4350, ReDo 1.5-2% and 7000.
# Officially ReDo ends at gradient step 2.5M (difference 9 in the script); a run has 2.495M, so that changes nothing.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers ALE/DemonAttack-v5 10000000
sweep redo_dqn_atari.py redo_fig9 "$envs" "$seeds" $flags < <(
  echo "dqn --method dqn"
  echo "redo --method redo"
)
draw benchmark/redo_dqn_atari/plot.py fig9 --runs "redo_fig9-$SCALE-*"
