#!/usr/bin/env bash
# The testing RM, the paper's automatic judge: ranking loss on all human pairs. As it stands it trains a tiny LLaMA on
# data/sample; scripts/common.sh lists the settings for the real thing. Example:
#   MODEL=huggyllama/llama-7b DATA_DIR=data/hh-split NUM_GPUS=8 bash scripts/train_testing_rm.sh
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train --task_type hh_split --data_suffix rm_testing \
    --train_data_path "$DATA_DIR/hh_cleaned_origin.train.json" \
    --output_dir "${OUTPUT_DIR:-$REPO/outputs/rm_testing}" "$@"
