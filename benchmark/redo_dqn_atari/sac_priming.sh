#!/usr/bin/env bash
# The primacy bias (Nikishin et al. 2022, on another task): SAC fails at a replay ratio of 9; a new agent that begins with the
# failed one's replay does not. What we expect on Ant: replay ratio 9 below 1; the new agent (replay ratio 1) as good as 1,
# and sooner. If the run at ratio 9 does not end (it may diverge), the new agent is refused. On a cluster submit this sweep
# twice: the new agent waits for the failed one.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

sac_tiers Ant-v5
[ "$SCALE" != small ] || flags="--total-timesteps 50000 --eval-episodes 5"
flags="$flags --method sac"
sweep studies/redo_sac.py redo_sac9 "$envs" "$seeds" $flags < <(
  echo "rr9 --replay-ratio 9 --checkpoint-replay always"
  echo "sac --replay-ratio 1"
)
wait
for seed in $seeds; do
  failed=$(run_folder "$envs" "redo_sac9-$SCALE-rr9" "$seed")
  sweep studies/redo_sac.py redo_sac9 "$envs" "$seed" ${flags/--learning-starts 300/} < <(echo "new --replay-from $failed")
done
draw benchmark/redo_dqn_atari/plot.py sac_priming --runs "redo_sac9-$SCALE-*"
