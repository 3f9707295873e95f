#!/usr/bin/env bash
# A base of any size from the start, and what it is worth: text, pretraining, SFT on the demo's paths, evaluation on dev.
#   recipes/base_gpu.sh out/base_gpu [minutes of pretraining] [flags of base/pretrain.py] [flags of train_sft.py]
#   TEXT=without recipes/base_gpu.sh out/base_gpu_held_out      # without the types held out from offline to online, and ALFWorld
# Meant for a GPU, where the defaults are about ten minutes; without one it runs too, and learns less in as many minutes.
# Resumable: what is done is skipped. Copy what lies in <folder>/model to base/, weights whole or in its pieces (cat model.safetensors.*).
# shellcheck disable=SC2086
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/base_gpu} minutes=${2:-6} shape=${3:---hidden 256 --layers 8 --heads 8 --feed-forward 688 --rows 32} sft=${4:---epochs 3}
words=${WORDS:-/usr/share/dict/american-english-small} python=.venv/bin/python  # apt install wamerican-small, or any list
resume() { if [ -f "$1/config.json" ]; then echo --resume; fi; }

# the text and the paths: a simulator's work, best done before a GPU is rented
if [ "${TEXT:-all}" = without ]; then
  text=out/o2o/explore.jsonl
  $python collect.py --source explore --panel without --max-steps 40 --out $text
else
  text="out/base/explore.jsonl out/base/explore_alfworld.jsonl"
  $python collect.py --source explore --panel full --limit 50 --max-steps 40 --out out/base/explore.jsonl
  $python collect.py --env alfworld --source explore --max-steps 40 --workers 0 --out out/base/explore_alfworld.jsonl
fi
$python collect.py --source gold --panel demo --out out/base/gold.jsonl
[ "$minutes" != 0 ] || exit 0  # 0 minutes: only these

[ -f "$out/model/pretrain.json" ] || $python base/pretrain.py --text $text --out "$out/model" --words "$words" --minutes "$minutes" $shape
split -b 16M -d "$out/model/model.safetensors" "$out/model/model.safetensors."
[ -f "$out/sft/policy.json" ] || $python train_sft.py --model "$out/model" --data out/base/gold.jsonl --out "$out/sft" \
  --rank 0 --lr 1e-3 --rename 0.5 $sft $(resume "$out/sft")
$python eval.py --checkpoint "$out/sft" --name sft --out "$out"
