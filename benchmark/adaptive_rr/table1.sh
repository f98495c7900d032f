#!/usr/bin/env bash
# Table 1: return at 2M frames, replay ratio 0.5 and 2 with resets, with ReDo and with neither, and Adaptive RR. The
# settings of resets (after every tenth of 2M frames) and ReDo (the paper's threshold, every 1000 gradient steps) are our
# guess; these arms are run by drqv2_plasticity.py, which is the same agent to the bit. Those with neither are the runs of
# Fig. 9.
# Expect, at replay ratio 0.5 (alone, with resets, with ReDo), 2 (the same), adaptive: Cheetah 828 799 788, 793 885 873, 880;
# Walker 710 648 618, 709 749 734, 758; Quadruped 579 593 371, 417 511 608, 784.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/adaptive_rr/runs.sh

ratio_tiers "cheetah-run walker-run quadruped-run"
sweep adaptive_rr.py rr "$envs" "$seeds" $flags < <(
  echo "static0.5 --rr-high 0.5"
  echo "static2 --rr-low 2"
  echo "adaptive"
)
reset=100000 redo=1000
[ "$SCALE" != small ] || reset=15000
[ "$SCALE" != smoke ] || reset=600 redo="200 --redo-batch-size 16"
[ "$SCALE" != smoke ] || flags="$DRQ_SMOKE --total-timesteps 2000 --eval-every 2000"
[ "$SCALE" != paper ] || flags="--total-timesteps 1000000" # ends where the tenth reset would come
sweep drqv2_plasticity.py rr "$envs" "$seeds" $flags < <(
  echo "static0.5-reset --reset-every $reset"
  echo "static0.5-redo --redo-period-gradient-steps $redo"
  echo "static2-reset --replay-ratio 2 --reset-every $reset"
  echo "static2-redo --replay-ratio 2 --redo-period-gradient-steps $redo"
)
draw benchmark/adaptive_rr/plot.py table --runs "rr-$SCALE-*" --envs $envs \
  --arms static0.5 static0.5-reset static0.5-redo static2 static2-reset static2-redo adaptive
