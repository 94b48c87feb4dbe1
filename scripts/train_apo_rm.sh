#!/usr/bin/env bash
# The APO RM: human pairs and golden-over-sampled pairs together. As it stands it trains a tiny LLaMA on data/sample;
# scripts/common.sh lists the settings for the real thing. Also from the environment:
#   LLM_NAME ROUND    whose samples             (default: llm, 0: ..._llm_v0.sample.json)
#   APO_DATA          golden-over-sampled pairs (default: what scripts/convert_apo_data.sh writes; made if missing)
#   APO_COEFF         their weight              (default: 0.1, the reference's)
#   NUM_APO_SAMPLES   samples per prompt        (default: 4; for --group data and MICRO_BATCH_SIZE=1: 1)
# Example:
#   LLM_NAME=alpaca MODEL=huggyllama/llama-7b DATA_DIR=data/hh-split NUM_GPUS=8 bash scripts/train_apo_rm.sh
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

APO_DATA=${APO_DATA:-$REPO/outputs/apo_data/$(basename "$DATA_DIR")_${LLM_NAME:-llm}_v${ROUND:-0}_text_scores.json}
if [[ ! -e $APO_DATA ]]; then APO_DATA=$APO_DATA bash "$REPO/scripts/convert_apo_data.sh"; fi

train --task_type apo --data_suffix rm_apo \
    --train_data_path "$DATA_DIR/rm_data/hh_split_rm.train.json" "$APO_DATA" \
    --apo_loss_coeff "${APO_COEFF:-0.1}" --apo_sample_num "${NUM_APO_SAMPLES:-4}" \
    --output_dir "${OUTPUT_DIR:-$REPO/outputs/rm_apo}" "$@"
