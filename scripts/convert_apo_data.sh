#!/usr/bin/env bash
# Golden and sampled responses -> golden-over-sampled pairs, the second training file of the APO RM. Environment:
#   DATA_DIR LLM_NAME ROUND  name the two input files           (default: data/sample, llm, 0)
#   GOLDEN SAMPLES           these files, if named differently
#   APO_DATA                 the output, <name>_text_scores.json
# Flags go to tools/apo_data_converter.py: --group, --seed 1.
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DATA_DIR=${DATA_DIR:-data/sample}
samples=${LLM_NAME:-llm}_v${ROUND:-0}
APO_DATA=${APO_DATA:-outputs/apo_data/$(basename "$DATA_DIR")_${samples}_text_scores.json}
if [[ -z ${GOLDEN:-} || -z ${SAMPLES:-} ]]; then check_folder DATA_DIR "$DATA_DIR"; fi

python tools/apo_data_converter.py \
    --golden_data_path "${GOLDEN:-$DATA_DIR/rm_data/hh_split_rm.golden.json}" \
    --sample_data_path "${SAMPLES:-$DATA_DIR/rm_data/hh_split_rm_$samples.sample.json}" \
    --output_dir "$(dirname "$APO_DATA")" --apo_data_name "$(basename "$APO_DATA" _text_scores.json)" "$@"
