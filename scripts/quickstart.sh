#!/usr/bin/env bash
# The method in a few minutes on a CPU: sets up .venv, makes a tiny LLaMA, trains the base RM and the APO RM from it on
# data/sample, and compares them on test prompts that no training saw. Everything it writes is in outputs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh
unset MODEL DATA_DIR DEEPSPEED NNODES LLM_NAME ROUND
out=$PWD/outputs/quickstart
test_data=data/sample/eval_data/hh_cleaned_origin

APO_DATA=$out/rm_apo_data_v0_text_scores.json bash scripts/convert_apo_data.sh
GOLDEN=${test_data}_test.golden.json SAMPLES=${test_data}_test_llm_v0.sample.json \
    APO_DATA=$out/golden_over_sampled_text_scores.json bash scripts/convert_apo_data.sh

quiet=(--eval_strategy no --save_strategy no --disable_tqdm true --logging_steps 50
    --eval_data_path "$test_data.test.json" "$out/golden_over_sampled_text_scores.json")
OUTPUT_DIR=$out/rm_base bash scripts/train_base_rm.sh "${quiet[@]}"
OUTPUT_DIR=$out/rm_apo APO_DATA=$out/rm_apo_data_v0_text_scores.json bash scripts/train_apo_rm.sh "${quiet[@]}"

echo
.venv/bin/python tools/compare_runs.py "$out/rm_base" "$out/rm_apo"
