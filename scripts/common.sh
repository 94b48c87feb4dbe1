#!/usr/bin/env bash
# Sourced by the train scripts: settings from the environment, with defaults, and the launcher.
#
#   MODEL             a LLaMA: folder or Hub name      (default: a tiny random one, with settings that fit data/sample)
#   DATA_DIR          folder laid out as data/sample   (default: data/sample)
#   NUM_GPUS          processes per machine            (default: the number of GPUs; 1 without any)
#   OUTPUT_DIR        where the model goes             (default: outputs/<stage>)
#   DEEPSPEED         a file of configs/; "" for none  (default with MODEL and a GPU: the reference's ZeRO-3 offload)
#   LEARNING_RATE EPOCHS WARMUP_STEPS MAX_LENGTH       (default with MODEL: the reference's)
#   BATCH_SIZE        pairs per step, over all processes; MICRO_BATCH_SIZE: pairs per process at a time
#   NNODES            machines; also MASTER_ADDR, MASTER_PORT, RUN_ID   (scripts/train_slurm.sh sets them)
#
# Arguments of a train script go to train.py behind its own flags and win over them.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -d $REPO/.venv ]]; then PATH=$REPO/.venv/bin:$PATH; fi

DATA_DIR=${DATA_DIR:-$REPO/data/sample}
num_found=$(python -c 'import torch; print(torch.cuda.device_count())')
NUM_GPUS=${NUM_GPUS:-$((num_found > 0 ? num_found : 1))}
NNODES=${NNODES:-1}
use_cpu=$([[ $num_found -eq 0 ]] && echo true || echo false)

if [[ -z ${MODEL:-} ]]; then
    # A run on the sample data, in a minute or two. Chosen on eval_data/hh_split_llm.valid.json and its golden answers.
    MODEL=$REPO/outputs/tiny_llama
    if [[ ! -e $MODEL/tokenizer_config.json ]]; then python "$REPO/tools/dev/make_tiny_llama.py" --output_dir "$MODEL"; fi
    : "${LEARNING_RATE:=1e-3}" "${EPOCHS:=3}" "${BATCH_SIZE:=16}" "${MICRO_BATCH_SIZE:=8}" "${WARMUP_STEPS:=20}"
    : "${OMP_NUM_THREADS:=1}" # more threads make a model this small slower, and much slower on a busy machine
else
    : "${LEARNING_RATE:=1e-6}" "${EPOCHS:=1}" "${BATCH_SIZE:=64}" "${MICRO_BATCH_SIZE:=1}" "${WARMUP_STEPS:=100}"
    if [[ $use_cpu == false ]]; then : "${DEEPSPEED=$REPO/configs/default_offload_opt_param.json}"; fi
fi
accumulation=$((BATCH_SIZE / (NNODES * NUM_GPUS * MICRO_BATCH_SIZE)))
if ((accumulation * NNODES * NUM_GPUS * MICRO_BATCH_SIZE != BATCH_SIZE)); then
    echo "error: BATCH_SIZE=$BATCH_SIZE is no multiple of NNODES=$NNODES x NUM_GPUS=$NUM_GPUS x" \
        "MICRO_BATCH_SIZE=$MICRO_BATCH_SIZE" >&2
    exit 2
fi

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

# What the three reward models have in common: the reference's command line.
common_flags=(
    --do_train True --eval_at_start False --use_cpu "$use_cpu"
    --model_type reward --model_name_or_path "$MODEL" --data_type comparison_pair
    --eval_data_path "$DATA_DIR/eval_data/hh_split_llm.valid.json" "$DATA_DIR/eval_data/hh_cleaned_origin.test.json"
    --add_sep_token True --remove_unused_columns false --num_train_epochs "$EPOCHS"
    --per_device_train_batch_size "$MICRO_BATCH_SIZE" --per_device_eval_batch_size "$MICRO_BATCH_SIZE"
    --gradient_accumulation_steps "$accumulation" --evaluation_strategy steps
    --padding_side right --truncation_side left --pooling_type last --max_length "${MAX_LENGTH:-512}"
    --save_strategy steps --save_total_limit 10 --learning_rate "$LEARNING_RATE" --warmup_steps "$WARMUP_STEPS"
    --logging_steps 10 --eval_steps 50 --weight_decay 0. --rm_calibration True --calibration_bins 10
    --tf32 false --fp16 false --report_to none
)
if [[ -n ${DEEPSPEED:-} ]]; then common_flags+=(--deepspeed "$DEEPSPEED"); fi

train() { "${launch[@]}" "$REPO/train.py" "${common_flags[@]}" "$@"; }
