#!/usr/bin/env bash
# Figs. 14, 18 and 20: ReDo, resets and weight decay in SAC, and the dormant neurons of its networks.
# Expect, at paper scale, after 1M steps: return of SAC, ReDo, weight decay, resets on Ant 5000, 4900, 4850, 4080, on
# HalfCheetah 11500, 11200, 10300, 10550; dormant at tau 0 on Ant about 10% of the policy and 17% of the critics.
# SCALE=small, for two cores: Ant, 60,000 steps, 3 seeds, 5 episodes per evaluation; as the runs are shorter, ReDo and resets
# come every 20,000 gradient steps. Expected, and written down before the runs (for 200,000 steps): at the end 2 to 15%
# of SAC's policy and critics are dormant at tau 0, with a spread over seeds of 3 points; at the last measurement (then meant to be just
# after a recycling; here it is 10,000 gradient steps after one), half as many of the critics' with ReDo; returns differ by less than the spread between
# seeds, but for resets, which are lower (by a third).
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

sac_runs
draw benchmark/redo_dqn_atari/plot.py sac_fig14 --runs "redo_sac-$SCALE-*"
