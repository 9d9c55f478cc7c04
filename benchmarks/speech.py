"""What training a talker costs: seconds a step, frames and tokens a second, and a process' peak memory.

    python benchmarks/speech.py

Each line is an `omniloom train` of its own, one after another, on text rows whose answers have codes at random, with a
random model of some 20M parameters in its thinker. The first two steps are left out. Peak memory is of the process
as the kernel counts it (`ru_maxrss`), the interpreter and its libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from omniloom.tools.tiny import make_tiny

FRAMES = 75  # of each answer: 6 seconds of Qwen3-Omni's codes
FULL, LORA = "{freeze: false}", "{lora: {rank: 16}}"
CASES = {
    "thinker alone": ("text: " + FULL, "lm_head: " + FULL),
    "talker alone": ("talker: " + FULL,),
    "LoRA on the talker": ("talker: " + LORA,),
    "thinker and talker": ("text: " + FULL, "lm_head: " + FULL, "talker: " + FULL),
}
TALKERS = {  # sizes of the talker: as those of the thinker, and codebooks as published
    "qwen3_omni": {
        "talker_config.num_code_groups": 16,
        "talker_config.text_config.hidden_size": 128,
        "talker_config.text_config.num_hidden_layers": 6,
        "talker_config.text_config.num_experts": 16,
        "talker_config.text_config.vocab_size": 3072,
        "talker_config.code_predictor_config.num_code_groups": 16,
        "talker_config.code_predictor_config.hidden_size": 128,
        "talker_config.code_predictor_config.num_hidden_layers": 3,
        "talker_config.code_predictor_config.layer_types": ["full_attention"] * 3,
        "talker_config.code_predictor_config.vocab_size": 2048,
    },
    "qwen2_5_omni": {
        "talker_config.hidden_size": 128,
        "talker_config.intermediate_size": 512,
        "talker_config.num_hidden_layers": 6,
    },
}


def write_rows(path: Path, num_groups: int, num_codes: int, num_rows: int) -> None:
    draw = random.Random(0)
    rows = []
    for _ in range(num_rows):
        codes = [[draw.randrange(num_codes) for _ in range(FRAMES)] for _ in range(num_groups)]
        words = " ".join(draw.choice(["one", "two", "three", "four"]) for _ in range(20))
        answer = {"role": "assistant", "content": words, "speech": codes, "speaker": "ethan"}
        rows.append({"messages": [{"role": "user", "content": "Say something to me."}, answer]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(folder: Path, name: str, policy: tuple[str, ...], steps: int) -> str:
    """A line of the table."""
    run = folder / name.replace(" ", "_")
    words = [f"model.path={folder / 'model'}", "model.dtype=float32", "model.modalities=[text]", "data.workers=0"]
    words += [f"data.train={folder / 'rows.jsonl'}", "data.pack_tokens=1024", "train.packs_per_step=1"]
    words += [f"train.run_dir={run}", f"train.steps={steps}", f"policy={{{', '.join(policy)}}}"]
    words += ["checkpoint.export=false", "checkpoint.every=0", "log.tensorboard=false"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "omniloom.cli", "train", *words], stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError((folder / "log").read_text()[-2000:])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
    seconds = statistics.median(line["step_seconds"] for line in lines)
    total = sum(line["step_seconds"] for line in lines)
    tokens, samples = (sum(line[key] for line in lines) for key in ("num_tokens", "num_samples"))
    frames = f"{samples * FRAMES / total:,.0f}" if "alone" not in name or "talker" in name else ""
    return f"| {name} | {seconds:.3f} | {frames} | {tokens / total:,.0f} | {used.ru_maxrss / 2**20:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_omni", choices=TALKERS)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    groups = TALKERS[given.family].get("talker_config.num_code_groups", 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny(given.family, folder / "model", size="20m", overrides=TALKERS[given.family])
        write_rows(folder / "rows.jsonl", groups, 64 if groups == 1 else 2048, 20 * given.steps)
        print("| what trains | s a step | frames/s | tokens of text/s | peak GiB |\n|---|---|---|---|---|")
        for case, policy in CASES.items():
            print(measure(folder, case, policy, given.steps), flush=True)


if __name__ == "__main__":
    main()
