#!/usr/bin/env bash
# Trains the testing RM, the paper's automatic judge: ranking loss on all human pairs. By default a tiny LLaMA on
# data/sample; settings: scripts/common.sh. Example:
#   CONFIG=configs/runs/llama7b_rm_testing.yaml NUM_GPUS=8 bash scripts/train_testing_rm.sh
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
choose_config rm_testing "$@"
train ${DATA_DIR:+--train_data_path "$DATA_DIR/hh_cleaned_origin.train.json"} "$@"
