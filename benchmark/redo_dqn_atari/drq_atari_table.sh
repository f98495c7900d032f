#!/usr/bin/env bash
# The Atari table of Ma et al.: DrQ(eps) at replay ratio 0.5, 1 and 2, with ReDo at 1 (tau 0.025), and with Adaptive RR.
# Expect, at paper scale: mean human-normalised score 42, 41, 35, 42 and 56%, median 23, 30, 26, 42 and 49%.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

drq_tiers "$(printf "ALE/%s-v5 " Alien Amidar Assault Asterix BankHeist Boxing Breakout ChopperCommand CrazyClimber DemonAttack \
  Enduro Freeway KungFuMaster Pong RoadRunner Seaquest SpaceInvaders)" "1 2 3 4 5"
check=2000
[ "$SCALE" != smoke ] || check=50
sweep studies/drq_eps_atari.py drq_table "$envs" "$seeds" $flags < <(
  for ratio in 0.5 1 2; do echo "static$ratio --method drq --replay-ratio $ratio"; done
  echo "redo --method redo --redo-tau 0.025"
  echo "adaptive --method adaptive --rr-check-every $check"
)
draw benchmark/redo_dqn_atari/plot.py drq_table --runs "drq_table-$SCALE-*"
