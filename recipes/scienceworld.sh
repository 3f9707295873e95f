#!/usr/bin/env bash
# SFT, then offline RL, on a ScienceWorld panel for several seeds, evaluated on dev. Resumable: what is done is skipped.
# bc is offline RL's twin: as many steps on the same experts and the rollouts that were solved, cloned. What offline RL gains over it comes from the values.
#   recipes/scienceworld.sh [panel] [seeds] [train_sft flags] [train_orl flags]
#   recipes/scienceworld.sh glider "0 1 2" "--epochs 2" "--steps 300"
# On two cores two seeds side by side, one thread each, are faster than one after the other:
#   export THREADS=1 OMP_WAIT_POLICY=passive; recipes/scienceworld.sh glider 0 & recipes/scienceworld.sh glider 1
# shellcheck disable=SC2086
set -euo pipefail
cd "$(dirname "$0")/.."
panel=${1:-glider} seeds=${2:-"0 1 2"} sft_flags=${3:-} orl_flags=${4:---rl.temperature 0.2 --rl.critic-lr 1e-3}
out=out/$panel python=.venv/bin/python threads="--threads ${THREADS:-2}" train="--threads ${THREADS:-2} --compile"
resume() { if [ -f "$1/config.json" ]; then echo --resume; fi; }

$python collect.py --source gold --panel "$panel" --out "$out/gold.jsonl"
$python collect.py --source stumble --panel "$panel" --gold "$out/gold.jsonl" --out "$out/stumbles.jsonl"
for seed in $seeds; do
  run=$out/seed$seed
  [ -f "$run/sft/policy.json" ] ||
    $python train_sft.py --data "$out/gold.jsonl" --rank 0 --lr 1e-3 --rename 0.5 --practice "$out/stumbles.jsonl" --out "$run/sft" \
      --seed "$seed" $train $sft_flags $(resume "$run/sft")
  [ -f "$run/results/sft.json" ] ||
    $python eval.py --panel "$panel" --checkpoint "$run/sft" --name sft --out "$run" --seed "$seed" $threads
  $python collect.py --source policy --panel "$panel" --limit 8 --checkpoint "$run/sft" --out "$run/rollouts.jsonl" --seed "$seed" $threads
  grep '"success": true' "$run/rollouts.jsonl" > "$run/solved.jsonl"
  for arm in orl bc; do
    [ $arm = orl ] && how="--rollouts $run/rollouts.jsonl" || how="--rollouts $run/solved.jsonl --rl.actor bc"
    [ -f "$run/$arm/policy.json" ] ||
      $python train_orl.py --init "$run/sft" --expert "$out/gold.jsonl" --out "$run/$arm" \
        --seed "$seed" $train $orl_flags $how $(resume "$run/$arm")
    [ -f "$run/results/$arm.json" ] ||
      $python eval.py --panel "$panel" --checkpoint "$run/$arm" --name $arm --out "$run" --seed "$seed" $threads
  done
done
$python recipes/compare.py --out "$out" --a orl --b sft
$python recipes/compare.py --out "$out" --a orl --b bc
