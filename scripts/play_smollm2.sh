#!/usr/bin/env bash
# The game of SmolLM2-135M-Instruct on real data, and its control: configs/game_smollm2.yaml. It has not been played to its
# end yet and may take a day on one core; the same command goes on after any kill. Environment:
#   HH_DATA_DIR  real data in the layout of docs/data.md   (default: data/hh-split)
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HH_DATA_DIR=${HH_DATA_DIR:-data/hh-split}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
check_folder HH_DATA_DIR "$HH_DATA_DIR"
python tools/dev/make_smollm2.py --output_dir outputs/smollm2/SmolLM2-135M

# ---- data: the first pairs that have at most 800 characters, as about half of them; golden is what people preferred
python - "$HH_DATA_DIR" outputs/game_smollm2_data <<'END'
import sys
from pathlib import Path

from apo.cli import InputError, exit_on_input_error, write_json
from apo.records import SEPARATOR, iter_records

source, target = Path(sys.argv[1]), Path(sys.argv[2])


def short_pairs(name):
    records = [record for _, record in iter_records(source / name)]
    sizes = [len(record["text"][0]) + len(record["text"][1].split(SEPARATOR)[1]) for record in records]
    return [record for record, size in zip(records, sizes, strict=True) if size <= 800]


def golden(records):
    rows = [(record["query_id"], *record["text"][0].split(SEPARATOR)) for record in records]
    return [dict(zip(("query_id", "query", "golden"), row, strict=True)) for row in rows]


@exit_on_input_error
def main():
    rm, llm = short_pairs("rm_data/hh_split_rm.train.json"), short_pairs("llm_data/hh_split_llm.train.json")
    test = short_pairs("eval_data/hh_cleaned_origin.test.json")
    if len(rm) < 600 or len(llm) < 200 or len(test) < 360:
        raise InputError(f"{source}: found {len(rm)}, {len(llm)} and {len(test)} short pairs, expected 600, 200 and 360")
    parts = {"human_train": rm[:600], "human_all": rm + llm, "human_test": test[:200], "rm_golden": golden(rm[:120])}
    parts |= {"llm_prompts": llm[:200], "eval_golden": golden(test[200:260]), "test_prompts": golden(test[260:360])}
    for name, records in parts.items():
        write_json(target / f"{name}.json", records)


main()
END

# ---- the testing RM, which judges both games
python train.py --config configs/runs/smollm2_rm_testing.yaml

python play.py --config configs/game_smollm2.yaml
python play.py --config configs/game_smollm2.yaml --apo false --output_dir outputs/game_smollm2_control
