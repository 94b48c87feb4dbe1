#!/usr/bin/env bash
# A reward model's scores of LLM samples. As it stands the APO RM that scripts/train_apo_rm.sh has trained scores the samples
# for 150 test prompts of data/sample. From the environment:
#   MODEL             the reward model                 (default: outputs/rm_apo)
#   DATA_PATH         the samples                      (default: DATA_DIR/eval_data/hh_cleaned_origin_test_LLM_v0.sample.json)
#   DATA_DIR LLM_NAME ROUND   name that file           (default: data/sample, llm, 0)
#   SUFFIX            names the scores                 (default: the model folder's name)
#   OUTPUT_DIR        where <data>_pred_<suffix>_results.json goes (default: outputs/scores)
#   NUM_GPUS          processes                        (default: the number of GPUs; 1 without any)
# Arguments go to train.py: --eval_token_budget 16384, --bf16 true. Started again, a killed run goes on where it was.
# Example:
#   MODEL=outputs/rm_base DATA_PATH=outputs/samples/llm_sampling_hh_split_rm_v0_results.json bash scripts/score.sh
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -d $REPO/.venv ]]; then PATH=$REPO/.venv/bin:$PATH; fi

MODEL=${MODEL:-$REPO/outputs/rm_apo}
samples=hh_cleaned_origin_test_${LLM_NAME:-llm}_v${ROUND:-0}.sample.json
DATA_PATH=${DATA_PATH:-${DATA_DIR:-$REPO/data/sample}/eval_data/$samples}
num_found=$(python -c 'import torch; print(torch.cuda.device_count())')
NUM_GPUS=${NUM_GPUS:-$((num_found > 0 ? num_found : 1))}

launch=(python)
if ((NUM_GPUS > 1)); then launch=(torchrun --nproc_per_node "$NUM_GPUS" --master_port "${MASTER_PORT:-6000}"); fi
num_cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((num_cores > NUM_GPUS ? num_cores / NUM_GPUS : 1))}

"${launch[@]}" "$REPO/train.py" --task_type inference --data_type reject_sample --model_name_or_path "$MODEL" \
    --eval_data_path "$DATA_PATH" --data_suffix "${SUFFIX:-$(basename "$MODEL")}" \
    --output_dir "${OUTPUT_DIR:-$REPO/outputs/scores}" --report_to none \
    --use_cpu "$([[ $num_found -eq 0 ]] && echo true || echo false)" "$@"
