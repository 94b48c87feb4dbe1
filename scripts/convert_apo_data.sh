#!/usr/bin/env bash
# Golden answers + LLM samples -> golden-over-sampled pairs, the APO RM's second training file. As it stands it converts
# data/sample. From the environment:
#   DATA_DIR LLM_NAME ROUND   name the two files (defaults: data/sample, llm, 0); or give GOLDEN and SAMPLES
#   APO_DATA                  the file to write: <name>_text_scores.json
# Arguments go to the converter: --group, --seed 1.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -d $REPO/.venv ]]; then PATH=$REPO/.venv/bin:$PATH; fi

DATA_DIR=${DATA_DIR:-$REPO/data/sample}
samples=${LLM_NAME:-llm}_v${ROUND:-0}
APO_DATA=${APO_DATA:-$REPO/outputs/apo_data/$(basename "$DATA_DIR")_${samples}_text_scores.json}

python "$REPO/tools/apo_data_converter.py" \
    --golden_data_path "${GOLDEN:-$DATA_DIR/rm_data/hh_split_rm.golden.json}" \
    --sample_data_path "${SAMPLES:-$DATA_DIR/rm_data/hh_split_rm_$samples.sample.json}" \
    --output_dir "$(dirname "$APO_DATA")" --apo_data_name "$(basename "$APO_DATA" _text_scores.json)" "$@"
