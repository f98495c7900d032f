#!/usr/bin/env bash
# Figs. 22 and 23: how a recycled neuron's weights are re-drawn: outgoing weights random instead of 0, incoming weights
# scaled to the norm of those of other neurons; replay ratio 1, five games.
# Expect (paper): random outgoing weights are worse, scaled incoming ones make no difference.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "$GAMES5" 2500000
[ "$SCALE" != smoke ] || flags=$ATARI_SMOKE
sweep studies/redo_variants.py redo_fig22 "$envs" "$seeds" $flags --replay-ratio 1 < <(
  echo "redo"
  echo "outgoing-random --redo-outgoing random"
  echo "incoming-scaled --redo-incoming scaled"
)
draw benchmark/redo_dqn_atari/plot.py fig22 --runs "redo_fig22-$SCALE-*"
