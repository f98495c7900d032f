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

headline_runs() { # Figs. 1, 10a, 11, 12, 13, Table 7; on a cluster submit fig1_headline.sh before the others
  sweep redo_dqn_atari.py redo_fig1 "$envs" "$seeds" $flags --replay-ratio 1 < <(
    echo "dqn --method dqn"
    echo "redo --method redo"
  )
}

baseline_runs() { # Figs. 1 and 13
  atari_tiers "$GAMES17" 2500000
  headline_runs
  sweep redo_dqn_atari.py redo_fig1 "$envs" "$seeds" $flags --replay-ratio 1 < <(
    echo "reset --method reset"
    echo "weight-decay --method dqn --weight-decay 1e-5"
  )
}

methods_by_ratio() { # methods_by_ratio NAME "RATIOS" [flags ...]: Fig. 10; 0.5 and 2 at paper scale alone
  local exp=$1 ratios=" $2 " ratio method
  shift 2
  [ "$SCALE" = paper ] || ratios=${ratios/ 0.5 / } ratios=${ratios/ 2 / }
  sweep redo_dqn_atari.py "$exp" "$envs" "$seeds" $flags "$@" < <(
    for ratio in $ratios; do
      for method in dqn redo; do echo "rr$ratio-$method --method $method --replay-ratio $ratio"; done
    done
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

old_runs() { # old_runs ARM ...: Fig. 7 on two cores; Figs. 4 and 8 learn from their replays (rr0.25, redo-rr1) and networks
  local arms=$*
  seeds="1 2 3" envs=ALE/Asterix-v5
  local flags="--total-timesteps 40000 --learning-starts 5000 --exploration-steps 20000 --target-network-frequency 1000
    --width 0.25 --padding valid --precision float32 --eval-every 20000 --eval-steps 5000 --eval-envs 4
    --dormant-every 2500 --checkpoint-every 10000"
  [ "$SCALE" != smoke ] || seeds=1 flags="$ATARI_SMOKE_ALL --padding valid"
  [ "$SCALE" != paper ] || seeds="1 2 3 4 5" envs=ALE/DemonAttack-v5 flags="--total-timesteps 10000000"
  local seed arm
  for seed in $seeds; do # seed by seed: all arms of one are done before the next begins
    sweep redo_dqn_atari.py redo_old "$envs" "$seed" $flags < <(
      for arm in $arms; do
        case $arm in
          redo-rr1) echo "$arm --method redo --replay-ratio 1 --checkpoint-replay always" ;;
          rr0.25) echo "$arm --method dqn --checkpoint-replay always" ;;
          *) echo "$arm --method dqn --replay-ratio ${arm#rr}" ;;
        esac
      done
    )
  done
}

old_run() { # old_run ARM SEED: the folder of that run of old_runs
  run_folder "$envs" "redo_old-$SCALE-$1" "$2"
}

sac_tiers() { # sac_tiers "TASKS at paper scale": sets seeds, envs and flags for this SCALE
  seeds=1 envs=Ant-v5 flags=""
  case $SCALE in
    smoke) flags="--total-timesteps 1500 --learning-starts 300 --width 0.1 --eval-every 500 --eval-episodes 2 --dormant-every 500
      --dormant-batch-size 64 --redo-period-gradient-steps 300 --reset-period-gradient-steps 300" ;;
    small) seeds="1 2 3" flags="--total-timesteps 60000 --eval-episodes 5 --redo-period-gradient-steps 20000
      --reset-period-gradient-steps 20000" ;;
    paper) seeds="1 2 3 4 5 6 7 8 9 10" envs=$1 ;;
  esac
}

sac_runs() { # Figs. 14, 18, 20: SAC and ReDo, seed by seed; then resets and weight decay
  sac_tiers "Ant-v5 HalfCheetah-v5 Hopper-v5 Walker2d-v5"
  local seed
  for seed in $seeds; do
    sweep studies/redo_sac.py redo_sac "$envs" "$seed" $flags < <(
      echo "sac --method sac"
      echo "redo --method redo"
    )
  done
  for seed in $seeds; do
    sweep studies/redo_sac.py redo_sac "$envs" "$seed" $flags < <(
      echo "reset --method reset"
      echo "weight-decay --method sac --weight-decay 1e-5"
    )
  done
}

GAMES26=$(printf "ALE/%s-v5 " Alien Amidar Assault Asterix BankHeist BattleZone Boxing Breakout ChopperCommand CrazyClimber \
  DemonAttack Freeway Frostbite Gopher Hero Jamesbond Kangaroo Krull KungFuMaster MsPacman Pong PrivateEye Qbert RoadRunner \
  Seaquest UpNDown)

drq_tiers() { # drq_tiers "GAMES at paper scale" SEEDS at paper scale: sets seeds, envs and flags for this SCALE
  seeds=1 envs=ALE/Asterix-v5 flags=""
  case $SCALE in
    smoke) flags="--total-timesteps 300 --learning-starts 50 --exploration-steps 50 --max-episode-steps 60 --width 0.25
      --eval-every 150 --eval-episodes 2 --eval-envs 2 --dormant-every 50 --dormant-batch-size 32 --log-every 50
      --redo-period-gradient-steps 50" ;;
    small) seeds="1 2" flags="--total-timesteps 100000 --width 0.25 --padding valid --precision float32 --eval-every 25000
      --eval-episodes 20" ;;
    paper) envs=$1 seeds=$2 ;;
  esac
}
