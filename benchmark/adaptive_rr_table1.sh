#!/usr/bin/env bash
# Table 1: return at 2M frames, replay ratio 0.5 and 2 with resets, with ReDo and with neither, and Adaptive RR. The
# settings of resets (10 in 2M frames) and ReDo (the paper's threshold, every 1000 gradient steps) are our guess.
source "$(dirname "$0")/common.sh"

ratio_tiers "cheetah-run walker-run quadruped-run"
[ "$SCALE" != paper ] || flags="--total-timesteps 1000500"
reset=100000 redo=1000
[ "$SCALE" != small ] || reset=15000
[ "$SCALE" != smoke ] || reset=60 redo="20 --redo-batch-size 16"
sweep adaptive_rr.py rr_table1 "$envs" "$seeds" $flags < <(
  echo "static0.5 --rr-mode static"
  echo "static0.5-reset --rr-mode static --reset-every $reset"
  echo "static0.5-redo --rr-mode static --redo-period-gradient-steps $redo"
  echo "static2 --rr-mode static --rr-low 2"
  echo "static2-reset --rr-mode static --rr-low 2 --reset-every $reset"
  echo "static2-redo --rr-mode static --rr-low 2 --redo-period-gradient-steps $redo"
  echo "adaptive"
)
draw benchmark/plot_adaptive_rr.py table --runs "rr_table1-$SCALE-*" --envs $envs \
  --arms static0.5 static0.5-reset static0.5-redo static2 static2-reset static2-redo adaptive
