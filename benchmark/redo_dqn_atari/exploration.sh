#!/usr/bin/env bash
# Not in the paper, an open question: does exploration that ends early silence neurons? DQN at replay ratio 1, with epsilon
# decaying over 25,000 to 2.5 million steps.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "ALE/DemonAttack-v5 ALE/Asterix-v5" 2500000
decays="25000 250000 1000000 2500000"
[ "$SCALE" != smoke ] || decays="100 400"
sweep redo_dqn_atari.py redo_exploration "$envs" "$seeds" $flags --replay-ratio 1 < <(
  for steps in $decays; do echo "decay$steps --method dqn --exploration-steps $steps"; done
)
draw benchmark/redo_dqn_atari/plot.py exploration --runs "redo_exploration-$SCALE-*"
