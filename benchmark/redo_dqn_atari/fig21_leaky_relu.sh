#!/usr/bin/env bash
# Fig. 21: leaky ReLU (slope 0.01) instead of ReLU, DQN: only slightly fewer dormant neurons.
# Setting inferred: replay ratio 0.25, 40M frames. With a leaky ReLU no score is exactly 0, so thresholds above 0 count.
# DQN alone: it does not matter here that ReDo officially ends at gradient step 2.5M.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "ALE/DemonAttack-v5 ALE/Asterix-v5" 10000000
sweep redo_dqn_atari.py redo_fig21 "$envs" "$seeds" $flags < <(
  echo "relu --method dqn --activation relu"
  echo "leaky-relu --method dqn --activation leaky_relu"
)
draw benchmark/redo_dqn_atari/plot.py fig21 --runs "redo_fig21-$SCALE-*"
