#!/usr/bin/env bash
# Rewards of sampled responses. By default the APO RM of scripts/train_apo_rm.sh scores the responses to 150 test prompts of
# data/sample. A killed run resumes. Environment (NUM_GPUS: scripts/common.sh):
#   MODEL                    the reward model                 (default: outputs/rm_apo)
#   DATA_PATH                the responses                    (default: the test prompts' of DATA_DIR, LLM_NAME, ROUND)
#   DATA_DIR LLM_NAME ROUND  name that file                   (default: data/sample, llm, 0)
#   SUFFIX                   names the rewards                (default: the model folder's name)
#   OUTPUT_DIR               folder of <data>_pred_<suffix>_results.json   (default: outputs/scores)
# Flags go to train.py: --eval_token_budget 16384, --bf16 true. Example:
#   MODEL=outputs/rm_base DATA_PATH=outputs/samples/llm_sampling_hh_split_rm_v0_results.json bash scripts/score.sh
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODEL=${MODEL:-outputs/rm_apo}
DATA_DIR=${DATA_DIR:-data/sample}
samples=hh_cleaned_origin_test_${LLM_NAME:-llm}_v${ROUND:-0}.sample.json
check_model "$MODEL"
if [[ -z ${DATA_PATH:-} ]]; then check_folder DATA_DIR "$DATA_DIR"; fi
choose_launcher

"${launch[@]}" train.py --task_type inference --data_type reject_sample --model_name_or_path "$MODEL" \
    --eval_data_path "${DATA_PATH:-$DATA_DIR/eval_data/$samples}" --data_suffix "${SUFFIX:-$(basename "$MODEL")}" \
    --output_dir "${OUTPUT_DIR:-outputs/scores}" --report_to none --use_cpu "$use_cpu" "$@"
