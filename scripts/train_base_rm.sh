#!/usr/bin/env bash
# Trains the base RM: ranking loss on the human pairs of the RM half. By default a tiny LLaMA on data/sample; settings:
# scripts/common.sh. Example:
#   CONFIG=configs/runs/llama7b_rm_base.yaml NUM_GPUS=8 bash scripts/train_base_rm.sh
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
choose_config rm_base "$@"
train ${DATA_DIR:+--train_data_path "$DATA_DIR/rm_data/hh_split_rm.train.json"} "$@"
