#!/usr/bin/env bash
# Fig. 24: the number of states that the scores are taken over hardly changes the share of dormant neurons (with ReDo).
# Expect, at paper scale: approximately the same curves. Paper: five games.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "$GAMES5" 2500000
flags="$flags --replay-ratio 1"
batches="32 64 256 1024"
[ "$SCALE" = paper ] || batches="32 1024"
[ "$SCALE" != smoke ] || batches="8 32"
sweep redo_dqn_atari.py redo_fig24 "$envs" "$seeds" $flags < <(
  for batch in $batches; do echo "batch$batch --redo-batch-size $batch --dormant-batch-size $batch"; done
)
draw benchmark/redo_dqn_atari/plot.py fig24 --runs "redo_fig24-$SCALE-*"
