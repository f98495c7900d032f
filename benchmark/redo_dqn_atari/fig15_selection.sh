#!/usr/bin/env bash
# Figs. 15 and 25: which neurons are recycled, when it is a tenth of every layer at first and none at gradient step 2.5M;
# replay ratio 1. redo is ReDo itself, by a threshold.
# Expect, at paper scale, DemonAttack and Asterix: return 3500 and 2200 with the least active neurons, 500 with random ones,
# 0 and 500 with the most active ones; the least useful ones (cbp) as good as the least active ones or worse.
# SCALE=small is for two cores: RoadRunner, a quarter of the width, 20,000 steps (14,996 gradient steps, so the share stays
# near a tenth), 3 seeds. Expected there, and written down before the runs: recycling changes the q-values of a batch at
# least twice as much with most as with random, and five times as much with random as with least, spread a fifth of each;
# the TD loss, mean of the last 5000 steps, is higher with most than with least (by a half, spread a fifth). Nothing about
# returns. (Silent neurons tie, so least, random and cbp recycle more neurons than most.)
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "ALE/DemonAttack-v5 ALE/Asterix-v5" 2500000
case $SCALE in
  smoke) flags=$ATARI_SMOKE ;;
  small) seeds="1 2 3" envs=ALE/RoadRunner-v5 flags="--total-timesteps 20000 --learning-starts 5000 --exploration-steps 10000
    --width 0.25 --padding valid --precision float32 --eval-every 20000 --eval-steps 5000 --eval-envs 4 --dormant-every 1000
    --log-every 100" ;;
esac
sweep studies/redo_variants.py redo_fig15 "$envs" "$seeds" $flags --replay-ratio 1 < <(
  echo "redo"
  for selection in least random most cbp; do echo "$selection --redo-selection $selection"; done
)
draw benchmark/redo_dqn_atari/plot.py fig15 --runs "redo_fig15-$SCALE-*"
