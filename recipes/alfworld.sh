#!/usr/bin/env bash
# SFT and offline RL on the official ALFWorld games: valid_seen, then valid_unseen once. Resumable: what is done is skipped.
#   export ALFWORLD_DATA=~/.cache/alfworld
#   recipes/alfworld.sh [seeds] [train_sft flags] [train_orl flags]
# PANEL=tenth learns from a tenth of the train games. `make alfworld` first, and the episodes are played again in the real engine.
# shellcheck disable=SC2086
set -euo pipefail
cd "$(dirname "$0")/.."
seeds=${1:-"0"} sft_flags=${2:---epochs 1.5 --shares 1 2 2} orl_flags=${3:---rl.temperature 0.2 --rl.critic-lr 1e-3 --warmup-steps 250 --steps 320}
out=out/alfworld${PANEL:+_$PANEL} python=.venv/bin/python threads="--threads ${THREADS:-2}" games="--env alfworld --panel official --workers 0"
train="$threads --compile" data="--env alfworld --panel ${PANEL:-official} --workers 0"
resume() { if [ -f "$1/config.json" ]; then echo --resume; fi; }
evaluate() { # name, split, flags
  [ -f "$run/results/$1.json" ] || $python eval.py $games --split "$2" --name "$1" --out "$run" $threads $3
}

$python collect.py --source gold $data --out "$out/gold.jsonl"
for seed in $seeds; do
  run=$out/seed$seed
  [ -f "$run/sft/policy.json" ] ||
    $python train_sft.py --data "$out/gold.jsonl" --rank 0 --lr 1e-3 --out "$run/sft" --seed "$seed" $train $sft_flags $(resume "$run/sft")
  evaluate sft_seen valid_seen "--checkpoint $run/sft"
  $python collect.py --source policy $data --limit 60 --checkpoint "$run/sft" --out "$run/rollouts.jsonl" --seed "$seed" $threads
  [ -f "$run/orl/policy.json" ] ||
    $python train_orl.py --init "$run/sft" --expert "$out/gold.jsonl" --rollouts "$run/rollouts.jsonl" --out "$run/orl" \
      --seed "$seed" $train $orl_flags $(resume "$run/orl")
  evaluate orl_seen valid_seen "--checkpoint $run/orl"
  evaluate sft_unseen valid_unseen "--checkpoint $run/sft --reason seed-$seed-of-SFT"
  evaluate orl_unseen valid_unseen "--checkpoint $run/orl --reason seed-$seed-of-offline-RL"
  if [ -f .venv/.alfworld ]; then
    $python recipes/alfworld_replay.py --episodes "$run"/episodes/*.jsonl --out "$run/results/replay.json"
  fi
done
$python recipes/compare.py --out "$out" --a orl_seen --b sft_seen
