#!/usr/bin/env bash
# Which size of base learns best in a fixed time? Each is pretrained on one thread for as many minutes on the same text
# and held-out rows: results/base_sizes/<width>x<layers>.{json,csv}.
#   recipes/base_sizes.sh out/base/explore.jsonl [minutes]
set -euo pipefail
cd "$(dirname "$0")/.."
text=$1 minutes=${2:-8}
mkdir -p results/base_sizes
for size in "128 4 4 344" "192 4 6 512" "256 4 8 688" "256 8 8 688"; do
  read -r width layers heads feed_forward <<<"$size"
  out=out/base/${width}x$layers
  .venv/bin/python base/pretrain.py --text "$text" --out "$out" --hidden "$width" --layers "$layers" --heads "$heads" \
    --feed-forward "$feed_forward" --minutes "$minutes" --rows 16 --questions 0.5 --dropout 0.1 --threads 1
  cp "$out/pretrain.json" "results/base_sizes/${width}x$layers.json"
  cp "$out/pretrain_log.csv" "results/base_sizes/${width}x$layers.csv"
done
