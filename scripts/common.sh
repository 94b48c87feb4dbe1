#!/usr/bin/env bash
# Sourced by the scripts of the stages: settings from the environment, and the launcher. Paths are relative to the
# repository.
#
# Of every training script:
#   CONFIG      the run, a file of configs/runs/   (default: sample_<stage>.yaml, or llama7b_<stage>.yaml with MODEL)
#   MODEL       folder or Hub name                 (default: the config's)
#   DATA_DIR    folder laid out as data/sample     (default: the config's)
#   OUTPUT_DIR  folder of the trained model        (default: the config's)
#   BATCH_SIZE  pairs a step, all processes        (default: 16 for sample_*, 8 for smollm2_*, 64 for llama7b_*)
#   MICRO_BATCH_SIZE   pairs of a process at once  (default: the config's)
# Of every script that starts a model:
#   NUM_GPUS    processes on each machine          (default: the number of GPUs; 1 without any or with use_cpu: true)
#   NNODES MASTER_ADDR MASTER_PORT RUN_ID          several machines: scripts/train_slurm.sh sets them
# Every other setting is a flag of train.py behind the script: --learning_rate 2e-6. Flags win over all of the above.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -d .venv ]]; then PATH=$PWD/.venv/bin:$PATH; fi

fail() {
    echo "error: $*" >&2
    exit 2
}

check_folder() { # NAME PATH
    if [[ ! -d $2 ]]; then fail "$1=$2: no such folder in ${PWD}; give a folder laid out as data/sample"; fi
}

check_model() { # a Hub name is `name` or `owner/name`; every other path has to exist
    if [[ -d $1 ]]; then return; fi
    if [[ $1 =~ ^(/|\.|~|outputs/|data/) || $1 == */*/* || $1 == */ || ($1 == */* && -d ${1%%/*}) ]]; then
        fail "MODEL=$1: no such folder in ${PWD}; give the folder of a model or its name on the Hub"
    fi
}

make_tiny_llama() {
    if [[ -e outputs/tiny_llama/tokenizer_config.json ]]; then return; fi
    DS_ACCELERATOR=cpu HF_HUB_DISABLE_PROGRESS_BARS=1 python tools/dev/make_tiny_llama.py --output_dir outputs/tiny_llama
}

choose_launcher() { # [cpu]: sets `launch`, the command before a program's name, and `use_cpu`
    local num_found=0 num_cores
    if [[ ${1:-} != cpu ]]; then num_found=$(python -c 'import torch; print(torch.cuda.device_count())'); fi
    use_cpu=$([[ $num_found -eq 0 ]] && echo true || echo false)
    NUM_GPUS=${NUM_GPUS:-$((num_found > 0 ? num_found : 1))}
    NNODES=${NNODES:-1}
    num_cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((num_cores > NUM_GPUS ? num_cores / NUM_GPUS : 1))}
    if ((NNODES > 1)); then
        launch=(torchrun --nnodes "$NNODES" --nproc_per_node "$NUM_GPUS" --rdzv_backend c10d
            --rdzv_id "${RUN_ID:-apo}" --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-6000}")
    elif ((NUM_GPUS > 1)); then
        launch=(torchrun --nproc_per_node "$NUM_GPUS" --master_port "${MASTER_PORT:-6000}")
    else
        launch=(python)
    fi
}

choose_config() { # STAGE FLAGS: sets and checks CONFIG and DATA_DIR
    CONFIG=${CONFIG:-configs/runs/$([[ -n ${MODEL:-} ]] && echo llama7b || echo sample)_$1.yaml}
    if [[ ! -f $CONFIG ]]; then fail "CONFIG=$CONFIG: no such file in ${PWD}; give a file of configs/runs/"; fi
    if [[ -n ${MODEL:-} ]]; then check_model "$MODEL"; fi
    case $CONFIG in
        */sample_*) : "${DATA_DIR:=data/sample}" "${BATCH_SIZE:=16}" "${OMP_NUM_THREADS:=1}" ;; # more threads are slower
        */smollm2_*) : "${BATCH_SIZE:=8}" ;;
        */llama7b_*)
            : "${BATCH_SIZE:=64}"
            if [[ " $* " != *" --train_data_path "* ]]; then check_folder DATA_DIR "${DATA_DIR:-data/hh-split}"; fi
            ;;
    esac
    if [[ -n ${DATA_DIR:-} ]]; then check_folder DATA_DIR "$DATA_DIR"; fi
}

train() { # FLAGS: trains CONFIG with what the environment sets, then FLAGS
    local flags=() micro accumulation processes
    if grep -q '^use_cpu: true' "$CONFIG"; then choose_launcher cpu; else choose_launcher; fi
    if grep -q '^model_name_or_path: outputs/tiny_llama' "$CONFIG" && [[ -z ${MODEL:-} ]]; then make_tiny_llama; fi
    if [[ -n ${MODEL:-} ]]; then flags+=(--model_name_or_path "$MODEL"); fi
    if [[ -n ${DATA_DIR:-} ]]; then
        flags+=(--eval_data_path "$DATA_DIR"/eval_data/{hh_split_llm.valid,hh_cleaned_origin.test}.json)
    fi
    if [[ -n ${OUTPUT_DIR:-} ]]; then flags+=(--output_dir "$OUTPUT_DIR"); fi
    if [[ $use_cpu == true ]]; then flags+=(--use_cpu true --deepspeed ""); fi
    micro=${MICRO_BATCH_SIZE:-$(sed -n 's/^per_device_train_batch_size: *\([0-9]*\).*/\1/p' "$CONFIG")}
    if [[ -n ${BATCH_SIZE:-} ]]; then
        processes=$((NNODES * NUM_GPUS))
        accumulation=$((BATCH_SIZE / (processes * micro)))
        if ((accumulation * processes * micro != BATCH_SIZE)); then
            fail "BATCH_SIZE=$BATCH_SIZE: expected a multiple of $processes processes x $micro pairs (MICRO_BATCH_SIZE)"
        fi
        flags+=(--gradient_accumulation_steps "$accumulation")
    fi
    if [[ -n ${MICRO_BATCH_SIZE:-} ]]; then
        flags+=(--per_device_train_batch_size "$micro" --per_device_eval_batch_size "$micro")
    fi
    "${launch[@]}" train.py --config "$CONFIG" "${flags[@]}" "$@"
}
