#!/usr/bin/env bash
# Responses of the LLM to the prompts of a file, four each. By default a tiny random LLaMA responds to the RM's prompts of
# data/sample. A killed run resumes. Environment (NUM_GPUS: scripts/common.sh):
#   MODEL            the LLM: folder or Hub name; its name on the server with ENGINE=openai
#   LLM_NAME ROUND   name the result                  (default: llm, 0)
#   DATA_DIR         folder laid out as data/sample   (default: data/sample)
#   DATA_PATH        the prompts                      (default: DATA_DIR/rm_data/hh_split_rm.train.json)
#   OUTPUT_DIR       folder of the result             (default: outputs/samples)
#   TASK_TYPE        sampling, or testing: one response, nearly greedy
#   TEMPLATE         plain, chat or llama-2-chat      (default: plain)
#   ENGINE BASE_URL  openai, http://localhost:8000/v1 (default: transformers, in this process)
# Flags go to tools/inference_llm.py: --temperature 0.8, --concurrency 64. Example:
#   MODEL=outputs/alpaca LLM_NAME=alpaca DATA_DIR=data/hh-split bash scripts/sample_llm.sh
#   SAMPLES=outputs/samples/alpaca_sampling_hh_split_rm_v0_results.json bash scripts/convert_apo_data.sh
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DATA_DIR=${DATA_DIR:-data/sample}
ENGINE=${ENGINE:-transformers}
if [[ -z ${DATA_PATH:-} ]]; then check_folder DATA_DIR "$DATA_DIR"; fi
DATA_PATH=${DATA_PATH:-$DATA_DIR/rm_data/hh_split_rm.train.json}

flags=()
if [[ $ENGINE == openai ]]; then
    if [[ -z ${MODEL:-} ]]; then fail "ENGINE=openai without MODEL; give the name of a model on the server"; fi
    launch=(python)
else
    if [[ -n ${MODEL:-} ]]; then
        check_model "$MODEL"
    else
        make_tiny_llama
        echo "MODEL is not set: a random LLaMA responds, its responses are noise" >&2
        MODEL=outputs/tiny_llama OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # more threads make a model this small slower
        flags+=(--max_new_tokens 32)
    fi
    choose_launcher
fi
if [[ -n ${TEMPLATE:-} ]]; then flags+=(--prompt_template "$TEMPLATE"); fi
if [[ -n ${BASE_URL:-} ]]; then flags+=(--base_url "$BASE_URL"); fi

"${launch[@]}" tools/inference_llm.py --engine "$ENGINE" --model_name_or_path "$MODEL" \
    --model_prefix "${LLM_NAME:-llm}" --task_type "${TASK_TYPE:-sampling}" --data_path "$DATA_PATH" \
    --data_suffix "$(basename "$DATA_PATH" | cut -d. -f1)_v${ROUND:-0}" \
    --output_dir "${OUTPUT_DIR:-outputs/samples}" "${flags[@]}" "$@"
