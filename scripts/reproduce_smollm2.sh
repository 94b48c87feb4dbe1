#!/usr/bin/env bash
# Base RM and APO RM from the pretrained SmolLM2-135M on 320 real pairs, tested on 300: configs/runs/smollm2_*.yaml, the
# results on real data of README.md. About an hour on one core. Environment:
#   HH_DATA_DIR  real data in the layout of docs/data.md   (default: data/hh-split)
#   OUTPUT_DIR   folder of both models                     (default: outputs/smollm2, where model and data are too)
#   SEED         (default: 42)
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HH_DATA_DIR=${HH_DATA_DIR:-data/hh-split}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/smollm2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
check_folder HH_DATA_DIR "$HH_DATA_DIR"
data=outputs/smollm2/data

# ---- the pretrained model
python tools/dev/make_smollm2.py --output_dir outputs/smollm2/SmolLM2-135M

# ---- sampled responses to the first 160 prompts, drawn here (10 minutes) unless HH_DATA_DIR has them
mkdir -p $data
samples=$HH_DATA_DIR/rm_data/hh_split_rm_smollm2_v0.sample.json
if [[ ! -f $samples ]]; then
    samples=$data/smollm2_sampling_prompts_v0_results.json
    python - "$HH_DATA_DIR/rm_data/hh_split_rm.train.json" $data/prompts.json <<'END'
import sys

from apo.cli import write_json
from apo.records import iter_records

write_json(sys.argv[2], [record for _, record in iter_records(sys.argv[1])][:160])
END
    MODEL=outputs/smollm2/SmolLM2-135M LLM_NAME=smollm2 TEMPLATE=chat DATA_PATH=$data/prompts.json OUTPUT_DIR=$data \
        bash scripts/sample_llm.sh --max_new_tokens 48
fi

# ---- data: the golden response is the preferred one; 40 of the 160 prompts are held out of all training
python - "$HH_DATA_DIR" "$samples" "$data" <<'END'
import sys
from pathlib import Path

from apo.cli import write_json
from apo.records import SEPARATOR, iter_records

source, target = Path(sys.argv[1]), Path(sys.argv[3])
human, samples, test = (
    [record for _, record in iter_records(path)]
    for path in (
        source / "rm_data/hh_split_rm.train.json",
        sys.argv[2],
        source / "eval_data/hh_cleaned_origin.test.json",
    )
)
golden = [(record["query_id"], *record["text"][0].split(SEPARATOR)) for record in human]
held_out = samples[120:160]
held_out_ids = {str(record["query_id"]) for record in held_out}
human = [record for record in human if str(record["query_id"]) not in held_out_ids]
parts = {"held_out.sample": held_out, "train.sample": samples[:80], "hh_rm_320": human[:320], "hh_test_300": test[:300]}
assert [len(records) for records in parts.values()] == [40, 80, 320, 300], "too few records"
parts["golden"] = [dict(zip(("query_id", "query", "golden"), row, strict=True)) for row in golden]
for name, records in parts.items():
    write_json(target / f"{name}.json", records)
END
for part in train held_out; do
    GOLDEN=$data/golden.json SAMPLES=$data/$part.sample.json \
        APO_DATA=$data/rm_apo_${part}_text_scores.json bash scripts/convert_apo_data.sh
done

# ---- both reward models start from the pretrained model; the base RM's run also evaluates it before the first step
for run in rm_base rm_apo; do
    python train.py --config configs/runs/smollm2_$run.yaml --seed "${SEED:-42}" --output_dir "$OUTPUT_DIR/$run"
done
python tools/compare_runs.py "$OUTPUT_DIR"/rm_{base,apo}
