# Sourced by the sweeps of this folder, after ../common.sh. All figures share their runs,
# drqv2-<scale>-<arm>, where the arms' flags are the same.

DRQ_SMOKE="--learning-starts 100 --exploration-steps 100 --image-size 36 --hidden-dim 64 --batch-size 16 --n-step 3
  --stddev-steps 200 --eval-episodes 1 --buffer-size 1000"
DRQ_SMALL="--total-timesteps 150000 --eval-every 15000 --eval-episodes 5"

pixel_tiers() { # pixel_tiers "TASKS at paper scale": sets seeds, envs, flags, the steps of a run and about a third of them
  local tasks=$1
  case $SCALE in
    smoke)
      seeds=1 tasks=cartpole-balance steps=1200 third=600
      flags="$DRQ_SMOKE --total-timesteps 1200 --eval-every 600 --plasticity-every 500 --plasticity-batch-size 64"
      ;;
    small) seeds=1 tasks=${1%% *} flags=$DRQ_SMALL steps=150000 third=50000 ;;
    paper) seeds="1 2 3 4 5" flags="" steps=1500500 third=500000 ;; # of a task of medium difficulty
  esac
  envs=$(printf "dm_control/%s-v0 " $tasks)
}

reset_arms() { # reset_arms STEPS "NUMBERS": so many resets in a run of STEPS, equally far apart; Figs. 1, 12 and 13
  local number every
  echo "augmentation"
  echo "plain --no-augmentation"
  for number in $2; do
    every=$((($1 + number) / (number + 1)))
    echo "augmentation-reset$number --reset-every $every"
    echo "plain-reset$number --no-augmentation --reset-every $every"
  done
}

injection_arms() { # Figs. 5 and 16, after pixel_tiers
  echo "augmentation"
  echo "augmentation-inject-actor --injection actor --injection-step $third"
  echo "augmentation-inject-critic --injection critic --injection-step $third"
  echo "switch-on --no-augmentation --augmentation-switch-step $third"
  echo "switch-on-inject-actor --no-augmentation --augmentation-switch-step $third --injection actor --injection-step $third"
  echo "switch-on-inject-critic --no-augmentation --augmentation-switch-step $third --injection critic --injection-step $third"
}

replay_ratio_arms() { # Figs. 7 and 8
  echo "augmentation"
  echo "rr1 --replay-ratio 1"
  echo "rr2 --replay-ratio 2"
  echo "rr4 --replay-ratio 4"
}
