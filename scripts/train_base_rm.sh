#!/usr/bin/env bash
# The base RM: ranking loss on the RM half of the human pairs. As it stands it trains a tiny LLaMA on data/sample;
# scripts/common.sh lists the settings for the real thing. Example:
#   MODEL=huggyllama/llama-7b DATA_DIR=data/hh-split NUM_GPUS=8 bash scripts/train_base_rm.sh
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train --task_type hh_split --data_suffix rm_base \
    --train_data_path "$DATA_DIR/rm_data/hh_split_rm.train.json" \
    --output_dir "${OUTPUT_DIR:-$REPO/outputs/rm_base}" "$@"
