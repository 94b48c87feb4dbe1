"""Sampled responses + their rewards -> the best response to each prompt, training data for the LLM, a report.

example:
    python tools/rejection_sampling.py --data_path data/sample/rm_data/hh_split_rm_llm_v0.sample.json \\
        --score_path outputs/scores/hh_split_rm_llm_v0.sample_pred_rm_apo_results.json \\
        --output_dir outputs/rejection_sampling --output_file_name best.json --to_pairs

The rewards are what `train.py --task_type inference` wrote for the same file, which is checked. The tool writes

    best.json                the records with two more fields: "target", the best response, and "scores", all rewards
    best_report.json, .png   expected reward of the best of 1, 2, ... responses; plot: lengths of chosen and rejected
    best_pairs.json          with --to_pairs, for DPO: {"prompt", "chosen", "rejected", "query_id"}, best over worst
    best_text_scores.json    with --to_pairs, for RRHF: {"text": ["<query><sep><response>", ...], "scores", "query_id"}

An empty response is never chosen or rejected, and counts in no average. Among equal rewards the first response is the
best. A prompt whose responses are all empty is left out and reported: a few empty responses do not stop a round.
"""

import argparse
import logging
from pathlib import Path

from apo import selection
from apo.cli import InputError, OneLineParser, exit_on_input_error, first_few, write_json
from apo.figures import plot_best_of_n
from apo.resume import refuse_overwriting

logger = logging.getLogger(__name__)


def name_outputs(output_dir: Path, file_name: str | None, score_path: Path, with_pairs: bool) -> dict[str, Path]:
    """Returns the paths of all files to write, by their content.

    The default name is the reference's. So is the rule that a name with a folder is not put into `output_dir`.
    """
    name = Path(file_name or f"{score_path.name}_sft.json")
    target = output_dir / name if name.name == str(name) else name
    endings = {"report": "_report.json", "figure": "_report.png"}
    if with_pairs:
        endings |= {"pairs": "_pairs.json", "text_scores": "_text_scores.json"}
    stem = target.name.removesuffix(".json")
    return {"target": target, **{content: target.with_name(stem + ending) for content, ending in endings.items()}}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    add = (parser := OneLineParser(description=__doc__)).add_argument
    add("--data_path", type=Path, required=True, help='records of "query_id", "query", "sample_0", ...')
    add("--score_path", type=Path, required=True, help="<data>_pred_<suffix>_results.json of train.py, or its folder")
    add("--rm_scorer", help="<suffix> of that file, for a folder with the rewards of several models")
    add("--response_keys", nargs="+", default=[], help="those of train.py, if the rewards were made with any")
    add("--output_dir", type=Path, default=Path(), help="folder to write to (default: this one)")
    add("--output_file_name", help="names the other files as well (default: <file name of the rewards>_sft.json)")
    add("--allow_changes", action="store_true", help="take rewards that were made from other data or another model")
    add("--to_pairs", action="store_true", help="also write pairs of best over worst (DPO) and all responses (RRHF)")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Reads responses and rewards, chooses, writes, prints the report."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    args = parse_args()
    score_path = selection.find_score_file(args.data_path, args.score_path, args.rm_scorer)
    outputs = name_outputs(args.output_dir, args.output_file_name, score_path, args.to_pairs)

    scored = selection.load_scored_prompts(args.data_path, score_path, args.response_keys)
    hashes = selection.check_origin(args.data_path, score_path, args.allow_changes)
    prompts = [prompt for prompt in scored if prompt.candidates]
    empty = [prompt.query_id for prompt in scored if not prompt.candidates]
    if not prompts:
        raise InputError(f"{args.data_path}: all responses to all {len(scored)} prompts are empty; expected some text")
    if empty:
        logger.warning("%d prompts left out, all responses are empty: %s", len(empty), first_few(empty))

    pairs = selection.to_pairs(prompts)
    report = {"data": str(args.data_path), "rewards": str(score_path), **hashes}
    report |= {"prompts": len(prompts), "prompts_left_out": empty, "ties": selection.share_of_ties(prompts)}
    report |= {"best_of_n": selection.best_of_n(prompts), "pairs": len(pairs)}

    for output in outputs.values():
        refuse_overwriting(args.data_path, output)
        refuse_overwriting(score_path, output)
    records = [{**p.record, "target": p.responses[p.candidates[0]], "scores": p.rewards} for p in prompts]
    write_json(outputs["target"], records)
    if args.to_pairs:
        write_json(outputs["pairs"], pairs)
        write_json(outputs["text_scores"], selection.to_text_scores(prompts))
    write_json(outputs["report"], report)
    plot_best_of_n(outputs["figure"], report["best_of_n"], pairs)

    print(f"{report['prompts']} prompts, {report['ties']:.1%} with a tie for the best response")
    for row in report["best_of_n"]:
        interval = "" if row["interval_95"] is None else " [{:.4f}, {:.4f}]".format(*row["interval_95"])
        print(f"best of {row['n']}: expected reward {row['mean']:.4f}{interval}, {row['prompts']} prompts")
    print(f"{report['pairs']} pairs of best over worst")
    print(f"written: {', '.join(map(str, outputs.values()))}")


if __name__ == "__main__":
    main()
