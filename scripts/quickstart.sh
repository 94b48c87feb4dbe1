#!/usr/bin/env bash
# The method in 40 seconds on two CPU cores: makes .venv, trains the base RM and the APO RM of a tiny LLaMA on data/sample,
# and compares them on test prompts that neither was trained on. All output is in outputs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset CONFIG MODEL DATA_DIR BATCH_SIZE MICRO_BATCH_SIZE NUM_GPUS NNODES LLM_NAME ROUND GOLDEN SAMPLES
# Warnings and one progress bar: the last variable hides those that end within a second.
export LOG_LEVEL=WARNING DS_ACCELERATOR=cpu HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DELAY=1
out=outputs/quickstart
test_data=data/sample/eval_data/hh_cleaned_origin

echo "[1/5] Python environment .venv (several minutes the first time, then none)"
bash scripts/setup_env.sh

echo "[2/5] golden-over-sampled pairs from the golden and sampled responses of data/sample (5 s)"
mkdir -p $out
rm -rf $out/rm_base $out/rm_apo  # a finished run would not be repeated
APO_DATA=$out/rm_apo_data_v0_text_scores.json bash scripts/convert_apo_data.sh
GOLDEN=${test_data}_test.golden.json SAMPLES=${test_data}_test_llm_v0.sample.json \
    APO_DATA=$out/golden_over_sampled_text_scores.json bash scripts/convert_apo_data.sh

flags=(--eval_strategy no --save_strategy no --eval_data_path $test_data.test.json $out/golden_over_sampled_text_scores.json)
echo "[3/5] base RM: trained on 440 human pairs (10 s; its log: $out/rm_base.log)"
OUTPUT_DIR=$out/rm_base bash scripts/train_base_rm.sh "${flags[@]}" >$out/rm_base.log

echo "[4/5] APO RM: trained on these and 1,760 pairs of step 2 (25 s; its log: $out/rm_apo.log)"
OUTPUT_DIR=$out/rm_apo APO_DATA=$out/rm_apo_data_v0_text_scores.json bash scripts/train_apo_rm.sh "${flags[@]}" >$out/rm_apo.log

echo "[5/5] both RMs on test prompts that neither was trained on"
echo
.venv/bin/python tools/compare_runs.py $out/rm_base $out/rm_apo
cat <<END

The two reward models are $out/rm_base and $out/rm_apo.
Next, the rewards of sampled responses:  MODEL=$out/rm_apo bash scripts/score.sh
END
