#!/usr/bin/env bash
# Figs. 12, 13 of the appendix: contrastive RL beside GCBC, GCSL, SAC and SAC + HER, over depth (TD3 + HER and the arm tasks are omitted).
# Expect (paper): contrastive RL with deep networks is best on 8 of 10 tasks; depth beyond 4 helps none of the others (but GCBC
# on an arm task); GCBC and GCSL reach about nothing on humanoid and ant_big_maze at any depth.
# SCALE=small, for two cores: the point mass in the room, depth 4 and 16, seeds 8 to 12 (contrastive RL's settings were chosen on
# seeds 1 to 3; the others have the same ones, untuned). Expected there, and written down before the runs: contrastive RL 76 to
# 97 of 150 steps at the goal in the last evaluation, as seeds 1 to 7 had, at least 20 more than SAC + HER, and that at least 20 more than GCBC; SAC alone
# at most 10; no method gains by depth 16 more than its spread over seeds, 10.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 envs=point_room depths="4 8" flags=$SMOKE ;;
  small) seeds="8 9 10 11 12" envs=point_room depths="4 16" flags="" ;;
  paper) seeds="1 2 3" envs="humanoid ant_big_maze" depths="4 16 64" flags="" ;;
esac
for depth in $depths; do
  for seed in $seeds; do # all methods of one are done before the next begins
    sweep crl_deep.py fig13 "$envs" "$seed" $flags --depth $depth <<<"crl-d$depth"
    sweep studies/crl_baselines.py fig13 "$envs" "$seed" $flags --depth $depth < <(
      for method in gcbc gcsl sac sac-her; do echo "$method-d$depth --method $method"; done
    )
  done
done
draw benchmark/crl_deep/plot.py fig13 --runs "fig13-$SCALE-*"
