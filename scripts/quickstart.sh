#!/usr/bin/env bash
# The method in minutes on two CPU cores: makes .venv, trains the base RM and the APO RM of a tiny LLaMA on data/sample and
# compares them on test prompts that neither was trained on (40 s); then plays a game of two rounds (5 minutes). All
# output is in outputs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset CONFIG MODEL DATA_DIR BATCH_SIZE MICRO_BATCH_SIZE NUM_GPUS NNODES LLM_NAME ROUND GOLDEN SAMPLES
# Warnings and one progress bar: the last variable hides those that end within a second.
export LOG_LEVEL=WARNING DS_ACCELERATOR=cpu HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DELAY=1
out=outputs/quickstart
test_data=data/sample/eval_data/hh_cleaned_origin

echo "[1/6] Python environment .venv (several minutes the first time, then none)"
bash scripts/setup_env.sh

echo "[2/6] golden-over-sampled pairs from the golden and sampled responses of data/sample (5 s)"
mkdir -p $out
rm -rf $out/rm_base $out/rm_apo  # a finished run would not be repeated
APO_DATA=$out/rm_apo_data_v0_text_scores.json bash scripts/convert_apo_data.sh
GOLDEN=${test_data}_test.golden.json SAMPLES=${test_data}_test_llm_v0.sample.json \
    APO_DATA=$out/golden_over_sampled_text_scores.json bash scripts/convert_apo_data.sh

flags=(--eval_strategy no --save_strategy no --eval_data_path $test_data.test.json $out/golden_over_sampled_text_scores.json)
echo "[3/6] base RM: trained on 440 human pairs (10 s; its log: $out/rm_base.log)"
OUTPUT_DIR=$out/rm_base bash scripts/train_base_rm.sh "${flags[@]}" >$out/rm_base.log

echo "[4/6] APO RM: trained on these and 1,760 pairs of step 2 (25 s; its log: $out/rm_apo.log)"
OUTPUT_DIR=$out/rm_apo APO_DATA=$out/rm_apo_data_v0_text_scores.json bash scripts/train_apo_rm.sh "${flags[@]}" >$out/rm_apo.log

echo "[5/6] both RMs on test prompts that neither was trained on"
echo
.venv/bin/python tools/compare_runs.py $out/rm_base $out/rm_apo

echo
echo "[6/6] a game of two rounds: the LLM learns from RMs that learn from its responses (5 minutes; its log: $out/game.log)"
rm -rf $out/game
if [[ ! -e outputs/game_llama/tokenizer_config.json ]]; then
    .venv/bin/python tools/dev/make_tiny_llama.py --output_dir outputs/game_llama --hidden_size 96 --num_layers 3 --vocab_size 2048 \
        >/dev/null
fi
game=(--config configs/game_sample.yaml --rounds 2 --output_dir $out/game)
PATH=$PWD/.venv/bin:$PATH python play.py "${game[@]}" >$out/game.log 2>&1 || { tail -n 3 $out/game.log >&2; exit 2; }
.venv/bin/python play.py "${game[@]}" --report
cat <<END

The two reward models are $out/rm_base and $out/rm_apo, the aligned LLM is $out/game/round_2/align.
Next, the rewards of sampled responses:  MODEL=$out/rm_apo bash scripts/score.sh
END
