#!/usr/bin/env bash
# Trains the APO RM: human pairs and golden-over-sampled pairs together. By default a tiny LLaMA on data/sample; settings:
# scripts/common.sh, and:
#   LLM_NAME ROUND  whose sampled responses    (default: llm, 0: ..._llm_v0.sample.json)
#   APO_DATA        golden-over-sampled pairs  (default: the file that scripts/convert_apo_data.sh writes; made if missing)
# Example:
#   CONFIG=configs/runs/llama7b_rm_apo.yaml LLM_NAME=alpaca NUM_GPUS=8 bash scripts/train_apo_rm.sh
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
choose_config rm_apo "$@"
if [[ -n ${DATA_DIR:-}${LLM_NAME:-}${ROUND:-}${APO_DATA:-} ]]; then
    DATA_DIR=${DATA_DIR:-data/hh-split}
    check_folder DATA_DIR "$DATA_DIR"
    name=$(basename "$DATA_DIR")_${LLM_NAME:-llm}_v${ROUND:-0}
    export DATA_DIR APO_DATA=${APO_DATA:-outputs/apo_data/${name}_text_scores.json}
    if [[ ! -e $APO_DATA ]]; then bash scripts/convert_apo_data.sh; fi
    set -- --train_data_path "$DATA_DIR/rm_data/hh_split_rm.train.json" "$APO_DATA" "$@"
fi
train "$@"
