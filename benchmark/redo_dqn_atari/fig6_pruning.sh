#!/usr/bin/env bash
# Fig. 6: neurons once found dormant are pruned for good, and the agent does not miss them: DQN at replay ratio 0.25.
# Expect, at paper scale, at 40M frames: return 3950 with pruning against 3650 on DemonAttack, 4640 against 4330 on Asterix.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "ALE/DemonAttack-v5 ALE/Asterix-v5" 10000000
[ "$SCALE" != smoke ] || flags=$ATARI_SMOKE
sweep studies/redo_variants.py redo_fig6 "$envs" "$seeds" $flags < <(
  echo "dqn --method dqn"
  echo "prune --method prune"
)
draw benchmark/redo_dqn_atari/plot.py fig6 --runs "redo_fig6-$SCALE-*"
