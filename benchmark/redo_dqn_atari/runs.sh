# Sourced by the sweeps of this folder, after ../common.sh.

# The paper's 17 games, the five of its appendix (which five is our guess), and tiny runs, with
# ATARI_SMOKE of studies/redo_variants.py, too
GAMES17=$(printf "ALE/%s-v5 " Asterix BeamRider Breakout DemonAttack DoubleDunk Enduro IceHockey Jamesbond MsPacman Pong \
  Qbert RoadRunner Seaquest SpaceInvaders WizardOfWor YarsRevenge Zaxxon)
GAMES5=$(printf "ALE/%s-v5 " Asterix Breakout DemonAttack Seaquest SpaceInvaders)
ATARI_SMOKE="--total-timesteps 600 --learning-starts 100 --exploration-steps 200 --max-episode-steps 100 --width 0.25
  --eval-every 200 --eval-steps 100 --eval-envs 2 --dormant-every 100 --dormant-batch-size 32 --log-every 50
  --redo-period-gradient-steps 50"
ATARI_SMOKE_ALL="$ATARI_SMOKE --rank-batch-size 64 --reset-period-gradient-steps 150"

atari_tiers() { # atari_tiers "GAMES at paper scale" STEPS at paper scale: sets seeds, envs and flags for this SCALE
  case $SCALE in
    smoke) seeds=1 envs=ALE/DemonAttack-v5 flags=$ATARI_SMOKE_ALL ;;
    small) seeds=1 envs=ALE/DemonAttack-v5 flags="--total-timesteps 1000000 --eval-every 100000 --eval-steps 50000" ;;
    paper) seeds="1 2 3 4 5" envs=$1 flags="--total-timesteps $2" ;;
  esac
}

baseline_runs() { # Figs. 1 and 13
  atari_tiers "$GAMES17" 2500000
  sweep redo_dqn_atari.py redo_fig1 "$envs" "$seeds" $flags --replay-ratio 1 < <(
    echo "dqn --method dqn"
    echo "redo --method redo"
    echo "reset --method reset"
    echo "weight-decay --method dqn --weight-decay 1e-5"
  )
}

growth_runs() { # Figs. 2 and 5
  atari_tiers "ALE/DemonAttack-v5 ALE/Asterix-v5" 25000000
  [ "$SCALE" != paper ] || flags="$flags --dormant-every 80000" # 20,000 gradient steps, as in the official code
  [ "$SCALE" != smoke ] || envs="ALE/DemonAttack-v5 ALE/Asterix-v5"
  sweep redo_dqn_atari.py redo_fig2 "$envs" "$seeds" $flags < <(echo "dqn --method dqn")
}

ratio_runs() { # ratio_runs "GAMES at paper scale": Figs. 7 and 16
  atari_tiers "$1" 10000000
  local ratio ratios="0.25 0.5 1 2"
  [ "$SCALE" = paper ] || ratios="0.25 1"
  sweep redo_dqn_atari.py redo_fig7 "$envs" "$seeds" $flags < <(
    for ratio in $ratios; do echo "rr$ratio --method dqn --replay-ratio $ratio"; done
  )
}

old_runs() { # Fig. 7 on two cores. Figs. 4 and 8 use what these runs leave: the replays of rr0.25 and redo-rr1, the networks
  seeds="1 2 3" envs=ALE/Asterix-v5
  local flags="--total-timesteps 40000 --learning-starts 5000 --exploration-steps 20000 --target-network-frequency 1000
    --width 0.25 --padding valid --precision float32 --eval-every 20000 --eval-steps 5000 --eval-envs 4
    --dormant-every 2500 --checkpoint-every 10000"
  [ "$SCALE" != smoke ] || seeds=1 flags="$ATARI_SMOKE_ALL --padding valid"
  [ "$SCALE" != paper ] || seeds="1 2 3 4 5" envs=ALE/DemonAttack-v5 flags="--total-timesteps 10000000"
  local seed
  for seed in $seeds; do # seed by seed: all arms of one are done before the next begins
    sweep redo_dqn_atari.py redo_old "$envs" "$seed" $flags < <(
      echo "redo-rr1 --method redo --replay-ratio 1 --checkpoint-replay always"
      echo "rr2 --method dqn --replay-ratio 2"
      echo "rr0.25 --method dqn --checkpoint-replay always"
      echo "rr1 --method dqn --replay-ratio 1"
    )
  done
}

old_run() { # old_run ARM SEED: the folder of that run of old_runs, or a pattern of it where it has not begun
  local folders=(runs/"${envs//\//-}__redo_old-$SCALE-$1__${2}__"*/)
  echo "${folders[-1]}"
}
