#!/usr/bin/env bash
# The LLM's answers to the prompts of a file, four each: what the RM learns to tell from golden answers, and what the
# LLM is aligned on. As it stands a tiny random LLaMA answers the RM's prompts of data/sample. From the environment:
#   MODEL             the LLM: folder or Hub name; its name on the server with ENGINE=openai
#   LLM_NAME ROUND    name the result                  (default: llm, 0)
#   DATA_DIR          folder laid out as data/sample   (default: data/sample)
#   DATA_PATH         the prompts                      (default: DATA_DIR/rm_data/hh_split_rm.train.json)
#   OUTPUT_DIR        where the result goes            (default: outputs/samples)
#   TASK_TYPE         sampling, or testing: one answer, nearly greedy
#   TEMPLATE          plain, chat or llama-2-chat      (default: plain)
#   ENGINE BASE_URL   openai, http://localhost:8000/v1 (default: transformers, in this process)
#   NUM_GPUS          processes                        (default: the number of GPUs; 1 without any)
# Arguments go to tools/inference_llm.py: --temperature 0.8, --concurrency 64. Started again, it goes on where it was.
# Examples:
#   MODEL=outputs/alpaca LLM_NAME=alpaca DATA_DIR=data/hh-split bash scripts/sample_llm.sh
#   SAMPLES=outputs/samples/llm_sampling_hh_split_rm_v0_results.json bash scripts/convert_apo_data.sh
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -d $REPO/.venv ]]; then PATH=$REPO/.venv/bin:$PATH; fi

DATA_DIR=${DATA_DIR:-$REPO/data/sample}
DATA_PATH=${DATA_PATH:-$DATA_DIR/rm_data/hh_split_rm.train.json}
TASK_TYPE=${TASK_TYPE:-sampling}
ENGINE=${ENGINE:-transformers}

flags=()
if [[ -z ${MODEL:-} ]]; then
    if [[ $ENGINE == openai ]]; then
        echo "error: ENGINE=openai without MODEL; expected the name of a model on the server" >&2
        exit 2
    fi
    MODEL=$REPO/outputs/tiny_llama
    if [[ ! -e $MODEL/tokenizer_config.json ]]; then python "$REPO/tools/dev/make_tiny_llama.py" --output_dir "$MODEL"; fi
    flags+=(--max_new_tokens 32)
    : "${OMP_NUM_THREADS:=1}" # more threads make a model this small slower
    export OMP_NUM_THREADS
fi
if [[ -n ${TEMPLATE:-} ]]; then flags+=(--prompt_template "$TEMPLATE"); fi
if [[ -n ${BASE_URL:-} ]]; then flags+=(--base_url "$BASE_URL"); fi

launch=(python)
if [[ $ENGINE == transformers ]]; then
    num_found=$(python -c 'import torch; print(torch.cuda.device_count())')
    NUM_GPUS=${NUM_GPUS:-$((num_found > 0 ? num_found : 1))}
    if ((NUM_GPUS > 1)); then launch=(torchrun --nproc_per_node "$NUM_GPUS" --master_port "${MASTER_PORT:-6000}"); fi
fi

"${launch[@]}" "$REPO/tools/inference_llm.py" --engine "$ENGINE" --model_name_or_path "$MODEL" \
    --model_prefix "${LLM_NAME:-llm}" --task_type "$TASK_TYPE" --data_path "$DATA_PATH" \
    --data_suffix "$(basename "$DATA_PATH" | cut -d. -f1)_v${ROUND:-0}" \
    --output_dir "${OUTPUT_DIR:-$REPO/outputs/samples}" "${flags[@]}" "$@"
